"""Adam, precision, history, repeatability and checkpoints, seen where they happen."""
import json, random, subprocess, sys
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import (Callback, MixedPrecision, Categorize, DataBlock, DataLoaders, Datasets, GradientClip, ImageBlock, ImageDataLoaders,
                               IntToFloatTensor, Learner, MultiCategoryBlock, Normalize, PILImage, PILImageBW,
                               ProgressCallback, RandomCrop, RandomSplitter, RandTransform, ReduceLROnPlateau,
                               RegressionBlock, Resize, TensorImage, ToTensor, accuracy, aug_transforms, error_rate,
                               load_learner, set_seed)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, VisionDataset

from cifar_fastai.core import TrainSettings, cifar10_stats, recipes
from cifar_fastai.data.picture import read_image
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.look.interpret import class_probabilities
from cifar_fastai.data.inspect import first_images
from cifar_fastai.optimizer import FusedAdam
from cifar_fastai.callback.precision import best_precision, precision_callbacks, precision_of
from cifar_fastai.callback.checkpoint import load_weights, save_weights
from cifar_fastai.callback.average import Lookahead
from cifar_fastai.callback.cost import FreezeFirst, ImageSizes
from cifar_fastai.learner import balanced_loss, cifar_learner, new_model
from cifar_fastai.models import CustomResNet, whiten_first_layer, whitening_filters
from cifar_fastai.callback.schedule import OneCycle
from cifar_fastai.run.train import settings_learner

cpu = torch.device('cpu')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

class on(Callback):
    "Runs `f(callback)` at `event`"
    def __init__(self, event, f, order=0):
        self.order = order
        setattr(self, event, lambda: f(self) and None)

# ---- Adam

def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*6*6, 5))

def step(net, opt, i):
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i))
    net(x).square().sum().backward()
    opt.step(); opt.zero_grad()

def reference(net, lr, betas=(.9, .99), eps=1e-8, wd=recipes['best'].wd):
    "torch's AdamW, unfused, with norms and biases undecayed"
    undecayed = [p for p in net.parameters() if p.ndim == 1]
    groups = [dict(params=[p for p in net.parameters() if p.ndim > 1], weight_decay=wd), dict(params=undecayed, weight_decay=0.)]
    return torch.optim.AdamW(groups, lr, betas, eps, fused=False, foreach=False)

@pytest.mark.parametrize('settings', [{}, dict(betas=(.8, .95), eps=1e-4, wd=0.), dict(wd=1.)])
def test_it_is_torchs_adamw_with_norms_and_biases_undecayed(settings):
    ours, theirs = a_net(), a_net()
    opt, expected = FusedAdam(list(ours.parameters()), lr=.01, **settings), reference(theirs, .01, **settings)
    for i in range(6):
        step(ours, opt, i); step(theirs, expected, i)
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(ours.parameters(), theirs.parameters()))

def test_its_defaults_are_those_of_the_settings():
    [decayed, undecayed] = FusedAdam(list(a_net().parameters())).opt.param_groups
    assert (decayed['betas'], decayed['eps'], decayed['weight_decay']) == (TrainSettings.betas, TrainSettings.eps, recipes['best'].wd)
    assert undecayed['weight_decay'] == 0 and all(p.ndim == 1 for p in undecayed['params'])
    assert decayed['fused']

def test_what_is_written_to_hypers_reaches_the_optimizer():
    opt = FusedAdam(list(a_net().parameters()))
    for h in opt.hypers: h['lr'] = .123
    opt.hypers[0]['mom'] = .5
    assert [g['lr'] for g in opt.opt.param_groups] == [.123, .123]
    assert [g['betas'] for g in opt.opt.param_groups] == [(.5, .99)]*2 # both of the one layer group
    assert opt.hypers[0]['lr'] == .123 and opt.hypers[0]['mom'] == .5

def test_set_hyper_reaches_the_optimizer_and_wd_only_the_weights():
    opt = FusedAdam(list(a_net().parameters()))
    opt.set_hyper('lr', .5); opt.set_hyper('wd', .3); opt.set_hyper('sqr_mom', .9)
    assert [g['lr'] for g in opt.opt.param_groups] == [.5, .5]
    assert [g['weight_decay'] for g in opt.opt.param_groups] == [.3, 0]
    assert [g['betas'] for g in opt.opt.param_groups] == [(.9, .9)]*2

def test_wd_of_a_fit_reaches_only_the_weights(tiny_learner):
    learn = tiny_learner()
    learn.fit(1, .01, wd=.4)
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [.4, 0]

def test_the_settings_of_the_learner_reach_the_optimizer(tiny_learner):
    learn = tiny_learner(betas=(.7, .8), eps=1e-3, wd=.05)
    learn.create_opt()
    group = learn.opt.opt.param_groups[0]
    assert (group['betas'], group['eps'], group['weight_decay']) == ((.7, .8), 1e-3, .05)

def halves(model): return [[p for m in model[:1] for p in m.parameters()], [p for m in model[1:] for p in m.parameters()]]

def test_each_part_of_a_splitter_is_one_group_of_which_only_weights_are_decayed():
    opt = FusedAdam(halves(a_net()), wd=.3)
    assert [[p.ndim for p in ps] for ps in opt.param_lists] == [[4], [2, 1, 1, 1]]
    assert [({p.ndim for p in g['params']}, g['weight_decay']) for g in opt.opt.param_groups] == [({4}, .3), ({2}, .3), ({1}, 0.)]

def test_reduce_lr_on_plateau_really_lowers_the_rate(tiny_learner):
    learn, rates = tiny_learner(), []
    see = on('before_epoch', lambda cb: rates.append([g['lr'] for g in cb.opt.opt.param_groups]))
    learn.fit(4, .01, cbs=[ReduceLROnPlateau(patience=1, min_delta=100, factor=10), see]) # no epoch is better by 100
    assert np.allclose(rates, [[.01, .01], [.01, .01], [.001, .001], [.0001, .0001]])

@pytest.mark.filterwarnings('ignore:Loading only the model')
@pytest.mark.filterwarnings('ignore:numpy.core is deprecated:DeprecationWarning') # fastai's `load`, unless something has imported it before
def test_a_checkpoint_brings_back_model_and_optimizer(tiny_learner):
    learn = tiny_learner()
    learn.fit(1, .01)
    file = learn.save('checkpoint')
    learn.fit(1, .01)
    after = {k: v.clone() for k, v in learn.model.state_dict().items()}
    other = tiny_learner()
    other.create_opt()
    other.load('checkpoint')
    assert file.exists() and other.opt.state_dict()['state'].keys() == learn.opt.state_dict()['state'].keys()
    other.fit(2, .01, start_epoch=1) # the second epoch's order and augmentation
    assert same(other.model.state_dict(), after) # with other moments it would differ

# ---- precision

def test_bf16_on_a_processor_computes_in_bf16_and_keeps_fp32(tiny_learner):
    learn, seen = tiny_learner(precision='bf16'), dict(conv=set(), loss=set(), grads=set(), preds=set())
    learn.model[0].register_forward_hook(lambda m, x, out: seen['conv'].add((out.dtype, m.training)))
    see = [on('after_loss', lambda cb: seen['loss'].add(cb.loss.dtype)), on('before_step', lambda cb: seen['grads'].update(p.grad.dtype for p in cb.model.parameters())),
           on('after_batch', lambda cb: seen['preds'].add(cb.pred.dtype))]
    learn.fit(1, .01, cbs=see)
    assert seen == dict(conv={(torch.bfloat16, True), (torch.bfloat16, False)}, loss={torch.float32}, grads={torch.float32}, preds={torch.float32})
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert {v.dtype for s in learn.opt.opt.state.values() for v in s.values()} == {torch.float32}

def test_fp32_computes_in_fp32(tiny_learner):
    learn, seen = tiny_learner(precision='fp32'), set()
    learn.model[0].register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    learn.fit(1, .01)
    assert seen == {torch.float32}

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_model_runs_channels_last(small_dls, precision):
    set_seed(0)
    learn, seen = cifar_learner(small_dls(bs=40), CustomResNet(width=16), precision=precision).remove_cbs(ProgressCallback), set()
    for conv in (learn.model.layer1[0], learn.model.res2[0]):
        conv.register_forward_hook(lambda m, x, out: seen.update(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x[0], m.weight, out)))
    learn.fit(1, .01)
    assert seen == {True}

def test_bf16_learns_what_fp32_learns(tiny_learner):
    def losses(precision):
        learn = tiny_learner(precision=precision)
        learn.fit(2, .01)
        return [row['train_loss'] for row in learn.recorder.history]
    assert losses('bf16') == pytest.approx(losses('fp32'), rel=.02) and losses('bf16') != losses('fp32')

def test_auto_is_what_the_hardware_is_good_at(tiny_learner):
    best = best_precision(cpu)
    assert best == ('bf16' if torch.cpu._is_avx512_bf16_supported() else 'fp32')
    assert precision_of(tiny_learner(precision='auto')) == best
    assert best_precision(torch.device('meta')) == 'fp32'

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_precision_of_a_learner_can_be_asked(tiny_learner, precision): assert precision_of(tiny_learner(precision=precision)) == precision

def test_fp16_on_a_processor_is_refused():
    with pytest.raises(ValueError, match="precision.*'fp16'.*CUDA.*'auto', 'bf16' or 'fp32'"):
        precision_callbacks('fp16', cpu)

def test_an_unknown_precision_is_refused(small_dls):
    with pytest.raises(ValueError, match="precision.*'fp8'.*'auto', 'fp32', 'bf16' or 'fp16'"):
        cifar_learner(small_dls(), precision='fp8')

@pytest.mark.parametrize('event', ['after_pred', 'before_step', 'before_batch', 'after_loss', 'before_validate'])
def test_an_interrupted_fit_leaves_no_autocast_open_to_the_next(tiny_learner, event):
    def interrupt(cb): raise KeyboardInterrupt
    learn, seen = tiny_learner(precision='bf16'), []
    try: learn.fit(1, .01, cbs=on(event, interrupt, order=100))
    except KeyboardInterrupt: pass
    else: pytest.fail('the fit was not interrupted')
    learn.fit(1, .01, cbs=on('before_epoch', lambda cb: seen.append(torch.is_autocast_enabled('cpu'))))
    assert seen == [False] and not torch.is_autocast_enabled('cpu')
    assert len(learn.recorder.history) == 1

def test_predicting_and_validating_leave_no_autocast_open(tiny_learner, small_dls):
    learn = tiny_learner(precision='bf16')
    learn.validate(); learn.get_preds()
    learn.get_preds(dl=learn.dls.test_dl([learn.dls.valid_ds[0][0]], num_workers=0)) # no labels, no loss
    assert not torch.is_autocast_enabled('cpu')

def test_a_prediction_in_bf16_is_an_fp32_tensor(tiny_learner): assert tiny_learner(precision='bf16').get_preds()[0].dtype == torch.float32

# ---- history

columns = ['epoch', 'lr', 'train_loss', 'train_accuracy', 'valid_loss', 'accuracy', 'seconds']

def test_history_has_a_row_an_epoch_with_both_sets(tiny_learner):
    learn = tiny_learner()
    learn.fit(3, .01)
    rows = learn.recorder.history
    assert [list(row) for row in rows] == [columns]*3
    assert [row['epoch'] for row in rows] == [1, 2, 3]
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())
    assert all(row['seconds'] > 0 and 0 <= row['accuracy'] <= 1 and 0 <= row['train_accuracy'] <= 1 for row in rows)

def test_train_loss_and_accuracy_are_means_over_all_training_images(tiny_learner, small_dls):
    learn, seen = tiny_learner(small_dls(bs=32)), [] # batches of 32, 32, 16
    def see(cb):
        if cb.training: seen.append((cb.epoch, len(cb.yb[0]), cb.loss.item(), (cb.pred.argmax(1) == cb.yb[0]).sum().item()))
    learn.fit(2, .01, cbs=on('after_loss', see))
    for row in learn.recorder.history:
        batches = [b for b in seen if b[0] + 1 == row['epoch']]
        assert [n for _, n, *_ in batches] == [32, 32, 16]
        assert row['train_loss'] == pytest.approx(sum(n*loss for _, n, loss, _ in batches)/80, rel=1e-5)
        assert row['train_accuracy'] == pytest.approx(sum(right for *_, right in batches)/80)

def test_valid_loss_and_accuracy_are_those_of_the_validation_images(tiny_learner, small):
    learn = tiny_learner()
    learn.fit(1, .01)
    probs, targs = learn.get_preds()
    [row] = learn.recorder.history
    assert row['accuracy'] == pytest.approx((probs.argmax(1) == targs).float().mean().item())
    assert row['valid_loss'] == pytest.approx(nn.functional.nll_loss(probs.log(), targs).item(), rel=1e-4)

def test_lr_is_that_of_the_epochs_last_step(tiny_learner):
    learn = tiny_learner()
    learn.fit(3, cbs=OneCycle(.001, .01, peak_epoch=1))
    assert [row['lr'] for row in learn.recorder.history] == pytest.approx([learn.recorder.lrs[i] for i in (4, 9, 14)])
    assert learn.recorder.history[0]['lr'] == pytest.approx(.01) and learn.recorder.history[2]['lr'] == pytest.approx(.001)

def test_validating_and_predicting_change_nothing_in_the_history(tiny_learner):
    learn = tiny_learner()
    learn.fit(2, .01)
    kept = [dict(row) for row in learn.recorder.history], list(learn.recorder.lrs), list(learn.recorder.losses), list(learn.recorder.values)
    learn.validate(); learn.get_preds(); learn.predict(learn.dls.valid_ds[0][0])
    assert (learn.recorder.history, learn.recorder.lrs, learn.recorder.losses, learn.recorder.values) == kept

def test_a_second_fit_begins_a_history_of_its_own(tiny_learner):
    learn = tiny_learner()
    learn.fit(2, .01)
    learn.fit(1, .01)
    assert [row['epoch'] for row in learn.recorder.history] == [1] and len(learn.recorder.lrs) == 5

def test_validate_returns_loss_and_accuracy(tiny_learner):
    learn = tiny_learner()
    learn.fit(1, .01)
    assert list(learn.validate()) == pytest.approx([learn.recorder.history[0]['valid_loss'], learn.recorder.history[0]['accuracy']])
    assert len(learn.validate(0)) == 2 and len(learn.validate(dl=learn.dls.train)) == 2

def test_each_epoch_has_a_line_where_there_is_no_bar(tiny_learner, capsys):
    tiny_learner().fit(2, .01)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines, 1):
        assert line.startswith(f'epoch {i} of 2: train_loss ')
        assert all(name in line for name in ('valid_loss', 'accuracy', 'train_accuracy', 'lr 0.01'))

def test_the_bar_shows_loss_accuracy_and_rate(tiny_net, small_dls):
    learn, comments = cifar_learner(small_dls(), tiny_net(), 'fp32'), []
    learn.fit(1, .01, cbs=on('after_batch', lambda cb: comments.append(cb.learn.progress.pbar.comment) if cb.training else None, order=1000))
    assert len(comments) == 5
    assert all(word in comments[-1] for word in ('loss ', 'accuracy ', 'lr 1.00e-02'))

def test_fastais_plots_of_the_recorder_work(tiny_learner):
    learn = tiny_learner()
    learn.fit(2, cbs=OneCycle(.001, .01))
    assert len(learn.recorder.plot_loss(skip_start=0).lines[0].get_ydata()) == 10
    learn.recorder.plot_sched()

def test_other_metrics_can_be_given(tiny_learner):
    learn = tiny_learner(metrics=[accuracy, error_rate])
    learn.fit(1, .01)
    [row] = learn.recorder.history
    assert row['error_rate'] == pytest.approx(1 - row['accuracy']) and row['train_error_rate'] == pytest.approx(1 - row['train_accuracy'])

# ---- the same seed, the same weights

def trained(small_dls, tiny_net, shown=False, **changes):
    dls = small_dls(**changes)
    set_seed(3)
    learn = cifar_learner(dls, tiny_net(), 'fp32').remove_cbs(ProgressCallback)
    if shown: dls.show_batch()
    learn.fit(2, cbs=OneCycle(.001, .01))
    return learn.model.state_dict()

@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # fastai hands matplotlib a tensor
@pytest.mark.parametrize('changes', [{}, dict(num_workers=2), dict(shown=True)], ids=['again', 'with two workers', 'with a batch shown before'])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(small_dls, tiny_net, changes):
    assert same(trained(small_dls, tiny_net), trained(small_dls, tiny_net, **changes))

def test_another_seed_gives_other_weights(small_dls, tiny_net): assert not same(trained(small_dls, tiny_net), trained(small_dls, tiny_net, seed=1))

# ---- weights in files

@pytest.fixture
def file(tmp_path): return tmp_path/'model.safetensors'

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_weights_come_back_from_a_file(file, memory_format):
    net, other = CustomResNet(norm='batch').to(memory_format=memory_format), CustomResNet().to(memory_format=memory_format)
    net.prep[1].running_mean += 1
    assert save_weights(net, file) == file
    assert load_weights(other, file) is other
    assert same(net.state_dict(), other.state_dict())
    assert other.res1[0].weight.is_contiguous(memory_format=memory_format)
    assert [p.name for p in file.parent.iterdir()] == [file.name]

def test_the_file_does_not_depend_on_the_memory_format(tmp_path):
    net = CustomResNet()
    first = save_weights(net, tmp_path/'a').read_bytes()
    assert save_weights(net.to(memory_format=torch.channels_last), tmp_path/'b').read_bytes() == first

def test_a_file_can_be_written_over(file, tiny_net):
    save_weights(tiny_net(), file)
    net = tiny_net()
    assert same(load_weights(tiny_net(), save_weights(net, file)).state_dict(), net.state_dict())

damages = {'cut short': lambda b: b[:-100], 'empty': lambda b: b'', 'text': lambda b: b'text', 'with other bytes': lambda b: b'\xff'*9 + b[9:]}

@pytest.mark.parametrize('damage', damages)
def test_a_damaged_file_is_refused_by_name(file, tiny_net, damage):
    save_weights(tiny_net(), file)
    file.write_bytes(damages[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r'model\.safetensors') as e: load_weights(tiny_net(), file)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('other', [dict(n_out=3), dict(n_out=10)], ids=['of other shapes', 'of other layers'])
def test_weights_of_another_network_are_refused(file, tiny_net, other):
    save_weights(tiny_net(**other), file)
    net = nn.Sequential(*tiny_net(), nn.Linear(10, 10)) if other['n_out'] == 10 else tiny_net()
    with pytest.raises(ValueError, match=r'model\.safetensors'): load_weights(net, file)

def test_a_missing_file_is_refused_by_name(file, tiny_net):
    with pytest.raises(FileNotFoundError, match=r'model\.safetensors'): load_weights(tiny_net(), file)

@pytest.mark.filterwarnings("ignore:.*pickle:UserWarning") # fastai's load_learner says that it unpickles
def test_an_exported_learner_predicts_the_same(small, small_dls, tiny_net):
    learn = cifar_learner(small_dls(), tiny_net(), precision='fp32') # fastai's `load_learner` returns a learner in fp32
    learn.fit(1, .01)
    img = learn.dls.valid_ds[0][0]
    expected = learn.predict(img)[2]
    learn.export('learner.pkl')
    assert torch.allclose(load_learner('learner.pkl').predict(img)[2], expected, atol=1e-6)

# ---- the learner

def test_a_learner_of_digits_has_their_classes():
    learn = cifar_learner(cifar_dls('digits', num_workers=0))
    assert isinstance(learn, Learner) and isinstance(learn.model, CustomResNet) and learn.model.fc.out_features == 10

def test_arguments_of_fastais_learner_are_passed_on(tiny_learner, tmp_path):
    learn = tiny_learner(path=tmp_path/'elsewhere', lr=.5, opt_func=partial(FusedAdam, wd=0.), cbs=GradientClip(1.))
    learn.create_opt()
    assert learn.path == tmp_path/'elsewhere' and learn.opt.hypers[0]['lr'] == .5 and learn.opt.hypers[0]['wd'] == 0
    assert any(isinstance(cb, GradientClip) for cb in learn.cbs)

# ---- recipes

def test_the_recipes_reach_optimizer_loss_and_callbacks(small_dls, tiny_net):
    for recipe, (wd, smoothing, flip) in dict(baseline=(.2, 0, 'random'), best=(.25, .2, 'alternate')).items():
        learn = cifar_learner(small_dls(recipe=recipe), tiny_net()) # which reads the recipe from the loaders
        learn.create_opt()
        assert learn.recipe == learn.dls.recipe == recipes[recipe]
        assert learn.opt.hypers[0]['wd'] == wd and learn.loss_func.func.label_smoothing == smoothing
        assert [f.aug.flip for f in learn.dls.train.after_item.fs if hasattr(f, 'aug')] == [flip]

@pytest.mark.parametrize('recipe, expected', [('baseline', {}), ('best', dict(lookahead=5)), ('fast', dict(sizes=(20, 24, 28, 32, 32), freeze_first=3, lookahead=5)),
                                              ('quick', dict(sizes=(20, 24, 28, 32), freeze_first=2, lookahead=5))])
def test_a_recipe_brings_its_callbacks_and_each_can_be_left_out(small_dls, recipe, expected):
    dls, off = small_dls(recipe=recipe), dict(sizes=(), freeze_first=0, lookahead=0)
    def found(**kwargs):
        cbs = {type(cb): cb for cb in cifar_learner(dls, CustomResNet(width=8), **kwargs).cbs}
        values = dict(sizes=cbs[ImageSizes].sizes if ImageSizes in cbs else (), freeze_first=cbs[FreezeFirst].epochs if FreezeFirst in cbs else 0,
                      lookahead=cbs[Lookahead].every if Lookahead in cbs else 0)
        return {name: value for name, value in values.items() if value}
    assert found() == expected and found(**off) == {}
    for name, value in dict(sizes=(16, 32), freeze_first=1, lookahead=3).items(): assert found(**{name: value}) == expected | {name: value}
    for name in off: assert found(**{name: off[name]}) == {k: v for k, v in expected.items() if k != name}
    assert dls.train.after_item.item_augment.aug.cutout == recipes[recipe].cutout

def test_identity_filters_belong_to_fast_and_quick(small_dls):
    for recipe in recipes:
        weight = new_model(small_dls(), recipes[recipe].whiten, recipes[recipe].dirac, width=8).layer2[0].weight
        is_identity = torch.equal(weight[:16], nn.init.dirac_(torch.empty(16, 16, 3, 3)))
        assert is_identity == (recipe in ('fast', 'quick'))

def test_the_networks_of_the_recipes_differ_in_their_batch_statistics_alone(small_dls):
    for recipe, group in dict(baseline=None, best=32).items(): assert {getattr(m, 'group', None) for m in cifar_learner(small_dls(), recipe=recipe).model.modules() if isinstance(m, nn.BatchNorm2d)} == {group}

def test_what_is_given_overrides_the_recipe(small_dls, tiny_net):
    learn = cifar_learner(small_dls(), tiny_net(), wd=.7, label_smoothing=0.)
    learn.create_opt()
    assert learn.opt.hypers[0]['wd'] == .7 and learn.loss_func.func.label_smoothing == 0

@pytest.mark.parametrize('make', [cifar_dls, cifar_learner], ids=lambda f: f.__name__)
def test_an_unknown_recipe_is_refused(small_dls, small, make):
    with pytest.raises(ValueError, match="recipe.*'secret'.*baseline.*best"):
        make(small if make is cifar_dls else small_dls(), recipe='secret')

# ---- data from elsewhere

def write_pictures(folder, small, sizes, n=6, mode='RGB'):
    "`n` training images of three classes each as <class>/*.png, resized to `sizes` in turn, (width, height)"
    for label in range(3):
        (folder/f'class_{label}').mkdir(parents=True)
        for i, x in enumerate(small.train_x[small.train_y == label][:n]):
            Image.fromarray(x).convert(mode).resize(sizes[i % len(sizes)]).save(folder/f'class_{label}'/f'{i}.png')
    return folder

def from_folder(folder, **kwargs):
    return ImageDataLoaders.from_folder(folder, **dict(valid_pct=.25, seed=0, bs=4, num_workers=0) | kwargs)

augmenting = dict(item_tfms=[Resize(36), RandomCrop(32)],
                  batch_tfms=[*aug_transforms(max_rotate=30, p_affine=1), Normalize.from_stats(*cifar10_stats)])

@pytest.mark.parametrize('sizes', [[(40, 30), (50, 60)], [(48, 48)], [(32, 32)]], ids=['several', '48', '32'])
def test_whitening_is_made_from_pictures_as_validation_shows_them(tmp_path, small, sizes):
    dls = from_folder(write_pictures(tmp_path/'pictures', small, sizes), **augmenting)
    test_dl = dls.test_dl(dls.train_ds.items, num_workers=0)
    expected = torch.cat([x.as_subclass(torch.Tensor) for x, in test_dl])
    assert torch.equal(first_images(dls), expected) and torch.equal(first_images(dls, 5), expected[:5])
    filters = whitening_filters(expected)
    learn = cifar_learner(dls, precision='fp32').remove_cbs(ProgressCallback)
    assert torch.allclose(learn.model.prep[0].weight[:len(filters)], filters, atol=1e-5)
    learn.fit(1, 1e-3)
    assert len(learn.recorder.history) == 1

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_the_whitening_of_our_own_batches_has_not_changed(small, small_dls, pipeline):
    dls = small_dls(pipeline=pipeline, recipe='best')
    whole = dls.valid.after_batch((TensorImage(torch.from_numpy(small.train_x).permute(0, 3, 1, 2)),))[0]
    before = [random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert torch.equal(first_images(dls), whole.as_subclass(torch.Tensor))
    assert before == [random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    set_seed(0)
    model = whiten_first_layer(CustomResNet(ghost=32, logit_scale=.125), whole.as_subclass(torch.Tensor))
    set_seed(0)
    assert same(cifar_learner(dls).model.state_dict(), model.state_dict())

class Inverted(RandTransform):
    "Training images alone have their colours inverted"
    def encodes(self, x:PILImage): return PILImage.create(255 - np.asarray(x))

def a_torchvision_set(small, transform, n=12):
    "torchvision's CIFAR-10, with a few of the small images in place of its files"
    data = CIFAR10.__new__(CIFAR10)
    VisionDataset.__init__(data, '.', transform=transform)
    data.data, data.targets, data.classes = small.train_x[:n], small.train_y[:n].tolist(), small.vocab
    return data

def from_elsewhere(kind, small):
    "`DataLoaders` of the first 12 training images, which training shows inverted where the kind of data set can"
    x, y = small.train_x[:12], small.train_y[:12].tolist()
    plain, inverted = transforms.ToTensor(), transforms.Compose([transforms.ToTensor(), lambda x: 1 - x])
    tensors = TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2)/255, torch.tensor(y))
    if kind == 'Datasets':
        tfms = [[lambda i: x[i], PILImage.create, Inverted()], [lambda i: small.vocab[y[i]], Categorize(small.vocab)]]
        dsets = Datasets(list(range(12)), tfms, splits=(list(range(12)), [0, 1]))
        return dsets.dataloaders(bs=4, num_workers=0, after_item=[ToTensor], after_batch=[IntToFloatTensor])
    if kind == 'torchvision':
        sets = a_torchvision_set(small, inverted), a_torchvision_set(small, plain)
        return DataLoaders.from_dsets(*sets, bs=4, num_workers=0)
    if kind == 'torchvision, parts':
        sets = Subset(a_torchvision_set(small, inverted), range(12)), Subset(a_torchvision_set(small, plain), range(4))
        return DataLoaders.from_dsets(*sets, bs=4, num_workers=0)
    if kind == 'tensors': return DataLoaders.from_dsets(tensors, tensors, bs=4, num_workers=0)
    if kind == 'tensors, training only': return DataLoaders.from_dsets(tensors, bs=4, num_workers=0)
    valid = TorchDataLoader(tensors, 4)
    if kind == 'torch': return DataLoaders(TorchDataLoader(tensors, 4, shuffle=True), valid)
    if kind == 'stream': return DataLoaders(TorchDataLoader(Stream(tensors), 4), valid)

class Stream(IterableDataset):
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)

kinds = ['Datasets', 'torchvision', 'torchvision, parts', 'tensors', 'tensors, training only', 'torch', 'stream']

@pytest.mark.parametrize('kind', kinds)
def test_first_images_are_not_augmented_whatever_loads_them(small, kind):
    dls = from_elsewhere(kind, small)
    images, loaded = first_images(dls, 10), torch.from_numpy(small.train_x[:10]).permute(0, 3, 1, 2)/255
    assert torch.allclose(images, loaded) and type(images) is torch.Tensor
    if kind in ('Datasets', 'torchvision'): # and training still sees them inverted
        x = dls.train.after_batch(dls.train.do_batch([dls.train.after_item(dls.train_ds[i]) for i in range(10)]))[0]
        assert torch.allclose(x, 1 - loaded, atol=1e-6)

@pytest.mark.filterwarnings('ignore:.*ChannelsLast')
@pytest.mark.parametrize('kind', ['Datasets', 'torchvision', 'torchvision, parts', 'tensors', 'torch'])
def test_a_learner_trains_on_data_from_elsewhere(small, kind):
    dls = from_elsewhere(kind, small)
    if kind in ('tensors', 'torch'):
        with pytest.raises(ValueError, match='dls.c'): cifar_learner(dls)
        dls.c = 10
    learn = cifar_learner(dls, precision='fp32').remove_cbs(ProgressCallback)
    assert learn.model.fc.out_features == 10
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.history[0]['valid_loss'])

wrong_images = {'48': ([(48, 48)], {}, '3×48×48.*Resize'),
                'resized to 40': ([(48, 48)], dict(item_tfms=Resize(40)), '3×40×40.*Resize'),
                'two sizes': ([(32, 32), (40, 40)], {}, '(several sizes|3×40×40).*Resize'),
                'grey': ([(32, 32)], dict(img_cls=PILImageBW), '1×32×32')}

@pytest.mark.parametrize('sizes, kwargs, said', wrong_images.values(), ids=wrong_images)
def test_images_that_the_default_model_does_not_take_are_refused(tmp_path, small, tiny_net, sizes, kwargs, said):
    dls = from_folder(write_pictures(tmp_path/'pictures', small, sizes), **kwargs)
    with pytest.raises(ValueError, match=said): cifar_learner(dls)

def test_images_of_another_size_are_for_another_model(tmp_path, small, tiny_net):
    dls = from_folder(write_pictures(tmp_path/'pictures', small, [(48, 48)]))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    learn = cifar_learner(dls, model).remove_cbs(ProgressCallback)
    learn.fit(1, 1e-3)

@pytest.mark.parametrize('block', [MultiCategoryBlock(vocab=['a', 'b']), RegressionBlock()], ids=['classes', 'numbers'])
def test_targets_that_are_not_one_class_an_image_are_refused(small, tiny_net, block):
    target = lambda i: ['a', 'b'][:i % 3] if 'Multi' in str(block.type_tfms) else i/2
    get_x, splitter = lambda i: small.train_x[i], RandomSplitter(seed=0)
    data = DataBlock((ImageBlock, block), get_x=get_x, get_y=target, splitter=splitter)
    dls = data.dataloaders(range(12), bs=4, num_workers=0)
    for model in (None, tiny_net(2)):
        with pytest.raises(ValueError, match='class'): cifar_learner(dls, model)

# ---- pictures of any kind

def some_photo(mode='RGB', size=(90, 60)):
    "A picture that is not symmetric, and not of one colour in its corners"
    w, h = size
    rows, cols = np.mgrid[:h, :w]
    rgb = np.stack([255*cols/w, 255*rows/h, 128 + 100*np.sin(rows/7 + cols/11)], axis=-1).astype(np.uint8)
    img = Image.fromarray(rgb)
    if mode in ('RGBA', 'LA'):
        img = img.convert(mode)
        img.putalpha(Image.fromarray((255*(rows/h)**2).astype(np.uint8)))
    if mode == 'I;16': img = Image.fromarray((rows*700 + cols*100).astype(np.uint16))
    return img.convert(mode) if img.mode != mode else img

def rotated(orientation): # as a camera saves it
    exif = Image.Exif()
    exif[0x0112] = orientation
    return dict(exif=exif)

photos = {
    'RGB.jpg': {}, 'RGB.webp': {}, 'RGB.bmp': {}, 'L.png': {}, 'LA.png': {}, 'RGBA.png': {}, 'RGBA.tif': {},
    'P.gif': {}, 'P.png': dict(transparency=7), '1.png': {}, 'I;16.png': {}, 'I;16.tif': {}, 'CMYK.jpg': {},
    'CMYK.tif': {}, 'RGB-6.jpg': rotated(6), 'RGB-3.jpg': rotated(3), 'RGB-8.png': rotated(8), 'RGB-6.tif': rotated(6)}

@pytest.fixture
def photo(request, tmp_path):
    path = tmp_path/request.param
    some_photo(path.stem.split('-')[0]).save(path, **photos[request.param])
    return path

def as_given(path, kind):
    if kind == 'PIL, loaded':
        with Image.open(path) as img: img.load()
        return img
    return dict(str=str, Path=lambda p: p, bytes=lambda p: p.read_bytes(), PIL=Image.open)[kind](path)

def by_the_command(learn, small, path): # what `cifar_predict` prints
    return class_probabilities(learn.model, [read_image(path)], small.stats)[0]

@pytest.mark.parametrize('photo', photos, indirect=True)
def test_predict_sees_a_picture_as_the_command_does(photo, small, tiny_learner):
    learn = tiny_learner()
    expected = by_the_command(learn, small, photo)
    for kind in 'str', 'Path', 'bytes', 'PIL', 'PIL, loaded':
        given = as_given(photo, kind)
        name, label, probs = learn.predict(given)
        if kind == 'PIL': given.close()
        assert torch.allclose(probs, expected, atol=1e-5), kind
        assert name == small.vocab[label] == small.vocab[expected.argmax()]

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'I;16', '1'])
def test_predict_takes_what_is_in_memory(mode, small, tiny_learner, tmp_path):
    img, learn = some_photo(mode), tiny_learner()
    array = np.asarray(img)
    first = torch.from_numpy(array.copy().reshape(*array.shape[:2], -1)).permute(2, 0, 1)
    img.save(tmp_path/'a.png')
    expected = by_the_command(learn, small, tmp_path/'a.png')
    for given in array, first, TensorImage(first), img, PILImage(img.copy()):
        assert torch.allclose(learn.predict(given)[2], expected, atol=1e-5), type(given)
    assert np.array_equal(np.asarray(img), array) and type(img) is Image.Image # the picture given is left as it was

def tensor_image(x): return TensorImage(torch.from_numpy(x).permute(2, 0, 1))

@pytest.mark.parametrize('given', [
    lambda x: x.astype(np.int64), lambda x: x/255, lambda x: (x/255).astype(np.float32),
    lambda x: x.astype(np.uint16)*256, lambda x: tensor_image(x/255), lambda x: tensor_image(x.astype(np.int64)),
    lambda x: tensor_image(x).bfloat16()/255],
    ids=['int64', 'float64', 'float32', 'uint16', 'float tensor', 'int64 tensor', 'bf16 tensor'])
def test_arrays_of_other_types_are_read_by_their_range(given, tiny_learner):
    x, learn = np.array(some_photo()), tiny_learner()
    assert torch.allclose(learn.predict(given(x))[2], learn.predict(x)[2], atol=1e-3) # bf16 has eight bits

@pytest.mark.parametrize('given, words', [
    (np.zeros((3, 40, 40), np.uint8), r'shape.*\(3, 40, 40\)'), (np.zeros((0, 4, 3), np.uint8), r'shape.*\(0, 4, 3\)'),
    (np.zeros(9, np.uint8), r'shape.*\(9,\)'), (np.full((9, 9, 3), -1.), '-1'), (np.full((9, 9), 300), '300'),
    (np.full((9, 9), np.nan), 'nan'), (np.full((9, 9), 'a'), 'dtype'), (tensor_image(np.full((9, 9, 3), 2.)), '2'),
    (Image.new('F', (40, 40)), 'floating-point'), (b'no picture', 'PNG')],
    ids=['channels first', 'empty', 'one axis', 'negative', 'over 255', 'no numbers', 'text', 'over 1', 'F', 'bytes'])
def test_predict_refuses_what_is_no_picture(given, words, tiny_learner):
    with pytest.raises(ValueError, match=words): tiny_learner().predict(given)

unreadable = {'nothing.png': FileNotFoundError, 'text.png': ValueError, 'folder': ValueError}

@pytest.mark.parametrize('name, kind', unreadable.items())
def test_files_that_cannot_be_read_are_refused_as_the_command_does(name, kind, tiny_learner, tmp_path):
    (tmp_path/'text.png').write_text('no picture')
    (tmp_path/'folder').mkdir()
    learn = tiny_learner()
    with pytest.raises(kind, match=name) as expected: read_image(tmp_path/name)
    with pytest.raises(kind) as of_predict: learn.predict(tmp_path/name)
    with pytest.raises(kind) as of_get_preds: learn.get_preds(dl=learn.dls.test_dl([tmp_path/name], num_workers=0))
    assert str(of_predict.value) == str(of_get_preds.value) == str(expected.value)

def test_a_file_that_a_worker_cannot_read_is_refused_as_elsewhere(tiny_learner, tmp_path): # torch takes 5 s to end a worker then
    (tmp_path/'text.png').write_text('no picture')
    learn = tiny_learner()
    with pytest.raises(ValueError) as expected: read_image(tmp_path/'text.png')
    with pytest.raises(ValueError) as of_a_worker: learn.get_preds(dl=learn.dls.test_dl([tmp_path/'text.png'], num_workers=1))
    assert str(of_a_worker.value) == str(expected.value)

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
@pytest.mark.parametrize('num_workers', [0, 2])
def test_pictures_of_several_sizes_and_kinds_are_predicted_together(
        pipeline, num_workers, small, small_dls, tiny_learner, tmp_path):
    learn, paths = tiny_learner(small_dls(pipeline=pipeline)), []
    for mode, size in ('RGB', (90, 60)), ('L', (32, 32)), ('RGBA', (20, 70)), ('I;16', (640, 480)), ('RGB', (32, 32)):
        paths.append(tmp_path/f'{len(paths)}.png')
        some_photo(mode, size).save(paths[-1])
    probs, _ = learn.get_preds(dl=learn.dls.test_dl(paths, bs=2, num_workers=num_workers))
    assert torch.allclose(probs, torch.stack([by_the_command(learn, small, path) for path in paths]), atol=1e-5)
    square = np.asarray(some_photo('RGB', (64, 64)))
    arrays = [square, square[::-1].copy()] # of one size, which is not the network's
    probs, _ = learn.get_preds(dl=learn.dls.test_dl(arrays, num_workers=num_workers))
    assert torch.allclose(probs, torch.stack([learn.predict(Image.fromarray(x))[2] for x in arrays]), atol=1e-5)

@pytest.mark.slow
def test_an_exported_learner_predicts_a_photo_in_another_process(small, tiny_learner, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    learn.export('learner.pkl')
    some_photo('RGBA').save(tmp_path/'photo.png')
    code = """
import json, sys
from fastai.vision.all import load_learner
learn = load_learner('learner.pkl')
with learn.no_bar():
    probs = [learn.predict('photo.png')[2]]
    probs += learn.get_preds(dl=learn.dls.test_dl(['photo.png']*2, num_workers=0))[0]
print(json.dumps([p.tolist() for p in probs]))
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for probs in json.loads(done.stdout.splitlines()[-1]):
        assert np.allclose(probs, by_the_command(learn, small, tmp_path/'photo.png'), atol=1e-5)

# ---- class weights

def weighted_loss(logits, labels, weights, smoothing):
    "The smoothed cross-entropy of each image, times the weight of its class, over the sum of the weights"
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = np.full(logits.shape, smoothing/logits.shape[1])
    wanted[np.arange(len(labels)), labels] += 1 - smoothing
    of_each = weights[labels]
    return (of_each*-(wanted*log_probs).sum(axis=1)).sum()/of_each.sum(), of_each*-(wanted*log_probs).sum(axis=1)

@pytest.mark.parametrize('smoothing', [0., .2])
def test_class_weights_and_smoothing_agree_with_their_definition(smoothing):
    labels = np.repeat(np.arange(5), [40, 20, 9, 3, 1])
    logits = np.random.default_rng(0).normal(size=(len(labels), 5))
    weights = len(labels)/(5*np.bincount(labels))
    loss, x, y = balanced_loss(labels, smoothing), torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)
    expected, of_each = weighted_loss(logits, labels, loss.func.weight.numpy(), smoothing)
    assert np.allclose(loss.func.weight, weights) and loss(x, y).item() == pytest.approx(expected, rel=1e-5)
    loss.reduction = 'none'
    assert np.allclose(loss(x, y), of_each, rtol=1e-5)
    loss.reduction = 'sum'
    assert loss(x, y).item() == pytest.approx(of_each.sum(), rel=1e-5)

def test_class_weights_without_smoothing_are_those_of_pytorch():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    x, y, loss = torch.randn(10, 3), torch.tensor(labels), balanced_loss(labels)
    assert torch.equal(loss(x, y), nn.CrossEntropyLoss(weight=loss.func.weight)(x, y))

def test_no_class_is_pulled_towards_rare_ones():
    "With a logit of its own for each class and output, the best probabilities are the smoothed labels, whatever the weights"
    labels, logits = np.repeat(np.arange(10), [162, 40, 20, 20, 10, 10, 10, 10, 8, 6]), torch.zeros(10, 10, requires_grad=True)
    loss, opt = balanced_loss(labels, .2), torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12)
    def closure():
        opt.zero_grad()
        value = loss(logits[labels], torch.tensor(labels))
        value.backward()
        return value
    opt.step(closure)
    assert torch.allclose(logits.softmax(dim=1).diag(), torch.tensor(.82), atol=1e-3)

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_a_learner_weighs_the_classes_of_its_loaders_as_a_run_does(digits, tiny_net, pipeline):
    idxs = np.concatenate([np.flatnonzero(digits.train_y == label)[:4 + label] for label in range(10)])
    few = digits._replace(train_x=digits.train_x[idxs], train_y=digits.train_y[idxs])
    dls = cifar_dls(few, bs=25, num_workers=0, pipeline=pipeline, valid='holdout')
    learn = cifar_learner(dls, tiny_net(), 'fp32', class_weights=True)
    run, _ = settings_learner(TrainSettings('digits', class_weights=True, valid='holdout', num_workers=0, width=8), few)
    counts = np.bincount([int(y) for _, y in dls.train_ds])
    assert len(set(counts)) > 1 and np.allclose(learn.loss_func.func.weight, counts.sum()/(10*counts))
    assert torch.equal(learn.loss_func.func.weight, run.loss_func.func.weight) and learn.loss_func.func.label_smoothing == .2
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

def test_class_weights_need_labels_and_the_loss_of_the_package(digits, tiny_net):
    dls = cifar_dls(digits.first(64, 32), bs=32, num_workers=0)
    with pytest.raises(ValueError, match='class_weights is True'): cifar_learner(dls, tiny_net(), class_weights=True, loss_func=nn.CrossEntropyLoss())
    one_class = digits.first(64, 32)._replace(train_y=np.full(64, 3)) # not in place: others use the digits, too
    with pytest.raises(ValueError, match=f'class_weights is True.*{digits.vocab[0]}'): cifar_learner(cifar_dls(one_class, bs=32, num_workers=0), tiny_net(), class_weights=True)
    stream = DataLoaders(TorchDataLoader(LabelledStream(), 4), TorchDataLoader(LabelledStream(), 4))
    stream.c = 5
    with pytest.raises(ValueError, match='class_weights is True'): cifar_learner(stream, a_net(), class_weights=True)

class LabelledStream(IterableDataset):
    def __iter__(self): return iter([(torch.zeros(3, 8, 8), 1)]*8)

# ---- a model of one's own

def conv(c_in, c_out): return nn.Sequential(nn.Conv2d(c_in, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c_out))

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
@pytest.mark.parametrize('model, named', [(conv(1, 10), r'32×32'), (conv(3, 5), r'\b5\b.*\b10\b'), (nn.Sequential(nn.Flatten(), nn.Linear(3*28*28, 10)), '32×32')])
def test_a_model_that_does_not_suit_the_images_is_refused_at_once(digits, pipeline, model, named):
    with pytest.raises(ValueError, match=named) as e: cifar_learner(cifar_dls(digits.first(64, 32), bs=32, num_workers=0, pipeline=pipeline), model)
    assert '\n' not in str(e.value)

class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = CustomResNet(width=8, dropout=.1), 0
    def forward(self, x):
        self.calls += 1
        torch.rand(1), np.random.rand(), random.random()
        return self.net(x)

def test_the_check_of_a_model_leaves_no_trace(digits):
    dls, model, seen = cifar_dls(digits.first(64, 32), bs=32, num_workers=0, seed=0), Watched(), []
    model.register_forward_hook(lambda *args: seen.append(args))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    draw = lambda: (torch.rand(1).item(), np.random.rand(), random.random())
    set_seed(0); expected = draw()
    set_seed(0); learn = cifar_learner(dls, model, 'fp32')
    assert draw() == expected and not seen and not model.calls and model.training and learn.model is model and same(before, model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert seen and model.calls

class Grey(Callback):
    def before_batch(self): self.learn.xb = (self.x.mean(dim=1, keepdim=True),)

@pytest.mark.parametrize('model, kwargs', [
    (conv(3, 12), {}), (conv(1, 10), dict(cbs=Grey())),
    (conv(3, 1), dict(loss_func=lambda pred, y: (pred.squeeze() - y.float()).square().mean(), metrics=[])),
    (nn.utils.parametrizations.weight_norm(nn.Linear(3*32*32, 10)), dict(cbs=on('before_batch', lambda cb: setattr(cb.learn, 'xb', (cb.x.flatten(1),)))))])
def test_models_that_train_are_not_refused(digits, model, kwargs):
    learn = cifar_learner(cifar_dls(digits.first(64, 32), bs=32, num_workers=0), model, 'fp32', **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

def test_a_lazy_module_is_not_tried(digits):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    learn = cifar_learner(cifar_dls(digits.first(64, 32), bs=32, num_workers=0), model, 'fp32')
    model(learn.dls.one_batch()[0].cpu())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

def test_a_refused_callback_leaves_none_of_the_others_behind(tiny_learner):
    learn = tiny_learner()
    before = [cb.name for cb in learn.cbs]
    with pytest.raises(ValueError, match='MixedPrecision'): learn.fit(1, cbs=[OneCycle(1e-5, 1e-2), MixedPrecision()])
    assert [cb.name for cb in learn.cbs] == before
