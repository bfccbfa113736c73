"The demo in the browser: a served page, asked through its API and seen in Chromium"
import asyncio, base64, http.client, io, json, os, re, shutil, signal, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('gradio', reason='the extra app is not installed')
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import forked
from cifar_fastai.use.app import build_app, find_examples, save_examples
from cifar_fastai.use.serve import AppServer, check_serving, launch_app
from cifar_fastai.cli import cifar_app
from cifar_fastai.core import cifar10_classes, cifar10_stats, data_variable
from cifar_fastai.files import read_json, write_json
from cifar_fastai.data.images import load_digits
from cifar_fastai.data.picture import max_bytes, read_image
from cifar_fastai.look.interpret import class_probabilities
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

class Started(subprocess.Popen):
    "A command of a Python of its own, with what the tests use of `forked.Forked`"
    def __init__(self, *args, env, folder):
        self.files = folder/'out', folder/'err'
        with open(self.files[0], 'w') as out, open(self.files[1], 'w') as err:
            super().__init__([sys.executable, '-m', 'cifar_fastai.cli', *map(str, args)], stdout=out, stderr=err, env=env, preexec_fn=self.heed_signals)

    def heed_signals(self): # what starts the tests may ignore some, as nohup does, and the app keeps to that
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT: signal.signal(number, signal.SIG_DFL)

    def said(self): return [file.read_text() for file in self.files]
    def __exit__(self, *_):
        self.kill()
        self.wait()

@pytest.fixture(scope='module')
def serve(tmp_path_factory):
    "Start `cifar_app` as a process, and wait until it listens"
    with ExitStack() as stack:
        def start(*args, fork=True):
            port, temporary = free_port(), tmp_path_factory.mktemp('temporary')
            env = os.environ | dict(TMPDIR=str(temporary), GRADIO_TEMP_DIR=str(temporary))
            args = ['app', '--port', port, *args]
            started = forked.Forked(forked.command, *args, env=env) if fork else Started(*args, env=env, folder=tmp_path_factory.mktemp('said'))
            process = stack.enter_context(started)
            while not (line := process.said()[0]).endswith('\n'):
                assert process.poll() is None, process.said()
                time.sleep(.05)
            assert line.startswith(f'http://127.0.0.1:{port}/ (Ctrl-C ends it)')
            process.log, process.temporary, process.first_line = process.files[1], temporary, line
            return f'http://127.0.0.1:{port}/', process
        yield start

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

def test_every_answer_is_the_same_and_its_time_is_noted(client, picture, figures):
    first = ask(client, picture)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert ask(client, picture) == first
        seconds.append(time.perf_counter() - start)
    figures('app_answer', seconds=seconds)

def test_fifty_at_once_are_all_answered_and_none_gets_the_answer_of_another(address, examples, classify, figures):
    images = [np.asarray(Image.open(path).convert('RGB')) for path in examples]
    expected = classify(np.stack(images))
    start = time.perf_counter()
    def answer(i): # Gradio's own client may lose an answer when several threads ask
        _, _, event = predict(address, dict(path=upload(address, examples[i % 10].read_bytes())))
        content = send(address, 'GET', f"/gradio_api/call/predict/{json.loads(event)['event_id']}")[2].decode()
        return json.loads(re.search('^event: complete\ndata: (.*)$', content, re.MULTILINE)[1])[1]['confidences']
    with ThreadPoolExecutor(50) as pool: said = list(pool.map(answer, range(50)))
    figures('app_fifty_at_once', seconds=time.perf_counter() - start)
    said = np.array([[row['confidence'] for row in sorted(rows, key=lambda row: cifar10_classes.index(row['label']))] for rows in said])
    np.testing.assert_allclose(said, expected[np.arange(50) % 10], atol=1e-5)
    assert min(np.abs(p - q).max() for p, q in combinations(expected, 2)) > 1e-3 # no two pictures have the same answer

@pytest.mark.parametrize('name, content', [('empty.png', b''), ('text.jpg', b'no picture'), ('<script>alert(1)<script>.png', b'none'), ('page.svg', b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')])
def test_what_is_no_picture_gets_a_sentence_without_paths_or_tags(client, tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(AppError) as e: ask(client, tmp_path/name)
    assert Path(name).suffix in str(e.value) and '/' not in str(e.value) and '<' not in str(e.value)

def test_a_picture_that_was_cut_off_gets_a_sentence(client, picture, tmp_path):
    (tmp_path/'half.png').write_bytes(picture.read_bytes()[:5000])
    with pytest.raises(AppError, match=r'half\.png'): ask(client, tmp_path/'half.png')

def test_an_upload_over_the_limit_is_refused(client, tmp_path):
    (tmp_path/'large.bmp').write_bytes(b'BM' + bytes(600_000))
    with pytest.raises(Exception, match='(?i)413|too large|exceed|maximum'): ask(client, tmp_path/'large.bmp')
    assert 600_000 < max_bytes

# ---- what others may send

def send(address, method, path, body=None, headers=None, chunked=False):
    "-> (status, headers, content) of a request as it is written here, without what a client would correct"
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    host = (headers or {}).get('Host', where.netloc)
    sent = {'Host': host} | ({'Transfer-Encoding': 'chunked'} if chunked else {}) | (headers or {})
    if chunked: body = iter([body[i:i + 60_000] for i in range(0, len(body), 60_000)])
    try:
        connection.request(method, path, body, sent, encode_chunked=chunked)
    except (BrokenPipeError, ConnectionResetError): pass # it may answer before it has seen everything
    response = connection.getresponse()
    try: return response.status, response.headers, response.read()
    finally: connection.close()

def multipart(*contents, frame='--frame'):
    parts = [f'{frame}\r\nContent-Disposition: form-data; name="files"; filename="{i}.png"\r\n\r\n'.encode() + content + b'\r\n'
             for i, content in enumerate(contents)]
    return b''.join(parts) + f'{frame}--\r\n'.encode()

form = {'Content-Type': 'multipart/form-data; boundary=frame'}
as_json = {'Content-Type': 'application/json'}

def upload(address, content): # -> path on the server
    status, _, paths = send(address, 'POST', '/gradio_api/upload', multipart(content), form)
    assert status == 200
    return json.loads(paths)[0]

def predict(address, value, **more):
    body = json.dumps(dict(data=[value], **more)).encode()
    return send(address, 'POST', '/gradio_api/call/predict', body, as_json)

def files_below(folder): return {path: path.stat().st_size for path in folder.rglob('*') if path.is_file()}

@pytest.fixture(scope='module')
def guarded(serve): return serve('--data', 'digits', '--max_mb', .05)

@pytest.fixture(scope='module')
def launched(examples, classify):
    "Start the page in this process"
    servers = []
    async def launch(**kwargs): # in an event loop, for without one Gradio opens some that it never closes
        servers.append(launch_app(build_app(classify, cifar10_classes, examples=examples), port=free_port(), **kwargs))
        return servers[-1]
    yield lambda **kwargs: asyncio.run(launch(**kwargs))
    for server in servers: server.close()

@pytest.mark.parametrize('chunked', [False, True], ids=['announced', 'chunked'])
@pytest.mark.parametrize('path, headers', [('upload', form), ('queue/join', as_json), ('call/predict', as_json)])
def test_a_request_over_the_limit_is_refused_and_leaves_nothing(guarded, path, headers, chunked):
    address, process = guarded
    before = files_below(process.temporary)
    body = multipart(*[bytes(45_000)]*200) if path == 'upload' else json.dumps(dict(data=['x'*9_000_000])).encode()
    for how in {}, {'Connection': 'close'}: # the answer is read after all has been sent
        assert send(address, 'POST', f'/gradio_api/{path}', body, headers | how, chunked)[0] == 413
    assert files_below(process.temporary) == before

@pytest.mark.parametrize('chunked', [False, True], ids=['announced', 'chunked'])
@pytest.mark.parametrize('path', ['queue/join', 'call/predict', 'run/predict'])
def test_a_question_is_short_whatever_an_upload_may_have(guarded, path, chunked):
    body = json.dumps(dict(data=[dict(path='x', orig_name='&'*20_000)], session_hash='x')).encode()
    assert send(guarded[0], 'POST', f'/gradio_api/{path}', body, as_json, chunked)[0] == 413

@pytest.mark.parametrize('method, path', [('POST', '/'), ('POST', '/gradio_api/component_server'), ('PUT', '/gradio_api/upload'), ('GET', '/config')])
def test_no_other_route_takes_a_large_body(guarded, method, path):
    for chunked in False, True:
        assert send(guarded[0], method, path, bytes(900_000), form, chunked)[0] in (400, 404, 405, 413)

def test_a_file_as_large_as_the_limit_is_taken_and_one_byte_more_is_not(guarded):
    address, process = guarded
    assert Path(upload(address, bytes(50_000))).stat().st_size == 50_000
    before = files_below(process.temporary)
    assert send(address, 'POST', '/gradio_api/upload', multipart(bytes(50_001)), form)[0] == 413
    assert send(address, 'POST', '/gradio_api/upload', multipart(b'one', b'two'), form)[0] == 400
    assert files_below(process.temporary) == before

def test_many_uploads_do_not_fill_the_disk(guarded, picture):
    address, process = guarded
    for _ in range(40): upload(address, bytes(50_000))
    path = upload(address, picture.read_bytes())
    assert sum(files_below(process.temporary).values()) < 20*50_000 + 100_000
    assert predict(address, dict(path=path))[0] == 200

@pytest.mark.parametrize('method, path, body, headers', [
    ('GET', '/', None, {}), ('GET', '/config', None, {}), ('GET', '/gradio_api/queue/data?session_hash=a', None, {}),
    ('POST', '/gradio_api/upload', multipart(b'x'), form), ('POST', '/gradio_api/call/predict', b'{"data": [null]}', as_json),
    ('OPTIONS', '/gradio_api/upload', None, {'Access-Control-Request-Method': 'POST'})])
@pytest.mark.parametrize('who', [{'Origin': 'http://evil.test'}, {'Origin': 'null'}, {'Host': 'evil.test:{port}'}, {'Host': '127.0.0.1:1'},
                                 {'Host': 'evil.test:{port}', 'Origin': 'http://evil.test:{port}'}, {'Origin': 'http://127.0.0.1:1'},
                                 {'Host': ''}, {'X-Forwarded-Host': 'evil.test'}, {'Origin': 'http://127.0.0.1:{port}.evil.test'}])
def test_foreign_hosts_and_origins_are_refused(guarded, method, path, body, headers, who):
    address, process = guarded
    before = files_below(process.temporary)
    who = {k: v.format(port=urlsplit(address).port) for k, v in who.items()}
    status, answered, content = send(address, method, path, body, headers | who)
    assert status == 403 and b'evil' not in content
    assert not [name for name in answered if name.lower().startswith('access-control')] and 'evil' not in str(answered)
    assert files_below(process.temporary) == before

@pytest.mark.parametrize('name', ['127.0.0.1', 'localhost', 'LOCALHOST', '[::1]'])
def test_the_names_of_loopback_are_accepted(guarded, name):
    here = f'{name}:{urlsplit(guarded[0]).port}'
    for headers in {'Host': here}, {'Host': here, 'Origin': f'http://{here}'}: assert send(guarded[0], 'GET', '/config', headers=headers)[0] == 200

def test_more_hosts_can_be_named_and_on_every_network_the_machine_has_its_names(launched):
    server = launched(host='0.0.0.0', hosts=['Demo.example.org'])
    port = urlsplit(server.address).port
    here = f'http://127.0.0.1:{port}/'
    for name in f'localhost:{port}', f'127.0.0.1:{port}', f'{socket.gethostname()}:{port}', 'demo.example.org':
        assert send(here, 'GET', '/config', headers={'Host': name, 'Origin': f'https://{name}'})[0] == 200
    for name in f'demo.example.org:{port}', f'example.org:{port}', f'8.8.8.8:{port}':
        assert send(here, 'GET', '/config', headers={'Host': name})[0] == 403

def test_over_ipv6(launched):
    server = launched(host='::1')
    assert re.fullmatch(r'http://\[::1\]:\d+/', server.address) and send(server.address, 'GET', '/config')[0] == 200

def test_no_websocket_is_opened(guarded):
    headers = {'Connection': 'Upgrade', 'Upgrade': 'websocket', 'Sec-WebSocket-Key': 'AAAAAAAAAAAAAAAAAAAAAA==', 'Sec-WebSocket-Version': '13'}
    for path in '/', '/gradio_api/queue/join': assert send(guarded[0], 'GET', path, headers=headers)[0] != 101

def test_nothing_but_an_upload_is_opened_or_fetched(launched, picture, monkeypatch, tmp_path):
    server = launched()
    path = Path(upload(server.address, picture.read_bytes()))
    os.mkfifo(path.parent/'fifo')
    (path.parent/'link').symlink_to(picture)
    (path.parent/'loop').symlink_to(path.parent/'loop')
    looked_up, getaddrinfo = [], socket.getaddrinfo
    monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *args, **kwargs: (looked_up.append(host), getaddrinfo(host, *args, **kwargs))[1])
    with socket.create_server(('127.0.0.1', 0)) as bait:
        bait.settimeout(.1)
        url = f'http://localhost:{bait.getsockname()[1]}/x.png'
        meta = dict(meta=dict(_type='gradio.FileData'))
        paths = [url, url.replace('http', 'HTTPS', 1), 'https://no-such-host.test/x.png', f'//{urlsplit(url).netloc}/x.png', 'data:image/png;base64,AAAA', f'file://{picture}',
                 str(picture), '/etc/hostname', f'{path.parent}/../../../../etc/hostname', '../../etc/hostname', '', '.', str(path.parent),
                 str(path.parent/'fifo'), str(path.parent/'link'), str(path.parent/'loop'), f'{path}\0', '/'*3000 + 'x'*3000, 'https://[', '\ud800']
        values = [dict(path=p) | more for p in paths for more in ({}, meta)]
        values += [url, [dict(path=url) | meta], dict(url=url) | meta, dict(path=None, url=url) | meta, dict(path=[url]), dict(path=dict(path=url) | meta) | meta,
                   dict(x=dict(path=url) | meta), 3, True, 'x', [], {}, [[[dict(path=url)]]]]
        for value in values:
            status, _, content = predict(server.address, value)
            assert status == 422 and b'hostname' not in content, value
            body = json.dumps(dict(data=[value], fn_index=1, session_hash='x')).encode()
            assert send(server.address, 'POST', '/gradio_api/queue/join', body, as_json)[0] == 422, value
        for target in paths[:-1]:
            for route in f'/gradio_api/file={quote(target)}', f'/gradio_api/proxy={quote(target)}', f'/gradio_api/file/{quote(target)}':
                assert send(server.address, 'GET', route)[0] in (400, 404, 405), route
        # what comes with the path of an upload is not followed either
        own = dict(path=str(path), url=url, meta=dict(_type='gradio.FileData', more=dict(path=url, url=url) | meta), is_stream=True, more=dict(path=url) | meta)
        status, _, event = predict(server.address, own, event_data=dict(path=url) | meta)
        answer = send(server.address, 'GET', f"/gradio_api/call/predict/{json.loads(event)['event_id']}")[2].decode()
        assert 'event: complete' in answer and url not in answer
        with pytest.raises(TimeoutError): bait.accept()
    assert not [host for host in looked_up if host not in ('127.0.0.1', b'127.0.0.1')]

def test_files_are_served_as_downloads(guarded, picture):
    path = upload(guarded[0], b'<script>alert(1)</script>')
    status, headers, content = send(guarded[0], 'GET', f'/gradio_api/file={path}')
    assert status == 200 and content.startswith(b'<script') and headers['Content-Disposition'].startswith('attachment') and 'html' not in headers['Content-Type']

deep = b'['*100_000
wrong_bodies = [b'', b'{', b'null', b'[]', b'{}', b'"x"', b'{"data": null}', b'{"data": 1}', b'{"data": []}', b'{"data": [null, null]}', b'{"data": {"0": null}}', deep,
                b'{"data": ' + deep[:9000], b'\xff\xfe', b'{"data": [null], "session_hash": 1}', b'{"data": [' + b'9'*20_000 + b']}', b'{"data": [1e999]}', b'{"data": [NaN]}',
                b'{"data": ["\\ud800"]}', b'{"data": [-1]}', b'{"data": [{"path": 1}]}', b'{"data": [{"path": "x", "orig_name": 1}]}']
wrong_joins = [b'{"data": [null]}', b'{"data": [null], "fn_index": 1}', b'{"data": [null], "fn_index": 99, "session_hash": "x"}', b'{"data": [null], "fn_index": "x", "session_hash": "x"}',
               b'{"data": [null], "fn_index": -1, "session_hash": "x"}', b'{"data": [null], "fn_index": ' + b'9'*1000 + b', "session_hash": "x"}', b'{"data": [0], "fn_index": 0, "session_hash": "x"}',
               b'{"data": [null], "fn_index": 1, "session_hash": "' + b'x'*5000 + b'"}', b'{"data": [null], "fn_index": 1, "session_hash": "x", "trigger_id": "x"}']
wrong_runs = [b'{"data": [null], "fn_index": 1, "session_hash": "x"}', b'{"data": [-1], "fn_index": 0, "session_hash": "x"}', b'{"data": [10], "fn_index": 0, "session_hash": "x"}',
              b'{"data": [' + b'9'*500 + b'], "fn_index": 0, "session_hash": "x"}', b'{"data": [null], "fn_index": 0, "session_hash": "x"}']

def test_malformed_requests_get_a_4xx_and_nothing_in_the_log(guarded):
    address, process = guarded
    asked = [('POST', f'/gradio_api/{path}', body, as_json) for path in ('call/predict', 'queue/join', 'run/predict') for body in wrong_bodies]
    asked += [('POST', '/gradio_api/queue/join', body, as_json) for body in wrong_joins]
    asked += [('POST', '/gradio_api/run/predict', body, as_json) for body in wrong_runs]
    asked += [('POST', f'/gradio_api/{path}', b'{"data": [null]}', as_json)
              for path in ('call/nope', 'call/', 'call/load_example', 'run/nope', 'api/predict', 'api/nope', 'call/v2/nope', 'call/v2/predict', 'stream/x', 'cancel', 'component_server', 'process_recording', 'vibe-edit')]
    asked += [('GET', path, None, {}) for path in (
        '/nope', '/%00', '/static/%00', '/assets/%00', '/assets/' + 'x'*300, '/static/%3F' + 'x'*300, '/static/' + '%F0%9F%98%80'*90, '/static/a%0Ab', '/assets/&' + 'x'*250, '/assets/../../etc/passwd', '/static/' + 'a/'*5000, '/static/%2e%2e/%2e%2e/x', '/gradio_api/file=%00', '/gradio_api/file=' + 'x'*300, '/gradio_api/call/predict/nope',
        '/gradio_api/queue/data?session_hash=nope', '/gradio_api/queue/data', '/gradio_api/stream/a/b/1/playlist.m3u8', '/gradio_api/custom_component/a/client/component/x', '/gradio_api/deep_link?session_hash=x', '/docs', '/openapi.json')]
    content_types = ['', 'multipart/form-data', 'multipart/form-data; boundary=', 'multipart/form-data; boundary=other', 'multipart/form-data; boundary=frame; charset=nope', 'application/x-www-form-urlencoded', 'text/plain', 'x'*1000]
    forms = [multipart(b'x').replace(*change) for change in ((b'name="files"', b'name="other"'), (b'; filename="0.png"', b''), (b'Content-Disposition', b'X'), (b'frame--', b''), (b'0.png"\r\n', b'0.png"\r\n' + b'x'*9000 + b'\r\n'), (b'form-data; ', b'\xff'))]
    asked += [('POST', '/gradio_api/upload?upload_id=x', multipart(b'x'), {'Content-Type': kind}) for kind in content_types if 'frame' not in kind]
    asked += [('POST', f'/gradio_api/upload{query}', body, form) for body in [b'', b'x', *forms[:3], *forms[4:]] for query in ('', '?upload_id=x')]
    logged, before = process.log.read_text(), files_below(process.temporary)
    for method, path, body, headers in asked:
        status = send(address, method, path, body, headers)[0]
        assert 400 <= status < 500, (status, method, path, (body or b'')[:100], headers)
    for path in '/?page=nope', '/?deep_link=../../x', '/config?page=nope', '/gradio_api/info?page=nope': assert send(address, 'GET', path)[0] == 200
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as s:
        s.sendall(b'nonsense\r\n\r\n')
        assert s.recv(100).startswith(b'HTTP/1.1 400')
    assert process.log.read_text() == logged and files_below(process.temporary) == before

def test_who_leaves_early_is_not_in_the_log(guarded, picture):
    address, process = guarded
    logged, where = process.log.read_text(), urlsplit(address)
    path = upload(address, picture.read_bytes())
    _, _, event = predict(address, dict(path=path))
    for head in (f"GET /gradio_api/call/predict/{json.loads(event)['event_id']} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n",
                 f'POST /gradio_api/upload HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: multipart/form-data; boundary=frame\r\nContent-Length: 1000\r\n\r\n--frame',
                 f'POST /gradio_api/call/predict HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{'):
        with socket.create_connection((where.hostname, where.port)) as s: s.sendall(head.encode())
    assert predict(address, dict(path=path))[0] == 200
    assert process.log.read_text() == logged

def test_answers_that_nobody_reads_are_bounded(launched, picture):
    server = launched()
    path = upload(server.address, picture.read_bytes())
    def join(session):
        body = json.dumps(dict(data=[dict(path=path)], fn_index=1, session_hash=session)).encode()
        return send(server.address, 'POST', '/gradio_api/queue/join', body, as_json)[0]
    statuses = [join('x') for _ in range(400)]
    assert set(statuses) == {200, 429} and statuses[-1] == 429
    assert join('y') == 200 and send(server.address, 'GET', '/gradio_api/queue/data?session_hash=x')[0] == 200
    assert join('x') == 200

def test_an_example_that_was_clicked_is_classified(launched, examples, classify):
    server = launched()
    def post(path, **body): return send(server.address, 'POST', f'/gradio_api/{path}', json.dumps(body | dict(session_hash='clicked')).encode(), as_json)
    status, _, loaded = post('run/predict', data=[3], fn_index=0)
    assert status == 200
    path = json.loads(loaded)['data'][0]['value']['path']
    assert post('queue/join', data=[dict(path=path)], fn_index=1)[0] == 200
    answer = send(server.address, 'GET', '/gradio_api/queue/data?session_hash=clicked')[2].decode()
    [done] = [message for message in map(json.loads, re.findall('^data: (.*)$', answer, re.MULTILINE)) if message['msg'] == 'process_completed']
    expected = cifar10_classes[classify(np.asarray(Image.open(examples[3]).convert('RGB'))[None])[0].argmax()]
    assert done['success'] and done['output']['data'][1]['label'] == expected

@pytest.mark.slow
def test_a_session_that_ends_while_it_is_read_is_not_in_the_log(guarded):
    address, process = guarded
    logged, where = process.log.read_text(), urlsplit(address)
    body = json.dumps(dict(data=[None], fn_index=1, session_hash='shared')).encode()
    assert send(address, 'POST', '/gradio_api/queue/join', body, as_json)[0] == 200
    assert send(address, 'GET', '/gradio_api/queue/data?session_hash=shared')[0] == 200 # the answer
    readers = [socket.create_connection((where.hostname, where.port)) for _ in range(3)]
    try:
        for reader in readers:
            reader.sendall(f'GET /gradio_api/queue/data?session_hash=shared HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n'.encode())
            assert reader.recv(15) == b'HTTP/1.1 200 OK'
        for reader in readers[:2]: reader.close() # Gradio deletes the session
        while send(address, 'GET', '/gradio_api/queue/data?session_hash=shared')[0] != 404: time.sleep(.1)
        readers[2].settimeout(60)
        received = b''
        while not received.endswith(b'0\r\n\r\n'): received += readers[2].recv(10_000)
    finally:
        for reader in readers: reader.close()
    assert process.log.read_text() == logged

# ---- connections

unfinished = [b'', b'G', b'GET / HTTP/1.1\r\nHost: x\r\n', b'GET /config HTTP/1.1\r\nHost: {host}\r\n\r\nGET /', b'GET /config HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n',
              b'POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=frame\r\nContent-Length: 1000\r\n\r\n--frame',
              b'POST /gradio_api/call/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{']

def test_connections_that_do_not_finish_their_requests_are_closed(launched):
    server = launched(timeout=1)
    where = urlsplit(server.address)
    def is_closed(start, dripping):
        with socket.create_connection((where.hostname, where.port)) as s:
            s.sendall(start.replace(b'{host}', where.netloc.encode()))
            s.settimeout(.2)
            for _ in range(200): # of them, a few seconds' worth happen
                try:
                    if dripping: s.sendall(b'a')
                    if not s.recv(100_000): return True
                except TimeoutError: pass
                except ConnectionError: return True
        return False
    tried = list(product(unfinished, (False, True)))
    with ThreadPoolExecutor(len(tried)) as pool: closed = list(pool.map(is_closed, *zip(*tried)))
    assert all(closed), [how for how, done in zip(tried, closed) if not done]
    assert send(server.address, 'GET', '/config')[0] == 200

def test_connections_are_bounded(launched, monkeypatch):
    monkeypatch.setattr(AppServer, 'max_connections', 3)
    server = launched(timeout=60)
    where = urlsplit(server.address)
    first = [socket.create_connection((where.hostname, where.port)) for _ in range(3)]
    try:
        with socket.create_connection((where.hostname, where.port)) as one_more:
            one_more.settimeout(30)
            try: assert one_more.recv(1) == b''
            except ConnectionResetError: pass
        first[0].sendall(f'GET /config HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n'.encode())
        assert first[0].recv(15) == b'HTTP/1.1 200 OK'
    finally:
        for each in first: each.close()

@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_temporary_files_are_gone_however_it_ends(serve, picture, number):
    address, process = serve('--data', 'digits', fork=False)
    where = urlsplit(address)
    path = upload(address, picture.read_bytes())
    _, _, event = predict(address, dict(path=path))
    assert len(files_below(process.temporary)) > 10 # examples are among them
    with socket.create_connection((where.hostname, where.port)) as uploading, socket.create_connection((where.hostname, where.port)) as waiting, \
         socket.create_connection((where.hostname, where.port)) as staying:
        uploading.sendall(f'POST /gradio_api/upload HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: multipart/form-data; boundary=frame\r\nContent-Length: 5000000\r\n\r\n'.encode() + multipart(bytes(3_000_000))[:-20])
        waiting.sendall(f"GET /gradio_api/call/predict/{json.loads(event)['event_id']} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
        staying.sendall(f"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
        assert staying.recv(15) == b'HTTP/1.1 200 OK'
        process.send_signal(number)
        assert process.wait(240) == 128 + number, process.said()
    assert not list(process.temporary.iterdir()) and process.said()[1] == ''

@pytest.mark.slow
def test_closing_and_leaving_delete_the_temporary_files(tmp_path):
    code = """
from cifar_fastai.use.app import build_app, find_examples
from cifar_fastai.use.serve import launch_app
import numpy as np, socket, sys
with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
page = build_app(lambda images: np.full((len(images), 10), .1), list('abcdefghij'), examples=find_examples('digits'))
server = launch_app(page, port=port)
server.uploads.save(b'x')
server.close()
server.close()
assert not server.uploads.folder.exists()
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=os.environ | dict(TMPDIR=str(tmp_path)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == '' and list(tmp_path.iterdir()) == []

# ---- the command

def test_a_port_that_is_taken_is_refused_in_one_sentence(command):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(OSError, match=rf'127\.0\.0\.1:{port}\b.*port'): check_serving('127.0.0.1', port, 10)
        done = command('app', '--port', port)
    assert done.returncode == 1 and re.fullmatch(rf'cifar_app: .*127\.0\.0\.1:{port}\b.*\n', done.stderr)

@pytest.mark.parametrize('args, said', [(['--port', '0'], 'port is 0'), (['--max_mb', '0'], 'max_mb is 0'), (['--max_mb', 'inf'], 'max_mb is inf'), (['no/such/run'], 'no/such/run'), (['--weights', 'best'], "weights is 'best'"), (['--data', 'no/such/data'], 'no/such/data')])
def test_wrong_arguments_get_one_sentence(args, said):
    with pytest.raises(SystemExit) as e: cifar_app(args if '--port' in args else ['--port', str(free_port()), *args])
    assert e.value.code.startswith('cifar_app: ') and said in e.value.code and '\n' not in e.value.code

def test_without_gradio_the_command_names_the_extra(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; import importlib.util as u; f = u.find_spec; import cifar_fastai.core as c; c.find_spec = lambda name: None if name == 'gradio' else f(name); from cifar_fastai.cli import main; main(['app'])"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert re.fullmatch(r"cifar_app: .*gradio.*pip install 'cifar_fastai\[app\]'\n", done.stderr)

def test_examples_are_the_first_of_each_class_and_are_not_downloaded(tmp_path, empty_home):
    digits = load_digits()
    paths = save_examples(digits, tmp_path/'pictures')
    for label, path in enumerate(paths): assert (np.asarray(Image.open(path)) == digits.test_x[digits.test_y == label][0]).all()
    assert find_examples() == [] and len(find_examples('digits', tmp_path/'others')) == 10

@pytest.fixture
def examples_of(monkeypatch):
    "The example images of `cifar_app`, which downloads nothing"
    def fetch(urls, *args, **kwargs):
        if urls: pytest.fail('downloads')
        raise FileNotFoundError('no address')
    for module in 'source', 'named': monkeypatch.setattr(f'cifar_fastai.data.{module}.fetch_archive', fetch)
    offered = []
    def page(*_, examples, **__):
        offered.append(examples)
        raise ValueError('enough')
    monkeypatch.setattr('cifar_fastai.use.app.build_app', page)
    def examples(*args):
        with pytest.raises(SystemExit, match='enough'): cifar_app(['--port', str(free_port()), *map(str, args)])
        return offered.pop()
    return examples

@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_the_images_of_a_run_are_not_downloaded_as_examples(finished, examples_of, empty_home, tmp_path, name):
    run = shutil.copytree(finished[0], tmp_path/'run')
    assert len(examples_of(run)) == 10
    config = read_json(run/'config.json')
    config['settings']['data'] = name
    write_json(run/'config.json', config)
    assert examples_of(run) == []

def test_a_file_of_other_classes_has_no_photos_of_cifar10_as_examples(examples_of, monkeypatch, small_archive):
    monkeypatch.setenv(data_variable, str(small_archive))
    for vocab, n in (list(cifar10_classes), 10), (['cat', 'dog'], 0):
        monkeypatch.setattr('cifar_fastai.use.predict.load_classifier', lambda *_: (SimpleNamespace(size=32), vocab))
        assert len(examples_of('some.onnx')) == n and len(examples_of('some.onnx', '--data', 'digits')) == 10

def test_it_says_when_there_is_nothing_to_click_on(serve):
    assert serve()[1].first_line.endswith(' give --data\n')

# ---- in a browser

def test_in_a_browser_an_upload_gets_the_class_that_cifar_predict_gives(browser, address, picture, command):
    page = browser.new_page(viewport=dict(width=1100, height=900))
    errors, hosts = [], set()
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: hosts.add(r.url.split('/')[2]) if r.url.startswith(('http', 'ws')) else None)
    page.goto(address)
    page.get_by_text('Example images').wait_for()
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
    page.get_by_text('bad.png cannot be read as an image').wait_for(timeout=10_000)
    page.close()

def test_on_a_phone_nothing_sticks_out(browser, address):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto(address)
    page.get_by_text('Example images').wait_for()
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
    assert page.title() == 'Image classifier'
    page.close()
