"""CIFAR-10 found, fetched, read, refused, cached, and made into `DataLoaders`."""
import gzip, hashlib, io, json, multiprocessing, os, pickle, platform, random, re, shutil, signal, subprocess, sys, tarfile, time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import PILImage, TensorCategory, TensorImage, Transform
from filelock import FileLock
from PIL import Image

import forked
from cifar_fastai.data.augment import CropFlipCutout, ItemAugment
from cifar_fastai.cli import cifar_train
from cifar_fastai.core import cifar10_classes, cifar10_stats, data_variable
from cifar_fastai.data.images import CIFAR10Data, cifar10_fingerprint, first_of_each_class, load_digits
from cifar_fastai.data.picture import read_image
from cifar_fastai.data.archive import read_images
from cifar_fastai.data.source import fetch_cifar10, find_cifar10, load_cifar10
from cifar_fastai.data.loader import explain_lost_worker
from cifar_fastai.data.block import cifar_block, cifar_dls


def same(a, b): return all(np.array_equal(x, y) for x, y in zip(a, b))

def digest(x, y): return hashlib.sha256(bytes([y]) + x.tobytes()).hexdigest()

def fingerprint(x, y): return hashlib.sha256('\n'.join(sorted(map(digest, x, y))).encode()).hexdigest()

def by_digest(x, y):
    order = sorted(range(len(y)), key=lambda i: digest(x[i], y[i]))
    return x[order], y[order]

@pytest.fixture(scope='module')
def canonical(small):
    "The small images as they must come out, in the order of their digests"
    return CIFAR10Data(*by_digest(small.train_x, small.train_y), *by_digest(small.test_x, small.test_y), small.vocab)

@pytest.fixture
def batches(small, write_batches, tmp_path): return write_batches(small, tmp_path/'cifar-10-batches-py')

# ---- both layouts

@pytest.mark.parametrize('layout', ['folder', 'batches'])
@pytest.mark.parametrize('container', ['folder', '.tgz', '.tar', 'reversed.tar.gz'])
def test_every_layout_and_container_gives_the_same_arrays(layout, container, canonical, pack, tmp_path, request):
    source = request.getfixturevalue(layout)
    if container != 'folder': source = pack(source, tmp_path/f'a{container}', reverse='reversed' in container)
    data = read_images(source)
    assert same(data, canonical)
    assert data.train_x.dtype == np.uint8 and data.train_x.shape == (80, 32, 32, 3)
    assert data.train_y.dtype == data.test_y.dtype == np.int64 and data.test_y.shape == (40,)
    assert data.vocab == list(cifar10_classes)

def test_the_batches_written_here_are_those_of_python_2(batches):
    raw = (batches/'data_batch_1').read_bytes()
    assert raw.startswith(b'\x80\x02') and b'cnumpy.core.multiarray\n_reconstruct' in raw
    assert set(pickle.loads(raw, encoding='bytes')) == {b'batch_label', b'labels', b'data'}

def test_the_fingerprint_is_that_of_the_description(small, canonical):
    expected = fingerprint(small.train_x, small.train_y), fingerprint(small.test_x, small.test_y)
    assert small.fingerprint == canonical.fingerprint == expected

def test_one_pixel_or_one_label_changes_the_fingerprint(small):
    x, y = small.test_x.copy(), small.test_y.copy()
    x[3, 4, 5, 0] += 1; y[3] += 1
    prints = {small.fingerprint, small._replace(test_x=x).fingerprint, small._replace(test_y=y).fingerprint}
    assert len({test for _, test in prints}) == 3 and len({train for train, _ in prints}) == 1

def test_stats_are_those_of_numpy_in_double_precision(small):
    pixels = small.train_x.reshape(-1, 3)/255
    assert np.allclose(small.stats, [pixels.mean(axis=0), pixels.std(axis=0)], rtol=0, atol=1e-12)

def test_other_counts_pass_and_are_said_to_be_others(small):
    assert all(print_[:8] in small.origin for print_ in small.fingerprint)

def test_hidden_files_beside_the_images_are_passed_over(folder, canonical): # macOS puts them into archives
    (folder/'train'/'cat'/'._0001.png').write_bytes(b'\0\5\x16\7')
    (folder/'labels.txt').write_text('\n'.join(cifar10_classes))
    assert same(read_images(folder), canonical)

def test_a_folder_can_be_given_as_here_and_above(folder, canonical, monkeypatch):
    monkeypatch.chdir(folder)
    assert same(read_images('.'), canonical)
    monkeypatch.chdir(folder/'train')
    assert same(read_images('..'), canonical)

# ---- refusals

def named_classes(e): return [name for name in cifar10_classes if re.search(rf'\b{name}\b', str(e.value))]

def test_a_missing_class_is_refused_by_name(folder):
    for file in (folder/'test'/'dog').iterdir(): file.unlink()
    with pytest.raises(ValueError, match=r'cifar10\b.*\btest\b') as e: read_images(folder)
    assert named_classes(e) == ['dog']

def test_a_class_missing_in_the_batches_is_refused_by_name(small, write_batches, tmp_path):
    keep = ~np.isin(small.train_y, [3, 9])
    folder = write_batches(small._replace(train_x=small.train_x[keep], train_y=small.train_y[keep]), tmp_path/'b')
    with pytest.raises(ValueError, match=r'\btrain\b') as e: read_images(folder)
    assert named_classes(e) == ['cat', 'truck']

@pytest.mark.parametrize('split', ['train', 'test'])
def test_an_empty_split_is_refused(folder, split):
    (folder/split).rename(folder/'elsewhere')
    with pytest.raises(ValueError, match=rf'cifar10\b.*\b{split}\b'): read_images(folder)

def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path/'a.txt').write_text('hello')
    with pytest.raises(ValueError, match=rf'{re.escape(str(tmp_path))}.*\btrain\b'): read_images(tmp_path)

def png(size=(32, 32), mode='RGB', kind='PNG'):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()

@pytest.mark.parametrize('content, kind', [
    (png((31, 32)), '31×32 RGB.*32×32 RGB'), (png((64, 64)), '64×64 RGB.*32×32 RGB'), (png(mode='L'), r'32×32 L\b.*32×32 RGB'),
    (png(mode='RGBA'), r'32×32 RGBA\b.*32×32 RGB\b'), (png(mode='P'), r'32×32 P\b.*32×32 RGB'), (b'no picture at all', 'PNG'), (b'', 'PNG'),
    (np.random.default_rng(0).bytes(3000), 'PNG'), (png()[:-40], '')])
def test_a_file_that_is_no_32_by_32_rgb_image_is_refused_by_name(folder, content, kind):
    (folder/'train'/'frog'/'bad.png').write_bytes(content)
    with pytest.raises(ValueError, match=rf'train/frog/bad\.png\b.*{kind}'): read_images(folder)

def test_an_image_of_an_unknown_class_is_refused(folder):
    (folder/'train'/'frog').rename(folder/'train'/'toad')
    with pytest.raises(ValueError, match=r'train/toad/.*\.png\b.*\bfrog\b'): read_images(folder)

def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path/'cifar10.tgz').write_text('<html>not found</html>')
    with pytest.raises(ValueError, match=r'cifar10\.tgz\b.*\btar\b'): read_images(tmp_path/'cifar10.tgz')

@pytest.mark.parametrize('suffix', ['.tgz', '.tar'])
def test_an_archive_cut_short_is_refused_wherever_it_is_cut(small_archive, tmp_path, suffix):
    whole, cut = small_archive.read_bytes(), tmp_path/f'cut{suffix}'
    if suffix == '.tar': whole = gzip.decompress(whole)
    for n in np.linspace(1, len(whole)*.95, 120).astype(int):
        cut.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf'cut\{suffix}\b'): read_images(cut)

@pytest.mark.parametrize('where', [0, 100, 512, 600])
@pytest.mark.parametrize('suffix', ['.tgz', '.tar'])
def test_an_archive_cut_short_in_its_last_files_is_refused(small_archive, tmp_path, suffix, where):
    "Each split has all its classes then: only the missing end tells"
    tar, cut = gzip.decompress(small_archive.read_bytes()), tmp_path/f'cut{suffix}'
    with tarfile.open(small_archive) as members: last = members.getmembers()[-1].offset
    if suffix == '.tar': cut.write_bytes(tar[:last + where])
    else: # what zlib has written when it is through the last header, and no more
        squeeze = gzip.zlib.compressobj(wbits=31)
        cut.write_bytes(squeeze.compress(tar[:last + where]) + squeeze.flush(gzip.zlib.Z_SYNC_FLUSH))
    with pytest.raises(ValueError, match=rf'cut\{suffix}\b.*\btar\b'): read_images(cut)

class Hostile:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call

@pytest.mark.parametrize('call', [(os.mkdir, ('broken_in',)), (eval, ("__import__('os').mkdir('broken_in')",)), (np.fromfile, ('/dev/null',))])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(batches, call, folder_of_its_own):
    (batches/'data_batch_3').write_bytes(pickle.dumps({b'data': Hostile(*call), b'labels': []}, protocol=2))
    with pytest.raises(ValueError, match=rf'data_batch_3\b.*\b{call[0].__name__}\b'): read_images(batches)
    assert not (folder_of_its_own/'broken_in').exists()

@pytest.mark.parametrize('batch', [
    {b'data': np.zeros((2, 3072), np.uint8)}, {b'data': np.zeros((2, 3072), np.uint8), b'labels': [1]}, {b'data': np.zeros((2, 3072), np.uint8), b'labels': [1, 10]},
    {b'data': np.zeros((2, 1024), np.uint8), b'labels': [1, 2]}, {b'data': np.zeros((2, 3072)), b'labels': [1, 2]}, [1, 2], 'text'])
def test_a_batch_of_something_else_is_refused_by_name(batches, batch):
    (batches/'test_batch').write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=r'test_batch\b'): read_images(batches)

def test_a_batch_cut_short_is_refused_by_name(batches):
    (batches/'data_batch_5').write_bytes((batches/'data_batch_5').read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r'data_batch_5\b'): read_images(batches)

# ---- cache

def cached(home): return list(home.rglob('*.npz'))

def replace_unseen(file, content):
    "Another content under the same size and time"
    stat = file.stat()
    assert len(content) <= stat.st_size
    file.write_bytes(content.ljust(stat.st_size, b'\0'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

@pytest.fixture
def archive(folder, pack, tmp_path): return pack(folder, tmp_path/'cifar10.tgz')

@pytest.mark.parametrize('kind', ['archive', 'folder'])
def test_the_second_load_decodes_nothing(empty_home, request, kind):
    source = request.getfixturevalue(kind)
    first = load_cifar10(source)
    for file in [source] if source.is_file() else source.rglob('*.png'): replace_unseen(file, b'no image')
    assert same(load_cifar10(source), first)
    assert type(load_cifar10(source).vocab) is list
    assert len(cached(empty_home)) == 1

damages = {'cut short': lambda file: file.write_bytes(file.read_bytes()[:-3000]), 'empty': lambda file: file.write_bytes(b''),
           'text': lambda file: file.write_bytes(b'text'), 'of other arrays': lambda file: np.savez(file, a=1),
           'of other shapes': lambda file: np.savez(file, **{**np.load(file), 'train_x': np.zeros((3, 8, 8), np.uint8)}),
           'of other types': lambda file: np.savez(file, **{**np.load(file), 'test_y': np.zeros(20, np.float32)}),
           'a pipe': lambda file: (file.unlink(), os.mkfifo(file)),
           'with other bytes': lambda file: file.write_bytes(file.read_bytes()[:5000] + b'\xff'*9 + file.read_bytes()[5009:])}

@pytest.mark.parametrize('damage', damages)
def test_a_damaged_cache_is_made_again(empty_home, archive, canonical, damage):
    load_cifar10(archive)
    [file] = cached(empty_home)
    damages[damage](file)
    assert same(load_cifar10(archive), canonical)
    replace_unseen(archive, b'') # from now on only the cache knows
    assert same(load_cifar10(archive), canonical)

def test_a_cache_that_pickles_is_not_read(empty_home, archive, canonical, folder_of_its_own):
    load_cifar10(archive)
    [file] = cached(empty_home)
    np.savez(file, train_x=np.array([Hostile(os.mkdir, ('broken_in',))], dtype=object), allow_pickle=True)
    assert same(load_cifar10(archive), canonical)
    assert not (folder_of_its_own/'broken_in').exists()

def test_a_changed_archive_is_read_again(empty_home, archive, folder, pack):
    before = load_cifar10(archive)
    Image.new('RGB', (32, 32)).save(next((folder/'test'/'cat').iterdir()))
    assert load_cifar10(pack(folder, archive)).fingerprint[1] != before.fingerprint[1]

def test_a_changed_folder_is_read_again(empty_home, folder):
    before = load_cifar10(folder)
    Image.new('RGB', (32, 32)).save(folder/'train'/'cat'/'new.png')
    assert len(load_cifar10(folder).train_y) == len(before.train_y) + 1

def test_a_change_that_keeps_the_size_is_seen_too(empty_home, folder):
    before, file = load_cifar10(folder), next((folder/'train'/'cat').iterdir())
    file.write_bytes(png().ljust(file.stat().st_size, b'\0'))
    assert load_cifar10(folder).fingerprint[0] != before.fingerprint[0]

def test_a_changed_source_has_one_cache_and_other_sources_keep_theirs(empty_home, archive, folder, pack, tmp_path):
    load_cifar10(pack(folder, tmp_path/'other.tgz'))
    for i in range(3):
        load_cifar10(archive)
        assert len(cached(empty_home)) == 2
        Image.new('RGB', (32, 32), (i, 0, 0)).save(folder/'train'/'cat'/'new.png')
        pack(folder, archive)

@pytest.fixture
def locked(empty_home, archive, folder, pack, monkeypatch):
    "A changed archive, of which another process holds the lock"
    load_cifar10(archive)
    Image.new('RGB', (32, 32)).save(folder/'train'/'cat'/'new.png')
    pack(folder, archive)
    monkeypatch.setattr('cifar_fastai.data.source.longest_wait', .2)
    [lock] = empty_home.rglob('*.lock')
    with FileLock(lock): yield archive

def test_a_process_that_prepares_the_images_for_too_long_is_not_waited_for(locked, empty_home, messages):
    before = [(file, file.stat().st_mtime_ns) for file in cached(empty_home)]
    part = empty_home/'data'/'cifar_fastai'/f'.{before[0][0].name[:32]}0123456789abcdef.part'
    part.write_bytes(b'of the other process')
    with pytest.warns(UserWarning, match='cache'): assert len(load_cifar10(locked).train_y) == 81
    assert messages().count('waiting') == 1 and part.exists()
    assert [(file, file.stat().st_mtime_ns) for file in cached(empty_home)] == before

def test_another_data_set_is_not_waited_for(locked, empty_home, folder, messages):
    load_cifar10(folder)
    assert len(cached(empty_home)) == 2 and 'waiting' not in messages()

def test_nothing_half_written_is_left_in_the_cache(empty_home, archive):
    load_cifar10(archive)
    [file] = [p for p in empty_home.rglob('*') if p.is_file() and p.suffix != '.lock']
    assert file.suffix == '.npz'

def test_what_is_refused_is_not_cached(empty_home, folder):
    (folder/'train'/'cat'/'bad.png').write_bytes(b'text')
    with pytest.raises(ValueError): load_cifar10(folder)
    assert not [p for p in empty_home.rglob('*') if p.is_file() and p.suffix != '.lock']

def test_images_that_cannot_be_cached_are_returned_all_the_same(empty_home, archive, canonical):
    (empty_home/'data').write_text('a file where the folder should be')
    with pytest.warns(UserWarning, match='cache'): assert same(load_cifar10(archive), canonical)

@pytest.mark.parametrize('home', ['/proc/nonexistent', 'a file'])
def test_a_home_that_cannot_be_written_to_stops_no_training(home, small_archive, tmp_path):
    if home == 'a file': (home := tmp_path/'home').write_text('')
    env = {name: value for name, value in os.environ.items() if name != 'FASTAI_HOME'} | dict(HOME=str(home))
    done = forked.run('train', '--data', small_archive, '--epochs', '1', '--bs', '40', '--width', '16', '--lr_min', '1e-3', '--lr_max', '1e-2', '--ghost', '0', '--num_workers', '0', '--out', 'run', env=env)
    assert done.returncode == 0 and Path('run/model.safetensors').exists(), done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith('cifar_train: ')]
    assert 'cache' in said and str(home) in said
    assert 'Traceback' not in done.stderr, done.stderr

# ---- where it is found

def test_what_is_given_comes_before_the_environment_before_fastais_folders_before_the_network(empty_home, server, small_archive, tmp_path, monkeypatch):
    server.answers['/cifar10.tgz'] = [small_archive.read_bytes()]
    def find(source=None): return find_cifar10(source, [server.url('/cifar10.tgz')])
    def made(path):
        path.mkdir(parents=True)
        return path

    fetched = find()
    assert fetched == empty_home/'archive'/'cifar10.tgz' and len(server.asked) == 1
    assert find() == fetched # it is kept
    extracted = made(empty_home/'data'/'cifar10')
    assert find() == find('cifar10') == extracted
    named = made(tmp_path/'named')
    monkeypatch.setenv(data_variable, str(named))
    assert find() == find('cifar10') == named
    given = made(tmp_path/'given')
    assert find(given) == find(str(given)) == given
    assert len(server.asked) == 1

@pytest.mark.parametrize('place', ['data/cifar10', 'data/cifar-10-batches-py', 'archive/cifar10.tgz', 'archive/cifar-10-python.tar.gz'])
def test_each_of_fastais_places_is_looked_at(empty_home, place):
    (empty_home/place).mkdir(parents=True)
    assert find_cifar10(urls=[]) == empty_home/place

def test_a_source_that_is_named_and_missing_is_an_error_and_never_a_download(empty_home, server, small_archive, monkeypatch):
    server.answers['/cifar10.tgz'] = [small_archive.read_bytes()]
    urls = [server.url('/cifar10.tgz')]
    with pytest.raises(FileNotFoundError, match='/no/such/folder'): load_cifar10('/no/such/folder', urls)
    monkeypatch.setenv(data_variable, '/no/such/archive.tgz')
    with pytest.raises(FileNotFoundError, match=r'/no/such/archive\.tgz'): load_cifar10(urls=urls)
    assert server.asked == []

def test_a_home_folder_can_be_written_with_a_tilde(small_folder, monkeypatch):
    monkeypatch.setenv('HOME', str(small_folder.parent))
    assert find_cifar10('~/cifar10') == small_folder

def test_the_environment_can_name_the_digits(monkeypatch, digits):
    monkeypatch.setenv(data_variable, 'digits')
    assert same(load_cifar10(), digits) and same(load_cifar10('cifar10'), digits)

def test_data_that_is_loaded_already_is_passed_on(small): assert load_cifar10(small) is small

# ---- downloads

@pytest.fixture
def content(small_archive): return small_archive.read_bytes()

def kept(folder): return sorted(p.name for p in folder.rglob('*') if p.is_file())

def test_a_download_is_kept_whole(server, content, tmp_path):
    server.answers['/a/cifar10.tgz'] = [content]
    path = fetch_cifar10([server.url('/a/cifar10.tgz')], tmp_path/'archive')
    assert path == tmp_path/'archive'/'cifar10.tgz' and path.read_bytes() == content
    assert kept(tmp_path/'archive') == ['cifar10.tgz']

def test_a_download_shows_its_progress(server, content, tmp_path, capsys):
    server.answers['/cifar10.tgz'] = [content]
    fetch_cifar10([server.url('/cifar10.tgz')], tmp_path)
    assert '%' in capsys.readouterr().out

def test_a_download_cut_off_once_is_tried_again(server, content, tmp_path):
    server.answers['/cifar10.tgz'] = [(content, 'cut'), content]
    assert fetch_cifar10([server.url('/cifar10.tgz')], tmp_path).read_bytes() == content
    assert len(server.asked) == 2

@pytest.mark.parametrize('answer', [404, 403, 500, (b'x'*10**5, 'cut'), (b'nonsense', 'no HTTP')], ids=['404', '403', '500', 'cut', 'no HTTP'])
def test_the_second_address_is_asked_when_the_first_fails(server, content, tmp_path, answer):
    server.answers.update({'/first.tgz': [answer], '/second.tgz': [content]})
    path = fetch_cifar10([server.url('/first.tgz'), server.url('/second.tgz')], tmp_path/'archive', show_progress=False)
    assert path.name == 'second.tgz' and path.read_bytes() == content
    assert kept(tmp_path/'archive') == ['second.tgz']

def test_a_download_without_end_is_broken_off(server, tmp_path):
    server.answers['/endless.tgz'] = [bytes(400*2**20 + 2**22)]
    with pytest.raises(FileNotFoundError, match=r'endless\.tgz.*419,430,400'):
        fetch_cifar10([server.url('/endless.tgz')], tmp_path/'archive', show_progress=False)
    assert kept(tmp_path/'archive') == []

def test_what_a_killed_download_has_left_is_removed_after_a_day(server, content, tmp_path, monkeypatch):
    server.answers['/cifar10.tgz'] = [content]
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('cifar_fastai.data.download.iter_members', killed)
        m.setattr(Path, 'unlink', lambda *args, **kwargs: None) # nobody cleans up
        fetch_cifar10([server.url('/cifar10.tgz')], tmp_path/'archive', show_progress=False)
    [left] = (tmp_path/'archive').iterdir()
    for age, names in (0, {left.name, 'cifar10.tgz'}), (2*24*60*60, {'cifar10.tgz'}):
        os.utime(left, (time.time() - age,)*2)
        fetch_cifar10([server.url('/cifar10.tgz')], tmp_path/'archive', show_progress=False)
        assert set(kept(tmp_path/'archive')) == names

def test_a_download_that_drips_is_broken_off(server, content, tmp_path):
    server.answers.update({'/slow.tgz': [(content, 'dripping')], '/second.tgz': [content]})
    urls = [server.url('/slow.tgz'), server.url('/second.tgz')]
    path = fetch_cifar10(urls, tmp_path/'archive', show_progress=False, timeout=.5)
    assert path.name == 'second.tgz' and path.read_bytes() == content

def test_when_all_fail_it_says_what_was_tried_and_leaves_nothing(server, content, tmp_path):
    server.answers['/cut.tgz'] = [(content, 'cut')]
    urls = [server.url('/cut.tgz'), server.url('/missing.tgz'), 'http://127.0.0.1:9/nobody.tgz']
    with pytest.raises(FileNotFoundError) as e: fetch_cifar10(urls, tmp_path/'archive')
    message = str(e.value)
    assert all(url in message for url in urls)
    assert '404' in message or 'Not Found' in message
    assert data_variable in message
    assert kept(tmp_path/'archive') == []

@pytest.mark.parametrize('answer', ['a page', 'half an archive'])
def test_an_answer_that_is_no_whole_archive_is_not_kept_for_good(empty_home, server, content, canonical, answer):
    bad = b'<html>log in to this network first</html>' if answer == 'a page' else (content, 'cut, length unsaid')
    server.answers.update({'/cifar10.tgz': [bad], '/second.tgz': [content]})
    data = load_cifar10(urls=[server.url('/cifar10.tgz'), server.url('/second.tgz')])
    assert same(data, canonical)
    assert 'cifar10.tgz' not in kept(empty_home)

def test_what_is_fetched_is_read_and_asked_for_once(empty_home, server, content, canonical):
    server.answers['/cifar10.tgz'] = [content]
    for _ in range(2): assert same(load_cifar10(urls=[server.url('/cifar10.tgz')]), canonical)
    assert server.asked == ['/cifar10.tgz']

# ---- digits and hold-out

def test_digits_are_ten_classes_of_32_by_32_rgb(digits):
    assert digits.train_x.shape[1:] == digits.test_x.shape[1:] == (32, 32, 3) and digits.train_x.dtype == np.uint8
    assert digits.vocab == [str(d) for d in range(10)]
    assert len(digits.train_y) + len(digits.test_y) == 1797
    assert len(digits.test_y)/1797 == pytest.approx(.2, abs=.002)
    assert digits.train_x.min() == 0 and digits.train_x.max() == 255

def test_digits_are_split_the_same_each_time_and_share_no_image(digits):
    assert same(load_digits(), digits)
    train = {digest(x, y) for x, y in zip(digits.train_x, digits.train_y)}
    assert train.isdisjoint(digest(x, y) for x, y in zip(digits.test_x, digits.test_y))

def test_a_share_of_each_class_is_taken_and_of_none_nothing():
    y = np.array([0]*20 + [1]*9 + [2]*1)
    mask = first_of_each_class(y, .1)
    assert [mask[y == label].sum() for label in range(3)] == [2, 1, 1] and mask.dtype == bool
    assert mask[:2].all()

def items(dl): return [(np.asarray(x).tobytes(), int(y)) for x, y in dl.dataset]

def test_the_hold_out_is_a_tenth_of_each_class_and_of_the_training_images(digits):
    dls = cifar_dls('digits', valid='holdout', num_workers=0)
    train, valid = items(dls.train), items(dls.valid)
    everything = {(x.tobytes(), int(y)) for x, y in zip(digits.train_x, digits.train_y)}
    assert set(train) | set(valid) == everything and set(train).isdisjoint(valid)
    for label, n in zip(*np.unique(digits.train_y, return_counts=True)): assert sum(y == label for _, y in valid) == round(n/10)

def test_the_hold_out_is_the_same_each_time():
    assert items(cifar_dls('digits', valid='holdout', seed=1).valid) == items(cifar_dls('digits', valid='holdout', seed=2, bs=8).valid)

def test_validation_is_on_the_test_images_by_default(small, small_dls):
    assert items(small_dls().valid) == [(x.tobytes(), y) for x, y in zip(small.test_x, small.test_y)]
    assert items(small_dls().train) == [(x.tobytes(), y) for x, y in zip(small.train_x, small.train_y)]

# ---- DataLoaders

def batches_of(dl): return [(x.clone(), y.clone()) for x, y in dl]

def equal(a, b): return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))

def test_a_batch_is_normalised_images_and_labels(small_dls):
    x, y = small_dls().one_batch()
    assert type(x) is TensorImage and type(y) is TensorCategory
    assert x.shape == (16, 3, 32, 32) and x.dtype == torch.float32
    assert y.shape == (16,) and y.dtype == torch.int64

def test_the_validation_batch_is_the_images_less_mean_by_deviation(small, small_dls):
    x, y = small_dls(bs=40).valid.one_batch()
    mean, std = map(np.array, small.stats)
    expected = ((small.test_x/255 - mean)/std).transpose(0, 3, 1, 2)
    assert np.allclose(x, expected, atol=1e-5) and (y.numpy() == small.test_y).all()

def test_other_stats_can_be_given(small, small_dls):
    x, _ = small_dls(bs=40, stats=cifar10_stats).valid.one_batch()
    assert np.allclose(x, ((small.test_x/255 - cifar10_stats[0])/cifar10_stats[1]).transpose(0, 3, 1, 2), atol=1e-5)

def test_the_hole_in_a_training_image_is_zero_after_normalisation(small_dls):
    for x in small_dls(bs=80).train.one_batch()[0]:
        near = (x.abs().amax(dim=0) < .01).float()[None] # half a grey level
        assert torch.nn.functional.avg_pool2d(near, 8, stride=1).max() == 1

def test_the_last_batch_is_kept_and_the_classes_are_known(small, small_dls):
    dls = small_dls(bs=32)
    assert (len(dls.train), len(dls.valid)) == (3, 2)
    assert [len(y) for _, y in dls.train] == [32, 32, 16] and [len(y) for _, y in dls.valid] == [32, 8]
    assert list(dls.vocab) == small.vocab and dls.c == 10

def test_an_epoch_has_each_image_once_in_another_order(small, small_dls):
    dls = small_dls(aug=CropFlipCutout(pad=0, flip_p=0, cutout=0), stats=((0, 0, 0), (1, 1, 1)))
    x = torch.cat([x for x, _ in dls.train])
    seen = [(img.mul(255).round().byte().permute(1, 2, 0).numpy().tobytes()) for img in x]
    given = [img.tobytes() for img in small.train_x]
    assert sorted(seen) == sorted(given) and seen != given

def test_the_same_seed_draws_the_same_with_any_number_of_workers(small_dls):
    def two_epochs(**changes):
        dls = small_dls(**changes)
        return batches_of(dls.train) + batches_of(dls.train)
    alone = two_epochs()
    assert equal(alone, two_epochs())
    assert equal(alone, two_epochs(num_workers=2))
    assert not equal(alone, two_epochs(seed=1))

def test_two_epochs_differ_in_order_and_augmentation(small_dls):
    dls = small_dls()
    first, second = batches_of(dls.train), batches_of(dls.train)
    assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in second]))
    assert len({img.numpy().tobytes() for x, _ in first + second for img in x}) == 160

def test_without_a_seed_torchs_decides(small_dls):
    def first(torch_seed):
        torch.manual_seed(torch_seed)
        return batches_of(small_dls(seed=None).train)
    assert equal(first(1), first(1)) and not equal(first(1), first(2))

def test_validation_is_in_order_and_the_same_each_time(small, small_dls):
    dls = small_dls()
    first = batches_of(dls.valid)
    assert equal(first, batches_of(dls.valid))
    assert torch.cat([y for _, y in first]).tolist() == small.test_y.tolist()

@pytest.mark.parametrize('source, bs', [('digits', 64), ('small_archive', 512)])
def test_the_batch_size_suits_the_source(source, bs, request):
    if source != 'digits': source = request.getfixturevalue(source)
    assert cifar_dls(source, num_workers=0).bs == bs

def test_one_validation_image_is_enough(small): assert len(items(cifar_dls(small.first(80, 1), bs=16, num_workers=0).valid)) == 1

shows_a_batch = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning') # fastai hands matplotlib a tensor

@shows_a_batch
def test_show_batch_shows_images_the_right_way_round(small, small_dls):
    small_dls(bs=40).valid.show_batch(max_n=9)
    axes = [ax for ax in plt.gcf().axes if ax.images]
    assert len(axes) == 9
    for ax, img, label in zip(axes, small.test_x, small.test_y):
        assert np.abs(np.asarray(ax.images[0].get_array(), int) - img).max() <= 1 and ax.get_title() == small.vocab[label]

@shows_a_batch
def test_show_batch_does_not_change_what_training_sees(small_dls, tiny_learner):
    def labels_seen(shown):
        learn, seen = tiny_learner(small_dls()), []
        if shown: learn.dls.show_batch()
        learn.model.register_forward_hook(lambda m, x, out: seen.append(x[0].detach().sum().item()) if m.training else None)
        learn.fit(1)
        return seen
    assert labels_seen(False) == labels_seen(True)

@pytest.mark.parametrize('change', [dict(pipeline='none'), dict(valid='train'), dict(bs=0), dict(bs=-4), dict(seed=-1)])
def test_invalid_values_are_refused(small, change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf'\b{name}\b.*{re.escape(repr(value))}'): cifar_dls(small, **change)

# ---- worker processes

@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
@pytest.mark.slow
def test_workers_of_another_start_method_give_the_same_batches(method, digits, tmp_path):
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f'no {method} here')
    for i, size in enumerate([(32, 32), (50, 40), (64, 64)]):
        Image.fromarray(digits.test_x[i]).resize(size).save(tmp_path/f'{i}.png')
    command = [sys.executable, '-W', 'ignore', Path(__file__).with_name('workers.py'), 'loaders', method, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (batches, by_workers), (sums, sums_by_workers) = json.loads(done.stdout)
    assert batches == by_workers and len(batches) == 4
    assert sums == sums_by_workers and len(sums[0]) == 3

def test_what_a_worker_is_sent_has_the_size_of_its_images(small, small_dls, tmp_path):
    item = small_dls(pipeline='item', num_workers=1)
    list(item.train)
    assert len(pickle.dumps(item.train.fake_l)) < 2*small.train_x.nbytes
    Image.fromarray(small.test_x[0]).save(tmp_path/'a.png')
    dl = small_dls().test_dl([tmp_path/'a.png'], num_workers=1)
    list(dl)
    assert len(pickle.dumps(dl.fake_l)) < 100_000

@pytest.mark.parametrize('pipeline', ['batch', 'item'])
def test_a_dataloader_survives_pickling_in_the_middle_of_a_run(pipeline, small_dls):
    dl = small_dls(pipeline=pipeline).train
    batches_of(dl)
    again = pickle.loads(pickle.dumps(dl))
    assert equal(batches_of(dl), batches_of(again))

class OneNumber(Transform):
    "An item transform that draws from Python's global generator"
    def encodes(self, x:PILImage): return PILImage.create(np.full((32, 32, 3), random.randrange(256), np.uint8))

def test_what_other_transforms_draw_in_a_worker_depends_on_seed_and_epoch(small_dls):
    def drawn(seed):
        dl = small_dls(pipeline='item', num_workers=1, seed=seed).valid
        dl.after_item.add(OneNumber())
        return [str([x[:, 0, 0, 0].tolist() for x, _ in dl]) for _ in range(2)]
    assert drawn(1) == drawn(1) and len({*drawn(1), *drawn(2)}) == 4

class Dies(Transform):
    "An item transform that ends a worker process as the system does when memory runs out"
    def __init__(self): self.main = os.getpid()
    def encodes(self, x:PILImage):
        if os.getpid() != self.main: os.kill(os.getpid(), signal.SIGKILL)
        return x

@pytest.mark.skipif(sys.platform == 'win32', reason='no such signal')
def test_a_worker_that_dies_is_one_sentence(small_dls):
    dls = small_dls(pipeline='item', num_workers=1)
    dls.add_tfms([Dies()], 'after_item')
    with pytest.raises(ChildProcessError, match=r'pid.*num_workers') as e, explain_lost_worker(): list(dls.train)
    assert '\n' not in str(e.value)

@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork here')
def test_a_run_whose_worker_dies_ends_with_one_sentence(small_archive, monkeypatch, tmp_path):
    main, reseed = os.getpid(), ItemAugment.reseed
    def die(self, *key):
        if os.getpid() != main: os.kill(os.getpid(), signal.SIGKILL)
        return reseed(self, *key)
    monkeypatch.setattr(ItemAugment, 'reseed', die) # workers are forked
    options = dict(data=small_archive, pipeline='item', num_workers=1, epochs=1, bs=16, lr_min=1e-3, lr_max=1e-2)
    args = [word for name, value in options.items() for word in (f'--{name}', str(value))]
    with pytest.raises(SystemExit) as e: cifar_train([*args, '--out', str(tmp_path/'run')])
    assert re.search(r'^cifar_train: [^\n]*pid[^\n]*num_workers', e.value.code)

def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match='^shape$'), explain_lost_worker(): raise RuntimeError('shape')

# ---- plain fastai

@pytest.mark.parametrize('source', ['small_folder', 'small_archive', 'small'])
def test_the_block_makes_dataloaders_of_every_source(source, request):
    dls = cifar_block().dataloaders(request.getfixturevalue(source), bs=16, num_workers=0)
    x, y = dls.one_batch()
    assert x.shape == (16, 3, 32, 32) and (len(dls.train_ds), len(dls.valid_ds)) == (80, 40)
    assert list(dls.vocab) == list(cifar10_classes)

def test_the_block_augments_training_items_only(small):
    dls = cifar_block(valid='holdout').dataloaders(small, bs=16, num_workers=0, shuffle=False)
    assert not torch.equal(dls.train.one_batch()[0], dls.train.one_batch()[0])
    assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])

def test_the_block_refuses_an_unknown_validation_set():
    with pytest.raises(ValueError, match="valid.*'train'.*'test'.*'holdout'"): cifar_block(valid='train')

def test_a_test_dataloader_gives_what_validation_gives(small, small_dls):
    dls = small_dls(bs=40)
    x = dls.test_dl([PILImage.create(img) for img in small.test_x], bs=40, num_workers=0).one_batch()[0]
    assert torch.equal(x, dls.valid.one_batch()[0])

def test_predict_takes_an_image(small, tiny_learner):
    learn = tiny_learner()
    cls, label, probs = learn.predict(PILImage.create(small.test_x[5]))
    all_probs, _ = learn.get_preds()
    assert cls == small.vocab[label] and torch.allclose(probs, all_probs[5], atol=1e-6)

def test_predictions_of_the_training_images_come_in_their_order(small, tiny_learner):
    learn = tiny_learner()
    _, targs = learn.get_preds(dl=learn.dls.train)
    assert targs.tolist() == small.train_y.tolist()

# ---- one image

@pytest.mark.parametrize('size', [(32, 32), (320, 32), (32, 100), (17, 23), (640, 480)])
def test_an_image_of_any_size_is_read_by_its_centre(size, tmp_path):
    w, h = size
    side = min(size)
    img = Image.new('RGB', size, 'red')
    img.paste('blue', ((w - side)//2, (h - side)//2, (w - side)//2 + side, (h - side)//2 + side))
    img.save(tmp_path/'a.png')
    x = read_image(tmp_path/'a.png')
    assert x.shape == (32, 32, 3) and x.dtype == np.uint8
    assert (x[2:-2, 2:-2] == (0, 0, 255)).all()

def test_an_image_of_the_right_size_is_read_as_it_is(small, tmp_path):
    Image.fromarray(small.test_x[7]).save(tmp_path/'a.png')
    assert (read_image(tmp_path/'a.png') == small.test_x[7]).all()

@pytest.mark.parametrize('mode, name', [('L', 'a.png'), ('RGBA', 'a.png'), ('P', 'a.gif'), ('CMYK', 'a.jpg'), ('1', 'a.png')])
def test_an_image_of_any_mode_is_read_as_rgb(mode, name, tmp_path):
    Image.new(mode, (40, 40)).save(tmp_path/name)
    assert read_image(tmp_path/name).shape == (32, 32, 3)

def test_an_image_that_a_camera_turned_is_turned_back(tmp_path):
    img, exif = Image.new('RGB', (32, 32), 'black'), Image.Exif()
    img.paste('white', (0, 0, 32, 16)) # the upper half
    exif[0x0112] = 3 # upside down
    img.save(tmp_path/'a.jpg', exif=exif)
    x = read_image(tmp_path/'a.jpg')
    assert x[:14].max() < 50 and x[18:].min() > 200

@pytest.mark.parametrize('content', [b'some text', b'', png()[:-40]])
def test_what_is_no_image_is_refused_by_name(content, tmp_path):
    (tmp_path/'a.png').write_bytes(content)
    with pytest.raises(ValueError, match=r'a\.png'): read_image(tmp_path/'a.png')

def test_a_missing_image_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nothing\.png'): read_image(tmp_path/'nothing.png')
    with pytest.raises(ValueError, match=rf'{re.escape(str(tmp_path))}.*regular'): read_image(tmp_path)

# ---- the real images

def test_cifar10_has_its_counts(real_cifar):
    assert np.bincount(real_cifar.train_y).tolist() == [5000]*10 and np.bincount(real_cifar.test_y).tolist() == [1000]*10
    assert real_cifar.train_x.shape == (50_000, 32, 32, 3) and real_cifar.test_x.shape == (10_000, 32, 32, 3)

def test_cifar10_has_its_statistics(real_cifar): assert np.allclose(real_cifar.stats, cifar10_stats, rtol=0, atol=1e-7)

def test_cifar10_has_its_fingerprint(real_cifar):
    assert (fingerprint(real_cifar.train_x, real_cifar.train_y), fingerprint(real_cifar.test_x, real_cifar.test_y)) == cifar10_fingerprint
    assert 'CIFAR-10' in real_cifar.origin
    assert not any(print_[:8] in real_cifar.origin for print_ in real_cifar.fingerprint)

@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('an image was decoded')
    return lambda: monkeypatch.setattr(Image, 'open', refuse)

def test_cifar10_is_decoded_once(real_cifar, real_source, no_decoding):
    no_decoding()
    assert same(load_cifar10(real_source), real_cifar)

@pytest.mark.slow
def test_a_folder_of_cifar10_is_decoded_once(real_cifar, real_source, tmp_path, no_decoding):
    with tarfile.open(real_source) as tar: tar.extractall(tmp_path, filter='data')
    assert same(load_cifar10(tmp_path), real_cifar)
    no_decoding()
    assert same(load_cifar10(tmp_path), real_cifar)

def test_an_epoch_of_cifar10_has_98_steps(real_cifar):
    dls = cifar_dls(real_cifar)
    assert (dls.bs, len(dls.train), len(dls.valid)) == (512, 98, 20)

def test_the_hold_out_of_cifar10_has_500_images_of_each_class(real_cifar):
    dls = cifar_dls(real_cifar, valid='holdout')
    labels = [real_cifar.vocab.index(item[1]) for item in dls.valid_ds.items]
    assert np.bincount(labels).tolist() == [500]*10 and len(dls.train_ds) == 45_000

@pytest.mark.parametrize('pipeline, num_workers', [('batch', 0), ('item', 0), ('item', 1)])
def test_batches_leave_the_global_generators_alone(small, pipeline, num_workers):
    "So what is looked at before a network is made does not change its weights"
    dls = cifar_dls(small, bs=16, pipeline=pipeline, seed=0, num_workers=num_workers)
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    dls.one_batch(); list(dls.train); list(dls.valid)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], before_np)

def test_a_link_to_nothing_beside_the_images_does_no_harm(folder):
    (folder/'notes').symlink_to(folder/'nothing')
    assert len(load_cifar10(folder).train_y) == 80

def test_batches_behind_a_second_link_are_read_once(small, write_batches, tmp_path):
    write_batches(small, tmp_path/'data'/'cifar-10-batches-py')
    (tmp_path/'data'/'latest').symlink_to('cifar-10-batches-py')
    data = load_cifar10(tmp_path/'data')
    assert (len(data.train_y), len(data.test_y)) == (len(small.train_y), len(small.test_y))

def test_links_between_many_folders_are_refused_at_once(tmp_path):
    folders = [tmp_path/f'class {i}' for i in range(12)]
    for folder in folders:
        folder.mkdir()
        Image.new('RGB', (32, 32)).save(folder/'a.png')
        for other in folders:
            if other != folder: (folder/f'to {other.name}').symlink_to(other)
    with pytest.raises(ValueError, match='3 links'): load_cifar10(tmp_path)

def test_machines_with_other_files_at_one_path_keep_a_cache_each_and_with_the_same_files_share_one(small, write_pngs, empty_home, tmp_path, monkeypatch):
    def of(machine): monkeypatch.setattr(platform, 'node', lambda: machine)
    source = write_pngs(small, tmp_path/'data')
    n = lambda: len(cached(empty_home))
    of('a'); load_cifar10(source)
    of('b'); load_cifar10(source)
    assert n() == 1
    shutil.rmtree(source); write_pngs(small.first(40, 20), source)
    load_cifar10(source)
    assert n() == 2 # that of `a` is left alone
    shutil.rmtree(source); write_pngs(small.first(20, 10), source)
    load_cifar10(source)
    assert n() == 2
