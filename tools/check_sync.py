"""Fails unless the notebooks are clean and the package is what a fresh `nbdev_export` makes of them.

It cleans and exports in a copy of the checkout, so nothing here is changed, committed or not."""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path

from readme import root, settings

written_by_hand = '__init__.py', 'all.py'


def run(*command, cwd):
    "Runs a command of git or nbdev and returns what it printed; a command that fails or warns ends the check."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST' and not k.startswith('GIT_')}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding='utf-8')
    # on a notebook that it cannot read or place, nbdev only warns
    if done.returncode or 'UserWarning' in done.stderr: sys.exit(f'{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}')
    return done.stdout


def copy_checkout(dest, root=root):
    "Copies what git tracks or would track, as it is in the working tree."
    for name in filter(None, run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', cwd=root).split('\0')):
        if not (root/name).is_file(): continue
        (dest/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root/name, dest/name)


def drift(root=root): # `git diff --stat` from the checkout to its clean, freshly exported self
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_checkout(copy, root)
        run('git', 'init', '-q', cwd=copy)
        run('git', 'add', '--all', '--force', cwd=copy)
        before = run('git', 'write-tree', cwd=copy).strip()
        for module in (copy/settings(root)['lib_path']).glob('*.py'):
            if module.name not in written_by_hand: module.unlink()
        bin = Path(sys.executable).parent
        for command in 'nbdev_clean', 'nbdev_export': run(str(bin/command), cwd=copy)
        run('git', 'add', '--all', cwd=copy)
        return run('git', 'diff', '--cached', '--stat', before, cwd=copy)


if __name__ == '__main__':
    changes = drift()
    sys.exit(f'{changes}The notebooks are not clean, or the package is not their export: run `make export` '
             '(and delete a module that has no notebook any more).' if changes else 0)
