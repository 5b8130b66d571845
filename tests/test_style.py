"The rules of style that can be counted"
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f for f in (ROOT/'fastai_bn').glob('*.py') if f.name != '_modidx.py')
TOOLS = sorted((ROOT/'tools').rglob('*.py'))
TESTS = sorted((ROOT/'tests').glob('*.py'))
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))

BRANCHES = ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def name_of(file:Path) -> str: return file.relative_to(ROOT).as_posix()

def per_file(files:list[Path]): return pytest.mark.parametrize('file', files, ids=name_of)

def parsed(file:Path) -> ast.Module: return ast.parse(file.read_text(encoding='utf-8'))


def complexity(f:ast.AST) -> int:
    """Count the paths through `f`, nested functions included.

    Branches, loops, comprehensions and their conditions, handlers, assertions, boolean operators"""
    n = 1
    for o in ast.walk(f):
        if isinstance(o, BRANCHES): n += 1
        elif isinstance(o, ast.comprehension): n += 1 + len(o.ifs)
        elif isinstance(o, ast.BoolOp): n += len(o.values) - 1
    return n

def functions(tree:ast.AST):
    "Yield functions and methods of a module, the outer ones alone"
    for o in ast.iter_child_nodes(tree):
        if isinstance(o, FUNCTIONS): yield o
        elif isinstance(o, ast.ClassDef): yield from functions(o)

def is_private(name:str) -> bool: return name.startswith('_') and not name.startswith('__')

def is_ours(o:ast.ImportFrom) -> bool: return o.level > 0 or (o.module or '').split('.')[0] == 'fastai_bn'

def private_imports(tree:ast.AST) -> list[str]:
    "List private names that a module takes from another one of ours, by import or as an attribute of the module"
    nodes = list(ast.walk(tree))
    imported = [a for o in nodes if isinstance(o, ast.ImportFrom) and is_ours(o) for a in o.names]
    names = {a.asname or a.name for a in imported}
    uses = [o for o in nodes if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name)]
    found = [a.name for a in imported if is_private(a.name)]
    return found + [f'{o.value.id}.{o.attr}' for o in uses if o.value.id in names and is_private(o.attr)]

def imported_modules(tree:ast.AST) -> list[str]:
    "List what is imported, by the name of its module"
    nodes = list(ast.walk(tree))
    whole = [a.name for o in nodes if isinstance(o, ast.Import) for a in o.names]
    return whole + [o.module or '' for o in nodes if isinstance(o, ast.ImportFrom)]


def source(cell:dict) -> str: return ''.join(cell['source'])

def cells_of(file:Path) -> list[dict]: return json.loads(file.read_text(encoding='utf-8'))['cells']

def is_export(cell:dict) -> bool:
    "Tell whether a cell goes into a module"
    return cell['cell_type'] == 'code' and re.search(r'^#\| ?exporti?\b', source(cell), re.M) is not None

def cells_in_a_row(cells:list[dict]) -> list[str]:
    "List first words of export cells that follow another without a sentence between"
    return [source(b)[:60] for a,b in zip(cells, cells[1:]) if is_export(a) and is_export(b)]

def too_long(code:str) -> str:
    "Say why an export cell has to be split, if so"
    most = 100 if any(isinstance(o, ast.ClassDef) for o in ast.parse(code).body) else 30
    n = len(code.splitlines())
    return f'{n} lines, at most {most}' if n > most else ''


@per_file([*MODULES, *TESTS, *TOOLS])
def test_no_line_is_wider_than_120_columns(file):
    lines = file.read_text(encoding='utf-8').splitlines()
    assert not [i for i,line in enumerate(lines, 1) if len(line) > 120]

@per_file(MODULES)
def test_a_module_has_300_lines_at_most(file):
    assert len(file.read_text(encoding='utf-8').splitlines()) <= 300

@per_file([*MODULES, *TOOLS])
def test_private_names_stay_in_their_module(file): assert not private_imports(parsed(file))

@per_file(MODULES)
def test_functions_are_simple(file):
    found = {f.name:complexity(f) for f in functions(parsed(file))}
    assert not {k:n for k,n in found.items() if n > 10}

@per_file(NOTEBOOKS)
def test_a_sentence_stands_between_export_cells(file): assert not cells_in_a_row(cells_of(file))

@per_file(NOTEBOOKS)
def test_export_cells_are_short(file):
    codes = [source(c) for c in cells_of(file) if is_export(c)]
    assert not {s[:60]:too_long(s) for s in codes if too_long(s)}

@per_file([f for f in TESTS if f.name != 'conftest.py'])
def test_no_test_imports_another(file):
    "What they share is in helpers.py; conftest.py has fixtures and hooks alone"
    assert not [m for m in imported_modules(parsed(file)) if re.fullmatch(r'test_\w+|conftest', m)]


def test_the_counts_count():
    "Negative examples: something breaks each rule"
    code = "def f(a, b):\n    return [x if x else 0 for x in a if x and b]"
    assert complexity(ast.parse(code).body[0]) == 5
    tree = ast.parse('class A:\n    def f(self):\n        def g(): pass\ndef h(): pass')
    assert [f.name for f in functions(tree)] == ['f', 'h']

@pytest.mark.parametrize('code,found', [
    ('from fastai_bn.paging import _Block, ActivationPager', ['_Block']),
    ('from .paging import _Block', ['_Block']),
    ('from fastai_bn import paging\npaging._OpenBlock()\npaging.__name__', ['paging._OpenBlock']),
    ('from . import paging as p\np._Block', ['p._Block']),
    ('from torch.nn.modules.batchnorm import _BatchNorm', []),
    ('from fastai_bn_else import _f', []),
    ('self._own', [])])
def test_private_names_are_found(code, found): assert private_imports(ast.parse(code)) == found

def test_cells_are_found():
    export = {'cell_type':'code', 'source':['#| export\n', 'x = 1']}
    helper = {'cell_type':'code', 'source':['#| exporti\n', 'x = 1']}
    prose = {'cell_type':'markdown', 'source':['#| export\n', 'Words']}
    assert cells_in_a_row([export, helper, prose, export]) == ['#| exporti\nx = 1']
    assert too_long('#| export\n' + 'x = 1\n'*30) and not too_long('#| export\n' + 'x = 1\n'*29)
    assert too_long('class A:\n' + '    x = 1\n'*100) and not too_long('class A:\n' + '    x = 1\n'*99)

def test_imports_are_found():
    assert imported_modules(ast.parse('import test_a, b\nfrom test_c import d')) == ['test_a', 'b', 'test_c']
