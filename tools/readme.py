"README.md from nbs/index.ipynb: the cells as Markdown, with GitHub's alerts for callouts and links into the docs site"
import json, re, tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ALERT = dict(note='NOTE', tip='TIP', warning='WARNING', important='IMPORTANT', caution='CAUTION')

def doc_url():
    with open(root/'pyproject.toml', 'rb') as f: return tomllib.load(f)['project']['urls']['Documentation'].rstrip('/')

def page(stem): return re.sub(r'^\d+[a-z]?_', '', stem)  # as nbdev names its pages

def prose(s):
    "Callouts to alerts, links to notebooks to links to the docs"
    def alert(m):
        body = re.sub(r'^\s*##\s+(.*)$', r'**\1**', m[2].strip('\n'), flags=re.M)
        return '\n'.join(('> '+l).rstrip() for l in [f'[!{ALERT[m[1]]}]', *body.splitlines()])
    s = re.sub(r'^:::\s*\{\.callout-(\w+)[^}\n]*\}\n(.*?)^:::[ \t]*$', alert, s, flags=re.M|re.S)
    return re.sub(r'\]\(([\w/]+)\.ipynb(#[^)]*)?\)', lambda m: f']({doc_url()}/{page(m[1])}.html{m[2] or ""})', s)

def output(o):
    if o['output_type']=='stream': return ''.join(o['text']) if o['name']=='stdout' else ''
    return ''.join(o.get('data', {}).get('text/plain', ''))

def convert(nb):
    "Markdown of a notebook (a dict)"
    res = []
    for c in nb['cells']:
        src = ''.join(c['source'])
        if c['cell_type']=='markdown': res.append(prose(src))
        elif c['cell_type']=='code':
            flags = re.findall(r'^#\|\s*(.*)$', src, flags=re.M)
            if {'hide','export','default_exp'} & {f.split()[0] for f in flags if f}: continue
            res.append('```python\n' + re.sub(r'^#[|].*\n', '', src, flags=re.M).strip() + '\n```')
            out = '\n'.join(filter(None, (output(o).rstrip() for o in c.get('outputs', []))))
            if out: res.append(f'```\n{out}\n```')
    return '\n\n'.join(r.strip('\n') for r in res if r.strip()) + '\n'

def readme(): return convert(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
