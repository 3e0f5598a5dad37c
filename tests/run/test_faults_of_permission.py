"""Files of another user in the way of a run, folders that it may not write to, a card that it may not read.

Whatever the cause: one line that names file and reason, nothing lost, and when the cause is gone the same command
ends as if nothing had happened.
"""

import os
import shutil
from pathlib import Path

import pytest

import inference
import plot_metrics
import train_grpo
from grpo.model_card import CARD
from grpo.plots.figures import CURVE
from grpo.record.metrics import FILE_NAME
from tests.helpers.faults import (
    FORBIDDEN,
    FULL,
    arguments,
    assert_continues,
    assert_sound,
    assert_sound_from,
    give_away,
    limit_file_size,
    make_writable,
    the_error,
    unprivileged,
    unreadable,
    without_plots,
)
from tests.helpers.runs import forked, options

pytest.importorskip("resource", reason="only POSIX has limits of a process")
# for example, left by an earlier launch of another user
IN_THE_WAY = {
    "metrics": f".{FILE_NAME}.new",
    "plots": f".{CURVE}.new",
    "saved model": ".saved_model.new/model.safetensors",
    "earlier model": ".saved_model.old/model.safetensors",
    "checkpoint": "checkpoints/.step-00000004.new/policy.safetensors",
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_cannot_read_is_found(tmp_path):
    # the fixture `public` asks this before a test becomes another user: a clone in root's home is closed as here
    tmp_path.chmod(0o700)
    file = tmp_path / "clone/file"
    file.parent.mkdir()
    file.write_text("")
    assert unreadable([file, Path("/bin/sh")]) == [file]


@pytest.mark.parametrize("name", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_a_file_of_another_user_is_in_the_way(public, whole_run, half_run, run_folder, name):
    plots = name == IN_THE_WAY["plots"]
    shutil.copytree(half_run, run_folder)
    give_away(run_folder)
    obstacle = run_folder / name
    obstacle.parent.mkdir(exist_ok=True)
    obstacle.write_text("not yours")
    obstacle.chmod(0o444)
    within = obstacle.parent.name.startswith(".")
    if within:
        obstacle.parent.chmod(0o555)
    before = unprivileged if plots else without_plots()
    result = forked(train_grpo.main, arguments(public, run_folder), before)
    if result[0]:
        the_error(result, "", run_folder)
        assert any(word in result[2] for word in (FORBIDDEN, os.strerror(39), os.strerror(17))), result[2]
    assert_sound_from(run_folder, 2)
    if obstacle.parent.exists():
        obstacle.parent.chmod(0o755)
    shutil.rmtree(obstacle.parent) if within and obstacle.parent.exists() else obstacle.unlink(missing_ok=True)
    assert_continues(public, run_folder, whole_run, plots)


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_run_may_not_write_when_it_continues(public, whole_run, half_run, run_folder, name):
    shutil.copytree(half_run, run_folder)
    give_away(run_folder)
    (run_folder / name).chmod(0o555)
    the_error(forked(train_grpo.main, arguments(public, run_folder), unprivileged), "ermission", run_folder)
    assert_sound(run_folder, 2)
    make_writable(run_folder)
    assert_continues(public, run_folder, whole_run)


def test_a_card_that_may_not_be_read_is_named(public, run_folder):
    shutil.copytree(public / "model", run_folder)
    give_away(run_folder)
    (run_folder / CARD).chmod(0)
    run = options(model=run_folder, output_dir=run_folder / "run")
    for command, more in ((train_grpo.main, run), (inference.main, ["--model", run_folder, "What is 1 + 1?"])):
        status, _, err = forked(command, more, unprivileged)
        assert status in (1, 2)
        assert err.count("Error: ") == 1
        assert f"{run_folder / CARD}" in err
        assert FORBIDDEN in err
        assert "Traceback" not in err


@pytest.mark.parametrize("cause", ["full", "forbidden", "forbidden parent", "in the way"])
def test_plots_that_cannot_be_written_are_named_and_the_old_ones_kept(whole_run, run_folder, cause):
    shutil.copytree(whole_run, run_folder)
    (run_folder / "closed").mkdir()
    give_away(run_folder)
    before = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    more, obstacle = [], run_folder / IN_THE_WAY["plots"]
    if cause == "forbidden":
        run_folder.chmod(0o555)
    if cause == "forbidden parent":
        (run_folder / "closed").chmod(0o555)
        more = ["--out", run_folder / "closed" / "pictures"]
    if cause == "in the way":
        obstacle.write_text("not yours")
        obstacle.chmod(0o444)

    def limits():
        unprivileged()
        if cause == "full":
            limit_file_size(31_200)

    result = forked(plot_metrics.main, [run_folder, *more], limits)
    the_error(result, FULL if cause == "full" else FORBIDDEN, run_folder)
    make_writable(run_folder)
    obstacle.unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()} == before
    status, out, err = forked(plot_metrics.main, [run_folder, *more], unprivileged)
    assert (status, out.count(".png"), err) == (0, 3, "")
