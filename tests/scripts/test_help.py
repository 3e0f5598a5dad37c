"""Test --help of the three scripts: it is quick, and train_grpo.py lists the common options by group."""

import re
import subprocess
import sys

import pytest

import inference
import plot_metrics
import train_grpo
from grpo.config import GROUPS, OLD_NAMES
from grpo.launch.options import default_text
from grpo.model_card import resolve
from tasks.registry import task_options
from tests.helpers.scripts import FIELDS, ROOT, invoke

SETTINGS = {f"--{name.replace('_', '-')}": field for name, field in FIELDS.items()}


@pytest.mark.parametrize(
    ("command", "options"),
    [(train_grpo.main, ["--help-all"]), (inference.main, ["--help", "-h"]), (plot_metrics.main, ["--help", "-h"])],
    ids=["train_grpo", "inference", "plot_metrics"],
)
def test_help_is_an_answer_and_names_every_option(command, options, tmp_path):
    for option in options:
        result = invoke(command, option, folder=tmp_path)
        assert result.exit_code == 0
        assert result.stderr == ""
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert parameter.opts[0] in result.stdout
                assert parameter.help
        assert all(len(line) <= 110 for line in result.stdout.splitlines())


def test_help_of_training_lists_the_common_settings_and_says_how_to_see_the_rest(tmp_path):
    text = invoke(train_grpo.main, "--help", folder=tmp_path).stdout
    assert invoke(train_grpo.main, "-h", folder=tmp_path).stdout == text
    groups = options_by_group(text)
    listed = set().union(*groups.values())
    common = {option for option, field in SETTINGS.items() if field.metadata["common"]}
    assert listed & set(SETTINGS) == common
    assert 20 <= len(common) <= 25
    assert {"--config", "--check", "--seeds", "--fresh", "--help-all"} <= groups["Other"]
    assert text.splitlines()[-1] == f"--help-all lists the other {len(SETTINGS) - len(common)} settings."
    assert "the other" not in invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout


def test_help_shows_the_default_that_the_command_would_use(tmp_path):
    words = " ".join(invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout.split())
    assert "[default: 2000; starter 60]" in words
    assert "[default: 1e-07; starter 3e-06]" in words
    assert "[default: auto; starter float32]" in words
    used = resolve({})  # the settings of `python train_grpo.py`
    differing = [name for name, field in FIELDS.items() if getattr(used, name) != field.default]
    assert words.count("; starter ") == len(differing)


def test_a_default_is_shown_only_if_there_is_one():
    assert default_text((), ()) == default_text("", "") == ""
    assert default_text("", "8:4") == "  [default: ; starter 8:4]"
    assert default_text(False, True) == "  [default: off; starter on]"
    assert default_text(("reverse=1", "arithmetic=0.5"), ("reverse=1", "arithmetic=0.5")).endswith("0.5]")
    assert default_text(0.0, 0.0) == "  [default: 0]"


def test_help_all_has_every_setting_with_group_meaning_and_default(tmp_path):
    text = invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout
    words = " ".join(text.split()).replace("- ", "-")  # lines break after a hyphen too
    for name, field in FIELDS.items():
        assert re.search(f"--{name.replace('_', '-')}\\b", words)
        assert field.metadata["meaning"].replace("- ", "-") in words
        assert f"{field.metadata['group']}:" in words
        assert default_text(field.default, field.default).strip(" ]") in words
    assert "--fresh" in words


@pytest.mark.parametrize("script", ["train_grpo.py", "inference.py", "plot_metrics.py"])
def test_help_answers_at_once_without_the_heavy_libraries(script, tmp_path):
    # -X importtime writes a line for every module that is imported: "import time: self | cumulative | name".
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "numpy", "matplotlib", "safetensors"}
    assert "Usage:" in done.stdout


def options_by_group(text):
    """Return the long options under each heading of a --help."""
    parts = re.split(r"^([A-Z][\w ]+):$", text, flags=re.MULTILINE)
    return {
        title: set(re.findall(r"^  (--[\w-]+)", part, re.MULTILINE))
        for title, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_help_all_lists_each_setting_once_under_its_group(tmp_path):
    groups = options_by_group(invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout)
    assert tuple(groups) == (*GROUPS, "Other")
    for group in GROUPS:
        names = {name for name, field in FIELDS.items() if field.metadata["group"] == group}
        assert groups[group] == {f"--{name.replace('_', '-')}" for name in names}


def test_help_all_lists_the_options_of_the_tasks_under_task(tmp_path):
    text = invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout
    of_data = {"data", "validation_data", "test_data", "columns", "correct"}
    assert {*of_data, "min_operand", "max_operand", "numbers", "largest_number"} == set(task_options())
    assert {"--data", "--correct", "--min-operand", "--max-operand"} <= options_by_group(text)["Task"]
    words = " ".join(text.split())
    for tasks, name in (("arithmetic", "max-operand"), ("arithmetic", "min-operand"), ("gsm8k, jsonl", "data")):
        assert re.search(rf"--{name} [A-Z]+ {tasks}: \w", words), name  # the tasks that take the option


def test_help_leaves_out_the_old_names(tmp_path):
    text = invoke(train_grpo.main, "--help-all", folder=tmp_path).stdout
    for old in OLD_NAMES:
        assert not re.search(rf"--(no-)?{old.replace('_', '-')}(?![\w-])", text)
