"What tools/docs.py adds to nbdev's pages. The built site is tested in a browser: browser.py"
import re
from functools import cached_property
from pathlib import Path

import pytest

import docs

def long(model, batches, some_number:int=10_000, *, frozen=False, loss=max, path=None, a_rather_long_name=None): pass
def rest(model, batches, *others, a_long_name=None, another_long_name=None, and_one_more_long_name=None, **kw): pass

class Thing(dict):
    "A thing"
    def __init__(self,
        n=2, # A number
    ): pass
    @classmethod
    def of(cls,
        x, # Values
    ): "Made of `x`"
    def size(self): "How large"
    def keys(self): "As a dict's"
    def _hidden(self): "Private"
    def silent(self): pass
    @property
    def half(self): "Half of it"
    @cached_property
    def slow(self): "Computed once"

def test_signatures():
    assert docs.signature(Thing, 'Thing') == 'Thing(n=2)' and docs.signature(Thing.of, 'Thing.of') == 'Thing.of(x)'
    first,*lines,last = docs.signature(long, 'long').splitlines()
    assert first == 'long(' and last == ')'
    assert lines == ['    model,', '    batches,', '    some_number=10000,', '    *,', '    frozen=False,',
                     '    loss=<built-in function max>,', '    path=None,', '    a_rather_long_name=None,']
    assert docs.signature(rest, 'rest').splitlines()[3:5] == ['    *others,', '    a_long_name=None,']  # no second star

def test_what_python_prints_is_made_readable():
    printed = f'opt={docs.signature}, kind={Path}, new=<factory>, x=2'
    assert docs.readable(printed) == 'opt=signature, kind=Path, new=[], x=2'

def entry(o, name): return docs.Api(o, name=name)._repr_markdown_()

def test_properties_are_not_called():
    text = entry(Thing.half, 'Thing.half')
    assert '```python\nhalf\n```' in text and 'Half of it' in text
    assert 'half()' in entry(Thing.size, 'Thing.half')

def test_methods_of_a_class():
    "Not what it overrides, says nothing of, or hides"
    found = [(n,full) for n,_,_,full in docs.methods(Thing)]
    assert found == [('of',True), ('size',False), ('half',False), ('slow',False)]

@pytest.mark.parametrize('name,want', [
    ('f', False), ('C.f', False), ('before_batch', False),
    ('_f', True), ('_C.f', True), ('C._f', True), ('C.__reduce__', True), ('C.before_batch', True)])
def test_private_names_and_events_have_no_entry(name, want): assert docs.private(name) is want

def test_links_into_the_site():
    url = docs.doc_url()
    code = f'```\n[`f`]({url}/a.html#f)\n```\n'
    md = f'[`f`]({url}/a.html#f), [`_g`]({url}/a.html#_g), [`h`](https://docs.fast.ai/x.html#h)\n{code}'
    ids = {('a','f')}
    assert docs.linked(md, 'b.md', ids) == f'[`f`](a.md#f), `_g`, [`h`](https://docs.fast.ai/x.html#h)\n{code}'
    assert docs.linked(md, 'sub/b.md', ids).startswith('[`f`](../a.md#f), `_g`')

PAGE = """# T

`f`: it
{: .subtitle }

### f { #f .api }

[source](https://x/y.md#L1)
{: .source }

[a](b/c.md#d)

```` { .text .output }
[a](b.md) ```
````
"""

PLAIN = """# T

> `f`: it

### f

[source](https://x/y.md#L1)

[a](b/c.html.md#d)

````
[a](b.md) ```
````
"""

def test_pages_for_machines():
    assert docs.plain(PAGE) == PLAIN
    assert docs.described(PAGE) == f"---\ndescription: 'f: it'\n---\n\n{PAGE}"
    assert docs.described('# T\n\ntext') == '# T\n\ntext'

@pytest.mark.parametrize('source,left', [
    ('#| exporti\ndef f(): pass', 'Source of f\ndef f(): pass'),
    ('#| export\ndef _f(): pass', 'Source of _f\ndef _f(): pass'),
    ('#| export\ndef f(): pass', None),
    ('#| hide\n#| export\ndef _f(): pass', None),
    ('#| exporti\nx = 1', None),
    ('x = 1', 'x = 1')])
def test_code_that_is_not_for_users_is_folded(source, left):
    "Other exported code goes: `show_doc` takes its place"
    cell = docs.nbdev.processors.mk_cell(source)
    cell.directives_ = {k:[] for k in re.findall(r'^#\| (\w+)', source, flags=re.M)}
    docs.fold_private(cell)
    got = getattr(cell, 'source', None)
    assert got == left if left is None else got.endswith(left)
