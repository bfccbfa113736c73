"""Several runs of a recipe: made, stopped and gone on with; their statistics against SciPy and by hand."""
import re, shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cifar_fastai.core import RepeatSettings, ingredients, recipes
from cifar_fastai.files import read_json, write_json
from cifar_fastai.run.repeat import (ablate_recipe, ablation_effects, collect_runs, mean_interval, plot_band,
                                     recipe_ingredients, repeat_runs, repeat_table)

@pytest.fixture(scope='module')
def repeated(settings, tmp_path_factory):
    "Two runs of two epochs, made once: settings, and what `repeat` returned"
    kept = {k: v for k, v in asdict(settings()).items() if k != 'out'}
    s = RepeatSettings(**kept, n=2, out=str(tmp_path_factory.mktemp('repeated')/'two'))
    return s, repeat_runs(s)

def test_each_run_has_a_seed_and_a_folder_of_its_own(repeated):
    settings, runs = repeated
    assert [run['seed'] for run in runs] == [0, 1] and len({run['weights_sha256'] for run in runs}) == 2
    for run in runs:
        summary = read_json(f"{settings.out}/seed-{run['seed']}/summary.json")
        assert (summary['seed'], summary['accuracy'], summary['weights_sha256']) == (run['seed'], run['accuracy'], run['weights_sha256'])
        assert len(run['accuracies']) == 2 and run['accuracies'][-1] == run['accuracy'] and run['flip_averaged_accuracy'] is not None

def test_more_runs_leave_those_that_are_done(repeated, tmp_path):
    settings, runs = repeated
    folder = shutil.copytree(settings.out, tmp_path/'moved', ignore=shutil.ignore_patterns('checkpoint'))
    three = repeat_runs(replace(settings, n=3, out=str(folder)))
    assert three[:2] == runs and three[2]['seed'] == 2 and read_json(folder/'repeat.json')['runs'] == three

def test_a_run_that_was_stopped_is_continued(repeated, tmp_path):
    settings, runs = repeated
    folder = shutil.copytree(settings.out, tmp_path/'stopped')
    (folder/'seed-1/summary.json').unlink()
    for file in sorted((folder/'seed-1/checkpoint').glob('*.safetensors'))[-1:]: file.unlink() # as after the first epoch
    again = repeat_runs(replace(settings, out=str(folder)))
    assert [run['weights_sha256'] for run in again] == [run['weights_sha256'] for run in runs]

def test_runs_of_other_settings_are_refused(repeated):
    settings, _ = repeated
    with pytest.raises(ValueError, match=r'seed-0.*wd is 0\.25.*0\.5'): repeat_runs(replace(settings, wd=.5))

def test_runs_on_other_images_are_refused(repeated, small):
    settings, _ = repeated
    with pytest.raises(ValueError, match='seed-0'): repeat_runs(settings, small._replace(train_y=small.train_y[::-1].copy()))

def test_a_run_that_is_not_finished_is_not_collected(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path/'run', ignore=shutil.ignore_patterns('checkpoint'))
    write_json(run/'summary.json', read_json(run/'summary.json') | dict(interrupted=True))
    with pytest.raises(ValueError, match=re.escape(str(run))): collect_runs([run])
    with pytest.raises(FileNotFoundError): collect_runs([tmp_path/'nothing'])

# ---- what is taken away

def test_an_ingredient_that_is_taken_away_is_as_in_the_seed_recipe():
    for name in ingredients:
        settings = RepeatSettings(without=(name,))
        assert getattr(settings, name) is None
        for resolved in settings.resolved(), settings.run(0, 'runs'):
            assert getattr(resolved, name) == asdict(recipes['baseline'])[name]
    assert RepeatSettings(without=('flip',)).resolved().label_smoothing == recipes['best'].label_smoothing

def test_an_ingredient_that_is_no_longer_taken_away_is_that_of_the_recipe():
    settings = replace(RepeatSettings(without=('wd', 'flip')), without=('flip',))
    resolved = settings.resolved()
    assert settings == RepeatSettings(without=('flip',))
    assert resolved.without == ('flip',) and resolved.resolved() == resolved
    assert (resolved.wd, resolved.flip) == (recipes['best'].wd, recipes['baseline'].flip)

@pytest.mark.parametrize('without', [('luck',), ({},), 'flip', ['flip']])
def test_an_ingredient_that_is_none_is_refused(without):
    with pytest.raises(ValueError, match='without is'): RepeatSettings(without=without)

@pytest.mark.parametrize('changes, message', [(dict(n=0), 'n is 0'), (dict(ablate=True), "valid is 'test'"), (dict(without=('luck',)), 'without is'),
                                              (dict(ablate=True, valid='holdout', without=('flip',)), "flip is 'random'"),
                                              (dict(ablate=True, valid='holdout', recipe='baseline'), "recipe is 'baseline'"), (dict(without=('wd',), wd=.5), 'wd is 0.5')])
def test_invalid_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message): RepeatSettings(**changes)

@pytest.mark.slow # a narrow network finds no bounds on so few images
def test_an_ablation_takes_each_ingredient_away_alone_and_never_looks_at_the_test_images(settings, tmp_path, small):
    kept = {k: v for k, v in asdict(settings()).items() if k not in ('out', *asdict(recipes['best']))}
    s = RepeatSettings(**kept | dict(epochs=1, peak_epoch=.5, valid='holdout', width=64), n=1, ablate=True, out=str(tmp_path/'ablation'))
    results = ablate_recipe(s, small)
    assert list(results) == ['best'] + [f'without {name}' for name in recipe_ingredients()]
    for name, runs in results.items():
        config = read_json(tmp_path/'ablation'/name.replace(' ', '-')/'seed-0/config.json')['settings']
        assert config['valid'] == 'holdout'
        assert {k for k in recipe_ingredients() if config[k] != asdict(recipes['best'])[k]} == ({name.removeprefix('without ')} if name != 'best' else set())
    assert read_json(tmp_path/'ablation/ablation.json') == results and list(ablation_effects(results).index) == recipe_ingredients()
    with pytest.raises(ValueError, match="valid is 'test'"): ablate_recipe(RepeatSettings(n=1, out=str(tmp_path/'b')), small)

# ---- statistics

values = [94.1, 94.6, 94.3, 94.9, 94.4]

def runs_of(accuracies): return [dict(seed=i, accuracy=a/100, flip_averaged_accuracy=a/100 + .005, seconds=10. + i, accuracies=[.5, a/100]) for i, a in enumerate(accuracies)]

def test_the_interval_is_students(): assert mean_interval(values) == pytest.approx(stats.t.interval(.95, 4, np.mean(values), stats.sem(values)))

def test_one_run_has_no_interval(): assert np.isnan(mean_interval([94.1])).all()

def test_the_table_has_mean_spread_interval_and_least():
    row = repeat_table(dict(best=runs_of(values), one=runs_of([93.8]))).loc['best']
    low, high = mean_interval(values)
    assert row['runs'] == 5 and row['mean'] == pytest.approx(94.46) and row['sd'] == pytest.approx(np.std(values, ddof=1), abs=.005) and row['least'] == 94.1
    assert (row['95 % from'], row['to']) == (round(low, 2), round(high, 2)) and row['with flip TTA'] == pytest.approx(94.96) and row['seconds a run'] == 12

def test_an_effect_is_the_mean_difference_over_the_same_seeds():
    without = [94.0, 94.2, 94.3, 94.5, 94.1]
    effect = ablation_effects({'best': runs_of(values), 'without flip': runs_of(without)}).loc['flip']
    test = stats.ttest_rel(values, without).confidence_interval(.95)
    assert effect['seeds'] == 5 and effect['brings'] == pytest.approx(np.mean(values) - np.mean(without), abs=.006)
    assert (effect['95 % from'], effect['to']) == pytest.approx((test.low, test.high), abs=.006)

def test_the_band_goes_from_the_least_to_the_most():
    others = pd.DataFrame(dict(project=['000', '000', '002'], epoch=[1, 2, 24], accuracy=[40., 50., 92.39]))
    ax = plot_band(dict(best=runs_of(values)), others)
    [band] = ax.collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.max() == pytest.approx(94.9) and 94.1 in ys.round(6) and ax.lines[-1].get_ydata()[-1] == pytest.approx(np.mean(values))
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[40., 50.], [92.39]]
