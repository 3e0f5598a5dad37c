"""What a run prints: times, throughput, and the table of completions."""

import pytest

from grpo.report.ending import seconds_by_phase, tokens_per_second
from grpo.report.progress import nats, question_and_completion, show_completions
from tests.helpers.rollouts import ODD, a_rollout


def test_the_time_of_a_run_by_hand():
    record = {
        "steps": [
            {
                "time/sample": 1.0,
                "time/reward": 9.0,
                "time/reward/mine": 2.0,
                "time/reference": 0.5,
                "time/update": 3.0,
            }
            | {"time/total": 8.0, "tokens": 100},
            {"time/sample": 1.5, "time/update": 3.0, "time/save": 0.25, "time/total": 2.0, "tokens": 300},
        ],
        "evals": [{"time/evaluate": 4.0}, {}],
        "sft": [{"time/total": 5.0}, {"time/total": 7.0}],
    }
    phases = {
        "fine-tuning": 12.0,
        "sampling": 2.5,
        "reference": 0.5,
        "update": 6.0,
        "reward mine": 2.0,
        "evaluation": 4.0,
        "saving": 0.25,
    }
    assert seconds_by_phase(record) == phases
    assert tokens_per_second(record) == pytest.approx(40)


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_the_table_of_completions_fits_the_terminal_and_moves_no_cursor(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    show_completions(7, a_rollout(completion="x" * 300 + ODD))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= columns for line in lines)


def test_no_minus_stands_before_a_zero():
    assert [nats(value) for value in (-0.0004, 0.0, 0.0096, -0.0021)] == [
        "0.000",
        "0.000",
        "0.010",
        "-0.002",
    ]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (40, "What is 1 + 2?  <answer>3</answer>"),
        (30, "What is 1…  <answer>3</answer>"),
        (24, "Wha…  <answer>3</answer>"),
        (20, "Wha…  <answer>3</an…"),
    ],
)
def test_the_question_is_cut_before_the_completion(columns, text):
    assert question_and_completion("What is 1 + 2?", "<answer>3</answer>", columns) == text
