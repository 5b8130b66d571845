"The package around the code: metadata, exports, documentation, notebooks"
import ast, dataclasses, importlib, inspect, json, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml
from fastai.basics import Learner
from fastcore.docments import docments
import fastai_bn
import fastai_bn.all

root = Path(__file__).resolve().parent.parent
MODULES = ['moments','layers','processes','diversion','capture','samples','batches','window','undo','epochs',
           'accumulate','forecast','copies','storages','mover','reads','paging','pooled','threads','turns','lockstep',
           'sampling','population','report','precise',
           'groupnorm','unet','rows','normalize','hpa','draw','demo']

def own_names(name):
    "The public names that are defined in a module; `moments` still has those that have moved to `capture`"
    mod = importlib.import_module(f'fastai_bn.{name}')
    return [n for n in mod.__all__ if getattr(getattr(mod, n), '__module__', mod.__name__) == mod.__name__]

public = [(m,n) for m in MODULES for n in own_names(m)] + [('precise','Learner.precise_bn'), ('precise','Learner.bn_report')]

def test_all_exports_the_api():
    for n in 'AccumulateGradBN Window capture_moments ActivationPager MicroBatched precise_bn Moments bn_layers bn_to_gn weight_standardize gn_unet_learner image_normalize ImageNormalize HPADataLoaders make_hpa HPA_LABELS'.split(): assert hasattr(fastai_bn.all, n) and n in fastai_bn.all.__all__
    assert Learner.precise_bn

@pytest.mark.parametrize('module,name', public)
def test_public_names_are_documented(module, name):
    o = getattr(Learner, name.partition('.')[2]) if '.' in name else getattr(importlib.import_module(f'fastai_bn.{module}'), name)
    if not callable(o): return
    assert o.__doc__ and o.__doc__.strip(), f'{name} has no docstring'
    if inspect.isclass(o) and '__init__' not in vars(o): return  # its arguments are its parent's
    f = o.__init__ if inspect.isclass(o) else o
    ps = [p for p in inspect.signature(f).parameters.values() if p.name not in ('self','args','kwargs') and p.kind not in (p.VAR_KEYWORD,p.VAR_POSITIONAL)]
    if code := getattr(f, '__code__', None): ps = [p for p in ps if p.name in code.co_varnames]  # others are delegated, and documented there
    docs = docments(o if dataclasses.is_dataclass(o) else f, full=False)
    for p in ps: assert docs.get(p.name), f'{name}: parameter {p.name} has no comment'

@pytest.mark.parametrize('module,name', public)
def test_public_names_have_an_example_that_runs(module, name):
    "Each stands in a cell of its notebook that is shown and that nbdev-test runs, or is what another name there gives"
    f = next(root.glob(f'nbs/*_{module}.ipynb'))
    shown = [s for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code' and not re.search(r'^#\| *(export|hide$|eval: false)', s := ''.join(c['source']), flags=re.M)]
    assert any(re.search(rf'\b{name.removeprefix("Learner.")}\b', s) for s in shown)

def test_names_that_moved_are_still_found():
    from fastai_bn import capture, moments
    for n in 'BNCapture BNUpdates capture_moments hold_updates update_running_stats'.split(): assert getattr(moments, n) is getattr(capture, n) and n in moments.__all__
    with pytest.raises(AttributeError, match='nothing'): moments.nothing
    names = {}
    exec('from fastai_bn.moments import *', names)
    assert names['capture_moments'] is capture.capture_moments

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
        if '#| export' in s: assert len(s.splitlines()) <= (100 if re.search(r'^class ', s, re.M) else 40), s[:80]
    text = json.dumps([c.get('outputs', []) for c in code] + [c['source'] for c in nb['cells']])
    assert not re.search(r'/(home|root|work|Users)/', text), 'a path of somebody\'s machine'
    assert re.fullmatch(r'# .+\n\n> .+\n?', ''.join(nb['cells'][0]['source'])), 'nbdev takes title and subtitle from the first cell, and drops what follows there'

def test_examples_have_outputs():
    "A notebook that shows something has stored outputs"
    for f in notebooks:
        code = [c for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code' and not re.match(r'#\| (export|hide|default_exp)', ''.join(c['source']))]
        assert not code or any(c.get('outputs') for c in code), f.stem

def test_modules_and_package_say_what_they_are():
    "Module docstrings and llms.txt, which nbdev makes of the cells that are marked for it"
    llms = (root/'nbs/llms.txt').read_text(encoding='utf-8')
    for m in MODULES:
        doc = importlib.import_module(f'fastai_bn.{m}').__doc__
        assert doc.count('\n\n') >= 2 and doc.rstrip().endswith(f'{m}.html.md') and '.ipynb' not in doc and ':::' not in doc, m
        assert f'[fastai_bn.{m}](' in llms and f'`fastai_bn.{m}`' in fastai_bn.__doc__

sys.path.insert(0, str(root/'tools'))

def test_readme_is_what_the_index_gives():
    import readme
    assert (root/'README.md').read_text(encoding='utf-8') == readme.readme()

def config(name): return yaml.safe_load((root/name).read_text(encoding='utf-8'))

def test_every_notebook_is_in_the_navigation():
    from nb2md import page
    def entries(o): return [o] if isinstance(o, str) else [e for p in (o.values() if isinstance(o, dict) else o) for e in entries(p)]
    want = {f.relative_to(root/'nbs').with_name(f'{page(f.stem)}.md').as_posix() for f in notebooks} | {'changelog.md','contributing.md'}
    nav = entries(config('mkdocs.yml')['nav'])
    assert set(nav) == want and len(nav) == len(want)

def test_versions_agree():
    ini = ConfigParser(delimiters=['='], interpolation=None); ini.read(root/'settings.ini')
    nbdev = next(o for o in ini['DEFAULT']['dev_requirements'].split() if o.startswith('nbdev=='))
    assert all(h['additional_dependencies'] == [nbdev] for h in config('.pre-commit-config.yaml')['repos'][0]['hooks'])
    assert config('.github/workflows/ci.yml')['jobs']['test']['strategy']['matrix']['python'][0] == ini['DEFAULT']['min_python']
    assert config('CITATION.cff')['version'] == fastai_bn.__version__
