"""Grad-CAM against gradients by hand, layers, label issues, changed images, and people's answers."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from cifar_fastai.core import cifar10_classes, cifar10_stats
from cifar_fastai.models import CustomResNet
from cifar_fastai.networks import build_network
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.look.people import compare_with_people, load_human, original_order
from cifar_fastai.look.shift import read_shift_table, shift_table, shifted, shifts, write_shift_table

# ---- Grad-CAM

needs_captum = pytest.mark.skipif(not pytest.importorskip('importlib.util').find_spec('captum'), reason='the extra [explain]')
explain = pytest.importorskip('cifar_fastai.look.explain')

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return CustomResNet(width=16).eval()

@pytest.fixture(scope='module')
def x(): return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))

def by_hand(net, x, labels): # the map of `layer2`
    features = net.layer2(net.res1(net.layer1(net.prep(x)))).detach().requires_grad_()
    logits = net.logit_scale*net.fc(net.pool(net.res2(net.layer3(features))).flatten(1))
    gradient, = torch.autograd.grad(logits[range(len(x)), labels].sum(), features)
    heat = (gradient.mean(dim=(2, 3), keepdim=True)*features).sum(dim=1, keepdim=True).clamp_min(0)
    heat = F.interpolate(heat.detach(), size=(32, 32), mode='bilinear')[:, 0]
    return heat/heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)

@needs_captum
def test_the_map_is_that_of_gradients_by_hand(net, x):
    labels = torch.tensor([0, 3, 9, 3, 1])
    maps = explain.grad_cam(net, x, labels)
    assert maps.shape == (5, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    assert torch.allclose(maps, by_hand(net, x, labels), atol=1e-5)
    assert torch.allclose(explain.grad_cam(net, x, 3), by_hand(net, x, [3]*5), atol=1e-5)
    assert torch.allclose(explain.grad_cam(net, x, labels, bs=2), maps, atol=1e-5)

@needs_captum
def test_the_network_stays_as_it_was_whatever_its_mode(net, x):
    for training in (True, False):
        model = copy.deepcopy(net).train(training).requires_grad_(training)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with torch.no_grad(): maps = explain.grad_cam(model, x, 3)
        assert torch.allclose(maps, by_hand(net, x, [3]*5), atol=1e-5)
        assert model.training is training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad is training for p in model.parameters())
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())

def test_the_layer_is_the_last_one_with_enough_positions(net, x):
    assert explain.cam_layer(net, x) == 'layer2'
    assert explain.cam_layer(net, x, least=4) == 'res2' and explain.cam_layer(net, x, 'layer3') == 'layer3'
    wrapped = nn.Sequential(nn.Sequential(net.prep, net.layer1, net.layer2, net.layer3, net.res2), nn.Sequential(net.pool, nn.Flatten(), net.fc))
    assert explain.cam_layer(wrapped, x) == '0.2'

@pytest.mark.parametrize('model, layer, words', [
    (None, 'layer9', 'layer9'), (None, 'fc', "'fc'"), (None, 'pool', "'pool'"), (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), None, '8×8'),
    (nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.Flatten(), nn.Linear(64, 10)), None, '8×8')])
def test_a_layer_that_does_not_suit_is_refused(net, x, model, layer, words):
    with pytest.raises(ValueError, match=words): explain.cam_layer(model or net, x, layer)

class ChannelsLast(nn.Module):
    "Features (N, H, W, C) behind a convolution, or behind flattened patches"
    def __init__(self, conv=True):
        super().__init__()
        self.embed = nn.Conv2d(3, 96, 4, stride=4) if conv else nn.Linear(48, 96)
        self.mix, self.head = nn.Linear(96, 96), nn.Linear(96, 10)
    def forward(self, x):
        if isinstance(self.embed, nn.Conv2d): x = self.embed(x).permute(0, 2, 3, 1)
        else: x = self.embed(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3))
        return self.head(self.mix(x).mean(dim=(1, 2)))

def test_positions_have_the_aspect_of_the_image(x):
    model = ChannelsLast().eval()
    assert explain.cam_layer(model, x, 'embed') == 'embed'
    with pytest.raises(ValueError, match="'mix'"): explain.cam_layer(model, x, 'mix')
    with pytest.raises(ValueError, match='8×8'): explain.cam_layer(ChannelsLast(conv=False), x)
    for stride, size in (2, (49, 32)), (2, (33, 64)), (3, (50, 33)):
        odd = nn.Sequential(nn.Conv2d(3, 5, 3, stride, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        assert explain.cam_layer(odd, torch.zeros(1, 3, *size)) == '0'
    with pytest.raises(ValueError, match="'0'"): explain.cam_layer(nn.Sequential(nn.AdaptiveAvgPool2d((12, 4)), nn.Flatten()), torch.zeros(1, 3, 32, 32), '0')
    with pytest.raises(ValueError, match="'0'"): explain.cam_layer(nn.Sequential(nn.Upsample(scale_factor=2), nn.Flatten()), torch.zeros(1, 3, 32, 32), '0')

@needs_captum
def test_a_network_without_maps_has_no_explainer(): assert explain.explainer(ChannelsLast(conv=False).eval(), cifar10_stats) is None

@pytest.mark.parametrize('name', ['swin_t', 'timm:vit_small_patch8_224', 'timm:vit_tiny_patch16_224'])
def test_a_transformer_has_no_maps_but_those_of_its_patches(name):
    if name.startswith('timm:'): pytest.importorskip('timm', reason='the extra [models]')
    model, x = build_network(name, 10, 64).eval(), torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match='name of a layer'): explain.cam_layer(model, x)

@pytest.mark.parametrize('name, layer', [('resnet18', 'layer4'), ('mobilenet_v3_small', None), ('convnext_tiny', None), ('densenet121', None)])
def test_a_convolutional_network_has_maps(name, layer):
    chosen = explain.cam_layer(build_network(name, 10, 64).eval(), torch.zeros(1, 3, 64, 64))
    assert layer is None or chosen == layer

def test_an_overlay_is_darker_where_nothing_speaks_for_the_class():
    image = np.full((32, 32, 3), 200, np.uint8)
    heat = np.zeros((32, 32)); heat[:16] = 1
    shown = explain.overlay(image, heat)
    assert shown.dtype == np.uint8 and shown.shape == image.shape and shown[:16].mean() > shown[16:].mean() + 50
    assert explain.beside(image, shown, image).shape == (32, 100, 3)

@needs_captum
def test_an_interpretation_explains_a_class_by_name_or_number(tiny_learner, small_dls):
    learn = tiny_learner()
    learn.model = CustomResNet(width=8)
    interp = CifarInterpretation.from_learner(learn)
    by_name, by_number = (interp.plot_cam(0, label) for label in ('cat', 3))
    assert [t.get_text() for t in by_name.axes[0].texts] == [t.get_text() for t in by_number.axes[0].texts]
    assert len(interp.plot_cam(int((interp.decoded != interp.targs).nonzero()[0])).axes[0].images) == 3
    with pytest.raises(ValueError, match='unicorn'): interp.plot_cam(0, 'unicorn')
    with pytest.raises(ValueError, match='99'): interp.plot_cam(0, 99)
    width = interp.plot_misclassified(2, cam=True).axes[0].images[0].get_array().shape[1]
    assert width == 3*32 + 2*2
    with pytest.raises(ValueError, match='learn is None'): CifarInterpretation(None, learn.dls.valid, interp.probs, interp.targs, interp.losses).plot_cam(0)

@needs_captum
def test_threads_that_explain_at_once_do_not_disturb_each_other(small):
    from concurrent.futures import ThreadPoolExecutor
    from cifar_fastai.use.predict import load_explainer
    explain_images, images = load_explainer(), small.test_x[:8]
    expected = [explain_images(images[i:i + 1], [i])[0] for i in range(8)]
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda i: explain_images(images[i % 8][None], [i % 8])[0], range(40)))
    assert all(np.abs(picture.astype(int) - expected[i % 8]).max() <= 1 for i, picture in enumerate(found))

def test_an_onnx_file_has_no_explainer(monkeypatch):
    from cifar_fastai.use.predict import load_explainer
    assert load_explainer('some.onnx') is None

@needs_captum
def test_maps_of_resized_images_are_shown_over_what_the_network_gets(tmp_path, small):
    from fastai.vision.all import ImageDataLoaders, Learner, Resize, CrossEntropyLossFlat
    from PIL import Image
    for i, (x, y) in enumerate(zip(small.test_x, small.test_y)):
        file = tmp_path/'images'/('train' if i % 2 else 'valid')/cifar10_classes[y]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).resize((80, 64)).save(file)
    dls = ImageDataLoaders.from_folder(tmp_path/'images', item_tfms=Resize(32), bs=8, num_workers=0, device='cpu')
    interp = CifarInterpretation.from_learner(Learner(dls, CustomResNet(width=8), CrossEntropyLossFlat()))
    shown = interp.plot_cam(0).axes[0].images
    assert {image.get_array().shape for image in shown} == {(32, 32, 3)}
    assert interp.plot_misclassified(3, cam=True).axes[0].images[0].get_array().shape == (32, 100, 3)

def test_each_part_of_a_network_gets_its_mode_back(net, x):
    model = copy.deepcopy(net).train()
    model.prep.eval()
    modes = [m.training for m in model.modules()]
    if pytest.importorskip('captum'): explain.grad_cam(model, x, 3)
    assert [m.training for m in model.modules()] == modes

# ---- labels

def test_images_of_one_class_have_no_label_issues():
    pytest.importorskip('cleanlab', reason='the extra [explain]')
    from types import SimpleNamespace
    for label in 0, 1:
        interp = CifarInterpretation(None, SimpleNamespace(vocab=['a', 'b']), torch.tensor([[.6, .4], [.3, .7]]), torch.full((2,), label), torch.zeros(2))
        assert interp.label_issues() == []

def test_labels_that_were_changed_are_found():
    pytest.importorskip('cleanlab', reason='the extra [explain]')
    from types import SimpleNamespace
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(10).repeat(50)
    probs = (3*F.one_hot(truth, 10) + torch.randn(500, 10, generator=g)).softmax(dim=1)
    given = truth.clone()
    changed = torch.randperm(500, generator=g)[:20]
    given[changed] = (truth[changed] + 1) % 10
    interp = CifarInterpretation(None, SimpleNamespace(vocab=cifar10_classes), probs, given, torch.zeros(500))
    issues = interp.label_issues(20)
    assert len(set(changed.tolist()) & {issue.idx for issue in issues}) >= 15
    for issue in issues:
        assert issue.given == cifar10_classes[given[issue.idx]] != issue.suggested == cifar10_classes[probs[issue.idx].argmax()]
        assert issue.probability == pytest.approx(float(probs[issue.idx, given[issue.idx]]))

# ---- changed images

@pytest.mark.parametrize('name', ['blur', 'translation', 'lower resolution'])
@pytest.mark.parametrize('size', [16, 64, 128])
def test_changes_are_as_strong_at_every_size(small, name, size):
    coarse = [Image.fromarray(image).resize((8, 8)) for image in small.test_x[:8]] # with the same details at every size
    def images(size):
        if name == 'lower resolution': return np.random.default_rng(0).integers(256, size=(8, size, size, 3), dtype=np.uint8)
        return np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in coarse])
    change = {n: np.abs(shifted(images(n), name, shifts[name][1][-1]).astype(int) - images(n)).mean() for n in (32, size)}
    assert change[size] == pytest.approx(change[32], rel=.25)

@pytest.mark.parametrize('name', list(shifts))
def test_a_stronger_change_moves_pixels_further_and_is_the_same_each_time(name, small):
    images = small.test_x[:6]
    kept = images.copy()
    further = [np.abs(shifted(images, name, strength).astype(int) - images).mean() for strength in shifts[name][1]]
    assert 0 < further[0] < further[1] < further[2] and (images == kept).all()
    strongest = shifts[name][1][-1]
    assert (shifted(images, name, strongest) == shifted(images, name, strongest)).all()
    assert (shifted(images[2:3], name, strongest)[0] == shifted(images, name, strongest)[2]).all() or name == 'noise'

def test_a_change_that_is_unknown_is_refused(small):
    with pytest.raises(ValueError, match='fog'): shifted(small.test_x, 'fog', 1)

def test_the_table_has_each_change_and_uses_as_many_images_as_asked(small, tmp_path):
    seen = []
    def classify(images):
        seen.append(len(images))
        return np.full((len(images), 10), .1)
    table = shift_table(classify, small.test_x, small.test_y, n=20)
    assert set(seen) == {20} and len(seen) == len(table) == 25
    assert np.allclose(table['accuracy'], .1) and np.allclose(table['confidence'], .1) and np.allclose(table['nll'], np.log(10))
    assert (table['images'] == 20).all()
    write_shift_table(tmp_path, table)
    pd.testing.assert_frame_equal(read_shift_table(tmp_path), table)

def test_a_table_without_the_number_of_images_stays_readable(small, tmp_path):
    table = shift_table(lambda images: np.full((len(images), 10), .1), small.test_x, small.test_y).drop(columns='images')
    write_shift_table(tmp_path, table)
    pd.testing.assert_frame_equal(read_shift_table(tmp_path), table)

def test_the_seed_of_the_noise_leaves_the_generators_of_gpus_alone(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('reseeded'))
    shifted(small.test_x[:2], 'noise', .1)

@pytest.mark.parametrize('content', ['', 'change,strength,accuracy\nfog,1,1\n', '\x00\x01', 'change\n' + 'blur\n'*25, 'accuracy', 'strength', 'range', 'images', 'part'])
def test_another_file_in_place_of_the_table_is_refused_by_name(tmp_path, content, small):
    if content in ('accuracy', 'strength', 'range', 'images', 'part'): # one value of a table
        table = shift_table(lambda images: np.full((len(images), 10), .1), small.test_x, small.test_y, n=10).reset_index()
        column, value = dict(accuracy=('accuracy', 'abc'), strength=('strength', 7.5), range=('ece', 7), images=('images', 0), part=('images', 9.5))[content]
        table[column] = table[column].astype(object)
        table.loc[3, column] = value
        content = table.to_csv(index=False)
    (tmp_path/'shift.csv').write_text(content)
    with pytest.raises(ValueError, match=r'shift\.csv'): read_shift_table(tmp_path)

# ---- people

targs = np.repeat(np.arange(10), 1000)

@pytest.fixture(scope='module')
def answers(): # 40 right answers and ten wrong ones for each image
    counts = 40*np.eye(10, dtype=np.uint8)[targs]
    counts[range(10_000), (targs + 1) % 10] = 10
    return counts

def test_both_orders_of_the_answers_are_read(answers, tmp_path, monkeypatch):
    published = np.empty_like(answers)
    published[original_order()] = answers
    np.save(tmp_path/'a.npy', answers); np.save(tmp_path/'b.npy', published); np.savez(tmp_path/'c.npz', counts=answers, other=targs)
    for name in 'a.npy', 'b.npy', 'c.npz': assert (load_human(targs, tmp_path/name) == answers).all()
    monkeypatch.setenv('CIFAR_FASTAI_HUMAN', str(tmp_path/'b.npy'))
    assert (load_human(targs) == answers).all()

def test_answers_that_are_not_of_these_images_are_refused(answers, tmp_path, monkeypatch):
    monkeypatch.delenv('CIFAR_FASTAI_HUMAN', raising=False)
    path = tmp_path/'x.npy'
    def refused(counts, words):
        np.save(path, counts)
        with pytest.raises(ValueError, match=words): load_human(targs, path)
    refused(answers[::-1], 'either order'); refused(answers[:-1], '9999'); refused(answers[:, :9], '9'); refused(answers.astype(float)*np.nan, 'x.npy')
    refused(answers.astype(int) - 20, 'x.npy'); refused(np.zeros_like(answers), 'without answers')
    path.write_bytes(b'no array')
    with pytest.raises(ValueError, match=r'x\.npy'): load_human(targs, path)
    with pytest.raises(FileNotFoundError, match='CIFAR_FASTAI_HUMAN'): load_human(targs)
    with pytest.raises(FileNotFoundError, match=r'nothing\.npy'): load_human(targs, tmp_path/'nothing.npy')

def test_the_comparison_counts_what_people_said_about_the_mistakes(answers):
    from types import SimpleNamespace
    probs = torch.from_numpy(.9*np.eye(10)[targs] + .01).float()
    probs[:300] = probs[:300].roll(1, dims=1) # wrong, as one in five people
    counts = answers.astype(int)
    counts[:30, 1], counts[:30, 0] = 50, 0 # people agree with the network
    counts[30:60, 0], counts[30:60, 1] = 50, 0 # all people are right
    found = compare_with_people(CifarInterpretation(None, SimpleNamespace(vocab=cifar10_classes), probs, torch.from_numpy(targs), torch.zeros(10_000)), counts)
    assert (found['n_images'], found['n_mistakes']) == (10_000, 300)
    assert found['majority_agrees_with_network'] == pytest.approx(.1) and found['nine_in_ten_right_on_mistakes'] == pytest.approx(.1)
    assert found['people_right_on_mistakes'] == pytest.approx(.1 + .8*.8) and found['majority_right'] == pytest.approx(1 - 30/10_000)
