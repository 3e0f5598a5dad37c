"""The READMEs are held against the code: settings with their defaults, metrics, findings, files, commands."""

import json
import re
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

import train_grpo
from grpo.config import ordered_fields
from grpo.diagnostics.findings import CHECKS
from grpo.model_card import STARTER, read_card
from grpo.record.step_metrics import STEP_METRICS
from tasks.arithmetic import Arithmetic
from tasks.rewards.scoring import parse_rewards

ROOT = Path(__file__).parents[1]
READMES = sorted(path for path in ROOT.rglob("README.md") if not {".venv", "fixtures"} & set(path.parts))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in READMES}
FRONT, RECORD = TEXTS["README.md"], TEXTS["grpo/record/README.md"]


def cell(value):
    """Return a value as the table of settings shows it."""
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_of_settings_is_that_of_the_code():
    starter = read_card("starter")["settings"]
    for f in ordered_fields():
        own = cell(starter[f.name]) if f.name in starter else ""
        row = f"| `--{f.name.replace('_', '-')}` | {cell(f.default)} | {own} | {f.metadata['meaning']} |"
        assert row in TEXTS["grpo/README.md"], f"missing or stale in grpo/README.md: {row}"


def test_the_table_of_metrics_is_that_of_the_code():
    for metric in STEP_METRICS:
        name = metric.name.replace("/*", "/<part>")
        row = f"| `{name}` | {metric.unit} | {metric.meaning} |"
        assert row in RECORD, f"missing or stale in grpo/record/README.md: {row}"


def test_every_name_in_the_metrics_file_is_defined(tmp_path):
    args = ["--num-iterations", "1", "--batch-size", "1", "--num-generations", "2", "--eval-problems", "2"]
    assert CliRunner().invoke(train_grpo.main, [*args, "--output-dir", str(tmp_path)]).exit_code == 0
    record = json.loads((tmp_path / "grpo_metrics.json").read_text(encoding="utf-8"))
    families = tuple(metric.name.removesuffix("*") for metric in STEP_METRICS if metric.name.endswith("/*"))
    names = {name for row in record["steps"] + record["evals"] for name in row} | set(record)
    names = {name for name in names if not name.startswith(families)}
    assert not [name for name in names if f"`{name}`" not in RECORD and f'"{name}"' not in RECORD]


def test_every_finding_is_explained_in_the_order_of_the_code():
    assert re.findall(r"^\| `(\w+)` \|", TEXTS["grpo/diagnostics/README.md"], re.MULTILINE) == list(CHECKS)


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_readme_links_to_is_there(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", TEXTS[name]):
        assert (folder / target).exists(), target


def test_every_folder_of_code_has_a_readme_that_the_front_page_leads_to():
    folders = [path.parent for path in (ROOT / "grpo").rglob("__init__.py")] + [ROOT / "tasks", ROOT / "tests"]
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        assert f"{name}/README.md" in TEXTS
        assert f"{name.removeprefix('grpo/')}/" in FRONT, name


def test_the_reward_of_the_front_page_is_a_reward(tmp_path, monkeypatch):
    text = re.search(r"^    def shows_work.*?\n\n", FRONT, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [command] = re.findall(r"--reward (mine.py:\S+)", FRONT)
    [reward] = parse_rewards([command], {})
    problem, task = Arithmetic().training_problem(0, 1, 0), Arithmetic()
    texts = ["1 + 2 = 3\n<answer>3</answer>", "<answer>3</answer>"]
    attempts = [task.grade(problem, text) for text in texts]
    assert list(reward.function(attempts, {"completion_ids": [[1], [2]]})) == [1.0, 0.0]


def test_the_starters_card_says_what_its_readme_quotes():
    card = (STARTER / "README.md").read_text(encoding="utf-8")
    [score] = re.findall(r"arithmetic, answer, integer \| ([^|]+) \|", card)
    assert score.strip() in TEXTS["grpo/starter/README.md"]
