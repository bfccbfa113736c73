"""For any number of steps, peak and bounds the schedule is what its definition says, at every step."""
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from cifar_fastai.callback.schedule import one_cycle_lr

rates = st.floats(1e-9, 10, allow_nan=False)

@st.composite
def cycles(draw):
    n_steps = draw(st.integers(2, 2400))
    lr_min, lr_max = sorted((draw(rates), draw(rates)))
    assume(lr_min < lr_max)
    return n_steps, draw(st.integers(0, n_steps - 2)), lr_min, lr_max, draw(st.sampled_from(['linear', 'cos']))

def rates_of(n_steps, peak, *how): return np.array([one_cycle_lr(step, n_steps, peak, *how) for step in range(n_steps)])

many = settings(max_examples=500, deadline=None, derandomize=True, database=None)

@many
@given(cycles())
def test_it_is_straight_lines_or_half_cosines_through_three_points(cycle):
    "The first and the last step at `lr_min`, the peak at `lr_max`, also when it is the first step"
    n_steps, peak, lr_min, lr_max, anneal = cycle
    corners = [peak, n_steps - 1] if peak == 0 else [0, peak, n_steps - 1]
    heights = np.array([1, 0] if peak == 0 else [0, 1, 0])
    if anneal == 'linear': height = np.interp(range(n_steps), corners, heights)
    else: height = np.cos(np.interp(range(n_steps), corners, np.arange(len(corners))*np.pi + np.pi*(1 - heights[0])))/2 + .5
    np.testing.assert_allclose(rates_of(*cycle), lr_min + (lr_max - lr_min)*height, rtol=1e-9, atol=1e-14)

@many
@given(cycles())
def test_it_never_leaves_the_bounds_and_reaches_them_exactly(cycle):
    n_steps, peak, lr_min, lr_max, _ = cycle
    lrs = rates_of(*cycle)
    assert lrs[peak] == lr_max and lrs[-1] == lr_min and lrs[0] == (lr_min if peak else lr_max)
    assert lr_min <= lrs.min() and lrs.max() <= lr_max

@many
@given(cycles())
def test_it_rises_to_the_peak_and_falls_behind_it(cycle):
    steps, peak = np.diff(rates_of(*cycle)), cycle[1]
    assert (steps[:peak] >= 0).all() and (steps[peak:] <= 0).all()

@pytest.mark.parametrize('steps', [2, 3, 10])
def test_the_shortest_cycles_have_both_bounds(steps):
    lrs = rates_of(steps, 0, .1, 1., 'linear')
    assert lrs[0] == 1. and lrs[-1] == .1
