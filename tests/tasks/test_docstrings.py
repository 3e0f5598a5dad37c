"""The examples in docstrings, run as doctests."""

import doctest
import importlib
import pkgutil

import pytest

import tasks

TASK_MODULES = [module.name for module in pkgutil.walk_packages(tasks.__path__, "tasks.")]


@pytest.mark.parametrize("name", [*TASK_MODULES, "grpo.runtime.console"])
def test_the_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_where_they_help_most():
    for name in ("tasks.common.parsing", "tasks.common.prompts", "tasks.gsm8k", "grpo.runtime.console"):
        assert doctest.testmod(importlib.import_module(name)).attempted > 0
