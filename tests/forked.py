"""Processes that start at once: forked from a server that has imported the package, which takes seconds each time.

The server has one thread and has computed nothing, so a process of it is as good as new. Tests of the start or of the
end of a command, or of what the environment does to an import, start Python itself."""
import multiprocessing, os, signal, socket, subprocess, sys, tempfile, time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch

context = multiprocessing.get_context('forkserver')
imported = [f'cifar_fastai.{name}' for name in ('cli', 'bench', 'look.compare', 'look.report', 'run.distributed', 'run.repeat', 'use.app', 'use.export', 'use.serve')]
for name in imported: assert find_spec(name), f'{name} was renamed: the server would import nothing, and say nothing'
context.set_forkserver_preload([*imported, 'gradio', 'torchmetrics', 'captum.attr', 'cleanlab.filter'])


def _child(function, args, env, folder, files):
    os.setsid() # a group of its own, which Ctrl-C of a terminal would reach
    os.environ.clear()
    os.environ.update(env)
    if n_threads := env.get('OMP_NUM_THREADS'): torch.set_num_threads(int(n_threads)) # it was read before the fork
    tempfile.tempdir = None # that of the server; TMPDIR may be another
    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT: signal.signal(number, signal.SIG_DFL) # nohup has some ignored
    os.chdir(folder)
    for number, name in zip((1, 2), files):
        handle = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, 'w', closefd=False, encoding='utf8')
    sys.stderr = open(2, 'w', closefd=False, encoding='utf8', errors='backslashreplace', buffering=1)
    sys.argv = ['cifar_fastai', *args]
    function(*args)


def command(*args):
    "What `python -m cifar_fastai.cli` does"
    from cifar_fastai.cli import main
    main(list(args))


class Forked:
    "A process that calls `function` with texts, and what the tests use of `subprocess.Popen`"
    def __init__(self, function, *args, env=None, one_stream=False):
        self.args = [str(arg) for arg in args]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name)/name for name in (('out',)*2 if one_stream else ('out', 'err'))]
        for file in self.files: file.touch()
        given = function, self.args, dict(os.environ if env is None else env), os.getcwd(), self.files
        self.process = context.Process(target=_child, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self): return self.process.exitcode
    def poll(self): return self.returncode
    def kill(self): self.process.kill()
    def send_signal(self, number): os.kill(self.pid, number)
    def said(self): return [file.read_text(encoding='utf8') for file in self.files]

    def communicate(self, timeout=300): # -> (out, err)
        self.process.join(timeout)
        said = self.said()
        if self.returncode is None: raise subprocess.TimeoutExpired(self.args, timeout, *said)
        self.folder.cleanup()
        return said

    def __enter__(self): return self
    def __exit__(self, *_):
        if self.returncode is None: self.kill()
        self.process.join()
        self.folder.cleanup()


def wait_until(done, process, seconds=200):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(.02)


def run_several(n, function, *args, timeout=300): # -> (list of statuses, what all of them said)
    "`n` processes that know of each other, as a launcher starts them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        common = os.environ | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
                                   OMP_NUM_THREADS='1')
    of_rank = [common | dict(RANK=str(r), LOCAL_RANK=str(r)) if n > 1 else None for r in range(n)]
    with ExitStack() as stack:
        processes = [stack.enter_context(Forked(function, *args, env=env, one_stream=True)) for env in of_rank]
        said = ''.join(process.communicate(timeout)[0] for process in processes)
        return [process.returncode for process in processes], said


def run(*args, timeout=300, **kwargs): # -> `subprocess.CompletedProcess`
    "A command of the package from its start to its end"
    with Forked(command, *args, **kwargs) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
