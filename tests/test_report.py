"""The page of a run and the page of several: what they say, that they are one safe file, and how they behave in a browser."""
import base64, hashlib, html, io, re, shlex, shutil
from dataclasses import asdict, fields
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binom

from cifar_fastai.cli import RunSettings
from cifar_fastai.core import TrainSettings, data_variable
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.images import CIFAR10Data
from cifar_fastai.run.folder import read_history
from cifar_fastai.look.interpret import CifarInterpretation
from cifar_fastai.look.page import page_plot, read_run, run_images, run_predictions
from cifar_fastai.look.report import changed_settings, repeat_command, report_page, run_lrs, write_report
from cifar_fastai.look.compare import mcnemar, write_comparison
from cifar_fastai.look.shift import shift_table, write_shift_table
from cifar_fastai.run.train import train, write_range_test

records = Path(__file__).parent.parent/'benchmarks/runs'
evil = '<script>alert(1)</script>', '"><img src=x onerror=alert(2)>', "'; alert(3) //", '{{ 7*7 }}', '&amp;', '</style><b>', 'a\u2028b', '${alert(4)}', '-->', '$x$'

class Page(HTMLParser):
    "Elements of a page in their order: (tag, attributes), and the text of each that is asked for"
    void = {'meta', 'img', 'link', 'br', 'input', 'base', 'path', 'use'}
    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = Path(path).read_text(encoding='utf8')
        self.feed(self.source)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.elements.append((tag, dict(attrs)))
    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'{tag} closes another element'
    def handle_data(self, data): self.texts.append((self.open[-1] if self.open else None, data))
    def all(self, tag, **having): return [attrs for name, attrs in self.elements if name == tag and all(attrs.get(k.replace('_', '-')) == v for k, v in having.items())]
    @property
    def text(self): return ' '.join(' '.join(data for tag, data in self.texts if tag not in ('style', 'script')).split())
    @property
    def gallery(self): return [attrs for attrs in self.all('li') if 'data-pair' in attrs]

@pytest.fixture
def run(finished, tmp_path): # to be changed
    return shutil.copytree(finished[0], tmp_path/'run', ignore=shutil.ignore_patterns('checkpoint', 'plots'))

@pytest.fixture
def change(run):
    "Change what a JSON file of the run holds"
    def changed(name, f):
        content = read_json(run/name)
        f(content)
        write_json(run/name, content)
    return changed

@pytest.fixture(scope='session')
def reported(finished, tmp_path_factory):
    "The page of the finished run, which no test changes"
    return write_report(shutil.copytree(finished[0], tmp_path_factory.mktemp('reported')/'run'))

@pytest.fixture(scope='module')
def recorded_run(tmp_path_factory):
    "A recorded run as the folder that it was"
    def make(name):
        run = shutil.copytree(records/name, tmp_path_factory.mktemp('recorded')/name)
        summary = read_json(run/'summary.json')
        write_json(run/'config.json', {key: summary[key] for key in ('settings', 'bounds', 'data', 'environment')})
        return run
    return make

@pytest.fixture(scope='session')
def few_digits(digits): return digits.first(120, 10)

@pytest.fixture(scope='session')
def compared(finished, settings, few_digits, tmp_path_factory):
    "Three runs, of which the first two were validated on the same images, and their page"
    runs = [tmp_path_factory.mktemp('compared')/name for name in ('first', 'second', 'third')]
    shutil.copytree(finished[0], runs[0])
    train(settings(seed=1, wd=.1, out=str(runs[1])))
    train(settings(data='digits', recipe='baseline', bs=24, ghost=0, valid='holdout', anneal='cos', peak_epoch=1.3, out=str(runs[2])), few_digits)
    return runs, write_comparison(runs, runs[0].parent/'compare.html')

def renamed(run, data, names):
    "The run of `data`, and `data`, with other class names"
    data = CIFAR10Data(*data[:4], list(names))
    config = read_json(run/'config.json')
    config['data']['vocab'] = list(names)
    write_json(run/'config.json', config)
    return data

# ---- what a page says

def test_the_figures_are_those_of_the_files(reported, finished):
    page, summary = Page(reported), finished[1]
    for shown in (f"{summary['accuracy']:.2%}", f"{summary['flip_averaged_accuracy']:.2%}", f"{summary['best_accuracy']:.2%}", summary['best_is'], f"{summary['n_params']:,}", f"{summary['n_wrong']} of 40",
                  summary['precision'], summary['device'], *filter(None, summary['environment']['packages'].values()), summary['environment']['platform']):
        assert shown in page.text, shown

def test_the_matrix_the_pairs_and_the_gallery_count_the_same_mistakes(reported, finished):
    page, kept = Page(reported), load_file(finished[0]/'predictions.safetensors')
    targs, decoded = kept['targs'].tolist(), kept['probs'].argmax(1).tolist()
    wrong = [f'{t}-{d}' for t, d in zip(targs, decoded) if t != d]
    assert sorted(attrs['data-pair'] for attrs in page.gallery) == sorted(wrong) and len(wrong) > 5
    cells = [b for b in page.all('button') if 'wrong' in b.get('class', '')]
    assert {b['data-pair']: int(b['data-n']) for b in cells} == {pair: wrong.count(pair) for pair in wrong}
    assert all(b['aria-pressed'] == 'false' and b['aria-label'] == f"{b['data-name']}: {b['data-n']}" and b['type'] == 'button' for b in cells)
    diagonal = re.findall(r'<span class="right"[^>]*>(\d+)</span>', page.source)
    assert list(map(int, diagonal)) == [sum(t == d == label for t, d in zip(targs, decoded)) for label in range(10)]

def test_the_gallery_shows_the_images_themselves_the_most_confident_mistakes_first(reported, finished):
    page, record = Page(reported), read_run(finished[0])
    interp = run_predictions(record, run_images(record))
    names = '|'.join(interp.vocab)
    pictures = [attrs for attrs in page.all('img') if re.fullmatch(rf'({names})\b.*\b({names})', attrs['alt'])]
    for shown, m in zip(pictures, interp.misclassified(), strict=True):
        assert re.fullmatch(rf'{m.actual}\b.*\b{m.predicted}', shown['alt'])
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(shown['src'].split(',')[1])))) == interp.image(m.idx)).all()

def test_every_picture_has_words(reported):
    page = Page(reported)
    assert len(page.all('img')) > 30 and all(attrs.get('alt') for attrs in page.all('img'))
    assert len(page.all('svg')) == 5 and all(attrs['role'] == 'img' and len(attrs['aria-label']) > 30 for attrs in page.all('svg'))

def test_the_curves_reach_the_last_epoch(reported, compared):
    "Epochs 1 and 2 are ticks of the axis, which would end at 1 if nothing were drawn"
    for path, label in ((reported, 'Loss over 2 epochs'), (reported, 'Accuracy over 2 epochs'), (compared[1], 'Validation accuracy')):
        [svg] = re.findall(rf'<svg [^>]*aria-label="{label}.*?</svg>', Page(path).source, re.DOTALL)
        assert {'1', '2'} <= set(re.findall(r'<text[^>]*>([^<]*)</text>', svg)), label

def test_no_two_elements_have_one_name(reported):
    names = [attrs['id'] for _, attrs in Page(reported).elements if 'id' in attrs]
    assert len(names) == len(set(names))

def test_training_images_are_shown_before_and_after_in_as_many_epochs_as_the_run_has(reported, run):
    after = [attrs['alt'] for attrs in Page(reported).all('img') if 'augmented' in attrs['alt']]
    assert len(after) == 4*min(8, read_run(run).settings.epochs) and read_run(run).settings.epochs < 8
    assert all(re.fullmatch(rf'airplane\b.*\bepoch {i + 1}', alt) for i, alt in enumerate(after[:2]))

def test_the_accuracy_has_the_interval_of_wilson(reported, run):
    interp = run_predictions(read_run(run))
    n, p, z = len(interp.targs), interp.accuracy, 1.959964
    middle, half = (p + z*z/2/n)/(1 + z*z/n), z*(p*(1 - p)/n + (z/2/n)**2)**.5/(1 + z*z/n)
    low, high = map(float, re.search(r'95% interval for [0-9,]+ images: ([0-9.]+) to ([0-9.]+)%', reported.read_text()).groups())
    assert low == pytest.approx(100*(middle - half), abs=.051) and high == pytest.approx(100*(middle + half), abs=.051)

def test_a_page_is_the_same_each_time(reported, run): assert write_report(run).read_bytes() == reported.read_bytes()

def test_the_schedule_is_the_one_that_ran(compared):
    for run in compared[0]:
        record = read_run(run)
        steps, lrs, n_batch = run_lrs(record, len(run_predictions(record).targs))
        assert steps == list(range(2*n_batch)) and np.allclose(lrs[n_batch - 1::n_batch], record.history['lr'], rtol=1e-6)

def test_rates_that_were_given_have_no_range_test(reported): assert not any('range test' in attrs['aria-label'].lower() for attrs in Page(reported).all('svg'))

def test_a_range_test_is_shown_with_its_bounds(run, change):
    lrs = np.geomspace(1e-7, 10, 100)
    write_range_test(run, lrs, 2.3 - 1.5/(1 + (1e-3/lrs)**2) + 20*np.clip(lrs - .1, 0, None))
    for name in 'config.json', 'summary.json': change(name, lambda c: c['settings'].update(lr_min='find', lr_max='find'))
    page = Page(write_report(run))
    [label] = [attrs['aria-label'] for attrs in page.all('svg') if 'range test' in attrs['aria-label'].lower()]
    assert re.search(r'\b1\.00e-03\b.*\b1\.00e-02\b', label)

def test_other_data_have_a_page_too(compared, few_digits):
    page = Page(write_report(compared[0][2], few_digits))
    record = read_run(compared[0][2])
    n_wrong, n = record.summary['n_wrong'], len(run_predictions(record).targs)
    assert 'scikit-learn' in page.text and re.search(rf'\b{n_wrong} of {n} held-out', page.text)
    assert len(page.gallery) == n_wrong
    assert 'cosine' in page.text and re.search('chance|random', page.text)

def with_mistakes(run, n_wrong, n):
    "Make summary and history say that `n_wrong` of `n` images are wrong at the end"
    history = read_history(run)
    history.loc[len(history) - 1, 'accuracy'] = 1 - n_wrong/n
    history.to_csv(run/'history.csv', index=False)
    accuracies = history['accuracy'].tolist()
    told = dict(n_wrong=n_wrong, accuracy=accuracies[-1], best_accuracy=max(accuracies), best_epoch=accuracies.index(max(accuracies)) + 1)
    write_json(run/'summary.json', read_json(run/'summary.json') | told)

def test_a_run_without_a_mistake_has_a_page(run):
    kept = load_file(run/'predictions.safetensors')
    kept['probs'] = torch.eye(10)[kept['targs']]
    save_file(kept, run/'predictions.safetensors')
    with_mistakes(run, 0, len(kept['targs']))
    page = Page(write_report(run))
    assert re.search(r'\b0 of 40\b', page.text) and not page.gallery and not page.all('button')

def test_what_does_not_fit_is_left_out_and_said(finished):
    record = read_run(finished[0])
    dls = run_images(record)
    page = report_page(record, run_predictions(record, dls), dls, most=20_000)
    n = page.count('<li data-pair="')
    assert 0 < n < record.summary['n_wrong'] and f"{n} of {record.summary['n_wrong']} shown" in page

# ---- pictures of your own

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A run with class weights on 12 unbalanced classes, with three copies between the splits: the run folder, and its images"
    rng, n_each = np.random.default_rng(0), np.array([20, *[6]*11])
    train_y, test_y = np.repeat(np.arange(12), n_each), np.array([*np.repeat(np.arange(12), 2), 0, 1, 2])
    train_x, test_x = (rng.integers(0, 256, (len(y), 32, 32, 3), dtype=np.uint8) for y in (train_y, test_y))
    test_x[-3:] = train_x[[0, 20, 26]]
    data = CIFAR10Data(train_x, train_y, test_x, test_y, [f'kind {i}' for i in range(12)])
    run = tmp_path_factory.mktemp('own')/'run'
    train(TrainSettings('pictures', epochs=3, lr_min=1e-3, lr_max=1e-2, num_workers=0, precision='fp32', width=8, class_weights=True, out=str(run)), data)
    return run, data

@pytest.fixture(scope='module')
def own_page(own): return Page(write_report(*own))

def cards(page): return dict(re.findall(r'<dt>([^<]*)</dt><dd>(.*?)</dd>', re.search('<dl class="cards">.*?</dl>', page.source, re.DOTALL)[0]))

def test_the_accuracy_has_its_standard_error(own_page, reported):
    for page, n in ((own_page, 27), (Page(reported), 40)):
        accuracy = float(re.match(r'[0-9.]+', cards(page)['accuracy'])[0])/100
        assert re.search(rf'\b{100*(accuracy*(1 - accuracy)/n)**.5:.1f} points\b.*\bn = {n}\b', cards(page)['accuracy'])

def test_an_accuracy_without_variance_has_an_interval_only(run):
    kept = load_file(run/'predictions.safetensors')
    kept['probs'] = torch.eye(10)[kept['targs']]
    save_file(kept, run/'predictions.safetensors')
    with_mistakes(run, 0, len(kept['targs']))
    shown = cards(Page(write_report(run)))['accuracy']
    assert '95% interval for 40 images' in shown and 'n = 40' not in shown

def test_the_calibration_error_of_few_images_says_so(own_page, recorded_run):
    assert re.search(r'\b100\b', cards(own_page)['calibration error'])
    assert not re.search(r'\b100\b', cards(Page(write_report(recorded_run('24-epochs'))))['calibration error'])

def test_copies_of_training_images_are_counted(own_page, own, reported):
    assert cards(own_page)['copies'].startswith('3<') and re.search(r'\b27\b', cards(own_page)['copies'])
    run, data = own
    assert 'copies' not in cards(Page(reported))

def test_the_class_table_has_the_training_images_and_comes_before_many_mistakes(own_page, own, reported, run, change):
    _, data = own
    shown = {row['class']: (row['training images'], row['validation images']) for row in rows(own_page, 'Results by class')}
    assert shown == {name: (str((data.train_y == i).sum()), str((data.test_y == i).sum())) for i, name in enumerate(data.vocab)}
    assert own_page.source.index('>Results by class<') < own_page.source.index('id="images"')
    assert Page(reported).source.index('>Results by class<') > Page(reported).source.index('id="images"')
    change('config.json', lambda c: c['settings'].update(data='/moved/away'))
    assert 'training images' not in rows(Page(write_report(run)), 'Results by class')[0]

def test_the_caption_of_the_loss_names_class_weights(own_page, reported):
    [caption], [plain] = (re.findall('<figcaption>(Loss.*?)</figcaption>', page.source) for page in (own_page, Page(reported)))
    assert 'class_weights' in caption and 'class_weights' not in plain

def test_settings_that_follow_from_the_images_are_no_changes(own_page, own):
    bold = re.findall(r'<div class="changed"><dt>(\w+)</dt>', own_page.source)
    assert set(bold) == {'data', 'epochs', 'lr_min', 'lr_max', 'num_workers', 'precision', 'width', 'class_weights'}
    shown = html.unescape(re.search(r'<code id="command">(.*?)</code>', own_page.source)[1])
    assert '--class_weights' in shown and '--bs' not in shown and set(re.findall(r'--(\w+)', shown)) == set(bold)
    pictures = dict(vocab=list('abc'), n_train=95)
    assert changed_settings(TrainSettings('p', bs=8), pictures) == dict(data='p') and changed_settings(TrainSettings('p', bs=16), pictures) == dict(data='p', bs=16)
    assert changed_settings(TrainSettings('p', bs=32, flip='none'), dict(vocab=list('0123456789'), n_train=700)) == dict(data='p')
    assert changed_settings(TrainSettings(model='resnet18').resolved()) == dict(model='resnet18')

def test_settings_without_a_value_have_words(reported):
    shown = dict(re.findall(r'<dt>(\w+)</dt><dd>([^<]*)</dd>', reported.read_text()))
    assert shown['sizes'] == 'none' and all(value.strip() not in ('', '-', '—') for value in shown.values())

def of_many_classes(record, n, path):
    "The page of made-up predictions of `n` classes"
    names, g = [f'kind of picture {i}' for i in range(n)], torch.Generator().manual_seed(0)
    targs = torch.arange(n).repeat(4)
    probs = (torch.randn(len(targs), n, generator=g) + 3*torch.eye(n)[targs]).softmax(1)
    interp = CifarInterpretation(None, SimpleNamespace(n=len(targs), vocab=names), probs, targs, -probs.log()[range(len(targs)), targs])
    path.write_text(report_page(record._replace(data=record.data | dict(vocab=names)), interp), encoding='utf8')
    return path

@pytest.mark.parametrize('n', [16, 100])
def test_a_matrix_of_many_classes_leaves_zeros_out(finished, tmp_path, n):
    page = Page(of_many_classes(read_run(finished[0]), n, tmp_path/'report.html'))
    matrix = re.search('<table class="matrix.*?</table>', page.source, re.DOTALL)[0]
    assert not re.search('<span class="none">0</span>', matrix) and len(re.findall('<td[ >]', matrix)) == n*n + 1

def test_classes_without_images_have_no_recall(finished):
    record, targs = read_run(finished[0]), torch.arange(8).repeat(4)
    interp = CifarInterpretation(None, SimpleNamespace(n=32, vocab=record.data['vocab']), torch.eye(10)[targs], targs, torch.zeros(32))
    page = SimpleNamespace(source=report_page(record, interp))
    *_, before, ship, truck = rows(page, 'Results by class')
    assert before['recall'] == '1.000' and {row[score] for row in (ship, truck) for score in ('precision', 'recall', 'F1')} == {'—'}
    assert 'classes that have images' in cards(page)['balanced accuracy']

optional = 'best_is', 'device', 'precision', 'weights_sha256'

def test_a_summary_without_its_optional_fields_has_a_page(run, compared, tmp_path):
    for folder in run, *compared[0][:2]:
        if folder != run: folder = shutil.copytree(folder, tmp_path/folder.name)
        summary = read_json(folder/'summary.json')
        write_json(folder/'summary.json', {name: value for name, value in summary.items() if name not in optional})
    page = Page(write_report(run))
    assert 'None' not in page.text and 'SHA-256' not in page.text and cards(page)['device'] == cards(page)['precision'] == '—'
    assert re.search(r'<small>after epoch \d+</small>', cards(page)['best accuracy'])
    page = Page(write_comparison([tmp_path/name for name in ('first', 'second')], tmp_path/'both.html'))
    assert 'None' not in page.text and {row[name] for row in rows(page, 'Results of the runs') for name in ('device', 'precision')} == {'—'}

def shift_of(run, n, small):
    table = shift_table(lambda images: np.eye(10)[images[:, 16, 16, 0] % 10], small.test_x, small.test_y, n)
    write_shift_table(run, table)
    return table

def test_the_table_of_changed_images_says_how_many_there_were(run, small):
    table = shift_of(run, 20, small)
    captions = lambda: re.findall(r'<(?:fig)?caption>([^<]*\bchanged\b[^<]*)<', write_report(run).read_text(encoding='utf8'))
    assert len(captions()) == 2 and all(re.search(r'\b20 validation images\b', caption) for caption in captions())
    write_shift_table(run, table.drop(columns='images'))
    assert captions() and not any(re.search(r'\d', caption) for caption in captions())

def contrast(colour): # of `#rrggbb` on white, by WCAG 2
    linear = [v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4 for v in (int(colour[i:i + 2], 16)/255 for i in (1, 3, 5))]
    return 1.05/(np.dot(linear, (.2126, .7152, .0722)) + .05)

def test_charts_have_a_contrast_of_three_to_one(run, small, compared):
    shift_of(run, 20, small)
    curves = page_plot(lambda ax: [ax.plot([0, 1], [i, i + 1]) for i in range(6)], 'six curves')
    styles = [style for source in (write_report(run).read_text(encoding='utf8'), Path(compared[1]).read_text(encoding='utf8'), curves)
              for svg in re.findall('<svg .*?</svg>', source, re.DOTALL) for style in re.findall('style="([^"]*)"', svg)]
    found = {}
    for style in styles:
        opacity = float((re.search(r'(?<![-\w])opacity: ([\d.]+)', style) or [0, 1])[1])
        for colour in re.findall(r'(?:fill|stroke): (#[0-9a-f]{6})', style):
            mixed = [round(opacity*int(colour[i:i + 2], 16) + (1 - opacity)*255) for i in (1, 3, 5)]
            found[style] = contrast('#%02x%02x%02x' % tuple(mixed)) if colour != '#ffffff' else 21
    assert contrast('#ffffff') == pytest.approx(1) and len(set(found.values())) > 7
    assert min(found.values()) >= 3.2, {style: ratio for style, ratio in found.items() if ratio < 3.2}

# ---- the command

everything = [dict(), dict(data='digits'), dict(data='digits', epochs=24, bs=512), dict(recipe='baseline', seed=7), dict(data='my images/cifar "10".tgz'), dict(data='-x; rm *'), dict(epochs=3), dict(epochs=3, peak_epoch=1.),
              dict(lr_min=1e-05, lr_max=.1 + .2), dict(betas=(.8, .95), eps=1e-7), dict(whiten=False, ghost=0, logit_scale=1.), dict(recipe='baseline', whiten=True, flip='alternate', wd=.1), dict(conv_bias=True, compile=True),
              dict(norm='group', n_groups=4, dropout=.1), dict(precision='fp32', device='cpu', valid='holdout', pipeline='item', num_workers=0, checkpoint_minutes=0., anneal='cos', label_smoothing=0., bs=64)]

@pytest.mark.parametrize('given', everything, ids=lambda given: ' '.join(given) or 'none')
def test_the_command_gives_the_settings_again(given):
    settings = TrainSettings(**given)
    name, *args = shlex.split(repeat_command(settings))
    parsed = tyro.cli(RunSettings, args=args)
    again = TrainSettings(**{f.name: getattr(parsed, f.name) for f in fields(TrainSettings)})
    assert name == 'cifar_train' and again.resolved() == settings.resolved()
    assert repeat_command(settings.resolved()) == repeat_command(settings) # of a run, all values are recorded

def test_the_command_names_what_differs_and_nothing_else():
    assert repeat_command(TrainSettings(out='somewhere')) == 'cifar_train'
    assert repeat_command(TrainSettings('digits', 'baseline', epochs=3, seed=2)) == 'cifar_train --data digits --recipe baseline --epochs 3 --seed 2'
    for settings in (s := TrainSettings(epochs=48), s.resolved()): assert changed_settings(settings) == dict(epochs=48)

def test_the_command_of_a_page_repeats_its_run(reported, finished, command, tmp_path):
    shown = html.unescape(re.search(r'<code id="command">(.*?)</code>', reported.read_text(encoding='utf8'))[1])
    name, *args = shlex.split(shown)
    done = command(name.removeprefix('cifar_'), *args, '--out', tmp_path/'again')
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path/'again/summary.json')['accuracy'] == pytest.approx(finished[1]['accuracy'], abs=.051) # other threads, other last bits
    other = {name for name, value in read_json(tmp_path/'again/config.json')['settings'].items() if value != read_json(finished[0]/'config.json')['settings'][name]}
    assert other == {'out'}

# ---- one file, and safe

def test_nothing_is_loaded_from_elsewhere(reported):
    page = Page(reported)
    for tag, attrs in page.elements:
        assert tag not in ('link', 'iframe', 'object', 'embed', 'base', 'form')
        for name in ('src', 'href', 'xlink:href', 'action', 'srcset', 'poster', 'data'): assert attrs.get(name, '#').startswith(('data:image/webp;base64,', '#'))
        assert not any(name.startswith('on') for name in attrs)
    assert 'url(h' not in page.source and '@import' not in page.source and 'http' not in re.sub(r'base64,[^"]*|http-equiv', '', page.source)

def test_the_policy_names_the_one_script_by_its_hash(reported):
    page = Page(reported)
    scripts = [data for tag, data in page.texts if tag == 'script']
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and page.all('meta', http_equiv='Content-Security-Policy')[0]['content'] == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"

def test_names_of_classes_are_text_everywhere(run, small, reported):
    renamed_data = renamed(run, small, evil)
    changed = read_json(run/'config.json')
    changed['data']['fingerprint'] = list(renamed_data.fingerprint)
    write_json(run/'config.json', changed)
    page, plain = Page(write_report(run, renamed_data)), Page(reported)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements] # not one element more or less
    assert [attrs.keys() for _, attrs in page.elements] == [attrs.keys() for _, attrs in plain.elements]
    assert [data for tag, data in page.texts if tag == 'script'] == [data for tag, data in plain.texts if tag == 'script']
    for name in evil:
        assert any(name in data for tag, data in page.texts if tag == 'th' or tag == 'span'), name
    assert {attrs['data-name'].split(' predicted as ')[0] for attrs in page.all('button') if 'data-name' in attrs} <= set(evil)

def test_other_texts_of_a_folder_are_text_too(run, change):
    bad = '<img src=x onerror=alert(1)>"\''
    change('config.json', lambda c: (c['settings'].update(data=bad), c['environment'].update(processor=bad, platform=bad), c['environment']['packages'].update({bad: bad})))
    change('summary.json', lambda s: s.update(device=bad, precision=bad, best_is=bad, weights_sha256=bad))
    named = run.rename(run.parent/'<b>$x_1$ & _')
    page = Page(write_report(named))
    assert not page.all('img') and bad in page.text and '<b>' not in page.source
    shutil.copytree(named, named.parent/'2')
    compared = Page(write_comparison([named, named.parent/'2'], 'c.html'))
    assert not compared.all('img') and not compared.all('b') and '1 · <b>$x_1$ & _' in compared.text and bad in compared.text

# ---- without images

@pytest.mark.parametrize('data', ['/moved/away', 'cifar10'])
def test_without_images_the_page_says_so_and_has_the_rest(run, change, empty_home, server, data):
    change('config.json', lambda c: c['settings'].update(data=data))
    page = Page(write_report(run))
    assert (data if data != 'cifar10' else data_variable) in page.text # what is missing, or how to name it
    assert not page.all('img') and not page.all('button') and len(page.all('svg')) == 5 and len(page.all('table')) > 1
    assert len(re.findall('<span class="wrong"', page.source)) > 3

def test_images_can_be_elsewhere(run, change, small_folder, reported):
    change('config.json', lambda c: c['settings'].update(data='/moved/away'))
    assert len(Page(write_report(run, small_folder)).gallery) == len(Page(reported).gallery)

def test_images_of_another_run_are_not_shown(run, change, small):
    is_named = rf'images.*{re.escape(str(run))}\b'
    with pytest.raises(ValueError, match=is_named): write_report(run, 'digits')
    with pytest.raises(ValueError, match=is_named): write_report(run, small.first(80, 39))
    with pytest.raises(FileNotFoundError, match='nothing'): write_report(run, 'nothing')
    assert not (run/'report.html').exists()
    change('config.json', lambda c: c['settings'].update(data='digits'))
    page = Page(write_report(run))
    assert not page.gallery and re.search(is_named, page.text)

# ---- refusals

def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path/'nothing', tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(folder))): write_report(folder)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('damage', [lambda run: (run/'summary.json').unlink(), lambda run: write_json(run/'summary.json', read_json(run/'summary.json') | dict(interrupted=True)), lambda run: (run/'predictions.safetensors').unlink()],
                         ids=['no summary', 'interrupted', 'no predictions'])
def test_a_run_that_is_not_finished_is_refused(run, damage):
    damage(run)
    with pytest.raises(ValueError, match=rf'{re.escape(str(run))}\b.*finished') as e: write_report(run)
    assert '\n' not in str(e.value) and not (run/'report.html').exists()

damages = {'no bounds': ('config.json', lambda c: c.update(bounds=None)), 'bounds of another kind': ('config.json', lambda c: c['bounds'].update(lr_min='low')), 'bounds that are none': ('config.json', lambda c: c['bounds'].update(lr_min=1)),
           'no settings': ('config.json', lambda c: c.pop('settings')), 'settings of another version': ('config.json', lambda c: c['settings'].update(colour='red')), 'no classes': ('config.json', lambda c: c['data'].update(vocab=[])),
           'classes that are none': ('config.json', lambda c: c['data'].update(vocab=[1]*10)), 'classes in one text': ('config.json', lambda c: c['data'].update(vocab='abcdefghij')), 'fewer classes': ('config.json', lambda c: c['data'].update(vocab=['a', 'b'])), 'no stats': ('config.json', lambda c: c['data'].pop('stats')),
           'stats that are none': ('config.json', lambda c: c['data'].update(stats=['abc', 'def'])), 'no machine': ('config.json', lambda c: c.pop('environment')), 'no number of images': ('config.json', lambda c: c['data'].update(n_train='many')),
           'no accuracy': ('summary.json', lambda s: s.pop('accuracy')), 'accuracy of another kind': ('summary.json', lambda s: s.update(accuracy='good')), 'other accuracy of both sides': ('summary.json', lambda s: s.update(flip_averaged_accuracy='x')),
           'of another run': ('summary.json', lambda s: s.update(n_wrong=s['n_wrong'] + 1))}

@pytest.mark.parametrize('damage', damages)
def test_a_damaged_run_is_refused_with_one_sentence(run, change, damage):
    (run/'report.html').write_text('as it was')
    change(*damages[damage])
    with pytest.raises(ValueError) as e: write_report(run)
    assert '\n' not in str(e.value) and (run/'report.html').read_text() == 'as it was' and not list(run.glob('*.part'))

@pytest.mark.parametrize('name, content', [('config.json', '{'), ('summary.json', '[]'), ('history.csv', 'a,b\n'), ('history.csv', 'epoch,lr,train_loss,train_accuracy,valid_loss,accuracy,seconds\n'),
                                           ('history.csv', 'epoch,lr,train_loss,train_accuracy,valid_loss,accuracy,seconds\n1,a,b,c,d,e,f\n'), ('range_test.csv', 'x\n1\n'), ('predictions.safetensors', 'none')])
def test_a_damaged_file_is_refused_by_name(run, name, content):
    (run/name).write_text(content)
    with pytest.raises(ValueError, match=name): write_report(run)
    assert not (run/'report.html').exists()

@pytest.mark.parametrize('wrong', [dict(probs=torch.ones(40, 9)), dict(targs=torch.full((40,), 10)), dict(targs=torch.full((40,), -1)), dict(probs=torch.ones(39, 10)), dict(probs=torch.ones(40)), dict(targs=torch.tensor(3)), dict(targs=torch.zeros(0, dtype=torch.int64), probs=torch.ones(0, 10))],
                         ids=['fewer classes', 'label too high', 'label too low', 'fewer images', 'one number', 'one label', 'none'])
def test_predictions_of_another_shape_are_refused(run, wrong):
    save_file(load_file(run/'predictions.safetensors') | wrong, run/'predictions.safetensors')
    with pytest.raises(ValueError, match='predictions.safetensors'): write_report(run)

def test_a_page_is_written_whole_or_not_at_all(run, monkeypatch):
    before = write_report(run).read_bytes()
    def full(fd): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
        m.setattr('os.fsync', full) # a full disk
        write_report(run)
    assert (run/'report.html').read_bytes() == before and not list(run.glob('*.part'))

# ---- several runs

def rows(page, id_or_label):
    table = re.search(rf'(?:id|aria-label)="{id_or_label}".*?<thead>(.*?)</thead>\s*<tbody>(.*?)</tbody>', page.source, re.DOTALL)
    read = lambda part: [html.unescape(re.sub('<.*?>', '', cell)) for cell in re.findall(r'<t[hd][ >].*?</t[hd]>', part)]
    head = read(table[1])
    return [dict(zip(head, read(row), strict=True)) for row in re.findall(r'<tr>(.*?)</tr>', table[2], re.DOTALL)]

def test_a_comparison_shows_the_figures_and_the_settings_that_differ(compared):
    runs, out = compared
    page, settings = Page(out), [read_run(run).settings for run in runs]
    for row, run in zip(rows(page, 'Results of the runs'), runs, strict=True):
        summary = read_json(run/'summary.json')
        assert row['accuracy'] == f"{summary['accuracy']:.2%}" and row['misclassified'] == str(summary['n_wrong']) and row['accuracy with TTA'] == f"{summary['flip_averaged_accuracy']:.2%}" and row['training time, s'] == f"{summary['seconds']:,.0f}"
    differing = rows(page, 'Settings that differ')
    assert [(row['run'], row['wd'], row['valid'], row['seed'], row['anneal']) for row in differing] == [('1 · first', '0.25', 'test', '0', 'linear'), ('2 · second', '0.1', 'test', '1', 'linear'), ('3 · third', '0.2', 'holdout', '0', 'cos')]
    assert set(differing[0]) == {'run'} | {name for name, value in asdict(settings[0]).items() if name != 'out' and any(getattr(other, name) != value for other in settings)}
    assert len(page.all('svg')) == 1 and all(name in page.all('svg')[0]['aria-label'] for name in ('1 · first', '2 · second', '3 · third')) and not page.all('script')

def test_a_comparison_counts_the_images_that_only_one_has_right(compared):
    runs, out = compared
    first, second = (load_file(run/'predictions.safetensors') for run in runs[:2])
    a, b = (kept['probs'].argmax(1) == kept['targs'] for kept in (first, second))
    row, = rows(Page(out), 'pairs') # the third was validated on other images
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    assert [row['only the first correct'], row['only the second correct'], row['both correct'], row['both wrong']] == [str(n) for n in (only_a, only_b, int((a & b).sum()), int((~a & ~b).sum()))]
    assert float(row['p']) == pytest.approx(min(1, 2*binom.cdf(min(only_a, only_b), only_a + only_b, .5)), rel=.05)
    assert Page(out).text.count('were validated on different images') == 2

@pytest.mark.parametrize('n, m', [(0, 0), (1, 0), (5, 1), (10, 10), (278, 231)])
def test_mcnemar_is_exact(n, m):
    a, b = np.repeat([True, False, True], [n, m, 7]), np.repeat([False, True, True], [n, m, 7])
    test = mcnemar(a, b)
    assert test[:4] == (n, m, 7, 0) and test.p == pytest.approx(min(1, 2*binom.cdf(min(n, m), n + m, .5)))

def test_runs_with_other_labels_for_the_same_images_are_refused(compared, tmp_path):
    run = shutil.copytree(compared[0][0], tmp_path/'run')
    kept = load_file(run/'predictions.safetensors')
    save_file({name: t.flip(0).contiguous() for name, t in kept.items()}, run/'predictions.safetensors') # in another order
    with pytest.raises(ValueError, match=rf'{re.escape(str(compared[0][0]))}\b.*{re.escape(str(run))}\b.*labels'):
        write_comparison([compared[0][0], run], 'c.html')

def test_what_cannot_be_compared_is_refused(compared, tmp_path):
    first, second = compared[0][:2]
    for runs in ([], [first]):
        with pytest.raises(ValueError, match=r'\bruns?\b.*\b(two|2)\b'): write_comparison(runs, 'c.html')
    for out in (tmp_path, tmp_path/'nothing/c.html'):
        with pytest.raises(ValueError, match=re.escape(f'out is {out}')): write_comparison([first, second], out)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path/'nothing'))):
        write_comparison([first, tmp_path/'nothing'], 'c.html')
    assert not list(tmp_path.iterdir())

def test_recorded_runs_are_compared(recorded_run, tmp_path):
    page = Page(write_comparison([recorded_run('best-version-3'), recorded_run('24-epochs')], tmp_path/'c.html'))
    row, = rows(page, 'pairs')
    assert sum(int(row[name].replace(',', '')) for name in ('only the first correct', 'only the second correct', 'both correct', 'both wrong')) == 10_000
    assert rows(page, 'Results of the runs')[1]['accuracy'] == '93.81%' and {'recipe', 'wd'} <= set(rows(page, 'Settings that differ')[0])

# ---- a run of CIFAR-10

@pytest.mark.slow
def test_a_recorded_run_has_a_page_of_less_than_3_mb(recorded_run, real_cifar, figures):
    run = recorded_run('best-version-3')
    path = write_report(run, real_cifar)
    page, summary = Page(path), read_json(run/'summary.json')
    figures('report', bytes=path.stat().st_size, images=len(page.gallery))
    assert path.stat().st_size < 3_000_000 and len(page.gallery) == summary['n_wrong'] and len(page.all('svg')) == 6

@pytest.mark.slow
def test_most_mistakes_do_not_make_it_larger(recorded_run, real_cifar):
    run = recorded_run('24-epochs')
    kept = load_file(run/'predictions.safetensors')
    kept['probs'] = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(10), 10_000)).float()
    save_file(kept, run/'predictions.safetensors')
    n_wrong = int((kept['probs'].argmax(1) != kept['targs']).sum())
    with_mistakes(run, n_wrong, 10_000)
    path = write_report(run, real_cifar)
    n = len(Page(path).gallery)
    assert 2_000_000 < path.stat().st_size < 3_000_000 and 500 < n < n_wrong
    assert f'{n} of {n_wrong:,} shown' in Page(path).text

def test_small_images_have_a_small_page(reported): assert reported.stat().st_size < 300_000

# ---- in a browser


@pytest.fixture
def opened(browser):
    "Open a file; what it complains of and asks for is noted in `complaints` and `asked`"
    contexts = []
    def open_(path, width=1200, **kwargs):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900), **kwargs))
        page = contexts[-1].new_page()
        page.complaints, page.asked = [], []
        page.on('console', lambda message: page.complaints.append(message.text))
        page.on('pageerror', lambda error: page.complaints.append(str(error)))
        page.on('dialog', lambda dialog: (page.complaints.append(dialog.message), dialog.dismiss()))
        page.on('request', lambda request: page.asked.append(request.url) if not request.url.startswith('data:') else None)
        page.goto(path.absolute().as_uri())
        return page
    yield open_
    for context in contexts: context.close()

def shown(page): return page.eval_on_selector_all('#gallery li', 'all => all.filter(o => o.offsetParent !== null).map(o => o.dataset.pair)')

def test_a_page_opens_without_complaint_and_asks_for_nothing(opened, reported, compared):
    for path in (reported, compared[1]):
        page = opened(path)
        page.mouse.wheel(0, 10_000)
        assert page.complaints == [] and page.asked == [path.absolute().as_uri()]
    assert opened(reported).evaluate('[...document.images].every(o => o.complete && o.naturalWidth === 32)')

def test_a_cell_shows_its_images_and_shows_all_when_pressed_again(opened, reported):
    page = opened(reported)
    every, cell = shown(page), page.locator('.matrix button').first
    pair, n = cell.get_attribute('data-pair'), int(cell.get_attribute('data-n'))
    cell.click()
    assert shown(page) == [pair]*n and len(every) > n and cell.get_attribute('aria-pressed') == 'true'
    assert page.inner_text('#shown') == f"{cell.get_attribute('data-name')}: {n} of {n} shown" and page.locator('[aria-pressed=true]').evaluate_all('all => all.every(o => o.dataset.pair)')
    cell.click()
    assert shown(page) == every and cell.get_attribute('aria-pressed') == 'false' and page.inner_text('#shown') == f'{len(every)} of {len(every)} shown'

def test_keys_and_pairs_filter_too(opened, reported):
    page = opened(reported)
    every = shown(page)
    first, second = page.locator('.pairs button').all()[:2]
    first.focus(); page.keyboard.press('Enter')
    assert set(shown(page)) == {first.get_attribute('data-pair')}
    second.focus(); page.keyboard.press('Space')
    assert set(shown(page)) == {second.get_attribute('data-pair')} and first.get_attribute('aria-pressed') == 'false'
    assert page.locator(f'.matrix button[data-pair="{second.get_attribute("data-pair")}"]').get_attribute('aria-pressed') == 'true'
    page.click('#all')
    assert shown(page) == every and page.complaints == []

@pytest.mark.parametrize('width', [320, 390, 768])
def test_a_narrow_page_does_not_scroll_sideways(opened, reported, compared, width):
    for path in (reported, compared[1]): assert opened(path, width).evaluate('document.documentElement.scrollWidth') <= width

@pytest.mark.parametrize('n', [30, 100])
@pytest.mark.parametrize('width', [390, 1200])
def test_a_matrix_of_many_classes_scrolls_in_its_own_box(opened, finished, tmp_path, n, width):
    page = opened(of_many_classes(read_run(finished[0]), n, tmp_path/'report.html'), width)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    box, table = page.evaluate('[document.querySelector(".matrix").parentElement.clientWidth, document.querySelector(".matrix").offsetWidth]')
    if (n, width) == (30, 1200): assert table <= box
    else: assert page.locator('.matrix').evaluate('o => getComputedStyle(o.parentElement).overflowX') == 'auto'

def test_a_page_is_dark_where_that_is_wanted_and_light_on_paper(opened, reported, compared):
    colours = 'o => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, getComputedStyle(document.querySelector("svg text")).fill]'
    light = lambda colour: sum(map(int, re.findall(r'\d+', colour)[:3]))/765
    for path in (reported, compared[1]):
        for scheme, paper in dict(light=1, dark=0).items():
            page = opened(path, color_scheme=scheme)
            background, ink, plot = map(light, page.evaluate(colours))
            assert abs(background - paper) < .2 and abs(ink - (1 - paper)) < .2 and plot == ink
            page.emulate_media(media='print', color_scheme=scheme)
            assert light(page.evaluate(colours)[0]) == 1

def test_without_its_script_a_page_lacks_the_filter_alone(opened, reported):
    page = opened(reported, java_script_enabled=False)
    assert page.locator('#gallery li').count() == len(Page(reported).gallery) and page.locator('#gallery li').last.is_visible() and not page.locator('#all').is_visible()

def test_evil_names_do_nothing_in_a_browser(opened, run, small):
    path = write_report(run, renamed(run, small, evil))
    page = opened(path)
    for cell in page.locator('.pairs button').all(): cell.click()
    assert page.complaints == [] and page.asked == [path.absolute().as_uri()] and page.inner_text('#shown').split(': ')[0].count('predicted as') == 1

@pytest.mark.slow
def test_recorded_run_in_a_browser(opened, recorded_run, real_cifar):
    page = opened(write_report(recorded_run('best-version-3'), real_cifar), 390)
    page.click('.matrix button[data-pair="3-5"]')
    assert set(shown(page)) == {'3-5'} and page.evaluate('document.documentElement.scrollWidth') <= 390 and page.complaints == []
