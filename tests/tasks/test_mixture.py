"""Several tasks as one: shares, prompts, grades and rewards by task, and what is refused."""

from collections import Counter

import pytest

from grpo.config import TrainConfig
from grpo.model_card import resolve
from tasks.arithmetic import Arithmetic
from tasks.base import Problem, asked, prompt_of
from tasks.common.shots import solved_problem
from tasks.registry import make_task, task_shares
from tasks.reverse import Reverse
from tasks.rewards.scoring import rewards_of, score
from tasks.selection.mixture import Mixture
from tests.helpers.data import town_rows, write
from tests.helpers.tasks import untimed

BOTH = ("arithmetic=0.7", "reverse=0.3")
MINE = """
from dataclasses import dataclass
from tasks.base import Problem
from tasks.common.drawn_task import DrawnTask

def near(completions, task, **columns):
    assert set(task) == {"Sums"}
    return [0.5] * len(completions)

@dataclass(frozen=True, kw_only=True)
class Sums(DrawnTask):
    name: str = "sums"
    largest: int = 50
    default_rewards = {f"{__file__}:near": 0.5, "exact": 2.0}

    def draw(self, rng):
        a, b = rng.randint(1, self.largest), rng.randint(1, self.largest)
        return Problem(f"Add {a} and {b}.", str(a + b))
"""


def mixture(*specs, **settings):
    """Return the mixture that these --task make."""
    return make_task(TrainConfig(task=specs, **settings))


@pytest.fixture
def mine(tmp_path):
    """Return a file with a task."""
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    return str(path)


def test_a_task_alone_is_that_task():
    assert make_task(TrainConfig(prompt_wording="plain")) == Arithmetic()
    assert make_task(TrainConfig(task="reverse", prompt_wording="plain")) == Reverse()
    assert TrainConfig(task="reverse").to_dict()["task"] == "reverse"  # as every file has it
    assert TrainConfig(task=("reverse",)) == TrainConfig(task="reverse") == TrainConfig(task=["reverse"])


def test_a_row_is_of_a_task_by_weight_and_a_function_of_its_place():
    task, again = mixture(*BOTH), mixture("arithmetic=7", "reverse=3")  # weights are relative
    places = [(seed, step, row) for seed in (0, 1) for step in range(100) for row in range(8)]
    drawn = [task.training_problem(*place) for place in places]
    assert drawn == [again.training_problem(*place) for place in places]
    shares = Counter(problem.category for problem in drawn)
    assert 0.67 < shares["arithmetic"] / len(places) < 0.73  # 1600 draws: 0.7 ± 2.6 standard deviations
    for place, problem in zip(places[:20], drawn, strict=False):
        own = {"arithmetic": Arithmetic(), "reverse": Reverse()}[problem.category].training_problem(*place)
        assert (problem.question, problem.answer) == (own.question, own.answer)


def test_what_is_held_out_is_what_each_task_holds_out_in_these_shares():
    task = mixture(*BOTH)
    held = {split: task.held_out(split, limit) for split, limit in (("validation", 500), ("test", 1000))}
    assert Counter(p.category for p in held["validation"]) == {"arithmetic": 350, "reverse": 150}
    assert Counter(p.category for p in held["test"]) == {"arithmetic": 508, "reverse": 300}  # 508 is all there are
    assert [p.question for p in held["test"][:508]] == [p.question for p in Arithmetic().held_out("test", 700)]
    assert Counter(p.category for p in task.held_out("test", 1)) == {"arithmetic": 1, "reverse": 1}
    drawn = {task.training_problem(0, step, row).question for step in range(50) for row in range(8)}
    assert not drawn & {problem.question for problems in held.values() for problem in problems}


def test_each_task_asks_grades_and_teaches_in_its_own_way():
    task = mixture("arithmetic=1", "countdown=1", shots=2)
    sums, numbers = (next(p for p in task.held_out("test", 10) if p.category == name) for name in task.parts)
    system, *turns, question = prompt_of(task, numbers)
    assert "the answer" in system["content"]
    assert [turn["content"][:5] for turn in turns[::2]] == ["Make "] * 2
    assert question["content"] == numbers.question
    assert "the result" in prompt_of(task, sums)[0]["content"]
    assert (asked(task)["kind"], asked(task)["tasks"]["countdown"]["kind"]) == ("integer", "text")
    right = f"<answer>{numbers.answer}</answer>"
    attempt = task.grade(numbers, right)
    assert (attempt.correct, attempt.kind) == (True, "text")
    assert not task.grade(sums, right).correct
    for row in range(8):
        problem, completion = solved_problem(task, 0, -2, row)
        assert task.grade(problem, completion).correct


def test_a_reward_that_tasks_share_is_one_and_others_apply_to_their_own_task(mine):
    settings = TrainConfig(task=("arithmetic=1", "reverse=1"))
    shared = rewards_of(settings, make_task(settings))
    assert [(reward.name, reward.weight) for reward in shared] == [("format", 0.2), ("close", 0.2), ("exact", 0.6)]
    settings = TrainConfig(task=("arithmetic=1", f"{mine}:Sums=1"))
    task = make_task(settings)
    rewards = rewards_of(settings, task)
    assert [r.name for r in rewards] == ["format", "close", "exact/arithmetic", "near", "exact/Sums"]
    own, other = (Problem("Q", "5", category=name) for name in ("arithmetic", "Sums"))
    attempts = [task.grade(problem, "<answer>5</answer>") for problem in (own, other, own)]
    first, second, third = score(rewards, attempts, {"completion_ids": [[1], [2], [3]]}, untimed)
    assert first.parts == {"format": 0.2, "close": 0.2, "exact/arithmetic": 0.6, "near": None, "exact/Sums": None}
    assert second.parts == dict.fromkeys(("format", "close", "exact/arithmetic")) | {"near": 0.25, "exact/Sums": 2.0}
    assert (first.total, second.total, third) == (pytest.approx(1.0), 2.25, first)
    everywhere = TrainConfig(task=settings.task, reward=("exact=1",))
    assert [r.name for r in rewards_of(everywhere, task)] == ["exact"]


def test_advice_names_its_task():
    hints = mixture(*BOTH).hints
    assert hints["too_hard"].startswith("arithmetic: Lower --max-operand. reverse: In most models")


def test_a_task_of_a_file_goes_by_its_name_there_with_its_arguments(mine, tmp_path):
    task = mixture("countdown=1", f"{mine}:Sums=2", task_arg=("largest=9",), numbers=4)
    assert isinstance(task, Mixture)
    assert (task.name, task.parts["Sums"].largest, task.parts["countdown"].numbers) == ("countdown and Sums", 9, 4)
    assert list(task.files) == [mine]
    towns = write(tmp_path / "towns.jsonl", town_rows())
    assert mixture("jsonl=1", "reverse=1", data=towns).parts["jsonl"].name == "jsonl"
    odd = tmp_path / "a=b.py"
    odd.write_text(MINE, encoding="utf-8")
    assert [share.weight for share in task_shares([f"{odd}:Sums=0.5", "reverse=1"])] == [0.5, 1.0]
    assert [share.weight for share in task_shares(f"{odd}:Sums")] == [None]


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (["arithmetic=0.7"], "a single task"),
        (["arithmetic", "reverse"], "'arithmetic' has no weight"),
        (["arithmetic=1", "reverse"], "'reverse' has no weight"),
        (["arithmetic=-1", "reverse=1"], "weight -1"),
        (["arithmetic=0", "reverse=1"], "weight 0"),
        (["arithmetic=nan", "reverse=1"], "weight nan"),
        (["arithmetic=inf", "reverse=1"], "weight inf"),
        (["arithmetic=much", "reverse=1"], "NAME=WEIGHT"),
        (["arithmetic=1", "arithmetic=2"], "'arithmetic' is given twice"),
        (["jsonl=1", "jsonl=2"], "--data"),
        (["jsonl=1", "gsm8k=1"], "jsonl and gsm8k share --data"),
        (["mine.py:A=1", "other.py:A=1"], "'A' is given twice"),
        (["mine.py:arithmetic=1", "arithmetic=1"], "'arithmetic' is given twice"),
        (["chess=1", "reverse=1"], "--task is 'chess'"),
        (["=1", "reverse=1"], "--task is ''"),
        ([], "--task is empty"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(specs, said):
    with pytest.raises(ValueError, match=said) as caught:
        TrainConfig(task=tuple(specs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"numbers": 4}, "--numbers"),
        ({"data": "x.jsonl"}, "--data"),
        ({"task": ("a.py:A=1", "b.py:B=1"), "task_arg": ("x=1",)}, "--task-arg needs one --task"),
    ],
)
def test_an_option_of_none_of_the_tasks_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        resolve({"task": BOTH, **given})
    assert resolve({"task": BOTH, "max_operand": 5}).max_operand == 5
    with pytest.raises(ValueError, match="--data"):
        make_task(TrainConfig(task=BOTH, data="x.jsonl"))
