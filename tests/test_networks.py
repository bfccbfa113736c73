"""Networks by name, in a learner, in a run folder and in the commands."""
import re, shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from fastai.vision.all import Normalize
from torch import nn

from cifar_fastai.cli import cifar_predict, cifar_train
from cifar_fastai.core import RepeatSettings, TrainSettings, recipes
from cifar_fastai.files import read_json, write_json
from cifar_fastai.callback.cost import FreezeFirst
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.data.picture import read_image
from cifar_fastai.learner import cifar_learner
from cifar_fastai.look.explain import grad_cam
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.look.report import write_report
from cifar_fastai.models import CustomResNet
from cifar_fastai.networks import build_network, pretrained_stats
from cifar_fastai.run.folder import load_run, unfinished
from cifar_fastai.run.train import resume, settings_learner, train, unused_ingredients
from cifar_fastai.use.export import export_model
from cifar_fastai.use.predict import load_classifier, load_explainer

needs_timm = pytest.mark.skipif(find_spec('timm') is None, reason='the extra models is not installed')
def n_params(model): return sum(p.numel() for p in model.parameters())

# ---- by name

@pytest.mark.parametrize('name, n', [('custom', 6_573_130), ('resnet18', 11_173_962), ('resnet34', 21_282_122)])
def test_the_number_of_parameters_is_the_published_one(name, n):
    model = build_network(name)
    assert n_params(model) == n and model.training and model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)

def test_resnet18_is_that_of_torchvision_but_for_its_beginning():
    from torchvision.models import resnet18
    torch.manual_seed(0); ours = build_network('resnet18', 1000)
    torch.manual_seed(0); theirs = resnet18(weights=None)
    assert ours.conv1.stride == (1, 1) and ours.conv1.kernel_size == (3, 3)
    theirs.conv1, theirs.maxpool = ours.conv1, torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x))
    with torch.no_grad(): assert ours.conv1.weight.std().item() == pytest.approx((2/(64*9))**.5, rel=.1)

@pytest.mark.parametrize('name, size', [('mobilenet_v2', 32), ('shufflenet_v2_x0_5', 32), ('squeezenet1_1', 32), ('vit_b_32', 64), ('resnet50', 16)])
def test_models_of_torchvision_give_logits(name, size):
    model = build_network(name, 7, size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)

@needs_timm
@pytest.mark.parametrize('name', ['timm:resnet10t', 'timm:vit_tiny_patch16_224', 'timm:convnext_atto'])
def test_models_of_timm_give_logits(name):
    assert build_network(name, 4, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)

@pytest.mark.parametrize('name', ['resnet99', 'os.system', 'torchvision.models', '__import__', 'timm:', 'timm:hf-hub:a/b', 'timm:local-dir:/tmp', 'timm:no_such', '', 'fcn_resnet50', 'a b', '../m'])
def test_other_names_are_refused_and_nothing_is_imported(name):
    import sys
    before = set(sys.modules)
    with pytest.raises((ValueError, ModuleNotFoundError)) as e: build_network(name)
    assert 'model is' in str(e.value) or 'timm' in str(e.value)
    assert not {m for m in set(sys.modules) - before if not m.startswith(('timm', 'torchvision', 'torch', 'huggingface', 'yaml', 'requests', 'urllib3', 'httpx', 'tqdm', 'fsspec'))} & {'os.system', 'm'}

@pytest.mark.parametrize('name', ['inception_v3', 'alexnet'])
def test_a_model_that_does_not_take_the_size_is_one_sentence(name):
    with pytest.raises(ValueError, match=rf"model is '{name}'.*16×16") as e: build_network(name, 10, 16)
    assert '\n' not in str(e.value)

# ---- settings

def test_what_belongs_to_custom_resnet_is_neutral_for_others_and_cannot_be_given():
    settings = TrainSettings(model='resnet18').resolved()
    assert (settings.ghost, settings.logit_scale, settings.whiten, settings.dirac) == (0, 1., False, False)
    assert settings.label_smoothing == recipes['best'].label_smoothing and settings.lookahead == recipes['best'].lookahead
    assert unused_ingredients(settings) == ['ghost', 'logit_scale', 'whiten'] and unused_ingredients(TrainSettings(model='resnet18', recipe='quick')) == ['ghost', 'logit_scale', 'whiten', 'dirac', 'freeze_first'] and unused_ingredients(TrainSettings()) == []
    assert unused_ingredients(TrainSettings(model='resnet18', recipe='baseline')) == []
    for given in dict(width=32), dict(ghost=8), dict(whiten=True), dict(dropout=.1), dict(conv_bias=True), dict(logit_scale=.5):
        [name] = given
        with pytest.raises(ValueError, match=f'{name} is .*resnet18'): TrainSettings(model='resnet18', **given)
    assert RepeatSettings(model='resnet18').run(0, 'runs').model == 'resnet18'

@pytest.mark.parametrize('norm, kind, groups', [('layer', torch.nn.GroupNorm, 1), ('group', torch.nn.GroupNorm, 8), ('batch', torch.nn.BatchNorm2d, None)])
def test_the_small_resnets_have_the_norm_that_is_given(norm, kind, groups):
    settings = TrainSettings(model='resnet34', norm=norm, n_groups=8)
    model = build_network(settings.model, 10, settings.size, **settings.network)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.BatchNorm2d))]
    assert len(layers) == 36 and {type(m) for m in layers} == {kind} and n_params(model) == 21_282_122
    assert not groups or {m.num_groups for m in layers} == {groups}
    x = torch.randn(3, 3, 32, 32)
    is_alone = torch.allclose(model(x)[:2], model(x[:2]), atol=1e-4) # an image does not depend on its batch
    assert is_alone == (norm != 'batch')

def test_a_norm_that_a_network_does_not_have_is_refused():
    for given in dict(norm='layer'), dict(norm='group', n_groups=4):
        with pytest.raises(ValueError, match='norm is .*resnet50'): TrainSettings(model='resnet50', **given)
    with pytest.raises(ValueError, match='n_groups is 3'): TrainSettings(model='resnet18', norm='group', n_groups=3)
    with pytest.raises(ValueError, match='n_groups is 3'): build_network('resnet18', norm='group', n_groups=3)
    with pytest.raises(ValueError, match='norm is .*instance'): build_network('resnet18', norm='instance')
    with pytest.raises(ValueError, match='norm is .*layer.*pretrained'): TrainSettings(model='resnet18', norm='layer', pretrained=True)
    with pytest.raises(ValueError, match='norm is .*layer.*pretrained'): build_network('resnet18', norm='layer', pretrained=True)

def test_a_run_with_layer_norm_is_read_with_it(digits, tmp_path):
    settings = TrainSettings('digits', model='resnet18', norm='layer', epochs=2, bs=64, lr_min=1e-4, lr_max=1e-3, num_workers=0, precision='fp32', out=str(tmp_path/'run'))
    few = digits.first(128, 32)
    train(settings, few)
    model, _ = load_run(tmp_path/'run')
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert np.allclose(load_classifier(tmp_path/'run')[0](few.test_x), CifarInterpretation.from_run(tmp_path/'run', few).raw_probs, atol=1e-4)

# ---- in a learner and in a run

def test_a_learner_takes_a_name(digits):
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, recipe='baseline')
    learn = cifar_learner(dls, 'resnet18', 'fp32')
    assert n_params(learn.model) == 11_173_962
    assert type(cifar_learner(dls, 'custom', 'fp32').model) is CustomResNet
    with pytest.raises(ValueError, match='resnet99'): cifar_learner(dls, 'resnet99')

@pytest.fixture(scope='module')
def run(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp('runs')/'other'
    settings = TrainSettings('digits', model='shufflenet_v2_x0_5', epochs=2, bs=64, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(run))
    train(settings, digits.first(256, 64))
    return run

def test_every_reader_of_a_run_builds_its_network(run, digits, tmp_path):
    model, config = load_run(run)
    assert type(model).__name__ == 'ShuffleNetV2' and not model.training and config['settings']['model'] == 'shufflenet_v2_x0_5'
    few = digits.first(256, 64)
    interp = CifarInterpretation.from_run(run, few)
    assert interp.probs.shape == (64, 10)
    classify, vocab = load_classifier(run)
    assert np.allclose(classify(few.test_x), interp.raw_probs, atol=1e-4) and len(vocab) == 10
    assert 'shufflenet_v2_x0_5' in write_report(run, data=few).read_text()
    program = torch.export.load(export_model(run, 'torch', tmp_path/'m.pt2')).module()
    assert np.allclose(program(torch.from_numpy(few.test_x[:4])), classify(few.test_x[:4]), atol=1e-4)

def test_a_run_with_another_network_resumes_to_the_same_weights(run, digits, tmp_path):
    few, again = digits.first(256, 64), shutil.copytree(run, tmp_path/'again')
    expected = read_json(run/'summary.json')['weights_sha256']
    (again/'summary.json').unlink()
    for file in sorted((again/'checkpoint').glob('*.safetensors'))[1:]: file.unlink()
    assert resume(again, data=few)['weights_sha256'] == expected

def test_a_config_with_a_name_from_elsewhere_is_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path/'other')
    for name in 'os.system', 'timm:hf-hub:someone/model', 'CustomResNet; import os', 5, None, '../x':
        config = read_json(run/'config.json')
        config['settings']['model'] = name
        write_json(other/'config.json', config)
        with pytest.raises((ValueError, ModuleNotFoundError)): load_run(other)

def test_grad_cam_explains_another_network(run, digits):
    pytest.importorskip('captum', reason='the extra explain is not installed')
    maps = grad_cam(build_network('resnet18'), torch.randn(2, 3, 32, 32), 3)
    assert maps.shape == (2, 32, 32)

def test_the_command_trains_another_network_and_says_what_it_leaves_out(tmp_path, capsys, folder_of_its_own):
    cifar_train('--data digits --model shufflenet_v2_x0_5 --epochs 1 --lr_min 1e-3 --lr_max 1e-2 --precision fp32 --num_workers 0 --out run'.split())
    said = capsys.readouterr().out
    assert 'whiten' in said and 'shufflenet_v2_x0_5' in said
    with pytest.raises(SystemExit) as e: cifar_train('--data digits --model resnet99 --out other'.split())
    assert 'resnet99' in str(e.value) and not (tmp_path/'other').exists()

# ---- faults that were found by others

def test_a_recipe_does_not_freeze_the_first_part_of_another_network(digits):
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, recipe='quick')
    other, own = cifar_learner(dls, 'mobilenet_v3_small', 'fp32'), cifar_learner(dls, CustomResNet(width=8), 'fp32')
    assert not hasattr(other, 'freeze_first') and hasattr(own, 'freeze_first')
    assert hasattr(cifar_learner(dls, 'mobilenet_v3_small', 'fp32', freeze_first=1), 'freeze_first') # asked for

@needs_timm
def test_a_network_without_maps_has_a_report_and_an_app_without_them(digits, tmp_path):
    few, run = digits.first(64, 32), tmp_path/'vit'
    train(TrainSettings('digits', model='timm:vit_tiny_patch16_224', epochs=1, bs=32, lr_min=1e-4, lr_max=1e-3, num_workers=0, precision='fp32', out=str(run)), few)
    assert load_explainer(run) is None and 'vit_tiny' in write_report(run, data=few).read_text()

@needs_timm
def test_sizes_that_a_network_does_not_take_are_refused_before_training(digits):
    with pytest.raises(ValueError, match='vit_tiny.*20×20|vit_tiny.*2.×2.'):
        settings_learner(TrainSettings('digits', model='timm:vit_tiny_patch16_224', recipe='quick'), digits.first(64, 32))

@pytest.mark.parametrize('name', ['maxvit_t', 'inception_v3'])
def test_what_a_model_refuses_itself_is_one_sentence_that_names_it(name):
    with pytest.raises(ValueError, match=f"model is '{name}'"): build_network(name, 10, 32)

def test_a_network_too_large_for_an_onnx_file_is_refused_before_the_export(run, tmp_path, monkeypatch):
    pytest.importorskip('onnx', reason='the extra export is not installed')
    monkeypatch.setattr('cifar_fastai.use.export.max_onnx_bytes', 1000)
    with pytest.raises(ValueError, match='1,000'): export_model(run, 'onnx', tmp_path/'m.onnx')
    assert not list(tmp_path.glob('*.onnx*'))

def test_a_folder_with_weights_alone_still_predicts(run, digits, tmp_path):
    import shutil
    (tmp_path/'bare').mkdir()
    for name in 'config.json', 'model.safetensors': shutil.copy(run/name, tmp_path/'bare'/name)
    assert unfinished(tmp_path/'bare') is None and unfinished(run) is None
    classify, _ = load_classifier(tmp_path/'bare')
    assert classify(digits.test_x[:2]).shape == (2, 10)

# ---- pretrained weights

def cached(name, home): # where torch.hub keeps a download
    from torchvision.models import get_model, get_model_weights
    file = home/'hub/checkpoints'/get_model_weights(name).DEFAULT.url.split('/')[-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    state = get_model(name, weights=None).state_dict()
    torch.save(state, file)
    return state

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'home'))
    for name in 'http_proxy', 'https_proxy': monkeypatch.setenv(name, 'http://127.0.0.1:9') # no download
    return tmp_path/'home'

@pytest.mark.parametrize('name, new', [('resnet18', {'conv1.weight', 'fc.weight', 'fc.bias'}),
                                       ('mobilenet_v3_small', {'classifier.3.weight', 'classifier.3.bias'})])
def test_pretrained_weights_go_where_they_fit(home, name, new):
    state = cached(name, home)
    torch.manual_seed(0); model = build_network(name, 5, pretrained=True)
    torch.manual_seed(0); before = build_network(name, 5).state_dict()
    for key, t in model.state_dict().items(): assert torch.equal(t, before[key] if key in new else state[key]), key
    means, deviations = pretrained_stats(name)
    assert len(means) == len(deviations) == 3 and min(deviations) > 0

@needs_timm
def test_timm_loads_its_own_weights(tmp_path, monkeypatch):
    import timm
    from timm.models import _registry
    state = timm.create_model('resnet10t', pretrained=False).state_dict()
    torch.save(state, tmp_path/'weights.pth')
    for name, cfg in _registry._model_pretrained_cfgs.items():
        if name.startswith('resnet10t'): monkeypatch.setattr(cfg, 'file', str(tmp_path/'weights.pth'))
    model = build_network('timm:resnet10t', 3, pretrained=True)
    assert torch.equal(model.layer4[0].conv1.weight, state['layer4.0.conv1.weight']) and model.fc.weight.shape[0] == 3
    assert pretrained_stats('timm:resnet10t')[0] == pytest.approx((.485, .456, .406))

@needs_timm
def test_timm_resamples_the_positions_of_a_transformer(tmp_path, monkeypatch):
    import timm
    state = timm.create_model('vit_tiny_patch16_224', pretrained=False).state_dict()
    torch.save(state, tmp_path/'weights.pth')
    monkeypatch.setattr(timm.get_pretrained_cfg('vit_tiny_patch16_224'), 'file', str(tmp_path/'weights.pth'), raising=False)
    from timm.models import _registry
    for name, cfg in _registry._model_pretrained_cfgs.items():
        if name.startswith('vit_tiny_patch16_224'): monkeypatch.setattr(cfg, 'file', str(tmp_path/'weights.pth')); monkeypatch.setattr(cfg, 'custom_load', False)
    model = build_network('timm:vit_tiny_patch16_224', 3, 32, pretrained=True)
    assert model.new_tensors == {'head.weight', 'head.bias'} and model.pos_embed.shape == (1, 5, 192)
    assert torch.allclose(model.pos_embed[:, 0], state['pos_embed'][:, 0]) and torch.equal(model.blocks[3].attn.qkv.weight, state['blocks.3.attn.qkv.weight'])
    assert (model.pos_embed[:, 1:].mean() - state['pos_embed'][:, 1:].mean()).abs() < 1e-2

def test_weights_that_cannot_be_had_are_one_sentence(home):
    with pytest.raises(FileNotFoundError, match='pretrained is True.*resnet34') as e: build_network('resnet34', pretrained=True)
    assert '\n' not in str(e.value)
    file = home/'hub/checkpoints/resnet34-b627a593.pth'
    file.write_bytes(b'no weights')
    with pytest.raises(FileNotFoundError, match='pretrained is True.*resnet34'): build_network('resnet34', pretrained=True)

@pytest.mark.parametrize('call', [lambda: build_network('custom', pretrained=True), lambda: TrainSettings(pretrained=True), lambda: pretrained_stats('resnet99'),
                                  lambda: build_network('resnet99', pretrained=True), lambda: TrainSettings(model='resnet18', pretrained='yes')])
def test_pretrained_is_refused_where_there_are_no_weights(call):
    with pytest.raises(ValueError, match='pretrained is|model is'): call()

def test_pretrained_layers_are_frozen_apart_from_new_ones(home, digits):
    cached('shufflenet_v2_x0_5', home)
    stats = pretrained_stats('shufflenet_v2_x0_5')
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, device='cpu', stats=stats)
    learn = cifar_learner(dls, 'shufflenet_v2_x0_5', 'fp32', pretrained=True)
    learn.freeze()
    new = {name for name, p in learn.model.named_parameters() if p.requires_grad and not re.search('norm|bn|branch|conv', name)}
    assert new == {'fc.weight', 'fc.bias'}
    before = {name: t.clone() for name, t in learn.model.state_dict().items()}
    learn.fine_tune(1, 1e-2, freeze_epochs=1)
    assert not {name for name, t in learn.model.named_parameters() if torch.equal(before[name], t)}
    assert [len(group) for group in learn.opt.param_lists] == [len(list(learn.model.parameters())) - 2, 2]

def test_pretrained_weights_ask_for_their_own_normalisation(home, digits):
    cached('shufflenet_v2_x0_5', home)
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, device='cpu')
    with pytest.warns(UserWarning, match='normalised.*shufflenet_v2_x0_5'): cifar_learner(dls, 'shufflenet_v2_x0_5', 'fp32', pretrained=True)
    for dl in dls: dl.after_batch.fs = dl.after_batch.fs.filter(lambda f: not isinstance(f, Normalize)) # as they are
    with pytest.warns(UserWarning, match='normalised'): cifar_learner(dls, 'shufflenet_v2_x0_5', 'fp32', pretrained=True)

@pytest.mark.parametrize('recipe', ['fast', 'quick'])
def test_the_first_part_of_a_module_of_ones_own_is_not_frozen(digits, recipe):
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, device='cpu', recipe=recipe)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def frozen(model, **kwargs): return [cb for cb in cifar_learner(dls, model, 'fp32', **kwargs).cbs if isinstance(cb, FreezeFirst)]
    assert not frozen(nn.Sequential(body, nn.Linear(8, 10))) and frozen(CustomResNet(width=8)) and frozen(None)
    assert frozen(nn.Sequential(body, nn.Linear(8, 10)), freeze_first=2)

def test_a_last_batch_of_one_image_is_refused_where_batch_norm_needs_two(digits, tmp_path):
    settings = TrainSettings('digits', model='mobilenet_v3_small', bs=8, epochs=1, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(tmp_path/'run'))
    with pytest.raises(ValueError, match='bs is 8'): settings_learner(settings, digits.first(65, 32))
    settings_learner(settings, digits.first(66, 32))

def test_a_learner_with_a_module_of_its_own_refuses_pretrained(digits):
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0)
    for model in CustomResNet(width=8), None, 'custom':
        with pytest.raises(ValueError, match='pretrained is True'): cifar_learner(dls, model, 'fp32', pretrained=True)

def test_a_run_starts_from_pretrained_weights_and_normalises_as_they_need_it(home, digits, tmp_path):
    few, run = digits.first(64, 32), tmp_path/'run'
    state = cached('shufflenet_v2_x0_5', home)
    settings = TrainSettings('digits', model='shufflenet_v2_x0_5', pretrained=True, epochs=1, bs=32, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(run))
    learn, _ = settings_learner(settings, few)
    assert torch.equal(learn.model.stage2[0].branch1[0].weight, state['stage2.0.branch1.0.weight'])
    assert learn.dls.train.after_batch.normalize.mean.flatten().tolist() == pytest.approx([.485, .456, .406])
    expected = train(settings, few)
    shutil.rmtree(home) # what reads a run needs no download
    assert read_json(run/'config.json')['data']['stats'][0] == pytest.approx([.485, .456, .406])
    classify, _ = load_classifier(run)
    assert np.allclose(classify(few.test_x), CifarInterpretation.from_run(run, few).raw_probs, atol=1e-4)
    assert 'shufflenet' in write_report(run, data=few).read_text() and expected['weights_sha256']
