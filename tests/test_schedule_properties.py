"""For any epochs, batches, peak and bounds the schedule is what its definition says, at every step."""
import math

import pytest
from hypothesis import assume, given, settings, strategies as st

from cifar_fastai.schedule import OneCycle, one_cycle_lr

rates = st.floats(1e-9, 10, allow_nan=False)

@st.composite
def cycles(draw):
    n_epoch, n_batch = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    peak_epoch = draw(st.floats(0, n_epoch, exclude_min=True, exclude_max=True))
    lr_min, lr_max = sorted((draw(rates), draw(rates)))
    assume(lr_min < lr_max and n_epoch*n_batch >= 2)
    return n_epoch, n_batch, peak_epoch, lr_min, lr_max, draw(st.sampled_from(['linear', 'cos']))

class _Dls:
    def __init__(self, n_batch): self.train = range(n_batch)

class _Learn:
    "As much of a Learner as the schedule asks for"
    def __init__(self, n_epoch, n_batch): self.n_epoch, self.dls = n_epoch, _Dls(n_batch)

def rates_of(n_epoch, n_batch, peak_epoch, lr_min, lr_max, anneal):
    "The peak's step and the rate of every step, as the callback computes them"
    cycle = OneCycle(lr_min, lr_max, peak_epoch, anneal)
    cycle.learn = _Learn(n_epoch, n_batch)
    cycle.before_fit()
    return cycle.peak_step, [cycle.lr_at(step) for step in range(n_epoch*n_batch)]

many = settings(max_examples=500, deadline=None, derandomize=True, database=None)

@many
@given(cycles())
def test_the_peak_is_at_the_last_step_of_its_epoch(cycle):
    n_epoch, n_batch, peak_epoch, lr_min, lr_max, _ = cycle
    peak, lrs = rates_of(*cycle)
    want = round(peak_epoch*n_batch) - 1
    assert peak == min(max(want, 0), n_epoch*n_batch - 2) and lrs[peak] == lr_max

@many
@given(cycles())
def test_it_begins_and_ends_at_the_lower_bound_and_never_leaves_the_bounds(cycle):
    _, _, _, lr_min, lr_max, _ = cycle
    peak, lrs = rates_of(*cycle)
    assert lrs[-1] == lr_min and lrs[0] == (lr_min if peak > 0 else lr_max)
    assert all(lr_min <= lr <= lr_max for lr in lrs)

@many
@given(cycles())
def test_it_rises_to_the_peak_and_falls_behind_it(cycle):
    peak, lrs = rates_of(*cycle)
    assert all(a <= b for a, b in zip(lrs[:peak], lrs[1:peak + 1])) and all(a >= b for a, b in zip(lrs[peak:], lrs[peak + 1:]))

@many
@given(cycles())
def test_it_is_a_straight_line_or_half_a_cosine_on_either_side(cycle):
    *_, lr_min, lr_max, anneal = cycle
    peak, lrs = rates_of(*cycle)
    for step, lr in enumerate(lrs):
        if step == peak: continue
        height = step/peak if step < peak else (len(lrs) - 1 - step)/(len(lrs) - 1 - peak)
        if anneal == 'cos': height = (1 - math.cos(math.pi*height))/2
        assert math.isclose(lr, lr_min + (lr_max - lr_min)*height, rel_tol=1e-9, abs_tol=1e-15)

@pytest.mark.parametrize('steps', [2, 3, 10])
def test_the_shortest_cycles_have_both_bounds(steps):
    lrs = [one_cycle_lr(step, steps, 0, .1, 1.) for step in range(steps)]
    assert lrs[0] == 1. and lrs[-1] == .1
