"""The checkout: README.md and notebooks as they should be committed, and commands that exist."""
from dataclasses import asdict
import ast, importlib, json, posixpath, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import distribution
from importlib.util import resolve_name
from pathlib import Path
from typing import get_origin
from urllib.parse import unquote

import pytest
from safetensors.torch import load_file

import cifar_fastai
from cifar_fastai.core import TrainSettings, recipes
from cifar_fastai.files import read_json
from cifar_fastai.callback.cost import fit_cost
from cifar_fastai.callback.schedule import bounds_from
from cifar_fastai.models import CustomResNet
from cifar_fastai.run.folder import read_history, read_range_test

root = Path(__file__).resolve().parent.parent
if not (root/'settings.ini').exists(): pytest.skip('a checkout: settings.ini, README.md and nbs/ beside tests/', allow_module_level=True)

notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
modules = [p for p in notebooks if p.parent.name == 'nbs' and p.stem[:2].isdigit()]
each_notebook = pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.relative_to(root/'nbs').as_posix())
each_module = pytest.mark.parametrize('notebook', modules, ids=lambda p: p.stem)

def cells(notebook, kind=None):
    return [cell for cell in json.loads(notebook.read_text(encoding='utf8'))['cells'] if kind in (None, cell['cell_type'])]

def source(cell): return ''.join(cell['source'])

def python(cell): # its source without lines that only IPython knows
    return re.sub(r'^(\s*)[%!].*', r'\1pass', source(cell), flags=re.MULTILINE)

@pytest.fixture(scope='module')
def config():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf8')
    return config['DEFAULT']

# ---- README.md

def test_the_readme_is_made_from_the_index():
    from readme import drifted
    assert [str(path.relative_to(root)) for path in drifted(root)] == []

def test_the_readme_says_what_it_must(config):
    text = (root/'README.md').read_text(encoding='utf8')
    for words in ('make demo', 'make test', 'colab.research.google.com', 'from cifar_fastai.all import *', 'OneCycle(*lr_bounds(learn))',
                  '92.33', '91.63', '92.39', '93.07', '92.68'): # the seeds' figures
        assert words in text, words

def test_owner_and_repository_stand_in_settings_ini_alone(config):
    address = f'github.com/{config["user"]}/{config["repo"]}'
    for file in [root/'README.md', *notebooks]:
        for owner, repo in re.findall(r'(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+)/(cifar_fastai\b[\w.-]*)', file.read_text(encoding='utf8')):
            assert f'github.com/{owner}/{repo.removesuffix(".git")}' == address, file

def links(text): # targets in Markdown and HTML that are relative
    code_free = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.DOTALL)
    found = re.findall(r'\]\(([^)\s]+)', code_free) + re.findall(r'\b(?:src|href)="([^"]+)"', code_free)
    return [unquote(link.split('#')[0]) for link in found if link.split('#')[0] and not re.match(r'[a-z][a-z0-9+.-]*:|attachment:', link)]

def test_every_picture_and_link_of_the_readme_is_there():
    missing = [link for link in links((root/'README.md').read_text(encoding='utf8')) if not (root/link).exists()]
    assert missing == []

written = [p for p in (root/'CONTRIBUTING.md', root/'CHANGELOG.md', root/'benchmarks/README.md', root/'cifar_fastai/weights/README.md', root/'data/README.md') if p.exists()]

@pytest.mark.parametrize('page', written, ids=lambda p: p.relative_to(root).as_posix())
def test_every_picture_and_link_of_a_written_page_is_there(page):
    assert [link for link in links(page.read_text(encoding='utf8')) if not (page.parent/link).exists()] == []

def test_every_address_of_the_repository_names_a_file_of_it(config):
    "In Colab's badges and in links to GitHub: .../blob/BRANCH/FILE"
    pages = [root/'README.md', *written, *notebooks]
    named = {name for page in pages for name in re.findall(rf'github(?:\.com)?/{config["user"]}/{config["repo"]}/(?:blob|tree|raw)/{config["branch"]}/([\w./-]*\w)', page.read_text(encoding='utf8'))}
    assert 'nbs/tutorials/train_cifar10.ipynb' in named and [name for name in named if not (root/name).exists()] == []

def test_the_readme_shows_a_picture():
    assert [link for link in links((root/'README.md').read_text(encoding='utf8')) if link.endswith('.png')]

def test_every_recorded_file_that_is_named_is_there():
    texts = [(root/'README.md').read_text(encoding='utf8'), (root/'benchmarks/README.md').read_text(encoding='utf8')]
    texts += [source(cell) for notebook in notebooks for cell in cells(notebook)]
    named = {name for text in texts for name in re.findall(r'\bbenchmarks/[\w./-]*\w', text)}
    assert len(named) >= 4 and [name for name in named if not (root/name).exists()] == []

# ---- tables

def in_a_copy(tmp_path, *parts):
    for part in ('settings.ini', 'README.md', 'nbs', 'benchmarks', *parts):
        copy = shutil.copytree if (root/part).is_dir() else shutil.copy
        copy(root/part, tmp_path/part)
    return tmp_path

def test_a_recorded_result_that_changes_is_noticed_and_written(tmp_path):
    from readme import drifted, main
    copy = in_a_copy(tmp_path)
    assert drifted(copy) == {}
    summary = copy/'benchmarks/runs/24-epochs/summary.json'
    summary.write_text(json.dumps({**json.loads(summary.read_text(encoding='utf8')), 'accuracy': .87654}), encoding='utf8')
    assert set(drifted(copy)) == {copy/'nbs/index.ipynb', copy/'README.md'}
    assert '87.65' not in (copy/'README.md').read_text(encoding='utf8') and main(['--check'], copy) != 0
    assert not main([], copy) and drifted(copy) == {} # nothing, or 0: the exit status
    assert '**87.65 %**' in (copy/'README.md').read_text(encoding='utf8')

@pytest.mark.parametrize('accuracies, epoch', [([80, 91, 92], 2), ([91, 92], 1), ([91, 89, 91], 3), ([91, 90], None), ([90, 90.01], 2), ([], None)])
def test_the_epoch_from_which_it_stays_over_90_is_the_one_behind_the_last_that_is_not(accuracies, epoch):
    from tables import stays_over
    assert stays_over(list(enumerate(accuracies, 1))) == epoch

def test_the_projects_figures_are_those_of_the_epochs_they_logged():
    from tables import curve, stays_over
    for project in json.loads((root/'benchmarks/projects.json').read_text(encoding='utf8')):
        logged = curve(root/'benchmarks/projects.csv', project=project['project'])
        assert logged[-1] == (project['epochs'], project['accuracy'])
        if len(logged) > 1: assert stays_over(logged) == project['over_90_from']

# ---- the page of the projects

def test_the_page_of_the_projects_has_a_row_for_each_with_both_figures():
    shown = '\n'.join(''.join(output['data'].get('text/markdown', '')) for cell in cells(root/'nbs/tutorials/from_the_seeds.ipynb', 'code') for output in cell['outputs'] if 'data' in output)
    ours = [f"{100*read_json(root/'benchmarks/runs'/name/'summary.json')['accuracy']:.2f}" for name in ('24-epochs', 'best-version-3')]
    rows = {re.search(r'\d{3}', row)[0]: [part.strip() for part in row.strip('|').split('|')] for row in shown.strip().splitlines()[2:]}
    projects = json.loads((root/'benchmarks/projects.json').read_text(encoding='utf8'))
    assert rows.keys() == {project['project'] for project in projects}
    for project in projects: assert rows[project['project']][2:] == [f"{project['accuracy']:.2f}", *ours] and '](' in rows[project['project']][1]

# ---- the recorded run

def recorded(*names): return pytest.mark.parametrize('run', [root/'benchmarks/runs'/name for name in names], ids=lambda run: run.name)

@recorded('24-epochs', '24-epochs-zen4', '24-epochs-item', 'best-version-3', 'best-found-end', 'best-before')
def test_a_recorded_run_is_of_one_piece(run):
    summary, history, kept = read_json(run/'summary.json'), read_history(run), load_file(run/'predictions.safetensors')
    assert summary['epochs'] == len(history) == 24 and summary['accuracy'] == history['accuracy'].iloc[-1]
    assert int((kept['probs'].argmax(1) != kept['targs']).sum()) == summary['n_wrong'] == round(10_000*(1 - summary['accuracy']))
    given, found = summary['settings'], bounds_from(*read_range_test(run))._asdict()
    assert given['lr_max'] == 'find' and summary['bounds'] == {name: found[name] if given[name] == 'find' else given[name] for name in found}
    assert history['lr'].iloc[-1] == pytest.approx(summary['bounds']['lr_min']) and history['lr'].max() == pytest.approx(summary['bounds']['lr_max'])

@pytest.mark.parametrize('name', list(recipes))
def test_the_recorded_runs_of_a_recipe_are_of_the_recipe_as_it_is(name):
    record = read_json(root/'benchmarks/runs/h100/runs.json')['recipes'][name]
    as_it_is = json.loads(json.dumps(asdict(TrainSettings(recipe=name).resolved()))) # JSON has no tuples
    assert record['settings'] == {key: as_it_is[key] for key in record['settings']} and record['settings']['recipe'] == name
    recipe = recipes[name]
    assert record['petaflop'] == round(fit_cost(CustomResNet(), 50_000, record['settings']['epochs'], recipe.sizes or (32,), recipe.freeze_first)/1e15, 3)
    seeds = [run['seed'] for run in record['runs']]
    assert seeds == list(range(len(seeds))) and len(seeds) >= (3 if name == 'baseline' else 5)

@pytest.mark.parametrize('name', list(recipes))
def test_the_recorded_predictions_have_the_recorded_accuracy(name):
    labels = load_file(root/'benchmarks/runs/24-epochs/predictions.safetensors')['targs']
    logits = load_file(root/f'benchmarks/runs/h100/{name}.safetensors')
    for run in read_json(root/'benchmarks/runs/h100/runs.json')['recipes'][name]['runs']:
        wrong = int((logits[f"seed-{run['seed']}"].argmax(1) != labels).sum())
        flipped = (logits[f"seed-{run['seed']}-flips"].argmax(1) == labels).float().mean().item()
        assert wrong == run['n_wrong'] == round(10_000*(1 - run['accuracy'])) and run['history']['accuracy'][-1] == pytest.approx(run['accuracy'], abs=1e-6)
        assert flipped == pytest.approx(run['flip_averaged_accuracy'], abs=1.5e-4) # fp16 makes an image or two equal

def test_the_tutorial_shows_the_recorded_run():
    summary = read_json(root/'benchmarks/runs/24-epochs-zen4/summary.json')
    shown = '\n'.join(str(output) for cell in cells(root/'nbs/tutorials/train_cifar10.ipynb', 'code') for output in cell['outputs'])
    assert f"{summary['accuracy']:.2%} right, {summary['n_wrong']:,} of 10,000 wrong" in shown

@recorded('24-epochs', '24-epochs-zen4', '24-epochs-item')
def test_a_recorded_run_reaches_what_the_assignment_asks_for(run):
    summary, history = read_json(run/'summary.json'), read_history(run)
    assert summary['data']['is_cifar10'] and summary['n_params'] == 6_573_130 and summary['settings']['bs'] == 512
    assert summary['settings']['lr_max'] == summary['settings']['lr_min'] == 'find' and summary['settings']['peak_epoch'] == 5
    assert summary['accuracy'] >= .9 and (history['accuracy'].iloc[18:] > .9).all()

# ---- notebooks

def target(notebook, link): # nbdev links pages, as .html, to notebooks
    path = notebook.parent/posixpath.normpath(link)
    pages = [p for p in notebooks if link.endswith('.html') and re.sub(r'^\d+\w*?_', '', p.stem) == Path(link).stem]
    return pages or path.exists()

@each_notebook
def test_every_link_of_a_notebook_is_there(notebook):
    made = [''.join(output['data'].get('text/markdown', '')) for cell in cells(notebook, 'code') for output in cell['outputs'] if 'data' in output]
    texts = [source(cell) for cell in cells(notebook, 'markdown')] + made
    assert [link for text in texts for link in links(text) if not target(notebook, link)] == []

@each_notebook
def test_every_attached_picture_of_a_notebook_is_there(notebook):
    for cell in cells(notebook, 'markdown'):
        assert set(re.findall(r'attachment:([^)\s"]+)', source(cell))) <= set(cell.get('attachments', {}))

@each_notebook
def test_a_notebook_holds_no_path_of_a_machine(notebook):
    text = re.sub(r'"image/\w+": "[^"]*"', '', notebook.read_text(encoding='utf8')) # letters of a picture may look like one
    assert re.findall(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|mnt|opt|var|private)/[\w.-]+|\b[A-Z]:\\\\', text) == []

@each_notebook
def test_a_notebook_is_committed_clean(notebook):
    for cell in cells(notebook, 'code'):
        assert cell['execution_count'] is None
        for output in cell['outputs']:
            assert output['output_type'] != 'error'
            assert output.get('execution_count') is None
            assert output.get('name') != 'stderr', output['text']

@each_notebook
def test_a_notebook_begins_with_a_title_and_a_line_that_says_what_it_is(notebook):
    first = source(cells(notebook)[0]) + '\n' + source(cells(notebook)[1])
    assert re.search(r'^# \S', first, re.MULTILINE)
    assert re.search(r'^(> \S|description: \S)', first, re.MULTILINE)

@each_module
def test_a_module_notebook_is_committed_with_its_outputs(notebook):
    assert any(cell['outputs'] for cell in cells(notebook, 'code'))
    assert any('assert' in source(cell) or 'test_' in source(cell) for cell in cells(notebook, 'code'))

@pytest.mark.parametrize('name', ['train_cifar10', 'best_recipe', 'from_the_seeds', 'next_exercise', 'your_pictures'])
def test_the_tutorial_opens_in_colab_and_installs_the_package_there(config, name):
    notebook = root/f'nbs/tutorials/{name}.ipynb'
    text = '\n'.join(source(cell) for cell in cells(notebook))
    assert f'colab.research.google.com/github/{config["user"]}/{config["repo"]}/blob/{config["branch"]}/nbs/tutorials/{name}.ipynb' in text
    first = source(cells(notebook, 'code')[0])
    assert 'pip install' in first and f'git+{config["git_url"]}' in first and 'colab' in first.lower()

opened_in_colab = [p for p in notebooks if f'/nbs/{p.relative_to(root/"nbs").as_posix()})' in p.read_text(encoding='utf8')]

def test_a_notebook_that_runs_a_network_asks_colab_for_a_gpu_and_says_so():
    "Colab starts a notebook on a processor unless its metadata ask for more; those that only read records need none"
    assert len(opened_in_colab) == 5
    for notebook in opened_in_colab:
        metadata = json.loads(notebook.read_text(encoding='utf8'))['metadata']
        runs = any(re.search(r'\b(cifar_learner|train)\(', source(cell)) for cell in cells(notebook, 'code'))
        assert metadata.get('accelerator') == ('GPU' if runs else None), notebook.name
        assert metadata.get('colab') == (dict(gpuType='T4', provenance=[]) if runs else None), notebook.name
        assert ('T4 GPU' in '\n'.join(map(source, cells(notebook, 'markdown')))) == runs, notebook.name
    assert 'GPU' in re.search(r'^In Colab.*$', (root/'README.md').read_text(encoding='utf8'), re.MULTILINE)[0]

def test_cleaning_keeps_what_a_notebook_asks_of_colab(tmp_path):
    pytest.importorskip('nbdev', reason='the development tools')
    shutil.copy(root/'settings.ini', tmp_path)
    for notebook in opened_in_colab:
        copy = tmp_path/'nbs'/notebook.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(notebook, copy)
        code = f"from nbdev.clean import nbdev_clean; nbdev_clean({str(copy)!r})"
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, check=True, timeout=120)
        assert copy.read_bytes() == notebook.read_bytes()

def test_the_tutorial_is_committed_with_the_outputs_of_a_run():
    shown = [output for cell in cells(root/'nbs/tutorials/train_cifar10.ipynb', 'code') for output in cell['outputs']]
    assert sum('image/png' in output.get('data', {}) for output in shown) >= 5
    assert any('train_loss' in str(output.get('data', {}).get('text/html', '')) for output in shown) # the table of epochs

# ---- numbers read from files

readers = 'read_csv', 'read_table', 'read_fwf' # before 3.1, pandas rounds what they read unless it is told not to

def calls_of(names, text, where): # -> list of places
    named = lambda f: getattr(f, 'attr', getattr(f, 'id', None)) in names
    return [f'{where}:{node.lineno}' for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and named(node.func)]

def test_csv_files_are_read_by_read_csv_exact_alone():
    files = [p for folder in ('cifar_fastai', 'tools', 'tests') for p in (root/folder).rglob('*.py')]
    found = [call for p in files for call in calls_of(readers, p.read_text(encoding='utf8'), p.name)]
    for notebook in notebooks:
        for cell in cells(notebook, 'code'): found += calls_of(readers, python(cell), f"{notebook.name} {cell['id']}")
    assert [where.split(':')[0].split()[0] for where in found] == ['folder.py', '40_run.folder.ipynb'] # `read_csv_exact` itself

# ---- the package

package = Path(cifar_fastai.__file__).parent

def module_of(notebook): return re.sub(r'^\d+_', '', notebook.stem) # 'data.loader' of 07_data.loader.ipynb

def parts():
    files = [p for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx', 'all')]
    return sorted('.'.join(p.relative_to(package).with_suffix('').parts) for p in files)

def test_each_module_has_its_notebook():
    assert parts() == sorted(map(module_of, modules))

def imports(module): # names of the package's modules that a module imports at its top
    tree = ast.parse((package/f'{module.replace(".", "/")}.py').read_text(encoding='utf8'))
    relative = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    return [resolve_name('.'*node.level + node.module, f'cifar_fastai.{module}'.rpartition('.')[0]).partition('.')[2] for node in relative]

@each_module
def test_a_module_imports_only_those_before_it(notebook):
    before = [module_of(p) for p in modules if p < notebook]
    assert [other for other in imports(module_of(notebook)) if other not in before] == []

@pytest.mark.parametrize('name', parts())
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(f'cifar_fastai.{name}')
    assert [public for public in module.__all__ if callable(value := getattr(module, public)) and not get_origin(value) and not value.__doc__] == []

def test_the_wildcard_import_brings_the_contract_and_not_fastai():
    from cifar_fastai import all as everything
    names = {name for name in vars(everything) if not name.startswith('_')}
    assert {'cifar10_stats', 'cifar10_classes', 'TrainSettings', 'CropFlipCutout', 'load_cifar10', 'cifar_block', 'cifar_dls', 'CustomResNet', 'model_summary',
            'one_cycle_lr', 'OneCycle', 'lr_bounds', 'cifar_learner', 'CifarInterpretation', 'train', 'bench'} <= names
    of_fastai = vars(importlib.import_module('fastai.vision.all'))
    assert [name for name in names if name in of_fastai] == []

def test_what_a_tutorial_uses_of_the_package_it_imports():
    everything = set(vars(importlib.import_module('cifar_fastai.all')))
    of_package = {name for part in parts() for name in importlib.import_module(f'cifar_fastai.{part}').__all__}
    for notebook in sorted((root/'nbs'/'tutorials').glob('*.ipynb')):
        trees = [ast.parse(python(cell)) for cell in cells(notebook, 'code')]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        if '*' in imported: imported |= everything
        made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        used = {node.id for node in nodes if isinstance(node, ast.Name)} & of_package
        assert used <= imported | made, (notebook.name, used - imported - made)

def scripts(config): return dict(script.split('=') for script in config['console_scripts'].split())

def test_every_command_of_settings_ini_is_there(config):
    assert set(scripts(config)) == {'cifar_train', 'cifar_lr_find', 'cifar_interpret', 'cifar_predict', 'cifar_bench', 'cifar_repeat', 'cifar_report', 'cifar_app', 'cifar_export'}
    for name, target in scripts(config).items():
        module, function = target.split(':')
        assert getattr(importlib.import_module(module), function).__name__ == name

def test_the_installed_commands_are_those_of_settings_ini(config):
    installed = {e.name: e.value for e in distribution('cifar_fastai').entry_points if e.group == 'console_scripts'}
    assert installed == scripts(config)

def test_versions_agree(config):
    assert cifar_fastai.__version__ == config['version'] == distribution('cifar_fastai').version

def test_requirements_of_users_are_lower_bounds(config):
    others = [r for r in config['requirements'].split() if not re.fullmatch(r'[\w-]+>=[\d.]+', r)]
    assert others == ['plum-dispatch<2.10'] # the reason is in settings.ini
    assert all(re.fullmatch(r'[\w-]+[<>=]+[\d.]+', requirement) for requirement in config['requirements'].split())
    required = {re.split('[>=]', requirement)[0] for requirement in config['requirements'].split()}
    assert {'fastai', 'torch', 'torchvision', 'albumentations', 'matplotlib', 'safetensors', 'tyro'} <= required

def test_only_augment_knows_albumentations():
    knowing = [p.stem for p in package.rglob('*.py') if re.search(r'import albumentations|from albumentations', p.read_text(encoding='utf8'))]
    assert knowing == ['augment']
