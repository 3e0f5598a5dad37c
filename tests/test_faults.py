"""Writes that begin to fail while a run goes on: the disk is full, the folder read-only, a file somebody else's.

When it begins is chosen here; that it fails is the system's doing, in a process of its own. Whatever the cause and
the file: exit status 1, one line that names both, the last checkpoint sound, and when the cause is gone the same
command ends as if nothing had been.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

import inference
import plot_metrics
import train_grpo
from grpo import trainer
from grpo.checkpoint import newest_checkpoint
from grpo.config import CARD
from grpo.metrics import FILE_NAME, Metrics
from grpo.plots import CURVE
from tests.runs import Fork, a_tiny_model, forked, options, spawned
from tests.test_resume import fingerprint

resource = pytest.importorskip("resource", reason="limits of a process are a matter of POSIX")
NOBODY = 65534
FULL, FORBIDDEN, READ_ONLY, NO_SPACE = map(os.strerror, (27, 13, 30, 28))
PAGE = 4096
# what a run calls to write each of its outputs
PLACES = {
    "checkpoint": (trainer, "write_checkpoint"),
    "saved model": (trainer, "save"),
    "metrics": (Metrics, "write"),
    "plots": (trainer, "draw_all"),
}


@pytest.fixture(scope="module")
def room():
    """A folder that any user may write in, unlike pytest's own, with the model and the runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o777)
        a_tiny_model(folder / "model")
        for path in (folder / "model", *(folder / "model").iterdir()):
            path.chmod(0o755)
        yield folder


def arguments(room, folder, **settings):
    return options(model=room / "model", output_dir=folder, **settings)


def a_run(room, name, **settings):
    folder = room / name
    status, _, err = forked(train_grpo.main, arguments(room, folder, **settings), unprivileged)
    assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def whole(room):
    """The run that nobody disturbed."""
    return a_run(room, "whole")


@pytest.fixture(scope="module")
def half(room):
    """The same when two of its six steps were done."""
    return a_run(room, "half", num_iterations=2)


@pytest.fixture
def folder(room):
    """A place for a run, made writable and removed afterwards, whatever became of it."""
    folder = room / "run"
    yield folder
    writable(folder)
    shutil.rmtree(folder, ignore_errors=True)


def unprivileged():
    """Root may write everywhere; somebody else may not."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def give_away(folder):
    """Have a folder belong to the user that the runs here are of."""
    if os.geteuid() == 0:
        for path, _, names in os.walk(folder):
            for name in ("", *names):
                os.chown(os.path.join(path, name), NOBODY, NOBODY)


def writable(folder):
    """Undo every chmod; the files that are somebody else's are those of `in the way`."""
    folders = [folder]
    for path in folders:
        path.chmod(0o755)
        folders += [below for below in path.iterdir() if below.is_dir()]


def small_files_only(size):
    """What a full disk does, to this process alone: no file grows beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def from_call(place, number, fault):
    """Have the fault happen when a place is about to be written for the n-th time."""
    owner, name = PLACES[place]
    true, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            fault()
        return true(*args, **kwargs)

    setattr(owner, name, counted)


def the_error(result, reason, *names):
    """The one line that a failed launch ends with, after checking that there is no other and what it says."""
    status, _, err = result
    assert status == 1, err
    *before, last = err.splitlines()
    assert last.startswith("Error: "), err
    assert all(line == "" or line.startswith("step ") for line in before), err  # progress
    assert reason in last
    assert any(str(name) in last for name in names), last
    return last


def sound(folder, step):
    """Whether the newest checkpoint verifies, and is of this step."""
    checkpoint, problems = newest_checkpoint(folder)
    assert problems == []
    assert (checkpoint.step if checkpoint else None) == step
    return True


def goes_on(room, folder, whole):
    """Whether the same command ends as the run that nobody disturbed."""
    status, _, err = forked(train_grpo.main, arguments(room, folder), unprivileged)
    assert status == 0, err
    assert fingerprint(folder) == fingerprint(whole)
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".grpo.lock"]
    return True


# --- each place, each cause ---

SLOW = pytest.mark.slow
# place, the n-th write of it, the step of the newest checkpoint then
MOMENTS = [
    pytest.param("checkpoint", 1, None, marks=SLOW),
    ("checkpoint", 3, 2),
    pytest.param("saved model", 1, 0, marks=SLOW),
    ("saved model", 2, 4),
    pytest.param("metrics", 1, 0, marks=SLOW),
    ("metrics", 4, 2),
    ("plots", 1, 6),
]
# the same, and how many bytes there is room for: 31,200 hold the policy, and neither the optimizer nor a plot
FULL_AT = [
    pytest.param("checkpoint", 1, None, 0, marks=SLOW),
    pytest.param("checkpoint", 3, 2, 0, marks=SLOW),
    ("checkpoint", 3, 2, 31_200),
    ("saved model", 1, 0, 0),
    ("saved model", 2, 4, 2000),
    pytest.param("metrics", 1, 0, 0, marks=SLOW),
    ("metrics", 4, 2, 0),
    pytest.param("plots", 1, 6, 0, marks=SLOW),
    ("plots", 1, 6, 31_200),
]


@pytest.mark.parametrize(("place", "number", "step", "size"), FULL_AT)
def test_a_disk_that_is_full_while_a_run_goes_on(room, whole, folder, place, number, step, size):
    def before():
        unprivileged()
        from_call(place, number, lambda: small_files_only(size))

    the_error(forked(train_grpo.main, arguments(room, folder), before), FULL, folder)
    assert sound(folder, step)
    assert goes_on(room, folder, whole)


@pytest.mark.parametrize(("place", "number", "step"), MOMENTS)
def test_a_folder_that_is_read_only_while_a_run_goes_on(room, whole, folder, place, number, step):
    def close():
        for path in (folder / "checkpoints", folder):
            if path.exists():
                path.chmod(0o555)

    def before():
        unprivileged()
        from_call(place, number, close)

    line = the_error(forked(train_grpo.main, arguments(room, folder), before), FORBIDDEN, folder)
    assert ".grpo.pid" not in line  # what failed first is to be told, not what failed while the run ended
    assert sound(folder, step)
    writable(folder)
    assert goes_on(room, folder, whole)


def mounted(*args):
    """Mount something, or skip the test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(room):
    """A disk of 2 MB."""
    disk = room / "disk"
    disk.mkdir()
    try:
        mounted("-t", "tmpfs", "-o", "size=2m,mode=777", "tmpfs", disk)
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)
    finally:
        disk.rmdir()


@pytest.mark.parametrize(("place", "number", "step"), [MOMENTS[5], pytest.param(*MOMENTS[1], marks=SLOW)])
def test_a_disk_that_becomes_read_only_while_a_run_goes_on(room, whole, small_disk, place, number, step):
    folder = small_disk / "run"

    def close():
        for how in ("bind", "remount,ro,bind"):
            subprocess.run(["mount", "-o", how, str(folder), str(folder)], check=True)

    result = forked(train_grpo.main, arguments(room, folder), lambda: from_call(place, number, close))
    assert ".grpo.pid" not in the_error(result, READ_ONLY, folder)
    the_error(forked(train_grpo.main, arguments(room, folder)), "read-only", folder)
    assert sound(folder, step)
    subprocess.run(["umount", "-l", str(folder)], check=True)
    shutil.copytree(folder, small_disk / "open")  # of the user that goes on
    give_away(small_disk / "open")
    assert goes_on(room, small_disk / "open", whole)


# of an earlier launch by another user, say
IN_THE_WAY = {
    "metrics": f".{FILE_NAME}.new",
    "plots": f".{CURVE}",
    "saved model": ".saved_model.new/model.safetensors",
    "earlier model": ".saved_model.old/model.safetensors",
    "checkpoint": "checkpoints/.step-00000004.new/policy.safetensors",
}


@pytest.mark.parametrize("name", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_a_file_of_somebody_else_in_the_way(room, whole, half, folder, name):
    shutil.copytree(half, folder)
    give_away(folder)
    obstacle = folder / name
    obstacle.parent.mkdir(exist_ok=True)
    obstacle.write_text("not yours")
    obstacle.chmod(0o444)
    within = obstacle.parent.name.startswith(".")
    if within:
        obstacle.parent.chmod(0o555)
    result = forked(train_grpo.main, arguments(room, folder), unprivileged)
    if result[0]:
        the_error(result, "", folder)
        assert any(word in result[2] for word in (FORBIDDEN, os.strerror(39), os.strerror(17))), result[2]
    assert newest_checkpoint(folder)[1] == []
    assert newest_checkpoint(folder)[0].step >= 2
    if obstacle.parent.exists():
        obstacle.parent.chmod(0o755)
    shutil.rmtree(obstacle.parent) if within and obstacle.parent.exists() else obstacle.unlink(missing_ok=True)
    assert goes_on(room, folder, whole)


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_run_that_may_not_write_when_it_goes_on(room, whole, half, folder, name):
    shutil.copytree(half, folder)
    give_away(folder)
    (folder / name).chmod(0o555)
    result = forked(train_grpo.main, arguments(room, folder), unprivileged)
    the_error(result, "ermission", folder)
    assert newest_checkpoint(folder)[1] == []
    writable(folder)
    assert goes_on(room, folder, whole)


def test_a_card_that_may_not_be_read_is_named(room, folder):
    shutil.copytree(room / "model", folder)
    give_away(folder)
    (folder / CARD).chmod(0)
    run = options(model=folder, output_dir=folder / "run")
    for command, more in ((train_grpo.main, run), (inference.main, ["--model", folder, "What is 1 + 1?"])):
        status, _, err = forked(command, more, unprivileged)
        assert status in (1, 2)
        assert err.count("Error: ") == 1
        assert f"{folder / CARD}" in err
        assert FORBIDDEN in err
        assert "Traceback" not in err


# --- wherever a write may fail ---


def fill(disk, pages):
    """Take all of a disk but so many pages."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(file.tell() - pages * PAGE)


@pytest.mark.parametrize("pages", [pytest.param(n, marks=() if n in (2, 30) else SLOW) for n in range(75)])
def test_a_run_that_finds_little_room_when_it_goes_on(room, whole, half, small_disk, pages):
    # 2 pages: not even the metrics; 20: no checkpoint; 29 to 32: no model; 45 to 60: no plot
    folder = small_disk / "run"
    shutil.copytree(half, folder)
    fill(small_disk, pages)
    result = forked(train_grpo.main, arguments(room, folder))
    if result[0]:
        the_error(result, NO_SPACE, folder)
    checkpoint, problems = newest_checkpoint(folder)
    assert problems == []
    assert checkpoint.step >= 2
    assert (folder / "saved_model/model.safetensors").stat().st_size > 30_000
    (small_disk / "filler").unlink()
    give_away(folder)
    assert goes_on(room, folder, whole)


def test_a_run_that_finds_no_room_as_a_user_starts_it(room, whole, half, folder):
    shutil.copytree(half, folder)
    the_error(spawned("train_grpo.py", arguments(room, folder), lambda: small_files_only(31_200)), FULL, folder)
    assert sound(folder, 2)
    give_away(folder)
    assert goes_on(room, folder, whole)


@SLOW
@pytest.mark.parametrize("cause", ["full", "forbidden"])
def test_the_world_changes_at_any_moment_of_a_run(room, folder, cause):
    # from outside, at no moment that the run could know of
    many = arguments(room, folder, num_iterations=400, eval_every=50)
    user = unprivileged if cause == "forbidden" else lambda: None  # only one's own processes can be limited
    for trial in range(10):
        if cause == "full" and not hasattr(resource, "prlimit"):
            pytest.skip("a limit is put on another process on Linux only")
        process = Fork(train_grpo.main, many, user)
        while not (folder / f"checkpoints/step-{2 + 20 * trial:08d}").exists():
            time.sleep(0.002)
        time.sleep(random.Random(trial).uniform(0, 0.1))
        if cause == "full":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        else:
            (folder / "checkpoints").chmod(0o555)
        the_error(process.wait(), FULL if cause == "full" else FORBIDDEN, folder)
        writable(folder)
        checkpoint, problems = newest_checkpoint(folder)
        assert problems == []
        assert checkpoint.step >= 2 + 20 * trial
    last = forked(train_grpo.main, many, user)
    assert last[0] == 0, last
    reference = a_run(room, f"reference {cause}", num_iterations=400, eval_every=50)
    assert fingerprint(folder) == fingerprint(reference)


# --- the plots alone ---


@pytest.mark.parametrize("cause", ["full", "forbidden", "forbidden parent", "in the way"])
def test_plots_that_cannot_be_written_are_named_and_the_old_ones_kept(whole, folder, cause):
    shutil.copytree(whole, folder)
    (folder / "closed").mkdir()
    give_away(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    more = []
    if cause == "forbidden":
        folder.chmod(0o555)
    if cause == "forbidden parent":
        (folder / "closed").chmod(0o555)
        more = ["--out", folder / "closed" / "pictures"]
    if cause == "in the way":
        (folder / f".{CURVE}").write_text("not yours")
        (folder / f".{CURVE}").chmod(0o444)

    def limits():
        unprivileged()
        if cause == "full":
            small_files_only(31_200)

    result = forked(plot_metrics.main, [folder, *more], limits)
    the_error(result, FULL if cause == "full" else FORBIDDEN, folder)
    writable(folder)
    (folder / f".{CURVE}").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    status, out, err = forked(plot_metrics.main, [folder, *more], unprivileged)
    assert (status, out.count(".png"), err) == (0, 3, "")
