"""Puts the weights of a finished run into the package, in half precision, with a model card: `python tools/pretrained.py RUN`.

The card's figures are of the file that ships: it is loaded as users load it and run over the images that validated the run."""
from dataclasses import asdict
import sys
from pathlib import Path

from readme import root
from tables import table

weights = root/'cifar_fastai/weights'

card = '''# Model card: CustomResNet on CIFAR-10

The weights that `load_pretrained()` and `cifar_predict` use, in half precision (`best.safetensors`, {megabytes:.1f} MB). Made by `tools/pretrained.py` from one run, which was named, by its seed, before it was made.

| | |
|---|---|
| network | `CustomResNet`, {n_params:,} parameters (D. Page's residual network, pooling before normalisation) |
| input | RGB, 32×32, normalised with `cifar10_stats` |
| output | 10 logits, classes in the order of `cifar10_classes` |
| data | the 50,000 training images of CIFAR-10 (Krizhevsky 2009), and no others |
| recipe | `{recipe}`: {settings}. The factor on the logits is folded into the weights of `fc`: load them into a plain `CustomResNet()` |
| learning rate | one cycle, {lr_min:.3g} → {lr_max:.3g} → {lr_min:.3g}, maximum at epoch {peak_epoch:g} of {epochs}; its height found by a range test, its ends those of the recipe |
| trained on | {device}, {precision}, seed {seed} |
| licence | Apache-2.0, as the package |

## How well it does

On the 10,000 test images, which had no part in training. The recipe was chosen without them, but for a starting point that an earlier run on them had suggested, and for a question, where the cycle should end, that the curve of an earlier recipe raised; training images answered it. They were looked at after each epoch, for the curves. Last weights, not those of the best epoch:

| | accuracy |
|---|---|
| the file that ships | {accuracy:.2%} |
| the same, logits averaged over each image and its mirror image | {flipped:.2%} |
| the run that it was made of, in {precision} | {run_accuracy:.2%} |

By class, the share of its images that are named rightly (recall), and of the images named so that are of it (precision):

{per_class}

The most frequent mistakes: {confused}.

This is one run. Another seed gives other weights and another accuracy; by how much was not measured for this recipe.

## Limits

It knows ten things, in pictures of 32×32 pixels, and nothing else: shown a face, a house or noise it still names one of the ten. Larger pictures are scaled down and cut to their centre square; what stands at the edge is not seen. CIFAR-10's labels contain mistakes, and near-duplicates between its training and test images are known (Barz & Denzler 2020), so the figures flatter a little. The labels were smoothed in training, so probabilities are cautious: on the test images the highest is {confidence:.2f} on average, and right {accuracy:.1%} of the time. They are no calibrated measure of certainty. It is meant for learning, for teaching and as a baseline, and for no decision about anybody.
'''


def main(run):
    from cifar_fastai.core import recipes
    from cifar_fastai.files import read_json
    from cifar_fastai.data.source import load_cifar10
    from cifar_fastai.data.block import cifar_dls
    from cifar_fastai.run.folder import load_run
    from cifar_fastai.look.interpret import CifarInterpretation
    from cifar_fastai.learner import no_bar_without_tty, cifar_learner
    from cifar_fastai.models import half_precision, load_pretrained
    summary, (model, config) = read_json(Path(run)/'summary.json'), load_run(run)
    settings = config['settings']
    data = load_cifar10(settings['data'])
    expected = asdict(recipes['best']) | dict(recipe='best', valid='test', epochs=24, bs=512, lr_max='find', norm='batch', dropout=0., conv_bias=False)
    if other := [f'{name} is {settings[name]}, not {value}' for name, value in expected.items() if settings[name] != value]: sys.exit(f'{run} is no run of the recipe best as the card describes it: {", ".join(other)}')
    if summary['interrupted'] or not config['data']['is_cifar10'] or list(data.fingerprint) != list(config['data']['fingerprint']): sys.exit(f'{run} is not finished, or the images are not those of CIFAR-10')
    weights.mkdir(exist_ok=True)
    (weights/'best.safetensors').write_bytes(half_precision(model))
    learn = no_bar_without_tty(cifar_learner(cifar_dls(data, 500, seed=0), load_pretrained(), 'fp32'))
    interp = CifarInterpretation.from_learner(learn)
    scores = interp.per_class()
    text = card.format(
        megabytes=(weights/'best.safetensors').stat().st_size/1e6, n_params=summary['n_params'], recipe=settings['recipe'], settings=', '.join(f'`{name}` {settings[name]}' for name in recipes[settings['recipe']]),
        **summary['bounds'], peak_epoch=settings['peak_epoch'], epochs=settings['epochs'], device=summary['device'] if summary['device'] != 'cpu' else f"{summary['environment']['cores']} cores of {summary['environment']['processor']}",
        precision=summary["precision"], seed=summary['seed'], accuracy=interp.accuracy, confidence=float(interp.probs.max(dim=1).values.mean()), flipped=interp.flip_averaged().accuracy, run_accuracy=summary['accuracy'],
        per_class=table(['class', 'recall', 'precision'], [[name, f'{row.recall:.1%}', f'{row.precision:.1%}'] for name, row in scores.iterrows()]),
        confused=', '.join(f'{actual} taken for {predicted} ({n})' for actual, predicted, n in interp.most_confused()[:4]))
    (weights/'README.md').write_text(text, encoding='utf-8')
    print(f'{interp.accuracy:.2%} by the file that ships, {summary["accuracy"]:.2%} by the run')


if __name__ == '__main__': main(*sys.argv[1:])
