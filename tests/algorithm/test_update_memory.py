"""Memory that runs out at any operation of an update: the update is repeated and has the same result."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.algorithm.loss import StepSizes
from grpo.algorithm.schedules import StepSettings
from grpo.algorithm.update import Batch, Updater
from grpo.model_card import resolve
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.scoring.scorer import DENSE
from tests.helpers import zoo
from tests.helpers.models import ragged_tokens

SETTINGS = StepSettings(learning_rate=1e-3, beta=0.1, num_generations=2)


class FailsOnce(TorchDispatchMode):
    """Note the operations, and let memory run out once, in place of operation number `at`, counted from 1."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.operations = at, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        if len(self.operations) == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "every", [pytest.param(False, id="kind"), pytest.param(True, id="number", marks=pytest.mark.slow)]
)
def test_an_update_in_which_memory_runs_out_at_an_operation_of_every_is_repeated_with_the_same_result(every):
    torch.manual_seed(0)
    model = zoo.random_model("llama", num_hidden_layers=1, vocab_size=50)
    tokens = ragged_tokens((5, 7), num_generations=2, columns=3)
    rows = len(tokens.completion_ids)
    microbatch = AdaptiveMicrobatch("the update", rows, tokens.num_generations)
    updater = Updater(model, resolve({"model": "starter"}), DENSE, microbatch)
    ref_logprobs = DENSE.logprobs(model, tokens, 1.0).detach() - 0.1
    sizes = StepSizes(rows, int(tokens.completion_mask.sum()), 3)
    batch = Batch(tokens, torch.linspace(-1, 1, rows), sizes, ref_logprobs)
    updater(batch, SETTINGS)  # so that the optimizer has counted a step, and its moments are not 0
    weights, optimizer = copy.deepcopy((model.state_dict(), updater.optimizer.state_dict()))

    def updated(rows_per_pass: int, mode: FailsOnce) -> list[torch.Tensor]:
        model.load_state_dict(weights)
        updater.optimizer.load_state_dict(copy.deepcopy(optimizer))
        microbatch.rows = rows_per_pass
        with mode:
            updater(batch, SETTINGS)
        moments = [value for entry in updater.optimizer.state.values() for value in entry.values()]
        return [x.clone() for x in (*model.parameters(), *moments)]

    undisturbed = FailsOnce()
    with_all_rows = updated(rows, undisturbed)
    with_half = updated(rows // 2, FailsOnce())
    names = undisturbed.operations
    last = len(names) - names[::-1].index("aten._fused_adamw_.default")  # what follows it need not be repeated
    places = range(1, last + 1) if every else sorted({name: i for i, name in enumerate(names[:last], 1)}.values())
    assert last in places
    for at in places:
        actual = updated(rows, FailsOnce(at))
        assert all(map(torch.equal, actual, with_half)), f"operation {at} of {len(names)}, {names[at - 1]}"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(with_all_rows, with_half, strict=True))
