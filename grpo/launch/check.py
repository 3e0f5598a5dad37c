"""`train_grpo.py --check`: print the settings, a prompt, rewards, and the expected time and memory of a run.

To measure time and memory, it takes one step of GRPO, and one step of SFT if the run has SFT, and evaluates some
validation problems. The steps are thrown away, and nothing is written.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.evaluation.evaluator import SAMPLES_PER_K, SKILL_PROBLEMS, Evaluator
from grpo.generation.greedy import ROWS_PER_PASS
from grpo.launch.outlook import look_closer, outlook, try_settings, way_out
from grpo.report.opening import introduce, show_shares, show_trials
from grpo.runtime.console import duration, printable, say
from grpo.runtime.device import TRAITS
from grpo.sft import SupervisedTrainer
from grpo.step_probe import measured_step
from tasks.base import Problem, Task
from tasks.common.prompts import after_opening, ideal_completion
from tasks.common.shots import solved_problem
from tasks.rewards.scoring import score

TIMED_PROBLEMS = 64  # validation problems that are evaluated to measure the time of an evaluation


def check(grpo: GRPO, evaluator: Evaluator, environment: Mapping[str, Any], started: float) -> None:
    """Print settings, a prompt, a solution and a wrong answer with their rewards, and the expected time and memory.

    `started` is the `time.monotonic()` at which the launch began; the time since then counts as loading.
    """
    lm = grpo.sampler.lm
    loading = time.monotonic() - started
    introduce(grpo.config, lm, environment, grpo.sampler.task.notes)
    show_examples(grpo)
    shares, _ = outlook(grpo, grpo.config)
    show_shares(shares)
    trials = try_settings(grpo, look_closer(grpo, shares))
    show_trials(trials, way_out(grpo.config, trials), grpo.ranks.script)
    parts = {"loading": loading, **expected_seconds(grpo, evaluator)}
    details = ",  ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    say("\nEstimate, from a step that was measured and thrown away:")
    say(f"  a step {duration(parts['steps'] / grpo.config.num_iterations, decimals=True)}")
    say(f"  the run about {duration(sum(parts.values()))}:  {details}")
    if memory := TRAITS[lm.model.device.type].peak_memory(lm.model.device):
        say(f"  the largest amount of memory so far: {memory / 2**20:,.0f} MiB")
    say("Later steps are slower if completions become longer. Nothing was trained, and nothing was written.")


def show_examples(grpo: GRPO) -> None:
    """Print a training problem's prompt as the model gets it, and the rewards of a solution and of a wrong answer."""
    lm, task, seed = grpo.sampler.lm, grpo.sampler.task, grpo.config.seed
    try:
        problem, solution = solved_problem(task, seed, 1, 0)
    except ValueError:  # the task does not know a right completion for these problems
        problem, solution = task.training_problem(seed, 1, 0), None
    [prompt] = lm.prompts([task.messages(problem.question)])
    say(f"A prompt, {len(prompt)} tokens:")
    for line in lm.decode([prompt])[0].rstrip("\n").split("\n"):
        say(f"  {printable(line)}")
    for name, completion in (("A solution", solution), ("A wrong answer", wrong_answer(task, problem))):
        if completion is None:
            say(f"{name} to this problem is not known.")
        else:
            say(f"{name}, {_length_and_reward(grpo, problem, completion)}:\n  {printable(completion)}")
    say()


def wrong_answer(task: Task, problem: Problem) -> str | None:
    """Return a well-formed completion that the task grades as wrong; None if no candidate is both."""
    for answer in (f"{problem.answer}0", "1", "2", "wrong"):
        completion = after_opening(ideal_completion(answer, task.style, ""), task.opening)
        attempt = task.grade(problem, completion)
        if attempt.well_formed and not attempt.correct:
            return completion
    return None


def _length_and_reward(grpo: GRPO, problem: Problem, completion: str) -> str:
    """Return a text with the length of a completion in tokens, its reward, and the parts of the reward."""
    limit = grpo.config.max_new_tokens
    ids = grpo.sampler.lm.completion(completion)
    attempts = [grpo.sampler.task.grade(problem, completion)]
    [reward] = score(grpo.sampler.rewards, attempts, {"completion_ids": [ids]})
    parts = ", ".join(f"{printable(name)} {'-' if n is None else f'{n:.2f}'}" for name, n in reward.parts.items())
    total = "none" if reward.total is None else f"{reward.total:.2f}"
    beyond = f" (more than --max-new-tokens {limit})" if len(ids) > limit else ""
    return f"{len(ids)} tokens{beyond}, reward {total} ({parts})"


def expected_seconds(grpo: GRPO, evaluator: Evaluator) -> dict[str, float]:
    """Return the expected seconds of each part of a run; to measure them, take a step and evaluate some problems.

    The step changes the policy, so call this function last.
    """
    c, lm, task = grpo.config, grpo.sampler.lm, grpo.sampler.task
    expected = {}
    if c.sft_steps:
        supervised = SupervisedTrainer(c, lm, task, grpo.update)
        expected["SFT"] = c.sft_steps * _seconds(lambda: supervised.step(1))
    _, entry = measured_step(grpo, 1)
    expected["steps"] = c.num_iterations * entry["time/total"]
    validation, test = evaluator.problems("validation"), evaluator.problems("test")
    timed = validation[:TIMED_PROBLEMS]
    seconds = _seconds(lambda: evaluator.evaluate(lm, task, timed))

    def evaluation(problems: int) -> float:
        """Return the expected seconds of an evaluation: proportional to its passes on a GPU, else to its rows."""
        is_gpu = TRAITS[lm.model.device.type].is_queued
        return seconds * (-(-problems // ROWS_PER_PASS) if is_gpu else problems / len(timed))

    evaluations = 1 + -(-c.num_iterations // c.eval_every)
    expected["validation"] = evaluations * evaluation(len(validation))
    expected["test"] = 2 * evaluation(len(test) + SKILL_PROBLEMS * len(evaluator.skills))
    if c.pass_at_k:
        seconds_per_row = entry["time/sample"] / (c.batch_size * c.num_generations)
        expected["pass@k"] = 2 * seconds_per_row * SAMPLES_PER_K * c.pass_at_k * len(test)
    return expected


def _seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
