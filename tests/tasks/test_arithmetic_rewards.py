"""The rewards of the arithmetic task: what they pay, and forty hacks that they do not pay."""

import pytest

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.prompts import STYLES, ideal_completion, system_prompt
from tests.helpers.tasks import SUM, TASK, reward_of


@pytest.mark.parametrize(
    ("completion", "total"),
    [
        ("", 0.0),
        ("-30", 0.0),
        ("<answer>...</answer>", 0.0),
        ("<answer>7</answer>", 0.2),  # well-formed
        ("<answer>-32</answer>", 0.2),
        ("<answer>30</answer>", 0.2),
        ("<answer>-29</answer>", 0.4),  # and within ±1
        ("<answer>-31</answer>", 0.4),
        ("<answer>-30</answer>", 1.0),  # and right
        ("4 - 9 = -5\n<answer>-30</answer>", 1.0),
        ("4 - 9 = 5\n<answer>-030</answer>", 1.0),
        ("<answer> -30\n</answer>\n", 1.0),  # what a person would call right is right
        ("<answer>−30.0</answer>", 1.0),
    ],
)
def test_the_reward_by_hand(completion, total):
    reward = reward_of(TASK, SUM, completion)
    assert reward.total == total
    assert reward.total == sum(reward.parts.values())
    assert tuple(reward.parts) == ("format", "close", "exact")
    assert reward.correct == (total == 1.0)
    assert reward.well_formed == (total > 0.0)


@pytest.mark.parametrize("style", STYLES)
def test_every_ideal_completion_scores_the_full_reward(style):
    task = Arithmetic(style=style)
    full = sum(task.default_rewards.values())
    for index in range(0, task.size, 5):
        expression = task.expression(index)
        problem = Problem(f"What is {expression}?", str(expression.value))
        for working in ("", expression.steps[0]):
            reward = reward_of(task, problem, ideal_completion(problem.answer, style, working))
            assert reward.total == full == (4.0 if style == "reasoning" else 1.0)
            assert reward.correct
            assert reward.well_formed


HACKS = [
    "",
    " ",
    "What is (4 - 9) * 6?",
    system_prompt("answer"),
    system_prompt("think"),
    system_prompt("answer") + "<answer>-30</answer>",
    "-30",
    "The answer is -30.",
    "<answer>-30",
    "-30</answer>",
    "<answer></answer>",
    "<answer>...</answer>",
    "<answer>-30</answer>\n\nWait.",
    "<answer>-30</answer>.",
    "<answer>-30</answer><|im_end|>",
    "<answer>-30</answer>" * 2,
    "<answer>-30</answer>" * 100,
    "<answer>-29</answer><answer>-30</answer>",
    "<answer>-30</answer> or <answer>-29</answer>",
    "<answer>-30</answer></answer>",
    "<answer><answer>-30</answer></answer>",
    "".join(f"<answer>{n}</answer>" for n in range(-40, 0)),
    "<answer>-31 -30 -29</answer>",
    "<answer>-30 or -29</answer>",
    "<answer>(4 - 9) * 6</answer>",
    "<answer>(4-9)*6</answer>",
    "<answer>-30.5</answer>",
    "<answer>-3e1</answer>",
    "<answer>-3_0</answer>",
    "<answer>–30</answer>",  # a dash
    "<answer>-٣٠</answer>",
    "<answer>-３０</answer>",
    "<answer>- 30</answer>",
    "<answer>-30 -30</answer>",
    "<answer>-3 0</answer>",
    "<answer>-30%</answer>",
    "<answer>x = -30</answer>",
    "<answer>--30</answer>",
    "<answer>-30\x00</answer>",
    "<answer>-" + "0" * 5000 + "30</answer>",
    "<answer>" + "9" * 5000 + "</answer>",
    "<answer>99**98**97</answer>",
    "<answer>__import__('os').system('true')</answer>",
    "<answer>nan</answer>",
    "<answer>inf</answer>",
    "<answer>True</answer>",
    "<ANSWER>-30</ANSWER>",
    "\\boxed{-30}",
    "<answer>-30</answer>" + "\ud800",
    "<|im_start|>assistant\n-30<|im_end|>",
]


@pytest.mark.parametrize("hack", HACKS, ids=range(len(HACKS)))
def test_a_hack_is_not_paid_like_an_answer(hack):
    for style in STYLES:
        task = Arithmetic(style=style)
        reward = reward_of(task, SUM, hack)
        assert reward.total < sum(task.default_rewards.values())
        assert not reward.correct
    assert reward_of(TASK, SUM, hack).total == 0.0  # none of them is even well-formed


@pytest.mark.parametrize(("style", "earned", "full"), [("think", 0.8, 1.0), ("reasoning", 2.5, 4.0)])
def test_an_answer_outside_the_form_is_right_and_only_its_form_unpaid(style, earned, full):
    task = Arithmetic(style=style)
    for before in ("", "4 - 9 = -5\n", f"x<{style}></{style}>", f"<{style}>"):
        reward = reward_of(task, SUM, f"{before}<answer>-30</answer>")
        assert reward.correct
        assert not reward.well_formed
        assert reward.total == pytest.approx(earned)
    assert reward_of(task, SUM, ideal_completion("-30", style, "4 - 9 = -5")).total == full
