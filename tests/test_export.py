"""A network as one file: it says what PyTorch says, whatever the network and the number of images; other files are refused; nothing is half-written."""
import hashlib, json, os, pickle, re, resource, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from fastai.vision.all import set_seed
from PIL import Image

onnx = pytest.importorskip('onnx', reason='the extra export is not installed')
ort = pytest.importorskip('onnxruntime', reason='the extra export is not installed')
from onnx import TensorProto, helper

import cifar_fastai, forked, workers
from cifar_fastai.cli import cifar_export, cifar_predict
from cifar_fastai.core import Norm, cifar10_classes, cifar10_stats, settings_from
from cifar_fastai.files import read_json, write_json
from cifar_fastai.use.export import ImagesToProbabilities, export_model, load_onnx
from cifar_fastai.use.predict import load_classifier
from cifar_fastai.run.folder import load_run
from cifar_fastai.look.interpret import class_probabilities
from cifar_fastai.callback.checkpoint import save_weights
from cifar_fastai.models import CustomResNet, load_pretrained


@pytest.fixture(scope='module')
def pictures(digits):
    "Digits with three channels that differ"
    grey = digits.train_x[:501, :, :, 0]
    return np.stack([grey, 255 - grey, grey//2], axis=-1)

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The network that ships, in both formats"
    folder = tmp_path_factory.mktemp('exported')
    return {format: export_model(None, format, folder/f'best{suffix}') for format, suffix in dict(onnx='.onnx', torch='.pt2').items()}

@pytest.fixture(scope='module')
def expected(pictures): return class_probabilities(load_pretrained(), pictures, cifar10_stats).numpy()

@pytest.fixture
def run(finished, tmp_path):
    "The run that is done; or a run folder of another network, whose norms have statistics of their own"
    def make(**network):
        folder = tmp_path/'run'
        shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns('checkpoint', 'plots'))
        if not network: return folder
        config = read_json(folder/'config.json')
        network = dict(width=config['settings']['width']) | network
        config['settings'] |= network
        write_json(folder/'config.json', config)
        set_seed(1)
        model = CustomResNet(10, **network)
        for _ in range(3): model(torch.randn(8, 3, 32, 32)*2 + 1)
        model.fc.weight.data /= model.eval()(torch.randn(8, 3, 32, 32)).std().detach() # else probabilities are all alike, or all 0 and 1
        for name in ('model', 'best'): save_weights(model, folder/f'{name}.safetensors')
        return folder
    return make

def of_torch(path):
    with open(path, 'rb') as f: return torch.export.load(f).module()

def everything(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}

# ---- what goes in and what comes out

def test_images_become_the_probabilities_of_the_package(pictures, expected):
    probs = ImagesToProbabilities(load_pretrained(), cifar10_stats)(torch.from_numpy(pictures[:100]))
    assert probs.dtype == torch.float32 and not probs.requires_grad and np.allclose(probs, expected[:100], atol=1e-6)

def test_the_network_that_is_given_stays_as_it_is(pictures):
    model = CustomResNet().to(torch.bfloat16, memory_format=torch.channels_last).train()
    net = ImagesToProbabilities(model, cifar10_stats)
    assert net(torch.from_numpy(pictures[:2])).dtype == torch.float32 and not any(m.training for m in net.modules())
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in model.parameters())

# ---- it says what PyTorch says

@pytest.mark.parametrize('n', [1, 7, pytest.param(501, marks=pytest.mark.slow)])
def test_both_agree_on_any_number_of_images(files, pictures, expected, n): # in one batch, as others would use them
    [by_onnx] = ort.InferenceSession(files['onnx']).run(['probabilities'], {'images': pictures[:n]})
    probs = dict(onnx=by_onnx, torch=of_torch(files['torch'])(torch.from_numpy(pictures[:n])).numpy())
    differences = {name: float(np.abs(p - expected[:n]).max()) for name, p in probs.items()}
    assert all(p.shape == (n, 10) and p.dtype == np.float32 for p in probs.values()) and max(differences.values()) < 1e-4
    assert len(set(expected.argmax(1))) > 3 and expected.max(1).min() < .6 # else the images say little

@pytest.mark.slow
def test_both_agree_on_photographs(files, real_cifar, figures):
    images = real_cifar.test_x[:1000]
    expected = class_probabilities(load_pretrained(), images, cifar10_stats).numpy()
    probs = dict(onnx=load_onnx(files['onnx'])(images), torch=of_torch(files['torch'])(torch.from_numpy(images)).numpy())
    differences = {name: float(np.abs(p - expected).max()) for name, p in probs.items()}
    assert max(differences.values()) < 1e-4 and all((p.argmax(1) == real_cifar.test_y[:1000]).mean() > .9 for p in probs.values())
    figures('export_1000', differences=differences, bytes={name: path.stat().st_size for name, path in files.items()})

def test_a_classifier_takes_no_image_and_a_list_and_more_than_fit_into_a_batch(files, pictures, expected):
    classify = load_onnx(files['onnx'])
    assert classify(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10) and classify.vocab == list(cifar10_classes)
    assert np.abs(classify(list(pictures[:3])) - expected[:3]).max() < 1e-4
    assert np.abs(classify(pictures) - expected).max() < 1e-4

def test_larger_images_pass_in_smaller_groups(files, monkeypatch):
    classify, passes = load_onnx(files['onnx']), []
    def note(images):
        passes.append(len(images))
        return np.full((len(images), 10), .1, np.float32)
    monkeypatch.setattr(classify, 'size', 64)
    monkeypatch.setattr(classify, '_probabilities', note)
    assert classify(np.zeros((130, 64, 64, 3), np.uint8)).shape == (130, 10) and passes == [125, 5]

@pytest.mark.parametrize('of_onnx', [False, True])
def test_each_classifier_takes_images_of_its_size_alone(files, pictures, of_onnx):
    classify, _ = load_classifier(files['onnx'] if of_onnx else None)
    assert classify(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10) and classify(list(pictures[:2])).shape == (2, 10)
    for wrong in (pictures[:2]/255, pictures[0], pictures[:2, :16], pictures[:2].transpose(0, 3, 1, 2), np.zeros((2, 64, 64, 3), np.uint8)):
        with pytest.raises(ValueError, match=re.escape(f'{wrong.dtype} {wrong.shape}')): classify(wrong)

networks = dict(batch=dict(ghost=4, conv_bias=True, dropout=.2, logit_scale=.125), group=dict(norm='group', n_groups=4), layer=dict(norm='layer', conv_bias=True, logit_scale=3.))

def test_there_is_a_network_to_export_for_each_norm(): assert set(networks) == set(get_args(Norm)), 'add one to `networks`'

@pytest.mark.parametrize('name', ['batch', *(pytest.param(name, marks=pytest.mark.slow) for name in get_args(Norm)[1:])])
def test_every_network_is_exported_in_silence(run, pictures, name, capfd):
    folder = run(**networks[name])
    paths = [export_model(folder, format) for format in ('onnx', 'torch')]
    assert [p.name for p in paths] == ['model.onnx', 'model.pt2'] and capfd.readouterr() == ('', '')
    model, config = load_run(folder)
    here = class_probabilities(model, pictures[:100], config['data']['stats']).numpy()
    for probs in (load_onnx(paths[0])(pictures[:100]), of_torch(paths[1])(torch.from_numpy(pictures[:100])).numpy()): assert np.abs(probs - here).max() < 1e-4
    unscaled = CustomResNet(10, **networks[name] | dict(logit_scale=1., width=config['settings']['width']))
    unscaled.load_state_dict(model.state_dict())
    differs = np.abs(class_probabilities(unscaled, pictures[:100], config['data']['stats']).numpy() - here).max() > .01
    assert differs == (model.logit_scale != 1) # else the scale could be missing

def test_a_run_of_other_classes_keeps_its_own(run, pictures):
    folder = run(norm='batch')
    config = read_json(folder/'config.json')
    config['data'] |= dict(vocab=['null', 'eins', 'zwei – „2“'], stats=[[.1, .2, .3], [.4, .5, .6]])
    write_json(folder/'config.json', config)
    for name in ('model', 'best'): save_weights(CustomResNet(3, width=config['settings']['width']), folder/f'{name}.safetensors')
    classify = load_onnx(export_model(folder))
    assert classify.vocab == ['null', 'eins', 'zwei – „2“'] and classify(pictures[:2]).shape == (2, 3)
    assert np.abs(classify(pictures[:50]) - class_probabilities(load_run(folder)[0], pictures[:50], config['data']['stats']).numpy()).max() < 1e-4

def test_last_and_best_weights_are_exported_under_their_names(run, pictures):
    folder = run()
    settings = settings_from(read_json(folder/'config.json')['settings'])
    save_weights(CustomResNet(**settings.network), folder/'best.safetensors')
    for weights, name in dict(last='model.pt2', best='best.pt2').items():
        path = export_model(folder, 'torch', weights=weights)
        model, config = load_run(folder, weights)
        assert path == folder/name
        assert np.abs(of_torch(path)(torch.from_numpy(pictures[:20])).numpy() - class_probabilities(model, pictures[:20], config['data']['stats']).numpy()).max() < 1e-4

# ---- one file, for others

def test_the_file_says_what_it_is(files):
    model = onnx.load(files['onnx'], load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert facts == dict(vocab=list(cifar10_classes), stats=[list(s) for s in cifar10_stats])
    assert not any(t.external_data for t in model.graph.initializer) and 4*6_573_130 < files['onnx'].stat().st_size < 4.1*6_573_130
    [image], [probs] = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in image.type.tensor_type.shape.dim]) == ('images', TensorProto.UINT8, ['N', 32, 32, 3])
    assert (probs.name, probs.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in probs.type.tensor_type.shape.dim]) == ('probabilities', TensorProto.FLOAT, ['N', 10])

@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_a_file_does_not_say_where_it_was_made(files, format):
    content = files[format].read_bytes()
    for place in (Path(cifar_fastai.__file__).parent, Path(torch.__file__).parent, files[format].parent, Path.home()):
        if len(str(place)) > 4: assert str(place).encode() not in content

@pytest.mark.slow
def test_the_same_weights_give_the_same_onnx_file(files):
    assert hashlib.sha256(export_model().read_bytes()).digest() == hashlib.sha256(files['onnx'].read_bytes()).digest()
    assert [p.name for p in Path().iterdir()] == ['best.onnx'] # in the current folder, under the name of the weights that ship

def alone(code, *hidden, **kwargs): # a process in which modules are not there
    hide = f'import sys\nfor name in {hidden!r}: sys.modules[name] = None\n'
    return subprocess.run([sys.executable, '-c', hide + code], capture_output=True, text=True, timeout=120, **kwargs)

def test_a_classifier_can_be_sent_to_another_process(files, pictures):
    classify = load_onnx(files['onnx'])
    sent = pickle.loads(pickle.dumps(classify))
    assert sent.process.pid != classify.process.pid and np.array_equal(sent(pictures[:3]), classify(pictures[:3]))

def test_onnx_runs_without_this_package_and_without_pytorch(files, pictures, expected):
    np.save('images.npy', pictures[:9])
    done = alone(f'''
import json, numpy as np, onnxruntime as ort
session = ort.InferenceSession({str(files['onnx'])!r})
vocab = json.loads(session.get_modelmeta().custom_metadata_map['vocab'])
[probs] = session.run(['probabilities'], {{'images': np.load('images.npy')}})
print([vocab[i] for i in probs.argmax(axis=1)])''', 'cifar_fastai', 'fastai', 'torch', 'onnx')
    assert (done.stdout.strip(), done.stderr) == (str([cifar10_classes[i] for i in expected[:9].argmax(1)]), '')

@pytest.mark.slow
def test_the_program_runs_without_this_package(files, pictures, expected):
    np.save('images.npy', pictures[:9])
    done = alone(f'''
import json, numpy as np, torch
extra = {{'vocab.json': '', 'stats.json': ''}}
program = torch.export.load({str(files['torch'])!r}, extra_files=extra).module()
probs = program(torch.from_numpy(np.load('images.npy')))
print([json.loads(extra['vocab.json'])[i] for i in probs.argmax(dim=1)], json.loads(extra['stats.json']))''', 'cifar_fastai', 'fastai', 'onnx', 'onnxruntime', 'onnxscript')
    assert done.stdout.strip() == f'{[cifar10_classes[i] for i in expected[:9].argmax(1)]} {[list(s) for s in cifar10_stats]}', done.stderr

def test_without_the_libraries_of_onnx_the_program_is_still_written(files):
    with forked.Forked(workers.export_without_onnx, files['onnx']) as process: out, err = process.communicate()
    written, *missing = out.splitlines()
    assert written == 'best.pt2' and all("pip install 'cifar_fastai[export]'" in line for line in missing), err
    assert [re.findall(r'\bonnx\w*', line) for line in missing] == [['onnx', 'onnxscript', 'onnxruntime'], ['onnxruntime']]
    assert [p.name for p in Path().iterdir()] == ['best.pt2']

# ---- nothing is written over, and nothing by halves

def test_a_suffix_may_be_in_upper_case():
    assert export_model(None, 'torch', 'network.PT2') == Path('network.PT2') and Path('network.PT2').exists()
    with pytest.raises(FileNotFoundError, match='no.ONNX'): load_classifier('no.ONNX')
    with pytest.raises(ValueError, match='network.PT2.*ONNX'): load_classifier('network.PT2')

@pytest.mark.parametrize('how', ['file', 'folder', 'link'])
def test_what_is_there_stays(how):
    out = Path('mine.pt2')
    if how == 'file': out.write_text('mine')
    elif how == 'folder': out.mkdir()
    else: out.symlink_to('nowhere')
    with pytest.raises(FileExistsError, match=r'mine\.pt2'): export_model(None, 'torch', out)
    assert [p.name for p in Path().iterdir()] == ['mine.pt2'] and (how != 'file' or out.read_text() == 'mine') and (how != 'link' or out.is_symlink())

@pytest.mark.parametrize('arguments, error, says', [
    (dict(format='tflite'), ValueError, "format.*'tflite'.*'onnx'.*'torch'"),
    (dict(weights='best'), ValueError, "weights.*'best'"),
    (dict(out='network.pt2'), ValueError, r'out\b.*\bnetwork\.pt2.*\.onnx\b'),
    (dict(out='network', format='torch'), ValueError, r'out\b.*\bnetwork\b.*\.pt2\b'),
    (dict(out='nowhere/network.onnx'), ValueError, r'out\b.*\bnowhere/network\.onnx\b.*folder'),
    (dict(run='nothing'), FileNotFoundError, 'nothing')])
def test_invalid_values_are_refused(arguments, error, says):
    with pytest.raises(error, match=f'^{says}'): export_model(**arguments)
    assert not list(Path().iterdir())

def test_a_run_that_diverged_is_refused(run):
    folder = run()
    model = load_run(folder)[0]
    model.fc.weight.data[0, 0] = torch.nan
    save_weights(model, folder/'model.safetensors')
    before = everything(folder)
    with pytest.raises(ValueError, match=rf'{folder.name}\b.*\bnan\b'): export_model(folder)
    assert everything(folder) == before

@pytest.mark.parametrize('format', ['onnx', pytest.param('torch', marks=pytest.mark.slow)])
def test_a_file_that_says_something_else_is_not_kept(monkeypatch, format):
    exporter, others = dict(onnx=torch.onnx, torch=torch.export)[format], ImagesToProbabilities(CustomResNet(), cifar10_stats)
    exported = exporter.export
    monkeypatch.setattr(exporter, 'export', lambda net, *args, **kwargs: exported(others, *args, **kwargs)) # makes a mistake
    with pytest.raises(ValueError, match=r'probabilities.*\b0\.\d'): export_model(None, format)
    assert not list(Path().iterdir())

@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_a_full_disk_leaves_no_file(format):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(OSError): export_model(None, format)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(Path().iterdir())

def test_an_interruption_leaves_no_file(monkeypatch):
    def interrupted(*args):
        assert [p.suffix for p in Path().iterdir()] == ['.part'] # it is written, and not yet named
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.export, 'load', interrupted)
    with pytest.raises(KeyboardInterrupt): export_model(None, 'torch')
    assert not list(Path().iterdir())

# ---- files from elsewhere

def refused(content, capfd, says=''):
    Path('hostile.onnx').write_bytes(content)
    with pytest.raises(ValueError) as e: load_onnx('hostile.onnx')
    assert re.match(rf'hostile\.onnx .*ONNX.*{says}', str(e.value)) and str(e.value).isprintable()
    assert capfd.readouterr() == ('', '')

@pytest.mark.parametrize('content', [b'', b'no network at all', bytes(1000), b'\xff'*1000, b'\x89PNG\r\n\x1a\n', b'PK\x03\x04'])
def test_what_is_no_onnx_file_is_refused(content, capfd): refused(content, capfd)

def test_an_exported_program_is_no_onnx_file(files, capfd): refused(files['torch'].read_bytes(), capfd)

@pytest.mark.parametrize('share', [.00001, .001, .3, .9, .9999, 'all but one byte'])
def test_a_truncated_file_is_refused(files, share, capfd):
    whole = files['onnx'].read_bytes()
    refused(whole[:-1 if isinstance(share, str) else int(share*len(whole))], capfd)

@pytest.mark.slow
def test_a_file_with_other_bytes_is_refused_or_gives_probabilities(files, pictures, capfd):
    whole, rng = files['onnx'].read_bytes(), np.random.default_rng(0)
    is_structure = np.ones(len(whole), bool)
    for t in onnx.load(files['onnx']).graph.initializer:
        if len(t.raw_data) > 1000: is_structure[(start := whole.find(t.raw_data)):start + len(t.raw_data)] = False
    places, n_refused = np.flatnonzero(is_structure), 0
    for _ in range(24):
        changed = bytearray(whole)
        for place in rng.choice(places, 3): changed[place] = rng.integers(256)
        Path('changed.onnx').write_bytes(changed)
        try: probs = load_onnx('changed.onnx')(pictures[:2])
        except ValueError as e:
            assert str(e).startswith('changed.onnx ') and str(e).isprintable()
            n_refused += 1
        else: assert np.allclose(probs.sum(1), 1, atol=1e-3)
    assert n_refused > 6 and capfd.readouterr() == ('', '')

def made_up(output=((.5, .5), (.5, .5)), vocab='["a", "b"]', takes=('images', TensorProto.UINT8, ['N', 32, 32, 3]), gives=('probabilities', TensorProto.FLOAT, ['N', 2]), nodes=None):
    "An ONNX file of one operation that gives `output`"
    value = helper.make_tensor('value', TensorProto.FLOAT, np.shape(output), np.ravel(output))
    nodes = nodes or [helper.make_node('Constant', [], [gives[0]], value=value)]
    graph = helper.make_graph(nodes, 'made_up', [helper.make_tensor_value_info(*takes)], [helper.make_tensor_value_info(*gives)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    if vocab is not None: helper.set_model_props(model, dict(vocab=vocab))
    return model.SerializeToString()

foreign = {
    'another input': (dict(takes=('x', TensorProto.FLOAT, [1, 3, 224, 224])), r'\bx\b.*float.*\b1, 3, 224, 224\b.*images.*uint8.*N, 32, 32, 3'),
    'channels first': (dict(takes=('images', TensorProto.UINT8, ['N', 3, 32, 32])), '3, 32, 32.*images.*uint8.*N, 32, 32, 3'),
    'an input with a strange name': (dict(takes=('\x1b[31m\n', TensorProto.UINT8, ['N', 32, 32, 3])), r'\\x1b\[31m'),
    'another output': (dict(gives=('logits', TensorProto.FLOAT, ['N', 2])), 'logits.*probabilities'),
    'an output of other classes': (dict(vocab='["a", "b", "c"]'), 'probabilities.*float.*N, 3'),
    'one image only': (dict(takes=('images', TensorProto.UINT8, [1, 32, 32, 3])), ''),
    'no classes': (dict(vocab=None), 'classes'), 'classes that are no list': (dict(vocab='{"a": 1}'), 'classes'),
    'classes that are no names': (dict(vocab='[1, 2]'), 'classes'), 'classes that are no JSON': (dict(vocab='['), ''), 'deep JSON': (dict(vocab='['*100_000), ''),
    'a class that writes to the terminal': (dict(vocab='["a", "\\u001b[31m"]'), 'classes'),
    'no probabilities': (dict(output=[[.5, .6], [.5, .5]]), 'probabilities'), 'nan': (dict(output=[[np.nan]*2]*2), 'probabilities'),
    'less than nothing': (dict(output=[[1.5, -.5], [.5, .5]]), 'probabilities'),
    'an unknown operation': (dict(nodes=[helper.make_node('\x1b[31mEvil', ['images'], ['probabilities'])]), 'Evil')}

@pytest.mark.parametrize('name', foreign)
def test_a_file_of_another_program_is_refused(name, capfd):
    changes, says = foreign[name]
    refused(made_up(**changes), capfd, says)

def test_the_files_that_are_made_up_differ_in_that_alone():
    Path('sound.onnx').write_bytes(made_up())
    classify = load_onnx('sound.onnx')
    assert classify.vocab == ['a', 'b'] and (classify(np.zeros((2, 32, 32, 3), np.uint8)) == .5).all()
    with pytest.raises(ValueError, match=r'sound\.onnx.*probabilities'): classify(np.zeros((3, 32, 32, 3), np.uint8))

def test_a_file_that_is_missing_or_none_or_too_large_is_refused():
    with pytest.raises(FileNotFoundError, match=r'nothing\.onnx'): load_onnx('nothing.onnx')
    Path('folder.onnx').mkdir()
    with pytest.raises(ValueError, match=r'folder\.onnx.*regular'): load_onnx('folder.onnx')
    with open('large.onnx', 'wb') as f: f.truncate(2**28 + 1)
    with pytest.raises(ValueError, match=r'large\.onnx.*268,435,457.*268,435,456'): load_onnx('large.onnx')
    os.mkfifo('pipe.onnx')
    with pytest.raises(ValueError, match=r'pipe\.onnx.*regular'): load_onnx('pipe.onnx')

def constant(name, value, dtype=np.int64): return helper.make_node('Constant', [], [name], value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))

half = constant('half', [[.5, .5], [.5, .5]], np.float32)

def sum_of(nodes): return made_up(nodes=[half, *nodes, helper.make_node('ReduceSum', ['z'], ['r'], keepdims=0), helper.make_node('Add', ['half', 'r'], ['probabilities'])])

def without_end(more_than=None):
    "A loop of 2**62 steps; with `more_than`, none for that many images, and 2**40 for each that is more"
    info = helper.make_tensor_value_info
    steps = [helper.make_node('Identity', [name], [f'{name}2']) for name in ('go_on', 'x')]
    body = helper.make_graph(steps, 'body', [info('i', TensorProto.INT64, []), info('go_on', TensorProto.BOOL, []), info('x', TensorProto.FLOAT, [2, 2])],
                             [info('go_on2', TensorProto.BOOL, []), info('x2', TensorProto.FLOAT, [2, 2])])
    n = [constant('n', 2**62)] if more_than is None else [
        helper.make_node('Shape', ['images'], ['shape']), constant('first', 0), helper.make_node('Gather', ['shape', 'first'], ['images_n']),
        constant('most', more_than), helper.make_node('Sub', ['images_n', 'most'], ['more']), constant('much', 2**40), helper.make_node('Mul', ['more', 'much'], ['n'])]
    return made_up(nodes=[half, *n, constant('yes', True, bool), helper.make_node('Loop', ['n', 'yes', 'half'], ['probabilities'], body=body)])

def of_many_nodes(n):
    names = ['half', *map(str, range(n - 1)), 'probabilities']
    return made_up(nodes=[half, *(helper.make_node('Relu', [a], [b]) for a, b in zip(names, names[1:]))])

def of_other_files():
    weights = TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key='location', value='weights.bin')
    model = onnx.ModelProto.FromString(made_up(nodes=[helper.make_node('Identity', ['w'], ['probabilities'])]))
    model.graph.initializer.append(weights)
    return model.SerializeToString()

costly = {
    'a loop': without_end, 'many nodes': lambda: of_many_nodes(500_000),
    'a giant constant': lambda: sum_of([constant('s', [100_000, 100_000]), helper.make_node('ConstantOfShape', ['s'], ['z'])]),
    'a giant that depends on the images': lambda: sum_of([constant('s', [50_000, 50_000]), helper.make_node('Cast', ['images'], ['f'], to=1), helper.make_node('ReduceMax', ['f'], ['m'], keepdims=0),
                                                          helper.make_node('Expand', ['m', 's'], ['z'])])}

@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow]*(name == 'many nodes')) for name in costly])
def test_a_file_that_takes_too_long_or_too_much_is_refused(name, capfd):
    Path('costly.onnx').write_bytes(costly[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r'costly\.onnx.*ONNX'): load_onnx('costly.onnx', timeout=5)
    assert capfd.readouterr() == ('', '') and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000 # kB

def test_a_file_that_refers_to_others_is_refused():
    Path('other.onnx').write_bytes(of_other_files())
    np.full(4, .5, np.float32).tofile('weights.bin')
    with pytest.raises(ValueError, match=r'other\.onnx.*weights.*files'): load_onnx('other.onnx')

def test_the_process_of_a_classifier_ends_with_it(files):
    classify = load_onnx(files['onnx'])
    process = classify.process
    assert process.poll() is None
    del classify
    assert process.poll() is not None

def waited(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until: time.sleep(.1)
    return condition()

@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_the_process_of_a_classifier_ends_with_a_process_that_is_killed():
    Path('loop.onnx').write_bytes(without_end(more_than=2))
    with forked.Forked(workers.classify_zeros, 'loop.onnx') as parent:
        assert waited(lambda: parent.said()[0].endswith('\n')), parent.said()
        pid = int(parent.said()[0])
        time.sleep(1) # it is at work
        parent.kill()
    def is_gone():
        try: os.kill(pid, 0)
        except ProcessLookupError: return True
        return Path(f'/proc/{pid}/stat').exists() and Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z'
    try: assert waited(is_gone)
    finally:
        if not is_gone(): os.kill(pid, 9)

@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_an_answer_that_was_interrupted_is_not_taken_for_the_next(files):
    def interrupt(*args): raise KeyboardInterrupt
    classify, images = load_onnx(files['onnx']), np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, .2)
        with pytest.raises(KeyboardInterrupt): classify(images[:500])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ValueError, match='interrupted'): classify(images[500:])

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='fork')
def test_a_classifier_is_not_shared_with_a_forked_process(files):
    classify = load_onnx(files['onnx'])
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try: classify(np.zeros((1, 32, 32, 3), np.uint8))
        except ValueError as e: os.write(writer, str(e).encode())
        finally: os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with open(reader) as f: assert 'forked' in f.read()
    assert classify(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 10)

def test_a_classifier_is_loaded_where_the_folder_is_gone(files, monkeypatch):
    monkeypatch.syspath_prepend('')
    Path('gone').mkdir()
    monkeypatch.chdir('gone')
    Path.cwd().rmdir()
    assert len(load_onnx(files['onnx']).vocab) == 10

@pytest.mark.parametrize('images', [np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8), []])
def test_what_are_no_images_are_refused(files, images):
    with pytest.raises(ValueError, match=r'images.*uint8 \(N, 32, 32, 3\)'): load_onnx(files['onnx'])(images)

# ---- the commands

def test_an_exported_run_predicts_as_the_run_does(run, small, capfd):
    folder = run(**networks['group'])
    Image.fromarray(small.test_x[3]).save('image.png')
    cifar_export([str(folder)])
    cifar_export([str(folder), '--format', 'torch', '--weights', 'best', '--out', 'program.pt2'])
    said = capfd.readouterr()
    assert str(folder/'model.onnx') in said.out and 'program.pt2' in said.out and said.err == '' and Path('program.pt2').exists()
    predicted = []
    for model in (folder, folder/'model.onnx'):
        cifar_predict(['--model', str(model), 'image.png'])
        predicted.append(capfd.readouterr())
    assert predicted[0] == predicted[1] and predicted[0].out.startswith('image.png: ')

def test_the_commands_refuse_in_one_sentence(small):
    Image.fromarray(small.test_x[3]).save('image.png')
    Path('text.onnx').write_text('no network')
    Path('there.onnx').write_text('mine')
    for command, args, says in [(cifar_predict, ['--model', 'text.onnx', 'image.png'], r'text\.onnx\b.*ONNX'),
                                (cifar_predict, ['--model', 'nothing.onnx', 'image.png'], r'nothing\.onnx'),
                                (cifar_export, ['--out', 'there.onnx'], r'there\.onnx\b.*exist'),
                                (cifar_export, ['nothing'], 'nothing')]:
        with pytest.raises(SystemExit) as e: command(args)
        assert re.fullmatch(f'{command.__name__}: {says}.*', e.value.code) # and not a line break

def test_threads_that_ask_at_once_get_their_own_answers(files):
    network, images = load_onnx(files['onnx']), np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(lambda i: network(images[i:i + 1]), range(24)))
    assert np.allclose(np.concatenate(answers), network(images), atol=1e-5)

@pytest.mark.slow
def test_a_class_may_be_called_location(run):
    folder = run()
    config = read_json(folder/'config.json')
    config['data']['vocab'][:2] = 'location', 'a location'
    write_json(folder/'config.json', config)
    assert load_onnx(export_model(folder)).vocab[:2] == ['location', 'a location']
