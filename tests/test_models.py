"""The network: layer by layer as in the seeds, with each norm, and refused where it makes no sense."""
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import nn

from cifar_fastai.core import TrainSettings
from cifar_fastai.models import CustomResNet, GhostBatchNorm2d, dirac_layers, half_precision, layer_table, model_summary, plot_model, whiten_first_layer, whitening_filters

# Seed 001, without its two rows of whole blocks
seed_001 = '''
    Conv2d 64,32,32 1728;     BatchNorm2d 64,32,32 128;                          ReLU 64,32,32 0
    Conv2d 128,32,32 73728;   MaxPool2d 128,16,16 0; BatchNorm2d 128,16,16 256;  ReLU 128,16,16 0
    Conv2d 128,16,16 147456;  BatchNorm2d 128,16,16 256;                         ReLU 128,16,16 0
    Conv2d 128,16,16 147456;  BatchNorm2d 128,16,16 256;                         ReLU 128,16,16 0
    Conv2d 256,16,16 294912;  MaxPool2d 256,8,8 0;   BatchNorm2d 256,8,8 512;    ReLU 256,8,8 0
    Conv2d 512,8,8 1179648;   MaxPool2d 512,4,4 0;   BatchNorm2d 512,4,4 1024;   ReLU 512,4,4 0
    Conv2d 512,4,4 2359296;   BatchNorm2d 512,4,4 1024;                          ReLU 512,4,4 0
    Conv2d 512,4,4 2359296;   BatchNorm2d 512,4,4 1024;                          ReLU 512,4,4 0
    MaxPool2d 512,1,1 0;      Linear 10 5130'''

# Seed 002
seed_002 = '''
    Conv2d 64,32,32 1792;     BatchNorm2d 64,32,32 128;                          ReLU 64,32,32 0
    Conv2d 128,32,32 73856;   MaxPool2d 128,16,16 0; BatchNorm2d 128,16,16 256;  ReLU 128,16,16 0
    Conv2d 128,16,16 147584;  BatchNorm2d 128,16,16 256;                         ReLU 128,16,16 0
    Conv2d 128,16,16 147584;  BatchNorm2d 128,16,16 256;                         ReLU 128,16,16 0
    Conv2d 256,16,16 295168;  MaxPool2d 256,8,8 0;   BatchNorm2d 256,8,8 512;    ReLU 256,8,8 0
    Conv2d 512,8,8 1180160;   MaxPool2d 512,4,4 0;   BatchNorm2d 512,4,4 1024;   ReLU 512,4,4 0
    Conv2d 512,4,4 2359808;   BatchNorm2d 512,4,4 1024;                          ReLU 512,4,4 0
    Conv2d 512,4,4 2359808;   BatchNorm2d 512,4,4 1024;                          ReLU 512,4,4 0
    MaxPool2d 512,1,1 0;      Linear 10 5130'''

def rows(table):
    cells = (row.split() for row in re.split(r'[;\n]', table) if row.strip())
    return [(kind, tuple(map(int, shape.split(','))), int(n)) for kind, shape, n in cells]

def printed_rows(summary):
    found = re.findall(r'^ *(\w+)-(\d+) +\[-1, ([\d, ]+)\] +([\d,]+)$', summary, re.MULTILINE)
    assert [int(i) for _, i, _, _ in found] == list(range(1, len(found) + 1))
    return [(kind, tuple(map(int, shape.split(','))), int(n.replace(',', ''))) for kind, _, shape, n in found]

@pytest.fixture(scope='module')
def nets(): return {bias: CustomResNet(conv_bias=bias) for bias in (False, True)}

seeds = pytest.mark.parametrize('conv_bias, table, total', [(False, seed_001, 6_573_130), (True, seed_002, 6_575_370)], ids=['seed 001', 'seed 002'])

# ---- the tables of the seeds

@seeds
def test_the_layers_are_those_of_the_seed(nets, conv_bias, table, total):
    assert len(rows(table)) == 29
    assert layer_table(nets[conv_bias]) == printed_rows(model_summary(nets[conv_bias])) == rows(table)

@seeds
def test_the_parameters_are_those_of_the_seed(nets, conv_bias, table, total):
    net, summary = nets[conv_bias], model_summary(nets[conv_bias])
    assert sum(p.numel() for p in net.parameters()) == sum(n for *_, n in rows(table)) == total
    assert f'Total params: {total:,}\nTrainable params: {total:,}\nNon-trainable params: 0\n' in summary

def test_the_sizes_are_those_of_seed_002(nets):
    summary = model_summary(nets[True])
    for line in ('Input size (MB): 0.01', 'Forward/backward pass size (MB): 6.44', 'Params size (MB): 25.08', 'Estimated Total Size (MB): 31.54'):
        assert line in summary

def test_frozen_parameters_are_counted_apart():
    net = CustomResNet()
    net.fc.requires_grad_(False)
    assert 'Trainable params: 6,568,000\nNon-trainable params: 5,130\n' in model_summary(net)

def test_the_summary_takes_any_module_and_leaves_it_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*6*6, 2))
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert layer_table(net, (1, 8, 8)) == [('Conv2d', (4, 6, 6), 40), ('BatchNorm2d', (4, 6, 6), 8), ('Flatten', (144,), 0), ('Linear', (2,), 290)]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training and not net[1].training
    assert not any(m._forward_hooks for m in net.modules())

# ---- structure

def test_children_are_named_in_order(nets):
    assert [name for name, _ in nets[False].named_children()] == ['prep', 'layer1', 'res1', 'layer2', 'layer3', 'res2', 'pool', 'fc']

def test_every_layer_is_a_module_of_torch():
    leaves = [m for m in CustomResNet(dropout=.1).modules() if not list(m.children())]
    assert {type(m).__module__.split('.')[0] for m in leaves} == {'torch'}

def test_every_convolution_is_3_by_3_with_stride_and_padding_1(nets):
    convs = [m for m in nets[False].modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 8
    assert {(c.kernel_size, c.stride, c.padding, c.bias) for c in convs} == {((3, 3), (1, 1), (1, 1), None)}

def test_logits_are_the_sum_over_blocks_by_hand(nets):
    net, x = nets[False].eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        h = net.layer1(net.prep(x))
        h = h + nn.Sequential(*net.res1)(h)
        h = net.layer3(net.layer2(h))
        h = h + nn.Sequential(*net.res2)(h)
        expected = net.fc(nn.functional.max_pool2d(h, 4).flatten(1))
        assert torch.equal(net(x), expected)
    assert expected.shape == (2, 10) and not torch.allclose(expected.exp().sum(1), torch.ones(2)) # logits, no softmax

def test_gradients_reach_every_parameter(nets):
    net = CustomResNet(conv_bias=True)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in net.named_parameters() if p.ndim > 1)

@pytest.mark.parametrize('n_out, c_in', [(10, 3), (100, 3), (7, 1)])
def test_classes_and_channels_can_be_others(n_out, c_in):
    net = CustomResNet(n_out, c_in).eval()
    with torch.no_grad(): assert net(torch.zeros(2, c_in, 32, 32)).shape == (2, n_out)
    assert layer_table(net, (c_in, 32, 32))[-1] == ('Linear', (n_out,), 513*n_out)

# ---- norm and dropout

def norms(net): return [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]

@pytest.mark.parametrize('kwargs, groups', [(dict(norm='group'), 2), (dict(norm='group', n_groups=32), 32), (dict(norm='layer'), 1), (dict(norm='layer', n_groups=8), 1)])
def test_group_and_layer_norm_have_their_groups_and_as_many_parameters(kwargs, groups):
    net = CustomResNet(**kwargs)
    assert len(norms(net)) == 8 and all(type(m) is nn.GroupNorm and m.num_groups == groups for m in norms(net))
    assert sum(p.numel() for p in net.parameters()) == 6_573_130

def test_batch_norm_is_the_default(nets): assert [type(m) for m in norms(nets[False])] == [nn.BatchNorm2d]*8

def test_dropout_follows_each_activation():
    layers = [m for m in CustomResNet(dropout=.25).modules() if isinstance(m, (nn.ReLU, nn.Dropout))]
    assert [type(m) for m in layers] == [nn.ReLU, nn.Dropout]*8
    assert {m.p for m in layers[1::2]} == {.25}

def test_a_dropout_of_zero_has_no_layer(nets): assert not [m for m in nets[False].modules() if isinstance(m, nn.Dropout)]

def test_dropout_drops_in_training_only():
    net, x = CustomResNet(norm='group', dropout=.5), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))

@pytest.mark.parametrize('name, value', [('norm', 'nosuch'), ('norm', None), ('dropout', -.1), ('dropout', 1), ('dropout', float('nan'))])
def test_invalid_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name}.*{re.escape(repr(value))}'): CustomResNet(**{name: value})

@pytest.mark.parametrize('n_groups', [0, -2, 3, 128])
def test_groups_must_divide_the_channels(n_groups):
    with pytest.raises(ValueError, match=rf'n_groups.* {n_groups}\b.*\b64\b'):
        CustomResNet(norm='group', n_groups=n_groups)

# ---- picture

def test_the_picture_names_every_part_with_its_shape(nets):
    expected = ['image', '3×32×32', 'prep', '64×32×32', 'layer1', '128×16×16', 'res1', '128×16×16', 'layer2', '256×8×8',
                'layer3', '512×4×4', 'res2', '512×4×4', 'pool', '512×1×1', 'fc', '10']
    texts = [t.get_text().split(':')[0] for t in plot_model(nets[False]).texts]
    assert [t for t in texts if t in expected] == expected

def test_the_picture_is_drawn_where_it_is_told_and_leaves_the_network_as_it_was():
    net, (_, ax) = CustomResNet(c_in=1).train(), plt.subplots()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert plot_model(net, ax) is ax
    assert net.training and all(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())

# ---- batch statistics of small groups

@pytest.mark.parametrize('n, groups', [(512, 16), (336, 10), (64, 2), (48, 2), (47, 1), (32, 1), (5, 1)])
def test_each_group_is_normalised_by_its_own_statistics(n, groups):
    x = torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(n))
    out = GhostBatchNorm2d(4, group=32)(x)
    for part in out.tensor_split(groups):
        assert torch.allclose(part.mean((0, 2, 3)), torch.zeros(4), atol=1e-5) and torch.allclose(part.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-3)

def test_a_step_moves_the_running_statistics_as_far_as_one_batch_does():
    ghost, plain = GhostBatchNorm2d(4, group=8), nn.BatchNorm2d(4)
    x = torch.randn(64, 4, 3, 3).add_(5)
    for _ in range(3): ghost(x), plain(x)
    assert torch.allclose(ghost.running_mean, plain.running_mean, rtol=.02) and ghost.num_batches_tracked == 3

def test_its_gradients_fill_no_batch_for_each_part():
    "Those of `tensor_split` do, which takes a fifth of a training step"
    out = GhostBatchNorm2d(4, group=8)(torch.randn(64, 4, 3, 3, requires_grad=True))
    kinds, nodes = set(), [out.grad_fn]
    while nodes:
        kinds.add(type(nodes[-1]).__name__)
        nodes += [f for f, _ in nodes.pop().next_functions if f is not None]
    assert any(kind.startswith('SplitWithSizesBackward') for kind in kinds) and not any(kind.startswith('SliceBackward') for kind in kinds)

def test_its_gradients_are_those_of_the_groups_apart():
    x = torch.randn(64, 4, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(GhostBatchNorm2d(4, group=32).double(), x[:6].detach().repeat(11, 1, 1, 1).requires_grad_(), fast_mode=True)

def test_in_evaluation_it_is_the_same_network():
    torch.manual_seed(0)
    ghost = CustomResNet(ghost=16)
    plain = CustomResNet()
    plain.load_state_dict(ghost.state_dict())
    x = torch.randn(40, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(ghost.eval()(x), plain.eval()(x)) and not torch.allclose(ghost.train()(x), plain.train()(x), atol=1e-3)
    assert sum(p.numel() for p in ghost.parameters()) == 6_573_130

@pytest.mark.parametrize('ghost', [-2, 1])
def test_a_group_of_less_than_two_images_is_refused(ghost):
    with pytest.raises(ValueError, match=rf'ghost.* {re.escape(str(ghost))}\b'): CustomResNet(ghost=ghost)

# ---- the scale of the logits

def test_the_scale_multiplies_the_logits_and_brings_no_parameter():
    torch.manual_seed(0)
    scaled, plain, x = CustomResNet(logit_scale=.125).eval(), CustomResNet().eval(), torch.randn(4, 3, 32, 32)
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad(): assert torch.equal(scaled(x), plain(x)/8)
    assert sum(p.numel() for p in scaled.parameters()) == 6_573_130

def test_weights_that_ship_have_the_scale_folded_in():
    torch.manual_seed(0)
    scaled, shipped, x = CustomResNet(logit_scale=.125).eval(), CustomResNet().eval(), torch.randn(4, 3, 32, 32)
    before = {k: v.clone() for k, v in scaled.state_dict().items()}
    shipped.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load(half_precision(scaled)).items()})
    with torch.no_grad(): assert torch.allclose(shipped(x), scaled(x), atol=1e-3) and not torch.allclose(shipped(x), 8*scaled(x), atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in scaled.state_dict().items())

@pytest.mark.parametrize('scale', [0, -1, float('inf'), float('nan')])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=rf'logit_scale.* {re.escape(str(scale))}\b'): CustomResNet(logit_scale=scale)

# ---- where the first layer begins

@pytest.fixture
def photographs(small): return (torch.from_numpy(small.train_x).permute(0, 3, 1, 2)/255 - .5)/.25

def test_answers_of_whitening_filters_are_uncorrelated_and_of_one_variance():
    images = F.avg_pool2d(torch.randn(50, 3, 34, 34, generator=torch.Generator().manual_seed(0)), 3, stride=1) # the small images are grey: their channels are one
    answers = F.conv2d(images.double(), whitening_filters(images, eps=0).double()).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(answers), torch.eye(27, dtype=torch.double), atol=1e-3)

@pytest.mark.parametrize('n', [1, 499, 1234]) # images are taken in parts
def test_whitening_filters_are_eigenvectors_of_the_covariance_of_all_patches(n):
    images = torch.randn(n, 3, 9, 7, generator=torch.Generator().manual_seed(n)) + torch.tensor([0, 5, -1]).view(3, 1, 1)
    patches = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    covariance, filters = torch.from_numpy(np.cov(patches.T)), whitening_filters(images).double().reshape(27, 27)
    directions = filters/filters.norm(dim=1, keepdim=True)
    variances = (directions@covariance*directions).sum(dim=1)
    assert torch.allclose(directions@covariance, variances[:, None]*directions, atol=1e-5)
    assert torch.allclose(filters.norm(dim=1), (variances + 5e-3).rsqrt(), rtol=1e-4)

def test_the_guard_holds_the_weakest_answers_back(photographs):
    strength = F.conv2d(photographs, whitening_filters(photographs, eps=.01)).transpose(0, 1).flatten(1).var(dim=1)
    assert strength[0] > .95 and strength[-1] < .5 and (strength.diff() < 1e-3).all()

def test_the_first_layer_begins_with_them_and_all_of_it_is_trained(photographs):
    torch.manual_seed(0)
    net = CustomResNet()
    before, filters = {k: v.clone() for k, v in net.state_dict().items()}, whitening_filters(photographs)
    assert whiten_first_layer(net, photographs) is net
    first = net.prep[0].weight
    assert torch.equal(first[:27], filters) and torch.equal(first[27:54], -filters) and torch.equal(first[54:], before['prep.0.weight'][54:])
    assert first.requires_grad and all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k != 'prep.0.weight')

# ---- width

def test_a_wider_network_has_as_many_times_the_channels_in_each_layer():
    shapes = {width: [shape[0] for kind, shape, _ in layer_table(CustomResNet(width=width))] for width in (8, 64)}
    assert [8*n for n in shapes[8][:-1]] == shapes[64][:-1] and shapes[8][-1] == shapes[64][-1] == 10 # classes stay

@pytest.mark.parametrize('width', [0, -8, 7, 2048])
def test_a_width_must_be_even_and_of_a_size_that_can_be_trained(width):
    with pytest.raises(ValueError, match=f'width is {width}'): CustomResNet(width=width)
    with pytest.raises(ValueError, match=f'width is {width}'): TrainSettings(width=width)

def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match='n_groups is 16'): CustomResNet(norm='group', n_groups=16, width=8)
    with pytest.raises(ValueError, match='n_groups is 16'): TrainSettings(norm='group', n_groups=16, width=8)

def test_a_narrow_first_layer_begins_with_the_largest_directions():
    images = torch.randn(200, 3, 6, 6)
    filters = whitening_filters(images)
    weight = whiten_first_layer(CustomResNet(width=8), images).prep[0].weight
    assert torch.equal(weight, torch.cat([filters[:4], -filters[:4]]))

# ---- where the later layers begin, and other sizes

@pytest.mark.parametrize('kwargs', [{}, dict(conv_bias=True, norm='group', width=16)])
def test_with_dirac_filters_the_first_half_of_a_layer_passes_its_input_on(kwargs):
    torch.manual_seed(0)
    net = CustomResNet(**kwargs)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert dirac_layers(net) is net
    for name, n in ('layer1', 1), ('layer2', 2), ('layer3', 4):
        convolution, n = getattr(net, name)[0], n*kwargs.get('width', 64)
        x = torch.randn(2, n, 6, 6)
        convolution.bias = None
        assert torch.equal(convolution(x)[:, :n], x)
        assert torch.equal(convolution.weight[n:], before[f'{name}.0.weight'][n:])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items() if name not in ('layer1.0.weight', 'layer2.0.weight', 'layer3.0.weight'))

@pytest.mark.parametrize('size', [8, 16, 20, 24, 28, 48])
def test_other_sizes_are_pooled_over_all_positions(size):
    net = CustomResNet(width=16).eval()
    x = torch.randn(2, 3, size, size)
    features = net.res2(net.layer3(net.layer2(net.res1(net.layer1(net.prep(x))))))
    assert torch.allclose(net(x), net.fc(features.amax((2, 3))), atol=1e-6)

@pytest.mark.parametrize('n', range(2, 12))
def test_a_group_has_two_images_or_more(n):
    norm = GhostBatchNorm2d(4, 2).train()
    assert norm(torch.randn(n, 4, 1, 1)).isfinite().all() # torch refuses one value per channel
