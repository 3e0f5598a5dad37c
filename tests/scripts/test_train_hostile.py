"""Test unusual mistakes in rewards, judges and folders: one line names them before a model is loaded."""

import os

import pytest

import train_grpo
from grpo.model import loading
from tests.helpers.data import write
from tests.helpers.hostile_rewards import REWARDS
from tests.helpers.scripts import TINY, invoke, names_in, refusal


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(("body", "words"), REWARDS.values(), ids=REWARDS)
def test_a_hostile_reward_is_refused_in_one_line_before_a_model_is_loaded(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(body, encoding="utf-8")
    before = os.getcwd()
    result = invoke(train_grpo.main, *TINY, "--reward", "mine.py:f=1", "--output-dir", "out", folder=tmp_path)
    line = refusal(result)
    assert words in line
    assert "mine.py" in line
    assert line.isprintable()
    assert names_in(tmp_path / "out") == set()
    assert os.getcwd() == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import os\ndef f(**c):\n    os.chdir('/')\n    return True", "current folder"),
        REWARDS["a class"],
        (REWARDS["a coroutine function"][0], "async"),
        REWARDS["raises"],
    ],
)
def test_a_hostile_judge_is_refused_in_one_line_before_a_model_is_loaded(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(body, encoding="utf-8")
    data = write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(200)])
    args = ["--task", "jsonl", "--data", data, "--correct", "mine.py:f"]
    assert words in refusal(invoke(train_grpo.main, *TINY, *args, folder=tmp_path))


def test_rewards_that_all_weigh_nothing_are_refused(tmp_path):
    line = refusal(invoke(train_grpo.main, *TINY, "--reward", "exact=0", folder=tmp_path))
    assert "--reward" in line
    assert "exact" in line


def test_one_operand_only_is_refused_before_a_model_is_loaded(tmp_path):
    line = refusal(invoke(train_grpo.main, *TINY, "--min-operand", 7, "--max-operand", 7, folder=tmp_path))
    assert "--min-operand 7 and --max-operand 7" in line


@pytest.mark.parametrize("option", ["--output-dir", "--model", "--reward"])
def test_a_symbolic_link_to_nothing_is_called_one(option, tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "link").symlink_to("gone")
    value = "link:f=1" if option == "--reward" else "link"
    line = refusal(invoke(train_grpo.main, *TINY, option, value, folder=tmp_path))
    assert "symbolic link" in line
    assert "gone" in line
