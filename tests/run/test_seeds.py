"""Test --seeds: which runs are started, what a stop leaves, and the table of results."""

import signal
from dataclasses import fields

import click
import pytest

import train_grpo
from grpo.config import TrainConfig
from grpo.evaluation.intervals import mean_interval, t_quantile
from grpo.launch import seeds
from grpo.launch.options import setting_options
from grpo.launch.seeds import as_arguments, parse_seeds, table
from grpo.plots.comparison import COMPARISON
from grpo.record.metrics import load_metrics
from tests.helpers.runs import Fork, forked, options, wait_for
from tests.helpers.scripts import TINY, invoke, refusal
from tests.scripts.test_train_options import VALID


def test_seeds_are_read_and_others_refused():
    assert parse_seeds("0, 1,22") == [0, 1, 22]
    for text in ("", "0", "0,0", "0,00", "a,b", "-1,2", "0,1,", "1.5,2", "٣,٤", "1" * 20 + ",2"):
        with pytest.raises(ValueError, match=r"^--seeds is"):
            parse_seeds(text)


def test_settings_survive_the_command_line():
    seen = {}

    @click.command()
    @setting_options
    def command(**settings):
        seen.update(settings)

    command.main(as_arguments(VALID), standalone_mode=False)
    assert {f.name for f in fields(TrainConfig)} == set(VALID)
    assert {name: seen[name] for name in VALID} == VALID


def test_the_interval_of_a_mean_by_hand():
    # For the values 1 and 3: mean 2, std sqrt(2), error 1, t with one degree of freedom 12.7062
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, -10.7062, 14.7062))
    for degrees, value in (
        (1, 12.7062),
        (2, 4.3027),
        (4, 2.7764),
        (5, 2.5706),
        (9, 2.2622),
        (30, 2.0423),
        (1000, 1.9623),
    ):
        assert t_quantile(degrees) == pytest.approx(value, rel=0.002)


def test_a_run_a_seed_then_a_table_and_a_picture(model, tmp_path, monkeypatch):
    # The run of each seed is a fork, because a new interpreter needs seconds to start.
    monkeypatch.setattr(seeds, "_run", lambda command: forked(train_grpo.main, command[2:], folder=tmp_path)[0])
    arguments = options(model=model, seed=None, num_iterations=2, output_dir="many")
    first = invoke(train_grpo.main, *arguments, "--seeds", "0,3", folder=tmp_path)
    assert first.exit_code == 0, first.output
    records = [load_metrics(tmp_path / f"many/seed-{seed}") for seed in (0, 3)]
    assert [record["config"]["seed"] for record in records] == [0, 3]
    assert records[0]["steps"] != records[1]["steps"]
    rows = first.stdout.splitlines()
    start = rows.index("seed   test accuracy")
    assert rows[start : start + 4] == table(records)
    assert rows[start + 3].startswith("mean   ")
    assert (tmp_path / "many" / COMPARISON).stat().st_size > 10_000


def test_sigterm_stops_the_run_of_a_seed_with_a_checkpoint_and_the_command_goes_on(model, tmp_path):
    arguments = options(model=model, seed=None, num_iterations=100_000, save_every=1, output_dir=None)
    process = Fork(train_grpo.main, [*arguments, "--seeds", "0,1"], folder=tmp_path)  # starts a new interpreter
    metrics = tmp_path / "seed-0/grpo_metrics.json"
    wait_for(metrics.exists, process)
    process.send_signal(signal.SIGTERM)
    output, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Seed 0 was stopped or failed. Run the same command again to continue it." in output
    assert list((tmp_path / "seed-0/checkpoints").glob("step-*"))
    assert not (tmp_path / "seed-1").exists()


@pytest.mark.parametrize(
    ("args", "word"), [(["--seeds", "0"], "two or more"), (["--seeds", "0,1", "--seed", "3"], "give one of them")]
)
def test_what_cannot_be_is_one_line(args, word, tmp_path):
    assert word in refusal(invoke(train_grpo.main, *TINY, *args, folder=tmp_path))
