"""The benchmark: processes that take turns, what is refused, and the tables that are made of it."""
import json, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from cifar_fastai.bench import bench, bench_table, matrix_products, plot_bench, plot_growth, profile_step, ratio, step_rate, take_turns, ways
from cifar_fastai.core import BenchSettings
from cifar_fastai.data.source import load_cifar10

quick = dict(data='digits', bs=8, steps=1, warmup=1, repeats=2)

@pytest.fixture(scope='module')
def recorded(): # -> what was measured on CIFAR-10
    return json.loads((Path(__file__).parent.parent/'benchmarks/bench/2-cores-avx512-bf16.json').read_text(encoding='utf8'))

@pytest.fixture
def networks():
    "Names of the networks and norms that made a forward pass in this process"
    seen, names = set(), ('CustomResNet', 'SqueezeNet', 'GhostBatchNorm2d')
    handle = register_module_forward_pre_hook(lambda module, args: seen.add(type(module).__name__))
    yield lambda: {name for name in names if name in seen}
    handle.remove()

@pytest.mark.slow
def test_every_case_is_measured_in_every_turn_and_written_with_settings_machine_and_versions(tmp_path):
    result = bench(BenchSettings(**quick, out=str(tmp_path/'bench.json')))
    assert list(result['cases']) == ['plain', 'fastai', 'package', 'bare', 'limit']
    for case in result['cases'].values():
        assert len(case['images_per_second']) == 2 and min(case['images_per_second']) > 0
        assert case['memory'] > 2**27 and case['first_step'] > 0 # torch alone takes more than 128 MB
    assert {name: len(rates) for name, rates in result['batches'].items()} == dict(albumentations=2, fastai=2, package=2)
    assert all(min(rates) > 0 for rates in result['batches'].values())
    assert set(result['matrix_products']) == {'fp32', 'bf16'} and step_rate(result) > 0
    written = json.loads((tmp_path/'bench.json').read_text(encoding='utf8'))
    assert written == json.loads(json.dumps(result))
    assert written['settings']['steps'] == 1 and written['environment']['packages']['torch'] and written['device'] and written['n_images'] == 1438

class OneStep:
    "Called like `Turns`: ends the loop after a step"
    def begins(self): pass
    def __call__(self, n): raise SystemExit

@pytest.mark.parametrize('way', ways)
@pytest.mark.parametrize('model, kind', [('custom', 'CustomResNet'), ('squeezenet1_1', 'SqueezeNet')])
def test_each_case_trains_the_network_of_the_settings_with_the_recipe_as_far_as_it_applies(way, model, kind, digits, networks, capsys):
    settings = BenchSettings(data='digits', bs=8, model=model, recipe='best', precision='fp32')
    with pytest.raises(SystemExit): ways[way](digits.first(16, 8), settings, torch.device('cpu'), OneStep())
    has_ghosts = model == 'custom' and way in ('package', 'bare', 'limit')
    assert networks() == {kind, *['GhostBatchNorm2d']*has_ghosts}

def test_the_parts_of_a_step_are_those_of_the_network_of_the_settings(networks):
    profiled = profile_step(BenchSettings(data='digits', bs=8, model='squeezenet1_1', device='cpu'), n=1, times=2)
    assert networks() == {'SqueezeNet'} and profiled['settings']['model'] == 'squeezenet1_1'

def test_the_rate_of_matrix_products_is_a_limit_of_each_type():
    by_size = [matrix_products(torch.device('cpu'), sizes=(n,)) for n in (32, 256)]
    both = matrix_products(torch.device('cpu'), sizes=(32, 256))
    assert set(both) == {'fp32', 'bf16'} and all(rate > 0 for rates in by_size for rate in rates.values())
    assert both['fp32'] > by_size[0]['fp32'] # the larger product has the higher rate, by much

def test_the_rate_of_a_step_follows_from_its_operations(recorded):
    mean = np.mean(recorded['cases']['package']['images_per_second'])
    assert step_rate(recorded) == pytest.approx(mean*2.27e9/1e12, rel=.01) # 2.27 billion operations an image
    assert step_rate(recorded, 'plain') < step_rate(recorded)

def test_the_table_has_rates_spread_epoch_memory_and_ratios(recorded):
    table, rates = bench_table(recorded), recorded['cases']['package']['images_per_second']
    assert list(table.index) == list(recorded['cases']) and list(table.columns) == ['images/s', 's an epoch', '× plain', '× limit', 'peak memory, GiB']
    assert table.loc['plain', '× plain'] == table.loc['limit', '× limit'] == '1.000 (1.000 to 1.000)'
    assert table.loc['package', 'images/s'] == f'{np.mean(rates):,.1f} ({min(rates):,.1f} to {max(rates):,.1f})' and table.loc['package', 's an epoch'] == f"{recorded['n_images']/np.mean(rates):,.1f}"

def test_ratios_are_of_the_means_with_the_extremes_of_the_turns():
    assert ratio([10, 20], [5, 5]) == (3, 2, 4)

def test_the_table_and_the_plot_name_the_network_if_it_is_another(recorded):
    other, title = recorded | dict(settings=recorded['settings'] | dict(model='timm:vit_tiny')), lambda result: plot_bench(result).axes[0].get_title()
    assert 'timm:vit_tiny' in bench_table(other).to_string() and 'timm:vit_tiny' in title(other)
    assert 'custom' not in bench_table(recorded).to_string() and 'custom' not in title(recorded)
    assert list(bench_table(other).index) == list(bench_table(recorded).index)

def test_the_pictures_show_every_case(recorded):
    assert [label.get_text() for label in plot_bench(recorded).axes[0].get_yticklabels()] == list(recorded['cases'])
    assert len(plot_growth(recorded).axes) == 4

@pytest.mark.slow
def test_a_batch_size_that_is_left_out_is_that_of_the_data():
    settings = BenchSettings(**quick | dict(bs=None, cases=('limit',), repeats=1, batches=False))
    result = bench(settings)
    assert result['settings']['bs'] == 64 and len(result['cases']['limit']['images_per_second']) == 1

@pytest.mark.slow
def test_smaller_training_images_are_measured_in_turns_of_their_own():
    result = bench(BenchSettings(**quick | dict(bs=64, cases=('package',), batches=False, image_sizes=(8, 32), recipe='best')))
    assert list(result['image_sizes']) == ['8', '32'] and set(result['cases']) == {'package'}
    small, full = (np.mean(case['images_per_second']) for case in result['image_sizes'].values())
    assert small > 1.5*full # a sixteenth of the arithmetic

def test_another_network_is_trained_by_every_case_and_its_operations_count():
    settings = BenchSettings(**quick | dict(model='shufflenet_v2_x0_5', batches=False, cases=('bare', 'limit'), repeats=1))
    result = bench(settings)
    assert result['settings']['model'] == 'shufflenet_v2_x0_5' and all(min(case['images_per_second']) > 0 for case in result['cases'].values())
    of_own = step_rate(result | dict(settings=result['settings'] | dict(model='custom')), 'bare')
    assert step_rate(result, 'bare') < of_own/20 # 2.27 billion operations an image, and less than 0.1

@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['baseline', 'best'])
def test_another_network_is_trained_by_the_other_cases(recipe):
    settings = BenchSettings(**quick | dict(model='mobilenet_v3_small', batches=False, repeats=1, recipe=recipe))
    assert list(bench(settings)['cases']) == list(settings.cases)

@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for name in 'cat', 'dog':
        (folder/name).mkdir()
        for i in range(30): Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(folder/name/f'{i}.jpg')
    return folder

def test_pictures_of_your_own_are_measured_in_turns_with_the_data(pets, tmp_path):
    result = bench(BenchSettings(**quick | dict(own=str(pets), batches=False, cases=('limit',), repeats=1)))
    assert list(result['own']) == ['data', 'own'] and all(min(case['images_per_second']) > 0 for case in result['own'].values())

@pytest.mark.parametrize('change, words', [(dict(model='resnet99'), 'resnet99'), (dict(model='inception_v3'), 'inception_v3'), (dict(model='../x'), 'model is'), (dict(own='no/such'), 'own is'), (dict(own=__file__), 'own is'),
                                           (dict(model='squeezenet1_1', image_sizes=(32, 8)), "model is 'squeezenet1_1'.*8×8"), (dict(model='squeezenet1_1', image_sizes=(32, 8), data='no/such'), "model is")]) # before images are read
def test_a_network_or_a_folder_that_cannot_be_measured_is_refused_before_anything_is_started(change, words):
    lines = []
    with pytest.raises(ValueError, match=words): bench(BenchSettings(**quick | change), say=lines.append)
    assert not lines

def test_a_folder_with_fewer_pictures_than_a_batch_is_refused_before_anything_is_started(pets):
    n, lines = len(load_cifar10(pets).train_y), []
    with pytest.raises(ValueError, match=rf'own is .*{re.escape(pets.name)}.*\b{n}\b.*\b{n + 1}\b'): bench(BenchSettings(**quick | dict(own=str(pets), bs=n + 1)), say=lines.append)
    assert not lines

def test_a_folder_with_the_name_of_a_data_set_is_a_folder(pets, tmp_path): # where the tests work
    shutil.copytree(pets, tmp_path/'digits')
    with pytest.raises(ValueError, match="own is 'digits'"): bench(BenchSettings(**quick | dict(own='digits', bs=100))) # there are 1,438 digits

def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))): bench(BenchSettings(**quick | dict(own=str(tmp_path))))

@pytest.mark.slow
def test_a_case_that_fails_is_named_and_leaves_no_process(tmp_path):
    import multiprocessing
    with pytest.raises(ChildProcessError, match=rf'broken.*{re.escape(str(tmp_path/"nothing"))}'):
        settings = BenchSettings(**quick | dict(data=str(tmp_path/'nothing')))
        take_turns({'broken': ('limit', settings, None)})
    assert multiprocessing.active_children() == []

@pytest.mark.slow
def test_a_process_that_is_killed_is_reported_and_the_others_end():
    import multiprocessing, os, signal
    there = []
    def kill(line):
        if not line.startswith('turn 1:'): return
        there.extend(sorted(multiprocessing.active_children(), key=lambda p: p.pid))
        os.kill(there[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match='first.*-9'):
        take_turns({name: ('limit', BenchSettings(**quick | dict(repeats=10_000)), None) for name in ('first', 'second')}, say=kill)
    assert len(there) == 2 and multiprocessing.active_children() == []

@pytest.mark.parametrize('change, words', [(dict(steps=0), 'steps is 0'), (dict(repeats=0), 'repeats is 0'), (dict(warmup=0), 'warmup is 0'), (dict(bs=1), 'bs is 1'),
                                           (dict(cases=('fastest',)), 'cases is'), (dict(cases=()), 'cases is'), (dict(precision='int8'), 'precision is'), (dict(recipe='worst'), 'recipe is'), (dict(image_sizes=(32, 4)), 'image_sizes is'), (dict(image_sizes=(64,)), 'image_sizes is'),
                                           (dict(model=''), 'model is'), (dict(model=18), 'model is 18'), (dict(own=''), 'own is'), (dict(own=3), 'own is 3'),
                                           (dict(out='no/such/folder/x.json'), 'out is'), (dict(out='.'), 'out is')])
def test_settings_that_are_invalid_are_refused(change, words):
    with pytest.raises(ValueError, match=words): BenchSettings(**quick | change)

@pytest.mark.parametrize('args, words', [(['--steps', '0'], 'steps is 0'), (['--device', 'cuda:99'], "device is 'cuda:99'"), (['--precision', 'fp16', '--device', 'cpu'], 'fp16'),
                                         (['--model', 'inception_v3'], "model is 'inception_v3'"), (['--own', 'no_such'], "own is 'no_such'")])
def test_the_command_refuses_in_one_sentence(command, args, words):
    done = command('bench', '--data', 'digits', *args)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and done.stdout == ''

@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_file(command, tmp_path):
    done = command('bench', '--data', 'digits', '--bs', '8', '--steps', '1', '--warmup', '1', '--repeats', '1', '--cases', 'package', 'limit', '--recipe', 'best', '--no-batches', '--out', tmp_path/'b.json')
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ('package', 'limit', 'images/s', '× limit', 'TFLOP/s', 'importing fastai'))
    assert list(json.loads((tmp_path/'b.json').read_text(encoding='utf8'))['cases']) == ['package', 'limit']

@pytest.mark.slow
def test_the_command_prints_the_network_and_the_ratio_of_own_and_data(command, pets, tmp_path):
    done = command('bench', '--data', 'digits', '--bs', '8', '--steps', '1', '--warmup', '1', '--repeats', '2', '--cases', 'package', '--no-batches', '--model', 'squeezenet1_1', '--own', pets, '--out', tmp_path/'b.json')
    assert done.returncode == 0, done.stderr
    rates = {name: case['images_per_second'] for name, case in json.loads((tmp_path/'b.json').read_text(encoding='utf8'))['own'].items()}
    mean, least, most = ratio(rates['own'], rates['data'])
    assert 'squeezenet1_1' in done.stdout and f'{mean:.3f} ({least:.3f} to {most:.3f})' in done.stdout

@pytest.mark.slow
def test_the_reading_of_pictures_is_measured_in_turns_with_pillow(tmp_path):
    tool = Path(__file__).parent.parent/'tools/decoding.py'
    subprocess.run([sys.executable, tool, '20', '--turns', '2', '--out', tmp_path/'d.json'], check=True, capture_output=True)
    result = json.loads((tmp_path/'d.json').read_text(encoding='utf8'))
    assert result['n'] == 20 and set(result['images_per_second']) == {'read_folder', 'threads', 'processes'}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in result['images_per_second'].values()) and len(result['ratio']) == 2
