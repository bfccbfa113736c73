"""What test_data.py and test_augment.py have done by worker processes: `workers.py WHAT METHOD FOLDER`; and what forked processes do."""
import hashlib, json, multiprocessing, os, resource, signal, sys, time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import forked
from cifar_fastai.data import source as source_module
from cifar_fastai.data.augment import item_pipeline
from cifar_fastai.data.images import load_digits
from cifar_fastai.data.block import cifar_dls

class Draws(Dataset):
    "One picture, augmented again and again; an item says what came out"
    def __init__(self, pipeline): self.pipeline, self.image = pipeline, load_digits().train_x[0]
    def __len__(self): return 32
    def __getitem__(self, i): return hashlib.sha256(self.pipeline(image=self.image)['image'].tobytes()).hexdigest()

def drawn(pipeline, context, epochs=2, num_workers=2, persistent=False):
    "What each epoch draws, a list of texts each"
    if num_workers == 0: context = None
    dl = DataLoader(Draws(pipeline), 4, num_workers=num_workers, multiprocessing_context=context,
                    persistent_workers=persistent)
    return [[text for batch in dl for text in batch] for _ in range(epochs)]

def put_one(pipeline, queue): queue.put(Draws(pipeline)[0])

def drawn_elsewhere(pipeline, context, n=2):
    "What `n` processes draw that are no workers of torch"
    queue = context.Queue()
    processes = [context.Process(target=put_one, args=(pipeline, queue)) for _ in range(n)]
    for p in processes: p.start()
    texts = [queue.get() for _ in processes]
    for p in processes: p.join()
    return texts

def batches(num_workers):
    dls = cifar_dls(load_digits().first(60, 20), 16, 'item', seed=1, num_workers=num_workers)
    state = torch.get_rng_state()
    seen = [hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x, _ in dls.train]
    assert torch.equal(torch.get_rng_state(), state)
    return seen

def from_files(folder, num_workers): # as `get_preds` takes them
    dls = cifar_dls(load_digits().first(60, 20), 16, seed=1)
    dl = dls.test_dl(sorted(folder.glob('*.png')), num_workers=num_workers)
    return [x.sum(dim=(1, 2, 3)).tolist() for x, in dl]

def fill_cache(source, hangs=''): # prints how often it decoded, and how many images it has
    decoded, original = [], source_module.read_images
    def read(path):
        decoded.append(path)
        print('decoding', flush=True)
        if hangs: time.sleep(60)
        return original(path)
    source_module.read_images = read
    n = len(source_module.load_cifar10(source).train_y)
    print(len(decoded), n)

def command_that_dies(write, *args):
    "When so many files are written and have not reached the disk"
    left, original = int(write), os.fsync
    def fsync(fd):
        nonlocal left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        original(fd)
    os.fsync = fsync
    forked.command(*args)

def command_with_little_memory(n_bytes, *args): # more than it has now
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages*resource.getpagesize() + int(n_bytes),)*2)
    forked.command(*args)

def command_without(library, *args):
    sys.modules[library] = None # as if it were not installed
    forked.command(*args)

def export_without_onnx(file):
    from cifar_fastai.use.export import export_model, load_onnx
    for name in 'onnx', 'onnxruntime', 'onnxscript': sys.modules[name] = None
    print(export_model(None, 'torch'))
    for call in export_model, lambda: load_onnx(file):
        try: call()
        except ModuleNotFoundError as e: print(e)

def classify_zeros(file): # says first which process does it
    from cifar_fastai.use.export import load_onnx
    classify = load_onnx(file, timeout=600)
    print(classify.process.pid, flush=True)
    classify(np.zeros((3, 32, 32, 3), np.uint8))

if __name__ == '__main__':
    what, method, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    multiprocessing.set_start_method(method)
    multiprocessing.set_forkserver_preload(['albumentations', 'cifar_fastai.data.block']) # imported once
    if what == 'loaders': said = [[batches(n) for n in (0, 2)], [from_files(folder, n) for n in (0, 1)]]
    else:
        pipeline, n = item_pipeline(), 2 if method == 'forkserver' else 1 # starting a spawned process takes seconds
        elsewhere = drawn_elsewhere(pipeline, multiprocessing.get_context(method), n)
        said = [drawn(pipeline, method, epochs=n), [Draws(pipeline)[0], *elsewhere]]
    print(json.dumps(said))
