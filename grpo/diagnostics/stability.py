"""Findings on how a run trains: KL, entropy, gradients and clipping, what moves, where completions end.

Each function in CHECKS is the finding of its name; it returns the figure and the text, or None.
"""

from statistics import median

from grpo.diagnostics.snapshot import CheckResult, Row, RunSnapshot, lower_bound, percent, upper_bound

KL_LARGE = 1.0  # nats a token: its tokens are on average e times as likely as under the reference
KL_SPIKE, KL_SPIKE_LEAST = 10.0, 0.5  # times the median before it; and nats a token, for early medians are near 0
SPIKE_COMPLETIONS = 32  # that a KL is the mean of, as one rare token is no spike
BEFORE_BLOCKS, BEFORE_STEPS = 7, 20  # that come before a spike at least: a fast start is none
ENTROPY_LEFT, ENTROPY_LEAST = 0.35, 0.08  # of the first steps' entropy; and nats a token
ALIKE = 0.75  # of the groups are tied: tokens that are copied have no entropy in a healthy run either
STILL_WRONG = 0.8  # a policy this accurate may be sure of itself
GROWN, GROWN_ANYHOW, GROWN_TOKENS = 4.0, 10.0, 20  # times the first length; the same if accuracy rose; tokens
MOSTLY, NEARLY_EVERY = 0.5, 0.95  # of completions
ENDINGS_REPEATED = 0.1  # of completions: a model that has learned where to stop has none
SPIKE = 10.0  # times the median, and the clipping
SPIKES, SPIKE_LEAST, SPIKE_STEPS = 3, 20, 50  # this many, for one is harmless; among so many steps, 20 to 50
CLIPPED = 0.3  # of tokens: clipping is for outliers; PPO's usual 0.05 to 0.2
MOVED = 0.1  # of weights: float32 at a sensible rate moves nearly all, bf16 at 1e-7 moved 2 to 8%
STANDING, STANDING_STEPS = 1e-6, 50  # nats a token, too few to tell the policies apart; steps to wait
GAP_FLOAT32, GAP_BF16 = 0.01, 1.0  # nats: rounding is 1e-5 in float32, and up to some tenths on a rare token in bf16


def kl_diverging(now: RunSnapshot) -> CheckResult:
    """The policy is far from the reference."""
    kl = now.mean("kl")
    if not kl >= KL_LARGE:
        return None
    return kl, (
        f"The KL diverges: {kl:.2f} nats a token over the last {now.window} steps, so the policy has left the model "
        "it came from, and with it what that could do. Lower --learning-rate, raise --beta, or set --target-kl 0.1."
    )


def kl_spike(now: RunSnapshot) -> CheckResult:
    """The KL of a step is far above that of those before it; of small batches, the mean of a few steps."""
    length = _steps_of(now, SPIKE_COMPLETIONS)
    kl = now.mean("kl", length)
    if len(now.steps) % length or not kl >= KL_SPIKE_LEAST:
        return None
    blocks = max(BEFORE_BLOCKS, -(-BEFORE_STEPS // length))
    before = [block for block in now.blocks("kl", length)[:-1] if block == block][-blocks:]
    if len(before) < blocks or not kl >= KL_SPIKE * median(before):
        return None
    steps = "one step" if length == 1 else f"{length} steps"
    return kl, (
        f"The KL jumps: {kl:.2f} nats a token in {steps}, {median(before):.3f} in the {blocks * length} before. A "
        "single update went too far. Lower --learning-rate, --num-inner-updates or --clip-grad-norm."
    )


def entropy_collapsed(now: RunSnapshot) -> CheckResult:
    """The policy no longer tries anything, and is not right either."""
    first, last, right = now.mean("entropy", first=True), now.mean("entropy"), now.mean("accuracy")
    tied = now.mean("tied_groups_fraction")
    if not (last < ENTROPY_LEAST and last < ENTROPY_LEFT * first and upper_bound(right, now.groups()) < STILL_WRONG):
        return None
    if not tied >= ALIKE:
        return None
    return last, (
        f"The entropy collapsed: {last:.3f} nats a token, {first:.3f} at first, with {percent(right)} of the "
        f"completions right and {percent(tied)} of the groups tied. All completions of a group are the same, so "
        "nothing better can be found. Lower --learning-rate, raise --beta or --temperature, or try --epsilon-high "
        "0.28."
    )


def length_growing(now: RunSnapshot) -> CheckResult:
    """Completions grow many times longer, and not because that makes them right."""
    first, last = now.mean("completion_length", first=True), now.mean("completion_length")
    if len(now.steps) < 2 * now.window or not (last >= GROWN * first and last - first >= GROWN_TOKENS):
        return None
    before, right = now.mean("accuracy", first=True), now.mean("accuracy")
    if lower_bound(right, now.groups()) > upper_bound(before, now.groups()) and last < GROWN_ANYHOW * first:
        return None
    return last, (
        f"Completions grow: {last:.0f} tokens on average in the last {now.window} steps, {first:.0f} in the first "
        f"ones, while the accuracy went from {percent(before)} to {percent(right)}. Length is paid for, or costs "
        "nothing: look at the completions, add --reward length=0.1, --loss-average constant, or lower "
        "--max-new-tokens."
    )


def truncated(now: RunSnapshot) -> CheckResult:
    """Most completions are cut off."""
    share = now.mean("truncated_fraction")
    if not now.at_least("truncated_fraction", MOSTLY - 0.05) or not MOSTLY <= share < NEARLY_EVERY:
        return None
    return share, (
        f"{percent(share)} of the completions of the last {now.window} steps were cut off by the token limit, "
        f"most before their answer. Raise --max-new-tokens (now {now.setting('max_new_tokens')}), or add "
        "--mask-truncated-completions to learn nothing from them."
    )


def never_ends(now: RunSnapshot) -> CheckResult:
    """No completion comes to an end."""
    share = now.mean("truncated_fraction")
    if not share >= NEARLY_EVERY:
        return None
    return share, (
        f"Completions never end: {percent(share)} of the last {now.window} steps ran into the token limit "
        f"({now.setting('max_new_tokens')}). Either that is far too short (raise --max-new-tokens), or the model "
        "does not know how to end a turn, as base models do not: take an instruct model, or a reward for ending "
        "(--reward one_ending=0.2)."
    )


def ends_at_once(now: RunSnapshot) -> CheckResult:
    """Completions are empty."""
    share = now.mean("empty_fraction")
    if not share >= MOSTLY or now.setting("max_new_tokens", 2) == 1:
        return None
    return share, (
        f"Completions end at once: {percent(share)} of the last {now.window} steps have at most one token. Saying "
        "nothing costs less than being wrong: check that no reward (--reward) is negative or pays for being short, "
        "raise --beta, and lower --learning-rate."
    )


def repeated_endings(now: RunSnapshot) -> CheckResult:
    """The ending is written over and over."""
    share = now.mean("repeated_endings_fraction")
    if not share >= ENDINGS_REPEATED:
        return None
    return share, (
        f"Repeated endings: in {percent(share)} of the completions of the last {now.window} steps a closing tag or "
        "an end marker appears more than once. The model does not stop after its answer, or is paid for more "
        "text. Add --reward one_ending=0.2, and check that the model has the chat template that it was made with."
    )


def gradient_spikes(now: RunSnapshot) -> CheckResult:
    """The gradient's norm jumps again and again, among the steps that have something to learn from."""
    rows = [row for row in now.steps if row.get("grad_norm") is not None and _teaches(row)][-SPIKE_STEPS:]
    norms = [row["grad_norm"] for row in rows]
    if len(norms) < SPIKE_LEAST:
        return None
    usual = median(norms)
    high = [norm for norm in norms if norm > SPIKE * max(usual, now.setting("clip_grad_norm", 0.5))]
    if len(high) < SPIKES:
        return None
    return max(high), (
        f"The gradient spikes: its norm was above {min(high):.3g} in {len(high)} of the last {len(rows)} steps that "
        f"were not tied, {usual:.2g} in their median. Clipping keeps such a step short but not its direction sound. "
        "Lower --learning-rate, use larger groups (--num-generations) or batches (--batch-size)."
    )


def _teaches(row: Row) -> bool:
    """Return whether a group of the step is not tied: the gradient of ties is that of the KL alone."""
    return (row.get("tied_groups_fraction") or 0.0) < 1


def _steps_of(now: RunSnapshot, completions: int) -> int:
    """Return the number of steps that hold so many completions."""
    a_step = now.batch * max(1, int(now.setting("num_generations", 8)))
    return -(-completions // a_step)


def updates_skipped(now: RunSnapshot) -> CheckResult:
    """Updates that were not finite."""
    skipped = now.last("skipped_updates")
    if not skipped >= 1:
        return None
    return skipped, (
        f"{skipped:.0f} update{'s' * (skipped > 1)} of step {now.steps[-1]['step']} had a loss or gradient that is "
        "not finite. None reached the weights, so nothing is broken yet. If more follow, lower --learning-rate or "
        "raise --beta; a reward of enormous numbers does this too."
    )


def clipping(now: RunSnapshot) -> CheckResult:
    """Most of what the updates would change is clipped away."""
    clipped = now.mean("clip_fraction")
    if not clipped >= CLIPPED:
        return None
    return clipped, (
        f"Much is clipped: {percent(clipped)} of the tokens in the inner update of a step that clips most, over the "
        f"last {now.window} steps (5 to 20% is usual), so the policy moves far within one step, on old samples. "
        f"Lower --learning-rate or --num-inner-updates (now {now.setting('num_inner_updates')})."
    )


def learning_rate_small(now: RunSnapshot) -> CheckResult:
    """The weights do not move, or too little for the policy to."""
    rates = now.values("learning_rate")
    rate = now.setting("learning_rate")
    if not rates or min(rates) < rate / 2 or not now.mean("grad_norm") > 0 or now.mean("skipped_updates") > 0:
        return None  # a warm-up, a decay; nothing to learn from; nothing applied
    moved, away = now.mean("weights_moved"), _distance(now)
    if moved < MOVED:
        return moved, (
            f"The learning rate is too small: {rate:g} changed {percent(moved)} of the weights in a step, for "
            "a float cannot hold a smaller change. Raise --learning-rate (1e-7 to 1e-5 is usual, 1e-4 with LoRA)."
        )
    if away < STANDING and len(now.steps) >= STANDING_STEPS:
        return away, (
            f"The policy stands still: after {len(now.steps)} steps it is {away:.1g} nats a token from its start. "
            f"Raise --learning-rate (now {rate:g}; 1e-7 to 1e-5 is usual, 1e-4 with --lora-rank)."
        )
    return None


def _distance(now: RunSnapshot) -> float:
    """Return how far the policy is from its start, nats a token; NaN if that is not known.

    That is the KL, unless there is no reference or it moves with the policy: then the drift at the last evaluation.
    """
    moves = now.setting("ref_model_sync_steps") or now.setting("refresh_reference_every")
    if now.setting("beta", 0.04) and not moves:
        return now.mean("kl")
    drifts = [e["drift"] for e in now.evals[1:] if e.get("drift") is not None and e["step"]]
    return abs(drifts[-1]) if drifts else float("nan")


def sampler_gap(now: RunSnapshot) -> CheckResult:
    """The policy that is scored is not the one that sampled."""
    gap = now.mean("sampler_gap")
    limit = GAP_FLOAT32 if now.precision == "float32" else GAP_BF16
    if not gap >= limit:
        return None
    return gap, (
        f"Sampler and scorer disagree: by up to {gap:.2g} nats on the log-probability of the same token, where "
        f"rounding explains {limit:g}. The ratio is then of another policy than the one that sampled. See that this "
        "model has no dropout and takes positions and masks as others do, try --deterministic, and report it."
    )


CHECKS = (
    kl_diverging,
    kl_spike,
    entropy_collapsed,
    length_growing,
    truncated,
    never_ends,
    ends_at_once,
    repeated_endings,
    gradient_spikes,
    updates_skipped,
    clipping,
    learning_rate_small,
    sampler_gap,
)
