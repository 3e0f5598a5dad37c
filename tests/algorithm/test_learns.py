"""A toy task is learned in seconds by the very functions that training uses."""

import torch

from grpo.algorithm.advantages import group_advantages
from grpo.algorithm.schedules import StepSettings
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.scoring.tokens import Tokens, left_pad
from tests.helpers.models import tiny_model
from tests.helpers.rollouts import a_batch
from tests.helpers.scoring import scorer_for

CONFIG = TrainConfig(
    batch_size=4, num_generations=8, max_new_tokens=3, num_inner_updates=2, beta=0.0, learning_rate=2e-3
)
PROMPTS = [[10, 11], [12], [13, 14, 15], [16, 17, 18]]
ENDS = range(10)


def scores(completions, prompts):
    """Give 0.5 for a first token with the parity of the prompt's last token, and 0.5 for an end right after it."""
    wanted = torch.tensor([prompt[-1] % 2 for prompt in prompts]).repeat_interleave(CONFIG.num_generations)
    return 0.5 * (completions.ids[:, 0] % 2 == wanted) + 0.5 * (completions.ended & (completions.lengths == 2))


def test_grpo_learns_to_look_at_the_prompt_and_to_stop():
    model = tiny_model("llama")
    update = Updater(model, CONFIG, scorer_for(model), AdaptiveMicrobatch("the update", 32, 8))
    settings = StepSettings(CONFIG.learning_rate, CONFIG.num_generations, CONFIG.beta)
    ids, mask = left_pad(PROMPTS, 0, torch.device("cpu"))
    params = SamplingParams(CONFIG.max_new_tokens, ENDS, CONFIG.num_generations)
    generator, means = Generator(model), []
    for step in range(60):
        completions = generator(ids, mask, params, sampling_uniforms(0, step, 32, 3))
        rewards = scores(completions, PROMPTS)
        means.append(rewards.mean().item())
        advantages = group_advantages(rewards, CONFIG.num_generations)
        batch = a_batch(Tokens(ids, mask, completions.ids, completions.mask), advantages, 3)
        for _ in range(CONFIG.num_inner_updates):
            _, batch = update(batch, settings)
    assert sum(means[:5]) / 5 < 0.6
    assert sum(means[-5:]) / 5 > 0.95
