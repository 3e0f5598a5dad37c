"""The metrics file: always whole and JSON; a file that is missing, cut short or binary is refused in one line."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from grpo.record import metrics as module
from grpo.record.metrics import FILE_NAME, Metrics, load_metrics
from grpo.runtime import atomic_io
from grpo.runtime.device import environment
from tests.helpers.metrics import CONFIG, EVALUATION, a_record, load_refusal


def strict_json(path):
    """Return the content of a JSON file; fail at NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_is_written_is_read_back(tmp_path):
    metrics = Metrics(tmp_path, CONFIG, environment(torch.device("cpu"), "float32", 1))
    metrics.add_step({"step": 1, "loss": 0.25, "kl": 1e-300, "skipped_updates": 0})
    metrics.add_eval({"step": 1, **EVALUATION})
    assert load_metrics(tmp_path) == metrics.record
    assert load_metrics(tmp_path / FILE_NAME) == metrics.record
    assert strict_json(tmp_path / FILE_NAME)["steps"] == [
        {"step": 1, "loss": 0.25, "kl": 1e-300, "skipped_updates": 0}
    ]
    names = {"schema_version", "config", "environment", "outlook", "steps", "evals", "findings", "finished"}
    assert set(metrics.record) == names | {"before_sft", "sft", "changed_files"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float64("-inf")])
def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path, value):
    metrics = Metrics(tmp_path, CONFIG, {})
    metrics.add_step({"step": 1, "loss": value, "kl": 0.5})
    metrics.add_eval({"step": 1, **EVALUATION, "skills": {"single": {"accuracy": value, "n": 3}}})
    read = strict_json(tmp_path / FILE_NAME)
    assert read["steps"] == [{"step": 1, "loss": None, "kl": 0.5}]
    assert read["evals"][0]["skills"] == {"single": {"accuracy": None, "n": 3}}


def test_a_number_that_is_not_finite_is_null_inside_a_list_too(tmp_path):
    metrics = Metrics(tmp_path, CONFIG, {})
    metrics.add_eval({"step": 1, **EVALUATION, "bins": [0.5, math.nan, [math.inf]]})
    assert strict_json(tmp_path / FILE_NAME)["evals"][0]["bins"] == [0.5, None, [None]]


def test_the_file_is_whole_after_every_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WRITE_EVERY", -1.0)
    metrics = Metrics(tmp_path, CONFIG, {})
    for step in range(1, 30):
        metrics.add_step({"step": step, "kl": 0.1 * step})
        assert [entry["step"] for entry in strict_json(tmp_path / FILE_NAME)["steps"]] == list(range(1, step + 1))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_steps_alone_do_not_rewrite_the_file_each_time(tmp_path, monkeypatch):
    now = itertools.count(1000.0, 1.0)  # one second a call
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    metrics = Metrics(tmp_path, CONFIG, {})
    writes = []
    monkeypatch.setattr(atomic_io.os, "replace", lambda source, target: writes.append(target))
    for step in range(100):
        metrics.add_step({"step": step})
    assert 5 <= len(writes) <= 35  # once every few seconds of 100
    before = len(writes)
    metrics.add_eval({"step": 100, **EVALUATION})
    assert len(writes) == before + 1  # an evaluation is written at once


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    metrics = Metrics(tmp_path, CONFIG, {})
    metrics.add_eval({"step": 0, **EVALUATION})
    before = (tmp_path / FILE_NAME).read_bytes()
    metrics.record["steps"].append({"step": 1, "cannot be JSON": object()})
    with pytest.raises(TypeError):
        metrics.write()
    assert (tmp_path / FILE_NAME).read_bytes() == before
    load_metrics(tmp_path)


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path):
    assert "train_grpo.py" in load_refusal(tmp_path)
    load_refusal(tmp_path / FILE_NAME)
    load_refusal(tmp_path / "no folder" / FILE_NAME)


@pytest.mark.parametrize("content", ["", " ", "\n\n", "\t"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    assert "empty" in load_refusal(tmp_path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = json.dumps(a_record(), separators=(",", ":"))
    for length in range(1, len(whole)):
        (tmp_path / FILE_NAME).write_text(whole[:length], encoding="utf-8")
        assert "cut short" in load_refusal(tmp_path)
    (tmp_path / FILE_NAME).write_text(whole, encoding="utf-8")
    assert load_metrics(tmp_path) == a_record()


BINARY = [b"\x89PNG\r\n\x1a\n", bytes(range(256)), b"\xff\xfe{\x00}\x00", b"\x80", b"\x00" * 100, b"PK\x03\x04\xf3"]


@pytest.mark.parametrize("content", BINARY, ids=range(len(BINARY)))
def test_a_binary_file_is_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    load_refusal(tmp_path)


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text("[" * 100_000, encoding="utf-8")
    load_refusal(tmp_path)
