"""The environments that are written down under tests/envs, and what makes them."""
import re, shutil
from pathlib import Path

import pytest

import environment
import readme

root = Path(__file__).parent.parent

def bounds(sign, text): # -> {(package, version)}
    return {(name.lower().replace('_', '-'), version) for name, version in re.findall(rf'([\w.-]+){sign}([\w.]+)', text)}

def test_the_oldest_environment_has_the_lower_bounds_of_the_settings():
    settings = readme.settings()
    kinds = [''] + [f'{extra}_' for extra in ('app', 'distributed', 'explain', 'export', 'tensorboard')]
    wanted = bounds('>=', '\n'.join(settings[f'{kind}requirements'] for kind in kinds))
    file = (root/'tests/envs/oldest.txt').read_text()
    assert bounds('==', file) == wanted and len(wanted) > 20
    assert environment.recipe('oldest')[0] == settings['min_python']

@pytest.mark.parametrize('name', ['colab', 'dev', 'newest', 'oldest'])
def test_an_environment_names_its_python_and_what_is_installed(name):
    python, what = environment.recipe(name)
    assert python in readme.settings()['python_versions'].split() and what[0].startswith('.[')

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project whose environment asks for what the first line of its file says"
    def make(first_line):
        (tmp_path/'tests'/'envs').mkdir(parents=True)
        (tmp_path/'tests'/'envs'/'odd.txt').write_text(first_line + '\n')
        (tmp_path/'settings.ini').write_text('')
        monkeypatch.setattr(environment, 'root', tmp_path)
        monkeypatch.setattr(environment, 'envs', tmp_path/'tests'/'envs')
        return tmp_path
    return make

def refusal(*args):
    with pytest.raises(SystemExit) as e: environment.main(list(args))
    return e.value.code

def test_without_uv_it_says_what_is_missing(project, monkeypatch):
    folder = project('# Python 3.13: pytest')
    monkeypatch.setenv('PATH', str(folder))
    assert 'uv is not installed' in refusal('odd') and not (folder/'.venv-odd').exists()

@pytest.mark.skipif(shutil.which('uv') is None, reason='uv is not installed')
@pytest.mark.parametrize('first_line', ['# Python 3.99: pytest', '# Python 3: no-such-package-of-anybody==1', '# Python 3: ./nowhere'])
def test_an_environment_that_cannot_be_made_leaves_nothing(project, monkeypatch, first_line):
    monkeypatch.setenv('UV_OFFLINE', '1')
    folder = project(first_line)
    said = refusal('odd')
    assert '\n' not in said and said.startswith('uv ') and not (folder/'.venv-odd').exists()
