"""Several processes train one network: the same images in the same order, the same losses, one voice, and an end in good order when one is killed."""
import json, os, shutil, signal, socket, subprocess, sys, time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as examples, strategies as st

from cifar_fastai.core import read_json
from cifar_fastai.distributed import launched_processes
from cifar_fastai.learner import CifarLearner, Processes, checkpoints_in, read_checkpoint
from cifar_fastai.training import read_history

try: import accelerate
except ModuleNotFoundError: accelerate = None
needs_accelerate = pytest.mark.skipif(accelerate is None, reason='accelerate is not installed')

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

@pytest.mark.skipif(accelerate is not None, reason='accelerate is installed')
def test_without_accelerate_it_is_said_what_to_install(small_archive):
    env = os.environ | dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='29511')
    done = subprocess.run([sys.executable, '-m', 'cifar_fastai.cli', 'train', '--data', str(small_archive), '--device', 'cpu'], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip() == "cifar_train: accelerate is not installed: pip install 'cifar_fastai[distributed]'"

# ---- launched

def launcher(n, *more): # `accelerate launch`, as users give it
    return [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', str(n), '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
            '--main_process_port', '0', *more]

def own_environment(): return os.environ | dict(OMP_NUM_THREADS='1')

@pytest.fixture
def launched(tmp_path, small_archive):
    "What each of `n` processes returns from a function of launched.py"
    def run(n, what, source=small_archive, folder=None, **options):
        folder = folder or tmp_path/f'{what}-{n}-{len(list(tmp_path.iterdir()))}'
        folder.mkdir(exist_ok=True)
        start = launcher(n) if n > 1 else [sys.executable]
        done = subprocess.run([*start, str(Path(__file__).with_name('launched.py')), what, str(folder), str(source), json.dumps(options)], env=own_environment(), capture_output=True, text=True, timeout=300)
        run.said = done.stdout + done.stderr
        assert done.returncode == 0, run.said[-3000:]
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
@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_every_image_is_seen_once_and_all_have_the_same_parameters_after_each_epoch(launched, pipeline):
    one, = launched(1, 'fit', pipeline=pipeline, epochs=1)
    both = launched(2, 'fit', pipeline=pipeline, epochs=1)
    assert disjoint([one], 'train', 80) and disjoint(both, 'train', 80) and disjoint(both, 'valid', 40)
    assert both[0]['digests'] == both[1]['digests'] and len(set(both[0]['digests'])) == 1
    for whole, *parts in zip(one['train'], *(answer['train'] for answer in both), strict=True): assert whole == list(chain(*parts)) # in the same order
    assert _numbers(both[0]['history']) == _numbers(both[1]['history'])
    assert both[0]['after'] == [pytest.approx(both[1]['after'][0]), 'CustomResNet', 16] # behind it, each has whole batches and the plain model
    assert both[0]['after'][0] == pytest.approx(both[0]['history'][-1]['accuracy'], abs=1e-6) # exactly the test images
    assert 'batch statistics are of a share of each batch, 8 images or so: processors cannot share them' in launched.said

def _numbers(history): return [{k: v for k, v in row.items() if k != 'seconds'} for row in history]

@needs_accelerate
def test_without_batch_statistics_the_losses_are_those_of_one_process(launched):
    "20 steps in fp32"
    options = dict(norm='layer', epochs=4, augmented=True)
    one, = launched(1, 'fit', **options)
    both = launched(2, 'fit', **options)
    assert len(one['losses']) == 20
    for answer in both: np.testing.assert_allclose(answer['losses'], one['losses'], atol=1e-4, rtol=0)
    for row, row1 in zip(both[0]['history'], one['history'], strict=True): assert row['train_loss'] == pytest.approx(row1['train_loss'], abs=1e-4) and row['accuracy'] == pytest.approx(row1['accuracy'], abs=1e-6)
    assert 'batch statistics' not in launched.said

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
    options = dict(source=source, images=n, bs=bs, epochs=1, norm='layer', augmented=True)
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

# ---- runs: one is killed, all are stopped, and they go on

def command(n, *args, env=None, more=()):
    return subprocess.Popen([*launcher(n, *more), '-m', 'cifar_fastai.cli', 'train', *map(str, args)], env=own_environment() | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(process, timeout=240):
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said

@pytest.fixture
def options(small_archive): # of a run of 4 epochs of 5 steps
    return ['--data', small_archive, '--device', 'cpu', '--epochs', 4, '--bs', 16, '--lr_min', 1e-4, '--lr_max', 2e-3, '--precision', 'fp32', '--dropout', .1, '--ghost', 4]

def process_of(rank, run): # -> id of the process of that rank
    for proc in Path('/proc').glob('[0-9]*'):
        try: words, environ = (proc/'cmdline').read_bytes().split(b'\0'), (proc/'environ').read_bytes().split(b'\0')
        except OSError: continue
        if str(run).encode() in words and f'RANK={rank}'.encode() in environ: return int(proc.name)

def wait_for_epoch(run, process, epoch=1):
    end = time.monotonic() + 200
    while not checkpoints_in(run/'checkpoint') or int(checkpoints_in(run/'checkpoint')[0].name[:5]) < epoch:
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(.05)

@needs_accelerate
@pytest.mark.skipif(not Path('/proc').exists(), reason='processes are found in /proc')
def test_a_run_of_two_that_is_stopped_or_loses_one_goes_on_to_the_same_weights(options, tmp_path):
    rc, said = finish(command(2, *options, '--out', tmp_path/'whole'))
    assert rc == 0, said
    whole = read_json(tmp_path/'whole/summary.json')
    assert read_json(tmp_path/'whole/config.json')['environment']['processes'] == 2
    assert said.count('epoch 1 of 4') == said.count('learning rates from') == said.count('wrong; averaged with') == said.count('report ') == 1 # one voice

    process = command(2, *options, '--out', tmp_path/'killed')
    wait_for_epoch(tmp_path/'killed', process)
    began = time.monotonic()
    os.kill(process_of(1, tmp_path/'killed'), signal.SIGKILL)
    rc, said = finish(process)
    seconds = time.monotonic() - began
    print(f'after a process was killed, the others ended in {seconds:.1f} s')
    assert rc != 0 and seconds < 60 and 'cifar_train: process 1 of 2 stops, since another one is gone' in said
    read_checkpoint(checkpoints_in(tmp_path/'killed/checkpoint')[0])
    assert not (tmp_path/'killed/summary.json').exists()
    shutil.copytree(tmp_path/'killed', tmp_path/'alone')

    rc, said = finish(command(2, '--resume', tmp_path/'killed'))
    assert rc == 0 and 'resuming at epoch' in said and said.count('resuming') == 1 and 'began' not in said, said
    assert read_json(tmp_path/'killed/summary.json')['weights_sha256'] == whole['weights_sha256']
    assert _numbers(read_history(tmp_path/'killed').to_dict('records')) == _numbers(read_history(tmp_path/'whole').to_dict('records'))

    alone = subprocess.run([sys.executable, '-m', 'cifar_fastai.cli', 'train', '--resume', str(tmp_path/'alone')], env=own_environment(), capture_output=True, text=True, timeout=200)
    assert alone.returncode == 0 and 'as 1 process what 2 processes began: the weights may differ in their last bits' in alone.stdout, alone.stdout + alone.stderr
    assert len(read_history(tmp_path/'alone')) == 4

    process = command(2, *options, '--checkpoint_minutes', 0, '--out', tmp_path/'stopped') # in the middle of an epoch
    wait_for_epoch(tmp_path/'stopped', process, 2)
    process.send_signal(signal.SIGTERM)
    rc, said = finish(process)
    assert rc != 0 and said.count('interrupted: checkpoint, history and last model are in') == 1, said
    assert read_json(tmp_path/'stopped/summary.json')['interrupted']
    rc, said = finish(command(2, '--resume', tmp_path/'stopped'))
    assert rc == 0 and read_json(tmp_path/'stopped/summary.json')['weights_sha256'] == whole['weights_sha256'], said

@needs_accelerate
@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two(options, tmp_path):
    "Stopped in the middle of an epoch, whose sums the first one takes"
    process = subprocess.Popen([sys.executable, '-m', 'cifar_fastai.cli', 'train', *map(str, options), '--checkpoint_minutes', '0', '--out', str(tmp_path/'run')], env=own_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_epoch(tmp_path/'run', process)
    process.terminate()
    finish(process)
    rc, said = finish(command(2, '--resume', tmp_path/'run'))
    assert rc == 0 and 'as 2 processes what 1 process began' in said, said
    history = read_history(tmp_path/'run')
    assert len(history) == 4 and history['train_accuracy'].between(0, 1).all()

@needs_accelerate
def test_two_machines_of_one_process(options, tmp_path):
    "Over loopback, each with a launcher of its own"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    example = Path(__file__).parent.parent/'examples/two_machines.yaml'
    start = lambda rank: subprocess.Popen([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(example), '--machine_rank', str(rank), '--num_processes', '2', '--main_process_ip', '127.0.0.1', '--main_process_port', str(port),
                                           '-m', 'cifar_fastai.cli', 'train', *map(str, options), '--out', str(tmp_path/'run')],
                                          env=own_environment() | dict(GLOO_SOCKET_IFNAME='lo'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    machines = [start(0), start(1)]
    (rc0, said0), (rc1, said1) = [finish(m) for m in machines]
    assert rc0 == rc1 == 0, said0 + said1
    assert 'epoch 4 of 4' in said0 and said1 == '' and len(read_history(tmp_path/'run')) == 4

# ---- what is refused, in one sentence of the first process

def sentences(said): return [line for line in said.splitlines() if line.startswith('cifar_train:')]

@needs_accelerate
@pytest.mark.parametrize('n, changes, sentence', [
    (3, ['--bs', 2], 'cifar_train: bs is 2, and 3 processes share each batch: give 3 or more images, or start fewer'),
    (2, ['--bs', 79], 'cifar_train: the last batch of an epoch has 1 image for 2 processes: give another bs than 79, or start fewer'),
    (2, ['--data', '/not/here'], "cifar_train: /not/here does not exist: give the folder or the archive of CIFAR-10, 'cifar10' or 'digits'"),
    (2, ['--epochs', 0], 'cifar_train: epochs is 0: give 1 or more'),
    (2, ['--device', 'cuda:1'], "cifar_train: device is 'cuda:1', and each of several processes has one of its own: give 'auto', 'cuda' or 'cpu'")])
def test_it_is_refused_in_one_sentence_and_leaves_no_folder(options, tmp_path, n, changes, sentence):
    rc, said = finish(command(n, *options, *changes, '--out', tmp_path/'run'))
    assert rc != 0 and sentences(said) == [sentence], said
    assert not (tmp_path/'run').exists()

@needs_accelerate
def test_a_process_that_cannot_see_the_data_is_named_by_the_first(launched):
    with pytest.raises(AssertionError, match='process 2 of 2, on .*: /not/here does not exist'): launched(2, 'blind')

@needs_accelerate
def test_other_commands_are_for_one(tmp_path):
    done = subprocess.run([*launcher(2), '-m', 'cifar_fastai.cli', 'bench', '--data', 'digits'], env=own_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and [l for l in done.stderr.splitlines() if l.startswith('cifar_bench')] == ['cifar_bench: started as 2 processes, and only cifar_train is for several: start it once']

@needs_accelerate
def test_batch_norm_that_is_shared_needs_gpus(launched):
    with pytest.raises(AssertionError, match='sync_bn is True, which needs GPUs: leave it away'): launched(2, 'fit', sync_bn=True)
