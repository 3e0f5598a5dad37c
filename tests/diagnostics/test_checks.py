"""Each check on a run that has its finding, and on runs that are close to it but do not have it."""

import pytest

from grpo.diagnostics import groups, learning, stability
from grpo.diagnostics.findings import CHECKS
from tests.diagnostics import groups_cases, learning_cases, stability_cases
from tests.helpers.sick_runs import changed, check_fires_once, check_same_step_by_step, names

CASES = {groups: groups_cases, learning: learning_cases, stability: stability_cases}
SICK_AND_WELL = {name: runs for cases in CASES.values() for name, runs in cases.SICK_AND_WELL.items()}
MORE_SICK = [case for cases in CASES.values() for case in cases.MORE_SICK]


@pytest.mark.parametrize("module", CASES, ids=lambda module: module.__name__)
def test_every_check_has_a_sick_run(module):
    checks = [name for name, check in CHECKS.items() if check.__module__ == module.__name__]
    assert list(CASES[module].SICK_AND_WELL) == checks


@pytest.mark.parametrize(("name", "sick"), [*((name, sick) for name, (sick, _) in SICK_AND_WELL.items()), *MORE_SICK])
def test_a_finding_fires_on_its_sick_run_once_and_says_what_to_do(name, sick):
    check_fires_once(name, changed(**sick))


@pytest.mark.parametrize(
    ("name", "well"), [(name, well) for name, (_, all_well) in SICK_AND_WELL.items() for well in all_well]
)
def test_a_finding_is_silent_on_a_run_that_only_looks_like_it(name, well):
    assert name not in names(changed(**well))


@pytest.mark.parametrize("sick", [sick for sick, _ in SICK_AND_WELL.values()], ids=list(SICK_AND_WELL))
def test_a_run_that_looks_after_every_step_finds_what_the_whole_record_shows(sick):
    check_same_step_by_step(changed(**sick))


def test_the_noise_of_two_evaluations_is_no_difference():
    one = {"accuracy": 0.55, "ci_low": 0.51, "ci_high": 0.59}
    other = {"accuracy": 0.5, "ci_low": 0.46, "ci_high": 0.54}
    assert not learning._is_better(one, other)
    assert learning._is_better(one | {"accuracy": 0.56}, other)
