"""Writes that begin to fail during a run: the disk is full or read-only, a folder is closed to the run.

The test chooses when it begins; that it fails is the system's doing, in a process of its own. Whatever the cause and
the file: exit status 1, one line that names both, a sound last checkpoint, and when the cause is gone the same
command ends as if nothing had happened.
"""

import os
import random
import shutil
import subprocess
import time

import pytest

import train_grpo
from tests.helpers.faults import (
    FORBIDDEN,
    FULL,
    NO_SPACE,
    READ_ONLY,
    arguments,
    assert_continues,
    assert_sound,
    assert_sound_from,
    at_call,
    give_away,
    limit_file_size,
    make_writable,
    the_error,
    undisturbed,
    unprivileged,
)
from tests.helpers.runs import Fork, fingerprint, forked, spawned

resource = pytest.importorskip("resource", reason="only POSIX has limits of a process")
PAGE = 4096

# --- each place, each cause ---

SLOW = pytest.mark.slow
# the file, which of its writes fails, and the step of the newest checkpoint at that time
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
def test_a_disk_fills_up_during_a_run(public, whole_run, run_folder, place, number, step, size):
    def before():
        unprivileged()
        at_call(place, number, lambda: limit_file_size(size))

    the_error(forked(train_grpo.main, arguments(public, run_folder), before), FULL, run_folder)
    assert_sound(run_folder, step)
    assert_continues(public, run_folder, whole_run, plots=place == "plots")


@pytest.mark.parametrize(("place", "number", "step"), MOMENTS)
def test_a_folder_becomes_read_only_during_a_run(public, whole_run, run_folder, place, number, step):
    def close():
        for path in (run_folder / "checkpoints", run_folder):
            if path.exists():
                path.chmod(0o555)

    def before():
        unprivileged()
        at_call(place, number, close)

    line = the_error(forked(train_grpo.main, arguments(public, run_folder), before), FORBIDDEN, run_folder)
    assert ".grpo.pid" not in line  # the error names what failed first, not what failed while the run ended
    assert_sound(run_folder, step)
    make_writable(run_folder)
    assert_continues(public, run_folder, whole_run, plots=place == "plots")


def mounted(*args):
    """Mount something, or skip the test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(public):
    """Mount a disk of 2 MB."""
    disk = public / "disk"
    disk.mkdir()
    try:
        mounted("-t", "tmpfs", "-o", "size=2m,mode=777", "tmpfs", disk)
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)
    finally:
        disk.rmdir()


@pytest.mark.parametrize(("place", "number", "step"), [MOMENTS[5], pytest.param(*MOMENTS[1], marks=SLOW)])
def test_a_disk_becomes_read_only_during_a_run(public, whole_run, small_disk, place, number, step):
    folder = small_disk / "run"

    def close():
        for how in ("bind", "remount,ro,bind"):
            subprocess.run(["mount", "-o", how, str(folder), str(folder)], check=True)

    result = forked(train_grpo.main, arguments(public, folder), lambda: at_call(place, number, close))
    assert ".grpo.pid" not in the_error(result, READ_ONLY, folder)
    the_error(forked(train_grpo.main, arguments(public, folder)), "read-only", folder)
    assert_sound(folder, step)
    subprocess.run(["umount", "-l", str(folder)], check=True)
    shutil.copytree(folder, small_disk / "open")  # belongs to the user that continues the run
    give_away(small_disk / "open")
    assert_continues(public, small_disk / "open", whole_run)


# --- wherever a write may fail ---


def fill(disk, pages):
    """Fill a disk until only this many pages are free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(file.tell() - pages * PAGE)


@pytest.mark.parametrize("pages", [pytest.param(n, marks=() if n in (2, 30) else SLOW) for n in range(75)])
def test_a_run_finds_little_room_when_it_continues(public, whole_run, half_run, small_disk, pages):
    # 2 pages: not even the metrics; 20: no checkpoint; 29 to 32: no model; 45 to 60: no plot
    folder = small_disk / "run"
    shutil.copytree(half_run, folder)
    fill(small_disk, pages)
    result = forked(train_grpo.main, arguments(public, folder))
    if result[0]:
        the_error(result, NO_SPACE, folder)
    assert_sound_from(folder, 2)
    assert (folder / "saved_model/model.safetensors").stat().st_size > 30_000
    (small_disk / "filler").unlink()
    give_away(folder)
    assert_continues(public, folder, whole_run)


def test_a_run_as_a_user_starts_it_finds_no_room(public, whole_run, half_run, run_folder):
    shutil.copytree(half_run, run_folder)
    result = spawned("train_grpo.py", arguments(public, run_folder), lambda: limit_file_size(31_200))
    the_error(result, FULL, run_folder)
    assert_sound(run_folder, 2)
    give_away(run_folder)
    assert_continues(public, run_folder, whole_run)


@SLOW
@pytest.mark.parametrize("cause", ["full", "forbidden"])
def test_a_fault_begins_at_any_moment_of_a_run(public, run_folder, cause):
    # from outside, at a moment that the run cannot know of
    many = arguments(public, run_folder, num_iterations=400, eval_every=50)
    user = unprivileged if cause == "forbidden" else lambda: None  # a user can only limit processes of the same user
    for trial in range(10):
        if cause == "full" and not hasattr(resource, "prlimit"):
            pytest.skip("only Linux can limit another process")
        process = Fork(train_grpo.main, many, user)
        while not (run_folder / f"checkpoints/step-{2 + 20 * trial:08d}").exists():
            time.sleep(0.002)
        time.sleep(random.Random(trial).uniform(0, 0.1))
        if cause == "full":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        else:
            (run_folder / "checkpoints").chmod(0o555)
        the_error(process.wait(), FULL if cause == "full" else FORBIDDEN, run_folder)
        make_writable(run_folder)
        assert_sound_from(run_folder, 2 + 20 * trial)
    last = forked(train_grpo.main, many, user)
    assert last[0] == 0, last
    reference = undisturbed(public, f"reference {cause}", num_iterations=400, eval_every=50)
    assert fingerprint(run_folder) == fingerprint(reference)
