"""Tables in Markdown from the recorded files under benchmarks/. Standard library only; tools/readme.py puts them into the notebooks."""
import csv, json
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def table(header, rows):
    lines = [header, ['---']*len(header), *rows]
    return '\n'.join(f"| {' | '.join(map(str, line))} |" for line in lines)


def curve(path, scale=1, **where): # [(epoch, accuracy times `scale`)] of the rows of a CSV file that are so
    with open(path, encoding='utf-8', newline='') as f:
        rows = [row for row in csv.DictReader(f) if all(row[k] == v for k, v in where.items())]
    return [(int(row['epoch']), scale*float(row['accuracy'])) for row in rows]


def stays_over(curve, mark=90): # per cent -> the first epoch from which on every accuracy is over `mark`, or None
    below = [epoch for epoch, accuracy in curve if accuracy <= mark]
    over = [epoch for epoch, _ in curve if epoch > max(below, default=0)]
    return min(over, default=None)


def machine(summary):
    env = summary['environment']
    return summary['device'] if summary['device'] != 'cpu' else f"{env['cores']} cores of {env['processor'].replace('(R)', '')}"


# (project, folder, description, folder of the run whose time is shown)
own_runs = [
    ('this package', '24-epochs-item', "baseline recipe, `pipeline='item'`", '24-epochs-item'),
    ('this package', '24-epochs', "baseline recipe, `pipeline='batch'`", '24-epochs'),
    ('this package', '24-epochs-zen4', "baseline recipe, `pipeline='batch'`", '24-epochs-zen4'),
    ('this package', 'best-version-3', "recipe `'best'`, version 3: LRMIN 2.5e-5, label smoothing, alternating flips, ghost batch normalisation (32 images), "
     "logits × 1/8, whitened first layer, weight decay 0.25", 'best-found-end')]


def runs(root=root):
    "Return the table of the five projects and of the recorded runs of this package"
    rows = [[f"[{p['project']}]({p['source']})" if p['source'] else p['project'], p['shows'], f"{p['parameters']:,}", p['epochs'], f"{p['accuracy']:.2f} %",
             p['over_90_from'] or 'not logged', p['time']] for p in json.loads((root/'benchmarks/projects.json').read_text(encoding='utf-8'))]
    for name, folder, shows, timed in own_runs: # a run that was paused shows the time of another run with the same number of steps
        summary, clock = (json.loads((root/'benchmarks/runs'/run/'summary.json').read_text(encoding='utf-8')) for run in (folder, timed))
        accuracy, flipped = f"**{summary['accuracy']:.2%}**", summary.get('flip_averaged_accuracy')
        if flipped: accuracy += f'; {flipped:.2%} with flip TTA'
        note = ' (timed in another run with the same number of steps)' if timed != folder else ''
        rows.append([name, shows, f"{summary['n_params']:,}", summary['epochs'], accuracy.replace('%', ' %'),
                     stays_over(curve(root/'benchmarks/runs'/folder/'history.csv', scale=100)),
                     f"{clock['seconds']:,.0f} s including validation{note}; {machine(clock)}, {clock['precision']}"])
    return table(['project', 'features', 'parameters', 'epochs', 'final test accuracy', 'above 90 % from epoch', 'time and hardware'], rows)


recipes = dict(
    quick='4 epochs: 20, 24, 28 and 32 pixels; no cutout',
    fast='11 epochs: 20 to 28 pixels in the first six; no cutout',
    baseline='the assignment with nothing added, 24 epochs',
    best='the assignment with everything it leaves open, 24 epochs')


def spread(values): # fractions -> per cent: mean and standard deviation
    middle = mean(values)
    deviation = (sum((v - middle)**2 for v in values)/(len(values) - 1))**.5
    return f'{100*middle:.2f} ± {100*deviation:.2f} %'


# Two cores each: file of `cifar_bench`, and runs with nothing else running
timed_on = {
    'Zen 4': ('2-cores-zen4.json', dict(quick='quick-2-cores', fast='fast-holdout')),
    'Zen 5': ('2-cores-zen5.json', dict(quick='quick-zen5'))}


def training_time(name, settings, file, timed_runs, root): # of a recorded run, or computed from the throughput at each size of the images
    timed = json.loads((root/'benchmarks/bench'/file).read_text(encoding='utf-8'))
    if name in timed_runs:
        run = json.loads((root/f'benchmarks/runs/{timed_runs[name]}/summary.json').read_text(encoding='utf-8'))
        part = ' for 45,000 of the images'*(run['settings']['valid'] == 'holdout')
        return f"{run['seconds']/60:.0f} min{part}"
    epochs, sizes, rates = settings['epochs'], settings['sizes'] or [32], timed['image_sizes']
    of_epochs = [sizes[-(-(epoch + 1)*len(sizes)//epochs) - 1] for epoch in range(epochs)] # as `ImageSizes.size_of`
    return f"about {sum(50_000/mean(rates[str(size)]['images_per_second']) for size in of_epochs)/60:.0f} min without validation"


def accuracies(root=root): # of several seeds of each recipe, on one GPU
    "Return the table of the recipes"
    record = json.loads((root/'benchmarks/runs/h100/runs.json').read_text(encoding='utf-8'))
    rows = []
    for name, shows in recipes.items():
        recipe = record['recipes'][name]
        plain, flipped = ([run[key] for run in recipe['runs']] for key in ('accuracy', 'flip_averaged_accuracy'))
        rows.append([f'`{name}`', shows, f"{recipe['petaflop']:.2f}", len(plain), spread(plain), f'{100*min(plain):.2f} %', f'**{spread(flipped)}**',
                     *(training_time(name, recipe['settings'], *timed, root) for timed in timed_on.values())])
    return table(['recipe', 'training', 'PFLOP', 'runs', 'test accuracy, mean ± sd', 'lowest', 'with flip TTA, mean ± sd',
                  *(f'time on two {kind} cores' for kind in timed_on)], rows)


cases = dict(
    plain="the projects' approach: PyTorch loop, albumentations in a `DataLoader`, fp32",
    fastai="fastai defaults: item transforms, fastai's Adam, fp32",
    package='**this package**, baseline recipe',
    bare='training loop without `Learner`; same batches, precision and optimizer',
    limit='limit: forward pass, backward pass and optimizer step on one batch')


def mean(values): return sum(values)/len(values)


def ratio(rates, reference): # turn by turn, as `cifar_fastai.bench.ratio` has it
    of_turns = [r/q for r, q in zip(rates, reference)]
    return f'{mean(rates)/mean(reference):.2f} ({min(of_turns):.2f} to {max(of_turns):.2f})'


def processor(result): # name and the extensions that matter for bf16
    cpu = result['environment'].get('cpu')
    if not cpu or result['device'] != 'cpu': return machine(result)
    has = [label for flag, label in dict(avx512_bf16='AVX512-BF16', amx_bf16='AMX').items() if flag in cpu['flags']]
    return f"{machine(result)} (family {cpu['family']}, model {cpu['model']}{''.join(f', {label}' for label in has)})"


def processors(results, operations): # operations of an image in training
    "Return the table that compares the machines"
    rows = []
    for result in results:
        rates = {name: mean(case['images_per_second']) for name, case in result['cases'].items()}
        step, products = rates['package']*operations/1e12, result.get('matrix_products')
        of_limit = f'{step:.2f}' + (f" ({step/products[result['precision']]:.0%})" if products else '')
        limits = [f'{products[kind]:.2f}' if products else 'not measured' for kind in ('fp32', 'bf16')]
        by_turn = ratio(result['cases']['package']['images_per_second'], result['cases']['plain']['images_per_second'])
        rows.append([processor(result), *limits, of_limit, f"{rates['plain']:,.0f}", f"{rates['package']:,.0f}", by_turn])
    return table(['processor', 'matrix product, fp32', 'matrix product, bf16', 'training step (share of the limit)', "the projects' approach, images/s",
                  'this package, images/s', 'ratio'], rows)


def bench(root=root): # all machines of benchmarks/bench side by side, and one table for each
    "Return the tables of the recorded benchmarks"
    read = lambda file: json.loads(file.read_text(encoding='utf-8'))
    results = [read(file) for file in sorted((root/'benchmarks/bench').glob('*.json'))]
    baseline = read(root/'benchmarks/runs/h100/runs.json')['recipes']['baseline']
    parts = [processors(results, 1e15*baseline['petaflop']/(50_000*baseline['settings']['epochs']))]
    for result in results:
        rates = {name: case['images_per_second'] for name, case in result['cases'].items()}
        against = [(label, rates[key]) for label, key in (("× the projects' approach", 'plain'), ('× the limit', 'limit')) if key in rates]
        gpu = any(case.get('gpu_memory') for case in result['cases'].values())
        rows = [[cases[name], f'{mean(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})', f'{result["n_images"]/mean(r):,.0f}', f'{result["cases"][name]["memory"]/2**30:.2f}',
                 *([f'{result["cases"][name]["gpu_memory"]/2**30:.2f}'] if gpu else []), *(ratio(r, reference) for _, reference in against)] for name, r in rates.items()]
        s = result['settings']
        parts.append(f"{processor(result)}, {s['bs']} images per batch; the first two cases in fp32, the others in {result['precision']}. Mean of {s['repeats']} turns of {s['steps']} steps each, minimum and maximum in parentheses. "
                     "Epochs exclude validation; memory is that of the main process, without workers.\n\n"
                     + table(['case', 'images/s', 's per epoch', 'peak memory, GiB', *(['GPU memory, GiB'] if gpu else []), *(label for label, _ in against)], rows))
    return '\n\n'.join(parts)


tables = dict(runs=runs, bench=bench, accuracies=accuracies)
