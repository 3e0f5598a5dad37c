"""Count the floating-point operations of an inner update with the shared prefix, for real tokens only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a Llama-shaped model (gated MLP, grouped queries) that decide how much it computes."""

    layers: int
    hidden: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads, and of all value heads
    inner: int  # width of the MLP
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Return the dimensions in a model's configuration in transformers."""
        head = config.head_dim or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads * head,
            config.num_key_value_heads * head,
            config.intermediate_size,
            config.vocab_size,
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return (in, out) of each matrix of a layer: queries, keys, values, output, gate, up, down."""
        h, q, k, f = self.hidden, self.queries, self.keys, self.inner
        return [(h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h)]


def update_flops(of: Dimensions, prompts: Sequence[int], completions: Sequence[int], common: int = 0) -> int:
    """Return the operations of an inner update, forward and backward, with the prompt of each group run once.

        6 · M · (T_p + T_c)  +  6 · h · V · (N + T_c)  +  12 · L · q · K

    `prompts` are the lengths P_i of the N prompts, `completions` the lengths C_j of the completions, group-major.

    Matrices: for each token, a weight is in one multiplication and one addition of the forward pass, and in two of
    each of the backward pass, 6 operations together. M is the number of weights in the matrices of all L layers; the
    embedding is looked up and does not count. T_p = Σ P_i, where the S = `common` tokens that all prompts begin with
    count once. T_c = Σ (C_j − 1), because the last token of a completion is not run.

    Output layer: h × V weights, run where a token is predicted, once after each prompt and on the T_c tokens.

    Attention: for each layer and each pair of a query and a key that it attends to, q multiplications and additions
    for the score and as many for the sum of values, 4q together; three times as many with the backward pass. K is the
    number of pairs: P(P + 1) / 2 in a prompt, and P + i for the i-th token that is run of a completion (from 1).

    Norms, rotations, softmax, loss and optimizer are left out, so the share of the machine's rate is not overstated.
    """
    group = len(completions) // len(prompts)
    run = [length - 1 for length in completions]
    weights = of.layers * sum(a * b for a, b in of.matrices)
    repeated = (len(prompts) - 1) * common
    pairs = sum(p * (p + 1) // 2 for p in prompts) - (len(prompts) - 1) * common * (common + 1) // 2
    pairs += sum(n * prompts[j // group] + n * (n + 1) // 2 for j, n in enumerate(run))
    return (
        6 * weights * (sum(prompts) - repeated + sum(run))
        + 6 * of.hidden * of.vocabulary * (len(prompts) + sum(run))
        + 12 * of.layers * of.queries * pairs
    )
