"""Tell users in plain words that memory ran out or that another process ended."""

from collections.abc import Iterator
from contextlib import contextmanager

from grpo.runtime.device import is_out_of_memory
from grpo.runtime.ranks import is_peer_failure

RESUME_HINT = "The last checkpoint is intact: the same command continues from it"


@contextmanager
def failures_in_words(model: str) -> Iterator[None]:
    """Raise a ValueError that tells users what to do, if memory runs out in the block or another process ends."""
    try:
        yield
    except MemoryError:
        raise ValueError(
            "a step does not fit into memory; lower --batch-size, --num-generations or --max-new-tokens"
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(f"{model} does not fit into memory; use a smaller model, or --device cpu") from None
        if is_peer_failure(error):
            raise ValueError(
                f"another process of this run has ended: look for its last message. {RESUME_HINT}"
            ) from None
        raise
