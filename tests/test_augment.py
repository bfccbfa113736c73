"""Pad → crop → flip → cutout: the exact pixels, the distribution of the draws, and who is spared."""
import copy, json, multiprocessing, pickle, random, re, subprocess, sys
from collections import Counter
from pathlib import Path

import albumentations
import numpy as np
import pytest
import torch
from fastai.vision.all import PILImage
from scipy.stats import binomtest, chisquare

from cifar_fastai.data.augment import CropFlipCutout, ItemAugment, item_pipeline, plot_augmented
from cifar_fastai.core import cifar10_stats
from workers import drawn, drawn_elsewhere

only_crop = CropFlipCutout(flip_p=0, cutout=0)
only_hole = CropFlipCutout(pad=0, flip_p=0)
n_draws = 4050

def draws(aug, img, n=n_draws, mean=cifar10_stats[0], seed=0):
    "`n` augmented versions of an array, each drawn by its own key"
    tfm, pil = ItemAugment(aug, mean), PILImage.create(img)
    for i in range(n):
        tfm.reseed(seed, i)
        yield np.asarray(tfm(pil, split_idx=0))

def uniform(counts, n_places): # p-value, for counts over all places
    return chisquare(list(counts.values()) + [0]*(n_places - len(counts))).pvalue

@pytest.fixture(scope='module')
def img(small): return small.train_x[0]

def hole_of(img): # rows and columns of the hole in an image that was white
    rows, cols = np.nonzero((img != 255).any(axis=-1))
    return rows.min(), rows.max() + 1, cols.min(), cols.max() + 1

white = np.full((32, 32, 3), 255, np.uint8)

# ---- crop

def test_crops_are_numpys_reflection_and_all_81_are_equally_likely(img):
    padded = np.pad(img, ((4, 4), (4, 4), (0, 0)), mode='reflect')
    place_of = {padded[r:r + 32, c:c + 32].tobytes(): (r, c) for r in range(9) for c in range(9)}
    assert len(place_of) == 81
    counts = Counter(place_of[crop.tobytes()] for crop in draws(only_crop, img)) # a crop that is none of them is a KeyError
    assert len(counts) == 81
    assert uniform(counts, 81) > .001

def test_a_constant_border_has_the_mean_colour(img):
    fill = tuple(round(255*m) for m in cifar10_stats[0])
    padded = np.stack([np.pad(img[..., c], 4, constant_values=fill[c]) for c in range(3)], axis=-1)
    crops = {padded[r:r + 32, c:c + 32].tobytes() for r in range(9) for c in range(9)}
    seen = {crop.tobytes() for crop in draws(CropFlipCutout(flip_p=0, cutout=0, pad_mode='constant'), img, 200)}
    assert len(seen) > 50 and seen <= crops

# ---- flip

def test_half_of_the_images_are_flipped(img):
    kinds = {img.tobytes(): 'as it was', img[:, ::-1].tobytes(): 'flipped'}
    counts = Counter(kinds[x.tobytes()] for x in draws(CropFlipCutout(pad=0, cutout=0), img, 2000))
    assert binomtest(counts['flipped'], 2000, .5).pvalue > .001

@pytest.mark.parametrize('flip_p', [0, 1])
def test_a_flip_can_be_never_or_always(img, flip_p):
    expected = img[:, ::-1] if flip_p else img
    assert all((x == expected).all() for x in draws(CropFlipCutout(pad=0, cutout=0, flip_p=flip_p), img, 50))

# ---- cutout

def test_there_is_always_one_hole_of_8_by_8_and_all_625_places_are_equally_likely():
    places = Counter()
    for x in draws(only_hole, white, 6250):
        top, bottom, left, right = hole_of(x)
        assert (bottom - top, right - left) == (8, 8)
        assert (x != 255).any(axis=-1).sum() == 64
        places[top, left] += 1
    assert max(top for top, _ in places) == max(left for _, left in places) == 24
    assert uniform(places, 625) > .001

def test_the_hole_is_zero_after_normalisation():
    mean, std = map(np.array, cifar10_stats)
    for x in draws(only_hole, white, 20):
        top, bottom, left, right = hole_of(x)
        normalised = (x[top:bottom, left:right]/255 - mean)/std
        assert np.abs(normalised).max() < .5/255/std.min() + 1e-9 # half a grey level, the rounding to `uint8`

def test_the_hole_has_the_mean_of_the_data_set_given():
    x = next(draws(only_hole, white, mean=(0.1, 0.2, 0.3)))
    top, _, left, _ = hole_of(x)
    assert x[top, left].tolist() == [26, 51, 76]

def test_the_hole_can_be_left_out(img): assert all((x == img).all() for x in draws(CropFlipCutout(pad=0, flip_p=0, cutout=0), img, 50))

def test_all_steps_together_are_crop_then_flip_then_hole(img):
    padded = np.pad(img, ((4, 4), (4, 4), (0, 0)), mode='reflect')
    crops = np.stack([padded[r:r + 32, c:c + 32] for r in range(9) for c in range(9)])
    crops = np.concatenate([crops, crops[:, :, ::-1]])
    fill = np.array([round(255*m) for m in cifar10_stats[0]])
    for x in draws(CropFlipCutout(), img, 100):
        differ = (crops != x).any(axis=-1)
        nearest = differ[differ.sum(axis=(1, 2)).argmin()]
        rows, cols = np.nonzero(nearest)
        assert np.ptp(rows) < 8 and np.ptp(cols) < 8
        assert (x[nearest] == fill).all()

# ---- who is augmented, and from what

def test_validation_images_are_left_as_they_are(img):
    tfm, pil = ItemAugment(), PILImage.create(img)
    assert all((np.asarray(tfm(pil, split_idx=1)) == img).all() for _ in range(20))

def test_the_same_key_draws_the_same_and_another_key_another(img):
    tfm, pil = ItemAugment(), PILImage.create(img)
    def drawn(*key):
        tfm.reseed(*key)
        return np.asarray(tfm(pil, split_idx=0)).tobytes()
    keys = [(seed, epoch, i) for seed in range(3) for epoch in range(3) for i in range(3)]
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in reversed(keys)] == first[::-1]
    assert len(set(first)) == len(keys)

def test_draws_do_not_touch_the_global_generators(img):
    python, numpy_state = random.getstate(), np.random.get_state()[1].tobytes()
    list(draws(CropFlipCutout(), img, 10))
    assert random.getstate() == python and np.random.get_state()[1].tobytes() == numpy_state

def test_without_a_key_the_draws_differ(img):
    first, second = item_pipeline(), item_pipeline()
    assert [first(image=img)['image'].tobytes() for _ in range(5)] != [second(image=img)['image'].tobytes() for _ in range(5)]

def test_the_transform_survives_pickling(img):
    tfm = ItemAugment(CropFlipCutout(cutout=4), mean=(0, 0, 0))
    copy, pil = pickle.loads(pickle.dumps(tfm)), PILImage.create(img)
    for t in (tfm, copy): t.reseed(1, 2)
    assert (np.asarray(tfm(pil, split_idx=0)) == np.asarray(copy(pil, split_idx=0))).all()

def test_the_result_is_an_image_of_the_same_kind(img):
    x = ItemAugment()(PILImage.create(img), split_idx=0)
    assert isinstance(x, PILImage) and x.size == (32, 32) and x.mode == 'RGB'

# ---- in other processes

workers = Path(__file__).with_name('workers.py')
fork = pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork here')

def few_repeat(texts): return len(set(texts)) >= len(texts) - 2 # of 101,250 results, two may be the same by chance

@fork
@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.parametrize('seeded', [False, True])
def test_workers_and_epochs_draw_afresh(persistent, seeded, img):
    pipeline = item_pipeline()
    if seeded: pipeline.set_random_seed(0)
    pipeline(image=img) # what was drawn before makes no difference
    first, second = drawn(pipeline, 'fork', persistent=persistent)
    assert few_repeat(first + second)

@fork
def test_two_pipelines_of_a_worker_draw_differently():
    torch.manual_seed(0)
    first = drawn(item_pipeline(), 'fork')
    torch.manual_seed(0)
    assert few_repeat(sum(first + drawn(item_pipeline(), 'fork'), []))

@fork
@pytest.mark.parametrize('num_workers', [0, 2])
def test_with_fixed_seeds_the_draws_are_the_same_again(num_workers):
    def twice():
        pipeline = item_pipeline()
        pipeline.set_random_seed(5)
        torch.manual_seed(5)
        return drawn(pipeline, 'fork', num_workers=num_workers)
    assert twice() == twice()

@fork
def test_other_forked_processes_draw_afresh(img):
    pipeline = item_pipeline()
    pipeline(image=img)
    assert few_repeat(drawn_elsewhere(pipeline, multiprocessing.get_context('fork'), 4))

@pytest.mark.slow
@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_processes_of_another_start_method_draw_afresh(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f'no {method} here')
    command = [sys.executable, '-W', 'ignore', workers, 'augment', method, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    epochs, elsewhere = json.loads(done.stdout)
    assert few_repeat(sum(epochs, [])) and few_repeat(elsewhere)

@pytest.mark.parametrize('again', [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy], ids=['pickle', 'deepcopy'])
def test_a_copy_in_the_same_process_continues_where_the_pipeline_stands(again, img):
    pipeline = item_pipeline()
    twin = again(pipeline)
    assert isinstance(twin, albumentations.Compose)
    for _ in range(3): assert np.array_equal(pipeline(image=img)['image'], twin(image=img)['image'])

def test_a_pipeline_obeys_the_generators_it_is_given(img):
    def with_state(seed):
        pipeline = item_pipeline()
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return [pipeline(image=img)['image'].tobytes() for _ in range(5)]
    assert with_state(1) == with_state(1) != with_state(2)

def test_a_pipeline_is_described_as_albumentations_own():
    "So that it can be read back without this package"
    assert albumentations.to_dict(item_pipeline())['transform']['__class_fullname__'] == 'Compose'

# ---- refusals and picture

@pytest.mark.parametrize('name, value', [('pad', -1), ('size', 0), ('flip_p', 1.5), ('flip_p', -.1), ('cutout', -1), ('cutout', 33), ('pad_mode', 'mirror')])
def test_invalid_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name}.*{re.escape(repr(value))}'): CropFlipCutout(**{name: value})

def test_the_picture_shows_the_image_and_its_versions(img):
    fig = plot_augmented(img, n=11, cols=4)
    pictures = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert len(pictures) == 12
    assert (pictures[0] == img).all()
    assert all(np.asarray(x).shape == (32, 32, 3) and (x != img).any() for x in pictures[1:])

# ---- flips that alternate

def test_flips_that_alternate_show_each_image_both_ways_in_two_epochs():
    from cifar_fastai.data.augment import flipped_in_epoch
    for seed in range(3):
        first, second, third = (flipped_in_epoch(seed, epoch, 1000) for epoch in range(3))
        assert (first ^ second).all() and (first == third).all() and 400 < first.sum() < 600
    assert (flipped_in_epoch(0, 0, 1000) != flipped_in_epoch(1, 0, 1000)).any()

def test_each_image_needs_its_own_draw(digits):
    tfm, img = ItemAugment(CropFlipCutout(flip='alternate')), PILImage.create(digits.train_x[0])
    with pytest.raises(ValueError, match='alternate'): tfm(img, split_idx=0)
    for epoch in range(2):
        tfm.reseed(0, epoch, 0)
        tfm(img, split_idx=0)
        with pytest.raises(ValueError, match='alternate'): tfm(img, split_idx=0)
