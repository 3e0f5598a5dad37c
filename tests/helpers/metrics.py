"""A small metrics file, and how `load_metrics` must refuse a damaged one."""

import pytest

from grpo.record.metrics import FILE_NAME, load_metrics
from grpo.record.schema import SCHEMA_VERSION

CONFIG = {"model": "starter", "seed": 0, "beta": 0.04}
EVALUATION = {"split": "validation", "accuracy": 0.5, "n": 8, "ci_low": 0.2, "ci_high": 0.8, "well_formed": 1.0}


def a_record(steps=3):
    """Return a small record as a run writes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "config": CONFIG,
        "environment": {"device": "cpu"},
        "steps": [{"step": step, "reward_mean": 0.5, "accuracy": 0.25, "kl": None} for step in range(1, steps + 1)],
        "evals": [{"step": 0, **EVALUATION}],
        "findings": [],
    }


def load_refusal(path):
    """Return what `load_metrics` says of a file, after checking that it is one line and names the file."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_metrics(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert FILE_NAME in text
    return text
