"""What the tests share: small real images in both layouts, a server on this machine, learners, and one finished run."""
import os, pickle, shutil, struct, subprocess, sys, tarfile, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg' # plots need no display; read when matplotlib is imported

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import Callback, ProgressCallback, set_seed
from PIL import Image
from torch import nn

import forked
from cifar_fastai.core import TrainSettings, cifar10_classes, data_variable
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.images import CIFAR10Data, load_digits
from cifar_fastai.data.source import load_cifar10
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.learner import cifar_learner
from cifar_fastai.run.train import train

real_data = os.environ.get(data_variable) # `real_cifar` alone may see it

def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('gpu'): item.add_marker(pytest.mark.skip(reason='no CUDA device'))

# ---- surroundings

@pytest.fixture(scope='session', autouse=True)
def fastai_home(tmp_path_factory):
    "fastai's folders are empty at the start, no data set is named, and every access to the network is refused at once"
    home = tmp_path_factory.mktemp('fastai_home')
    (home/'config.ini').write_text('[DEFAULT]\ndata = data\narchive = archive\nstorage = tmp\nmodel = models\n') # else fastcore writes it, and leaves it open
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FASTAI_HOME', str(home))
        m.delenv(data_variable, raising=False)
        for name in ('http_proxy', 'https_proxy'): m.setenv(name, 'http://127.0.0.1:9')
        m.setenv('no_proxy', '127.0.0.1')
        assert fastai_cfg().config_path == home, 'fastai_cfg is cached, and was called before FASTAI_HOME was set'
        yield home

@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    "Each test works in an empty folder, and leaves no figure and no autocast open"
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close('all')
    assert not torch.is_autocast_enabled('cpu')

@pytest.fixture
def messages(caplog):
    "A function that returns what the package has logged in this test"
    caplog.set_level('INFO', 'cifar_fastai')
    return lambda: '\n'.join(caplog.messages)

@pytest.fixture
def empty_home(tmp_path_factory):
    "A `data` and an `archive` folder of fastai's for this test alone"
    home, cfg = tmp_path_factory.mktemp('home'), fastai_cfg()
    kept = {kind: cfg[kind] for kind in ('data', 'archive')}
    for kind in kept: cfg[kind] = home/kind # an absolute path
    yield home
    for kind, value in kept.items(): cfg[kind] = value

@pytest.fixture
def figures():
    "Note figures in the JSON file that the environment variable FIGURES names; without it, nothing is written"
    def note(name, **values):
        if not (file := os.environ.get('FIGURES')): return
        known = read_json(file) if Path(file).exists() else {}
        write_json(file, {**known, name: values})
    return note

@pytest.fixture
def command():
    "Run `python -m cifar_fastai.cli …` as a process of its own; forked, but with another `env`"
    def run(*args, **kwargs):
        if 'env' not in kwargs: return forked.run(*args, **kwargs)
        return subprocess.run([sys.executable, '-m', 'cifar_fastai.cli', *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)
    return run

@pytest.fixture(scope='session')
def start_processes():
    "Start `n` processes by `accelerate launch`, as users do, with a thread each; one without it. Both streams are one"
    def start(n, *args, how=('--multi_gpu', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0'), env=None):
        launcher = ['-m', 'accelerate.commands.launch', *how, '--num_processes', str(n)] if n > 1 else []
        return subprocess.Popen([sys.executable, *launcher, *map(str, args)], env=os.environ | dict(OMP_NUM_THREADS='1') | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return start

@pytest.fixture(scope='session')
def browser():
    "Chromium without a window; tests that need it are skipped where it is not installed"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None: pytest.skip('Chromium is not installed')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--no-proxy-server'])
        yield browser
        browser.close()

# ---- images

@pytest.fixture(scope='session')
def digits(): return load_digits()

@pytest.fixture(scope='session')
def small(digits):
    "Eight training and four test images of each of CIFAR-10's classes: digits, with three channels that differ"
    def first(x, y, n):
        idxs = np.concatenate([np.flatnonzero(y == label)[:n] for label in range(10)])
        grey = x[idxs, :, :, 0]
        return np.stack([grey, 255 - grey, grey//2], axis=-1), y[idxs]
    return CIFAR10Data(*first(digits.train_x, digits.train_y, 8), *first(digits.test_x, digits.test_y, 4), list(cifar10_classes))

def splits(data): return ('train', data.train_x, data.train_y), ('test', data.test_x, data.test_y)

@pytest.fixture(scope='session')
def write_pngs():
    "Write data as <split>/<class>/*.png below a folder"
    def write(data, folder):
        for split, xs, ys in splits(data):
            for i, (x, y) in enumerate(zip(xs, ys)):
                file = folder/split/cifar10_classes[y]/f'{i:04}.png'
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(file)
        return folder
    return write

class Python2Pickler(pickle._Pickler):
    "Writes strings as Python 2 did, which wrote the batches of CIFAR-10"
    dispatch = dict(pickle._Pickler.dispatch)
    def save_bytes(self, o):
        self.write(pickle.BINSTRING + struct.pack('<i', len(o)) + o)
        self.memoize(o)
    def save_str(self, o): self.save_bytes(o.encode('latin1'))
    dispatch[bytes], dispatch[str] = save_bytes, save_str

@pytest.fixture(scope='session')
def write_batches():
    "Write data as data_batch_1 … data_batch_5 and test_batch in a folder"
    def write(data, folder):
        folder.mkdir(parents=True)
        for split, x, y in splits(data):
            names = [f'data_batch_{i}' for i in range(1, 6)] if split == 'train' else ['test_batch']
            for i, name in enumerate(names):
                batch = {b'batch_label': name.encode(), b'labels': y[i::len(names)].tolist(),
                         b'data': x[i::len(names)].transpose(0, 3, 1, 2).reshape(-1, 3072)}
                with open(folder/name, 'wb') as f: Python2Pickler(f, protocol=2).dump(batch)
                (folder/name).write_bytes((folder/name).read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
        (folder/'batches.meta').write_bytes(pickle.dumps({b'label_names': [c.encode() for c in cifar10_classes]}, protocol=2))
        return folder
    return write

@pytest.fixture(scope='session')
def pack():
    "Make an archive of a folder; `reverse` for the opposite order of files"
    def make(folder, archive, reverse=False):
        with tarfile.open(archive, 'w' if archive.suffix == '.tar' else 'w:gz') as tar:
            for file in sorted(folder.rglob('*'), reverse=reverse):
                if file.is_file(): tar.add(file, file.relative_to(folder.parent))
        return archive
    return make

@pytest.fixture(scope='session')
def small_folder(small, write_pngs, tmp_path_factory): return write_pngs(small, tmp_path_factory.mktemp('pngs')/'cifar10')

@pytest.fixture(scope='session')
def small_archive(small_folder, pack, tmp_path_factory): return pack(small_folder, tmp_path_factory.mktemp('archive')/'cifar10.tgz')

@pytest.fixture
def folder(small_folder, tmp_path): # for tests that change a file in it
    return shutil.copytree(small_folder, tmp_path/'cifar10')

@pytest.fixture(scope='session')
def real_source():
    "Where the real images are"
    if real_data in (None, '', 'digits'): pytest.skip(f'real CIFAR-10 images: set {data_variable} to its archive')
    return real_data

@pytest.fixture(scope='session')
def real_cifar(real_source): return load_cifar10(real_source)

# ---- a server

class _Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path, [404])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int): return self.send_error(answer)
        body, how = answer if isinstance(answer, tuple) else (answer, 'whole')
        if how == 'no HTTP': return self.wfile.write(body)
        self.send_response(200)
        if how != 'cut, length unsaid': self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if how == 'dripping': return self.drip(body)
        self.wfile.write(body if how == 'whole' else body[:len(body)//2])

    def drip(self, body):
        for i in range(1000):
            try: self.wfile.write(body[i:i + 1])
            except OSError: return # the client has gone
            time.sleep(.02)

    def log_message(self, *args): pass

@pytest.fixture
def server():
    """A server on this machine. `answers` holds a list for each path, used up from the left, the last one for good:
    a status, the content, or (content, 'cut' | 'cut, length unsaid' | 'dripping' | 'no HTTP'). `asked` holds the paths that were asked for."""
    with ThreadingHTTPServer(('127.0.0.1', 0), _Answer) as httpd:
        httpd.answers, httpd.asked = {}, []
        httpd.url = lambda path: f'http://127.0.0.1:{httpd.server_port}{path}'
        thread = threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=.05))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()

# ---- learners and runs

@pytest.fixture(scope='session')
def tiny_net():
    "A network with a weight of each kind that trains in no time"
    def make(n_out=10):
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_out))
    return make

@pytest.fixture(scope='session')
def small_dls(small):
    "`DataLoaders` of the small images, 5 batches an epoch"
    def make(**changes): return cifar_dls(small, **dict(bs=16, seed=0, num_workers=0, recipe='baseline') | changes)
    return make

@pytest.fixture(scope='session')
def tiny_learner(tiny_net, small_dls):
    "`cifar_learner` of the plain recipe with the tiny network, seeded weights and no progress bar"
    def make(dls=None, **kwargs):
        set_seed(0)
        learn = cifar_learner(dls or small_dls(), tiny_net(), **dict(precision='fp32', recipe='baseline') | kwargs)
        return learn.remove_cbs(ProgressCallback)
    return make

@pytest.fixture(scope='session')
def settings(small_archive):
    "Settings of a run of seconds, with a narrow network, and what a test changes in them"
    def make(**changes):
        return TrainSettings(**dict(data=str(small_archive), epochs=2, bs=16, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', ghost=4, width=16) | changes)
    return make

@pytest.fixture(scope='session')
def finished(settings, tmp_path_factory):
    "A run that is done: its folder, and what `train` returned"
    run = tmp_path_factory.mktemp('runs')/'finished'
    return run, train(settings(out=str(run)))

@pytest.fixture
def same_when_resumed(tiny_learner, tmp_path):
    "Assert that a fit of three epochs with the callbacks of `cbs(folder, resume)` that is stopped in `epoch` and resumed ends as one that is not"
    class Stop(Exception): pass
    class StopIn(Callback):
        order = 100
        def __init__(self, epoch): self.stop_in = epoch
        def after_batch(self):
            if self.training and self.epoch == self.stop_in and self.iter == 2: raise Stop('here')
    def fit(folder, *more, resume=False, cbs):
        learn = tiny_learner()
        with learn.no_logging(): learn.fit(3, 1e-2, cbs=[*cbs(tmp_path/folder, resume), *more])
        return learn.model.state_dict()
    def check(epoch, cbs):
        whole = fit('whole', cbs=cbs)
        with pytest.raises(Stop): fit('stopped', StopIn(epoch), cbs=cbs)
        resumed = fit('stopped', resume=True, cbs=cbs)
        assert all(torch.equal(t, whole[name]) for name, t in resumed.items())
    return check
