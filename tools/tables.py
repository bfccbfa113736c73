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


own_runs = [('this package', '24-epochs-item', "bounds found; `recipe='baseline'`, `pipeline='item'`", '24-epochs-item'), ('this package', '24-epochs', "bounds found; `recipe='baseline'`, `pipeline='batch'`", '24-epochs'),
            ('**this package**', 'best', "LRMAX found, LRMIN 2.5e-5; `recipe='best'`: label smoothing, flips that alternate, batch statistics of 32 images, logits × 1/8, whitened first layer, weight decay 0.25", 'best-found-end')]


def runs(root=root):
    "The projects that did the assignment by hand, and the recorded runs of this package"
    rows = [[f"[{p['project']}]({p['source']})" if p['source'] else p['project'], p['shows'], f"{p['parameters']:,}", p['epochs'], f"{p['accuracy']:.2f} %",
             p['over_90_from'] or 'not logged', p['time']] for p in json.loads((root/'benchmarks/projects.json').read_text(encoding='utf-8'))]
    for name, folder, shows, timed in own_runs: # `timed`: the run of as many steps whose seconds are shown, where this one was paused
        summary, clock = (json.loads((root/'benchmarks/runs'/run/'summary.json').read_text(encoding='utf-8')) for run in (folder, timed))
        accuracy, flipped = f"**{summary['accuracy']:.2%}**", summary.get('flip_averaged_accuracy')
        if flipped: accuracy += f'; {flipped:.2%} averaged with mirror images'
        rows.append([name, shows, f"{summary['n_params']:,}", summary['epochs'], accuracy.replace('%', ' %'),
                     stays_over(curve(root/'benchmarks/runs'/folder/'history.csv', scale=100)),
                     f"{clock['seconds']:,.0f} s with a validation each epoch{', by another run of as many steps' if timed != folder else ''}; {machine(clock)}, {clock['precision']}"])
    return table(['project', 'what it shows', 'parameters', 'epochs', 'test accuracy after the last', 'over 90 % from epoch', 'time and machine'], rows)


cases = dict(plain="the projects' way: PyTorch loop, albumentations in a `DataLoader`, fp32", fastai='fastai as it comes: item transforms, its Adam, fp32',
             package="**this package**, recipe `seed`", bare='a loop without a `Learner`, the same batches, precision and optimizer', limit='forward, backward and step on one batch: the limit')


def mean(values): return sum(values)/len(values)


def ratio(rates, reference): # turn by turn, as `cifar_fastai.bench.ratio` has it
    of_turns = [r/q for r, q in zip(rates, reference)]
    return f'{mean(rates)/mean(reference):.2f} ({min(of_turns):.2f} to {max(of_turns):.2f})'


def bench(root=root): # one table for each machine of benchmarks/bench
    "How fast each way of training is, from the recorded benchmarks"
    parts = []
    for file in sorted((root/'benchmarks/bench').glob('*.json')):
        result = json.loads(file.read_text(encoding='utf-8'))
        rates = {name: case['images_per_second'] for name, case in result['cases'].items()}
        against = [(label, rates[key]) for label, key in (("× the projects' way", 'plain'), ('× the limit', 'limit')) if key in rates]
        gpu = any(case.get('gpu_memory') for case in result['cases'].values())
        rows = [[cases[name], f'{mean(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})', f'{result["n_images"]/mean(r):,.0f}', f'{result["cases"][name]["memory"]/2**30:.2f}',
                 *([f'{result["cases"][name]["gpu_memory"]/2**30:.2f}'] if gpu else []), *(ratio(r, reference) for _, reference in against)] for name, r in rates.items()]
        s = result['settings']
        parts.append(f"{machine(result)}, {s['bs']} images a batch; the first two cases in fp32, the others in {result['precision']}. {s['repeats']} turns of {s['steps']} steps each, in brackets their extremes; "
                     "epochs without validation, memory of the main process without workers.\n\n"
                     + table(['case', 'images/s', 's an epoch', 'peak memory, GiB', *(['of the GPU, GiB'] if gpu else []), *(label for label, _ in against)], rows))
    return '\n\n'.join(parts)


tables = dict(runs=runs, bench=bench)
