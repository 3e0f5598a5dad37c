"""Findings on what a run learns: rewards, held-out accuracy, what is forgotten.

Each function in CHECKS is the finding of its name; it returns the figure and the text, or None.
"""

from math import log, sqrt
from statistics import fmean, variance

from grpo.diagnostics.groups import NEARLY_ALL, is_constant
from grpo.diagnostics.snapshot import CheckResult, Row, RunSnapshot, noise, percent, upper_bound
from grpo.evaluation.intervals import Z

BLIND = 0.1  # share of groups with right and wrong completions paid alike; a reward for being right has none
RISE_ERRORS, RISE_SPREADS = 4.0, 0.5  # a reward rises by this many standard errors, and this much of a group's std
FORM_LEARNED, FORM_ALONE = 0.2, 0.3  # rise of the well-formed share; accuracy rises by less than this part of it
OVERFITTED = 0.15  # rise of the accuracy on training problems above that on held-out ones
ABLE, LEFT = 0.2, 0.25  # an accuracy worth losing; the part of it that a collapse leaves
RECENT_GROUPS = 24  # on which a collapse is seen between evaluations
DRIFT = 0.5  # nats a token: what the start said is on average 40% less likely
SKILL_LOST, SKILL_NOISE = 0.05, 1.7  # of a skill's problems, and so many half-widths of the interval
DWARFED = 0.03  # of the largest part's spread: 30 times as much noise as signal
SPREAD_LEAST, SPREAD_MOST = 0.01, 10.0  # of rewards in a group, undivided: far from the 1 that beta is meant for
EPSILON_COUNTS = 1e-3  # of rewards in a group, divided: there the 1e-4 in the division takes 10%


def _above(one: Row, other: Row, looks: int = 1) -> bool:
    """Return whether an evaluation is better than another beyond the noise of both (their 95% intervals).

    `looks` is the number of evaluations that `one` is the best of: by chance it is √(2 ln looks) deviations too high.
    """
    return one["accuracy"] - other["accuracy"] > noise(one, other) * (1 + sqrt(2 * log(looks)) / (Z * sqrt(2)))


def _accuracy_is_flat(now: RunSnapshot) -> bool:
    """Return whether the last two evaluations are no better than the start; False before there are two."""
    return len(now.evals) > 2 and not any(_above(e, now.evals[0]) for e in now.evals[-2:])


def _form_rise(now: RunSnapshot) -> float:
    first, last = (now.evals[i].get("well_formed") for i in (0, -1))
    return 0.0 if first is None or last is None else last - first


def _rise(now: RunSnapshot, name: str) -> tuple[float, float]:
    """Return how much higher a metric is in the last window than in the first, and the standard error of that."""
    windows = now.values(name, first=True), now.values(name)
    if None in windows or len(now.steps) < 2 * now.window:
        return float("nan"), float("nan")
    first, last = windows
    return fmean(last) - fmean(first), sqrt(variance(first) / len(first) + variance(last) / len(last))


def _reward_rises(now: RunSnapshot) -> bool:
    rise, error = _rise(now, "reward_mean")
    return rise > max(RISE_ERRORS * error, RISE_SPREADS * now.mean("reward_std", first=True))


def collapsed(now: RunSnapshot) -> CheckResult:
    """The accuracy that the run had is gone, held-out or sampled."""
    best = max(now.evals, key=lambda e: e["accuracy"], default=None)
    if best is None:
        return None
    last, had = now.evals[-1], best["accuracy"]
    if now.evaluated and best["ci_low"] >= ABLE / 2 and last["ci_high"] < 2 * LEFT * had:
        return last["accuracy"], _collapse(f"held-out accuracy fell from {percent(had)} to", last["accuracy"], best)
    if isinstance(now.setting("task"), list):  # the shares of hard and easy tasks differ from step to step
        return None
    recent = max(3, -(-RECENT_GROUPS // now.batch))
    blocks = [block for block in now.blocks("accuracy", now.window)[:-1] if block == block]
    had, right = max(blocks, default=0.0), now.mean("accuracy", recent)
    if had >= ABLE and right < LEFT * had and upper_bound(right, now.groups(recent)) < 2 * LEFT * had:
        return right, _collapse(f"the accuracy of the completions fell from {percent(had)} to", right, best)
    return None


def _collapse(said: str, now: float, best: Row) -> str:
    return (
        f"Collapsed: {said} {percent(now)}. The policy has lost what it could do, and seldom finds it again. "
        f"saved_model/ keeps the best policy, of step {best['step']} ({percent(best['accuracy'])} of the held-out "
        "answers right). Stop, and start anew with a lower --learning-rate, a larger --beta or fewer "
        "--num-inner-updates."
    )


def reward_hacking(now: RunSnapshot) -> CheckResult:
    """The reward cannot see what is right, or rises while no accuracy does."""
    held_out = f"held-out accuracy is {percent(now.evals[-1]['accuracy'])}" if now.evals else ""
    tied, right = now.mean("tied_groups_fraction"), now.mean("accuracy")
    mixed = tied - now.mean("tied_all_right_fraction") - now.mean("tied_all_wrong_fraction")
    cure = "Pay for being right (--reward exact=1), and less for everything else."
    if mixed >= BLIND and tied >= NEARLY_ALL and not is_constant(now):
        return mixed, (
            f"Reward hacking: the reward is earned without being right. In {percent(mixed)} of the groups of the "
            f"last {now.window} steps right and wrong completions were paid alike; the mean reward is "
            f"{now.mean('reward_mean'):.2f}, {percent(right)} of the completions are right"
            f"{', ' + held_out if held_out else ''}. More steps teach little. {cure}"
        )
    if not (now.evaluated and _accuracy_is_flat(now) and _reward_rises(now)):
        return None
    rise, error = _rise(now, "accuracy")
    falls = _above(now.evals[0], now.evals[-1])
    if not falls and (_form_rise(now) >= FORM_LEARNED or rise > RISE_ERRORS * error):
        return None  # it learns the form, or the training problems
    return now.evals[-1]["accuracy"] - now.evals[0]["accuracy"], (
        f"Reward hacking: the reward rose from {now.mean('reward_mean', first=True):.2f} to "
        f"{now.mean('reward_mean'):.2f} while {held_out}, {percent(now.evals[0]['accuracy'])} at the start. The "
        f"policy has found what is paid without being right: look at the completions. {cure}"
    )


def format_only(now: RunSnapshot) -> CheckResult:
    """The form is learned and the answers are not."""
    if len(now.evals) < 3:
        return None
    first, last = now.evals[0], now.evals[-1]
    form, right = _form_rise(now), last["accuracy"] - first["accuracy"]
    if form < FORM_LEARNED or right + noise(first, last) >= FORM_ALONE * form:
        return None
    if any((e.get("well_formed") or 0) < NEARLY_ALL for e in now.evals[-2:]):
        return None
    return last["accuracy"], (
        f"The form is learned, the task is not: {percent(last['well_formed'])} of the answers are well-formed "
        f"({percent(first['well_formed'])} at the start), {percent(last['accuracy'])} right "
        f"({percent(first['accuracy'])}). Pay less for form (--reward format=0.1 --reward exact=1), give more "
        "completions a chance to be right (--num-generations), or take easier problems."
    )


def overfitting(now: RunSnapshot) -> CheckResult:
    """Accuracy rises on training problems by more than on held-out ones, beyond the noise of both."""
    if not now.evaluated or len(now.evals) < 3:
        return None
    rise, error = _rise(now, "accuracy")
    first, last = now.evals[0], now.evals[-1]
    gap = rise - (last["accuracy"] - first["accuracy"])
    if not (
        rise >= OVERFITTED
        and gap >= max(OVERFITTED, sqrt((RISE_ERRORS * error) ** 2 + (2 * noise(first, last)) ** 2))
    ):
        return None
    return gap, (
        f"Learned by heart: {percent(now.mean('accuracy'))} of the completions to training problems are right "
        f"({percent(now.mean('accuracy', first=True))} at first), but {percent(last['accuracy'])} of the held-out "
        f"answers ({percent(first['accuracy'])}). Train on more different problems, for fewer steps, or with a "
        "larger --beta."
    )


def past_peak(now: RunSnapshot) -> CheckResult:
    """Held-out accuracy has been higher, by more than the noise, for two evaluations."""
    if len(now.evals) < 3:
        return None
    best, last = max(now.evals[:-2], key=lambda e: e["accuracy"]), now.evals[-1]
    if not all(_above(best, e, len(now.evals)) for e in now.evals[-2:]) or collapsed(now):
        return None
    what = "Past its peak" if best["step"] else "Worse than the start"
    return last["accuracy"], (
        f"{what}: held-out accuracy was {percent(best['accuracy'])} at step {best['step']} and is "
        f"{percent(last['accuracy'])}. More steps hurt, as they often do. saved_model/ has the best policy; stop "
        "in time with --patience 3, lower --learning-rate, or use --learning-rate-decay linear."
    )


def falling_category(now: RunSnapshot) -> CheckResult:
    """Held-out accuracy of a category of problems has been higher for two evaluations, and that of all has not."""
    if len(now.evals) < 3 or past_peak(now) or collapsed(now):
        return None
    best = {name: max(evals[:-2], key=lambda e: e["accuracy"]) for name, evals in now.categories.items()}
    looks = len(now.evals) * len(now.categories)
    fallen = {n: evals for n, evals in now.categories.items() if all(_above(best[n], e, looks) for e in evals[-2:])}
    if not fallen:
        return None
    last = {name: evals[-1]["accuracy"] for name, evals in fallen.items()}
    said = [
        f"{name} fell from {percent(best[name]['accuracy'])} at step {best[name]['step']} to {percent(last[name])}"
        for name in fallen
    ]
    return max(best[name]["accuracy"] - last[name] for name in fallen), (
        f"A category of problems falls: in held-out accuracy {', '.join(said)}. The best policy is chosen by all "
        "problems together. Train on more problems of this category (of a task among several: --task NAME=WEIGHT), "
        "lower --learning-rate, or raise --beta."
    )


def forgetting(now: RunSnapshot) -> CheckResult:
    """Abilities of the starting model outside the task are lost."""
    latest = [e for e in (*now.evals, *now.tests[1:]) if e.get("drift") is not None][-1:]
    drift = latest[0]["drift"] if latest else 0.0
    then, later = (now.tests[i].get("skills") or {} if now.tests else {} for i in (0, -1))
    pairs = {name: (then[name], later[name]) for name in then if name in later}
    lost = {name: a["accuracy"] - b["accuracy"] for name, (a, b) in pairs.items()}
    lost = {n: loss for n, loss in lost.items() if loss >= max(SKILL_LOST, SKILL_NOISE * noise(*pairs[n]))}
    if not lost and not drift >= DRIFT:
        return None
    said = [f"its answers to unrelated prompts have drifted by {drift:.2f} nats a token"] * bool(drift >= DRIFT)
    said += [
        f"{name} {percent(pairs[name][0]['accuracy'])} -> {percent(pairs[name][1]['accuracy'])}" for name in lost
    ]
    return max([drift, *lost.values()]), (
        f"It forgets: {'; '.join(said)}. Training took away abilities that it was not about. Lower --learning-rate, "
        "raise --beta, train for fewer steps, or use --lora-rank 16."
    )


def reward_scale(now: RunSnapshot) -> CheckResult:
    """One reward part is far smaller than another, or all are far from the size that the update expects."""
    parts = {name.removeprefix("reward_std/") for row in now.steps[-1:] for name in row if "reward_std/" in name}
    spreads = {part: now.mean(f"reward_std/{part}", now.long_window) for part in sorted(parts)}
    spreads = {part: spread for part, spread in spreads.items() if spread > 0}
    if spreads:
        small, large = min(spreads, key=spreads.__getitem__), max(spreads, key=spreads.__getitem__)
        if spreads[small] < DWARFED * spreads[large]:
            return spreads[small], (
                f"Reward parts of different scales: where {small} differs in a group it does so by "
                f"{spreads[small]:.2g} (standard deviation), {large} by {spreads[large]:.2g}. Where both differ "
                f"{small} counts for nothing; where {large} is tied the division by the group's std makes "
                f"{small} all that counts. Give the parts like weights (--reward), or divide by the batch's "
                "(--scale-rewards batch)."
            )
    spread = now.mean("reward_std", now.long_window) / max(
        1e-9, 1 - now.mean("tied_groups_fraction", now.long_window)
    )
    undivided = now.setting("scale_rewards", "group") == "none"
    least, most = (SPREAD_LEAST, SPREAD_MOST) if undivided else (EPSILON_COUNTS, float("inf"))
    if not (0 < spread < least or spread > most):
        return None
    against = "against --beta and --clip-grad-norm" if undivided else "against the 1e-4 that is added to it"
    return spread, (
        f"Rewards of an unfit scale: in groups that are not tied they differ by {spread:.2g} (standard deviation), "
        f"too {'little' if spread < least else 'much'} {against}. Change the weights (--reward NAME=WEIGHT) so that "
        "completions differ by about 1."
    )


CHECKS = (
    collapsed,
    reward_hacking,
    format_only,
    overfitting,
    past_peak,
    falling_category,
    forgetting,
    reward_scale,
)
