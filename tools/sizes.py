"""Measure training throughput at each image size in turns, and compare it with the arithmetic: `python tools/sizes.py benchmarks/sizes.json`.

Steps of the recipe `quick` (128 images, ghost batch norm), with and without a frozen first layer. Run it alone on the machine."""
import sys


def main(out, turns=3, steps=6):
    import time
    from fastai.vision.all import Callback
    from cifar_fastai.callback.cost import fit_cost
    from cifar_fastai.callback.precision import keep_memory, precision_of
    from cifar_fastai.core import environment
    from cifar_fastai.data.block import cifar_dls
    from cifar_fastai.data.source import load_cifar10
    from cifar_fastai.files import write_json
    from cifar_fastai.learner import cifar_learner

    class Clock(Callback):
        "Time the steps of an epoch after the first one"
        order = 1000
        def after_batch(self):
            if self.training and self.iter == 0: self.began = time.perf_counter()
        def after_train(self): self.seconds = time.perf_counter() - self.began

    keep_memory() # as the commands do
    dls = cifar_dls(load_cifar10().first(128*(steps + 1), 10), recipe='quick', seed=0, device='cpu')
    cases, rates = [(size, frozen) for size in (16, 20, 24, 28, 32) for frozen in (False, True)], {}
    for turn in range(turns + 1): # the first turn warms up
        for size, frozen in cases:
            learn, clock = cifar_learner(dls, sizes=(size,), freeze_first=0, lookahead=0), Clock()
            if frozen: learn.model.prep.requires_grad_(False)
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=clock)
            if turn: rates.setdefault((size, frozen), []).append(128*steps/clock.seconds)
            precision, model = precision_of(learn), learn.model
    model.prep.requires_grad_(True)
    cost = {key: fit_cost(model, 1, 1, key[:1], 0) for key in cases if not key[1]}
    frozen = {key: fit_cost(model, 1, 2, key[:1], 1) - cost[key[0], False] for key in cases if key[1]} # the second epoch
    rows = [dict(size=size, frozen=is_frozen, flop=(cost | frozen)[size, is_frozen], images_per_second=rates[size, is_frozen]) for size, is_frozen in cases]
    write_json(out, dict(environment=environment(), precision=precision, batch=128, rows=rows))
    for row in rows: print(row['size'], row['frozen'], f"{row['flop']/1e9:.2f} GFLOP", *(f'{r:.0f}' for r in row['images_per_second']), 'images/s')


if __name__ == '__main__': main(sys.argv[1])
