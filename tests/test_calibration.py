"""Probabilities: measures against NumPy and scikit-learn, the temperature, and where it is applied."""
import math, re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import log_loss

from cifar_fastai.core import Recipe, TrainSettings, cifar10_classes, cifar10_stats, recipe_temperatures, recipes
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.data.images import CIFAR10Data, cifar10_fingerprint, first_of_each_class
from cifar_fastai.learner import cifar_learner
from cifar_fastai.look.calibration import apply_temperature, calibration, fit_temperature, log_probabilities, plot_reliability
from cifar_fastai.look.interpret import CifarInterpretation, class_probabilities
from cifar_fastai.look.page import read_run, run_predictions
from cifar_fastai.run.folder import load_run, read_summary, read_temperature
from cifar_fastai.models import load_pretrained
from cifar_fastai.run.train import changed_from_recipe, find_temperature, run_calibration, train
from cifar_fastai.use.predict import load_classifier

def draw(n=2000, classes=5, scale=1., seed=0): # -> (logits, labels): labels are drawn from the softmax of the logits, so scale 1 is calibrated
    g = torch.Generator().manual_seed(seed)
    logits = 2*torch.randn(n, classes, generator=g)
    targs = torch.multinomial(logits.softmax(dim=1), 1, generator=g).flatten()
    return scale*logits, targs

# ---- measures

def test_the_measures_follow_their_definitions():
    logits, targs = draw(scale=1.7)
    probs, y = logits.softmax(dim=1), targs.numpy()
    p = probs.double().numpy()
    p = p/p.sum(axis=1, keepdims=True)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    error = 0
    for k in range(15):
        inside = (confidence > k/15) & (confidence <= (k + 1)/15)
        if inside.any(): error += inside.mean()*abs(confidence[inside].mean() - right[inside].mean())
    one_hot = np.eye(5)[y]
    found = calibration(probs, targs)
    assert found.ece == pytest.approx(error, abs=1e-5)
    assert found.nll == pytest.approx(log_loss(y, p, labels=range(5)), abs=1e-5)
    assert found.brier == pytest.approx(((p - one_hot)**2).sum(axis=1).mean(), abs=1e-5)

@pytest.mark.parametrize('probs, expected', [([[1., 0], [0, 1]], (0, 0, 0)), ([[0., 1], [1, 0]], (1, -math.log(torch.finfo(torch.float32).tiny), 2)), ([[.5, .5]]*2, (0, math.log(2), .5))])
def test_the_measures_of_perfect_of_wrong_and_of_uniform_probabilities(probs, expected):
    assert tuple(calibration(torch.tensor(probs), torch.tensor([0, 1]))) == pytest.approx(expected, rel=1e-5, abs=1e-6)

@pytest.mark.parametrize('probs, targs', [(torch.ones(3, 2)/2, torch.zeros(2)), (torch.ones(3), torch.zeros(3)), (torch.ones(0, 2), torch.zeros(0))])
def test_shapes_that_do_not_fit_are_refused(probs, targs):
    for function in calibration, plot_reliability, fit_temperature:
        with pytest.raises(ValueError, match=r'shapes'): function(probs, targs)

def test_a_confidence_of_one_is_in_the_last_bin_and_rounding_above_one_changes_nothing():
    probs = torch.cat([torch.tensor([[1., 0]]).repeat(50, 1), torch.tensor([[.95, .05]]).repeat(50, 1)])
    targs = torch.tensor([0]*45 + [1]*5 + [0]*50)
    assert calibration(probs, targs).ece == pytest.approx(abs(.975 - .95), abs=1e-5)
    above = torch.cat([probs, torch.tensor([[1.0000002, 0]])])
    assert calibration(above, torch.cat([targs, torch.tensor([0])])).ece == pytest.approx((101*.024 + 0)/101, abs=2e-3)

def test_probabilities_that_do_not_sum_to_one_are_refused():
    probs, targs = torch.tensor([[.9, .8], [.7, .6]]), torch.tensor([0, 1])
    for function in calibration, plot_reliability:
        with pytest.raises(ValueError, match='1.3 to 1.7'): function(probs, targs)
    with pytest.raises(ValueError, match='1.3 to 1.7'): apply_temperature(probs, 2.)
    assert apply_temperature(probs, 1) is probs

def test_the_diagram_shows_accuracy_and_share_of_each_bin():
    logits, targs = draw(scale=2.)
    probs = logits.softmax(dim=1)
    above, below = plot_reliability(probs, targs, n_bins=10).axes
    confidence, decoded = probs.max(dim=1)
    for k, (accuracy, share) in enumerate(zip(above.containers[0], below.containers[0])):
        inside = (confidence >= k/10) & (confidence < (k + 1)/10) if k < 9 else confidence >= .9
        assert share.get_height() == pytest.approx(inside.float().mean().item())
        expected = (decoded == targs)[inside].float().mean().item() if inside.any() else 0
        assert accuracy.get_height() == pytest.approx(expected, abs=1e-6)
    assert f'{100*calibration(probs, targs, 10).ece:.1f}' in above.get_title()

# ---- temperature

@pytest.mark.parametrize('scale', [.3, 1., 4.])
def test_the_fitted_temperature_undoes_a_factor_of_calibrated_logits(scale):
    logits, targs = draw(20_000, scale=scale)
    assert fit_temperature(logits, targs) == pytest.approx(scale, rel=.05)

def test_no_other_temperature_has_a_lower_negative_log_likelihood():
    logits, targs = draw(500, scale=.4)
    best = fit_temperature(logits, targs)
    nll = lambda t: F.cross_entropy(logits.double()/t, targs).item()
    assert all(nll(best) <= nll(best*factor) for factor in (.5, .9, .99, 1.01, 1.1, 2))

def test_a_temperature_changes_no_class_and_one_changes_nothing():
    logits, targs = draw()
    probs = logits.softmax(dim=1)
    assert apply_temperature(probs, 1) is probs
    for t in .2, .7, 3.:
        assert torch.allclose(apply_temperature(probs, t), (logits/t).softmax(dim=1), atol=1e-5)
        assert torch.equal(apply_temperature(probs, t).argmax(dim=1), probs.argmax(dim=1))

@pytest.mark.parametrize('temperature', [0, -1., math.nan, math.inf, None, '1', True])
def test_a_temperature_must_be_a_positive_number(temperature):
    with pytest.raises(ValueError, match='temperature is'): apply_temperature(torch.ones(2, 2)/2, temperature)

def test_images_that_cannot_tell_a_temperature_are_refused():
    logits, targs = draw(300)
    with pytest.raises(ValueError, match='99'): fit_temperature(logits[:99], targs[:99])
    with pytest.raises(ValueError, match='300 of 300'): fit_temperature(logits, logits.argmax(dim=1))
    with pytest.raises(ValueError, match='0 of 300'): fit_temperature(logits, logits.argmin(dim=1))
    with pytest.raises(ValueError, match='finite'): fit_temperature(logits.log(), targs)

# ---- interpretation

@pytest.fixture(scope='module')
def learn(tiny_learner):
    learn = tiny_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    return learn

def test_an_interpretation_keeps_classes_losses_and_raw_probabilities(learn, tmp_path):
    interp = CifarInterpretation.from_learner(learn)
    other = interp.calibrated(.5)
    assert torch.equal(other.decoded, interp.decoded) and torch.equal(other.losses, interp.losses) and other.accuracy == interp.accuracy
    assert torch.equal(other.raw_probs, interp.probs) and torch.allclose(other.probs, apply_temperature(interp.probs, .5))
    assert other.calibration() == calibration(other.probs, other.targs) and torch.equal(other.calibrated(1.).probs, interp.probs)
    assert torch.equal(CifarInterpretation.from_learner(learn, temperature=.5).probs, other.probs)
    path = other.save_predictions(tmp_path/'p.safetensors')
    assert torch.equal(load_file(path)['probs'], interp.probs)
    assert torch.equal(CifarInterpretation.from_predictions(path, learn.dls.valid, .5).probs, other.probs)

def test_test_time_augmentation_keeps_the_temperature_and_the_losses_of_the_network(learn):
    plain = CifarInterpretation.from_learner(learn).flip_averaged()
    cooler = CifarInterpretation.from_learner(learn, temperature=.5).flip_averaged()
    assert torch.equal(cooler.losses, plain.losses) and torch.equal(cooler.decoded, plain.decoded)
    assert torch.allclose(cooler.probs, apply_temperature(plain.probs, .5), atol=1e-6)

# ---- runs

@pytest.fixture(scope='module')
def held_out(digits, tmp_path_factory):
    "A run on the digits that was validated on held-out training images"
    run = tmp_path_factory.mktemp('runs')/'holdout'
    train(TrainSettings('digits', epochs=3, bs=64, valid='holdout', width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(run)))
    return run

def test_a_run_with_a_hold_out_fits_its_temperature_on_it(held_out):
    kept = load_file(held_out/'predictions.safetensors')
    found = read_summary(held_out)['calibration']
    assert found['temperature'] == read_temperature(held_out) == pytest.approx(fit_temperature(kept['probs'].log(), kept['targs']), rel=1e-6)
    assert found['temperature'] != 1 and found['nll'] < found['uncalibrated']['nll']
    assert found['uncalibrated'] == pytest.approx(calibration(kept['probs'], kept['targs'])._asdict(), rel=1e-5)

def test_every_reader_of_a_run_applies_its_temperature(held_out, digits):
    t, kept = read_temperature(held_out), load_file(held_out/'predictions.safetensors')
    expected = apply_temperature(kept['probs'], t)
    assert torch.allclose(run_predictions(read_run(held_out)).probs, expected, atol=1e-6)
    interp = CifarInterpretation.from_run(held_out)
    assert interp.temperature == t and torch.allclose(interp.probs, expected, atol=1e-3)
    classify, _ = load_classifier(held_out)
    model, config = load_run(held_out)
    images, raw = digits.test_x[:20], class_probabilities(model, digits.test_x[:20], config['data']['stats'])
    assert np.allclose(classify(images), apply_temperature(raw, t), atol=1e-5)

def test_the_best_weights_have_the_temperature_only_if_they_are_the_last(held_out, tmp_path):
    import shutil
    run = shutil.copytree(held_out, tmp_path/'run')
    for best_epoch, expected in ((3, read_temperature(run)), (1, 1)):
        write_json(run/'summary.json', read_json(run/'summary.json') | dict(best_epoch=best_epoch))
        assert read_temperature(run, 'best') == expected and read_temperature(run) != 1

def test_an_export_contains_the_temperature(held_out, digits, tmp_path):
    from cifar_fastai.use.export import ImagesToProbabilities
    model, config = load_run(held_out)
    stats, images = config['data']['stats'], torch.from_numpy(digits.test_x[:20])
    net = ImagesToProbabilities(model, stats, .5)
    assert torch.allclose(net(images), apply_temperature(ImagesToProbabilities(model, stats)(images), .5), atol=1e-5)
    with pytest.raises(ValueError, match='temperature is 0'): ImagesToProbabilities(model, stats, 0)

@pytest.mark.slow
def test_an_exported_file_contains_the_temperature_of_its_run(held_out, digits, tmp_path):
    from cifar_fastai.use.export import export_model
    classify, _ = load_classifier(held_out)
    exported, _ = load_classifier(export_model(held_out, 'onnx', tmp_path/'m.onnx'))
    assert np.allclose(exported(digits.test_x[:20]), classify(digits.test_x[:20]), atol=1e-4)

def test_a_run_on_all_training_images_takes_the_constant_of_its_recipe_if_nothing_else_changed(finished, monkeypatch):
    run, _ = finished
    interp = run_predictions(read_run(run))
    config = dict(settings=vars(TrainSettings(recipe='quick')), data=dict(fingerprint=list(cifar10_fingerprint)))
    monkeypatch.setitem(recipe_temperatures, 'quick', .6)
    assert find_temperature(config, interp) == (.6, 'constant of recipe quick')
    for change in dict(seed=3), dict(precision='fp32'), dict(num_workers=0), dict(out='runs/a'):
        assert find_temperature(config | dict(settings=config['settings'] | change), interp)[0] == .6
    for change in dict(label_smoothing=0.), dict(epochs=8), dict(width=32), dict(dropout=.1):
        temperature, how = find_temperature(config | dict(settings=config['settings'] | change), interp)
        assert temperature == 1 and next(iter(change)) in how
    assert find_temperature(config | dict(data=dict(fingerprint=['0'*64]*2)), interp)[0] == 1
    monkeypatch.delitem(recipe_temperatures, 'quick')
    assert find_temperature(config, interp)[0] == 1

def test_settings_that_follow_from_others_are_not_named_as_changes():
    pictures = dict(vocab=['a', 'b', 'c'], n_train=95, fingerprint=['0'*64]*2)
    changed = lambda data=pictures, **given: set(changed_from_recipe(dict(settings=vars(TrainSettings('pictures', **given).resolved()), data=data)))
    assert changed(epochs=4, bs=8, size=64) == {'epochs', 'size', 'data'} # not peak_epoch, cutout and bs
    assert changed(bs=16, size=64, cutout=8, epochs=4, peak_epoch=2.) == {'bs', 'size', 'cutout', 'epochs', 'peak_epoch', 'data'}
    assert changed(model='resnet18', bs=8) == {'model', 'data'}
    assert changed(pictures | dict(vocab=list('0123456789')), flip='none', bs=8) == {'data'}
    assert changed(dict(fingerprint=list(cifar10_fingerprint), vocab=list(cifar10_classes), n_train=50_000), bs=256) == {'bs'}

def test_without_a_temperature_a_run_says_what_differs_and_which_option_fits_one(finished):
    interp = run_predictions(read_run(finished[0]))
    pictures = dict(vocab=['a', 'b', 'c'], n_train=95, fingerprint=['0'*64]*2)
    temperature, how = find_temperature(dict(settings=vars(TrainSettings('pictures', epochs=4, bs=8).resolved()), data=pictures), interp)
    assert temperature == 1 and '--valid holdout' in how
    assert {name for name in vars(TrainSettings()) if name in re.findall(r'\w+', how)} == {'epochs', 'data', 'recipe', 'valid'}

def test_runs_without_a_temperature_stay_readable(finished, tmp_path):
    import shutil
    run = shutil.copytree(finished[0], tmp_path/'run')
    assert read_temperature(run) == 1 # images of another origin: no constant applies
    summary = read_json(run/'summary.json')
    assert summary['calibration']['temperature_is'].startswith('not calibrated')
    del summary['calibration']
    write_json(run/'summary.json', summary)
    assert read_temperature(run) == 1 and run_predictions(read_run(run)).temperature == 1
    (run/'summary.json').unlink()
    assert read_temperature(run) == 1

@pytest.mark.parametrize('value', [0, -1, 'hot', None])
def test_an_invalid_temperature_in_a_summary_is_refused_by_name(finished, tmp_path, value):
    import shutil
    run = shutil.copytree(finished[0], tmp_path/'run')
    summary = read_json(run/'summary.json')
    summary['calibration']['temperature'] = value
    write_json(run/'summary.json', summary)
    with pytest.raises(ValueError, match=r'calibration\.temperature'): read_temperature(run)

# ---- the temperatures of the recipes, and the network that ships

benchmarks = Path(__file__).parent.parent/'benchmarks'

def recorded_seeds(recipe): # -> list of (probabilities, labels) of the test images
    targs = load_file(benchmarks/'runs/24-epochs/predictions.safetensors')['targs']
    logits = load_file(benchmarks/f'runs/h100/{recipe}.safetensors')
    return [(logits[name].float().softmax(dim=1), targs) for name in logits if not name.endswith('flips')]

@pytest.mark.parametrize('recipe', recipe_temperatures)
def test_the_temperature_of_a_recipe_has_its_evidence(recipe):
    found = [record for record in read_json(benchmarks/'temperatures.json')['runs'] if record['recipe'] == recipe]
    assert found and recipe_temperatures[recipe] == pytest.approx(np.mean([record['temperature'] for record in found]), abs=5e-4)
    for record in found:
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in record['settings'].items()}
        assert Recipe(**settings) == recipes[recipe], 'the recipe has changed since: measure its temperature again'
        assert record['n_images'] >= 5000 and record['temperature_of_halves'] == pytest.approx([record['temperature']]*2, rel=.1)

@pytest.mark.parametrize('recipe', recipe_temperatures)
def test_the_temperature_of_a_recipe_calibrates_each_recorded_seed_on_the_test_images(recipe):
    for probs, targs in recorded_seeds(recipe):
        calibrated, before = apply_temperature(probs, recipe_temperatures[recipe]), calibration(probs, targs)
        after = calibration(calibrated, targs)
        assert after.ece <= .03 and after.nll <= before.nll and torch.equal(calibrated.argmax(dim=1), probs.argmax(dim=1))

@pytest.fixture(scope='module')
def some_test_images(real_cifar): # 2,000, the same share of each class
    chosen = first_of_each_class(real_cifar.test_y, .2)
    return real_cifar.test_x[chosen], real_cifar.test_y[chosen]

def shown_by_predict(images): return load_classifier()[0](images)

def shown_by_export(images, tmp_path):
    pytest.importorskip('onnxruntime', reason='the extra export is not installed')
    from cifar_fastai.use.export import export_model
    return load_classifier(export_model(None, 'onnx', tmp_path/'best.onnx'))[0](images)

def shown_by_captions(images, labels, digits):
    data = CIFAR10Data(digits.train_x[:64], digits.train_y[:64], images, labels, cifar10_classes)
    learn = cifar_learner(cifar_dls(data, 64, num_workers=0, stats=cifar10_stats), load_pretrained(), 'fp32')
    with learn.no_bar(): interp = CifarInterpretation.from_learner(learn)
    shown = {m.idx: m.probability for m in interp.misclassified()}
    assert shown == {i: float(interp.probs[i].max()) for i in shown} and len(shown) == interp.n_wrong
    return interp.probs

def test_the_network_that_ships_shows_calibrated_probabilities_in_predictions_captions_and_exports(some_test_images, digits, tmp_path):
    images, labels = some_test_images
    shown = dict(predict=shown_by_predict(images), captions=shown_by_captions(images, labels, digits), export=shown_by_export(images, tmp_path))
    for place, probs in shown.items():
        found = calibration(torch.as_tensor(probs), torch.as_tensor(labels))
        assert found.ece <= .03, place
        assert np.allclose(probs, shown['predict'], atol=1e-4), place # the app and its examples show those of `load_classifier`

@pytest.mark.slow
def test_the_network_that_ships_is_calibrated_on_all_test_images(real_cifar):
    probs, targs = torch.as_tensor(shown_by_predict(real_cifar.test_x)), torch.as_tensor(real_cifar.test_y)
    assert calibration(probs, targs).ece <= .03
    logits = log_probabilities(probs)*recipe_temperatures['best'] # as trained
    recorded, _ = recorded_seeds('best')[0]
    assert (logits.argmax(dim=1) == recorded.argmax(dim=1)).float().mean() > .998 # in bf16 on a GPU
    assert calibration(logits.softmax(dim=1), targs).ece > .15

def test_the_report_of_a_run_of_the_recipe_shows_calibrated_probabilities():
    probs, targs = recorded_seeds('best')[0]
    interp = CifarInterpretation(None, None, probs, targs, torch.zeros(len(targs)))
    config = dict(settings=vars(TrainSettings(recipe='best')), data=dict(fingerprint=list(cifar10_fingerprint)))
    temperature, how = find_temperature(config, interp)
    assert 'best' in how and run_calibration(interp.calibrated(temperature), how)['ece'] <= .03
