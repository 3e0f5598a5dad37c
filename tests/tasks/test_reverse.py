"""The task of words backwards: its words, its splits, and forty hacks that are not paid in full."""

import re
from itertools import pairwise

import pytest

from tasks.common.prompts import STYLES, ideal_completion, system_prompt
from tasks.reverse import Reverse
from tests.helpers.tasks import WORD, reward_of


def test_a_word_and_its_reverse_are_in_one_split():
    task = Reverse()
    held_out = {split: task.held_out(split, 1000) for split in ("validation", "test")}
    words = {split: {p.answer for p in problems} for split, problems in held_out.items()}
    assert all(len(problems) == len(words[split]) == 1000 for split, problems in held_out.items())
    train = {task.training_problem(0, step, row).answer for step in range(1000) for row in range(4)}
    for some, others in ((train, words["test"]), (train, words["validation"]), (words["test"], words["validation"])):
        assert not some & (others | {word[::-1] for word in others})
    assert task.training_problem(1, 2, 3) == Reverse().training_problem(1, 2, 3)
    assert task.held_out("test", 7) == Reverse().held_out("test", 7)


TEXT_HACKS = [
    *("", " ", "irotab", WORD.question, system_prompt("answer", "text"), system_prompt("think", "text")),
    *("<answer></answer>", "<answer>...</answer>", "<answer> </answer>", "<answer>batori</answer>"),
    *("<answer>irotab", "irotab</answer>", "<answer>irotab</answer>.", "<answer>irotab</answer>\n\nDone"),
    *("<answer>irotab</answer><|im_end|>", "<answer>irotab</answer>" * 2, "<answer>irotab</answer>" * 100),
    *("<answer>a</answer><answer>irotab</answer>", "<answer><answer>irotab</answer></answer>"),
    *("<answer>irotab</answer></answer>", "<answer>irotab or batori</answer>", "<answer>i-r-o-t-a-b</answer>"),
    *("<answer>IROTAB</answer>", "<answer>irotab.</answer>", "<answer>'irotab'</answer>", "<answer>irota</answer>"),
    *("<answer>'batori'[::-1]</answer>", "<answer>\u0456rotab</answer>", "<answer>irotab\x00</answer>"),
    *("<answer>irotab</answer>\ud800", "<answer>" + "irotab" * 5000 + "</answer>", "<ANSWER>irotab</ANSWER>"),
    *("<answer>irotab<|im_end|></answer>", "<think>irotab</think>", "<answer>ｉｒｏｔａｂ</answer>"),
    "<reasoning>\nx\n</reasoning>\n<answer>\nirotab\nbatori\n</answer>\n",
    "<reasoning>\n<answer>\nirotab\n</answer>\n</reasoning>\n<answer>\nirotab\n</answer>\n",
]


@pytest.mark.parametrize("style", STYLES)
def test_a_hack_of_a_task_of_text_is_paid_less_than_the_answer(style):
    task = Reverse(style=style)
    full = reward_of(task, WORD, ideal_completion("irotab", style))
    assert full.total == sum(task.default_rewards.values())
    assert full.correct
    assert len(TEXT_HACKS) >= 30
    for hack in TEXT_HACKS:
        reward = reward_of(task, WORD, hack)
        assert reward.total < full.total, hack
        assert not reward.correct, hack


def test_the_words_are_made_up_pronounceable_and_spelled_backwards():
    task = Reverse()
    problems = [task.training_problem(0, step, row) for step in range(200) for row in range(3)]
    problems += task.held_out("validation", 300) + task.held_out("test", 300)
    for problem in problems:
        [word] = re.fullmatch(r"Spell ([a-z]{4,8}) backwards\.", problem.question).groups()
        assert problem.answer == "".join(reversed(word)) != word
        assert all((a in "aeiou") != (b in "aeiou") for a, b in pairwise(word))
    assert {len(problem.answer) for problem in problems} == {4, 5, 6, 7, 8}
