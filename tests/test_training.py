"""One run, from its settings to its folder: what it holds, what is refused, and that it can be repeated."""
import hashlib, json, os, re, shutil, signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, ProgressCallback, set_seed
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cifar_fastai.data.augment import CropFlipCutout
from cifar_fastai.core import TrainSettings, ingredients, recipes, settings_from
from cifar_fastai.files import read_json
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.run.folder import history_columns, read_history, read_range_test
from cifar_fastai.data.inspect import first_images
from cifar_fastai.callback.checkpoint import load_weights
from cifar_fastai.learner import cifar_learner
from cifar_fastai.models import CustomResNet, whitening_filters
from cifar_fastai.callback.schedule import LRBounds, OneCycle, bounds_from, lr_bounds, one_cycle_lr, range_test, resolve_bounds
from cifar_fastai.run.train import (SaveRun, StopAfterStep, differences, finish_run, new_run_folder, resume, run_config,
                                    settings_learner, train, write_range_test)

@pytest.fixture(scope='module')
def history(finished): return read_history(finished[0])

# ---- what a run folder holds

def test_a_run_folder_holds_all_that_was_promised_and_nothing_else(finished):
    run, _ = finished
    assert sorted(p.name for p in run.iterdir()) == ['.lock', 'best.safetensors', 'checkpoint', 'config.json', 'history.csv', 'model.safetensors', 'plots',
                                                     'predictions.safetensors', 'summary.json'] # and range_test.csv, when there was one

def test_the_plots_are_pictures_of_something(finished):
    plots = {p.stem: p for p in (finished[0]/'plots').iterdir()}
    assert {'history', 'learning_rate', 'confusion_matrix', 'confusion_matrix_normalized', 'misclassified', 'samples', 'augmented'} <= set(plots)
    for file in plots.values():
        with Image.open(file) as img:
            assert img.format == 'PNG' and min(img.size) > 200
            assert np.asarray(img.convert('L')).std() > 5

def test_the_history_has_its_header_and_a_row_an_epoch(finished):
    lines = (finished[0]/'history.csv').read_text().splitlines()
    assert lines[0] == 'epoch,lr,train_loss,train_accuracy,valid_loss,accuracy,seconds' == ','.join(history_columns)
    assert [line.split(',')[0] for line in lines[1:]] == ['1', '2']
    assert all(np.isfinite([float(value) for value in line.split(',')]).all() for line in lines[1:])

def test_the_history_has_the_rate_of_each_epochs_last_step(history):
    steps = [one_cycle_lr(step, 10, round(2*5/24*5) - 1, 1e-3, 1e-2) for step in range(10)]
    assert history['lr'].tolist() == pytest.approx([steps[4], steps[9]])

def test_the_summary_is_what_train_returns(finished):
    run, summary = finished
    assert read_json(run/'summary.json') == json.loads(json.dumps(summary))

def test_the_summary_holds_what_was_promised(finished, history, small, settings):
    run, summary = finished
    assert summary['n_params'] == sum(p.numel() for p in CustomResNet(width=16).parameters()) and summary['epochs'] == 2 and summary['seed'] == 0 and summary['interrupted'] is False
    assert summary['seconds'] == pytest.approx(history['seconds'].sum())
    assert summary['device'] and summary['precision'] == 'fp32'
    assert summary['settings'] == asdict(settings(out=str(run)).resolved())
    assert summary['bounds'] == dict(lr_min=1e-3, lr_max=1e-2)
    assert tuple(summary['data']['fingerprint']) == small.fingerprint and summary['data']['is_cifar10'] is False
    assert {'torch', 'fastai', 'cifar_fastai'} <= set(summary['environment']['packages'])

def test_final_and_best_accuracy_are_those_of_the_history(finished, history):
    summary, accuracies = finished[1], history['accuracy'].tolist()
    assert summary['accuracy'] == pytest.approx(accuracies[-1]) and summary['best_accuracy'] == pytest.approx(max(accuracies))
    assert summary['best_epoch'] == 1 + accuracies.index(max(accuracies))
    assert summary['n_wrong'] == round(40*(1 - accuracies[-1]))

def test_the_hash_is_that_of_the_weights_file(finished):
    run, summary = finished
    assert summary['weights_sha256'] == hashlib.sha256((run/'model.safetensors').read_bytes()).hexdigest()

def test_the_config_gives_the_settings_back(finished, settings):
    run, _ = finished
    config = read_json(run/'config.json')
    assert settings_from(config['settings']) == settings(out=str(run)).resolved()
    assert config['settings']['wd'] == .25 and config['settings']['peak_epoch'] == pytest.approx(10/24)
    assert None not in config['settings'].values()
    assert config['data']['vocab'][3] == 'cat' and (config['data']['n_train'], config['data']['n_test']) == (80, 40)

def test_the_weights_are_those_of_the_network(finished):
    tensors = load_file(finished[0]/'model.safetensors')
    assert tensors['res2.0.weight'].shape == (128, 128, 3, 3) and {t.dtype for t in tensors.values()} == {torch.float32, torch.int64}
    assert tensors['prep.1.num_batches_tracked'] == 10

def test_what_the_run_predicted_is_kept(finished, small):
    kept = CifarInterpretation.from_predictions(finished[0]/'predictions.safetensors', cifar_dls(small, bs=16, num_workers=0).valid)
    again = CifarInterpretation.from_run(finished[0])
    assert torch.equal(kept.probs, again.probs) and torch.equal(kept.targs, again.targs) and torch.equal(kept.losses, again.losses)
    assert kept.n_wrong == finished[1]['n_wrong']

def test_the_range_test_is_kept_to_the_last_digit(tiny_learner, small, settings, monkeypatch):
    lrs, losses = np.geomspace(1e-7, 10, 100), np.r_[np.full(40, 2.3), np.linspace(2.3, .3, 50), np.geomspace(.3, 9, 10)].astype(np.float32)
    bounds, learn = bounds_from(lrs, losses), tiny_learner()
    saved = SaveRun('run', run_config(settings(), small, bounds))
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=saved)
    finish_run(learn, saved, (lrs, losses, bounds))
    again = read_range_test('run')
    assert np.array_equal(again[0], lrs) and np.array_equal(again[1], losses) and bounds_from(*again) == bounds

def test_numbers_of_a_run_are_read_back_to_the_last_bit(tmp_path):
    "pandas 2 reads floats inexactly unless it is told to"
    numbers = np.random.default_rng(0).uniform(0, 3, (500, len(history_columns) - 1))*10.**np.random.default_rng(1).integers(-8, 2, (500, 1))
    rows = '\n'.join(','.join([str(i), *map(repr, row)]) for i, row in enumerate(numbers.tolist(), 1))
    (tmp_path/'history.csv').write_text(f"{','.join(history_columns)}\n{rows}\n")
    assert np.array_equal(read_history(tmp_path)[history_columns[1:]].to_numpy(), numbers)
    write_range_test(tmp_path, *numbers[:, :2].T)
    assert np.array_equal(np.transpose(read_range_test(tmp_path)), numbers[:, :2])

def test_a_run_without_a_range_test_says_so(finished):
    with pytest.raises(FileNotFoundError, match=r'range_test\.csv'): read_range_test(finished[0])

@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n', 'lr,loss\nx,y\n', 'lr,loss\n', 'lr,loss\n-1,2\n', 'no table'])
def test_what_is_no_range_test_is_refused_by_name(text, tmp_path):
    (tmp_path/'range_test.csv').write_text(text)
    with pytest.raises(ValueError, match=r'range_test\.csv'): read_range_test(tmp_path)

# ---- settings that were left out

def test_every_user_of_settings_takes_them_with_values_left_out(settings, small, tiny_learner):
    left_out = settings(ghost=None, lr_min=None)
    learn, _ = settings_learner(left_out)
    assert learn.dls.train.bs == 16 and learn.loss_func.func.label_smoothing == recipes['best'].label_smoothing
    resolved = left_out.resolved()
    assert resolve_bounds(learn, resolved.lr_min, resolved.lr_max) == (LRBounds(recipes['best'].lr_min, 1e-2), None)
    for config in (run_config(s, small, None)['settings'] for s in (left_out, left_out.resolved())):
        assert config == asdict(left_out.resolved())
        assert {name: config[name] for name in ingredients} == {name: getattr(recipes['best'], name) for name in ingredients} | dict(lr_max=1e-2)

def assert_differ(recorded, given, *patterns):
    "One text for each setting that differs, in their order"
    assert all(re.match(p, text) for p, text in zip(patterns, differences(recorded, given), strict=True))

def test_settings_are_compared_as_they_resolve():
    recorded = asdict(TrainSettings('digits', wd=.5, num_workers=2).resolved())
    same = (asdict(TrainSettings('digits', wd=.5)), dict(data='/moved', num_workers=None), {}, dict(betas=[.9, .99]),
            dict(betas=(.9, .99), flip=None, peak_epoch=None, epochs=None))
    for given in same: assert differences(recorded, given) == []
    assert_differ(recorded, dict(wd=None), r'wd\b.*\b0\.5\b.*\b0\.25\b')
    assert_differ(recorded, dict(epochs=1, recipe='baseline'), r'epochs\b.*\b10\b.*\b1\b', r"recipe\b.*'best'.*'baseline'")

def test_what_an_old_run_did_not_name_is_compared_too():
    old = asdict(TrainSettings(recipe='baseline').resolved())
    for name in 'recipe', 'whiten', 'ghost': del old[name]
    assert differences(old, asdict(TrainSettings(recipe='baseline'))) == []
    assert_differ(old, dict(recipe='best', whiten=True, ghost=0), r"recipe\b.*'baseline'.*'best'", r'whiten\b.*\bFalse\b.*\bTrue\b')

@pytest.mark.parametrize('changes, message', [
    (dict(ghost=None), r'ghost\b.*\b4\b.*\b32\b'), (dict(epochs=1), r'epochs\b.*\b2\b.*\b1\b'),
    (dict(recipe='baseline'), r"recipe\b.*'best'.*'baseline'")])
def test_a_run_continues_with_its_own_settings_alone(finished, tmp_path, changes, message):
    run = shutil.copytree(finished[0], tmp_path/'run')
    with pytest.raises(ValueError, match=message): resume(run, changes)
    assert resume(run, dict(wd=None, bs=16)) == read_json(run/'summary.json')

# ---- what it says

def test_a_run_says_what_data_it_has_and_that_best_on_test_images_is_optimistic(settings, capsys, messages, small):
    train(settings(epochs=1, out='run'))
    said = messages()
    assert re.search(r'\b80 training\b.*\b40 test\b', said) and small.fingerprint[0][:8] in said
    assert re.search(r'\b1\.00e-03\b.*\b1\.00e-02\b', said)
    assert re.search(r'^epoch 1 of 1\b.*train_loss.*\n\Z', capsys.readouterr().out) # of the recorder alone: a library logs
    assert re.search(r'\btest\b.*\d+\.\d+%.*\bepoch 1\b.*optimistic.*\brun\Z', said)

def test_a_run_on_the_hold_out_uses_no_test_image_and_says_so(settings, messages):
    summary = train(settings(epochs=1, valid='holdout', norm='group', n_groups=4, dropout=.1, conv_bias=True, anneal='cos', out='run'))
    said = messages()
    assert 'held-out' in said and 'optimistic' not in said
    assert summary['valid'] == 'holdout' and summary['n_params'] == sum(p.numel() for p in CustomResNet(width=16, conv_bias=True).parameters())
    assert len(CifarInterpretation.from_run('run').targs) == 10 # a tenth of 80, rounded in each class

# ---- the same again

def test_the_same_settings_give_the_same_weights(settings, finished):
    again, other = train(settings(out='again')), train(settings(out='other', seed=1, epochs=1))
    assert again['weights_sha256'] == finished[1]['weights_sha256'] != other['weights_sha256']
    assert again['accuracy'] == finished[1]['accuracy']

# ---- last and best

@pytest.fixture
def worse_at_the_end(tiny_learner, settings, small):
    "A fit of three epochs whose network is spoilt after the first, and the callback that saved it"
    class Spoil(Callback):
        def before_validate(self):
            if self.epoch > 0: self.model[-1].weight.data.zero_()
    learn, saved = tiny_learner(), SaveRun('run', run_config(settings(), small, LRBounds(1e-3, 1e-2)))
    learn.fit(12, .02)
    learn.fit(3, .005, cbs=[saved, Spoil()])
    return learn, saved

def test_best_and_last_weights_are_both_kept(worse_at_the_end, tiny_net, small_dls):
    learn, saved = worse_at_the_end
    accuracies = [row['accuracy'] for row in learn.recorder.history]
    assert accuracies[0] > .15 and accuracies[1:] == pytest.approx([.1, .1])
    def accuracy(name):
        learn.model = load_weights(tiny_net(), saved.path/name)
        return learn.validate()[1]
    assert saved.best_epoch == 1
    assert accuracy('best.safetensors') == pytest.approx(accuracies[0])
    assert accuracy('model.safetensors') == pytest.approx(accuracies[-1])

# ---- refusals

def test_a_new_run_folder_has_the_date_as_its_name():
    assert re.fullmatch(r'runs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d', str(new_run_folder()))

@pytest.mark.parametrize('kind', ['folder', 'full folder', 'file', 'broken link'])
def test_a_run_folder_that_exists_is_refused_and_left_as_it_is(settings, kind, tmp_path):
    out = tmp_path/'run'
    if kind == 'file': out.write_text('mine')
    elif kind == 'broken link': out.symlink_to('nowhere')
    else: out.mkdir()
    if kind == 'full folder': (out/'history.csv').write_text('mine')
    before = sorted((p.name, p.lstat().st_mtime_ns) for p in tmp_path.rglob('*'))
    with pytest.raises(FileExistsError, match=rf'{re.escape(str(out))}\b.*--out'): train(settings(out=str(out)))
    assert sorted((p.name, p.lstat().st_mtime_ns) for p in tmp_path.rglob('*')) == before

def test_a_run_folder_that_another_run_made_meanwhile_is_left_as_it_is(tiny_learner, settings, small, folder_of_its_own):
    learn, saved = tiny_learner(), SaveRun('run', run_config(settings(), small, LRBounds(1e-3, 1e-2)))
    Path('run').mkdir()
    with pytest.raises(FileExistsError): learn.fit(1, .01, cbs=saved)
    assert list(Path('run').iterdir()) == []

def test_a_run_folder_below_a_file_is_refused_by_name(settings, tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError) as e: train(settings(out=str(tmp_path/'file'/'run')))
    assert str(tmp_path/'file') in str(e.value) and 'Exception occured' not in str(e.value)

refused = {'no data': (dict(data='/no/such'), FileNotFoundError, '/no/such'),
           'an fp16 on a processor': (dict(precision='fp16'), ValueError, "precision is 'fp16'")}

@pytest.mark.parametrize('change', refused)
def test_a_run_that_is_refused_leaves_no_folder(settings, change, folder_of_its_own):
    changes, error, message = refused[change]
    with pytest.raises(error, match=message): train(settings(out='runs/a', **changes))
    assert list(folder_of_its_own.iterdir()) == []

# ---- found bounds

@pytest.fixture
def findable(digits):
    "A learner on digits with a network of two layers, whose range test takes a second"
    set_seed(0)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    dls = cifar_dls(digits.first(400, 40), bs=32, num_workers=0, seed=0, aug=CropFlipCutout(pad=0, flip_p=0, cutout=0))
    return cifar_learner(dls, net, 'fp32').remove_cbs(ProgressCallback)

@pytest.mark.parametrize('given, kept', [(dict(lr_min='find', lr_max='find'), {}), (dict(lr_min='find', lr_max=.5), dict(lr_max=.5)), (dict(lr_min=1e-5, lr_max='find'), dict(lr_min=1e-5))])
def test_bounds_that_are_not_given_are_found(findable, given, kept):
    found = bounds_from(*range_test(findable))
    bounds, (lrs, losses) = resolve_bounds(findable, **given)
    assert bounds._asdict() == found._asdict() | kept and len(lrs) == len(losses)

@pytest.mark.parametrize('given', [dict(lr_min=1e6, lr_max='find'), dict(lr_min='find', lr_max=1e-9)])
def test_bounds_that_do_not_fit_those_found_are_refused(findable, given):
    with pytest.raises(ValueError, match=r'lr_min.*lr_max.*range test'): resolve_bounds(findable, **given)

def test_the_lower_bound_is_that_of_the_recipe_unless_it_is_to_be_found(findable):
    found = bounds_from(*range_test(findable))
    assert lr_bounds(findable, show_plot=False) == (recipes['best'].lr_min, found.lr_max)
    assert lr_bounds(findable, show_plot=False, lr_min='find') == found

def test_bounds_that_are_given_need_no_range_test(tiny_learner):
    assert resolve_bounds(tiny_learner(), 1e-3, 1e-2) == (LRBounds(1e-3, 1e-2), None)

def test_a_run_with_found_bounds_records_and_draws_them(settings, messages, digits):
    summary = train(settings(data='digits', epochs=1, bs=4, lr_min='find', lr_max='find', out='run'), digits.first(80, 40))
    said, bounds = messages(), summary['bounds']
    assert 0 < bounds['lr_min'] <= bounds['lr_max']/10 and bounds['lr_max'] < 10
    assert re.search(rf'\b{bounds["lr_min"]:.2e}\b.*\b{bounds["lr_max"]:.2e}\b.*range test', said)
    assert Path('run/plots/range_test.png').exists() and read_history('run')['lr'].iloc[0] == pytest.approx(bounds['lr_min'])

@pytest.mark.slow
def test_of_the_recipe_best_the_height_alone_is_found(settings, messages, digits):
    summary = train(settings(data='digits', epochs=1, bs=4, lr_min=None, lr_max='find', out='run'), digits.first(80, 40))
    bounds = summary['bounds']
    assert bounds == dict(lr_min=recipes['best'].lr_min, lr_max=bounds_from(*read_range_test('run')).lr_max)
    assert re.search(rf'\b6.50e-04\b.*\b{bounds["lr_max"]:.2e}\b.*lr_max.*range test', messages())

# ---- where the first layer begins

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_the_first_images_are_normalised_in_order_and_not_augmented(small, pipeline):
    images = first_images(cifar_dls(small, bs=16, pipeline=pipeline, seed=0, num_workers=0), 30)
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in small.stats)
    assert torch.allclose(images.cpu(), (torch.from_numpy(small.train_x[:30]).permute(0, 3, 1, 2)/255 - mean)/std, atol=1e-5)

@pytest.mark.parametrize('valid', ['test', 'holdout'])
def test_a_whitened_run_begins_with_filters_of_its_own_training_images(settings, valid):
    learn, data = settings_learner(settings(whiten=True, valid=valid))
    images = first_images(learn.dls)
    assert len(images) == len(learn.dls.train_ds) == (80 if valid == 'test' else 70)
    assert torch.equal(learn.model.prep[0].weight[:8].cpu(), whitening_filters(images.cpu())[:8])

def test_whitening_changes_no_random_draw(settings):
    plain, whitened = (settings_learner(settings(whiten=whiten))[0] for whiten in (False, True))
    assert torch.equal(plain.model.prep[0].weight[54:], whitened.model.prep[0].weight[54:]) and torch.equal(plain.model.fc.weight, whitened.model.fc.weight)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain.dls.train, whitened.dls.train))

# ---- from Python as from the command line

@pytest.mark.slow
def test_the_lines_of_the_readme_train_what_the_command_trains(digits, tmp_path):
    few = digits.first(80, 20)
    set_seed(0, reproducible=True)
    dls = cifar_dls(few, bs=8, seed=0)
    learn = cifar_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=OneCycle(*lr_bounds(learn, show_plot=False)))
    train(TrainSettings('digits', epochs=2, bs=8, out=str(tmp_path/'run')), few)
    trained = load_weights(CustomResNet(ghost=32, logit_scale=.125), tmp_path/'run'/'model.safetensors').state_dict()
    assert all(torch.equal(trained[name], t) for name, t in learn.model.state_dict().items())

def test_a_run_on_classes_of_different_sizes_says_the_balanced_accuracy(digits, tmp_path, messages):
    settings = dict(data='digits', epochs=1, bs=32, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32')
    few = digits.first(128, 40)
    idxs = np.concatenate([np.flatnonzero(few.test_y < 3), np.flatnonzero(few.test_y == 3)[:1]])
    uneven = few._replace(test_x=few.test_x[idxs], test_y=few.test_y[idxs])
    summary = train(TrainSettings(out=str(tmp_path/'run'), **settings), uneven)
    interp = CifarInterpretation.from_run(tmp_path/'run', uneven)
    recall = [(interp.decoded[interp.targs == label] == label).float().mean().item() for label in range(4)]
    assert read_json(tmp_path/'run/summary.json')['balanced_accuracy'] == summary['balanced_accuracy'] == pytest.approx(np.mean(recall))
    assert interp.is_unbalanced and re.search(f"balanced.*{summary['balanced_accuracy']:.2%}", messages())

def test_ctrl_c_in_the_range_test_leaves_no_folder_and_says_so(digits, tmp_path, messages, monkeypatch):
    monkeypatch.setattr(StopAfterStep, 'before_batch', lambda self: os.kill(os.getpid(), signal.SIGINT), raising=False)
    run = tmp_path/'run'
    settings = TrainSettings('digits', recipe='baseline', epochs=1, bs=32, width=8, num_workers=0, precision='fp32', out=str(run))
    with pytest.raises(KeyboardInterrupt): train(settings, digits.first(64, 32))
    assert not run.exists() and str(run) in messages().splitlines()[-1] and re.search(r'\b100 steps', messages())

def test_a_signal_at_the_end_of_a_range_test_stops_the_fit_after_it(tiny_learner, monkeypatch):
    learn = tiny_learner()
    load = learn.model.load_state_dict
    def press(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return load(*args, **kwargs)
    with StopAfterStep() as stop, learn.added_cbs(stop), learn.no_logging():
        with monkeypatch.context() as patch:
            patch.setattr(learn.model, 'load_state_dict', press)
            with pytest.raises(KeyboardInterrupt):
                range_test(learn, num_it=3)
                learn.fit(1)

@pytest.mark.parametrize('sizes', [(8, 32), (12, 14, 16)], ids=str)
def test_a_last_batch_of_one_small_image_is_refused_before_there_is_a_folder(settings, tmp_path, sizes):
    out = tmp_path/'run'
    with pytest.raises(ValueError, match='bs is 79'): train(settings(out=str(out), ghost=0, sizes=sizes, bs=79))
    assert not out.exists()
