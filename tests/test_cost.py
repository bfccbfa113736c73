"""Callbacks that reduce the arithmetic of training, and the count of it."""
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import Adam, Callback, CancelFitException, Learner, ProgressCallback
from torch import nn

from cifar_fastai.callback.checkpoint import Checkpoints
from cifar_fastai.callback.cost import FreezeFirst, ImageSizes, fit_cost, training_cost
from cifar_fastai.callback.schedule import OneCycle, range_test
from cifar_fastai.learner import Processes
from cifar_fastai.models import CustomResNet

def first_weight(model): return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.detach().clone()

class Record(Callback):
    "Record the size of each batch that reaches the model, and the first layer after each epoch"
    order = 50
    def before_fit(self): self.trained, self.validated, self.weights = [], [], []
    def before_batch(self): (self.trained if self.training else self.validated).append(self.x.shape[-1])
    def after_epoch(self): self.weights.append(first_weight(self.model))

class Stop(Exception): pass

class StopIn(Callback):
    def __init__(self, event, epoch):
        def stop():
            if self.learn.training and self.learn.epoch == epoch: raise Stop('here')
        setattr(self, event, stop)

def fit(learn, epochs, *cbs, **kwargs):
    record = Record()
    with learn.no_logging(): learn.fit(epochs, 1e-2, cbs=[*cbs, record], **kwargs)
    return record

def weights(learn): return {name: t.clone() for name, t in learn.model.state_dict().items()}

# ---- the count

@pytest.mark.parametrize('size', [16, 24, 32])
def test_the_count_is_that_of_the_layers(size):
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    first, second = 3*8*9*size**2, 8*4*9*size**2
    # Forward, and backward to the weights; the second layer also to its input.
    assert training_cost(convolution, size) == 2*(2*first + 3*second) # a multiplication and an addition each

def test_the_count_leaves_the_model_alone():
    model = CustomResNet(width=16).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    training_cost(model, 24)
    assert not model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

# ---- image sizes

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_each_epoch_trains_on_its_size_and_validates_on_full_images(tiny_learner, small_dls, pipeline):
    learn = tiny_learner(small_dls(pipeline=pipeline, num_workers=0))
    record = fit(learn, 3, ImageSizes([20, 24, 32]))
    n = len(learn.dls.train)
    assert record.trained == [20]*n + [24]*n + [32]*n and set(record.validated) == {32}

def test_full_size_in_all_epochs_changes_nothing(tiny_learner):
    plain, sized = tiny_learner(), tiny_learner()
    fit(plain, 2)
    fit(sized, 2, ImageSizes([32, 32]))
    assert all(torch.equal(t, weights(plain)[name]) for name, t in weights(sized).items())

def test_images_are_averaged_and_not_cropped(tiny_learner):
    learn, seen = tiny_learner(), []
    class Keep(Callback):
        def __init__(self, order): self.order = order
        def before_batch(self): seen.append(self.x.clone())
    with pytest.raises(Stop): fit(learn, 1, Keep(4), ImageSizes([16]), Keep(6), StopIn('after_pred', 0))
    full, half = seen
    # Away from the border, the mean of a downsampled image is that of the image.
    assert half.shape[-1] == 16 and torch.allclose(half.mean((2, 3)), full.mean((2, 3)), atol=.02)
    assert (half - F.avg_pool2d(full, 2)).abs().mean() < .2*full.std()

@pytest.mark.parametrize('sizes', [(), (7,), (32.,), ('32',)])
def test_sizes_that_are_invalid_are_refused(sizes):
    with pytest.raises(ValueError, match='sizes'): ImageSizes(sizes)

@pytest.mark.parametrize('sizes, n_epoch, expected', [((24, 32), 3, [24, 32, 32]), ((20, 24, 32), 9, [20]*3 + [24]*3 + [32]*3), ((20, 24, 28, 32, 32), 11, [20]*2 + [24]*2 + [28]*2 + [32]*5),
                                                     ((20, 24, 28, 32), 2, [24, 32]), ((20, 24, 32), 1, [32])])
def test_sizes_share_the_epochs_and_the_last_epoch_has_the_last(tiny_learner, sizes, n_epoch, expected):
    assert [ImageSizes(sizes).size_of(epoch, n_epoch) for epoch in range(n_epoch)] == expected
    if n_epoch > 3: return
    learn = tiny_learner()
    assert fit(learn, n_epoch, ImageSizes(sizes)).trained == [size for size in expected for _ in range(len(learn.dls.train))]

def test_a_copy_of_the_model_during_a_fit_has_no_frozen_layer_and_no_learner(tiny_learner):
    copies = []
    class Copy(Callback):
        def after_batch(self): copies.append(pickle.loads(pickle.dumps(deepcopy(self.model))))
    learn = tiny_learner()
    fit(learn, 1, FreezeFirst(0), Copy())
    copied = copies[-1].train()
    copied(learn.dls.one_batch()[0]).sum().backward()
    assert next(copied.parameters()).grad is not None

def test_a_fit_of_plain_fastai_takes_both(small_dls):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = Learner(small_dls(), model, nn.CrossEntropyLoss(), Adam).remove_cb(ProgressCallback)
    record = fit(learn, 3, ImageSizes([16, 24, 32]), FreezeFirst(1))
    assert set(record.trained) == {16, 24, 32}
    # Although fastai's Adam decays weights whose gradient is zero
    assert torch.equal(record.weights[0], record.weights[2])

def test_a_range_test_is_at_full_size_and_trains_all_layers(tiny_learner):
    plain, other = tiny_learner(), tiny_learner()
    other.add_cbs([ImageSizes([16, 16, 16]), FreezeFirst(0)])
    assert (range_test(plain, num_it=6)[1] == range_test(other, num_it=6)[1]).all()

# ---- a frozen first layer

@pytest.mark.parametrize('epochs', [0, 1, 2, 3])
def test_the_first_layer_is_trained_in_the_first_epochs_only(tiny_learner, epochs):
    learn = tiny_learner()
    start = first_weight(learn.model)
    record = fit(learn, 3, FreezeFirst(epochs))
    changes = [not torch.equal(a, b) for a, b in zip([start, *record.weights], record.weights)]
    assert changes == [epoch < epochs for epoch in range(3)]
    assert all(p.requires_grad for p in learn.model.parameters()) and not any(m._forward_hooks for m in learn.model.modules())

def test_frozen_from_the_beginning_it_costs_as_much_as_a_layer_without_gradient(tiny_learner):
    learn, frozen = tiny_learner(), tiny_learner()
    fit(learn, 1, FreezeFirst(0))
    next(frozen.model.children()).requires_grad_(False)
    fit(frozen, 1)
    for name, t in weights(learn).items(): assert torch.allclose(t, weights(frozen)[name], atol=1e-6), name

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward'])
def test_after_an_exception_the_next_fit_trains_the_first_layer(tiny_learner, event):
    learn = tiny_learner()
    with pytest.raises(Stop): fit(learn, 2, FreezeFirst(0), StopIn(event, 0))
    before = first_weight(learn.model)
    fit(learn, 1)
    assert not torch.equal(first_weight(learn.model), before)

def test_several_processes_are_refused(tiny_learner):
    learn = tiny_learner()
    learn.processes = Processes()
    learn.processes.n = 2
    with pytest.raises(ValueError, match=r'\b2\b'): fit(learn, 2, FreezeFirst(1))

def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(ValueError, match='epochs is -1'): FreezeFirst(-1)

@pytest.mark.parametrize('epoch', [1, 2])
def test_a_fit_that_is_resumed_ends_with_the_same_weights(same_when_resumed, epoch):
    def cbs(folder, resume):
        return OneCycle(1e-3, 2e-2), ImageSizes([16, 24, 32]), FreezeFirst(1), Checkpoints(folder, minutes=0, resume=resume)
    same_when_resumed(epoch, cbs)

# ---- states around a fit

def seen_without_gradient(learn, run): # -> set of whether the first layer has no gradient
    seen = set()
    class See(Callback):
        def after_backward(self): seen.add(next(self.learn.model.parameters()).grad is None)
    with learn.added_cbs(See()): run()
    return seen

@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_freezes_after_a_range_test_as_without(tiny_learner, compiled):
    learn = tiny_learner(freeze_first=1)
    if compiled: learn.model.compile(backend='eager')
    assert seen_without_gradient(learn, lambda: range_test(learn, num_it=6)) == {False}
    assert seen_without_gradient(learn, lambda: fit(learn, 1)) == {False}
    assert seen_without_gradient(learn, lambda: fit(learn, 2)) == {False, True}

def test_a_range_test_trains_the_layer_after_a_fit_that_was_interrupted(tiny_learner):
    learn = tiny_learner(freeze_first=1)
    with pytest.raises(Stop): fit(learn, 3, StopIn('after_batch', 1))
    assert seen_without_gradient(learn, lambda: range_test(learn, num_it=6)) == {False}

def test_a_fit_that_is_cancelled_before_it_begins_ends_quietly(tiny_learner):
    class CancelAtOnce(Callback):
        def before_fit(self): raise CancelFitException()
    fit(tiny_learner(freeze_first=1), 3, CancelAtOnce())

def test_a_layer_stays_frozen_after_a_validation_within_the_fit(tiny_learner):
    class ValidateOnce(Callback):
        order, seen = 100, 0
        def after_train(self):
            if self.seen: return
            self.seen = 1
            self.learn.validate()
    learn = tiny_learner(freeze_first=1)
    assert seen_without_gradient(learn, lambda: fit(learn, 3, ValidateOnce())) == {False, True}

def test_tta_works_after_epochs_of_small_images(tiny_learner):
    learn = tiny_learner(sizes=(16, 24, 32))
    with learn.no_logging(), learn.no_bar():
        fit(learn, 3)
        preds, _ = learn.tta(n=5)
    assert preds.shape == (len(learn.dls.valid_ds), 10)

def test_the_cost_of_a_fit_at_full_size_needs_no_sizes():
    model = CustomResNet(width=4)
    assert fit_cost(model, 10, 2, sizes=()) == fit_cost(model, 10, 2) == 20*training_cost(model, 32)
