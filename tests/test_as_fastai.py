"""What works with fastai's own `Learner` works with `cifar_learner`, and with the same result."""
import os, subprocess, sys, textwrap, threading
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.vision.all import (SGD, Adam, BalancedAccuracy, Callback, CancelBatchException, CancelEpochException,
                               CancelFitException, CancelStepException, CancelTrainException, CancelValidException, CrossEntropyLossFlat, DataLoaders, F1Score,
                               GradientClip, Learner, OptimWrapper, ParamScheduler, ProgressCallback, Recorder,
                               ReduceLROnPlateau, RocAuc, SaveModelCallback, SchedCos, SchedExp, TrainEvalCallback, ValueMetric, accuracy,
                               defaults, load_learner, noop, params, set_seed)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_fastai.data.augment import CropFlipCutout
from cifar_fastai.optimizer import FusedAdam
from cifar_fastai.callback.precision import Autocast, precision_of
from cifar_fastai.callback.recorder import EpochRecorder
from cifar_fastai.callback.checkpoint import Checkpoints, FiniteLoss
from cifar_fastai.learner import cifar_learner
from cifar_fastai.models import load_pretrained
from cifar_fastai.callback.schedule import OneCycle, one_cycle_lr, range_test

def four_parts(net): return [params(net[0]), params(net[1]), params(net[2:5]) or [], params(net[5])]
def three_parts(net): return [params(net[0]), params(net[1]), params(net[5])]
def two_parts(net): return [params(net[:5]), params(net[5:])]

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

def assert_same(a, b, exact=True):
    assert a.keys() == b.keys()
    for name in a: torch.testing.assert_close(a[name], b[name], **dict(rtol=0, atol=0) if exact else dict(rtol=2e-4, atol=2e-6))

def net(n_out=10):
    "A small network. Its convolution has no bias: the norm would leave it a gradient of rounding errors, which Adam enlarges"
    set_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, n_out))

@pytest.fixture
def tiny_learner(small_dls):
    def make(dls=None, **kwargs):
        return cifar_learner(dls or small_dls(), net(), **dict(precision='fp32', recipe='baseline') | kwargs).remove_cbs(ProgressCallback)
    return make

@pytest.fixture
def plain_loaders():
    "fastai's own `DataLoaders` of random images, in their order"
    images = torch.utils.data.TensorDataset(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64)%10)
    dls = DataLoaders.from_dsets(images, images, bs=16, device='cpu', shuffle=False)
    dls.c = 10
    return dls

@pytest.fixture
def plain_learner(small_dls):
    "fastai's own `Learner` and `Adam`, with the values of `tiny_learner`"
    def make(dls=None, **kwargs):
        opt_func = partial(Adam, mom=.9, sqr_mom=.99, eps=1e-8, wd=.2)
        return Learner(dls or small_dls(), net(), CrossEntropyLossFlat(), **dict(opt_func=opt_func, metrics=accuracy) | kwargs)
    return make

# ---- layer groups

idioms = {
    'a slice': lambda learn: learn.fit(2, slice(1e-4, 1e-2)),
    'a slice with one end': lambda learn: learn.fit(2, slice(1e-2)),
    'a rate for each group': lambda learn: learn.fit(2, [1e-4, 1e-3, 1e-2]),
    'one cycle with a slice': lambda learn: learn.fit_one_cycle(2, slice(1e-4, 1e-2)),
    'one cycle with a slice with one end': lambda learn: learn.fit_one_cycle(2, slice(1e-2)),
    'flat then cosine': lambda learn: learn.fit_flat_cos(2, slice(1e-4, 1e-2)),
    'warm restarts': lambda learn: learn.fit_sgdr(1, 2, slice(1e-4, 1e-2)),
    'frozen': lambda learn: (learn.freeze(), learn.fit(2, 1e-2)),
    'frozen but for two': lambda learn: (learn.freeze_to(-2), learn.fit(2, 1e-2)),
    'frozen, then not': lambda learn: (learn.freeze(), learn.fit(1, 1e-2), learn.unfreeze(), learn.fit(1, slice(1e-4, 1e-2))),
    'fine-tuned': lambda learn: learn.fine_tune(2, 1e-2),
    'another weight decay': lambda learn: learn.fit(2, 1e-2, wd=.7),
    'hyper-parameters set': lambda learn: (learn.create_opt(), learn.opt.set_hypers(mom=.5, wd=.6, eps=1e-4), learn.fit(2, 1e-2)),
    'a scheduler of the weight decay': lambda learn: learn.fit(2, 1e-2, cbs=ParamScheduler(dict(wd=SchedExp(.1, .9)))),
    'a scheduler of each rate': lambda learn: learn.fit(2, cbs=ParamScheduler(dict(lr=SchedCos(np.array([1e-4, 1e-3, 1e-2]), 1e-5)))),
    'a plateau': lambda learn: learn.fit(3, slice(1e-4, 1e-2), cbs=ReduceLROnPlateau('valid_loss', min_delta=100, patience=1)),
    'an optimizer made anew': lambda learn: (learn.fit(1, 1e-2), learn.fit(1, 1e-2, reset_opt=True)),
}

@pytest.mark.parametrize('idiom', idioms)
def test_an_idiom_of_training_gives_the_weights_of_plain_fastai(tiny_learner, plain_learner, idiom):
    ours, plain = tiny_learner(splitter=three_parts), plain_learner(splitter=three_parts)
    for learn in (ours, plain):
        with learn.no_bar(), learn.no_logging(): idioms[idiom](learn)
    assert_same(weights(ours), weights(plain), exact=False)

@pytest.mark.parametrize('splitter, n', [(params, 1), (two_parts, 2), (three_parts, 3), (four_parts, 4)], ids='1234')
def test_the_optimizer_has_the_groups_of_the_splitter(tiny_learner, plain_learner, splitter, n):
    ours, plain = tiny_learner(splitter=splitter), plain_learner(splitter=splitter)
    for learn in (ours, plain): learn.create_opt()
    assert len(ours.opt.hypers) == len(ours.opt.param_lists) == len(plain.opt.param_lists) == n
    shapes = lambda learn: [sorted(tuple(p.shape) for p in ps) for ps in learn.opt.param_lists]
    assert shapes(ours) == shapes(plain)

@pytest.mark.parametrize('n', [-1, -2, 0, 1, 2])
def test_freezing_leaves_the_same_parameters_trainable(tiny_learner, plain_learner, n):
    trainable = []
    for learn in (tiny_learner(splitter=three_parts), plain_learner(splitter=three_parts)):
        learn.freeze_to(n)
        trainable.append({name for name, p in learn.model.named_parameters() if p.requires_grad})
    assert trainable[0] == trainable[1]

def test_freezing_the_network_leaves_its_last_group_and_the_norms_trainable(small_dls):
    learn = cifar_learner(small_dls(), splitter=lambda net: [params(net.prep), params(net.layer1), [*params(net.layer3), *params(net.fc)]])
    learn.freeze()
    assert learn.model.fc.weight.requires_grad and not learn.model.prep[0].weight.requires_grad
    assert learn.model.prep[1].weight.requires_grad # fastai trains frozen norms

def test_the_hyper_parameters_are_those_of_fastais_adam(tiny_learner, plain_learner):
    ours, plain = tiny_learner(splitter=three_parts), plain_learner(splitter=three_parts)
    for learn in (ours, plain):
        learn.create_opt()
        learn.opt.set_hyper('lr', slice(1e-4, 1e-2))
        learn.opt.set_hyper('wd', [.1, .2, .3])
    for h, expected in zip(ours.opt.hypers, plain.opt.hypers):
        assert {k: h[k] for k in ('lr', 'mom', 'sqr_mom', 'eps')} == pytest.approx({k: expected[k] for k in ('lr', 'mom', 'sqr_mom', 'eps')})
    assert [h['wd'] for h in ours.opt.hypers] == [.1, 0, .3] # the second group has nothing but a norm

# ---- arguments of the optimizer and the loss

@pytest.mark.parametrize('given, expected', [
    (dict(opt_func=SGD, wd=.1), dict(wd=.1)),
    (dict(opt_func=partial(SGD, mom=.8), wd=.1), dict(wd=.1, mom=.8)),
    (dict(opt_func=Adam, wd=.3), dict(wd=.3)),
    (dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD), wd=.1), dict(wd=.1)),
    (dict(opt_func=Adam), dict(wd=.01)), # fastai's own default
    (dict(opt_func=FusedAdam, wd=.1, betas=(.8, .95), eps=1e-5), dict(wd=.1, mom=.8, sqr_mom=.95, eps=1e-5)),
    (dict(opt_func=partial(FusedAdam, betas=(.7, .9)), wd=.1), dict(wd=.1, mom=.7, sqr_mom=.9)),
    (dict(wd=.1, betas=(.8, .95), eps=1e-5), dict(wd=.1, mom=.8, sqr_mom=.95, eps=1e-5)),
    (dict(), dict(wd=.2, mom=.9, sqr_mom=.99, eps=1e-8)),
], ids=['SGD', 'SGD with momentum', 'Adam', 'wrapped SGD', 'Adam, nothing given', 'FusedAdam', 'FusedAdam with betas', 'options', 'nothing'])
def test_arguments_of_the_optimizer_are_honoured(tiny_learner, given, expected):
    learn = tiny_learner(**given)
    learn.fit(1, 1e-3)
    assert {k: learn.opt.hypers[0][k] for k in expected} == pytest.approx(expected)

@pytest.mark.parametrize('given', [dict(betas=(.8, .95)), dict(eps=1e-3)], ids=str)
@pytest.mark.parametrize('opt_func', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['SGD', 'Adam', 'wrapped AdamW'])
def test_an_argument_that_the_optimizer_would_ignore_is_refused(tiny_learner, opt_func, given):
    [(name, value)] = given.items()
    with pytest.raises(ValueError) as e: tiny_learner(opt_func=opt_func, **given)
    assert name in str(e.value) and str(value) in str(e.value)

def test_a_label_smoothing_that_the_loss_would_ignore_is_refused(tiny_learner):
    with pytest.raises(ValueError, match=r'label_smoothing is 0\.1'): tiny_learner(loss_func=nn.CrossEntropyLoss(), label_smoothing=.1)

@pytest.mark.parametrize('opt_func', [None, FusedAdam], ids=['default', 'given'])
@pytest.mark.parametrize('decayed', [True, False])
def test_wd_bn_bias_decides_whether_norms_and_biases_are_decayed(tiny_learner, plain_learner, decayed, opt_func):
    ours, plain = tiny_learner(wd_bn_bias=decayed, opt_func=opt_func, wd=.2), plain_learner(wd_bn_bias=decayed)
    for learn in (ours, plain):
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, wd=.7)
    assert_same(weights(ours), weights(plain), exact=False)

# ---- epochs

class Seen(Callback):
    "Note what identifies each training batch, and its learning rate"
    order = 100 # after schedulers
    def __init__(self): self.batches, self.lrs = [], []
    def before_batch(self):
        if self.training:
            self.batches.append(self.x.double().sum().item())
            self.lrs.append(self.opt.hypers[-1]['lr'])

def test_successive_fits_see_other_batches(tiny_learner):
    seen = Seen()
    learn = tiny_learner()
    for _ in range(3): learn.fit(1, 1e-3, cbs=seen)
    assert len(set(seen.batches)) == 15

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_three_fits_of_an_epoch_see_the_batches_of_one_fit_of_three(tiny_learner, small_dls, pipeline):
    first, second = Seen(), Seen()
    make = lambda: tiny_learner(small_dls(pipeline=pipeline, aug=CropFlipCutout(flip='alternate')))
    make().fit(3, 1e-3, cbs=first)
    learn = make()
    for _ in range(3):
        learn.fit(1, 1e-3, cbs=second)
        learn.validate(); learn.get_preds()
    assert first.batches == second.batches

def test_each_image_is_flipped_in_one_of_two_successive_fits(tiny_learner, small_dls):
    counts = []
    class Flips(Callback):
        def before_train(self): counts.append(self.dls.train.epoch)
    learn = tiny_learner(small_dls(aug=CropFlipCutout(flip='alternate')))
    for _ in range(4): learn.fit(1, 1e-3, cbs=Flips())
    assert counts == [0, 1, 2, 3]

def test_fine_tuning_counts_on(tiny_learner):
    seen = Seen()
    learn = tiny_learner(splitter=two_parts)
    learn.add_cb(seen).fine_tune(2, 1e-3, freeze_epochs=2)
    assert len(set(seen.batches)) == 20

@pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')
@pytest.mark.parametrize('find', [range_test, Learner.lr_find], ids=lambda f: f.__name__)
def test_a_range_test_uses_up_no_epoch(tiny_learner, find):
    first, second = Seen(), Seen()
    tiny_learner().fit(1, 1e-3, cbs=first)
    learn = tiny_learner()
    find(learn, num_it=12)
    learn.fit(1, 1e-3, cbs=second)
    assert first.batches == second.batches

cycle = dict(lr_min=1e-4, lr_max=1e-2, peak_epoch=1)

@pytest.mark.parametrize('start', [1, 2, 3])
@pytest.mark.parametrize('anneal', ['linear', 'cos'])
def test_start_epoch_continues_with_the_cycle(tiny_learner, start, anneal):
    seen = Seen()
    tiny_learner().fit(4, cbs=[OneCycle(**cycle, anneal=anneal), seen], start_epoch=start)
    assert seen.lrs == pytest.approx([one_cycle_lr(step, 20, 4, 1e-4, 1e-2, anneal) for step in range(5*start, 20)])

@pytest.mark.filterwarnings('ignore:Loading only the model')
@pytest.mark.filterwarnings('ignore:numpy.core is deprecated:DeprecationWarning')
@pytest.mark.parametrize('fresh', [True, False], ids=['in a new learner', 'in the same learner'])
def test_loading_with_the_optimizer_and_start_epoch_equal_the_undisturbed_run(tiny_learner, small_dls, tmp_path, fresh):
    make = lambda: tiny_learner(small_dls(aug=CropFlipCutout(flip='alternate')), path=tmp_path)
    whole, seen = make(), Seen()
    whole.fit(4, cbs=[OneCycle(**cycle), seen])

    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2 and self.iter == 3: raise KeyboardInterrupt
    learn, again = make(), Seen()
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=[OneCycle(**cycle), SaveModelCallback(every_epoch=True, with_opt=True), Stop()])
    if fresh: learn = make()
    learn.create_opt()
    learn.load('model_1', with_opt=True)
    learn.fit(4, cbs=[OneCycle(**cycle), again], start_epoch=2)
    assert again.batches == seen.batches[10:] and again.lrs == seen.lrs[10:]
    assert_same(weights(learn), weights(whole))

def test_a_resumed_second_fit_sees_the_batches_of_the_undisturbed_one(tiny_learner, tmp_path):
    class Stop(Callback):
        order = 90 # after the checkpoint of the step before
        def before_batch(self):
            if self.training and (self.epoch, self.iter) == (1, 2): raise KeyboardInterrupt
    whole = tiny_learner()
    whole.fit(1, 1e-3); whole.fit(2, 1e-3)
    learn = tiny_learner()
    learn.fit(1, 1e-3)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-3, cbs=[Checkpoints(tmp_path/'c', minutes=0), Stop()])
    other = tiny_learner()
    other.fit(2, 1e-3, cbs=Checkpoints(tmp_path/'c', resume=True))
    assert_same(weights(other), weights(whole))

def test_a_cycle_keeps_its_place_when_epochs_are_cut_short(tiny_learner):
    class Short(Callback):
        def after_batch(self):
            if self.training and self.iter == 2: raise CancelTrainException
    seen = Seen()
    tiny_learner().fit(4, cbs=[OneCycle(**cycle), Short(), seen])
    assert seen.lrs == pytest.approx([one_cycle_lr(step, 20, 4, 1e-4, 1e-2) for epoch in range(4) for step in range(5*epoch, 5*epoch + 3)])

# ---- weight decay of one fit, memory format, frozen weights

def test_the_weight_decay_of_one_fit_ends_with_it(tiny_learner, plain_learner):
    for make in (tiny_learner, plain_learner):
        learn = make(wd=.01)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, wd=.5)
            assert learn.opt.hypers[0]['wd'] == .5
            learn.fit(1, 1e-3)
        assert learn.opt.hypers[0]['wd'] == .01

@pytest.mark.filterwarnings('ignore:Loading only the model')
@pytest.mark.filterwarnings('ignore:numpy.core is deprecated:DeprecationWarning')
@pytest.mark.parametrize('change', [
    lambda learn: learn.to_contiguous(),
    lambda learn: (learn.to_contiguous(), learn.fit(1, 5e-3), learn.to_channelslast(use_amp=False)),
    lambda learn: (learn.remove_cb(ChannelsLast), learn.model.to(memory_format=torch.contiguous_format)),
    lambda learn: (learn.model.to(memory_format=torch.contiguous_format), learn.save('a'), learn.load('a', with_opt=True)),
], ids=['to contiguous', 'and back', 'without the callback', 'saved and loaded'])
def test_the_memory_format_may_change_between_fits(tiny_learner, plain_learner, tmp_path, change):
    ours, plain = tiny_learner(path=tmp_path), plain_learner(path=tmp_path)
    for learn in (ours, plain):
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 5e-3)
            if learn is plain: plain.add_cb(ChannelsLast())
            change(learn)
            learn.fit(1, 5e-3)
    assert_same(weights(ours), weights(plain), exact=False)

# ---- what is recorded

def means(learn): # valid_loss and accuracy of the validation set
    return [float(value) for value in learn.validate()]

def test_columns_stand_where_fastai_has_them(tiny_learner, plain_learner):
    rows = []
    for make in (tiny_learner, plain_learner):
        learn = make()
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        rows.append([row[1:3] for row in learn.recorder.values])
        assert list(learn.recorder.metric_names)[:4] == ['epoch', 'train_loss', 'valid_loss', 'accuracy']
        assert all(isinstance(loss, torch.Tensor) for loss in learn.recorder.losses)
    for row, expected in zip(*rows, strict=True): assert list(row) == pytest.approx(list(expected), rel=1e-3)

def test_the_validation_curve_is_the_validation_loss(tiny_learner):
    class Seen(Callback):
        order = ShowGraphCallback.order + 1
        def after_epoch(self): drawn.append([row[1] for row in self.recorder.values])
    drawn, learn = [], tiny_learner()
    learn.fit(2, 1e-3, cbs=Seen())
    assert drawn[-1] == [row['valid_loss'] for row in learn.recorder.history]

@pytest.mark.parametrize('metric', [RocAuc(), F1Score(average='macro'), BalancedAccuracy()], ids=lambda m: type(m).__name__ + m.name)
def test_a_metric_of_the_whole_set_is_not_asked_for_in_the_middle(small_dls, metric):
    learn = cifar_learner(small_dls(bs=4), net(), 'fp32', metrics=metric) # with its progress bar
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.history[0][metric.name]) and np.isfinite(learn.recorder.history[0][f'train_{metric.name}'])

def test_a_value_that_a_callback_computes_in_validation_is_one_of_validation(small_dls):
    class Counts(Callback):
        def after_validate(self): self.n = 10*(self.epoch + 1)
    counts = Counts()
    learn = cifar_learner(small_dls(), net(), 'fp32', cbs=counts, metrics=[accuracy, ValueMetric(lambda: counts.n, 'n')])
    learn.fit(2, 1e-3)
    assert [row['n'] for row in learn.recorder.history] == [10, 20] and 'train_n' not in learn.recorder.history[0]

class Auxiliary(nn.Module):
    "Two outputs in training, one in validation"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return (self.net(x), x) if self.training else self.net(x)

def test_metrics_of_the_training_set_can_be_switched_off(small_dls):
    loss = lambda out, y, **kwargs: nn.functional.cross_entropy(out[0] if isinstance(out, tuple) else out, y, **kwargs)
    learn = cifar_learner(small_dls(), Auxiliary(), 'fp32', loss_func=loss)
    learn.recorder.train_metrics = False
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'lr', 'time']
    assert 'accuracy' in learn.recorder.history[0] and 'train_accuracy' not in learn.recorder.history[0]

class Cancels(Callback):
    "Raise `error` at `event` of some training batch"
    order = 20
    def __init__(self, event, error, batch): self.event, self.error, self.batch = event, error, batch
    def __call__(self, event):
        if event == self.event and (self.batch is None or self.training and self.iter == self.batch): raise self.error()
        return super().__call__(event)

@pytest.mark.parametrize('batch', [0, 2, 4])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_a_batch_that_is_skipped_counts_for_nothing(tiny_learner, event, batch):
    right = []
    class See(Callback):
        order = 40
        def after_loss(self):
            if self.training: right.append((self.pred.argmax(1) == self.y).float())
    learn = tiny_learner()
    learn.fit(2, 1e-3, cbs=[Cancels(event, CancelBatchException, batch), See()])
    expected = torch.cat(right[:4]), torch.cat(right[4:])
    assert [row['train_accuracy'] for row in learn.recorder.history] == pytest.approx([o.mean().item() for o in expected])

@pytest.mark.filterwarnings('ignore:numpy.core is deprecated:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:Loading only the model')
def test_an_epoch_that_is_cut_short_is_recorded_under_its_names(tiny_learner, tmp_path):
    learn = tiny_learner(path=tmp_path)
    cut = Cancels('after_batch', CancelTrainException, 2)
    learn.fit(2, 1e-3, cbs=[cut, SaveModelCallback(monitor='accuracy')])
    loss, acc = means(learn)
    assert len(learn.recorder.history) == 2
    best = max(row['accuracy'] for row in learn.recorder.history)
    assert best == pytest.approx(acc) # the best weights were loaded at the end
    assert all(0 < row['train_loss'] < 10 and 0 < row['valid_loss'] < 10 for row in learn.recorder.history)

def test_a_validation_that_is_cancelled_leaves_no_number(tiny_learner):
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    learn = tiny_learner()
    learn.fit(1, 1e-3, cbs=NoValidation())
    [row] = learn.recorder.history
    assert np.isnan(row['valid_loss']) and np.isnan(row['accuracy']) and 0 < row['train_loss'] < 10

def test_a_fit_that_is_cancelled_before_it_begins_ends_quietly(tiny_learner):
    tiny_learner().fit(1, cbs=Cancels('before_fit', CancelFitException, None))

def test_two_metrics_of_one_name_are_both_kept(tiny_learner):
    learn = tiny_learner(metrics=[F1Score(average='macro'), F1Score(average='micro')])
    learn.fit(1, 1e-3)
    [row] = learn.recorder.history
    assert {'f1_score', 'f1_score_2', 'train_f1_score', 'train_f1_score_2'} <= set(row)
    assert row['f1_score'] != row['f1_score_2'] and [row['f1_score'], row['f1_score_2']] == list(learn.recorder.values[0])[2:4]

def test_the_recorder_has_fastais_options(tiny_learner):
    learn = tiny_learner()
    learn.recorder.add_time = False
    learn.fit(1, 1e-3)
    assert 'time' not in learn.recorder.metric_names and learn.recorder.history[0]['seconds'] > 0
    learn.recorder.valid_metrics = False
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'train_accuracy', 'lr']

@pytest.mark.parametrize('recorder', [Recorder, EpochRecorder, lambda: Recorder(train_metrics=True)])
def test_the_recorder_can_be_exchanged(small_dls, recorder):
    learn = cifar_learner(small_dls(), net(), 'fp32') # with its progress bar
    learn.remove_cb(Recorder)
    learn.add_cb(recorder())
    learn.fit(2, 1e-3)
    assert len(learn.recorder.values) == 2

def test_batches_can_be_run_by_hand(tiny_learner):
    learn = tiny_learner()
    learn.create_opt()
    with learn:
        learn.model.train()
        learn.training, learn.dl = True, learn.dls.train
        learn.all_batches()
    assert learn.opt.opt.state and len(learn.recorder.losses) == len(learn.dls.train)

# ---- precision

class Fails(nn.Module):
    "The identity, until it is told to raise"
    error = None
    def forward(self, x):
        if self.error is not None: raise self.error
        return x

def failing_learner(tiny_learner, **kwargs):
    learn = tiny_learner(**dict(precision='bf16') | kwargs)
    learn.model.append(Fails())
    return learn

errors = [RuntimeError('out of memory'), KeyboardInterrupt(), SystemExit(1), ValueError('a shape'), CancelBatchException(), CancelFitException(),
          CancelEpochException(), CancelTrainException()]

@pytest.mark.parametrize('error', errors, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('where', ['fit', 'validate', 'get_preds', 'range test'])
def test_an_exception_in_the_forward_pass_leaves_no_autocast_on(tiny_learner, error, where):
    learn = failing_learner(tiny_learner)
    learn.model[-1].error = error
    actions = {'fit': lambda: learn.fit(1), 'validate': learn.validate, 'get_preds': learn.get_preds, 'range test': lambda: range_test(learn)}
    try: actions[where]()
    except BaseException: pass
    assert not torch.is_autocast_enabled('cpu')
    assert (torch.ones(4, 4)@torch.ones(4, 4)).dtype == torch.float32

def test_an_exception_in_the_loss_leaves_no_autocast_on(tiny_learner):
    def loss(*args, **kwargs): raise RuntimeError('no loss')
    with pytest.raises(RuntimeError): tiny_learner(precision='bf16', loss_func=loss).fit(1)
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_after_an_exception_another_learner_trains_as_if_nothing_had_been(tiny_learner, precision):
    def learner(make=tiny_learner):
        learn = make(precision='fp32')
        return learn.add_cb(Autocast(precision)) # fp16 on a processor stands in for a GPU
    undisturbed = learner()
    undisturbed.fit(2, .01)
    before = load_pretrained()(torch.zeros(1, 3, 32, 32))
    failing = learner(partial(failing_learner, tiny_learner))
    failing.fit(1, .01)
    failing.model[-1].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt): failing.fit(1, .01)
    assert torch.equal(load_pretrained()(torch.zeros(1, 3, 32, 32)), before)
    after = learner()
    after.fit(2, .01)
    assert_same(weights(after), weights(undisturbed))
    failing.model[-1].error = None
    failing.fit(1, .01) # and the same learner goes on
    assert all(torch.isfinite(v).all() for v in weights(failing).values() if v.is_floating_point())

@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_on_a_gpu_after_an_exception_another_learner_trains_as_if_nothing_had_been(tiny_learner, small_dls, error, precision):
    def learner(): return tiny_learner(small_dls(device='cuda'), precision=precision)
    undisturbed = learner()
    undisturbed.fit(2, .01)
    failing = learner()
    failing.model.append(Fails())
    failing.fit(1, .01)
    failing.model[-1].error = error
    with pytest.raises(type(error)): failing.fit(1, .01)
    assert not torch.is_autocast_enabled('cuda')
    assert (torch.ones(4, 4, device='cuda')@torch.ones(4, 4, device='cuda')).dtype == torch.float32
    after = learner()
    after.fit(2, .01)
    assert_same(weights(after), weights(undisturbed))

def test_two_threads_that_predict_at_once_leave_no_autocast_on(tiny_learner):
    learners, problems = [tiny_learner(precision='bf16') for _ in range(2)], []
    expected = learners[0].get_preds()[0]
    def predict(learn):
        for _ in range(10):
            if not torch.equal(learn.get_preds()[0], expected) or torch.is_autocast_enabled('cpu'): problems.append(learn)
    threads = [threading.Thread(target=predict, args=[learn]) for learn in learners]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not problems and not torch.is_autocast_enabled('cpu')

def test_backward_pass_and_step_are_outside_of_autocast(tiny_learner):
    seen = set()
    class See(Callback):
        def before_backward(self): seen.add(torch.is_autocast_enabled('cpu'))
        def before_step(self): seen.add(torch.is_autocast_enabled('cpu'))
        def after_loss(self): seen.add(torch.is_autocast_enabled('cpu'))
    tiny_learner(precision='bf16').fit(1, cbs=See())
    assert seen == {False}

def dtype_of(learn):
    seen = set()
    hook = learn.model[0].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    learn.fit(1, .01)
    hook.remove()
    [dtype] = seen
    return dtype

def test_the_precision_can_be_changed_and_asked(tiny_learner):
    learn = tiny_learner(precision='fp32')
    assert (precision_of(learn), dtype_of(learn)) == ('fp32', torch.float32)
    assert learn.to_bf16() is learn and (precision_of(learn), dtype_of(learn)) == ('bf16', torch.bfloat16)
    assert learn.to_bf16() is learn and sum(isinstance(cb, Autocast) for cb in learn.cbs) == 1
    assert learn.to_fp32() is learn and (precision_of(learn), dtype_of(learn)) == ('fp32', torch.float32)

def test_fp16_is_refused_where_the_device_lacks_it_and_nothing_changes(tiny_learner):
    learn = tiny_learner(precision='bf16')
    with pytest.raises(ValueError, match="'fp16'"): learn.to_fp16()
    assert (precision_of(learn), dtype_of(learn)) == ('bf16', torch.bfloat16)

@pytest.mark.parametrize('add', [lambda learn: learn.add_cb(MixedPrecision()), lambda learn: learn.add_cb(MixedPrecision), lambda learn: learn.fit(1, cbs=MixedPrecision('bf16')),
                                 lambda learn: learn.to_non_native_fp16()], ids=['instance', 'class', 'of a fit', 'not native'])
def test_fastais_callbacks_of_precision_are_refused(tiny_learner, add):
    learn = tiny_learner()
    with pytest.raises(ValueError, match='MixedPrecision|ModelToHalf'): add(learn)
    assert precision_of(learn) == 'fp32'

def test_autocast_is_refused_in_a_learner_that_would_ignore_it(plain_learner):
    with pytest.raises(ValueError, match='cifar_learner'): plain_learner(cbs=Autocast('bf16')).fit(1)

@pytest.mark.filterwarnings('ignore:.*pickle:UserWarning')
def test_a_loaded_learner_is_fp32_as_fastais_is(tiny_learner):
    learn = tiny_learner(precision='bf16')
    learn.fit(1, .01)
    learn.export('learner.pkl')
    assert precision_of(load_learner('learner.pkl')) == 'fp32'

def test_the_memory_format_can_be_changed(tiny_learner):
    learn = tiny_learner(precision='fp32')
    layouts = lambda: {m.weight.is_contiguous() for m in learn.model if isinstance(m, nn.Conv2d)}
    learn.fit(1)
    assert layouts() == {False}
    assert learn.to_contiguous() is learn
    learn.fit(1)
    assert layouts() == {True} and precision_of(learn) == 'fp32'
    assert learn.to_channelslast(amp_mode='bf16') is learn
    learn.fit(1)
    assert layouts() == {False} and precision_of(learn) == 'bf16'

# ---- fp16, on a processor as a stand-in

def fp16_learner(tiny_learner, net=None, **scaler):
    learn = tiny_learner(precision='fp32') if net is None else net
    return learn.add_cb(Autocast('fp16', **scaler))

class Waits(TorchDispatchMode):
    "Count reads of single numbers, each of which would wait for a GPU"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})

def waits(learn, n_epoch=1):
    with Waits() as counted: learn.fit(n_epoch, .01)
    return counted.n

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_no_step_waits_for_a_number(tiny_learner, small_dls, precision):
    def of(bs):
        learn = tiny_learner(small_dls(bs=bs), precision='fp32')
        return waits(learn if precision == 'fp32' else learn.add_cb(Autocast(precision)))
    assert of(bs=16) == of(bs=4) # 5 and 20 steps

def test_fp16_learns_what_fp32_learns(tiny_learner):
    learn, other = fp16_learner(tiny_learner), tiny_learner(precision='fp32')
    for l in (learn, other): l.fit(3, .01)
    assert dtype_of(learn) == torch.float16
    assert [r['train_loss'] for r in learn.recorder.history] != [r['train_loss'] for r in other.recorder.history]
    torch.testing.assert_close(weights(learn)['0.weight'], weights(other)['0.weight'], rtol=0, atol=.1)

def test_a_step_with_an_overflow_is_skipped_and_the_scale_halved(tiny_learner):
    scales = []
    class See(Callback):
        order = 100
        def before_step(self): self.before = weights(self.learn)['0.weight']
        def after_step(self): scales.append((self.learn.scaler.get_scale(), torch.equal(self.before, self.model[0].weight)))
    fp16_learner(tiny_learner, init_scale=2.**20).fit(4, .01, cbs=See())
    kept = [same for _, same in scales]
    assert kept[0] and not kept[-1] # at first nothing moves, at last it does
    assert [scale for scale, same in scales if same] == [2.**(19 - i) for i in range(sum(kept))]

def test_gradients_are_clipped_unscaled_in_fp16(tiny_learner):
    norms = []
    class See(Callback):
        order = GradientClip.order + 1
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    fp16_learner(tiny_learner).fit(1, .01, cbs=[GradientClip(.01), See()])
    assert max(norms) <= .0101 and max(norms) > .005

@pytest.mark.parametrize('opt_func', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.SGD)], ids=['SGD', 'Adam', 'wrapped SGD'])
def test_other_optimizers_train_in_fp16(tiny_learner, opt_func):
    learn = fp16_learner(tiny_learner, tiny_learner(precision='fp32', opt_func=opt_func))
    before = weights(learn)
    learn.fit(1, .01)
    after = weights(learn)
    assert not torch.equal(after['0.weight'], before['0.weight']) and all(v.isfinite().all() for v in after.values() if v.is_floating_point())

# ---- messages

def on_screen(output):
    "The lines that a terminal shows of `output`, where a carriage return writes over what is there"
    shown = []
    for line in output.replace('\r\n', '\n').split('\n'):
        cells = []
        for part in line.split('\r'): cells[:len(part)] = part
        shown.append(''.join(cells).rstrip())
    return shown

@pytest.mark.skipif(sys.platform == 'win32', reason='no pseudo-terminals')
@pytest.mark.slow
def test_a_line_after_a_range_test_stands_alone_in_a_terminal(tmp_path):
    import pty
    (tmp_path/'script.py').write_text(textwrap.dedent("""
        import warnings; warnings.filterwarnings('ignore')
        from fastai.vision.all import nn
        from cifar_fastai.data.block import cifar_dls
        from cifar_fastai.learner import cifar_learner
        from cifar_fastai.callback.schedule import range_test
        learn = cifar_learner(cifar_dls('digits', bs=64), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        range_test(learn, num_it=8)
        print('after')
    """))
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, 'script.py'], cwd=tmp_path, stdout=theirs, stderr=subprocess.STDOUT)
    os.close(theirs)
    output = b''
    try:
        while block := os.read(ours, 4096): output += block
    except OSError: pass # Linux, when the other end is closed
    os.close(ours)
    assert process.wait() == 0, output.decode()
    shown = on_screen(output.decode())
    assert 'after' in shown and '%' in output.decode() # there was a bar

def test_a_loss_that_is_not_finite_speaks_of_a_checkpoint_only_where_there_is_one(tiny_learner, tmp_path):
    class Break(Callback):
        def after_pred(self):
            if self.training and self.epoch == 1: self.learn.pred = self.pred*float('nan')
    for kept in (False, True):
        cbs = [FiniteLoss(), Break()] + [Checkpoints(tmp_path/'c')]*kept
        with pytest.raises(FloatingPointError) as e: tiny_learner().fit(2, .01, cbs=cbs)
        assert 'nan' in str(e.value) and ('checkpoint' in str(e.value)) == kept

def test_the_wildcard_import_changes_no_name_of_fastai():
    import cifar_fastai.all as ours
    import fastai.vision.all as theirs
    public = lambda module: {name: value for name, value in vars(module).items() if not name.startswith('_')}
    names, fastais = public(ours), public(theirs)
    assert [name for name in names if name in fastais and names[name] is not fastais[name]] == []


# ---- a validation within a fit

class Ask(Callback):
    "Call a function of the learner after an event of each epoch"
    asking = False
    def __init__(self, ask, event, order): self.ask, self.event, self.order = ask, event, order
    def _asked(self, event):
        if event != self.event or self.asking: return # the answer may have such an event, too
        self.asking = True
        self.ask(self.learn)
        self.asking = False
    def after_train(self): self._asked('after_train')
    def after_validate(self): self._asked('after_validate')
    def after_epoch(self): self._asked('after_epoch')
    def _in_second_batch(self, event):
        if self.training and self.iter == 1: self._asked(event)
    def before_batch(self): self._in_second_batch('before_batch')
    def after_pred(self): self._in_second_batch('after_pred')
    def after_loss(self): self._in_second_batch('after_loss')
    def before_step(self): self._in_second_batch('before_step')
    def after_batch(self): self._in_second_batch('after_batch')

asked = {
    'predictions': lambda learn: learn.get_preds(),
    'predictions of the training set': lambda learn: learn.get_preds(ds_idx=0),
    'inner predictions': lambda learn: learn.get_preds(ds_idx=0, inner=True),
    'a validation': lambda learn: learn.validate(),
    'a validation on the training set': lambda learn: learn.validate(0),
    'one image': lambda learn: learn.predict(np.zeros((32, 32, 3), np.uint8)),
    'results': lambda learn: learn.show_results(max_n=1)}

def numbers(learn): return [[v for v in values] for values in learn.recorder.values], [
    {k: v for k, v in row.items() if k != 'seconds'} for row in learn.recorder.history]

@pytest.fixture
def undisturbed(tiny_learner):
    learn = tiny_learner(lookahead=2)
    learn.fit(3, 1e-2)
    return learn

@pytest.mark.parametrize('event, order', [('after_train', 70), ('after_train', 0), ('after_validate', 70), ('after_epoch', 0), ('after_epoch', 70)]
                         + [(event, 0) for event in ('before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch')] + [('after_batch', 70)])
@pytest.mark.parametrize('ask', asked)
def test_a_validation_within_a_fit_leaves_the_fit_as_it_is(tiny_learner, undisturbed, ask, event, order):
    learn = tiny_learner(lookahead=2)
    learn.fit(3, 1e-2, cbs=Ask(asked[ask], event, order))
    assert_same(weights(learn), weights(undisturbed))
    assert numbers(learn) == numbers(undisturbed)
    assert learn.recorder.losses == undisturbed.recorder.losses and learn.recorder.lrs == undisturbed.recorder.lrs

def test_a_validation_within_a_fit_returns_its_own_results(tiny_learner):
    within = []
    learn = tiny_learner(lookahead=0)
    learn.fit(1, 1e-2, cbs=Ask(lambda learn: within.append((list(learn.validate()), list(learn.validate(0)))), 'after_epoch', 0))
    [(of_valid, of_train)] = within
    assert of_valid == list(learn.validate()) == list(learn.recorder.values[0][1:3]) and of_train != of_valid

def test_fp16_stays_scaled_after_a_validation_within_the_fit(tiny_learner):
    class Scaled(Callback):
        def before_train(self): scaled.append(self.learn.scaler is not None)
    scaled, learn = [], tiny_learner().add_cb(Autocast('fp16'))
    learn.fit(2, 1e-2, cbs=[Ask(asked['predictions'], 'after_train', 0), Scaled()])
    assert scaled == [True, True] and learn.scaler is None

def test_a_learner_that_is_exported_within_a_fit_is_in_none(tiny_learner, tmp_path):
    copies, learn = [], tiny_learner(path=tmp_path)
    learn.fit(1, cbs=Ask(lambda learn: copies.append(learn.__getstate__()), 'after_epoch', 0))
    assert 'model' in copies[0] and 'in_fit' not in copies[0]

def test_a_fit_that_raises_is_over(tiny_learner):
    def stop(learn): raise RuntimeError('stop')
    learn = tiny_learner()
    with pytest.raises(RuntimeError, match='stop'): learn.fit(1, cbs=Ask(stop, 'after_train', 0))
    assert not learn.in_fit

# ---- what callbacks read from the recorder

def test_the_log_is_there_for_callbacks_that_run_before_the_recorder_has_written_its_row(tiny_learner):
    class Read(Callback):
        def after_epoch(self): logs.append(list(self.recorder.log))
    class Late(Callback):
        order = 55
        def after_train(self): logs.append(list(self.recorder.log))
        def after_validate(self): logs.append(list(self.recorder.log))
    logs, learn = [], tiny_learner()
    learn.fit(2, 1e-2, cbs=[Read(), Late()])
    for epoch, row in enumerate(learn.recorder.values):
        after_train, after_validate, after_epoch = logs[3*epoch:3*epoch + 3]
        assert after_train == [epoch, row[0]] and after_validate == after_epoch == [epoch, *row]

@pytest.mark.parametrize('skipped', [0, 1, 2])
def test_an_epoch_without_training_has_its_validation(tiny_learner, tmp_path, skipped):
    class NoTraining(Callback):
        def before_train(self):
            if self.epoch == skipped: raise CancelTrainException
    learn = tiny_learner(path=tmp_path)
    save = SaveModelCallback(monitor='valid_loss')
    learn.fit(3, 1e-2, cbs=[NoTraining(), save])
    history = learn.recorder.history
    assert [row['epoch'] for row in history] == [1, 2, 3] and [len(v) for v in learn.recorder.values] == [5, 5, 5]
    assert [np.isnan(row['train_loss']) and np.isnan(row['train_accuracy']) for row in history] == [i == skipped for i in range(3)]
    assert save.best == min(row['valid_loss'] for row in history)
    if skipped: assert history[skipped]['valid_loss'] == history[skipped - 1]['valid_loss']

@pytest.mark.parametrize('change', [lambda h: h.update(lr=.5), lambda h: h.update({'lr': .5}), lambda h: h.__ior__(dict(lr=.5)),
                                    lambda h: h.__setitem__('lr', .5)])
def test_hyper_parameters_can_be_changed_as_a_dictionary(tiny_learner, change):
    learn = tiny_learner(splitter=two_parts)
    learn.create_opt()
    change(learn.opt.hypers[-1])
    assert learn.opt.hypers.itemgot('lr')[-1] == .5 and learn.opt.hypers[0]['lr'] != .5
    assert [group['lr'] == .5 for group in learn.opt.opt.param_groups] == [False]*2 + [True]*2
    assert learn.opt.param_lists.map(len) == learn.opt.hypers.map(lambda h: sum(len(g['params']) for g in h.groups))

# ---- callbacks that are given

class MyRecorder(Recorder):
    def after_epoch(self):
        super().after_epoch()
        self.n = getattr(self, 'n', 0) + 1
class MyProgress(ProgressCallback):
    def before_epoch(self):
        super().before_epoch()
        self.n = getattr(self, 'n', 0) + 1

def test_a_recorder_and_a_bar_that_are_given_are_kept(small_dls):
    cbs = [MyRecorder(), MyProgress()]
    learn = cifar_learner(small_dls(), net(), 'fp32', cbs=cbs)
    learn.fit(2, 1e-2)
    assert [cb.n for cb in cbs] == [2, 2] and isinstance(learn.recorder, EpochRecorder)
    assert [row['epoch'] for row in learn.recorder.history] == [1, 2]

def test_a_recorder_of_the_same_name_takes_the_place_of_ours(small_dls):
    given = Recorder(train_metrics=True)
    learn = cifar_learner(small_dls(), net(), 'fp32', cbs=given)
    assert learn.recorder is given and sum(isinstance(cb, Recorder) for cb in learn.cbs) == 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert len(given.values) == 1

@pytest.mark.parametrize('order', [-10, 9, 10, 50, 60, 61])
def test_callbacks_of_ones_own_come_after_default_ones_of_the_same_order(small_dls, order):
    def names(make):
        own = Callback(before_fit=noop)
        own.order = order
        cbs = make(small_dls(), net(), loss_func=CrossEntropyLossFlat(), cbs=[own]).cbs.sorted('order')
        return ['own' if cb is own else cb.name for cb in cbs if cb is own or cb.name in ('train_eval', 'recorder', 'progress', 'cast_to_tensor')]
    assert names(partial(cifar_learner, precision='fp32', recipe='baseline')) == names(Learner)

@pytest.mark.parametrize('given_to', ['learner', 'fit'])
def test_a_logger_of_ones_own_gets_all_rows(small_dls, tmp_path, given_to):
    logger = CSVLogger(tmp_path/'history.csv')
    learn = cifar_learner(small_dls(), net(), cbs=[logger] if given_to == 'learner' else [])
    learn.fit(2, cbs=[] if given_to == 'learner' else logger)
    names, *rows = (tmp_path/'history.csv').read_text().splitlines()
    assert names.split(',') == list(learn.recorder.metric_names) and len(rows) == 2
    assert [float(row.split(',')[1]) for row in rows] == [row[0] for row in learn.recorder.values]

def test_what_a_callback_sets_when_the_learner_is_made_stays(small_dls):
    class Quiet(Callback):
        def after_create(self):
            self.recorder.add_time, self.recorder.smooth_loss.beta, self.learn.logger = False, .5, rows.append
    rows = []
    learn = cifar_learner(small_dls(), net(), cbs=Quiet(), default_cbs=True)
    with learn.no_bar(): learn.fit(2, 1e-2)
    assert 'time' not in learn.recorder.metric_names and learn.recorder.smooth_loss.beta == .5 and len(rows) == 2

def test_default_callbacks_of_ones_own_are_kept(small_dls, monkeypatch):
    own = Callback()
    monkeypatch.setattr(defaults, 'callbacks', [TrainEvalCallback, Recorder(), own])
    learn = cifar_learner(small_dls(), net())
    assert own in learn.cbs and type(learn.recorder) is EpochRecorder and not hasattr(learn, 'progress')

class OwnLoop(Callback):
    "Forward pass, backward pass and step by hand"
    def before_batch(self):
        if not self.training: return
        self.learn.pred = self.model(*self.xb)
        self.learn.loss = self.loss_func(self.pred, *self.yb)
        self.loss.backward(); self.opt.step(); self.opt.zero_grad()
        raise CancelBatchException
class OwnStep(Callback):
    def after_loss(self):
        if not self.training: return
        self.loss_grad.backward(); self.opt.step(); self.opt.zero_grad()
        raise CancelBatchException
class SkipsHighLosses(Callback):
    def after_loss(self):
        if self.loss > 2.3: raise CancelBatchException

@pytest.mark.parametrize('cb', [OwnLoop, OwnStep, SkipsHighLosses])
def test_a_batch_that_is_cancelled_after_its_loss_counts(tiny_learner, plain_learner, small_dls, tmp_path, cb):
    class Plain(Callback):
        "The mean over the epoch, as it is defined"
        def before_train(self): self.losses = []
        def after_batch(self):
            if self.training: self.losses.append(self.loss.item()*len(self.y))
    seen = Plain()
    learn, plain = tiny_learner(small_dls(), opt_func=SGD, cbs=[cb(), seen], path=tmp_path).to_contiguous(), plain_learner(small_dls(), opt_func=SGD, cbs=cb())
    for one in learn, plain: one.fit(2, 1e-2, wd=0.)
    assert_same(weights(learn), weights(plain), exact=False)
    n = len(learn.dls.train_ds)
    assert learn.recorder.values[-1][0] == pytest.approx(sum(seen.losses)/n, rel=1e-5)
    for ours, theirs in zip(learn.recorder.values, plain.recorder.values, strict=True): assert list(ours[1:3]) == pytest.approx(list(theirs[1:3]), rel=1e-4)
    learn.fit(1, 1e-2, cbs=SaveModelCallback(monitor='train_loss'))
    assert (tmp_path/'models/model.pth').exists()

def test_an_attribute_of_a_callback_decides_nothing(tiny_learner):
    class Penalty(Callback): first_epoch = 2 # from this epoch on
    learn = tiny_learner(cbs=Penalty())
    learn.fit(3, 1e-2)
    assert len(learn.recorder.values) == 3

class OwnScaler(Callback):
    "Scales the loss as fastai's `MixedPrecision` does"
    order = 10
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu')
    def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
    def before_step(self):
        self.skipped = True
        self.scaler.step(self)
        if self.skipped: raise CancelStepException
    def after_step(self): self.learn.scaler.update()
    def after_fit(self): self.learn.scaler = None
    @property
    def param_groups(self): return self.opt.param_groups
    def step(self, *args, **kwargs): self.skipped = False

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('opt_func', [SGD, None])
def test_a_scaler_of_ones_own_is_left_to_its_callback(tiny_learner, opt_func, precision):
    losses = []
    for cbs in [], [OwnScaler()]:
        learn = tiny_learner(opt_func=opt_func, cbs=cbs, precision=precision)
        learn.fit(2, 1e-2)
        losses.append(learn.recorder.losses)
    assert [loss.item() for loss in losses[0]] == pytest.approx([loss.item() for loss in losses[1]], rel=1e-5 if precision == 'fp32' else 1e-2)
    assert losses[0][-1] < losses[0][0] - .01

def test_without_default_callbacks_there_are_none(small_dls):
    learn = cifar_learner(small_dls(), net(), 'fp32', cbs=TrainEvalCallback, default_cbs=False)
    assert not learn.cbs.filter(lambda cb: isinstance(cb, (Recorder, ProgressCallback)))
    learn.fit(1, 1e-2)
    given = Recorder(train_metrics=True)
    learn = cifar_learner(small_dls(), net(), 'fp32', cbs=[TrainEvalCallback, given], default_cbs=False)
    learn.fit(1, 1e-2)
    assert learn.recorder is given and len(given.values) == 1

def test_batches_without_targets_are_shown_by_the_bar(small_dls):
    class NoTargets(Callback):
        def before_batch(self): self.learn.yb = ()
    learn = cifar_learner(small_dls(), net(), 'fp32')
    with learn.no_logging(): learn.fit(1, 1e-2, cbs=NoTargets())
    assert np.isnan(learn.recorder.history[0]['train_loss'])

# ---- memory format of models of one's own

class Viewed(nn.Module):
    "The usual idiom of PyTorch's tutorials, which needs contiguous maps"
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(512, 10)
    def forward(self, x):
        x = self.conv(x)
        return self.linear(x.view(x.size(0), -1))

class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3072, 10)
    def forward(self, x): return self.linear(x.view(len(x), -1))

contiguous = {'view of maps': Viewed, 'view of images': Pixels,
              'lazy': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10)),
              'compiled': lambda: torch.compile(Viewed(), backend='eager')}

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
@pytest.mark.parametrize('loss_func', [None, CrossEntropyLossFlat()])
@pytest.mark.parametrize('kind', contiguous)
@pytest.mark.filterwarnings('ignore') # the compiler imports what warns in some versions
def test_a_model_that_needs_contiguous_images_trains_and_predicts(small_dls, kind, loss_func, pipeline):
    learn = cifar_learner(small_dls(pipeline=pipeline), contiguous[kind](), 'fp32', loss_func=loss_func)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert not learn.cbs.filter(lambda cb: isinstance(cb, ChannelsLast)) and len(learn.recorder.losses) == len(learn.dls.train)
    assert learn.get_preds()[0].shape == (learn.dls.valid.n, 10)

def test_a_model_trains_as_in_plain_fastai_on_loaders_of_ones_own(plain_loaders):
    results = []
    for make in partial(Learner, opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), partial(cifar_learner, precision='fp32', lookahead=0, opt_func=partial(OptimWrapper, opt=torch.optim.SGD)):
        set_seed(0)
        learn = make(plain_loaders, Viewed(), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=[])
        results.append(weights(learn))
    assert_same(*results, exact=False)

class OnceOnly(torch.utils.data.IterableDataset):
    "A stream whose images come once"
    def __init__(self): self.left = iter([(torch.rand(3, 32, 32), i%10) for i in range(8)])
    def __iter__(self): return self.left

@pytest.mark.parametrize('loss_func', [None, CrossEntropyLossFlat()])
def test_a_stream_is_not_used_up_before_the_fit(loss_func):
    stream = OnceOnly()
    dls = DataLoaders(torch.utils.data.DataLoader(stream, 4), torch.utils.data.DataLoader(OnceOnly(), 4))
    dls.c = 10
    learn = cifar_learner(dls, net(), 'fp32', loss_func=loss_func)
    assert len(list(stream.left)) == 8 and not learn.cbs.filter(lambda cb: isinstance(cb, ChannelsLast))

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_a_model_without_a_need_for_contiguous_maps_is_channels_last(small_dls, pipeline):
    learn = cifar_learner(small_dls(pipeline=pipeline), net(), 'fp32')
    assert len(learn.cbs.filter(lambda cb: isinstance(cb, ChannelsLast))) == 1

def test_contiguous_images_reach_a_learner_that_was_made_contiguous(small_dls):
    seen, learn = set(), cifar_learner(small_dls(), net(), 'fp32').to_contiguous()
    learn.model.register_forward_pre_hook(lambda module, xs: seen.add(xs[0].is_contiguous()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert seen == {True}

# ---- numbers of metrics

def test_numbers_of_numpy_are_recorded_as_numbers(tiny_learner, tmp_path):
    def right(p, y): return (p.argmax(1) == y).float().mean().numpy()
    def share(p, y): return np.float64((p.argmax(1) == y).float().mean())
    learn = tiny_learner(metrics=[right, share])
    learn.fit(1, 1e-3, cbs=Checkpoints(tmp_path))
    for values in learn.recorder.values[0], learn.validate(), learn.recorder.history[0].values(): assert {type(v) for v in values} <= {float, int}

def test_a_validation_within_an_epoch_leaves_modes_and_bar_as_they_are(small_dls):
    class Modes(Callback):
        order = 80
        def before_train(self): self.model[1].eval() # a norm that keeps its statistics
        def after_batch(self):
            if self.training: seen[-1].append((self.model[1].training, self.model[0].training, self.progress.pbar.last_v))
    seen = []
    for cbs in [], [Ask(asked['a validation'], 'after_batch', 0)]:
        seen.append([])
        learn = cifar_learner(small_dls(), net(), 'fp32', cbs=cbs)
        with learn.no_logging(): learn.fit(1, 1e-2, cbs=Modes())
    assert seen[0] == seen[1] and seen[0][3][:2] == (False, True) and len(seen[0]) == 5
