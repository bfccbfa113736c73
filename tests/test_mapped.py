"""Pictures of one's own that are memory-mapped: the same images, batches and runs as from memory, at the cost of a batch."""
import errno, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_fastai.core import TrainSettings
from cifar_fastai.files import read_json
from cifar_fastai.data.augment import CropFlipCutout
from cifar_fastai.data.block import cifar_dls, default_bs, split_images
from cifar_fastai.data.folder import n_duplicates, read_folder
from cifar_fastai.data.images import CIFAR10Data, MappedImages
from cifar_fastai.data.loader import Resident
from cifar_fastai.data.source import load_cifar10
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.look.report import write_report
from cifar_fastai.run.train import train

threshold = 'cifar_fastai.data.folder.max_bytes_in_memory'

def save_noise(folder, n, side, seed=0):
    "Save `n` pictures of noise, of a few bytes"
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(seed).integers(256, size=(n, side, side, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder/f'{i:05}.bmp')

@pytest.fixture
def pictures(tmp_path):
    "A folder of three classes without splits, 110 pictures"
    for k, n in enumerate((60, 30, 20)): save_noise(tmp_path/'pictures'/'abc'[k], n, 20 + k, seed=k)
    return tmp_path/'pictures'

@pytest.fixture
def split(tmp_path):
    "A folder of two classes with splits"
    for k, part in enumerate(('train', 'val')):
        for i, name in enumerate('ab'): save_noise(tmp_path/'split'/part/name, (40, 15)[k], 24, seed=10*k + i)
    return tmp_path/'split'

@pytest.fixture
def mapping(monkeypatch, empty_home):
    "From here on, folders of more than 10,000 bytes are memory-mapped"
    monkeypatch.setattr(threshold, 10_000)
    return empty_home/'data'/'cifar_fastai'

def cached(cache): return sorted(path.name for path in cache.iterdir() if path.suffix != '.lock')

def same(a, b): return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

def is_mapped(data): return isinstance(data.train_x, np.memmap) and isinstance(data.test_x, np.memmap)

# ---- the images

@pytest.mark.parametrize('layout', ['pictures', 'split'])
@pytest.mark.parametrize('size', [16, 32, 64])
def test_the_images_are_those_from_memory_in_the_same_order(mapping, request, layout, size, monkeypatch):
    folder = request.getfixturevalue(layout)
    expected, data = read_folder(folder, size), load_cifar10(folder, size=size)
    assert same(data, expected) and is_mapped(data) and not is_mapped(expected)
    assert not data.train_x.flags.writeable and type(data.train_y) is np.ndarray and data.train_y.dtype == np.int64
    def refuse(*args): raise AssertionError('a picture was decoded')
    monkeypatch.setattr('cifar_fastai.data.folder.read_image', refuse)
    again = load_cifar10(folder, size=size)
    assert same(again, expected) and is_mapped(again)

def test_the_cache_is_a_folder_of_arrays_that_numpy_reads(mapping, pictures):
    data = load_cifar10(pictures)
    [name] = cached(mapping)
    files = {file.name: np.load(file, allow_pickle=False) for file in (mapping/name).iterdir()}
    assert set(files) == {f'{field}.npy' for field in (*CIFAR10Data._fields, 'notes')}
    for field, value in data._asdict().items(): assert np.array_equal(files[f'{field}.npy'], value)
    assert Path(data.train_x.filename) == mapping/name/'train_x.npy'

@pytest.mark.parametrize('above', [0, 1])
def test_the_threshold_counts_decoded_bytes(empty_home, pictures, monkeypatch, above):
    monkeypatch.setattr(threshold, 110*3*32*32 - above)
    assert is_mapped(load_cifar10(pictures)) == bool(above)
    [name] = cached(empty_home/'data'/'cifar_fastai')
    assert name.endswith('.npz') == (not above)

def test_facts_about_the_images_are_the_same(mapping, pictures):
    (pictures/'c'/'copy.bmp').write_bytes((pictures/'a'/'00000.bmp').read_bytes())
    expected, data = read_folder(pictures), load_cifar10(pictures)
    for fact in 'size', 'stats', 'fingerprint', 'origin': assert getattr(data, fact) == getattr(expected, fact)
    assert (n_duplicates(data), default_bs(data), repr(data)) == (n_duplicates(expected), default_bs(expected), repr(expected))
    assert same(data.first(20, 5), expected.first(20, 5)) and is_mapped(data.first(20, 5))

def test_the_hold_out_selects_the_same_images_and_copies_none(mapping, pictures):
    expected, data = read_folder(pictures), load_cifar10(pictures)
    for (x, y), (x1, y1) in zip(split_images(data, 'holdout'), split_images(expected, 'holdout'), strict=True):
        assert type(x) is MappedImages and len(x) == len(y1) and x.shape == x1.shape
        assert np.array_equal(y, y1) and np.array_equal(np.stack(list(x)), x1) and np.array_equal(x[3:7], x1[3:7])
        assert all(np.shares_memory(img, data.train_x) for img in x)

# ---- the cache

def other_array(name, **changes):
    def damage(folder):
        a = np.array(np.load(folder/name))
        np.save(folder/name, a.astype(changes['dtype']) if 'dtype' in changes else a[changes['part']])
    return damage

damages = {'cut short': lambda folder: os.truncate(folder/'train_x.npy', 20_000), 'empty': lambda folder: (folder/'test_x.npy').write_bytes(b''),
           'text': lambda folder: (folder/'train_y.npy').write_text('text'), 'a file is missing': lambda folder: (folder/'vocab.npy').unlink(),
           'of another type': other_array('test_x.npy', dtype=np.int8), 'labels of another type': other_array('test_y.npy', dtype=np.int32),
           'fewer labels': other_array('train_y.npy', part=slice(5)), 'of another shape': other_array('train_x.npy', part=np.s_[:, :8]),
           'a pipe': lambda folder: ((folder/'train_x.npy').unlink(), os.mkfifo(folder/'train_x.npy')),
           'a file in its place': lambda folder: (folder.rename(folder.with_name('moved')), folder.write_text('text'))}

@pytest.mark.parametrize('damage', damages)
def test_a_damaged_cache_is_made_anew(mapping, pictures, damage):
    expected = read_folder(pictures)
    load_cifar10(pictures)
    [name] = cached(mapping)
    damages[damage](mapping/name)
    assert same(load_cifar10(pictures), expected)
    again = load_cifar10(pictures)
    assert same(again, expected) and is_mapped(again) and [path for path in cached(mapping) if path != 'moved'] == [name]

def test_images_that_are_in_use_outlive_a_change_of_the_folder(mapping, pictures):
    expected, data = read_folder(pictures), load_cifar10(pictures)
    (pictures/'a'/'00000.bmp').unlink()
    assert len(load_cifar10(pictures).train_y) + len(load_cifar10(pictures).test_y) == 109
    assert same(data, expected) and len(cached(mapping)) == 1 # of the folder as it is now

@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_nothing_is_left_of_a_reading_that_is_broken_off(mapping, pictures, monkeypatch, error):
    def stop(*args): raise error
    for name in 'read_image', 'first_of_each_class':
        with monkeypatch.context() as m, pytest.raises(error):
            m.setattr(f'cifar_fastai.data.folder.{name}', stop)
            load_cifar10(pictures)
        assert cached(mapping) == []

def leave_part(folder):
    folder.mkdir(parents=True)
    (folder/'decoded.npy').write_bytes(bytes(1000))
    return folder

def test_what_a_killed_process_has_left_is_removed(mapping, pictures, monkeypatch):
    class Killed(BaseException): pass
    def killed(*args, **kwargs): raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr('cifar_fastai.data.folder.first_of_each_class', killed)
        m.setattr('shutil.rmtree', lambda *args, **kwargs: None) # nobody cleans up
        load_cifar10(pictures)
    [left] = [path for path in mapping.iterdir() if path.suffix == '.part']
    assert is_mapped(load_cifar10(pictures)) and len(cached(mapping)) == 1 and not left.exists()

def test_what_other_processes_write_is_removed_after_a_day(mapping, pictures):
    new, old = (leave_part(mapping/f'.{name*48}.part') for name in 'ab')
    os.utime(old, (0, 0))
    assert is_mapped(load_cifar10(pictures)) and new.exists() and not old.exists()

def test_incomplete_pictures_are_mapped_and_not_kept(mapping, pictures, tmp_path):
    damaged, content = pictures/'a'/'00007.bmp', (pictures/'a'/'00007.bmp').read_bytes()
    damaged.write_bytes(b'no picture')
    with pytest.warns(UserWarning, match='1 of 110'): expected = read_folder(pictures)
    for _ in range(2):
        with pytest.warns(UserWarning, match='1 of 110'): data = load_cifar10(pictures)
        assert is_mapped(data) and cached(mapping) == [] and same(data, expected)
    damaged.write_bytes(content)
    assert len(load_cifar10(pictures).train_y) + len(load_cifar10(pictures).test_y) == 110

@pytest.mark.parametrize('where', ['decoded', 'train_x', 'test_x', 'train_y'])
def test_a_full_disk_is_said_and_the_images_are_in_memory_or_not_kept(mapping, pictures, monkeypatch, where):
    expected, n_files = read_folder(pictures), ['decoded', 'train_x', 'test_x', 'train_y'].index(where)
    def full(*args):
        nonlocal n_files
        n_files -= 1
        if n_files < 0: raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    if where == 'train_y': monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='No space'): data = load_cifar10(pictures)
    assert same(data, expected) and is_mapped(data) == (where == 'train_y') and cached(mapping) == []

def test_without_a_cache_the_images_are_in_memory(empty_home, pictures, monkeypatch):
    monkeypatch.setattr(threshold, 10_000)
    (empty_home/'data').write_text('a file where the folder should be')
    with pytest.warns(UserWarning, match='cache'): data = load_cifar10(pictures)
    assert same(data, read_folder(pictures)) and not is_mapped(data)

# ---- batches

aug = CropFlipCutout(cutout=8, flip='alternate')

def epochs(dls, n=3): return [[(x.clone(), y.clone()) for x, y in dl] for _ in range(n) for dl in dls]

def equal(a, b):
    return all(torch.equal(x, x1) and torch.equal(y, y1) and type(x) is type(x1) for one, other in zip(a, b, strict=True)
               for (x, y), (x1, y1) in zip(one, other, strict=True))

@pytest.fixture
def both(mapping, pictures): return read_folder(pictures), load_cifar10(pictures)

@pytest.mark.parametrize('options', [dict(), dict(flip='random'), dict(cutout=0), dict(pad_mode='constant'), dict(size=24, pad=0)], ids=str)
@pytest.mark.parametrize('valid', ['test', 'holdout'])
def test_batches_are_those_from_memory(both, valid, options):
    chosen = CropFlipCutout(**dict(cutout=8, flip='alternate') | options)
    in_memory, mapped = (cifar_dls(data, bs=16, valid=valid, seed=1, aug=chosen) for data in both)
    assert equal(epochs(in_memory), epochs(mapped))
    assert mapped.train.resident.is_mapped and mapped.valid.resident.is_mapped

@pytest.mark.parametrize('valid', ['test', 'holdout'])
def test_items_are_those_from_memory(both, valid):
    in_memory, mapped = (cifar_dls(data, bs=16, valid=valid, seed=1, aug=aug, pipeline='item', num_workers=0) for data in both)
    assert equal(epochs(in_memory, 1), epochs(mapped, 1))
    assert {type(x) for x, *_ in mapped.train_ds.items} == {np.ndarray}

@pytest.mark.parametrize('parts', [2, 3])
def test_shares_of_a_batch_are_those_from_memory(both, parts):
    in_memory, mapped = (cifar_dls(data, bs=16, seed=1, aug=aug) for data in both)
    for part in range(parts):
        for dl in (*in_memory, *mapped): dl.share = part, parts
        assert equal(epochs(in_memory, 1), epochs(mapped, 1))

def test_an_epoch_is_resumed_in_the_middle_as_from_memory(both):
    in_memory, mapped = (cifar_dls(data, bs=16, seed=1, aug=aug) for data in both)
    for dls in in_memory, mapped: dls.train.start, dls.train.epoch = 2, 5
    assert equal(epochs(in_memory, 2), epochs(mapped, 2))

@pytest.mark.parametrize('changes', [dict(shuffle=False), dict(drop_last=True), dict(bs=1000), dict(shuffle=True, bs=7)], ids=str)
def test_other_loaders_of_the_same_images_are_those_from_memory(both, changes):
    new = [[dl.new(**changes) for dl in cifar_dls(data, bs=16, seed=1, aug=aug)] for data in both]
    assert equal(*map(epochs, new))

def test_a_batch_of_one_image_many_times_is_shown(both):
    cifar_dls(both[1], bs=16, seed=1, aug=aug).train.show_batch(max_n=4, unique=True)

def test_pages_are_read_in_the_order_of_the_file():
    read = []
    class Noted(MappedImages):
        def __getitem__(self, idxs):
            read.append(idxs)
            return super().__getitem__(idxs)
    images = np.random.default_rng(0).integers(256, size=(50, 8, 8, 3), dtype=np.uint8)
    idxs = np.array([40, 2, 31, 2, 0])
    resident, packed = Resident(Noted(images, np.arange(50)), np.zeros(50, np.int64)), Resident(images, np.zeros(50, np.int64))
    pixels, places = resident.of_batch(idxs, torch.from_numpy(idxs))
    assert read[0].tolist() == sorted(idxs) and torch.equal(pixels[places], packed.pixels[idxs])

def test_batches_are_made_on_the_device_that_is_asked_for(both):
    resident = Resident(both[1].train_x, both[1].train_y).to(torch.device('meta'))
    pixels, places = resident.of_batch(np.arange(4), torch.arange(4))
    assert {pixels.device.type, places.device.type, resident.labels.device.type} == {'meta'} and is_mapped(both[1])

@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_from_memory(both):
    in_memory, mapped = (cifar_dls(data, bs=16, seed=1, aug=aug, device='cuda') for data in both)
    batches = epochs(mapped)
    assert equal(epochs(in_memory), batches) and batches[0][0][0].device.type == 'cuda'

# ---- runs

def test_a_run_its_interpretation_and_its_report_are_those_from_memory(empty_home, pictures, tmp_path, monkeypatch):
    def run(name):
        train(TrainSettings(str(pictures), epochs=2, width=8, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', valid='holdout', out=name))
        interp = CifarInterpretation.from_run(name)
        assert '<html' in write_report(name).read_text()
        return read_json(f'{name}/summary.json')['weights_sha256'], read_json(f'{name}/config.json')['data'], interp
    *in_memory, interp = run('a')
    monkeypatch.setattr(threshold, 10_000)
    for file in (empty_home/'data'/'cifar_fastai').glob('*.npz'): file.unlink()
    *mapped, interp1 = run('b')
    assert interp1.learn.dls.train.resident.is_mapped and mapped == in_memory
    assert torch.equal(interp.probs, interp1.probs) and np.array_equal(interp.image(3), interp1.image(3))
    assert len(interp1.plot_misclassified(4).axes) and interp1[[0, 2]][0][0].shape == (2, 3, 32, 32)

# ---- memory

uses_them_all = '''
import resource, sys
from fastai.vision.all import *
from cifar_fastai.all import *
from cifar_fastai.data import folder
from cifar_fastai.data.folder import n_duplicates

folder.max_bytes_in_memory, defaults.cpus = int(sys.argv[3]), 2

def use(source):
    data = load_cifar10(source, size=128)
    data.stats, data.fingerprint, data.origin, n_duplicates(data)
    for valid in 'test', 'holdout':
        dls = cifar_dls(data, bs=16, valid=valid, recipe='baseline', seed=0, device='cpu')
        net = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        learn = cifar_learner(dls, net, precision='fp32', recipe='baseline').remove_cbs(ProgressCallback)
        with learn.no_logging(): learn.fit(1, 1e-3)
        CifarInterpretation.from_learner(learn).plot_misclassified(4)
    cifar_dls(data, bs=16, pipeline='item', valid='holdout', recipe='baseline', num_workers=0).one_batch()
    return len(data.train_y)

def data_bytes(): return next(1024*int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmData'))

use(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 100*10**6,)*2) # without the pages of files
print(use(sys.argv[2]))
'''

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the limit holds on Linux only')
def test_more_images_take_no_more_memory(tmp_path):
    "300 MB of images with 100 MB to spare; from memory they do not fit, which shows that the limit holds"
    for k, n in enumerate((40, 6200)):
        for i, name in enumerate('ab'): save_noise(tmp_path/f'{n}'/name, n//2, 12, seed=10*k + i)
    def use(threshold):
        malloc = dict(MALLOC_ARENA_MAX='1', MALLOC_MMAP_THRESHOLD_='1000000') # what is freed is returned, with any number of cores
        env = os.environ | malloc | dict(OMP_NUM_THREADS='1', FASTAI_HOME=str(tmp_path/f'home{threshold}'))
        return subprocess.run([sys.executable, '-W', 'ignore', '-c', uses_them_all, tmp_path/'40', tmp_path/'6200', str(threshold)], env=env, capture_output=True, text=True)
    done = use(1000)
    assert done.returncode == 0 and done.stdout.split()[-1] == '4960', done.stderr[-3000:]
    done = use(10**9)
    assert done.returncode != 0 and 'llocate' in done.stderr, done.stderr[-3000:]
