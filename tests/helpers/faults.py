"""Runs as a user without privileges, faults that begin while they write, and what must be true afterwards."""

import os
import subprocess
from pathlib import Path

import click
import matplotlib
import torch
import transformers

import train_grpo
from grpo import measurer, resume, trainer
from grpo.model_card import STARTER
from grpo.record.checkpoint import newest_checkpoint
from grpo.record.metrics import Metrics
from tests.helpers.runs import ROOT, fingerprint, forked, options

NOBODY = 65534
FULL, FORBIDDEN, READ_ONLY, NO_SPACE = map(os.strerror, (27, 13, 30, 28))
# One file of each folder that a run still reads after it has become another user: of the clone and of the packages.
READ_BY_A_RUN = [
    ROOT / "grpo/recipes/starter.json",
    STARTER / "config.json",
    Path(click.__file__),
    Path(torch.__file__),
    Path(transformers.__file__),
    Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"),
]
# The functions that a run calls to write each of its outputs.
PLACES = {
    "checkpoint": (resume, "write_checkpoint"),
    "saved model": (measurer, "save"),
    "metrics": (Metrics, "write"),
    "plots": (trainer, "draw_all"),
}


def arguments(public, folder, **settings):
    """Return the arguments of a run in `folder` of the model in the public folder."""
    return options(model=public / "model", output_dir=folder, **settings)


def undisturbed(public, name, **settings):
    """Complete a run in a folder of this name in the public folder; return the folder."""
    folder = public / name
    status, _, err = forked(train_grpo.main, arguments(public, folder, **settings), unprivileged)
    assert status == 0, err
    return folder


def unprivileged():
    """Become another user if this is root, because root may write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def unreadable(files):
    """Return the files that the user of `unprivileged` cannot read."""

    def may_read(file):
        return subprocess.run(["test", "-r", file], preexec_fn=unprivileged, cwd="/", check=False).returncode == 0

    return [file for file in files if not may_read(file)]


def give_away(folder):
    """Make a folder belong to the user of the runs."""
    if os.geteuid() == 0:
        for path, _, names in os.walk(folder):
            for name in ("", *names):
                os.chown(os.path.join(path, name), NOBODY, NOBODY)


def make_writable(folder):
    """Make a folder and all below it writable for their owner."""
    folders = [folder]
    for path in folders:
        path.chmod(0o755)
        folders += [below for below in path.iterdir() if below.is_dir()]


def limit_file_size(size):
    """Simulate a full disk for this process: let no file grow beyond this number of bytes."""
    import resource  # exists on POSIX only

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def at_call(place, number, fault):
    """Make the fault happen when a place is about to be written for the n-th time."""
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
    """Return the one line that a failed launch ends with, after checking that it is the only one, and its content."""
    status, _, err = result
    assert status == 1, err
    *before, last = err.splitlines()
    assert last.startswith("Error: "), err
    assert all(line == "" or line.startswith(("step ", "Loading ")) for line in before), err  # progress
    assert reason in last
    assert any(str(name) in last for name in names), last
    return last


def assert_sound(folder, step):
    """Check that the newest checkpoint verifies, and that it is of this step; None for no checkpoint."""
    checkpoint, problems = newest_checkpoint(folder)
    assert problems == []
    assert (checkpoint.step if checkpoint else None) == step


def assert_sound_from(folder, least):
    """Check that the newest checkpoint verifies, and that it is of this step or a later one."""
    checkpoint, problems = newest_checkpoint(folder)
    assert problems == []
    assert checkpoint.step >= least


def without_plots(before=unprivileged):
    """Return a function to call in a fork: it switches the plots off, which take a second, then calls `before`."""

    def switch_off():
        trainer.draw_all = lambda *_: []
        before()

    return switch_off


def assert_continues(public, folder, whole_run, plots=False):
    """Check that the same command ends as an undisturbed run does; draw its plots only if asked to."""
    before = unprivileged if plots else without_plots()
    status, _, err = forked(train_grpo.main, arguments(public, folder), before)
    assert status == 0, err
    assert fingerprint(folder) == fingerprint(whole_run)
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".grpo.lock"]
