"""Log-probabilities in one call."""

from grpo.scoring.attention.packed import enable
from grpo.scoring.scorer import DENSE, Scorer

SHARING = Scorer(shares_prompts=True, fuses_output=True)


def scorer_for(model, shared=True):
    """Return the scorer with all shortcuts, enabled in the model, or the one without any."""
    if shared:
        enable(model)
    return SHARING if shared else DENSE


def logprobs_of(model, tokens, temperature=1.0, shared=True):
    """Return log-probabilities of the completions' tokens, (B, C)."""
    return scorer_for(model, shared).logprobs(model, tokens, temperature)


def scores_of(model, tokens, temperature=1.0, shared=True, entropy_gradient=False):
    """Return log-probabilities and entropies of the completions' tokens, (B, C) each."""
    return scorer_for(model, shared).scores(model, tokens, temperature, True, entropy_gradient)
