"""The docs site: notebooks -> Markdown -> `_docs/`, without Quarto and with nothing loaded from elsewhere when read.

    python tools/docs.py            # build
    python tools/docs.py serve      # build, then serve on http://localhost:8000

1. nbdev processes the notebooks: hidden cells go, `show_doc` takes the place of exported code, names become links. Here
   it also adds tables of parameters (`Api`), and folds private exported code, which the prose around it explains
   (`Pages`).
2. `nb2md` turns them into Markdown in `_docs_src/`, with CHANGELOG.md and CONTRIBUTING.md beside them.
3. Zensical builds `_docs/` from mkdocs.yml. KaTeX comes from the npm registry once and is served by the site itself.
4. Each page's Markdown and llms.txt lie beside it, for readers that are no people."""
import functools
import http.server
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import nbdev.processors
import nbdev.serve
import nbdev.showdoc
import yaml
from fastcore.basics import listify
from fastai.callback.core import event
from fastcore.docments import DocmentTbl, docments
from nbdev.doclinks import NbdevLookup

from nb2md import convert, is_hidden, outside_code, page
from readme import doc_url, project_url, root

PROC,SRC,SITE = root/'_proc',root/'_docs_src',root/'_docs'
KATEX = '0.16.22'

def readable(s:str) -> str:
    "Replace what Python prints for functions, classes and factories: a name says more, and is the same in every build"
    printed = r"<function (?:\w+\.)*(\w+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>|<factory>"
    return re.sub(printed, lambda m: m[1] or m[2] or '[]', s)

def source_of(name:str) -> str:
    "Link to the line where `name` is defined; say which it is, as long as the project has no address"
    url = NbdevLookup().code(name)
    if not url: return ''
    file,line = re.search(r'(fastai_bn/\w+\.py)#L(\d+)$', url).groups()
    return f'[source]({url})' if project_url('Repository') else f'{file}, line {line}'

def own_init(sym) -> bool: return not inspect.isclass(sym) or '__init__' in vars(sym)

def signature(sym, name:str) -> str:
    "Write the call without types and comments, which the table has: in a line, or a line for each parameter"
    ps = [p.replace(annotation=p.empty) for p in inspect.signature(sym).parameters.values() if p.name != 'self']
    call = name + readable(str(inspect.Signature(ps)))
    if len(call) <= 96: return call
    parts,kinds = [readable(str(p)) for p in ps],[p.kind for p in ps]
    keyword,star = inspect.Parameter.KEYWORD_ONLY,inspect.Parameter.VAR_POSITIONAL
    if keyword in kinds and star not in kinds: parts.insert(kinds.index(keyword), '*')
    return name + '(\n' + ''.join(f'    {o},\n' for o in parts) + ')'

def documented(f) -> bool: return any(docments(f, returns=True).values())

def is_property(o) -> bool: return isinstance(o, (property,functools.cached_property))

def own_members(cls) -> dict:
    "Find the public methods and properties that stand in a class, with a docstring: what is patched in has its entries"
    src = inspect.getsource(cls)
    def stands(n): return re.search(rf'^    def {n}\(', src, flags=re.M)
    return {n:o for n,o in vars(cls).items() if n[0] != '_' and stands(n) and getattr(o, '__doc__', None)}

def methods(cls) -> list: # Name, object, is it called?, has it an entry of its own?
    "List a class's methods and properties: those with comments, and of the others those that it does not override"
    res = []
    for n,o in own_members(cls).items():
        is_call = not is_property(o)
        if is_call: o = getattr(cls, n)
        full = is_call and documented(o)
        if full or not any(hasattr(b, n) for b in cls.__bases__): res.append((n, o, is_call, full))
    return res

class Api(nbdev.showdoc.BasicMarkdownRenderer):
    "`show_doc` for the site: heading, source, signature, docstring, a table of parameters, and the methods of a class"
    def __init__(self, sym, *args, **kwargs):
        super().__init__(sym, *args, **kwargs)
        self.is_property = is_property(sym)  # `self.sym` is its function

    def _repr_markdown_(self): return '\n\n'.join(filter(None, self.parts()))

    def parts(self):
        head = self.nm.replace('_', r'\_')
        yield f'{"#"*self.title_level} {head} {{ #{self.nm.lower()} .api }}'
        if src := source_of(self.nm): yield f'{src}\n{{: .source }}'
        name = self.nm if inspect.ismethod(self.sym) else self.nm.rpartition('.')[2]
        yield f'```python\n{name if self.is_property else signature(self.sym, name)}\n```'
        yield inspect.cleandoc(self.sym.__doc__ or '')
        yield self.table()
        if inspect.isclass(self.sym): yield from self.members()

    def members(self):
        "Write a table of methods, then the entries of those that have parameters to comment on"
        found,rows = methods(self.sym),[]
        for n,o,is_call,full in found:
            if not full: rows.append(f'| `{signature(o, n) if is_call else n}` | {" ".join(o.__doc__.split())} |')
        if rows: yield '\n'.join(['| Method | |','| --- | --- |',*rows])
        for n,o,_,full in found:
            if full: yield Api(o, name=f'{self.nm}.{n}', title_level=self.title_level+1)._repr_markdown_()

    def table(self) -> str:
        if not own_init(self.sym) or not documented(self.sym): return ''
        rows = re.sub(r'\| \*\*(.*?)\*\* (?=\|)', r'| \1 ', DocmentTbl(self.sym)._repr_markdown_())
        return readable(rows.replace('| NoneType |', '| |'))

def private(name:str) -> bool:
    "Tell whether a name, or the class it is in, is private, or an event of a callback, which the training loop calls"
    return re.search(r'(^|\.)_', name) is not None or '.' in name and hasattr(event, name.rpartition('.')[2])

def modules(nb) -> list:
    "Name the module of a notebook"
    return [c.directives_['default_exp'] for c in nb.cells if 'default_exp' in getattr(c, 'directives_', {})]

class public_docs(nbdev.processors.add_show_docs):
    "As nbdev's, but in the order of the code, and without methods of private classes and events of callbacks"
    def begin(self):
        super().begin()
        groups = [list(g)[::-1 if docs else 1] for docs,g in itertools.groupby(self.nb.cells, is_doc)]
        self.nb.cells = [c for g in groups for c in g if not (is_doc(c) and private(c.source[len('show_doc('):-1]))]

def is_doc(cell) -> bool: return getattr(cell, 'has_sd', False)

def defined(cell) -> list:
    "Name the functions and classes that a cell defines"
    defs = [o for o in cell.parsed_() if isinstance(o, nbdev.processors._def_types)]
    return [n for o in defs for n in listify(nbdev.showdoc.showdoc_nm(o))]

def fold_private(cell):
    """In place of nbdev's `rm_export`: remove exported code.

    Functions and classes that are not for users stay, folded, as the prose around them explains them"""
    flags = cell.directives_ if cell.cell_type == 'code' else {}
    names = defined(cell) if {'export','exporti'} & set(flags) and 'hide' not in flags else []
    if names and ('exporti' in flags or all(map(private, names))):
        code = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
        cell.source = f'#| code-fold: true\n#| code-summary: Source of {", ".join(names)}\n{code}'
        return
    nbdev.processors.rm_export(cell)

class imported_docs(nbdev.processors.exec_show_docs):
    "As nbdev's, but `show_doc` finds its names in the module, so that no cell of a notebook has to run"
    def begin(self):
        super().begin()
        for mod in modules(self.nb): self.k.run_cell(ALL_NAMES.format(mod))

    def __call__(self, cell):
        if is_doc(cell): super().__call__(cell)

ALL_NAMES = "import fastai_bn.{} as _m\nglobals().update({{k:v for k,v in vars(_m).items() if k[:2] != '__'}})"
IMPORTS = '''```python
from fastai.vision.all import *
from fastcore.test import *
from fastai_bn.{} import *
```'''

class say_imports(nbdev.process.Processor):
    "What the examples of a module's page need, behind its overview"
    def begin(self):
        at = next((i for i,c in enumerate(self.nb.cells) if c.cell_type == 'code'), 0)
        names = [m for m in modules(self.nb) if m != 'all']
        self.nb.cells[at:at] = [nbdev.processors.mk_cell(IMPORTS.format(m), 'markdown') for m in names]

class hide_prose(nbdev.process.Processor):
    "nbdev hides code alone; what hidden prose says stands in docstrings"
    def begin(self):
        self.nb.cells = [c for c in self.nb.cells if c.cell_type != 'markdown' or not is_hidden(c.source)]

class Pages(nbdev.serve.FilterDefaults):
    "nbdev's processing, with ours in front and in three places, and without the comment that pages are generated"
    ours = dict(add_show_docs=public_docs, exec_show_docs=imported_docs, rm_export=fold_private)
    def base_procs(self):
        theirs = [o for o in super().base_procs() if o.__name__ != 'insert_warning']
        return [hide_prose, say_imports, *(self.ours.get(o.__name__, o) for o in theirs)]

def process():
    "nbdev's processing of all notebooks into `_proc/`. (`nbdev-proc-nbs` would want to install Quarto.)"
    nbdev.serve.FilterDefaults = Pages
    nbdev.showdoc.BasicMarkdownRenderer = Api
    os.chdir(root)
    nbdev.serve.proc_nbs(force=True, n_workers=0)

def linked(md:str, rel:str, ids:set) -> str:
    """Make links that nbdev made into this very site relative, in the Markdown `md` of page `rel`.

    They become plain code where there is no such entry, as for what is private"""
    def local(m):
        if (m[2],m[3]) not in ids: return m[1]
        return f'[{m[1]}]({os.path.relpath(m[2], os.path.dirname(rel) or ".")}.md#{m[3]})'
    link = rf'\[(`[^`]+`)\]\({re.escape(doc_url())}/?([\w/.-]+)\.html#([^)]+)\)'
    return outside_code(lambda o: re.sub(link, local, o), md)

def write(file:Path, content:str|bytes):
    "Write a file, into a folder that may be new"
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str): file.write_text(content, encoding='utf-8')
    else: file.write_bytes(content)

def entries(mds:dict) -> set:
    "Collect the entries of the API: page and anchor"
    heads = {rel:re.findall(r'^#+ .* \{ #(\S+) \.api \}$', md, flags=re.M) for rel,md in mds.items()}
    return {(rel.removesuffix('.md'),i) for rel,ids in heads.items() for i in ids}

def pages() -> dict:
    "Make `_docs_src/` of `_proc/` and what lies in the repository's root; return the Markdown by page"
    shutil.rmtree(SRC, ignore_errors=True)
    shutil.copytree(root/'docs', SRC/'assets')
    shutil.copytree(root/'nbs/images', SRC/'images')
    mds = {f.lower():(root/f).read_text(encoding='utf-8') for f in ('CHANGELOG.md','CONTRIBUTING.md')}
    for f in sorted(PROC.rglob('*.ipynb')):
        rel = f.relative_to(PROC).with_name(page(f.stem))
        nb = json.loads(f.read_text(encoding='utf-8'))
        mds[f'{rel}.md'],images = convert(nb, True, files=f'{rel.name}_files', repository=project_url('Repository'))
        for name,png in images.items(): write(SRC/f'{rel}_files'/name, png)
    ids = entries(mds)
    mds = {rel:linked(first_screen(md, Path(rel).stem), rel, ids) for rel,md in mds.items()}
    for rel,md in mds.items(): write(SRC/rel, described(md))
    write(SRC/'llms.txt', llms(mds))
    return mds

SUBTITLE = re.compile(r'\A# (.*)\n\n(.*)\n\{: \.subtitle \}')

def call_of(name:str, md:str) -> tuple|None: # Anchor, is it a method of `Learner`?, signature
    "Find the entry of `name` on a page"
    head = rf'^#+ (Learner\.)?{re.escape(name.replace("_", chr(92)+"_"))} \{{ #(\S+) \.api \}}$'
    m = re.search(rf'{head}.*?^```python\n(.*?)^```', md, flags=re.M|re.S)
    return m and (m[2], bool(m[1]), m[3])

def promised(subtitle:str, md:str) -> tuple|None: # Name, and what `call_of` gives
    "Find what a page is about: the first name in its subtitle that has an entry"
    for name in re.findall(r'`(?:learn\.)?([A-Za-z][\w.]*)(?:\(\))?`', subtitle):
        if found := call_of(name, md): return name,*found

def compact(call:str) -> str:
    "Write a signature in few lines, where it has a line for each parameter"
    name,*params = call.strip().splitlines()
    if not params: return name
    joined = ' '.join(o.strip().replace(' ', '\0') for o in params[:-1]).removesuffix(',')
    lines = textwrap.wrap(f'{name}{joined})', 92, subsequent_indent=' '*len(name), break_long_words=False)
    return '\n'.join(lines).replace('\0', ' ')

def first_screen(md:str, module:str) -> str:
    "Begin a module's page with the signature of what it is about; its overview, with an example, follows"
    m = SUBTITLE.match(md)
    found = m and promised(m[2], md)
    if not found: return md
    name,anchor,is_method,call = found
    begin = 'from fastai_bn.all import *' if is_method else f'from fastai_bn.{module} import {name.partition(".")[0]}'
    call = compact(f'learn.{call}' if is_method else call)
    top = f'{m[0]}\n\n```python\n{begin}\n\n{call}\n```\n\n[All arguments](#{anchor})\n{{: .more }}'
    return top + md[m.end():]

def described(md:str) -> str:
    "Add the subtitle as the page's description, for search engines"
    m = SUBTITLE.match(md)
    if not m: return md
    description = m[2].replace('`', '')
    return f'---\n{yaml.safe_dump(dict(description=description), width=1000)}---\n\n{md}'

MARKUP = re.compile(r'^\{: \.\w+ \}\n|(?<=\S) \{ #\S+ \.api \}$|(?<=`) \{ \.text \.output \}$', flags=re.M)

def plain(md:str) -> str:
    "Write a page for readers that are no people: without the site's markup, and with links to its like"
    md = MARKUP.sub('', SUBTITLE.sub(r'# \1\n\n> \2', md))
    return outside_code(lambda o: re.sub(r'\]\((?!\w+:)([\w/.-]+)\.md(#[^)]*)?\)', r'](\1.html.md\2)', o), md)

MODULE = re.compile(r'^- (?:`fastai_bn\.(\w+)`|\[fastai_bn\.(\w+)\]\([^)]*\)): (.*?)(?: \(Docs: .*\))?$', re.M)

def llms(mds:dict) -> str:
    """Add to nbdev's llms.txt, which lists the modules, the pages that are of none, in the order of the navigation.

    On the site each line links to its page; the file in the repository names notebooks as long as there is no site"""
    text = (root/'nbs/llms.txt').read_text(encoding='utf-8')
    head,mark,tail = text.partition('\n<!-- Generated')
    assert mark, text
    modules = {m[1] or m[2] for m in MODULE.finditer(head)}
    head = MODULE.sub(lambda m: f'- [fastai_bn.{m[1] or m[2]}]({page_url(m[1] or m[2])}): {m[3]}', head)
    rels = re.findall(r': (\S+)\.md$', (root/'mkdocs.yml').read_text(encoding='utf-8'), flags=re.M)
    lines = [entry(rel, mds[f'{rel}.md']) for rel in rels if rel not in modules]
    return head + '\n## Pages\n\n' + '\n'.join(lines) + '\n' + mark + tail

def page_url(rel:str) -> str: return f'{doc_url()}/{rel}.html.md'.lstrip('/')

def entry(rel:str, md:str) -> str:
    "Write the line for a page in llms.txt"
    m = SUBTITLE.match(md) or re.match('# (.*)', md)
    return f'- [{m[1]}]({page_url(rel)})' + (f': {m[2]}' if m.re is SUBTITLE else '')

def config() -> Path:
    "Write what Zensical reads: mkdocs.yml, with the project's address where it has one"
    cfg = yaml.safe_load((root/'mkdocs.yml').read_text(encoding='utf-8'))
    if url := doc_url(): cfg['site_url'] = f'{url}/'
    # In place of repo_url, whose script asks api.github.com
    if url := project_url('Repository'):
        cfg['extra']['social'] = [dict(icon='fontawesome/brands/git-alt', link=url, name='The repository')]
    file = root/'_mkdocs.yml'
    file.write_text(yaml.safe_dump(cfg, sort_keys=False, width=1000), encoding='utf-8')
    return file

def katex():
    "KaTeX's style, scripts and fonts, from the npm registry: once, then from the environment's folder"
    dist = Path(sys.prefix)/'share'/f'katex-{KATEX}'
    if not dist.exists():
        with tempfile.TemporaryDirectory() as tmp:
            pack = ['npm', 'pack', '--silent', f'katex@{KATEX}']
            tgz = subprocess.run(pack, cwd=tmp, text=True, stdout=subprocess.PIPE, check=True).stdout.split()[-1]
            shutil.unpack_archive(Path(tmp)/tgz, tmp)
            shutil.copytree(Path(tmp)/'package'/'dist', dist)
    own = [dist/'katex.min.css', dist/'katex.min.js', dist/'contrib/auto-render.min.js']
    for f in own: write(SRC/'assets/katex'/f.name, f.read_bytes())
    for f in (dist/'fonts').glob('*.woff2'): write(SRC/'assets/katex/fonts'/f.name, f.read_bytes())

def build():
    process()
    mds = pages()
    katex()
    zensical = [sys.executable, '-m', 'zensical', 'build', '--clean', '--strict', '-f', config().name]
    subprocess.run(zensical, cwd=root, check=True, env={**os.environ, 'NO_COLOR':'1'})
    # Where nbdev's docstrings lead to
    for rel,md in mds.items(): write((SITE/rel).with_suffix('.html.md'), plain(md))

def serve(port:int=8000):
    print(f'http://localhost:{port}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
    http.server.test(handler, port=port, bind='127.0.0.1')

if __name__ == '__main__':
    build()
    if 'serve' in sys.argv: serve()
