"""The README is held against the code: settings with their defaults, metrics, files, commands."""

import json
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from grpo.config import STARTER, TrainConfig, read_card

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def cell(value):
    """A value as the table of settings shows it."""
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_settings_is_that_of_the_code():
    starter = read_card("starter")["settings"]
    for f in fields(TrainConfig):
        own = cell(starter[f.name]) if f.name in starter else ""
        row = f"| `--{f.name.replace('_', '-')}` | {cell(f.default)} | {own} | {f.metadata['meaning']} |"
        assert row in README, f"missing or stale in README.md: {row}"


def test_every_metric_of_a_step_and_of_an_evaluation_is_defined(tmp_path):
    from click.testing import CliRunner

    import train_grpo

    args = ["--num-iterations", "1", "--batch-size", "1", "--num-generations", "2", "--eval-problems", "2"]
    assert CliRunner().invoke(train_grpo.main, [*args, "--output-dir", str(tmp_path)]).exit_code == 0
    record = json.loads((tmp_path / "grpo_metrics.json").read_text(encoding="utf-8"))
    names = {name for row in record["steps"] + record["evals"] for name in row} | set(record)
    assert not [name for name in names if f"`{name}`" not in README and f'"{name}"' not in README]


def test_every_file_that_the_readme_names_is_there():
    for name in re.findall(r"^    ((?:grpo|tasks)/[\w/.]*|\w+\.py) ", README, re.MULTILINE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


MODULES = [path for folder in ("grpo", "tasks") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_module_is_in_the_file_tree(path):
    if path.name != "__init__.py":
        assert f"    {path.parent.name}/{path.name}" in README


def test_the_reward_of_the_readme_is_a_reward(tmp_path, monkeypatch):
    from tasks.arithmetic import Arithmetic
    from tasks.rewards import parse_rewards

    text = re.search(r"^    def shows_work.*?\n\n", README, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [command] = re.findall(r"--reward (mine.py:\S+)", README)
    [reward] = parse_rewards([command], {})
    problem, task = Arithmetic().training_problem(0, 1, 0), Arithmetic()
    texts = ["1 + 2 = 3\n<answer>3</answer>", "<answer>3</answer>"]
    attempts = [task.judge(problem, text) for text in texts]
    assert list(reward.function(attempts, {"completion_ids": [[1], [2]]})) == [1.0, 0.0]


def test_the_starters_card_says_what_the_readme_quotes():
    assert (STARTER / "README.md").is_file()
    [score] = re.findall(
        r"arithmetic \(the task\) \| ([^|]+) \|", (STARTER / "README.md").read_text(encoding="utf-8")
    )
    assert score.strip() in README
