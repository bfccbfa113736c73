"""Several processes train one network: the same images in the same order, the same losses, the same parameters."""
import json, os, subprocess, sys
from importlib.util import find_spec
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings as examples, strategies as st

import forked, launched as launched_py
from cifar_fastai.run.distributed import launched_processes
from cifar_fastai.learner import CifarLearner, Processes

needs_accelerate = pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed')

# ---- shares of a batch, in one process

@examples(deadline=None)
@given(n=st.integers(0, 600), parts=st.integers(1, 40))
def test_shares_of_a_batch_are_whole_disjoint_and_of_one_size_or_two(small_dls, n, parts):
    dl = small_dls().train
    slices = []
    for part in range(parts):
        dl.share = part, parts
        slices.append(dl.of_batch(n))
    assert [i for s in slices for i in range(n)[s]] == list(range(n))
    assert max(s.stop - s.start for s in slices) - min(s.stop - s.start for s in slices) <= 1

@pytest.mark.parametrize('pipeline, num_workers', [('batch', 0), ('item', 0), ('item', 2)])
@pytest.mark.parametrize('parts', [2, 3])
def test_shares_put_together_are_the_batches_of_one_process(small_dls, pipeline, num_workers, parts):
    "Augmented as there: order and draws depend on seed and epoch alone"
    batches = lambda share: [[b[0], b[1]] for b in _epoch(small_dls(pipeline=pipeline, num_workers=num_workers, recipe='best', bs=24).train, share)]
    whole, shares = batches((0, 1)), [batches((part, parts)) for part in range(parts)]
    assert [len(x) for x, _ in whole] == [24, 24, 24, 8]
    for (x, y), *of in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([x for x, _ in of]), x) and torch.equal(torch.cat([y for _, y in of]), y)

def _epoch(dl, share):
    dl.epoch, dl.share = 3, share
    return list(dl)

def test_a_share_without_images_is_no_batch(small_dls):
    dl = small_dls(bs=27).valid # 40 test images: 27 and 13
    sizes = []
    for part in range(20):
        dl.share = part, 20
        sizes.append([len(x) for x, _ in dl])
    assert sum(map(sum, sizes)) == 40 and [1, 1] in sizes and [1] in sizes

def test_one_process_is_as_without(tiny_learner):
    learn = tiny_learner()
    assert isinstance(learn, CifarLearner) and type(launched_processes('cpu')) is Processes and not launched_processes('cpu').rank
    with learn.distrib_ctx() as same: assert same is learn and not hasattr(learn, 'distributed_trainer')

@pytest.mark.skipif(find_spec('accelerate') is not None, reason='accelerate is installed')
def test_without_accelerate_it_is_said_what_to_install(small_archive):
    env = os.environ | dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='29511')
    done = subprocess.run([sys.executable, '-m', 'cifar_fastai.cli', 'train', '--data', str(small_archive), '--device', 'cpu'], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip() == "cifar_train: accelerate is not installed: pip install 'cifar_fastai[distributed]'"

# ---- launched

@pytest.fixture
def launched(tmp_path, small_archive):
    "What each of `n` processes returns from a function of launched.py"
    def run(n, what, source=small_archive, folder=None, **options):
        folder = folder or tmp_path/f'{what}-{n}-{len(list(tmp_path.iterdir()))}'
        folder.mkdir(exist_ok=True)
        statuses, run.said = forked.run_several(n, launched_py.main, what, folder, source, json.dumps(options))
        assert not any(statuses), run.said[-3000:]
        return [json.loads((folder/f'rank{r}.json').read_text()) for r in range(n)]
    return run

@needs_accelerate
def test_a_flag_of_one_is_known_to_all_at_the_same_step(launched):
    for answer in launched(3, 'said'):
        assert answer == dict(late=[False, False, False, True, False, False], now=[True]*3, all=[0, 1, 2], sum=[3, 3])

@needs_accelerate
def test_the_first_one_loads_before_the_others_and_what_it_raises_is_raised_everywhere(launched, tmp_path):
    assert launched(3, 'turns', folder=tmp_path/'turns') == [0, 1, 2]
    assert (tmp_path/'turns/turns').read_text().split()[0] == '0'
    assert launched(2, 'fails') == [True, True]

def disjoint(answers, which, n): # the images of each epoch, seen once by one of the processes
    shares = [list(chain(*answer[which])) for answer in answers]
    every = list(chain(*shares))
    return len(every) == n and len(set(every)) == n

@needs_accelerate
@pytest.mark.parametrize('pipeline', ['batch', pytest.param('item', marks=pytest.mark.slow)])
def test_every_image_is_seen_once_and_all_have_the_same_parameters_after_each_epoch(launched, pipeline):
    one, = launched(1, 'fit', pipeline=pipeline, epochs=1)
    both = launched(2, 'fit', pipeline=pipeline, epochs=1)
    assert disjoint([one], 'train', 80) and disjoint(both, 'train', 80) and disjoint(both, 'valid', 40)
    assert both[0]['digests'] == both[1]['digests'] and len(set(both[0]['digests'])) == 1
    for whole, *parts in zip(one['train'], *(answer['train'] for answer in both), strict=True): assert whole == list(chain(*parts)) # in the same order
    assert _numbers(both[0]['history']) == _numbers(both[1]['history'])
    assert both[0]['after'] == [pytest.approx(both[1]['after'][0]), 'CustomResNet', 16] # behind it, each has whole batches and the plain model
    assert both[0]['after'][0] == pytest.approx(both[0]['history'][-1]['accuracy'], abs=1e-6) # exactly the test images
    assert 'batch statistics' in launched.said and '8 images' in launched.said

@needs_accelerate
def test_a_function_of_a_notebook_is_launched_as_well(launched):
    [first, second], = launched(1, 'notebook')
    assert first == second and len(first) == 1

def _numbers(history): return [{k: v for k, v in row.items() if k != 'seconds'} for row in history]

@needs_accelerate
@pytest.mark.slow
def test_without_batch_statistics_the_losses_are_those_of_one_process(launched):
    "20 steps in fp32"
    options = dict(norm='layer', epochs=4, augmented=True)
    one, = launched(1, 'fit', **options)
    both = launched(2, 'fit', **options)
    assert len(one['losses']) == 20
    for answer in both: np.testing.assert_allclose(answer['losses'], one['losses'], atol=1e-4, rtol=0)
    for row, row1 in zip(both[0]['history'], one['history'], strict=True): assert row['train_loss'] == pytest.approx(row1['train_loss'], abs=1e-4) and row['accuracy'] == pytest.approx(row1['accuracy'], abs=1e-6)
    assert 'batch statistics' not in launched.said

@pytest.mark.slow
@needs_accelerate
def test_shares_of_two_sizes_count_as_much_as_they_have_images(launched):
    "6, 7 and 7 images of a batch: the gradient is that of the batch"
    options = dict(norm='layer', bs=20, epochs=1, augmented=True)
    one, = launched(1, 'fit', **options)
    for answer in launched(3, 'fit', **options):
        np.testing.assert_allclose(answer['gradient'], one['gradient'], rtol=1e-4)
        np.testing.assert_allclose(answer['losses'][:2], one['losses'][:2], rtol=1e-5) # later on, rounding has become steps
        assert answer['history'][0]['train_loss'] == pytest.approx(np.mean(answer['losses']), rel=1e-6)

@needs_accelerate
def test_classes_of_other_weights_count_as_much_as_in_one_process(launched):
    "The shares of a batch have other numbers of images of the heavy class"
    options = dict(norm='layer', bs=20, epochs=1, weights=[20., *[1.]*9])
    one, = launched(1, 'fit', **options)
    for answer in launched(3, 'fit', **options):
        np.testing.assert_allclose(answer['gradient'], one['gradient'], rtol=1e-4)
        np.testing.assert_allclose(answer['losses'][:2], one['losses'][:2], rtol=1e-4)
        assert answer['history'][0]['train_loss'] == pytest.approx(np.mean(answer['losses']), rel=1e-6)

@needs_accelerate
def test_gradients_of_several_processes_are_not_accumulated(launched):
    with pytest.raises(AssertionError, match='GradientAccumulation.*2'): launched(2, 'fit', n_acc=32)

@needs_accelerate
@pytest.mark.slow
def test_groups_of_batch_statistics_are_those_of_one_process(launched):
    "Groups of 4 images lie wholly in a share of 8"
    options = dict(ghost=4, epochs=1, augmented=True)
    one, = launched(1, 'fit', **options)
    both = launched(2, 'fit', **options)
    np.testing.assert_allclose(both[0]['gradient'], one['gradient'], rtol=1e-3)
    np.testing.assert_allclose(both[0]['losses'][:3], one['losses'][:3], rtol=1e-5)
    assert 'batch statistics' not in launched.said

@needs_accelerate
@pytest.mark.slow
def test_in_fp64_the_losses_of_several_stay_those_of_one(launched):
    "Where rounding has no part, no difference grows: 16 steps of three processes with shares of 6 and 7 images, at rates at which it does in fp32"
    options = dict(norm='layer', bs=20, epochs=4, augmented=True, fp64=True)
    one, = launched(1, 'fit', **options)
    for answer in launched(3, 'fit', **options): np.testing.assert_allclose(answer['losses'], one['losses'], rtol=1e-6) # the digits of an fp32 loss

@needs_accelerate
@pytest.mark.slow
@pytest.mark.parametrize('source', ['digits', 'cifar10'])
def test_full_size(launched, request, source):
    "1,438 digits; 2,000 images of CIFAR-10. In fp32 a difference of the last digit grows with each of the first, violent steps"
    source, n, bs = (source, None, 64) if source == 'digits' else (request.getfixturevalue('real_source'), 2000, 100)
    options = dict(source=source, images=n, bs=bs, epochs=1, width=64, norm='layer', augmented=True)
    one, = launched(1, 'fit', **options)
    both = launched(2, 'fit', **options)
    differences = np.abs(np.subtract(both[0]['losses'][:20], one['losses'][:20]))
    print(f'{source}: the first 20 losses differ by', ' '.join(f'{d:.1e}' for d in differences))
    assert len(differences) == 20 and differences[:3].max() < 1e-4 and differences.max() < 1e-2
    np.testing.assert_allclose(both[0]['gradient'], one['gradient'], rtol=1e-4)
    assert both[0]['digests'] == both[1]['digests']
    n_train, n_valid = (n, n//4) if n else (1438, 359)
    both = launched(2, 'fit', **options | dict(augmented=False))
    assert disjoint(both, 'train', n_train) and disjoint(both, 'valid', n_valid) and both[0]['digests'] == both[1]['digests']

@needs_accelerate
def test_a_process_that_cannot_see_the_data_is_named_by_the_first(launched):
    with pytest.raises(AssertionError, match='process 2 of 2, on .*: /not/here does not exist'): launched(2, 'blind')

@needs_accelerate
def test_processes_with_other_images_are_refused(launched):
    with pytest.raises(AssertionError, match='the images of process 2 are not those of the run'): launched(2, 'other_images')

@needs_accelerate
def test_a_metric_that_cannot_be_summed_is_refused_before_an_epoch(launched):
    with pytest.raises(AssertionError, match='f1_score.*2 processes'): launched(2, 'fit', f1=True)

@needs_accelerate
def test_metrics_that_are_arrays_are_summed(launched):
    one, = launched(1, 'fit', vectors=True, norm='layer', epochs=1)
    for answer in launched(2, 'fit', vectors=True, norm='layer', epochs=1):
        for name in 'per_class', 'train_per_class', 'predicted', 'train_predicted':
            np.testing.assert_allclose(answer['history'][0][name], one['history'][0][name], rtol=1e-6)

@needs_accelerate
def test_batch_norm_that_is_shared_needs_gpus(launched):
    with pytest.raises(AssertionError, match='sync_bn is True'): launched(2, 'fit', sync_bn=True)
