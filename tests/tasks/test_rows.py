"""Rows of JSON Lines files: what is read, what is refused and how, and fuzzing of the readers."""

import json
import os
import random
import time

import pytest

from tasks import gsm8k, jsonl
from tasks.base import split_of
from tasks.common import sources
from tasks.common.parsing import parse_number
from tasks.common.rows import normal, read_rows
from tasks.common.sources import WHOLE, parse_row
from tests.helpers.data import GSM8K_ROWS, refusal, town_rows, write


def read(tmp_path, content):
    """Write bytes to a file and read its problems as the jsonl task does."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return read_rows(str(path), lambda row: jsonl.problem_of(row, "answer"))[0][WHOLE]


def test_question_and_answer_or_prompt_and_response_and_other_columns(tmp_path):
    rows = [
        {"question": "q", "answer": " a ", "level": 3},
        {"prompt": "q", "response": "a", "tags": ["x"]},
        {"question": "q", "answer": "a", "prompt": "p", "response": "r"},
        {"prompt": "q", "answer": "a"},
        {"question": "q", "response": "a"},
        {"question": "q", "answer": 5},
        {"question": "q", "answer": -0.25},
        {"question": "q", "answer": 1e22},
        {"question": " q\n", "answer": "北京"},
    ]
    problems = read(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    assert [problem.question for problem in problems] == ["q"] * 9
    assert [problem.answer for problem in problems] == ["a", "a", "a", "a", "a", "5", "-0.25", "1" + "0" * 22, "北京"]
    assert [dict(problem.columns) for problem in problems[:3]] == [
        {"level": 3},
        {"tags": ["x"]},
        {"prompt": "p", "response": "r"},
    ]


@pytest.mark.parametrize(
    "content",
    [
        b'{"question": "q", "answer": "a"}\n{"question": "q", "answer": "a"}\n',
        b'{"question": "q", "answer": "a"}\n{"question": "q", "answer": "a"}',  # no line feed at the end
        b'\xef\xbb\xbf{"question": "q", "answer": "a"}\r\n{"question": "q", "answer": "a"}\r\n',
        b'\n\n  \n{"question": "q", "answer": "a"}\r\n\t\n{"question": "q", "answer": "a"}\n\n',
        b' {"question" : "q" ,"answer": "a"} \n{"answer":"a","question":"q","deep":[[[{}]]]}',
    ],
)
def test_blank_lines_byte_order_mark_and_crlf_are_fine(content, tmp_path):
    assert [(problem.question, problem.answer) for problem in read(tmp_path, content)] == [("q", "a")] * 2


GOOD = b'{"question": "q", "answer": "a"}\n'
MALFORMED = [
    (b'{"question": "q", "answer": "a"', "not JSON"),
    (b'{"question": "q", "answer": "a"},', "not JSON"),
    (b'{"question": "q" "answer": "a"}', "not JSON"),
    (b"{'question': 'q', 'answer': 'a'}", "not JSON"),
    (b"question,answer", "not JSON"),
    (b'{"question": "q", "answer": NaN}', "not JSON (NaN)"),
    (b'{"question": "q", "answer": -Infinity}', "not JSON (-Infinity)"),
    (b'{"question": "q", "answer": "a"}{"question": "q", "answer": "a"}', "not JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"{}", "no 'question'; there are no columns"),
    (b'{"answer": "a"}', "no 'question'; the columns are 'answer'; name the right one by --columns question=NAME"),
    (b'{"question": "q"}', "no 'answer'; the columns are 'question'; name the right one by --columns answer=NAME"),
    (b'{"prompt": "q", "gold": "a"}', "no 'answer'"),
    (b'[{"question": "q", "answer": "a"}]', "a file with one array needs a name that ends in .json"),
    (b'{"question": "", "answer": "a"}', "'question' is empty"),
    (b'{"question": "q", "answer": " \\n"}', "'answer' is empty"),
    (b'{"question": 5, "answer": "a"}', "'question' is int"),
    (b'{"question": "q", "answer": true}', "'answer' is bool"),
    (b'{"question": "q", "answer": null}', "'answer' is empty"),
    (b'{"question": ["q"], "answer": "a"}', "'question' is list"),
    (b'{"question": "q", "answer": {"text": "a"}}', "'answer' is dict"),
    (b'{"question": "q", "answer": 1e400}', "too large"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"question": "q\xff", "answer": "a"}', "not UTF-8 (byte 16)"),
    (b'{"question": "q", "answer": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"question": "q", "answer": "\\ud800"}', "half a surrogate pair"),
    (b'{"question": "\\udc00q", "answer": "a"}', "half a surrogate pair"),
    (b'{"question": "q\0", "answer": "a"}', "NUL"),
    (b'{"question": "q", "answer": "a\\u0000"}', "NUL"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"question": "q", "answer": "a", "x": ' + b'{"x":' * 50_000 + b"1" + b"}" * 50_001, "nested too deeply"),
    (b'{"question": "q", "question": "r", "answer": "a"}', "twice"),
    (b'{"question": "q", "answer": "a", "x": {"y": 1, "y": 2}}', "twice"),
    (b'{"question": "q", "answer": "..."}', "cannot be parsed between the tags"),
    (b'{"question": "q", "answer": "</answer>"}', "cannot be parsed between the tags"),
    (b'{"question": "q", "answer": "a <answer> b"}', "cannot be parsed between the tags"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_line_is_named_with_file_line_and_reason(line, reason, tmp_path):
    text = refusal(read, tmp_path, GOOD * 2 + line + b"\n" + GOOD)
    assert text.startswith(f"{tmp_path / 'data.jsonl'}:3: ")
    assert reason in text
    assert len(text) < 300


def test_the_first_malformed_line_is_explained_and_some_more_are_named(tmp_path):
    for bad, expected in (
        ([3], ":3: not a JSON object"),
        ([3, 5], ":3: not a JSON object (and 1 more: 5)"),
        ([2, 3, 4, 5, 6], ":2: not a JSON object (and 4 more: 3, 4, 5, 6)"),
        (range(1, 9), ":1: not a JSON object (and 7 more: 2, 3, 4, 5, …)"),
    ):
        lines = b"".join(b"[]\n" if number in bad else GOOD for number in range(1, 10))
        assert refusal(read, tmp_path, lines).endswith(expected)


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "a\0b", "x" * 300])
def test_a_file_that_cannot_be_read_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (jsonl.load, gsm8k.load):
        assert refusal(load, name).startswith("cannot read --data")


def mutated(rng, seeds):
    """Return one of the texts with some bytes changed, doubled, dropped or inserted."""
    text = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(0, 6)):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            text[place:place] = bytes([rng.randrange(256)])
        elif kind == 1:
            del text[place : place + rng.randint(1, 8)]
        elif kind == 2:
            text[place:place] = rng.choice(FRAGMENTS)
        elif kind == 3 and text:
            text[place % len(text)] ^= 1 << rng.randrange(8)
        else:
            text[place:place] = bytes(text[place : place + 20]) * rng.choice((1, 2, 200))
    return bytes(text)


FRAGMENTS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
]
FRAGMENTS += [b"####", b"#### ", b"$", b"-", b"+", b".", b"1,000", b"9" * 5000, b"1e999", b"NaN", b"true", b"null"]
FRAGMENTS += [
    "٤".encode(),
    "１".encode(),
    b"<answer>",
    b"</answer>",
    b"...",
    b'"answer":',
    b'"question":',
    b"[" * 3000,
]


def fuzz(seconds, seed, path):
    """Feed mutated rows to both readers for some seconds and return how many."""
    rng, done, accepted, slowest = random.Random(seed), 0, 0, 0.0
    seeds = [json.dumps(row).encode() for row in (*GSM8K_ROWS[:5], *town_rows(5))]
    seeds += [line for line, _ in MALFORMED if len(line) < 10_000] + [text.encode() for text in ("#### 1,234", "")]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = [mutated(rng, seeds) for _ in range(50)]
        start = time.monotonic()
        for line in lines:
            for problem_of in (gsm8k.problem_of, lambda row: jsonl.problem_of(row, "reasoning")):
                try:
                    problem = problem_of(parse_row(line))
                except ValueError as error:
                    assert "\n" not in str(error)  # noqa: PT017
                else:
                    accepted += 1
                    split_of(normal(problem.question))
                    assert problem.answer
            try:
                gold = gsm8k.gold_answer(line.decode(errors="surrogateescape"))
            except ValueError:
                pass
            else:
                assert parse_number(gold) is not None
                assert gold.isascii()
        path.write_bytes(b"\n".join(lines))
        for problem_of in (gsm8k.problem_of, lambda row: jsonl.problem_of(row, "answer")):
            try:
                read_rows(str(path), problem_of)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
        slowest = max(slowest, time.monotonic() - start)
        done += len(lines)
    assert accepted > done / 100  # some mutants are still valid rows
    assert slowest < 5
    return done


def test_fuzz_of_the_readers_for_a_second(tmp_path):
    assert fuzz(1.2, 0, tmp_path / "f.jsonl") > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fuzz_of_the_readers_for_5_minutes(tmp_path):
    print(fuzz(300, time.time_ns(), tmp_path / "f.jsonl"), "mutants")


NUMBERS = [{"question": f"How many are {i}?", "answer": i} for i in range(300)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": 1e300}, "is text, not integer, because of 1 of 301 answers: {0}:4 '1000"),
        (
            {"question": "q", "answer": "\x1b[2Jmany"},
            "is text, not integer, because of 1 of 301 answers: {0}:4 '\\x1b[2Jmany'.",
        ),
        ({"question": "q", "answer": 0.5}, "is number, not integer, because of 1 of 301 answers: {0}:4 '0.5'."),
        ({"question": " how many ARE 2?", "answer": 3}, "{0}:4 '3' (before: {0}:3 '2')."),
        ({"question": "How many are 2?", "answer": "2.0"}, None),  # the same number
        ({"question": "q", "answer": 5}, None),
    ],
)
def test_a_remark_names_the_lines_that_decide_the_kind_or_contradict_others(row, expected, tmp_path):
    data = write(tmp_path / "d.jsonl", [*NUMBERS[:3], row, *NUMBERS[3:]])
    notes = jsonl.load(data).notes
    if expected is None:
        assert notes == []
    else:
        [note] = notes
        assert expected.format(data) in note
        assert note.isprintable()


def test_words_and_numbers_alike_get_no_remark(tmp_path):
    assert jsonl.load(write(tmp_path / "d.jsonl", [*NUMBERS[:200], *town_rows()])).notes == []


def test_many_copies_of_one_question_are_said_to_be_one(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"question": "What?", "answer": "5"}] * 300 + [NUMBERS[0]])
    text = refusal(jsonl.load, data)
    assert "2 in 301 rows; 'what?' occurs 300 times" in text


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_may_never_end_is_not_read(make, tmp_path):
    make(tmp_path / "d.jsonl")
    assert "pipe or a device" in refusal(jsonl.load, str(tmp_path / "d.jsonl"))


def test_a_line_without_end_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 100)
    assert ":2: the line has more than" in refusal(read, tmp_path, GOOD + b" " * 200 + GOOD)
