"""A toy task is learned in seconds by the very functions that training uses."""

from dataclasses import replace

import torch

from grpo.advantages import group_advantages
from grpo.config import TrainConfig
from grpo.logprobs import Tokens
from grpo.sampling import generate, left_pad, token_noise
from grpo.update import Batch, inner_update
from tests.conftest import tiny_model

CONFIG = TrainConfig(batch_size=4, num_generations=8, max_new_tokens=3, num_inner_updates=2, beta=0.0)
PROMPTS = [[10, 11], [12], [13, 14, 15], [16, 17, 18]]
ENDS = range(10)


def scores(drawn, prompts):
    """Half for a first token of the parity of the prompt's last, half for ending right after it."""
    wanted = torch.tensor([prompt[-1] % 2 for prompt in prompts]).repeat_interleave(CONFIG.num_generations)
    return 0.5 * (drawn.ids[:, 0] % 2 == wanted) + 0.5 * (drawn.ended & (drawn.lengths == 2))


def test_grpo_learns_to_look_at_the_prompt_and_to_stop():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    ids, mask = left_pad(PROMPTS, 0, torch.device("cpu"))
    means = []
    for step in range(60):
        drawn = generate(
            model,
            ids,
            mask,
            num_generations=CONFIG.num_generations,
            max_new_tokens=CONFIG.max_new_tokens,
            end_ids=ENDS,
            noise=token_noise(0, step, 32, 3),
        )
        rewards = scores(drawn, PROMPTS)
        means.append(rewards.mean().item())
        advantages = group_advantages(rewards, CONFIG.num_generations)
        batch = Batch.of_step(Tokens(ids, mask, drawn.ids, drawn.mask), advantages)
        for _ in range(CONFIG.num_inner_updates):
            _, logprobs = inner_update(model, optimizer, batch, CONFIG, shared=True, limit=32)
            batch = batch if batch.old_logprobs is not None else replace(batch, old_logprobs=logprobs)
    assert sum(means[:5]) / 5 < 0.6
    assert sum(means[-5:]) / 5 > 0.95
