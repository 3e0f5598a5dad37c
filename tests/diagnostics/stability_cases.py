"""For each finding in stability.py: a run that must have it, and runs that are close to it and must not."""

from tests.helpers.sick_runs import every

SICK_AND_WELL = {
    "kl_diverging": ({"steps": {"kl": 1.5}}, [{"steps": {"kl": 0.7}}, {"steps": {"kl": every(20, 5.0, 0.2)}}]),
    "kl_spike": (
        {"steps": {"kl": every(50, 2.0, 0.05)}},
        [{"steps": {"kl": every(50, 0.4, 0.001)}}, {"steps": {"kl": lambda step: step / 100}}],
    ),
    "entropy_collapsed": (
        {"steps": {"entropy": 0.003, "accuracy": 0.3, "tied_groups_fraction": 0.9}, "first": 20},
        [
            # These are figures of a real model that copies most tokens in its working. It went on to learn.
            {"steps": {"entropy": 0.045, "accuracy": 0.49, "tied_groups_fraction": 0.6}, "first": 20},
            {
                "steps": {"entropy": 0.003, "accuracy": 0.95, "tied_groups_fraction": 0.9},
                "first": 20,
            },  # completions are certain and right
            {"steps": {"entropy": 0.1, "accuracy": 0.3, "tied_groups_fraction": 0.9}, "first": 20},
            # The entropy was the same from the start.
            {"steps": {"entropy": 0.003, "accuracy": 0.3, "tied_groups_fraction": 0.9}},
        ],
    ),
    "length_growing": (
        {"steps": {"completion_length": lambda step: 8.0 if step <= 10 else 160.0, "accuracy": 0.3}},
        [
            {"steps": {"completion_length": lambda step: 8.0 + step / 8, "accuracy": 0.3}},
            {"steps": {"completion_length": lambda step: 8.0 if step <= 50 else 48.0}},  # accuracy rises as well
        ],
    ),
    "truncated": (
        {"steps": {"truncated_fraction": 0.7}},
        [{"steps": {"truncated_fraction": 0.4}}, {"steps": {"truncated_fraction": every(4, 1.0, 0.2)}}],
    ),
    "never_ends": ({"steps": {"truncated_fraction": 1.0}}, [{"steps": {"truncated_fraction": 0.9}}]),
    "ends_at_once": (
        {"steps": {"empty_fraction": 0.8}},
        [{"steps": {"empty_fraction": 0.3}}, {"steps": {"empty_fraction": 1.0}, "config": {"max_new_tokens": 1}}],
    ),
    "repeated_endings": (
        {"steps": {"repeated_endings_fraction": 0.3}},
        [{"steps": {"repeated_endings_fraction": every(10, 0.5, 0.0)}}],
    ),
    "gradient_spikes": (
        {"steps": {"grad_norm": every(10, 90.0, 1.5)}},
        [
            {"steps": {"grad_norm": every(50, 90.0, 1.5)}},  # one spike is harmless
            {"steps": {"grad_norm": every(10, 4.0, 0.01)}},  # no norm is large enough to be clipped much
            {"steps": {"grad_norm": 90.0}},
        ],
    ),
    "updates_skipped": ({"steps": {"skipped_updates": every(40, 2, 0)}}, [{"steps": {"skipped_updates": 0}}]),
    "clipping": (
        {"steps": {"clip_fraction": 0.5}},
        [{"steps": {"clip_fraction": 0.15}}, {"steps": {"clip_fraction": every(5, 0.9, 0.05)}}],
    ),
    "learning_rate_small": (
        {"steps": {"weights_moved": 0.02}},
        [
            {"steps": {"weights_moved": every(2, 0.0, 0.9)}},
            {"steps": {"weights_moved": 0.0, "grad_norm": 0.0}},  # there is no gradient
            {"steps": {"weights_moved": 0.0, "learning_rate": 1e-9}},  # the rate has decayed
            {"steps": {"weights_moved": 0.0, "skipped_updates": 5}},
            {"steps": {"kl": 1e-7}, "length": 49},
        ],
    ),
    "sampler_gap": (
        {"steps": {"sampler_gap": 0.3}},
        [{"steps": {"sampler_gap": 1e-4}}, {"steps": {"sampler_gap": every(20, 0.05, 0.0)}}],
    ),
    "entropy_gap": (
        {"steps": {"entropy_gap": -0.02, "entropy_gap_error": 0.01}},  # of 20 steps: 9 standard errors
        [
            {"steps": {"entropy_gap": every(2, 0.03, -0.03), "entropy_gap_error": 0.01}},
            {"steps": {"entropy_gap": -0.02, "entropy_gap_error": 0.03}},
            {"steps": {"entropy_gap": -0.004, "entropy_gap_error": 1e-4}},  # too small to do harm
            {"steps": {"entropy_gap": -0.02, "entropy_gap_error": 0.01}, "length": 19},
            # The policy is nearly certain of each token, and its few surprising tokens are missing by chance.
            {"steps": {"entropy": 0.006, "entropy_gap": -0.006, "entropy_gap_error": 1e-5}},
            {"steps": {"entropy_gap": None, "entropy_gap_error": None}},
        ],
    ),
}
MORE_SICK = [
    ("learning_rate_small", {"steps": {"kl": 1e-8}}),
    (
        "learning_rate_small",
        {"steps": {"weights_moved": 0.0, "learning_rate": 0.0}, "config": {"learning_rate": 0.0}},
    ),
]
