"""How fast a folder of JPEG files is read, compared with Pillow alone on all cores:

    python tools/decoding.py [N [--turns TURNS] [--out OUT.json]]

Writes N files of 256×256 pixels, which are crops of scikit-learn's two photographs, to a temporary folder. `read_folder`
reads them at 32×32, and so do two programs of Pillow and NumPy alone: a pool of threads and a pool of processes, one per
core, each with `Image.open(file).convert('RGB').resize((32, 32))`. All make the same pixels, which is checked. Each
measurement is a process of its own, and they take turns. The ratio of a turn is that of `read_folder` to the faster of
the two pools. Imports are not measured; the pools are."""
import argparse, json, os, subprocess, sys, tempfile, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

names = 'read_folder', 'threads', 'processes'


def write_pictures(folder, n):
    from sklearn.datasets import load_sample_images
    rng, photos = np.random.default_rng(0), load_sample_images().images
    for i in range(n):
        photo, file = photos[i % 2], folder/'ab'[i % 2]/f'{i:06}.jpg'
        file.parent.mkdir(exist_ok=True)
        top, left = (rng.integers(side - 256) for side in photo.shape[:2])
        Image.fromarray(photo[top:top + 256, left:left + 256]).save(file, quality=90)


def read_block(files): return np.stack([np.asarray(Image.open(file).convert('RGB').resize((32, 32))) for file in files])


def n_cores(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def read_with(pool, folder):
    files = sorted(folder.glob('*/*.jpg'))
    blocks = [files[i:i + 32] for i in range(0, len(files), 32)]
    with pool(n_cores()) as workers: return np.concatenate(list(workers.map(read_block, blocks)))


def reader(name): # -> function: folder -> arrays of images
    pools = dict(threads=ThreadPoolExecutor, processes=ProcessPoolExecutor)
    if name in pools: return lambda folder: [read_with(pools[name], folder)]
    from cifar_fastai.data.folder import read_folder
    def read(folder):
        data = read_folder(folder, size=32, show_progress=False)
        return [data.train_x, data.test_x]
    return read


def memory(name): # bytes, from a line of Linux's /proc/self/status; None elsewhere
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return next(1024*int(line.split()[1]) for line in lines if line.startswith(name))


def measure(name, folder): # in a process of its own -> dict
    read = reader(name) # imports what it needs
    try: Path('/proc/self/clear_refs').write_text('5') # the peak begins anew
    except OSError: pass
    before, start = memory('VmRSS'), time.perf_counter()
    arrays = read(folder)
    seconds, peak = time.perf_counter() - start, memory('VmHWM')
    of_result = sum(x.nbytes for x in arrays)
    beyond = None if peak is None else peak - before - of_result # of this process, without others of a pool
    digest = sha256(b''.join(sorted(img.tobytes() for x in arrays for img in x))).hexdigest()
    return dict(seconds=seconds, memory=beyond, pixels=digest)


def in_turns(folder, n_turns): # -> {name: measurements, one per turn}
    found = {name: [] for name in names}
    for turn in range(n_turns):
        for name in names[turn % 3:] + names[:turn % 3]:
            command = [sys.executable, '-W', 'ignore', __file__, '--measure', name, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found[name].append(json.loads(done.stdout))
    pixels = {measured['pixels'] for of_name in found.values() for measured in of_name}
    if len(pixels) > 1: sys.exit('the readers made different pixels')
    return found


def summary(found, n, n_bytes): # -> JSON-ready dict
    from cifar_fastai.core import environment
    rates = {name: [n/measured['seconds'] for measured in found[name]] for name in names}
    ratio = [package/max(pools) for package, *pools in zip(*rates.values())]
    beyond = [measured['memory'] for measured in found['read_folder']]
    return dict(n=n, bytes_per_file=n_bytes/n, images_per_second=rates, ratio=ratio, memory_beyond_result=beyond,
                result_bytes=n*32*32*3, cores=n_cores(), environment=environment())


def show(result):
    files = f"{result['n']:,} JPEG files of 256×256 pixels, {result['bytes_per_file']/1000:.1f} kB each"
    print(f"{files}, {result['cores']} cores; images/s")
    print('turn', *(f'{name:>12}' for name in names), '       ratio', '  memory beyond the result, MB')
    turns = zip(*result['images_per_second'].values(), result['ratio'], result['memory_beyond_result'])
    for turn, (*rates, ratio, beyond) in enumerate(turns, 1):
        memory = '' if beyond is None else f'{beyond/1e6:12.1f}'
        print(f'{turn:4}', *(f'{rate:12,.0f}' for rate in rates), f'{ratio:12.3f}', memory)
    print(f"mean ratio {np.mean(result['ratio']):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('n', nargs='?', type=int, default=5000, help='number of files')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--out', help='JSON file to write')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
    if args.n < 4 or args.turns < 1: parser.error('n must be 4 or more, and --turns 1 or more')
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), args.n)
        n_bytes = sum(file.stat().st_size for file in Path(folder).glob('*/*.jpg'))
        result = summary(in_turns(folder, args.turns), args.n, n_bytes)
    show(result)
    if args.out: Path(args.out).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
