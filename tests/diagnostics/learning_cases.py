"""For each finding in learning.py: a run that must have it, and runs that are close to it and must not."""

from tests.helpers.sick_runs import accuracy, by_category, every

FLAT = accuracy(0.3)
FALLING = by_category(lambda step: 0.9 if step < 40 else 0.3)
WRONG = {"accuracy": 0.3, "tied_all_right_fraction": 0.1}
RISES = {"reward_mean": lambda step: 0.3 + step / 100, "reward_std": 0.2}
SKILLS = {name: {"accuracy": 0.9, "n": 500, "ci_low": 0.87, "ci_high": 0.92} for name in ("single", "letters")}
LOST = SKILLS | {"single": {"accuracy": 0.8, "n": 500, "ci_low": 0.76, "ci_high": 0.83}}
LESS = SKILLS | {"single": {"accuracy": 0.89, "n": 500, "ci_low": 0.86, "ci_high": 0.91}}
FINE_TUNED = {"sft_steps": 100}

SICK_AND_WELL = {
    "collapsed": (
        {"evals": accuracy(lambda step: 0.9 if 0 < step < 60 else 0.3 if step == 0 else 0.02)},
        [
            {"evals": accuracy(lambda step: 0.9 if 0 < step < 60 else 0.6)},  # past its peak, but no collapse
            {"evals": accuracy(0.02), "steps": {"accuracy": 0.02}},  # the accuracy was always low
        ],
    ),
    "reward_hacking": (
        {"steps": RISES | WRONG, "evals": FLAT},
        [
            {"steps": RISES | WRONG},  # the held-out accuracy rises too
            {"steps": {"reward_mean": 0.5} | WRONG, "evals": FLAT},
            {"steps": {"reward_mean": every(2, 0.2, 0.8), "reward_std": 0.2} | WRONG, "evals": FLAT},  # noise
            {"steps": RISES | WRONG, "evals": FLAT, "length": 19},
            {"steps": RISES | {"accuracy": lambda step: step / 100}, "evals": FLAT},  # the run learns by heart
            {"steps": RISES | WRONG, "evals": FLAT | {"well_formed": lambda step: min(1.0, step / 30)}},
        ],
    ),
    "format_only": (
        {"evals": FLAT | {"well_formed": lambda step: min(1.0, step / 20)}},
        [
            {"evals": {"well_formed": lambda step: min(1.0, step / 20)}},
            {"evals": FLAT},
            {"evals": FLAT | {"well_formed": lambda step: step / 100}},
        ],
    ),
    "overfitting": (
        {"steps": {"accuracy": lambda step: min(1.0, 0.3 + step / 50)}, "evals": FLAT},
        [{"steps": {"accuracy": lambda step: min(1.0, 0.3 + step / 50)}}, {"steps": WRONG, "evals": FLAT}],
    ),
    "past_peak": (
        {"evals": accuracy(lambda step: 0.9 if step == 30 else 0.7)},
        [
            {"evals": accuracy(lambda step: 0.9 if step == 30 else 0.85)},  # noise
            {"evals": accuracy(lambda step: 0.5 if step == 40 else 0.9)},  # only one evaluation is lower
        ],
    ),
    "falling_category": (
        {"evals": accuracy(0.6) | FALLING},
        [
            {"evals": accuracy(0.6) | by_category(lambda step: 0.9 if step < 40 else 0.85)},  # noise
            {
                "evals": accuracy(0.6) | by_category(lambda step: 0.3 if step == 40 else 0.9)
            },  # only one evaluation is lower
            {
                "evals": accuracy(lambda step: 0.9 if step < 40 else 0.5)
                | by_category(lambda step: 0.9 if step < 40 else 0.3)
            },
        ],
    ),
    "forgetting": (
        {"evals": {"drift": lambda step: step / 100}},
        [
            {"evals": {"drift": 0.1}},
            {"evals": {"drift": None}},
            {"tests": [{"skills": SKILLS}, {"skills": LESS}]},
            {"evals": {"drift": 0.9}, "config": FINE_TUNED},  # lost before GRPO began
        ],
    ),
    "fine_tuning_forgets": (
        {"evals": {"drift": 0.9}, "config": FINE_TUNED},
        [
            {"evals": {"drift": 0.1}, "config": FINE_TUNED},
            {"evals": {"drift": lambda step: step / 100}, "config": FINE_TUNED},  # lost to GRPO
            {"evals": {"drift": 0.9}},
        ],
    ),
    "reward_scale": (
        {"steps": {"reward_std/exact": 0.4, "reward_std/length": 0.005}},
        [
            {"steps": {"reward_std/exact": 0.4, "reward_std/length": 0.05}},
            {
                "steps": {"reward_std/exact": 0.4, "reward_std/format": every(5, 0.005, None)}
            },  # only in one of five steps do rewards of the part differ
            {"steps": {"reward_std": 50.0}},  # advantages are divided by it, so it does no harm
            {"steps": {"reward_std": 0.5}, "config": {"scale_rewards": "none"}},
        ],
    ),
}
MORE_SICK = [
    ("collapsed", {"steps": {"accuracy": lambda step: 0.9 if step < 40 else 0.0}}),  # no evaluation shows it yet
    (
        "reward_hacking",
        {"steps": {"tied_groups_fraction": 1.0, "tied_all_right_fraction": 0.2, "reward_mean": every(2, 0.9, 1.0)}},
    ),
    (
        "reward_hacking",  # held-out accuracy falls, so that a better form is no excuse
        {"steps": RISES, "evals": accuracy(lambda step: 0.3 - step / 400) | {"well_formed": lambda step: step / 80}},
    ),
    ("forgetting", {"evals": {"drift": lambda step: 0.9 + step / 100}, "config": FINE_TUNED}),
    ("fine_tuning_forgets", {"tests": [{"skills": LOST}], "before_sft": {"skills": SKILLS}, "config": FINE_TUNED}),
    ("forgetting", {"tests": [{"skills": SKILLS}, {"skills": LOST}]}),
    ("reward_scale", {"steps": {"reward_std": 50.0}, "config": {"scale_rewards": "none"}}),
    ("reward_scale", {"steps": {"reward_std": 1e-4, "tied_groups_fraction": 0.0}}),
]
