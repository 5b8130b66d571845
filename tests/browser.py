"""The built site in a real browser: `make test-docs`. Needs `_docs/` and Debian's chromium, or one that CHROMIUM names

Every page at desktop width in light, and at phone width in dark: errors, missing and outside requests, leftover markup,
formulas, pictures, doubled ids, sideways scroll, dead links. SHOTS=FOLDER stores a picture of each."""
import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pytest
import yaml
from playwright.sync_api import sync_playwright

from helpers import ROOT, public_names, public_object

site = ROOT/'_docs'
pages = sorted(f.relative_to(site).as_posix() for f in site.rglob('*.html') if f.name != '404.html')
assert pages, 'nothing built: make docs'
views = {'light desktop':('light',1300), 'dark phone':('dark',390)}
widths = dict(desktop=('light',1300), phone=('light',390))
flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def base():
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{srv.server_port}/'
    srv.shutdown()

@pytest.fixture(scope='session')
def browser():
    path = os.environ.get('CHROMIUM') or shutil.which('chromium')
    assert path, "no chromium: install Debian's, or set CHROMIUM"
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=flags)
        yield b
        b.close()

@pytest.fixture
def tab(request, browser, base):
    "A new page; what it says and asks for is noted, and has to be in order at the end"
    scheme,width = getattr(request, 'param', widths['desktop'])
    context,bad = browser.new_context(color_scheme=scheme, viewport=dict(width=width, height=900)),[]
    pg = context.new_page()
    def is_outside(url): return not url.startswith((base,'data:','blob:'))
    pg.on('console', lambda m: bad.append(m.text) if m.type in ('error','warning') else None)
    pg.on('pageerror', lambda e: bad.append(str(e)))
    # A page that is left for another one ends what it still asks for
    pg.on('requestfailed', lambda r: None if r.failure == 'net::ERR_ABORTED' else bad.append(f'failed: {r.url}'))
    pg.on('response', lambda r: bad.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    pg.on('request', lambda r: bad.append(f'outside: {r.url}') if is_outside(r.url) else None)
    yield pg
    context.close()
    assert not bad

def prose(pg) -> str:
    "The text of the page that is no code"
    return pg.evaluate("""() => { const a = document.querySelector('article').cloneNode(true)
        for (const o of a.querySelectorAll('pre, code, .katex, script, style')) o.remove()
        return a.textContent }""")

MARKUP = [r':::', r'#\|', r'\{ ?[#.:]\w', r'\]\(', r'\[\[', r'(?<!\w)\*\*', r'\$\$', r'\\\(', r'^\s*\|', r'\.ipynb',
          r'@(?:fig|eq)-', r'<[a-z]+[ >]', r'^!!!|^\?\?\?']

def visit(pg, url):
    "Open `url`, and wait until it is read whole and asks for nothing. Busy machines can do the second before the first"
    pg.goto(url, wait_until='load')
    pg.wait_for_load_state('networkidle')

def all_of(pg, selector, js):
    "What the JavaScript `js` says of each element `o`"
    return pg.evaluate(f"Array.from(document.querySelectorAll('{selector}')).map(o => {js})")

@pytest.mark.parametrize('tab', views.values(), indirect=True, ids=views)
@pytest.mark.parametrize('rel', pages)
def test_page(rel, tab, base, request):
    visit(tab, base+rel)
    assert tab.locator('article h1').count() == 1
    left = {m:found for m in MARKUP if (found := re.findall(f'.*(?:{m}).*', prose(tab), flags=re.M))}
    assert not left
    assert not tab.locator('.arithmatex:not(:has(.katex))').count(), 'a formula that was not set'
    assert not tab.locator('.katex-error').count(), 'a wrong formula'
    assert all(all_of(tab, 'img', 'o.alt')), 'a picture without a text'
    ids = all_of(tab, 'article [id]', 'o.id')
    assert sorted(set(ids)) == sorted(ids), 'an id twice'
    assert all(all_of(tab, 'img', 'o.complete && o.naturalWidth > 0')), 'a picture is missing'
    assert tab.evaluate('document.documentElement.scrollWidth') <= tab.viewport_size['width'], 'scrolls sideways'
    assert all(all_of(tab, 'article img', 'o.getBoundingClientRect().right <= innerWidth')), 'a picture is too wide'
    if shots := os.environ.get('SHOTS'):
        Path(shots).mkdir(exist_ok=True)
        name = f'{request.node.callspec.id}.png'.replace('/', '_').replace(' ', '-')
        tab.screenshot(path=Path(shots)/name, full_page=True)

@pytest.mark.parametrize('scheme,low,high', [('light',700,766), ('dark',0,150)])
def test_dark_is_dark(scheme, low, high, tab, base):
    tab.emulate_media(color_scheme=scheme)
    visit(tab, base)
    color = tab.evaluate('getComputedStyle(document.body).backgroundColor')
    assert low <= sum(float(v) for v in re.findall(r'[\d.]+', color)[:3]) < high

class Links(HTMLParser):
    "What a page of the site links to, what of that stands in its navigation, and the ids it has; read from its file"
    def __init__(self, rel):
        super().__init__()
        self.links,self.nav,self.ids,self.depth = [],[],set(),0
        self.feed((site/rel).read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'nav': self.depth += 1
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag != 'a' or 'href' not in attrs: return
        self.links.append(attrs['href'])
        if self.depth: self.nav.append(attrs['href'])

    def handle_endtag(self, tag):
        if tag == 'nav': self.depth -= 1

def target(rel, link) -> tuple:
    "The file below the site that `link` on the page `rel` leads to (None: elsewhere), and the place in it"
    url,anchor = urldefrag(urljoin(f'http://site/{rel}', link))
    if not url.startswith('http://site/'): return None,anchor
    return url.removeprefix('http://site/') or 'index.html',anchor

def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    of = {rel:Links(rel) for rel in pages}
    nav = {target('index.html', link)[0] for link in of['index.html'].nav}
    assert set(pages) <= nav, 'a page that no entry leads to'
    def is_dead(to, anchor): return to and (not (site/to).is_file() or anchor and to in of and anchor not in of[to].ids)
    assert [(rel, link) for rel,page in of.items() for link in page.links if is_dead(*target(rel, link))] == []

FOCUSED = """() => { let o = document.activeElement
    while (o.shadowRoot?.activeElement) o = o.shadowRoot.activeElement
    return o.tagName }"""

def open_search(pg):
    "On a busy machine the page may not listen yet, and letters outside of the search are shortcuts to other pages"
    for _ in range(20):
        pg.keyboard.press('Control+k')
        pg.wait_for_timeout(300)
        if pg.evaluate(FOCUSED) == 'INPUT': return
    raise AssertionError('the search does not open')

WORDS = dict(AccumulateGradBN='accumulate.html', precise_bn='precise.html', bn_to_gn='groupnorm.html',
             memory_plan='plan.html', Window='window.html', keep_running_stats='keep.html')

@pytest.mark.parametrize('words,page', WORDS.items())
@pytest.mark.parametrize('tab', widths.values(), indirect=True, ids=widths)
def test_search(words, page, tab, base):
    visit(tab, base)
    open_search(tab)
    tab.keyboard.type(words, delay=20)
    hit = tab.locator('a[role="option"]').first
    hit.wait_for(timeout=15_000)
    assert page in hit.get_attribute('href'), 'the first hit'
    hit.click()
    tab.wait_for_url(f'**/{page}*', timeout=5000)

def nav_pages(section:str) -> list:
    "Pages of a section of the navigation"
    nav = yaml.safe_load((ROOT/'mkdocs.yml').read_text(encoding='utf-8'))['nav']
    part = next(o[section] for o in nav if section in o)
    return [p.replace('.md', '.html') for o in part for p in o.values()]

# The demo is a command, and `all` has nothing of its own
API = [p for p in nav_pages('API') if p not in ('all.html','demo.html')]

@pytest.mark.parametrize('rel', API)
def test_the_first_screen_of_the_api_is_a_signature_and_an_example(rel, tab, base):
    "What the page is about is imported and called, then used, before one scrolls"
    visit(tab, base+rel)
    blocks = [o for o in tab.locator('article pre').all() if o.is_visible()]
    seen = [o.inner_text() for o in blocks if o.bounding_box()['y'] < tab.viewport_size['height']-60]
    examples = [o for o in seen[1:] if re.search(r'^(?!from |import )\S', o, flags=re.M)]
    assert seen[0].startswith('from fastai_bn.') and examples, 'below the first screen'
    assert tab.locator('article p.more a').first.get_attribute('href').startswith('#')

NEW = ['window.html','will_it_fit.html','virtual.html','any_loop.html','losses.html','keep.html','picture.html']

def test_users_find_pages_and_machinery_stands_apart():
    users,inside = nav_pages('Guide')+nav_pages('API'),nav_pages('How it works')
    assert set(NEW) <= set(users)
    for o in 'mover','storages','schedule','turns','fakes','counting','tracker': assert f'{o}.html' in inside

CORNERS = """() => Array.from(document.querySelectorAll('article img[src*="_files/"]')).map(o => {
    const c = document.createElement('canvas').getContext('2d')
    c.drawImage(o, 0, 0)
    return c.getImageData(0, 0, 1, 1).data[3] })"""

@pytest.mark.parametrize('rel', [p for p in pages if '_files/' in (site/p).read_text(encoding='utf-8')])
def test_pictures_let_the_page_shine_through(rel, tab, base):
    "So they fit a dark page as well as a light one"
    visit(tab, base+rel)
    corners = tab.evaluate(CORNERS)
    assert corners and set(corners) == {0}

@pytest.mark.parametrize('scheme,shown', [('light','front-light'), ('dark','front-dark')])
def test_the_front_picture_fits_the_theme(scheme, shown, tab, base):
    tab.emulate_media(color_scheme=scheme)
    visit(tab, base)
    visible = [o for o in tab.locator('article img').all() if o.is_visible()]
    assert [shown in o.get_attribute('src') for o in visible] == [True]

def test_a_benchmark_page_begins_with_its_picture(tab, base):
    for rel in nav_pages('Benchmarks'):
        visit(tab, base+rel)
        picture = min(o.bounding_box()['y'] for o in tab.locator('article img').all() if o.is_visible())
        tables = [o for o in tab.locator('article table, article details').all() if o.is_visible()]
        assert picture < 600 and picture < min(o.bounding_box()['y'] for o in tables), rel

def test_without_javascript_the_text_is_there(browser, base):
    context = browser.new_context(java_script_enabled=False)
    pg = context.new_page()
    pg.goto(base+'accumulate.html')
    assert pg.locator('#accumulategradbn').count() == 1 and 'n_step' in pg.locator('article').inner_text()
    context.close()

@pytest.mark.parametrize('f', ['llms.txt', *(f'{p}.md' for p in pages)])
def test_what_machines_read(f):
    text = (site/f).read_text(encoding='utf-8')
    assert text.startswith('# ') and not re.search(r'\{: |\.api \}|\.output \}|AUTOGENERATED', text)
    prose = re.sub(r'^( *)(```+).*?^\1\2$', '', text, flags=re.M|re.S)
    links = [o for o in re.findall(r'\]\(([^)#\s]+)', prose) if not re.match(r'\w+:', o)]
    assert [o for o in links if not (site/f).parent.joinpath(o).is_file()] == []
    assert f != 'llms.txt' or all(re.search(rf'[/(]{re.escape(p)}\.md\)', text) for p in pages)

@pytest.mark.parametrize('module,name', public_names())
def test_every_public_name_has_an_entry(module, name):
    text = (site/f'{module}.html').read_text(encoding='utf-8')
    if callable(public_object(module, name)): assert f'id="{name.lower()}"' in text and f'#{name.lower()}' in text

SOURCE = r'(fastai_bn/\w+\.py)(?:, line |#L)(\d+)(?:">source</a>)?</p>'

def test_source_links_lead_to_definitions():
    "Each entry of the API names the line of its class or function"
    found = [o for p in pages for o in re.findall(SOURCE, (site/p).read_text(encoding='utf-8'))]
    lines = {f:(site.parent/f).read_text(encoding='utf-8').splitlines() for f,_ in found}
    assert len(found) > 30 and all(re.match(r'\s*(class|def) ', lines[f][int(n)-1]) for f,n in found)

def test_a_phone_can_open_the_menu(browser, base):
    context = browser.new_context(viewport=dict(width=390, height=800), has_touch=True)
    pg = context.new_page()
    visit(pg, base)
    pg.locator('label[for="__drawer"]:visible').first.click()
    pg.get_by_text('Benchmarks', exact=True).locator('visible=true').first.wait_for(timeout=3000)
    context.close()
