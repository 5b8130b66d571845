"The package around the code: metadata, exports, documentation, notebooks"
import ast
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser

import pytest
import yaml
from fastai.basics import Learner
from fastcore.docments import docments

import fastai_bn
import fastai_bn.all
import readme
from helpers import MODULES, ROOT, public_names, public_object
from nb2md import convert, page

NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
API = ['AccumulateGradBN','Window','capture_moments','keep_running_stats','ActivationPager','MicroBatched',
       'precise_bn','Moments','bn_layers','bn_to_gn','weight_standardize','gn_unet_learner','image_normalize',
       'ImageNormalize','HPADataLoaders','make_hpa','HPA_LABELS']
MOVED = ['BNCapture','BNUpdates','capture_moments','hold_updates','update_running_stats']  # from moments to capture

def read(name): return (ROOT/name).read_text(encoding='utf-8')
def config(name): return yaml.safe_load(read(name))

def settings():
    "settings.ini"
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    return ini['DEFAULT']

def sources(file):
    "The code cells of a notebook"
    cells = json.loads(file.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']

PUBLIC = public_names()

def test_all_exports_the_api():
    for n in API: assert hasattr(fastai_bn.all, n) and n in fastai_bn.all.__all__
    assert Learner.precise_bn

def own_parameters(f):
    "Names of the parameters of `f` itself: others are delegated, and documented there"
    ps = [p for p in inspect.signature(f).parameters.values() if p.kind not in (p.VAR_KEYWORD,p.VAR_POSITIONAL)]
    names = [p.name for p in ps if p.name not in ('self','args','kwargs')]
    code = getattr(f, '__code__', None)
    return names if code is None else [n for n in names if n in code.co_varnames]

@pytest.mark.parametrize('module,name', PUBLIC)
def test_public_names_are_documented(module, name):
    o = public_object(module, name)
    if not callable(o): return
    assert o.__doc__ and o.__doc__.strip(), f'{name} has no docstring'
    if inspect.isclass(o) and '__init__' not in vars(o): return  # its arguments are its parent's
    f = o.__init__ if inspect.isclass(o) else o
    docs = docments(o if dataclasses.is_dataclass(o) else f, full=False)
    for p in own_parameters(f): assert docs.get(p), f'{name}: parameter {p} has no comment'

@pytest.mark.parametrize('module,name', PUBLIC)
def test_public_names_have_an_example_that_runs(module, name):
    "Each stands in a cell of its notebook that is shown and that nbdev-test runs, or is what another name there gives"
    hidden = re.compile(r'^#\| *(export|hide$|eval: false)', flags=re.M)
    shown = [s for s in sources(next(ROOT.glob(f'nbs/*_{module}.ipynb'))) if not hidden.search(s)]
    assert any(re.search(rf'\b{name.removeprefix("Learner.")}\b', s) for s in shown)

def test_names_that_moved_are_still_found():
    from fastai_bn import capture, moments
    for n in MOVED: assert getattr(moments, n) is getattr(capture, n) and n in moments.__all__
    with pytest.raises(AttributeError, match='nothing'): moments.nothing
    names = {}
    exec('from fastai_bn.moments import *', names)
    assert names['capture_moments'] is capture.capture_moments

def test_version_and_metadata():
    ini = settings()
    assert re.fullmatch(r'\d+\.\d+\.\d+', fastai_bn.__version__)
    assert f'## {fastai_bn.__version__}' in read('CHANGELOG.md')
    assert 'fastai>=2.8.12' in ini['requirements'] and ini['min_python'] == '3.10'

def imports(f):
    for node in ast.walk(ast.parse(f.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

def test_everything_imported_is_required():
    required = {re.split('[<>=]', o)[0] for o in settings()['requirements'].split()}
    used = {n for f in (ROOT/'fastai_bn').glob('*.py') for n in imports(f)}
    others = used - required - {'fastai_bn','PIL','sklearn'} - set(sys.stdlib_module_names)
    assert not others

def tracked() -> list:
    "All files that git has"
    names = subprocess.run(['git','ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [f for f in names if (ROOT/f).is_file()]

def checkout(to):
    "Copy all files that git has, as they are now"
    for f in tracked():
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        (to/f).write_bytes((ROOT/f).read_bytes())

def test_sdist_and_wheel(tmp_path):
    src,dist = tmp_path/'src',tmp_path/'dist'
    checkout(src)
    build = [sys.executable, '-m', 'build', '--no-isolation', '-o', str(dist), str(src)]
    res = subprocess.run(build, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout+res.stderr
    sdist,wheel = next(dist.glob('*.tar.gz')),zipfile.ZipFile(next(dist.glob('*.whl')))  # which is built from the sdist
    names = wheel.namelist()
    def text(end): return wheel.read(next(n for n in names if n.endswith(end))).decode()
    assert {f'fastai_bn/{m}.py' for m in [*MODULES,'all','_modidx','__init__']} <= set(names)
    assert not any(n.startswith(('tests','nbs','tools')) for n in names)
    meta = text('METADATA')
    assert f'Version: {fastai_bn.__version__}' in meta and '# fastai_bn' in meta
    assert 'Requires-Dist: fastai>=2.8.12' in meta and 'Requires-Python: >=3.10' in meta
    assert 'fastai_bn._modidx:d' in text('entry_points.txt')
    assert any(n.endswith('settings.ini') for n in tarfile.open(sdist).getnames())

@pytest.mark.parametrize('f', NOTEBOOKS, ids=lambda f: f.stem)
def test_notebooks(f):
    cells = json.loads(f.read_text(encoding='utf-8'))['cells']
    outputs = [c.get('outputs', []) for c in cells]
    assert not any(o['output_type'] == 'error' for os in outputs for o in os)
    assert len(cells) <= 60
    text = json.dumps([outputs, [c['source'] for c in cells]])
    assert not re.search(r'/(home|root|work|Users)/', text), "a path of somebody's machine"
    # nbdev takes title and subtitle from the first cell, and drops what follows there
    assert re.fullmatch(r'# .+\n\n> .+\n?', ''.join(cells[0]['source']))

def test_examples_have_outputs():
    "A notebook that shows something has stored outputs"
    hidden = re.compile(r'#\| (export|hide|default_exp)')
    for f in NOTEBOOKS:
        code = [c for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        shown = [c for c in code if not hidden.match(''.join(c['source']))]
        assert not shown or any(c.get('outputs') for c in shown), f.stem

def test_modules_and_package_say_what_they_are():
    "Module docstrings and llms.txt, which nbdev makes of the cells that are marked for it"
    llms = read('nbs/llms.txt')
    for m in MODULES:
        doc = importlib.import_module(f'fastai_bn.{m}').__doc__
        notebook = next(ROOT.glob(f'nbs/*_{m}.ipynb')).relative_to(ROOT).as_posix()
        url = readme.doc_url()
        where = f'{url}/{m}.html.md' if url else f'the notebook {notebook}'
        assert doc.count('\n\n') >= 2 and doc.endswith(f'\n\nDocs: {where}') and doc.count('Docs: ') == 1, m
        assert ':::' not in doc and (f']({where}): ' if url else f'`fastai_bn.{m}`: ') in llms and where in llms, m
        assert f'`fastai_bn.{m}`' in fastai_bn.__doc__

def test_readme_is_what_the_index_gives(): assert read('README.md') == readme.readme()

def test_readme_is_short():
    "As it is without an address, which makes links longer"
    lines = convert(json.loads(read('nbs/index.ipynb')), site=False)[0].splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120

def prose_of(f:str) -> str:
    "Markdown of a page, or of a notebook's cells"
    if not f.endswith('.ipynb'): return read(f)
    cells = json.loads(read(f))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def links_in(text:str) -> list:
    "Where links and pictures lead that are no code, but for other people's sites"
    text = re.sub(r'^```.*?^```', '', text, flags=re.M|re.S)
    text = re.sub(r'(`+)(?!`).+?(?<!`)\1(?!`)', '', text, flags=re.S)
    found = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [o.partition('#')[0] for o in found if not re.match(r'\w+:', o) and not o.startswith('#')]

@pytest.mark.parametrize('text,links', [
    ('[`f`](a.md) and [`g`](b.ipynb#x), [h](https://x.org/c.md), [i](#j)', ['a.md','b.ipynb']),
    ('[over\n`two` lines](a.md) `[no](b.md)`', ['a.md']),
    ('```\n[no](a.md)\n```\n![p](b.svg) <img src="c.svg" srcset="d.svg">', ['b.svg','c.svg','d.svg'])])
def test_links_are_found(text, links): assert sorted(links_in(text)) == links

@pytest.mark.parametrize('f', [f for f in tracked() if f.endswith(('.md','.ipynb'))])
def test_links_lead_to_files_of_the_clone(f):
    here,files = (ROOT/f).parent,{(ROOT/o).resolve() for o in tracked()}
    dead = [o for o in links_in(prose_of(f)) if (here/o).resolve() not in files]
    assert not dead

def test_readme_leads_to_notebooks_as_long_as_there_is_no_site():
    there = [o for o in links_in(read('README.md')) if o.endswith('.ipynb')]
    assert len(there) > 15 if not readme.doc_url() else not there

ADDRESS = re.compile(r'https?://[\w.-]*(?:fastai[-_]bn[\w.-]*|[\w.-]+/(?:[\w.-]+/)*fastai_bn)')

def test_the_address_stands_in_one_place():
    "pyproject.toml may give it; `make sync` writes it into modules, README and llms.txt, and nobody anywhere else"
    may = r'pyproject\.toml|tests/test_package\.py'
    if readme.doc_url(): may += r'|README\.md|nbs/llms\.txt|fastai_bn/\w+\.py'
    by_hand = [f for f in tracked() if not re.fullmatch(may, f)]
    texts = {f:(ROOT/f).read_bytes().decode(errors='ignore') for f in by_hand}
    assert not [f for f,text in texts.items() if ADDRESS.search(text)]

def test_an_address_is_found():
    for s in 'https://fastai-bn.github.io/x','https://github.com/somebody/fastai_bn','http://x.org/fastai_bn/a.html':
        assert ADDRESS.search(s)
    assert not ADDRESS.search('https://docs.fast.ai, https://github.com/fastai/fastai, nbs/fastai_bn')

def test_setting_the_address_turns_links_to_the_site(tmp_path):
    checkout(tmp_path)
    subprocess.run(['git','init','-q'], cwd=tmp_path, check=True)
    toml = (tmp_path/'pyproject.toml').read_text()
    urls = "[project.urls]\nRepository = 'https://x.org/r/fastai_bn'  # a forge\nDocumentation=\"https://x.org/d/\"\n"
    (tmp_path/'pyproject.toml').write_text(re.sub(r'\[project\.urls\]\n(.+\n)*', urls, toml))
    subprocess.run([sys.executable, 'tools/sync.py'], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path/'README.md').read_text()
    assert '.ipynb)' not in text and '](https://x.org/d/accumulate.html)' in text
    assert '](https://x.org/d/benchmarks/index.html)' in text
    doc = ast.get_docstring(ast.parse((tmp_path/'fastai_bn/accumulate.py').read_text()))
    assert doc.endswith('Docs: https://x.org/d/accumulate.html.md') and doc.count('Docs: ') == 1
    assert '[fastai_bn.accumulate](https://x.org/d/accumulate.html.md)' in (tmp_path/'nbs/llms.txt').read_text()

def entries(nav):
    "The pages of a navigation, which has lists in dicts in lists"
    if isinstance(nav, str): return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [e for p in parts for e in entries(p)]

def test_every_notebook_is_in_the_navigation():
    pages = {f.relative_to(ROOT/'nbs').with_name(f'{page(f.stem)}.md').as_posix() for f in NOTEBOOKS}
    want = pages | {'changelog.md','contributing.md'}
    nav = entries(config('mkdocs.yml')['nav'])
    assert set(nav) == want and len(nav) == len(want)

def test_versions_agree():
    ini = settings()
    nbdev = next(o for o in ini['dev_requirements'].split() if o.startswith('nbdev=='))
    hooks = config('.pre-commit-config.yaml')['repos'][0]['hooks']
    assert all(h['additional_dependencies'] == [nbdev] for h in hooks)
    matrix = config('.github/workflows/ci.yml')['jobs']['test']['strategy']['matrix']
    assert matrix['python'][0] == ini['min_python']
    assert config('CITATION.cff')['version'] == fastai_bn.__version__
