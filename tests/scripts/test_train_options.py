"""Every option of train_grpo.py reaches the run, under an old name too."""

import json
import shutil
from pathlib import Path

import pytest

import train_grpo
from grpo.config import OLD_NAMES
from grpo.model_card import read_card, resolve
from grpo.record import checkpoint
from grpo.record.checkpoint import FOLDER, MANIFEST, newest_checkpoint
from grpo.record.metrics import load_metrics
from tests.helpers.scripts import FIELDS, TINY, a_model, invoke, snapshot, train

# old option, its value, the setting of today, its value
OLD_OPTIONS = [
    (["--refresh-reference-every", 20], "ref_model_sync_steps", 20),
    (["--mask-truncated"], "mask_truncated_completions", True),
    (["--no-mask-truncated"], "mask_truncated_completions", False),
]
# a valid value of each setting that is not its default
VALID = {
    "model": "no/such-model",
    "device": "cpu",
    "precision": "bfloat16",
    "deterministic": True,
    "cuda_graphs": True,
    "task": ("reverse=1", "arithmetic=0.5"),
    "data": "problems.jsonl",
    "correct": "judge.py:right",
    "validation_data": "validation.csv",
    "test_data": "test.parquet",
    "columns": "question=problem",
    "min_operand": -2,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_targets": "q_proj,v_proj",
    "load_in_4bit": True,
    "gradient_checkpointing": True,
    "shard": True,
    "max_operand": 3,
    "prompt_style": "think",
    "prompt_wording": "plain",
    "system_prompt": "Say it.",
    "shots": 2,
    "sft_steps": 3,
    "sft_batch_size": 5,
    "sft_learning_rate": 2e-5,
    "reward": ("exact=1", "length=-0.5"),
    "num_iterations": 7,
    "batch_size": 3,
    "num_generations": 5,
    "max_new_tokens": 9,
    "temperature": 0.7,
    "learning_rate": 2e-6,
    "beta": 0.01,
    "epsilon": 0.1,
    "num_inner_updates": 2,
    "clip_grad_norm": 1.25,
    "micro_batch_size": 2,
    "seed": 11,
    "surrogate": "cispo",
    "multi_objective_aggregation": "normalize_then_sum",
    "entropy_bonus": 0.001,
    "overlong_buffer": 4,
    "loss_average": "constant",
    "ratio": "sequence",
    "kl_estimator": "k3-corrected",
    "epsilon_high": 0.28,
    "scale_rewards": "none",
    "mask_truncated_completions": True,
    "resample_tied": 3,
    "task_arg": ("largest=3",),
    "chat_template_arg": ("enable_thinking=false", "effort=low"),
    "numbers": 4,
    "largest_number": 9,
    "target_kl": 0.02,
    "warmup_steps": 5,
    "learning_rate_decay": "cosine",
    "group_schedule": "8:4",
    "ref_model_sync_steps": 20,
    "eval_every": 13,
    "pass_at_k": 3,
    "eval_problems": 17,
    "save_every": 3,
    "patience": 4,
    "target_accuracy": 0.5,
    "time_limit": "1h30m",
    "show_every": 0,
    "track": "wandb",
    "output_dir": "elsewhere/deep",
}
# two settings as an earlier version wrote them
SYNCED_AND_MASKED = {"refresh_reference_every": 1, "mask_truncated": True}


@pytest.fixture
def resolved(monkeypatch, tmp_path):
    """Return a function that calls train_grpo.py without training, and returns settings and standard error."""
    seen = []
    monkeypatch.setattr(
        train_grpo, "train", lambda launched, check, anyway, accept, trust, config: seen.append(config) or 0
    )

    def call(*args):
        result = invoke(train_grpo.main, *args, folder=tmp_path)
        assert result.exit_code == 0, result.output
        return seen.pop(), result.stderr

    return call


@pytest.fixture(scope="module")
def earlier_run(tmp_path_factory):
    """Run two steps, and write the settings in their checkpoints as an earlier version would have."""
    folder = tmp_path_factory.mktemp("earlier")
    train("--ref-model-sync-steps", 1, "--mask-truncated-completions", folder=folder)
    for path in (folder / FOLDER).iterdir():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for old, new in OLD_NAMES.items():
            state["config"][old] = state["config"].pop(new)
        assert {name: state["config"][name] for name in OLD_NAMES} == SYNCED_AND_MASKED
        (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (path / MANIFEST).write_bytes(checkpoint._manifest(path))
    return folder


@pytest.fixture
def copy_of_earlier(earlier_run, tmp_path):
    """Copy the folder of the earlier run, for a test to change."""
    return Path(shutil.copytree(earlier_run, tmp_path / "copy"))


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_of_training_reaches_the_run(name, resolved):
    option = f"--{name.replace('_', '-')}"
    values = VALID[name] if isinstance(VALID[name], tuple) else [VALID[name]]
    args = [option] if VALID[name] is True else [arg for value in values for arg in (option, value)]
    needed = {"load_in_4bit": {"lora_rank": 4}, "task_arg": {"task": "mine.py:Task"}}.get(name, {})
    more = [f"--{other.replace('_', '-')}={value}" for other, value in needed.items()]
    config, _ = resolved(*args, *more)
    assert getattr(config, name) == VALID[name] != FIELDS[name].default
    assert config == resolve({name: VALID[name], **needed})


# --- settings under their old names ---


@pytest.mark.parametrize(("args", "name", "value"), OLD_OPTIONS, ids=[args[0] for args, *_ in OLD_OPTIONS])
def test_an_old_option_works_as_the_new_one_and_says_so_in_one_line(args, name, value, resolved):
    config, said = resolved(*args)
    assert getattr(config, name) == value
    [line] = said.splitlines()
    assert line.startswith("--" + args[0].removeprefix("--no-").removeprefix("--"))
    assert "deprecated" in line
    assert f"--{name.replace('_', '-')}" in line
    new = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    assert resolved(new, *args[1:]) == (config, "")


def test_both_old_options_say_one_line_each(resolved):
    config, said = resolved("--refresh-reference-every", 20, "--mask-truncated")
    assert (config.ref_model_sync_steps, config.mask_truncated_completions) == (20, True)
    assert len(said.splitlines()) == 2
    assert all(sum(f"--{old.replace('_', '-')} is" in line for line in said.splitlines()) == 1 for old in OLD_NAMES)


def test_the_new_option_overrides_the_old_one(resolved):
    config, said = resolved("--refresh-reference-every", 20, "--ref-model-sync-steps", 30)
    assert config.ref_model_sync_steps == 30
    assert len(said.splitlines()) == 1


def test_a_bad_value_of_an_old_option_is_refused_by_name(tmp_path):
    result = invoke(train_grpo.main, "--refresh-reference-every", -1, folder=tmp_path)
    assert result.exit_code == 2
    assert "--ref-model-sync-steps" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_the_card_of_an_earlier_version_is_understood(resolved, tmp_path):
    settings = read_card("starter")["settings"]
    a_model(tmp_path / "old", settings={**settings, **SYNCED_AND_MASKED})
    config, said = resolved("--model", "old")
    assert (config.ref_model_sync_steps, config.mask_truncated_completions) == (1, True)
    assert said == ""  # the user typed no old name
    config, _ = resolved("--model", "old", "--ref-model-sync-steps", 7, "--no-mask-truncated-completions")
    assert (config.ref_model_sync_steps, config.mask_truncated_completions) == (7, False)


def test_a_run_of_an_earlier_version_continues(copy_of_earlier):
    same = ["--ref-model-sync-steps", 1, "--mask-truncated-completions", "--num-iterations", 3]
    result = train(*same, folder=copy_of_earlier)
    assert "checkpoint of step 2" in result.stdout
    assert "Warning" not in result.stdout
    assert "deprecated" not in result.stderr
    record = load_metrics(copy_of_earlier)
    assert [row["step"] for row in record["steps"]] == [1, 2, 3]
    written = newest_checkpoint(copy_of_earlier)[0].state["config"]
    for settings in (record["config"], written):
        assert not set(OLD_NAMES) & set(settings)
        assert (settings["ref_model_sync_steps"], settings["mask_truncated_completions"]) == (1, True)


@pytest.mark.parametrize(
    ("args", "conflict"),
    [
        (["--mask-truncated-completions"], "--ref-model-sync-steps 1 (now 0)"),
        (["--ref-model-sync-steps", 1], "--mask-truncated-completions True (now False)"),
    ],
    ids=["sync", "mask"],
)
def test_a_run_of_an_earlier_version_with_other_values_is_refused(args, conflict, copy_of_earlier):
    before = snapshot(copy_of_earlier)
    result = invoke(train_grpo.main, *TINY, *args, "--num-iterations", 3, folder=copy_of_earlier)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.count(" (now ") == 1
    assert conflict in line
    assert snapshot(copy_of_earlier) == before
