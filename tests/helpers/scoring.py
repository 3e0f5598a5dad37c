"""Log-probabilities in one call."""

from grpo.scoring.scorer import DENSE, Scorer

SHARING = Scorer(shares_prompts=True, fuses_output=True)


def scorer(shared=True):
    """Return the scorer with all shortcuts, or the one without any."""
    return SHARING if shared else DENSE


def logprobs_of(model, tokens, temperature=1.0, shared=True):
    """Return log-probabilities of the completions' tokens, (B, C)."""
    return scorer(shared).logprobs(model, tokens, temperature)


def scores_of(model, tokens, temperature=1.0, shared=True, entropy_gradient=False):
    """Return log-probabilities and entropies of the completions' tokens, (B, C) each."""
    return scorer(shared).logprobs_and_entropies(model, tokens, temperature, entropy_gradient)
