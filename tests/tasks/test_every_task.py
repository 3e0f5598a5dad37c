"""What all tasks have in common: pinned splits, chats, and scores of any text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.arithmetic import Arithmetic
from tasks.base import split_of
from tasks.reverse import Reverse
from tasks.skills import SKILLS
from tests.helpers.tasks import TASK, reward_of

ROOT = Path(__file__).parents[2]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates included
NEAR_MISS = st.lists(
    st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "-", "5", "9" * 5000, "٤", " ", "\n", "..."]),
    max_size=8,
).map("".join)


EVERY_TASK = {
    "arithmetic": TASK,
    "arithmetic, think": Arithmetic(style="think"),
    "arithmetic, reasoning": Arithmetic(style="reasoning"),
    "reverse": Reverse(),
    "reverse, reasoning": Reverse(style="reasoning"),
    **SKILLS,
}


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_chat_asks_the_question_last(name):
    task = EVERY_TASK[name]
    messages = task.messages("What is (4 - 9) * 6?")
    assert messages[-1] == {"role": "user", "content": "What is (4 - 9) * 6?"}
    assert [m["role"] for m in messages] in (["user"], ["system", "user"])
    assert all(type(text) is str for message in messages for text in message.values())


@pytest.mark.parametrize("name", EVERY_TASK)
def test_scoring_never_raises_whatever_the_text(name):
    task = EVERY_TASK[name]
    problem = task.held_out("test", 1)[0]

    @given(st.one_of(ANY_TEXT, NEAR_MISS, st.builds("{}<answer>{}</answer>".format, ANY_TEXT, NEAR_MISS)))
    @settings(max_examples=150, deadline=None)
    def check(text):
        reward = reward_of(task, problem, text)
        assert 0.0 <= reward.total <= sum(task.default_rewards.values())
        assert reward.total == sum(reward.parts.values())
        assert set(reward.parts) == set(task.default_rewards)
        if reward.correct:
            assert problem.answer in text

    check()


IN_ANOTHER_PROCESS = """
import json
from tasks.arithmetic import Arithmetic
from tasks.skills import SKILLS
tasks = [Arithmetic(), *SKILLS.values()]
print(json.dumps([
    [[p.question, p.answer] for p in [
        *task.held_out("validation", 60),
        *task.held_out("test", 60),
        *(task.training_problem(3, s, 1) for s in range(60)),
    ]]
    for task in tasks
]))
"""


def test_problems_and_splits_are_the_same_in_every_process():
    # PYTHONHASHSEED salts Python's own hash of a string, so nothing may depend on that hash.
    texts = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        texts.append(run.stdout)
    assert texts[0] == texts[1]
    first = TASK.held_out("validation", 60)[0]
    assert json.loads(texts[0])[0][0] == [first.question, first.answer]


def test_a_split_is_pinned():
    # If a split changes, every published accuracy was measured on other problems. By hand: the first 16 digits of
    # `printf '(4 - 9) * 6' | sha256sum`, modulo 10; 0 is validation, 1 is test.
    by_hand = {"(4 - 9) * 6": "validation", "(1 + 2) + 3": "train", "(0 + 0) + 0": "test"}
    assert {key: split_of(key) for key in by_hand} == by_hand
