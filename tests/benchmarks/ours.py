"""The worker of this project: a step with its metrics, and the rate at which the machine multiplies matrices."""

import time
from statistics import fmean

import torch

from grpo.algorithm.grpo import GRPO
from grpo.model.language_model import LanguageModel
from grpo.runtime.device import TRAITS, keep_freed_memory, use_large_pages
from grpo.runtime.precision import precision
from grpo.scoring.tokens import shared_beginning, shared_from
from grpo.step_probe import measured_step
from tests.benchmarks.flops import Dimensions, update_flops
from tests.benchmarks.work import Channel, Spec, record

SQUARE = 2048  # rows and columns of the large square product
PHASES = {"sampling": "time/sample", "reward": "time/reward", "scoring": "time/reference"}


def rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """Return the operations a second of the fastest product (rows, columns) × (columns, out) within `seconds`."""
    rows, columns, out = shape
    a, b = torch.randn(rows, columns, device=device).to(dtype), torch.randn(out, columns, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b.T
        TRAITS[device.type].synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * columns * out / best


def rates(of: Dimensions, rows: int, lm: LanguageModel) -> dict[str, float]:
    """Return the machine's rates in the precision of training, for the model's shapes and for a large square."""
    dtype = getattr(torch, precision(lm.model))
    shapes = [(rows, *matrix) for matrix in dict.fromkeys(of.matrices)]
    shapes += [(rows, of.hidden, of.vocabulary), (SQUARE, SQUARE, SQUARE)]
    return {"×".join(map(str, shape)): rate(shape, dtype, lm.model.device) for shape in shapes}


def main() -> None:
    """Take turns until there are no more orders."""
    spec = Spec.of_arguments()
    if spec.device == "cpu":
        use_large_pages()
    config, task, lm = spec.config, spec.task, spec.language_model()
    if spec.device == "cpu":
        keep_freed_memory(lm.model.num_parameters())
    grpo, channel = GRPO(config, task, lm, spec.rewards), Channel(spec, lm)
    of, step, rows = Dimensions.of(lm.model.config), 0, 1
    channel.ready(shared=grpo.scorer.shares_prompts)
    while (order := channel.receive()) is not None:
        for step in range(step + 1, step + order["steps"] + 1):  # noqa: B020 (it counts on)
            start = time.perf_counter()
            outcome, metrics = measured_step(grpo, step)
            seconds = time.perf_counter() - start
            rollout = outcome.rollout
            prompts, completions = (
                mask.sum(-1).tolist() for mask in (rollout.tokens.prompt_mask, rollout.tokens.completion_mask)
            )
            common = shared_beginning(rollout.tokens.prompt_ids, rollout.tokens.prompt_mask, shared_from(lm.model))
            rows = sum(prompts) - (len(prompts) - 1) * common + sum(completions) - len(completions)
            channel.records.append(
                record(
                    seconds,
                    {phase: metrics[name] for phase, name in PHASES.items() if name in metrics},
                    prompts,
                    completions,
                    updates=config.num_inner_updates - metrics["skipped_updates"],
                    reward=fmean(reward.total for reward in rollout.rewards),
                    kl=metrics["kl"],
                    update_flops=config.num_inner_updates * update_flops(of, prompts, completions, common),
                    update_seconds=metrics["time/update"],
                    problems=[problem.question for problem in rollout.problems],
                )
            )
        # after the answer has its memory: the matrices must not count
        channel.answer(order, **({"rates": rates(of, rows, lm)} if order.get("rates") else {}))


if __name__ == "__main__":
    main()
