"""For each finding of tied groups: a run that has it, and runs that are close to it but do not have it."""

from tests.helpers.sick_runs import accuracy, by_category, every

UNABLE, PAIRS = {"accuracy": 0.01}, {"num_generations": 2}
EQUAL_REWARDS = {"tied_groups_fraction": 1.0, "tied_all_right_fraction": 0.0, "tied_all_wrong_fraction": 0.2}
NOTHING = {"groups": 8, "num_generations": 16, "teaching": 0.0, "all_right": 0.0, "pass_at_1": 0.0, "pass_at_g": 0.0}
NOTHING |= {"well_formed": 1.0, "truncated": 0.0}
SICK_AND_WELL = {
    "nothing_to_learn": (
        {"outlook": NOTHING},
        [
            {"outlook": NOTHING | {"teaching": 0.125}},
            {"outlook": NOTHING | {"groups": 4}},  # All of 64 completions may be wrong, or right, by chance.
            {"outlook": NOTHING | {"groups": 1, "num_generations": 2, "well_formed": 0.0}},
            {"outlook": None},  # older versions wrote no outlook
        ],
    ),
    "too_easy": (
        {"steps": {"tied_all_right_fraction": 0.95}},
        [{"steps": {"tied_all_right_fraction": 1.0}, "first": 11}],  # the run has learned the task
    ),
    "too_hard": (
        {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.0}, "evals": accuracy(0.0), "tests": [UNABLE] * 2},
        [
            {"steps": {"tied_all_wrong_fraction": 0.95, "accuracy": 0.05}, "evals": accuracy(0.3)},
            {"steps": {"tied_all_wrong_fraction": 0.6, "accuracy": 0.05}, "evals": accuracy(0.0)},
            {"steps": {"tied_all_wrong_fraction": 1.0}, "evals": accuracy(0.0), "length": 19},
        ],
    ),
    "unsolved_category": (
        {"evals": by_category(lambda step: 0.0)},
        [
            {"evals": by_category(lambda step: 0.1 if step == 20 else 0.0)},  # one evaluation has right answers
            {"evals": by_category(lambda step: 0.0), "length": 19},  # the run is too short to tell
            {"evals": accuracy(0.0) | by_category(lambda step: 0.0), "tests": [UNABLE] * 2},  # no category is solved
        ],
    ),
    "constant_reward": (
        {"steps": EQUAL_REWARDS | {"reward_mean": 0.5, "accuracy": 0.4}},
        [
            {
                "steps": EQUAL_REWARDS | {"reward_mean": every(2, 0.5, 0.6), "accuracy": 0.4}
            },  # the reward differs: this is reward hacking
            {"steps": EQUAL_REWARDS | {"reward_mean": 1.0, "accuracy": 1.0}},  # all completions are right
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
            {
                "steps": {"tied_groups_fraction": 0.7, "tied_all_right_fraction": 0.6}
            },  # most tied groups are all right
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
    ("nothing_to_learn", {"outlook": NOTHING | {"all_right": 1.0, "pass_at_1": 1.0, "pass_at_g": 1.0}}),
    ("nothing_to_learn", {"outlook": NOTHING | {"groups": 2, "well_formed": 0.0}}),
    ("nothing_to_learn", {"outlook": NOTHING | {"groups": 2, "truncated": 1.0}}),
    ("nothing_to_learn", {"outlook": NOTHING | {"groups": 2, "truncated": 1.0, "well_formed": 0.0}}),
    (
        "too_hard",
        {"steps": {"tied_all_wrong_fraction": 0.5, "accuracy": 0.01}, "evals": accuracy(0.0), "tests": [UNABLE] * 2},
    ),
]
