"""The learning rate to the step, what a fit refuses, and a range test that leaves no trace."""
import gc, math, random, re
from copy import deepcopy
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.optimizer import Adam, OptimWrapper
from fastai.vision.all import SGD, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner, ProgressCallback, accuracy, set_seed
from torch import nn

from cifar_fastai.core import recipes
from cifar_fastai.callback.schedule import (LRBounds, OneCycle, bounds_from, find_edge, lr_bounds, one_cycle_lr,
                                            plot_range_test, range_test)

# ---- the definition

def cycle(n_epoch, n_batch, peak_epoch, lr_min, lr_max, anneal='linear'):
    "The rates of a fit, from the words of the definition and with one step after the other"
    n_steps, peak = n_epoch*n_batch, round(peak_epoch*n_batch) - 1
    shape = (lambda h: h) if anneal == 'linear' else (lambda h: (1 - math.cos(math.pi*h))/2)
    up = [lr_min + (lr_max - lr_min)*shape(h) for h in np.linspace(0, 1, peak + 1)]
    down = [lr_min + (lr_max - lr_min)*shape(h) for h in np.linspace(1, 0, n_steps - peak)]
    return up[:-1] + down

def lrs_of(n_steps, peak_step, lr_min=.01, lr_max=1, anneal='linear'):
    return [one_cycle_lr(step, n_steps, peak_step, lr_min, lr_max, anneal) for step in range(n_steps)]

anneals = pytest.mark.parametrize('anneal', ['linear', 'cos'])

@anneals
def test_every_cycle_is_the_definition(anneal):
    rng = random.Random(0)
    for _ in range(300):
        n_epoch, n_batch = rng.randint(1, 30), rng.randint(1, 100)
        peak_epoch = rng.choice([n_epoch*5/24, rng.uniform(0, n_epoch), rng.randint(1, n_epoch)])
        lr_min = 10**rng.uniform(-8, 0)
        lr_max = lr_min*10**rng.uniform(.01, 4)
        n_steps, peak = n_epoch*n_batch, round(peak_epoch*n_batch) - 1
        if not 0 < peak < n_steps - 1: continue
        lrs = lrs_of(n_steps, peak, lr_min, lr_max, anneal)
        assert (lrs[0], lrs[peak], lrs[-1]) == (lr_min, lr_max, lr_min) # to the last bit
        assert all(lr_min <= lr <= lr_max for lr in lrs)
        assert lrs[:peak + 1] == sorted(lrs[:peak + 1]) and lrs[peak:] == sorted(lrs[peak:], reverse=True)
        assert lrs.count(lr_max) == 1 or anneal == 'cos'
        assert np.allclose(lrs, cycle(n_epoch, n_batch, peak_epoch, lr_min, lr_max, anneal), rtol=1e-9)

def test_linear_is_a_straight_line_and_cos_half_a_cosine():
    assert np.allclose(lrs_of(9, 4, 0, 4), [0, 1, 2, 3, 4, 3, 2, 1, 0])
    assert np.allclose(lrs_of(9, 4, 0, 4, 'cos'), [0, 2 - 2**.5, 2, 2 + 2**.5, 4, 2 + 2**.5, 2, 2 - 2**.5, 0])

@anneals
def test_a_peak_at_step_0_runs_at_lr_max(anneal):
    lrs = lrs_of(10, 0, anneal=anneal)
    assert lrs[0] == 1 and lrs[-1] == .01 and lrs == sorted(lrs, reverse=True)

@anneals
def test_a_cycle_of_one_or_two_steps_is_defined(anneal):
    assert lrs_of(1, 0, anneal=anneal) == [1]
    assert lrs_of(2, 0, anneal=anneal) == [1, .01]

def test_the_cycle_of_the_assignment_peaks_at_the_end_of_epoch_5_of_24():
    lrs = lrs_of(24*98, 5*98 - 1, .001, .02)
    assert lrs.index(.02) == 489 and lrs[0] == lrs[-1] == .001

# ---- in a fit

class Fit:
    "What a fit ran at: the rates of every group at each step, seen where the optimizer steps"
    def __init__(self, learn, n_epoch, *args, **kwargs):
        self.lrs = []
        class See(Callback):
            order = 1000
            def before_step(cb): self.lrs.append([h['lr'] for h in cb.opt.hypers])
        with learn.added_cbs(See()): learn.fit(n_epoch, *args, **kwargs)

def plain_learner(n_batch=5, opt_func=SGD, splitter=None, bs=4):
    "A plain fastai learner: is the first of three numbers positive?"
    set_seed(0)
    items = [(x, (x[0] > 0).long()) for x in torch.randn(bs*n_batch, 3)]
    dls = DataLoaders(DataLoader(items, bs=bs, shuffle=True), DataLoader(items, bs=bs))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func, metrics=accuracy, **(dict(splitter=splitter) if splitter else {})).remove_cbs(ProgressCallback)

def split(n):
    "A splitter into `n` groups"
    def splitter(model): return [list(m.parameters()) for m in [model[0], model[2], model[4]][:n - 1]] + [[p for m in list(model)[2*(n - 1):] for p in m.parameters()]]
    return splitter

opt_funcs = dict(SGD=partial(SGD, mom=.9), Adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.Adam))

@pytest.mark.parametrize('opt_func', opt_funcs)
@pytest.mark.parametrize('n_groups', [1, 2, 3])
def test_a_fit_runs_every_group_at_the_rate_of_its_step(opt_func, n_groups):
    learn = plain_learner(opt_func=opt_funcs[opt_func], splitter=split(n_groups))
    fit = Fit(learn, 4, cbs=OneCycle(.01, .1, peak_epoch=1.5, anneal='cos'))
    assert len(fit.lrs) == 20 and all(len(lrs) == n_groups for lrs in fit.lrs)
    expected = cycle(4, 5, 1.5, .01, .1, 'cos')
    for group in zip(*fit.lrs): assert np.allclose(group, expected)
    assert np.allclose(learn.recorder.lrs, expected)

@pytest.mark.parametrize('n_epoch, n_batch, peak_epoch, peak_step', [(24, 2, None, 9), (3, 5, None, 2), (3, 5, 1, 4), (3, 5, 2.5, 11), (3, 5, .1, 0), (2, 1, 1, 0),
                                                                     (1, 1, .5, 0), (1, 8, .5, 3), (3, 4, 2.99, 10)])
def test_the_last_step_of_peak_epoch_runs_at_lr_max(n_epoch, n_batch, peak_epoch, peak_step):
    lrs = [lrs[0] for lrs in Fit(plain_learner(n_batch), n_epoch, cbs=OneCycle(.01, .1, peak_epoch)).lrs]
    assert len(lrs) == n_epoch*n_batch
    assert lrs.index(max(lrs)) == peak_step and max(lrs) == .1
    assert all(.01 <= lr <= .1 for lr in lrs)
    if len(lrs) > 1: assert lrs[-1] == .01
    if peak_step > 0: assert lrs[0] == .01

@pytest.mark.parametrize('anneal', ['linear', 'cos'])
@pytest.mark.parametrize('lr_start', [.002, .01, .05, .1])
def test_the_first_step_may_have_a_rate_of_its_own(lr_start, anneal):
    lrs = [lrs[0] for lrs in Fit(plain_learner(), 4, cbs=OneCycle(.01, .1, 1.6, anneal, lr_start)).lrs]
    without = cycle(4, 5, 1.6, .01, .1, anneal)
    peak = 7
    assert lrs[0] == lr_start and lrs[peak] == .1 and lrs[-1] == .01
    assert np.allclose(lrs[peak:], without[peak:]) # only the rise differs
    assert np.allclose((np.array(lrs[:peak]) - lr_start)*(.1 - .01), (np.array(without[:peak]) - .01)*(.1 - lr_start)) # of the same shape

def test_the_bounds_of_lr_bounds_can_be_unpacked_into_it():
    cycle = OneCycle(*LRBounds(.01, .1))
    assert (cycle.lr_min, cycle.lr_max) == (.01, .1)

def test_a_second_fit_runs_the_cycle_from_its_start():
    learn, one_cycle = plain_learner(), OneCycle(.01, .1)
    assert Fit(learn, 2, cbs=one_cycle).lrs == Fit(learn, 2, cbs=one_cycle).lrs

def test_the_recorder_plots_the_schedule():
    learn = plain_learner()
    Fit(learn, 2, cbs=OneCycle(.01, .1))
    learn.recorder.plot_sched()
    [line] = plt.gcf().axes[0].lines
    assert np.allclose(line.get_ydata(), cycle(2, 5, 2*5/24, .01, .1))

# ---- refusals

@pytest.mark.parametrize('args, message', [
    ((0, .1), 'lr_min is 0'), ((-.1, .1), 'lr_min is -0.1'), ((math.nan, .1), 'lr_min is nan'), ((.01, math.inf), 'lr_max is inf'), ((.01, 0), 'lr_max is 0'),
    ((.01, math.nan), 'lr_max is nan'), ((.1, .1), r'lr_min is 0\.1\b.*lr_max'), ((.2, .1), r'lr_min is 0\.2\b.*lr_max'), ((.01, .1, 1, 'step'), "anneal is 'step'"),
    ((.01, .1, 1, 'linear', 0), 'lr_start is 0'), ((.01, .1, 1, 'linear', .2), r'lr_start is 0\.2\b.*lr_max'), ((.01, .1, 1, 'linear', math.nan), 'lr_start is nan')])
def test_rates_and_shapes_that_are_invalid_are_refused_when_it_is_made(args, message):
    with pytest.raises(ValueError, match=message): OneCycle(*args)

@pytest.mark.parametrize('peak_epoch', [0, -1, 2, 2.5, math.nan, math.inf])
def test_a_peak_outside_the_fit_is_refused_before_the_first_step(peak_epoch):
    learn = plain_learner()
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=rf'peak_epoch.* {re.escape(str(peak_epoch))}\b.*epochs.*\b2\b'):
        Fit(learn, 2, cbs=OneCycle(.01, .1, peak_epoch))
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())

# ---- the range test

def states(learn):
    "Everything that a range test may not change"
    dl = learn.dls.train
    return deepcopy(dict(
        weights=learn.model.state_dict(), modes=[m.training for m in learn.model.modules()], grads=[p.requires_grad for p in learn.model.parameters()],
        opt=learn.opt and learn.opt.state_dict(), has_opt=learn.opt is None, random=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state(),
        rng=dl.rng.getstate(), epoch=getattr(dl, 'epoch', None), model_dir=learn.model_dir, cbs=sorted(type(cb).__name__ for cb in learn.cbs),
        recorder={k: v for k, v in learn.recorder.__dict__.items() if k in ('lrs', 'losses', 'values', 'iters', 'history')}))

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, L)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)): return bool((a == b).all())
    return a == b

quick = dict(start_lr=1e-4, end_lr=100, num_it=20)

@pytest.mark.parametrize('fitted', [False, True], ids=['before a fit', 'after a fit'])
@pytest.mark.parametrize('kind', ['tiny_learner', 'plain'])
def test_a_range_test_leaves_no_trace(kind, fitted, request, folder_of_its_own):
    learn = plain_learner(opt_func=Adam) if kind == 'plain' else request.getfixturevalue(kind)()
    if fitted: Fit(learn, 2, .01)
    learn.model[0].eval()
    before, n_hooks = states(learn), sum(len(m._forward_hooks) for m in learn.model.modules())
    lrs, losses = range_test(learn, **quick)
    assert len(lrs) > 5
    after = states(learn)
    assert [k for k in before if not same(before[k], after[k])] == []
    assert list(folder_of_its_own.iterdir()) == []
    assert n_hooks == sum(len(m._forward_hooks) for m in learn.model.modules())

@pytest.mark.parametrize('kind', ['tiny_learner', 'plain'])
def test_training_after_a_range_test_is_what_it_would_have_been(kind, request):
    def trained(tested):
        learn = plain_learner(opt_func=Adam) if kind == 'plain' else request.getfixturevalue(kind)()
        Fit(learn, 1, .01) # an optimizer with a state
        if tested: range_test(learn, **quick)
        Fit(learn, 1, .01)
        return learn.model.state_dict()
    assert same(trained(False), trained(True))

@pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning') # fastai's, of the temporary folder in ours
def test_a_range_test_that_fails_leaves_no_trace_either(tiny_learner, folder_of_its_own):
    class Break(Callback):
        def after_step(self):
            if self.train_iter == 3: raise RuntimeError('on purpose')
    learn = tiny_learner()
    Fit(learn, 1, .01)
    before = states(learn)
    with learn.added_cbs(Break()), pytest.raises(RuntimeError, match='on purpose'): range_test(learn, **quick)
    gc.collect()
    after = states(learn)
    assert [k for k in before if not same(before[k], after[k])] == []
    assert list(folder_of_its_own.iterdir()) == []

def test_the_rates_of_a_range_test_grow_by_a_constant_factor(tiny_learner):
    learn = tiny_learner()
    lrs, losses = range_test(learn, 1e-5, 1e-2, 30)
    assert len(lrs) == len(losses) == 30
    assert lrs[0] == pytest.approx(1e-5)
    assert np.allclose(np.diff(np.log(lrs)), np.log(1e3)/30)
    assert losses[0] == pytest.approx(math.log(10), rel=.3) # of an untrained network, one loss a step and no average

def test_a_range_test_ends_where_the_loss_is_no_longer_finite():
    class Explode(Callback):
        def after_loss(self):
            if self.train_iter == 8: self.learn.loss_grad, self.learn.loss = self.loss_grad*math.nan, self.loss*math.nan
    learn = plain_learner()
    with learn.added_cbs(Explode()): lrs, losses = range_test(learn, 1e-5, 1e-3, 20)
    assert len(lrs) == len(losses) == 8 and np.isfinite(losses).all()

# ---- the rule

steps = np.arange(100)
test_lrs = 1e-7*1e8**(steps/100)

def curve(falls_from=30, rises_from=70, bottom=.8, top=6., noise=0.):
    "A loss that is flat at 2.3, falls to `bottom` over 30 steps, and climbs to `top`"
    fall = np.clip((steps - falls_from)/30, 0, 1)
    rise = np.clip((steps - rises_from)/10, 0, None)**2
    return 2.3 - (2.3 - bottom)*fall + rise*(top - bottom)/9 + noise*np.random.default_rng(0).standard_normal(100)

def test_the_bounds_lie_where_the_rule_says():
    lr_min, lr_max = bounds_from(test_lrs, curve())
    edge = find_edge(test_lrs, curve())
    assert 70 <= edge <= 80
    assert lr_max == pytest.approx(test_lrs[edge]/3)
    assert lr_min == pytest.approx(test_lrs[45], rel=.25) # half-way down
    assert lr_min <= lr_max/10

def test_lr_min_is_at_most_a_tenth_of_lr_max():
    lr_min, lr_max = bounds_from(test_lrs, curve(falls_from=50, rises_from=70))
    assert lr_min == pytest.approx(lr_max/10)

def test_noise_moves_the_bounds_little():
    quiet, noisy = bounds_from(test_lrs, curve()), bounds_from(test_lrs, curve(noise=.1))
    assert all(.5 < a/b < 2 for a, b in zip(quiet, noisy))

def test_a_scaled_and_shifted_loss_has_the_same_bounds():
    assert bounds_from(test_lrs, curve()) == bounds_from(test_lrs, 10*curve())

@pytest.mark.parametrize('losses, reason', [(np.full(100, 2.3), 'fall'), (2.3 + steps/10, 'fall'), (curve(rises_from=200), 'rise')])
def test_a_curve_without_a_valley_is_refused_with_the_remedy(losses, reason):
    with pytest.raises(ValueError, match=f'loss.*{reason}.*lr_min.*lr_max'): bounds_from(test_lrs, losses)

@pytest.mark.parametrize('n', [0, 1, 3])
def test_a_test_that_broke_off_at_once_is_refused(n):
    with pytest.raises(ValueError, match='loss'): bounds_from(test_lrs[:n], curve()[:n])

def test_the_plot_shows_the_curve_and_both_bounds():
    bounds = bounds_from(test_lrs, curve())
    ax = plot_range_test(test_lrs, curve(), bounds)
    lines = {line.get_label(): line for line in ax.lines}
    for name, lr in zip(('LRMIN', 'LRMAX'), bounds): assert lines[f'{name} {lr:.2e}'].get_xdata()[0] == lr
    assert any(np.array_equal(line.get_ydata(), curve()) for line in ax.lines)
    assert ax.get_xscale() == 'log'

def test_lr_bounds_of_a_recipe_that_has_both_need_no_range_test():
    learn = plain_learner()
    learn.recipe = recipes['quick']
    before = states(learn)
    assert lr_bounds(learn) == (recipes['quick'].lr_min, recipes['quick'].lr_max) and not plt.get_fignums()
    assert [k for k, v in states(learn).items() if not same(before[k], v)] == []

def test_lr_bounds_are_found_by_a_real_range_test(folder_of_its_own):
    learn, test = plain_learner(20, Adam, bs=16), dict(start_lr=1e-4, end_lr=100, num_it=60)
    before = states(learn)
    bounds = lr_bounds(learn, **test)
    assert isinstance(bounds, LRBounds) and 1e-4 < bounds.lr_min <= bounds.lr_max/10 and bounds.lr_max < 10
    assert len(plt.get_fignums()) == 1
    assert lr_bounds(learn, **test, show_plot=False) == bounds # nothing moved
    assert len(plt.get_fignums()) == 1
    assert [k for k, v in states(learn).items() if not same(before[k], v)] == []
    assert list(folder_of_its_own.iterdir()) == []
    Fit(learn, 3, cbs=OneCycle(*bounds))
    assert learn.recorder.values[-1][-1] > .9 # what was found trains

def test_a_range_test_restores_an_optimizer_that_was_given_as_an_object(small_dls, tiny_net):
    model = tiny_net()
    opt = OptimWrapper(opt=torch.optim.Adam(model.parameters(), 1e-3))
    learn = Learner(small_dls(), model, CrossEntropyLossFlat(), opt).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, 2e-3)
    before = deepcopy(opt.state_dict())
    range_test(learn, **quick)
    after = opt.state_dict()
    assert after['param_groups'] == before['param_groups']
    for i, moments in before['state'].items():
        for name, t in moments.items(): assert torch.equal(after['state'][i][name], t)
