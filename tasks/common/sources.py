"""Read rows of problems from JSON Lines, a JSON array, CSV, Parquet, or a data set of the Hub.

`read_source` gives each row as a dictionary, whatever the format. The libraries that read Parquet files (pyarrow)
and data sets of the Hub (datasets) are optional. Every mistake in a source is reported as a ValueError, in one line.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.base import SPLITS, first_few, one_line

Row = Mapping[str, Any]
NumberedRows = Iterator[tuple[int, Row | ValueError]]  # each row with its number, or the reason why it is malformed
MAX_LINE_BYTES = 32 * 2**20  # A longer line of a JSON Lines file would fill the memory.
QUESTIONS = ("question", "prompt")  # the columns that may hold the question
ANSWERS = ("answer", "response")  # the columns that may hold the answer
COLUMNS_NAMED = 8  # the largest number of columns that an error names
WHOLE = ""  # The name of the only split of a file, or of a data set with a single split.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)  # OWNER/NAME or OWNER/NAME:CONFIGURATION
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
# A CSV cell with a computed number, such as 0.3333333333333333 or 1e-05, becomes a float, as in JSON.
_COMPUTED = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]{10,}|\.[0-9]+(?=[eE])|(?=[eE]))(?:[eE][+-]?[0-9]{1,3})?")


def read_source(source: str) -> tuple[dict[str, tuple[str, NumberedRows]], str | None]:
    """Return the rows of a file or of a data set of the Hub, by split, and the SHA-256 of the data set's rows.

    A split is a pair of a prefix and the rows; the prefix followed by a row's number names the row's place. For a
    file, the only split is WHOLE, and None replaces the SHA-256. This function and the iterators raise ValueError or
    OSError if the source cannot be read.
    """
    suffix = os.path.splitext(source)[1].lower()
    if not os.path.exists(source) and suffix not in _SUFFIXES and _HUB_NAME.fullmatch(source):
        return _hub_splits(source)
    if os.path.exists(source) and not os.path.isdir(source) and not os.path.isfile(source):
        raise ValueError("it is not a file; a pipe or a device may never end")
    with open(source, "rb") as file:
        begins_array = suffix == ".json" and file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if begins_array:
        return {WHOLE: (f"{source}, row ", _array_rows(source))}, None
    if suffix == ".parquet":
        return {WHOLE: (f"{source}, row ", _parquet_rows(source))}, None
    if suffix in (".csv", ".tsv"):
        return {WHOLE: (f"{source}:", _csv_rows(source, "\t" if suffix == ".tsv" else ","))}, None
    return {WHOLE: (f"{source}:", _json_lines(source))}, None


def file_sha256(path: str) -> str:
    """Return the SHA-256 of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_lines(path: str) -> NumberedRows:
    """Yield each object of a JSON Lines file with its line number. Blank lines, CRLF and a BOM are allowed."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                yield number, ValueError(f"the line has more than {MAX_LINE_BYTES // 2**20} MB")
                return
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                try:
                    yield number, parse_row(content)
                except ValueError as error:
                    yield number, error


def parse_row(line: bytes) -> Row:
    """Parse the JSON object in a line. Raises ValueError with the reason if the line holds no valid object."""
    if b"\0" in line:
        raise ValueError("the line has a NUL character")
    try:
        row = json.loads(line.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        if isinstance(row, list) and row and isinstance(row[0], dict):
            raise ValueError("not a JSON object; a file with one array needs a name that ends in .json")
        raise ValueError("not a JSON object")
    return row


def _array_rows(path: str) -> NumberedRows:
    """Yield each object of a JSON array with its position, counted from 1. Reading ends at a syntax error."""
    text = _text_of_file(path).strip()
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    place = _after_white_space(text, 1)
    number = 0
    while text[place : place + 1] != "]" or number:
        number += 1
        try:
            row, place = decoder.raw_decode(text, place)
            place = _after_white_space(text, place)
            if place == len(text) or text[place] not in ",]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON ({error.msg}, line {error.lineno}, character {error.colno})")
            return
        except RecursionError:
            yield number, ValueError("nested too deeply")
            return
        except ValueError as error:
            yield number, error
            return
        yield number, row if isinstance(row, dict) else ValueError("not a JSON object")
        if text[place] == "]":
            break
        place = _after_white_space(text, place + 1)
    if place + 1 < len(text):
        yield number + 1, ValueError("there is text after the end of the array")


def _after_white_space(text: str, place: int) -> int:
    return _WHITE_SPACE.match(text, place).end()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"not JSON ({name})")


def _csv_rows(path: str, delimiter: str) -> NumberedRows:
    """Yield each row of a CSV file with the line number at which it begins. The first row names the columns."""
    reader = csv.reader(io.StringIO(_text_of_file(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"not CSV ({error})")
            return
        if cells and not names:
            names = [name.strip() for name in cells]
            if len(set(names)) < len(names):
                yield line, ValueError("a name of a column occurs twice")
                return
        elif cells and len(cells) != len(names):
            yield line, ValueError(f"{len(cells)} cells, but the first line has {len(names)}")
        elif cells:
            values = (float(cell) if _COMPUTED.fullmatch(cell) else cell for cell in cells)
            yield line, dict(zip(names, values, strict=True))
        line = reader.line_num + 1


def _text_of_file(path: str) -> str:
    """Return the content of a file without a byte order mark. Raises ValueError if it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save the file as UTF-8") from None


def _parquet_rows(path: str) -> NumberedRows:
    """Yield each row of a Parquet file with its position, counted from 1."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading Parquet needs the package pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except Exception as error:  # The library raises a dozen kinds of errors for a damaged file.
        raise ValueError(f"it is not a Parquet file that pyarrow can read ({one_line(error)})") from None


def _hub_splits(source: str) -> tuple[dict[str, tuple[str, NumberedRows]], str]:
    """Load a data set of the Hub, OWNER/NAME or OWNER/NAME:CONFIGURATION, as `read_source` returns it.

    Splits that are not named train, validation or test are left out; a single split gets the name WHOLE.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "there is no such file, and a data set of the Hub needs the package datasets: pip install datasets"
        ) from None
    try:
        data = load_dataset(*source.split(":"))
        rows = {split: list(data[split]) for split in data if split in SPLITS or len(data) == 1}
    except Exception as error:  # The library raises a dozen kinds of errors, which all mean the same to the user.
        raise ValueError(
            f"there is no such file, and the Hub gives no data set of this name ({one_line(error)}); write a "
            "configuration as OWNER/NAME:CONFIGURATION; --data FILE needs no network"
        ) from None
    if len(data) == 1:
        rows = {WHOLE: next(iter(rows.values()))}
    elif "train" not in rows:
        raise ValueError(f"the data set has the splits {first_few(data, 5)}, but none that is named train")
    sha256 = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    return {split: (f"{source} {split}".strip() + ", row ", enumerate(rows[split], 1)) for split in rows}, sha256


def parse_columns(columns: str) -> dict[str, str]:
    """Return --columns as a mapping from names that the tasks use to names of columns in the data.

    >>> parse_columns("question=problem, answer=solution")
    {'question': 'problem', 'answer': 'solution'}
    """
    pairs = [tuple(name.strip() for name in pair.split("=")) for pair in columns.split(",")] if columns else []
    names = {pair[0]: pair[-1] for pair in pairs}
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(names) < len(pairs):
        raise ValueError(f"--columns is {columns!r}; it must look like question=problem,answer=solution")
    return names


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with the columns in `columns` under the tasks' names. Raises ValueError if a column is missing."""
    if missing := [column for column in columns.values() if column not in row]:
        raise ValueError(f"no {missing[0]!r}, which --columns names; {names_of(row)}")
    rest = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return rest | {name: row[column] for name, column in columns.items()}


def names_of(row: Row) -> str:
    """Return the names of the columns of a row in words."""
    if not row:
        return "there are no columns"
    return f"the columns are {first_few((ascii(str(name)[:20]) for name in row), COLUMNS_NAMED)}"


def with_plain_texts(row: Row) -> Row:
    """Return a row in which the columns with question and answer hold texts instead of chats.

    A chat is a list of messages with role and content. A column `messages` has the question; it also has the answer
    if it ends with a turn of the assistant. The column `system` gets a chat's system prompt. Raises ValueError if a
    chat does not have exactly one turn of the role that is read from it.
    """
    texts: dict[str, str] = {}
    chat = row.get("messages")
    if _is_chat(chat):
        if not row.keys() & QUESTIONS:
            texts["question"] = _turn(chat, "user")
        if not row.keys() & ANSWERS and chat[-1]["role"] == "assistant":
            texts["answer"] = _turn(chat, "assistant")
    for names, role in ((QUESTIONS, "user"), (ANSWERS, "assistant")):
        texts |= {name: _turn(row[name], role) for name in names if _is_chat(row.get(name))}
    systems = [turn for value in row.values() if _is_chat(value) for turn in value if turn["role"] == "system"]
    if systems and "system" not in row:
        texts["system"] = systems[0]["content"]
    return {**row, **texts}


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and {"role", "content"} <= v.keys() for v in value)
    )


def _turn(chat: Sequence[Mapping[str, Any]], role: str) -> Any:
    """Return the content of a role's turn in a chat. Raises ValueError unless the role has exactly one turn."""
    turns = [turn["content"] for turn in chat if turn["role"] == role]
    if len(turns) != 1:
        raise ValueError(f"the chat has {len(turns)} turns of the {role}; it must have one question and one answer")
    return turns[0]
