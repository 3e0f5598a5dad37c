"""GSM8K, grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168), in the format of its authors.

    {"question": "Natalia sold clips to 48 ...", "answer": "She sold 48 / 2 = 24 ...\\n#### 72"}

`--data FILE` is a file in that format, split by a hash of the question. Without it, the optional package datasets
loads the problems from the Hugging Face Hub: the official test problems are the test split, and a hash puts a tenth
of the official training problems into validation. The column `solution` has the full answer.
"""

import hashlib
import re
from itertools import chain
from typing import Annotated

from tasks.base import Option, Problem, one_line, split_of
from tasks.common.parsing import parse_number
from tasks.common.rows import Row, Rows, kind_of_all, normal, notes_on, read_rows, split_rows, text_of

HUB = "openai/gsm8k"
MAX_NEW_TOKENS = 256  # The default token limit: the published workings have about 100 tokens, few more than 256.
MARK = "####"
_CALCULATION = re.compile(r"<<[^<>]*>>")  # a calculator mark, such as <<9*2=18>> in 9 * 2 = <<9*2=18>>18


def load(
    data: Annotated[str, Option("JSON Lines file with the problems", inheritable=False, common=True)] = "",
    style: str = "answer",
    system_prompt: str = "",
) -> Rows:
    """Load the task from the file `data`, or from the Hub if `data` is empty. Raises ValueError, in one line."""
    if data:
        problems, sha256 = read_rows(data, problem_of)
        by_split = split_rows(problems, data)
        notes = notes_on(problems)
    else:
        by_split, sha256 = from_hub()
        notes = []
    return Rows(
        name="gsm8k",
        problems=by_split,
        files={data or HUB: sha256},
        style=style,
        kind=kind_of_all(chain.from_iterable(by_split.values())),
        notes=notes,
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

    Raises ValueError if there is none.

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


def from_hub() -> tuple[dict[str, list[Problem]], str]:
    """Load the problems by split; also return the SHA-256 of their texts. Raises ValueError if that fails."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "--task gsm8k without --data FILE takes the problems from the Hugging Face Hub: pip install datasets"
        ) from None
    try:
        data = load_dataset(HUB, "main")
        test = [problem_of(row) for row in data["test"]]
        train = [problem_of(row) for row in data["train"]]
    except Exception as error:  # the library raises a dozen kinds of errors, which all mean the same to the user
        raise ValueError(
            f"cannot load {HUB} from the Hub ({one_line(error)}); --data FILE needs no network"
        ) from error
    test_questions = {normal(problem.question) for problem in test}
    rest = [problem for problem in train if normal(problem.question) not in test_questions]
    by_split = {"train": [], "validation": [], "test": test}
    for problem in rest:
        held_out = split_of(normal(problem.question)) == "validation"
        by_split["validation" if held_out else "train"].append(problem)
    digest = hashlib.sha256()
    for problem in (*test, *rest):
        digest.update(f"{problem.question}\0{problem.answer}\0".encode())
    return by_split, digest.hexdigest()
