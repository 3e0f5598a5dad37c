"""A task of a user's own file: `--task FILE.py:NAME`, its arguments, and one line about whatever goes wrong."""

import sys
from types import SimpleNamespace

import pytest

from tasks.common.own_task import load_task
from tasks.common.prompts import ideal_completion
from tasks.common.user_file import PREFIX, naming_own_code
from tasks.registry import make_task, task_options
from tests.helpers.data import example_task, refusal

SUMS = """
from tasks.base import Problem
from tasks.common.drawn_task import DrawnTask

class Sums(DrawnTask):
    def draw(self, rng):
        a, b = rng.randrange(100), rng.randrange(100)
        return Problem(f"Add {a} and {b}.", str(a + b))

    def key(self, problem):
        return " ".join(sorted(problem.question.split()))

def make(largest, style="answer", system_prompt="", name="sums", scale: float = 1.0, loud=False, parts: list = ()):
    assert (type(largest), type(scale), type(loud)) == (str, float, bool)
    return Sums(name=name, style=style, system_prompt=system_prompt or f"Up to {largest}.")
"""


@pytest.fixture
def example(tmp_path):
    (tmp_path / "multiples.py").write_text(example_task(), encoding="utf-8")
    return f"{tmp_path / 'multiples.py'}:Multiples"


@pytest.fixture
def sums(tmp_path):
    (tmp_path / "sums.py").write_text(SUMS, encoding="utf-8")
    return f"{tmp_path / 'sums.py'}:make"


def test_the_example_of_the_page_runs_as_shown(example):
    task = load_task(example, ["largest=9"], "answer", "")
    problems = [*(task.training_problem(0, 1, row) for row in range(200)), *task.held_out("test", 50)]
    assert {problem.columns["of"] for problem in problems} == set(range(2, 10))
    problem = problems[0]
    of, above = problem.columns["of"], problem.columns["above"]
    first = (above // of + 1) * of
    for answer, right in ((first, True), (first + 7 * of, True), (first - of, False), (first + 1, False)):
        assert task.grade(problem, ideal_completion(str(answer), "answer")).correct == right


def test_a_run_makes_the_task_with_its_style_prompt_and_examples(sums):
    options = {name: option.default for name, option in task_options().items()}
    given = {"task": sums, "task_arg": ("largest=7", "loud=yes", "scale=2"), "prompt_style": "think", "shots": 2}
    settings = SimpleNamespace(**options, **given, system_prompt="")
    task = make_task(settings)
    assert (task.style, task.system_prompt, len(task.examples)) == ("think", "Up to 7.", 4)
    assert make_task(SimpleNamespace(**{**vars(settings), "system_prompt": "Add."})).system_prompt == "Add."
    [(path, sha256)] = task.files.items()
    assert path == sums.rpartition(":")[0]
    assert len(sha256) == 64
    with pytest.raises(ValueError, match="does not use --data"):
        make_task(SimpleNamespace(**{**vars(settings), "data": "x.jsonl"}))


def test_problems_are_split_by_their_key(sums):
    task = load_task(sums, ["largest=7"], "answer", "")
    of_split = {
        "train": {task.key(task.training_problem(0, step, row)) for step in range(40) for row in range(20)},
        **{split: {task.key(p) for p in task.held_out(split, 200)} for split in ("validation", "test")},
    }
    assert min(map(len, of_split.values())) > 150
    assert not of_split["train"] & of_split["validation"]
    assert not of_split["train"] & of_split["test"]
    assert not of_split["validation"] & of_split["test"]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ([], "needs --task-arg largest=..."),
        (["largest"], "write key=value"),
        (["largest=7", "smallest=1"], "are: largest, scale, loud, parts"),
        (["largest=7", "style=think"], "'style=think'"),
        (["largest=7", "largest=8"], "twice"),
        (["largest=7", "scale=two"], "'two' is not float"),
        (["largest=7", "loud=perhaps"], "'perhaps' is not bool"),
        (["largest=7", "parts=1"], "cannot be given on the command line"),
    ],
)
def test_an_argument_that_it_does_not_take_is_refused(sums, given, word):
    assert word in refusal(load_task, sums, given, "answer", "")


def changed(old, new):
    """Return the file with a change, and a task that needs no argument."""
    assert old in SUMS
    return SUMS.replace(old, new).replace("largest,", "largest='7',")


NOT_A_VERDICT = "def is_correct(self, problem, answer):\n        return None\n\n    def key"
BAD = [
    ("def make(: pass", "SyntaxError", None),
    ("x = 1 / 0", "ZeroDivisionError", None),
    ("make = 3", "no function 'make'", None),
    ("def make():\n    return 3", "int, not a QATask", None),
    ("def make():\n    raise SystemExit('\x1b[31mno')", "SystemExit", 2),
    ("def make(x: Missing = 1): ...", "Missing", None),
    (changed("a, b = rng", "a, b = 1 / 0, rng"), "ZeroDivisionError", 7),
    (changed("return Problem", "return str"), "raised TypeError", None),
    (changed("str(a + b)", "a + b"), "must be texts", None),
    (changed("str(a + b)", "'many'"), "it grades the answer 'many' of 'Add", None),
    (changed("rng.randrange(100), rng", "__import__('random').random(), rng"), "a resumed run needs the same", None),
    (changed("rng.randrange(100), rng.randrange(100)", "1, 2"), "", None),
    (changed("def key", NOT_A_VERDICT), "None, not True or False", None),
]


@pytest.mark.parametrize(("text", "word", "line"), BAD, ids=[word or "one problem" for _, word, _ in BAD])
def test_a_task_that_does_not_work_is_one_line_with_its_place(tmp_path, text, word, line):
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    message = refusal(load_task, f"{path}:make", [], "answer", "")
    assert word in message
    assert str(path) in message
    if line:
        assert f"{path}:{line})" in message


def test_what_a_task_raises_later_is_one_line_too(tmp_path):
    path = tmp_path / "late.py"
    path.write_text(f"{changed('str', 'str')}\n\ndef late():\n    return {{}}['a']\n", encoding="utf-8")
    load_task(f"{path}:make", [], "answer", "")
    [late] = [m.late for name, m in sys.modules.items() if name.startswith(PREFIX) and m.__file__ == str(path)]
    with pytest.raises(ValueError, match=r"^your code raised KeyError: 'a' \(.*late\.py:19\)$"), naming_own_code():
        late()
    with pytest.raises(KeyError), naming_own_code():  # not the user's
        raise KeyError("a")
