"""Write sampled completions to grpo_samples.jsonl, one JSON object a line; README.md lists its entries."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.runtime.atomic_io import name_in_errors, write_atomic

FILE_NAME = "grpo_samples.jsonl"
EVERY = 5  # Samples of step 1 and of every fifth step are recorded.
GROUPS = 2  # The first two groups of such a step are recorded.


class Samples:
    """A run's file of sampled completions: two whole groups every few steps."""

    def __init__(self, folder: Path | None) -> None:
        """Write to `folder`, which is None for all ranks but rank 0."""
        self.path = folder / FILE_NAME if folder else None

    def wants(self, step: int) -> bool:
        """Return whether samples of this step are recorded."""
        return self.path is not None and (step == 1 or step % EVERY == 0)

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each completion. Raises an OSError that names the file."""
        with name_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def truncate(self, step: int) -> None:
        """Remove completions that were sampled after `step`, and damaged lines."""
        if self.path is None or not self.path.exists():
            return
        with name_in_errors(self.path):
            kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _is_until(line, step)]
        write_atomic(self.path, b"".join(kept))


def _is_until(line: bytes, last: int) -> bool:
    """Return whether a line is whole and its step is at most `last`."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
