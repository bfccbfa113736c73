"""Data sets by name, from small copies in their formats."""
import hashlib, io, pickle

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

from conftest import Python2Pickler
from cifar_fastai.cli import cifar_train
from cifar_fastai.core import TrainSettings, named_sets
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.data.named import find_named, read_named
from cifar_fastai.data.source import load_cifar10

rng = np.random.default_rng(0)
images = {'train': rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), 'test': rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)}

def as_python2(content): # as the original files are
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')

def write_cifar100(root, monkeypatch, changes={}):
    folder = root/'cifar-100-python'
    folder.mkdir(parents=True)
    for split, x in images.items():
        content = {b'filenames': [b'%d.png' % i for i in range(len(x))], b'batch_label': b'1', b'fine_labels': [i%100 for i in range(len(x))],
                   b'coarse_labels': [i%20 for i in range(len(x))], b'data': x.transpose(0, 3, 1, 2).reshape(-1, 3072)} | changes
        (folder/split).write_bytes(as_python2(content))
    names = {b'fine_label_names': [b'fine %02d' % i for i in range(100)], b'coarse_label_names': [b'coarse %02d' % i for i in range(20)]}
    (folder/'meta').write_bytes(as_python2(names))
    def known(name): return [name, hashlib.md5((folder/name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.CIFAR100, 'train_list', [known('train')])
    monkeypatch.setattr(datasets.CIFAR100, 'test_list', [known('test')])
    monkeypatch.setattr(datasets.CIFAR100, 'meta', dict(filename='meta', key='fine_label_names', md5=known('meta')[1]))
    return folder

def write_mnist(root, name='MNIST'):
    raw = root/name/'raw'
    raw.mkdir(parents=True)
    for part, x in zip(('train', 't10k'), images.values()):
        grey = np.ascontiguousarray(x[:, :28, :28, 0])
        (raw/f'{part}-images-idx3-ubyte').write_bytes(b''.join(n.to_bytes(4, 'big') for n in (2051, *grey.shape)) + grey.tobytes())
        labels = np.arange(len(x), dtype=np.uint8)%10
        (raw/f'{part}-labels-idx1-ubyte').write_bytes((2049).to_bytes(4, 'big') + len(x).to_bytes(4, 'big') + labels.tobytes())
    return raw

def write_svhn(root, monkeypatch):
    folder, known = root/'SVHN', {}
    folder.mkdir(parents=True)
    for split, x in images.items():
        file = folder/f'{split}_32x32.mat'
        scipy.io.savemat(file, dict(X=x.transpose(1, 2, 3, 0), y=(np.arange(len(x))%10 + 1)[:, None].astype(np.uint8))) # 10 is zero
        known[split] = ['nowhere', file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, 'split_list', known)
    return folder

# ---- what is read

@pytest.mark.parametrize('name, n, kind', [('cifar100', 100, 'fine'), ('cifar100_coarse', 20, 'coarse')])
def test_cifar100_has_both_kinds_of_labels(name, n, kind, tmp_path, monkeypatch):
    write_cifar100(tmp_path, monkeypatch)
    data = read_named(name, tmp_path)
    assert data.vocab == [f'{kind} {i:02}' for i in range(n)] and data.train_x.shape == (200, 32, 32, 3) and data.train_y.dtype == np.int64
    expected = {(img.tobytes(), i%n) for i, img in enumerate(images['train'])}
    assert {(img.tobytes(), label) for img, label in zip(data.train_x, data.train_y)} == expected

@pytest.mark.parametrize('name, folder, vocab', [('mnist', 'MNIST', '0123456789'), ('fashion_mnist', 'FashionMNIST', None)])
def test_images_of_28_pixels_are_enlarged_as_any_picture_is(name, folder, vocab, tmp_path):
    from cifar_fastai.data.picture import NetworkImage
    write_mnist(tmp_path, folder)
    data = read_named(name, tmp_path)
    expected = {(np.asarray(NetworkImage.create(np.ascontiguousarray(img[:28, :28, 0]))).tobytes(), i%10) for i, img in enumerate(images['test'])}
    assert {(img.tobytes(), label) for img, label in zip(data.test_x, data.test_y)} == expected
    assert data.vocab == (list(vocab) if vocab else list(datasets.FashionMNIST.classes)) and (data.test_x[..., 0] == data.test_x[..., 2]).all()

def test_the_tens_of_svhn_are_zeros(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    data = read_named('svhn', tmp_path)
    expected = {(img.tobytes(), (i%10 + 1)%10) for i, img in enumerate(images['train'])}
    assert {(img.tobytes(), label) for img, label in zip(data.train_x, data.train_y)} == expected and data.vocab == list('0123456789')

# ---- refusals

@pytest.mark.parametrize('name', named_sets)
def test_what_is_not_there_is_one_sentence_that_names_it(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"data is '{name}'") as e: find_named(name, tmp_path, download=False)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)

def test_a_pickle_of_another_checksum_is_not_read(tmp_path, monkeypatch):
    folder = write_cifar100(tmp_path, monkeypatch)
    import os
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'broken_in'),)
    (folder/'train').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FileNotFoundError, match='cifar100'): read_named('cifar100', tmp_path)
    assert not (tmp_path/'broken_in').exists()

@pytest.mark.parametrize('changes', [{b'fine_labels': [100]*200}, {b'fine_labels': 'x'}, {b'data': np.zeros((3, 3072), np.uint8)}])
def test_labels_and_images_that_do_not_fit_are_refused(changes, tmp_path, monkeypatch):
    from cifar_fastai.data.archive import read_batch
    folder = write_cifar100(tmp_path, monkeypatch, changes)
    with pytest.raises(ValueError, match='train is not a file of CIFAR-100'): read_batch(folder/'train', b'fine_labels', 100)

# ---- as a source like the others

def test_a_name_is_a_source_with_a_cache_and_its_own_flips(empty_home, tmp_path, monkeypatch):
    root = empty_home/'data'
    write_mnist(root); write_cifar100(root, monkeypatch)
    first = load_cifar10('mnist')
    def refuse(*args): raise AssertionError('it was decoded again')
    monkeypatch.setattr('cifar_fastai.data.source.read_named', refuse)
    assert load_cifar10('mnist').fingerprint == first.fingerprint
    monkeypatch.undo(); monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='size is 64'): load_cifar10('mnist', size=64)
    dls = cifar_dls('mnist', num_workers=0)
    assert dls.bs == 8 and dls.c == 10 and next(t for t in dls.train.after_item.fs if hasattr(t, 'aug')).aug.flip == 'none'

def test_both_labels_of_cifar100_have_caches_of_their_own(empty_home, monkeypatch):
    write_cifar100(empty_home/'data', monkeypatch)
    assert len(load_cifar10('cifar100').vocab) == 100 and len(load_cifar10('cifar100_coarse').vocab) == 20 and len(load_cifar10('cifar100').vocab) == 100

def test_the_command_trains_on_a_named_set(empty_home, tmp_path, monkeypatch, capsys):
    write_cifar100(empty_home/'data', monkeypatch)
    cifar_train('--data cifar100 --epochs 1 --bs 64 --width 8 --lr_min 1e-3 --lr_max 1e-2 --precision fp32 --num_workers 0 --out run'.split())
    assert '100 classes' in capsys.readouterr().out and (tmp_path/'run'/'report.html').exists()
