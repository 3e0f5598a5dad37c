"""Findings on groups whose rewards are all equal, which teach nothing: too easy, too hard, a reward that is blind.

Each function in CHECKS is the finding of its name; it returns the figure and the text, or None.
"""

from statistics import fmean

from grpo.diagnostics.snapshot import CheckResult, RunSnapshot, lower_bound, percent

NEARLY_ALL = 0.9  # of groups: one step in ten may still teach something
FEW, MANY = 16, 128  # completions that show that none has the form or ends, and that all are wrong or right
HARDLY_ANY = 0.02  # of completions: less than one right in six groups of 8
UNSOLVED_CI_HIGH = 0.15  # of a category with no right answer: 22 problems or more
BOTH_KINDS = 0.15  # of groups: all right and all wrong ones are both common
WASTED, WASTED_PAIRS = 0.5, 0.7  # share of groups that tie, most not all right; pairs and triples tie by nature
IDLE, IDLE_STEPS = 0.1, 40  # share of steps beyond what ties of single groups explain; steps that are looked at


def nothing_to_learn(now: RunSnapshot) -> CheckResult:
    """Before the first step, no group of a rollout teaches anything."""
    look = now.outlook
    completions = look["groups"] * look["num_generations"] if look else 0
    if completions < FEW or look["teaching"] > 0:
        return None
    text = (
        f"In {look['groups']} groups of {look['num_generations']} completions none had rewards that differ, so as "
        "things stand a step teaches nothing. "
    )
    if look["truncated"] >= NEARLY_ALL:
        text += "Nearly all were cut off by the token limit: raise --max-new-tokens. "
    if look["well_formed"] <= HARDLY_ANY:
        return 0.0, text + (
            "Hardly one has the form that the prompt asks for: show it by worked examples in the prompt, --shots 4, "
            "or teach it first, --sft-steps 50."
        )
    if look["truncated"] >= NEARLY_ALL:
        return 0.0, text
    if completions < MANY:
        return None
    if look["all_right"] == 1:
        return 1.0, text + "All are right already: take harder problems, or add --resample-tied 3."
    return look["pass_at_1"], text + "Take easier problems, or a --reward that tells wrong answers apart."


def too_easy(now: RunSnapshot) -> CheckResult:
    """All completions of nearly all groups are right from the start."""
    tied = now.mean("tied_all_right_fraction", first=True)
    if not (tied >= NEARLY_ALL and now.at_least("tied_all_right_fraction", NEARLY_ALL - 0.05, first=True)):
        return None
    return tied, (
        f"Too easy: in the first {now.window} steps {percent(tied)} of the groups were all right, and a group "
        "that is paid alike teaches nothing. Take harder problems or --resample-tied 3."
    )


def too_hard(now: RunSnapshot) -> CheckResult:
    """All completions of nearly all groups are wrong, and always were; at the end also: hardly one is right."""
    ended = len(now.tests) > 1
    window = -(-len(now.steps) // 2) if ended else now.long_window
    tied, right = now.mean("tied_all_wrong_fraction", window), now.mean("accuracy", window)
    if _able(now) or not (now.evals or now.tests):
        return None
    if not (tied >= NEARLY_ALL or (ended and right <= HARDLY_ANY)):
        return None
    text = (
        f"Too hard for this model: in the last {window} steps {100 * right:.1f}% of the completions were right, and "
        f"{percent(tied)} of the groups all wrong and paid alike, which teaches nothing. Take easier problems, "
        "a --reward that also pays for coming closer, or an abler --model."
    )
    latest = [*now.evals, *now.tests[1:]][-1:] or now.tests
    if any((e.get("well_formed") or 0) < HARDLY_ANY for e in latest):
        text += " It does not write the form that the prompt asks for: teach it that first, or try --prompt-style."
    return tied, text


def unsolved_category(now: RunSnapshot) -> CheckResult:
    """Hardly a held-out answer of one category of problems has ever been right, while the others' are."""
    early = len(now.evals) < 3 or len(now.steps) < now.long_window
    if not _able(now) or (early and len(now.tests) < 2):  # the second test is the end of the run
        return None
    best = {name: max(e["accuracy"] for e in evals) for name, evals in now.categories.items()}
    unsolved = [
        name
        for name, accuracy in best.items()
        if accuracy <= HARDLY_ANY and now.categories[name][-1]["ci_high"] <= UNSOLVED_CI_HIGH
    ]
    if not unsolved:
        return None
    figure = max(best[name] for name in unsolved)
    return figure, (
        f"Never solved: in each of {len(now.evals)} evaluations at most {percent(figure)} of the held-out answers to "
        f"{', '.join(unsolved)} were right, while of all answers {percent(now.evals[-1]['accuracy'])} are right now. "
        "Groups that are all wrong and paid alike teach nothing. Take easier problems of this category or none, or a "
        "--reward that also pays for coming closer."
    )


def constant_reward(now: RunSnapshot) -> CheckResult:
    """Every completion gets the same reward, right or wrong."""
    if not is_constant(now):
        return None
    reward = now.mean("reward_mean")
    return reward, (
        f"The reward is constant: every completion of the last {now.window} steps got {reward:.3g}, while "
        f"{percent(now.mean('accuracy'))} of them were right. Nothing can be learned from it. Check the reward "
        "function (--reward): its answer does not depend on the completion."
    )


def all_or_nothing(now: RunSnapshot) -> CheckResult:
    """Nearly all groups are tied, some all right and the others all wrong."""
    right, wrong = now.mean("tied_all_right_fraction"), now.mean("tied_all_wrong_fraction")
    if not (min(right, wrong) >= BOTH_KINDS and lower_bound(right + wrong, now.groups()) >= NEARLY_ALL - 0.1):
        return None
    return right + wrong, (
        f"All or nothing: in the last {now.window} steps {percent(right)} of the groups were all right and "
        f"{percent(wrong)} all wrong; only {percent(1 - right - wrong)} had something to compare. The problems are "
        "either too easy or too hard. Take problems in between, more completions a prompt (--num-generations), a "
        "higher --temperature, or --resample-tied 3."
    )


def tied_groups(now: RunSnapshot) -> CheckResult:
    """Half of the groups are tied, and most of those not because all is right."""
    window = now.long_window
    tied, right = now.mean("tied_groups_fraction", window), now.mean("tied_all_right_fraction", window)
    wasted = WASTED_PAIRS if now.setting("num_generations", 8) < 4 else WASTED
    if not (tied >= wasted and right < tied / 2 and now.at_least("tied_groups_fraction", wasted - 0.1, window)):
        return None
    return tied, (
        f"Ties: {percent(tied)} of the groups of the last {window} steps had equal rewards ({percent(right)} all "
        f"right), so {percent(tied)} of the sampling and of the update taught nothing. Add --resample-tied 3, a "
        "--reward that tells wrong answers apart, easier problems, or more completions a prompt "
        "(--num-generations)."
    )


def idle_steps(now: RunSnapshot) -> CheckResult:
    """Whole steps teach nothing, far more of them than ties of single groups explain."""
    tied = now.values("tied_groups_fraction", max(IDLE_STEPS, now.long_window))
    if not tied:
        return None
    idle = sum(share == 1 for share in tied) / len(tied)
    expected = fmean(tied) ** now.batch
    if not lower_bound(idle, len(tied)) > expected + IDLE:
        return None
    return idle, (
        f"Idle steps: in {percent(idle)} of the last {len(tied)} steps every group was tied, so that all advantages "
        f"were 0 and nothing was learned; ties of single groups ({percent(fmean(tied))}) explain "
        f"{percent(expected)}. Whole batches are paid alike: check whether the reward (--reward) depends on "
        "something that changes from step to step."
    )


def _able(now: RunSnapshot) -> bool:
    """Return whether the run has ever been right more than now and then."""
    return any(e["accuracy"] > HARDLY_ANY for e in (*now.evals, *now.tests))


def is_constant(now: RunSnapshot) -> bool:
    """Return whether all rewards of the window are equal, those of right and of wrong completions."""
    rewards, tied = now.values("reward_mean"), now.values("tied_groups_fraction")
    if not rewards or not tied or min(tied) < 1 or min(rewards) < max(rewards):
        return False
    return HARDLY_ANY < now.mean("accuracy") < 1 - HARDLY_ANY


CHECKS = (
    nothing_to_learn,
    too_easy,
    too_hard,
    unsolved_category,
    constant_reward,
    all_or_nothing,
    tied_groups,
    idle_steps,
)
