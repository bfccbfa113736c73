"""Makes README.md from nbs/index.ipynb, and keeps what the notebooks repeat true: links, and tables of recorded results.

The repository's address stands in settings.ini; a table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and
tools/tables.py makes it from the files under benchmarks/.

`python tools/readme.py` writes; with `--check` it only says what has drifted, and exits with 1. Standard library only."""
import argparse, json, posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path

from tables import tables

root = Path(__file__).resolve().parent.parent
notice = '<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->'


def settings(root=root): # the values of settings.ini, and `colab`, what every Colab link begins with
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    cfg = dict(config['DEFAULT'])
    return cfg | {'colab': 'https://colab.research.google.com/github/{user}/{repo}/blob/{branch}'.format(**cfg)}


def relink(text, folder='nbs'):
    "Targets of links and pictures relative to `folder` made relative to the root; code is left alone."
    def moved(m): return m[1] + posixpath.normpath(posixpath.join(folder, m[2]))
    parts = re.split(r'(```.*?```|`[^`\n]*`)', text, flags=re.DOTALL)
    target = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z][a-z0-9+.-]*:|[#/<])([^)\s"]+)', re.IGNORECASE)
    return ''.join(part if i % 2 else target.sub(moved, part) for i, part in enumerate(parts))


def fence(text, language): # longer than any fence inside `text`
    ticks = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{ticks}{language}\n{text}\n{ticks}'


def output_text(output):
    "What an output says in plain text; nothing for pictures, errors and warnings."
    data = output.get('data', {})
    if any(mime.startswith('image/') for mime in data) or output.get('name') == 'stderr': return ''
    text = ''.join(output.get('text') or data.get('text/plain', ''))
    return re.sub(r'\x1b\[[0-9;]*m', '', text).strip('\n')


def cell_blocks(cell): # the Markdown blocks of one cell
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'raw' or re.search(r'^#\s*\|\s*hide\s*$', source, re.MULTILINE): return []
    if cell['cell_type'] == 'markdown': return [relink(source).strip()]
    code = re.sub(r'^#\s*\|.*\n?', '', source, flags=re.MULTILINE).strip('\n')
    outputs = '\n'.join(filter(None, map(output_text, cell['outputs'])))
    return [fence(text, language) for text, language in ((code, 'python'), (outputs, 'text')) if text.strip()]


def readme(notebook): # README.md as text, from the parsed notebook
    blocks = [notice] + [block for cell in notebook['cells'] for block in cell_blocks(cell)]
    return '\n\n'.join(filter(None, blocks)) + '\n'


def true_links(text, cfg):
    "The text of a notebook file with its badges and `pip install git+…` lines pointing at this repository."
    text = re.sub(r'https://colab\.research\.google\.com/github/[\w.-]+/[\w.-]+/blob/[\w.-]+', cfg['colab'], text)
    text = re.sub(r'https://github\.com/[\w.-]+/[\w.-]+/actions', f"{cfg['git_url']}/actions", text)
    return re.sub(r'git\+https://github\.com/[\w.-]+/[\w.-]+', f"git+{cfg['git_url']}", text)


def with_tables(text, root=root):
    "The text of a notebook file with every marked table made anew."
    nb, marked = json.loads(text), re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)', re.DOTALL)
    changed = False
    for cell in nb['cells']:
        old = ''.join(cell['source'])
        new = marked.sub(lambda m: f'{m[1]}\n{tables[m[2]](root)}\n\n{m[3]}', old) if cell['cell_type'] == 'markdown' else old
        if new != old: cell['source'], changed = new.splitlines(keepends=True), True
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n' if changed else text # as nbdev writes it


def drifted(root=root): # {path: the text it should have}, of files that differ from it
    cfg, index = settings(root), root/'nbs/index.ipynb'
    notebooks = [index, *sorted((root/'nbs/tutorials').glob('*.ipynb'))]
    want = {path: with_tables(true_links(path.read_text(encoding='utf-8'), cfg), root) for path in notebooks}
    want[root/'README.md'] = readme(json.loads(want[index]))
    return {path: text for path, text in want.items() if not path.exists() or path.read_text(encoding='utf-8') != text}


def main(argv=None, root=root): # the exit status, or the sentence that says what drifted
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail when a file is not what it should be')
    check, files = parser.parse_args(argv).check, drifted(root)
    names = ', '.join(str(path.relative_to(root)) for path in files)
    if check: return f'Not what nbs/index.ipynb and settings.ini say: {names}. Run `make readme`.' if files else 0
    for path, text in files.items(): path.write_text(text, encoding='utf-8')
    print(f'Written: {names}.' if files else 'README.md is up to date.')


if __name__ == '__main__': sys.exit(main())
