"""Train many runs on one machine, several at a time, and keep a compact record of each:

    python tools/many_runs.py RUNS.json OUT [--workers 4] [--holdout 10000] [--minutes 9] [--logits] [--weights NAME]

RUNS.json is a list of objects {"name": …, "seed": …, "settings": {…}}; settings are those of `cifar_train`. OUT/runs.jsonl gets a
line for each run when it ends. A run that OUT/runs.jsonl has already is not made again, and none is begun after so many minutes, so the
same command goes on where it was stopped. With --holdout, so many training images are held out and validate, and the test images have no
part in it; `calibration` of a record has the temperature fitted on them, for `tools/temperatures.py`. --logits writes OUT/NAME.safetensors for each name: the logits of the validation images in fp16, with and without horizontal
flip, of all its seeds. --weights keeps the weights of seed 0 of a name, in fp16.

`extra` of a run has what was tried and is no setting of the package: "ema" (an average with the decay 1 - 1/ema at every fifth step),
"bias_lr" (factor of the learning rate of norms and biases) and "norm_scales" (false: the scales of norms stay 1)."""
import argparse, json, time, traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp


def held_out(data, n): # -> `CIFAR10Data` whose test images are the last `n` training images of each class in equal parts
    import numpy as np
    from cifar_fastai.data.images import CIFAR10Data, first_of_each_class
    is_valid = first_of_each_class(data.train_y[::-1], n/len(data.train_y))[::-1].copy()
    x, y = data.train_x, data.train_y
    return CIFAR10Data(x[~is_valid], y[~is_valid], x[is_valid], y[is_valid], data.vocab)


def extra_callbacks(ema=0, bias_lr=1., norm_scales=True):
    from fastai.vision.all import Callback
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class EMA(Callback):
        "End a fit with the exponential moving average of the weights and of the statistics of norms"
        order = 5
        def before_train(self):
            if self.epoch == 0: self.average = None
        def after_step(self):
            if self.average is None: # not the weights of the beginning
                self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1/ema), use_buffers=True)
            if round(self.pct_train*self.n_epoch*len(self.dls.train)) % 5 == 4: self.average.update_parameters(self.model)
        def after_train(self):
            if self.epoch == self.n_epoch - 1: self.model.load_state_dict(self.average.module.state_dict())

    class BiasRate(Callback):
        order = 100 # after the schedule
        def before_batch(self):
            if not self.training or hasattr(self.learn, 'lr_finder'): return
            for i in self.opt.undecayed: self.opt.opt.param_groups[i]['lr'] = bias_lr*self.opt.opt.param_groups[0]['lr']

    class NormScales(Callback):
        def before_fit(self):
            for m in self.model.modules():
                if isinstance(m, torch.nn.BatchNorm2d): m.weight.requires_grad_(False)

    return [EMA()]*(ema > 0) + [BiasRate()]*(bias_lr != 1) + [NormScales()]*(not norm_scales)


def logits_of(interp): # up to a constant per image
    from cifar_fastai.look.calibration import log_probabilities
    return log_probabilities(interp.raw_probs)


def one_run(run, data, is_held_out): # -> (record, logits, logits with flips, weights)
    from cifar_fastai.callback.schedule import OneCycle, resolve_bounds
    from cifar_fastai.core import TrainSettings
    from cifar_fastai.look.interpret import CifarInterpretation
    from cifar_fastai.models import half_precision
    from cifar_fastai.run.train import run_environment, settings_learner
    from temperatures import temperatures_of
    settings = TrainSettings(seed=run['seed'], **{k: tuple(v) if isinstance(v, list) else v for k, v in run['settings'].items()}).resolved()
    begun = time.monotonic()
    learn, _ = settings_learner(settings, data)
    learn.add_cbs(extra_callbacks(**run.get('extra', {})))
    bounds, _ = resolve_bounds(learn, settings.lr_min, settings.lr_max)
    with learn.no_bar(), learn.no_logging():
        learn.fit(settings.epochs, cbs=OneCycle(*bounds, settings.peak_epoch, settings.anneal, settings.lr_start or None))
        interp = CifarInterpretation.from_learner(learn)
        flipped = interp.flip_averaged()
    history = [{k: round(v, 6) for k, v in row.items()} for row in learn.recorder.history]
    record = run | dict(accuracy=interp.accuracy, n_wrong=interp.n_wrong, flip_averaged_accuracy=flipped.accuracy, n_valid=len(interp.targs),
                        bounds=bounds._asdict(), seconds=sum(row['seconds'] for row in history), wall=time.monotonic() - begun,
                        memory=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None, history=history)
    if is_held_out: record['calibration'] = temperatures_of(logits_of(interp), interp.targs)
    return record, logits_of(interp).half(), logits_of(flipped).half(), half_precision(learn.model), run_environment(learn)


def work(jobs, results, path, threads, is_held_out):
    import numpy as np
    from cifar_fastai.data.images import CIFAR10Data
    torch.set_num_threads(threads)
    arrays = np.load(path)
    data = CIFAR10Data(*(arrays[name] for name in ('train_x', 'train_y', 'test_x', 'test_y')), arrays['vocab'].tolist())
    while (run := jobs.get()) is not None:
        try: results.put((run, one_run(run, data, is_held_out)))
        except Exception: results.put((run, traceback.format_exc()))


def key(run): return json.dumps({name: run.get(name) for name in ('name', 'seed', 'settings', 'extra')}, sort_keys=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs'); parser.add_argument('out', type=Path)
    parser.add_argument('--workers', type=int, default=1); parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--holdout', type=int, default=0); parser.add_argument('--minutes', type=float, default=10**6)
    parser.add_argument('--logits', action='store_true'); parser.add_argument('--weights')
    args = parser.parse_args()
    import numpy as np
    from safetensors.torch import save_file
    from cifar_fastai.data.source import load_cifar10
    begun, data = time.monotonic(), load_cifar10()
    if args.holdout: data = held_out(data, args.holdout)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, logits = args.out/'runs.jsonl', {}
    done = {key(json.loads(line)) for line in lines.read_text().splitlines()} if lines.exists() else set()
    waiting = [run for run in json.loads(Path(args.runs).read_text()) if key(run) not in done]
    images = args.out/'images.npz'
    np.savez(images, train_x=data.train_x, train_y=data.train_y, test_x=data.test_x, test_y=data.test_y, vocab=np.array(data.vocab))
    context = mp.get_context('spawn') # a fork could not use CUDA, which fastai begins to use when it is imported
    jobs, results = context.SimpleQueue(), context.Queue()
    workers = [context.Process(target=work, args=(jobs, results, images, args.threads, args.holdout > 0)) for _ in range(min(args.workers, len(waiting)))]
    for worker in workers: worker.start()
    running = 0
    while running or waiting:
        late = time.monotonic() - begun > 60*args.minutes
        if late: waiting = []
        while waiting and running < len(workers):
            jobs.put(waiting.pop(0)); running += 1
        if not running: break
        run, result = results.get(); running -= 1
        if isinstance(result, str):
            print(run['name'], run['seed'], 'FAILED\n', result, flush=True)
            continue
        record, plain, flipped, weights, environment = result
        with open(lines, 'a') as f: f.write(json.dumps(record) + '\n')
        (args.out/'environment.json').write_text(json.dumps(environment, indent=1))
        print(f"{run['name']} {run['seed']}: {record['accuracy']:.2%} flips {record['flip_averaged_accuracy']:.2%} {record['seconds']:.1f} s", flush=True)
        if args.weights == run['name'] and run['seed'] == 0: (args.out/'weights.safetensors').write_bytes(weights)
        if args.logits:
            of_name = logits.setdefault(run['name'], {})
            of_name |= {f"seed-{run['seed']}": plain.clone(), f"seed-{run['seed']}-flips": flipped.clone()}
            save_file(of_name, args.out/f"{run['name']}.safetensors")
    for _ in workers: jobs.put(None)
    for worker in workers: worker.join()
    images.unlink()
    print(f'{time.monotonic() - begun:.0f} s', flush=True)


if __name__ == '__main__': main()
