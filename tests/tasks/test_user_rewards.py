"""Reward functions in a user's file: TRL's signature, and one line about whatever goes wrong."""

import json
from contextlib import contextmanager

import numpy
import pytest
import torch

from grpo.model_card import resolve
from grpo.runtime.stopwatch import Stopwatch
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.prompts import ideal_completion
from tasks.gsm8k import problem_of
from tasks.registry import make_task
from tasks.rewards.functions import DEMO
from tasks.rewards.scoring import parse_rewards, score, try_out
from tests.helpers.tasks import SUM, WORD, numbers_task, untimed

# The reward functions of the well-known GSM8K demo for TRL, unchanged.
GRPO_DEMO = '''
import re

def extract_xml_answer(text: str) -> str:
    answer = text.split("<answer>")[-1]
    answer = answer.split("</answer>")[0]
    return answer.strip()

def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]['content'] for completion in completions]
    q = prompts[0][-1]['content']
    extracted_responses = [extract_xml_answer(r) for r in responses]
    print('-'*20, f"Question:\\n{q}", f"\\nAnswer:\\n{answer[0]}", f"\\nResponse:\\n{responses[0]}")
    return [2.0 if r == a else 0.0 for r, a in zip(extracted_responses, answer)]

def int_reward_func(completions, **kwargs) -> list[float]:
    responses = [completion[0]['content'] for completion in completions]
    extracted_responses = [extract_xml_answer(r) for r in responses]
    return [0.5 if r.isdigit() else 0.0 for r in extracted_responses]

def strict_format_reward_func(completions, **kwargs) -> list[float]:
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<reasoning>\\n.*?\\n</reasoning>\\n<answer>\\n.*?\\n</answer>\\n$"
    responses = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, r) for r in responses]
    return [0.5 if match else 0.0 for match in matches]

def soft_format_reward_func(completions, **kwargs) -> list[float]:
    """Reward function that checks if the completion has a specific format."""
    pattern = r"<reasoning>.*?</reasoning>\\s*<answer>.*?</answer>"
    responses = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, r) for r in responses]
    return [0.5 if match else 0.0 for match in matches]

def count_xml(text) -> float:
    count = 0.0
    if text.count("<reasoning>\\n") == 1:
        count += 0.125
    if text.count("\\n</reasoning>\\n") == 1:
        count += 0.125
    if text.count("\\n<answer>\\n") == 1:
        count += 0.125
        count -= len(text.split("\\n</answer>\\n")[-1])*0.001
    if text.count("\\n</answer>") == 1:
        count += 0.125
        count -= (len(text.split("\\n</answer>")[-1]) - 1)*0.001
    return count

def xmlcount_reward_func(completions, **kwargs) -> list[float]:
    contents = [completion[0]["content"] for completion in completions]
    return [count_xml(c) for c in contents]
'''


DEMO_NAMES = ("correctness", "int", "strict_format", "soft_format", "xmlcount")


def test_the_gsm8k_demo_written_for_trl_runs_unchanged(tmp_path, capsys):
    path = tmp_path / "grpo_demo.py"
    path.write_text(GRPO_DEMO, encoding="utf-8")
    task = numbers_task()
    problem = problem_of({"question": "How much is 2 x 9?", "answer": "2*9 = <<2*9=18>>18\n#### 18"})
    rewards = parse_rewards([f"{path}:{name}_reward_func=1" for name in DEMO_NAMES], {})
    texts = [ideal_completion("18", "reasoning", "2 x 9"), "<answer>18</answer>", "<answer>17</answer>", ""]
    attempts = [task.grade(problem, text) for text in texts]
    scored = score(rewards, attempts, {"completion_ids": [[1]] * 4}, untimed)
    # soft_format pays nothing for the first: its `.` matches no line feed; the others pay what their code says
    assert [reward.parts for reward in scored] == [
        {f"{name}_reward_func": value for name, value in zip(DEMO_NAMES, values, strict=True)}
        for values in ((2.0, 0.5, 0.5, 0.0, 0.5), (2.0, 0.5, 0, 0, 0), (0, 0.5, 0, 0, 0), (0, 0, 0, 0, 0))
    ]
    assert [reward.total for reward in scored] == [3.5, 2.5, 0.5, 0.0]
    assert "How much is 2 x 9?" in capsys.readouterr().out
    # our rewards pay more for the perfect completion, because our soft_format accepts it
    [own] = score(parse_rewards((), DEMO), attempts[:1], {}, untimed)
    assert own.total == 4.0


def user(tmp_path, body, spec="f=1"):
    """Write a user's file with this body and return the reward functions that `spec` names in it."""
    path = tmp_path / "mine.py"
    path.write_text(body, encoding="utf-8")
    return parse_rewards([f"{path}:{spec}"], {})


def run(rewards, problems=(SUM, SUM, WORD), text="<answer>-30</answer>"):
    """Score the same completion for each of the problems."""
    attempts = [Arithmetic().grade(problem, text) for problem in problems]
    columns = {"completion_ids": [[i] for i in range(len(attempts))]}
    return score(rewards, attempts, columns, untimed)


def test_a_users_function_sees_prompts_completions_and_columns(tmp_path):
    rewards = user(
        tmp_path,
        "import json\n"
        "def f(**everything):\n"
        f"    json.dump(everything, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        "    everything['completions'][0][0]['content'] = 'changed'\n"  # must change nothing outside
        "    return [1.0, 2, None]\n",
    )
    problems = [Problem("q", "1", {"level": 3}), Problem("r", "2", {"level": 4, "note": "n"}), Problem("s", "3")]
    scored = run(rewards, problems)
    assert [reward.total for reward in scored] == [1.0, 2.0, None]
    assert [reward.parts for reward in scored] == [{"f": 1.0}, {"f": 2.0}, {"f": None}]
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen == {
        "prompts": [Arithmetic().messages(question) for question in "qrs"],
        "completions": [[{"role": "assistant", "content": "<answer>-30</answer>"}]] * 3,
        "question": ["q", "r", "s"],
        "answer": ["1", "2", "3"],
        "level": [3, 4, None],
        "note": [None, "n", None],
        "completion_ids": [[0], [1], [2]],
    }


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def f(**c):\n    x = 1\n    raise KeyError('no\\nsuch')", ["'f'", "KeyError", "mine.py:3"]),
        ("def g():\n    return 1 / 0\ndef f(**c):\n    return g()", ["'f'", "ZeroDivisionError", "mine.py:2"]),
        ("import json\ndef f(**c):\n    return json.loads('x')", ["'f'", "JSONDecodeError", "mine.py:3"]),
        ("def f(prompts):\n    return []", ["'f'", "TypeError", "completion", "mine.py)"]),
        ("def f(**c):\n    exit()", ["'f'", "SystemExit", "mine.py:2"]),
        ("def f(**c):\n    return [1.0]", ["'f'", "1 numbers for 3 completions"]),
        ("def f(**c):\n    return [1.0] * 4", ["'f'", "4 numbers for 3 completions"]),
        ("def f(**c):\n    return None", ["'f'", "TypeError"]),
        ("def f(**c):\n    return 1.0", ["'f'", "TypeError"]),
        *((f"def f(**c):\n    return [0.0, {bad}, 0.0]", ["'f'", "finite number", "-30"]) for bad in (
            "float('nan')", "float('inf')", "-float('inf')", "'1'", "[1]", "{}", "10**400", "1e300", "1j", "b'1'",
        )),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # about the coroutine that nobody awaits
def test_a_failing_function_is_refused_in_one_line_that_names_it(body, words, tmp_path):
    rewards = user(tmp_path, body)
    with pytest.raises(ValueError, match="reward function") as caught:
        run(rewards)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_that_quotes_a_completion_has_no_control_characters(tmp_path):
    attack = "\x1b[2J\n<answer>5</answer>"
    for body in ("return [0.0, float('nan'), 0.0]", "raise ValueError(completions[0][0]['content'])"):
        with pytest.raises(ValueError, match="'f'") as caught:
            run(user(tmp_path, f"def f(completions, **c):\n    {body}"), text=attack)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("body", "spec", "word"),
    [
        ("def g(**c): pass", "f=1", "no function 'f'; it has g"),
        ("f = 5", "f=1", "no function 'f'"),
        ("", "f=1", "none"),
        ("def f(:", "f=1", "SyntaxError"),
        ("raise RuntimeError('at\\nimport')", "f=1", "RuntimeError: at import"),
        ("import no_such_module", "f=1", "no_such_module"),
        ("exit(0)", "f=1", "SystemExit"),
    ],
)
def test_a_file_without_the_function_is_refused_in_one_line(body, spec, word, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.py") as caught:
        user(tmp_path, body, spec)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


TEXT_REWARDS = {
    "return [-abs(20 - len(c)) for c in completions]": [0, -3, -20],
    "import re\n    return [len(re.findall('1', c)) for c in completions]": [0, 1, 0],
    "return [len(c.split()) for c in completions]": [1, 5, 0],
    "return [len(p + c) for p, c in zip(prompts, completions)]": [40, 37, 20],
}


@pytest.mark.parametrize(("body", "expected"), TEXT_REWARDS.items())
def test_a_reward_for_plain_texts_gets_texts_and_a_remark_says_so(body, expected, tmp_path):
    [reward], [remark] = try_out(user(tmp_path, f"def f(completions, prompts, **c):\n    {body}"), Arithmetic())
    assert "'f' of" in remark
    assert "plain texts" in remark
    texts = ["<answer>30</answer>!", "It is 1, I think.", ""]
    attempts = [Arithmetic().grade(SUM, text) for text in texts]
    assert [each.total for each in score([reward], attempts, {}, untimed)] == expected


def test_a_reward_that_fails_on_texts_too_is_refused_with_the_way_to_read_a_message(tmp_path):
    rewards = user(tmp_path, "def f(completions, **c):\n    return [len(c['content']) for c in completions]")
    with pytest.raises(ValueError, match="'f' raised TypeError") as caught:
        try_out(rewards, Arithmetic())
    assert 'completion[0]["content"]' in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_a_reward_that_gives_all_made_up_completions_the_same_is_named(tmp_path):
    body = "def f(completions, **c):\n    return [float('because' in c[0]['content']) for c in completions]"
    rewards = [*user(tmp_path, body), *parse_rewards(["xml_count=1"], {})]
    chosen, [remark] = try_out(rewards, Arithmetic())
    assert chosen == rewards
    assert "'f' of" in remark
    assert "all 12 made-up completions the same value" in remark
    assert try_out(user(tmp_path, body.replace("because", "think")), Arithmetic())[1] == []


# Functions of the kinds that TRL's documentation shows: by tokens, by a pattern, against a column of the data with
# plain texts, for one kind of problem only, and async.
DOCUMENTED = """
import asyncio
import re

def by_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def by_pattern(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match("^<answer>.*?</answer>$", content) else 0.0 for content in contents]

def boxed(completions, ground_truth, **kwargs):
    found = [re.search(r"\\\\boxed{(.*?)}", completion) for completion in completions]
    return [1.0 if match and match.group(1) == truth else 0.0 for match, truth in zip(found, ground_truth)]

def math_only(prompts, completions, kind, **kwargs):
    return [float(len(completion[0]["content"])) if k == "math" else None for completion, k in zip(completions, kind)]

async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(completion[0]["content"])) for completion in completions]
"""


def test_rewards_of_the_kinds_in_trls_documentation_work_as_they_stand(tmp_path):
    path = tmp_path / "documented.py"
    path.write_text(DOCUMENTED, encoding="utf-8")
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} + 9?", "answer": i + 9, "ground_truth": str(i + 9)} for i in range(60)]
    data.write_text("".join(json.dumps({**row, "kind": "math"}) + "\n" for row in rows), encoding="utf-8")
    task = make_task(resolve({"task": "jsonl", "data": str(data)}))
    names = ("by_tokens", "by_pattern", "boxed", "math_only", "slow")
    rewards, remarks = try_out(parse_rewards([f"{path}:{name}=1" for name in names], {}), task)
    assert len(remarks) == 2  # that boxed reads plain texts, and that no made-up completion has a box
    assert all("'boxed'" in remark for remark in remarks)
    problem = task.training_problem(0, 0, 0)
    texts = (f"<answer>{problem.answer}</answer>", f"\\boxed{{{problem.answer}}}", "")
    attempts = [task.grade(problem, text) for text in texts]
    scored = score(rewards, attempts, {"completion_ids": [[1, 2], [1], []]}, untimed)
    long, short = map(len, texts[:2])
    assert [list(each.parts.values()) for each in scored] == [
        [2, 1, 0, long, long],
        [1, 0, 1, short, short],
        [0, 0, 0, 0, 0],
    ]


def test_a_file_may_import_its_neighbours_and_their_changes_are_noticed(tmp_path):
    body = "from marks import MARK\ndef f(completions, **c):\n    return [MARK] * len(completions)"
    seen = []
    for folder, mark in (("a", 1.0), ("a", 2.0), ("b", 3.0)):  # the same name in another folder is another module
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "marks.py").write_text(f"MARK = {mark}\n", encoding="utf-8")
        [reward] = user(tmp_path / folder, body)
        assert run([reward])[0].total == mark
        assert set(reward.files) == {str(tmp_path / folder / name) for name in ("mine.py", "marks.py")}
        seen.append(reward.files)
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"mine.py", "marks.py"}
    assert seen[0] != seen[1]


def test_an_async_function_is_run_to_its_end(tmp_path):
    body = "import asyncio\nasync def f(prompts, **c):\n    await asyncio.sleep(0)\n    return [2.0] * len(prompts)"
    assert run(user(tmp_path, body))[0].total == 2.0


def test_a_rare_mistake_costs_only_the_completions_that_it_is_about(tmp_path):
    body = (
        "def f(completions, level, **c):\n"
        "    values = [len(level) / (n - 2) for n in level]\n"  # fails on level 2; depends on the batch
        "    return values\n"
    )
    rewards = [*user(tmp_path, body), *parse_rewards(["exact=1"], {})]
    attempts = [Arithmetic().grade(Problem("q", "1", {"level": n}), "<answer>1</answer>") for n in (1, 2, 3)]
    columns = {"completion_ids": [[0], [1], [2]]}
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        score(rewards, attempts, columns)
    scored = score(rewards, attempts, columns, tolerant=True)
    # the batch of two that is left: 2 / (1 − 2) and 2 / (3 − 2), each plus 1 for the right answer
    assert [reward.total for reward in scored] == [-1.0, None, 3.0]
    assert scored[1].parts == {"f": None, "exact": 1.0}
    assert [len(reward.errors) for reward in scored] == [0, 1, 0]
    assert "'f' raised ZeroDivisionError: division by zero" in scored[1].errors[0]
    assert "mine.py:2" in scored[1].errors[0]


@pytest.mark.parametrize("body", ["return 3", "raise OSError('offline')", "return [0.5]"])
def test_a_mistake_about_every_batch_leaves_no_completion_a_reward(body, tmp_path):
    attempts = [Arithmetic().grade(SUM, "")] * 3
    scored = score(user(tmp_path, f"def f(**c):\n    {body}"), attempts, {}, tolerant=True)
    assert [reward.total for reward in scored] == [None] * 3
    assert all(len(reward.errors) == 1 for reward in scored)


def test_numbers_of_libraries_are_numbers(tmp_path):
    for made in (numpy.float32([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), (True, 2, 3.0), iter([1, 2, 3])):
        [reward] = parse_rewards(["exact=2"], {})
        given = type(reward)(reward.name, reward.weight, lambda attempts, columns, made=made: made)
        assert [scored.total for scored in run([given])] == [2.0, 4.0, 6.0]


def test_a_changed_file_takes_effect_at_once_and_leaves_nothing_behind(tmp_path):
    first = user(tmp_path, "def f(**c):\n    return [1.0] * 3")
    second = user(tmp_path, "def f(**c):\n    return [2.0] * 3")  # same size, same second: no stale bytecode
    assert [run(rewards)[0].total for rewards in (first, second)] == [1.0, 2.0]
    assert first[0].files != second[0].files
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py"}


def test_a_file_is_run_once_for_all_its_functions_and_may_hold_what_any_module_may(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"open({str(tmp_path / 'log')!r}, 'a').write('run ')\n"
        "@dataclass\nclass Judge:\n    n: int = 0\njudge = Judge()\n"
        "def f(prompts, **c):\n    judge.n += 1\n    return [judge.n] * len(prompts)\n"
        "g = lambda prompts, **c: [10 * judge.n] * len(prompts)\n",
        encoding="utf-8",
    )
    rewards = parse_rewards([f"{path}:f=1", f"{path}:g=1"], {})
    assert run(rewards)[0].parts == {"f": 1.0, "g": 10.0}
    assert (tmp_path / "log").read_text(encoding="utf-8") == "run "


def test_each_function_is_timed_by_its_name(tmp_path):
    clock = Stopwatch(torch.device("cpu"))
    rewards = user(tmp_path, "import time\ndef f(**c):\n    time.sleep(0.02)\n    return [1.0] * 3")
    attempts = [Arithmetic().grade(SUM, "")] * 3
    score([*rewards, *parse_rewards(["exact=1"], {})], attempts, {}, clock)
    assert set(clock.seconds) == {"reward/f", "reward/exact"}
    assert clock.seconds["reward/f"] > 0.02 > clock.seconds["reward/exact"]


def test_the_clock_stops_where_a_function_raises(tmp_path):
    seen = []

    @contextmanager
    def clock(name):
        seen.append(name)
        try:
            yield
        finally:
            seen.append("stopped")

    with pytest.raises(ValueError, match="'f'"):
        score(user(tmp_path, "def f(**c):\n    raise OSError"), [Arithmetic().grade(SUM, "")], {}, clock)
    assert seen == ["reward/f", "stopped"]


def test_a_completion_that_no_function_applies_to_has_no_reward():
    [reward] = parse_rewards(["exact=1"], {})
    none = type(reward)("f", 1.0, lambda attempts, columns: [None] * len(attempts))
    assert [(scored.total, scored.parts) for scored in run([none])] == [(None, {"f": None})] * 3
