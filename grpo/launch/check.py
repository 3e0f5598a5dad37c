"""`train_grpo.py --check`: what a run would work with, and how long it would take. Trains and writes nothing.

Time and memory are measured: one step of GRPO, and one of SFT if there are any, are taken and thrown away, and some
problems are evaluated. Completions that grow longer in training make later steps slower.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.evaluation.evaluator import SAMPLES_PER_K, SKILL_PROBLEMS, Evaluator
from grpo.generation.greedy import ROWS_PER_PASS
from grpo.launch.outlook import outlook
from grpo.report.opening import introduce, show_shares
from grpo.runtime.console import duration, printable, say
from grpo.runtime.device import peak_memory
from grpo.sft import SupervisedTrainer
from grpo.step_probe import measured_step
from tasks.base import Problem
from tasks.common.prompts import ideal_completion
from tasks.common.shots import solved_problem
from tasks.rewards.scoring import score

EVALUATED = 64  # problems that are timed


def check(grpo: GRPO, evaluator: Evaluator, environment: Mapping[str, Any], started: float) -> None:
    """Print settings, a prompt, a solution and a wrong answer with rewards, and the expected time and memory.

    `started` is the `time.monotonic()` at which the launch began: loading is part of a run.
    """
    lm = grpo.sampler.lm
    loading = time.monotonic() - started
    introduce(grpo.config, lm, environment, grpo.scorer, grpo.decoder)
    show_examples(grpo)
    found, _ = outlook(grpo, grpo.config)
    show_shares(found)
    parts = {"loading": loading, **expected_seconds(grpo, evaluator)}
    say("\nEstimate, from a step that was measured and thrown away:")
    say(f"  a step {parts['steps'] / grpo.config.num_iterations:.2g} s")
    say(f"  the run about {duration(sum(parts.values()))}:  " + ",  ".join(_said(*item) for item in parts.items()))
    if memory := peak_memory(lm.device):
        say(f"  at most {memory / 2**20:,.0f} MiB of memory so far")
    say("Later steps are slower where completions grow longer. Nothing was trained, and nothing was written.")


def _said(name: str, seconds: float) -> str:
    return f"{name} {duration(seconds)}"


def show_examples(grpo: GRPO) -> None:
    """Print a training problem's prompt as the model gets it, and what a solution and a wrong answer are paid."""
    c, lm, task = grpo.config, grpo.sampler.lm, grpo.sampler.task
    try:
        problem, solution = solved_problem(task, c.seed, 1, 0)
    except ValueError:  # of problems without a known answer, say
        problem, solution = task.training_problem(c.seed, 1, 0), None
    [prompt] = lm.prompts([task.messages(problem.question)])
    say(f"A prompt, {len(prompt)} tokens:")
    for line in lm.decode([prompt])[0].rstrip("\n").split("\n"):
        say(f"  {printable(line)}")
    wrong = wrong_answer(grpo, problem)
    for name, completion in (("A solution", solution), ("A wrong answer", wrong)):
        if completion is None:
            say(f"{name} of this problem is not known.")
        else:
            say(f"{name}, {_paid(grpo, problem, completion)}:\n  {printable(completion)}")
    say()


def wrong_answer(grpo: GRPO, problem: Problem) -> str | None:
    """Return a completion in the right form whose answer the task calls wrong; None if it calls none so."""
    task = grpo.sampler.task
    for answer in (f"{problem.answer}0", "1", "2", "wrong"):
        completion = ideal_completion(answer, task.style, "")
        attempt = task.grade(problem, completion)
        if attempt.well_formed and not attempt.correct:
            return completion
    return None


def _paid(grpo: GRPO, problem: Problem, completion: str) -> str:
    """Return in words how long a completion is, and its reward by part."""
    c, ids = grpo.config, grpo.sampler.lm.completion(completion)
    attempts = [grpo.sampler.task.grade(problem, completion)]
    [reward] = score(grpo.sampler.rewards, attempts, {"completion_ids": [ids]})
    parts = ", ".join(f"{printable(name)} {'-' if n is None else f'{n:.2f}'}" for name, n in reward.parts.items())
    total = "none" if reward.total is None else f"{reward.total:.2f}"
    beyond = f" (more than --max-new-tokens {c.max_new_tokens})" if len(ids) > c.max_new_tokens else ""
    return f"{len(ids)} tokens{beyond}, reward {total} ({parts})"


def expected_seconds(grpo: GRPO, evaluator: Evaluator) -> dict[str, float]:
    """Return the seconds that a run will spend on steps, evaluations and tests, from one step and some problems.

    The policy is that of one step later afterwards.
    """
    c, lm, task = grpo.config, grpo.sampler.lm, grpo.sampler.task
    expected = {}
    if c.sft_steps:
        supervised = SupervisedTrainer(c, lm, task, grpo.update)
        expected["SFT"] = c.sft_steps * _seconds(lambda: supervised.step(1))
    _, entry = measured_step(grpo, 1)
    expected["steps"] = c.num_iterations * entry["time/total"]
    validation, test = evaluator.problems("validation"), evaluator.problems("test")
    some = validation[:EVALUATED]
    seconds = _seconds(lambda: evaluator.evaluate(lm, task, some))

    def evaluation(problems: int) -> float:
        """A CPU takes as long as there are rows, an accelerator as there are passes."""
        return seconds * (problems / len(some) if lm.device.type == "cpu" else -(-problems // ROWS_PER_PASS))

    times = 1 + -(-c.num_iterations // c.eval_every)
    expected["validation"] = times * evaluation(len(validation))
    expected["test"] = 2 * evaluation(len(test) + SKILL_PROBLEMS * len(evaluator.skills))
    if c.pass_at_k:
        a_row = entry["time/sample"] / (c.batch_size * c.num_generations)
        expected["pass@k"] = 2 * a_row * SAMPLES_PER_K * c.pass_at_k * len(test)
    return expected


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
