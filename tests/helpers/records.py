"""Records of runs, as the figures and the HTML report read them: short, long, damaged, with every metric."""


def an_evaluation(step, accuracy, split="validation", n=500):
    """Return an evaluation with an interval of 4 points on each side."""
    return {
        "step": step,
        "split": split,
        "accuracy": accuracy,
        "n": n,
        "ci_low": max(0.0, accuracy - 0.04),
        "ci_high": min(1.0, accuracy + 0.04),
        "well_formed": 1.0,
    }


def a_record(steps, evals=(), **config):
    """Return a record of this many steps whose values rise slowly."""
    return {
        "config": {"model": "starter", "seed": 0, "beta": 0.04, **config},
        "steps": [
            {"step": i, "reward_mean": 0.5 + 0.001 * i, "accuracy": 0.3 + 0.001 * i, "kl": 1e-4 * i}
            for i in range(1, steps + 1)
        ],
        "evals": list(evals),
    }


EVALS = [an_evaluation(0, 0.3), an_evaluation(50, 0.5), an_evaluation(300, 0.97)]
TESTS = [an_evaluation(0, 0.31, "test", 829), an_evaluation(300, 1.0, "test", 829)]
FINDINGS = [
    {"name": "spike", "step": 40, "text": "The gradient norm was 80: $x^2$ <b>, lower it. " * 9},
    {"name": "near", "step": 41, "text": "Updates were skipped."},
    {"name": "normal", "step": 290, "text": "A loss near 0 is normal."},
]
FULL = {
    "reward/exact": 0.4,
    "reward/of $mine$": -0.5,
    "reward/_hidden": None,
    "entropy": 0.3,
    "clip_fraction": 0.01,
    "ratio_max": 30.0,
    "completion_length": 12.0,
    "truncated_fraction": 0.5,
    "grad_norm": 2.0,
    "loss": -0.01,
    "tied_groups_fraction": 0.5,
    "tied_all_right_fraction": 0.25,
    "tied_all_wrong_fraction": 0.25,
    "time/sample": 0.1,
    "time/reward": 0.1,
    "time/reward/exact": 0.05,
    "time/save": 0.1,
    "time/total": 0.5,
}


def a_full_record(steps, found=(), **more):
    """Return a record with every metric of this version."""
    record = a_record(steps, [TESTS[0], *EVALS, TESTS[1]])
    skill = {"accuracy": 0.9, "n": 300, "ci_low": 0.85, "ci_high": 0.93, "well_formed": 1.0}
    for row in record["evals"]:
        row.update(drift=0.001 * row["step"], skills={"letters": skill, "single $": skill})
    record["steps"] = [{**row, **FULL} for row in record["steps"]]
    return {**record, "findings": list(found), **more}
