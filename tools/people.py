"""Compare the recorded predictions with what people said: `python tools/people.py CIFAR10H`, with the archive of CIFAR-10 in CIFAR_FASTAI_DATA.

CIFAR10H is `cifar10h-counts.npy` of Peterson et al. (2019), licence CC BY-NC-SA 4.0, or an .npz file with `counts`. benchmarks/people.json gets the
figures of each seed of the recipes `best` and `baseline`; nothing of the answers to single images is written."""
import sys
from pathlib import Path
from types import SimpleNamespace

from readme import root


def main(path):
    import torch
    from safetensors.torch import load_file
    from cifar_fastai.core import cifar10_classes, recipe_temperatures
    from cifar_fastai.files import write_json
    from cifar_fastai.look.interpret import CifarInterpretation
    from cifar_fastai.look.people import compare_with_people, label_issue_precision, load_human
    targs = load_file(root/'benchmarks/runs/24-epochs/predictions.safetensors')['targs']
    counts, found = load_human(targs, path), {}
    for recipe in ('best', 'baseline'):
        logits, temperature = load_file(root/f'benchmarks/runs/h100/{recipe}.safetensors'), recipe_temperatures.get(recipe, 1.)
        for name in sorted(name for name in logits if not name.endswith('flips')):
            probs = logits[name].float().softmax(dim=1)
            interp = CifarInterpretation(None, SimpleNamespace(vocab=list(cifar10_classes)), probs, targs, torch.zeros(len(targs)), temperature=temperature)
            precision = label_issue_precision(interp, counts)
            found.setdefault(recipe, {})[name] = compare_with_people(interp, counts) | dict(
                temperature=temperature, label_issues=precision.to_dict('index'), n_label_issues=len(interp.label_issues()))
    source = 'CIFAR-10H, Peterson, Battleday, Griffiths & Russakovsky (2019), https://github.com/jcpeterson/cifar-10h, CC BY-NC-SA 4.0'
    write_json(root/'benchmarks/people.json', dict(source=source, recipes=found))


if __name__ == '__main__': main(*sys.argv[1:])
