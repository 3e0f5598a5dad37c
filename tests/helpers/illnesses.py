"""Simulated runs with a fault, each in a heavy and a mild form, by the finding that should name the fault."""

import random
from collections.abc import Callable
from typing import Any

from tests.helpers.simulated_runs import Row, Setting, learning, mixed_run, run, step_from

Record = dict[str, Any]
FLAT, RISING, NEVER = learning(0.3, 0.3), learning(0.33, 0.9), learning(0.0, 0.0)


def _changed(curve=RISING, held_out=None, **figures: float) -> Callable[[Setting, int], Record]:
    """Return a run whose steps show these figures instead of healthy ones."""
    return lambda setting, seed: run(setting, seed, curve, held_out, lambda row, done: row.update(figures))


def _edited(edit: Callable[[Row, float], None], curve=RISING, held_out=None) -> Callable[[Setting, int], Record]:
    return lambda setting, seed: run(setting, seed, curve, held_out, edit)


def _groups(kind: Callable[[random.Random, int], tuple[list, list]], curve=FLAT) -> Callable[[Setting, int], Record]:
    """Return a run whose groups are made by `kind(rng, G)`: rewards and whether right, each (G,)."""

    def make(setting: Setting, seed: int) -> Record:
        rng = random.Random(f"groups {seed}")

        def change(row: Row, done: float) -> Row:
            made = [kind(rng, setting.group) for _ in range(setting.batch)]
            return step_from(rng, setting, row["step"], *map(list, zip(*made, strict=True)))

        return run(setting, seed, curve, None, change)

    return make


def _all_or_nothing(mixed: float) -> Callable[[random.Random, int], tuple[list, list]]:
    def kind(rng: random.Random, g: int) -> tuple[list, list]:
        if rng.random() < mixed:
            right = [i % 2 == 0 for i in range(g)]
        else:
            right = [rng.random() < 0.5] * g
        return [1.0 if r else 0.2 for r in right], right

    return kind


def _paid_alike(share: float) -> Callable[[random.Random, int], tuple[list, list]]:
    """Reward right and wrong completions of a group equally, but groups differently."""

    def kind(rng: random.Random, g: int) -> tuple[list, list]:
        right = [rng.random() < 0.4 for _ in range(g)]
        paid = rng.choice([0.2, 0.4, 1.0])
        return [paid if rng.random() < share else 0.0 for _ in right] if share < 1 else [paid] * g, right

    return kind


def _all_wrong(right: float) -> Callable[[random.Random, int], tuple[list, list]]:
    def kind(rng: random.Random, g: int) -> tuple[list, list]:
        answers = [rng.random() < right for _ in range(g)]
        return [1.0 if one else 0.2 for one in answers], answers

    return kind


def _constant(rng: random.Random, g: int) -> tuple[list, list]:
    return [0.5] * g, [rng.random() < 0.4 for _ in range(g)]


def _wasted(share: float) -> Callable[[random.Random, int], tuple[list, list]]:
    """Tie this share of the groups, most of them wrong."""

    def kind(rng: random.Random, g: int) -> tuple[list, list]:
        if rng.random() < share:
            right = [rng.random() < 0.2] * g
        else:
            right = [rng.random() < 0.5 for _ in range(g - 2)] + [True, False]
        return [1.0 if r else 0.2 for r in right], right

    return kind


def _idle(every: int) -> Callable[[Setting, int], Record]:
    def make(setting: Setting, seed: int) -> Record:
        rng = random.Random(f"idle {seed}")

        def change(row: Row, done: float) -> Row | None:
            if row["step"] % every:
                return None
            right = [[rng.random() < 0.4 for _ in range(setting.group)] for _ in range(setting.batch)]
            return step_from(rng, setting, row["step"], [[0.2] * setting.group] * setting.batch, right)

        return run(setting, seed, FLAT, None, change)

    return make


def _now_and_then(every: int, name: str, factor: float) -> Callable[[Row, float], None]:
    def edit(row: Row, done: float) -> None:
        if row["step"] % every == 0 and row[name] is not None:
            row[name] = max(row[name], 0.3) * factor

    return edit


def _collapse(to: float) -> Callable[[float], float]:
    return lambda done: 0.9 if done < 0.25 else to


def _grow(factor: float) -> Callable[[Row, float], None]:
    return lambda row, done: row.update(completion_length=8 * (1 + (factor - 1) * min(1, 3 * done)))


def _fall(name: str, start: float, end: float) -> Callable[[Row, float], None]:
    return lambda row, done: row.update({name: start + (end - start) * min(1, 4 * done)})


def _all_alike(end: float) -> Callable[[Row, float], None]:
    """Let the entropy fall to `end`, and the completions of a group become the same, right or wrong."""

    def edit(row: Row, done: float) -> None:
        _fall("entropy", 0.5, end)(row, done)
        tied, right = row["tied_groups_fraction"], row["accuracy"]
        tied += (0.97 - tied) * min(1, 4 * done)
        row.update(tied_groups_fraction=tied)
        row.update(tied_all_right_fraction=tied * right, tied_all_wrong_fraction=tied * (1 - right))

    return edit


def _cold(gap: float) -> Callable[[Row, float], None]:
    """Let the sampled tokens of a policy with an entropy of 0.5 nats be likelier than they should be."""

    def edit(row: Row, done: float) -> None:
        row["entropy_gap_error"] *= (0.5 / row["entropy"]) ** 0.5
        row["entropy"] = 0.5
        row["entropy_gap"] += gap

    return edit


def _evals(**figures: Any) -> Callable[[Setting, int], Record]:
    """Return a run whose evaluations after the start show these figures."""

    def make(setting: Setting, seed: int) -> Record:
        record = run(setting, seed, RISING)
        for entry in record["evals"]:
            if entry["step"]:
                entry.update(figures)
        return record

    return make


def _fine_tuned(drift: float) -> Callable[[Setting, int], Record]:
    """Return a run whose supervised steps, before the first evaluation, have cost this drift."""

    def make(setting: Setting, seed: int) -> Record:
        record = run(setting, seed, RISING)
        record["config"]["sft_steps"] = 100
        for entry in record["evals"]:
            entry["drift"] += drift
        return record

    return make


def _outlook(**figures: Any) -> Callable[[Setting, int], Record]:
    """Return a run that begins with groups that are all tied and wrong, with these figures."""

    def make(setting: Setting, seed: int) -> Record:
        record = run(setting, seed, RISING)
        record["outlook"] |= {"teaching": 0.0, "all_right": 0.0, "pass_at_1": 0.0, "pass_at_g": 0.0, **figures}
        return record

    return make


def _form_only(rise: float) -> Callable[[Setting, int], Record]:
    def make(setting: Setting, seed: int) -> Record:
        record = run(setting, seed, learning(0.05, 0.05))
        for entry in record["evals"]:
            entry["well_formed"] = 1 - rise if entry["step"] == 0 else 1.0
        return record

    return make


def _always(share: float) -> Callable[[Setting, int], Record]:
    return lambda setting, seed: run(setting, seed, lambda done: share)


def _fallen(by: float) -> Callable[[Setting, int], Record]:
    """Return a run of two tasks; the accuracy of one falls by this much while that of the other rises."""
    tasks = {"sums": (0.8, learning(0.1, 0.95, 8)), "words": (0.2, lambda done: 0.95 - by * (done > 0.1))}
    return lambda setting, seed: mixed_run(setting, seed, tasks)


def _unsolved(share: float) -> Callable[[Setting, int], Record]:
    """Return a run of two tasks; one keeps this accuracy while the other is learned."""
    tasks = {"sums": (0.5, learning(0.3, 0.95, 8)), "words": (0.5, lambda done: share)}
    return lambda setting, seed: mixed_run(setting, seed, tasks)


SPIKY, SLOW, KL = _now_and_then(6, "grad_norm", 400), {"weights_moved": 0.02}, {"kl": 3.0}
# By finding: the heavy form and the mild form of the fault.
ILLNESSES: dict[str, tuple[Callable[[Setting, int], Record], Callable[[Setting, int], Record]]] = {
    "nothing_to_learn": (_outlook(well_formed=0.0), _outlook(truncated=1.0)),
    "too_easy": (_always(0.9999), _always(0.97)),
    "too_hard": (_groups(_all_wrong(0.0), NEVER), _groups(_all_wrong(0.002), NEVER)),
    "collapsed": (_edited(lambda *_: None, _collapse(0.0)), _edited(lambda *_: None, _collapse(0.2))),
    "unsolved_category": (_unsolved(0.0), _unsolved(0.001)),
    "constant_reward": (_groups(_constant), _groups(_constant)),
    "all_or_nothing": (_groups(_all_or_nothing(0.0)), _groups(_all_or_nothing(0.1))),
    "tied_groups": (_groups(_wasted(0.8)), _groups(_wasted(0.55))),
    "idle_steps": (_idle(2), _idle(4)),
    "reward_hacking": (_groups(_paid_alike(1.0)), _groups(_paid_alike(0.98))),
    "format_only": (_form_only(1.0), _form_only(0.4)),
    "overfitting": (
        _edited(lambda *_: None, learning(0.3, 1.0, 12), FLAT),
        _edited(lambda *_: None, learning(0.3, 0.6, 12), FLAT),
    ),
    "past_peak": (
        _edited(lambda *_: None, lambda done: 0.9 if done < 0.2 else 0.5),
        _edited(lambda *_: None, lambda done: 0.9 if done < 0.2 else 0.75),
    ),
    "falling_category": (_fallen(0.9), _fallen(0.4)),
    "forgetting": (_evals(drift=2.0), _evals(drift=0.6)),
    "fine_tuning_forgets": (_fine_tuned(2.0), _fine_tuned(0.6)),
    "reward_scale": (_changed(reward_std=1e-6), _changed(reward_std=3e-4)),
    "kl_diverging": (_changed(**KL), _changed(kl=1.1)),
    "kl_spike": (
        _edited(lambda row, done: row.update(kl=0.01 if row["step"] % 32 or done < 0.15 else 40.0)),
        _edited(lambda row, done: row.update(kl=0.01 if row["step"] % 32 or done < 0.15 else 2.0)),
    ),
    "entropy_collapsed": (_edited(_all_alike(0.03), FLAT), _edited(_all_alike(0.06), FLAT)),
    "length_growing": (_edited(_grow(20), FLAT), _edited(_grow(5), FLAT)),
    "truncated": (_changed(FLAT, truncated_fraction=0.8), _changed(FLAT, truncated_fraction=0.55)),
    "never_ends": (_changed(FLAT, truncated_fraction=1.0), _changed(FLAT, truncated_fraction=0.96)),
    "ends_at_once": (_changed(FLAT, empty_fraction=0.95), _changed(FLAT, empty_fraction=0.55)),
    "repeated_endings": (_changed(repeated_endings_fraction=0.6), _changed(repeated_endings_fraction=0.15)),
    "gradient_spikes": (_edited(SPIKY), _edited(_now_and_then(12, "grad_norm", 60))),
    "updates_skipped": (_changed(skipped_updates=5), _changed(skipped_updates=1)),
    "clipping": (_changed(clip_fraction=0.7), _changed(clip_fraction=0.33)),
    "learning_rate_small": (_changed(FLAT, **SLOW), _changed(FLAT, weights_moved=0.09)),
    "sampler_gap": (_changed(sampler_gap=1.0), _changed(sampler_gap=0.02)),
    "entropy_gap": (_edited(_cold(-0.4)), _edited(_cold(-0.1))),
}

# Shapes in which a fault cannot be told from a healthy run: a step of few groups has no signal if these are tied.
UNDEFINED = {
    "nothing_to_learn": lambda setting: min(8, setting.batch) * setting.group < 16,
    "idle_steps": lambda setting: setting.batch < 8,
    "kl_spike": lambda setting: setting.beta == 0,
}
