"""The commands, as they are typed: what they say, what they refuse in one sentence, and what Ctrl-C leaves."""
import ast, hashlib, inspect, json, os, re, shutil, signal, subprocess, sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

import forked
from forked import wait_until
from cifar_fastai import cli
from cifar_fastai.cli import (AppSettings, ExportSettings, LRFindSettings, InterpretSettings, PredictSettings,
                              ReportSettings, RunSettings, cifar_app, cifar_bench, cifar_export, cifar_interpret, cifar_lr_find,
                              cifar_predict, cifar_repeat, cifar_report, cifar_train)
from cifar_fastai.core import BenchSettings, Norm, RepeatSettings, cifar10_classes, cifar10_stats, data_variable
from cifar_fastai.files import read_json
from cifar_fastai.data.picture import read_image
from cifar_fastai.run.folder import load_run
from cifar_fastai.look.interpret import CifarInterpretation, class_probabilities
from cifar_fastai.look.report import write_report
from cifar_fastai.models import load_pretrained
from cifar_fastai.run.folder import read_csv_exact

commands = dict(cifar_train=RunSettings, cifar_lr_find=LRFindSettings, cifar_interpret=InterpretSettings,
                cifar_predict=PredictSettings, cifar_bench=BenchSettings, cifar_repeat=RepeatSettings,
                cifar_report=ReportSettings, cifar_app=AppSettings, cifar_export=ExportSettings)
scripts = Path(sys.executable).parent

def refused(command, *args):
    "What `command` says when it refuses `args`: one sentence, behind its name"
    with pytest.raises(SystemExit) as e: command([str(arg) for arg in args])
    said = e.value.code
    assert isinstance(said, str), 'the exit status is not 1' # of a string: printed to stderr, and 1
    assert '\n' not in said and said.startswith(f'{command.__name__}: ')
    return said

# ---- help

def comments(settings): # {name: comment} of a dataclass and those it is made from
    lines = [line for cls in settings.__mro__[-2::-1] for line in inspect.getsource(cls).splitlines()]
    return dict(re.findall(r'^    (\w+): .* # (.+)$', '\n'.join(lines), re.MULTILINE))

@pytest.fixture(scope='module')
def help_of():
    "What `--help` prints, unfolded, and the modules it imports, by name of the command"
    def run(command):
        done = subprocess.run([sys.executable, '-X', 'importtime', scripts/command, '--help'], capture_output=True, text=True,
                              env={**os.environ, 'COLUMNS': '120'}, check=True)
        return ' '.join(done.stdout.replace('│', ' ').split()), set(re.findall(r'\| +([\w.]+)$', done.stderr, re.MULTILINE))
    return {command: run(command) for command in commands}

@pytest.mark.parametrize('command', commands)
def test_help_is_immediate_since_it_imports_neither_torch_nor_fastai(help_of, command):
    assert 'tyro' in help_of[command][1] and not {'torch', 'fastai', 'matplotlib', 'pandas'} & help_of[command][1]

@pytest.mark.parametrize('command', commands)
def test_help_says_what_every_option_means(help_of, command):
    said, explained = help_of[command][0], comments(commands[command])
    assert f'usage: {command}' in said
    for field in fields(commands[command]):
        assert f'--{field.name.replace("_", "-")} ' in said.replace(',', ' ') or field.name in ('run', 'images', 'runs', 'model') # those that have no name
        assert explained[field.name] in said, f'no help for {field.name}'

def test_the_source_of_every_class_that_options_are_made_from_can_be_found():
    "Python 3.13 finds none for a class that is made by `type(name, bases, dict)`, and tyro has no explanations then"
    for command, settings in commands.items():
        assert getattr(cli, command).__annotations__['settings'] is settings
        assert f'class {settings.__name__}' in inspect.getsource(settings)
        assert set(comments(settings)) >= {field.name for field in fields(settings)}

def test_no_class_is_made_at_run_time():
    for module in Path(cli.__file__).parent.glob('*.py'):
        nodes = ast.walk(ast.parse(module.read_text(encoding='utf8')))
        calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        for call in calls:
            makes_a_class = call.func.id == 'make_dataclass' or call.func.id == 'type' and len(call.args) > 1
            assert not makes_a_class, f'{module.name}, line {call.lineno}'

def test_a_reader_that_goes_away_is_no_traceback():
    done = subprocess.run(f'"{scripts/"cifar_repeat"}" --help | head -n 1', shell=True, capture_output=True, text=True)
    assert done.stdout.startswith('usage: cifar_repeat') and done.stderr == ''

def test_help_says_what_the_command_does(help_of):
    for command in commands: assert ' '.join(inspect.getdoc(getattr(cli, command)).splitlines()[0].split()) in help_of[command][0]

@pytest.mark.parametrize('name', ['train', 'lr_find', 'interpret', 'predict', 'bench', 'repeat', 'report', 'app', 'export'])
def test_python_m_is_the_same_command(name, capsys):
    with pytest.raises(SystemExit) as e: cli.main([name, '--help'])
    through_main = capsys.readouterr().out
    with pytest.raises(SystemExit): getattr(cli, f'cifar_{name}')(['--help'])
    assert e.value.code in (0, None) and through_main == capsys.readouterr().out != ''

def test_python_m_without_a_command_names_them(capsys):
    cli.main(['--help'])
    assert '{train,lr_find,interpret,predict,bench,repeat,report,app,export}' in capsys.readouterr().out
    for args in ([], ['fly']):
        with pytest.raises(SystemExit, match='train.*lr_find.*interpret.*predict.*bench.*repeat.*report.*app.*export'):
            cli.main(args)

# ---- arguments that are refused

both_spellings = pytest.mark.parametrize('option', ['--peak_epoch', '--peak-epoch'])

@pytest.mark.parametrize('args', [('--device', 'cuda:99'), ('--device', 'tpu'), ('--precision', 'fp16', '--device', 'cpu')])
def test_what_the_machine_lacks_is_refused_before_images_are_looked_for(args):
    assert f'{args[0][2:]} is {args[1]!r}' in refused(cifar_train, '--data', 'no/such/folder', *args)

@both_spellings
def test_options_have_both_spellings(option): assert 'peak_epoch is 99.0' in refused(cifar_train, option, 99)

@pytest.mark.parametrize('args, message', [
    (['--epochs', 0], 'epochs is 0'), (['--bs', 1], 'bs is 1'), (['--bs', -8], 'bs is -8'), (['--lr_max', -.1], 'lr_max is -0.1'),
    (['--lr_min', 0], 'lr_min is 0.0'), (['--lr_max', 'nan'], 'lr_max is nan'), (['--lr_max', 'inf'], 'lr_max is inf'),
    (['--lr_min', .2, '--lr_max', .1], r'lr_min is 0\.2\b.*lr_max.*0\.1'), (['--peak_epoch', 24], r'peak_epoch is 24\.0\b.*epochs.*24'),
    (['--dropout', 1], 'dropout is 1.0'), (['--seed', -1], 'seed is -1'), (['--data', '/no/such'], '/no/such')])
def test_invalid_values_are_refused_in_one_sentence_and_leaves_no_folder(args, message, folder_of_its_own):
    assert re.search(message, refused(cifar_train, '--out', 'run', *args))
    assert list(folder_of_its_own.iterdir()) == []

@pytest.mark.parametrize('args, named', [
    (['--norm', 'nosuch'], ['norm', *get_args(Norm)]), (['--precision', 'fp8'], ['precision', 'auto', 'fp32', 'bf16', 'fp16']), (['--valid', 'train'], ['valid', 'test', 'holdout']),
    (['--colour', 'red'], ['--colour']), (['--epochs', 'many'], ['--epochs', 'many']), (['--bs', '2.5'], ['--bs', '2.5']), (['--lr_max', 'high'], ['--lr', 'high']), (['--epochs'], ['--epochs'])])
def test_what_cannot_be_read_is_refused_by_name(args, named, capsys, folder_of_its_own):
    with pytest.raises(SystemExit) as e: cifar_train(args)
    said = capsys.readouterr()
    assert e.value.code not in (0, None) and said.out == '' and 'Traceback' not in said.err
    assert [name for name in named if name not in said.err] == []
    assert list(folder_of_its_own.iterdir()) == []

@pytest.mark.parametrize('args, said', [
    ('--epochs zwei', "--epochs is 'zwei'.*integer"), ('--lr_max 0,01', r"--lr_max is '0,01'.*find.*number.*\b0\.01\b"), ('--lr-max=0,01', "--lr-max is '0,01'"),
    ('--sizes 20 x', "--sizes is 'x'"), ('--betas .9 x', "--betas is 'x'"), ('--recipe bst', "--recipe is 'bst'.*best"), ('--whiten maybe', "--whiten is 'maybe'")])
def test_a_value_of_another_type_is_one_plain_sentence(args, said, capsys, folder_of_its_own):
    with pytest.raises(SystemExit) as e: cifar_train(args.split())
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and re.fullmatch(rf'cifar_train: {said}.*\n', err)
    assert list(folder_of_its_own.iterdir()) == []

def test_values_of_the_type_of_their_option_are_read(capsys):
    for args in '--lr_max find --epochs 0', '--lr_max 1e-2 --wd None --epochs 0', '--sizes 20 24 --betas .9 .99 --compile --whiten True --epochs 0':
        assert 'epochs is 0' in refused(cifar_train, *args.split())

@pytest.mark.parametrize('name, meant', [('Resnet18', 'resnet18'), ('resnet-18', 'resnet18'), ('mobilenet_v3_smal', 'mobilenet_v3_small'), ('Custom', 'custom')])
def test_a_similar_name_of_a_network_is_suggested_before_images_are_looked_for(name, meant):
    assert re.search(rf"model is '{name}'.*{meant}\?$", refused(cifar_train, '--data', 'no/such/folder', '--model', name))

def test_the_width_of_other_networks_is_fixed():
    assert re.search('width is 16.*resnet18.*custom', refused(cifar_train, '--model', 'resnet18', '--width', 16))

def test_a_missing_extra_is_named_before_images_are_looked_for(monkeypatch):
    import cifar_fastai.core
    monkeypatch.setattr(cifar_fastai.core, 'find_spec', lambda name: None)
    for extra, args in dict(models=['--model', 'timm:resnet10t'], tensorboard=['--log', 'tensorboard']).items():
        assert f'[{extra}]' in refused(cifar_train, '--data', 'no/such/folder', *args)
    for option in '--cam', '--label_issues': assert '[explain]' in refused(cifar_interpret, 'no/such/run', option)
    assert '[app]' in refused(cifar_app, 'no/such/run', '--data', 'no/such/folder')
    assert '[export]' in refused(cifar_export, 'no/such/run')

def test_an_existing_run_folder_is_refused(folder_of_its_own):
    Path('run').mkdir()
    assert re.search(r'\brun\b.*exist.*--out', refused(cifar_train, '--data', 'digits', '--out', 'run'))
    assert list(Path('run').iterdir()) == []

def test_without_network_and_data_it_says_what_to_do(empty_home, folder_of_its_own):
    said = refused(cifar_train, '--out', 'run')
    assert 'CIFAR-10' in said and data_variable in said
    assert 'cifar10.tgz' in said and 'cifar-10-python.tar.gz' in said # what was tried
    assert list(folder_of_its_own.iterdir()) == [] and not [p for p in empty_home.rglob('*') if p.is_file()]

def test_damaged_data_is_refused_in_one_sentence(folder, small_archive, tmp_path):
    (tmp_path/'cut.tgz').write_bytes(small_archive.read_bytes()[:9000])
    assert re.search(r'cut\.tgz\b.*\btar\b', refused(cifar_train, '--data', tmp_path/'cut.tgz', '--out', 'run'))
    shutil.rmtree(folder/'train'/'ship')
    assert re.search(r'cifar10\b.*\btrain\b.*\bship\b', refused(cifar_train, '--data', folder, '--out', 'run'))
    Image.new('RGB', (40, 40)).save(folder/'test'/'cat'/'big.png')
    assert re.search(r'test/cat/big\.png\b.*40×40 RGB.*32×32 RGB', refused(cifar_train, '--data', folder, '--out', 'run'))
    assert not Path('run').exists()

def test_a_process_that_is_refused_prints_one_line_and_exits_with_1(command):
    done = command('train', '--epochs', 0)
    assert (done.returncode, done.stdout) == (1, '') and done.stderr.startswith('cifar_train: epochs is 0') and done.stderr.count('\n') == 1

@pytest.mark.parametrize('command, args, said', [
    (cifar_lr_find, ['--bs', 0], 'bs is 0'), (cifar_bench, ['--bs', 1], 'bs is 1'),
    (cifar_bench, ['--repeats', 0], 'repeats is 0'), (cifar_repeat, ['--n', 0], 'n is 0'),
    (cifar_repeat, ['--without', 'wd', '--wd', .5], 'wd is 0.5'),
    (cifar_train, ['--epochs', 2, '--peak_epoch', 3], 'peak_epoch is 3.0'),
    (cifar_train, ['--data', 'digits', '--peak_epoch', 12], 'peak_epoch is 12.0'),
    (cifar_train, ['--recipe', 'best', '--lr_max', 1e-5], 'lr_min is 0.00065')])
def test_every_command_refuses_a_value_in_one_sentence_without_a_box(command, args, said, capsys, folder_of_its_own):
    assert refused(command, *args).startswith(f'{command.__name__}: {said}') and capsys.readouterr() == ('', '')
    assert list(folder_of_its_own.iterdir()) == []

# ---- going on with a run

@pytest.mark.parametrize('args, said', [
    (['--ghost', None], r'\bghost\b.*\b4\b.*\b32\b'), (['--epochs', 1], r'\bepochs\b.*\b2\b.*\b1\b'),
    (['--epochs', 0], r'\bepochs\b.*\b2\b.*\b0\b'), (['--lr_min', 1], r'\blr_min\b.*\b0\.001\b.*\b1\.0\b'),
    (['--recipe', 'baseline'], r"\brecipe\b.*'best'.*'baseline'")])
def test_an_option_that_makes_another_run_is_refused_by_its_name(finished, args, said):
    assert re.search(said, refused(cifar_train, '--resume', finished[0], *args))

def test_an_option_that_says_what_the_run_has_is_none(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path/'run')
    cifar_train(['--resume', str(run), *'--wd None --peak_epoch None --bs 16 --recipe best --num_workers 1'.split()])
    assert re.search(rf'{re.escape(str(run))}\b.*\b2 epochs\b', capsys.readouterr().out)

# ---- a run, typed

small_run = '--bs 16 --width 16 --ghost 4 --lr_min 0.001 --lr_max 0.01 --precision fp32'.split()

def test_train_as_a_process_makes_a_run(small_archive, finished, folder_of_its_own):
    done = subprocess.run([scripts/'cifar_train', '--data', small_archive, '--epochs', '2', '--num_workers', '0', *small_run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert [line[:12] for line in lines if line.startswith('epoch')] == ['epoch 1 of 2', 'epoch 2 of 2']
    [run] = (folder_of_its_own/'runs').iterdir()
    assert lines[-2].endswith(f'runs/{run.name}') and lines[-1] == f'report runs/{run.name}/report.html' and (run/'report.html').stat().st_size > 10_000
    assert json.loads((run/'summary.json').read_text())['weights_sha256'] == finished[1]['weights_sha256'] # as in this process

def press_ctrl_c(process): os.killpg(process.pid, signal.SIGINT) # as a terminal does: for the process and its workers

@pytest.mark.parametrize('moment', ['at once', 'after an epoch'])
def test_ctrl_c_keeps_history_and_last_model(small_archive, moment, folder_of_its_own):
    run, at_once = folder_of_its_own/'run', moment == 'at once'
    data, workers = ('digits', '2') if at_once else (small_archive, '0') # at once: just before the workers are forked
    args = ['--data', data, '--epochs', '200', *small_run, '--num_workers', workers, '--out', run]
    with forked.Forked(forked.command, 'train', *args) as process:
        # The bounds are recorded when signals are already handled, and the first step has not begun.
        begun = (lambda: (run/'config.json').exists() and read_json(run/'config.json')['bounds']) if at_once else (run/'best.safetensors').exists
        wait_until(begun, process)
        press_ctrl_c(process)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in out + err and re.search(r'interrupted.*\brun\b', out)
    history = read_csv_exact(run/'history.csv')
    summary = json.loads((run/'summary.json').read_text())
    assert summary['interrupted'] is True and summary['epochs'] == len(history)
    assert len(history) == 0 and summary['accuracy'] is None if at_once else summary['accuracy'] == pytest.approx(history['accuracy'].iloc[-1])
    assert summary['weights_sha256'] == hashlib.sha256((run/'model.safetensors').read_bytes()).hexdigest()
    assert load_run(run)[1] == json.loads((run/'config.json').read_text())

# ---- predict

@pytest.fixture
def images(small, folder_of_its_own):
    Image.fromarray(small.test_x[3]).save('same.png')
    Image.fromarray(small.test_x[9]).resize((200, 120)).save('wide.jpg')
    Image.fromarray(small.test_x[20]).resize((20, 45)).convert('L').save('tall grey.png')
    return ['same.png', 'wide.jpg', 'tall grey.png']

def test_predict_says_class_and_probability_of_each_image(finished, images, capsys):
    cifar_predict(['--model', str(finished[0]), *images])
    model, config = load_run(finished[0])
    probs = class_probabilities(model, [read_image(image) for image in images], config['data']['stats'])
    expected = [f'{image}: {config["data"]["vocab"][p.argmax()]} {p.max():.1%}' for image, p in zip(images, probs)]
    assert capsys.readouterr().out.splitlines() == expected

def test_predict_prints_all_probabilities_for_programs(finished, images, capsys):
    cifar_predict(['--json', '--model', str(finished[0]), *map(str, images)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['image'] for row in rows] == list(map(str, images))
    for row in rows:
        probs = row['probabilities']
        assert max(probs, key=probs.get) == row['class'] and sum(probs.values()) == pytest.approx(1, abs=1e-5) and len(probs) == 10

def test_predict_refuses_a_web_address_by_its_name():
    assert 'https://example.org/cat.jpg' in refused(cifar_predict, 'https://example.org/cat.jpg')

def test_predict_takes_the_best_weights_when_asked(finished, images, capsys, tmp_path):
    run = shutil.copytree(finished[0], tmp_path/'run')
    (run/'model.safetensors').unlink()
    cifar_predict(['--model', str(run), '--weights', 'best', *images])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert 'model.safetensors' in refused(cifar_predict, '--model', run, *images)

def test_predict_refuses_what_is_no_image_and_predicts_the_rest(finished, images, capsys):
    Path('text.png').write_text('no picture')
    run = finished[0]
    with pytest.raises(SystemExit) as e: cifar_predict(['--model', str(run), 'text.png', images[0], 'nothing.png'])
    out, err = capsys.readouterr()
    assert e.value.code == 1 and out.startswith('same.png: ') and len(out.splitlines()) == 1
    assert [re.findall(r'\w+\.png', line) for line in err.splitlines()] == [['text.png'], ['nothing.png']]
    assert 'image' in refused(cifar_predict, '--model', run)

def test_predict_refuses_what_is_no_run(images):
    assert 'no_run' in refused(cifar_predict, '--model', 'no_run', *images)

@pytest.mark.parametrize('config', ['['*100_000, '{', '{}', *('{"settings": {}, "data": {"vocab": %s, "stats": %s}}' % facts for facts in [('3', '[[0,0,0],[1,1,1]]'), ('{"a": 1}', '[[0,0,0],[1,1,1]]'),
                                                                          ('["a", "b"]', '[[0],[1]]'), ('["a", "b"]', '[[0,0,0],[1,1,0]]'), ('["a", "b"]', '3')]), '{"settings": {}, "data": {"vocab": ["a", "b"]}}', '{"settings": {"epochs": "x"}, "data": {}}'])
def test_predict_refuses_a_damaged_run_in_one_sentence(finished, images, tmp_path, config):
    run = shutil.copytree(finished[0], tmp_path/'run')
    (run/'config.json').write_text(config)
    refused(cifar_predict, '--model', run, *images)

def test_predict_without_a_run_uses_the_network_that_ships(images, capsys):
    cifar_predict(images)
    probs = class_probabilities(load_pretrained(), [read_image(image) for image in images], cifar10_stats)
    assert capsys.readouterr().out.splitlines() == [f'{image}: {cifar10_classes[p.argmax()]} {p.max():.1%}' for image, p in zip(images, probs)]
    assert "weights is 'best'" in refused(cifar_predict, '--weights', 'best', *images)

def test_the_network_that_ships_knows_real_photographs(real_cifar, capsys):
    for i in range(60): Image.fromarray(real_cifar.test_x[i]).save(f'{i}.png')
    cifar_predict([f'{i}.png' for i in range(60)])
    named = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert sum(name == cifar10_classes[label] for name, label in zip(named, real_cifar.test_y[:60], strict=True)) >= 52 # far under 94 % of 60, far over chance

def test_predict_takes_the_pictures_of_a_folder(finished, images, capsys, tmp_path):
    folder = tmp_path/'pictures'
    for name, image in zip(['b.PNG', 'a.jpg', 'more/c.png', '.hidden/d.png'], [*images, images[0]]):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder/name)
    (folder/'notes.txt').write_text('no picture')
    cifar_predict(['--model', str(finished[0]), str(folder), images[0]])
    expected = [*(str(folder/name) for name in ('a.jpg', 'b.PNG', 'more/c.png')), images[0]]
    assert [line.rpartition(': ')[0] for line in capsys.readouterr().out.splitlines()] == expected
    (tmp_path/'empty').mkdir()
    assert str(tmp_path/'empty') in refused(cifar_predict, '--model', finished[0], tmp_path/'empty')

# ---- interpret

def test_interpret_explains_on_request_and_the_report_shows_it(finished, capsys, tmp_path):
    for module in 'captum', 'cleanlab': pytest.importorskip(module, reason='the extra [explain]')
    run = shutil.copytree(finished[0], tmp_path/'run')
    cifar_interpret([str(run), '--cam', '--label_issues', '--shift'])
    said = capsys.readouterr().out
    assert re.search(r'\d+ labels are likely to be wrong', said) and re.search(r'^JPEG compression +80', said, re.MULTILINE)
    assert {'cam.png', 'shift.png'} <= {file.name for file in (run/'plots').iterdir()} and (run/'shift.csv').exists()
    page = write_report(run).read_text(encoding='utf8')
    assert page.count('<tr><th scope="row">blur</th>') == 3 and '<details><summary><img' in page and 'Grad-CAM' in page
    (run/'shift.csv').write_text('no table')
    with pytest.raises(ValueError, match=r'shift\.csv'): write_report(run)

@pytest.mark.parametrize('option, module', [('--cam', 'captum'), ('--label_issues', 'cleanlab')])
def test_interpret_names_the_extra_that_is_missing(finished, monkeypatch, option, module):
    import cifar_fastai.core
    monkeypatch.setattr(cifar_fastai.core, 'find_spec', lambda name: None)
    assert 'explain' in refused(cifar_interpret, str(finished[0]), option)

def test_interpret_says_what_is_wrong_and_draws_it(finished, capsys, tmp_path, small):
    run, summary = shutil.copytree(finished[0], tmp_path/'run'), finished[1]
    shutil.rmtree(run/'plots')
    cifar_interpret([str(run), '--k', '3'])
    said = capsys.readouterr().out
    assert re.search(rf'\b{summary["accuracy"]:.2%}.*\b{summary["n_wrong"]} of 40\b', said)
    assert all(re.search(rf'^{name} +[\d.—]+ +[\d.]+ +[\d.—]+ +4 *$', said, re.MULTILINE) for name in small.vocab)
    assert '\r' not in said # a bar is for people
    names = '|'.join(small.vocab)
    assert len(re.findall(rf'^({names}) .*\b({names})\W+\d+$', said, re.MULTILINE)) == 3
    assert {'confusion_matrix.png', 'misclassified.png', 'history.png'} <= {p.name for p in (run/'plots').iterdir()}

@pytest.mark.parametrize('args, name', [
    (['--weights', 'best'], 'plots-best'), (['--data', 'DATA'], 'plots-other-data'),
    (['--data', 'DATA', '--weights', 'best'], 'plots-best-other-data')])
def test_plots_of_other_weights_or_images_leave_those_of_the_run(finished, capsys, tmp_path, small_folder, args, name):
    run = shutil.copytree(finished[0], tmp_path/'run')
    for plot in (run/'plots').iterdir(): plot.write_bytes(b'of the run')
    cifar_interpret([str(run), *(arg.replace('DATA', str(small_folder)) for arg in args)])
    assert {plot.read_bytes() for plot in (run/'plots').iterdir()} == {b'of the run'} and (run/name/'confusion_matrix.png').exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(run/name))

def test_interpret_prints_a_dash_for_scores_that_are_undefined(finished, capsys, tmp_path, monkeypatch):
    interp = CifarInterpretation.from_run(finished[0])
    one_class = CifarInterpretation(interp.learn, interp.dl, torch.eye(10)[interp.targs*0], interp.targs, interp.losses)
    monkeypatch.setattr(CifarInterpretation, 'from_run', lambda *_: one_class)
    cifar_interpret([str(shutil.copytree(finished[0], tmp_path/'run'))])
    assert re.search(r'^cat +— +0\.000 +— +4 *$', capsys.readouterr().out, re.MULTILINE)

@pytest.mark.parametrize('weights, optimistic', [('best', True), ('last', False)])
def test_interpret_calls_the_best_on_test_images_optimistic(finished, capsys, tmp_path, weights, optimistic):
    cifar_interpret([str(shutil.copytree(finished[0], tmp_path/'run')), '--weights', weights])
    assert ('optimistic' in capsys.readouterr().out) == optimistic

def test_interpret_averages_over_flips_when_told(finished, capsys, tmp_path):
    cifar_interpret([str(shutil.copytree(finished[0], tmp_path/'run')), '--flip_average'])
    assert re.search(rf'^.*(mirror|flip).*{finished[1]["flip_averaged_accuracy"]:.2%}$', capsys.readouterr().out, re.MULTILINE)

def test_interpret_refuses_what_is_no_run(finished, tmp_path):
    assert 'no_run' in refused(cifar_interpret, 'no_run')
    run = shutil.copytree(finished[0], tmp_path/'run')
    assert '/no/such' in refused(cifar_interpret, run, '--data', '/no/such')
    (run/'model.safetensors').write_bytes(b'')
    assert 'model.safetensors' in refused(cifar_interpret, run)

# ---- report

def test_report_of_one_run_lies_in_its_folder_and_of_several_where_told(finished, capsys, tmp_path):
    for name in 'one', 'two': shutil.copytree(finished[0], tmp_path/name)
    cifar_report([str(tmp_path/'one')])
    [said] = capsys.readouterr().out.splitlines()
    assert said.endswith(f' {tmp_path/"one"/"report.html"}')
    assert (tmp_path/'one'/'report.html').read_text().count('data-pair') > 5
    cifar_report([str(tmp_path/'one'), str(tmp_path/'two'), '--out', str(tmp_path/'both.html')])
    [said] = capsys.readouterr().out.splitlines()
    assert said.endswith(f' {tmp_path/"both.html"}') and (tmp_path/'both.html').exists()

@pytest.mark.parametrize('args, message', [([], ' run'), (['run', '--out', 'page.html'], "out is 'page.html'"),
    (['run', 'run', '--data', 'digits'], "data is 'digits'"), (['no/such/run'], 'no/such/run')])
def test_report_refuses_in_one_sentence(args, message, folder_of_its_own):
    assert message in refused(cifar_report, *args) and list(folder_of_its_own.iterdir()) == []

def test_a_run_whose_report_cannot_be_written_is_finished_all_the_same(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path/'run')
    (run/'report.html').mkdir() # where the page would be
    cifar_train(['--resume', str(run)])
    said = capsys.readouterr()
    assert str(run) in said.out
    assert re.fullmatch(rf'cifar_train: .*report\.html.*cifar_report {re.escape(str(run))}.*\n', said.err)
    assert list((run/'report.html').iterdir()) == [] and not list(run.glob('*.part')) and not list(run.glob('.report*'))

# ---- lr_find

def test_lr_find_prints_both_rates_and_saves_the_plot(capsys, folder_of_its_own):
    cifar_lr_find('--data digits --recipe baseline --width 16 --bs 4 --precision fp32 --num_workers 0 --plot found.png'.split())
    said = dict(line.split(' ') for line in capsys.readouterr().out.splitlines()[-3:])
    assert 0 < float(said['lr_min']) <= float(said['lr_max'])/10 and said['plot'] == 'found.png'
    with Image.open('found.png') as img: assert img.format == 'PNG' and min(img.size) > 200
    assert [p.name for p in folder_of_its_own.iterdir()] == ['found.png']

def test_lr_find_says_when_training_takes_another_end(capsys):
    cifar_lr_find('--data digits --recipe baseline --width 16 --lr_min 1e-5 --bs 4 --precision fp32 --num_workers 0 --plot found.png'.split())
    assert re.search(r'\b1e-05\b.*--lr_min find', capsys.readouterr().out.splitlines()[-1])

def test_lr_find_refuses_a_plot_in_no_folder():
    assert 'plot is no/such/folder.png' in refused(cifar_lr_find, '--data', 'digits', '--plot', 'no/such/folder.png')

def test_lr_find_checks_the_settings_of_a_run(): assert 'epochs is 0' in refused(cifar_lr_find, '--epochs', 0)

# ---- repeat

@pytest.mark.slow
def test_repeat_prints_a_table_and_continues_where_it_was(small_archive, capsys):
    args = ['--data', str(small_archive), '--epochs', '1', *small_run, '--num_workers', '0', '--out', 'two', '--n']
    cifar_repeat([*args, '1'])
    first = read_json('two/repeat.json')['runs']
    cifar_repeat([*args, '2'])
    said, runs = capsys.readouterr().out, read_json('two/repeat.json')['runs']
    assert runs[:1] == first
    assert [run['seed'] for run in runs] == [0, 1] and re.search(r'\bseed-0\b.*\b1 epochs?\b', said)
    row = next(line for line in said.splitlines()[::-1] if line.startswith('best, lr_min 0.001, ghost 4'))
    _, n, mean, *_ = re.split(r'\s{2,}', row)
    assert n == '2' and float(mean) == pytest.approx(100*sum(run['accuracy'] for run in runs)/2, abs=.006)
    assert said.splitlines()[-1].endswith(' two')
    assert re.search(r'\bwd\b.*\b0\.25\b.*\b0\.9\b', refused(cifar_repeat, *args, '2', '--wd', .9))

@pytest.mark.parametrize('args, message', [(['--n', 0], 'n is 0'), (['--ablate'], "valid is 'test'"), (['--data', '/no/such'], '/no/such')])
def test_repeat_refuses_invalid_values(args, message, folder_of_its_own):
    assert message in refused(cifar_repeat, '--out', 'runs', *args)
    assert list(folder_of_its_own.iterdir()) == []

# ---- mistakes that were once accepted

def test_an_unfinished_run_is_used_with_a_warning(finished, images, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path/'run')
    (run/'summary.json').unlink()
    history = (run/'history.csv').read_text().splitlines(keepends=True)
    (run/'history.csv').write_text(''.join(history[:2]))
    cifar_predict(['--model', str(run), *images])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(images) and 'epoch 1 of' in err and len(err.splitlines()) == 1
    cifar_predict(['--model', str(finished[0]), *images])
    assert not capsys.readouterr().err

@pytest.mark.parametrize('name', ['page', 'p.png', 'page.txt'])
def test_a_comparison_is_written_to_an_html_file_alone(finished, tmp_path, name):
    other = shutil.copytree(finished[0], tmp_path/'other')
    Path(name).write_bytes(b'mine')
    assert name in refused(cifar_report, finished[0], other, '--out', name)
    assert Path(name).read_bytes() == b'mine'

def test_a_run_is_not_compared_with_itself(finished):
    assert 'twice' in refused(cifar_report, finished[0], f'{finished[0]}/.')

def test_repeated_runs_get_a_folder_of_their_own(finished, tmp_path):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.tex').write_text('mine'); Path('file').write_text('mine')
    for out in finished[0], tmp_path/'full', 'file':
        assert str(out) in refused(cifar_repeat, '--data', 'digits', '--n', 2, '--out', out)
    assert not list(finished[0].glob('seed-*'))

def test_a_negative_number_of_pairs_is_refused(finished): assert 'k is -1' in refused(cifar_interpret, finished[0], '--k', -1)

@pytest.mark.parametrize('plot', ['p.txt', 'p.', 'folder/p.png'])
def test_a_plot_that_cannot_be_written_is_refused_before_the_range_test(plot, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('the test has begun')
    monkeypatch.setattr('cifar_fastai.callback.schedule.range_test', refuse)
    if plot == 'p.': pytest.skip('a name without a suffix is a PNG file')
    assert plot in refused(cifar_lr_find, '--data', 'digits', '--plot', plot)

@pytest.mark.parametrize('command', [cifar_train, cifar_repeat])
def test_a_folder_below_a_file_is_refused_by_name(command):
    Path('file').write_text('mine')
    said = refused(command, '--data', 'digits', '--out', 'file/run')
    assert 'file/run' in said and '.part' not in said

@pytest.mark.parametrize('command, args', [(cifar_predict, ['a.png', '--model', 'run', 'b.png']), (cifar_predict, ['a.png', '--json', 'b.png']), (cifar_report, ['run', '--out', 'a.html', 'another'])])
def test_values_before_and_after_options_are_refused_with_their_order(command, args, capsys):
    with pytest.raises(SystemExit) as e: command(args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and args[-1] in said and 'before the options' in said and said.count('\n') == 1

def test_values_after_options_alone_are_read(tmp_path, capsys):
    Image.new('RGB', (32, 32)).save(tmp_path/'black.png')
    cifar_predict(['--json', str(tmp_path/'black.png')])
    assert 'black.png' in capsys.readouterr().out
