"The demo in the browser: a served page, asked through its API and seen in Chromium"
import base64, io, json, os, re, shutil, signal, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('gradio', reason='the extra app is not installed')
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from cifar_fastai.app import check_serving, find_examples, save_examples
from cifar_fastai.cli import cifar_app
from cifar_fastai.core import cifar10_classes, cifar10_stats, read_json, write_json
from cifar_fastai.data import load_digits, max_bytes, read_image
from cifar_fastai.interpret import class_probabilities
from cifar_fastai.models import load_pretrained

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def classify():
    network = load_pretrained()
    return lambda images: class_probabilities(network, list(images), cifar10_stats).numpy()

@pytest.fixture(scope='module')
def examples(tmp_path_factory): return save_examples(load_digits(), tmp_path_factory.mktemp('examples'))

@pytest.fixture(scope='module')
def serve(tmp_path_factory):
    "Start `cifar_app` as a process of its own, and wait until it listens"
    processes = []
    def start(*args):
        port = free_port()
        log = open(tmp_path_factory.mktemp('app')/'stderr', 'w+')
        process = subprocess.Popen([sys.executable, '-m', 'cifar_fastai.cli', 'app', '--port', str(port), *map(str, args)], stdout=subprocess.PIPE, stderr=log, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), # a shell ignores it in what it runs in the background
                                   env=os.environ | dict(GRADIO_TEMP_DIR=str(tmp_path_factory.mktemp('uploads'))))
        processes.append((process, log))
        process.first_line = process.stdout.readline()
        log.seek(0)
        assert process.first_line.startswith(f'http://127.0.0.1:{port}/ (Ctrl-C ends it)'), log.read()
        return f'http://127.0.0.1:{port}/', process
    yield start
    for process, log in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()

@pytest.fixture(scope='module')
def address(serve): return serve('--data', 'digits', '--max_mb', .5)[0]

@pytest.fixture(scope='module')
def client(address): return Client(address, verbose=False)

@pytest.fixture
def picture(tmp_path): # not square, and larger than 32 pixels
    path = tmp_path/'a picture.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(path)
    return path

def ask(client, path): return client.predict(handle_file(str(path)), api_name='/predict')

def test_the_app_says_what_cifar_predict_says(client, command, picture, examples):
    for path in picture, examples[0]:
        said = ask(client, path)[1]
        done = command('predict', path)
        name, percent = re.fullmatch(rf'{re.escape(str(path))}: (\w+) ([\d.]+)%\n', done.stdout).groups()
        assert said['label'] == name and abs(100*said['confidences'][0]['confidence'] - float(percent)) < .06

def test_it_shows_the_pixels_that_the_network_sees(client, picture):
    shown = re.search('base64,([^"]+)"', ask(client, picture)[0])[1]
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert('RGB')) == read_image(picture)).all()

def test_all_classes_are_shown_and_sum_to_one(client, picture):
    said = ask(client, picture)[1]['confidences']
    assert {row['label'] for row in said} == set(cifar10_classes) and abs(sum(row['confidence'] for row in said) - 1) < 1e-5

def test_an_answer_takes_less_than_a_second(client, picture, figures):
    ask(client, picture)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ask(client, picture)
        seconds.append(time.perf_counter() - start)
    figures('app_answer', seconds=seconds)
    assert np.median(seconds) < 1

def test_fifty_at_once_are_all_answered_and_none_gets_the_answer_of_another(client, examples, classify, figures):
    images = [np.asarray(Image.open(path).convert('RGB')) for path in examples]
    expected = classify(np.stack(images))
    start = time.perf_counter()
    with ThreadPoolExecutor(50) as pool: said = list(pool.map(lambda i: ask(client, examples[i % 10])[1]['confidences'], range(50)))
    figures('app_fifty_at_once', seconds=time.perf_counter() - start)
    said = np.array([[row['confidence'] for row in sorted(rows, key=lambda row: cifar10_classes.index(row['label']))] for rows in said])
    np.testing.assert_allclose(said, expected[np.arange(50) % 10], atol=1e-5)
    assert min(np.abs(p - q).max() for p, q in combinations(expected, 2)) > 1e-3 # no two pictures have the same answer

@pytest.mark.parametrize('name, content', [('empty.png', b''), ('text.jpg', b'no picture'), ('<script>alert(1)<script>.png', b'none'), ('page.svg', b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')])
def test_what_is_no_picture_gets_a_sentence_without_paths_or_tags(client, tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(AppError) as e: ask(client, tmp_path/name)
    assert 'is no image that can be read' in str(e.value) and '/' not in str(e.value) and '<' not in str(e.value)

def test_a_picture_that_was_cut_off_gets_a_sentence(client, picture, tmp_path):
    (tmp_path/'half.png').write_bytes(picture.read_bytes()[:5000])
    with pytest.raises(AppError, match='half.png is no image that can be read'): ask(client, tmp_path/'half.png')

def test_an_upload_over_the_limit_is_refused(client, tmp_path):
    (tmp_path/'large.bmp').write_bytes(b'BM' + bytes(600_000))
    with pytest.raises(Exception, match='(?i)413|too large|exceed|maximum'): ask(client, tmp_path/'large.bmp')
    assert 600_000 < max_bytes

def test_files_of_this_machine_cannot_be_asked_for(address, picture):
    headers = {'Content-Type': 'application/json'}
    for path in picture, '/etc/hostname', picture.parent/'no such file', '':
        body = json.dumps(dict(data=[dict(path=str(path), meta=dict(_type='gradio.FileData'))])).encode()
        with urlopen(Request(f'{address}gradio_api/call/predict', body, headers)) as response: event = json.load(response)['event_id']
        with urlopen(f'{address}gradio_api/call/predict/{event}') as response: said = response.read().decode()
        assert said.startswith('event: error') and 'confidence' not in said and 'is no image' not in said # by Gradio, or by `build_app`

def test_a_port_that_is_taken_is_refused_in_one_sentence(command):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(OSError, match=f'127.0.0.1:{port} cannot be listened on .*: give another port'): check_serving('127.0.0.1', port, 10)
        done = command('app', '--port', port)
    assert done.returncode == 1 and re.fullmatch(r'cifar_app: .* cannot be listened on .*\n', done.stderr)

@pytest.mark.parametrize('args, said', [(['--port', '0'], 'port is 0'), (['--max_mb', '0'], 'max_mb is 0'), (['no/such/run'], 'no/such/run is not a run folder'), (['--weights', 'best'], 'weights is'), (['--data', 'no/such/data'], 'does not exist')])
def test_wrong_arguments_get_one_sentence(args, said):
    with pytest.raises(SystemExit) as e: cifar_app(args if '--port' in args else ['--port', str(free_port()), *args])
    assert e.value.code.startswith('cifar_app: ') and said in e.value.code and '\n' not in e.value.code

def test_without_gradio_the_command_names_the_extra(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; import importlib.util as u; f = u.find_spec; import cifar_fastai.core as c; c.find_spec = lambda name: None if name == 'gradio' else f(name); from cifar_fastai.cli import main; main(['app'])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "cifar_app: gradio is not installed: pip install 'cifar_fastai[app]'\n"

def test_examples_are_the_first_of_each_class_and_are_not_downloaded(tmp_path, empty_home):
    digits = load_digits()
    paths = save_examples(digits, tmp_path/'pictures')
    for label, path in enumerate(paths): assert (np.asarray(Image.open(path)) == digits.test_x[digits.test_y == label][0]).all()
    assert find_examples() == [] and len(find_examples('digits', tmp_path/'others')) == 10

def test_the_command_ends_when_told_and_says_when_there_is_nothing_to_click_on(serve):
    _, process = serve()
    assert process.first_line.endswith('; no pictures to click on: give --data\n')
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130)

# ---- in a browser

def test_in_a_browser_an_upload_gets_the_class_that_cifar_predict_gives(browser, address, picture, command):
    page = browser.new_page(viewport=dict(width=1100, height=900))
    errors, hosts = [], set()
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: hosts.add(r.url.split('/')[2]) if r.url.startswith(('http', 'ws')) else None)
    page.goto(address)
    page.get_by_text('or click on one of these').wait_for()
    page.set_input_files('input[type=file]', str(picture))
    expected = command('predict', picture).stdout.split(': ')[1].split()[0]
    page.locator('h2[data-testid=label-output-value]', has_text=expected).wait_for(timeout=10_000)
    assert not errors and hosts == {address.split('/')[2]}
    page.close()

def test_in_a_browser_an_example_can_be_clicked_and_a_bad_file_gets_a_sentence(browser, address, examples, classify, tmp_path):
    page = browser.new_page(viewport=dict(width=1100, height=900))
    page.goto(address)
    page.locator('#examples button').nth(3).click()
    expected = cifar10_classes[classify(np.asarray(Image.open(examples[3]).convert('RGB'))[None])[0].argmax()]
    page.locator('h2[data-testid=label-output-value]', has_text=expected).wait_for(timeout=10_000)
    (tmp_path/'bad.png').write_bytes(b'no picture')
    page.reload()
    page.set_input_files('input[type=file]', str(tmp_path/'bad.png'))
    page.get_by_text('bad.png is no image that can be read').wait_for(timeout=10_000)
    page.close()

def test_on_a_phone_nothing_sticks_out(browser, address):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto(address)
    page.get_by_text('or click on one of these').wait_for()
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    page.close()

def test_class_names_are_text_in_the_page(browser, serve, finished, picture, tmp_path):
    run = shutil.copytree(finished[0], tmp_path/'run')
    config = read_json(run/'config.json')
    config['data']['vocab'][:2] = ['<script>document.title="run"</script>', '<img src=x onerror=\'document.title="run"\'>']
    write_json(run/'config.json', config)
    page = browser.new_page()
    page.goto(serve(run)[0])
    page.set_input_files('input[type=file]', str(picture))
    page.locator('h2[data-testid=label-output-value]').wait_for(timeout=10_000)
    page.get_by_text('<script>document.title').first.wait_for()
    assert page.title() == 'What is it?'
    page.close()
