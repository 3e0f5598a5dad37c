"""The settings of a run: each is declared once, is checked, and survives a round trip through JSON."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from grpo.config import DEVICES, TrainConfig
from grpo.setting import as_typed
from tasks.common.prompts import STYLES
from tasks.registry import TASKS

FIELDS = {f.name: f for f in fields(TrainConfig)}
GROUPS = {"Model", "Task", "Algorithm", "SFT before GRPO", "Variants and schedules", "Evaluation and output"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_group_a_meaning_and_a_default_that_passes_its_own_check(name):
    field = FIELDS[name]
    assert field.metadata["group"] in GROUPS
    assert len(field.metadata["meaning"]) > 5
    assert field.type in (int, float, str, bool, tuple[str, ...])
    assert isinstance(field.default, tuple if field.type == tuple[str, ...] else field.type)
    assert getattr(TrainConfig(), name) == field.default
    if field.metadata["choices"]:
        assert field.default in field.metadata["choices"]


def test_the_defaults_are_the_published_ones():
    # the settings of the arithmetic experiment that this project rebuilds
    config = TrainConfig()
    published = {"learning_rate": 1e-7, "batch_size": 4, "num_generations": 8, "max_new_tokens": 16}
    published |= {"num_iterations": 2000, "beta": 0.04, "epsilon": 0.2, "num_inner_updates": 5}
    published |= {"clip_grad_norm": 0.5, "temperature": 1.0, "max_operand": 10}
    assert {name: getattr(config, name) for name in published} == published


def test_a_configuration_cannot_be_changed_and_is_plain_json():
    config = TrainConfig(seed=3)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()
    assert TrainConfig(**config.to_dict()) == config


def test_the_inheritable_settings_leave_out_place_model_and_seed():
    passed = TrainConfig(seed=3, output_dir="here", num_generations=4).inheritable_settings()
    left_out = {"model", "device", "deterministic", "cuda_graphs", "shard", "seed", "track", "sft_steps", "task_arg"}
    of_data = {"data", "validation_data", "test_data", "columns", "correct"}
    assert set(FIELDS) - set(passed) == left_out | of_data | {"output_dir", "time_limit"}
    assert passed["num_generations"] == 4


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_its_default():
    earlier = {name: value for name, value in TrainConfig().to_dict().items() if name not in ("task", "reward")}
    assert TrainConfig().conflicting_settings(earlier) == []
    assert TrainConfig(task="reverse").conflicting_settings(earlier) == ["--task arithmetic (now reverse)"]
    assert len(TrainConfig(reward=("exact=1",)).conflicting_settings(earlier)) == 1
    assert TrainConfig(reward=("exact=1",)).conflicting_settings({**earlier, "reward": ["exact=1"]}) == []


# --- values that are refused ---

OF_OTHER_TYPES = {
    # JSON can hold 10**400, a float cannot.
    float: (math.nan, math.inf, -math.inf, 10**400, "1", "", None, [1.0], True),
    int: ("1", 1.5, 2.0, None, [2], True),
    bool: ("yes", None, [True], 0, 1),
    str: (1, None, ["x"], True, b"x"),
    tuple[str, ...]: (None, 5, (1,), [None], {"exact": 1}),
}
# The bounds are repeated here, so that a test fails when one changes.
OUT_OF_BOUNDS = {
    "batch_size": (0, -1),
    "beta": (-0.01,),
    "clip_grad_norm": (0.0, -0.5),
    "device": ("tpu", "CUDA", ""),
    "epsilon": (0.0, -0.2),
    "eval_every": (0,),
    "eval_problems": (0, -1, 10**9),
    "learning_rate": (-1e-7,),
    "max_new_tokens": (0, -16, 10**25),
    "max_operand": (0, -1),
    "micro_batch_size": (-1,),
    "num_generations": (1, 0, -8, 10**22),
    "num_inner_updates": (0, 10**21),
    "num_iterations": (0, -1, 10**25),
    "prompt_style": ("essay", ""),
    "reward": ("exact=1",),
    "seed": (-1,),
    "shots": (10**9,),
    "show_every": (-1,),
    "target_accuracy": (2.0,),
    "task": ("chess", ""),
    "temperature": (0, 0.0, -1.0, 1e30),
}


@pytest.mark.parametrize("name", FIELDS)
def test_an_impossible_value_is_refused_in_one_line_that_names_it(name):
    for value in (*OF_OTHER_TYPES[FIELDS[name].type], *OUT_OF_BOUNDS.get(name, ())):
        with pytest.raises(ValueError, match=as_typed(name)) as caught:
            TrainConfig(**{name: value})
        assert "\n" not in str(caught.value), value


@pytest.mark.parametrize("name", FIELDS)
def test_the_least_value_and_every_choice_are_allowed(name):
    metadata = FIELDS[name].metadata
    if metadata["least"] is not None:
        assert getattr(TrainConfig(**{name: FIELDS[name].type(metadata["least"])}), name) == metadata["least"]
    for choice in metadata["choices"]:
        assert getattr(TrainConfig(**{name: choice}), name) == choice


def test_the_choices_are_those_that_the_program_knows():
    assert FIELDS["device"].metadata["choices"] == DEVICES
    assert FIELDS["prompt_style"].metadata["choices"] == STYLES
    assert FIELDS["task"].metadata["meaning"].startswith(", ".join(TASKS))


def test_an_integer_is_accepted_where_a_float_is_asked_for():
    assert TrainConfig(beta=0, temperature=1, learning_rate=0).beta == 0
