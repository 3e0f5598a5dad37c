"""Checks of how a run trains: KL, entropy, gradients, clipping, learning rate, and where completions end."""

from math import hypot
from statistics import fmean, median

from grpo.diagnostics.snapshot import CheckResult, RunSnapshot, lower_bound, percent, upper_bound

KL_MIN = 1.0  # nats a token: on average a token is e times as likely as under the reference.
KL_SPIKE_MIN_RATIO = 10.0  # A spike is this many times the median of the earlier KL.
KL_SPIKE_MIN = 0.5  # nats a token: early medians are near 0, so a large ratio alone says little.
KL_SPIKE_MIN_COMPLETIONS = 32  # The KL is a mean over this many completions or more, so one rare token is no spike.
KL_SPIKE_MIN_BLOCKS = 7  # A spike is compared with at least this many earlier blocks of steps.
KL_SPIKE_MIN_STEPS = 20  # The earlier blocks have at least this many steps in all, so a fast start is no spike.
ENTROPY_MAX_REMAINING = 0.35  # A collapsed entropy is below this fraction of the entropy of the first steps.
ENTROPY_MAX = 0.08  # nats a token: a collapsed entropy is also below this value.
ENTROPY_MIN_TIED_SHARE = 0.75  # A healthy policy that copies text has little entropy too, but fewer ties.
ENTROPY_MAX_ACCURACY = 0.8  # A policy that is right this often may have little entropy.
LENGTH_MIN_RATIO = 4.0  # Completions grow if they have this many times the tokens of the first steps.
LENGTH_MIN_RATIO_IF_BETTER = 10.0  # This ratio applies if accuracy has risen, perhaps due to the length.
LENGTH_MIN_GROWTH = 20  # tokens: smaller growth is ignored, because a few tokens can multiply a short length.
MOST_MIN_SHARE = 0.5  # From this share of completions on, messages say "most".
NEVER_ENDS_MIN_SHARE = 0.95  # If at least this share of completions is truncated, the model does not end its turns.
REPEATED_MIN_SHARE = 0.1  # Minimum share of completions with a repeated ending; a model that stops in time has none.
GRADIENT_SPIKE_MIN_RATIO = 10.0  # A spike is more than this many times both the median norm and --clip-grad-norm.
GRADIENT_MIN_SPIKES = 3  # One spike is harmless.
GRADIENT_MIN_STEPS = 20  # Fewer untied steps do not show which norm is usual.
GRADIENT_MAX_STEPS = 50  # Older steps say little about the current policy.
CLIPPED_MIN_SHARE = 0.3  # Clipping is for outliers; 0.05 to 0.2 of the tokens is usual in PPO.
MOVED_MIN_SHARE = 0.1  # A step changes nearly all float32 weights; with rate 1e-7, 2 to 8% of bfloat16 weights.
DISTANCE_MIN = 1e-6  # nats a token: a policy closer to its start than this has hardly changed.
DISTANCE_MIN_STEPS = 50  # The distance is not judged before this many steps.
GAP_MIN_FLOAT32 = 0.01  # nats: rounding in float32 explains a gap of 1e-5.
GAP_MIN_BFLOAT16 = 1.0  # nats: rounding in bfloat16 explains a gap of a few tenths on a rare token.
# The mean gap of the steps must be this number of standard errors. In five default runs of 100 steps, with seeds 0 to
# 4, the mean of any 20 steps was at most 2.5 standard errors.
ENTROPY_GAP_MIN_ERRORS = 6.0
ENTROPY_GAP_MIN = 0.005  # nats a token: a smaller gap does no harm, and rounding in bfloat16 may explain it.
ENTROPY_GAP_MIN_NATS = 200.0  # With less entropy in all tokens of the steps, rare tokens may be missing by chance.


def kl_diverging(run: RunSnapshot) -> CheckResult:
    """Report that the policy is far from the reference."""
    kl = run.mean("kl")
    if not kl >= KL_MIN:
        return None
    return kl, (
        f"The KL diverges: {kl:.2f} nats a token over the last {run.window} steps, so the policy may have lost what "
        "the reference could do. Lower --learning-rate, raise --beta, or set --target-kl 0.1."
    )


def kl_spike(run: RunSnapshot) -> CheckResult:
    """Report that the KL of the last step, or of the last steps if batches are small, is far above the earlier KL."""
    completions = run.batch * max(1, int(run.config.get("num_generations", 8)))
    length = -(-KL_SPIKE_MIN_COMPLETIONS // completions)
    kl = run.mean("kl", length)
    if len(run.steps) % length or not kl >= KL_SPIKE_MIN:
        return None
    blocks = max(KL_SPIKE_MIN_BLOCKS, -(-KL_SPIKE_MIN_STEPS // length))
    before = run.earlier_blocks("kl", length)[-blocks:]
    if len(before) < blocks or not kl >= KL_SPIKE_MIN_RATIO * median(before):
        return None
    steps = "one step" if length == 1 else f"{length} steps"
    return kl, (
        f"The KL jumps: {kl:.2f} nats a token in {steps}, {median(before):.3f} in the {blocks * length} steps "
        "before. A single update went too far. Lower --learning-rate, --num-inner-updates or --clip-grad-norm."
    )


def entropy_collapsed(run: RunSnapshot) -> CheckResult:
    """Report that the policy no longer varies its completions, although many of them are wrong."""
    first = run.mean("entropy", first=True)
    last = run.mean("entropy")
    right = run.mean("accuracy")
    tied = run.mean("tied_groups_fraction")
    if not (last < ENTROPY_MAX and last < ENTROPY_MAX_REMAINING * first and tied >= ENTROPY_MIN_TIED_SHARE):
        return None
    if not upper_bound(right, run.groups()) < ENTROPY_MAX_ACCURACY:
        return None
    return last, (
        f"The entropy collapsed: {last:.3f} nats a token, {first:.3f} at first, with {percent(right)} of the "
        f"completions right and {percent(tied)} of the groups tied. The completions of a group hardly differ, so "
        "nothing better is found. Lower --learning-rate, raise --beta or --temperature, or try --epsilon-high 0.28."
    )


def length_growing(run: RunSnapshot) -> CheckResult:
    """Report that completions grow many times longer without being right more often."""
    first = run.mean("completion_length", first=True)
    last = run.mean("completion_length")
    grows = last >= LENGTH_MIN_RATIO * first and last - first >= LENGTH_MIN_GROWTH
    if len(run.steps) < 2 * run.window or not grows:
        return None
    before = run.mean("accuracy", first=True)
    right = run.mean("accuracy")
    is_better = lower_bound(right, run.groups()) > upper_bound(before, run.groups())
    if is_better and last < LENGTH_MIN_RATIO_IF_BETTER * first:
        return None
    return last, (
        f"Completions grow: {last:.0f} tokens on average in the last {run.window} steps, {first:.0f} in the first "
        f"ones, while the accuracy went from {percent(before)} to {percent(right)}. Look at the "
        "completions, add --reward length=0.1 or --loss-average constant, or lower --max-new-tokens."
    )


def truncated(run: RunSnapshot) -> CheckResult:
    """Report that the token limit cuts most completions off."""
    share = run.mean("truncated_fraction")
    is_certain = run.at_least("truncated_fraction", MOST_MIN_SHARE - 0.05)
    if not (is_certain and MOST_MIN_SHARE <= share < NEVER_ENDS_MIN_SHARE):
        return None
    return share, (
        f"{percent(share)} of the completions of the last {run.window} steps were cut off by the token limit, "
        f"so probably most of them have no answer. Raise --max-new-tokens (now {run.config.get('max_new_tokens')}), "
        "or add --mask-truncated-completions to leave them out of the loss."
    )


def never_ends(run: RunSnapshot) -> CheckResult:
    """Report that the token limit cuts nearly every completion off."""
    share = run.mean("truncated_fraction")
    if not share >= NEVER_ENDS_MIN_SHARE:
        return None
    return share, (
        f"Completions never end: in the last {run.window} steps, {percent(share)} reached the token limit "
        f"({run.config.get('max_new_tokens')}). Either it is far too low (raise --max-new-tokens), or the model is a "
        "base model that does not end its turns: take an instruct model, or reward endings (--reward one_ending=0.2)."
    )


def ends_at_once(run: RunSnapshot) -> CheckResult:
    """Report that most completions have at most one token."""
    share = run.mean("empty_fraction")
    if not share >= MOST_MIN_SHARE or run.config.get("max_new_tokens", 2) == 1:
        return None
    return share, (
        f"Completions end at once: in the last {run.window} steps, {percent(share)} have at most one token. Maybe "
        "an empty answer costs less than a wrong one: check that no reward (--reward) is negative or favours short "
        "answers, raise --beta, and lower --learning-rate."
    )


def repeated_endings(run: RunSnapshot) -> CheckResult:
    """Report that completions repeat a closing tag or an end marker."""
    share = run.mean("repeated_endings_fraction")
    if not share >= REPEATED_MIN_SHARE:
        return None
    return share, (
        f"Repeated endings: in {percent(share)} of the completions of the last {run.window} steps a closing tag or "
        "an end marker appears more than once. The model does not stop after its answer, or rewards prefer "
        "more text. Add --reward one_ending=0.2, and check that the model has the chat template that it was trained "
        "with."
    )


def gradient_spikes(run: RunSnapshot) -> CheckResult:
    """Report that the norm of the gradient jumps again and again in steps in which not all groups are tied.

    Steps whose groups are all tied are left out, since their gradient comes from the KL alone.
    """
    untied = [row for row in run.steps if (row.get("tied_groups_fraction") or 0.0) < 1]
    norms = [row["grad_norm"] for row in untied if row.get("grad_norm") is not None][-GRADIENT_MAX_STEPS:]
    if len(norms) < GRADIENT_MIN_STEPS:
        return None
    usual = median(norms)
    limit = GRADIENT_SPIKE_MIN_RATIO * max(usual, run.config.get("clip_grad_norm", 0.5))
    spikes = [norm for norm in norms if norm > limit]
    if len(spikes) < GRADIENT_MIN_SPIKES:
        return None
    return max(spikes), (
        f"The gradient spikes: its norm was at least {min(spikes):.3g} in {len(spikes)} of the last {len(norms)} "
        f"steps with untied groups; its median is {usual:.2g}. Clipping makes such a step shorter but does not "
        "correct its direction. Lower --learning-rate, or use larger groups (--num-generations) or batches "
        "(--batch-size)."
    )


def updates_skipped(run: RunSnapshot) -> CheckResult:
    """Report updates of the last step that were skipped because loss or gradient was not finite."""
    skipped = run.mean("skipped_updates", 1)
    if not skipped >= 1:
        return None
    return skipped, (
        f"{skipped:.0f} update{'s' * (skipped > 1)} of step {run.steps[-1]['step']} had a loss or gradient that is "
        "not finite. None reached the weights, so nothing is broken yet. If more follow, lower --learning-rate or "
        "raise --beta; very large rewards are another cause."
    )


def clipping(run: RunSnapshot) -> CheckResult:
    """Report that clipping removes the gradient of many tokens."""
    clipped = run.mean("clip_fraction")
    if not clipped >= CLIPPED_MIN_SHARE:
        return None
    return clipped, (
        f"Much is clipped: {percent(clipped)} of the tokens in the inner update that clips most, on average over the "
        f"last {run.window} steps (5 to 20% is usual). The policy moves far from the policy that sampled. Lower "
        f"--learning-rate or --num-inner-updates (now {run.config.get('num_inner_updates')})."
    )


def learning_rate_small(run: RunSnapshot) -> CheckResult:
    """Report that the weights do not change, or too little to change the policy."""
    rates = run.values("learning_rate")
    rate = run.config.get("learning_rate", 0)
    if not rates or min(rates) < rate / 2:
        return None  # The rate is still rising or already decaying.
    if not run.mean("grad_norm") > 0 or run.mean("skipped_updates") > 0:
        return None  # There is no learning signal, or updates were not applied.
    moved = run.mean("weights_moved")
    if moved < MOVED_MIN_SHARE:
        return moved, (
            f"The learning rate is too small: {rate:g} changed {percent(moved)} of the weights in a step, because "
            "floats cannot hold smaller changes. Raise --learning-rate (1e-7 to 1e-5 is usual, 1e-4 with LoRA)."
        )
    distance = _distance(run)
    if distance < DISTANCE_MIN and len(run.steps) >= DISTANCE_MIN_STEPS:
        return distance, (
            f"The policy hardly changes: after {len(run.steps)} steps it is {distance:.1g} nats a token from its "
            f"start. Raise --learning-rate (now {rate:g}; 1e-7 to 1e-5 is usual, 1e-4 with --lora-rank)."
        )
    return None


def _distance(run: RunSnapshot) -> float:
    """Return how far the policy is from its start, in nats a token; NaN if this is not known.

    It is the KL to a reference that never changes; without such a reference, the drift at the last evaluation.
    """
    moves = run.config.get("ref_model_sync_steps") or run.config.get("refresh_reference_every")
    if run.config.get("beta", 0.04) and not moves:
        return run.mean("kl")
    drifts = [e["drift"] for e in run.evals[1:] if e.get("drift") is not None and e["step"]]
    return abs(drifts[-1]) if drifts else float("nan")


def sampler_gap(run: RunSnapshot) -> CheckResult:
    """Report that sampling and scoring compute different log-probabilities for the same token."""
    gap = run.mean("sampler_gap")
    limit = GAP_MIN_FLOAT32 if run.precision == "float32" else GAP_MIN_BFLOAT16
    if not gap >= limit:
        return None
    return gap, (
        f"Sampling and scoring disagree by up to {gap:.2g} nats on the log-probability of the same token. Rounding "
        f"explains at most {limit:g}. So the ratio is not relative to the policy that sampled. Check that "
        "this model has no dropout and treats positions and masks as usual, try --deterministic, and report it."
    )


def entropy_gap(run: RunSnapshot) -> CheckResult:
    """Report that tokens are not drawn from the distribution that is scored.

    The mean of -log p of the sampled tokens must then equal the mean entropy, within its standard error. A policy
    that is nearly certain of each token is not judged: its few surprising tokens may be missing by chance, and then
    the measured standard error is too small.
    """
    gap = run.mean("entropy_gap", run.long_window)
    errors = run.values("entropy_gap_error", run.long_window)
    lengths, sizes = run.values("completion_length", run.long_window), run.values("num_generations", run.long_window)
    nats = sum(run.values("entropy", run.long_window)) * run.batch * fmean(lengths or [0]) * fmean(sizes or [0])
    error = hypot(*errors) / len(errors) if errors else float("nan")
    if not (abs(gap) >= max(ENTROPY_GAP_MIN, ENTROPY_GAP_MIN_ERRORS * error) and nats >= ENTROPY_GAP_MIN_NATS):
        return None
    return gap, (
        f"The sampled tokens do not follow the policy: over the last {run.long_window} steps, the mean of their "
        f"-log p differs from the mean entropy by {gap:+.3f} nats, {abs(gap) / error:.0f} standard errors. "
        f"Completions are {'more' if gap < 0 else 'less'} predictable than the policy that the updates assume. Run "
        "`python -m tests.benchmarks.device_check`, compare with --device cpu, and report it."
    )
