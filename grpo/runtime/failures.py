"""Messages for users when memory runs out or another process ends."""

from collections.abc import Iterator
from contextlib import contextmanager

from grpo.runtime.microbatch import is_out_of_memory
from grpo.runtime.ranks import is_peer_failure

RESUME_HINT = "The last checkpoint is good: the same command continues from it"


@contextmanager
def failures_in_words(model: str) -> Iterator[None]:
    """Raise ValueError with a message for users if memory runs out in the block, or if another process ends."""
    try:
        yield
    except MemoryError:
        raise ValueError(
            "a step does not fit into memory; lower --batch-size, --num-generations or --max-new-tokens"
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(f"{model} does not fit into memory; take a smaller one, or --device cpu") from None
        if is_peer_failure(error):
            raise ValueError(
                f"another process of this run has ended: look for its last message. {RESUME_HINT}"
            ) from None
        raise
