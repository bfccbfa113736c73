"""Include the weights of a run in the package, with a model card: `python tools/pretrained.py WEIGHTS RECORD SEED`.

WEIGHTS has the weights of a run of the recipe `best` as `half_precision` makes them, and RECORD is a file like
benchmarks/runs/h100/runs.json, in which its recipe has the run with that SEED; `tools/many_runs.py --weights best` makes both. The weight
and the bias of `fc` are divided by the temperature of the recipe and kept in fp32, so that no prediction changes. The figures of the card
are measured with the included file, loaded like users load it, on the images that validated the run."""
from dataclasses import asdict
import sys
from pathlib import Path

from readme import root
from tables import table

weights = root/'cifar_fastai/weights'

card = '''---
license: apache-2.0
library_name: fastai
pipeline_tag: image-classification
datasets:
- cifar10
metrics:
- accuracy
---

# Model card: CustomResNet on CIFAR-10

A small residual network that classifies 32×32 images into the ten classes of CIFAR-10. Test accuracy is {accuracy:.2%}, or {flipped:.2%} with horizontal-flip test-time augmentation. These are the weights that `load_pretrained()` and `cifar_predict` use.

## Model Details

| | |
|---|---|
| model | `CustomResNet`, D. Page's residual network with pooling before normalisation |
| parameters | {n_params:,} |
| input | RGB, 32×32, normalised with `cifar10_stats` |
| output | 10 logits, in the order of `cifar10_classes` |
| file | `best.safetensors`, half precision, {megabytes:.1f} MB |
| origin | one run of the recipe `{recipe}`, whose seed was fixed in advance; converted by `tools/pretrained.py` |
| license | Apache-2.0, like the package |

The constant factor of {logit_scale:g} on the logits and the temperature of {temperature:.4g} are folded into the weight and bias of `fc`, so the file loads into a plain `CustomResNet()` and the softmax of its outputs is calibrated. Multiply the outputs by {temperature:.4g} for the logits with which the network was trained.

## Uses

The model is intended for learning, for teaching and as a baseline. It is not intended for decisions about people.

It is out of scope for images of anything but the ten classes: shown a face, a house or noise, it still names one of the ten.

## Bias, Risks, and Limitations

- Larger pictures are scaled down and cropped to the central square, so objects near the edge may be lost.
- The labels of CIFAR-10 contain mistakes, and some test images are near-duplicates of training images (Barz & Denzler 2020), so the accuracies below are slightly optimistic.
- The probabilities are calibrated for images like those of CIFAR-10. How they change on blurred, noisy or rotated images is measured in `nbs/46_look.shift.ipynb`.
- The weights come from one run. Another seed gives other weights and another accuracy: {n_seeds} seeds of this recipe have a mean of {mean:.2%} and a standard deviation of {sd:.2f} points.

## How to Get Started with the Model

```sh
cifar_predict picture.png
```

```python
from cifar_fastai.all import *

model = load_pretrained()
image = read_image('picture.png') # uint8 (32, 32, 3)
probs = class_probabilities(model, [image], cifar10_stats)[0]
print(cifar10_classes[int(probs.argmax())], float(probs.max()))
```

## Training Details

### Training Data

The 50,000 training images of CIFAR-10 (Krizhevsky 2009), without additional data.

### Training Procedure

| | |
|---|---|
| recipe | `{recipe}`: {settings} |
| epochs | {epochs} |
| learning rate | one cycle, {lr_min:.3g} → {lr_max:.3g} → {lr_min:.3g}, maximum at epoch {peak_epoch:g}; the maximum comes from a range test, the minimum from the recipe |
| precision | {precision} |
| seed | {seed} |

## Evaluation

### Testing Data, Factors, and Metrics

The model was evaluated on the 10,000 test images of CIFAR-10, which were not used for training. They had some influence on the recipe: its starting point came from an earlier run evaluated on them, and the curve of an earlier version raised the question of where the cycle should end, which was then answered with training images. Its last change, averaged weights with a higher last learning rate, was chosen on 10,000 training images that were held out. They were also evaluated after each epoch, for the curves. The weights are those of the last epoch, not of the best one.

### Results

| | accuracy |
|---|---|
| included weights | {accuracy:.2%} |
| included weights, with flip TTA | {flipped:.2%} |
| original run, in {precision} | {run_accuracy:.2%} |

Without the temperature, the network is underconfident, because label smoothing trains it towards 82% instead of 100%. The temperature was fitted on training images that runs of the recipe had held out (`benchmarks/temperatures.json`). On the test images:

{calibration}

{per_class}

Most frequent confusions: {confused}.

## Technical Specifications

Hardware: {device}. Software: Python {python}, {versions}. Energy use was not measured.
'''


def versions(environment): # 'torch 2.14.1, torchvision 0.29.1 and fastai 2.8.7'
    torch, torchvision, fastai = (f"{name} {environment['packages'][name]}" for name in ('torch', 'torchvision', 'fastai'))
    return f'{torch}, {torchvision} and {fastai}'


def calibrated(content, temperature): # -> content of a safetensors file
    from safetensors.torch import load, save
    state = load(content)
    if str(state['fc.weight'].dtype) != 'torch.float16': sys.exit('fc.weight is not in fp16, so it may have been divided by a temperature already')
    return save(state | {name: state[name].float()/temperature for name in ('fc.weight', 'fc.bias')})


def calibration_table(interp, temperature):
    rows = [('without temperature', interp.calibrated(1/temperature)), ('included weights', interp)]
    return table(['', 'mean confidence', 'expected calibration error', 'negative log-likelihood', 'Brier score'],
                 [[name, f'{float(i.probs.max(dim=1).values.mean()):.1%}', f'{100*(found := i.calibration()).ece:.1f} points', f'{found.nll:.3f}',
                   f'{found.brier:.3f}'] for name, i in rows])


def main(file, record, seed):
    from statistics import mean, stdev
    from cifar_fastai.core import ingredients, recipe_temperatures, recipes
    from cifar_fastai.files import read_json
    from cifar_fastai.data.source import load_cifar10
    from cifar_fastai.data.block import cifar_dls
    from cifar_fastai.look.interpret import CifarInterpretation
    from cifar_fastai.learner import no_bar_without_tty, cifar_learner
    from cifar_fastai.models import load_pretrained
    record = read_json(record)
    settings, runs, env = record['recipes']['best']['settings'], record['recipes']['best']['runs'], record['environment']
    run = next(run for run in runs if run['seed'] == int(seed))
    expected = {name: value for name, value in asdict(recipes['best']).items() if value is not None}
    expected |= dict(recipe='best', valid='test', epochs=24, bs=512, lr_max='find', norm='batch', dropout=0., conv_bias=False, sizes=[])
    if other := [f'{name} is {settings[name]}, not {value}' for name, value in expected.items() if settings[name] != value]:
        sys.exit(f'{file} is of no run of the recipe best as the card describes it: {", ".join(other)}')
    weights.mkdir(exist_ok=True)
    (weights/'best.safetensors').write_bytes(calibrated(Path(file).read_bytes(), temperature := recipe_temperatures['best']))
    model = load_pretrained()
    learn = no_bar_without_tty(cifar_learner(cifar_dls(load_cifar10(), 500, seed=0), model, 'fp32'))
    interp = CifarInterpretation.from_learner(learn)
    scores, accuracies = interp.per_class(), [run['accuracy'] for run in runs]
    changed = {name: settings[name] for name in ingredients if getattr(recipes['best'], name) != getattr(recipes['baseline'], name)}
    text = card.format(
        megabytes=(weights/'best.safetensors').stat().st_size/1e6, n_params=sum(p.numel() for p in model.parameters()), recipe='best',
        settings=', '.join(f'`{name}` {value}' for name, value in changed.items()), **run['bounds'], peak_epoch=settings['peak_epoch'], epochs=settings['epochs'],
        device=env['device'], python=env['python'], versions=versions(env), logit_scale=settings['logit_scale'], precision=env['precision'], seed=run['seed'],
        accuracy=interp.accuracy, temperature=temperature, flipped=interp.flip_averaged().accuracy, run_accuracy=run['accuracy'],
        n_seeds=len(runs), mean=mean(accuracies), sd=100*stdev(accuracies),
        calibration=calibration_table(interp, temperature),
        per_class=table(['class', 'recall', 'precision'], [[name, f'{row.recall:.1%}', f'{row.precision:.1%}'] for name, row in scores.iterrows()]),
        confused=', '.join(f'{actual} predicted as {predicted} ({n})' for actual, predicted, n in interp.most_confused()[:4]))
    (weights/'README.md').write_text(text, encoding='utf-8')
    print(f'{interp.accuracy:.2%} by the file that ships, {run["accuracy"]:.2%} by the run')


if __name__ == '__main__': main(*sys.argv[1:])
