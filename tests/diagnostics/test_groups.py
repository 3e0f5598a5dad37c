"""Each finding on groups: a run that has it, and runs that only look like it."""

import pytest

from grpo.diagnostics import groups
from tests.helpers.sick_runs import accuracy, changed, check_fires_once, check_same_step_by_step, every, names

UNABLE, PAIRS = {"accuracy": 0.01}, {"num_generations": 2}
PAID_ALIKE = {"tied_groups_fraction": 1.0, "tied_all_right_fraction": 0.0, "tied_all_wrong_fraction": 0.2}
SICK_AND_WELL = {
    "too_easy": (
        {"steps": {"tied_all_right_fraction": 0.95}},
        [{"steps": {"tied_all_right_fraction": 1.0}, "first": 11}],  # it has learned it
    ),
    "too_hard": (
        {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.0}, "evals": accuracy(0.0), "tests": [UNABLE] * 2},
        [
            {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.05}, "evals": accuracy(0.3)},
            {"steps": {"tied_all_wrong_fraction": 0.6, "accuracy": 0.05}, "evals": accuracy(0.0)},
            {"steps": {"tied_all_wrong_fraction": 1.0}, "evals": accuracy(0.0), "length": 19},
        ],
    ),
    "constant_reward": (
        {"steps": PAID_ALIKE | {"reward_mean": 0.5, "accuracy": 0.4}},
        [
            {"steps": PAID_ALIKE | {"reward_mean": every(2, 0.5, 0.6), "accuracy": 0.4}},  # not constant: hacking
            {"steps": PAID_ALIKE | {"reward_mean": 1.0, "accuracy": 1.0}},  # all is right
        ],
    ),
    "all_or_nothing": (
        {"steps": {"tied_groups_fraction": 0.95, "tied_all_right_fraction": 0.5, "tied_all_wrong_fraction": 0.45}},
        [
            {"steps": {"tied_all_right_fraction": 0.95, "tied_all_wrong_fraction": 0.0}},
            {"steps": {"tied_all_right_fraction": 0.3, "tied_all_wrong_fraction": 0.3}},
        ],
    ),
    "tied_groups": (
        {"steps": {"tied_groups_fraction": 0.7, "tied_all_right_fraction": 0.2}},
        [
            {"steps": {"tied_groups_fraction": 0.7, "tied_all_right_fraction": 0.6}},  # most because all is right
            {
                "steps": {"tied_groups_fraction": 0.6, "tied_all_right_fraction": 0.1},
                "config": {"num_generations": 2},
            },
        ],
    ),
    "idle_steps": (
        {"steps": {"tied_groups_fraction": every(2, 1.0, 0.2)}},
        [
            {"steps": {"tied_groups_fraction": 0.9}},
            {"steps": {"tied_groups_fraction": every(2, 1.0, 0.2)}, "config": {"batch_size": 1}},  # one group a step
        ],
    ),
}
MORE_SICK = [
    (
        "too_hard",
        {"steps": {"tied_all_wrong_fraction": 0.5, "accuracy": 0.01}, "evals": accuracy(0.0), "tests": [UNABLE] * 2},
    )
]


def test_every_check_has_a_sick_run():
    assert list(SICK_AND_WELL) == [check.__name__ for check in groups.CHECKS]


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
