"""The docs site: notebooks -> Markdown -> `_docs/`, without Quarto and with nothing loaded from elsewhere when it is read.

    python tools/docs.py            # build
    python tools/docs.py serve      # build, then serve on http://localhost:8000

1. nbdev processes the notebooks: hidden cells go, `show_doc` takes the place of exported code, names become links. Here it also adds tables of parameters
   (`Api`), and folds exported code that is private, which the prose around it explains (`Pages`).
2. `nb2md` turns them into Markdown in `_docs_src/`, with CHANGELOG.md and CONTRIBUTING.md beside them.
3. Zensical builds `_docs/` from mkdocs.yml. KaTeX comes from the npm registry once and is served by the site itself.
4. Each page's Markdown and llms.txt lie beside it, for readers that are no people."""
import functools, http.server, inspect, itertools, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import nbdev.processors, nbdev.serve, nbdev.showdoc, yaml
from fastcore.basics import listify
from fastai.callback.core import event
from fastcore.docments import DocmentTbl, docments
from nbdev.doclinks import NbdevLookup

from nb2md import convert, outside_code, page
from readme import doc_url, root

PROC,SRC,SITE = root/'_proc',root/'_docs_src',root/'_docs'
KATEX = '0.16.22'

def readable(s:str) -> str:
    "Without what Python prints for functions, classes and factories: a name says more, and is the same in every build"
    return re.sub(r"<function (?:\w+\.)*(\w+) at 0x\w+>|<class '(?:\w+\.)*(\w+)'>|<factory>", lambda m: m[1] or m[2] or '[]', s)

def own_init(sym) -> bool: return not inspect.isclass(sym) or '__init__' in vars(sym)

def signature(sym, name:str) -> str:
    "The call, without types and comments, which the table has: in a line, or a line for each parameter"
    ps = [p.replace(annotation=p.empty) for p in inspect.signature(sym).parameters.values() if p.name != 'self']
    call = name + readable(str(inspect.Signature(ps)))
    if len(call) <= 96: return call
    parts,kinds = [readable(str(p)) for p in ps],[p.kind for p in ps]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds: parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), '*')
    return name + '(\n' + ''.join(f'    {o},\n' for o in parts) + ')'

def documented(f) -> bool: return any(docments(f, returns=True).values())

def methods(cls) -> list:
    "A class's own public methods and properties that it documents. Methods patched in elsewhere have entries anyway"
    src,res = inspect.getsource(cls),[]
    for n,o in vars(cls).items():
        if n[0] == '_' or not re.search(rf'^    def {n}\(', src, flags=re.M) or not getattr(o, '__doc__', None): continue
        is_call = not isinstance(o, (property,functools.cached_property))
        full = is_call and documented(getattr(cls, n))
        if full or not any(hasattr(b, n) for b in cls.__bases__): res.append((n, getattr(cls, n) if is_call else o, is_call, full))
    return res

class Api(nbdev.showdoc.BasicMarkdownRenderer):
    "`show_doc` for the site: heading, source, signature, docstring, a table of parameters, and the methods of a class"
    def __init__(self, sym, *args, **kwargs):
        super().__init__(sym, *args, **kwargs)
        self.is_property = isinstance(sym, (property,functools.cached_property))  # `self.sym` is its function

    def _repr_markdown_(self): return '\n\n'.join(filter(None, self.parts()))

    def parts(self):
        yield f'{"#"*self.title_level} {self.nm.replace("_", chr(92)+"_")} {{ #{self.nm.lower()} .api }}'
        if src := NbdevLookup().code(self.nm): yield f'[source]({src})\n{{: .source }}'
        name = self.nm if inspect.ismethod(self.sym) else self.nm.rpartition('.')[2]
        yield f'```python\n{name if self.is_property else signature(self.sym, name)}\n```'
        yield inspect.cleandoc(self.sym.__doc__ or '')
        yield self.table()
        if not inspect.isclass(self.sym): return
        found = methods(self.sym)
        rows = [f'| `{signature(o, n) if is_call else n}` | {" ".join(o.__doc__.split())} |' for n,o,is_call,full in found if not full]
        if rows: yield '\n'.join(['| Method | |','| --- | --- |',*rows])
        for n,o,_,full in found:
            if full: yield Api(o, name=f'{self.nm}.{n}', title_level=self.title_level+1)._repr_markdown_()

    def table(self) -> str:
        if not own_init(self.sym) or not documented(self.sym): return ''
        rows = re.sub(r'\| \*\*(.*?)\*\* (?=\|)', r'| \1 ', DocmentTbl(self.sym)._repr_markdown_())
        return readable(rows.replace('| NoneType |', '| |'))

def private(name:str) -> bool:
    "Is the name, or the class it is in, private, or is it an event of a callback, which the training loop calls?"
    return re.search(r'(^|\.)_', name) is not None or '.' in name and hasattr(event, name.rpartition('.')[2])

def modules(nb) -> list: return [c.directives_['default_exp'] for c in nb.cells if 'default_exp' in getattr(c, 'directives_', {})]

class public_docs(nbdev.processors.add_show_docs):
    "As nbdev's, but in the order of the code, and of private classes no method is shown either, and of callbacks no event"
    def begin(self):
        super().begin()
        is_doc = lambda c: getattr(c, 'has_sd', False)
        groups = [list(g)[::-1 if docs else 1] for docs,g in itertools.groupby(self.nb.cells, is_doc)]
        self.nb.cells = [c for g in groups for c in g if not (is_doc(c) and private(c.source[len('show_doc('):-1]))]

def fold_private(cell):
    "In place of nbdev's `rm_export`: exported code goes, but functions and classes that are private stay, folded, as the prose around them explains them"
    if cell.cell_type == 'code' and 'export' in cell.directives_ and 'hide' not in cell.directives_:
        names = [n for o in cell.parsed_() if isinstance(o, nbdev.processors._def_types) for n in listify(nbdev.showdoc.showdoc_nm(o))]
        if names and all(map(private, names)):
            cell.source = f'#| code-fold: true\n#| code-summary: Source of {", ".join(names)}\n' + re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
            return
    nbdev.processors.rm_export(cell)

class imported_docs(nbdev.processors.exec_show_docs):
    "As nbdev's, but `show_doc` finds its names in the module, so that no cell of a notebook has to run"
    def begin(self):
        super().begin()
        for mod in modules(self.nb):
            self.k.run_cell(f'import fastai_bn.{mod} as _m\nglobals().update({{k:v for k,v in vars(_m).items() if k[:2] != "__"}})')

    def __call__(self, cell):
        if getattr(cell, 'has_sd', False): super().__call__(cell)

class say_imports(nbdev.process.Processor):
    "What the examples of a module's page need, behind its overview"
    def begin(self):
        at = next((i for i,c in enumerate(self.nb.cells) if c.cell_type == 'code'), 0)
        self.nb.cells[at:at] = [nbdev.processors.mk_cell(f'```python\nfrom fastai.vision.all import *\nfrom fastcore.test import *\nfrom fastai_bn.{m} import *\n```', 'markdown')
                                for m in modules(self.nb) if m != 'all']

class Pages(nbdev.serve.FilterDefaults):
    "nbdev's processing, with ours in front and in three places, and without the comment that pages are generated"
    ours = dict(add_show_docs=public_docs, exec_show_docs=imported_docs, rm_export=fold_private)
    def base_procs(self): return [say_imports, *(self.ours.get(o.__name__, o) for o in super().base_procs() if o.__name__ != 'insert_warning')]

def process():
    "nbdev's processing of all notebooks into `_proc/`. (`nbdev-proc-nbs` would want to install Quarto.)"
    nbdev.serve.FilterDefaults,nbdev.showdoc.BasicMarkdownRenderer = Pages,Api
    os.chdir(root)
    nbdev.serve.proc_nbs(force=True, n_workers=0)

def linked(md:str, rel:str, ids:set) -> str:
    "`md` of page `rel` with links that nbdev made into this very site: relative, and plain code where there is no such entry, as for what is private"
    def local(m): return f'[{m[1]}]({os.path.relpath(m[2], os.path.dirname(rel) or ".")}.md#{m[3]})' if (m[2],m[3]) in ids else m[1]
    return outside_code(lambda o: re.sub(rf'\[(`[^`]+`)\]\({re.escape(doc_url())}/([\w/.-]+)\.html#([^)]+)\)', local, o), md)

def pages() -> dict:
    "`_docs_src/` from `_proc/` and what lies in the repository's root; the Markdown by page"
    shutil.rmtree(SRC, ignore_errors=True)
    shutil.copytree(root/'docs', SRC/'assets')
    mds = {f.lower():(root/f).read_text(encoding='utf-8') for f in ('CHANGELOG.md','CONTRIBUTING.md')}
    for f in sorted(PROC.rglob('*.ipynb')):
        rel = f.relative_to(PROC).with_name(page(f.stem))
        mds[f'{rel}.md'],images = convert(json.loads(f.read_text(encoding='utf-8')), site=True, files=f'{rel.name}_files')
        for name,png in images.items():
            (o := SRC/f'{rel}_files'/name).parent.mkdir(parents=True, exist_ok=True)
            o.write_bytes(png)
    ids = {(rel.removesuffix('.md'),i) for rel,md in mds.items() for i in re.findall(r'^#+ .* \{ #(\S+) \.api \}$', md, flags=re.M)}
    for rel,md in mds.items():
        (SRC/rel).parent.mkdir(parents=True, exist_ok=True)
        mds[rel] = linked(md, rel, ids)
        (SRC/rel).write_text(described(mds[rel]), encoding='utf-8')
    (SRC/'llms.txt').write_text(llms(mds), encoding='utf-8')
    return mds

SUBTITLE = re.compile(r'\A# (.*)\n\n(.*)\n\{: \.subtitle \}')

def described(md:str) -> str:
    "With the subtitle as the page's description, for search engines"
    return f'---\n{yaml.safe_dump(dict(description=m[2].replace("`", "")), width=1000)}---\n\n{md}' if (m := SUBTITLE.match(md)) else md

def plain(md:str) -> str:
    "A page for readers that are no people: without the site's markup, and with links to its like"
    md = re.sub(r'^\{: \.\w+ \}\n|(?<=\S) \{ #\S+ \.api \}$|(?<=`) \{ \.text \.output \}$', '', SUBTITLE.sub(r'# \1\n\n> \2', md), flags=re.M)
    return outside_code(lambda o: re.sub(r'\]\((?!\w+:)([\w/.-]+)\.md(#[^)]*)?\)', r'](\1.html.md\2)', o), md)

def llms(mds:dict) -> str:
    "nbdev's llms.txt, which lists the modules, and the pages that are of none, in the order of the navigation"
    text = (root/'nbs/llms.txt').read_text(encoding='utf-8')
    head,mark,tail = text.partition('\n<!-- Generated')
    assert mark, text
    lines = []
    for rel in re.findall(r': (\S+)\.md$', (root/'mkdocs.yml').read_text(encoding='utf-8'), flags=re.M):
        if (url := f'{doc_url()}/{rel}.html.md') in text: continue
        m = SUBTITLE.match(mds[f'{rel}.md'])
        lines.append(f'- [{m[1]}]({url}): {m[2]}' if m else f'- [{re.match("# (.*)", mds[f"{rel}.md"])[1]}]({url})')
    return head + '\n## Pages\n\n' + '\n'.join(lines) + '\n' + mark + tail

def katex():
    "KaTeX's style, scripts and fonts, from the npm registry: once, then from the environment's folder"
    dist = Path(sys.prefix)/'share'/f'katex-{KATEX}'
    if not dist.exists():
        with tempfile.TemporaryDirectory() as tmp:
            tgz = subprocess.run(['npm','pack','--silent',f'katex@{KATEX}'], cwd=tmp, text=True, stdout=subprocess.PIPE, check=True).stdout.split()[-1]
            shutil.unpack_archive(Path(tmp)/tgz, tmp)
            shutil.copytree(Path(tmp)/'package'/'dist', dist)
    for f in [dist/'katex.min.css', dist/'katex.min.js', dist/'contrib/auto-render.min.js', *(dist/'fonts').glob('*.woff2')]:
        (o := SRC/'assets/katex'/('fonts' if f.suffix == '.woff2' else '')/f.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, o)

def build():
    process()
    mds = pages()
    katex()
    subprocess.run([sys.executable, '-m', 'zensical', 'build', '--clean', '--strict', '-f', 'mkdocs.yml'], cwd=root, check=True, env={**os.environ, 'NO_COLOR':'1'})
    for rel,md in mds.items(): (SITE/rel).with_suffix('.html.md').write_text(plain(md), encoding='utf-8')  # where nbdev's docstrings lead to

def serve(port:int=8000):
    print(f'http://localhost:{port}')
    http.server.test(functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE), port=port, bind='127.0.0.1')

if __name__ == '__main__':
    build()
    if 'serve' in sys.argv: serve()
