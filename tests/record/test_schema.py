"""The schema of the metrics file: records of other programs, other versions and wrong types are refused."""

import json

import pytest

from grpo.record.metrics import FILE_NAME, load_metrics
from grpo.record.schema import SCHEMA_VERSION, is_evaluation
from tests.helpers.metrics import EVALUATION, a_record, load_refusal


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "[]", "null", "5", "true", '"schema_version"', '["schema_version"]', '{"steps": [], "evals": []}'),
        *('{"log_history": [{"step": 1}]}', '{"scalars": {"loss": [1, 2]}}'),
    ],
)
def test_the_json_of_another_program_is_refused_as_such(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    assert "not written by this program" in load_refusal(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 99, -1, "1", "", None, 1.5, [1], {"a": 1}, "1\n2"])
def test_another_schema_is_refused_with_both_versions(tmp_path, version):
    (tmp_path / FILE_NAME).write_text(json.dumps({**a_record(), "schema_version": version}), encoding="utf-8")
    assert str(SCHEMA_VERSION) in load_refusal(tmp_path)


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
    # readers of the file rely on all of it: the plots would otherwise stop with a traceback
    record = {key: value for key, value in {**a_record(), **change}.items() if value is not ...}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    assert "damaged" in load_refusal(tmp_path)


def test_entries_that_a_later_version_adds_are_kept(tmp_path):
    record = {**a_record(), "more": [1]}
    record["steps"][0]["something new"] = 0.5
    record["evals"][0]["skills"] = {"something new": {"accuracy": 0.5, "n": 8}}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    assert load_metrics(tmp_path) == record


@pytest.mark.parametrize("skills", [5, {"single": {}}, {"single": {"accuracy": "high"}}])
def test_an_evaluation_of_a_checkpoint_with_damaged_skills_is_none(skills):
    entry = {"step": 1, "split": "test", "accuracy": 0.5, "n": 10, "ci_low": 0.2, "ci_high": 0.8}
    assert is_evaluation(entry | {"skills": {}})
    assert not is_evaluation(entry | {"skills": skills})
