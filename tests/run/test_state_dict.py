"""The state of each part of a run: restored to the bit through JSON, and refused by the name of a damaged entry."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.evaluation.evaluator import Evaluator
from grpo.generation.decoding import Decoder
from grpo.model.loading import load
from grpo.record.metrics import Metrics
from grpo.resume import Progress
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.scoring.scorer import DENSE
from tasks.arithmetic import Arithmetic
from tests.helpers.runs import SETTINGS

EVALUATION = {"step": 2, "split": "validation", "accuracy": 0.5, "n": 8, "ci_low": 0.2, "ci_high": 0.8}
OUTLOOK = {"groups": 2, "num_generations": 8, "teaching": 0.5, "all_right": 0.0, "pass_at_1": 0.2, "pass_at_g": 1.0}
OUTLOOK |= {"well_formed": 1.0, "truncated": 0.0}
FINDING = {"name": "too_easy", "step": 1, "text": "Too easy."}
CONFIG = TrainConfig(**{name: value for name, value in SETTINGS.items() if name != "max_operand"})


def a_grpo(model):
    """Return GRPO on the tiny model, with a reference that changes and so belongs to the state."""
    config = TrainConfig(**{**SETTINGS, "ref_model_sync_steps": 1, "model": str(model)})
    return GRPO(config, Arithmetic(max_operand=1), load(str(model), torch.device("cpu")))


@pytest.fixture(scope="module")
def grpo_state(model):
    """Return the state of GRPO after a step."""
    grpo = a_grpo(model)
    grpo.step(1)
    return copy.deepcopy(grpo.state_dict())


@pytest.fixture(scope="module")
def evaluator_state(model):
    """Return the state of an evaluator that has recorded the start."""
    evaluator = an_evaluator()
    evaluator.remember_start(load(str(model), torch.device("cpu")))
    return evaluator.state_dict()


def an_evaluator():
    return Evaluator(CONFIG, Arithmetic(max_operand=1), {}, Decoder())


def through_json(state):
    return json.loads(json.dumps(state))


def plain(state):
    """Return a state with lists in place of tensors, so that == compares every number."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def damaged(state, path, value):
    """Return a copy of a state with another value at a path of names; the value `...` removes the entry."""
    state = copy.deepcopy(state)
    *folders, name = path.split("/")
    place = state
    for folder in folders:
        place = place[folder]
    place[name] = value(place[name]) if callable(value) else value
    if value is ...:
        del place[name]
    return state


def assert_refused(owner, load_state, state, entry):
    """Assert that an owner refuses a state in one line that names the entry, and stays as it was."""
    before = plain(copy.deepcopy(owner.state_dict()))
    with pytest.raises(ValueError, match=rf"^(invalid entries: {entry}|its {entry} cannot be[^\n]*)$"):
        load_state(state)
    assert plain(owner.state_dict()) == before


# --- progress ---

PROGRESS = {"step": 2, "before": EVALUATION, "best": EVALUATION}
START = {"step": 0, "before": {}, "best": None}


@pytest.mark.parametrize(
    ("state", "step", "sft_step"),
    [
        (PROGRESS, 2, 0),  # written before there were supervised steps
        (START, 0, 0),
        (START | {"step": 3, "sft_step": 3}, 0, 3),
        (PROGRESS | {"step": 9, "sft_step": 4}, 5, 4),
    ],
    ids=["later", "at the start", "in supervised steps", "after them"],
)
def test_progress_is_restored(state, step, sft_step):
    # a checkpoint counts the steps of both kinds
    progress = Progress()
    progress.load_state_dict(through_json(state))
    assert (progress.step, progress.sft_step, progress.total) == (step, sft_step, state["step"])
    assert {"step": progress.total, **progress.state_dict()} == {"sft_step": 0, **state}


@pytest.mark.parametrize("value", [-1, 3, 0.5, "1", None, [1]])
def test_more_supervised_steps_than_steps_are_refused_by_name(value):
    with pytest.raises(ValueError, match="sft_step"):
        Progress().load_state_dict(PROGRESS | {"sft_step": value})


@pytest.mark.parametrize("entry", ["before", "best"])
@pytest.mark.parametrize(
    "value",
    [..., 3, "good", [], {"step": 2}, {**EVALUATION, "accuracy": float("nan")}, {**EVALUATION, "n": None}],
    ids=str,
)
def test_damaged_progress_is_refused_by_name(entry, value):
    progress = Progress()
    assert_refused(progress, progress.load_state_dict, damaged(PROGRESS, entry, value), entry)


def test_every_damaged_entry_is_named():
    with pytest.raises(ValueError, match=r"invalid entries: before, best"):
        Progress().load_state_dict({"step": 2, "before": 3})


# --- evaluator ---


def test_an_evaluator_is_restored(model, evaluator_state):
    evaluator = an_evaluator()
    evaluator.load_state_dict({**through_json(evaluator_state), "evaluate_limit": 7})
    assert evaluator.state_dict() == {**evaluator_state, "evaluate_limit": 7}
    assert evaluator.start.drift(load(str(model), torch.device("cpu")), rows_per_pass=7) == pytest.approx(0, abs=1e-6)
    evaluator.load_state_dict({"start": None})  # the first version had no limit
    assert evaluator.start is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("evaluate_limit", value) for value in ("4", -1, 2.5, None, True)),
        *(("start", value) for value in (3, [], {}, "answers")),
        *((f"start/{name}", value) for name in ("prompts", "answers", "logprobs") for value in (..., [], "a", [[]])),
        *(("start/answers", lambda rows: rows[:-1]), ("start/prompts", lambda rows: [[-1], *rows[1:]])),
        ("start/logprobs", lambda rows: [rows[0][:-1], *rows[1:]]),
        ("start/logprobs", lambda rows: [[float("nan")] * len(rows[0]), *rows[1:]]),
    ],
)
def test_a_damaged_evaluator_is_refused_by_name(path, value, evaluator_state):
    evaluator = an_evaluator()
    evaluator.load_state_dict(evaluator_state)
    state = damaged(evaluator_state, path, value)
    assert_refused(evaluator, evaluator.load_state_dict, state, path.partition("/")[0])


# --- metrics ---

METRICS = {"steps": [{"step": 1, "kl": None}, {"step": 2, "kl": 0.5}], "evals": [EVALUATION], "findings": [FINDING]}


def test_metrics_are_restored():
    metrics = Metrics(None, {}, {})
    metrics.load_state_dict(through_json(METRICS), 2)
    # a run from before there was an outlook or supervised steps
    assert metrics.state_dict() == {"before_sft": None, "sft": [], "outlook": None, "changed_files": [], **METRICS}


def test_the_supervised_steps_are_restored():
    metrics, state = Metrics(None, {}, {}), METRICS | {"before_sft": EVALUATION, "sft": [{"step": 1, "loss": 2.0}]}
    metrics.load_state_dict(through_json(state), 2, 1)
    assert metrics.state_dict() == {"outlook": None, "changed_files": [], **state}
    for name, value in (("sft", []), ("sft", [{"step": 2}]), ("sft", {}), ("before_sft", 3), ("before_sft", {})):
        with pytest.raises(ValueError, match=name):
            metrics.load_state_dict(state | {name: value}, 2, 1)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("outlook", value) for value in (3, [], {}, {"groups": 1}, OUTLOOK | {"teaching": 2.0})),
        ("outlook", OUTLOOK | {"groups": "x"}),
        ("outlook", {name: value for name, value in OUTLOOK.items() if name != "num_generations"}),
        *((entry, value) for entry in METRICS for value in (..., None, 3, "all", {}, [1], [{}])),
        *(("steps", rows) for rows in ([], [{"step": 1}], [{"step": 2}, {"step": 1}], [{"step": 1}] * 2)),
        ("steps", [{"step": 1, "kl": "small"}, {"step": 2}]),
        ("steps", [{"step": 1, "kl": float("nan")}, {"step": 2}]),
        *(("evals", [{k: v for k, v in EVALUATION.items() if k != name}]) for name in EVALUATION),
        *(("findings", [{k: v for k, v in FINDING.items() if k != name}]) for name in FINDING),
        ("findings", [{**FINDING, "examples": [1]}]),
        ("changed_files", [{"step": 1}]),
        ("changed_files", [{"step": 1, "files": {"mine.py": 3}}]),
    ],
)
def test_damaged_metrics_are_refused_by_name(entry, value):
    metrics = Metrics(None, {}, {})
    assert_refused(metrics, lambda state: metrics.load_state_dict(state, 2), damaged(METRICS, entry, value), entry)


# --- GRPO ---


def test_grpo_is_restored_to_the_bit(model, grpo_state):
    whole, resumed = a_grpo(model), a_grpo(model)
    whole.step(1)
    resumed.load_state_dict(copy.deepcopy(grpo_state), keep_limits=True)
    assert plain(resumed.state_dict()) == plain(grpo_state)
    for grpo in (whole, resumed):
        grpo.step(2)
    assert plain(resumed.state_dict()) == plain(whole.state_dict())
    assert plain(resumed.state_dict()) != plain(grpo_state), "or it would prove nothing"


@pytest.mark.parametrize("keep_limits", [True, False])
def test_the_rows_of_a_pass_are_restored_where_they_are_kept(keep_limits, model, grpo_state):
    grpo = a_grpo(model)
    before = grpo.state_dict()["limits"]
    grpo.load_state_dict({**grpo_state, "limits": {"sample": 3, "update": 5}}, keep_limits)
    assert grpo.state_dict()["limits"] == ({"sample": 3, "update": 5} if keep_limits else before)


def test_grpo_takes_the_state_of_the_first_version(model, grpo_state):
    grpo = a_grpo(model)
    state = {name: value for name, value in grpo_state.items() if name not in ("limits", "beta")}
    grpo.load_state_dict({**state, "reference": None}, keep_limits=True)
    assert grpo.schedule.beta == grpo.config.beta


def first_matrix(change):
    """Return a change of the first matrix among named tensors."""

    def changed(tensors):
        name = next(name for name in sorted(tensors) if tensors[name].dim() == 2)
        return {**tensors, name: change(tensors[name])}

    return changed


TENSORS = {
    "too few": lambda tensors: dict(list(tensors.items())[1:]),
    "too many": lambda tensors: {**tensors, "more": torch.zeros(2)},
    "another shape": first_matrix(lambda tensor: tensor[:, :-1]),
    "a shape that would be repeated": first_matrix(lambda tensor: tensor[:, :1]),
    "none": lambda tensors: {},
}
OTHER_TYPE = first_matrix(lambda tensor: tensor.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("path", "value", "entry"),
    [
        *(("beta", value, "beta") for value in ("small", None, float("nan"), float("inf"), True)),
        *(("skipped_in_a_row", value, "skipped_in_a_row") for value in (..., "0", -1, 0.5, None)),
        *(("limits", value, "limits") for value in ([1], "4", {}, {"update": 4}, {"sample": 4, "update": "4"})),
        *(("policy", change, "weights") for change in (*TENSORS.values(), OTHER_TYPE)),
        *(("reference", change, "reference") for change in (*TENSORS.values(), OTHER_TYPE)),
        *(("optimizer", change, "optimizer state") for name, change in TENSORS.items() if name != "none"),
        ("optimizer", lambda tensors: {**tensors, "999.step": torch.zeros(())}, "optimizer state"),
        ("optimizer", lambda tensors: {**tensors, "-1.step": torch.zeros(())}, "optimizer state"),
        ("optimizer", lambda tensors: {**tensors, "step": torch.zeros(())}, "optimizer state"),
    ],
)
def test_a_damaged_grpo_is_refused_by_name(path, value, entry, model, grpo_state):
    grpo = a_grpo(model)
    state = damaged(grpo_state, path, value)
    assert_refused(grpo, lambda state: grpo.load_state_dict(state, keep_limits=True), state, entry)


def test_a_restored_optimizer_continues_to_the_same_bits():
    def an_updater():
        torch.manual_seed(0)
        config = SimpleNamespace(gradient_checkpointing=False, learning_rate=0.1)
        return Updater(torch.nn.Linear(4, 3), config, DENSE, AdaptiveMicrobatch("the update", 2, 2))

    def train(updater, steps):
        for step in steps:
            updater.optimizer.zero_grad()
            updater.policy(torch.full((2, 4), float(step))).square().sum().backward()
            updater.optimizer.step()

    whole, resumed = an_updater(), an_updater()
    train(whole, range(3))
    resumed.load_state_dict(**copy.deepcopy(whole.state_dict()))
    train(whole, range(3, 6))
    train(resumed, range(3, 6))
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_reward_chooses_until_an_answer_is_right_and_accuracy_from_then_on():
    nothing_right = Progress(best={"accuracy": 0.0, "reward": 0.5})
    assert nothing_right.is_better({"accuracy": 0.0, "reward": 0.6})
    assert not nothing_right.is_better({"accuracy": 0.0, "reward": 0.5})
    assert nothing_right.is_better({"accuracy": 0.1})
    some_right = Progress(best={"accuracy": 0.1})
    assert not some_right.is_better({"accuracy": 0.0, "reward": 9.0})
    assert not some_right.is_better({"accuracy": 0.1})
