"""Record the temperatures of runs that held out training images: `python tools/temperatures.py RUN…`.

RUN is a run folder of `cifar_train --recipe NAME --valid holdout` on CIFAR-10 with no other setting of the recipe changed, or the
`runs.jsonl` of `tools/many_runs.py --holdout N`. benchmarks/temperatures.json gets, for each run that it does not have yet, the temperature,
and the calibration before and after: of the temperature fitted on all held-out images, and of two temperatures fitted on one half of
them and measured on the other. `recipe_temperatures` in nbs/00_core.ipynb has the mean of each recipe; a test compares the two."""
import json, sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from readme import root

file = root/'benchmarks/temperatures.json'


def temperatures_of(logits, targs): # -> JSON-ready
    import torch
    from cifar_fastai.look.calibration import calibration, fit_temperature
    measure = lambda images, t: calibration((logits[images]/t).softmax(dim=1), targs[images])._asdict()
    every = torch.randperm(len(targs), generator=torch.Generator().manual_seed(0))
    halves, t = every.chunk(2), fit_temperature(logits, targs)
    of_halves = [fit_temperature(logits[half], targs[half]) for half in halves]
    crossed = [measure(other, t_half) for t_half, other in zip(of_halves, halves[::-1])]
    return dict(n_images=len(targs), accuracy=float((logits.argmax(dim=1) == targs).float().mean()), temperature=t,
                temperature_of_halves=of_halves, uncalibrated=measure(every, 1.), calibrated=measure(every, t),
                on_other_half={name: (crossed[0][name] + crossed[1][name])/2 for name in crossed[0]})


def origin(recipe, seed, environment):
    from cifar_fastai.core import recipes
    return dict(recipe=recipe, settings=asdict(recipes[recipe]), seed=seed, device=environment['device'], precision=environment['precision'])


def of_folder(run):
    from safetensors.torch import load_file
    from cifar_fastai.core import settings_from
    from cifar_fastai.look.calibration import log_probabilities
    from cifar_fastai.run.folder import read_config
    from cifar_fastai.run.train import changed_from_recipe
    config = read_config(run)
    settings = settings_from(config['settings']).resolved()
    if settings.valid != 'holdout': sys.exit(f'{run} was validated on the test images: a temperature needs --valid holdout')
    if changed := changed_from_recipe(config): sys.exit(f"{run} is not the recipe {settings.recipe}: {', '.join(changed)} changed")
    kept = load_file(run/'predictions.safetensors')
    return origin(settings.recipe, settings.seed, config['environment']) | temperatures_of(log_probabilities(kept['probs']), kept['targs'])


def of_many_runs(path):
    environment = json.loads(path.with_name('environment.json').read_text())
    for run in map(json.loads, path.read_text().splitlines()):
        if set(run['settings']) == {'recipe'} and not run.get('extra') and 'calibration' in run:
            yield origin(run['settings']['recipe'], run['seed'], environment) | run['calibration']


def main(*runs):
    from cifar_fastai.files import read_json, write_json
    records = read_json(file)['runs'] if file.exists() else []
    for record in chain.from_iterable([of_folder(run)] if run.is_dir() else of_many_runs(run) for run in map(Path, runs)):
        same = [old for old in records if all(old[name] == record[name] for name in ('recipe', 'seed', 'device', 'n_images'))]
        if not same: records.append(record)
        print(f"{record['recipe']} {record['seed']}: {record['temperature']:.4f}" + ' (recorded already)'*bool(same))
    write_json(file, dict(runs=records))


if __name__ == '__main__': main(*sys.argv[1:]) if sys.argv[1:] else sys.exit(__doc__)
