"""Write a self-contained page about a run: pictures, findings, evaluations, completions, settings.

The page shows text that a model wrote, which is not trusted: jinja2 escapes the text, the page has no script, and a
content security policy forbids loading anything.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from grpo.plots.series import Record, findings
from grpo.record.samples import FILE_NAME as SAMPLES
from grpo.record.schema import few_categories
from grpo.runtime.atomic_io import write_atomic
from grpo.runtime.console import printable

PAGE = "grpo_report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_STEPS = 60  # The completions of at most this many steps are shown.
SHOWN_COMPLETIONS = 16  # At most this many completions of a step are shown.
SHOWN_LETTERS = 2000  # A longer text is cut to this many characters.
KEYS = ("step", "prompt", "completion", "rewards", "reward", "advantage", "correct")
CAPTIONS = {
    "grpo_overview.png": "Every metric of the run; numbered lines are the findings below",
    "grpo_training_curve.png": "Reward and accuracy",
    "grpo_kl_divergence.png": "KL to the reference",
    "grpo_sft_curve.png": "Supervised steps before GRPO",
}
Cell = str | int | Markup


def write_page(record: Record, pictures: Sequence[Path], run: Path, folder: Path) -> Path:
    """Write the page of a run into `folder` and return its path; `run` is the folder of the run."""
    images = {picture.name: picture.read_bytes() for picture in pictures}
    text = page(record, images, *read_samples(run / SAMPLES))
    write_atomic(folder / PAGE, text.encode())
    return folder / PAGE


def read_samples(path: Path) -> tuple[dict[int, list[Mapping[str, Any]]], int]:
    """Return the completions by step and the number of damaged lines; ({}, 0) if the file does not exist."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    damaged = 0
    if not path.is_file():
        return steps, damaged
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                damaged += bool(text.strip()) and text.endswith("\n")  # a run may still be writing the last line
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("completion"), str):
                steps.setdefault(row["step"], []).append({key: row.get(key) for key in KEYS})
            else:
                damaged += 1
    return dict(sorted(steps.items())), damaged


def page(
    record: Record,
    pictures: Mapping[str, bytes],
    samples: Mapping[int, Sequence[Mapping[str, Any]]],
    damaged: int = 0,
) -> str:
    """Return the page as HTML, from pictures by file name, completions by step, and the number of damaged lines."""
    config = record["config"]
    shown = [*(name for name in CAPTIONS if name in pictures), *(name for name in pictures if name not in CAPTIONS)]
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        name=f"GRPO on {_text(config.get('model', '?'))}, seed {_text(config.get('seed', '?'))}",
        state=_state(record),
        pictures=[(CAPTIONS.get(p, _text(p)), base64.b64encode(pictures[p]).decode()) for p in shown],
        findings=[f"Step {finding['step']}: {_text(finding['text'])}" for finding in findings(record)],
        samples_file=SAMPLES,
        recorded_steps=len(samples),
        damaged=damaged,
        steps=[_step(step, samples[step]) for step in _spread(list(samples), SHOWN_STEPS)],
        settings=[("Settings", _name_and_value(config)), ("Environment", _name_and_value(record.get("environment")))],
        **_evaluations(record),
    )


def _text(value: Any, longest: int = SHOWN_LETTERS) -> str:
    """Return a value as text of limited length, with invisible characters as escape sequences."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = f" … ({len(text) - longest} more characters)" if len(text) > longest else ""
    return "\n".join(printable(line) for line in text[:longest].split("\n")) + cut


def _number(value: Any, digits: int = 2) -> str:
    """Format a number with `digits` decimals; return – for any other value."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return f"{value:.{digits}f}".replace("-", "−") if is_number else "–"


def _state(record: Record) -> str:
    """Return a sentence that says whether the run has finished."""
    if ending := record.get("finished"):
        return f"Finished after step {ending['step']}: {_text(ending['reason'])}."
    done = record["steps"][-1]["step"] if record["steps"] else 0
    planned = _text(record["config"].get("num_iterations", "?"))
    return f"Not finished: step {done} of {planned}, running or interrupted."


def _evaluations(record: Record) -> dict[str, Any]:
    """Return the header and the rows of two tables, evaluations and skills, by their names in the template."""
    drifts = any(entry.get("drift") is not None for entry in record["evals"])
    head = ["step", "problems", "right", "95% interval", "n", "well-formed"] + ["drift, nats a token"] * drifts
    rows = [
        [entry["step"], _text(f"{entry.get('split', '?')}{suffix}"), *_measured(part)]
        + ([_number(part.get("drift"), 4)] if drifts else [])
        for entry in record["evals"]
        for suffix, part in (("", entry), *((f", {name}", part) for name, part in few_categories(entry).items()))
    ]
    skills = [
        [entry["step"], _text(name), *_measured(skill)]
        for entry in record["evals"]
        for name, skill in (entry["skills"] if isinstance(entry.get("skills"), dict) else {}).items()
        if isinstance(skill, dict)
    ]
    return {
        "evaluation_head": head,
        "evaluations": rows,
        "skill_head": ["step", "skill", *head[2:6]],
        "skills": skills,
    }


def _measured(entry: Mapping[str, Any]) -> list[str]:
    """Return four cells: accuracy in %, its interval in %, the number of problems, the well-formed share in %."""

    def percent(name: str) -> str:
        return _number(100 * entry[name] if isinstance(entry.get(name), (int, float)) else None, 1)

    interval = f"{percent('ci_low')} to {percent('ci_high')}%"
    well_formed = f"{percent('well_formed')}%".replace("–%", "–")
    return [f"{percent('accuracy')}%", interval, _number(entry.get("n"), 0), well_formed]


def _step(step: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the title and the table of a step's completions."""
    parts = list(dict.fromkeys(name for row in rows for name in _parts(row)))
    right = sum(row.get("correct") is True for row in rows)
    limit = f", {SHOWN_COMPLETIONS} shown" if len(rows) > SHOWN_COMPLETIONS else ""
    return {
        "title": f"Step {step}: {right} of {len(rows)} right{limit}",
        "head": ["prompt", "completion", "", *map(_text, parts), "reward", "advantage"],
        "rows": [_cells(row, parts) for row in rows[:SHOWN_COMPLETIONS]],
    }


def _parts(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parts of the reward by name; {} if they are damaged."""
    return row["rewards"] if isinstance(row.get("rewards"), dict) else {}


def _cells(row: Mapping[str, Any], parts: Iterable[str]) -> list[Cell]:
    """Return a completion as the cells of a table row."""
    correct = row.get("correct")
    mark: Cell = "–"
    if correct is not None:
        right = Markup('<span class="right">✓ right</span>')
        mark = right if correct is True else Markup('<span class="wrong">✗ wrong</span>')
    texts = [Markup("<pre>{}</pre>").format(_text(row.get(key) or "")) for key in ("prompt", "completion")]
    rewards = [_number(_parts(row).get(name)) for name in parts]
    return [*texts, mark, *rewards, _number(row["reward"]), _number(row["advantage"])]


def _spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most `most` items, evenly spread, including the first and the last item."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _name_and_value(values: Any) -> list[list[str]]:
    return [[_text(name), _text(value)] for name, value in values.items()] if isinstance(values, dict) else []
