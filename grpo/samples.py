"""Completions as they were sampled, in grpo_samples.jsonl: one JSON object a line.

{"step", "prompt": the question, "completion", "rewards": {part: number or null}, "reward", "advantage", "correct"}
"""

import json
import os
from pathlib import Path

from grpo.files import SAMPLES, writing
from grpo.rollout import RolloutBatch

EVERY = 5  # steps; the first one too
GROUPS = 2  # of a step


class Samples:
    """The file of a run: some groups every few steps, whole, and cut back to where a run goes on."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder nothing is written: another process of the run does."""
        self.path = folder / SAMPLES if folder else None

    def add(self, step: int, rollout: RolloutBatch) -> None:
        """Append the first groups of a step's rollout, if it is this step's turn."""
        if self.path is None or (step != 1 and step % EVERY):
            return
        per_group = len(rollout.completions) // len(rollout.problems)
        lines = []
        for row, completion in enumerate(rollout.completions[: GROUPS * per_group]):
            reward = rollout.rewards[row]
            entry = {
                "step": step,
                "prompt": rollout.problems[row // per_group].question,
                "completion": completion,
                "rewards": dict(reward.parts),
                "reward": reward.total,
                "advantage": float(rollout.advantages[row]),
                "correct": reward.correct,
            }
            lines.append(json.dumps(entry) + "\n")
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def cut(self, step: int) -> None:
        """Forget what was sampled after `step`, and lines that are not whole."""
        if self.path is None or not self.path.exists():
            return
        with writing(self.path):
            kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _is_of(line, step)]
            temporary = self.path.with_name(f".{self.path.name}.new")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.path)


def _is_of(line: bytes, last: int) -> bool:
    """Whether a line is whole, and of a step up to the last."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
