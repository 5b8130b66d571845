"What tools/docs.py adds to nbdev's pages. The built site is tested in a browser: browser.py"
import sys
from functools import cached_property
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import docs

def long(model, batches, some_number:int=10_000, *, frozen=False, loss=max, path=None, a_rather_long_name=None): pass
def rest(model, batches, *others, a_long_name=None, another_long_name=None, and_one_more_long_name=None, **kwargs): pass

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
    assert docs.signature(long, 'long').splitlines() == ['long(','    model,','    batches,','    some_number=10000,','    *,','    frozen=False,','    loss=<built-in function max>,','    path=None,','    a_rather_long_name=None,',')']
    assert docs.signature(rest, 'rest').splitlines()[3:5] == ['    *others,','    a_long_name=None,']  # no second star

def test_what_python_prints_is_made_readable():
    assert docs.readable(f'opt={docs.signature}, kind={Path}, new=<factory>, x=2') == 'opt=signature, kind=Path, new=[], x=2'

def test_properties_are_not_called():
    text = docs.Api(Thing.half, name='Thing.half')._repr_markdown_()
    assert '```python\nhalf\n```' in text and 'Half of it' in text and 'half()' in docs.Api(Thing.size, name='Thing.half')._repr_markdown_()

def test_methods_of_a_class():
    assert [(n,full) for n,_,_,full in docs.methods(Thing)] == [('of',True), ('size',False), ('half',False), ('slow',False)]  # not what it overrides, says nothing of, or hides

@pytest.mark.parametrize('name,want', [('f',False), ('C.f',False), ('_f',True), ('_C.f',True), ('C._f',True), ('C.__reduce__',True), ('C.before_batch',True), ('before_batch',False)])
def test_private_names_and_events_have_no_entry(name, want): assert docs.private(name) is want

def test_links_into_the_site():
    url = docs.doc_url()
    md = f'[`f`]({url}/a.html#f), [`_g`]({url}/a.html#_g), [`h`](https://docs.fast.ai/x.html#h)\n```\n[`f`]({url}/a.html#f)\n```\n'
    ids = {('a','f')}
    assert docs.linked(md, 'b.md', ids) == f'[`f`](a.md#f), `_g`, [`h`](https://docs.fast.ai/x.html#h)\n```\n[`f`]({url}/a.html#f)\n```\n'
    assert docs.linked(md, 'sub/b.md', ids).startswith('[`f`](../a.md#f), `_g`')

def test_pages_for_machines():
    md = '# T\n\n`f`: it\n{: .subtitle }\n\n### f { #f .api }\n\n[source](https://x/y.md#L1)\n{: .source }\n\n[a](b/c.md#d)\n\n```` { .text .output }\n[a](b.md) ```\n````\n'
    assert docs.plain(md) == '# T\n\n> `f`: it\n\n### f\n\n[source](https://x/y.md#L1)\n\n[a](b/c.html.md#d)\n\n````\n[a](b.md) ```\n````\n'
    assert docs.described(md) == f"---\ndescription: 'f: it'\n---\n\n{md}" and docs.described('# T\n\ntext') == '# T\n\ntext'
