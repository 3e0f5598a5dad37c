"""The file of samples: whole groups every few steps, cut back to the step of a checkpoint after a resume."""

import json
import os

import pytest

from grpo.record.samples import EVERY, FILE_NAME, GROUPS, Samples
from tests.helpers.rollouts import ODD, a_rollout


def add(samples, step):
    """Record the first groups of a step as a run does, if the step is recorded."""
    if samples.wants(step):
        samples.add(a_rollout().samples(step, GROUPS))


def test_samples_are_whole_lines_of_some_groups_every_few_steps(tmp_path):
    samples = Samples(tmp_path)
    for step in range(1, 2 * EVERY + 1):
        add(samples, step)
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text(encoding="utf-8").split("\n")[:-1]]
    assert [line["step"] for line in lines] == [step for step in (1, EVERY, 2 * EVERY) for _ in range(GROUPS * 2)]
    assert lines[3] == {
        "step": 1,
        "prompt": "What is 1?",
        "completion": ODD,
        "rewards": {"format": 0.2, "close": 0.2, "mine": None},
        "reward": 0.4,
        "advantage": 1.5,
        "correct": False,
    }


def test_samples_are_truncated_to_a_step_and_incomplete_lines_removed(tmp_path):
    samples, path = Samples(tmp_path), tmp_path / FILE_NAME
    samples.truncate(3)  # there is no file: nothing to do
    add(samples, 1)
    first = path.read_bytes()
    add(samples, EVERY)
    path.write_bytes(path.read_bytes() + b'not json\n[1]\n{"step": 1, "prom')
    samples.truncate(EVERY)
    assert len(path.read_bytes().splitlines()) == 2 * GROUPS * 2
    samples.truncate(EVERY - 1)
    assert path.read_bytes() == first


def test_without_a_folder_nothing_is_recorded():
    samples = Samples(None)
    assert not any(samples.wants(step) for step in range(1, 2 * EVERY))
    samples.truncate(1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full is a matter of Linux")
def test_a_failed_write_names_the_file(tmp_path):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    with pytest.raises(OSError, match=FILE_NAME):
        add(Samples(tmp_path), 1)
