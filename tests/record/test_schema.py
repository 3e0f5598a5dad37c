"""The format of the metrics file: records of other programs, other versions and wrong types are refused."""

import json

import pytest

from grpo.record.metrics import FILE_NAME, load_metrics
from grpo.record.schema import SCHEMA_VERSION, is_evaluation
from tests.helpers.metrics import a_record, load_refusal


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
