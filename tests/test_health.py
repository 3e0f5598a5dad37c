"""Every finding with a run that has the illness and one that has not, and no finding in a healthy run.

Most runs here are written down, as a healthy one with one thing changed. Those that can be had in seconds are real.
"""

import copy
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo import illnesses, report, trainer
from grpo.checkpoint import newest_checkpoint
from grpo.health import CHECKS, findings, new_findings
from grpo.learner import sampler_gap
from grpo.metrics import load_metrics
from grpo.rollout import RolloutBatch
from tests.runs import a_tiny_model, options

FIXTURES = Path(__file__).parent / "fixtures"
HEALTHY = [json.loads((FIXTURES / f"healthy_seed_{seed}.json").read_text(encoding="utf-8")) for seed in (0, 1, 2)]
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def changed(steps=None, evals=None, config=None, first=1, tests=None, length=80):
    """The healthy run with other values of some metrics from step `first` on; a function gets the step."""
    record = copy.deepcopy(HEALTHY[0])
    record["steps"] = record["steps"][:length]
    record["config"] |= config or {}
    for row in record["steps"]:
        if row["step"] >= first:
            row |= {name: of(value, row["step"]) for name, value in (steps or {}).items()}
    for row in record["evals"]:
        if row["split"] == "validation":
            row |= {name: of(value, row["step"]) for name, value in (evals or {}).items()}
    for row, more in zip([e for e in record["evals"] if e["split"] == "test"], tests or (), strict=False):
        row |= more
    record["evals"] = [e for e in record["evals"] if e["step"] <= length]
    return record


def of(value, step):
    return value(step) if callable(value) else value


def accuracy(value):
    """Validation accuracies, with the interval of 500 problems."""
    return {
        "accuracy": value,
        "ci_low": lambda step: of(value, step) - 0.04,
        "ci_high": lambda step: of(value, step) + 0.04,
    }


def names(record):
    return [finding.name for finding in findings(record)]


FLAT = accuracy(0.3)
WRONG = {"accuracy": 0.3, "tied_all_right_fraction": 0.1}
RISES = {"reward_mean": lambda step: 0.3 + step / 100, "reward_std": 0.2}
SKILLS = {name: {"accuracy": 0.9, "n": 500, "ci_low": 0.87, "ci_high": 0.92} for name in ("single", "letters")}
LOST = SKILLS | {"single": {"accuracy": 0.8, "n": 500, "ci_low": 0.76, "ci_high": 0.83}}
LESS = SKILLS | {"single": {"accuracy": 0.89, "n": 500, "ci_low": 0.86, "ci_high": 0.91}}


def every(n, value, otherwise):
    return lambda step: value if step % n == 0 else otherwise


# finding: a run that has it, runs near to it that have not
SICK_AND_WELL = {
    "too_easy": (
        {"steps": {"tied_all_right_fraction": 0.95}},
        [{"steps": {"tied_all_right_fraction": 1.0}, "first": 11}],  # it has learned it
    ),
    "too_hard": (
        {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.0}, "evals": accuracy(0.0)},
        [
            {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.05}, "evals": accuracy(0.3)},
            {"steps": {"tied_all_wrong_fraction": 0.6, "accuracy": 0.05}, "evals": accuracy(0.0)},
            {"steps": {"tied_all_wrong_fraction": 1.0}, "evals": accuracy(0.0), "length": 19},
        ],
    ),
    "reward_hacking": (
        {"steps": RISES | WRONG, "evals": FLAT},
        [
            {"steps": RISES | WRONG},  # the held-out accuracy rises
            {"steps": {"reward_mean": 0.5} | WRONG, "evals": FLAT},
            {"steps": {"reward_mean": every(2, 0.2, 0.8), "reward_std": 0.2} | WRONG, "evals": FLAT},  # noise
            {"steps": RISES | WRONG, "evals": FLAT, "length": 19},
            {"steps": RISES | {"accuracy": lambda step: step / 100}, "evals": FLAT},  # it learns, by heart
            {"steps": RISES | WRONG, "evals": FLAT | {"well_formed": lambda step: min(1.0, step / 30)}},
        ],
    ),
    "format_only": (
        {"evals": FLAT | {"well_formed": lambda step: min(1.0, step / 20)}},
        [
            {"evals": {"well_formed": lambda step: min(1.0, step / 20)}},
            {"evals": FLAT},
            {"evals": FLAT | {"well_formed": lambda step: step / 100}},
        ],
    ),
    "overfitting": (
        {"steps": {"accuracy": lambda step: min(1.0, 0.3 + step / 50)}, "evals": FLAT},
        [{"steps": {"accuracy": lambda step: min(1.0, 0.3 + step / 50)}}, {"steps": WRONG, "evals": FLAT}],
    ),
    "past_peak": (
        {"evals": accuracy(lambda step: 0.9 if step == 30 else 0.7)},
        [
            {"evals": accuracy(lambda step: 0.9 if step == 30 else 0.85)},  # noise
            {"evals": accuracy(lambda step: 0.5 if step == 40 else 0.9)},  # once
        ],
    ),
    "forgetting": (
        {"evals": {"drift": lambda step: step / 100}},
        [{"evals": {"drift": 0.1}}, {"evals": {"drift": None}}, {"tests": [{"skills": SKILLS}, {"skills": LESS}]}],
    ),
    "reward_scale": (
        {"steps": {"reward_std/exact": 0.4, "reward_std/length": 0.005}},
        [
            {"steps": {"reward_std/exact": 0.4, "reward_std/length": 0.05}},
            {"steps": {"reward_std/exact": 0.4, "reward_std/format": every(5, 0.005, None)}},  # hardly ever differs
            {"steps": {"reward_std": 50.0}},  # divided by
            {"steps": {"reward_std": 0.5}, "config": {"scale_rewards": "none"}},
        ],
    ),
    "kl_diverging": ({"steps": {"kl": 1.5}}, [{"steps": {"kl": 0.7}}, {"steps": {"kl": every(20, 5.0, 0.2)}}]),
    "kl_spike": (
        {"steps": {"kl": every(50, 2.0, 0.05)}},
        [{"steps": {"kl": every(50, 0.4, 0.001)}}, {"steps": {"kl": lambda step: step / 100}}],
    ),
    "entropy_collapsed": (
        {"steps": {"entropy": 0.003, "accuracy": 0.3}, "first": 20},
        [
            {"steps": {"entropy": 0.003, "accuracy": 0.95}, "first": 20},  # sure, and right
            {"steps": {"entropy": 0.1, "accuracy": 0.3}, "first": 20},
            {"steps": {"entropy": 0.003, "accuracy": 0.3}},  # as it was from the start
        ],
    ),
    "truncated": (
        {"steps": {"truncated_fraction": 0.7}},
        [{"steps": {"truncated_fraction": 0.4}}, {"steps": {"truncated_fraction": every(4, 1.0, 0.2)}}],
    ),
    "never_ends": ({"steps": {"truncated_fraction": 1.0}}, [{"steps": {"truncated_fraction": 0.9}}]),
    "ends_at_once": (
        {"steps": {"empty_fraction": 0.8}},
        [{"steps": {"empty_fraction": 0.3}}, {"steps": {"empty_fraction": 1.0}, "config": {"max_new_tokens": 1}}],
    ),
    "repeated_endings": (
        {"steps": {"repeated_endings_fraction": 0.3}},
        [{"steps": {"repeated_endings_fraction": every(10, 0.5, 0.0)}}],
    ),
    "gradient_spikes": (
        {"steps": {"grad_norm": every(10, 90.0, 1.5)}},
        [
            {"steps": {"grad_norm": every(50, 90.0, 1.5)}},  # one
            {"steps": {"grad_norm": every(10, 4.0, 0.01)}},  # clipping takes no notice
            {"steps": {"grad_norm": 90.0}},
        ],
    ),
    "updates_skipped": ({"steps": {"skipped_updates": every(40, 2, 0)}}, [{"steps": {"skipped_updates": 0}}]),
    "clipping": (
        {"steps": {"clip_fraction": 0.5}},
        [{"steps": {"clip_fraction": 0.15}}, {"steps": {"clip_fraction": every(5, 0.9, 0.05)}}],
    ),
    "learning_rate_small": (
        {"steps": {"weights_moved": 0.02}},
        [
            {"steps": {"weights_moved": every(2, 0.0, 0.9)}},
            {"steps": {"weights_moved": 0.0, "grad_norm": 0.0}},  # nothing to learn from
            {"steps": {"weights_moved": 0.0, "learning_rate": 1e-9}},  # the end of a decay
            {"steps": {"weights_moved": 0.0, "skipped_updates": 5}},
            {"steps": {"kl": 1e-7}, "length": 49},
        ],
    ),
    "sampler_gap": (
        {"steps": {"sampler_gap": 0.3}},
        [{"steps": {"sampler_gap": 1e-4}}, {"steps": {"sampler_gap": every(20, 0.05, 0.0)}}],
    ),
}
MORE_SICK = [
    ("too_hard", {"steps": {"tied_all_wrong_fraction": 0.5, "accuracy": 0.01}, "tests": [{}, {"accuracy": 0.01}]}),
    (
        "reward_hacking",
        {"steps": {"tied_groups_fraction": 1.0, "tied_all_right_fraction": 0.2} | {"reward_mean": 1.0}},
    ),
    (
        "reward_hacking",  # form and accuracy cannot excuse a fall
        {"steps": RISES, "evals": accuracy(lambda step: 0.3 - step / 400) | {"well_formed": lambda step: step / 80}},
    ),
    ("forgetting", {"tests": [{"skills": SKILLS}, {"skills": LOST}]}),
    ("reward_scale", {"steps": {"reward_std": 50.0}, "config": {"scale_rewards": "none"}}),
    ("reward_scale", {"steps": {"reward_std": 1e-4, "tied_groups_fraction": 0.0}}),
    ("learning_rate_small", {"steps": {"kl": 1e-8}}),
    (
        "learning_rate_small",
        {"steps": {"weights_moved": 0.0, "learning_rate": 0.0}, "config": {"learning_rate": 0.0}},
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_default_run_has_no_finding(seed):
    assert len(HEALTHY[seed]["steps"]) == 80
    assert findings(HEALTHY[seed]) == []


def test_every_finding_has_a_sick_run_and_a_line_in_the_readme():
    assert set(SICK_AND_WELL) == set(CHECKS)
    section = README[README.index("## When a run does not learn") :]
    assert re.findall(r"^\| `(\w+)` \|", section[: section.index("\n## ", 4)], re.MULTILINE) == list(CHECKS)


@pytest.mark.parametrize(("name", "sick"), [*((name, sick) for name, (sick, _) in SICK_AND_WELL.items()), *MORE_SICK])
def test_a_finding_fires_on_its_sick_run_once_and_says_what_to_do(name, sick):
    record = changed(**sick)
    [finding] = [f for f in findings(record) if f.name == name]
    assert 1 <= finding.step <= 80
    assert math.isfinite(finding.figure)
    assert re.search(r"\d", finding.text)  # the figure
    assert " --" in finding.text or "(--" in finding.text  # what to change
    known = set(re.findall(r"`(--[\w-]+)`", README[README.index("## Settings") :]))
    assert set(re.findall(r"--[a-z][\w-]*", finding.text)) <= known
    json.dumps(asdict(finding), allow_nan=False)
    assert new_findings(record, list(CHECKS)) == []


@pytest.mark.parametrize(
    ("name", "well"), [(name, well) for name, (_, all_well) in SICK_AND_WELL.items() for well in all_well]
)
def test_a_finding_is_silent_on_a_run_that_only_looks_like_it(name, well):
    assert name not in names(changed(**well))


@pytest.mark.parametrize("sick", [sick for sick, _ in SICK_AND_WELL.values()], ids=list(SICK_AND_WELL))
def test_a_run_that_asks_after_every_step_finds_what_the_whole_record_shows(sick):
    record, seen = changed(**sick), []
    so_far = {**record, "steps": [], "evals": []}

    def ask():
        seen.extend(new_findings(so_far, [f.name for f in seen]))

    first_test, *evals, last_test = record["evals"]
    so_far["evals"] += [first_test, evals[0]]
    ask()
    for row in record["steps"]:
        so_far["steps"].append(row)
        ask()
        if due := [e for e in evals if e["step"] == row["step"]]:
            so_far["evals"].extend(due)
            ask()
    so_far["evals"].append(last_test)
    ask()
    assert seen == findings(record)


def test_a_record_with_nulls_or_without_the_newer_metrics_raises_nothing():
    assert findings({"config": {}, "steps": [], "evals": []}) == []
    for record in HEALTHY:
        for keep in (["step"], ["step", "reward_mean", "accuracy", "kl"]):
            rows = [{name: row.get(name) for name in keep} for row in record["steps"]]
            assert findings({**record, "steps": rows}) == []
            nulls = [dict.fromkeys(row, None) | {"step": row["step"]} for row in record["steps"]]
            assert findings({**record, "steps": nulls}) == []
        measured = ("step", "split", "accuracy", "n", "ci_low", "ci_high")
        assert findings({**record, "evals": [{name: e[name] for name in measured} for e in record["evals"]]}) == []


def test_what_is_too_hard_says_why_where_it_can():
    for well_formed in (0.0, 1.0):
        sick = SICK_AND_WELL["too_hard"][0]
        evals = sick["evals"] | {"well_formed": well_formed}
        record = changed(**sick | {"evals": evals, "config": {"task": "reverse"}})
        [finding] = [f for f in findings(record) if f.name == "too_hard"]
        assert ("the form that the prompt asks for" in finding.text) == (well_formed == 0)
        assert "tokens hide the letters" in finding.text


def test_a_finding_is_a_paragraph_as_wide_as_the_terminal_and_a_model_cannot_colour_it(capsys, monkeypatch):
    finding = {"name": "reward_hacking", "step": 7, "text": "word --some-option " * 30, "examples": ["a\x1b[31mb\nc"]}
    for columns, widest in (("60", 60), ("250", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        report.show_finding(finding)
        lines = capsys.readouterr().out.splitlines()
        assert widest - 20 <= max(map(len, lines)) <= widest
        assert lines[0].startswith("step    7  reward_hacking: word")
        assert lines[-1] == "    a\\x1b[31mb\\nc"
        assert "--some-option" in lines[1]


# Real runs, of a model of a few kilobytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, which answers some digit in answer tags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
        yield a_tiny_model(tmp_path_factory.mktemp("health") / "model")


def run(model, folder, *more, **settings):
    """A tiny run to its end; its output and record."""
    settings = {"num_iterations": 24, "eval_every": 8, "eval_problems": 40, "max_operand": 2} | settings
    result = CliRunner().invoke(train_grpo.main, [*options(model=model, output_dir=folder, **settings), *more])
    return result, load_metrics(folder)


def found(record):
    assert [f["name"] for f in record["findings"]] == names(record)  # the file says what the run said
    return {f["name"]: f for f in record["findings"]}


def test_a_reward_for_the_form_only_is_named_as_hacking_with_examples(tiny, tmp_path):
    result, record = run(tiny, tmp_path, "--reward", "format=1", max_new_tokens=12)
    finding = found(record)["reward_hacking"]
    assert len(finding["examples"]) == 2
    assert all("wrong" in text for text in finding["examples"])
    assert result.stdout.count("reward_hacking:") == 2  # when it arises, and at the end
    assert "Done after step 24" in result.stdout.rpartition("reward_hacking:")[0]


def test_a_limit_that_cuts_completions_off_is_named(tiny, tmp_path):
    _, record = run(tiny, tmp_path, max_new_tokens=3, num_iterations=12)
    assert "never_ends" in found(record)


def test_a_learning_rate_that_moves_nothing_is_named_and_one_that_does_is_not(tiny, tmp_path):
    _, record = run(tiny, tmp_path / "small", max_new_tokens=12, learning_rate=1e-12, num_iterations=12)
    assert "learning_rate_small" in found(record)
    _, record = run(tiny, tmp_path / "right", max_new_tokens=12, num_iterations=12)
    assert "learning_rate_small" not in found(record)
    assert record["steps"][-1]["weights_moved"] > 0.5


def test_groups_that_are_all_wrong_are_named_once_and_at_the_end(tiny, tmp_path):
    result, record = run(tiny, tmp_path, min_operand=900, max_operand=999, num_iterations=24)
    assert "too_hard" in found(record)
    assert result.stdout.count("Too hard for this model") == 2


def test_updates_that_are_not_finite_are_named(tiny, tmp_path, monkeypatch):
    real = trainer.Learner.step

    def step(self, number):
        with pytest.MonkeyPatch.context() as patch:
            if number == 3:
                patch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.nan))
            return real(self, number)

    monkeypatch.setattr(trainer.Learner, "step", step)
    _, record = run(tiny, tmp_path, num_iterations=4)
    assert found(record)["updates_skipped"]["step"] == 3


def test_a_resumed_run_says_nothing_twice_and_keeps_what_it_found(tiny, tmp_path):
    first, _ = run(tiny, tmp_path, max_new_tokens=3, num_iterations=12)
    assert "never_ends" in first.stdout
    [kept] = newest_checkpoint(tmp_path)[0].metrics["findings"][:1]
    again, record = run(tiny, tmp_path, max_new_tokens=3, num_iterations=14)
    assert kept in record["findings"]
    assert again.stdout.count("never_ends:") == 1  # in the list at the end
    finished, _ = run(tiny, tmp_path, max_new_tokens=3, num_iterations=14)
    assert "is finished" in finished.stdout
    assert finished.stdout.count("never_ends:") == 1


def test_what_the_findings_need_is_measured_in_every_step(tiny, tmp_path):
    _, record = run(tiny, tmp_path, max_new_tokens=12, num_iterations=2)
    for row in record["steps"]:
        assert 0 <= row["sampler_gap"] < 1e-4  # float32
        assert row["weights_moved"] > 0.5
        assert row["empty_fraction"] == row["repeated_endings_fraction"] == 0
        assert {f"reward_std/{name}" for name in ("format", "close", "exact")} <= set(row)


def test_the_spread_of_a_part_is_that_of_the_groups_where_it_differs():
    # groups of 2: (0, 1) has a standard deviation of sqrt(1/2), (1, 1) none, in (None, 2) there is one value only
    of = RolloutBatch._spread
    rollout = type("Rollout", (), {"problems": [0, 1, 2]})
    assert of(rollout, [0.0, 1.0, 1.0, 1.0, None, 2.0]) == pytest.approx(math.sqrt(0.5))
    assert of(rollout, [1.0] * 6) is None


def test_the_sampler_gap_is_the_largest_of_the_tokens_of_completions():
    sampled, scored = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.25, -9.0]])

    def gap(mask):
        batch = SimpleNamespace(num_completions=1, old_logprobs=scored[:, :2], tokens=SimpleNamespace())
        batch.tokens.completion_mask = torch.tensor([mask])
        return sampler_gap(SimpleNamespace(sample_logprobs=sampled), batch)

    assert gap([True, True]) == 0.5
    assert gap([False, True]) == 0.25
    assert gap([False, False]) == 0.0


def test_the_noise_of_two_evaluations_is_no_difference():
    one, other = ({"accuracy": p, "ci_low": p - 0.04, "ci_high": p + 0.04} for p in (0.55, 0.5))
    assert not illnesses._above(one, other)
    assert illnesses._above(one | {"accuracy": 0.56}, other)
