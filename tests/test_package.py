"The package around the code: metadata, exports, documentation, notebooks"
import ast, dataclasses, importlib, inspect, json, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from fastai.basics import Learner
from fastcore.docments import docments
import fastai_bn
import fastai_bn.all

root = Path(__file__).resolve().parent.parent
MODULES = ['moments','accumulate','paging','lockstep','precise','groupnorm','unet','normalize','hpa','demo']
public = [(m,n) for m in MODULES for n in importlib.import_module(f'fastai_bn.{m}').__all__] + [('precise','Learner.precise_bn')]

def test_all_exports_the_api():
    for n in 'AccumulateGradBN ActivationPager MicroBatched precise_bn Moments bn_layers bn_to_gn weight_standardize gn_unet_learner image_normalize ImageNormalize HPADataLoaders make_hpa HPA_LABELS'.split(): assert hasattr(fastai_bn.all, n) and n in fastai_bn.all.__all__
    assert Learner.precise_bn

@pytest.mark.parametrize('module,name', public)
def test_public_names_are_documented(module, name):
    o = Learner.precise_bn if '.' in name else getattr(importlib.import_module(f'fastai_bn.{module}'), name)
    if not callable(o): return
    assert o.__doc__ and o.__doc__.strip(), f'{name} has no docstring'
    if inspect.isclass(o) and '__init__' not in vars(o): return  # its arguments are its parent's
    f = o.__init__ if inspect.isclass(o) else o
    ps = [p for p in inspect.signature(f).parameters.values() if p.name not in ('self','args','kwargs') and p.kind not in (p.VAR_KEYWORD,p.VAR_POSITIONAL)]
    if code := getattr(f, '__code__', None): ps = [p for p in ps if p.name in code.co_varnames]  # others are delegated, and documented there
    docs = docments(o if dataclasses.is_dataclass(o) else f, full=False)
    for p in ps: assert docs.get(p.name), f'{name}: parameter {p.name} has no comment'

def test_version_and_metadata():
    ini = ConfigParser(delimiters=['='], interpolation=None); ini.read(root/'settings.ini')
    assert re.fullmatch(r'\d+\.\d+\.\d+', fastai_bn.__version__)
    assert f'## {fastai_bn.__version__}' in (root/'CHANGELOG.md').read_text()
    assert 'fastai>=2.8.12' in ini['DEFAULT']['requirements'] and ini['DEFAULT']['min_python'] == '3.10'

def imports(f):
    for node in ast.walk(ast.parse(f.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]

def test_everything_imported_is_required():
    ini = ConfigParser(delimiters=['='], interpolation=None); ini.read(root/'settings.ini')
    req = {re.split('[<>=]', o)[0] for o in ini['DEFAULT']['requirements'].split()} | {'fastai_bn','PIL'} | set(sys.stdlib_module_names)
    used = {n for f in (root/'fastai_bn').glob('*.py') for n in imports(f)}
    assert used <= req, used-req

def test_sdist_and_wheel(tmp_path):
    src = tmp_path/'src'
    files = subprocess.run(['git','ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\n')
    for f in filter(None, files):
        if (root/f).is_file(): (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((root/f).read_bytes())
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '-o', str(tmp_path/'dist'), str(src)], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout+res.stderr
    whl,sdist = next((tmp_path/'dist').glob('*.whl')),next((tmp_path/'dist').glob('*.tar.gz'))  # the wheel is built from the sdist
    names = zipfile.ZipFile(whl).namelist()
    assert {f'fastai_bn/{m}.py' for m in MODULES+['all','_modidx','__init__']} <= set(names) and not any(n.startswith(('tests','nbs','tools')) for n in names)
    meta = zipfile.ZipFile(whl).read(next(n for n in names if n.endswith('METADATA'))).decode()
    assert f'Version: {fastai_bn.__version__}' in meta and 'Requires-Dist: fastai>=2.8.12' in meta and 'Requires-Python: >=3.10' in meta and '# fastai_bn' in meta
    entry = zipfile.ZipFile(whl).read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    assert 'fastai_bn._modidx:d' in entry
    assert any(n.endswith('settings.ini') for n in tarfile.open(sdist).getnames())

notebooks = sorted((root/'nbs').rglob('*.ipynb'))

@pytest.mark.parametrize('f', notebooks, ids=lambda f: f.stem)
def test_notebooks(f):
    nb = json.loads(f.read_text(encoding='utf-8'))
    code = [c for c in nb['cells'] if c['cell_type']=='code']
    assert not any(o['output_type']=='error' for c in code for o in c['outputs'])
    assert len(nb['cells']) <= 60
    for c in code:
        s = ''.join(c['source'])
        if '#| export' in s: assert len(s.splitlines()) <= 40, s[:80]
    text = json.dumps([c.get('outputs', []) for c in code] + [c['source'] for c in nb['cells']])
    assert not re.search(r'/(home|root|work|Users)/', text), 'a path of somebody\'s machine'
    first = ''.join(nb['cells'][0]['source'])
    assert first.startswith('# ') and '\n> ' in first

def test_examples_have_outputs():
    "A notebook that shows something has stored outputs"
    for n in ('00_moments','01_accumulate','02_paging','03_lockstep','04_precise','05_groupnorm','06_unet','07_normalize','08_hpa','09_demo','index'):
        nb = json.loads((root/'nbs'/f'{n}.ipynb').read_text(encoding='utf-8'))
        assert sum(bool(c.get('outputs')) for c in nb['cells']) >= 1, n

def test_readme_is_what_the_index_gives():
    sys.path.insert(0, str(root/'tools'))
    import readme
    assert (root/'README.md').read_text(encoding='utf-8') == readme.readme()

def test_readme_converter():
    sys.path.insert(0, str(root/'tools'))
    import readme
    md = lambda s: dict(cell_type='markdown', source=[s])
    code = lambda s,out=(): dict(cell_type='code', source=[s], outputs=list(out))
    out = dict(output_type='stream', name='stdout', text=['3\n'])
    nb = dict(cells=[md('# T\n\n::: {.callout-tip}\n## Hi\n\nthere\n:::\n\nsee [x](01_accumulate.ipynb#a)'), code('#| hide\n1'), code('#| export\n2'), code('#| echo: true\nprint(3)', [out])])
    assert readme.convert(nb) == f'# T\n\n> [!TIP]\n> **Hi**\n>\n> there\n\nsee [x]({readme.doc_url()}/accumulate.html#a)\n\n```python\nprint(3)\n```\n\n```\n3\n```\n'
