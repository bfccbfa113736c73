"""Runs of several processes: one voice, one is killed, all are stopped, another number goes on; and what is refused."""
import os, re, shutil, signal, socket
from importlib.util import find_spec
from pathlib import Path

import pytest

import forked
from forked import wait_until
from cifar_fastai.files import read_json
from cifar_fastai.callback.checkpoint import checkpoints_in, read_checkpoint
from cifar_fastai.run.folder import read_history

needs_accelerate = pytest.mark.skipif(find_spec('accelerate') is None, reason='accelerate is not installed')

train_command = '-m', 'cifar_fastai.cli', 'train'

@pytest.fixture
def start_run(start_processes): return lambda n, *args, **kwargs: start_processes(n, *train_command, *args, **kwargs)

def finish(process, timeout=240):
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said

def options_of(data): # of a run of 4 epochs of 5 steps
    return ['--data', data, '--device', 'cpu', '--epochs', 4, '--bs', 16, '--lr_min', 1e-4, '--lr_max', 2e-3, '--precision', 'fp32', '--dropout', .1, '--ghost', 4, '--width', 16]

@pytest.fixture
def options(small_archive): return options_of(small_archive)

def process_of(rank, run): # -> id of the process of that rank
    for proc in Path('/proc').glob('[0-9]*'):
        try: arguments, environ = (proc/'cmdline').read_bytes().split(b'\0'), (proc/'environ').read_bytes().split(b'\0')
        except OSError: continue
        if str(run).encode() in arguments and f'RANK={rank}'.encode() in environ: return int(proc.name)

def wait_for_epoch(run, process, epoch=1):
    def done(): return any(int(folder.name[:5]) >= epoch for folder in checkpoints_in(run/'checkpoint'))
    wait_until(done, process)

@pytest.fixture(scope='module')
def undisturbed(small_archive, tmp_path_factory): # the run of two that nothing happens to
    run = tmp_path_factory.mktemp('runs')/'undisturbed'
    statuses, said = forked.run_several(2, forked.command, 'train', *options_of(small_archive), '--out', run)
    assert statuses == [0, 0], said
    assert read_json(run/'config.json')['environment']['processes'] == 2
    assert said.count('epoch 1 of 4') == said.count('report.html') == 1 # one voice
    return run

@needs_accelerate
@pytest.mark.skipif(not Path('/proc').exists(), reason='processes are found in /proc')
@pytest.mark.slow
def test_a_run_of_two_that_loses_one_ends_and_continues_to_the_same_weights(start_run, options, tmp_path, undisturbed):
    "With two; with one, nearly"
    process = start_run(2, *options, '--out', tmp_path/'killed')
    wait_for_epoch(tmp_path/'killed', process)
    os.kill(process_of(1, tmp_path/'killed'), signal.SIGKILL)
    rc, said = finish(process)
    assert rc != 0 and 'process 1 of 2' in said, said
    read_checkpoint(checkpoints_in(tmp_path/'killed/checkpoint')[0])
    assert not (tmp_path/'killed/summary.json').exists()
    shutil.copytree(tmp_path/'killed', tmp_path/'alone')

    statuses, said = forked.run_several(2, forked.command, 'train', '--resume', tmp_path/'killed')
    assert statuses == [0, 0] and said.count('epoch 4 of 4') == 1 and '2 processes' not in said, said
    assert read_json(tmp_path/'killed/summary.json')['weights_sha256'] == read_json(undisturbed/'summary.json')['weights_sha256']
    assert read_history(tmp_path/'killed').drop(columns='seconds').equals(read_history(undisturbed).drop(columns='seconds'))

    [status], said = forked.run_several(1, forked.command, 'train', '--resume', tmp_path/'alone')
    assert status == 0 and re.search('1 process.*2 processes', said), said
    assert len(read_history(tmp_path/'alone')) == 4

@needs_accelerate
@pytest.mark.parametrize('gone', [1, 0], ids=['the one that is waited for', 'the first'])
@pytest.mark.slow
def test_a_process_that_hears_from_no_other_says_why_it_stops(start_processes, small_archive, tmp_path, gone):
    "As at the end of a run, when the first one alone writes"
    process = start_processes(2, Path(__file__).with_name('launched.py'), 'leaves', tmp_path, small_archive, f'{{"gone": {gone}}}')
    rc, said = finish(process, 60)
    sentence = re.search(rf'process {2 - gone} of 2.*--resume', said) # the launcher says SIGTERM, too, where it ends a process
    assert rc != 0 and sentence and ('SIGTERM' in sentence[0]) == bool(gone), said

@needs_accelerate
@pytest.mark.slow
def test_a_run_of_two_that_is_stopped_within_an_epoch_continues_to_the_same_weights(start_run, options, tmp_path, undisturbed):
    process = start_run(2, *options, '--checkpoint_minutes', 0, '--out', tmp_path/'stopped')
    wait_for_epoch(tmp_path/'stopped', process, 2)
    process.send_signal(signal.SIGTERM)
    rc, said = finish(process)
    assert rc != 0 and said.count(f'--resume {tmp_path}/stopped') == 1, said
    assert read_json(tmp_path/'stopped/summary.json')['interrupted']
    statuses, said = forked.run_several(2, forked.command, 'train', '--resume', tmp_path/'stopped')
    assert statuses == [0, 0] and read_json(tmp_path/'stopped/summary.json')['weights_sha256'] == read_json(undisturbed/'summary.json')['weights_sha256'], said

@needs_accelerate
@pytest.mark.slow
def test_a_run_of_one_continues_with_two(start_run, options, tmp_path):
    "Stopped in the middle of an epoch, whose sums the first one takes"
    process = start_run(1, *options, '--checkpoint_minutes', 0, '--out', tmp_path/'run')
    wait_for_epoch(tmp_path/'run', process)
    process.terminate()
    finish(process)
    rc, said = finish(start_run(2, '--resume', tmp_path/'run'))
    assert rc == 0 and re.search('2 processes.*1 process', said), said
    history = read_history(tmp_path/'run')
    assert len(history) == 4 and history['train_accuracy'].between(0, 1).all()

@needs_accelerate
@pytest.mark.slow
def test_two_machines_of_one_process(start_run, options, tmp_path):
    "Over loopback, each with a launcher of its own"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    how = lambda rank: ['--config_file', Path(__file__).parent.parent/'examples/two_machines.yaml', '--machine_rank', rank, '--main_process_ip', '127.0.0.1', '--main_process_port', port]
    machines = [start_run(2, *options, '--out', tmp_path/'run', how=map(str, how(rank)), env=dict(GLOO_SOCKET_IFNAME='lo')) for rank in range(2)]
    (rc0, said0), (rc1, said1) = [finish(m) for m in machines]
    assert rc0 == rc1 == 0, said0 + said1
    assert 'epoch 4 of 4' in said0 and said1 == '' and len(read_history(tmp_path/'run')) == 4

# ---- what is refused, in one sentence of the first process

def sentences(said): return [line for line in said.splitlines() if line.startswith('cifar_train:')]

@needs_accelerate
@pytest.mark.parametrize('n, changes, figures', [
    (3, ['--bs', 2], 'bs is 2.*3 processes'), (2, ['--bs', 79], '1 image.*2 processes.*79'), (2, ['--data', '/not/here'], '/not/here'), (2, ['--epochs', 0], 'epochs is 0'),
    (2, ['--device', 'cuda:1'], "device is 'cuda:1'")])
def test_it_is_refused_in_one_sentence_and_leaves_no_folder(options, tmp_path, n, changes, figures):
    statuses, said = forked.run_several(n, forked.command, 'train', *options, *changes, '--out', tmp_path/'run')
    assert all(statuses) and len(sentences(said)) == 1 and re.search(figures, sentences(said)[0]), said
    assert not (tmp_path/'run').exists()

@needs_accelerate
def test_other_commands_are_for_one():
    statuses, said = forked.run_several(2, forked.command, 'bench', '--data', 'digits')
    [line] = [line for line in said.splitlines() if line.startswith('cifar_bench')]
    assert all(statuses) and '2 processes' in line, said
