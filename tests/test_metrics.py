"""The metrics file: always whole and JSON, and every damaged one answered with a line that says what to do."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from grpo import metrics
from grpo.evaluate import wilson_interval
from grpo.metrics import FILE_NAME, SCHEMA_VERSION, Metrics, Stopwatch, environment, load_metrics

CONFIG = {"model": "starter", "seed": 0, "beta": 0.04}
EVALUATION = {"split": "validation", "accuracy": 0.5, "n": 8, "ci_low": 0.2, "ci_high": 0.8, "well_formed": 1.0}


def a_record(steps=3):
    """A small record as a run writes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": CONFIG,
        "environment": {"device": "cpu"},
        "steps": [{"step": step, "reward_mean": 0.5, "accuracy": 0.25, "kl": None} for step in range(1, steps + 1)],
        "evals": [{"step": 0, **EVALUATION}],
        "findings": [],
    }


def strict_json(path):
    """The content of a file as JSON has it, NaN and Infinity refused."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def refusal(path):
    """What `load_metrics` says of a file, after checking that it is one line and names the file."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_metrics(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert FILE_NAME in text
    return text


# --- writing ---


def test_what_is_written_is_read_back(tmp_path):
    record = Metrics(tmp_path, CONFIG, environment("cpu", 1, {"torch": "2"}))
    record.add_step({"step": 1, "loss": 0.25, "kl": 1e-300, "skipped_updates": 0})
    record.add_eval({"step": 1, **EVALUATION})
    assert load_metrics(tmp_path) == record.record
    assert load_metrics(tmp_path / FILE_NAME) == record.record
    assert strict_json(tmp_path / FILE_NAME)["steps"] == [
        {"step": 1, "loss": 0.25, "kl": 1e-300, "skipped_updates": 0}
    ]
    names = {"schema_version", "config", "environment", "steps", "evals", "findings", "finished"}
    assert set(record.record) == names


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float64("-inf")])
def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path, value):
    record = Metrics(tmp_path, CONFIG, {})
    record.add_step({"step": 1, "loss": value, "kl": 0.5})
    record.add_eval({"step": 1, **EVALUATION, "skills": {"single": {"accuracy": value, "n": 3}}})
    read = strict_json(tmp_path / FILE_NAME)
    assert read["steps"] == [{"step": 1, "loss": None, "kl": 0.5}]
    assert read["evals"][0]["skills"] == {"single": {"accuracy": None, "n": 3}}


def test_a_number_that_is_not_finite_is_null_inside_a_list_too(tmp_path):
    record = Metrics(tmp_path, CONFIG, {})
    record.add_eval({"step": 1, **EVALUATION, "bins": [0.5, math.nan, [math.inf]]})
    assert strict_json(tmp_path / FILE_NAME)["evals"][0]["bins"] == [0.5, None, [None]]


def test_the_file_is_whole_after_every_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "WRITE_EVERY", -1.0)
    record = Metrics(tmp_path, CONFIG, {})
    for step in range(1, 30):
        record.add_step({"step": step, "kl": 0.1 * step})
        assert [entry["step"] for entry in strict_json(tmp_path / FILE_NAME)["steps"]] == list(range(1, step + 1))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_steps_alone_do_not_rewrite_the_file_each_time(tmp_path, monkeypatch):
    now = itertools.count(1000.0, 1.0)  # one second a call
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    record = Metrics(tmp_path, CONFIG, {})
    writes = []
    monkeypatch.setattr(metrics.os, "replace", lambda source, target: writes.append(target))
    for step in range(100):
        record.add_step({"step": step})
    assert 5 <= len(writes) <= 35  # every few of 100 seconds
    before = len(writes)
    record.add_eval({"step": 100, **EVALUATION})
    assert len(writes) == before + 1  # an evaluation at once


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    record = Metrics(tmp_path, CONFIG, {})
    record.add_eval({"step": 0, **EVALUATION})
    before = (tmp_path / FILE_NAME).read_bytes()
    record.record["steps"].append({"step": 1, "cannot be JSON": object()})
    with pytest.raises(TypeError):
        record.write()
    assert (tmp_path / FILE_NAME).read_bytes() == before
    load_metrics(tmp_path)


def test_the_stopwatch_adds_up_phases_and_counts_a_phase_that_raises(monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    clock = Stopwatch()
    with clock("sample"):
        pass
    with clock("sample"):
        pass
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    assert clock.seconds == {"sample": 5.0, "update": 4.0}


# --- reading what is not right ---


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path):
    assert "train_grpo.py" in refusal(tmp_path)
    refusal(tmp_path / FILE_NAME)
    refusal(tmp_path / "no folder" / FILE_NAME)


@pytest.mark.parametrize("content", ["", " ", "\n\n", "\t"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    assert "empty" in refusal(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = json.dumps(a_record(), separators=(",", ":"))
    for length in range(1, len(whole)):
        (tmp_path / FILE_NAME).write_text(whole[:length], encoding="utf-8")
        assert "cut short" in refusal(tmp_path)
    (tmp_path / FILE_NAME).write_text(whole, encoding="utf-8")
    assert load_metrics(tmp_path) == a_record()


BINARY = [b"\x89PNG\r\n\x1a\n", bytes(range(256)), b"\xff\xfe{\x00}\x00", b"\x80", b"\x00" * 100, b"PK\x03\x04\xf3"]


@pytest.mark.parametrize("content", BINARY, ids=range(len(BINARY)))
def test_a_binary_file_is_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "[]", "null", "5", "true", '"schema_version"', '["schema_version"]', '{"steps": [], "evals": []}'),
        *('{"log_history": [{"step": 1}]}', '{"scalars": {"loss": [1, 2]}}'),
    ],
)
def test_the_json_of_another_program_is_refused_as_such(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    assert "not written by this program" in refusal(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", "", None, 1.5, [1], {"a": 1}, "1\n2"])
def test_another_schema_is_refused_with_both_versions(tmp_path, version):
    (tmp_path / FILE_NAME).write_text(json.dumps({**a_record(), "schema_version": version}), encoding="utf-8")
    assert str(SCHEMA_VERSION) in refusal(tmp_path)


WRONG = {
    "steps missing": {"steps": ...},
    "steps null": {"steps": None},
    "steps a number": {"steps": 3},
    "steps a text": {"steps": "abc"},
    "steps an object": {"steps": {"1": {"step": 1}}},
    "steps of numbers": {"steps": [1, 2]},
    "steps of nulls": {"steps": [None]},
    "a step without its number": {"steps": [{"kl": 0.1}]},
    "a step numbered by a text": {"steps": [{"step": "1"}]},
    "a step numbered null": {"steps": [{"step": None}]},
    "a step numbered true": {"steps": [{"step": True}]},
    "a step numbered by a fraction": {"steps": [{"step": 1.5}]},
    "a step below zero": {"steps": [{"step": -1}]},
    "one bad step among good ones": {"steps": [{"step": 1}, 5, {"step": 3}]},
    "a metric that is a text": {"steps": [{"step": 1, "kl": "x"}]},
    "a metric that is an object": {"steps": [{"step": 1, "kl": {}}]},
    "a metric that is a list": {"steps": [{"step": 1, "kl": [1, 2]}, {"step": 2, "kl": 1.0}]},
    "a metric out of range": {"steps": [{"step": 1, "kl": 10**400}]},
    "a step out of range": {"steps": [{"step": 10**400}]},
    "evals missing": {"evals": ...},
    "evals an object": {"evals": {}},
    "evals of texts": {"evals": ["a"]},
    "an evaluation without its step": {"evals": [EVALUATION]},
    "an evaluation without its numbers": {"evals": [{"step": 0, "split": "validation"}]},
    "an evaluation of nulls": {"evals": [{"step": 0, **EVALUATION, "accuracy": None, "ci_low": None}]},
    "an evaluation of texts": {"evals": [{"step": 0, **EVALUATION, "accuracy": "high"}]},
    "config missing": {"config": ...},
    "config null": {"config": None},
    "config a list": {"config": []},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_record_with_wrong_types_is_refused(tmp_path, change):
    # All that a reader of the file relies on: the plots would otherwise stop with a traceback.
    record = {key: value for key, value in {**a_record(), **change}.items() if value is not ...}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    assert "damaged" in refusal(tmp_path)


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text("[" * 100_000, encoding="utf-8")
    refusal(tmp_path)


def test_what_a_later_version_adds_does_no_harm(tmp_path):
    record = {**a_record(), "more": [1]}
    record["steps"][0]["something new"] = 0.5
    record["evals"][0]["skills"] = {"something new": {"accuracy": 0.5, "n": 8}}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    assert load_metrics(tmp_path) == record


# --- the interval that goes with every accuracy ---


@pytest.mark.parametrize("n", [1, 2, 8, 10, 100, 500, 829, 1000])
def test_the_interval_agrees_with_scipy(n):
    for successes in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_by_hand():
    # z² = 3.8415. 0 of 10: centre = half = (z²/20) / (1 + z²/10) = 0.19207 / 1.38415 = 0.13877, so [0, 0.27753].
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0.0, abs=1e-15)
    assert high == pytest.approx(0.27753, abs=5e-6)
    # 5 of 10: centre 1/2; half = 1.95996 / 1.38415 · √(0.025 + 0.0096037) = 1.41600 · 0.186021 = 0.26341.
    assert wilson_interval(5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)


@pytest.mark.parametrize("n", [1, 3, 10, 829, 10**6])
def test_the_interval_stays_in_range_holds_the_proportion_and_is_symmetric(n):
    for successes in sorted({0, 1, n // 2, n - 1, n}):
        low, high = wilson_interval(successes, n)
        assert 0.0 <= low < high <= 1.0
        assert low - 1e-12 <= successes / n <= high + 1e-12
        mirrored = wilson_interval(n - successes, n)
        assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    assert wilson_interval(0, n)[0] == pytest.approx(0.0, abs=1e-15)
    assert wilson_interval(n, n)[1] == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (-1, -1), (0, -5)])
def test_what_is_no_proportion_is_refused(successes, n):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(successes, n)
