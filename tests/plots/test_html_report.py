"""The page of a run: it is valid, loads and executes nothing, and opens in a browser without an error."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from grpo.plots.figures import draw_all
from grpo.plots.html_report import PAGE, SHOWN_COMPLETIONS, SHOWN_STEPS, page, read_samples, write_page
from grpo.record.samples import FILE_NAME as SAMPLES
from tests.helpers.records import EVALS, FINDINGS, a_full_record, a_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-extensions --enable-logging=stderr"
)
EVIL = {
    "script": "<script>document.title = 'taken'</script>",
    "image": "</pre></td></table><img src=https://example.org/x.png onerror=\"document.title='taken'\">",
    "quotes": "\"'><b onmouseover='x'>&amp;&lt;",
    "comment": "<!-- </details> <![CDATA[ <?php",
    "style": "</style><style>body { display: none }</style>@import url(https://example.org/a.css)",
    "control": "\x00\x1b[2J\x08\x7f\x85\r",
    "surrogate": "lone \ud800 and \udfff",
    "direction": "\u202ereversed\u2066",
    "beyond": "\ufffe\U0010ffff 🙂 日本",
    "template": "{{ 7 * 7 }} {% if x %} {# gone #} {0} %s",
    "lines": "4 - 9 = -5\n<answer>-30</answer>",
    "long": "7" * 50_000,
}
VOID = {"meta", "img", "br", "hr", "link", "input"}
PICTURE = b"\x89PNG\r\n\x1a\n"


class Checked(HTMLParser):
    """A parser that collects tags, texts and attributes of a page, and fails if tags are not nested."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:80]}")

    unknown_decl = handle_pi = handle_comment


def a_sample(step, completion="<answer>1</answer>", **more):
    """Return a line of the samples file as a mapping, with the entries of `more` replaced."""
    row = {
        "step": step,
        "prompt": "What is 1 * 1?",
        "completion": completion,
        "rewards": {"exact": 0.6, "close": None},
    }
    return {**row, "reward": 0.6, "advantage": -0.5, "correct": True, **more}


def an_evil_page():
    """Return a page in which every text tries to break out of its element."""
    evil = list(EVIL.values())
    record = a_full_record(20, [{"name": t, "step": 3, "text": t} for t in evil])
    record["config"] |= {"model": evil[0], "reward": evil, evil[1]: evil[2]}
    record["environment"] = {"device": evil[4], evil[1]: 1}
    record["finished"] = {"step": 20, "reason": evil[0]}
    for entry in record["evals"]:
        entry["skills"] = dict.fromkeys(evil, entry["skills"]["letters"])
    samples = [a_sample(3, text, prompt=text, rewards={text: 1.0}) for text in evil]
    return page(record, {"a<b>.png": PICTURE, "grpo_overview.png": PICTURE}, {3: samples}, 7)


def test_whatever_a_text_holds_it_is_shown_and_nothing_else():
    text = an_evil_page()
    checked = Checked(text)
    assert not {"script", "link", "iframe", "object", "base", "form", "b"} & set(checked.tags)
    assert checked.tags.count("img") == 2
    assert not [a for a in checked.attributes if a[1].startswith("on") or a[1] == "style"]
    shown = "".join(checked.texts)
    for name in ("script", "image", "quotes", "comment", "style", "template", "lines"):
        assert EVIL[name] in shown, name
    assert r"\x00\x1b[2J\x08\x7f\x85\r" in shown
    assert r"lone \ud800 and \udfff" in shown
    assert r"\u202ereversed\u2066" in shown
    assert "(48000 more characters)" in shown
    assert "Damaged and left out: 7 lines" in shown
    text.encode("utf-8")  # no surrogate is left
    assert not re.search(r"[^\n\x20-\x7e\x80-\U0010ffff]", text)


def test_nothing_is_loaded_from_elsewhere_and_a_policy_forbids_it():
    checked = Checked(an_evil_page())
    links = [value for _, name, value in checked.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in links)
    [policy] = [value for _, name, value in checked.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy
    style = an_evil_page().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_on_a_narrow_screen_each_cell_names_its_column():
    # A table would be cut off below 40rem. Each cell becomes a line there, with its `data-column` in front.
    text = page(a_full_record(20), {}, {10: [a_sample(10)]})
    columns = [value for tag, name, value in Checked(text).attributes if (tag, name) == ("td", "data-column")]
    assert len(columns) == text.count("<td")
    assert columns[:3] == ["step", "problems", "right"]
    assert {"prompt", "completion", "exact", "reward", "name", "value"} <= set(columns)
    assert "@media (max-width: 40rem)" in text


def test_the_page_has_what_the_run_has():
    text = page(a_full_record(300, FINDINGS), {}, {10: [a_sample(10)], 20: [a_sample(20, correct=False)]})
    shown = " ".join("".join(Checked(text).texts).split())
    for words in (
        "Step 40: The gradient norm",
        "A loss near 0",
        "97.0%",
        "46.0 to 54.0%",
        "letters",
        "beta",
        "0.3000",
    ):
        assert words in shown, words
    assert "Step 10: 1 of 1 right" in shown
    assert "Step 20: 0 of 1 right" in shown
    assert shown.index("✓ right") < shown.index("✗ wrong")
    assert "−0.50" in shown  # the advantage
    assert "<details open>" in text


@pytest.mark.parametrize("record", [a_record(0), a_record(1, EVALS[:1]), {**a_record(3), "config": {}}])
def test_a_run_without_samples_findings_or_an_end_has_a_page(record):
    shown = "".join(Checked(page(record, {}, {})).texts)
    assert "Not finished" in shown
    assert f"There is no {SAMPLES}" in shown


def test_a_page_does_not_grow_without_end():
    samples = {step: [a_sample(step)] * 100 for step in range(1, 1001)}
    text = page(a_record(5), {}, samples)
    assert text.count("<summary>Step") == SHOWN_STEPS
    assert text.count("✓ right") == SHOWN_STEPS * SHOWN_COMPLETIONS
    assert "Step 1: 100 of 100 right, 16 shown" in text
    assert "Step 1000:" in text


LINES = {
    "good": json.dumps(a_sample(2)),
    "another step": json.dumps(a_sample(1)),
    "cut short": json.dumps(a_sample(2))[:-20],
    "not an object": "[1]",
    "without a step": json.dumps({"completion": "x"}),
    "a step that is a text": json.dumps(a_sample("2")),
    "a completion that is none": json.dumps(a_sample(2, completion=None)),
    "deep": "[" * 100_000,
    "not text": b"\xff\xfe\x00",
    "empty": "",
    "rewards of another kind": json.dumps(a_sample(2, rewards=[1], reward="x", advantage=None, correct=None)),
    "numbers beyond any": json.dumps(a_sample(2, reward=10**400, advantage=float("inf"))),
}


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    lines = [line if isinstance(line, bytes) else line.encode() for line in LINES.values()]
    (tmp_path / SAMPLES).write_bytes(b"\n".join(lines))
    samples, damaged = read_samples(tmp_path / SAMPLES)
    assert {step: len(rows) for step, rows in samples.items()} == {1: 1, 2: 3}
    assert list(samples) == [1, 2]
    assert damaged == 7
    Checked(page(a_record(3), {}, samples, damaged))
    assert read_samples(tmp_path / "none") == ({}, 0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_chromium_opens_it_without_an_error(tmp_path):
    record = a_full_record(300, FINDINGS)
    with (tmp_path / SAMPLES).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(a_sample(10, text)) + "\n" for text in EVIL.values())
    path = write_page(record, draw_all(record, tmp_path), tmp_path, tmp_path)
    assert path.name == PAGE
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr  # an error, or a load that the policy of the page refused
    assert "<title>GRPO on starter, seed 0</title>" in result.stdout  # no completion has changed it
    assert result.stdout.count("<img") == 3
    assert result.stdout.count("<tr>") == path.read_text(encoding="utf-8").count("<tr>")  # nothing was repaired
