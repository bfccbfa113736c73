"""What several processes do in test_distributed.py: `launched.py WHAT FOLDER SOURCE OPTIONS`. Each leaves `rank<r>.json` in FOLDER."""
import hashlib, json, os, signal, sys, time
from contextlib import nullcontext
from pathlib import Path

import torch
from fastai.vision.all import Callback, F1Score, GradientAccumulation, accuracy, set_seed

from cifar_fastai.data.augment import CropFlipCutout
from cifar_fastai.core import TrainSettings, printed_log
from cifar_fastai.data.source import load_cifar10
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.run.distributed import launched_processes
from cifar_fastai.callback.checkpoint import Checkpoints
from cifar_fastai.learner import ClassWeightedLoss, cifar_learner
from cifar_fastai.models import CustomResNet
from cifar_fastai.callback.schedule import OneCycle
from cifar_fastai.run.train import train

def digest(model): return hashlib.sha256(b''.join(t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())).hexdigest()

def per_class(preds, targs): return torch.stack([(preds.argmax(1) == i).float().mean() for i in range(10)])
def predicted(preds, targs): return per_class(preds, targs).reshape(2, 5).numpy()

class Double(Callback):
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)

class Seen(Callback):
    "Which images came, by what they look like, and the model after each epoch"
    order = 2000
    def before_fit(self): self.train_images, self.valid_images, self.digests, self.losses, self.gradient = [], [], [], [], None
    def before_batch(self): (self.train_images if self.training else self.valid_images).append([hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in self.x.contiguous()])
    def before_step(self): self.gradient = self.gradient or [p.grad.norm().item() for p in self.model.parameters()] # of the first step
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())
    def after_epoch(self): self.digests.append(digest(self.model))

def fit(folder, source, images=None, epochs=2, bs=16, pipeline='batch', norm='batch', ghost=0, dropout=0., augmented=False, seed=0, stop_at=None, resume=False, num_workers=0, sync_bn=None, fp64=False, f1=False, vectors=False, width=16, weights=None, n_acc=0):
    data = load_cifar10(source)
    if images: data = data.first(images, images//4)
    aug = CropFlipCutout(flip='alternate') if augmented else CropFlipCutout(pad=0, flip_p=0, cutout=0)
    dls = cifar_dls(data, bs, pipeline, seed=seed, aug=aug, num_workers=num_workers, device='cpu')
    set_seed(seed)
    model = CustomResNet(norm=norm, ghost=ghost, dropout=dropout, width=width).to(torch.float64 if fp64 else torch.float32)
    learn, seen = cifar_learner(dls, model, 'fp32', recipe='baseline', cbs=[Double()] if fp64 else [], **(dict(metrics=[accuracy, F1Score(average='macro')]) if f1 else dict(metrics=[accuracy, per_class, predicted]) if vectors else {}),
                                **(dict(loss_func=ClassWeightedLoss(torch.tensor(weights))) if weights else {})), Seen()
    cbs = [OneCycle(1e-4, 2e-3), seen, Checkpoints(folder/'checkpoint', minutes=0, resume=resume)]
    if n_acc: cbs.append(GradientAccumulation(n_acc))
    with learn.distrib_ctx(sync_bn=sync_bn): learn.fit(epochs, cbs=cbs)
    return dict(train=seen.train_images, valid=seen.valid_images, digests=seen.digests, gradient=seen.gradient, losses=seen.losses, history=[{name: getattr(v, 'tolist', lambda: v)() for name, v in row.items()} for row in learn.recorder.history],
                after=[learn.validate()[1], type(learn.model).__name__, len(learn.dls.train.one_batch()[0])])

def notebook(folder, source): # as a cell does it, with Accelerate's launcher that needs no GPU
    from accelerate import debug_launcher
    debug_launcher(in_notebook, (folder, source), num_processes=2)
    return [json.loads((folder/f'of-{r}.json').read_text()) for r in range(2)]

def in_notebook(folder, source):
    digests = fit(folder, source, epochs=1)['digests']
    (folder/f'of-{launched_processes("cpu").rank}.json').write_text(json.dumps(digests))

def turns(folder, source): # who does what when
    def note():
        with open(folder/'turns', 'a') as f: f.write(f'{rank}\n')
        return rank
    return launched_processes('cpu').in_turn(note)

def blind(folder, source): # all but the first one look elsewhere
    return len(launched_processes('cpu').in_turn(lambda: load_cifar10(source if rank == 0 else '/not/here')).train_y)

def other_images(folder, source): # one of them has one that differs
    data, processes = load_cifar10(source), launched_processes('cpu')
    if rank == 1: data = data._replace(train_x=255 - data.train_x)
    train(TrainSettings(data=str(source), bs=16, epochs=2, lr_min=1e-4, lr_max=1e-3, width=16, device='cpu', out=str(folder/'run')), data, processes)

def leaves(folder, source, gone): # one of them is killed, while the other waits for nobody, or for the first one
    processes = launched_processes('cpu')
    signal.signal(signal.SIGTERM, processes.on_sigterm)
    processes.gather(rank) # both are there
    if rank == gone: os.kill(os.getpid(), signal.SIGKILL)
    processes.from_first(lambda: time.sleep(50))

def said(folder, source): # a flag of one process is known to all, at the same step
    processes = launched_processes('cpu')
    late = [processes.any('stop', rank == 1 and step == 2) for step in range(6)]
    return dict(late=late, now=[processes.any('save', rank == step, wait=True) for step in range(3)], all=processes.gather(rank), sum=processes.sum([rank, 1]))

def fails(folder, source): # what the first one raises is raised everywhere
    try: launched_processes('cpu').from_first(lambda: Path('/not/here').read_text())
    except FileNotFoundError: return True

def main(what, folder, source, options):
    global rank
    rank, folder, options = int(os.environ.get('RANK', 0)), Path(folder), json.loads(options)
    torch.set_num_threads(1)
    with printed_log() if rank == 0 else nullcontext(): result = globals()[what](folder, source, **options)
    (folder/f'rank{rank}.json').write_text(json.dumps(result))
    launched_processes('cpu').end()

if __name__ == '__main__': main(*sys.argv[1:])
