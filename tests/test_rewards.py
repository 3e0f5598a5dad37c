"""The rewards: each by hand, users' functions with TRL's signature, and what is said where one goes wrong."""

import json
import math
import time
from contextlib import contextmanager, nullcontext

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.metrics import Stopwatch
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.gsm8k import problem_of
from tasks.parsing import PARSERS
from tasks.prompts import STYLES, ideal_completion
from tasks.reverse import Reverse
from tasks.rewards import DEMO, REWARDS, SHAPED, parse_rewards, repeats_an_ending, score
from tasks.rows import Rows

SUM = Problem("What is (4 - 9) * 6?", "-30")
WORD = Problem("Spell batori backwards.", "irotab")
PERFECT = "<reasoning>\n4 - 9 = -5\n</reasoning>\n<answer>\n-30\n</answer>\n"


def numbers_task(style="reasoning"):
    """A task of numbers whose rows do not matter."""
    return Rows(name="gsm8k", problems={}, files={}, kind="number", style=style)


def value(name, completion, problem=SUM, task=None):
    """What a named reward gives for a completion."""
    return REWARDS[name]((task or Arithmetic()).judge(problem, completion))


# --- the named rewards, by hand ---


@pytest.mark.parametrize(
    ("answer", "formatted", "close", "exact"),
    [("-30", 1, 1, 1), ("-31", 1, 1, 0), ("-29", 1, 1, 0), ("-32", 1, 0, 0), ("30", 1, 0, 0), ("x", 0, 0, 0)],
)
def test_format_close_and_exact_of_numbers(answer, formatted, close, exact):
    text = f"<answer>{answer}</answer>"
    assert [value(name, text) for name in ("format", "close", "exact")] == [formatted, close, exact]


@pytest.mark.parametrize(
    ("answer", "close", "exact"),
    [("18", 1, 1), ("18.00", 1, 1), ("17.5", 1, 0), ("19", 1, 0), ("19.000000001", 0, 0), ("1,018", 0, 0)],
)
def test_close_and_exact_of_decimals(answer, close, exact):
    task, text = numbers_task("answer"), f"<answer>{answer}</answer>"
    assert [value(name, text, Problem("?", "18"), task) for name in ("close", "exact")] == [close, exact]


@pytest.mark.parametrize(
    ("answer", "formatted", "close", "exact"),
    [("irotab", 1, 1, 1), ("IRotab", 1, 1, 0), ("irota", 1, 0, 0), (" irotab ", 1, 1, 1), ("", 0, 0, 0)],
)
def test_format_close_and_exact_of_texts(answer, formatted, close, exact):
    text = f"<answer>{answer}</answer>"
    got = [value(name, text, WORD, Reverse()) for name in ("format", "close", "exact")]
    assert got == [formatted, close, exact]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (PERFECT, 1.0),
        (PERFECT.removesuffix("\n"), 1.0),
        # four tags less what follows the last one: "Done." has five characters
        (PERFECT + "Done.", 1 - 0.005),
        (PERFECT + "\n", 1 - 0.001),
        (PERFECT + "x" * 2000, 0.0),
        ("<reasoning>\nx\n</reasoning>\n", 0.5),
        ("x\n<answer>\n5\n</answer>", 0.5),
        ("<reasoning>x</reasoning><answer>5</answer>", 0.0),  # not on lines of their own
        (PERFECT * 2, 0.0),  # each twice
        ("\n</answer>" + "y" * 100, 0.15),  # 0.25 - 0.1
        ("", 0.0),
    ],
)
def test_xml_count(completion, expected):
    assert value("xml_count", completion) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("completion", "strict", "soft"),
    [
        (PERFECT, 1, 1),
        (PERFECT.removesuffix("\n"), 1, 1),
        (ideal_completion("5", "reasoning"), 1, 1),  # nothing between the tags
        ("<reasoning>x</reasoning><answer>5</answer>", 0, 1),
        (" <reasoning>x</reasoning> \n <answer>5</answer> and so on", 0, 1),
        (PERFECT + "\n", 0, 1),
        (PERFECT + "x", 0, 1),
        ("x" + PERFECT, 0, 0),
        (PERFECT.replace("<answer>\n", "<answer>"), 0, 1),
        (PERFECT.replace("\n</reasoning>\n", "</reasoning>\n\n"), 0, 1),
        (PERFECT * 2, 0, 1),
        ("<reasoning>\n" + PERFECT, 0, 1),  # a tag twice
        ("<reasoning>x</reasoning>so<answer>5</answer>", 0, 0),
        ("<reasoning>x<answer>5</answer></reasoning>", 0, 0),
        ("<answer>5</answer><reasoning>x</reasoning>", 0, 0),
        ("<reasoning>\n</answer>", 0, 0),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0, 1),  # too few line feeds
        ("", 0, 0),
    ],
)
def test_strict_and_soft_format(completion, strict, soft):
    assert (value("strict_format", completion), value("soft_format", completion)) == (strict, soft)


@pytest.mark.parametrize(
    ("completion", "correct", "whole"),
    [
        (PERFECT, 1, 1),
        ("<answer>-30</answer>", 1, 1),
        ("<answer>7</answer> no, <answer> -30 </answer> it is", 1, 1),
        ("<answer>-30</answer><answer>7</answer>", 0, 1),
        ("<answer>-30.0</answer>", 0, 0),  # a task of integers
        ("<answer>-30", 0, 0),
        ("-30</answer>", 0, 0),
        ("-30", 0, 0),
        ("<answer>x</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_correctness_and_integer_take_the_last_answer(completion, correct, whole):
    assert (value("correctness", completion), value("integer", completion)) == (correct, whole)


def test_integer_among_decimals_asks_for_a_whole_number_where_the_right_one_is():
    task = numbers_task()
    for gold, answer, expected in (("18", "18.00", 1), ("18", "1,018", 1), ("18", "18.5", 0), ("1.5", "2.5", 1)):
        assert value("integer", f"<answer>{answer}</answer>", Problem("?", gold), task) == expected
    assert value("integer", "<answer>5</answer>", WORD, Reverse()) == 0  # texts


@pytest.mark.parametrize(
    ("question", "completion", "expected"),
    [
        ("What is it?", "all of it <answer>5</answer>", 1.0),
        ("What is it?", "", 1.0),
        ("What is it?", "<answer>5</answer>", 1.0),  # tags are not counted
        ("What is it?", "ab да", 0.5),
        ("What is it?", "abc北", 0.75),
        ("Что это?", "да <answer>нет</answer>", 1.0),
        ("Что это?", "yes", 0.0),
        ("北京 is what?", "北京 city", 1.0),  # both scripts are asked in
        ("2 + 2", "whatever", 1.0),  # a question without letters has no script to stay in
    ],
)
def test_language_is_the_share_of_letters_in_the_scripts_of_the_question(question, completion, expected):
    assert value("language", completion, Problem(question, "5")) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>5</answer>", 1),
        ("working <answer>5</answer>\n", 1),
        (PERFECT, 1),
        ("<answer>5</answer> so", 0),
        ("<answer>5</answer></answer>", 0),
        ("<answer>5</answer><answer>5</answer>", 0),
        ("<think>a</think><think>b</think><answer>5</answer>", 0),
        *((f"<answer>5</answer>{marker}", 0) for marker in ("<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>")),
        ("<|im_end|><answer>5</answer>", 0),
        ("5", 0),
        ("", 0),
    ],
)
def test_one_ending(completion, expected):
    assert value("one_ending", completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>1</answer></answer>", True),
        ("<answer>1</answer><|im_end|><|im_end|>", True),
        ("<think>a</think> <think>b</think><answer>1</answer>", True),
        ("<answer><answer>1</answer>", False),  # an opening
        ("<think>a</think><answer>1</answer><|im_end|>", False),
        ("", False),
    ],
)
def test_a_repeated_ending(completion, expected):
    assert repeats_an_ending(completion) == expected


def test_length_pays_short_well_formed_completions():
    assert value("length", "<answer>5</answer>") == 1 - 18 / 1000
    assert value("length", "x" * 482 + "<answer>5</answer>") == 0.5
    assert value("length", "x" * 5000 + "<answer>5</answer>") == 0.0
    assert value("length", "") == 0.0


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
PIECES = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", "5", "-30", "1,000", "٤", "<|im_end|>", "é"]
TEXTS = st.one_of(ANY_TEXT, st.lists(st.one_of(st.sampled_from(PIECES), ANY_TEXT), max_size=10).map("".join))


@given(TEXTS, st.sampled_from(STYLES), st.sampled_from(sorted(PARSERS)), st.sampled_from(["-30", "1.5", "gold", ""]))
@settings(max_examples=300, deadline=None)
def test_every_reward_of_any_text_is_from_0_to_1(text, style, kind, gold):
    task = Rows(name="any", problems={}, files={}, style=style, kind=kind)
    for name, function in REWARDS.items():
        assert 0.0 <= function(task.judge(Problem("What?", gold), text)) <= 1.0, name


@pytest.mark.parametrize("piece", [*PIECES, "<reasoning>\n", "\n</answer>", "</reasoning>\n<answer>", " "])
def test_every_reward_is_linear_in_the_length_of_the_text(piece):
    attempt = Arithmetic(style="reasoning").judge(SUM, "<reasoning>\n" + piece * (1_000_000 // len(piece)))
    for name, function in REWARDS.items():
        start = time.perf_counter()
        function(attempt)
        assert time.perf_counter() - start < 1.0, name


# --- specifications ---


def test_the_defaults_are_those_of_task_and_style():
    assert Arithmetic().default_rewards == Arithmetic(style="think").default_rewards == SHAPED
    assert Arithmetic(style="reasoning").default_rewards == DEMO == numbers_task().default_rewards
    assert Reverse(style="reasoning").default_rewards == {n: w for n, w in DEMO.items() if n != "integer"}
    names = {reward.name: reward.weight for reward in parse_rewards((), SHAPED)}
    assert names == {"format": 0.2, "close": 0.2, "exact": 0.6}


def test_given_rewards_replace_the_defaults_and_may_be_negative():
    rewards = parse_rewards(("exact=1", "length=-0.5", "language=1e-1"), SHAPED)
    assert [(reward.name, reward.weight) for reward in rewards] == [("exact", 1), ("length", -0.5), ("language", 0.1)]
    attempt = Arithmetic().judge(SUM, "<answer>-30</answer>")
    [reward] = score(rewards, [attempt], {}, lambda name: nullcontext())
    # 1 - 0.5 (1 - 20/1000) + 0.1: exact, length of 20 characters, no letters outside the tags
    assert reward.total == pytest.approx(1 - 0.5 * 0.98 + 0.1)
    assert reward.total == sum(reward.parts.values())


@pytest.mark.parametrize(
    ("specs", "word"),
    [
        (["exact"], "NAME=WEIGHT"),
        (["=1"], "NAME=WEIGHT"),
        ([""], "NAME=WEIGHT"),
        (["exact="], "NAME=WEIGHT"),
        (["exact=much"], "NAME=WEIGHT"),
        (["exact=nan"], "NAME=WEIGHT"),
        (["exact=inf"], "NAME=WEIGHT"),
        (["exact=1e300"], "NAME=WEIGHT"),
        (["exact=1", "exact=2"], "twice"),
        (["excat=1"], "format, close, exact"),
        (["nowhere.py:f=1"], "nowhere.py"),
        ([".:f=1"], "'.'"),
        (["a\0b.py:f=1"], "cannot read"),
        ([":f=1"], "cannot read"),
    ],
)
def test_a_specification_that_cannot_be_is_refused_in_one_line(specs, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="reward") as caught:
        parse_rewards(specs, SHAPED)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# --- users' functions ---

# The reward functions of the well-known GSM8K demo for TRL, as they are passed around.
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
    attempts = [task.judge(problem, text) for text in texts]
    scored = score(rewards, attempts, {"completion_ids": [[1]] * 4}, lambda name: nullcontext())
    # soft: its `.` does not match the line feeds of the first; the rest is what each function's code says
    assert [reward.parts for reward in scored] == [
        {f"{name}_reward_func": value for name, value in zip(DEMO_NAMES, values, strict=True)}
        for values in ((2.0, 0.5, 0.5, 0.0, 0.5), (2.0, 0.5, 0, 0, 0), (0, 0.5, 0, 0, 0), (0, 0, 0, 0, 0))
    ]
    assert [reward.total for reward in scored] == [3.5, 2.5, 0.5, 0.0]
    assert "How much is 2 x 9?" in capsys.readouterr().out
    # and ours, for the perfect completion, at least as much: soft_format is paid too
    [own] = score(parse_rewards((), DEMO), attempts[:1], {}, lambda name: nullcontext())
    assert own.total == 4.0


def user(tmp_path, body, spec="f=1", **settings):
    """The reward function in a file of the user's with this body."""
    path = tmp_path / "mine.py"
    path.write_text(body, encoding="utf-8")
    return parse_rewards([f"{path}:{spec}"], {})


def run(rewards, problems=(SUM, SUM, WORD), text="<answer>-30</answer>"):
    attempts = [Arithmetic().judge(problem, text) for problem in problems]
    columns = {"completion_ids": [[i] for i in range(len(attempts))]}
    return score(rewards, attempts, columns, lambda name: nullcontext())


def test_a_users_function_sees_prompts_completions_and_columns(tmp_path):
    rewards = user(
        tmp_path,
        "import json\n"
        "def f(**everything):\n"
        f"    json.dump(everything, open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        "    everything['completions'][0][0]['content'] = 'changed'\n"  # which changes nothing outside
        "    return [1.0, 2, None]\n",
    )
    problems = [Problem("q", "1", {"level": 3}), Problem("r", "2", {"level": 4, "note": "n"}), Problem("s", "3")]
    scored = run(rewards, problems)
    assert [reward.total for reward in scored] == [1.0, 2.0, 0.0]
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
        ("async def f(**c):\n    return [1.0] * 3", ["'f'", "TypeError"]),
        *((f"def f(**c):\n    return [0.0, {bad}, 0.0]", ["'f'", "finite number", "-30"]) for bad in (
            "float('nan')", "float('inf')", "-float('inf')", "'1'", "[1]", "{}", "10**400", "1e300", "1j", "b'1'",
        )),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the coroutine that nobody awaits
def test_what_goes_wrong_in_a_users_function_is_one_line_that_names_it(body, words, tmp_path):
    rewards = user(tmp_path, body)
    with pytest.raises(ValueError, match="reward function") as caught:
        run(rewards)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_word_of_a_model_can_move_the_cursor_by_way_of_an_error(tmp_path):
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


def test_numbers_of_libraries_are_numbers(tmp_path):
    for made in (numpy.float32([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), (True, 2, 3.0), iter([1, 2, 3])):
        [reward] = parse_rewards(["exact=2"], {})
        given = type(reward)(reward.name, reward.weight, lambda attempts, columns, made=made: made)
        assert [scored.total for scored in run([given])] == [2.0, 4.0, 6.0]


def test_a_changed_file_is_another_file_at_once_and_leaves_nothing_behind(tmp_path):
    first = user(tmp_path, "def f(**c):\n    return [1.0] * 3")
    second = user(tmp_path, "def f(**c):\n    return [2.0] * 3")  # same size, same second: no stale bytecode
    assert [run(rewards)[0].total for rewards in (first, second)] == [1.0, 2.0]
    assert first[0].sha256 != second[0].sha256
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
    clock = Stopwatch()
    rewards = user(tmp_path, "import time\ndef f(**c):\n    time.sleep(0.02)\n    return [1.0] * 3")
    attempts = [Arithmetic().judge(SUM, "")] * 3
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
        score(user(tmp_path, "def f(**c):\n    raise OSError"), [Arithmetic().judge(SUM, "")], {}, clock)
    assert seen == ["reward/f", "stopped"]


def test_nothing_is_nan_where_no_function_applied():
    [reward] = parse_rewards(["exact=1"], {})
    none = type(reward)("f", 1.0, lambda attempts, columns: [None] * len(attempts))
    assert all(math.isclose(scored.total, 0.0) and scored.parts == {"f": None} for scored in run([none]))
