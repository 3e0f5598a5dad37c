"""Hundreds of simulated runs: healthy runs have no finding, runs with a fault have the finding of this fault.

The ordinary suite simulates a few runs. `python -m pytest -m slow tests/diagnostics/test_gauntlet.py` simulates 1,200
healthy runs, 1,200 healthy runs on mixtures of tasks, and each fault in twelve shapes of batches.
"""

from collections import Counter

import pytest

from grpo.diagnostics.findings import CHECKS, findings
from tests.helpers.illnesses import ILLNESSES, UNDEFINED
from tests.helpers.simulated_runs import SHAPES, healthy_mixture, healthy_run, setting_of

FEW = [(1, 2), (4, 8), (16, 16)]
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


def first_half(record):
    """Return the first half of the record of a run."""
    half = record["config"]["num_iterations"] // 2
    evals = [e for e in record["evals"] if e["step"] <= half and not (e["split"] == "test" and e["step"])]
    return {**record, "steps": record["steps"][:half], "evals": evals}


@pytest.mark.parametrize("seeds", [2, pytest.param(100, marks=SLOW)])
def test_healthy_runs_have_no_finding(seeds):
    check_health(healthy_run, SHAPES, range(seeds))


@pytest.mark.parametrize(
    ("shapes", "seeds"), [([(8, 8)], 4), pytest.param(SHAPES, 100, marks=SLOW)], ids=["few", "all shapes"]
)
def test_healthy_runs_on_mixtures_have_no_finding(shapes, seeds):
    check_health(healthy_mixture, shapes, range(seeds))


def check_health(make, shapes, seeds):
    """Check that at most one in a thousand runs has a finding."""
    found = Counter()
    for shape in shapes:
        for seed in seeds:
            found.update((finding.name, shape) for finding in findings(make(shape, seed)))
    assert sum(found.values()) <= len(seeds) * len(shapes) / 1000, found


def test_every_finding_has_an_illness():
    assert set(ILLNESSES) == set(CHECKS)


@pytest.mark.parametrize(
    ("shapes", "seeds"), [(FEW, 1), pytest.param(SHAPES, 5, marks=SLOW)], ids=["few", "all shapes"]
)
@pytest.mark.parametrize("name", ILLNESSES)
def test_a_heavy_illness_is_named_before_half_of_the_run_is_over(name, shapes, seeds):
    heavy, _ = ILLNESSES[name]
    named = []
    for shape in shapes:
        for seed in range(seeds):
            setting = setting_of(shape, seed)
            if name not in UNDEFINED or not UNDEFINED[name](setting):
                record = first_half(heavy(setting, seed))
                named.append(name in {finding.name for finding in findings(record)})
    assert named, "no shape tells this illness from health"
    assert sum(named) >= 0.95 * len(named), f"{sum(named)} of {len(named)}"
