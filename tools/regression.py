"""Check that a change of the code changes no result, on one machine with one set of library versions:

    python tools/regression.py record values.json [CASE …]
    python tools/regression.py compare values.json [CASE …]

`record` trains short runs with many settings and writes the SHA-256 of their weights and predictions, their summaries,
the outputs of an exported ONNX file and the text of reports. `compare` does the same again and names what differs.
Only commands are used, so that it works whatever modules are called. On two cores it takes about four minutes."""
import difflib, hashlib, html, json, os, re, signal, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

common = ['--data', 'digits', '--width', '16', '--epochs', '2', '--bs', '64', '--device', 'cpu']
rates = ['--lr_min', '1e-4', '--lr_max', '2e-3', '--precision', 'fp32']
short = ['--epochs', '1', '--peak_epoch', '0.3']
baseline = 'baseline'

runs = dict(
    best=rates,
    baseline=['--recipe', baseline, *rates],
    range_test=['--recipe', baseline, '--precision', 'fp32', '--bs', '32', *short],
    bf16=['--lr_min', '1e-4', '--lr_max', '2e-3', '--precision', 'bf16', *short],
    items_best=['--pipeline', 'item', '--num_workers', '0', *rates],
    items_baseline=['--recipe', baseline, '--pipeline', 'item', '--num_workers', '2', *rates],
    group_norm=['--norm', 'group', '--n_groups', '4', *rates, *short],
    layer_norm=['--norm', 'layer', '--whiten', 'False', *rates, *short],
    dropout=['--dropout', '0.1', '--conv_bias', '--ghost', '0', *rates, *short],
    schedule=['--anneal', 'cos', '--peak_epoch', '0.5', '--seed', '7', *rates],
    optimizer=['--betas', '0.8', '0.95', '--eps', '1e-4', '--wd', '0.01', '--label_smoothing', '0', '--flip', 'random', *rates, *short],
    holdout=['--valid', 'holdout', *rates, *short])


def cli(*args, launcher=(), **kwargs): # -> what the command prints
    env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', NO_ALBUMENTATIONS_UPDATE='1')
    start = [sys.executable, *(launcher or ['-m', 'cifar_fastai.cli'])]
    done = subprocess.run([*start, *map(str, args)], env=env, capture_output=True, text=True, **kwargs)
    if done.returncode: raise RuntimeError(f'{args}: {done.stdout}{done.stderr}')
    return done.stdout


def sha256(content): return hashlib.sha256(content).hexdigest()


def values_of(run): # a finished run folder -> dict
    summary = json.loads((run/'summary.json').read_text())
    history = [line.rsplit(',', 1)[0] for line in (run/'history.csv').read_text().splitlines()] # without the seconds
    names = ('accuracy', 'n_wrong', 'flip_averaged_accuracy', 'best_accuracy', 'best_epoch', 'n_params', 'bounds', 'weights_sha256')
    return {**{name: summary[name] for name in names},
            'history': sha256('\n'.join(history).encode()),
            'predictions': sha256((run/'predictions.safetensors').read_bytes())}


def train(folder, name, options, **kwargs): # -> run folder
    cli('train', *common, *options, '--out', folder/name, **kwargs)
    return folder/name


def resumed(folder): # -> values of a run that was killed in the middle of an epoch
    run = folder/'resumed'
    args = ['-m', 'cifar_fastai.cli', 'train', *common, *rates, '--checkpoint_minutes', '0', '--out', str(run)]
    with subprocess.Popen([sys.executable, *args], env=os.environ | dict(OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL) as process:
        while not list(run.glob('checkpoint/00001-000000[2-9]*')):
            if process.poll() is not None: raise RuntimeError('the run ended before it could be killed')
            time.sleep(.02)
        process.send_signal(signal.SIGKILL)
    cli('train', '--resume', run)
    return values_of(run)


def two_processes(folder): # -> values of a run of two
    launcher = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', '2', '--mixed_precision', 'no',
                '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'cifar_fastai.cli']
    return values_of(train(folder, 'two_processes', rates, launcher=launcher))


def onnx(folder): # -> SHA-256 of the outputs for fixed images
    import onnxruntime
    cli('export', folder/'best', '--out', folder/'net.onnx')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder/'net.onnx', options)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    outputs = session.run(None, {session.get_inputs()[0].name: images})
    return dict(outputs=[sha256(o.tobytes()) for o in outputs])


def text_of(page): # -> the lines of a page, without what differs from run to run
    text = re.sub(r'<(style|script|svg).*?</\1>', '', page.read_text(), flags=re.S)
    text = html.unescape(re.sub(r'<[^>]*>', '\n', text))
    lines = [' '.join(line.split()) for line in text.splitlines()]
    varies = re.compile(r'\b(seconds?|minutes?|[0-9.]+ s|h|min|GiB|GB|MiB|MB)\b|/tmp|20\d\d-\d\d-\d\d|--out')
    return [line for line in lines if line and not varies.search(line)]


def reports(folder):
    cli('report', folder/'best', folder/'baseline', '--out', folder/'compare.html')
    return dict(report=text_of(folder/'best'/'report.html'), comparison=text_of(folder/'compare.html'))


others = dict(resumed=resumed, two_processes=two_processes, onnx=onnx, reports=reports)


def measure(names):
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in names or [*runs, *others]:
            result[name] = values_of(train(folder, name, runs[name])) if name in runs else others[name](folder)
            print(name, flush=True)
    return result


def difference(name, before, now): # -> lines; none if they are the same
    if before == now: return []
    if not isinstance(now, list): return [f'{name}: {before} → {now}']
    return [name, *list(difflib.unified_diff(list(map(str, before)), list(map(str, now)), n=0, lineterm=''))[2:]]


def main(what, file, *names):
    file = Path(file)
    if what == 'record':
        file.write_text(json.dumps(measure(names), indent=1, ensure_ascii=False) + '\n')
        return
    recorded = json.loads(file.read_text())
    now = measure(names)
    different = [line for case, values in now.items() for name, value in values.items()
                 for line in difference(f'{case}.{name}', recorded[case][name], value)]
    sys.exit('\n'.join(different) or 0)



if __name__ == '__main__': main(*sys.argv[1:])
