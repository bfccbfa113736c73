"""Run folders from strangers, and two writers of one folder: no other file is touched, and what is wrong is said in one sentence."""
import errno, json, os, re, shutil, socket, subprocess, sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from fastai.vision.all import Callback
from PIL import Image
from safetensors.torch import load_file, save, save_file

from cifar_fastai.cli import cifar_export, cifar_interpret, cifar_predict, cifar_report, cifar_train
from cifar_fastai.core import TrainSettings, printable
from cifar_fastai.files import read_json, remove_parts, write_json, write_whole
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.run.folder import read_history, read_range_test, read_summary
from cifar_fastai.run.folder import load_run
from cifar_fastai.look.plots import save_figure
from cifar_fastai.callback.checkpoint import Checkpoints, checkpoints_in, read_checkpoint, write_checkpoint
from cifar_fastai.look.page import read_run, run_predictions
from cifar_fastai.look.report import report_page, write_report
from cifar_fastai.callback.schedule import LRBounds
from cifar_fastai.run.train import SaveRun, resume, run_config, train

@pytest.fixture
def run(finished, tmp_path): # to be changed
    return shutil.copytree(finished[0], tmp_path/'run', ignore=shutil.ignore_patterns('plots'))

@pytest.fixture
def mine(tmp_path):
    "A file of the user, which nobody may touch"
    file = tmp_path/'mine'
    file.write_text('as it was')
    yield file
    assert file.read_text() == 'as it was' and not file.is_symlink()

def sentence(command, *args):
    "What a command that refuses says: one line, and exit status 1"
    with pytest.raises(SystemExit) as e: command(list(map(str, args)))
    assert isinstance(e.value.code, str) and '\n' not in e.value.code and e.value.code.isprintable(), e.value.code
    return e.value.code

def change(path, *keys, to):
    content = read_json(path)
    inner = content
    for key in keys[:-1]: inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(content))

# ---- links

def linked(target, link):
    link.unlink(missing_ok=True)
    link.symlink_to(target)

def test_a_file_is_written_beside_links_and_never_through_one(tmp_path, mine):
    linked(mine, tmp_path/'a.txt')
    linked(mine, tmp_path/'a.txt.part')
    write_whole(tmp_path/'a.txt', b'new')
    assert (tmp_path/'a.txt').read_bytes() == b'new' and not (tmp_path/'a.txt').is_symlink()

def test_the_name_of_a_file_that_is_being_written_cannot_be_foreseen(tmp_path):
    seen = set()
    for _ in range(20): write_whole(tmp_path/'a', b'', check=lambda part: seen.add(part.name))
    assert len(seen) == 20

def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path/'plain').write_bytes(b'')
    assert write_whole(tmp_path/'a', b'').stat().st_mode == (tmp_path/'plain').stat().st_mode

def test_a_figure_is_written_like_any_file(tmp_path, mine):
    linked(mine, tmp_path/'a.png')
    fig = plt.figure()
    save_figure(fig, tmp_path/'a.png')
    assert (tmp_path/'a.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='xyz'): save_figure(fig, tmp_path/'a.xyz')
    plt.close(fig)

written = {cifar_report: ['report.html', 'report.html.part'], cifar_export: ['model.onnx.part'], cifar_interpret: ['plots/history.png', 'plots/misclassified.png']}

@pytest.mark.parametrize('command', written, ids=lambda c: c.__name__)
def test_a_link_in_a_run_folder_is_not_followed(run, mine, command):
    (run/'plots').mkdir(exist_ok=True)
    for name in written[command]: linked(mine, run/name)
    if command is cifar_export: pytest.importorskip('onnxscript')
    command([str(run)])
    assert all(not (run/name).is_symlink() for name in written[command] if not name.endswith('.part'))

@pytest.mark.parametrize('keys, to', [
    (('n_params',), 1), (('id',), '0'*32), (('seed',), 7), (('valid',), 'holdout'), (('bounds', 'lr_max'), 1.), (('peak_memory',), -1),
    (('settings', 'epochs'), 24), (('settings', 'seed'), 9), (('settings', 'width'), 64)])
def test_a_summary_that_the_settings_contradict_is_refused(run, keys, to):
    change(run/'summary.json', *keys, to=to)
    said = sentence(cifar_report, run)
    assert 'summary.json' in said and keys[-1] in said and str(to)[:20] in said

def test_a_learning_rate_of_a_history_is_positive(run):
    history = read_history(run)
    history['lr'] = -history['lr']
    history.to_csv(run/'history.csv', index=False)
    assert 'lr' in sentence(cifar_report, run)

def test_a_link_to_itself_is_no_range_test(run):
    (run/'range_test.csv').unlink(missing_ok=True)
    (run/'range_test.csv').symlink_to(run/'range_test.csv')
    assert 'range_test.csv' in sentence(cifar_report, run)

@pytest.mark.parametrize('name', ['config.json', 'summary.json'])
def test_json_that_names_a_value_twice_is_refused(run, name):
    text = (run/name).read_text()
    (run/name).write_text(text.rstrip()[:-1] + ', "seed": 1, "seed": 2}')
    assert name in sentence(cifar_report, run)

@pytest.mark.parametrize('command, args', [(cifar_train, ['--data', '']), (cifar_train, ['--resume', '']), (cifar_report, ['']), (cifar_export, ['']),
                                           (cifar_predict, ['']), (cifar_predict, ['--model', '', 'a.png']), (cifar_interpret, ['']), (cifar_export, ['--out', ''])])
def test_an_empty_argument_is_refused_and_never_the_current_folder(run, monkeypatch, command, args):
    monkeypatch.chdir(run) # as where a variable of the shell is not set
    assert " is ''" in sentence(command, *args)

def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="data is ''"): cifar_dls('')

def test_a_command_whose_answer_nobody_can_read_fails(run):
    done = subprocess.run(f'{sys.executable} -m cifar_fastai.cli report {run} >&-', shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr

@pytest.mark.parametrize('name', ['plots', 'checkpoint', 'tensorboard'])
def test_a_folder_in_a_run_folder_that_is_a_link_is_refused(run, settings, tmp_path, name):
    other = tmp_path/'other'
    other.mkdir()
    (other/'00001-0000000.safetensors').write_text('mine')
    shutil.rmtree(run/name, ignore_errors=True)
    (run/name).symlink_to(other)
    (run/'summary.json').unlink()
    if name == 'tensorboard':
        pytest.importorskip('tensorboard')
        change(run/'config.json', 'settings', 'log', to='tensorboard')
    with pytest.raises(ValueError, match=rf'\b{name}\b.*link'): resume(run)
    assert [p.name for p in other.iterdir()] == ['00001-0000000.safetensors'] and (other/'00001-0000000.safetensors').read_text() == 'mine'

def test_a_lock_that_is_a_link_is_refused(run, mine):
    linked(mine, run/'.lock')
    with pytest.raises(ValueError, match=r'\.lock\b.*link'): resume(run)

# ---- a run whose images are not at hand

def test_a_lock_that_is_another_file_by_a_second_name_is_refused(run, mine):
    (run/'.lock').unlink(missing_ok=True)
    os.link(mine, run/'.lock')
    (run/'summary.json').unlink()
    assert '.lock' in sentence(cifar_train, '--resume', run)

def test_a_report_without_images_has_the_names_of_the_classes(run, finished):
    change(run/'config.json', 'settings', 'data', to='/no/such/folder')
    interp = run_predictions(read_run(run))
    assert list(interp.vocab) == read_json(run/'config.json')['data']['vocab'] and interp.confusion_matrix().shape == (10, 10)
    page = write_report(run).read_text()
    assert all(page.count(name) > 1 for name in interp.vocab)

# ---- two writers

class After(Callback):
    "Do something after the first epoch, behind everything else"
    order = 2000
    def __init__(self, do): self.do = do
    def after_epoch(self):
        if self.epoch == 0: self.do()

@pytest.fixture
def disturbed(settings, tiny_learner, small, tmp_path):
    "A fit whose folder is treated by `do` after its first epoch"
    def fit(do):
        saved = SaveRun(tmp_path/'trained', run_config(settings(epochs=3), small, LRBounds(1e-3, 1e-2)))
        try: tiny_learner().fit(3, .01, cbs=[saved, After(lambda: do(saved.path))])
        finally: saved.end()
    return fit

def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def test_a_run_whose_folder_is_deleted_stops_and_makes_no_new_one(disturbed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'\btrained\b.*deleted'): disturbed(shutil.rmtree)
    assert not (tmp_path/'trained').exists()

def test_a_run_whose_folder_is_replaced_leaves_the_new_one_alone(disturbed, settings, small, tmp_path):
    before = {}
    def replace(path):
        shutil.rmtree(path)
        other = SaveRun(path, run_config(settings(epochs=3), small, LRBounds(1e-3, 1e-2)))
        other.begin()
        other.end()
        before.update(contents(path))
    with pytest.raises(FileNotFoundError, match=r'\btrained\b.*replaced'): disturbed(replace)
    assert contents(tmp_path/'trained') == before

def test_a_command_whose_folder_is_deleted_says_so(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(SaveRun, 'save_last', lambda self, save=SaveRun.save_last: (shutil.rmtree(self.path), save(self)))
    s = settings(out=str(tmp_path/'run'))
    args = ['--data', s.data, '--epochs', 2, '--bs', 16, '--lr_min', 1e-3, '--lr_max', 1e-2, '--num_workers', 0, '--precision', 'fp32', '--ghost', 4, '--out', s.out]
    said = sentence(cifar_train, *args)
    assert re.search(rf'{re.escape(s.out)}\b.*deleted', said) and 'Exception occured' not in said
    assert not (tmp_path/'run').exists()

def test_a_checkpoint_of_another_run_is_refused(run, settings, tmp_path):
    other = tmp_path/'other'
    train(settings(out=str(other)))
    for file in (other/'checkpoint').iterdir(): shutil.copy(file, run/'checkpoint')
    (run/'summary.json').unlink()
    with pytest.raises(ValueError, match=rf'{re.escape(str(run))}\b.*another run'): resume(run)

def test_a_run_of_an_earlier_version_has_no_identity_and_continues(run, finished):
    for path in checkpoints_in(run/'checkpoint'):
        tensors, facts = read_checkpoint(path)
        write_checkpoint(run/'checkpoint', tensors, {k: v for k, v in facts.items() if k != 'run'})
    config = read_json(run/'config.json')
    write_json(run/'config.json', {k: v for k, v in config.items() if k != 'id'})
    (run/'summary.json').unlink()
    assert resume(run)['weights_sha256'] == finished[1]['weights_sha256']

# ---- numbers that are none, or are too large

long = '1'*400
values = ['1'*400, 'Infinity', '-Infinity', 'NaN', '1e999', 'true', '"3"', 'null', '[1]', '{}', '1.5', '-1', '"\\u001b[31m"', '1'*5000]
places = [('config.json', *keys) for keys in (('settings', 'epochs'), ('settings', 'lr_max'), ('settings', 'eps'), ('settings', 'betas'), ('bounds', 'lr_max'), ('data', 'n_train'),
          ('data', 'vocab'), ('data', 'stats'), ('data', 'fingerprint'), ('environment', 'packages'), ('environment', 'processor'))] + [
          ('summary.json', name) for name in ('accuracy', 'n_wrong', 'best_epoch', 'seconds', 'n_params', 'device', 'flip_averaged_accuracy')]

@pytest.mark.parametrize('place', places, ids='.'.join)
def test_wrong_values_in_a_run_folder_end_in_one_sentence(run, place):
    file, *keys = place
    original = (run/file).read_text()
    refused = 0
    for value in values:
        content = json.loads(original)
        inner = content
        for key in keys[:-1]: inner = inner[key]
        inner[keys[-1]] = '@@'
        (run/file).write_text(json.dumps(content).replace('"@@"', value))
        try: read_run(run)
        except (ValueError, FileNotFoundError) as e:
            assert '\n' not in str(e) and str(e).isprintable() and len(str(e)) < 600
            refused += 1
    assert refused >= 8

@pytest.mark.parametrize('value', [10**400, 10**9, float('inf'), float('nan'), -10**400, True, '3', 1.5, [3]])
@pytest.mark.parametrize('name', ['epochs', 'bs', 'n_groups', 'num_workers', 'seed', 'ghost'])
def test_settings_refuse_numbers_out_of_range_by_name(name, value):
    if (name, value) in [('seed', 10**9), ('ghost', 10**9)]: return
    with pytest.raises(ValueError, match=rf'^{name}\b'): TrainSettings(**{name: value})

@pytest.mark.parametrize('value', [10**400, float('nan'), True, '3', [3]])
@pytest.mark.parametrize('name', ['peak_epoch', 'lr_max', 'lr_min', 'eps', 'wd', 'dropout', 'logit_scale', 'label_smoothing', 'checkpoint_minutes'])
def test_settings_refuse_numbers_that_are_none_by_name(name, value):
    with pytest.raises(ValueError, match=rf'^{name}\b'): TrainSettings(**{name: value})

@pytest.mark.parametrize('option', ['--epochs', '--lr_max', '--eps', '--peak_epoch', '--seed', '--bs'])
@pytest.mark.parametrize('value', [long, '1e999', 'nan', '-1', '0'])
def test_numbers_on_the_command_line_end_in_a_sentence(option, value, capsys):
    if (option, value) == ('--seed', '0'): return
    with pytest.raises(SystemExit) as e: cifar_train(['--data', 'digits', f'{option}={value}', '--out', '/proc/no/such'])
    assert e.value.code not in (0, None) and 'Traceback' not in capsys.readouterr().err

# ---- sizes

def test_a_long_run_on_paper_is_no_long_work(run):
    for key, value in dict(epochs=10**9, n_train=10**15).items():
        with pytest.raises(ValueError, match=key):
            if key == 'epochs': change(run/'config.json', 'settings', 'epochs', to=value)
            else: change(run/'config.json', 'data', 'n_train', to=value)
            read_run(run)
        change(run/'config.json', 'settings', 'epochs', to=2)

def test_the_epochs_of_a_report_are_those_of_its_history(run):
    change(run/'config.json', 'settings', 'epochs', to=1000)
    change(run/'config.json', 'settings', 'peak_epoch', to=5.)
    with pytest.raises(ValueError, match=r'\b2 epochs\b.*config\.json.*\b1000\b'): read_run(run)

def test_a_long_schedule_is_drawn_from_some_of_its_steps(run):
    change(run/'config.json', 'data', 'n_train', to=10**9)
    record = read_run(run)
    page = report_page(record, run_predictions(record))
    assert '125,000,000 steps' in page and len(page) < 10**6

# ---- what is not a file

def make_fifo(path): os.mkfifo(path)
def make_socket(path):
    s = socket.socket(socket.AF_UNIX)
    os.chdir(path.parent) # its whole name may be too long
    s.bind(path.name)
    s.close()
def make_folder(path): path.mkdir()
def make_zero(path): path.symlink_to('/dev/zero')

@pytest.mark.parametrize('make', [make_fifo, make_socket, make_folder, make_zero], ids=lambda f: f.__name__)
@pytest.mark.parametrize('name, read', [('config.json', read_run), ('summary.json', read_summary), ('history.csv', read_history), ('range_test.csv', read_range_test),
                                        ('predictions.safetensors', lambda run: run_predictions(read_run(run))), ('model.safetensors', load_run)], ids=lambda v: v if isinstance(v, str) else '')
def test_what_is_not_a_file_is_refused_at_once(run, folder_of_its_own, name, read, make):
    (run/name).unlink(missing_ok=True)
    make(run/name)
    with pytest.raises((ValueError, OSError)) as e: read(run)
    assert name in str(e.value) or run.name in str(e.value)

# ---- tensors of other kinds

def tampered(path, **changes):
    tensors = load_file(path)
    save_file({name: changes[name](t).contiguous() if name in changes else t for name, t in tensors.items()}, path)

def as_complex(t): # which safetensors before 0.5 cannot write
    try: return save({'t': t.to(torch.complex64)}) and t.to(torch.complex64)
    except KeyError: return t.bool()

kinds = [torch.Tensor.bool, as_complex, lambda t: t.to(torch.int64)*10**6, lambda t: t.float()*float('nan'), lambda t: t[:0], lambda t: t.reshape(-1), lambda t: -t.double() - 1, lambda t: t.new_zeros(())]

@pytest.mark.parametrize('kind', range(len(kinds)))
@pytest.mark.parametrize('name', ['probs', 'targs'])
def test_predictions_of_other_kinds_are_refused(run, name, kind):
    tampered(run/'predictions.safetensors', **{name: kinds[kind]})
    if name == 'targs' and kind == 5: return # they have one dimension
    with pytest.raises(ValueError, match='predictions'): write_report(run)

@pytest.mark.parametrize('kind', range(5))
def test_weights_of_other_kinds_are_refused(run, kind):
    tampered(run/'model.safetensors', **{'prep.0.weight': kinds[kind]})
    if kind == 3: return # nan is a number of the right kind; who uses the network says so
    with pytest.raises(ValueError, match=r'model\.safetensors'): load_run(run)

replaced = [True, 'text', None, [], {}, 1.5, -1, 10**30, [True], ['a'], [[1, 2]]]
parts = [('epoch',), ('batches',), ('fit',), ('train_iter',), ('pct_train',), ('param_groups',), ('param_groups', 0, 'lr'), ('param_groups', 0, 'betas'), ('param_groups', 0, 'eps'), ('random',), ('random', 'python'),
         ('random', 'numpy'), ('callbacks',), ('callbacks', 'recorder'), ('callbacks', 'recorder', 'lrs'), ('callbacks', 'recorder', 'losses'), ('callbacks', 'recorder', 'history'), ('callbacks', 'recorder', 'smooth'),
         ('callbacks', 'recorder', 'sums'), ('callbacks', 'recorder', 'seconds'), ('callbacks', 'save_run', 'best'), ('callbacks', 'save_run', 'best_epoch'), ('callbacks', 'set_epoch', 'trained_before')]

@pytest.mark.parametrize('part', parts, ids=lambda p: '.'.join(map(str, p)))
def test_wrong_values_in_a_checkpoint_end_in_one_sentence(settings, tiny_learner, small, tmp_path, part):
    "Its checksum is right, so the content was written on purpose"
    config = run_config(settings(epochs=2), small, LRBounds(1e-3, 1e-2))
    def fit(resume):
        saved, learn = SaveRun(tmp_path/'trained', config, resume=resume), tiny_learner()
        try:
            with learn.no_logging(): learn.fit(2, .01, cbs=[saved, Checkpoints(tmp_path/'trained'/'checkpoint', resume=resume)])
        finally: saved.end()
    fit(False)
    newest = checkpoints_in(tmp_path/'trained'/'checkpoint')[1] # after the first epoch
    checkpoints_in(tmp_path/'trained'/'checkpoint')[0].unlink()
    tensors, facts = read_checkpoint(newest)
    text, refused = json.dumps(facts), 0
    for value in replaced:
        changed = json.loads(text)
        inner = changed
        for key in part[:-1]: inner = inner[key]
        inner[part[-1]] = value
        try: write_checkpoint(newest.parent, tensors, {'epoch': facts['epoch'], 'batches': facts['batches']} | changed)
        except (ValueError, TypeError): refused += 1; continue
        for path in checkpoints_in(newest.parent)[1:]: path.unlink()
        try: fit(True)
        except (ValueError, FloatingPointError) as e:
            assert '\n' not in str(e).split('\n\t')[-1]
            refused += 1
        for path in checkpoints_in(newest.parent): path.unlink()
    assert refused >= 6

@pytest.mark.parametrize('position, value', [(0, 'PCG64'), (1, [1]*623), (1, [2**32]*624), (1, [-1]*624), (2, 10**9), (2, -1), (2, 625), (2, True), (3, 2), (4, 'x')])
def test_a_numpy_state_that_would_read_beyond_its_keys_is_refused(tiny_learner, tmp_path, position, value):
    learn, checkpoints = tiny_learner(), Checkpoints(tmp_path, minutes=0)
    with learn.no_logging(): learn.fit(1, .01, cbs=checkpoints)
    tensors, facts = read_checkpoint(checkpoints_in(tmp_path)[0])
    facts['random']['numpy'][position] = value
    write_checkpoint(tmp_path, tensors, facts)
    with pytest.raises(ValueError, match='NumPy'), learn.no_logging(): learn.fit(1, .01, cbs=Checkpoints(tmp_path, resume=True))

# ---- the commands' last resort, terminals, and full disks

def test_an_unexpected_error_ends_with_one_sentence_and_a_traceback_in_a_file(run, monkeypatch, tmp_path):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    monkeypatch.setattr('cifar_fastai.look.report.report_page', lambda *args, **kwargs: {}['never\x1b[31m foreseen'])
    said = sentence(cifar_report, run)
    [file] = [file for file in tmp_path.iterdir() if file.is_file()]
    assert 'KeyError' in said and str(file) in said and 'report_page' in file.read_text()

def test_names_reach_the_terminal_as_text(run, capsys):
    evil = 'cat\x1b]0;owned\x07\u202e'
    change(run/'config.json', 'settings', 'x\x1b[31m', to=1)
    assert 'x\\x1b' in sentence(cifar_report, run)
    content = read_json(run/'config.json')
    del content['settings']['x\x1b[31m']
    content['data']['vocab'][0] = evil
    write_json(run/'config.json', content)
    said = sentence(cifar_interpret, run)
    assert '\\x1b' in said
    write_json(run/'config.json', content | dict(data=content['data'] | dict(n_train='\x1b')))
    assert 'n_train' in sentence(cifar_report, run)

def test_text_is_printable_and_stays_readable():
    assert printable('é 图 a b') == 'é 图 a b' and printable('\x1b[31m\u202e\n\udcff') == '\\x1b[31m\\u202e\\n\\udcff'

def test_a_full_disk_names_the_file_and_how_to_continue(settings, tmp_path, monkeypatch):
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real, s = os.fsync, settings(out=str(tmp_path/'run'))
    class Full(Callback):
        def before_epoch(self): monkeypatch.setattr(os, 'fsync', full)
    monkeypatch.setattr('cifar_fastai.run.train.FiniteLoss', Full)
    with pytest.raises(OSError) as e: train(s)
    monkeypatch.setattr(os, 'fsync', real)
    assert str(tmp_path/'run') in str(e.value) and '--resume' in str(e.value) and 'Exception occured' not in str(e.value)
    assert not list((tmp_path/'run').rglob('*.part'))

def test_errors_on_resume_are_said_without_the_prefix_of_fastai(run):
    (run/'summary.json').unlink()
    for path in checkpoints_in(run/'checkpoint'):
        tensors, facts = read_checkpoint(path)
        write_checkpoint(run/'checkpoint', tensors, facts | dict(fit=[7, 7]))
    with pytest.raises(ValueError) as e: resume(run)
    assert 'Exception occured' not in str(e.value) and '\n' not in str(e.value)

# ---- surroundings

@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_no_duration(settings, tmp_path, monkeypatch):
    now = [2e9]
    def clock():
        now[0] -= 1000
        return now[0]
    monkeypatch.setattr('time.time', clock)
    train(settings(out=str(tmp_path/'run')))
    assert (read_history(tmp_path/'run')['seconds'].between(0, 1000)).all()
    (tmp_path/'run'/'summary.json').unlink()
    assert 0 <= resume(tmp_path/'run')['seconds'] < 1000

def test_more_epochs_than_five_digits_keep_their_newest_checkpoint(tmp_path):
    for epoch in (99_998, 99_999, 100_000, 100_001): write_checkpoint(tmp_path, dict(w=torch.ones(1)), dict(epoch=epoch, batches=0))
    assert [path.name[:6] for path in checkpoints_in(tmp_path)] == ['100001', '100000']

def test_a_folder_that_could_not_be_begun_is_no_hindrance(settings, tmp_path, monkeypatch):
    def full(path, content): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with monkeypatch.context() as m:
        m.setattr('cifar_fastai.run.folder.write_json', full)
        with pytest.raises(OSError): train(settings(out=str(tmp_path/'run')))
    assert not (tmp_path/'run').exists()

def test_a_name_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path):
    assert 'out' in sentence(cifar_train, '--data', 'digits', '--out', tmp_path/'r\udcff')
    assert not list(tmp_path.iterdir())

def test_a_range_test_that_is_stopped_leaves_the_files_of_others(settings, tmp_path, monkeypatch):
    def interrupted(learn):
        (tmp_path/'run'/'notes').write_text('mine')
        raise KeyboardInterrupt
    monkeypatch.setattr('cifar_fastai.callback.schedule.range_test', interrupted)
    with pytest.raises(KeyboardInterrupt): train(settings(out=str(tmp_path/'run'), lr_max='find'))
    assert [path.name for path in (tmp_path/'run').iterdir()] == ['notes']

def test_a_range_test_that_is_stopped_does_not_stumble_over_a_moved_folder(settings, tmp_path, monkeypatch):
    def interrupted(learn):
        (tmp_path/'run').rename(tmp_path/'moved')
        (tmp_path/'run').symlink_to(tmp_path/'moved')
        raise KeyboardInterrupt
    monkeypatch.setattr('cifar_fastai.callback.schedule.range_test', interrupted)
    with pytest.raises(KeyboardInterrupt): train(settings(out=str(tmp_path/'run'), lr_max='find'))

@pytest.mark.parametrize('name', ['accuracy', 'best_accuracy', 'best_epoch', 'seconds', 'epochs'])
def test_a_summary_that_its_history_contradicts_is_refused(run, name):
    change(run/'summary.json', name, to=dict(best_epoch=7, epochs=7).get(name, .99))
    assert name in sentence(cifar_report, run)

def test_an_accuracy_that_the_predictions_contradict_is_refused(run):
    rows = (run/'history.csv').read_text().splitlines()
    cells = rows[-1].split(',')
    cells[5] = '1.0'
    (run/'history.csv').write_text('\n'.join([*rows[:-1], ','.join(cells)]) + '\n')
    for name, value in dict(accuracy=1., best_accuracy=1., best_epoch=2).items(): change(run/'summary.json', name, to=value)
    with pytest.raises(ValueError, match='accuracy'): run_predictions(read_run(run))

def test_a_page_calls_images_those_of_cifar10_by_their_content_only(run):
    change(run/'config.json', 'data', 'is_cifar10', to=True)
    assert re.search('not .*CIFAR-10', write_report(run).read_text())
    change(run/'config.json', 'data', 'vocab', to=list('0123456789'))
    change(run/'config.json', 'settings', 'data', to='/no/such/folder')
    assert re.search('not .*CIFAR-10', write_report(run).read_text())

@pytest.mark.parametrize('n', [101, 1000, 1001])
def test_many_classes_make_no_endless_page(run, n):
    kept = load_file(run/'predictions.safetensors')
    save_file(kept | dict(probs=torch.nn.functional.pad(kept['probs'], (0, n - 10))), run/'predictions.safetensors')
    change(run/'config.json', 'data', 'vocab', to=[f'class {i}' for i in range(n)])
    n_params = read_json(run/'summary.json')['n_params']
    change(run/'summary.json', 'n_params', to=n_params + 129*(n - 10)) # 128 weights and a bias of each class
    if n > 1000: assert '1,001 classes' in sentence(cifar_report, run)
    else: assert f' {n} classes' in (page := write_report(run).read_text()) and len(page) < 10**6

def test_a_long_history_makes_no_endless_page(run):
    n = 100_000
    header, *_, last = (run/'history.csv').read_text().splitlines()
    (run/'history.csv').write_text('\n'.join([header, *(f"{i},{last.split(',', 1)[1]}" for i in range(1, n + 1))]) + '\n')
    history = read_history(run)
    for name in 'config.json', 'summary.json': change(run/name, 'settings', 'epochs', to=n)
    wanted = dict(epochs=n, best_epoch=1, best_accuracy=history['accuracy'].max(), seconds=history['seconds'].sum())
    for name, value in wanted.items(): change(run/'summary.json', name, to=value)
    assert len(write_report(run).read_text()) < 2*10**6

@pytest.mark.parametrize('rank, n', [('abc', '1'), ('-1', '0'), ('3', None), ('2', '2')])
def test_a_rank_without_its_launch_is_refused_and_not_silent(monkeypatch, rank, n):
    monkeypatch.setenv('RANK', rank)
    if n is not None: monkeypatch.setenv('WORLD_SIZE', n)
    assert 'RANK' in sentence(cifar_report, '/no/such')

def test_a_terminal_of_one_column_gets_its_help(monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '1')
    with pytest.raises(SystemExit) as e: cifar_report(['--help'])
    assert e.value.code in (0, None) and '--data' in capsys.readouterr().out

def test_a_working_folder_that_was_deleted_is_said(tmp_path, monkeypatch):
    (tmp_path/'gone').mkdir()
    monkeypatch.chdir(tmp_path/'gone')
    (tmp_path/'gone').rmdir()
    said = sentence(cifar_report, '/no/such')
    monkeypatch.chdir(tmp_path)
    assert 'working' in said and '/no/such' not in said

def test_a_run_needs_no_output(settings, tmp_path, monkeypatch):
    monkeypatch.setattr('sys.stdout', None)
    assert train(settings(out=str(tmp_path/'run'), epochs=1))['epochs'] == 1

@pytest.mark.parametrize('args', [['report', '/no/such/é…'], *(pytest.param(a, marks=pytest.mark.slow) for a in (['--help'], ['report', '--help']))], ids=' '.join)
def test_a_terminal_without_the_letters_is_no_error(command, args):
    done = command(*args, env=os.environ | dict(PYTHONIOENCODING='ascii:strict'))
    assert done.returncode == (0 if '--help' in args else 1) and 'Traceback' not in done.stderr and 'codec' not in done.stderr

def test_a_folder_name_reaches_the_terminal_as_text(run, capsys):
    run = run.rename(run.with_name('r\x1b[31m'))
    cifar_report([str(run)])
    assert '\\x1b' in (said := capsys.readouterr().out) and '\x1b' not in said

# ---- what a command writes

def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    make_fifo(tmp_path/'pipe')
    for path in (tmp_path/'pipe', Path('/dev/no-such-device'), tmp_path):
        with pytest.raises(FileExistsError, match=rf'{re.escape(str(path))}.*regular'): write_whole(path, b'')
    assert (tmp_path/'pipe').is_fifo()

def test_a_network_that_gives_no_probabilities_is_not_asked(run):
    weights = load_file(run/'model.safetensors')
    for t in weights.values():
        if t.is_floating_point(): t.fill_(float('nan'))
    save_file(weights, run/'model.safetensors')
    Image.new('RGB', (32, 32)).save('picture.png')
    assert 'probabilities' in sentence(cifar_predict, 'picture.png', '--model', run)

def test_a_folder_named_like_a_part_of_a_file_is_no_hindrance(tmp_path):
    (tmp_path/'.0123456789abcdef.part').mkdir()
    (tmp_path/'.fedcba9876543210.part').write_bytes(b'')
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.0123456789abcdef.part']

def test_a_run_folder_is_there_with_its_settings_or_not_at_all(settings, small, tmp_path, monkeypatch):
    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'fsync', killed)
    saved = SaveRun(tmp_path/'run', run_config(settings(), small, LRBounds(1e-3, 1e-2)))
    with pytest.raises(KeyboardInterrupt): saved.begin()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    saved.begin()
    saved.end()
    assert {p.name for p in (tmp_path/'run').iterdir()} >= {'config.json'}
