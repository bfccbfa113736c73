"""The facts, the settings and their refusals, and that importing them costs nothing."""
import errno, io, json, math, os, re, stat, subprocess, sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from cifar_fastai.cli import LRFindSettings, RunSettings
from cifar_fastai.core import (BenchSettings, RepeatSettings, TrainSettings, cifar10_classes, cifar10_stats,
                               data_variable, environment, images_per_pass, named_source, peak_memory,
                               recipes, settings_from, source_defaults)
from cifar_fastai.files import read_json, write_json, write_whole


def test_classes_are_the_ten_in_alphabetical_order():
    assert list(cifar10_classes) == sorted('airplane automobile bird cat deer dog frog horse ship truck'.split())

def test_stats_are_those_of_the_training_images():
    assert cifar10_stats == ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784))

# ---- defaults

@pytest.mark.parametrize('size, n', [(32, 500), (64, 125), (128, 31), (1024, 1)])
def test_a_pass_has_as_many_pixels_at_every_size(size, n): assert images_per_pass(size) == n

def test_defaults_are_the_assignment():
    s = TrainSettings().resolved()
    assert (s.data, s.epochs, s.bs, s.peak_epoch) == ('cifar10', 24, 512, 5)
    assert (s.lr_min, s.lr_max, s.anneal) == (6.5e-4, 'find', 'linear')
    assert TrainSettings(recipe='baseline').resolved().lr_min == 'find'
    assert (s.norm, s.dropout, s.conv_bias, s.valid, s.precision) == ('batch', 0, False, 'test', 'auto')

def test_digits_have_defaults_of_their_own():
    s = TrainSettings(data='digits').resolved()
    assert (s.epochs, s.bs) == (10, 64)
    assert s.peak_epoch == pytest.approx(10*5/24)

@pytest.mark.parametrize('recipe, epochs, bs, sizes', [('quick', 4, 128, (20, 24, 28, 32)), ('fast', 11, 256, (20, 24, 28, 32, 32)), ('best', 24, 512, ()), ('baseline', 24, 512, ())])
def test_a_recipe_has_its_epochs_and_its_batch_size_but_for_the_digits(recipe, epochs, bs, sizes):
    s, digits = TrainSettings(recipe=recipe).resolved(), TrainSettings('digits', recipe).resolved()
    assert (s.epochs, s.bs, s.peak_epoch, s.sizes) == (epochs, bs, pytest.approx(epochs*5/24), sizes)
    assert (digits.epochs, digits.bs, digits.sizes) == (10, 64, sizes)
    assert TrainSettings(recipe=recipe, epochs=3, bs=32).resolved().bs == 32

def test_the_first_learning_rate_is_at_most_the_one_at_the_peak():
    with pytest.raises(ValueError, match='lr_start is 0.02: .*0.01'): TrainSettings(recipe='fast', lr_start=.02, lr_max=.01)
    with pytest.raises(ValueError, match='lr_start is 0.0016: .*0.001'): TrainSettings(recipe='fast', lr_max=.001)

def test_what_is_given_is_kept():
    s = TrainSettings(data='digits', epochs=3, bs=32, peak_epoch=0.5).resolved()
    assert (s.epochs, s.bs, s.peak_epoch) == (3, 32, 0.5)

def test_the_environment_names_the_data_in_place_of_cifar10(monkeypatch):
    monkeypatch.setenv(data_variable, 'digits')
    assert named_source() == named_source('cifar10') == 'digits'
    assert named_source('/some/folder') == '/some/folder'
    assert source_defaults() == dict(epochs=10, bs=64)
    assert TrainSettings().resolved().epochs == 10

def test_an_empty_variable_is_as_none(monkeypatch):
    monkeypatch.setenv(data_variable, '')
    assert named_source() == 'cifar10'

# ---- settings that were left out

every_settings = [TrainSettings, RunSettings, LRFindSettings, RepeatSettings, BenchSettings]

@pytest.mark.parametrize('cls', every_settings)
def test_a_setting_that_is_not_given_stays_none_and_is_resolved_in_a_copy(cls):
    settings = cls(data='digits')
    assert settings.bs is None and settings.resolved().bs == 64 and settings.bs is None
    assert type(settings.resolved()) is cls and settings.resolved().resolved() == settings.resolved()
    left_out = {f.name for f in fields(settings) if getattr(settings, f.name) != getattr(settings.resolved(), f.name)}
    assert left_out == ({'bs'} if cls is BenchSettings else {'epochs', 'bs', 'peak_epoch', *asdict(recipes['best'])})

@pytest.mark.parametrize('cls', every_settings)
def test_replacing_the_data_set_replaces_its_batch_size(cls):
    for first, then, bs in ('cifar10', 'digits', 64), ('digits', 'cifar10', 512):
        settings = replace(cls(data=first), data=then)
        assert settings == cls(data=then) and settings.resolved().bs == bs

@pytest.mark.parametrize('cls', every_settings[:-1])
def test_replacing_the_recipe_replaces_its_values(cls):
    settings = replace(cls(wd=.1), recipe='baseline')
    resolved = settings.resolved()
    assert settings == cls(wd=.1, recipe='baseline')
    assert {name: getattr(resolved, name) for name in asdict(recipes['baseline'])} == asdict(recipes['baseline']) | dict(wd=.1, epochs=24, bs=512)

@pytest.mark.parametrize('cls', every_settings[:-1])
def test_replacing_the_epochs_moves_the_peak_along(cls):
    cases = (dict(epochs=5), 5, 25/24), (dict(data='digits'), 10, 50/24), (dict(epochs=48, peak_epoch=3), 48, 3)
    for changes, epochs, peak in cases:
        settings = replace(cls(), **changes).resolved()
        assert (settings.epochs, settings.peak_epoch) == (epochs, pytest.approx(peak))

other_values = dict(
    data='digits', class_weights=True, size=64, model='resnet18', pretrained=True, recipe='baseline', epochs=7, bs=32, peak_epoch=2.5, lr_max=.2, lr_min=1e-3, lr_start=.1, anneal='cos', norm='group',
    n_groups=4, ghost=8, logit_scale=.5, width=32, whiten=False, dirac=True, cutout=4, rotate=5., sizes=(16, 32), freeze_first=2, lookahead=3, dropout=.1, conv_bias=True, betas=(.8, .95), eps=1e-6, wd=.3,
    label_smoothing=.05, flip='random', precision='fp32', device='cpu', compile=True, valid='holdout', pipeline='item',
    num_workers=0, checkpoint_minutes=1., log='tensorboard', seed=3, out='runs/a', n=2, without=('flip',), resume='runs/b', force=True,
    plot='p.png', cases=('plain',), steps=2, repeats=3, warmup=4, batches=False, growth=True, image_sizes=(16, 32), own='runs')

@pytest.mark.parametrize('cls', every_settings)
def test_replacing_any_setting_is_the_same_as_giving_it(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'runs').mkdir() # a benchmark writes into a folder that exists
    values = other_values | (dict(recipe='best') if cls is BenchSettings else {})
    for name in {f.name for f in fields(cls)} - {'ablate', 'pretrained'}: # which go with the hold-out, and with other models, alone
        settings = replace(cls(), **{name: values[name]})
        assert getattr(settings, name) == values[name] != getattr(cls(), name)
        assert settings == cls(**{name: values[name]})
        assert replace(settings, **{name: getattr(cls(), name)}).resolved() == cls().resolved() # and back

def test_what_is_left_out_is_checked_as_it_resolves(monkeypatch):
    with pytest.raises(ValueError, match='peak_epoch is 3: .*2'): TrainSettings(epochs=2, peak_epoch=3)
    with pytest.raises(ValueError, match='peak_epoch is 12: .*10'): TrainSettings(data='digits', peak_epoch=12)
    with pytest.raises(ValueError, match='peak_epoch is 12: .*10'): replace(TrainSettings(peak_epoch=12), data='digits')
    with pytest.raises(ValueError, match='lr_min is 0.00065: .*1e-05'): TrainSettings(lr_max=1e-5)
    assert replace(TrainSettings(recipe='baseline', lr_max=1e-5), lr_min=1e-6).resolved().lr_max == 1e-5

def test_the_environment_is_read_when_settings_are_resolved(monkeypatch):
    settings = TrainSettings()
    assert settings.resolved().epochs == 24
    monkeypatch.setenv(data_variable, 'digits')
    resolved = settings.resolved()
    assert (resolved.data, resolved.epochs, resolved.bs) == ('cifar10', 10, 64) and BenchSettings().resolved().bs == 64
    monkeypatch.delenv(data_variable)
    assert resolved.resolved() == resolved and resolved.epochs == 10 # what is resolved stays

def test_network_and_optimizer_get_values_and_never_none():
    assert TrainSettings().network == TrainSettings().resolved().network
    assert TrainSettings().network['ghost'] == recipes['best'].ghost
    assert TrainSettings(recipe='baseline').optimization['wd'] == recipes['baseline'].wd

# ---- refusals

refused = [
    ('model', ''), ('model', 'os.system()'), ('model', 'timm:hf-hub:a/b'), ('size', 8), ('size', 33), ('size', 136), ('size', 0),
    ('epochs', 0), ('epochs', -1), ('bs', 1), ('bs', 0), ('bs', -64), ('peak_epoch', 0), ('peak_epoch', 24), ('peak_epoch', 30.), ('peak_epoch', math.nan),
    ('lr_max', 0), ('lr_max', -.1), ('lr_max', math.inf), ('lr_max', math.nan), ('lr_max', 'high'), ('lr_min', 0.), ('lr_min', math.nan), ('lr_min', 'low'),
    ('anneal', 'steps'), ('norm', 'nosuch'), ('n_groups', 0), ('n_groups', 3), ('width', 0), ('width', 15), ('width', 2048), ('dropout', -.1), ('dropout', 1), ('dropout', math.nan), ('betas', (0.9,)),
    ('betas', (0.9, 1.)), ('betas', (-.1, .99)), ('eps', 0), ('eps', -1e-8), ('wd', -.1), ('wd', math.inf), ('wd', math.nan), ('precision', 'fp8'),
    ('recipe', 'worst'), ('recipe', {}), ('label_smoothing', -.1), ('label_smoothing', 1), ('flip', 'never'), ('ghost', 1), ('ghost', -32), ('ghost', 2.5),
    ('logit_scale', 0), ('logit_scale', -.1), ('logit_scale', math.inf), ('logit_scale', math.nan), ('whiten', 1), ('whiten', 'yes'),
    ('lr_start', -.1), ('lr_start', math.nan), ('lr_start', 'low'), ('dirac', 1), ('cutout', -1), ('cutout', 33), ('cutout', 2.5), ('rotate', -1), ('pretrained', True), ('pretrained', 'yes'), ('rotate', 181), ('rotate', math.nan), ('rotate', '5'), ('sizes', 32), ('sizes', (4,)),
    ('sizes', (16, 2048)), ('sizes', (24.5,)), ('freeze_first', -1), ('freeze_first', 1.5), ('lookahead', -5), ('lookahead', .5),
    ('valid', 'train'), ('pipeline', 'none'), ('num_workers', -1), ('checkpoint_minutes', -1), ('checkpoint_minutes', math.nan), ('log', 'wandb'), ('seed', -1), ('seed', 2**32)]

@pytest.mark.parametrize('name, value', refused)
def test_invalid_values_are_refused_by_name_value_and_remedy(name, value):
    with pytest.raises(ValueError) as e: TrainSettings(**{name: value})
    message = str(e.value)
    assert re.fullmatch(rf'{name} is {re.escape(repr(value))}: .+', message) # and not a line break

def test_every_setting_but_names_and_switches_has_a_refusal():
    assert {f.name for f in fields(TrainSettings)} - {name for name, _ in refused} == {'data', 'device', 'conv_bias', 'compile', 'class_weights', 'out'} # a device is looked for when the data are brought to it

@pytest.mark.parametrize('name', ['epochs', 'bs', 'peak_epoch', 'dropout', 'n_groups', 'eps', 'wd', 'num_workers', 'seed', 'betas'])
def test_a_value_of_another_type_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name): TrainSettings(**{name: 'many'})

@pytest.mark.parametrize('name', ['epochs', 'bs', 'seed'])
def test_what_is_counted_is_a_whole_number(name):
    with pytest.raises(ValueError, match=name): TrainSettings(**{name: 2.5})

@pytest.mark.parametrize('lr_min, lr_max', [(.1, .1), (.2, .1)])
def test_lr_min_must_be_less_than_lr_max(lr_min, lr_max):
    with pytest.raises(ValueError, match=rf'lr_min is {re.escape(str(lr_min))}\b.*lr_max.*\b0\.1\b'):
        TrainSettings(lr_min=lr_min, lr_max=lr_max)

def test_one_epoch_has_its_peak_within_it(): assert TrainSettings(epochs=1).resolved().peak_epoch == pytest.approx(5/24)

def test_settings_do_not_change():
    with pytest.raises(AttributeError): TrainSettings().epochs = 3

# ---- JSON

@pytest.mark.parametrize('changes', [{}, dict(data='digits', lr_max=.1, lr_min=.001, betas=(.8, .9), norm='group', n_groups=4, conv_bias=True, out='runs/a')])
def test_settings_come_back_from_json(changes, tmp_path):
    s = TrainSettings(**changes)
    assert settings_from(read_json(write_json(tmp_path/'s.json', asdict(s)))) == s

def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ValueError, match='colour.*shape'): settings_from(dict(epochs=3, shape=1, colour='red'))

def test_a_run_that_names_no_recipe_is_of_the_one_there_was():
    old = {k: v for k, v in asdict(TrainSettings(recipe='baseline').resolved()).items() if k not in ('recipe', 'label_smoothing', 'flip', 'ghost', 'logit_scale', 'whiten')}
    assert settings_from(old).resolved() == TrainSettings(recipe='baseline').resolved()

def test_a_run_of_best_from_before_it_had_an_end_of_its_own_keeps_the_one_that_was_found():
    settings = TrainSettings().resolved()
    assert settings_from(asdict(settings) | dict(lr_min='find')).lr_min == 'find' != settings.lr_min

def test_a_run_of_before_the_scale_of_logits_and_the_whitening_has_neither():
    old = {k: v for k, v in asdict(TrainSettings(logit_scale=.125, whiten=True).resolved()).items() if k not in ('logit_scale', 'whiten')}
    assert settings_from(old) == TrainSettings(logit_scale=1., whiten=False).resolved()

def test_a_run_of_before_the_means_of_less_arithmetic_has_none_of_them():
    new = dict(lr_start=0., dirac=False, cutout=8, sizes=(), freeze_first=0, lookahead=0)
    old = {k: v for k, v in asdict(TrainSettings().resolved()).items() if k not in new}
    settings = settings_from(old).resolved()
    assert {name: getattr(settings, name) for name in new} == new

def test_settings_from_a_file_are_checked_too():
    with pytest.raises(ValueError, match='epochs is 0'): settings_from(dict(epochs=0))

@pytest.mark.parametrize('content', [b'{"a": ', b'\xff\xfe\x00', b'[1]', b''])
def test_what_is_no_json_object_is_refused_by_file(content, tmp_path):
    (tmp_path/'config.json').write_bytes(content)
    with pytest.raises(ValueError, match=r'config\.json\b.*JSON'): read_json(tmp_path/'config.json')

def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path/'a.json', {'n': 1})
    with pytest.raises(TypeError): write_json(tmp_path/'a.json', {'n': object()})
    assert read_json(tmp_path/'a.json') == {'n': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']

def test_environment_says_what_ran_where():
    env = json.loads(json.dumps(environment()))
    assert env['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert env['cores'] >= 1 and env['processor']
    assert {'torch', 'fastai', 'cifar_fastai'} <= set(env['packages'])
    assert all(env['packages'].values())
    if not (cpuinfo := Path('/proc/cpuinfo')).exists(): return
    for flag in 'avx2', 'avx512_bf16', 'amx_bf16':
        assert (flag in env['cpu']['flags']) == bool(re.search(rf'^flags\b.*\b{flag}\b', cpuinfo.read_text(), re.MULTILINE))

# ---- imports

def python(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()

@pytest.mark.parametrize('modules', ['cifar_fastai', 'cifar_fastai.core, cifar_fastai.cli'])
def test_package_core_and_commands_import_neither_torch_nor_fastai(modules):
    loaded = set(python(f'import sys, {modules}; print(*sys.modules)'))
    assert 'cifar_fastai' in loaded
    assert loaded.isdisjoint({'torch', 'torchvision', 'fastai', 'fastcore', 'albumentations', 'sklearn', 'pandas', 'matplotlib'})

def test_the_package_itself_imports_nothing():
    assert python('import sys; before = set(sys.modules); import cifar_fastai; print(*set(sys.modules) - before)') == ['cifar_fastai']

def test_importing_everything_prints_nothing_and_draws_nothing():
    state = 'hash((random.getstate(), numpy.random.get_state()[1].tobytes(), bytes(torch.get_rng_state().tolist())))'
    code = f'import random, numpy, torch; import fastai.vision.all, albumentations; before = {state}; from cifar_fastai.all import *; print("same" if before == {state} else "drawn")'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('same\n', '')

@pytest.mark.parametrize('error', [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_loses_nothing(tmp_path, monkeypatch, error):
    flush = os.fsync
    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(error, 'folder')
        flush(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    if error == errno.EIO: # the disk fails
        with pytest.raises(OSError, match='folder'): write_whole(tmp_path/'a', b'content')
    else: assert write_whole(tmp_path/'a', b'content').read_bytes() == b'content'

def test_the_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    status = '/proc/self/status'
    monkeypatch.setattr(os.path, 'exists', lambda path: path == status)
    monkeypatch.setattr('builtins.open', lambda path: io.StringIO('VmRSS: 10 kB\n'))
    assert peak_memory() is None

def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    "And its name is, before the function returns"
    flushed, fsync = [], os.fsync
    def noted(handle):
        info = os.fstat(handle)
        flushed.append(('folder' if stat.S_ISDIR(info.st_mode) else info.st_size, (tmp_path/'a').exists()))
        fsync(handle)
    monkeypatch.setattr(os, 'fsync', noted)
    write_whole(tmp_path/'a', b'content')
    assert flushed == [(7, False), ('folder', True)]
