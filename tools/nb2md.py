"""Notebooks as Markdown, in two dialects: the docs site's (Zensical, MkDocs' extensions) and GitHub's, for README.md.

`convert(nb, site)` takes a notebook as a dict, raw or processed by nbdev. It knows what our notebooks use, and no more: front matter or a first cell of title and
subtitle, callouts, links to notebooks, directives that hide or fold, and text, tables, pictures and `show_doc`'s Markdown as outputs."""
import base64, re

import yaml

ALERT = dict(note='NOTE', tip='TIP', warning='WARNING', important='IMPORTANT', caution='CAUTION')   # GitHub's
ADMONITION = dict(note='note', tip='tip', warning='warning', important='info', caution='danger')    # MkDocs'
HIDDEN = {'hide','export','exporti','default_exp'}
FENCED = re.compile(r'(^(?:`{3,}|~~~).*?^(?:`{3,}|~~~)[ \t]*$)', re.M|re.S)

def page(stem:str) -> str: return re.sub(r'^\d+[a-z]?_', '', stem)  # as nbdev names its pages

def outside_code(f, s:str) -> str:
    "`s` with `f` applied to what is outside fenced blocks"
    return ''.join(o if i%2 else f(o) for i,o in enumerate(FENCED.split(s)))

def unlinked(s:str) -> str:
    "`s` without the links that nbdev made of names where they are in the way: within links and headings"
    nested = r'(?<=\[)([^][\n]*)\[(`[^`]+`)\]\([^)]*\)(?=(?:[^][\n]|\[`[^`]+`\]\([^)]*\))*\]\()'
    while s != (s := re.sub(nested, r'\1\2', s)): pass
    return re.sub(r'^#+ .*', lambda h: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', h[0]), s, flags=re.M)

def indented(s:str) -> str: return re.sub(r'^(?=.)', '    ', s, flags=re.M)
def text(o) -> str: return o if isinstance(o, str) else ''.join(o)

class Writer:
    "Markdown of one notebook; `images`, the content of its pictures by file name, is filled on the way"
    def __init__(self, site:bool, doc_url:str='', files:str=''):
        self.site,self.doc_url,self.files,self.images,self.heading = site,doc_url.rstrip('/'),files,{},''

    def callout(self, m):
        kind,body = m[1],m[2].strip('\n')
        title = re.match(r'##\s+(.*)\n*', body)
        if title: body = body[title.end():]
        if self.site: return f'!!! {ADMONITION[kind]}' + (f' "{title[1]}"' if title else '') + '\n\n' + indented(body)
        return re.sub(r'^', '> ', '\n'.join([f'[!{ALERT[kind]}]', *([f'**{title[1]}**',''] if title else []), body]), flags=re.M).replace('> \n', '>\n')

    def link(self, m):
        folder,_,stem = m[1].rpartition('/')
        target = f'{folder}/{page(stem)}' if folder else page(stem)
        return f']({target}.md{m[2] or ""})' if self.site else f']({self.doc_url}/{target}.html{m[2] or ""})'

    def prose(self, s:str) -> str:
        s = re.sub(r'^:::\s*\{\.callout-(\w+)\}\n(.*?)^:::[ \t]*$', self.callout, s, flags=re.M|re.S)
        s = outside_code(lambda o: re.sub(r'\]\(([\w/.-]+)\.ipynb(#[^)]*)?\)', self.link, o), s)
        s = outside_code(unlinked, s)
        for h in re.findall(r'^#+\s+(.*?)\s*(?:\{.*)?$', FENCED.sub('', s), flags=re.M): self.heading = h.replace('`', '')
        return s

    def fence(self, s:str) -> str:
        if not s.strip(): return ''
        ticks = max(re.findall('`+', s)+['``'], key=len) + '`'
        return ticks + ' { .text .output }'*self.site + f'\n{s.rstrip()}\n{ticks}'

    def output(self, o) -> str:
        if o['output_type'] == 'stream': return self.fence(text(o['text'])) if o['name'] == 'stdout' else ''
        data = {k:text(v) for k,v in o['data'].items() if isinstance(v, (str,list))}
        if 'text/markdown' in data: return self.prose(data['text/markdown'])
        if self.site and 'image/png' in data:
            name = f'{len(self.images)+1}.png'
            self.images[name] = base64.b64decode(data['image/png'])
            return f'![{self.heading}]({self.files}/{name})'
        if self.site and 'text/html' in data:  # a data frame
            table = re.sub(r'<style.*?</style>| border="1"| class="dataframe"| style="[^"]*"', '', data['text/html'], flags=re.S)
            return '<div class="output">\n' + '\n'.join(l.strip() for l in table.splitlines() if l.strip()) + '\n</div>'
        return self.fence(data.get('text/plain', ''))

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
        for o in c.get('outputs', []): yield self.output(o)

    def cells(self, nb):
        for c in nb['cells']:
            if c['cell_type'] == 'code': yield from self.code(c)
            elif c['cell_type'] == 'markdown': yield self.prose(re.sub(r'^(#\|.*\n)+', '', text(c['source'])))
            elif (s := text(c['source'])).startswith('---'): yield self.title(yaml.safe_load(s.strip().strip('-')))

    def title(self, front):
        "A page's title and, in the style of the site, its subtitle"
        self.heading = front['title']
        return f'# {front["title"]}\n\n{front["description"]}\n{{: .subtitle }}'

def convert(nb:dict, site:bool, doc_url:str='', files:str='') -> tuple[str,dict]: # Markdown, and pictures by file name
    "Markdown of `nb`; with `site` its pictures are linked to in the folder `files`, without it all links go to `doc_url`"
    w = Writer(site, doc_url, files)
    return '\n\n'.join(o.strip('\n') for o in w.cells(nb) if o and o.strip()) + '\n',w.images
