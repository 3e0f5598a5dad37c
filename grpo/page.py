"""One self-contained page about a run: pictures, findings, evaluations, completions, settings.

It holds text that a model wrote, so nothing in it is trusted: all of it is escaped, there is no script, and a
content security policy forbids whatever would be loaded from elsewhere.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo.console import printable
from grpo.curves import Record, findings
from grpo.files import writing

PAGE, SAMPLES = "grpo_report.html", "grpo_samples.jsonl"
SHOWN_STEPS, SHOWN_COMPLETIONS, SHOWN_LETTERS = 60, 16, 2000  # of all; of a step; of a text
KEYS = ("step", "prompt", "completion", "rewards", "reward", "advantage", "correct")
CAPTIONS = {
    "grpo_overview.png": "Every metric of the run; numbered lines are the findings below",
    "grpo_training_curve.png": "Reward and accuracy",
    "grpo_kl_divergence.png": "KL to the reference",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --paper: #fff; --line: #d4d4d4; --shade: #f4f4f2;
  --right: #00644a; --wrong: #a14300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #161616; --line: #3c3c3c; --shade: #212121;
    --right: #4fd0a5; --wrong: #ff9a57; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; display: block; } figure { margin: 1rem 0; }
figcaption, .soft { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.8rem 0.25rem 0;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { margin: 0; font: 0.85rem/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  min-width: 9rem; }
td { overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--line); padding: 0.3rem 0; } summary { cursor: pointer; }
.right, .wrong { white-space: nowrap; } .right { color: var(--right); } .wrong { color: var(--wrong); }
li { margin: 0.4rem 0; }
"""


def write_page(record: Record, pictures: Sequence[Path], run: Path, folder: Path) -> Path:
    """Write the page of a run (its folder, for the completions) into a folder; returns its path."""
    path, temporary = folder / PAGE, folder / f".{PAGE}"
    text = page(record, {picture.name: picture.read_bytes() for picture in pictures}, *read_samples(run / SAMPLES))
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


def read_samples(path: Path) -> tuple[dict[int, list[Mapping[str, Any]]], int]:
    """Completions by step, and how many lines could not be read. None of either where there is no such file."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    damaged = 0
    if not path.is_file():
        return steps, damaged
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                damaged += bool(text.strip()) and text.endswith("\n")  # a run may be writing the last line
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
    """The page as HTML. `pictures` are PNGs by name, `samples` completions by step, `damaged` their lost lines."""
    config = record["config"]
    name = f"GRPO on {_escape(config.get('model', '?'))}, seed {_escape(config.get('seed', '?'))}"
    parts = [_state(record)]
    for picture in sorted(pictures, key=lambda p: list(CAPTIONS).index(p) if p in CAPTIONS else len(CAPTIONS)):
        data = base64.b64encode(pictures[picture]).decode()
        caption = _escape(CAPTIONS.get(picture, picture))
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    parts += [_findings(record), _evaluations(record), _completions(samples, damaged)]
    parts += [_table_of("Settings", config), _table_of("Environment", record.get("environment"))]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _escape(value: Any, longest: int = SHOWN_LETTERS) -> str:
    """Anything as HTML text: markup and quotes escaped, what cannot be seen as an escape sequence, and an end."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    cut = f" … ({len(text) - longest} more characters)" if len(text) > longest else ""
    return html.escape("\n".join(printable(line) for line in text[:longest].split("\n")), quote=True) + cut


def _number(value: Any, digits: int = 2) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return f"{value:.{digits}f}".replace("-", "−") if known else "–"


def _state(record: Record) -> str:
    ending, steps = record.get("finished"), record["steps"]
    if ending:
        return f"<p>Finished after step {ending['step']}: {_escape(ending['reason'])}.</p>"
    done = steps[-1]["step"] if steps else 0
    planned = _escape(record["config"].get("num_iterations", "?"))
    return f"<p>Not finished: step {done} of {planned}, running or interrupted.</p>"


def _findings(record: Record) -> str:
    rows = []
    for one in findings(record):
        step = f"Step {one['step']}: " if isinstance(one.get("step"), int) else ""
        rows.append(f"<li>{step}{_escape(one['text'])}</li>")
    return "<h2>Findings</h2>\n" + (f"<ol>{''.join(rows)}</ol>" if rows else "<p>None.</p>")


def _evaluations(record: Record) -> str:
    drifts = any(entry.get("drift") is not None for entry in record["evals"])
    rows = [
        [entry["step"], _escape(entry.get("split", "?")), *_measured(entry)]
        + ([_number(entry.get("drift"), 4)] if drifts else [])
        for entry in record["evals"]
    ]
    head = ["step", "problems", "right", "95% interval", "n", "well-formed"] + ["drift, nats a token"] * drifts
    text = "<h2>Evaluations</h2>\n" + (_table(head, rows, words=(1,)) if rows else "<p>None yet.</p>")
    skills = [
        [entry["step"], _escape(name), *_measured(skill)]
        for entry in record["evals"]
        for name, skill in (entry["skills"] if isinstance(entry.get("skills"), dict) else {}).items()
        if isinstance(skill, dict)
    ]
    if skills:
        text += f"\n<h2>Neighbouring skills</h2>\n{_table(['step', 'skill', *head[2:6]], skills, words=(1,))}"
    return text


def _measured(entry: Mapping[str, Any]) -> list[str]:
    """Accuracy, interval, n and well-formed share, in %."""
    names = ("accuracy", "ci_low", "ci_high", "well_formed")
    known = [entry[n] * 100 if isinstance(entry.get(n), (int, float)) else None for n in names]
    right, low, high, formed = (_number(value, 1) for value in known)
    return [f"{right}%", f"{low} to {high}%", _number(entry.get("n"), 0), f"{formed}%"]


def _completions(samples: Mapping[int, Sequence[Mapping[str, Any]]], damaged: int) -> str:
    lines = ["<h2>Completions</h2>"]
    if not samples:
        lines.append(f"<p>There is no {SAMPLES} to show.</p>")
    chosen = _some(list(samples), SHOWN_STEPS)
    if len(chosen) < len(samples):
        lines.append(f'<p class="soft">{len(chosen)} of {len(samples)} recorded steps, evenly spread.</p>')
    if damaged:
        lines.append(f'<p class="soft">Damaged and left out: {damaged} lines of {SAMPLES}.</p>')
    for step in chosen:
        rows = samples[step]
        parts = list(dict.fromkeys(name for row in rows for name in _parts(row)))
        right = sum(row.get("correct") is True for row in rows)
        some = f", {SHOWN_COMPLETIONS} shown" if len(rows) > SHOWN_COMPLETIONS else ""
        head = ["prompt", "completion", "", *map(_escape, parts), "reward", "advantage"]
        table = _table(head, [_cells(row, parts) for row in rows[:SHOWN_COMPLETIONS]], words=(0, 1, 2))
        opened = " open" if step == chosen[-1] else ""
        lines.append(
            f"<details{opened}><summary>Step {step}: {right} of {len(rows)} right{some}</summary>{table}</details>"
        )
    return "\n".join(lines)


def _parts(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row["rewards"] if isinstance(row.get("rewards"), dict) else {}


def _cells(row: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """A completion as cells of a table."""
    correct = row.get("correct")
    mark = '<span class="right">✓ right</span>' if correct is True else '<span class="wrong">✗ wrong</span>'
    texts = [f"<pre>{_escape(row.get(key) or '')}</pre>" for key in ("prompt", "completion")]
    paid = [_number(_parts(row).get(name)) for name in parts]
    return [*texts, mark if correct is not None else "–", *paid, _number(row["reward"]), _number(row["advantage"])]


def _some(items: Sequence[int], most: int) -> list[int]:
    """So many at most, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _table_of(title: str, values: Any) -> str:
    rows = [[_escape(name), _escape(value)] for name, value in values.items()] if isinstance(values, dict) else []
    table = _table(["name", "value"], rows, words=(0, 1))
    return f"<h2>{title}</h2>\n<details><summary>{len(rows)} values</summary>{table}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: Sequence[int]) -> str:
    """Cells that are HTML already, as a table; the columns in `words` are text, the others numbers."""
    kinds = ["" if i in words else ' class="number"' for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'
