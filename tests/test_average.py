"""Lookahead: its average against the definition, alone, in plain fastai, in a range test and across an interruption."""
import pickle

import numpy as np
import pytest
import torch
from fastai.vision.all import Adam, Callback, EarlyStoppingCallback, GradientAccumulation, Learner, ProgressCallback, ShortEpochCallback
from torch import nn

from cifar_fastai.callback.average import Lookahead
from cifar_fastai.callback.checkpoint import Checkpoints, checkpoints_in, read_checkpoint, write_checkpoint
from cifar_fastai.callback.schedule import OneCycle, range_test

class Follow(Callback):
    "Record the weights before and after `Lookahead` in each step"
    def __init__(self, order): self.order, self.seen = order, []
    def after_step(self): self.seen.append(weights(self.learn))

def weights(learn): return {name: t.clone().double().numpy() for name, t in learn.model.state_dict().items() if t.is_floating_point()}

def fit(learn, epochs, *cbs, **kwargs):
    with learn.no_logging(): learn.fit(epochs, 1e-2, cbs=list(cbs), **kwargs)

def same(a, b): return all(np.array_equal(t, b[name]) for name, t in a.items())

@pytest.mark.parametrize('every, decay', [(1, .5), (2, .9), (5, .95**5), (7, .8)])
def test_the_average_is_the_one_of_its_definition(tiny_learner, every, decay):
    learn, before, after = tiny_learner(), Follow(4), Follow(6)
    average = weights(learn)
    fit(learn, 3, Lookahead(every, decay), before, after)
    n_steps = len(before.seen)
    assert n_steps == 3*len(learn.dls.train)
    for step, (fast, result) in enumerate(zip(before.seen, after.seen), 1):
        if step % every == 0:
            share = decay*(step/n_steps)**3
            average = {name: share*t + (1 - share)*fast[name] for name, t in average.items()}
        is_average = step % every == 0 or step == n_steps
        for name, t in result.items(): assert np.allclose(t, (average if is_average else fast)[name], rtol=1e-5, atol=1e-7), (step, name)
    assert same(weights(learn), after.seen[-1])

def test_statistics_of_norms_are_averaged_and_counts_are_not(tiny_learner):
    learn = tiny_learner()
    fit(learn, 2, Lookahead(2))
    counts = [m.num_batches_tracked.item() for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts and set(counts) == {2*len(learn.dls.train)}

def test_it_works_in_plain_fastai(small_dls):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(small_dls(), model, nn.CrossEntropyLoss(), Adam).remove_cb(ProgressCallback)
    plain = weights(learn)
    fit(learn, 2, Lookahead(3))
    assert not same(weights(learn), plain)

def test_a_second_fit_begins_with_the_weights_of_its_own(tiny_learner):
    one, two, lookahead = tiny_learner(), tiny_learner(), Lookahead(2)
    fit(one, 1, lookahead); fit(one, 1, lookahead)
    fit(two, 1, Lookahead(2)); fit(two, 1, Lookahead(2))
    assert same(weights(one), weights(two))

def test_a_fit_of_fewer_steps_than_the_interval_trains(tiny_learner):
    learn = tiny_learner()
    before = weights(learn)
    fit(learn, 1, Lookahead(len(learn.dls.train) + 1))
    assert not same(before, weights(learn))

def test_a_range_test_averages_nothing(tiny_learner):
    plain, other = tiny_learner(), tiny_learner()
    other.add_cb(Lookahead(1))
    assert (range_test(plain, num_it=6)[1] == range_test(other, num_it=6)[1]).all()

@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_a_fit_that_is_resumed_ends_with_the_same_weights(same_when_resumed, epoch):
    same_when_resumed(epoch, lambda folder, resume: (OneCycle(1e-3, 2e-2), Lookahead(3), Checkpoints(folder, minutes=0, resume=resume)))

def test_an_average_of_another_model_is_refused(tiny_learner):
    lookahead, learn = Lookahead(), tiny_learner()
    lookahead.learn = learn
    lookahead.before_fit()
    state = lookahead.state_dict()
    name = next(iter(state))
    for damaged in ({}, {k: t for k, t in state.items() if k != name}, state | {name: state[name][:1, :1]}, state | {name: state[name].long()}):
        with pytest.raises(ValueError, match='another model'): lookahead.load_state_dict(damaged)

def test_a_checkpoint_after_the_last_step_can_be_loaded(tiny_learner, tmp_path):
    "As of a run that is stopped after its last epoch"
    learn, checkpoints = tiny_learner(), Checkpoints(tmp_path, minutes=0)
    learn.add_cb(Lookahead(3))
    fit(learn, 2, checkpoints)
    with learn.added_cbs([checkpoints]): checkpoints.save()
    again = tiny_learner()
    again.add_cb(Lookahead(3))
    fit(again, 2, Checkpoints(tmp_path, resume=True))
    assert same(weights(again), weights(learn))

def test_an_exported_learner_has_its_weights_once(tiny_learner):
    learn = tiny_learner()
    learn.add_cb(Lookahead(3))
    fit(learn, 1)
    copied = pickle.loads(pickle.dumps(learn.lookahead))
    assert learn.lookahead.average and not copied.average and copied.every == 3

@pytest.mark.parametrize('args, name', [((0,), 'every is 0'), ((-1,), 'every is -1'), ((5, 1.), 'decay is 1.0'), ((5, -.1), 'decay is -0.1')])
def test_invalid_values_are_refused(args, name):
    with pytest.raises(ValueError, match=name): Lookahead(*args)

# ---- fits whose steps are not their batches

def ends_with_average(learn, lookahead): return all(torch.equal(t, lookahead.average[name]) for name, t in learn.model.state_dict().items() if t.is_floating_point())

@pytest.mark.parametrize('n_acc', [32, 48, 80])
def test_steps_are_counted_and_not_batches(tiny_learner, n_acc):
    learn, lookahead, updates, steps = tiny_learner(), Lookahead(2), [], []
    class See(Callback):
        order = 4
        def after_step(self): steps.append(self.iter); self.before = {name: t.clone() for name, t in lookahead.average.items()}
    class Changed(Callback):
        order = 6
        def __init__(self, see): self.see = see
        def after_step(self): updates.append(any(not torch.equal(t, lookahead.average[name]) for name, t in self.see.before.items()))
    see = See()
    fit(learn, 4, GradientAccumulation(n_acc), lookahead, see, Changed(see))
    assert 2 <= len(steps) < 4*len(learn.dls.train)
    assert updates == [i % 2 == 1 for i in range(len(steps))]
    assert ends_with_average(learn, lookahead)

@pytest.mark.parametrize('ends_early', [lambda: EarlyStoppingCallback('train_loss', min_delta=100.), lambda: ShortEpochCallback(.5)], ids=['early stopping', 'short epochs'])
def test_a_fit_that_ends_early_ends_with_the_average(tiny_learner, capsys, ends_early):
    learn, lookahead = tiny_learner(), Lookahead(2)
    fit(learn, 4, lookahead, ends_early())
    assert ends_with_average(learn, lookahead)

@pytest.mark.parametrize('epoch', [0, 1])
def test_with_accumulated_gradients_a_fit_that_is_resumed_ends_the_same(same_when_resumed, epoch):
    same_when_resumed(epoch, lambda folder, resume: (GradientAccumulation(32), Lookahead(2), Checkpoints(folder, minutes=0, resume=resume)))

def test_a_finished_fit_of_an_earlier_version_is_resumed(tiny_learner, tmp_path):
    "Its checkpoints do not have the number of steps"
    learn = tiny_learner()
    fit(learn, 2, Lookahead(3), Checkpoints(tmp_path))
    tensors, facts = read_checkpoint(checkpoints_in(tmp_path)[0])
    del facts['callbacks']['lookahead']['steps']
    write_checkpoint(tmp_path, tensors, facts)
    again = tiny_learner()
    fit(again, 2, Lookahead(3), Checkpoints(tmp_path, resume=True))
    assert same(weights(again), weights(learn))
