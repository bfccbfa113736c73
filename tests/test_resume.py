"""A run that is stopped at any moment and continued ends with the same weights, bit for bit; damaged checkpoints are noticed."""
import errno, gc, hashlib, json, os, random, re, shutil, signal, subprocess, sys, time, warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.metrics import skm_to_fastai
from fastai.vision.all import (Adam, AvgMetric, Callback, EarlyStoppingCallback, F1Score, GradientAccumulation, ProgressCallback,
                               ReduceLROnPlateau, SaveModelCallback, ValueMetric, accuracy, set_seed)
from safetensors.torch import load_file, save
from sklearn.metrics import recall_score
from torch import nn

import forked, workers
from forked import wait_until
from cifar_fastai.core import TrainSettings, recipes
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.source import load_cifar10
from cifar_fastai.callback.checkpoint import (Checkpoints, FiniteLoss, checkpoints_in, newest_checkpoint,
                                              read_checkpoint, write_checkpoint)
from cifar_fastai.callback.recorder import EpochProgress
from cifar_fastai.learner import Processes, cifar_learner
from cifar_fastai.callback.schedule import OneCycle
from cifar_fastai.look.interpret import class_probabilities
from cifar_fastai.look.report import write_report
from cifar_fastai.run.folder import load_run, read_history
from cifar_fastai.run.train import resume, train
from cifar_fastai.use.export import export_model
from cifar_fastai.use.predict import load_classifier

class Stop(Exception): "What stops a fit in these tests"

class StopAt(Callback):
    "Stop a fit at an event, behind everything else that happens there"
    order = 2000
    def __init__(self, event, times, training=None):
        self.seen = 0
        def count():
            if training is not None and bool(self.training) != training: return
            self.seen += 1
            if self.seen == times: raise Stop(f'{event} {times}')
        setattr(self, event, count)

def fit(learn, folder, epochs=3, stop_at=None, again=False):
    "`stop_at`: a training step, or the arguments of `StopAt`; up to there, each step has its checkpoint"
    if isinstance(stop_at, int): stop_at = 'after_batch', stop_at, True
    cbs = [OneCycle(1e-3, 2e-2), Checkpoints(folder, minutes=0 if stop_at else 60, resume=again), *([StopAt(*stop_at)] if stop_at else [])]
    with learn.no_logging(): learn.fit(epochs, cbs=cbs)
    return learn

moments = [1, 4, 5, 6, 14, 15, ('after_epoch', 1), ('after_epoch', 2), ('before_epoch', 2), ('before_validate', 1), ('after_batch', 2, False), ('after_step', 8), ('after_pred', 9)]

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

# ---- in one process: 3 epochs of 5 steps

@pytest.fixture(scope='module')
def whole_fit(tiny_learner, small_dls, tmp_path_factory): # -> function that makes a learner, and one after its fit, made once
    @cache
    def of(pipeline, num_workers, precision):
        make = lambda: tiny_learner(small_dls(pipeline=pipeline, num_workers=num_workers, recipe='best'), precision=precision)
        return make, fit(make(), tmp_path_factory.mktemp('whole'))
    return of

@pytest.mark.parametrize('pipeline, num_workers, precision, stop_at', [(*how, moment) for how, some in ((('batch', 0, 'bf16'), moments[::2]), (('item', 0, 'fp32'), moments[1::2])) for moment in some]
                         + [pytest.param(*how, moment, marks=pytest.mark.slow) for how, some in ((('batch', 0, 'bf16'), moments[1::2]), (('item', 0, 'fp32'), moments[::2]), (('item', 2, 'bf16'), moments[2:12:3])) for moment in some], ids=str)
def test_a_fit_that_continues_ends_with_the_same_weights_and_history(whole_fit, tmp_path, pipeline, num_workers, precision, stop_at):
    make, whole = whole_fit(pipeline, num_workers, precision)
    with pytest.raises(Stop): fit(make(), tmp_path/'stopped', stop_at=stop_at)
    torch.manual_seed(999); np.random.seed(999); random.seed(999) # whatever happened meanwhile
    again = fit(make(), tmp_path/'stopped', again=True)
    assert same(weights(again), weights(whole))
    for row, row1 in zip(again.recorder.history, whole.recorder.history, strict=True):
        assert {k: v for k, v in row.items() if k != 'seconds'} == {k: v for k, v in row1.items() if k != 'seconds'}
    assert again.recorder.lrs == whole.recorder.lrs and again.recorder.losses == whole.recorder.losses and again.recorder.iters == whole.recorder.iters

@pytest.mark.parametrize('stop_at', [5, 7, ('after_epoch', 1), ('after_batch', 2, False)], ids=str)
@pytest.mark.parametrize('pipeline, num_workers', [('batch', 0), pytest.param('item', 0, marks=pytest.mark.slow), pytest.param('item', 1, marks=pytest.mark.slow)])
def test_dropout_continues_with_the_same_draws(small_dls, tmp_path, stop_at, pipeline, num_workers):
    def make():
        set_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.Dropout(.3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(32, 10))
        return cifar_learner(small_dls(pipeline=pipeline, num_workers=num_workers), net, precision='fp32').remove_cbs(ProgressCallback)
    whole = fit(make(), tmp_path/'whole')
    with pytest.raises(Stop): fit(make(), tmp_path/'stopped', stop_at=stop_at)
    torch.manual_seed(999)
    again = fit(make(), tmp_path/'stopped', again=True)
    assert same(weights(again), weights(whole))

@pytest.mark.parametrize('stop_at', [7, ('after_epoch', 1)], ids=str)
def test_as_two_processes_dropout_continues_with_draws_of_its_own_in_each(tiny_learner, tmp_path, stop_at):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=stop_at)
    class Draw(Callback):
        order = 100 # after all others
        def before_batch(self):
            self.drawn = torch.rand(3)
            raise Stop('drawn')
    drawn = []
    for rank, n in (0, 1), (0, 2), (1, 2):
        learn, draw = tiny_learner(), Draw()
        learn.processes = Processes()
        learn.processes.rank, learn.processes.n = rank, n
        with learn.no_logging(), pytest.raises(Stop): learn.fit(3, cbs=[OneCycle(1e-3, 2e-2), Checkpoints(tmp_path, resume=True), draw])
        drawn.append(draw.drawn)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

def test_it_can_be_stopped_again_and_again(tiny_learner, tmp_path):
    whole = fit(tiny_learner(), tmp_path/'whole')
    for _ in range(5):
        with pytest.raises(Stop): fit(tiny_learner(), tmp_path/'stopped', stop_at=2, again=True)
    again = fit(tiny_learner(), tmp_path/'stopped', again=True)
    assert same(weights(again), weights(whole))

def test_a_finished_fit_that_continues_does_nothing_more(tiny_learner, tmp_path, messages):
    whole = fit(tiny_learner(), tmp_path/'whole')
    again = fit(tiny_learner(), tmp_path/'whole', again=True)
    assert same(weights(again), weights(whole)) and again.recorder.history == whole.recorder.history
    assert len(messages().splitlines()) == 1

def test_it_says_where_it_continues(tiny_learner, tmp_path, messages):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=7)
    fit(tiny_learner(), tmp_path, again=True)
    assert messages().endswith('epoch 2, step 3')

def test_a_shorter_rest_of_an_epoch_sees_the_images_that_were_left(tiny_learner, small_dls, tmp_path):
    class Labels(Callback):
        def before_fit(self): self.seen = []
        def before_batch(self):
            if self.training: self.seen.append(self.yb[0].clone())
    seen = []
    for again, stop_at in (False, 3), (True, None):
        learn, labels = tiny_learner(), Labels()
        with learn.added_cbs(labels):
            try: fit(learn, tmp_path, epochs=1, stop_at=stop_at, again=again)
            except Stop: pass
        seen += labels.seen
    dl = small_dls().train
    assert [t.tolist() for t in seen] == [y.tolist() for _, y in dl]

def test_the_moments_have_the_memory_format_of_the_weights(tiny_learner, tmp_path):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=7)
    learn, formats = tiny_learner(), []
    class Look(Callback):
        order = 1999
        def after_step(self): formats.extend(v.stride() == p.stride() for p, state in self.opt.opt.state.items() for v in state.values() if v.shape == p.shape)
    with learn.added_cbs(Look()): fit(learn, tmp_path, again=True)
    assert formats and all(formats)

def test_checkpoints_of_another_network_are_refused(tiny_learner, small_dls, tmp_path):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=2)
    other = cifar_learner(small_dls(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), precision='fp32')
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))): fit(other, tmp_path, again=True)

def test_checkpoints_of_a_longer_fit_are_refused(tiny_learner, tmp_path):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=2, epochs=5)
    with pytest.raises(ValueError, match=r'\b5 epochs.*\b5 batches'): fit(tiny_learner(), tmp_path, again=True)

def test_a_fit_that_continues_in_the_same_learner_is_the_same(tiny_learner, tmp_path):
    "As in a notebook after Ctrl-C"
    whole, learn = fit(tiny_learner(), tmp_path/'whole'), tiny_learner()
    with pytest.raises(Stop): fit(learn, tmp_path/'stopped', stop_at=7)
    fit(learn, tmp_path/'stopped', again=True)
    assert same(weights(learn), weights(whole)) and len(learn.recorder.history) == 3

def test_checkpoints_of_a_former_fit_are_not_taken_for_its_own(tiny_learner, tmp_path):
    fit(tiny_learner(), tmp_path)
    with pytest.raises(FileExistsError, match=rf'{re.escape(str(tmp_path))}.*resume=True'): fit(tiny_learner(), tmp_path)

def test_they_belong_to_a_fit_and_need_a_learner_of_this_package(small_dls, tmp_path):
    with pytest.raises(ValueError, match='Checkpoints'): cifar_learner(small_dls(), nn.Flatten(), cbs=Checkpoints(tmp_path))
    learn = cifar_learner(small_dls(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), precision='fp32', opt_func=Adam)
    with pytest.raises(ValueError, match='optimizer'): fit(learn, tmp_path)

def test_a_metric_that_cannot_be_kept_keeps_checkpoints_to_the_ends_of_epochs(small_dls, tmp_path):
    set_seed(0)
    learn = cifar_learner(small_dls(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), precision='fp32', metrics=[accuracy, F1Score(average='macro')]).remove_cbs(ProgressCallback)
    with pytest.raises(Stop): fit(learn, tmp_path, stop_at=8)
    assert [p.name for p in checkpoints_in(tmp_path)] == ['00001-0000000.safetensors']

def per_class(preds, targs): return torch.stack([(preds.argmax(1) == i).float().mean() for i in range(10)]) # a vector of each batch
def confusion(preds, targs): return per_class(preds, targs).numpy()*np.ones((2, 1)) # a matrix

vectors = dict(sums=lambda: [accuracy, per_class, AvgMetric(confusion)],
               others=lambda: [accuracy, skm_to_fastai(recall_score, average=None, zero_division=0), ValueMetric(lambda: 'text', 'said'), ValueMetric(lambda: dict(a=1), 'both')])

@pytest.mark.parametrize('metrics, stop_at', [('sums', 7), ('sums', ('after_epoch', 1)), ('others', 7), ('others', ('after_epoch', 2))], ids=str)
def test_metrics_need_not_be_numbers(small_dls, tmp_path, metrics, stop_at):
    def make():
        set_seed(0)
        return cifar_learner(small_dls(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), precision='fp32', metrics=vectors[metrics]())
    def rows(learn): return [[np.asarray(v).tolist() if not isinstance(v, dict) else str(v) for name, v in row.items() if name != 'seconds'] for row in learn.recorder.history]
    whole = fit(make(), tmp_path/'whole')
    with pytest.raises(Stop): fit(make(), tmp_path/'stopped', stop_at=stop_at)
    again = fit(make(), tmp_path/'stopped', again=True)
    assert same(weights(again), weights(whole)) and rows(again) == rows(whole)
    assert [name for name in whole.recorder.history[0] if 'per_class' in name or 'said' in name] == dict(sums=['train_per_class', 'per_class'], others=['said'])[metrics]

@pytest.mark.slow
@pytest.mark.parametrize('workers', [(1, 2), (2, 0), (0, 2)], ids=str)
def test_the_number_of_workers_may_change_in_the_middle_of_an_epoch(tiny_learner, small_dls, tmp_path, workers):
    make = lambda n: tiny_learner(small_dls(pipeline='item', num_workers=n))
    whole = fit(make(0), tmp_path/'whole')
    with pytest.raises(Stop): fit(make(workers[0]), tmp_path/'stopped', stop_at=7)
    assert same(weights(fit(make(workers[1]), tmp_path/'stopped', again=True)), weights(whole))

# ---- files

@pytest.fixture
def kept(tiny_learner, tmp_path):
    "A folder with two checkpoints"
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path/'kept', stop_at=4)
    assert [p.name for p in checkpoints_in(tmp_path/'kept')] == ['00000-0000004.safetensors', '00000-0000003.safetensors']
    return tmp_path/'kept'

def test_two_checkpoints_are_kept_and_nothing_else(kept): assert sorted(p.name for p in kept.iterdir()) == ['00000-0000003.safetensors', '00000-0000004.safetensors']

def positions(n, many): return sorted({int(i) for i in np.linspace(0, n - 1, many)})

def test_a_checkpoint_cut_anywhere_is_noticed(kept, figures):
    tried = 0
    for path in checkpoints_in(kept):
        whole = path.read_bytes()
        for n in positions(len(whole), 20):
            path.write_bytes(whole[:n])
            with pytest.raises(ValueError, match=path.name): read_checkpoint(path)
            tried += 1
    figures('cut', tried=tried, noticed=tried)

def test_a_checkpoint_with_one_bit_changed_is_noticed(kept, figures):
    tried = 0
    for path in checkpoints_in(kept):
        whole = path.read_bytes()
        for n in positions(len(whole), 200):
            damaged = bytearray(whole)
            damaged[n] ^= 1 << (n % 8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name): read_checkpoint(path)
            tried += 1
    figures('flipped', tried=tried, noticed=tried)

def test_what_says_nothing_of_the_file_is_no_damage(kept, monkeypatch):
    "No permission, no memory: the checkpoint stays where it is"
    def refuse(*args, **kwargs): raise PermissionError('not today')
    monkeypatch.setattr('cifar_fastai.callback.checkpoint.safe_open', refuse)
    with pytest.raises(PermissionError): newest_checkpoint(kept)
    assert len(checkpoints_in(kept)) == 2

def test_a_damaged_newest_gives_way_to_the_one_before_with_a_warning(kept):
    newest, before = checkpoints_in(kept)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match='00000-0000004.safetensors'): path, tensors, facts = newest_checkpoint(kept)
    assert path == before and facts['batches'] == 3 and newest.with_suffix('.damaged').exists()

def test_with_all_damaged_it_starts_over(kept, tiny_learner, tmp_path):
    for path in checkpoints_in(kept): path.write_bytes(b'')
    whole = fit(tiny_learner(), tmp_path/'whole')
    damaged = [path.name for path in checkpoints_in(kept)]
    with pytest.warns(UserWarning) as said: again = fit(tiny_learner(), kept, again=True)
    assert all(name in str(w.message) for name, w in zip(damaged, said, strict=True))
    assert same(weights(again), weights(whole))

def test_a_checkpoint_holds_nothing_that_could_be_executed(kept):
    tensors = load_file(checkpoints_in(kept)[0]) # safetensors: numbers only
    assert {'random.torch', 'model.0.weight', 'opt.0.exp_avg'} <= tensors.keys()

def checksum(tensors, text): # of a checkpoint, as anybody can make it
    h = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()): h.update(f'{name} {t.dtype} {tuple(t.shape)}'.encode() + t.numpy().tobytes())
    return h.hexdigest()

@pytest.mark.parametrize('name, value', [('param_groups', [3]), ('epoch', None), ('epoch', '1'), ('epoch', 99), ('batches', -1), ('batches', 6), ('train_iter', 1.5), ('random', {}), ('random', []), ('callbacks', 3),
                                         ('fit', 3), ('fit', [3, 'x']), ('scaler', 3)], ids=str)
def test_facts_that_are_invalid_are_refused_with_the_right_checksum_too(kept, tiny_learner, name, value):
    _, tensors, facts = newest_checkpoint(kept)
    place = dict(epoch=facts['epoch'], batches=facts['batches'])
    write_checkpoint(kept, tensors, {**facts, **place, 'x': 0})
    learn, newest = tiny_learner(), checkpoints_in(kept)[0]
    text = json.dumps({**facts, name: value})
    newest.write_bytes(save(tensors, metadata=dict(facts=text, sha256=checksum(tensors, text))))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: fit(learn, kept, again=True)
        except ValueError as e: assert str(kept) in str(e)
        else: assert name in str(said[0].message) and newest.with_suffix('.damaged').exists() # the one before was used

@pytest.fixture
def disk(tmp_path):
    "Make a file system of so many MB, or change its size"
    folder = tmp_path/'disk'
    folder.mkdir()
    def mount(size):
        options = f'size={size}m' if not os.path.ismount(folder) else f'remount,size={size}m'
        if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)], capture_output=True).returncode:
            pytest.skip('only root may mount a small file system')
        return folder
    yield mount
    if os.path.ismount(folder): subprocess.run(['umount', '--lazy', str(folder)], check=True) # of a test that failed, files are still open

def test_a_full_disk_leaves_the_checkpoint_before_whole(disk):
    small_disk = disk(1)
    write_checkpoint(small_disk, dict(a=torch.zeros(100)), dict(epoch=0, batches=1))
    with pytest.raises(OSError) as e: write_checkpoint(small_disk, dict(a=torch.zeros(1_000_000)), dict(epoch=0, batches=2))
    assert e.value.errno == errno.ENOSPC
    assert [p.name for p in small_disk.iterdir()] == ['00000-0000001.safetensors'] and newest_checkpoint(small_disk)[2]['batches'] == 1

# ---- a loss that is not finite

class Spoil(Callback):
    "Make a loss what it should not be"
    order = -1
    def __init__(self, step, value): self.at, self.value = step, value
    def after_loss(self):
        if not self.training or self.train_iter != self.at: return
        self.learn.loss_grad = self.learn.loss_grad*self.value
        self.learn.loss = self.learn.loss*self.value

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('every', [0, 100, None], ids=['looked at each step', 'looked at before a checkpoint', 'looked at by checkpoints alone'])
def test_a_loss_that_is_not_finite_stops_the_fit_where_it_happened(tiny_learner, tmp_path, value, every):
    learn, checkpoints = tiny_learner(), Checkpoints(tmp_path, minutes=0)
    with pytest.raises(FloatingPointError, match=rf'{value}.*epoch 2, step 3\b'), learn.no_logging():
        learn.fit(3, cbs=[OneCycle(1e-3, 1e-2), *([FiniteLoss(every)] if every is not None else []), checkpoints, Spoil(7, value)])
    _, tensors, facts = newest_checkpoint(tmp_path)
    assert (facts['epoch'], facts['batches']) == (1, 2) # the step before
    assert all(t.isfinite().all() for name, t in tensors.items() if t.is_floating_point())

def test_weights_that_are_not_finite_are_not_kept_though_the_loss_was(tiny_learner, tmp_path):
    class Spoil(Callback):
        order = -1
        def after_backward(self):
            if self.train_iter == 7: next(self.model.parameters()).grad.fill_(float('inf'))
    learn = tiny_learner(precision='fp32')
    with pytest.raises(FloatingPointError, match=r'epoch 2, step 3\b'), learn.no_logging():
        learn.fit(3, cbs=[OneCycle(1e-3, 1e-2), Checkpoints(tmp_path, minutes=0), Spoil()])
    _, tensors, facts = newest_checkpoint(tmp_path)
    assert (facts['epoch'], facts['batches']) == (1, 2) and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())

# ---- runs

class Press(Callback):
    "Send this process a signal at an event"
    order = -20
    def __init__(self, event, times, number=signal.SIGINT, training=None):
        self.seen = 0
        def count():
            if training is not None and bool(self.training) != training: return
            self.seen += 1
            if self.seen == times: os.kill(os.getpid(), number)
        setattr(self, event, count)

def train_and_press(settings, press, monkeypatch):
    import cifar_fastai.run.train as training
    original = training.settings_learner
    def with_press(*args):
        learn, data = original(*args)
        return learn.add_cb(press), data
    with monkeypatch.context() as m:
        m.setattr(training, 'settings_learner', with_press)
        return train(settings)

@pytest.mark.parametrize('press, status', [(('after_batch', 8, signal.SIGINT, True), None), pytest.param(('after_batch', 1, signal.SIGTERM, True), 143, marks=pytest.mark.slow), (('before_validate', 1, signal.SIGTERM), 143),
                                           (('after_batch', 2, signal.SIGINT, False), None), pytest.param(('before_epoch', 2, signal.SIGTERM), 143, marks=pytest.mark.slow), pytest.param(('after_step', 10, signal.SIGINT), None, marks=pytest.mark.slow)], ids=str)
def test_a_run_that_continues_is_the_run_that_was_not_stopped(settings, finished, monkeypatch, tmp_path, press, status):
    "Stopped by a signal in a step, before and in a validation, between epochs"
    run = Path('run')
    with pytest.raises(SystemExit if status else KeyboardInterrupt) as e: train_and_press(settings(out=str(run)), Press(*press), monkeypatch)
    assert not status or e.value.code == status
    assert read_json(run/'summary.json')['interrupted'] is True and checkpoints_in(run/'checkpoint')
    summary = resume(run)
    assert summary['weights_sha256'] == finished[1]['weights_sha256'] and summary['accuracy'] == finished[1]['accuracy']
    assert summary['best_epoch'] == finished[1]['best_epoch'] and not summary['interrupted']
    columns = [c for c in read_history(run).columns if c != 'seconds']
    assert read_history(run)[columns].equals(read_history(finished[0])[columns])
    assert (run/'best.safetensors').read_bytes() == (finished[0]/'best.safetensors').read_bytes()

@pytest.mark.parametrize('recipe', ['quick', pytest.param('fast', marks=pytest.mark.slow)])
def test_a_run_of_less_arithmetic_continues_and_is_reported_predicted_and_exported(small_archive, recipe, monkeypatch):
    "Stopped in the third epoch: of larger images, with a frozen first layer and an average of the weights"
    settings = TrainSettings(str(small_archive), recipe, epochs=4, bs=16, width=16, ghost=4, precision='fp32', device='cpu', num_workers=0, freeze_first=2)
    whole = train(replace(settings, out='whole'))
    steps = -(-whole['data']['n_train']//16)
    with pytest.raises(KeyboardInterrupt): train_and_press(replace(settings, out='run'), Press('after_batch', 2*steps + 2, training=True), monkeypatch)
    summary = resume('run')
    assert summary['weights_sha256'] == whole['weights_sha256'] and tuple(summary['settings']['sizes']) == recipes[recipe].sizes
    lrs = read_history('run')['lr']
    assert lrs.iloc[-1] == pytest.approx(recipes[recipe].lr_min) and lrs.max() < recipes[recipe].lr_max
    assert f'{recipes[recipe].lr_start:.3g} at the first step' in write_report('run').read_text(encoding='utf8')
    images = load_cifar10(small_archive).test_x[:8]
    probs = class_probabilities(load_run('run')[0], images, summary['data']['stats']).numpy()
    for model in ('run', export_model('run', 'onnx')): assert np.allclose(load_classifier(model)[0](images), probs, atol=1e-4)

def test_a_second_ctrl_c_does_not_wait(settings, monkeypatch):
    class Twice(Callback):
        order = -20
        def before_batch(self):
            if self.training and self.train_iter == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError('the second was waited for')
    with pytest.raises(KeyboardInterrupt): train_and_press(settings(out='run'), Twice(), monkeypatch)

@pytest.mark.filterwarnings('ignore:Implicitly cleaning up') # by fastai's LRFinder; its folder is in ours
def test_ctrl_c_in_the_range_test_leaves_no_folder(settings, monkeypatch):
    with pytest.raises(KeyboardInterrupt): train_and_press(settings(out='run', lr_min='find', lr_max='find'), Press('after_batch', 3), monkeypatch)
    assert not Path('run').exists()
    gc.collect()

@pytest.fixture
def nearly_finished(finished, tmp_path):
    "The finished run without its last files"
    run = shutil.copytree(finished[0], tmp_path/'nearly')
    for name in 'summary.json', 'predictions.safetensors': (run/name).unlink()
    return run

def test_a_run_that_lacks_only_its_last_files_gets_them(nearly_finished, finished, capsys):
    assert resume(nearly_finished)['weights_sha256'] == finished[1]['weights_sha256'] and 'epoch 1 of 2' not in capsys.readouterr().out

def test_ctrl_c_after_the_last_epoch_is_ctrl_c(nearly_finished, finished, monkeypatch):
    import cifar_fastai.run.train as training
    original = training.settings_learner
    with monkeypatch.context() as m:
        m.setattr(training, 'settings_learner', lambda *args: (lambda learn, data: (learn.add_cb(Press('before_fit', 1)), data))(*original(*args)))
        with pytest.raises(KeyboardInterrupt): resume(nearly_finished)
    assert resume(nearly_finished)['weights_sha256'] == finished[1]['weights_sha256']

def test_the_folder_is_kept_from_others_until_the_last_file_is_written(nearly_finished, monkeypatch):
    import cifar_fastai.run.train as training
    code, said, original = 'import sys; from filelock import FileLock; FileLock(sys.argv[1]).acquire(timeout=0)', [], training.finish_run
    def others_try(*args):
        said.append(subprocess.run([sys.executable, '-c', code, str(nearly_finished/'.lock')], capture_output=True, text=True).stderr)
        return original(*args)
    monkeypatch.setattr(training, 'finish_run', others_try)
    resume(nearly_finished)
    assert 'Timeout' in said[0]
    assert subprocess.run([sys.executable, '-c', code, str(nearly_finished/'.lock')]).returncode == 0

def test_a_finished_run_says_so(finished, messages):
    run, summary = finished
    assert resume(run) == read_json(run/'summary.json') and str(run) in messages()
    with pytest.raises(ValueError, match='epochs is 2.*3'): resume(run, dict(epochs=3))

@pytest.mark.parametrize('changes, figures', [(dict(epochs=3), 'epochs is 2.*3'), (dict(seed=1), 'seed is 0.*1'),
                                            (dict(bs=8, wd=0.), r'bs is 16.*8.*wd is 0\.25.*0\.0'), (dict(out='other'), 'out is .*other')])
def test_another_setting_is_refused_by_name(unfinished, changes, figures):
    with pytest.raises(ValueError, match=figures): resume(unfinished, changes)

@pytest.fixture
def unfinished(finished, tmp_path):
    "The finished run as it was before its first checkpoint"
    run = tmp_path/'unfinished'
    run.mkdir()
    (run/'config.json').write_bytes((finished[0]/'config.json').read_bytes())
    return run

def test_other_images_are_refused(unfinished, small):
    with pytest.raises(ValueError, match=r'\b60\b.*\b40\b'): resume(unfinished, data=small.first(60, 40))

def test_other_versions_are_refused_unless_forced_and_another_machine_is_warned_of(unfinished, finished):
    config = read_json(unfinished/'config.json')
    config['environment']['packages']['torch'] = '1.0'
    config['environment']['threads'] = 64
    write_json(unfinished/'config.json', config)
    with pytest.raises(ValueError, match=rf'torch.*1\.0.*{re.escape(torch.__version__.split("+")[0])}.*--force'): resume(unfinished)
    with pytest.warns(UserWarning, match=rf'threads.*\b64\b.*\b{torch.get_num_threads()}\b'): summary = resume(unfinished, force=True)
    assert summary['weights_sha256'] == finished[1]['weights_sha256']

def test_without_a_checkpoint_it_starts_over_and_workers_and_minutes_may_change(unfinished, finished, capsys):
    assert resume(unfinished, dict(num_workers=1, checkpoint_minutes=1.))['weights_sha256'] == finished[1]['weights_sha256']
    assert 'epoch 1 of 2' in capsys.readouterr().out

@pytest.mark.parametrize('text', ['', '[]', '{}', '{"settings": {}}', '{"settings": {"epochs": 0}, "bounds": {}}', '{"settings": {"shape": 3}}', '{"settings": 3}',
                                  '{"settings": {}, "bounds": {"lr_min": "x", "lr_max": 1}}', '{"settings": {}, "bounds": {"lr_min": 1, "lr_max": 2}, "data": {"fingerprint": []}, "environment": []}'])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path/'config.json').write_text(text)
    with pytest.raises(ValueError): resume(tmp_path)

def test_a_folder_that_another_process_writes_to_is_refused(unfinished):
    code = 'import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print("held", flush=True); time.sleep(60)'
    with subprocess.Popen([sys.executable, '-c', code, str(unfinished/'.lock')], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(BlockingIOError, match=re.escape(str(unfinished))): resume(unfinished)
        other.kill() # the lock goes with it
    assert resume(unfinished)['epochs'] == 2

# ---- processes that are killed

def start(*args): return forked.Forked(forked.command, 'train', *args)

small_run = '--epochs 3 --bs 16 --lr_min 1e-4 --lr_max 1e-3 --width 16'.split() # 15 steps
digits_run = '--data digits --epochs 2 --bs 128 --lr_min 1e-4 --lr_max 3e-3 --width 16'.split() # 24 steps

def wait_for_config(process, run): wait_until((run/'config.json').exists, process)

def same_end(run, other): # the same weights, and the same history but for the seconds
    history, history1 = (read_history(r).drop(columns='seconds') for r in (run, other))
    return read_json(run/'summary.json')['weights_sha256'] == read_json(other/'summary.json')['weights_sha256'] and history.equals(history1)

def run_to_the_end(args, run):
    "A run that nothing happens to -> its folder, and how many seconds it took from its config.json on"
    with start(*args, '--out', run) as process:
        wait_for_config(process, run)
        began = time.monotonic()
        out, err = process.communicate(timeout=900)
    assert (run/'summary.json').exists(), err
    return run, time.monotonic() - began

def go_on(run):
    "-> what the command said"
    with start('--resume', run) as process: out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out, err

@pytest.fixture(scope='module')
def few(small_archive): return ['--data', small_archive, *small_run]

@pytest.fixture(scope='module')
def undisturbed(few, tmp_path_factory): return run_to_the_end(few, tmp_path_factory.mktemp('runs')/'undisturbed')

@pytest.mark.parametrize('kills, on', [(2, 'few images'), pytest.param(25, 'digits', marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_continued_it_ends_the_same(few, undisturbed, tmp_path, figures, kills, on):
    args, (other, seconds) = (few, undisturbed) if on == 'few images' else (digits_run, run_to_the_end(digits_run, tmp_path/'undisturbed'))
    where = []
    for i in range(kills):
        run, process = tmp_path/f'run{i}', None
        while process is None or process.returncode == 0: # it was at its end before: the machine is faster now
            if process: seconds *= .8; shutil.rmtree(run)
            with start(*args, '--checkpoint_minutes', .02, '--out', run) as process:
                wait_for_config(process, run)
                time.sleep(seconds*(i + .5)/kills*.85) # spread over steps, checkpoints and validation
                process.kill()
                process.communicate()
        assert process.returncode == -signal.SIGKILL
        out, err = go_on(run)
        assert same_end(run, other), (i, out)
        where += [line for line in out.splitlines() if line.startswith(('resuming', 'no checkpoint yet'))] or ['finished before']
    figures(f'kills, {on}', kills=kills, equal=kills, resumed=where)

@pytest.mark.parametrize('write', [pytest.param(n, marks=() if n == 5 else pytest.mark.slow) for n in (1, 2, 3, 5, 8, 13, 21)])
def test_killed_in_the_middle_of_a_write_it_continues_or_starts_over(few, undisturbed, tmp_path, write):
    "The content is written, and has neither reached the disk nor taken its name"
    run = tmp_path/'run'
    with forked.Forked(workers.command_that_dies, write, 'train', *few, '--checkpoint_minutes', 0, '--out', run) as process: out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    if not run.exists(): # killed while the first file was written, and its folder had no name yet: there is nothing to go on with
        assert write <= 2 # the file and its folder
        return
    go_on(run)
    assert same_end(run, undisturbed[0]) and not list(run.rglob('*.part'))

@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_status_that_shells_expect(few, undisturbed, tmp_path, number, status):
    run = tmp_path/'run'
    with start(*few, '--checkpoint_minutes', 0, '--out', run) as process:
        wait_until(lambda: checkpoints_in(run/'checkpoint'), process) # of the first step
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == status and f'--resume {run}' in out and err == ''
    assert newest_checkpoint(run/'checkpoint')
    go_on(run)
    assert same_end(run, undisturbed[0])

def test_a_run_that_fills_the_disk_ends_with_one_sentence_and_continues_when_there_is_room(few, undisturbed, disk):
    "A checkpoint has 5 MB, last and best weights 1.7 MB each"
    run = disk(12)/'run'
    with start(*few, '--out', run) as process: out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and re.fullmatch(rf'cifar_train: .*{os.strerror(errno.ENOSPC)}.*\n', err)
    path, tensors, facts = newest_checkpoint(run/'checkpoint')
    assert facts['epoch'] == 1 and not list(run.rglob('*.part')) and read_history(run).epoch.tolist()[0] == 1
    disk(40)
    assert 'epoch 2, step 1\n' in go_on(run)[0]
    assert same_end(run, undisturbed[0])

def test_of_two_runs_in_one_folder_one_is_refused(few, undisturbed, tmp_path):
    runs = [start(*few, '--out', tmp_path/'run') for _ in range(2)]
    errs = [process.communicate(timeout=300)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 1]
    assert [err.count('\n') for err in sorted(errs)] == [0, 1] and 'exists' in max(errs)
    assert same_end(tmp_path/'run', undisturbed[0])

@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_a_run_folder_that_another_process_makes_at_the_same_time_is_not_touched(kind, tmp_path, monkeypatch):
    from cifar_fastai.run import folder
    def in_between(path, value): # the other process is faster, but only after it was looked for
        write_json(path, value)
        (tmp_path/'run').mkdir() if kind == 'folder' else (tmp_path/'run').write_text('theirs')
        if kind == 'folder': (tmp_path/'run'/'theirs').touch()
    monkeypatch.setattr(folder, 'write_json', in_between)
    with pytest.raises(FileExistsError, match='run'): folder.RunFolder(tmp_path/'run', {}).open()
    assert [file.name for file in tmp_path.rglob('*') if file.is_file()] == ['theirs' if kind == 'folder' else 'run']

@pytest.mark.slow
def test_killed_in_the_range_test_it_starts_over(small_archive, tmp_path):
    args = ['--data', small_archive, '--epochs', 1, '--bs', 16]
    other, _ = run_to_the_end(args, tmp_path/'other')
    with start(*args, '--out', tmp_path/'run') as process:
        wait_for_config(process, tmp_path/'run')
        time.sleep(.5)
        process.kill()
        process.communicate()
    assert read_json(tmp_path/'run'/'config.json')['bounds'] is None
    go_on(tmp_path/'run')
    assert same_end(tmp_path/'run', other) and read_json(tmp_path/'run'/'config.json')['bounds'] == read_json(other/'config.json')['bounds']

def test_the_command_refuses_in_one_sentence(tmp_path):
    for args, words in (['--resume', tmp_path/'nothing'], str(tmp_path/'nothing')), (['--resume', ''], "resume is ''"), (['--force'], 'resume'):
        with start(*args) as process: out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and words in err and len(err.strip().splitlines()) == 1

def test_a_run_with_a_damaged_newest_checkpoint_continues_from_the_one_before(few, undisturbed, tmp_path):
    run = tmp_path/'run'
    with start(*few, '--checkpoint_minutes', 0, '--out', run) as process:
        wait_until(lambda: len(checkpoints_in(run/'checkpoint')) >= 2, process)
        process.kill()
        process.communicate()
    newest = checkpoints_in(run/'checkpoint')[0]
    content = bytearray(newest.read_bytes())
    content[len(content)//2] ^= 1
    newest.write_bytes(content)
    out, err = go_on(run)
    assert err.count('\n') == 1 and newest.name in err and newest.with_suffix('.damaged').exists()
    assert same_end(run, undisturbed[0])

def test_a_batch_that_does_not_fit_into_memory_is_answered_with_a_smaller_one(tmp_path):
    "What the process may have is limited when all is imported"
    options = '--data digits --epochs 1 --bs 1024 --lr_min 1e-4 --lr_max 1e-3 --precision fp32 --whiten False'.split() # whitening takes 1 GB itself
    with forked.Forked(workers.command_with_little_memory, 1_000_000_000, 'train', *options, '--out', tmp_path/'run') as process: out, err = process.communicate()
    assert process.returncode == 1 and 'bs 512' in err and err.count('\n') == 1, err

# ---- several processes at once

@pytest.fixture
def home(tmp_path):
    "fastai's folders for processes of their own, empty"
    folder = tmp_path/'home'
    folder.mkdir()
    (folder/'config.ini').write_text('[DEFAULT]\ndata = data\narchive = archive\nstorage = tmp\nmodel = models\n')
    return folder

@pytest.fixture
def fill_cache(small_archive, home): # -> function that starts a process
    return lambda **kwargs: forked.Forked(workers.fill_cache, small_archive, *kwargs.values(), env=os.environ | dict(FASTAI_HOME=str(home)))

def test_processes_that_fill_the_cache_at_once_do_it_once(fill_cache, home):
    processes = [fill_cache() for _ in range(3)]
    said = [p.communicate()[0].splitlines()[-1] for p in processes]
    assert sorted(said) == ['0 80', '0 80', '1 80']
    assert sorted(p.suffix for p in (home/'data'/'cifar_fastai').iterdir()) == ['.lock', '.npz']

def test_a_process_that_is_killed_while_it_fills_the_cache_blocks_nobody(fill_cache):
    with fill_cache(hangs='yes') as first:
        wait_until(lambda: 'decoding' in first.said()[0], first)
        second = fill_cache()
        time.sleep(2)
        assert second.poll() is None # it waits
        first.kill()
    assert second.communicate(timeout=60)[0].splitlines()[-1] == '1 80'

# ---- callbacks of fastai

def fit_with(learn, folder, cb, epochs=6, stop_after=None, resume=False, lr=1e-3):
    stop = [StopAt('after_epoch', stop_after)] if stop_after else []
    with learn.no_logging(): learn.fit(epochs, lr, cbs=[cb, Checkpoints(folder, resume=resume), *stop])
    return [row['lr'] for row in learn.recorder.history]

@pytest.mark.parametrize('make', [
    lambda: EarlyStoppingCallback('train_loss', patience=3), # improves in each epoch
    lambda: EarlyStoppingCallback('train_loss', patience=2, min_delta=100.), # stops after the second worse epoch
    lambda: ReduceLROnPlateau('train_loss', patience=2, min_delta=100.)], ids=['goes on', 'stops', 'plateau'])
@pytest.mark.parametrize('stop_after', [1, 2, 4])
def test_trackers_of_fastai_go_on_as_if_nothing_had_happened(tiny_learner, tmp_path, capsys, make, stop_after):
    whole = fit_with(tiny_learner(), tmp_path/'whole', make())
    if len(whole) <= stop_after: return
    with pytest.raises(Stop): fit_with(tiny_learner(), tmp_path/'stopped', make(), stop_after=stop_after)
    assert fit_with(tiny_learner(), tmp_path/'stopped', make(), resume=True) == whole

def test_the_best_weights_of_fastai_are_not_replaced_by_worse_ones(tiny_learner, tmp_path):
    def fit(**how):
        learn = tiny_learner()
        learn.path = tmp_path
        best = SaveModelCallback('train_loss', comp=np.greater, fname='best') # the first epoch
        fit_with(learn, tmp_path/'checkpoints', best, **how)
    with pytest.raises(Stop): fit(stop_after=3)
    file = tmp_path/'models'/'best.pth'
    before = torch.load(file)
    fit(resume=True)
    assert same(torch.load(file), before)

def test_finished_epochs_have_no_events_in_a_fit_that_is_resumed(tiny_learner, tmp_path):
    with pytest.raises(Stop): fit_with(tiny_learner(), tmp_path, Callback(), stop_after=3)
    class Seen(Callback):
        def before_epoch(self): epochs.append(self.epoch)
        def after_epoch(self): epochs.append(self.epoch)
    epochs = []
    fit_with(tiny_learner(), tmp_path, Seen(), resume=True)
    assert epochs == [3, 3, 4, 4, 5, 5]

@pytest.mark.parametrize('stop_at', [('after_batch', 3, True), ('after_batch', 6, True), ('after_epoch', 1), ('after_epoch', 2)], ids=str)
def test_gradients_that_are_not_used_yet_are_kept(tiny_learner, tmp_path, stop_at):
    def fit(folder, *more, resume=False):
        learn = tiny_learner()
        with learn.no_logging(): learn.fit(3, 1e-2, cbs=[GradientAccumulation(32), Checkpoints(tmp_path/folder, minutes=0, resume=resume), *more])
        return weights(learn)
    whole = fit('whole')
    with pytest.raises(Stop): fit('stopped', StopAt(*stop_at))
    assert same(fit('stopped', resume=True), whole)

def test_the_order_of_the_images_is_that_of_the_checkpoint(tiny_learner, small_dls, tmp_path):
    def fit(seed, resume=False, stop_at=None):
        dls, seen = small_dls(seed=seed), []
        class See(Callback):
            def before_batch(self):
                if self.training: seen.append(self.y.tolist())
        cbs = [See(), Checkpoints(tmp_path, minutes=0, resume=resume), *([StopAt('after_batch', stop_at, True)] if stop_at else [])]
        learn = tiny_learner(dls)
        with learn.no_logging(): learn.fit(1, cbs=cbs)
        return seen
    whole = []
    for batch in small_dls(seed=11).train: whole.append(batch[1].tolist())
    with pytest.raises(Stop): fit(11, stop_at=2)
    assert fit(12, resume=True) == whole[2:]

@pytest.mark.parametrize('stop_at', [3, 7, ('after_epoch', 1)], ids=str)
def test_the_plot_of_the_schedule_has_all_steps(tiny_learner, tmp_path, stop_at):
    with pytest.raises(Stop): fit(tiny_learner(), tmp_path, stop_at=stop_at)
    recorder = fit(tiny_learner(), tmp_path, again=True).recorder
    assert recorder.hps['lr'] == recorder.lrs and len(recorder.lrs) == 15

@pytest.mark.parametrize('stop_after', [1, 2])
def test_a_fit_with_a_progress_bar_is_resumed(tiny_learner, tmp_path, capsys, stop_after):
    def fit(stop=None, resume=False):
        learn = tiny_learner().add_cb(EpochProgress())
        learn.fit(3, 1e-3, cbs=[Checkpoints(tmp_path, resume=resume), *([StopAt('after_epoch', stop)] if stop else [])])
        return learn.recorder.history
    with pytest.raises(Stop): fit(stop_after)
    assert len(fit(resume=True)) == 3

def test_infinite_gradients_that_are_not_used_yet_do_not_stop_a_fit(tiny_learner, tmp_path):
    class Overflow(Callback): # as a scaled loss in fp16
        def after_backward(self):
            for p in self.learn.model.parameters(): p.grad.fill_(float('inf'))
    learn = tiny_learner()
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[GradientAccumulation(10_000), Overflow(), Checkpoints(tmp_path, minutes=0)])
    assert checkpoints_in(tmp_path)

def test_a_learner_that_was_stopped_between_gradient_and_step_goes_on_exactly(tiny_learner, tmp_path):
    whole = weights(fit(tiny_learner(), tmp_path/'whole'))
    learn = tiny_learner()
    with pytest.raises(Stop): fit(learn, tmp_path/'stopped', stop_at=('before_step', 7))
    assert any(p.grad is not None for p in learn.model.parameters())
    assert same(weights(fit(learn, tmp_path/'stopped', again=True)), whole)

def test_a_seed_of_numpy_is_kept(tiny_learner, small_dls, tmp_path):
    fit(tiny_learner(small_dls(seed=np.int64(3))), tmp_path, epochs=2)
    assert read_checkpoint(checkpoints_in(tmp_path)[0])[1]['seed'] == 3
