"""Checks of tied groups: problems that are too easy or too hard, and rewards that do not depend on the completion.

A group is tied if its completions have equal rewards. It has no learning signal, because its advantages are 0.
"""

from statistics import fmean

from grpo.diagnostics.snapshot import HARDLY_ANY, NEARLY_ALL, CheckResult, RunSnapshot, lower_bound, percent

OUTLOOK_MIN_COMPLETIONS = 16  # Fewer completions may all lack the form, or all be cut off, by chance.
OUTLOOK_MIN_THINKING = 0.5  # From this share on, a finding mentions completions that begin with <think>.
OUTLOOK_MIN_GRADED = 128  # Fewer completions may all be right, or all wrong, by chance.
UNSOLVED_MAX_CI_HIGH = 0.15  # A category's 95% interval ends at or below this value, as it does for 0 right of 22.
ALL_OR_NOTHING_MIN_SHARE = 0.15  # All-right and all-wrong groups must each be at least this share of all groups.
TIED_MIN_SHARE = 0.5  # If at least this share of the groups is tied, much of the sampling is wasted.
TIED_MIN_SHARE_SMALL_GROUPS = 0.7  # Groups of 2 or 3 completions are often tied by chance.
IDLE_MIN_EXCESS = 0.1  # The share of idle steps must be this much larger than independent ties would explain.
IDLE_MIN_STEPS = 40  # Idle steps are counted over at least this number of steps.


def nothing_to_learn(run: RunSnapshot) -> CheckResult:
    """Report that before the first step all groups are tied, so that there is no learning signal."""
    outlook = run.outlook
    completions = outlook["groups"] * outlook["num_generations"] if outlook else 0
    if completions < OUTLOOK_MIN_COMPLETIONS or outlook["teaching"] > 0:
        return None
    text = (
        f"In each of {outlook['groups']} groups, all {outlook['num_generations']} completions have equal rewards, so "
        "a step would have no learning signal. "
    )
    are_cut_off = outlook["truncated"] >= NEARLY_ALL
    if are_cut_off:
        text += "Nearly all completions were cut off by the token limit: raise --max-new-tokens. "
    thinking = outlook.get("thinking", 0)  # Records of older versions lack this entry.
    if thinking >= OUTLOOK_MIN_THINKING and run.config.get("prompt_style") != "think":
        text += (
            f"{percent(thinking)} of the completions begin with <think>: switch thinking off if the model's chat "
            "template can (--chat-template-arg enable_thinking=false), or leave tokens for it (--max-new-tokens). "
        )
    if outlook["well_formed"] <= HARDLY_ANY:
        text += "Hardly any completion has the form that the prompt asks for: show it with worked examples in the "
        return 0.0, text + "prompt (--shots 4), or train on it first (--sft-steps 50)."
    if are_cut_off:
        return 0.0, text
    if completions < OUTLOOK_MIN_GRADED:
        return None
    if outlook["all_right"] == 1:
        return 1.0, text + "All are right already: take harder problems, or add --resample-tied 3."
    return outlook["pass_at_1"], text + "Take easier problems, or a --reward that tells wrong answers apart."


def too_easy(run: RunSnapshot) -> CheckResult:
    """Report that from the start all completions of nearly all groups are right."""
    tied = run.mean("tied_all_right_fraction", first=True)
    if not (tied >= NEARLY_ALL and run.at_least("tied_all_right_fraction", NEARLY_ALL - 0.05, first=True)):
        return None
    return tied, (
        f"Too easy: in the first {run.window} steps {percent(tied)} of the groups were all right with equal rewards, "
        "which gives no learning signal. Take harder problems or --resample-tied 3."
    )


def too_hard(run: RunSnapshot) -> CheckResult:
    """Report that nearly all groups have always been all wrong, or that hardly any completion is right at the end."""
    ended = len(run.tests) > 1
    window = -(-len(run.steps) // 2) if ended else run.long_window
    tied = run.mean("tied_all_wrong_fraction", window)
    right = run.mean("accuracy", window)
    if _has_been_right(run) or not (run.evals or run.tests):
        return None
    if not (tied >= NEARLY_ALL or (ended and right <= HARDLY_ANY)):
        return None
    text = (
        f"Too hard for this model: in the last {window} steps {100 * right:.1f}% of the completions were right, and "
        f"{percent(tied)} of the groups were all wrong with equal rewards, which gives no learning signal. Take "
        "easier problems, a --reward that gives partial credit, or a more capable --model."
    )
    latest = [*run.evals, *run.tests[1:]][-1:] or run.tests
    if any((e.get("well_formed") or 0) < HARDLY_ANY for e in latest):
        text += " It does not answer in the form that the prompt asks for: try --shots 4 or another --prompt-style."
    return tied, text


def unsolved_category(run: RunSnapshot) -> CheckResult:
    """Report categories of held-out problems that the model has hardly ever solved, while it solves others."""
    ended = len(run.tests) > 1
    if not _has_been_right(run) or not (ended or (len(run.evals) >= 3 and len(run.steps) >= run.long_window)):
        return None
    best = {name: max(e["accuracy"] for e in evals) for name, evals in run.categories.items()}
    unsolved = [
        name
        for name, accuracy in best.items()
        if accuracy <= HARDLY_ANY and run.categories[name][-1]["ci_high"] <= UNSOLVED_MAX_CI_HIGH
    ]
    if not unsolved:
        return None
    figure = max(best[name] for name in unsolved)
    return figure, (
        f"Never solved: in each of {len(run.evals)} evaluations at most {percent(figure)} of the held-out answers in "
        f"{', '.join(unsolved)} were right, while {percent(run.evals[-1]['accuracy'])} of all answers are right now. "
        "Groups that are all wrong with equal rewards give no learning signal. Take easier problems in these "
        "categories, leave the categories out, or add a --reward that gives partial credit."
    )


def constant_reward(run: RunSnapshot) -> CheckResult:
    """Report that every completion gets the same reward, right or wrong."""
    if not run.has_constant_reward:
        return None
    reward = run.mean("reward_mean")
    return reward, (
        f"The reward is constant: every completion of the last {run.window} steps got {reward:.3g}, while "
        f"{percent(run.mean('accuracy'))} of the completions were right, so there is no learning signal. Check the "
        "reward function (--reward): what it returns does not depend on the completion."
    )


def all_or_nothing(run: RunSnapshot) -> CheckResult:
    """Report that nearly all groups are tied: some are all right, the others all wrong."""
    right = run.mean("tied_all_right_fraction")
    wrong = run.mean("tied_all_wrong_fraction")
    common = min(right, wrong) >= ALL_OR_NOTHING_MIN_SHARE
    if not (common and lower_bound(right + wrong, run.groups()) >= NEARLY_ALL - 0.1):
        return None
    return right + wrong, (
        f"All or nothing: in the last {run.window} steps {percent(right)} of the groups were all right and "
        f"{percent(wrong)} all wrong; only the other {percent(1 - right - wrong)} can have a learning signal. The "
        "problems are either too easy or too hard. Take problems of medium difficulty, more completions a prompt "
        "(--num-generations), a higher --temperature, or --resample-tied 3."
    )


def tied_groups(run: RunSnapshot) -> CheckResult:
    """Report that at least half of the groups are tied, and that most tied groups are not all right."""
    window = run.long_window
    tied = run.mean("tied_groups_fraction", window)
    right = run.mean("tied_all_right_fraction", window)
    least = TIED_MIN_SHARE_SMALL_GROUPS if run.config.get("num_generations", 8) < 4 else TIED_MIN_SHARE
    if not (tied >= least and right < tied / 2 and run.at_least("tied_groups_fraction", least - 0.1, window)):
        return None
    return tied, (
        f"Ties: in {percent(tied)} of the groups that were drawn in the last {window} steps all rewards were equal, "
        f"so they gave no learning signal (in {percent(right)} of the groups every completion was right). Add "
        "--resample-tied 3, a --reward that tells wrong answers apart, easier problems, or more completions a prompt "
        "(--num-generations)."
    )


def idle_steps(run: RunSnapshot) -> CheckResult:
    """Report that steps with only tied groups are far more frequent than independent ties would explain."""
    tied = run.values("tied_groups_fraction", max(IDLE_MIN_STEPS, run.long_window))
    if not tied:
        return None
    idle = sum(share == 1 for share in tied) / len(tied)
    expected = fmean(tied) ** run.batch
    if not lower_bound(idle, len(tied)) > expected + IDLE_MIN_EXCESS:
        return None
    return idle, (
        f"Idle steps: in {percent(idle)} of the last {len(tied)} steps every group was tied, so that all advantages "
        f"were 0. If ties were independent ({percent(fmean(tied))} of the groups are tied), {percent(expected)} of "
        "the steps would be idle. Check whether the reward (--reward) depends on something that changes from step "
        "to step."
    )


def _has_been_right(run: RunSnapshot) -> bool:
    """Return whether the accuracy of any evaluation was above HARDLY_ANY."""
    return any(e["accuracy"] > HARDLY_ANY for e in (*run.evals, *run.tests))
