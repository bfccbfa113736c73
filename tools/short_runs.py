"""Short runs that a recipe can be chosen by, since a full one takes an hour on two cores:

    python tools/short_runs.py FOLDER 'lr_min=2.5e-5 lr_max=6.35e-3' 'lr_min=2.5e-5 lr_max=6.35e-3 whiten=False' …

Each trains the recipe `best`, with the settings that are named, for 16 epochs on 11,250 training images, and is measured on 20,000
other training images: the 5,000 of the hold-out and 15,000 more. The test images have no part in it. One run folder each in FOLDER,
and FOLDER/runs.jsonl with their results."""
import ast, json, sys
from pathlib import Path


def choosing_data(): # -> `CIFAR10Data` whose test images are training images, too
    from cifar_fastai.data.images import CIFAR10Data, first_of_each_class
    from cifar_fastai.data.source import load_cifar10
    import numpy as np
    data = load_cifar10()
    held = np.asarray(first_of_each_class(data.train_y, 0.1))
    others = np.flatnonzero(~held)
    train, test = others[:11_250], np.concatenate([np.flatnonzero(held), others[-15_000:]])
    return CIFAR10Data(data.train_x[train], data.train_y[train], data.train_x[test], data.train_y[test], data.vocab)


def value(text):
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): return text


def main(folder, *runs):
    from cifar_fastai.core import TrainSettings
    from cifar_fastai.callback.precision import keep_memory
    from cifar_fastai.run.train import train
    keep_memory() # as `cifar_train` does
    folder, data = Path(folder), choosing_data()
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        changed = {name: value(v) for name, v in (part.split('=') for part in run.split())}
        summary = train(TrainSettings(**dict(epochs=16, out=str(folder/run.replace(' ', ','))) | changed), data)
        history = (folder/run.replace(' ', ',')/'history.csv').read_text().splitlines()
        last = dict(zip(history[0].split(','), map(float, history[-1].split(','))))
        with open(folder/'runs.jsonl', 'a') as f:
            f.write(json.dumps(dict(what=run, **summary['bounds']) | {'training accuracy': 100*last['train_accuracy'], 'accuracy': 100*summary['accuracy'], 'with flip TTA': 100*summary['flip_averaged_accuracy']}) + '\n')


if __name__ == '__main__': main(*sys.argv[1:])
