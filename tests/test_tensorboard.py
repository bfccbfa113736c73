"""What a run writes for TensorBoard, read back from the event files; and that the run is the same with it and without."""
import io, os, signal, threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fastai.vision.all import Callback
from PIL import Image

import forked, workers
from cifar_fastai.core import settings_from
from cifar_fastai.files import read_json
from cifar_fastai.callback.checkpoint import Checkpoints
from cifar_fastai.run.folder import read_history
from cifar_fastai.run.train import resume, train

pytest.importorskip('tensorboard', reason='the extra tensorboard')

curves = {'loss/train': 'train_loss', 'loss/valid': 'valid_loss', 'accuracy/train': 'train_accuracy', 'accuracy/valid': 'accuracy', 'lr': 'lr'}

def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(Path(run)/'tensorboard')).Reload()

def steps(run): # {tag: [step]} of all that is written
    read = events(run)
    return {tag: [e.step for e in getattr(read, kind.capitalize())(tag)] for kind in ('scalars', 'images', 'tensors') for tag in read.Tags()[kind]}

def is_the_history(run):
    read, history = events(run), read_history(run)
    assert set(read.Tags()['scalars']) == set(curves)
    for tag, column in curves.items():
        assert [e.step for e in read.Scalars(tag)] == history['epoch'].tolist()
        assert [e.value for e in read.Scalars(tag)] == pytest.approx(history[column].tolist(), rel=1e-6) # it keeps single precision

@pytest.fixture(scope='module')
def logged(settings, tmp_path_factory):
    run = tmp_path_factory.mktemp('runs')/'logged'
    return run, train(settings(out=str(run), log='tensorboard'))

class Stop(Callback):
    "Ctrl-C, or an error, in a step of the second epoch; the run has five steps in each"
    order = -20
    def __init__(self, error=None): self.error = error
    def before_batch(self):
        if not self.training or self.train_iter != 7: return
        if self.error: raise self.error
        os.kill(os.getpid(), signal.SIGINT)

def stopped(settings, monkeypatch, error=None, **changes):
    import cifar_fastai.run.train as training
    original = training.settings_learner
    def with_stop(*args):
        learn, data = original(*args)
        return learn.add_cb(Stop(error)), data
    with monkeypatch.context() as m, pytest.raises(type(error) if error else KeyboardInterrupt):
        m.setattr(training, 'settings_learner', with_stop)
        train(settings(**changes))
    return Path(changes['out'])

def writers(): # threads that write event files, which end when these are closed
    return [t for t in threading.enumerate() if 'AsyncWriter' in type(t).__name__]

# ---- what is written

def test_the_curves_are_those_of_the_history(logged): is_the_history(logged[0])

def test_the_pictures_are_there_and_show_something(logged):
    read = events(logged[0])
    assert set(read.Tags()['images']) == {'misclassified', 'confusion matrix'}
    for tag in read.Tags()['images']:
        (picture,) = read.Images(tag)
        with Image.open(io.BytesIO(picture.encoded_image_string)) as img: assert min(img.size) > 200 and np.asarray(img.convert('L')).std() > 5
        assert picture.step == 2

def test_the_settings_are_there_to_read_and_to_compare_by(logged):
    from tensorboard.plugins.hparams import plugin_data_pb2
    read = events(logged[0])
    (text,) = read.Tensors('settings/text_summary')
    table = text.tensor_proto.string_val[0].decode()
    for name, value in {**asdict(settings_from(logged[1]['settings'])), **logged[1]['bounds']}.items(): assert f'| {name} | {value} |' in table
    content = read.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams['bs'].number_value == 16 and hparams['recipe'].string_value == 'best' and hparams['lr_max'].number_value == pytest.approx(1e-2)

def test_nothing_is_written_in_a_step_and_nothing_asked_of_the_device(logged):
    assert steps(logged[0]) == {**dict.fromkeys(curves, [1, 2]), 'misclassified': [2], 'confusion matrix': [2], 'settings/text_summary': [0]}

# ---- the run itself

def test_the_run_is_the_same_with_it_and_without(logged, finished):
    (run, summary), (other, without) = logged, finished
    assert summary['weights_sha256'] == without['weights_sha256'] == read_json(run/'summary.json')['weights_sha256']
    assert read_history(run).drop(columns='seconds').equals(read_history(other).drop(columns='seconds'))
    assert (run/'best.safetensors').read_bytes() == (other/'best.safetensors').read_bytes()
    assert {p.name for p in run.iterdir()} - {p.name for p in other.iterdir()} == {'tensorboard'}

def test_a_run_of_before_the_setting_has_none(finished):
    old = {k: v for k, v in read_json(finished[0]/'config.json')['settings'].items() if k != 'log'}
    assert settings_from(old).log == 'none'

# ---- runs that stop and go on

def test_a_run_that_continues_has_the_curves_of_one_that_was_not_stopped(settings, logged, monkeypatch):
    run = stopped(settings, monkeypatch, out='run', log='tensorboard')
    assert writers() == [] and steps(run)['loss/train'] == [1] # epoch 1 is there, and the file is closed
    summary = resume(run)
    assert summary['weights_sha256'] == logged[1]['weights_sha256']
    assert len(list((run/'tensorboard').iterdir())) == 2 and steps(run) == steps(logged[0])
    is_the_history(run)

def test_what_was_written_after_the_last_checkpoint_is_taken_back(settings, logged, monkeypatch):
    "As when a run is killed between the events of an epoch and its checkpoint"
    save = Checkpoints.save
    def first_only(self):
        if self.position == (2, 0): raise RuntimeError('killed before the checkpoint of epoch 2')
        return save(self)
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match='killed before'):
        m.setattr(Checkpoints, 'save', first_only)
        train(settings(out='run', log='tensorboard'))
    assert steps('run')['lr'] == [1, 2]
    resume('run')
    assert steps('run') == steps(logged[0])
    is_the_history('run')

@pytest.mark.parametrize('first, then', [('none', 'tensorboard'), ('tensorboard', 'none')])
@pytest.mark.slow
def test_it_may_be_begun_and_left_off_on_the_way(settings, finished, monkeypatch, first, then):
    run = stopped(settings, monkeypatch, out='run', log=first)
    assert resume(run, dict(log=then))['weights_sha256'] == finished[1]['weights_sha256']
    if then == 'tensorboard': is_the_history(run) # with the epoch before
    else: assert steps(run)['lr'] == [1]

def test_an_error_leaves_a_closed_file_with_all_finished_epochs(settings, monkeypatch):
    run = stopped(settings, monkeypatch, error=ValueError('no more'), out='run', log='tensorboard')
    assert writers() == [] and steps(run)['loss/valid'] == [1]

# ---- the command

@pytest.mark.slow
def test_the_command_says_nothing_but_what_it_says_without(command, small_archive):
    done = command('train', '--data', small_archive, *'--epochs 2 --bs 40 --width 16 --lr_min 1e-4 --lr_max 3e-3 --log tensorboard --out run'.split())
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert not any('tensor' in line.lower() for line in done.stdout.splitlines())
    is_the_history('run')

def test_without_the_extra_it_is_one_sentence_and_no_folder(small_archive):
    args = ['train', '--data', str(small_archive), '--epochs', '1', '--bs', '16', '--log', 'tensorboard', '--out', 'runs/one']
    with forked.Forked(workers.command_without, 'tensorboard', *args) as process: out, err = process.communicate()
    assert process.returncode == 1 and out == ''
    assert err == "cifar_train: tensorboard is not installed: pip install 'cifar_fastai[tensorboard]'\n"
    assert not Path('runs').exists()
