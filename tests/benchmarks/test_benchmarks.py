"""The parts of `python -m tests.benchmarks` that are arithmetic or text; TRL is not needed."""

import pytest
import torch
from transformers import AutoConfig

from grpo.model.loading import load
from grpo.model_card import STARTER
from tests.benchmarks import report
from tests.benchmarks.flops import Dimensions, update_flops
from tests.benchmarks.work import Digits, Size, Spec


def test_operations_of_an_update_by_hand():
    # One layer: hidden 4, queries 4, keys 2, MLP 8, vocabulary 10.
    # Weights: queries 16, keys 8, values 8, output 16, MLP 3 · 32 = 96; together 144.
    # One prompt of 3 tokens, two completions of 2 and 1: run are 3 + 1 + 0 = 4 tokens, 6 · 144 · 4 = 3456.
    # The head, 40 weights, predicts after the prompt and after the one token: 6 · 40 · 2 = 480.
    # Attention: the prompt has 1 + 2 + 3 pairs, the one token looks at 3 and itself, 4: 12 · 4 · 10 = 480.
    of = Dimensions(1, 4, 4, 2, 8, 10)
    assert update_flops(of, [3], [2, 1]) == 3456 + 480 + 480
    # two such prompts that begin with the same 2 tokens: 2 tokens and 1 + 2 pairs of them count once
    assert update_flops(of, [3, 3], [2, 1, 2, 1], common=2) == 2 * (3456 + 480 + 480) - 6 * 144 * 2 - 12 * 4 * 3


def test_the_weights_that_are_counted_are_those_of_the_model():
    of = Dimensions.of(AutoConfig.from_pretrained(STARTER))
    model = load("starter", torch.device("cpu")).model
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert of.layers * sum(a * b for a, b in of.matrices) == sum(p.numel() for p in matrices)
    assert of.hidden * of.vocabulary == model.lm_head.weight.numel()


def test_prompts_have_exactly_the_length_that_is_asked_for():
    lm, task = load("starter", torch.device("cpu")), Digits(length=40)
    problems = [task.training_problem(0, 1, row) for row in range(4)]
    assert {len(ids) for ids in lm.prompts([task.messages(p.question) for p in problems])} == {40}
    assert len({p.question for p in problems}) == 4


def test_the_settings_are_those_of_the_starter_in_the_size_of_the_spec():
    c = Spec(Size(4, 16, 150, 64)).config
    assert (c.batch_size, c.num_generations, c.max_new_tokens) == (4, 16, 64)
    assert (c.learning_rate, c.num_inner_updates) == (3e-6, 5)
    assert Spec(Size(4, 16, 0, 64), learning_rate=1e-5).config.learning_rate == 1e-5
    real = Spec(Size(8, 8, 0, 32), "smollm2", precision="bfloat16")
    assert (real.config.shots, real.config.num_inner_updates, real.config.precision) == (4, 2, "bfloat16")
    assert len(real.task.examples) == 2 * 4


def steps(*seconds):
    """Records of steps, all of them sampling but for 0.5 s."""
    counts = {
        "prompt_tokens": 10,
        "completion_tokens": 30,
        "completions": 4,
        "update_flops": 2e9,
        "update_seconds": 0.5,
    }
    phases = [{"sampling": s - 0.5, "update": 0.5} for s in seconds]
    return [{"seconds": s, "phases": p, "problems": [""], **counts} for s, p in zip(seconds, phases, strict=True)]


def test_a_summary_of_steps():
    result = report.summary(steps(1.0, 2.0, 3.0, 4.0), turns=2)
    assert result["seconds"] == [1.75, 2.5, 3.25]  # inclusive quartiles of 1, 2, 3, 4
    assert result["by_turn"] == [1.5, 3.5]
    assert result["phases"] == {"sampling": 2.0, "reward": 0.0, "scoring": 0.0, "update": 0.5}
    assert result["tokens_per_second"] == pytest.approx((20 + 40 / 3) / 2)  # of 40, 20, 40 / 3 and 10
    assert result["completion_length"] == 7.5
    assert result["update_rate"] == 4e9


def test_the_best_learning_rate_is_that_of_the_shortest_median():
    seconds = {1e-6: (9.0, 8.0, 7.0), 3e-6: (5.0, None, 6.0), 1e-5: (1.0, None, None)}
    runs = [{"who": "ours", "rate": rate, "done": s and {"seconds": s}} for rate, of in seconds.items() for s in of]
    assert report.fastest(runs, "ours") == [(3e-6, 6.0)]  # medians 8, 6, and none: two of three never arrive
    assert report.fastest(runs[-1:], "ours") == []


def test_the_report_says_everything(tmp_path):
    about = {"versions": {"torch": "2"}, "threads": 2, "weights": "float32", "cuda": "", "memory": 2**20}
    ours, trl = (
        report.summary(steps(*seconds), 2) | {"about": about, "memory": 3 * 2**20}
        for seconds in ((1.0, 1.0, 1.0, 1.0), (3.0, 3.0, 3.0, 3.0))
    )
    size = {"name": "N=1", "ours": ours, "TRL": trl, "rates": {"2×2×2": 1e9, "3×3×3": 8e9}}
    prefix = {"name": "batch", "shared": 0.1, "dense": 0.25, "quartiles": (2.4, 2.6), "bound": 2.75}
    end = {"step": 8, "seconds": 4.5, "accuracy": 0.97}
    race = [
        {"who": who, "rate": 1e-6, "seed": 0, "curve": [end], "done": end if who == "ours" else None}
        for who in ("ours", "TRL")
    ]
    hardware = {"cpu": "A CPU", "cores": 2, "device": "cpu"}
    results = {"hardware": hardware, "turns": 2, "steps": 2, "sizes": [size], "shared_prefix": [prefix], "race": race}
    text = report.markdown(results)
    for part in (
        "A CPU, 2 cores, 2 threads; float32 weights; torch 2",
        "3.00 (3.00 to 3.00)",  # three seconds beside one
        "| 4.0             | 8.0 (3×3×3)             | 50%   |",  # 2e9 in half a second, of the higher rate
        "2.50 (2.40 to 2.60)",
        "| 1e-06         | 0    | 4.5 s, step 8 | not in 8 steps |",
        "The best learning rate of each: ours 4.5 s (1e-06).",
    ):
        assert part in text
    assert report.plot(results, tmp_path / "plot.png").stat().st_size > 10_000
    del size["TRL"]
    assert "TRL |" not in report.markdown(results | {"race": []}).replace("TRL / ours", "")
