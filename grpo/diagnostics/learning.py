"""Checks of what a run learns and forgets: rewards, held-out accuracy, abilities outside the task."""

from math import log, sqrt
from statistics import fmean, variance

from grpo.diagnostics.snapshot import NEARLY_ALL, CheckResult, Row, RunSnapshot, noise, percent, upper_bound
from grpo.evaluation.intervals import Z

BLIND_MIN_SHARE = 0.1  # Minimum share of groups that are tied although they have right and wrong completions.
RISE_MIN_ERRORS = 4.0  # A metric rises if its last window is this number of standard errors above its first.
REWARD_RISE_MIN_STDS = 0.5  # A reward must also rise by this fraction of its standard deviation within groups.
FORM_MIN_RISE = 0.2  # The form is learned if the share of well-formed answers rises by this much.
# The task is not learned if accuracy rises by less than this fraction of the rise in well-formed answers.
FORM_MAX_ACCURACY_RISE = 0.3
OVERFITTING_MIN_GAP = 0.15  # Accuracy must rise by this much more on training problems than on held-out ones.
# A collapse takes sampled accuracy from COLLAPSE_MIN_ACCURACY or more to below COLLAPSE_MAX_REMAINING of its best.
# Held-out accuracy is judged by its 95% interval: at the best evaluation it began at half of that minimum or above,
# and now it ends below twice that fraction of the best accuracy.
COLLAPSE_MIN_ACCURACY = 0.2
COLLAPSE_MAX_REMAINING = 0.25
COLLAPSE_MIN_GROUPS = 24  # Between evaluations, a collapse must show in at least this number of groups.
FORGETTING_MIN_DRIFT = 0.5  # nats a token: on average a token of the starting model's answers is 40% less likely.
SKILL_MIN_LOSS = 0.05  # A skill is lost if accuracy on it falls by this much.
SKILL_MIN_HALF_WIDTHS = 1.7  # The fall must also be at least this number of half-widths of its 95% interval.
PART_MIN_RELATIVE_STD = 0.03  # A reward part with a std below this fraction of the largest one has hardly any effect.
UNSCALED_MIN_STD = 0.01  # With --scale-rewards none, rewards with a smaller std are too small for the default --beta.
UNSCALED_MAX_STD = 10.0  # With --scale-rewards none, rewards with a larger std are too large for the default --beta.
SCALED_MIN_STD = 1e-3  # At this std, the 1e-4 that is added to it before the division makes advantages 9% smaller.


def _is_better(first: Row, second: Row, candidates: int = 1) -> bool:
    """Return whether the first evaluation is better than the second, beyond the noise of their 95% intervals.

    `first` is the best of `candidates` evaluations. By chance alone, the best of n is about √(2 ln n) standard
    deviations too high, so the difference must exceed the noise by that much.
    """
    selection = sqrt(2 * log(candidates)) / (Z * sqrt(2))
    return first["accuracy"] - second["accuracy"] > noise(first, second) * (1 + selection)


def _form_rise(run: RunSnapshot) -> float:
    """Return by how much the share of well-formed answers has risen since the start; 0 if this is not known."""
    first = run.evals[0].get("well_formed")
    last = run.evals[-1].get("well_formed")
    return 0.0 if first is None or last is None else last - first


def _rise(run: RunSnapshot, name: str) -> tuple[float, float]:
    """Return a metric's rise from the first window to the last, and the rise's standard error; NaN if not known."""
    first = run.values(name, first=True)
    last = run.values(name)
    if not first or not last or len(run.steps) < 2 * run.window:
        return float("nan"), float("nan")
    return fmean(last) - fmean(first), sqrt(variance(first) / len(first) + variance(last) / len(last))


def collapsed(run: RunSnapshot) -> CheckResult:
    """Report that the held-out or sampled accuracy has fallen far below its best."""
    best = max(run.evals, key=lambda e: e["accuracy"], default=None)
    if best is None:
        return None
    last = run.evals[-1]
    was_able = best["ci_low"] >= COLLAPSE_MIN_ACCURACY / 2
    if run.evaluated and was_able and last["ci_high"] < 2 * COLLAPSE_MAX_REMAINING * best["accuracy"]:
        return _collapse("held-out accuracy", best["accuracy"], last["accuracy"], best)
    if isinstance(run.config.get("task"), list):
        return None  # In a mixture, a step with more problems of a hard task would look like a collapse.
    steps = max(3, -(-COLLAPSE_MIN_GROUPS // run.batch))
    highest = max(run.earlier_blocks("accuracy", run.window), default=0.0)
    right = run.mean("accuracy", steps)
    is_low = upper_bound(right, run.groups(steps)) < 2 * COLLAPSE_MAX_REMAINING * highest
    if highest >= COLLAPSE_MIN_ACCURACY and right < COLLAPSE_MAX_REMAINING * highest and is_low:
        return _collapse("the accuracy of the completions", highest, right, best)
    return None


def _collapse(what: str, highest: float, accuracy: float, best: Row) -> CheckResult:
    return accuracy, (
        f"Collapsed: {what} fell from {percent(highest)} to {percent(accuracy)}. Policies seldom "
        f"recover from this. saved_model/ has the best policy, of step {best['step']} "
        f"({percent(best['accuracy'])} of the held-out answers right). Stop, and start again with a lower "
        "--learning-rate, a larger --beta or fewer --num-inner-updates."
    )


def reward_hacking(run: RunSnapshot) -> CheckResult:
    """Report that right and wrong completions get equal rewards, or that the reward rises while accuracy does not."""
    held_out = f"held-out accuracy is {percent(run.evals[-1]['accuracy'])}" if run.evals else ""
    tied = run.mean("tied_groups_fraction")
    right = run.mean("accuracy")
    mixed = tied - run.mean("tied_all_right_fraction") - run.mean("tied_all_wrong_fraction")
    advice = "Reward right answers (--reward exact=1), and lower the weight of everything else."
    if mixed >= BLIND_MIN_SHARE and tied >= NEARLY_ALL and not run.has_constant_reward:
        return mixed, (
            f"Reward hacking: wrong completions earn the reward. In {percent(mixed)} of the groups of the last "
            f"{run.window} steps right and wrong completions got equal rewards; the mean reward is "
            f"{run.mean('reward_mean'):.2f}, {percent(right)} of the completions are right"
            f"{', ' + held_out if held_out else ''}. {advice}"
        )
    is_flat = len(run.evals) > 2 and not any(_is_better(e, run.evals[0]) for e in run.evals[-2:])
    rise, error = _rise(run, "reward_mean")
    least = max(RISE_MIN_ERRORS * error, REWARD_RISE_MIN_STDS * run.mean("reward_std", first=True))
    if not (run.evaluated and is_flat and rise > least):
        return None
    rise, error = _rise(run, "accuracy")
    learns_otherwise = _form_rise(run) >= FORM_MIN_RISE or rise > RISE_MIN_ERRORS * error
    if learns_otherwise and not _is_better(run.evals[0], run.evals[-1]):
        return None  # The reward rises because the run learns the form, or the training problems by heart.
    return run.evals[-1]["accuracy"] - run.evals[0]["accuracy"], (
        f"Reward hacking: the reward rose from {run.mean('reward_mean', first=True):.2f} to "
        f"{run.mean('reward_mean'):.2f} while {held_out}, {percent(run.evals[0]['accuracy'])} at the start. Wrong "
        f"completions earn the reward: look at some of them. {advice}"
    )


def format_only(run: RunSnapshot) -> CheckResult:
    """Report that answers have become well-formed but not right."""
    if len(run.evals) < 3:
        return None
    first, last = run.evals[0], run.evals[-1]
    form = _form_rise(run)
    right = last["accuracy"] - first["accuracy"]
    if form < FORM_MIN_RISE or right + noise(first, last) >= FORM_MAX_ACCURACY_RISE * form:
        return None
    if any((e.get("well_formed") or 0) < NEARLY_ALL for e in run.evals[-2:]):
        return None
    return last["accuracy"], (
        f"The form is learned, the task is not: {percent(last['well_formed'])} of the answers are well-formed "
        f"({percent(first['well_formed'])} at the start), {percent(last['accuracy'])} right "
        f"({percent(first['accuracy'])} at the start). Reward the form less (--reward format=0.1 --reward exact=1), "
        "sample more completions a prompt (--num-generations), or take easier problems."
    )


def overfitting(run: RunSnapshot) -> CheckResult:
    """Report that accuracy rises more on training problems than on held-out ones, beyond the noise of both."""
    if not run.evaluated or len(run.evals) < 3:
        return None
    rise, error = _rise(run, "accuracy")
    first, last = run.evals[0], run.evals[-1]
    gap = rise - (last["accuracy"] - first["accuracy"])
    gap_noise = sqrt((RISE_MIN_ERRORS * error) ** 2 + (2 * noise(first, last)) ** 2)
    if not (rise >= OVERFITTING_MIN_GAP and gap >= max(OVERFITTING_MIN_GAP, gap_noise)):
        return None
    return gap, (
        f"Learned by heart: {percent(run.mean('accuracy'))} of the completions to training problems are right "
        f"({percent(run.mean('accuracy', first=True))} at first), but only {percent(last['accuracy'])} of the "
        f"held-out answers ({percent(first['accuracy'])} at first). Train on more varied problems, for "
        "fewer steps, or with a larger --beta."
    )


def past_peak(run: RunSnapshot) -> CheckResult:
    """Report that the last two held-out accuracies are lower than an earlier one, by more than the noise."""
    if len(run.evals) < 3:
        return None
    best, last = max(run.evals[:-2], key=lambda e: e["accuracy"]), run.evals[-1]
    if not all(_is_better(best, e, len(run.evals)) for e in run.evals[-2:]) or collapsed(run):
        return None
    what = "Past its peak" if best["step"] else "Worse than the start"
    return last["accuracy"], (
        f"{what}: held-out accuracy was {percent(best['accuracy'])} at step {best['step']} and is "
        f"{percent(last['accuracy'])} now. More steps often make it worse. saved_model/ has the best policy. Stop "
        "earlier with --patience 3, lower --learning-rate, or use --learning-rate-decay linear."
    )


def falling_category(run: RunSnapshot) -> CheckResult:
    """Report categories whose last two held-out accuracies have fallen, while accuracy on all problems has not."""
    if len(run.evals) < 3 or past_peak(run) or collapsed(run):
        return None
    candidates = len(run.evals) * len(run.categories)
    falls, texts = [], []
    for name, evals in run.categories.items():
        best = max(evals[:-2], key=lambda e: e["accuracy"])
        if all(_is_better(best, e, candidates) for e in evals[-2:]):
            before, after = best["accuracy"], evals[-1]["accuracy"]
            falls.append(before - after)
            texts.append(f"{name} fell from {percent(before)} at step {best['step']} to {percent(after)}")
    if not falls:
        return None
    return max(falls), (
        f"The held-out accuracy of a category falls: {', '.join(texts)}. The best policy is chosen by all problems "
        "together. Train on more problems of this category (if it is a task of a mixture: --task NAME=WEIGHT), "
        "lower --learning-rate, or raise --beta."
    )


def forgetting(run: RunSnapshot) -> CheckResult:
    """Report that the policy has lost abilities outside the task that it had when GRPO began."""
    drifts = [e["drift"] for e in (*run.evals, *run.tests[1:]) if e.get("drift") is not None]
    drift = drifts[-1] if drifts else 0.0
    if drifts and run.config.get("sft_steps"):
        drift -= drifts[0]  # Both are measured on the same answers, and the first is due to the supervised steps.
    loss, text = _losses(drift, run.tests[0] if run.tests else {}, run.tests[-1] if run.tests else {})
    if not text:
        return None
    return loss, (
        f"It forgets: {text}. Training has reduced abilities outside the task. Lower --learning-rate, "
        "raise --beta, train for fewer steps, or use --lora-rank 16."
    )


def fine_tuning_forgets(run: RunSnapshot) -> CheckResult:
    """Report that the supervised steps before GRPO have reduced abilities of the starting model outside the task."""
    if not run.config.get("sft_steps") or not run.evals:
        return None
    loss, text = _losses(run.evals[0].get("drift") or 0.0, run.before_sft or {}, run.tests[0] if run.tests else {})
    if not text:
        return None
    return loss, (
        f"Supervised fine-tuning forgets: {text}. Before GRPO began, it reduced abilities outside the task. Lower "
        "--sft-learning-rate, or train for fewer --sft-steps."
    )


def _losses(drift: float, before: Row, after: Row) -> tuple[float, str]:
    """Return the largest loss, and a text about all losses: drift (nats a token), the accuracy of each lost skill."""
    losses = [drift]
    texts = []
    if drift >= FORGETTING_MIN_DRIFT:
        texts.append(f"its answers to unrelated prompts have drifted by {drift:.2f} nats a token")
    earlier = before.get("skills") or {}
    later = after.get("skills") or {}
    for name in [name for name in earlier if name in later]:
        loss = earlier[name]["accuracy"] - later[name]["accuracy"]
        if loss >= max(SKILL_MIN_LOSS, SKILL_MIN_HALF_WIDTHS * noise(earlier[name], later[name])):
            losses.append(loss)
            texts.append(f"{name} {percent(earlier[name]['accuracy'])} -> {percent(later[name]['accuracy'])}")
    return max(losses), "; ".join(texts)


def reward_scale(run: RunSnapshot) -> CheckResult:
    """Report that a reward part varies far less than another, or that all rewards vary too little or too much."""
    parts = {name.removeprefix("reward_std/") for row in run.steps[-1:] for name in row if "reward_std/" in name}
    stds = {part: run.mean(f"reward_std/{part}", run.long_window) for part in sorted(parts)}
    stds = {part: std for part, std in stds.items() if std > 0}
    small, large = min(stds, key=stds.get, default=""), max(stds, key=stds.get, default="")
    if stds and stds[small] < PART_MIN_RELATIVE_STD * stds[large]:
        return stds[small], (
            "Reward parts of different scales: in groups where a part differs, its standard deviation is "
            f"{stds[small]:.2g} for {small} and {stds[large]:.2g} for {large}. Where both parts differ, {small} has "
            f"no effect. Where {large} is tied, {small} alone decides, however little it varies. Give the parts "
            "similar weights (--reward), or divide by the standard deviation of the batch (--scale-rewards batch)."
        )
    untied = 1 - run.mean("tied_groups_fraction", run.long_window)
    std = run.mean("reward_std", run.long_window) / max(1e-9, untied)
    if run.config.get("scale_rewards", "group") == "none":
        low, high = UNSCALED_MIN_STD, UNSCALED_MAX_STD
        compared = "--beta and --clip-grad-norm"
    else:
        low, high = SCALED_MIN_STD, float("inf")
        compared = "the 1e-4 that is added to it"
    if not (0 < std < low or std > high):
        return None
    return std, (
        f"The scale of the rewards does not fit: in groups that are not tied, their standard deviation is {std:.2g}, "
        f"which is too {'small' if std < low else 'large'} compared with {compared}. Change the weights "
        "(--reward NAME=WEIGHT) so that rewards differ by about 1."
    )
