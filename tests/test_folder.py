"""Folders of pictures of one's own, from the files to a trained run."""
import json, logging, os, pickle, re, shutil, struct, warnings, zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import get_image_files
from PIL import Image
from markupsafe import escape
from sklearn.datasets import load_sample_images

from cifar_fastai.cli import cifar_interpret, cifar_predict, cifar_train
from cifar_fastai.core import RepeatSettings, TrainSettings, cifar10_classes, settings_from
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.augment import CropFlipCutout, ItemAugment, sized_augment
from cifar_fastai.data.block import cifar_block, cifar_dls, default_bs
from cifar_fastai.data.folder import find_pictures, n_duplicates, picture_suffixes, read_folder
from cifar_fastai.data.images import CIFAR10Data, load_digits
from cifar_fastai.data.picture import read_image
from cifar_fastai.data.source import load_cifar10
from cifar_fastai.learner import balanced_loss, cifar_learner
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.look.report import write_report
from cifar_fastai.models import CustomResNet
from cifar_fastai.run.folder import learner_from_run
from cifar_fastai.run.train import resume, settings_learner, train
from cifar_fastai.use.export import export_model
from cifar_fastai.use.predict import load_classifier

photos = [Image.fromarray(img) for img in load_sample_images().images]

def save_squares(folder, n, kind='png', photo=0, seed=0, sides=(40, 90)):
    "Save `n` squares of a photograph, of several sizes"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, photo))
    for i, side in enumerate(rng.integers(*sides, n)):
        left, top = rng.integers(photos[photo].width - side), rng.integers(photos[photo].height - side)
        photos[photo].crop((left, top, left + side, top + side)).save(folder/f'{i:04}.{kind}')

@pytest.fixture
def pets(tmp_path):
    "A folder of two classes without splits"
    for photo, name in enumerate(('palace', 'flower')): save_squares(tmp_path/'pets'/name, 20, ('jpg', 'png')[photo], photo)
    return tmp_path/'pets'

@pytest.fixture
def split(tmp_path):
    "A folder of three classes with splits"
    for k, part in enumerate(('train', 'test')):
        for i, name in enumerate('abc'): save_squares(tmp_path/'split'/part/name, (8, 3)[k], photo=i%2, seed=10*k + i)
    return tmp_path/'split'

def refused(folder, *names, by=read_folder):
    with pytest.raises(ValueError) as e: by(folder)
    said = str(e.value)
    assert '\n' not in said and all(name in said for name in names), said
    return said

# ---- layouts

@pytest.mark.parametrize('valid', ['test', 'valid', 'val', 'Test', 'VAL'])
def test_each_name_of_the_second_split_is_known(split, valid):
    (split/'test').rename(split/'t'); (split/'t').rename(split/valid)
    data = read_folder(split)
    assert data.vocab == ['a', 'b', 'c'] and np.bincount(data.train_y).tolist() == [8]*3 and np.bincount(data.test_y).tolist() == [3]*3

def test_the_test_images_validate_if_there_are_two_candidates(split):
    shutil.copytree(split/'test', split/'valid')
    (split/'valid'/'a'/'0000.png').unlink()
    with pytest.warns(UserWarning, match='valid'): data = read_folder(split)
    assert len(data.test_y) == 9
    for _ in range(2): # the second time from the cache
        _, [said] = told(split)
        assert 'valid' in said

@pytest.mark.parametrize('inside_train', [False, True])
def test_a_fixed_fifth_of_each_class_validates_without_a_second_split(pets, inside_train, tmp_path):
    folder = pets
    if inside_train: folder = shutil.copytree(pets, tmp_path/'other'/'train').parent
    data = read_folder(folder)
    assert data.vocab == ['flower', 'palace'] and np.bincount(data.test_y).tolist() == [4, 4] and np.bincount(data.train_y).tolist() == [16, 16]
    shutil.move(pets/'palace'/'0003.jpg', pets/'palace'/'renamed.JPG')
    assert read_folder(pets).fingerprint == data.fingerprint # neither names nor the order of files matter

def test_each_image_is_what_prediction_reads(split):
    data = read_folder(split)
    expected = {(read_image(file).tobytes(), 'abc'.index(file.parent.name)) for file in split.glob('train/*/*')}
    assert {(img.tobytes(), label) for img, label in zip(data.train_x, data.train_y)} == expected
    assert data.train_x.dtype == np.uint8 and data.train_x.shape == (24, 32, 32, 3) and data.train_y.dtype == np.int64

@pytest.mark.parametrize('kind', [suffix[1:] for suffix in picture_suffixes])
def test_every_suffix_is_read_in_upper_and_lower_case(tmp_path, kind):
    save_squares(tmp_path/'one', 3, kind); save_squares(tmp_path/'two', 3, kind.upper(), photo=1)
    assert len(read_folder(tmp_path).train_y) == 4

def test_pictures_of_any_kind_are_brought_to_the_same_form(pets):
    rotated = Image.Exif(); rotated[274] = 6
    photos[0].crop((0, 0, 90, 60)).save(pets/'palace'/'turned.jpg', exif=rotated)
    photos[0].convert('L').crop((0, 0, 300, 40)).save(pets/'palace'/'grey.png')
    photos[1].convert('CMYK').crop((0, 0, 33, 20)).save(pets/'flower'/'print.jpg')
    photos[1].convert('P').crop((0, 0, 10, 10)).save(pets/'flower'/'small.gif')
    assert len(read_folder(pets).train_y) + len(read_folder(pets).test_y) == 44

def test_what_is_no_picture_is_passed_over(pets):
    (pets/'notes.txt').write_text('mine'); (pets/'palace'/'Thumbs.db').write_bytes(b'\0'); (pets/'cover.jpg').write_bytes(b'no picture')
    (pets/'palace'/'._0000.jpg').write_bytes(b'\0\5'); (pets/'.git').mkdir()
    (pets/'__MACOSX'/'palace').mkdir(parents=True); (pets/'__MACOSX'/'palace'/'0000.jpg').write_bytes(b'\0\5')
    assert read_folder(pets).vocab == ['flower', 'palace']

def test_pictures_in_subfolders_of_a_class_and_links_are_found(pets, tmp_path):
    (pets/'palace').rename(tmp_path/'elsewhere')
    (pets/'palace').symlink_to(tmp_path/'elsewhere', target_is_directory=True)
    (pets/'flower'/'2024').mkdir(); (pets/'flower'/'0000.png').rename(pets/'flower'/'2024'/'0000.png')
    (pets/'flower'/'circle').symlink_to(pets, target_is_directory=True)
    data = read_folder(pets)
    assert (data.vocab, len(data.train_y) + len(data.test_y)) == (['flower', 'palace'], 40)

def test_links_to_themselves_and_to_nothing_are_no_folders(pets):
    for place in pets, pets/'flower', pets/'palace':
        (place/'itself').symlink_to('itself'); (place/'nothing').symlink_to('nowhere')
    found = find_pictures(pets)
    assert (found.vocab, len(found.splits[0]), found.skipped) == (['flower', 'palace'], 40, {'': 4})

def files_of(images, files, folder):
    assert len(images) == len(files) and len(set(files)) == len(files)
    return [np.array_equal(img, read_image(folder/file)) for img, file in zip(images, files)]

def test_the_files_are_known_in_the_order_of_the_images(pets):
    for data in read_folder(pets), load_cifar10(pets), load_cifar10(pets), pickle.loads(pickle.dumps(read_folder(pets))): # decoded, cached, a process of a loader
        for images, files in zip((data.train_x, data.test_x), data.files): assert all(files_of(images, files, pets))
    few = data.first(10, 3)
    assert all(files_of(few.train_x, few.files[0], pets)) and few.files[1] == data.files[1][:3]
    assert load_digits().files == ((), ()) and load_digits().first(3, 2).files == ((), ())

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
@pytest.mark.parametrize('valid', ['test', 'holdout'])
def test_mistakes_have_the_names_of_their_files(pets, pipeline, valid):
    dls = cifar_dls(pets, 8, pipeline, valid, 0, num_workers=0, device='cpu')
    learn = cifar_learner(dls, CustomResNet(2, width=16), precision='fp32')
    for ds_idx in 0, 1:
        interp = CifarInterpretation.from_learner(learn, ds_idx)
        files = [interp.file(i) for i in range(len(interp.targs))]
        assert [Path(file).parts[0] for file in files] == [interp.vocab[label] for label in interp.targs]
        for found in interp, interp.flip_averaged(): assert all(wrong.file == files[wrong.idx] for wrong in found.misclassified())
    assert all(files_of([interp.image(i) for i in range(len(files))], files, pets)) # as they are, in validation

def test_a_cache_of_a_version_that_did_not_keep_the_names_is_made_anew(pets, tmp_path, monkeypatch):
    monkeypatch.setitem(fastai_cfg().d, 'data', str(tmp_path/'home'))
    files = load_cifar10(pets).files
    [cache] = (tmp_path/'home').rglob('*.npz')
    arrays = dict(np.load(cache))
    notes = json.loads(arrays['notes'].tobytes())
    assert list(map(tuple, notes.pop('files'))) == list(map(tuple, files))
    np.savez(cache, **arrays | dict(notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)))
    assert list(map(list, load_cifar10(pets).files)) == list(map(list, files))

def test_a_cache_of_a_version_that_did_not_keep_unused_splits_is_read(split, tmp_path, monkeypatch):
    monkeypatch.setitem(fastai_cfg().d, 'data', str(tmp_path/'home'))
    expected = load_cifar10(split)
    [cache] = (tmp_path/'home').rglob('*.npz')
    arrays = dict(np.load(cache))
    notes = json.loads(arrays['notes'].tobytes())
    assert notes.pop('unused') == []
    np.savez(cache, **arrays | dict(notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)))
    def refuse(*args): raise AssertionError('a picture was decoded')
    monkeypatch.setattr('cifar_fastai.data.folder.read_image', refuse)
    assert load_cifar10(split).fingerprint == expected.fingerprint and told(split)[1] == []

def test_pictures_that_are_read_in_another_way_are_cached_anew(pets, tmp_path, monkeypatch):
    monkeypatch.setitem(fastai_cfg().d, 'data', str(tmp_path/'home'))
    def cache():
        load_cifar10(pets)
        [file] = (tmp_path/'home').rglob('*.npz') # the one of the former way is gone
        return file.name
    before = cache()
    assert cache() == before
    monkeypatch.setattr('cifar_fastai.data.source.decoder_version', 99)
    after = cache()
    assert after != before and cache() == after

def test_a_hundred_and_more_than_256_classes_are_read(tmp_path):
    for i in range(300):
        (tmp_path/f'{i:03}').mkdir()
        for k in range(2): Image.new('RGB', (32, 32), (i%256, i//256, k)).save(tmp_path/f'{i:03}'/f'{k}.bmp')
    data = read_folder(tmp_path)
    assert data.vocab == [f'{i:03}' for i in range(300)] and sorted(data.train_y) == list(range(300)) == sorted(data.test_y)
    for img, label in zip(data.train_x, data.train_y): assert int(img[0, 0, 0]) + 256*int(img[0, 0, 1]) == label
    assert data.fingerprint != data._replace(train_y=(data.train_y + 256)%300).fingerprint

# ---- refusals and warnings

@pytest.mark.parametrize('make', ['empty', 'only text', 'one class', 'no train', 'a flat folder'])
def test_a_folder_of_another_kind_is_one_sentence(tmp_path, make):
    if make == 'only text': (tmp_path/'a').mkdir(); (tmp_path/'a'/'b.txt').write_text('b')
    if make == 'one class': save_squares(tmp_path/'a', 4)
    if make == 'no train': save_squares(tmp_path/'test'/'a', 4); save_squares(tmp_path/'test'/'b', 4)
    if make == 'a flat folder': save_squares(tmp_path, 4)
    refused(tmp_path, str(tmp_path), by=load_cifar10)

def test_an_empty_class_is_named(pets):
    (pets/'tree').mkdir(); (pets/'tree'/'readme.md').write_text('later')
    refused(pets, 'tree')

@pytest.mark.parametrize('place', ['tree', 'palace/tree', 'test/tree'])
def test_an_empty_class_is_named_after_a_first_start_too(empty_home, pets, split, place):
    folder = split if place.startswith('test') else pets
    load_cifar10(folder)
    (folder/place).mkdir()
    if place == 'palace/tree': assert n_pictures(load_cifar10(folder)) == (32, 8) # no class
    else: refused(folder, 'tree', by=load_cifar10)

@pytest.mark.parametrize('part', ['train', 'test'])
def test_a_class_in_one_split_only_is_named(split, part):
    shutil.rmtree(split/part/'b')
    refused(split, "b")

def test_a_class_of_one_picture_is_named(pets):
    for file in list((pets/'flower').iterdir())[1:]: file.unlink()
    refused(pets, 'flower')

@pytest.mark.parametrize('name', ['<script>alert(1)</script>', 'a\nb', 'a\x1b[31m', 'x'*101, 'a\u202eb'])
def test_a_class_name_that_cannot_be_shown_is_refused(pets, name):
    try: (pets/'flower').rename(pets/name.replace('/', '∕'))
    except OSError: pytest.skip('the file system does not allow this name')
    assert not re.search('[\x00-\x1f\u202e]', refused(pets))

def test_accents_mean_the_same_in_both_ways_to_write_them(split):
    (split/'train'/'a').rename(split/'train'/'caf\u00e9'); (split/'test'/'a').rename(split/'test'/'cafe\u0301')
    assert read_folder(split).vocab == ['b', 'c', 'caf\u00e9']

@pytest.mark.parametrize('damage', [b'', b'no picture', b'cut'])
def test_unreadable_pictures_are_named_and_left_out_up_to_one_in_a_hundred(tmp_path, damage):
    for photo, name in enumerate('ab'): save_squares(tmp_path/name, 100, photo=photo, sides=(33, 34))
    for n, file in enumerate([tmp_path/'a'/'0003.png', tmp_path/'b'/'0099.png', tmp_path/'a'/'0050.png'], 1):
        file.write_bytes(file.read_bytes()[:-100] if damage == b'cut' else damage)
        if n == 3: break
        with pytest.warns(UserWarning, match=f'{n} of 200') as found: data = read_folder(tmp_path)
        assert file.name in str(found[0].message) and len(data.train_y) + len(data.test_y) == 200 - n
    refused(tmp_path, '3 of 200')

def test_duplicates_between_the_splits_are_counted_by_content(split):
    assert n_duplicates(read_folder(split)) == 0
    shutil.copy(split/'train'/'a'/'0000.png', split/'test'/'a'/'copy.png')
    Image.open(split/'train'/'b'/'0001.png').save(split/'test'/'c'/'other.bmp') # other format, other class
    with pytest.warns(UserWarning, match='2 of 11'): data = load_cifar10(split)
    assert n_duplicates(data) == 2
    with pytest.warns(UserWarning, match='2 of 11'): load_cifar10(split) # from the cache, too

# ---- as a source like the others

def test_a_folder_with_the_classes_of_cifar10_is_cifar10_and_others_are_not(small_folder, tmp_path):
    assert load_cifar10(small_folder).vocab == list(cifar10_classes)
    some = tmp_path/'some'
    for part in 'train', 'test':
        for name in 'cat', 'dog': shutil.copytree(small_folder/part/name, some/part/name)
    data = load_cifar10(some)
    assert data.vocab == ['cat', 'dog'] and all(digest[:8] in data.origin for digest in data.fingerprint)

def n_pictures(data): return len(data.train_y), len(data.test_y)

def is_own(data): return any(map(len, data.files)) # CIFAR-10 has no names of files

def test_no_picture_is_lost_in_a_folder_with_the_classes_of_cifar10(folder):
    for part in 'train', 'test':
        for k, kind in enumerate(('jpg', 'webp')): save_squares(folder/part/'cat', 1, kind, k, seed=len(part))
    data = load_cifar10(folder)
    assert (data.vocab, n_pictures(data), is_own(data)) == (list(cifar10_classes), (82, 42), True)

def test_a_class_beside_those_of_cifar10_is_kept(folder):
    for part, n in dict(train=3, test=2).items(): save_squares(folder/part/'person', n, 'jpg', seed=n)
    data = load_cifar10(folder)
    assert (data.vocab, n_pictures(data)) == (sorted([*cifar10_classes, 'person']), (83, 42))

def test_pictures_in_subfolders_of_the_classes_of_cifar10_are_kept(folder):
    save_squares(folder/'train'/'cat'/'kittens', 3)
    assert n_pictures(load_cifar10(folder)) == (83, 40)

@pytest.mark.parametrize('name', ['valid', 'val', 'validation'])
def test_the_classes_of_cifar10_in_other_splits_are_pictures_of_ones_own(folder, name):
    (folder/'test').rename(folder/name)
    data = load_cifar10(folder)
    assert (data.vocab, n_pictures(data), is_own(data)) == (list(cifar10_classes), (80, 40), True)

def test_the_classes_of_cifar10_without_a_split_are_pictures_of_ones_own(folder):
    shutil.rmtree(folder/'test')
    assert n_pictures(load_cifar10(folder)) == (60, 20)

def test_a_split_beside_those_of_cifar10_makes_it_pictures_of_ones_own(folder): # as in CINIC-10
    shutil.copytree(folder/'test', folder/'valid')
    with pytest.warns(UserWarning, match='valid'): data = load_cifar10(folder)
    assert n_pictures(data) == (80, 40) and is_own(data)

def test_the_classes_of_cifar10_at_another_size_are_pictures_of_ones_own(folder):
    for file in folder.rglob('*.png'): Image.open(file).resize((64, 64)).save(file)
    data = load_cifar10(folder, size=64)
    assert (data.vocab, data.size, n_pictures(data)) == (list(cifar10_classes), 64, (80, 40))
    with pytest.raises(ValueError, match='64×64.*valid'): load_cifar10(folder)

def test_too_many_images_for_cifar10_name_a_way_out(folder, monkeypatch):
    monkeypatch.setattr('cifar_fastai.data.archive.max_files', 100)
    with pytest.raises(ValueError, match='100 files.*valid'): load_cifar10(folder)
    (folder/'test').rename(folder/'valid')
    assert n_pictures(load_cifar10(folder)) == (80, 40)

def test_the_folder_is_decoded_once_and_again_after_a_change(empty_home, pets, monkeypatch):
    first = load_cifar10(pets)
    def refuse(*args, **kwargs): raise AssertionError('an image was decoded')
    with monkeypatch.context() as m:
        m.setattr(Image, 'open', refuse)
        again = load_cifar10(str(pets))
    assert again.fingerprint == first.fingerprint and again.vocab == first.vocab
    save_squares(pets/'palace', 1, 'bmp', seed=5)
    assert len(load_cifar10(pets).train_y) + len(load_cifar10(pets).test_y) == 41

@pytest.mark.parametrize('n, bs', [(2, 8), (40, 8), (320, 16), (1000, 32), (9, 7), (10_000, 256), (20_000, 512), (10**6, 512)])
def test_few_pictures_get_a_smaller_batch_and_cifar10_its_own(n, bs):
    data = CIFAR10Data(np.zeros((0,)), np.zeros(n), None, None, ['a', 'b'])
    assert default_bs(data) == bs and default_bs(data, 16) == min(bs, 16)
    assert default_bs(data._replace(vocab=list(cifar10_classes))) == 512

def test_a_folder_trains_from_python_and_its_dataloaders_have_its_classes(pets):
    dls = cifar_dls(pets, num_workers=0)
    assert (list(dls.vocab), dls.c, dls.bs) == (['flower', 'palace'], 2, 8) and dls.one_batch()[0].shape == (8, 3, 32, 32)

# ---- other sizes than 32×32

@pytest.mark.parametrize('size', [16, 64])
def test_pictures_are_read_at_the_size_that_is_asked_for(pets, size):
    data = load_cifar10(pets, size=size)
    assert data.size == size and data.train_x.shape == (32, size, size, 3)
    expected = {read_image(file, size).tobytes() for file in pets.glob('*/*')}
    assert {img.tobytes() for img in (*data.train_x, *data.test_x)} == expected
    assert load_cifar10(pets).size == 32 # each size has a cache of its own

@pytest.mark.parametrize('size', [0, 8, 33, 136, 32., '32', True])
def test_a_size_that_cannot_be_trained_on_is_refused(pets, size):
    for make in (lambda: load_cifar10(pets, size=size), lambda: TrainSettings(size=size), lambda: cifar_dls(pets, size=size)):
        with pytest.raises(ValueError, match='size is'): make()

@pytest.mark.parametrize('source', ['digits', 'small_archive', 'batches'])
def test_images_of_32_pixels_have_no_other_size(source, request):
    if source != 'digits': source = request.getfixturevalue(source)
    with pytest.raises(ValueError, match='size is 64'): load_cifar10(source, size=64)

@pytest.fixture
def batches(small, write_batches, tmp_path): return write_batches(small, tmp_path/'cifar-10-batches-py')

def aug_of(dls): return next(t for t in dls.train.after_item.fs if isinstance(t, ItemAugment)).aug

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_augmentation_and_recipe_follow_the_size(pets, pipeline):
    dls = cifar_dls(pets, size=64, recipe='quick', pipeline=pipeline, num_workers=0, bs=16)
    aug = aug_of(dls)
    assert (aug.size, aug.pad, aug.cutout) == (64, 8, 0)
    x, _ = dls.one_batch()
    assert x.shape == (16, 3, 64, 64)
    learn = cifar_learner(dls, CustomResNet(2, width=8), 'fp32')
    assert learn.image_sizes.sizes == (40, 48, 56, 64)
    settings = TrainSettings(str(pets), size=64).resolved()
    assert (settings.cutout, settings.sizes) == (16, ()) and TrainSettings(size=48, cutout=40).resolved().cutout == 40
    with pytest.raises(ValueError, match='cutout is 65'): TrainSettings(size=64, cutout=65)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run on pictures of 48×48 in three classes"
    folder = tmp_path_factory.mktemp('own')
    for photo, name in enumerate(('palace & co', 'flower', 'zebra')): save_squares(folder/'pictures'/name, 24, photo=photo%2, seed=photo)
    settings = TrainSettings(str(folder/'pictures'), size=48, epochs=2, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(folder/'run'))
    train(settings)
    return folder/'run', folder/'pictures'

def test_one_picture_in_two_classes_is_no_copy_to_remove_but_a_label_to_correct(split):
    first = sorted((split/'train'/'a').iterdir())[0]
    for k in range(3): shutil.copy(sorted((split/'train'/'b').iterdir())[k], split/'test'/'b'/f'again_{k}.png')
    shutil.copy(first, split/'test'/'c'/'other.png')
    with pytest.warns(UserWarning, match=r'4 of 13 .*inflates.*1 of them in another class.*test/c/other\.png = train/a/') as found: load_cifar10(split)
    for k in range(3): (split/'test'/'b'/f'again_{k}.png').unlink()
    with pytest.warns(UserWarning, match='1 of 10 .*another class') as found: load_cifar10(split)
    assert 'inflates' not in str(found[0].message)

def test_own_pictures_are_no_test_images(trained, capsys):
    run, pictures = trained
    assert 'validation images' in read_json(run/'summary.json')['best_is'] and 'test images' not in write_report(run).read_text()

def test_a_report_says_when_its_images_are_no_longer_those_of_the_run(trained, tmp_path, caplog):
    run, pictures = trained
    shutil.copytree(run, tmp_path/'run'); shutil.copytree(pictures, tmp_path/'pictures')
    config = read_json(tmp_path/'run/config.json')
    config['settings']['data'] = str(tmp_path/'pictures')
    write_json(tmp_path/'run/config.json', config)
    save_squares(tmp_path/'pictures'/'zebra', 1, 'bmp', seed=99)
    write_report(tmp_path/'run')
    assert any(record.levelname == 'WARNING' and 'no images' in record.message for record in caplog.records)

def changed_run(run, folder, **settings):
    shutil.copytree(run, folder)
    config = read_json(folder/'config.json')
    config['settings'] |= settings
    write_json(folder/'config.json', config)
    return folder

def test_a_run_in_the_precision_of_another_machine_is_read(trained, tmp_path):
    run, _ = trained
    there = changed_run(run, tmp_path/'run', precision='fp16') # of a GPU
    assert abs(CifarInterpretation.from_run(there).accuracy - CifarInterpretation.from_run(run).accuracy) < .1

def test_the_report_of_a_run_whose_network_is_not_installed_has_its_images(trained, tmp_path, monkeypatch):
    run, _ = trained
    def missing(*args, **kwargs): raise ModuleNotFoundError('timm is not installed')
    monkeypatch.setattr('cifar_fastai.look.report.load_run', missing)
    assert 'id="gallery"' in write_report(changed_run(run, tmp_path/'run')).read_text()

def test_the_command_names_the_files_of_mistakes_and_doubtful_labels(trained, capsys):
    run, pictures = trained
    cifar_interpret([str(run), '--k', '4', *['--label_issues']*bool(find_spec('cleanlab'))])
    said, interp = capsys.readouterr().out, CifarInterpretation.from_run(run)
    assert all(f'{m.file}: ' in said and (pictures/m.file).is_file() for m in interp.misclassified(4))
    if find_spec('cleanlab'): assert all(f'{issue.file}: label {issue.given}' in said for issue in interp.label_issues(4))

def test_a_run_records_size_and_batch_size_and_everything_reads_them(trained, tmp_path):
    run, pictures = trained
    settings = read_json(run/'config.json')['settings']
    assert (settings['size'], settings['bs'], settings['cutout']) == (48, 6, 12) # 57 images: 8 or 7 would leave one over
    interp = CifarInterpretation.from_run(run)
    assert interp.vocab == ['flower', 'palace & co', 'zebra'] and interp.image(0).shape == (48, 48, 3)
    classify, vocab = load_classifier(run)
    file = next((pictures/'zebra').iterdir())
    probs = classify([read_image(file, classify.size)])
    assert classify.size == 48 and probs.shape == (1, 3) and vocab == interp.vocab
    report = write_report(run).read_text()
    assert 'palace &amp; co' in report and 'palace & co' not in report
    mistakes = CifarInterpretation.from_run(run).misclassified()
    assert mistakes and all(f'title="{escape(mistake.file)}"' in report for mistake in mistakes)
    assert "--size 48" in report

def test_a_run_is_resumed_predicted_and_interpreted_by_the_commands(trained, capsys):
    run, pictures = trained
    files = [str(file) for file in list((pictures/'flower').iterdir())[:2]]
    cifar_predict(['--model', str(run), *files])
    assert len(capsys.readouterr().out.splitlines()) == 2
    cifar_interpret([str(run)])
    cifar_train(['--resume', str(run)])
    assert 'palace & co' in capsys.readouterr().out

def test_an_export_takes_images_of_the_size_of_its_run(trained, tmp_path):
    pytest.importorskip('onnxruntime', reason='the extra export is not installed')
    run, pictures = trained
    exported, vocab = load_classifier(export_model(run, 'onnx', tmp_path/'own.onnx'))
    classify, _ = load_classifier(run)
    images = np.stack([read_image(file, 48) for file in (pictures/'zebra').iterdir()])
    assert exported.size == 48 and vocab == ['flower', 'palace & co', 'zebra'] and np.allclose(exported(images), classify(images), atol=1e-4)
    with pytest.raises(ValueError, match='32'): exported(images[:, :32, :32])
    program = export_model(run, 'torch', tmp_path/'own.pt2')
    assert program.stat().st_size > 0

def test_digits_are_not_flipped_and_pictures_are(digits, pets):
    assert TrainSettings('digits').resolved().flip == 'none' and TrainSettings(str(pets)).resolved().flip == 'alternate'
    assert aug_of(cifar_dls('digits', num_workers=0)).flip == aug_of(cifar_dls(digits, num_workers=0)).flip == 'none'
    assert aug_of(cifar_dls(pets, num_workers=0)).flip == 'alternate'

# ---- classes of different sizes

def test_class_weights_make_the_loss_the_mean_of_the_classes():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    logits, targs = torch.randn(10, 3), torch.from_numpy(labels)
    plain = torch.nn.functional.cross_entropy(logits, targs, reduction='none')
    expected = np.mean([plain[targs == label].mean().item() for label in range(3)])
    assert balanced_loss(labels)(logits, targs).item() == pytest.approx(expected, rel=1e-5)
    assert balanced_loss(labels, .2).func.label_smoothing == .2

@pytest.mark.parametrize('labels, n_classes, missing', [([0, 0, 2], None, 1), ([0, 1, 1], 3, 2)])
def test_a_class_without_images_has_no_weight(labels, n_classes, missing):
    with pytest.raises(ValueError, match=f'class {missing}'): balanced_loss(np.array(labels), n_classes=n_classes)
    assert balanced_loss(np.array([0, 1, 1, 2]), n_classes=3).func.weight.tolist() == pytest.approx([4/3, 2/3, 4/3])

def test_a_run_weighs_its_classes_on_request_and_the_report_has_the_balanced_accuracy(tmp_path):
    for name, n in dict(many=40, few=10).items(): save_squares(tmp_path/'p'/name, n, photo=len(name)%2, seed=n)
    settings = dict(epochs=1, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32')
    learn, data = settings_learner(TrainSettings(str(tmp_path/'p'), class_weights=True, **settings))
    n_few, n_many = np.bincount(data.train_y)
    assert data.vocab == ['few', 'many'] and torch.allclose(learn.loss_func.func.weight, torch.tensor([40/(2*n_few), 40/(2*n_many)], dtype=torch.float32))
    train(TrainSettings(str(tmp_path/'p'), class_weights=True, out=str(tmp_path/'run'), **settings))
    interp = CifarInterpretation.from_run(tmp_path/'run')
    assert torch.equal(learner_from_run(tmp_path/'run').loss_func.func.weight, learn.loss_func.func.weight)
    assert interp.balanced_accuracy == pytest.approx(interp.per_class()['recall'].mean())
    assert 'balanced accuracy' in write_report(tmp_path/'run').read_text()

# ---- faults that were found by others

@pytest.mark.parametrize('train, valid', [('training', 'testing'), ('Train', 'validation'), ('TRAINING', 'Dev'), ('train', 'eval')])
def test_other_names_of_the_splits_are_known(split, train, valid):
    (split/'train').rename(split/'t'); (split/'t').rename(split/train); (split/'test').rename(split/'v'); (split/'v').rename(split/valid)
    assert read_folder(split).vocab == ['a', 'b', 'c'] and len(read_folder(split).test_y) == 9

def test_folders_beside_the_splits_are_refused_by_name(split, pets):
    save_squares(split/'unlabelled', 3)
    refused(split, 'unlabelled')
    shutil.copytree(pets/'palace', pets/'test')
    refused(pets, 'test')

def test_a_split_that_is_not_used_is_named_and_one_without_classes_is_not_taken(split):
    (split/'test').rename(split/'valid')
    save_squares(split/'test', 5) # pictures without labels
    with pytest.warns(UserWarning, match='test'): data = read_folder(split)
    assert len(data.test_y) == 9

def test_pictures_of_both_spellings_of_a_class_are_kept(split):
    for k, name in enumerate(('caf\u00e9', 'cafe\u0301')): save_squares(split/'train'/name, 4 + k, seed=50 + k)
    save_squares(split/'test'/'caf\u00e9', 2, seed=60)
    assert np.bincount(read_folder(split).train_y).tolist() == [8, 8, 8, 9]

@pytest.mark.parametrize('link, real', [('a', 'z'), ('z', 'a')])
def test_a_picture_behind_a_link_is_in_both_classes_and_reported(tmp_path, link, real):
    for k, name in enumerate((link, real)): save_squares(tmp_path/name, 4, photo=k)
    save_squares(tmp_path/real/'more', 3, seed=9)
    (tmp_path/link/'more').symlink_to(tmp_path/real/'more', target_is_directory=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        data = load_cifar10(tmp_path)
    counts = dict(zip(data.vocab, np.bincount(np.concatenate([data.train_y, data.test_y]))))
    assert counts == {link: 7, real: 7}
    assert any('another class' in str(warning.message) for warning in found) == (n_duplicates(data) > 0)

def test_every_class_has_the_pictures_that_it_links_to(tmp_path):
    save_squares(tmp_path/'pool', 5, seed=9)
    for k, name in enumerate(('cat', 'dog')):
        save_squares(tmp_path/'pets'/name, 4, photo=k)
        (tmp_path/'pets'/name/'more').symlink_to(tmp_path/'pool', target_is_directory=True)
    found = find_pictures(tmp_path/'pets')
    assert [sum(label == i for _, label in found.splits[0]) for i in range(2)] == [9, 9]

def test_links_that_lead_to_each_other_end(tmp_path):
    for k, (name, other) in enumerate((('cat', 'dog'), ('dog', 'cat'))):
        save_squares(tmp_path/name, 4, photo=k)
        (tmp_path/name/'others').symlink_to(tmp_path/other, target_is_directory=True)
    assert len(find_pictures(tmp_path).splits[0]) == 16

def test_cifar10_is_read_with_the_links_by_which_it_is_recognised(empty_home, small, folder, tmp_path):
    (folder/'train'/'cat').rename(tmp_path/'cats')
    (folder/'train'/'cat').symlink_to(tmp_path/'cats', target_is_directory=True)
    data = load_cifar10(folder)
    assert data.fingerprint == small.fingerprint and not is_own(data)

def test_folders_that_change_places_are_read_again(empty_home, tmp_path):
    for k, name in enumerate('ab'):
        (tmp_path/'p'/name).mkdir(parents=True)
        for i in range(3):
            file = tmp_path/'p'/name/f'{i}.bmp'
            Image.new('RGB', (32, 32), (255*k, 0, i)).save(file)
            os.utime(file, (0, 0))
    assert (load_cifar10(tmp_path/'p').train_x[..., 0].max(axis=(1, 2)) == 255*load_cifar10(tmp_path/'p').train_y).all()
    (tmp_path/'p'/'a').rename(tmp_path/'t'); (tmp_path/'p'/'b').rename(tmp_path/'p'/'a'); (tmp_path/'t').rename(tmp_path/'p'/'b')
    data = load_cifar10(tmp_path/'p')
    assert (data.train_x[..., 0].max(axis=(1, 2)) == 255*(1 - data.train_y)).all()

def test_pictures_that_could_not_be_read_are_tried_again_the_next_time(empty_home, tmp_path):
    for photo, name in enumerate('ab'): save_squares(tmp_path/'p'/name, 100, photo=photo, sides=(33, 34))
    file = tmp_path/'p'/'a'/'0001.png'
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(content[::-1]); os.utime(file, ns=times)
    for _ in range(2):
        with pytest.warns(UserWarning, match='1 of 200'): assert len(load_cifar10(tmp_path/'p').train_y) == 159
    file.write_bytes(content); os.utime(file, ns=times)
    data = load_cifar10(tmp_path/'p')
    assert len(data.train_y) + len(data.test_y) == 200

def test_a_hold_out_that_takes_the_last_image_of_a_class_is_refused_by_name(tmp_path):
    for k, name in enumerate(('many', 'rare')): save_squares(tmp_path/'train'/name, (20, 1)[k], photo=k); save_squares(tmp_path/'test'/name, 2, photo=k, seed=3)
    with pytest.raises(ValueError, match='rare'): cifar_dls(tmp_path, valid='holdout')
    assert cifar_dls(tmp_path).train.n == 21

def test_own_classes_from_0_to_9_are_no_digits_of_scikit_learn(tmp_path):
    for i in range(10): save_squares(tmp_path/str(i), 6, photo=i%2, seed=i)
    data = load_cifar10(tmp_path)
    assert 'scikit' not in data.origin and default_bs(data) == 8 and default_bs(load_cifar10('digits'), 64) == 64

@pytest.mark.parametrize('n', [99, 100, 149])
def test_no_batch_of_one_image_is_left_over_in_a_hold_out(n):
    x, y = np.zeros((n, 32, 32, 3), dtype=np.uint8), np.arange(n)%2
    data = CIFAR10Data(x, y, x[:2], y[:2], ['a', 'b'])
    assert all(cifar_dls(data, valid=valid, num_workers=0, device='cpu').train.n % default_bs(data, valid=valid) != 1 for valid in ('test', 'holdout'))

@pytest.mark.parametrize('n', [9, 17, 57, 161, 1009])
def test_no_batch_of_one_image_is_left_over_by_default(n):
    data = CIFAR10Data(np.zeros((0,)), np.zeros(n), None, None, ['a', 'b'])
    assert n%default_bs(data) != 1 and default_bs(data) >= 5

@pytest.mark.parametrize('data, out', [('../pets', '{pets}/runs/a'), ('{pets}', 'link/a'), ('{pets}/../pets', '../pets/a'), ('cifar10', '{pets}/a'), ('~/pets', '{pets}/a')])
def test_a_run_folder_among_the_pictures_is_refused_by_any_name(pets, tmp_path, monkeypatch, data, out):
    (tmp_path/'elsewhere').mkdir(); (tmp_path/'elsewhere'/'link').symlink_to(pets, target_is_directory=True)
    monkeypatch.chdir(tmp_path/'elsewhere'); monkeypatch.setenv('CIFAR_FASTAI_DATA', str(pets)); monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(ValueError, match='out is'): train(TrainSettings(data.format(pets=pets), epochs=1, out=out.format(pets=pets)))
    assert sorted(folder.name for folder in pets.iterdir()) == ['flower', 'palace']

def test_a_run_folder_among_the_pictures_is_refused(pets, monkeypatch):
    monkeypatch.chdir(pets)
    with pytest.raises(SystemExit) as e: cifar_train('--data . --epochs 1 --out runs/a'.split())
    assert 'runs/a' in str(e.value) and not (pets/'runs').exists()

def test_a_run_whose_pictures_have_changed_is_not_interpreted_with_others(trained, tmp_path):
    run, pictures = shutil.copytree(trained[0], tmp_path/'run'), shutil.copytree(trained[1], tmp_path/'pictures')
    config = read_json(run/'config.json'); config['settings']['data'] = str(pictures); write_json(run/'config.json', config)
    assert CifarInterpretation.from_run(run).accuracy >= 0
    next((pictures/'zebra').iterdir()).unlink()
    with pytest.raises(ValueError, match='pictures'): CifarInterpretation.from_run(run)
    assert CifarInterpretation.from_run(run, pictures).accuracy >= 0 # given, they are meant

def test_a_constant_channel_and_names_with_dollars_train_to_the_end(tmp_path):
    for name, green in {'$10_$20': 80, '$20_$50': 200}.items():
        (tmp_path/'p'/name).mkdir(parents=True)
        for i in range(10): Image.new('RGB', (32, 32), (0, green + i, 0)).save(tmp_path/'p'/name/f'{i}.png')
    train(TrainSettings(str(tmp_path/'p'), epochs=1, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(tmp_path/'run')))
    assert '$10_$20' in write_report(tmp_path/'run').read_text()

@pytest.mark.parametrize('flip, cutout, words', [('none', 0, 'not flipped'), ('alternate', 6, 'every other epoch'), ('random', 6, 'at random')])
def test_the_report_says_how_the_images_were_augmented(pets, tmp_path, flip, cutout, words):
    train(TrainSettings(str(pets), flip=flip, cutout=cutout, epochs=1, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(tmp_path/'run')))
    page = write_report(tmp_path/'run').read_text()
    assert words in page and ('cutout of' in page) == (cutout > 0)

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_a_run_rotates_its_images_says_so_and_goes_on_to_do_so(pets, tmp_path, pipeline):
    settings = TrainSettings(str(pets), rotate=7.5, pipeline=pipeline, epochs=1, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', out=str(tmp_path/'run'))
    train(settings)
    assert '7.5°' in write_report(tmp_path/'run').read_text()
    assert learner_from_run(tmp_path/'run').dls.train.after_item.item_augment.aug.rotate == 7.5
    with pytest.raises(ValueError, match='rotate is 200'): CropFlipCutout(rotate=200)

def test_runs_of_digits_from_before_flips_were_recorded_keep_theirs():
    assert settings_from(dict(data='digits', epochs=5, bs=64)).resolved().flip == 'random' and TrainSettings('digits').resolved().flip == 'none'

def test_an_ablation_starts_from_the_values_of_data_size_and_model(pets):
    for given in dict(data='digits'), dict(data=str(pets), size=64), dict(model='resnet18'):
        assert RepeatSettings(ablate=True, valid='holdout', **given).resolved().n == 5
    assert RepeatSettings(data=str(pets), recipe='quick', without=('cutout',), size=64).resolved().cutout == 16

def test_the_block_reads_pictures_at_the_size_that_it_is_told(pets):
    data = load_cifar10(pets, size=64)
    dls = cifar_block(data.stats, data.vocab, sized_augment(64, 0, 'none'), size=64).dataloaders(pets, bs=4, num_workers=0)
    assert {np.asarray(item[0]).tobytes() for item in dls.valid_ds.items} == {img.tobytes() for img in data.test_x}
    smaller = cifar_block(data.stats, data.vocab, CropFlipCutout(size=28)).dataloaders(pets, bs=4, num_workers=0) # a crop of 32×32
    assert smaller.one_batch()[0].shape[-1] == 28 and smaller.valid.one_batch()[0].shape[-1] == 32

def test_unreadable_pictures_are_not_cached_even_if_warnings_are_ignored(empty_home, tmp_path):
    for photo, name in enumerate('ab'): save_squares(tmp_path/'p'/name, 100, photo=photo, sides=(33, 34))
    (tmp_path/'p'/'a'/'0001.png').write_bytes(b'no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        load_cifar10(tmp_path/'p')
    assert not list(empty_home.rglob('*.npz'))

# ---- what a newcomer is told

def told(folder, **kwargs):
    "Load a folder, and return the data and the warnings"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        data = load_cifar10(folder, **kwargs)
    return data, [str(warning.message) for warning in found]

def test_files_that_are_no_readable_format_are_counted_by_suffix(empty_home, pets):
    for i in range(8): (pets/'palace'/f'{i}.HEIC').write_bytes(b'x')
    (pets/'flower'/'more').mkdir(); (pets/'flower'/'more'/'film.mp4').write_bytes(b'x')
    for _ in range(2): # the second time from the cache
        data, [said] = told(pets)
        assert '8 .heic' in said and '1 .mp4' in said and len(data.train_y) + len(data.test_y) == 40

@pytest.mark.parametrize('name', ['.hidden.heic', 'Thumbs.db', 'desktop.ini', 'a.txt', 'a.CSV', 'a.json', 'a.md', '.DS_Store'])
def test_files_that_are_never_pictures_are_passed_over_without_a_word(pets, name):
    (pets/'palace'/name).write_bytes(b'x')
    assert told(pets)[1] == []

def test_very_many_suffixes_are_one_short_warning(pets):
    for i in range(200): (pets/'palace'/f'scan.{i:04}').write_bytes(b'x')
    (pets/'palace'/'no_suffix').write_bytes(b'x'); (pets/'palace'/'a.\x1b[31m').write_bytes(b'x')
    _, [said] = told(pets)
    assert len(said) < 400 + len(str(pets)) and said.isprintable()

def test_a_class_of_other_formats_only_is_told_them(pets):
    (pets/'tree').mkdir()
    for i in range(6): (pets/'tree'/f'{i}.heic').write_bytes(b'x')
    refused(pets, 'tree', '6 .heic')

@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger='cifar_fastai')
    return caplog

def test_the_classes_and_the_split_are_logged_once(empty_home, pets, log):
    for file in list((pets/'flower').iterdir())[:10]: file.unlink()
    save_squares(pets, 3, seed=7)
    for _ in range(2): load_cifar10(pets)
    assert 'flower 8 + 2, palace 16 + 4' in log.messages[0] and 'fifth' in log.messages[1] and '3' in log.messages[2]
    assert len(log.messages) == 3
    save_squares(pets/'flower', 1, 'bmp', seed=5)
    load_cifar10(pets)
    assert 'flower 9 + 2' in log.messages[3]

def test_the_log_is_the_same_from_the_cache(empty_home, pets, log, monkeypatch):
    load_cifar10(pets)
    monkeypatch.chdir(pets.parent)
    load_cifar10('pets')
    assert log.messages[:2] == log.messages[2:] and 'flower 16 + 4' in log.messages[0] and 'fifth' in log.messages[1]

def test_a_split_of_ones_own_is_not_said_to_be_made(empty_home, split, log):
    load_cifar10(split)
    assert len(log.messages) == 1 and 'a 8 + 3' in log.messages[0]

def test_many_classes_are_summed_up(empty_home, tmp_path, log):
    for i in range(30):
        (tmp_path/'p'/f'class{i:02}').mkdir(parents=True)
        for k in range(2 + i): Image.new('RGB', (32, 32), (i, k, 0)).save(tmp_path/'p'/f'class{i:02}'/f'{k}.bmp')
    load_cifar10(tmp_path/'p')
    assert '30' in log.messages[0] and 'class00 1 + 1' in log.messages[0] and 'class29 25 + 6' in log.messages[0] and 'class10' not in log.messages[0]

@pytest.mark.filterwarnings('always::UserWarning')
def test_a_command_says_each_thing_once(empty_home, pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path/'twice'/'train'); shutil.copytree(pets, tmp_path/'twice'/'test')
    (tmp_path/'twice'/'train'/'palace'/'film.mp4').write_bytes(b'x')
    cifar_train(f"--data {tmp_path/'twice'} --epochs 1 --width 8 --lr_min 1e-3 --lr_max 1e-2 --num_workers 0 --precision fp32 --out {tmp_path/'run'}".split())
    said = capsys.readouterr()
    assert said.err.count('40 of 40') == said.err.count('.mp4') == said.out.count('palace 20 + 20') == 1

@pytest.mark.parametrize('n_good', [10, 1000])
def test_unreadable_pictures_are_grouped_by_their_reason(tmp_path, n_good):
    for k, name in enumerate('ab'):
        (tmp_path/name).mkdir()
        for i in range(n_good//2): Image.new('RGB', (16, 16), (i%256, i//256, k)).save(tmp_path/name/f'{i}.bmp')
    frames = [Image.new('L', (20, 20), 90*i) for i in range(2)]
    for i in range(5): frames[0].save(tmp_path/'a'/f'film{i}.gif', save_all=True, append_images=frames[1:])
    for i in range(2): (tmp_path/'b'/f'bad{i}.png').write_bytes(b'no picture')
    if n_good == 10: said = refused(tmp_path, '7 of 17')
    else:
        with pytest.warns(UserWarning, match='7 of 1,007') as found: read_folder(tmp_path)
        said = str(found[0].message)
    assert said.count('several pages') == said.count('save one frame') == said.count('PNG') == 1 and said.count(str(tmp_path)) == 1
    assert 'a/film0.gif' in said and 'b/bad1.png' in said and 'film4' not in said

def test_reasons_that_differ_in_a_number_are_one_group(tmp_path):
    for name in 'ab': save_squares(tmp_path/name, 5)
    for i in range(3): Image.new('1', (6000 + i, 6000)).save(tmp_path/'a'/f'large{i}.png')
    assert refused(tmp_path, '3 of 13').count('save it smaller') == 1

def test_copies_between_the_splits_are_named(empty_home, split):
    for i in range(5): shutil.copy(split/'train'/'a'/f'{i:04}.png', split/'test'/'b'/f'copy{i}.png')
    for _ in range(2):
        _, [said] = told(split)
        for i in range(3): assert f'test/b/copy{i}.png' in said and f'train/a/{i:04}.png' in said
        assert '5 of 14' in said and 'copy3' not in said

def test_copies_are_named_without_a_split_and_from_mapped_images(empty_home, pets, monkeypatch):
    for i in range(20): shutil.copy(pets/'palace'/f'{i:04}.jpg', pets/'flower'/f'copy{i}.jpg')
    _, [said] = told(pets)
    monkeypatch.setattr('cifar_fastai.data.folder.max_bytes_in_memory', 10_000)
    for file in empty_home.rglob('*.npz'): file.unlink()
    for _ in range(2):
        data, [mapped] = told(pets)
        assert isinstance(data.train_x, np.memmap) and mapped == said and 'flower/copy' in said and f'{n_duplicates(data)} of' in said

@pytest.mark.parametrize('mapped', [False, True])
def test_a_cache_of_an_earlier_version_is_read(empty_home, split, monkeypatch, mapped):
    shutil.copy(split/'train'/'a'/'0000.png', split/'test'/'b'/'copy.png')
    if mapped: monkeypatch.setattr('cifar_fastai.data.folder.max_bytes_in_memory', 10_000)
    data, _ = told(split)
    [cache] = [file for file in (empty_home/'data'/'cifar_fastai').iterdir() if file.suffix != '.lock']
    if mapped:
        for file in cache.iterdir():
            if file.stem not in CIFAR10Data._fields: file.unlink()
    else: np.savez(cache, **data._asdict())
    def refuse(*args): raise AssertionError('a picture was decoded')
    monkeypatch.setattr('cifar_fastai.data.folder.read_image', refuse)
    again, [said] = told(split)
    assert again.fingerprint == data.fingerprint and '1 of 10' in said

def test_a_class_with_too_few_pictures_is_told_how_many_it_has(pets, split):
    for file in list((pets/'flower').iterdir())[1:]: file.unlink()
    assert re.search(r'\b1\b', refused(pets, 'flower', 'two').removeprefix(str(pets)))
    save_squares(split/'train'/'a', 300, 'bmp', sides=(33, 34))
    for file in (split/'test'/'b').iterdir(): file.write_bytes(b'no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert re.search(r'\b8\b.*\b0\b', refused(split, 'class b').removeprefix(str(split)))

@pytest.mark.parametrize('part, other', [('train', 'test'), ('test', 'train')])
def test_a_misspelt_class_is_named_with_its_split_and_the_similar_one(split, part, other):
    (split/part/'a').rename(split/part/'Blume'); (split/other/'a').rename(split/other/'blumen')
    said = refused(split, 'Blume', 'blumen', 'train', 'test')
    first = min('Blume', 'blumen')
    assert re.search(rf'{first} is in {part}\b', said)
    shutil.rmtree(split/other/'blumen')
    assert re.search(rf'Blume is in {part}\b.*{other}', refused(split)) and ' b' not in refused(split).removeprefix(str(split))

def test_a_folder_one_level_too_deep_is_suggested(tmp_path, split, pets):
    for folder in split, pets:
        shutil.copytree(folder, tmp_path/f'outer_{folder.name}'/'Bilder')
        refused(tmp_path/f'outer_{folder.name}', str(tmp_path/f'outer_{folder.name}'/'Bilder'))
    save_squares(tmp_path/'one'/'cat', 4)
    assert str(tmp_path/'one'/'cat') not in refused(tmp_path/'one', 'cat')

# ---- pictures of 12 bits

def grey_photo(highest):
    grey = np.asarray(photos[0].convert('L').crop((0, 0, 60, 60))).astype(float)
    return np.rint(grey/grey.max()*highest).astype(np.uint16)

@pytest.mark.parametrize('tag', [281, 341])
@pytest.mark.parametrize('bits', [10, 12, 14])
def test_grey_values_are_scaled_by_the_range_that_a_tiff_states(tmp_path, tag, bits):
    Image.fromarray(grey_photo(2**bits - 1)).save(tmp_path/'known.tif', tiffinfo={tag: 2**bits - 1})
    Image.fromarray(grey_photo(2**bits - 1) << 16 - bits).save(tmp_path/'scaled.tif')
    assert np.array_equal(read_image(tmp_path/'known.tif'), read_image(tmp_path/'scaled.tif'))

@pytest.mark.parametrize('tags', [{281: 3000}, {281: 4095}, {281: 0}, {341: -1.}, {281: 65535}, {341: float('nan')}])
def test_other_tags_leave_the_pixels_as_they_are(tmp_path, tags):
    Image.fromarray(grey_photo(60_000)).save(tmp_path/'with.tif', tiffinfo=tags); Image.fromarray(grey_photo(60_000)).save(tmp_path/'without.tif')
    assert np.array_equal(read_image(tmp_path/'with.tif'), read_image(tmp_path/'without.tif'))

def tiff_of_12_bits(values):
    "The content of an uncompressed TIFF with two values of 12 bits in three bytes, in rows of an even length"
    a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    tags = {256: values.shape[1], 257: values.shape[0], 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9*12 + 4, 277: 1, 278: values.shape[0], 279: len(packed)}
    return b'II*\0' + struct.pack('<IH', 8, 9) + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items()) + bytes(4) + packed

def test_a_tiff_of_12_bits_per_pixel_has_its_full_range(tmp_path):
    (tmp_path/'packed.tif').write_bytes(tiff_of_12_bits(grey_photo(4095)))
    Image.fromarray(grey_photo(4095) << 4).save(tmp_path/'scaled.png')
    assert np.array_equal(read_image(tmp_path/'packed.tif'), read_image(tmp_path/'scaled.png'))

def test_16_bit_pictures_that_will_be_dark_are_counted(empty_home, tmp_path):
    for k, name in enumerate('ab'): save_squares(tmp_path/'p'/name, 10, photo=k)
    Image.new('L', (40, 40), 3).save(tmp_path/'p'/'a'/'eight_bits.png')
    assert told(tmp_path/'p')[1] == []
    Image.fromarray(grey_photo(60_000)).save(tmp_path/'p'/'a'/'bright.png')
    Image.fromarray(grey_photo(4095)).save(tmp_path/'p'/'a'/'known.tif', tiffinfo={341: 4095})
    assert told(tmp_path/'p')[1] == []
    for i in range(3): Image.fromarray(np.rot90(grey_photo(4095), i).copy()).save(tmp_path/'p'/'b'/f'dark{i}.{"png tif tif".split()[i]}')
    for _ in range(2):
        _, [said] = told(tmp_path/'p')
        assert '3 of 5' in said and '16' in said

def save_rgb_16(file, values):
    "Save `uint16` (H, W, 3) as a PNG"
    def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    header = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    file.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))

def test_colour_pictures_of_16_bits_are_counted_too(pets):
    for i, highest in enumerate((4095, 60_000)): save_rgb_16(pets/'palace'/f'deep{i}.png', np.stack([grey_photo(highest - k) for k in range(3)], -1))
    _, [said] = told(pets)
    assert '1 of 2' in said

def test_a_folder_that_has_moved_is_named_with_its_run(trained, tmp_path):
    run, pictures = trained
    moved = shutil.copytree(run, tmp_path/'run')
    config = read_json(moved/'config.json')
    config['settings']['data'] = str(tmp_path/'gone')
    write_json(moved/'config.json', config)
    with pytest.raises(FileNotFoundError, match=f'{tmp_path/"gone"}.*{moved}'): CifarInterpretation.from_run(moved)
    (moved/'summary.json').unlink()
    with pytest.raises(FileNotFoundError, match=f'{tmp_path/"gone"}.*{moved}'): resume(moved)
    assert CifarInterpretation.from_run(moved, pictures).accuracy == CifarInterpretation.from_run(run).accuracy

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_files_are_labelled_by_their_folders_in_a_test_dl(split, pipeline):
    dls = cifar_dls(split, bs=8, seed=0, num_workers=0, pipeline=pipeline)
    files = [file for file in get_image_files(split) if file.suffix == '.png']
    x, y = next(iter(dls.test_dl(files, bs=len(files), with_labels=True)))
    assert [dls.vocab[i] for i in y] == [file.parent.name for file in files]
    assert torch.equal(x, dls.test_dl(files, bs=len(files)).one_batch()[0])
