"""Checkpoints: whole or absent; damage is always found, and the checkpoint before is used."""

import os
import random
import shutil

import pytest
import torch

from grpo.record import checkpoint as module
from grpo.record.checkpoint import (
    FOLDER,
    MANIFEST,
    PAYLOAD,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def a_checkpoint(step):
    generator = torch.Generator().manual_seed(step)
    policy = {"a.weight": torch.randn(5, 3, generator=generator), "b": torch.randn(2, generator=generator)}
    optimizer = {"0.step": torch.tensor(float(step)), "0.exp_avg": torch.randn(5, 3, generator=generator)}
    return Checkpoint(step, policy, optimizer, {"steps": [{"step": 1, "kl": 0.1 + 0.2}]}, {"best": None})


def is_same(a, b):
    """Check that two checkpoints have the same content; return True."""
    assert a.step == b.step
    for name in ("policy", "optimizer"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)
    assert a.metrics == b.metrics
    return True


def made(folder):
    """Make a folder; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    path = write_checkpoint(tmp_path, a_checkpoint(7))
    assert is_same(read_checkpoint(path), a_checkpoint(7))
    assert sorted(p.name for p in path.iterdir()) == sorted((*PAYLOAD, MANIFEST))


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 3, 30):
        write_checkpoint(tmp_path, a_checkpoint(step))
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["step-00000003", "step-00000030"]
    checkpoint, problems = newest_checkpoint(tmp_path)
    assert is_same(checkpoint, a_checkpoint(30))
    assert problems == []


def test_the_same_step_again_is_the_same(tmp_path):
    for _ in range(2):
        write_checkpoint(tmp_path, a_checkpoint(4))
    assert os.listdir(tmp_path / FOLDER) == ["step-00000004"]


def test_a_cut_at_any_place_is_found_and_the_one_before_is_used(tmp_path):
    rng = random.Random(0)
    for trial in range(100):
        folder = tmp_path / str(trial)
        write_checkpoint(made(folder), a_checkpoint(1))
        path = write_checkpoint(folder, a_checkpoint(2)) / rng.choice((*PAYLOAD, MANIFEST))
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])
        checkpoint, problems = newest_checkpoint(folder)
        assert is_same(checkpoint, a_checkpoint(1))
        assert len(problems) == 1
        assert "step-00000002" in problems[0]
        shutil.rmtree(folder)


def test_a_thousand_single_bits_flipped_are_all_found(tmp_path):
    path = write_checkpoint(tmp_path, a_checkpoint(2))
    rng = random.Random(1)
    names = (*PAYLOAD, MANIFEST)
    sizes = [(path / name).stat().st_size for name in names]
    for _ in range(1000):
        file = path / rng.choices(names, sizes)[0]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="step-00000002"):
            read_checkpoint(path)
        file.write_bytes(good)
    assert is_same(read_checkpoint(path), a_checkpoint(2))


def calls_of_a_write(tmp_path, monkeypatch, fail_at):
    """Write checkpoint 2 beside checkpoint 1 while call `fail_at` to the disk fails; return the number of calls."""
    count = 0

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fail_at:
                raise OSError(28, "No space left on device")
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", counted(module.save_file))
        patch.setattr(module, "_write_json", counted(module._write_json))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(module.Path, "rename", counted(module.Path.rename))
        patch.setattr(module.Path, "write_bytes", counted(module.Path.write_bytes))
        patch.setattr(module.Path, "mkdir", counted(module.Path.mkdir))
        try:
            write_checkpoint(tmp_path, a_checkpoint(2))
        except OSError:
            assert fail_at
    return count


def test_a_failure_at_any_write_fsync_or_rename_leaves_a_run_that_can_continue(tmp_path, monkeypatch):
    write_checkpoint(made(tmp_path / "count"), a_checkpoint(1))
    total = calls_of_a_write(tmp_path / "count", monkeypatch, fail_at=0)
    assert total >= 12
    for n in range(1, total + 1):
        folder = made(tmp_path / str(n))
        write_checkpoint(folder, a_checkpoint(1))
        calls_of_a_write(folder, monkeypatch, fail_at=n)
        checkpoint, problems = newest_checkpoint(folder)
        assert problems == []
        assert is_same(checkpoint, a_checkpoint(checkpoint.step)), "one of the two, whole"
        write_checkpoint(folder, a_checkpoint(3))  # The next checkpoint can be written.
        assert is_same(newest_checkpoint(folder)[0], a_checkpoint(3))


def test_a_failure_while_the_same_step_is_written_again_loses_neither(tmp_path, monkeypatch):
    for n in range(1, 20):
        folder = made(tmp_path / str(n))
        write_checkpoint(folder, a_checkpoint(1))
        write_checkpoint(folder, a_checkpoint(2))
        calls_of_a_write(folder, monkeypatch, fail_at=n)
        assert is_same(newest_checkpoint(folder)[0], a_checkpoint(2))


def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 99)
    path = write_checkpoint(tmp_path, a_checkpoint(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="99"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="99"):
        newest_checkpoint(tmp_path)
    assert path.is_dir(), "it is sound, so it stays where it is"


def test_a_checkpoint_that_may_not_be_read_stays_where_it_is(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, a_checkpoint(1))

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.Path, "read_bytes", forbidden)
    with pytest.raises(ValueError, match="Permission denied"):
        newest_checkpoint(tmp_path)
    assert path.is_dir()
