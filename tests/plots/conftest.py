"""A fixture for all tests of plots: warnings are failures."""

import warnings

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def _strict():
    """Make a warning of matplotlib or numpy (empty axes, a missing glyph) a failure; close figures after use."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")
