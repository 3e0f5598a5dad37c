"""The scale of an axis that begins at zero."""

import matplotlib.pyplot as plt
import numpy as np

from grpo.plots.style import from_zero


def test_an_axis_shows_values_below_zero_too():
    # Drift is an estimate, which may be negative.
    axes = plt.figure().subplots()
    from_zero(axes, np.array([0.0, -0.002, np.nan, 0.01]))
    low, high = axes.get_ylim()
    assert low < -0.002
    assert high > 0.01
    from_zero(axes, np.array([0.0, 0.01]))
    assert axes.get_ylim()[0] == 0
    plt.close(axes.figure)
