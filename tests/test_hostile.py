"""Pictures and archives from strangers: predicted rightly, or refused with one sentence; never a crash, never a hang."""
import io, json, os, pickle, re, signal, struct, tarfile, time, zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageOps

import forked
from cifar_fastai.cli import cifar_predict, cifar_train
from cifar_fastai.core import peak_memory
from cifar_fastai.data.picture import NetworkImage, max_pixels, read_image
from cifar_fastai.data.archive import read_images
from cifar_fastai.data.source import load_cifar10

@contextmanager
def hang_guard(seconds=300):
    "Fail a test that hangs; the limit is not a measure of speed"
    def hung(*args): pytest.fail(f'still running after {seconds} s') # not an `Exception`, so the package does not catch it
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

quick, long = 300, pytest.param(20_000, marks=pytest.mark.slow)

def count_peak_anew():
    Path('/proc/self/clear_refs').write_text('5') # Linux then counts the most anew
    return peak_memory()

@pytest.fixture
def grown():
    "How much the memory of this process has grown at most since the test began, in bytes"
    try: before = count_peak_anew()
    except OSError: pytest.skip('the most memory cannot be counted anew here')
    return lambda: peak_memory() - before

@pytest.fixture(scope='module')
def photo(digits):
    "A picture of 48×48 in colour with soft edges"
    img = Image.fromarray(np.stack([digits.train_x[0, :, :, 0], digits.train_x[1, :, :, 0], digits.train_x[2, :, :, 0]], axis=-1))
    return img.resize((48, 48), Image.Resampling.BICUBIC)

def as_network_takes_it(img): return np.asarray(ImageOps.fit(img.convert('RGB'), (32, 32)))

def close(a, b, tolerance): return np.abs(a.astype(int) - b.astype(int)).mean() < tolerance

# ---- odd pictures, predicted rightly

@pytest.mark.parametrize('mode, name, tolerance', [('L', 'a.png', 1), ('1', 'a.png', 80), ('P', 'a.png', 20), ('P', 'a.gif', 20), ('CMYK', 'a.jpg', 12), ('YCbCr', 'a.jpg', 12),
                                                   ('RGB', 'a.webp', 12), ('RGB', 'a.bmp', 1), ('RGB', 'a.tif', 1), ('CMYK', 'a.tif', 2)])
def test_a_picture_of_any_mode_is_read_as_what_it_shows(photo, tmp_path, mode, name, tolerance):
    photo.convert(mode).save(tmp_path/name)
    want = as_network_takes_it(photo.convert('L') if mode in ('L', '1') else photo)
    assert close(read_image(tmp_path/name), want, tolerance)

@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_what_is_transparent_is_white(photo, tmp_path, mode):
    img = photo.convert(mode)
    alpha = np.zeros((48, 48), dtype=np.uint8)
    alpha[:, 24:] = 255
    img.putalpha(Image.fromarray(alpha))
    img.save(tmp_path/'a.png')
    out = read_image(tmp_path/'a.png')
    assert (out[:, :15] == 255).all() and close(out[:, 17:], as_network_takes_it(photo.convert(mode[:-1]))[:, 17:], 2)

def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    img = Image.new('P', (32, 32), 0)
    img.putpalette([10, 20, 30, 200, 0, 0])
    img.paste(1, (16, 0, 32, 32))
    img.save(tmp_path/'a.png', transparency=0)
    out = read_image(tmp_path/'a.png')
    assert (out[:, :16] == 255).all() and (out[:, 16:] == (200, 0, 0)).all()

def test_16_bits_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 32*32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path/'a.png')
    Image.fromarray(ramp).save(tmp_path/'a.tif')
    for name in ('a.png', 'a.tif'): assert np.abs(read_image(tmp_path/name)[..., 0].astype(int) - (ramp >> 8)).max() <= 1

@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_picture_that_a_camera_turned_is_upright_with_alpha_too(photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ('RGB', 'RGBA'):
        photo.convert(mode).save(tmp_path/f'{mode}.png', exif=exif)
        assert close(read_image(tmp_path/f'{mode}.png'), as_network_takes_it(ImageOps.exif_transpose(Image.open(tmp_path/f'{mode}.png'))), 1)

@pytest.mark.parametrize('name', ['ünïcödé und Leerzeichen.png', '图片.png', "it's & <b>.png", '-x.png', 'a' * 200 + '.png'])
def test_an_ordinary_name_is_accepted(photo, tmp_path, name):
    photo.save(tmp_path/name)
    assert read_image(tmp_path/name).shape == (32, 32, 3)

# ---- refused

def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

def png(width, height, rows=b''): # a header that says so, whatever the rows hold
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

def animated(photo, file): photo.save(file, save_all=True, append_images=[ImageOps.flip(photo), ImageOps.mirror(photo)])

@pytest.mark.parametrize('name', ['a.gif', 'a.png', 'a.webp', 'a.tif'])
def test_an_animation_is_refused(photo, tmp_path, name):
    animated(photo, tmp_path/name)
    with pytest.raises(ValueError, match=rf'{re.escape(name)}.*animated'): read_image(tmp_path/name)

@pytest.mark.parametrize('content, figures', [
    (b'', ''), (b'text', ''), (png(10**5, 10**5), '10000000000 pixels'), (png(2**31 - 1, 2**31 - 1), f'{(2**31 - 1)**2} pixels'),
    (png(8000, 8000), '8000×8000.*25,000,000'), (png(0, 5), ''), (png(32, 32), ''), (png(32, 32, b'\0'*10), '')])
def test_a_file_that_is_none_or_too_much_is_refused(tmp_path, content, figures):
    (tmp_path/'a.png').write_bytes(content)
    with pytest.raises(ValueError, match=rf'a\.png.*{figures}'): read_image(tmp_path/'a.png')

def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, grown):
    side = int(max_pixels**.5) + 1
    (tmp_path/'a.png').write_bytes(png(side, side, bytes(10)))
    with pytest.raises(ValueError, match=rf'a\.png.*{side}×{side}.*25,000,000'): read_image(tmp_path/'a.png')
    assert grown() < 50_000_000 # decoded it would be 75 MB and more

def test_a_bomb_in_a_text_chunk_is_refused(photo, tmp_path, grown):
    photo.save(tmp_path/'a.png')
    content = (tmp_path/'a.png').read_bytes()
    bomb = chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(300_000_000), 9))
    (tmp_path/'a.png').write_bytes(content[:33] + bomb + content[33:])
    try: assert read_image(tmp_path/'a.png').shape == (32, 32, 3) # Pillow may leave the text alone
    except ValueError as e: assert 'a.png' in str(e)
    assert grown() < 500_000_000

def test_a_file_of_too_many_bytes_is_refused_unread(photo, tmp_path, grown):
    photo.save(tmp_path/'a.webp')
    with open(tmp_path/'a.webp', 'r+b') as f: f.truncate(600_000_000) # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r'a\.webp.*600,000,000.*50,000,000'): read_image(tmp_path/'a.webp')
    assert grown() < 200_000_000

def test_a_jpeg_that_is_gone_over_again_and_again_is_refused(photo, tmp_path):
    photo.resize((3000, 3000)).save(tmp_path/'a.jpg', progressive=True)
    assert read_image(tmp_path/'a.jpg').shape == (32, 32, 3)
    content = (tmp_path/'a.jpg').read_bytes()
    last = content.rindex(b'\xff\xda')
    (tmp_path/'a.jpg').write_bytes(content[:last] + content[last:-2]*100 + content[-2:])
    with pytest.raises(ValueError, match=r'a\.jpg.*3000×3000.*\b[0-9]+ scans'): read_image(tmp_path/'a.jpg')

@pytest.mark.parametrize('progressive', [False, True])
def test_a_large_jpeg_that_can_be_decoded_smaller_is_read(photo, tmp_path, progressive):
    photo.resize((6000, 6000)).save(tmp_path/'a.jpg', progressive=progressive)
    assert close(read_image(tmp_path/'a.jpg'), as_network_takes_it(photo), 12)

def test_scans_of_a_jpeg_that_is_not_progressive_are_counted_too(photo, tmp_path):
    out = io.BytesIO()
    Image.new('YCbCr', (16, 16)).save(out, 'JPEG', subsampling=0)
    head = bytearray(out.getvalue()[:out.getvalue().index(b'\xff\xda')])
    at = head.index(b'\xff\xc0')
    head[at + 5:at + 9] = struct.pack('>HH', 4900, 4900)
    scan = lambda i: segment(0xda, bytes([1, i + 1, 0 if i == 0 else 0x11, 0, 63, 0])) + b'\0'
    scans = [scan(i % 3) for i in range(3000)]
    for n in 3, 3000:
        (tmp_path/f'{n}.jpg').write_bytes(bytes(head) + b''.join(scans[:n]) + b'\xff\xd9')
    assert read_image(tmp_path/'3.jpg').shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r'3000\.jpg.*4900×4900.*\b3000 scans'): read_image(tmp_path/'3000.jpg')

def test_a_video_behind_a_progressive_photo_is_not_taken_for_scans(photo, tmp_path):
    "As phones write it: by chance a megabyte of video has 16 of the markers that begin a scan"
    photo.resize((4000, 3000)).save(tmp_path/'a.jpg', progressive=True)
    with open(tmp_path/'a.jpg', 'ab') as f: f.write(np.random.default_rng(0).bytes(5_000_000))
    assert close(read_image(tmp_path/'a.jpg'), as_network_takes_it(photo.resize((4000, 3000))), 12)

@pytest.mark.parametrize('side, ok', [(4096, True), (8192, False)])
def test_tiles_of_a_tiff_that_are_much_larger_than_the_picture_are_refused(tmp_path, side, ok):
    content = zlib.compress(bytes(side*side))
    entries = [(256, 4, 1, 100), (257, 4, 1, 100), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
               (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 142), (325, 4, 1, len(content))]
    (tmp_path/'a.tif').write_bytes(tiff(entries, 142 - 10 - 12*len(entries)) + content)
    if ok: assert (read_image(tmp_path/'a.tif') == 0).all()
    else:
        with pytest.raises(ValueError, match=r'a\.tif.*67,108,864.*50,000,000'): read_image(tmp_path/'a.tif')

def with_transparent_colour(content, value): # tRNS of a grey PNG, in front of its pixels
    at = content.index(b'IDAT') - 4
    return content[:at] + chunk(b'tRNS', struct.pack('>H', value)) + content[at:]

def test_a_transparent_colour_at_other_depths_is_refused(tmp_path):
    ramp = Image.fromarray(np.arange(32*32, dtype=np.uint16).reshape(32, 32))
    out = io.BytesIO()
    ramp.save(out, 'PNG')
    (tmp_path/'a.png').write_bytes(with_transparent_colour(out.getvalue(), 5))
    with pytest.raises(ValueError, match=r'a\.png.*transparent.*\b16 bits'): read_image(tmp_path/'a.png')

def test_grey_values_whose_scale_cannot_be_told_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), 200, dtype=np.int32)).save(tmp_path/'int32.tif')
    Image.fromarray(np.full((32, 32), 200, dtype=np.uint16)).save(tmp_path/'white_is_0.tif', tiffinfo={262: 0})
    for name in 'int32.tif', 'white_is_0.tif':
        with pytest.raises(ValueError, match=rf'{re.escape(name)}.*\b32 bits.*white'): read_image(tmp_path/name)

@pytest.mark.parametrize('make, error', [(lambda p: p.mkdir(), ValueError), (lambda p: os.mkfifo(p), ValueError), (lambda p: p.symlink_to('/dev/zero'), ValueError),
                                        (lambda p: p.symlink_to(p), FileNotFoundError)], ids=['folder', 'pipe', 'device', 'loop'])
def test_what_is_no_file_is_refused(tmp_path, make, error):
    make(tmp_path/'a.png')
    with pytest.raises(error, match=r'a\.png.*regular' if error is ValueError else r'a\.png'):
        read_image(tmp_path/'a.png')

@pytest.mark.parametrize('name', ['a\nb.png', 'a\rb.png', 'a\x1b[31mb.png', 'a\0b.png'])
def test_a_name_that_cannot_be_printed_is_refused(photo, tmp_path, name):
    if '\0' not in name: photo.save(tmp_path/name)
    with pytest.raises(ValueError, match=r'a\\\S*b\.png.*name') as e:
        read_image(tmp_path/name) # the character is escaped
    assert str(e.value).isprintable()

def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((32, 32), dtype=np.float32)).save(tmp_path/'a.tif')
    with pytest.raises(ValueError, match=r'a\.tif.*floating-point'): read_image(tmp_path/'a.tif')

def test_one_bad_file_among_many_is_reported_and_the_rest_are_predicted(command, finished, photo, tmp_path):
    for i in range(3): photo.save(tmp_path/f'{i}.png')
    (tmp_path/'bad.png').write_bytes(b'no picture')
    done = command('predict', '--model', finished[0], tmp_path/'0.png', tmp_path/'bad.png', tmp_path/'missing.png', tmp_path/'1.png', tmp_path/'2.png')
    assert done.returncode == 1 and [line.split(':')[0][-5:] for line in done.stdout.splitlines()] == ['0.png', '1.png', '2.png']
    assert len(done.stderr.splitlines()) == 2 and 'bad.png' in done.stderr and 'missing.png' in done.stderr

# ---- made to cost time or memory

most = 20_000_000 # bytes of the pictures below; limits are counts of parts, so more takes as long

def many(part): return part*(most//len(part))

def segment(marker, content): return bytes([0xff, marker]) + struct.pack('>H', len(content) + 2) + content

def tiff(entries, n_bytes, head=b'II*\0'): # entries of (tag, type, count, value)
    order = '>' if head.startswith(b'MM') else '<'
    def packed(kind, count, value): return struct.pack(order + 'I', value) if kind == 4 or count > 1 else struct.pack(order + 'HH', value, 0)
    directory = b''.join(struct.pack(order + 'HHI', tag, *of) + packed(*of, value) for tag, *of, value in entries)
    return head + struct.pack(order + 'IH', 8, len(entries)) + directory + bytes(n_bytes)

def exif(n): # entries that share their values
    return b'MM\0\x2a\0\0\0\x08' + struct.pack('>HHHII', n + 1, 0x112, 3, 1, 6 << 16) + b''.join(struct.pack('>HHII', 1000 + i, 7, 30_000, 8) for i in range(n))

rows, strips = zlib.compress(bytes(97*32)), [(256, 4, 1, 5000), (257, 4, 1, 5000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 2_000_000, 1000), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 2_000_000, 1000)]

def between_header_and_pixels(part): return png(32, 32)[:33] + part + chunk(b'IDAT', rows) + chunk(b'IEND', b'')

def behind_pixels(part): return between_header_and_pixels(b'')[:-12] + part + chunk(b'IEND', b'')

costly = {
    'PNG, empty texts': lambda jpg, gif: between_header_and_pixels(many(chunk(b'tEXt', b''))),
    'PNG, empty texts behind its pixels': lambda jpg, gif: behind_pixels(many(chunk(b'tEXt', b''))),
    'PNG, unknown chunks': lambda jpg, gif: between_header_and_pixels(many(chunk(b'abCd', b''))),
    'PNG, empty pixels': lambda jpg, gif: between_header_and_pixels(many(chunk(b'IDAT', b''))),
    'PNG, packed profiles': lambda jpg, gif: between_header_and_pixels(many(chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(2**20), 9)))),
    'PNG, large EXIF': lambda jpg, gif: between_header_and_pixels(chunk(b'eXIf', exif(60_000) + bytes(10_000_000))),
    'JPEG, padding': lambda jpg, gif: jpg[:2] + b'\xff'*most + jpg[2:],
    'JPEG, comments': lambda jpg, gif: jpg[:2] + many(segment(0xfe, b'')) + jpg[2:],
    'JPEG, EXIF that is joined': lambda jpg, gif: jpg[:2] + many(segment(0xe1, b'Exif\0\0' + bytes(10_000))) + jpg[2:],
    'JPEG, tables': lambda jpg, gif: jpg[:2] + many(segment(0xdb, bytes(65)*1000)) + jpg[2:],
    'GIF, extensions': lambda jpg, gif: gif[:-1] + many(b'\x21\x01\0') + b';',
    'GIF, blocks of a byte': lambda jpg, gif: gif[:-1] + b'\x21\xfe' + many(b'\1a') + b'\0;',
    'TIFF, strips': lambda jpg, gif: tiff(strips, most),
    **{f'TIFF, strips behind the header {head}': lambda jpg, gif, head=head: tiff(strips, most, head)
       for head in (b'MM\0*', b'MM*\0', b'II\0*', b'MM\0+')},
    'TIFF, values that are shared': lambda jpg, gif: tiff(strips[:5] + [(1000 + i, 7, most - 2_000_000, 1_000_000) for i in range(60_000)], most),
    'BMP, runs of nothing': lambda jpg, gif: b'BM' + struct.pack('<IHHIIiiHHIIiiII', most, 0, 0, 1078, 40, 5000, 5000, 1, 8, 1, most, 0, 0, 256, 256) + bytes(1024) + b'\1\0'*(most//2)}

def saved(img, kind, **options):
    file = io.BytesIO()
    img.save(file, kind, **options)
    return file.getvalue()

@pytest.mark.parametrize('name', costly)
def test_a_picture_of_very_many_parts_is_refused(name, photo, tmp_path, grown):
    content = costly[name](saved(photo, 'JPEG'), saved(photo.convert('P'), 'GIF'))
    (tmp_path/'a.png').write_bytes(content)
    with pytest.raises(ValueError, match=r'a\.png.*(parts|EXIF)'): read_image(tmp_path/'a.png')
    assert grown() < 400_000_000

@pytest.mark.parametrize('end', [b'', b'\0'])
def test_padding_at_the_end_of_a_jpeg_is_gone_over_once(end, photo, tmp_path, grown):
    (tmp_path/'a.jpg').write_bytes(saved(photo, 'JPEG')[:-2] + b'\xff'*most + end)
    with hang_guard():
        try: assert read_image(tmp_path/'a.jpg').shape == (32, 32, 3)
        except ValueError as e: assert 'a.jpg' in str(e)
    assert grown() < 400_000_000

def test_a_long_comment_in_a_gif_costs_nothing(photo, tmp_path):
    (tmp_path/'a.gif').write_bytes(saved(photo.convert('P'), 'GIF')[:-1] + b'\x21\xfe' + many(b'\xff' + b'a'*255) + b'\0;')
    assert read_image(tmp_path/'a.gif').shape == (32, 32, 3)

def test_exif_data_that_share_their_values_are_read_and_turn_the_picture(photo, tmp_path, grown):
    photo.save(tmp_path/'a.png', exif=exif(2800))
    assert close(read_image(tmp_path/'a.png'), as_network_takes_it(photo.transpose(Image.Transpose.ROTATE_270)), 1)
    assert grown() < 400_000_000

@pytest.mark.parametrize('kind', ['PNG', 'JPEG', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('GIF', 'BMP', 'TIFF'))])
def test_a_large_noisy_picture_is_read(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3500, 3500), dtype=np.uint8)
    (tmp_path/'a').write_bytes(saved(Image.fromarray(pixels).convert('RGB' if kind != 'GIF' else 'L'), kind))
    assert read_image(tmp_path/'a').shape == (32, 32, 3)

def test_an_image_of_a_data_set_of_very_many_parts_is_refused(folder):
    (folder/'train'/'cat'/'0000.png').write_bytes(behind_pixels(many(chunk(b'tEXt', b''))))
    with pytest.raises(ValueError, match=r'cat/0000\.png'): read_images(folder)

def packed(content, level=1):
    pack = zlib.compressobj(level, wbits=31)
    return pack.compress(content) + pack.flush()

def header(kind, content=b'', size=None):
    info = tarfile.TarInfo('cifar10/x')
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)

costly_archives = {
    'a long name in gzip': lambda: b'\x1f\x8b\x08\x08' + bytes(5) + b'\xff' + b'a'*100_000_000, 'empty gzip files': lambda: packed(b'')*3_000_000,
    'empty blocks': lambda: b'\x1f\x8b\x08' + bytes(6) + b'\xff' + b'\0\0\0\xff\xff'*20_000_000,
    'global headers': lambda: header(tarfile.XGLTYPE, b'6 a=b\n'*100)*50_000, 'empty members': lambda: header(tarfile.REGTYPE)*200_000,
    'a long name': lambda: header(tarfile.GNUTYPE_LONGNAME, b'a'*50_000_000), 'less than nothing': lambda: header(tarfile.REGTYPE, size=-512)}

@pytest.mark.parametrize('name', costly_archives)
def test_an_archive_of_very_many_parts_is_refused(name, tmp_path, grown):
    (tmp_path/'a.tgz').write_bytes(costly_archives[name]())
    before = grown()
    with pytest.raises(ValueError, match=r'a\.tgz.*\btar\b'): read_images(tmp_path/'a.tgz')
    assert grown() - before < 100_000_000

def test_gzip_files_behind_one_another_are_one(small_archive, tmp_path):
    import gzip
    whole = gzip.decompress(small_archive.read_bytes())
    (tmp_path/'a.tgz').write_bytes(b''.join(packed(whole[i:i + 10_000]) for i in range(0, len(whole), 10_000)) + bytes(1000))
    assert read_images(tmp_path/'a.tgz').fingerprint == read_images(small_archive).fingerprint

@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize('parent', ['', 'x'*90 + '/' + 'y'*60, 'ü'*70 + '/' + 'z'*180])
def test_every_format_of_tar_and_long_names_are_read(format, parent, small_folder, tmp_path):
    if format == tarfile.USTAR_FORMAT and len(parent) > 200: pytest.skip('too long for it')
    with tarfile.open(tmp_path/'a.tar', 'w', format=format) as tar: tar.add(small_folder, Path(parent)/'cifar10')
    assert read_images(tmp_path/'a.tar').fingerprint == read_images(small_folder).fingerprint

# ---- other things than files, and names

kinds = dict(pipe=os.mkfifo, device=lambda p: p.symlink_to('/dev/zero'))

@pytest.mark.parametrize('kind', kinds)
def test_what_is_no_regular_file_is_no_data_set_and_no_part_of_one(kind, folder, tmp_path):
    kinds[kind](tmp_path/'a.tgz')
    with pytest.raises(ValueError, match=r'a\.tgz.*regular'): load_cifar10(tmp_path/'a.tgz')
    kinds[kind](folder/'train'/'cat'/'x.png')
    with pytest.raises(ValueError, match=r'x\.png.*regular'): load_cifar10(folder)

def test_a_file_that_the_kernel_makes_is_no_archive():
    if not Path('/proc/self/status').exists(): pytest.skip('no /proc')
    with pytest.raises(ValueError, match='/proc/self/status.*empty'): read_images('/proc/self/status')

def test_links_that_go_round_are_not_followed(folder):
    (folder/'train'/'again').symlink_to(folder)
    (folder/'train'/'itself').symlink_to(folder/'train'/'itself')
    assert len(read_images(folder).train_y) == 80

@pytest.mark.parametrize('name', ['~nobody-of-this-name/a', 'a\0b', 'a'*5000, '\ud800', 'file/below', 'loop', 'a\x1b[31m'])
def test_a_strange_name_is_refused_in_a_sentence(name, tmp_path):
    (tmp_path/'file').write_bytes(b'')
    (tmp_path/'loop').symlink_to('loop')
    for read in (load_cifar10, read_image):
        with pytest.raises((ValueError, OSError)) as e: read(name)
        assert str(e.value).isprintable()

@pytest.mark.parametrize('extra', ['', '.onnx'])
def test_a_command_refuses_other_things_than_files_at_once(extra, photo, tmp_path):
    os.mkfifo(tmp_path/f'pipe{extra}')
    photo.save(tmp_path/'a.png')
    for command, args in [(cifar_predict, ['--model', f'pipe{extra}', 'a.png']), (cifar_train, ['--data', f'pipe{extra}']),
                          (cifar_train, ['--data', '~nobody-of-this-name']), (cifar_predict, ['--model', '~nobody-of-this-name/a.onnx', 'a.png'])]:
        with pytest.raises(SystemExit) as e: command(args)
        assert str(e.value.code).startswith(f'{command.__name__}: ') and '\n' not in e.value.code

def test_a_name_does_not_reach_the_terminal_as_it_is(photo, tmp_path, capsys):
    names = ['umlaut-äöü-图.png', 'bidi-\u202egnp.png', 'isolate-\u2067.png']
    for name in names: photo.save(tmp_path/name)
    with pytest.raises(SystemExit): cifar_predict([*names, 'esc-\x1b[31m.png', 'c1-\x9b31m.png', 'missing-\u202e.png'])
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())
    assert [line.split(':')[0] for line in said.out.splitlines()] == [names[0], 'bidi-\\u202egnp.png', 'isolate-\\u2067.png'] and len(said.err.splitlines()) == 3

def test_many_pictures_are_predicted_in_order_as_one_at_a_time(small, tmp_path, capsys):
    names = []
    for i in range(300): # more than a batch
        names.append(f'{i}.png')
        if i % 100 == 50: Path(names[-1]).write_bytes(b'no picture')
        else: Image.fromarray(small.train_x[i % 80]).save(names[-1])
    with pytest.raises(SystemExit) as e: cifar_predict(names)
    said = capsys.readouterr()
    good = [name for i, name in enumerate(names) if i % 100 != 50]
    assert e.value.code == 1 and [line.split(':')[0] for line in said.out.splitlines()] == good
    assert [re.findall(r'\d+\.png', line) for line in said.err.splitlines()] == [['50.png'], ['150.png'], ['250.png']]
    for name in good[:3] + good[-3:]: cifar_predict([name])
    assert capsys.readouterr().out.splitlines() == said.out.splitlines()[:3] + said.out.splitlines()[-3:]

# ---- mutated

def with_crcs(png):
    "The chunks of a PNG with the checksums that they ought to have, so that a decoder looks at them"
    at = 8
    while at + 12 <= len(png):
        n = struct.unpack('>I', png[at:at + 4])[0]
        if at + 12 + n > len(png): break
        png = png[:at + 8 + n] + struct.pack('>I', zlib.crc32(png[at + 4:at + 8 + n])) + png[at + 12 + n:]
        at += 12 + n
    return png

def with_checksums(tar):
    "The headers of an archive with the checksums that they ought to have"
    at = 0
    while at + 512 <= len(tar) and any(tar[at:at + 512]):
        header = tar[at:at + 148] + b' '*8 + tar[at + 156:at + 512]
        tar = tar[:at] + header[:148] + b'%06o\0 ' % sum(header) + header[156:] + tar[at + 512:]
        try: at += 512 + (int(header[124:136].strip(b' \0') or b'0', 8) + 511)//512*512
        except ValueError: break
    return tar

edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(['byte', 'bit', 'cut', 'double', 'drop', 'zeros', 'ones']), st.integers(0, 255), st.integers(1, 64)), min_size=1, max_size=6)

def mutated(content, edits):
    for where, kind, value, n in edits:
        i = int(where*len(content))
        if kind == 'byte': content = content[:i] + bytes([value]) + content[i + 1:]
        elif kind == 'bit' and i < len(content): content = content[:i] + bytes([content[i] ^ (1 << value % 8)]) + content[i + 1:]
        elif kind == 'cut': content = content[:i]
        elif kind == 'double': content = content[:i + n] + content[i:]
        elif kind == 'drop': content = content[:i] + content[i + n:]
        else: content = content[:i] + (b'\0' if kind == 'zeros' else b'\xff')*n + content[i + n:]
    return content

@pytest.fixture(scope='module')
def pictures(photo):
    "The same picture in many formats, as bytes"
    kinds = [(photo, 'PNG', {}), (photo.convert('P'), 'PNG', dict(transparency=3)), (photo.convert('LA'), 'PNG', {}), (photo, 'JPEG', {}),
             (photo.convert('CMYK'), 'JPEG', {}), (photo, 'JPEG', dict(progressive=True)), (photo.convert('P'), 'GIF', {}), (photo, 'WEBP', {}),
             (photo, 'TIFF', {}), (photo, 'TIFF', dict(compression='tiff_lzw')), (photo, 'BMP', {}), (photo, 'ICO', {}), (photo, 'PPM', {}),
             (photo, 'TGA', {}), (photo, 'PCX', {}), (photo, 'GIF', dict(save_all=True, append_images=[ImageOps.flip(photo)]))]
    return [saved(img, kind, **options) for img, kind, options in kinds]

def read_mutated(folder, examples):
    "Read mutated versions of the files in a folder; print how many were read and refused, the longest time and the most memory of one"
    pictures, file = [p.read_bytes() for p in sorted(Path(folder).iterdir())], Path(folder)/'a.png'
    counts, slowest, most = [0, 0], [0.], [0]

    @settings(max_examples=int(examples), deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(range(len(pictures))), edits, st.booleans())
    def check(i, edits, mended):
        content = mutated(pictures[i], edits)
        file.write_bytes(with_crcs(content) if mended and content.startswith(b'\x89PNG') else content)
        start, before = time.perf_counter(), count_peak_anew() # for each of them: Hypothesis itself keeps more and more
        try:
            with hang_guard(): out = read_image(file)
            assert out.shape == (32, 32, 3) and out.dtype == np.uint8
            counts[0] += 1
        except ValueError as e:
            assert str(file) in str(e) and '\n' not in str(e)
            counts[1] += 1
        slowest[0], most[0] = max(slowest[0], time.perf_counter() - start), max(most[0], peak_memory() - before)
    check()
    print(json.dumps(dict(counts=counts, slowest=slowest[0], most=most[0])))

@pytest.mark.parametrize('examples', [quick, long])
def test_a_mutated_picture_is_read_or_refused(pictures, tmp_path, figures, grown, examples):
    "In a process of its own, whose memory nothing else changes"
    for i, content in enumerate(pictures): (tmp_path/f'{i:02}').write_bytes(content)
    with forked.Forked(read_mutated, tmp_path, examples) as process:
        out, err = process.communicate(1800)
        assert process.returncode == 0, err
    done = json.loads(out.splitlines()[-1])
    counts = done['counts']
    assert min(counts) > examples//50, counts # both happen
    assert done['most'] < 100_000_000 # bytes for one of them: a picture of the most pixels has 75 MB
    figures('pictures', tried=sum(counts), read=counts[0], refused=counts[1], slowest=done['slowest'], grown=done['most'])

@pytest.mark.parametrize('examples', [100, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('layout', ['pngs', 'batches'])
def test_a_mutated_archive_is_read_or_refused(small, write_pngs, write_batches, pack, tmp_path_factory, figures, grown, examples, layout):
    folder = tmp_path_factory.mktemp('fuzz')
    few = small._replace(train_x=small.train_x[::8], train_y=small.train_y[::8], test_x=small.test_x[::4], test_y=small.test_y[::4])
    whole = pack((write_pngs if layout == 'pngs' else write_batches)(few, folder/'cifar10'), folder/'whole.tar').read_bytes()
    file, counts, slowest = folder/'a.tar', [0, 0], [0.]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(edits, st.booleans())
    def check(edits, mended):
        file.write_bytes((with_checksums if mended else bytes)(mutated(whole, edits)))
        start = time.perf_counter()
        try:
            with hang_guard(): data = read_images(file)
            assert data.train_x.shape[1:] == (32, 32, 3) and data.train_x.dtype == np.uint8 and set(data.train_y) <= set(range(10))
            counts[0] += 1
        except ValueError as e:
            assert '\n' not in str(e)
            counts[1] += 1
        slowest[0] = max(slowest[0], time.perf_counter() - start)
    check()
    assert counts[1] > examples//50, counts
    assert grown() < 500_000_000 # bytes
    figures(f'archives of {layout}', tried=sum(counts), read=counts[0], refused=counts[1], slowest=slowest[0], grown=grown())

# ---- bounds

def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    (tmp_path/'a.tgz').write_bytes(packed(header(tarfile.REGTYPE, bytes(60_000_000)))*7)
    with pytest.raises(ValueError, match=r'a\.tgz.*419,430,400'): read_images(tmp_path/'a.tgz') # 400 MiB

def test_an_archive_of_too_many_files_is_refused(tmp_path):
    (tmp_path/'a.tgz').write_bytes(packed(header(tarfile.REGTYPE)*70_001))
    with pytest.raises(ValueError, match=r'a\.tgz.*70,000 files'): read_images(tmp_path/'a.tgz')

@pytest.mark.parametrize('make', [os.mkdir, os.mknod], ids=['folders', 'files'])
def test_a_folder_of_too_many_files_or_folders_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr('cifar_fastai.data.archive.max_files', 100)
    for i in range(101): make(tmp_path/f'{i}')
    with pytest.raises(ValueError, match=rf'{re.escape(str(tmp_path))}\b.*\b100 files'): read_images(tmp_path)

def test_a_file_that_is_too_large_is_refused_unread(folder, grown):
    with open(folder/'train'/'cat'/'0000.png', 'wb') as f: f.truncate(2**26 + 1) # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r'cat/0000\.png.*67,108,865.*67,108,864'): read_images(folder)
    assert grown() < 50_000_000

def test_a_file_with_holes_in_an_archive_is_refused(tmp_path):
    info = tarfile.TarInfo('cifar10/train/cat/0000.png')
    info.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.map': '0,4,60000000,4', 'GNU.sparse.size': '60000004'}
    info.size = 8
    with tarfile.open(tmp_path/'a.tar', 'w', format=tarfile.PAX_FORMAT) as tar: tar.addfile(info, io.BytesIO(b'12345678'))
    with pytest.raises(ValueError, match=r'a\.tar.*\btar\b.*holes'): read_images(tmp_path/'a.tar')

def test_long_headers_in_an_archive_are_refused(tmp_path):
    info = tarfile.TarInfo('cifar10/a')
    info.pax_headers = {'comment': '1'*1_000_000}
    with tarfile.open(tmp_path/'a.tar', 'w', format=tarfile.PAX_FORMAT) as tar: tar.addfile(info)
    with pytest.raises(ValueError, match=r'a\.tar.*1,000,017.*65,536'): read_images(tmp_path/'a.tar')

def test_headers_behind_headers_are_refused(tmp_path):
    info = tarfile.TarInfo('././@LongLink')
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4
    (tmp_path/'a.tar').write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b'name'.ljust(512, b'\0'))*3000 + bytes(1024))
    with pytest.raises(ValueError, match=r'a\.tar.*\btar\b.*headers') as e: read_images(tmp_path/'a.tar')
    assert '\n' not in str(e.value)

def test_a_damaged_chunk_behind_the_pixels_is_refused(small_folder, tmp_path):
    import shutil
    folder = shutil.copytree(small_folder, tmp_path/'cifar10')
    file = next((folder/'train').rglob('*.png'))
    content = file.read_bytes()
    file.write_bytes(content[:-12] + chunk(b'iCCP', b'a') + content[-12:])
    with pytest.raises(ValueError, match=rf'{file.parent.name}/{re.escape(file.name)}'): read_images(folder)

# ---- pickles that are programs

def batch_of(**changes): return pickle.dumps({b'data': np.zeros((2, 3072), dtype=np.uint8), b'labels': [1, 2], **{name.encode(): value for name, value in changes.items()}}, protocol=2)

@pytest.fixture
def read_batch(small, write_batches, tmp_path):
    "Read the small images with `content` as their first batch"
    folder = write_batches(small, tmp_path/'cifar')
    def read(content):
        (folder/'data_batch_1').write_bytes(content)
        return read_images(folder)
    return read

def test_a_batch_that_is_none_of_these_is_read(read_batch):
    data = read_batch(batch_of())
    assert data.train_y[(data.train_x == 0).all(axis=(1, 2, 3))].tolist() in ([1, 2], [2, 1])

def test_an_array_in_the_order_of_fortran_is_read_right(read_batch):
    x = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    data = read_batch(batch_of(data=np.asfortranarray(x)))
    assert data.fingerprint == read_batch(batch_of(data=x)).fingerprint
    for row, label in zip(x, (1, 2)):
        is_row = (data.train_x.transpose(0, 3, 1, 2).reshape(-1, 3072) == row).all(axis=1)
        assert data.train_y[is_row].tolist() == [label]

@pytest.mark.parametrize('content, word', [
    (pickle.dumps(frozenset([frozenset()])), 'FROZENSET'), (b'\x80\x02}(' + b''.join(pickle.dumps(k*(2**61 - 1), protocol=2)[2:-1] + b'K\0' for k in range(5, 50_000)) + b'u.', 'LONG1'),
    (b'\x80\x04' + b'\x8f'*3_000_000 + b'.', 'EMPTY_SET'), (b'\x80\x02' + b']'*3_000_000 + b'.', '200,000'),
    (b'\x80\x02}(' + b'K\x01K\x02u.', 'key'), (pickle.dumps({(1, 2): 3, (2, 3): 4}), 'key'),
    (b'\x80\x02c_codecs\nencode\nq\x00X' + struct.pack('<I', 100_000) + b'a'*100_000 + b'q\x01X\x06\0\0\0latin1q\x020' + b'h\x00h\x01h\x02\x86R'*50 + b'.', 'POP'),
    (b'\x80\x02]c_codecs\nencode\nq\x00X' + struct.pack('<I', 100_000) + b'a'*100_000 + b'q\x01X\x06\0\0\0latin1q\x02' + b'h\x00h\x01h\x02\x86R'*50 + b'.', 'text'),
    (batch_of(labels=[1, True]), 'labels'), (batch_of(labels=[1, 10]), 'labels'), (batch_of(data=np.zeros((2, 3072), dtype=np.int8)), 'data'),
    (batch_of(data=[1]), ''), (batch_of(data=np.zeros((3, 3072), dtype=np.uint8)), 'data'), (pickle.dumps(3), ''), (b'', '')],
    ids=['sets in sets', 'numbers of one hash', 'many sets', 'many lists', 'number as a key', 'tuple as a key', 'pop', 'encode again', 'bool label', 'label 10', 'signed', 'list', 'three', 'number', 'nothing'])
def test_a_pickle_that_is_another_program_is_refused(content, word, grown, read_batch):
    content = content.replace(b'numpy._core', b'numpy.core')
    with hang_guard(), pytest.raises(ValueError, match=rf'data_batch_1\b.*\b{word}') as e: read_batch(content)
    assert '\n' not in str(e.value) and grown() < 100_000_000

def test_links_in_an_archive_are_not_followed(tmp_path, small_folder):
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo('cifar10/train/cat/0000.png')
            info.type, info.linkname = kind, '/etc/passwd'
            tar.addfile(info)
    with pytest.raises(ValueError, match=r'cat/0000\.png.*link'): read_images(tmp_path/'a.tar')

def test_a_file_that_is_twice_in_an_archive_is_refused(tmp_path, small_folder):
    "As `tar --append` and `tar --update` leave it"
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        for _ in range(2): tar.add(small_folder, 'cifar10')
    with pytest.raises(ValueError, match=r'\.png.*twice'): read_images(tmp_path/'a.tar')

def test_headers_that_macos_writes_are_read(tmp_path, small_folder):
    with tarfile.open(tmp_path/'a.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(small_folder.rglob('*.png')):
            info = tar.gettarinfo(file, str(file.relative_to(small_folder)))
            info.pax_headers = {'SCHILY.xattr.com.apple.metadata:kMDItemWhereFroms': 'https://example.com/'*200}
            with open(file, 'rb') as f: tar.addfile(info, f)
    assert read_images(tmp_path/'a.tar').fingerprint == read_images(small_folder).fingerprint

def test_hidden_folders_are_left_out_and_names_in_capitals_are_not(folder):
    want, cats = read_images(folder).fingerprint, folder/'train'/'cat'
    cat = next(cats.glob('*.png'))
    (folder/'train'/'.ipynb_checkpoints').mkdir()
    (folder/'train'/'.ipynb_checkpoints'/'cat-checkpoint.png').write_bytes(cat.read_bytes())
    cat.rename(cat.with_suffix('.PNG'))
    assert read_images(folder).fingerprint == want

def test_more_images_than_cifar10_has_are_refused(folder):
    "As when a folder has both layouts of it"
    n = 10_001
    batch = {b'data': np.zeros((n, 3072), dtype=np.uint8), b'labels': [i % 10 for i in range(n)]}
    (folder/'test_batch').write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match='10,0[0-9]+ test.*10,000'): read_images(folder)

@pytest.mark.parametrize('mode', ['I', 'I;16'])
def test_8_bits_in_a_mode_of_more_are_not_taken_for_black(photo, mode):
    with pytest.raises(ValueError, match='256'): NetworkImage.create(photo.convert('L').convert(mode))

@pytest.mark.parametrize('shape', [(40, 40), (40, 40, 3), (40, 40, 4)])
@pytest.mark.parametrize('kind', [np.asarray, torch.from_numpy])
def test_8_bits_in_an_array_of_16_are_not_taken_for_black(shape, kind):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint16)
    with pytest.raises(ValueError, match='256.*uint8'): NetworkImage.create(kind(pixels))
    assert np.array_equal(NetworkImage.create(kind(pixels << 8)), NetworkImage.create(pixels.astype(np.uint8)))
    if shape[2:] != (4,): assert not np.asarray(NetworkImage.create(kind(pixels*0))).any() # black is black
