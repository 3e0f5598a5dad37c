"""Atomic writes: the old content or the new, never a part; an error names the file, no temporary file stays."""

import errno
import os
from pathlib import Path

import pytest

from grpo.runtime import atomic_io
from grpo.runtime.atomic_io import name_in_errors, restore_interrupted_swap, write_atomic

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def path(tmp_path):
    """Return the path of a file with old content."""
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    return path


def full_disk(*args):
    raise OSError(errno.ENOSPC, FULL)  # without the name of a file, as in the system's error


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_or_made(durable, path):
    write_atomic(path, b"the new content", durable)
    write_atomic(path.with_name("other"), b"", durable)
    assert path.read_bytes() == b"the new content"
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {
        "record.json": b"the new content",
        "other": b"",
    }


def test_the_old_content_is_whole_until_the_new_one_is(path, monkeypatch):
    seen, true_replace = [], os.replace

    def replace(source, target):
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent == path.parent))
        true_replace(source, target)

    monkeypatch.setattr(atomic_io.os, "replace", replace)
    write_atomic(path, b"the new content")
    assert seen == [(b"old", b"the new content", True)], "one rename within a folder, which is atomic"


@pytest.mark.parametrize("durable", [False, True])
def test_only_a_durable_write_is_flushed_and_before_it_replaces_the_file(durable, path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(atomic_io.os, name, lambda *args, name=name: calls.append(name))
    write_atomic(path, b"the new content", durable)
    assert calls == ["fsync", "replace"][not durable :]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content_and_names_the_file(call, path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(atomic_io.os, call, full_disk)
        with pytest.raises(OSError, match=FULL) as caught:
            write_atomic(path, b"the new content", durable=True)
    assert str(caught.value) == f"cannot write {path}: {FULL}"
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name], "no temporary file"
    write_atomic(path, b"the new content")
    assert path.read_bytes() == b"the new content"


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_write_that_stops_in_the_middle_of_the_data_leaves_no_part(size, path):
    resource = pytest.importorskip("resource", reason="limits of a process are a matter of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, hard))  # the system writes 7 bytes, then refuses
    try:
        with pytest.raises(OSError, match="cannot write") as caught:
            write_atomic(path, b"x" * size, durable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write {path}: {os.strerror(errno.EFBIG)}"
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name], "no temporary file"


def test_a_folder_that_is_gone_is_named(tmp_path):
    path = tmp_path / "gone" / "record.json"
    with pytest.raises(OSError, match=r"record\.json"):
        write_atomic(path, b"the new content")


def test_a_folder_in_place_of_the_file_is_named_and_kept(tmp_path):
    (tmp_path / "record.json").mkdir()
    with pytest.raises(OSError, match=r"record\.json"):
        write_atomic(tmp_path / "record.json", b"the new content")
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_error_names_the_file_once(path):
    with pytest.raises(OSError, match=r"^cannot write \S+record\.json: of no use$"), name_in_errors(path, ValueError):
        raise ValueError("of no use")
    with pytest.raises(FileNotFoundError) as caught, name_in_errors(path):
        (path.parent / "gone").read_bytes()
    assert caught.value.filename == str(path.parent / "gone")
    with pytest.raises(KeyError), name_in_errors(path):
        raise KeyError


def test_an_interrupted_swap_is_undone_only_where_the_folder_is_missing(tmp_path):
    folder, earlier = tmp_path / "saved_model", tmp_path / ".saved_model.old"
    restore_interrupted_swap(folder)
    assert os.listdir(tmp_path) == []
    earlier.mkdir()
    (earlier / "weights").write_bytes(b"old")
    restore_interrupted_swap(folder)
    assert (folder / "weights").read_bytes() == b"old"
    assert not earlier.exists()
    earlier.mkdir()
    restore_interrupted_swap(folder)
    assert (folder / "weights").read_bytes() == b"old"
    assert earlier.is_dir()
