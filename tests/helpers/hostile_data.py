"""Files of problems, each hostile in one way: the bytes of a JSON Lines file, or a function that makes the file."""

import json
import os

from tests.helpers.data import town_rows

NUMBERS = [{"question": f"How many are {i}?", "answer": i} for i in range(300)]
LONG = 5 * 2**20


def rows(*more, of=NUMBERS, at=7):
    """Return good rows as bytes, with other rows among them from line `at` on; a row may be given as bytes."""
    lines = [json.dumps(row).encode() for row in of]
    lines[at - 1 : at - 1] = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in more]
    return b"\n".join(lines) + b"\n"


def link_to_itself(path):
    """Make a symbolic link to itself."""
    path.symlink_to(path)


LINE_7 = "data.jsonl:7: "
# The content, or the function that makes the file, and words that the error must have.
FILES = {
    "nothing": (b"", "too few problems"),
    "one row": (rows(of=NUMBERS[:1], at=1), "too few problems"),
    "301 times one question": (rows(of=[{"question": "What?", "answer": "5"}] * 301), "1 in 301 rows"),
    "one question in many spellings": (
        rows(of=[{"question": " " * (i % 9) + ("WHAT?", "what?")[i % 2], "answer": "5"} for i in range(301)]),
        "1 in 301 rows",
    ),
    "questions longer than the positions": (
        rows(of=[{"question": "7 " * (600 + i), "answer": 1} for i in range(301)]),
        "(and 300 more of 301: ",
    ),
    "an answer of 5 MB": (rows({"question": "?", "answer": "a </answer>" + "b" * LONG}), LINE_7),
    "a line of 40 MB": (rows(b"x" * (40 * 2**20)), LINE_7),
    "a NUL": (rows(b'{"question": "a\0", "answer": 1}'), LINE_7),
    "all NUL": (bytes(10**6), "NUL"),
    "random bytes": (bytes((i * 7919) % 251 for i in range(10**5)), "data.jsonl:1: "),
    "UTF-16": ('{"question": "q", "answer": "a"}\n' * 300).encode("utf-16"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(256)) * 40, "data.jsonl:1: "),
    "escape sequences as a line": (rows(b"\x1b[2J\x1b]0;owned\x07"), LINE_7),
    "escape sequences as a key": (rows({"\x1b[2J": 1, "answer": "\x1b[2J"}), LINE_7),
    "escape sequences around a tag": (rows({"question": "q", "answer": "\x1b[2J</answer>"}), LINE_7),
    "nested": (rows(b"[" * 10**6), LINE_7),
    "an object nested": (rows(b'{"question": "q", "answer": "a", "x": ' + b"[" * 10**6), LINE_7),
    "a number of 10**5 digits": (rows(b'{"question": "q", "answer": ' + b"9" * 10**5 + b"}"), LINE_7),
    "1e999": (rows(b'{"question": "q", "answer": 1e999}'), LINE_7),
    "NaN": (rows(b'{"question": "q", "answer": NaN}'), LINE_7),
    "half a surrogate pair": (rows(b'{"question": "\\ud800", "answer": 1}'), LINE_7),
    "a key twice": (rows(b'{"question": "q", "question": "r", "answer": 1}'), LINE_7),
    "an array": (rows(b"[1, 2, 3]"), LINE_7),
    "a JSON array over lines": (json.dumps(NUMBERS, indent=1).encode(), "data.jsonl:1: "),
    "CSV": (b"question,answer\n" + b"1,2\n" * 300, "data.jsonl:1: "),
    "an empty answer": (rows({"question": "q", "answer": " "}), LINE_7),
    "an answer that is a list": (rows({"question": "q", "answer": [1]}), LINE_7),
    "an answer with a tag": (rows({"question": "q", "answer": "1</answer>"}), LINE_7),
    "the placeholder as an answer": (rows({"question": "q", "answer": "..."}), LINE_7),
    "a folder": (lambda path: path.mkdir(), "cannot read --data"),
    "a link to itself": (link_to_itself, "cannot read --data"),
    "a pipe": (os.mkfifo, "cannot read --data"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "cannot read --data"),
    "a million bad lines": (b"{}\n" * 10**6, "(and 999999 more: 2, 3, 4, 5, …)"),
}
FILES["UTF-16"] = (FILES["UTF-16"], "data.jsonl:1: ")
# Files that are unusual but not wrong, and words of the remark that a run must make about them.
ODD = {
    "1e300 among integers": (rows({"question": "q", "answer": 1e300}), "text, not integer, because of 1 of 301"),
    "a word among integers": (rows({"question": "q", "answer": "\x1b[2Jmany"}), "data.jsonl:7 '\\\\x1b[2Jmany'"),
    "a fraction among integers": (rows({"question": "q", "answer": 0.5}), "number, not integer, because of 1 of 301"),
    "the same question with another answer": (
        rows({"question": " how many ARE 3?", "answer": 4}),
        "data.jsonl:7 '4' (before: data.jsonl:4 '3')",
    ),
    "towns": (rows(of=town_rows()), ""),
}


def write_file(path, content):
    """Write this content to a file, or call the function with the path of the file."""
    content(path) if callable(content) else path.write_bytes(content)
    return path
