"""How fast one process trains, and two, on this machine, in turns:

    python tools/processes.py OUT.json [turns [steps]]

One process with all cores, one with a single core, two with a core each (a thread a core); the recipe `best`, 512 images a batch. Of
two processes also what a step takes when gradients are not exchanged: the difference is the time in which communication is waited for."""
import json, os, subprocess, sys, time
from pathlib import Path


def measure(out, turn, steps, exchange):
    import torch
    from fastai.vision.all import CancelFitException, Callback
    from cifar_fastai.core import TrainSettings, environment
    from cifar_fastai.run.distributed import launched_processes
    from cifar_fastai.callback.precision import keep_memory
    from cifar_fastai.run.train import settings_learner

    class Clock(Callback):
        order = 1500
        def before_batch(self):
            trainer = getattr(self.learn, 'distributed_trainer', None)
            if trainer and not exchange: trainer.ddp.require_backward_grad_sync = False # as its `no_sync` does
        def after_batch(self):
            times.append(time.perf_counter())
            if len(times) == steps + 3: raise CancelFitException # two to warm up, and one whose end is the beginning

    times, processes = [], launched_processes('cpu')
    settings = TrainSettings(device='cpu', epochs=2, lr_min=1e-4, lr_max=1e-3).resolved()
    keep_memory() # as `cifar_train` does
    learn, data = settings_learner(settings, None, processes)
    with processes.train(learn), learn.no_logging(): learn.fit(1, cbs=Clock())
    seconds = [b - a for a, b in zip(times[2:], times[3:])]
    result = dict(seconds=seconds, images_per_second=settings.bs*len(seconds)/sum(seconds), threads=torch.get_num_threads(), processes=processes.n)
    if processes.n > 1: # the same number of bytes, with nothing else to do
        grads, alone = torch.zeros(sum(p.numel() for p in learn.model.parameters())), []
        for _ in range(12):
            torch.distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(grads)
            alone.append(time.perf_counter() - start)
        result |= dict(gradient_bytes=grads.nbytes, all_reduce_seconds=alone[2:])
    if processes.rank == 0: Path(out).write_text(json.dumps(dict(result, environment=environment())))
    processes.end()


def main(out, turns=3, steps=6):
    cores = os.cpu_count()
    cases = {'one process, all cores': (1, cores, True), 'one process, one core': (1, 1, True), 'two processes, a core each': (2, 1, True), 'two processes, nothing exchanged': (2, 1, False)}
    results, part = {name: [] for name in cases}, Path(out).with_suffix('.part')
    for turn in range(int(turns)):
        for name, (n, threads, exchange) in cases.items():
            start = [sys.executable] if n == 1 else [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', str(n), '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
            subprocess.run([*start, __file__, 'measure', str(part), str(turn), str(steps), str(int(exchange))], env=os.environ | dict(OMP_NUM_THREADS=str(threads)), check=True)
            results[name].append(json.loads(part.read_text()))
            print(f"turn {turn + 1}: {name}: {results[name][-1]['images_per_second']:.0f} images/s", flush=True)
    part.unlink()
    machine = next(iter(results.values()))[0]['environment']
    for runs in results.values():
        for run in runs: run.pop('environment')
    Path(out).write_text(json.dumps(dict(environment=machine, steps=int(steps), bs=512, recipe='best', cases=results), indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1] == 'measure': measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), bool(int(sys.argv[5])))
    else: main(*sys.argv[1:])
