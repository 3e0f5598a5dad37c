"""GSM8K, grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168), in the format of its authors.

    {"question": "Natalia sold clips to 48 ...", "answer": "She sold 48 / 2 = 24 ...\\n#### 72"}

`--data FILE` is a file in that format, split by a hash of the question. Without it, the optional package datasets
loads the problems from the Hugging Face Hub: the official test problems are the test split, and a hash puts a tenth
of the official training problems into validation. Rewards get the full answer in the column `solution`.
"""

import re

from tasks.base import Problem
from tasks.common.parsing import parse_number
from tasks.common.rows import (
    Columns,
    Data,
    Rows,
    TestData,
    ValidationData,
    kind_of_all,
    notes_on,
    read_splits,
    text_of,
)
from tasks.common.sources import Row

HUB = "openai/gsm8k:main"
MAX_NEW_TOKENS = 256  # The default token limit: the published workings have about 100 tokens; few have more than 256.
MARK = "####"
_CALCULATION = re.compile(r"<<[^<>]*>>")  # a calculator mark, such as <<9*2=18>> in 9 * 2 = <<9*2=18>>18


def load(
    data: Data = "",
    style: str = "answer",
    system_prompt: str = "",
    validation_data: ValidationData = "",
    test_data: TestData = "",
    columns: Columns = "",
) -> Rows:
    """Load the task from a file or data set, by default HUB. Raises ValueError, in one line, if it is malformed."""
    problems, by_split, files = read_splits(data or HUB, validation_data, test_data, columns, problem_of)
    used = sum(map(len, by_split.values()))
    return Rows(
        name="gsm8k",
        problems=by_split,
        files=files,
        style=style,
        kind=kind_of_all(problems),
        notes=notes_on(problems, used),
        system_prompt=system_prompt,
    )


def problem_of(row: Row) -> Problem:
    """Return the problem in a row. Raises ValueError with the reason if the row has none."""
    solution = text_of(row, "answer")
    columns = {name: value for name, value in row.items() if name not in ("question", "answer")}
    working = _CALCULATION.sub("", solution.rpartition(MARK)[0]).strip()
    columns["solution"] = solution
    return Problem(text_of(row, "question"), gold_answer(solution), columns, working=working)


def gold_answer(solution: str) -> str:
    """Return the number after the last ####, without thousands separators, dollar and plus sign.

    Raises ValueError if there is no such number.

    >>> gold_answer("She makes 9 * 2 = $<<9*2=18>>18.\\n#### $1,018")
    '1018'
    """
    _, mark, text = solution.rpartition(MARK)
    if not mark:
        raise ValueError(f"no {MARK} in 'answer'")
    text = text.strip()
    number = parse_number(text)
    if number is None:
        raise ValueError(f"the text after the last {MARK} is not a number: {text[:40]!a}")
    return format(number, "f")
