"The rules of style that can be counted"
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f for f in (ROOT/'fastai_bn').glob('*.py') if f.name != '_modidx.py')
TESTS = sorted((ROOT/'tests').glob('*.py'))
SOURCES = [*MODULES, *TESTS, *sorted((ROOT/'tools').rglob('*.py'))]
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
BRANCHES = ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def name(file:Path) -> str: return file.relative_to(ROOT).as_posix()


def complexity(f:ast.AST) -> int:
    "Count the paths through `f` and what is nested in it: branches, loops, comprehensions, handlers, boolean operators"
    n = 1
    for o in ast.walk(f):
        if isinstance(o, BRANCHES): n += 1
        elif isinstance(o, ast.comprehension): n += 1 + len(o.ifs)
        elif isinstance(o, ast.BoolOp): n += len(o.values) - 1
    return n


def functions(tree:ast.AST):
    "Functions and methods of a module, the outer ones alone"
    for o in ast.iter_child_nodes(tree):
        if isinstance(o, FUNCTIONS): yield o
        elif isinstance(o, ast.ClassDef): yield from functions(o)


def private_imports(tree:ast.AST) -> list[str]:
    "Names with an underscore that a module takes from another one of ours"
    imports = [o for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)]
    ours = [o for o in imports if o.level or (o.module or '').startswith('fastai_bn')]
    return [a.name for o in ours for a in o.names if a.name.startswith('_')]


def is_export(cell:dict) -> bool:
    return cell['cell_type'] == 'code' and re.search(r'^#\| ?exporti?\b', ''.join(cell['source']), re.M) is not None


def cells_in_a_row(cells:list[dict]) -> list[str]:
    "First lines of export cells that follow another without a sentence between"
    pairs = zip(cells, cells[1:])
    return [''.join(b['source'])[:60] for a,b in pairs if is_export(a) and is_export(b)]


def too_long(source:str) -> str|None:
    "Why an export cell has to be split"
    tree = ast.parse(source)
    most = 100 if any(isinstance(o, ast.ClassDef) for o in tree.body) else 30
    n = sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())
    return f'{n} lines, at most {most}' if n > most else None


@pytest.mark.parametrize('file', SOURCES, ids=name)
def test_no_line_is_wider_than_120_columns(file):
    wide = [i for i,line in enumerate(file.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.name)
def test_a_module_has_300_lines_at_most(file):
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize('file', [f for f in SOURCES if f not in TESTS], ids=name)
def test_private_names_stay_in_their_module(file):
    "Tests may have them where the thing under test is private"
    assert not private_imports(ast.parse(file.read_text()))


@pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda f: f.stem)
def test_a_sentence_stands_between_export_cells(file):
    cells = json.loads(file.read_text())['cells']
    assert not cells_in_a_row(cells)
    assert not [(s[:60],why) for c in cells if is_export(c) and (why := too_long(s := ''.join(c['source'])))]


@pytest.mark.parametrize('file', MODULES, ids=lambda f: f.name)
def test_functions_are_simple(file):
    found = {f.name:complexity(f) for f in functions(ast.parse(file.read_text()))}
    assert not {k:n for k,n in found.items() if n > 10}


@pytest.mark.parametrize('file', [f for f in TESTS if f.stem.startswith('test_')], ids=lambda f: f.name)
def test_no_test_imports_another(file):
    names = [o.module or '' for o in ast.walk(ast.parse(file.read_text())) if isinstance(o, ast.ImportFrom)]
    names += [a.name for o in ast.walk(ast.parse(file.read_text())) if isinstance(o, ast.Import) for a in o.names]
    assert not [n for n in names if re.search(r'\btest_', n)]


def test_the_counts_count():
    "Negative examples: each rule is broken by something"
    code = "def f(a, b):\n    return [x if x else 0 for x in a if x and b]"
    assert complexity(ast.parse(code).body[0]) == 5
    assert private_imports(ast.parse('from fastai_bn.paging import _Block, ActivationPager')) == ['_Block']
    assert private_imports(ast.parse('from .paging import _Block')) == ['_Block']
    export = {'cell_type':'code', 'source':['#| export\n', 'x = 1']}
    prose = {'cell_type':'markdown', 'source':['#| export\n', 'Words']}
    assert cells_in_a_row([export, export, prose, export]) == ['#| export\nx = 1']
    assert too_long('#| export\n' + 'x = 1\n'*31) and not too_long('#| export\n' + 'x = 1\n'*30)
    assert not too_long('class A:\n' + '    x = 1\n'*50)
