"""Data in the formats that people have: the same problems from each, and one line for each mistake."""

import csv
import io
import json
import random
import sys
import time
from types import SimpleNamespace

import pytest

from tasks import gsm8k, jsonl
from tasks.base import split_of
from tasks.common.rows import normal
from tasks.common.sources import parse_columns
from tests.helpers.data import GSM8K_ROWS, refusal, town_rows, write

ROWS = [
    {"question": f'How many are {i}, "exactly"?\nSay it.', "answer": f"{i},000", "level": f"{i % 3}"}
    for i in range(90)
]
FORMATS = ("jsonl", "json", "lines.json", "csv", "tsv", "CSV", "parquet")


def content(rows, form):
    """Return rows as the bytes of a file in this format."""
    if form == "json":
        return b"\xef\xbb\xbf " + json.dumps(rows, indent=1, ensure_ascii=False).encode() + b"\n"
    if form in ("jsonl", "lines.json"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        file = io.BytesIO()
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), file, row_group_size=7)
        return file.getvalue()
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8-sig")


def data_file(folder, rows, form, name="data"):
    """Write rows to a file in this format and return its path as text."""
    path = folder / f"{name}.{form}"
    path.write_bytes(content(rows, form))
    return str(path)


def hub(monkeypatch, **splits):
    """Let the library datasets return these rows by split; return the list of the names that are asked for."""
    asked = []
    load_dataset = lambda *names: asked.append(names) or splits  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def questions(task):
    """Return the normal forms of the questions of each split."""
    return {split: {normal(problem.question) for problem in found} for split, found in task.problems.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_problems(form, tmp_path):
    task = jsonl.load(data_file(tmp_path, ROWS, form))
    assert task.problems == jsonl.load(write(tmp_path / "same.jsonl", ROWS)).problems
    assert task.kind == "integer"
    problem = task.problems["train"][0]
    assert problem.columns == {"level": "0"}
    places = [problem.place for problem in task.listed()]
    assert len(set(places)) == 90
    if form in ("json", "parquet"):
        assert set(places) == {f"{tmp_path}/data.{form}, row {number}" for number in range(1, 91)}
    elif form in ("csv", "tsv", "CSV"):  # a question has two lines, and the first line has the names
        assert set(places) == {f"{tmp_path}/data.{form}:{2 * number}" for number in range(1, 91)}


@pytest.mark.parametrize("form", FORMATS)
def test_the_fingerprint_changes_with_the_content(form, tmp_path):
    path = data_file(tmp_path, ROWS, form)
    before = jsonl.load(path).files
    assert list(before) == [path]
    data_file(tmp_path, [{**ROWS[0], "level": "9"}, *ROWS[1:]], form)
    after = jsonl.load(path).files
    assert list(after) == [path]
    assert after != before


@pytest.mark.parametrize("form", FORMATS)
def test_gsm8k_reads_every_format(form, tmp_path):
    rows = [{"problem": row["question"], "full": row["answer"], "answer": "short"} for row in GSM8K_ROWS]
    task = gsm8k.load(data_file(tmp_path, rows, form), columns="question=problem,answer=full")
    assert {problem.answer for problem in task.listed()} == {str(a * b) for a in range(3, 13) for b in (7, 250)}


def test_a_row_of_other_formats_with_a_mistake_is_named(tmp_path):
    for form in ("json", "csv", "parquet"):
        rows = [{**row, "answer": " " if i in (4, 6) else row["answer"]} for i, row in enumerate(ROWS)]
        line = refusal(jsonl.load, data_file(tmp_path, rows, form))
        place, more = (":10", "14") if form == "csv" else (", row 5", "7")
        assert line == f"{tmp_path}/data.{form}{place}: 'answer' is empty (and 1 more: {more})"


MALFORMED = [
    ("a.csv", b"question,answer\nq,a\nq,a,b\n", "a.csv:3: 3 cells, but the first line has 2"),
    ("a.csv", b"question,answer\nq\n", "a.csv:2: 1 cells, but the first line has 2"),
    ("a.csv", b"question,question\nq,a\n", "a.csv:1: a name of a column occurs twice"),
    ("a.csv", b'question,answer\nq,a\n"q,a\nq,a\n', "a.csv:3: not CSV (unexpected end of data)"),
    ("a.csv", b'question,answer\n"q"q,a\n', "a.csv:2: not CSV"),
    ("a.csv", b"question,answer\n" + b"q" * 200_000 + b",a\n", "a.csv:2: not CSV (field larger than field limit"),
    ("a.csv", b"question;answer\nq;a\n", "a.csv:2: no 'question'; the columns are 'question;answer'"),
    ("a.csv", b"question,answer\nq\0,a\n", "a.csv:2: 'question' has a NUL character"),
    ("a.csv", b"question,answer\nq,1e999\n", "a.csv:2: 'answer' is too large a number"),
    ("a.csv", "question,answer\nq,ä\n".encode("cp1252"), "a.csv': line 2 is not UTF-8; save the file as UTF-8"),
    ("a.csv", "question,answer\nq,a\n".encode("utf-16"), "a.csv': line 1 is not UTF-8"),
    ("a.csv", b"", "too few problems (0)"),
    ("a.csv", b"question,answer\n", "too few problems (0)"),
    ("a.json", b'[{"question": "q", "answer": "a"},\n {"question": "q" "answer": "a"}]', "a.json, row 2: not JSON ("),
    ("a.json", b'[{"question": "q", "answer": "a"}\n', "a.json, row 1: not JSON (Expecting ',' or ']', line 1, char"),
    ("a.json", b'[{"question": "q", "answer": "a"},', "a.json, row 2: not JSON (Expecting value, line 1, character"),
    ("a.json", b'[{"question": "q", "answer": "a"}] x', "a.json, row 2: there is text after the end of the array"),
    ("a.json", b'[{"question": "q", "question": "r"}]', "a.json, row 1: a key occurs twice"),
    ("a.json", b'[{"question": "q", "answer": NaN}]', "a.json, row 1: not JSON (NaN)"),
    ("a.json", b"[1, 2]", "a.json, row 1: not a JSON object (and 1 more: 2)"),
    ("a.json", b"[" * 100_000, "a.json, row 1: nested too deeply"),
    ("a.json", b"[]", "too few problems (0)"),
    ("a.json", b"[", "a.json, row 1: not JSON (Expecting value"),
    ("a.json", b"[\xff]", "a.json': line 1 is not UTF-8"),
    ("a.json", b'{"data": []}', "a.json:1: no 'question'; the columns are 'data'"),
    ("a.json", b"", "too few problems (0)"),
]


@pytest.mark.parametrize(("name", "text", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_file_of_another_format_is_named_in_one_line(name, text, reason, tmp_path):
    (tmp_path / name).write_bytes(text)
    line = refusal(jsonl.load, str(tmp_path / name))
    assert reason in line
    assert str(tmp_path / name) in line
    assert len(line) < 400


@pytest.mark.parametrize("text", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"question,answer\n", b"\xff" * 99])
def test_what_is_no_parquet_file_is_named_in_one_line(text, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(text)
    assert "it is not a Parquet file that pyarrow can read" in refusal(jsonl.load, str(tmp_path / "a.parquet"))


def test_an_answer_in_a_parquet_file_that_is_missing_or_no_number_is_named(tmp_path):
    for value, reason in ((None, "is empty"), (float("nan"), "is not a number"), (float("inf"), "is too large")):
        rows = [{"question": "q", "answer": 1.0}, {"question": "q", "answer": value}]
        line = refusal(jsonl.load, data_file(tmp_path, rows, "parquet"))
        assert f"data.parquet, row 2: 'answer' {reason}" in line


@pytest.mark.parametrize(
    "name", ["missing.csv", "missing.json", "missing.parquet", "a/b.csv", "a/b/c", "missing", "a.b"]
)
def test_a_missing_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(jsonl.load, name).startswith(f"cannot read --data {name!r}: ")


@pytest.mark.parametrize(("module", "source"), [("pyarrow.parquet", "data.parquet"), ("datasets", "owner/name")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(module, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {module.partition('.')[0]}" in refusal(jsonl.load, source)


def test_computed_numbers_in_a_csv_file_are_compared_with_a_tolerance_as_in_json(tmp_path):
    rows = [{"question": f"What is {a} / 7?", "answer": a / 7} for a in range(1, 200)]
    rows += [{"question": f"What is 1 / {10**a}?", "answer": 10.0**-a} for a in range(5, 8)]
    task = jsonl.load(data_file(tmp_path, rows, "csv"))
    assert task.problems == jsonl.load(write(tmp_path / "same.jsonl", rows)).problems
    assert task.kind == "number"
    problem = next(problem for problem in task.listed() if problem.question == "What is 100 / 7?")
    assert task.grade(problem, "<answer>14.29</answer>").correct
    numerals = ["007", "1e", "e5", "1.", "3.141592653", "-"]  # not computed numbers
    rows = [{"question": f"q{i}", "answer": text, "level": 1} for i, text in enumerate(numerals)]
    task = jsonl.load(data_file(tmp_path, rows + town_rows(99), "csv"))
    assert {problem.answer for problem in task.listed()} >= set(numerals)


def test_columns_may_have_other_names(tmp_path):
    rows = [{"problem": row["question"], "solution": row["answer"], "answer": "?", "level": 1} for row in ROWS]
    task = jsonl.load(write(tmp_path / "d.jsonl", rows), columns="question=problem,answer=solution")
    assert [p.question for p in task.listed()] == [
        p.question for p in jsonl.load(write(tmp_path / "e.jsonl", ROWS)).listed()
    ]
    assert task.problems["train"][0].columns == {"level": 1}
    swapped = [{"question": row["answer"], "answer": row["question"], "x": 1} for row in town_rows()]
    task = jsonl.load(write(tmp_path / "d.jsonl", swapped), columns=" question = answer , answer=question,level=x")
    problem = task.problems["train"][0]
    assert problem.question.startswith("What is town")
    assert problem.answer.startswith("Town")
    assert problem.columns == {"level": 1}
    line = refusal(jsonl.load, str(tmp_path / "d.jsonl"), columns="question=problem")
    assert "d.jsonl:1: no 'problem', which --columns names; the columns are 'question', 'answer', 'x'" in line


@pytest.mark.parametrize("columns", ["question", "=", "question=", "=a", "a=b=c", "a=b,", ",", "a=b,a=c", "a b"])
def test_columns_that_cannot_be_read_are_named_with_an_example(columns):
    assert "it must look like question=problem,answer=solution" in refusal(parse_columns, columns)


def test_chats_are_questions_and_answers(tmp_path):
    def turns(*pairs):
        return [{"role": role, "content": text} for role, text in pairs]

    system, user, assistant = ("system", "Be brief."), ("user", "q"), ("assistant", "a")
    rows = [
        {"messages": turns(user, assistant)},
        {"messages": turns(system, user, assistant)},
        {"messages": turns(user), "answer": "a"},
        {"messages": turns(user, ("assistant", "long")), "answer": "a"},
        {"prompt": turns(system, user), "response": turns(assistant)},
        {"prompt": turns(user), "answer": "a"},
        {"question": turns(user), "answer": "a"},
    ]
    more = town_rows(99)
    task = jsonl.load(write(tmp_path / "d.jsonl", [*rows, *more]))
    found = [problem for problem in task.listed() if "town" not in problem.question]
    assert [(problem.question, problem.answer) for problem in found] == [("q", "a")] * len(rows)
    [note] = task.notes
    assert note.startswith("2 problems have a system prompt of their own, which is not used; see --system-prompt")
    for chat, reason in (
        (turns(user, assistant, user, assistant), "the chat has 2 turns of the user"),
        (turns(assistant), "the chat has 0 turns of the user"),
        (turns(user), "no 'answer'"),
        ([{"role": "user", "content": ["q"]}, *turns(assistant)], "'question' is list, not text"),
        ([{"from": "human", "value": "q"}], "no 'question'; the columns are 'messages'"),
        ([], "no 'question'"),
        ("q", "no 'question'"),
    ):
        line = refusal(jsonl.load, write(tmp_path / "d.jsonl", [*more, {"messages": chat}]))
        assert "d.jsonl:100: " in line
        assert reason in line


@pytest.mark.parametrize("given", [("validation",), ("test",), ("validation", "test")])
def test_files_of_ones_own_are_validation_and_test(given, tmp_path):
    held_out = {"validation": ROWS[:5], "test": ROWS[3:9]}
    files = {f"{split}_data": data_file(tmp_path, held_out[split], "csv", split) for split in given}
    task = jsonl.load(data_file(tmp_path, ROWS, "json"), **files)
    asked = questions(task)
    assert not asked["train"] & (asked["validation"] | asked["test"])
    assert not asked["validation"] & asked["test"]
    all_questions = {normal(row["question"]) for row in ROWS}
    assert set().union(*asked.values()) == all_questions
    if "test" in given:
        assert asked["test"] == {normal(row["question"]) for row in ROWS[3:9]}
    for split in {"validation", "test"} - set(given):  # as a hash decides, as without any of these files
        assert asked[split] == {q for q in all_questions if split_of(q) == split} - asked[given[0]]
    if "validation" in given:
        own = {normal(row["question"]) for row in ROWS[:5]}
        assert asked["validation"] == (own - asked["test"] if "test" in given else own) or given == ("validation",)
    assert len(task.files) == 1 + len(given)
    assert "are left out of training or validation" in task.notes[0]
    data_file(tmp_path, ROWS[:2], "csv", given[0])
    assert jsonl.load(str(tmp_path / "data.json"), **files).files != task.files  # a resumed run notices it


def test_mistakes_in_files_of_ones_own_for_validation_and_test_are_named(tmp_path):
    data, few = data_file(tmp_path, ROWS, "json"), data_file(tmp_path, ROWS[:5], "csv", "few")
    assert refusal(jsonl.load, data, test_data="no.csv").startswith("cannot read --test-data 'no.csv'")
    (tmp_path / "empty.csv").write_bytes(b"question,answer\n")
    line = refusal(jsonl.load, data, validation_data=str(tmp_path / "empty.csv"))
    assert "there are no problems for validation" in line
    assert "there are no problems for validation" in refusal(jsonl.load, data, validation_data=few, test_data=few)
    assert "without the problems that are in the data for" in refusal(
        jsonl.load, few, validation_data=data, test_data=few
    )
    (tmp_path / "bad.csv").write_bytes(b"question,answer\nq,\n")
    assert "bad.csv:2: 'answer' is empty" in refusal(jsonl.load, data, test_data=str(tmp_path / "bad.csv"))


def test_a_data_set_of_the_hub_has_its_own_splits(monkeypatch):
    asked = hub(monkeypatch, train=ROWS[10:], validation=ROWS[5:10], test=ROWS[:5], extra=town_rows())
    task = jsonl.load("owner/name:config")
    assert asked == [("owner/name", "config")]
    expected = {"train": ROWS[10:], "validation": ROWS[5:10], "test": ROWS[:5]}
    assert questions(task) == {split: {normal(row["question"]) for row in rows} for split, rows in expected.items()}
    assert task.problems["test"][2].place == "owner/name:config test, row 3"
    hub(monkeypatch, train=[*ROWS[10:-1], {**ROWS[-1], "level": "9"}], validation=ROWS[5:10], test=ROWS[:5])
    assert jsonl.load("owner/name:config").files != task.files  # a resumed run notices that the data changed


def test_a_single_split_of_the_hub_is_split_by_a_hash_and_may_be_the_test_of_a_file(monkeypatch, tmp_path):
    asked = hub(monkeypatch, test=ROWS)
    path = write(tmp_path / "same.jsonl", ROWS)
    assert jsonl.load("owner/name").problems == jsonl.load(path).problems
    assert asked == [("owner/name",)]
    task = jsonl.load(write(tmp_path / "towns.jsonl", town_rows()), test_data="owner/name")
    assert questions(task)["test"] == {normal(row["question"]) for row in ROWS}
    hub(monkeypatch, train=ROWS, test=ROWS[:4])
    assert len(jsonl.load(str(tmp_path / "towns.jsonl"), test_data="owner/name").problems["test"]) == 4
    assert "has no split that is named validation" in refusal(jsonl.load, path, validation_data="owner/name")
    hub(monkeypatch, a=ROWS, b=ROWS)
    assert "the splits a, b, but none that is named train" in refusal(jsonl.load, "owner/name")
    hub(monkeypatch, train=[*ROWS[:3], {"question": "q"}], test=ROWS)
    assert refusal(jsonl.load, "owner/name").startswith("owner/name train, row 4: no 'answer'")


def mutated(rng, text):
    """Return bytes with some of them changed, dropped or inserted."""
    text = bytearray(text)
    for _ in range(rng.randint(1, 5)):
        if not text:
            break
        place = rng.randrange(len(text))
        kind = rng.randrange(4)
        if kind == 0:
            text[place:place] = rng.choice(
                (b'"', b",", b"[", b"]", b"{", b"}", b"\n", b"\r", b"\0", b"\xff", b"\\", b";")
            )
        elif kind == 1:
            del text[place : place + rng.randint(1, 30)]
        elif kind == 2:
            text[place] ^= 1 << rng.randrange(8)
        else:
            del text[place + 1 :]
    return bytes(text)


@pytest.mark.parametrize("form", ["json", "csv", "parquet"])
def test_any_file_is_read_or_refused_in_one_printable_line(form, tmp_path):
    rng, good = random.Random(form), content(ROWS, form)
    path = tmp_path / f"data.{form}"
    end, read, refused = time.monotonic() + 0.7, 0, 0
    while time.monotonic() < end:
        path.write_bytes(mutated(rng, good))
        try:
            jsonl.load(str(path))
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017
            refused += 1
        else:
            read += 1
    assert refused > 10
    assert read or form == "parquet"
