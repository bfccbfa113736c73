"""Data sets by name, from small copies in their formats."""
import hashlib, io, os, pickle, shutil, tarfile

import numpy as np
import pytest
import scipy.io
from fastai.data.external import URLs
from PIL import Image
from torchvision import datasets

from conftest import Python2Pickler
from cifar_fastai.cli import cifar_train
from cifar_fastai.core import TrainSettings, named_sets
from cifar_fastai.data.block import cifar_dls
from cifar_fastai.data.named import find_named, read_cifar100, read_named
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

def write_fastai(root): # the same images as in the pickles, as fastai's archive has them
    for split, x in images.items():
        for i, pixels in enumerate(x):
            folder = root/'cifar100'/split/f'coarse {i%20:02}'/f'fine {i%100:02}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder/f'{i:05}.png')
    return root/'cifar100'

def packed(folder, file, edit=lambda info: info):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, 'w:gz') as tar: tar.add(folder, folder.name, filter=edit)
    return file

def same(a, b): return a.vocab == b.vocab and all((x == y).all() and x.dtype == y.dtype for x, y in zip(a[:4], b[:4]))

@pytest.fixture(scope='module')
def pngs(tmp_path_factory): return write_fastai(tmp_path_factory.mktemp('fastai'))

@pytest.fixture(scope='module')
def png_archive(pngs, tmp_path_factory): return packed(pngs, tmp_path_factory.mktemp('archive')/'cifar100.tgz')

@pytest.fixture
def own_pngs(pngs, tmp_path): return shutil.copytree(pngs, tmp_path/'own'/'cifar100') # to be changed

@pytest.fixture
def from_pickles(tmp_path_factory, monkeypatch):
    "The images as they are read from the pickles, which are nowhere where they could be found"
    root = tmp_path_factory.mktemp('pickles')
    write_cifar100(root, monkeypatch)
    return {name: read_named(name, root) for name in ('cifar100', 'cifar100_coarse')}

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

# ---- fastai's copy of CIFAR-100

both_labels = pytest.mark.parametrize('name', ['cifar100', 'cifar100_coarse'])

@both_labels
def test_the_folder_and_the_archive_of_fastai_are_read_as_the_pickles_are(name, empty_home, pngs, png_archive, from_pickles):
    shutil.copytree(pngs, empty_home/'data'/'cifar100')
    assert find_named(name, download=False) == empty_home/'data'/'cifar100'
    assert same(read_named(name), from_pickles[name]) and read_named(name).fingerprint == from_pickles[name].fingerprint
    shutil.rmtree(empty_home/'data'/'cifar100')
    (empty_home/'archive').mkdir()
    shutil.copy(png_archive, empty_home/'archive')
    assert find_named(name, download=False) == empty_home/'archive'/'cifar100.tgz'
    assert same(read_named(name), from_pickles[name]) and read_named(name).fingerprint == from_pickles[name].fingerprint

def test_the_files_of_torchvision_come_first_then_the_folder_then_the_archive(tmp_path, pngs, png_archive, monkeypatch):
    shutil.copy(png_archive, tmp_path)
    assert find_named('cifar100', tmp_path) == tmp_path/'cifar100.tgz'
    shutil.copytree(pngs, tmp_path/'cifar100')
    assert find_named('cifar100', tmp_path) == tmp_path/'cifar100'
    pickles = write_cifar100(tmp_path, monkeypatch)
    assert find_named('cifar100', tmp_path) == pickles
    (pickles/'test').write_bytes(b'damaged')
    assert find_named('cifar100', tmp_path) == tmp_path/'cifar100'
    with pytest.raises(FileNotFoundError, match='mnist'): find_named('mnist', tmp_path, download=False)

def test_a_folder_of_that_name_with_other_files_is_not_that_of_fastai(tmp_path, png_archive, monkeypatch):
    write_cifar100(tmp_path/'cifar100', monkeypatch) # as with root='cifar100' for torchvision
    with pytest.raises(FileNotFoundError, match="data is 'cifar100'"): find_named('cifar100', tmp_path, download=False)
    shutil.copy(png_archive, tmp_path)
    assert find_named('cifar100', tmp_path, download=False) == tmp_path/'cifar100.tgz'

@pytest.fixture
def addresses(server, png_archive, monkeypatch):
    "Both addresses are on this machine; torchvision's has nothing"
    server.answers['/cifar100.tgz'] = [png_archive.read_bytes()]
    monkeypatch.setattr(URLs, 'CIFAR_100', server.url('/cifar100.tgz'))
    monkeypatch.setattr(datasets.CIFAR100, 'url', server.url('/cifar-100-python.tar.gz'))
    return server

def test_what_is_not_there_is_downloaded_from_torchvision_and_then_from_fastai(addresses, empty_home, from_pickles):
    assert same(load_cifar10('cifar100_coarse'), from_pickles['cifar100_coarse'])
    assert addresses.asked == ['/cifar-100-python.tar.gz', '/cifar100.tgz']
    assert [file.name for file in (empty_home/'archive').iterdir()] == ['cifar100.tgz']
    assert same(load_cifar10('cifar100'), from_pickles['cifar100']) and len(addresses.asked) == 2

def test_nothing_is_downloaded_unless_it_may_be(addresses, empty_home, tmp_path):
    with pytest.raises(FileNotFoundError, match='cifar100'): load_cifar10('cifar100', urls=())
    with pytest.raises(FileNotFoundError, match='cifar100'): read_named('cifar100', tmp_path)
    assert addresses.asked == []

def test_a_download_that_fails_names_both_addresses_and_leaves_nothing(addresses, tmp_path, png_archive):
    addresses.answers['/cifar100.tgz'] = [(png_archive.read_bytes(), 'cut')]
    with pytest.raises(FileNotFoundError, match="data is 'cifar100'") as e: find_named('cifar100', tmp_path)
    assert '\n' not in str(e.value) and '/cifar100.tgz' in str(e.value) and '404' in str(e.value)
    assert [file for file in tmp_path.rglob('*') if file.is_file()] == []

def refused(path, match, labels='fine'):
    with pytest.raises(ValueError, match=match) as e: read_cifar100(path, labels)
    assert '\n' not in str(e.value) and str(path) in str(e.value)

@pytest.mark.parametrize('labels', ['fine', 'coarse'])
def test_images_and_folders_that_do_not_fit_are_refused(labels, own_pngs):
    group = own_pngs/'train'/'coarse 03'
    image = group/'fine 23'/'00023.png'
    content = image.read_bytes()
    for damaged in content[:100], b'some text', b'': # a PNG that ends early, or none
        image.write_bytes(damaged)
        refused(own_pngs, r'train/coarse 03/fine 23/00023\.png', labels)
    Image.new('L', (32, 32)).save(image)
    refused(own_pngs, r'00023\.png.*32×32 L', labels)
    image.write_bytes(content)
    shutil.copytree(group/'fine 23', own_pngs/'test'/'coarse 04'/'fine 23') # a class belongs to one group
    refused(own_pngs, 'fine 23.*coarse 03.*coarse 04', labels)
    shutil.rmtree(own_pngs/'test'/'coarse 04'/'fine 23')
    shutil.rmtree(own_pngs/'test'/'coarse 03'/'fine 23')
    refused(own_pngs, 'test.*fine 23', labels)
    shutil.rmtree(group/'fine 23')
    refused(own_pngs, '99.*100', labels)
    shutil.rmtree(own_pngs/'test')
    refused(own_pngs, 'test', labels)

def test_more_groups_or_files_than_cifar100_has_are_refused(own_pngs, monkeypatch):
    for split in images: shutil.copytree(own_pngs/split/'coarse 03'/'fine 23', own_pngs/split/'coarse 20'/'fine 100')
    refused(own_pngs, '101.*21.*100.*20')
    monkeypatch.setattr('cifar_fastai.data.archive.max_files', 100)
    refused(own_pngs, '100 files')

def test_links_and_duplicates_in_the_archive_are_refused(pngs, tmp_path):
    name = 'cifar100/train/coarse 03/fine 23/00023.png'
    def link(info):
        if info.name == name: info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, '/etc/passwd'
        return info
    refused(packed(pngs, tmp_path/'linked.tgz', link), '00023.*link')
    def twice(info):
        if info.name.endswith('/00123.png'): info.name = name
        return info
    refused(packed(pngs, tmp_path/'twice.tgz', twice), '00023.*twice')
    cut = packed(pngs, tmp_path/'cut.tgz')
    cut.write_bytes(cut.read_bytes()[:-10_000])
    refused(cut, 'tar')

def test_hidden_files_and_names_that_are_no_words_are_passed_over(own_pngs, from_pickles):
    file = own_pngs/'train'/'coarse 03'/'fine 23'/'00023.png'
    for name in '._00023.png', '00023.txt': (file.parent/name).write_bytes(b'of macOS')
    for name in '.hidden', '<b>', 'a\nb':
        (file.parents[1]/name).mkdir()
        shutil.copy(file, file.parents[1]/name)
    file.rename(file.with_suffix('.PNG'))
    assert same(read_cifar100(own_pngs), from_pickles['cifar100'])

# ---- an archive of CIFAR-100 by its path

@pytest.mark.parametrize('archive_name', ['cifar100.tgz', 'renamed.tar.gz'])
def test_the_path_of_an_archive_gives_the_hundred_classes(archive_name, png_archive, tmp_path, empty_home, from_pickles):
    path = shutil.copy(png_archive, tmp_path/archive_name)
    assert same(load_cifar10(path), from_pickles['cifar100']) and cifar_dls(path, num_workers=0).c == 100
    with pytest.raises(ValueError, match='size is 64'): load_cifar10(path, size=64)

def test_so_does_an_archive_of_the_pickles(tmp_path, empty_home, from_pickles, monkeypatch):
    path = packed(write_cifar100(tmp_path, monkeypatch), tmp_path/'cifar-100-python.tar.gz')
    assert same(load_cifar10(path), from_pickles['cifar100'])
    assert same(read_cifar100(path, 'coarse'), from_pickles['cifar100_coarse'])

@pytest.mark.parametrize('given', ['pngs', 'above the pngs', 'pickles', 'renamed pickles', 'above the pickles'])
def test_so_does_a_folder_of_either(pngs, given, tmp_path, empty_home, from_pickles, monkeypatch):
    path = pngs if 'pngs' in given else write_cifar100(tmp_path/'own', monkeypatch)
    if given.startswith('above'): path = path.parent
    if given.startswith('renamed'): path = path.rename(tmp_path/'own'/'mine')
    assert same(load_cifar10(path), from_pickles['cifar100']) and cifar_dls(path, num_workers=0).c == 100
    with pytest.raises(ValueError, match='size is 64'): load_cifar10(path, size=64)

def test_groups_of_other_numbers_are_pictures_of_ones_own(own_pngs, empty_home):
    for split in images: shutil.rmtree(own_pngs/split/'coarse 03'/'fine 23')
    assert load_cifar10(own_pngs).vocab == [f'coarse {i:02}' for i in range(20)]

def test_an_archive_of_other_pickles_is_refused(tmp_path, monkeypatch):
    folder = write_cifar100(tmp_path, monkeypatch)
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'broken_in'),)
    most = [b'fine %02d' % i for i in range(99)]
    for names in most, {}, [*most, b'<script>'], [*most, b'\xff'], [*most, 'text'], [*most, most[0]]:
        (folder/'meta').write_bytes(as_python2({b'fine_label_names': names}))
        refused(packed(folder, tmp_path/'a.tgz'), 'meta.*CIFAR-100')
    (folder/'train').write_bytes(pickle.dumps(Evil()))
    refused(packed(folder, tmp_path/'a.tgz'), 'train.*mkdir')
    assert not (tmp_path/'broken_in').exists()
    (folder/'meta').unlink()
    refused(packed(folder, tmp_path/'a.tgz'), 'meta')

def test_an_archive_of_neither_is_refused_as_before(tmp_path, empty_home):
    (tmp_path/'text').mkdir()
    (tmp_path/'text'/'a.txt').write_text('text')
    with pytest.raises(ValueError, match=r'a\.tgz.*train.*CIFAR-10\b'): load_cifar10(packed(tmp_path/'text', tmp_path/'a.tgz'))

# ---- as a source like the others

def test_a_name_is_a_source_with_a_cache_and_its_own_flips(empty_home, tmp_path, monkeypatch):
    root = empty_home/'data'
    write_mnist(root); write_cifar100(root, monkeypatch)
    first = load_cifar10('mnist')
    def refuse(*args): raise AssertionError('it was decoded again')
    monkeypatch.setattr('cifar_fastai.data.source.read_named', refuse)
    assert load_cifar10('mnist').fingerprint == first.fingerprint
    with monkeypatch.context() as m, pytest.raises(AssertionError, match='again'): # in another way
        m.setattr('cifar_fastai.data.source.decoder_version', 99)
        load_cifar10('mnist')
    monkeypatch.undo(); monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='size is 64'): load_cifar10('mnist', size=64)
    dls = cifar_dls('mnist', num_workers=0)
    assert dls.bs == 8 and dls.c == 10 and next(t for t in dls.train.after_item.fs if hasattr(t, 'aug')).aug.flip == 'none'

def test_both_labels_of_cifar100_have_caches_of_their_own(empty_home, monkeypatch):
    write_cifar100(empty_home/'data', monkeypatch)
    assert len(load_cifar10('cifar100').vocab) == 100 and len(load_cifar10('cifar100_coarse').vocab) == 20 and len(load_cifar10('cifar100').vocab) == 100

def test_each_source_of_cifar100_and_each_kind_of_label_has_a_cache_of_its_own(empty_home, png_archive, pngs, monkeypatch):
    caches, n = empty_home/'data'/'cifar_fastai', 0
    def load_both(): # from the source that is found first
        for name, n_classes in ('cifar100', 100), ('cifar100_coarse', 20):
            assert len(load_cifar10(name).vocab) == n_classes
            assert len(load_cifar10(name).vocab) == n_classes # from the cache
        return len(list(caches.glob('*.npz')))
    packed(pngs, empty_home/'archive'/'cifar100.tgz')
    assert load_both() == 2
    shutil.copytree(pngs, empty_home/'data'/'cifar100')
    assert load_both() == 4
    write_cifar100(empty_home/'data', monkeypatch)
    assert load_both() == 6
    def refuse(*args): raise AssertionError('it was decoded again')
    monkeypatch.setattr('cifar_fastai.data.source.read_named', refuse)
    assert load_both() == 6

def test_the_command_trains_on_a_named_set(empty_home, tmp_path, monkeypatch, capsys):
    write_cifar100(empty_home/'data', monkeypatch)
    cifar_train('--data cifar100 --epochs 1 --bs 64 --width 8 --lr_min 1e-3 --lr_max 1e-2 --precision fp32 --num_workers 0 --out run'.split())
    assert '100 classes' in capsys.readouterr().out and (tmp_path/'run'/'report.html').exists()
