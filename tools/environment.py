"""Runs the fast tests, or a notebook, in an environment that is written down: `python tools/environment.py colab`.

`tests/envs/NAME.txt` is a constraints file. Its first line names the version of Python and, behind a colon, what is installed.
The environment is made by uv in `.venv-NAME`, where it stays for the next time; one that could not be made is removed.
Standard library only."""
import argparse, os, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
envs = root/'tests'/'envs'


def uv(*args):
    done = subprocess.run(['uv', *map(str, args)], cwd=root, capture_output=True, text=True)
    if done.returncode: sys.exit(f'uv {args[0]}: {" ".join(done.stderr.split())[-500:]}')
    return done.stdout.strip()


def recipe(name): # -> (version of Python, requirements)
    first = (envs/f'{name}.txt').read_text(encoding='utf-8').splitlines()[0]
    python, what = first.removeprefix('# Python').split(':')
    return python.strip(), what.split()


def stamp(name): # what the environment was made of
    return ''.join((root/file).read_text(encoding='utf-8') for file in ('settings.ini', f'tests/envs/{name}.txt'))


def make(name): # -> `Path` of its Python
    folder = root/f'.venv-{name}'
    python, made = folder/'bin'/'python', folder/'made-of.txt'
    version, requirements = recipe(name)
    if not (made.exists() and made.read_text(encoding='utf-8') == stamp(name)):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            uv('venv', '--python', version, folder)
            uv('pip', 'install', '--python', python, '--constraint', envs/f'{name}.txt', *requirements)
            made.write_text(stamp(name), encoding='utf-8')
        finally:
            if not made.exists(): shutil.rmtree(folder, ignore_errors=True)
    # the package itself is a copy, so that tests see what users get
    shutil.rmtree(root/'build', ignore_errors=True)
    uv('pip', 'install', '--python', python, '--no-deps', '--reinstall-package', 'cifar_fastai', root)
    shutil.rmtree(root/'build', ignore_errors=True)
    return python


def execute(python, notebook, env): # -> exit status
    "Run a notebook from its first cell to its last, in a folder that is deleted behind it"
    with tempfile.TemporaryDirectory() as folder:
        command = [python, '-m', 'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--output-dir', folder]
        # a kernel of this environment, and not one that the user has under the same name
        env = env | dict(JUPYTER_PREFER_ENV_PATH='1', IPYTHONDIR=folder)
        return subprocess.run([*command, shutil.copy(notebook, folder)], cwd=folder, env=env).returncode


def main(args=None):
    parser = argparse.ArgumentParser(description='Run the fast tests in an environment that is written down in tests/envs.')
    parser.add_argument('name', choices=sorted(file.stem for file in envs.glob('*.txt')))
    parser.add_argument('--notebook', type=Path, help='run this notebook instead')
    parser.add_argument('pytest', nargs='*', help='options of pytest, behind --')
    options = parser.parse_args(args)
    if shutil.which('uv') is None: sys.exit('uv is not installed: pip install uv')
    if options.notebook and not options.notebook.is_file(): sys.exit(f'{options.notebook} is no file: give a notebook')
    python = make(options.name)
    print(uv('pip', 'list', '--python', python, '--format', 'freeze'), flush=True)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'IN_TEST', 'PYTHONDONTWRITEBYTECODE')}
    if options.notebook: sys.exit(execute(python, options.notebook, env))
    command = [python, '-m', 'pytest', '-m', 'not slow', '-p', 'no:cacheprovider', *options.pytest]
    sys.exit(subprocess.run(command, cwd=root/'tests', env=env).returncode)


if __name__ == '__main__': main()
