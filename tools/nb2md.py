"""Notebooks as Markdown, in two dialects: the docs site's (Zensical, MkDocs' extensions) and GitHub's, for README.md.

`convert(nb, site)` takes a notebook as a dict, raw or processed by nbdev. It knows what our notebooks use, and no more:
front matter or a first cell of title and subtitle, callouts, links to notebooks and to files of the repository's root,
pictures in a light and a dark version, directives that hide or fold, and text, tables, pictures and `show_doc`'s
Markdown as outputs."""
import base64
import re

import yaml

# GitHub's names, and MkDocs'
ALERT = dict(note='NOTE', tip='TIP', warning='WARNING', important='IMPORTANT', caution='CAUTION')
ADMONITION = dict(note='note', tip='tip', warning='warning', important='info', caution='danger')
HIDDEN = {'hide','export','exporti','default_exp'}
# Files of the root that have a page on the site
ROOT_PAGES = 'CHANGELOG.md','CONTRIBUTING.md'
NOTEBOOK_LINK = re.compile(r'\]\(([\w/.-]+)\.ipynb(#[^)]*)?\)')
ROOT_LINK = re.compile(r'\[([^][]*)\]\(((?:\.\./)+)(?![\w.-]*\.ipynb)([\w.-]+)(#[^)]*)?\)')
# The light version is what a notebook shows
PICTURE = re.compile(r'!\[([^]]*)\]\(([\w/.-]+)-light\.svg\)')
FENCED = re.compile(r'(^(?:`{3,}|~~~).*?^(?:`{3,}|~~~)[ \t]*$)', re.M|re.S)

def page(stem:str) -> str:
    "Name a notebook's page as nbdev does"
    return re.sub(r'^\d+[a-z]?_', '', stem)

def outside_code(f, s:str) -> str:
    "Apply `f` to what is outside fenced blocks"
    return ''.join(o if i%2 else f(o) for i,o in enumerate(FENCED.split(s)))

def unlinked(s:str) -> str:
    "Remove the links that nbdev made of names where they are in the way: within links and headings"
    words = r'(?:[^][\n]|\n(?!\n))' # of one paragraph
    nested = rf'(?<=\[)({words}*)\[(`[^`]+`)\]\([^)]*\)(?=(?:{words}|\[`[^`]+`\]\([^)]*\))*\]\()'
    before = None
    while s != before: before,s = s,re.sub(nested, r'\1\2', s)
    def plain(heading): return re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', heading[0])
    return re.sub(r'^#+ .*', plain, s, flags=re.M)

def is_hidden(s:str) -> bool:
    "Tell whether `#| hide`, or `#| hide: true`, as nbdev writes it, is one of the directives with which prose begins"
    return re.match(r'(?:#\|.*\n)*#\| hide(: true)?\n', s) is not None

def indented(s:str) -> str: return re.sub(r'^(?=.)', '    ', s, flags=re.M)
def text(o) -> str: return o if isinstance(o, str) else ''.join(o)

def admonition(kind:str, title:str|None, body:str) -> str:
    "Write a callout as MkDocs has it"
    head = f'!!! {ADMONITION[kind]}' + (f' "{title}"' if title else '')
    return f'{head}\n\n{indented(body)}'

def alert(kind:str, title:str|None, body:str) -> str:
    "Write a callout as GitHub has it"
    lines = [f'[!{ALERT[kind]}]', *([f'**{title}**', ''] if title else []), *body.split('\n')]
    return '\n'.join(f'> {line}' if line else '>' for line in lines)

class Writer:
    "Markdown of one notebook; `images`, the content of its pictures by file name, is filled on the way"
    def __init__(self, site:bool, doc_url:str='', files:str='', repository:str=''):
        self.site,self.files = site,files
        self.doc_url,self.repository = doc_url.rstrip('/'),repository.rstrip('/')
        self.images,self.heading = {},''

    def callout(self, m):
        kind,body = m[1],m[2].strip('\n')
        title = re.match(r'##\s+(.*)\n*', body)
        if title: body = body[title.end():]
        if self.site: return admonition(kind, title and title[1], body)
        return alert(kind, title and title[1], body)

    def link(self, m):
        "Link to a notebook's page; in README to the notebook itself, as long as there is no site"
        folder,_,stem = m[1].rpartition('/')
        target = f'{folder}/{page(stem)}' if folder else page(stem)
        if self.site: return f']({target}.md{m[2] or ""})'
        return f']({self.doc_url}/{target}.html{m[2] or ""})' if self.doc_url else f'](nbs/{m[1]}.ipynb)'

    def root_link(self, m):
        "Link to a file of the repository's root; on the site it may have a page, or be out of reach"
        words,up,file,anchor = m[1],m[2],m[3],m[4] or ''
        if not self.site: return f'[{words}]({file}{anchor})'
        if file in ROOT_PAGES: return f'[{words}]({up[3:]}{file.lower()}{anchor})'
        return f'[{words}]({self.repository}/blob/main/{file})' if self.repository else words

    def two_pictures(self, m):
        "Show a picture's light or dark version, as the reader has it"
        words,path = m[1],m[2]
        if self.site: return f'![{words}]({path}-light.svg#only-light)\n![{words}]({path}-dark.svg#only-dark)'
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="nbs/{path}-dark.svg">'
        alt = words.replace('"', '&quot;')
        light = f'<img src="nbs/{path}-light.svg"\n       alt="{alt}">'
        return f'<picture>\n  {dark}\n  {light}\n</picture>'

    def links(self, s:str) -> str:
        "Translate links and pictures in text without code"
        s = PICTURE.sub(self.two_pictures, s)
        s = ROOT_LINK.sub(self.root_link, s)
        return NOTEBOOK_LINK.sub(self.link, s)

    def prose(self, s:str) -> str:
        s = re.sub(r'^:::\s*\{\.callout-(\w+)\}\n(.*?)^:::[ \t]*$', self.callout, s, flags=re.M|re.S)
        s = outside_code(self.links, s)
        s = outside_code(unlinked, s)
        headings = re.findall(r'^#+\s+(.*?)\s*(?:\{.*)?$', FENCED.sub('', s), flags=re.M)
        if headings: self.heading = headings[-1].replace('`', '')
        return s

    def fence(self, s:str) -> str:
        if not s.strip(): return ''
        ticks = max(re.findall('`+', s)+['``'], key=len) + '`'
        return ticks + ' { .text .output }'*self.site + f'\n{s.rstrip()}\n{ticks}'

    def output(self, o) -> str:
        if o['output_type'] == 'stream': return self.fence(text(o['text'])) if o['name'] == 'stdout' else ''
        data = {k:text(v) for k,v in o['data'].items() if isinstance(v, (str,list))}
        if 'text/markdown' in data: return self.prose(data['text/markdown'])
        if self.site and 'image/png' in data: return self.picture(data['image/png'])
        if self.site and 'text/html' in data: return data_frame(data['text/html'])
        return self.fence(data.get('text/plain', ''))

    def picture(self, png:str) -> str:
        name = f'{len(self.images)+1}.png'
        self.images[name] = base64.b64decode(png)
        return f'![{self.heading}]({self.files}/{name})'

    def code(self, c):
        src = text(c['source'])
        head = re.match(r'(?:#\|.*\n?)*', src)[0]
        flags = {k:v.strip('"') for k,v in re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', head, flags=re.M)}
        if HIDDEN & set(flags): return
        src = src[len(head):].strip()
        if src and flags.get('echo') != 'false':
            block = f'```python\n{src}\n```'
            fold = self.site and flags.get('code-fold') == 'true'
            yield f'??? code "{flags.get("code-summary", "Code")}"\n\n{indented(block)}' if fold else block
        shown = self.outputs(c)
        fold = self.site and shown and flags.get('fold-output')
        yield f'??? note "{fold}"\n\n{indented(shown)}' if fold else shown

    def outputs(self, c) -> str:
        "Write a cell's outputs; pictures that follow one another stand side by side"
        shown = [o for o in map(self.output, c.get('outputs', [])) if o.strip()]
        return re.sub(r'(?<=\.png\))\n\n(?=!\[)', '\n', '\n\n'.join(o.strip('\n') for o in shown))

    def cells(self, nb):
        for c in nb['cells']:
            if c['cell_type'] == 'code': yield from self.code(c)
            elif c['cell_type'] == 'markdown': yield self.markdown(text(c['source']))
            elif (s := text(c['source'])).startswith('---'): yield self.title(yaml.safe_load(s.strip().strip('-')))

    def markdown(self, s:str) -> str:
        return '' if is_hidden(s) else self.prose(re.sub(r'\A(#\|.*\n)+', '', s))

    def title(self, front):
        "A page's title and, in the style of the site, its subtitle"
        self.heading = front['title']
        return f'# {front["title"]}\n\n{front["description"]}\n{{: .subtitle }}'

def data_frame(markup:str) -> str:
    "Write a table without what pandas and GitHub style it with"
    table = re.sub(r'<style.*?</style>| border="1"| class="dataframe"| style="[^"]*"', '', markup, flags=re.S)
    lines = [l.strip() for l in table.splitlines() if l.strip()]
    return '\n'.join(['<div class="output">', *lines, '</div>'])

def convert(nb:dict, site:bool, **kwargs) -> tuple[str,dict]: # Markdown, and pictures by file name
    """Write `nb` as Markdown; `kwargs` are the other arguments of `Writer`.

    With `site`, pictures are links into the folder `files`, and files of the root are at `repository`. Without, links
    go to `doc_url`, or to files of the clone"""
    w = Writer(site, **kwargs)
    return '\n\n'.join(o.strip('\n') for o in w.cells(nb) if o and o.strip()) + '\n',w.images
