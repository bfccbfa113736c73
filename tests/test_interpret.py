"""What the network gets wrong: one run of the model, and every answer against scikit-learn or NumPy."""
import json, re, shutil
from functools import partial
from operator import itemgetter
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BaseLoss, FocalLoss
from fastai.vision.all import (CrossEntropyLossFlat, DataBlock, DataLoaders, Datasets, F1Score, FocalLossFlat,
                               ImageBlock, ImageDataLoaders, LabelSmoothingCrossEntropy,
                               LabelSmoothingCrossEntropyFlat, Learner, MSELossFlat, MultiCategoryBlock, Perplexity,
                               ProgressCallback, RegressionBlock, Resize, RocAuc, accuracy, error_rate, set_seed, top_k_accuracy)
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix, f1_score, precision_score, recall_score
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import SubsetRandomSampler, TensorDataset

from cifar_fastai.core import recipes
from cifar_fastai.models import CustomResNet
from cifar_fastai.run.folder import learner_from_run, load_run
from cifar_fastai.look.plots import plot_classes, plot_history, plot_images, plot_lrs, save_figure
from cifar_fastai.look.interpret import CifarInterpretation, class_probabilities
from cifar_fastai.data.inspect import first_images
from cifar_fastai.callback.checkpoint import save_weights
from cifar_fastai.learner import cifar_learner
from cifar_fastai.callback.schedule import OneCycle, bounds_from, plot_range_test
from cifar_fastai.run.folder import read_history


@pytest.fixture(scope='module')
def learn(tiny_learner):
    "A learner that is right about some images and wrong about others"
    learn = tiny_learner()
    learn.fit(12, .02)
    return learn

@pytest.fixture(scope='module')
def interp(learn): return CifarInterpretation.from_learner(learn)

@pytest.fixture(scope='module')
def predicted(learn, small):
    "(labels, predicted labels, probabilities) of the validation images, by a plain pass of the model"
    with torch.no_grad(): probs = torch.cat([learn.model.eval()(x).softmax(1) for x, _ in learn.dls.valid])
    targs, decoded = small.test_y, probs.argmax(1).numpy()
    assert 8 < (targs != decoded).sum() < 36 and len(set(decoded)) > 5 # else the tests of this file say little
    return targs, decoded, probs.numpy()

# ---- one run of the model

@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # fastai hands matplotlib a tensor
def test_the_model_runs_once_for_all_questions(learn):
    batches = []
    hook = learn.model.register_forward_hook(lambda m, x, out: batches.append(len(out)))
    interp = CifarInterpretation.from_learner(learn)
    assert batches == [16, 16, 8]
    interp.accuracy, interp.n_wrong, interp.per_class(), interp.confusion_matrix(), interp.most_confused(), interp.misclassified(), interp.top_losses(5)
    interp.print_classification_report(); interp.plot_misclassified(9); interp.plot_confusion_matrix(); interp.plot_confusion_matrix(normalize=True)
    interp.plot_top_losses(4, figsize=(4, 4)); interp[[1, 2]]
    hook.remove()
    assert batches == [16, 16, 8]

def test_flip_averaging_is_the_mean_of_the_logits_of_both_sides(interp, learn, predicted):
    with torch.no_grad(): logits = torch.cat([learn.model(x) + learn.model(x.flip(-1)) for x, _ in learn.dls.valid])/2
    both = interp.flip_averaged()
    assert torch.allclose(both.probs, logits.softmax(1), atol=1e-5) and torch.equal(both.targs, interp.targs)
    assert torch.allclose(both.losses, torch.nn.functional.cross_entropy(logits, interp.targs, reduction='none'), atol=1e-4)
    assert not torch.equal(both.probs, interp.probs) and both.accuracy == pytest.approx((logits.argmax(1) == interp.targs).float().mean().item())

# ---- kept and read again

def test_predictions_come_back_from_a_file_and_answer_the_same(interp, learn, tmp_path):
    again = CifarInterpretation.from_predictions(interp.save_predictions(tmp_path/'p.safetensors'), learn.dls.valid)
    assert torch.equal(again.probs, interp.probs) and again.misclassified() == interp.misclassified() and again.most_confused() == interp.most_confused()
    again.plot_misclassified(4); again.plot_confusion_matrix()
    with pytest.raises(ValueError, match='network'): again.flip_averaged()

def test_predictions_of_other_images_are_refused(interp, learn, tmp_path):
    path = interp.save_predictions(tmp_path/'p.safetensors')
    with pytest.raises(ValueError, match=r'\b40\b.*\b80\b'): CifarInterpretation.from_predictions(path, learn.dls.train)

@pytest.mark.parametrize('content', [b'', b'no predictions', bytes(100), None])
def test_a_file_without_predictions_is_refused_by_name(learn, tmp_path, content):
    path = tmp_path/'p.safetensors'
    if content is None: save_weights(learn.model, path)
    else: path.write_bytes(content)
    with pytest.raises(ValueError, match=r'p\.safetensors'): CifarInterpretation.from_predictions(path, learn.dls.valid)

def test_a_missing_file_of_predictions_is_refused_by_name(learn):
    with pytest.raises(FileNotFoundError, match=r'nothing\.safetensors'):
        CifarInterpretation.from_predictions('nothing.safetensors', learn.dls.valid)

# ---- the answers

def test_probabilities_and_labels_are_those_of_a_plain_pass(interp, predicted):
    targs, decoded, probs = predicted
    assert np.allclose(interp.probs, probs, atol=1e-5)
    assert (interp.targs.numpy() == targs).all() and (interp.decoded.numpy() == decoded).all()
    assert np.allclose(interp.losses, -np.log(probs[range(40), targs]), atol=1e-4)

def test_accuracy_and_wrong_predictions_are_counted(interp, predicted):
    targs, decoded, _ = predicted
    assert interp.accuracy == pytest.approx(accuracy_score(targs, decoded)) and type(interp.accuracy) is float
    assert interp.n_wrong == (targs != decoded).sum() and type(interp.n_wrong) is int

def test_precision_and_recall_of_each_class_are_scikit_learns(interp, predicted, small):
    targs, decoded, _ = predicted
    table = interp.per_class()
    assert list(table.index) == small.vocab
    for name, score in dict(precision=precision_score, recall=recall_score, f1=f1_score).items():
        expected = score(targs, decoded, average=None, labels=range(10), zero_division=np.nan)
        if name == 'f1': expected[~np.isin(range(10), decoded)] = np.nan # as their precision
        assert np.allclose(table[name], expected, equal_nan=True)
    assert table['images'].tolist() == np.bincount(targs, minlength=10).tolist() == [4]*10

def test_scores_that_are_undefined_are_nan():
    "Class b is never predicted, c has no images, and d neither"
    targs, decoded = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0])
    table = CifarInterpretation(None, SimpleNamespace(vocab=list('abcd')), torch.eye(4)[decoded], targs, torch.zeros(3)).per_class()
    assert table['precision'].fillna(-1).tolist() == [.5, -1, 0, -1] and table['recall'].fillna(-1).tolist() == [.5, 0, -1, -1]
    assert table['f1'].fillna(-1).tolist() == [.5, -1, -1, -1] and table['images'].tolist() == [2, 1, 0, 0]

def test_the_confusion_matrix_is_scikit_learns(interp, predicted):
    targs, decoded, _ = predicted
    matrix = interp.confusion_matrix()
    assert (matrix == confusion_matrix(targs, decoded, labels=range(10))).all()
    assert matrix.sum() == 40 and np.trace(matrix) == 40 - interp.n_wrong

def test_the_most_confused_are_the_largest_off_the_diagonal(interp, predicted, small):
    targs, decoded, _ = predicted
    pairs = {}
    for t, d in zip(targs, decoded):
        if t != d: pairs[small.vocab[t], small.vocab[d]] = pairs.get((small.vocab[t], small.vocab[d]), 0) + 1
    found = interp.most_confused()
    assert {(a, p): n for a, p, n in found} == pairs
    assert [n for *_, n in found] == sorted(pairs.values(), reverse=True)
    assert all(n >= 2 for *_, n in interp.most_confused(2))

def test_the_misclassified_begin_with_the_most_confident(interp, predicted, small):
    targs, decoded, probs = predicted
    wrong = [(i, small.vocab[targs[i]], small.vocab[decoded[i]], probs[i].max()) for i in np.flatnonzero(targs != decoded)]
    found = interp.misclassified()
    assert [m[:3] for m in found] == [w[:3] for w in sorted(wrong, key=itemgetter(3), reverse=True)]
    assert [m.probability for m in found] == pytest.approx(sorted(map(itemgetter(3), wrong), reverse=True), abs=1e-5)
    assert all(m.actual != m.predicted for m in found)
    assert interp.misclassified(3) == found[:3]

def test_the_report_is_scikit_learns(interp, predicted, small, capsys):
    targs, decoded, _ = predicted
    interp.print_classification_report()
    assert capsys.readouterr().out.strip() == classification_report(targs, decoded, labels=range(10), target_names=small.vocab, zero_division=0).strip()

def test_another_dataloader_can_be_interpreted(learn, small):
    interp = CifarInterpretation.from_learner(learn, dl=learn.dls.test_dl(learn.dls.valid_ds.items[:12], with_labels=True, num_workers=0))
    assert interp.targs.tolist() == small.test_y[:12].tolist() and interp.confusion_matrix().sum() == 12

def test_the_training_images_can_be_interpreted(learn, small):
    interp = CifarInterpretation.from_learner(learn, ds_idx=0)
    assert interp.targs.tolist() == small.train_y.tolist()
    assert (interp.image(7) == small.train_x[7]).all()

def test_interpreting_changes_neither_model_nor_history(learn):
    weights, history = {k: v.clone() for k, v in learn.model.state_dict().items()}, [dict(row) for row in learn.recorder.history]
    CifarInterpretation.from_learner(learn)
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    assert learn.recorder.history == history

# ---- pictures

def pictures(fig): return [np.asarray(image.get_array()) for ax in fig.axes for image in ax.images]

def test_an_image_is_the_one_that_was_loaded(interp, small):
    for i in (0, 17, 39): assert interp.image(i).dtype == np.uint8 and (interp.image(i) == small.test_x[i]).all()

def test_items_are_given_as_the_model_saw_them(interp, predicted, small):
    inputs, probs, targs, decoded, losses = interp[[3, 30]]
    mean, std = map(np.array, small.stats)
    assert np.allclose(inputs[0], ((small.test_x[[3, 30]]/255 - mean)/std).transpose(0, 3, 1, 2), atol=1e-5)
    assert targs.tolist() == small.test_y[[3, 30]].tolist() and torch.equal(losses, interp.losses[[3, 30]])

@pytest.mark.parametrize('k', [1, 7, 25])
def test_the_misclassified_are_shown_the_right_way_round_with_their_titles(interp, small, k):
    fig = interp.plot_misclassified(k)
    wrong = interp.misclassified(k)
    shown = pictures(fig)
    assert len(shown) == min(k, interp.n_wrong) == len(wrong)
    assert all((img == small.test_x[m.idx]).all() for img, m in zip(shown, wrong))
    [ax] = fig.axes
    for image, title, m in zip(ax.images, ax.texts, wrong, strict=True):
        assert all(word in title.get_text() for word in (m.actual, m.predicted, f'{m.probability:.0%}'))
        assert image.get_interpolation() == 'nearest'
    assert str(interp.n_wrong) in fig.get_suptitle()

def test_when_nothing_is_wrong_the_figure_is_empty(interp):
    interp = CifarInterpretation(interp.learn, interp.dl, torch.eye(10)[interp.targs], interp.targs, interp.losses)
    assert interp.n_wrong == 0 and interp.misclassified() == [] and pictures(interp.plot_misclassified(9)) == []

@pytest.mark.parametrize('normalize', [False, True])
def test_the_matrix_is_drawn_with_its_numbers(interp, small, normalize):
    fig = interp.plot_confusion_matrix(normalize=normalize)
    expected = interp.confusion_matrix()/(4 if normalize else 1)
    [drawn] = pictures(fig)
    assert np.allclose(drawn, expected)
    numbers = [t.get_text() for t in fig.axes[0].texts]
    assert numbers == [f'{n:.2f}' if normalize else f'{n:.0f}' for n in expected.ravel()]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == small.vocab
    assert (fig.axes[0].get_xlabel(), fig.axes[0].get_ylabel()) == ('Predicted', 'Actual')

def test_probabilities_are_those_of_evaluation_whatever_the_mode_of_the_network(small):
    set_seed(0)
    model, images = CustomResNet(width=16, dropout=.5).train(), small.test_x[:8]
    probs = class_probabilities(model, images, small.stats)
    assert torch.equal(probs, class_probabilities(model.train(), images, small.stats))
    assert torch.allclose(probs[:1], class_probabilities(model.train(), images[:1], small.stats), atol=1e-6) # no statistics of the batch

def test_images_are_drawn_in_rows_under_their_titles(small):
    fig = plot_images(small.test_x[:7], [f'number {i}' for i in range(7)], cols=3)
    assert all((a == b).all() for a, b in zip(pictures(fig), small.test_x[:7], strict=True))
    [ax] = fig.axes
    assert [t.get_text() for t in ax.texts] == [f'number {i}' for i in range(7)]
    centres = np.array([np.array(image.get_extent()).reshape(2, 2).mean(axis=1) for image in ax.images])
    assert len(np.unique(centres[:, 0].round(6))) == len(np.unique(centres[:, 1].round(6))) == 3 # columns and rows
    assert np.allclose(centres[:, 0], [t.get_position()[0] for t in ax.texts])

def test_an_image_that_is_not_square_is_not_stretched():
    [image] = plot_images([np.zeros((20, 50, 3), np.uint8)], ['wide']).axes[0].images
    left, right, bottom, top = image.get_extent()
    assert (right - left)/(bottom - top) == pytest.approx(2.5)

def test_sample_images_are_drawn_a_class_a_row(small):
    fig = plot_classes(small.train_x, small.train_y, small.vocab, n=5)
    shown = np.stack(pictures(fig)).reshape(10, 5, 32, 32, 3)
    for label in range(10): assert (shown[label] == small.train_x[small.train_y == label][:5]).all()
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == small.vocab

def test_a_class_with_few_images_has_a_short_row(small): assert len(pictures(plot_classes(small.test_x, small.test_y, small.vocab, n=6))) == 40

def test_the_curves_are_those_of_the_history(learn):
    fig = plot_history(learn.recorder.history)
    names = [('train_loss', 'valid_loss'), ('train_accuracy', 'accuracy')]
    for ax, columns in zip(fig.axes, names):
        assert [line.get_xdata().tolist() for line in ax.lines] == [list(range(1, 13))]*2
        assert [line.get_ydata().tolist() for line in ax.lines] == [[row[c] for row in learn.recorder.history] for c in columns]

def test_the_rates_are_drawn_over_steps_and_epochs(tiny_learner):
    learn = tiny_learner()
    learn.fit(2, cbs=OneCycle(.001, .01))
    ax = plot_lrs(learn.recorder.lrs, 5)
    assert ax.lines[0].get_ydata().tolist() == learn.recorder.lrs
    assert [child.get_xlabel() for child in ax.child_axes] == ['epoch']

def test_a_plot_is_drawn_where_it_is_told():
    _, ax = plt.subplots()
    assert plot_lrs([.1, .2], ax=ax) is ax

# ---- a run folder

@pytest.fixture
def run(finished, tmp_path): # a copy that a test may damage
    return shutil.copytree(finished[0], tmp_path/'run')

@pytest.mark.parametrize('weights', ['last', 'best'])
def test_a_run_is_interpreted_as_its_learner_was(finished, weights):
    folder, summary = finished
    interp = CifarInterpretation.from_run(folder, weights=weights)
    assert interp.accuracy == pytest.approx(summary['accuracy' if weights == 'last' else 'best_accuracy'])
    if weights == 'last': assert interp.n_wrong == summary['n_wrong']

def test_from_run_equals_from_learner(settings, tmp_path, tiny_learner, finished):
    learn = learner_from_run(finished[0])
    fresh = CifarInterpretation.from_learner(cifar_learner(learn.dls, load_run(finished[0])[0], 'fp32').remove_cbs(ProgressCallback))
    assert torch.allclose(CifarInterpretation.from_run(finished[0]).probs, fresh.probs, atol=1e-6)

def test_the_network_of_a_run_is_on_the_processor_and_ready(finished):
    model, config = load_run(finished[0])
    assert not model.training and {p.device.type for p in model.parameters()} == {'cpu'} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert config['data']['n_train'] == 80

@pytest.mark.parametrize('recipe', ['baseline', 'best'])
def test_the_learner_of_a_run_is_as_its_settings_say(settings, tmp_path, recipe):
    from cifar_fastai.run.train import train
    train(settings(recipe=recipe, ghost=None, epochs=1, wd=.1, betas=(.8, .9), out=str(tmp_path/'run')))
    learn = learner_from_run(tmp_path/'run')
    learn.create_opt()
    assert learn.recipe == recipes[recipe]
    assert [f.aug.flip for f in learn.dls.train.after_item.fs if hasattr(f, 'aug')] == [dict(baseline='random', best='alternate')[recipe]]
    assert (learn.opt.hypers[0]['wd'], learn.opt.hypers[0]['mom'], learn.loss_func.func.label_smoothing) == (.1, .8, dict(baseline=0, best=.2)[recipe])

def test_a_run_keeps_the_scale_of_its_logits(settings, tmp_path):
    from cifar_fastai.run.train import train
    summary = train(settings(logit_scale=.125, whiten=True, epochs=1, out=str(tmp_path/'run')))
    interp = CifarInterpretation.from_run(tmp_path/'run')
    assert interp.learn.model.logit_scale == .125 and interp.n_wrong == summary['n_wrong']
    assert torch.equal(interp.probs, load_file(tmp_path/'run/predictions.safetensors')['probs'])

def test_the_data_of_a_run_can_be_elsewhere(run, small_folder):
    config = json.loads((run/'config.json').read_text())
    config['settings']['data'] = '/moved/away'
    (run/'config.json').write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match='/moved/away'): CifarInterpretation.from_run(run)
    assert len(CifarInterpretation.from_run(run, data=small_folder).targs) == 40

def test_data_of_other_classes_is_refused(finished):
    with pytest.raises(ValueError, match=r'classes.*\bairplane, .*\b0, 1,'):
        CifarInterpretation.from_run(finished[0], data='digits')

def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path/'nothing'))): load_run(tmp_path/'nothing')
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))): load_run(tmp_path)

def test_unknown_weights_are_refused(finished):
    with pytest.raises(ValueError, match="weights.*'first'.*'last'.*'best'"): load_run(finished[0], 'first')

@pytest.mark.parametrize('name', ['model.safetensors', 'best.safetensors'])
def test_missing_weights_are_refused_by_name(run, name):
    (run/name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load_run(run, 'last' if name == 'model.safetensors' else 'best')

def damaged_config(run, change):
    config = json.loads((run/'config.json').read_text())
    change(config)
    (run/'config.json').write_text(json.dumps(config))

changes = {'no settings': lambda c: c.pop('settings'), 'no data': lambda c: c.pop('data'), 'no classes': lambda c: c['data'].pop('vocab'), 'no stats': lambda c: c['data'].pop('stats'),
           'settings of another version': lambda c: c['settings'].update(colour='red'), 'settings out of range': lambda c: c['settings'].update(epochs=0),
           'settings of another type': lambda c: c['settings'].update(dropout='much'), 'settings that are none': lambda c: c.update(settings=3), 'data that is none': lambda c: c.update(data=[]),
           'another network': lambda c: c['settings'].update(conv_bias=True)}

@pytest.mark.parametrize('change', changes)
def test_a_damaged_run_is_refused_with_one_sentence(run, change):
    damaged_config(run, changes[change])
    with pytest.raises(ValueError) as e: CifarInterpretation.from_run(run)
    assert '\n' not in str(e.value)

def test_a_history_is_read_back(finished):
    history = read_history(finished[0])
    assert isinstance(history, pd.DataFrame) and history['epoch'].tolist() == [1, 2]

@pytest.mark.parametrize('content', ['', 'epoch,loss\n1,2\n', '{}', 'a,b\n1,2,3\n4,5,6,7\n'])
def test_what_is_no_history_is_refused_by_name(run, content):
    (run/'history.csv').write_text(content)
    with pytest.raises(ValueError, match=r'history\.csv'): read_history(run)

# ---- probabilities of single images

def test_class_probabilities_are_those_of_the_learner(finished, small):
    model, config = load_run(finished[0])
    probs = class_probabilities(model, small.test_x, config['data']['stats'])
    interp = CifarInterpretation.from_run(finished[0])
    by_bytes = {img.tobytes(): p for img, p in zip((interp.image(i) for i in range(40)), interp.probs)}
    assert torch.allclose(probs, torch.stack([by_bytes[x.tobytes()] for x in small.test_x]), atol=1e-4)
    assert torch.allclose(probs.sum(1), torch.ones(40)) and probs.dtype == torch.float32

@pytest.mark.parametrize('size, most', [(32, 500), (64, 125)])
def test_larger_images_pass_in_smaller_groups(size, most):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.passes = nn.Linear(3, 2), []
        def forward(self, x):
            self.passes.append(len(x))
            return self.fc(x.mean(dim=(2, 3)))
    model, images = Counting(), np.zeros((most + 1, size, size, 3), np.uint8)
    assert class_probabilities(model, images, ((.5,)*3, (.5,)*3)).shape == (most + 1, 2) and model.passes == [most, 1]

# ---- losses, metrics and data from elsewhere

class LogOfProbabilities(nn.Module):
    "A loss for models that end in a softmax"
    reduction = 'mean'
    def forward(self, probs, targs): return F.nll_loss(probs.log(), targs, reduction=self.reduction)

class FirstOutput(nn.Module):
    "A head that gives the first class of the first image of each batch another output"
    def __init__(self, value): super().__init__(); self.value = value
    def forward(self, x): return torch.where(torch.arange(x.numel()).reshape(x.shape) == 0, self.value, x)

class Rounded(nn.Module):
    def forward(self, x): return (3*x).bfloat16()

of_logits = [CrossEntropyLossFlat(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.1), F.cross_entropy,
             FocalLoss(), FocalLossFlat(), LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropyFlat()]
of_logarithms = [nn.NLLLoss(), F.nll_loss, BaseLoss(nn.NLLLoss)]
pairs = [(loss, nn.Identity()) for loss in of_logits] + [(loss, nn.LogSoftmax(dim=1)) for loss in of_logarithms]
pairs += [(LogOfProbabilities(), nn.Softmax(dim=1))]
losses_and_heads = [pytest.param(loss, head, id=getattr(loss, '__name__', repr(loss))) for loss, head in pairs]

def with_loss(learn, loss_func, head, dls=None):
    "A learner of the same network with another loss, and with what that wants at the end of the network"
    own = cifar_learner(dls or learn.dls, nn.Sequential(*learn.model, head), 'fp32', loss_func=loss_func)
    return own.remove_cbs(ProgressCallback)

def test_outputs_that_are_nan_are_refused_and_infinite_logits_are_not(learn, predicted):
    with pytest.raises(ValueError, match='nan'): CifarInterpretation.from_learner(with_loss(learn, CrossEntropyLossFlat(), FirstOutput(torch.nan)))
    with pytest.raises(ValueError, match='act'): CifarInterpretation.from_learner(learn, act=lambda outputs: torch.nan*outputs)
    probs = CifarInterpretation.from_learner(with_loss(learn, CrossEntropyLossFlat(), FirstOutput(-torch.inf))).probs
    others = np.arange(40) % 16 != 0
    assert (probs[~others, 0] == 0).all() and np.allclose(probs[others], predicted[2][others], atol=1e-5)

def test_rounded_outputs_become_probabilities_once(learn, predicted):
    probs, logits = CifarInterpretation.from_learner(with_loss(learn, CrossEntropyLossFlat(), Rounded())).probs, np.log(predicted[2])
    expected = torch.from_numpy(3*logits).softmax(dim=1)
    assert probs.dtype == torch.float32 and torch.allclose(probs.double(), expected.double(), atol=.03) and probs.max() > .9

@pytest.mark.parametrize('loss_func, head', losses_and_heads)
def test_probabilities_are_those_of_the_network_whatever_the_loss(learn, predicted, loss_func, head):
    targs, decoded, probs = predicted
    own = with_loss(learn, loss_func, head)
    interp = CifarInterpretation.from_learner(own)
    assert np.allclose(interp.probs, probs, atol=1e-5) and (interp.decoded.numpy() == decoded).all()
    plain = [[t.as_subclass(torch.Tensor) for t in batch] for batch in own.dls.valid]
    with own.loss_not_reduced(), torch.no_grad():
        expected = torch.cat([own.loss_func(own.model.eval()(x), y) for x, y in plain])
    assert torch.allclose(interp.losses, expected, atol=1e-5)
    assert all(0 <= m.probability <= 1 for m in interp.misclassified())
    interp.plot_misclassified(4)

@pytest.mark.parametrize('loss_func, head', losses_and_heads)
def test_flip_averaging_is_the_same_whatever_the_loss(learn, loss_func, head):
    own, model = with_loss(learn, loss_func, head), learn.model.eval()
    with torch.no_grad(): logits = torch.cat([model(x) + model(x.flip(-1)) for x, _ in learn.dls.valid])/2
    both = CifarInterpretation.from_learner(own).flip_averaged()
    assert torch.allclose(both.probs, logits.softmax(1), atol=1e-5)
    given = logits.softmax(1) if isinstance(head, nn.Softmax) else logits.log_softmax(1)
    with own.loss_not_reduced(): expected = own.loss_func(given, both.targs)
    assert torch.allclose(both.losses, expected, atol=1e-4)

def test_cross_entropy_takes_logits_even_if_they_look_like_probabilities(learn, predicted):
    interp = CifarInterpretation.from_learner(with_loss(learn, nn.CrossEntropyLoss(), nn.Softmax(dim=1)))
    assert np.allclose(interp.probs, torch.from_numpy(predicted[2]).softmax(1), atol=1e-5)

def test_an_activation_can_be_given(learn, predicted):
    make = lambda act: CifarInterpretation.from_learner(with_loss(learn, nn.CrossEntropyLoss(), nn.Identity()), act=act)
    assert np.allclose(make(partial(torch.softmax, dim=1)).probs, predicted[2], atol=1e-5)
    assert torch.equal(make(partial(torch.softmax, dim=1)).flip_averaged().probs, make(None).flip_averaged().probs)
    assert (make(torch.sigmoid).decoded.numpy() == predicted[1]).all()
    with pytest.raises(ValueError, match='act'): make(torch.sigmoid).flip_averaged()
    for act in (partial(torch.log_softmax, dim=1), lambda x: x, lambda x: x.argmax(dim=1)):
        with pytest.raises(ValueError, match='act'): make(act)

class Named(TensorDataset):
    "Tensors with names of the classes"
    vocab = ['cat', 'dog', 'owl']

def small_tensors(small, cls=TensorDataset, n_classes=3, split='test'):
    x, y = (small.test_x, small.test_y) if split == 'test' else (small.train_x, small.train_y)
    return cls(torch.from_numpy(x[y < n_classes]).permute(0, 3, 1, 2)/255, torch.from_numpy(y[y < n_classes]))

def test_a_list_of_names_is_not_taken_apart(small, tiny_net, tmp_path):
    sets = (small_tensors(small, Named, split=split) for split in ('train', 'test'))
    dls = DataLoaders.from_dsets(*sets, bs=8, num_workers=0)
    interp = CifarInterpretation.from_learner(cifar_learner(dls, tiny_net(3), 'fp32').remove_cbs(ProgressCallback))
    path = interp.save_predictions(tmp_path/'p.safetensors')
    again = CifarInterpretation.from_predictions(path, SimpleNamespace(n=12, vocab=Named.vocab))
    for i in (interp, again, CifarInterpretation.from_predictions(path, dls.valid)):
        assert list(i.vocab) == Named.vocab and list(i.per_class().index) == Named.vocab
        assert i.confusion_matrix().shape == (3, 3)
        assert {m.actual for m in i.misclassified()} <= set(Named.vocab)
        assert [t.get_text() for t in i.plot_confusion_matrix().axes[0].get_yticklabels()] == Named.vocab

def test_names_come_from_the_learner_where_the_data_set_has_none(small, tiny_net):
    dls = DataLoaders.from_dsets(small_tensors(small, split='train'), small_tensors(small), bs=8, num_workers=0)
    learn = cifar_learner(dls, tiny_net(4), 'fp32').remove_cbs(ProgressCallback)
    assert list(CifarInterpretation.from_learner(learn).vocab) == ['0', '1', '2', '3']
    dls.vocab = Named.vocab
    assert list(CifarInterpretation.from_learner(learn).vocab) == ['cat', 'dog', 'owl', '3']

@pytest.mark.parametrize('ds_idx', [0, 1])
def test_loaders_of_torch_are_interpreted_in_the_order_of_their_data(small, tiny_net, ds_idx):
    train, valid = small_tensors(small, split='train'), small_tensors(small)
    dls = DataLoaders(TorchDataLoader(train, 7, shuffle=True), TorchDataLoader(valid, 5))
    learn = cifar_learner(dls, tiny_net(3), 'fp32').remove_cbs(ProgressCallback)
    for kwargs in (dict(ds_idx=ds_idx), dict(dl=dls[ds_idx])):
        interp = CifarInterpretation.from_learner(learn, **kwargs)
        x, y = (train, valid)[ds_idx].tensors
        with torch.no_grad(): assert torch.allclose(interp.probs, learn.model.eval()(x).softmax(1), atol=1e-5)
        assert torch.equal(interp.targs, y) and torch.equal(interp[[2, 3]][0][0], x[[2, 3]])
        assert (interp.image(3) == (small.train_x, small.test_x)[ds_idx][3]).all()
        interp.plot_misclassified(4); interp.plot_confusion_matrix()
        interp.flip_averaged(); interp.print_classification_report()

def test_a_part_of_the_data_that_torch_samples_is_all_that_is_interpreted(small, tiny_net):
    data = small_tensors(small, split='train')
    part = partial(TorchDataLoader, data, 4)
    dls = DataLoaders(part(sampler=SubsetRandomSampler(range(4, 24))), part(sampler=SubsetRandomSampler([3, 1, 2, 0])))
    interp = CifarInterpretation.from_learner(cifar_learner(dls, tiny_net(3), 'fp32').remove_cbs(ProgressCallback))
    assert torch.equal(interp.targs, data.tensors[1][:4]) and (interp.image(3) == small.train_x[3]).all()
    assert torch.equal(first_images(dls, 5), data.tensors[0][4:9]) # and no image of the others makes the whitening

@pytest.fixture
def mixed_sizes(small, tmp_path):
    "`DataLoaders` of pictures of several sizes, two of them grey"
    for label in range(3):
        (tmp_path/'pictures'/f'class {label}').mkdir(parents=True)
        for i, x in enumerate(small.train_x[small.train_y == label]):
            img = Image.fromarray(x).resize([(40, 30), (50, 60), (32, 32)][i % 3])
            (img.convert('L') if i == 5 else img).save(tmp_path/'pictures'/f'class {label}'/f'{i}.png')
    settings = dict(valid_pct=.5, seed=0, item_tfms=Resize(32), bs=4, num_workers=0)
    return ImageDataLoaders.from_folder(tmp_path/'pictures', **settings)

@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # fastai hands matplotlib a tensor
def test_pictures_of_several_sizes_are_shown_as_they_are(mixed_sizes, tiny_net):
    learn = cifar_learner(mixed_sizes, tiny_net(3), 'fp32').remove_cbs(ProgressCallback)
    interp = CifarInterpretation.from_learner(learn)
    shown, wrong = pictures(interp.plot_misclassified(9)), interp.misclassified(9)
    assert len({img.shape for img in shown}) > 1 and len(shown) == len(wrong)
    for img, m in zip(shown, wrong):
        assert (img == np.asarray(Image.open(mixed_sizes.valid_ds.items[m.idx]).convert('RGB'))).all()
    x = interp[list(range(4))][0][0]
    assert torch.allclose(x, next(iter(mixed_sizes.valid))[0]) # cut from the middle, as validation does
    interp.plot_top_losses(4, figsize=(4, 4)); interp.flip_averaged()

sevens = [np.full((5, 4), 7, np.uint8), np.full((5, 4, 1), 7, np.uint8), Image.fromarray(np.full((5, 4), 7, np.uint8)),
          torch.full((1, 5, 4), 7/255), torch.full((3, 5, 4), 7/255), torch.full((3, 5, 4), 7, dtype=torch.uint8)]

@pytest.mark.parametrize('x', sevens, ids=lambda x: f'{type(x).__name__} {getattr(x, "shape", "")}')
def test_a_picture_is_shown_whatever_holds_it(x):
    dl = SimpleNamespace(n=1, vocab=['a', 'b'], dataset=[(x, 0)])
    interp = CifarInterpretation(None, dl, torch.tensor([[.2, .8]]), torch.tensor([0]), torch.tensor([1.]))
    assert interp.image(0).dtype == np.uint8 and (interp.image(0) == np.full((5, 4, 3), 7)).all()
    assert len(pictures(interp.plot_misclassified(1))) == 1

def test_a_normalised_picture_is_scaled_to_be_seen():
    x = torch.linspace(-2, 3, 48).reshape(3, 4, 4)
    dl = SimpleNamespace(n=1, vocab=['a', 'b'], dataset=[(x, 0)])
    img = CifarInterpretation(None, dl, torch.tensor([[.2, .8]]), torch.tensor([0]), torch.tensor([1.])).image(0)
    assert (img.min(), img.max()) == (0, 255) and (np.diff(img.transpose(2, 0, 1).ravel().astype(int)) >= 0).all()

def test_two_classes(small, tiny_net):
    sets = (small_tensors(small, n_classes=2, split=split) for split in ('train', 'test'))
    dls = DataLoaders.from_dsets(*sets, bs=8, num_workers=0)
    dls.vocab = ['no', 'yes']
    interp = CifarInterpretation.from_learner(cifar_learner(dls, tiny_net(2), 'fp32').remove_cbs(ProgressCallback))
    assert interp.confusion_matrix().sum() == 8 and list(interp.per_class().index) == ['no', 'yes']
    interp.plot_confusion_matrix(); interp.plot_misclassified()
    interp.print_classification_report(); interp.flip_averaged()

def test_what_has_not_one_class_an_image_is_refused(small, tiny_net):
    several = MultiCategoryBlock(vocab=['a', 'b']), lambda i: ['a', 'b'][:i % 3], nn.BCEWithLogitsLoss()
    for block, target, loss in [several, (RegressionBlock(), lambda i: i/2, MSELossFlat())]:
        data = DataBlock((ImageBlock, block), get_x=lambda i: small.train_x[i], get_y=target)
        dls = data.dataloaders(range(20), bs=4, num_workers=0)
        net = tiny_net(2 if isinstance(loss, nn.Module) else 1)
        learn = Learner(dls, net, loss).remove_cbs(ProgressCallback)
        with pytest.raises(ValueError, match='class'): CifarInterpretation.from_learner(learn)

def test_one_output_for_two_classes_is_refused(small, tiny_net):
    dls = DataLoaders.from_dsets(small_tensors(small), small_tensors(small), bs=8, num_workers=0)
    loss = lambda x, y, reduction='mean': F.binary_cross_entropy_with_logits(x[:, 0], y.float(), reduction=reduction)
    with pytest.raises(ValueError, match=r'\bclass'):
        CifarInterpretation.from_learner(Learner(dls, tiny_net(1), loss).remove_cbs(ProgressCallback))

def test_missing_validation_images_are_said_to_be_missing(small, tiny_net):
    tensors = small_tensors(small)
    tfms, every = [[lambda i: tensors[i][0]], [lambda i: tensors[i][1]]], list(range(12))
    empty = Datasets(every, tfms, splits=(every, []))
    for dls in (DataLoaders.from_dsets(tensors, bs=4, num_workers=0), empty.dataloaders(bs=4, num_workers=0)):
        learn = cifar_learner(dls, tiny_net(3), 'fp32').remove_cbs(ProgressCallback)
        with pytest.raises(ValueError, match='validation'): CifarInterpretation.from_learner(learn)
        assert len(CifarInterpretation.from_learner(learn, ds_idx=0).targs) == 12

def test_a_learner_of_fastai_can_be_interpreted(learn, predicted):
    "Without anything of this package but the network"
    plain = Learner(learn.dls, learn.model, nn.CrossEntropyLoss(), metrics=error_rate).remove_cbs(ProgressCallback)
    assert np.allclose(CifarInterpretation.from_learner(plain).probs, predicted[2], atol=1e-5)

@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # fastai hands matplotlib a tensor
def test_training_images_of_the_best_recipe_can_be_looked_at(small, tiny_net):
    from cifar_fastai.data.block import cifar_dls
    for pipeline in ('batch', 'item'):
        dls = cifar_dls(small, bs=16, num_workers=0, pipeline=pipeline)
        learn = cifar_learner(dls, tiny_net(), 'fp32').remove_cbs(ProgressCallback)
        CifarInterpretation.from_learner(learn, ds_idx=0).plot_top_losses(4, figsize=(4, 4))

# ---- curves of other metrics

def top_2(preds, targs): return top_k_accuracy(preds, targs, k=2)

def counts(preds, targs): return torch.bincount(preds.argmax(dim=1), minlength=10) # no number

metric_lists = {'none': ([], []), 'error_rate': ([error_rate], ['error_rate']),
                'F1Score': ([F1Score(average='macro')], ['f1_score']), 'top k': ([top_2], ['top_2']),
                'partial': ([partial(top_k_accuracy, k=2)], ['top_k_accuracy']),
                'RocAuc': ([RocAuc()], ['roc_auc_score']), 'Perplexity': ([Perplexity()], ['perplexity']),
                'three': ([accuracy, error_rate, Perplexity()], ['accuracy', 'error_rate', 'perplexity'])}

@pytest.mark.parametrize('name', metric_lists)
def test_curves_are_drawn_of_whatever_was_measured(tiny_learner, name):
    metrics, names = metric_lists[name]
    learn = tiny_learner(metrics=metrics)
    learn.fit(2, .01)
    history = learn.recorder.history
    for rows in (history, pd.DataFrame(history), pd.DataFrame(history).drop(columns='epoch')):
        fig = plot_history(rows)
        assert [ax.get_ylabel() for ax in fig.axes] == ['loss', *names]
        for ax, columns in zip(fig.axes, [('train_loss', 'valid_loss'), *((f'train_{n}', n) for n in names)]):
            assert [line.get_ydata().tolist() for line in ax.lines] == [[row[c] for row in history] for c in columns]
            assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 2]]*2
            assert [t.get_text() for t in ax.get_legend().get_texts()] == ['training', 'validation']

def test_what_is_no_number_has_no_curve():
    counts = dict(train_counts=np.arange(3), counts=np.arange(3))
    row = dict(epoch=1, lr=.1, train_loss=2., valid_loss=None, accuracy=None, seconds=1.) | counts
    fig = plot_history([row, row | dict(epoch=2)])
    assert [ax.get_ylabel() for ax in fig.axes] == ['loss'] and len(fig.axes[0].lines) == 1

def test_curves_of_nothing_are_refused():
    with pytest.raises(ValueError, match='history'): plot_history([])

# ---- texts lie inside their pictures

def predictions(n, names=None, n_images=None, seed=0):
    "An interpretation of made-up predictions of `n` classes, which are mostly right"
    rng = np.random.default_rng(seed)
    targs = torch.from_numpy(rng.integers(0, n, n_images or 20*n))
    logits = torch.from_numpy(rng.normal(size=(len(targs), n)))
    logits[range(len(targs)), targs] += 3
    probs, img = logits.softmax(dim=1), Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    dl = SimpleNamespace(n=len(targs), vocab=names or [f'class {i}' for i in range(n)], dataset=[(img, 0)]*len(targs))
    return CifarInterpretation(None, dl, probs, targs, -probs[range(len(targs)), targs].log())

def long_names(n):
    where = 'southern', 'northern'
    return [f'a bird of the mountains, {where[i % 2]}, with a very long name, number {i}' for i in range(n)]

def assert_all_inside(fig):
    fig.canvas.draw() # layouts are made now
    box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()
    assert -.02 <= box.x0 < box.x1 <= width + .02 and -.02 <= box.y0 < box.y1 <= height + .02
    labels = [t for ax in fig.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts) if t.get_text()]
    for t in labels + [t for t in fig.texts if t.get_text()]:
        inner = t.get_window_extent()
        assert 0 <= inner.x0 and inner.x1 <= fig.bbox.x1 and 0 <= inner.y0 and inner.y1 <= fig.bbox.y1, t.get_text()

naming = pytest.mark.parametrize('names', [lambda n: None, long_names], ids=['short names', 'long names'])

@naming
@pytest.mark.parametrize('n, normalize', [(2, False), (10, False), (10, True), pytest.param(37, True, marks=pytest.mark.slow), pytest.param(100, False, marks=pytest.mark.slow)])
def test_the_whole_matrix_lies_inside_its_picture(n, normalize, names):
    fig = predictions(n, names(n)).plot_confusion_matrix(normalize=normalize)
    assert fig.axes[0].get_xlabel() == 'Predicted' and fig.axes[0].get_ylabel() == 'Actual'
    assert_all_inside(fig)

@pytest.mark.parametrize('n, normalize', [(2, False), (10, False), (10, True), (37, True), (100, False), (100, True)])
def test_numbers_are_left_out_where_they_do_not_fit(n, normalize):
    interp, shown = predictions(n), n < 100
    fig = interp.plot_confusion_matrix(normalize=normalize)
    fig.canvas.draw()
    texts = fig.axes[0].texts
    assert len(texts) == n**2*shown
    cell = np.diff(fig.axes[0].transData.transform([[0, 0], [1, 1]]), axis=0)[0]
    for t in texts[:n + 1]: assert (np.abs(cell) > [t.get_window_extent().width, t.get_window_extent().height]).all()
    counts = interp.confusion_matrix()
    assert np.allclose(pictures(fig)[0], counts/counts.sum(1, keepdims=True).clip(1) if normalize else counts)

def test_many_images_a_class_still_fit_into_their_cells():
    texts = predictions(10, n_images=300_000).plot_confusion_matrix().axes[0].texts
    assert len(texts) == 100
    for size in [(3, 3), (7, 6.5), (12, 5)]:
        fig = predictions(10, n_images=300_000).plot_confusion_matrix(figsize=size)
        assert tuple(fig.get_size_inches()) == size and len(fig.axes[0].texts) == (0 if size == (3, 3) else 100)
        assert_all_inside(fig)

def test_a_matrix_can_be_drawn_without_numbers():
    assert not predictions(10).plot_confusion_matrix(plot_txt=False).axes[0].texts

def test_a_class_without_images_has_no_shares():
    interp = predictions(3)
    interp = CifarInterpretation(None, interp.dl, interp.probs, interp.targs.clamp(max=1), interp.losses)
    assert (pictures(interp.plot_confusion_matrix(normalize=True))[0][2] == 0).all()

def test_names_that_are_shortened_keep_their_ends():
    labels = [t.get_text() for t in predictions(10, long_names(10)).plot_confusion_matrix().axes[0].get_yticklabels()]
    assert len(set(labels)) == 10
    assert all(label.startswith('a bird') and label.endswith(str(i)) for i, label in enumerate(labels))

@naming
@pytest.mark.parametrize('cols', [1, 5])
def test_captions_of_the_misclassified_lie_inside_the_picture_and_beside_each_other(names, cols):
    interp = predictions(10, names(10))
    fig = interp.plot_misclassified(10, cols)
    assert_all_inside(fig)
    titles = fig.axes[0].texts
    boxes = [t.get_window_extent() for t in titles]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for t, m in zip(titles, interp.misclassified(10), strict=True):
        assert t.get_text().replace('\n', ' ') == f'{m.actual} → {m.predicted} ({m.probability:.0%})'

@naming
def test_labels_of_the_classes_lie_inside_the_picture(small, names):
    assert_all_inside(plot_classes(small.train_x, small.train_y, names(10) or small.vocab, n=4))

def test_curves_and_rates_lie_inside_their_pictures(tiny_learner):
    learn = tiny_learner(metrics=[accuracy, Perplexity(), F1Score(average='macro')])
    learn.fit(2, cbs=OneCycle(1e-5, 2e-5))
    assert_all_inside(plot_history(learn.recorder.history))
    assert_all_inside(plot_lrs(learn.recorder.lrs, 5).figure)
    lrs = np.geomspace(1e-7, 10, 100)
    losses = np.r_[np.full(40, 2.3), np.linspace(2.3, .3, 50), np.geomspace(.3, 9, 10)]
    assert_all_inside(plot_range_test(lrs, losses, bounds_from(lrs, losses)).figure)

def test_zeros_are_written_up_to_fifteen_classes():
    for n in 15, 16, 30:
        interp = predictions(n)
        for normalize in False, True:
            texts = [t.get_text() for t in interp.plot_confusion_matrix(normalize=normalize).axes[0].texts]
            counts = interp.confusion_matrix().ravel()
            assert [bool(text) for text in texts] == [n < 16 or bool(count) for count in counts] and (counts == 0).any()

def test_the_title_of_a_normalised_matrix_says_so():
    interp = predictions(3)
    titles = [interp.plot_confusion_matrix(**kwargs).axes[0].get_title() for kwargs in (dict(), dict(normalize=True), dict(normalize=True, title='mine'))]
    assert 'normalised' not in titles[0] and 'normalised' in titles[1] and titles[2] == 'mine'

@pytest.mark.parametrize('n', [30, 100, 250])
def test_names_of_classes_are_legible_or_left_out(n):
    ax = predictions(n, n_images=2*n).plot_confusion_matrix().axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    if n <= 100: assert names == [f'class {i}' for i in range(n)] and min(t.get_fontsize() for t in ax.get_yticklabels()) >= 6
    else: assert not any(names) and str(n) in ax.get_xlabel() and str(n) in ax.get_ylabel()

def test_a_single_mistake_fills_its_picture():
    interp = predictions(3)
    one_wrong = interp.targs.clone()
    one_wrong[0] = (one_wrong[0] + 1) % 3
    interp = CifarInterpretation(None, interp.dl, torch.eye(3)[one_wrong], interp.targs, interp.losses)
    fig = interp.plot_misclassified(25)
    left, right, *_ = fig.axes[0].images[0].get_extent()
    assert interp.n_wrong == 1 and (right - left)/fig.get_figwidth() > .5
    assert_all_inside(fig)

def test_white_images_have_a_frame():
    white = np.full((4, 32, 32, 3), 255, np.uint8)
    for fig in (plot_images(white, list('abcd')), plot_classes(white, np.array([0, 0, 1, 1]), ['a', 'b'])):
        frames = [p.get_bbox().extents for p in fig.axes[0].patches if not p.get_fill()]
        left, right, bottom, top = np.transpose([image.get_extent() for image in fig.axes[0].images])
        assert np.allclose(sorted(map(tuple, frames)), sorted(zip(left, top, right, bottom)))

# ---- characters that the font lacks

script_a, unknown = '\U0001d49c', '\U000f0000' # a letter that STIXGeneral has, which comes with matplotlib; one that no font has

@pytest.mark.filterwarnings('error')
def test_no_warning_of_a_character_that_no_font_has(tmp_path):
    names = [f'{unknown} a', '\u685c', 'c']
    interp, x = predictions(3, names), np.zeros((3, 32, 32, 3), np.uint8)
    figures = interp.plot_misclassified(4), interp.plot_confusion_matrix(), plot_images(x, names), plot_classes(x, np.arange(3), names)
    for i, fig in enumerate(figures): save_figure(fig, tmp_path/f'{i}.png')

def test_a_character_is_drawn_in_a_font_that_has_it():
    names, x = [script_a, 'b', 'c'], np.zeros((3, 32, 32, 3), np.uint8)
    with_it = [e.name for e in fontManager.ttflist if 'Last' not in e.name and FT2Font(e.fname).get_char_index(ord(script_a))]
    interp = predictions(3, names)
    texts = [*plot_images(x, names).axes[0].texts, *interp.plot_misclassified(4).axes[0].texts, *interp.plot_confusion_matrix().axes[0].get_yticklabels(), *plot_classes(x, np.arange(3), names).axes[0].get_yticklabels()]
    drawn = [t for t in texts if script_a in t.get_text()]
    assert len(drawn) > 3 and all(set(t.get_fontfamily()) & set(with_it) for t in drawn)
    assert plt.rcParams['font.family'] == plt.rcParamsDefault['font.family']

@pytest.mark.parametrize('plot', [lambda: plot_images([np.zeros((8, 8, 3), np.uint8)], ['é']), lambda: plot_classes(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)%2, ['é', 'b'])], ids=['images', 'classes'])
def test_what_a_first_figure_sets_is_kept(plot, monkeypatch):
    "It makes pyplot interactive in a notebook, which shows no further figure otherwise"
    subplots = plt.subplots
    def first(*args, **kwargs):
        plt.ion()
        return subplots(*args, **kwargs)
    monkeypatch.setattr(plt, 'subplots', first)
    with plt.ioff():
        plot()
        assert plt.isinteractive()
