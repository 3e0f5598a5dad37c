"""Write files so that a crash or a full disk leaves either the old content or the new, never a mixture or a part."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file, or the list of the files in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and flushes this list itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, durable: bool = False) -> None:
    """Replace the content of `path` by `data`, completely or not at all. With `durable`, flush it to the disk first.

    Raises an OSError that names the file.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with name_in_errors(path):
            with temporary.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise an OSError that names `what` if fewer than `needed` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"cannot write {what} to {folder}: {os.strerror(errno.ENOSPC)} ({needed / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free)"
        )


@contextmanager
def name_in_errors(path: Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Add the path to errors raised in the block, because the system's error for a full disk names no file.

    Exceptions of `kinds` become an OSError. An OSError that already names a file passes through.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"cannot write {path}: {reason}") from None


def restore_interrupted_swap(folder: Path) -> None:
    """Rename `.NAME.old` back to NAME, if a process was killed between the two renames that replace a folder."""
    earlier = folder.with_name(f".{folder.name}.old")
    if earlier.is_dir() and not folder.exists():
        earlier.rename(folder)
