"""Batches made at once, on the device: the same pixels, the same distribution, and a DataLoader as fastai's users know it."""
import io, itertools, math, platform, random, shutil, subprocess, sys, warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import (Brightness, Callback, Categorize, CategoryBlock, CategoryMap, CrossEntropyLossFlat, CutMix, DataBlock, Flip, L,
                               FuncSplitter, ImageBlock, IntToFloatTensor, ItemGetter, ItemTransform, Learner, MixUp,
                               Normalize, Pipeline, PILImage, ProgressCallback, RandomResizedCrop, Resize, Rotate,
                               Saturation, TensorImage, ToTensor, Transform, accuracy, aug_transforms, error_rate,
                               load_learner, set_seed)
from PIL import Image
from scipy.ndimage import center_of_mass
from scipy.stats import chi2_contingency, chisquare, ks_2samp, kstest
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_fastai.data.augment import (CropFlipCutout, Draws, ItemAugment, augment_batch, draw, item_pipeline, pack_colour,
                                       pack_pixels, unpack_pixels)
from cifar_fastai.core import cifar10_stats
from cifar_fastai.data.loader import BatchDL, NormalizeBytes, Resident, SeededDL, resolve_device
from cifar_fastai.data.block import cifar_block, cifar_dls, resident_images
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.callback.recorder import EpochProgress
from cifar_fastai.learner import cifar_learner
from cifar_fastai.models import CustomResNet
from cifar_fastai.callback.schedule import OneCycle, range_test

fill = tuple(round(255*m) for m in cifar10_stats[0])
cpu = torch.device('cpu')
pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"), # fastai hands matplotlib a tensor
              pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")] # and its checkpoints name NumPy as it was

@pytest.fixture(scope='module')
def images(): return np.random.default_rng(0).integers(256, size=(50, 32, 32, 3), dtype=np.uint8)

@pytest.fixture(scope='module')
def ruler():
    "An image whose pixels say where they are: red is the row, green the column"
    rows, cols = np.mgrid[:32, :32]
    return np.stack([rows, cols, np.full_like(rows, 200)], axis=-1).astype(np.uint8)

def one_by_one(img, aug, top, left, flip, hole_top, hole_left):
    "What `aug` does to an image for given draws, in NumPy's words"
    side = aug.size + 2*aug.pad
    before = max(0, side - 32)//2
    border = [(before, max(0, side - 32) - before)]*2
    if aug.pad_mode == 'reflect': img = np.pad(img, [*border, (0, 0)], mode='reflect')
    else: img = np.stack([np.pad(img[..., c], border, constant_values=fill[c]) for c in range(3)], axis=-1)
    out = img[top:top + aug.size, left:left + aug.size]
    out = (out[:, ::-1] if flip else out).copy()
    out[hole_top:hole_top + aug.cutout, hole_left:hole_left + aug.cutout] = fill
    return out

# ---- pixels

@pytest.mark.parametrize('aug', [CropFlipCutout(), CropFlipCutout(pad_mode='constant'), CropFlipCutout(pad=0), CropFlipCutout(pad=2, size=28), CropFlipCutout(size=24, pad=0),
                                 CropFlipCutout(pad=8, cutout=0), CropFlipCutout(cutout=32), CropFlipCutout(pad=31), CropFlipCutout(pad=7, pad_mode='constant', cutout=3)], ids=str)
def test_for_given_draws_the_pixels_are_those_of_one_image_after_the_other(images, aug):
    draws, idxs = draw(aug, 200, key=(3, 1)), torch.from_numpy(np.random.default_rng(1).integers(50, size=200))
    batch = unpack_pixels(augment_batch(pack_pixels(images), idxs, draws, aug)).numpy()
    assert batch.shape == (200, aug.size, aug.size, 3) and batch.dtype == np.uint8
    for out, i, *drawn, _ in zip(batch, idxs, *draws): assert np.array_equal(out, one_by_one(images[i], aug, *drawn))

@pytest.mark.parametrize('pad_mode, border', [('reflect', cv2.BORDER_REFLECT_101), ('constant', cv2.BORDER_CONSTANT)])
@pytest.mark.parametrize('shape', [(32, 32), (24, 40)], ids=str)
def test_a_rotated_image_is_that_of_opencv(pad_mode, border, shape):
    (h, w), angles = shape, [-180, -90, -30, -5, -.5, 0, 5, 20, 45, 180]
    img = cv2.GaussianBlur(np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8), (0, 0), 1.5)
    aug = CropFlipCutout(pad=0, size=min(shape), flip='none', cutout=0, rotate=180, pad_mode=pad_mode)
    zeros = torch.zeros(len(angles), dtype=torch.int64)
    draws = Draws(*[zeros]*5, (1000*torch.tensor(angles)).round().long())
    batch = unpack_pixels(augment_batch(pack_pixels(img[None]), zeros, draws, aug)).numpy()
    for angle, out in zip(angles, batch):
        matrix = cv2.getRotationMatrix2D(((w - 1)/2, (h - 1)/2), angle, 1)
        expected = cv2.warpAffine(img, matrix, (w, h), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=[int(c) for c in fill])
        difference = np.abs(out.astype(int) - expected[:min(shape), :min(shape)]).mean(axis=(0, 1))
        assert difference.max() < 1 and (angle or np.array_equal(out, img[:min(shape), :min(shape)]))

def test_a_rotation_leaves_the_other_draws_as_they_are_and_covers_its_angles():
    plain, rotated = draw(CropFlipCutout(), 5000, key=(3, 1)), draw(CropFlipCutout(rotate=5), 5000, key=(3, 1))
    for name in Draws._fields[:-1]: assert torch.equal(getattr(plain, name), getattr(rotated, name))
    assert not plain.angle.any() and rotated.angle.abs().max() <= 5000
    assert kstest(rotated.angle.numpy(), 'uniform', (-5000, 10_000)).pvalue > 1e-3

def test_both_pipelines_rotate_by_the_same_angles():
    aug, dot = CropFlipCutout(pad=0, flip='none', cutout=0, rotate=20), np.zeros((32, 32, 3), np.uint8)
    dot[13:19, 26:32] = 255 # its centre of mass tells the angle
    def angles(imgs): return [math.degrees(math.atan2(15.5 - y, x - 15.5)) for y, x in (center_of_mass(img[..., 0]) for img in imgs)]
    as_batch = unpack_pixels(augment_batch(pack_pixels(dot[None]), torch.zeros(400, dtype=torch.int64), draw(aug, 400, key=1), aug)).numpy()
    pipeline = item_pipeline(aug)
    pipeline.set_random_seed(0)
    found = [angles(as_batch), angles(pipeline(image=dot)['image'] for _ in range(400))]
    assert all(-21 < min(each) < -17 and 17 < max(each) < 21 for each in found) and ks_2samp(*found).pvalue > 1e-3

def test_images_come_back_from_their_packed_form(images):
    packed = pack_pixels(images)
    assert packed.dtype == torch.int32 and packed.shape == (50, 32, 32)
    assert np.array_equal(unpack_pixels(packed).numpy(), images)
    assert unpack_pixels(packed).untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()

def test_the_images_are_not_changed(images):
    packed = pack_pixels(images)
    augment_batch(packed, torch.arange(50), draw(CropFlipCutout(), 50, key=0))
    assert np.array_equal(unpack_pixels(packed).numpy(), images)

def test_the_hole_has_the_colour_that_is_given(images):
    out = augment_batch(pack_pixels(images), torch.arange(50), draw(CropFlipCutout(cutout=32), 50, key=0), CropFlipCutout(cutout=32), pack_colour((0, .5, 1)))
    assert (unpack_pixels(out) == torch.tensor([0, 128, 255])).all()

# ---- draws

def test_draws_are_a_function_of_the_key():
    aug = CropFlipCutout()
    same, again, other = (torch.stack(draw(aug, 100, key)) for key in [(1, 2), (1, 2), (1, 3)])
    assert torch.equal(same, again) and not torch.equal(same, other)

def test_draws_do_not_touch_the_global_generators():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw(CropFlipCutout(), 100, key=0)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()

@pytest.mark.parametrize('field, places', [('top', 9), ('left', 9), ('flip', 2), ('hole_top', 25), ('hole_left', 25)])
def test_every_value_is_equally_likely(field, places):
    counts = np.bincount(getattr(draw(CropFlipCutout(), 50_000, key=(5, 6)), field), minlength=places)
    assert len(counts) == places and chisquare(counts).pvalue > 1e-4

@pytest.mark.parametrize('flip_p', [0, 1])
def test_a_flip_can_be_never_or_always(flip_p): assert set(draw(CropFlipCutout(flip_p=flip_p), 100, key=0).flip.tolist()) == {flip_p}

def test_the_six_draws_are_independent_of_each_other():
    draws = torch.stack(draw(CropFlipCutout(rotate=5), 50_000, key=1)).double()
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < .02

def read_off(out):
    "(row offset, column offset, flip, row and column of the hole) of an augmented ruler"
    hole = (out == fill).all(axis=-1)
    ys, xs = np.nonzero(hole)
    free = ~hole
    free[:4], free[-4:], free[:, :4], free[:, -4:] = False, False, False, False # reflected, perhaps
    y, x = np.argwhere(free)[0]
    flip = np.median(np.diff(out[..., 1].astype(int), axis=1)) < 0
    return int(out[y, x, 0]) - y, int(out[y, x, 1]) - (31 - x if flip else x), flip, ys[0], xs[0]

@pytest.fixture(scope='module')
def both_ways(ruler):
    "What 4,000 augmented rulers of each pipeline show"
    n, pipeline = 4000, item_pipeline()
    pipeline.set_random_seed(0)
    at_once = augment_batch(pack_pixels(ruler[None]), torch.zeros(n, dtype=torch.int64), draw(CropFlipCutout(), n, key=(7, 8)))
    return np.array([read_off(pipeline(image=ruler)['image']) for _ in range(n)]), np.array([read_off(out) for out in unpack_pixels(at_once).numpy()])

@pytest.mark.parametrize('column, places', list(enumerate([9, 9, 2, 25, 25])), ids=['row offset', 'column offset', 'flip', 'row of the hole', 'column of the hole'])
def test_both_pipelines_draw_from_the_same_distribution(both_ways, column, places):
    values = [np.unique(way[:, column]) for way in both_ways]
    assert np.array_equal(*values) and len(values[0]) == places
    counts = [[np.sum(way[:, column] == v) for v in values[0]] for way in both_ways]
    assert chi2_contingency(counts).pvalue > 1e-4

@pytest.mark.slow
def test_both_pipelines_have_the_same_pixel_statistics(digits):
    some = digits.first(640, 10)
    def means(pipeline): # of each of 20 epochs: mean and standard deviation of the pixels, per position of a coarse grid
        dl = cifar_dls(some, bs=640, pipeline=pipeline, seed=1, num_workers=0).train
        epochs = torch.stack([next(iter(dl))[0].as_subclass(torch.Tensor).mean(1).reshape(640, 4, 8, 4, 8).mean(dim=(0, 2, 4)) for _ in range(20)])
        return epochs.mean(0), epochs.std(0)/20**.5
    (item, item_error), (batch, batch_error) = means('item'), means('batch')
    z = (item - batch)/(item_error**2 + batch_error**2).sqrt()
    assert z.abs().max() < 5 and z.std() < 2, z

# ---- the DataLoader

@pytest.fixture
def dls(small): return cifar_dls(small, bs=16, seed=0)

def test_it_is_the_default_and_the_item_pipeline_can_be_asked_for(small):
    assert type(cifar_dls(small).train) is BatchDL and type(cifar_dls(small, pipeline='item').train) is SeededDL

def test_validation_batches_equal_those_of_the_item_pipeline(small, dls):
    for (x, y), (x1, y1) in zip(dls.valid, cifar_dls(small, bs=16, pipeline='item', num_workers=0).valid, strict=True):
        assert torch.equal(x, x1) and torch.equal(y, y1) and type(x) is type(x1) and type(y) is type(y1)

def test_the_order_is_that_of_the_item_pipeline(small, dls):
    item = cifar_dls(small, bs=16, seed=0, pipeline='item', num_workers=0).train
    for _ in range(2): assert torch.equal(torch.cat([y for _, y in dls.train]), torch.cat([y for _, y in item]))

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
@pytest.mark.parametrize('flip', ['random', 'alternate'])
def test_a_pass_within_a_pass_changes_nothing_of_it(small, pipeline, flip):
    def batches(within):
        aug = CropFlipCutout(flip=flip)
        dl = cifar_dls(small, bs=16, seed=0, aug=aug, pipeline=pipeline, num_workers=0, device='cpu').train
        found = []
        for x, y in dl:
            found.append((x.clone(), y))
            within(dl)
        return found
    for within in lambda dl: dl.one_batch(), list, lambda dl: next(iter(dl)):
        for (x, y), (x1, y1) in zip(batches(lambda dl: None), batches(within), strict=True): assert torch.equal(x, x1) and torch.equal(y, y1)

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_a_loader_without_a_batch_size_gives_single_images(small, pipeline):
    dl = cifar_dls(small, bs=16, seed=0, pipeline=pipeline, num_workers=0, device='cpu').valid.new(bs=None)
    items = list(dl)
    assert [int(y) for _, y in items] == small.test_y.tolist() and items[0][0].shape[-3:] == (3, 32, 32)

def test_no_item_is_ever_made(dls, monkeypatch):
    dls.train.one_batch()
    def never(*args): raise AssertionError('an item was made')
    for name in ('do_item', 'create_item'): monkeypatch.setattr(BatchDL, name, never)
    assert sum(len(x) for dl in (dls.train, dls.valid) for x, _ in dl) == 120

class Ops(TorchDispatchMode):
    "Counts what torch is asked to do"
    def __init__(self):
        super().__init__()
        self.counts = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

def test_the_number_of_operations_does_not_depend_on_the_batch_size(digits):
    def operations(bs):
        batches = iter(cifar_dls(digits, bs=bs, seed=0).train)
        next(batches)
        with Ops() as ops: next(batches)
        return ops.counts
    assert operations(8) == operations(256) and sum(operations(8).values()) < 100

def test_batches_are_channels_last_as_the_network_wants_them(dls): assert dls.one_batch()[0].is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize('drop_last, sizes', [(False, [32, 32, 16]), (True, [32, 32])])
def test_the_last_batch_is_kept_or_dropped(dls, drop_last, sizes):
    dl = dls.train.new(bs=32, drop_last=drop_last)
    assert [len(y) for _, y in dl] == sizes and len(dl) == len(sizes)

def test_new_shares_the_images(dls):
    assert dls.train.new(bs=5).resident is dls.train.resident and dls.valid.new(shuffle=True).resident is dls.valid.resident
    assert dls.train.resident is not dls.valid.resident

def test_show_batch_shows_one_image_in_many_ways(dls):
    dls.train.show_batch(max_n=9, unique=True)
    shown = [ax.images[0].get_array() for ax in plt.gcf().axes]
    assert len(shown) == 9 and len({img.tobytes() for img in map(np.asarray, shown)}) == 9
    assert len({ax.get_title() for ax in plt.gcf().axes}) == 1
    assert not np.array_equal(*[torch.cat([y for _, y in dls.train]).numpy() for _ in range(2)]) # afterwards it shuffles again

def test_decoding_brings_the_images_back(small, dls):
    x, y = dls.valid.decode(dls.valid.one_batch())
    assert type(x) is TensorImage and np.array_equal(x.permute(0, 2, 3, 1).numpy(), small.test_x[:16])
    assert [str(label) for _, label in dls.valid.decode_batch(dls.valid.one_batch(), max_n=5)] == [small.vocab[label] for label in small.test_y[:5]]

def test_a_test_dataloader_takes_arrays_images_and_files(small, dls, tmp_path):
    want = dls.valid.one_batch()[0][:6]
    for i, img in enumerate(small.test_x[:6]): PILImage.create(img).save(tmp_path/f'{i}.png')
    for items in list(small.test_x[:6]), [PILImage.create(img) for img in small.test_x[:6]], sorted(tmp_path.glob('*.png')):
        got = dls.test_dl(items, num_workers=0).one_batch()
        assert len(got) == 1 and torch.equal(got[0], want)

def test_a_test_dataloader_takes_labels(small, dls):
    items = [(img, small.vocab[label], True) for img, label in zip(small.test_x[:6], small.test_y)]
    x, y = dls.test_dl(items, with_labels=True).one_batch()
    assert torch.equal(x, dls.valid.one_batch()[0][:6]) and y.tolist() == small.test_y[:6].tolist()

def test_a_block_of_ones_own_is_batched_from_the_arrays_that_are_given(small):
    block = DataBlock((ImageBlock, CategoryBlock(vocab=small.vocab, sort=False)), get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=FuncSplitter(lambda o: o[2]),
                      get_items=lambda data: [(img, small.vocab[label], i < 20) for i, (img, label) in enumerate(zip(data.train_x, data.train_y))], item_tfms=ItemAugment())
    arrays = [dict(resident=Resident(x, y)) for x, y in ((small.train_x[20:], small.train_y[20:]), (small.train_x[:20], small.train_y[:20]))]
    dls = block.dataloaders(small, bs=10, dl_type=BatchDL, dl_kwargs=arrays)
    x, y = dls.valid.decode(dls.valid.one_batch())
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), small.train_x[:10]) and y.tolist() == small.train_y[:10].tolist()

class Mirrored(ItemTransform):
    def encodes(self, item): return item[0][:, ::-1].copy()

class FirstClass(ItemTransform):
    def encodes(self, item): return 'airplane'

def pairs(data): return [(img, data.vocab[label]) for img, label in zip(data.train_x, data.train_y)]

@pytest.mark.parametrize('getters', [dict(get_x=Mirrored(), get_y=ItemGetter(1)), dict(get_x=ItemGetter(0), get_y=FirstClass())], ids=['of images', 'of labels'])
def test_getters_that_change_what_stands_in_the_items_are_obeyed(small, getters):
    block = DataBlock((ImageBlock, CategoryBlock(vocab=small.vocab, sort=False)), get_items=pairs, splitter=FuncSplitter(lambda item: False), **getters)
    dl = block.dataloaders(small, bs=80, dl_type=BatchDL, num_workers=0, shuffle=False).train
    x, y = dl.decode(dl.one_batch())
    assert dl.resident is None
    assert np.array_equal(x[0].permute(1, 2, 0).numpy(), getters['get_x'](pairs(small)[0]))
    assert set(y.tolist()) == ({0} if isinstance(getters['get_y'], FirstClass) else set(range(10)))

def test_a_getter_that_changes_one_item_in_the_middle_is_obeyed(small):
    sixth = small.train_x[5]
    class SixthInverted(ItemTransform):
        def encodes(self, item): return 255 - item[0] if np.array_equal(item[0], sixth) else item[0]
    block = DataBlock((ImageBlock, CategoryBlock(vocab=small.vocab, sort=False)), get_items=pairs, splitter=FuncSplitter(lambda item: False), get_x=SixthInverted(), get_y=ItemGetter(1))
    dl = block.dataloaders(small, bs=80, dl_type=BatchDL, num_workers=0, shuffle=False).train
    assert dl.resident is None and np.array_equal(dl.decode(dl.one_batch())[0][5].permute(1, 2, 0).numpy(), 255 - sixth)

def test_an_unknown_item_transform_is_refused_and_not_left_out(small):
    block = cifar_block(small.stats, small.vocab).new(item_tfms=RandomResizedCrop(32))
    with pytest.raises(ValueError, match="RandomResizedCrop.*pipeline='item'"):
        block.dataloaders(small, dl_type=BatchDL, dl_kwargs=resident_images(small))

class Inverted(Transform):
    "An item transform"
    def encodes(self, x:PILImage): return PILImage.create(255 - np.asarray(x))

def every_item(item): return item

def add(dls, event, tfm): dls.add_tfms([tfm], event)

def set_to(dls, event, tfms):
    for dl in dls: setattr(dl, event, tfms)

added_items = { # what is done -> (how, what the error names)
    'add_tfms': (lambda dls: add(dls, 'after_item', Inverted()), 'Inverted'),
    'add_tfms to train': (lambda dls: dls.add_tfms([Inverted()], 'after_item', 'train'), 'Inverted'),
    'after_item.add': (lambda dls: dls.train.after_item.add(Inverted()), 'Inverted'),
    'Resize': (lambda dls: dls.train.after_item.add(Resize(24)), 'Resize'),
    'a function': (lambda dls: dls.train.after_item.add(Transform(every_item)), 'every_item'),
    'before_batch': (lambda dls: add(dls, 'before_batch', Transform(every_item)), 'every_item'),
    'another before_batch': (lambda dls: set_to(dls, 'before_batch', Pipeline([every_item])), 'every_item'),
    'after_item a function': (lambda dls: set_to(dls, 'after_item', every_item), 'every_item'),
    'another after_item': (lambda dls: set_to(dls, 'after_item', Pipeline([Inverted(), ToTensor()])), 'Inverted'),
    'a second ItemAugment': (lambda dls: add(dls, 'after_item', ItemAugment()), 'ItemAugment'),
    'in the data set': (lambda dls: dls.train_ds.tls[0].tfms.add(Inverted()), 'Inverted')}

@pytest.mark.parametrize('how', added_items)
def test_item_transforms_that_come_later_are_refused_when_a_pass_begins(how, dls):
    change, name = added_items[how]
    dls.one_batch()
    change(dls)
    for use in (lambda: list(dls.train), dls.one_batch, dls.show_batch):
        with pytest.raises(ValueError, match=f"{name}.*pipeline='item'"): use()

@pytest.mark.parametrize('name, changes', [
    ('Inverted', dict(after_item=[Inverted(), ToTensor()])), ('every_item', dict(before_batch=every_item)),
    ('create_batch', dict(create_batch=every_item))], ids=['after_item', 'before_batch', 'create_batch'])
def test_item_transforms_of_a_new_dataloader_are_refused(name, changes, dls):
    with pytest.raises(ValueError, match=f"{name}.*pipeline='item'"): dls.train.new(**changes)

def test_a_subclass_of_the_augmentation_is_refused_and_not_taken_for_it(small):
    class Other(ItemAugment):
        def encodes(self, x:PILImage): return x
    block = cifar_block(small.stats, small.vocab).new(item_tfms=Other())
    with pytest.raises(ValueError, match="Other.*pipeline='item'"): block.dataloaders(small, dl_type=BatchDL, dl_kwargs=resident_images(small))

def test_item_transforms_act_where_items_are_made(small, small_dls, tmp_path):
    plain = small_dls(pipeline='item').valid.one_batch()[0]
    dls = small_dls(pipeline='item')
    add(dls, 'after_item', Inverted())
    inverted = dls.valid.one_batch()[0]
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in small.stats)
    assert torch.allclose(inverted*std + mean, 1 - (plain*std + mean), atol=1e-5)
    Image.fromarray(small.test_x[0]).save(tmp_path/'a.png')
    files = small_dls().test_dl([tmp_path/'a.png'], after_item=[Inverted(), ToTensor()], num_workers=0)
    assert torch.allclose(files.one_batch()[0], inverted[:1], atol=1e-5)

class Darker(Transform):
    order = 100
    def encodes(self, x:TensorImage): return x/2
    def decodes(self, x:TensorImage): return x*2

def test_further_batch_transforms_are_kept(small, dls):
    stats = small.stats
    block = cifar_block(stats, small.vocab)
    block.batch_tfms = [*block.batch_tfms, Darker()]
    darker = block.dataloaders(small, bs=16, dl_type=BatchDL, dl_kwargs=resident_images(small))
    assert torch.allclose(darker.valid.one_batch()[0], dls.valid.one_batch()[0]/2)
    decoded = darker.valid.decode(darker.valid.one_batch())[0]
    assert np.array_equal(decoded.permute(0, 2, 3, 1).numpy(), small.test_x[:16])

def test_the_batch_transforms_are_those_of_plain_fastai(dls):
    for dl in dls: assert [type(f) for f in dl.after_batch.fs] == [IntToFloatTensor, Normalize]

class Doubled(Transform):
    "A batch transform before all others: it gets bytes"
    order = 0
    def encodes(self, x:TensorImage): return TensorImage((x.int()*2).clamp(max=255).byte())

class Halved(Transform):
    "One between the two that are done in one step elsewhere"
    order = 50
    def encodes(self, x:TensorImage): return x/2

def without(dls, *types):
    for dl in dls: dl.after_batch.fs = dl.after_batch.fs.filter(lambda f: not isinstance(f, types))

def batch_tfms(dls, *tfms): set_to(dls, 'after_batch', Pipeline(tfms))

def normalize(mean, std, dtype=torch.float32):
    return Normalize(*(torch.full((1, 3, 1, 1), value, dtype=dtype) for value in (mean, std)))

batch_changes = dict(
    augmented=lambda dls: dls.add_tfms(aug_transforms(), 'after_batch'),
    brighter=lambda dls: dls.add_tfms([Brightness(.5, p=1.), Rotate(p=1.)], 'after_batch', 0),
    flipped=lambda dls: dls.train.after_batch.add(Flip(p=1.)),
    saturated=lambda dls: dls.add_tfms([Saturation(.5, p=1.)], 'after_batch'),
    first=lambda dls: dls.add_tfms([Doubled()], 'after_batch'),
    between=lambda dls: dls.add_tfms([Halved()], 'after_batch'),
    last=lambda dls: dls.add_tfms([Darker()], 'after_batch'),
    not_normalized=lambda dls: without(dls, Normalize),
    bytes_alone=lambda dls: without(dls, Normalize, IntToFloatTensor),
    undivided=lambda dls: batch_tfms(dls, IntToFloatTensor(div=1), normalize(9., 2.)),
    normalized_anew=lambda dls: batch_tfms(dls, IntToFloatTensor(), normalize(.1, .2), Halved()),
    in_double=lambda dls: batch_tfms(dls, IntToFloatTensor(), normalize(.1, .2, torch.float64)),
    bytes_normalized=lambda dls: batch_tfms(dls, normalize(9., 2.)),
    function=lambda dls: set_to(dls, 'after_batch', every_item),
    validation_alone=lambda dls: setattr(dls.train.after_batch[1], 'split_idx', 1))

@pytest.mark.parametrize('change', batch_changes)
def test_batch_transforms_act_as_where_fastai_applies_them(change, small):
    def batches(dl_type):
        block = cifar_block(small.stats, small.vocab, CropFlipCutout(pad=0, flip_p=0, cutout=0))
        dls = block.dataloaders(small, bs=16, shuffle=False, num_workers=0, dl_type=dl_type, dl_kwargs=resident_images(small) if dl_type is BatchDL else None, device=cpu)
        dls.one_batch()
        batch_changes[change](dls)
        set_seed(0)
        seen = [b for dl in dls for b in dl]
        return seen, [dl.decode(dl.one_batch())[0] for dl in dls if isinstance(dl.after_batch, Pipeline)]
    (ours, our_images), (theirs, their_images) = batches(BatchDL), batches(SeededDL) # `TfmdDL` would draw by itself
    for (x, y), (x1, y1) in zip(ours, theirs, strict=True):
        assert type(x) is type(x1) and x.dtype == x1.dtype and torch.equal(y, y1)
        assert torch.allclose(x, x1, rtol=0, atol=1e-5) # rotations round in the order of memory
    for x, x1 in zip(our_images, their_images, strict=True):
        assert x.dtype == x1.dtype and (x - x1).abs().max() <= 1 # fastai cuts off, to a value that may be one less

def test_statistics_that_are_not_given_are_those_of_a_batch(small):
    block = cifar_block(small.stats, small.vocab, CropFlipCutout(pad=0, flip_p=0, cutout=0)).new(batch_tfms=Normalize())
    x = block.dataloaders(small, bs=80, dl_type=BatchDL, dl_kwargs=resident_images(small)).one_batch()[0]
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3)

def test_a_transform_that_is_added_within_an_epoch_acts_from_the_next_batch_on(dls):
    batches = iter(dls.valid)
    first = next(batches)[0]
    dls.valid.after_batch.add(Darker())
    assert next(batches)[0].abs().max() < .6*first.abs().max()

def test_a_shuffle_of_ones_own_is_obeyed(small, dls):
    dl = dls.train.new(shuffle_fn=lambda idxs: list(idxs)[::-1])
    assert torch.cat([y for _, y in dl]).tolist() == small.train_y[::-1].tolist()

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_callbacks_that_mix_batches_work(cb, tiny_learner):
    learn, seen = tiny_learner(cbs=cb()), []
    learn.model.register_forward_hook(lambda m, x, out: seen.append(x[0].shape))
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(seen) == 5 + 3 and np.isfinite(learn.recorder.history[0]['train_loss'])

def test_show_batch_shows_what_batch_transforms_make(small, dls):
    dls.add_tfms([Halved()], 'after_batch')
    dls.valid.show_batch(max_n=4)
    for ax, img in zip(plt.gcf().axes, small.test_x):
        assert np.abs(np.asarray(ax.images[0].get_array(), int) - img/2).max() <= 1

def test_normalising_bytes_is_what_fastai_does_in_two_steps(small):
    mean, std = small.stats
    x = TensorImage(torch.from_numpy(small.test_x).permute(0, 3, 1, 2))
    both = Normalize.from_stats(mean, std, cuda=False)
    one = NormalizeBytes(both.mean, both.std)
    assert torch.equal(one(x), both(IntToFloatTensor()(x)))
    floats = IntToFloatTensor()(x)
    kept = floats.clone()
    assert torch.equal(one(floats), both(kept)) and torch.equal(floats, kept) # what is a float already is not changed in place

# ---- with a Learner

def test_lr_find_and_get_preds_and_tta_and_show_results_work(small, tiny_learner):
    learn = tiny_learner()
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.lr_find(num_it=13).valley > 0 and len(plt.gca().lines) >= 1
    assert len(learn.recorder.losses) >= 10 and all(loss.device == cpu for loss in learn.recorder.losses) # those of the epoch that it breaks off, too
    probs, targs = learn.get_preds()
    assert probs.shape == (40, 10) and targs.tolist() == small.test_y.tolist()
    augmented = [learn.tta(n=1, beta=0)[0] for _ in range(2)]
    assert not torch.allclose(augmented[0], probs) and not torch.allclose(*augmented) # augmented, where `get_preds` is not, and each time in another way
    with learn.no_bar(): learn.show_results(max_n=4) # puts fastai's own bar back
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert len(plt.gcf().axes) >= 4

def test_predictions_of_shuffled_images_come_in_the_order_of_the_images(small, tiny_learner):
    assert tiny_learner().get_preds(0)[1].tolist() == small.train_y.tolist()

def test_interpretation_works_and_runs_the_model_once(tiny_learner):
    learn, seen = tiny_learner(), []
    hook = learn.model.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    interp = CifarInterpretation.from_learner(learn)
    interp.plot_confusion_matrix(); interp.most_confused(); interp.plot_misclassified(4); interp.per_class(); interp.plot_top_losses(4)
    hook.remove()
    assert sum(seen) == 40

def test_an_exported_learner_carries_no_images(small, tiny_learner, tmp_path):
    learn = tiny_learner()
    learn.path = tmp_path
    learn.export('learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 100_000 # the 80 small images are 327 kB as they are packed
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(tmp_path/'learner.pkl')
    items = list(small.test_x[:8])
    preds = [l.get_preds(dl=l.dls.test_dl(items))[0] for l in (again, learn)]
    assert torch.allclose(*preds, atol=1e-6) # the layouts in memory differ

@contextmanager
def watched(monkeypatch, learn):
    "Counts what torch is asked to do from the beginning of each epoch until the recorder reads, and how often something is copied to the host"
    ops, copies, watching = Ops(), [], []
    class Watch(Callback):
        order = -1000
        def before_epoch(self):
            watching.append(True)
            ops.__enter__()
        def after_epoch(self):
            ops.__exit__(None, None, None)
            watching.clear()
    def counted(original):
        def f(t, *args, **kwargs):
            if watching: copies.append(t.shape)
            return original(t, *args, **kwargs)
        return f
    with monkeypatch.context() as m, learn.added_cbs(Watch()):
        for name in ('cpu', 'tolist', 'numpy'): m.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name))) # on a processor nothing is dispatched
        yield ops.counts, copies

def reads(counts): return sum(n for name, n in counts.items() if '_local_scalar_dense' in name or 'nonzero' in name)

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_no_step_asks_for_a_number(tiny_learner, precision, monkeypatch):
    "On a GPU, a read on the host waits until the queue is empty"
    learn = tiny_learner(precision=precision, metrics=[accuracy, error_rate])
    with watched(monkeypatch, learn) as (counts, copies), learn.no_logging(): learn.fit(2, cbs=OneCycle(1e-4, 1e-2))
    assert reads(counts) == 0 and copies == [] and sum(counts.values()) > 100

def test_a_reader_at_every_step_is_seen(tiny_learner, monkeypatch):
    class Reads(Callback):
        def after_batch(self): self.loss.tolist()
    learn = tiny_learner()
    with watched(monkeypatch, learn) as (counts, copies), learn.no_logging(): learn.fit(1, 1e-3, cbs=Reads())
    assert len(copies) >= 5 + 3

def test_fastais_own_bar_is_not_put_back(tiny_net, small_dls):
    learn = cifar_learner(small_dls(), tiny_net(), precision='fp32')
    with learn.no_bar(): pass
    with redirect_stdout(io.StringIO()): learn.fit(1, 1e-3)
    assert type(learn.progress) is EpochProgress

@pytest.mark.slow
def test_a_compiled_network_trains_as_the_same_network(tiny_net, small_dls):
    if not shutil.which('g++') and not shutil.which('clang++'): pytest.skip('torch.compile needs a C++ compiler')
    def losses(compile):
        set_seed(0)
        learn = cifar_learner(small_dls(), tiny_net(), precision='fp32', compile=compile).remove_cbs(ProgressCallback)
        with learn.no_logging(): learn.fit(1, 1e-3)
        return learn.recorder.losses, list(learn.model.state_dict())
    (a, names), (b, names1) = losses(False), losses(True)
    assert np.allclose(a, b, rtol=1e-3) and names == names1

@pytest.mark.skipif(not sys.platform.startswith('linux') or platform.libc_ver()[0] != 'glibc', reason='an allocator that takes no advice')
@pytest.mark.slow
def test_kept_memory_is_not_fetched_again():
    "In a process of its own, since there is no way back"
    code = '''
import resource, torch
from cifar_fastai.callback.precision import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(2**24).fill_(1) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before, kept = faults(), keep_memory()
print(kept, before, min(faults() for _ in range(30))) # it may take some until a gap is left that all fits into
'''
    kept, before, after = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert kept == 'True' and int(before) > 90 and int(after) < int(before)/10 # 192 MB, in pages of 4 kB or of 2 MB

def test_fastais_own_loop_asks_at_every_step(tiny_net, small, monkeypatch):
    "What the test above must be able to see: fastai's Recorder copies, its progress bar asks"
    dls = cifar_block().dataloaders(small, bs=16, num_workers=0, drop_last=False)
    learn = Learner(dls, tiny_net(), CrossEntropyLossFlat(), metrics=accuracy)
    with watched(monkeypatch, learn) as (counts, copies), redirect_stdout(io.StringIO()): learn.fit(1)
    assert reads(counts) >= 5 and len(copies) >= 5 + 3*2 # a loss a training step, loss and accuracy a validation step

def test_the_bar_reads_a_few_times_a_second_at_most(tiny_net, small_dls):
    learn = cifar_learner(small_dls(bs=2), tiny_net(), precision='fp32')
    class Reads(Callback):
        order, seen = 1000, []
        def after_batch(self): self.seen.append(learn.progress.pbar.comment)
    with redirect_stdout(io.StringIO()): learn.fit(2, 1e-3, cbs=Reads())
    seconds = sum(row['seconds'] for row in learn.recorder.history)
    assert len(Reads.seen) == 80 + 2*20 and len({c for c in Reads.seen if c}) <= 2 + seconds/learn.progress.every

# ---- devices

def test_images_that_do_not_fit_stay_on_the_host_and_it_says_so_once(dls, messages, monkeypatch):
    monkeypatch.setattr('cifar_fastai.data.loader.free_memory', lambda device: 1000)
    dls.train.device = torch.device('meta')
    for _ in range(2): assert {x.device.type for x, _ in dls.train} == {'meta'} # made on the host, then sent
    assert dls.train.resident.pixels.device == cpu
    assert len(messages().splitlines()) == 1

def test_images_that_fit_are_brought_to_the_device(dls, messages, monkeypatch):
    monkeypatch.setattr('cifar_fastai.data.loader.free_memory', lambda device: 10**9)
    assert dls.train.resident.to(torch.device('meta')).pixels.device.type == 'meta' and messages() == ''

@pytest.mark.parametrize('name', ['cuda:99', 'tpu', 'meta', ''])
def test_a_device_that_is_not_there_is_refused(small, name):
    with pytest.raises(ValueError, match=f'device.*{name!r}'): cifar_dls(small, device=name)

def test_a_device_can_be_named(): assert resolve_device('cpu') == resolve_device(cpu) == cpu

@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_processor(small):
    here, there = (cifar_dls(small, bs=16, seed=3, device=device).train for device in ('cpu', 'cuda'))
    for (x, y), (x1, y1) in zip(here, there, strict=True):
        assert x1.device.type == 'cuda' and torch.equal(y, y1.cpu()) and torch.allclose(x, x1.cpu(), atol=1e-6)

@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('recipe', ['baseline', 'best', 'quick'])
def test_an_epoch_on_a_gpu_never_waits(small_dls, precision, recipe):
    class NoWaiting(Callback):
        order = -1000
        def before_epoch(self):
            with warnings.catch_warnings(): # of a prototype
                warnings.simplefilter('ignore')
                torch.cuda.set_sync_debug_mode('error')
        def after_epoch(self): torch.cuda.set_sync_debug_mode('default') # here the recorder reads
    model = CustomResNet(ghost=0 if recipe == 'baseline' else 4)
    learn = cifar_learner(small_dls(device='cuda', recipe=recipe), model, precision, recipe=recipe).remove_cbs(ProgressCallback)
    try:
        with learn.no_logging(): learn.fit(2, cbs=[OneCycle(1e-4, 1e-2), NoWaiting()])
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.recorder.history) == 2

@pytest.mark.gpu
def test_a_range_test_of_more_than_an_epoch_works_on_a_gpu(tiny_learner, small_dls):
    learn = tiny_learner(small_dls(device='cuda'))
    assert len(range_test(learn, num_it=2*len(learn.dls.train) - 1)[0]) > len(learn.dls.train)

@pytest.mark.gpu
def test_interpretation_works_on_a_gpu(tiny_learner, small_dls):
    interp = CifarInterpretation.from_learner(tiny_learner(small_dls(device='cuda')))
    interp.plot_top_losses(4); interp.plot_misclassified(4)
    assert interp.probs.device == cpu

# ---- a loader whose order or items are changed

def labels_of(dl): return torch.cat([y for _, y in dl]).tolist()

both = pytest.mark.parametrize('pipeline', ['batch', 'item'])

@both
def test_the_order_is_a_list_of_python_numbers_as_in_fastai(small, pipeline):
    for dl in cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).loaders:
        for idxs in dl.get_idxs(), dl.shuffle_fn(list(range(dl.n))): assert type(idxs) is list and {type(i) for i in idxs} == {int}

orders = dict(longer=lambda idxs: list(range(len(idxs)))*2, twice=lambda idxs: idxs*2, one_more=lambda idxs: idxs + [0, 1], fewer=lambda idxs: idxs[:100]*3,
              drawn=lambda idxs: random.Random(0).sample(idxs, len(idxs)), generator=lambda idxs: (i for i in idxs*2), cycle=lambda idxs: itertools.islice(itertools.cycle(idxs), 1000),
              backwards=lambda idxs: reversed(idxs), from_behind=lambda idxs: [-1, -2, 3], array=lambda idxs: np.array(idxs)[::-1], tensor=lambda idxs: torch.tensor(idxs).flip(0), empty=lambda idxs: [])

@both
@pytest.mark.parametrize('order', orders.values(), ids=orders)
def test_an_order_of_ones_own(small, pipeline, order):
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).valid
    own, labels = dl.get_idxs(), labels_of(dl)
    dl.get_idxs = lambda: order(own)
    wanted = [labels[int(i)] for i in order(own)]
    assert (labels_of(dl) if wanted else list(dl)) == wanted

@both
def test_an_order_may_be_extended_in_a_subclass_and_by_a_function(small, pipeline):
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).train.new(shuffle_fn=lambda idxs: idxs[:50]*2 + [1])
    assert labels_of(dl) == [small.train_y[i] for i in [*range(50)]*2 + [1]]
    class OneMore(type(dl)):
        def get_idxs(self): return super().get_idxs() + [0]
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).train
    dl.__class__ = OneMore
    assert len(labels_of(dl)) == dl.n + 1 and labels_of(dl)[-1] == small.train_y[0]

@both
def test_an_order_without_an_end_is_read_as_far_as_it_is_wanted(small, pipeline):
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).valid
    labels = labels_of(dl)
    dl.get_idxs = lambda: itertools.cycle(range(dl.n))
    n_batches = 3*dl.n//16 + 1
    seen = torch.cat([y for _, y in itertools.islice(dl, n_batches)]).tolist()
    assert seen == (labels*4)[:16*n_batches]

def test_an_iterator_longer_than_the_set_draws_new_crops(small):
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, aug=CropFlipCutout(flip_p=0, cutout=0)).train
    dl.get_idxs = lambda: iter([0]*3*dl.n)
    images = {x.numpy().tobytes() for batch, _ in dl for x in batch}
    assert len(images) > 70 # of 81 places

@both
@pytest.mark.parametrize('i', [40, 10**6, -41])
def test_an_index_beyond_the_data_set_raises_as_in_fastai(small, pipeline, i):
    dl = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline).valid
    assert dl.n == 40
    dl.get_idxs = lambda: [0, i]
    with pytest.raises(IndexError): list(dl)

def other_data_set(dl, other): dl.dataset = other.dataset
def items_in_another_order(dl, other):
    for tl in dl.dataset.tls: tl.items = L(list(tl.items)[::-1])
def items_that_swap_places(dl, other):
    for tl in dl.dataset.tls: tl.items[0], tl.items[-1] = tl.items[-1], tl.items[0]
def another_label(dl, other):
    item = dl.dataset.tls[1].items[0]
    dl.dataset.tls[1].items[0] = (item[0], next(name for name in dl.vocab if name != item[1]), item[2])

def other_vocabulary(dl, other):
    categorize = next(f for f in dl.dataset.tls[1].tfms.fs if isinstance(f, Categorize))
    categorize.vocab = CategoryMap(list(categorize.vocab)[::-1], sort=False)

@pytest.mark.parametrize('change', [other_data_set, items_in_another_order, items_that_swap_places, another_label, other_vocabulary])
@pytest.mark.parametrize('made_anew', [False, True])
def test_a_loader_follows_its_data_set(small, change, made_anew):
    seen = {}
    for pipeline in 'item', 'batch':
        dls = cifar_dls(small, bs=16, seed=0, num_workers=0, pipeline=pipeline)
        before = labels_of(dls.valid)
        change(dls.valid, dls.train)
        dl = dls.valid.new() if made_anew else dls.valid
        assert labels_of(dl) == [int(dl.dataset[i][1]) for i in range(dl.n)] != before
        seen[pipeline] = torch.cat([x for x, _ in dl])
    assert torch.equal(seen['item'], seen['batch'])

def test_a_part_of_a_data_set_can_take_its_place(small):
    dl = cifar_dls(small, bs=4, seed=0, num_workers=0).valid
    before = labels_of(dl)
    dl.dataset, dl.n = torch.utils.data.Subset(dl.dataset, [3, 1, 2]), 3
    assert labels_of(dl) == [before[i] for i in (3, 1, 2)]

def test_a_data_set_that_stays_keeps_its_images_in_memory(small):
    dls = cifar_dls(small, bs=16, seed=0, num_workers=0)
    resident = dls.train.resident
    list(dls.train), dls.train.one_batch(), dls.show_batch(unique=True, show=False), dls.train.new(bs=4)
    assert dls.train.resident is resident is not None
