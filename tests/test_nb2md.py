"Notebooks as Markdown: for the docs site, and for GitHub"
import base64

import pytest

from nb2md import convert, page, unlinked

def paragraphs(*ps): return '\n\n'.join(ps)

def md(s): return dict(cell_type='markdown', source=s.splitlines(keepends=True))
def code(s, *out): return dict(cell_type='code', source=s.splitlines(keepends=True), outputs=list(out))
def printed(s, name='stdout'): return dict(output_type='stream', name=name, text=[s])
def shown(**kw): return dict(output_type='display_data', data={k.replace('_','/'):v for k,v in kw.items()})
def clone(*cells): return convert(dict(cells=cells), site=False)[0]
def gfm(*cells): return convert(dict(cells=cells), site=False, doc_url='https://x.org/d/')[0]
def site(*cells): return convert(dict(cells=cells), site=True, files='p_files')

def test_readme():
    head = paragraphs('# T', '::: {.callout-tip}\n## Hi', 'there\n:::', 'see [x](05_accumulate.ipynb#a)')
    cells = [md(head), code('#| hide\n1'), code('#| export\n2'), code('#| echo: true\nprint(3)', printed('3\n'))]
    assert gfm(*cells) == paragraphs(
        '# T',
        '> [!TIP]\n> **Hi**\n>\n> there',
        'see [x](https://x.org/d/accumulate.html#a)',
        '```python\nprint(3)\n```',
        '```\n3\n```\n')

def test_without_a_site_readme_links_to_files_of_the_clone():
    "The notebook that an anchor would be in shows on every forge; the anchor does not"
    cell = md('[a](05_accumulate.ipynb#b) [c](benchmarks/index.ipynb) [d](../CHANGELOG.md#new) [e](https://x/f.ipynb)')
    assert clone(cell) == ('[a](nbs/05_accumulate.ipynb) [c](nbs/benchmarks/index.ipynb) [d](CHANGELOG.md#new) '
                           '[e](https://x/f.ipynb)\n')

def test_files_of_the_root():
    cell = md('[a](../CHANGELOG.md), [b](../../CONTRIBUTING.md), [`c`](../CITATION.cff), [d](../51_draw.ipynb)')
    assert site(cell)[0] == '[a](changelog.md), [b](../contributing.md), `c`, [d](../draw.md)\n'
    there = convert(dict(cells=[cell]), site=True, repository='https://x.org/r/')[0]
    assert '[`c`](https://x.org/r/blob/main/CITATION.cff)' in there

def test_pictures_in_light_and_dark():
    assert 'alt="&quot;A&quot;"' in clone(md('![&quot;A&quot;](images/net-light.svg)'.replace('&quot;', '"')))
    cell = md('![A net](images/net-light.svg)')
    assert site(cell)[0] == '![A net](images/net-light.svg#only-light)\n![A net](images/net-dark.svg#only-dark)\n'
    assert clone(cell) == ('<picture>\n'
        '  <source media="(prefers-color-scheme: dark)" srcset="nbs/images/net-dark.svg">\n'
        '  <img src="nbs/images/net-light.svg"\n       alt="A net">\n</picture>\n')

def test_hidden_prose_is_hidden():
    assert site(md('#| hide\n#| export\nno'), md('#| export\nyes'))[0] == 'yes\n'
    assert clone(md('#| export\n#| hide\nno'), md('yes')) == 'yes\n'
    assert clone(md('#| hide: true\n#| export: true\nno'), md('yes')) == 'yes\n'  # as nbdev has it
    assert clone(md('#| export\nThis\n#| hide\nis code of a page')).startswith('This')

def test_readme_shows_tables_as_text_and_no_pictures():
    cell = code('t', shown(text_html='<table></table>', text_plain='a  b'))
    assert gfm(cell) == paragraphs('```python\nt\n```', '```\na  b\n```\n')
    assert 'png' not in gfm(code('p', shown(image_png='AAAA', text_plain='<Figure>')))

def test_front_matter_is_title_and_subtitle():
    raw = dict(cell_type='raw', source=['---\n','title: T\n',"description: '`f`: what it is'\n",'---\n'])
    assert site(raw)[0] == '# T\n\n`f`: what it is\n{: .subtitle }\n'

def test_callouts_and_links():
    links = '[x](sub/13_paging.ipynb), [y](../faq.ipynb#z), [out](https://a.b/c.ipynb)'
    callout = paragraphs('::: {.callout-important}\n## Mind', 'one', 'two\n:::')
    assert site(md(paragraphs(callout, links)))[0] == paragraphs(
        '!!! info "Mind"',
        '    one',
        '    two',
        '[x](sub/paging.md), [y](../faq.md#z), [out](https://a.b/c.ipynb)\n')
    assert site(md('::: {.callout-note}\nplain\n:::'))[0] == '!!! note\n\n    plain\n'

def test_code_is_left_alone():
    s = '```python\nx = "[a](b.ipynb)"  # $x$ [[`f`](g)](h)\n# no heading [`f`](g)\n```'
    assert site(md(s))[0] == s+'\n'

def test_folding_hiding_and_echo():
    folded = code('#| code-fold: true\n#| code-summary: _f, _g\ndef _f(): pass')
    assert site(folded)[0] == paragraphs('??? code "_f, _g"', '    ```python\n    def _f(): pass\n    ```\n')
    assert site(code('#| echo: false\nf()', printed('1')))[0] == '``` { .text .output }\n1\n```\n'
    assert site(code('#| hide\nf()', printed('1')), md('x'))[0] == 'x\n'
    assert site(code('f()', printed('warning', 'stderr')))[0] == '```python\nf()\n```\n'

def test_pictures_are_files_named_by_what_they_are_about():
    png = base64.b64encode(b'PNG').decode()
    head = md('## A `thing` {#id}')
    text,images = site(head, code('p', shown(image_png=png)), code('q', shown(image_png=[png+'\n'])))
    assert images == {'1.png':b'PNG', '2.png':b'PNG'}
    assert '![A thing](p_files/1.png)' in text and '![A thing](p_files/2.png)' in text

def test_pictures_of_a_cell_stand_side_by_side():
    png = shown(image_png=base64.b64encode(b'PNG').decode())
    text = site(md('## A'), code('#| echo: false\np', png, png, printed('x'), png))[0]
    assert '![A](p_files/1.png)\n![A](p_files/2.png)\n\n```' in text and '```\n\n![A](p_files/3.png)\n' in text

def test_outputs_can_be_folded():
    cell = code('#| echo: false\n#| fold-output: "Table: x"\nt', printed('1'))
    assert site(cell)[0] == '??? note "Table: x"\n\n    ``` { .text .output }\n    1\n    ```\n'
    assert clone(cell) == '```\n1\n```\n'

def test_data_frames():
    html = ['<div>\n<style scoped>\n    .x {\n}\n</style>\n',
            '<table border="1" class="dataframe">\n',
            '  <tr style="text-align: right;"><td>1</td></tr>\n</table>\n</div>']
    text = site(code('t', shown(text_html=html, text_plain='1')))[0]
    table = '<table>\n<tr><td>1</td></tr>\n</table>'
    assert text.endswith(f'<div class="output">\n<div>\n{table}\n</div>\n</div>\n')

LINKS = {
    '[An [`A`](u) example](v)': '[An `A` example](v)',
    '[[`A`](u) and [`B`](v)](w)': '[`A` and `B`](w)',
    '[[`A`](u) and\n[`B`](v)](w)': '[`A` and\n`B`](w)',
    '[x\n\n[`A`](u)](w)': '[x\n\n[`A`](u)](w)',
    '## In a [`L`](x)': '## In a `L`',
    '[`C`](c) and [a](b)': '[`C`](c) and [a](b)',
    '[x] ([`C`](c))': '[x] ([`C`](c))'}

@pytest.mark.parametrize('s,want', LINKS.items())
def test_links_that_nbdev_makes_where_they_cannot_be(s, want): assert unlinked(s) == want

@pytest.mark.parametrize('stem,want', [('00_moments','moments'), ('index','index'), ('10b_x_y','x_y'), ('2d','2d')])
def test_page(stem, want): assert page(stem) == want
