"The benchmarks' machinery on a handful of images, and what is stored of them"
import importlib
import itertools
import math
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from bench import front, pictures, results
from bench.__main__ import PAGES, main, parser
from bench.accumulate import TwoPhase, renorm
from fastai_bn.demo import small_resnet

TABLES = {(p,k):t for p in PAGES for k,t in importlib.import_module(f'bench.{p}').TABLES.items()}

def line(seed, value, table='t', data='drawn'):
    rows = [dict(way='a', x=value), dict(way='b', x=2*value)]
    env = dict(date='d', machine='m', torch='2')
    return dict(table=table, data=data, seed=seed, device='cpu', command='c', seconds=1, env=env, rows=rows)

def test_a_line_takes_the_place_of_its_own_only(tmp_path):
    lines = [line(1, 1.), line(0, 2.), line(1, 3.), line(1, 4., data='hep2'), line(None, 5., 'u')]
    for l in lines: results.store('p', l, tmp_path)
    got = [(l['table'],l['data'],l['seed'],l['rows'][0]['x']) for l in results.lines('p', tmp_path)]
    assert got == [('t','drawn',0,2.),('t','drawn',1,3.),('t','hep2',1,4.),('u','drawn',None,5.)]

def test_spread_is_mean_and_range_in_the_order_of_the_rows(tmp_path, monkeypatch):
    for s,x in enumerate((1.,2.,6.)): results.store('p', line(s, x), tmp_path)
    monkeypatch.setattr(results, 'RESULTS', tmp_path)
    df = results.load('p', 't')
    assert results.spread(df, 'way', 'x', '.1f')['x'].to_dict() == {'a':'3.0 (1.0 to 6.0)', 'b':'6.0 (2.0 to 12.0)'}
    assert results.spread(df, 'seed', 'x', '.0f', 'way').loc[1].to_dict() == {'a':'2', 'b':'4'}
    assert results.measured('p').seeds.tolist() == ['0, 1, 2']

@pytest.mark.parametrize('n', [2,5])
def test_rounds_are_side_by_side(n):
    calls = []
    ways = {k:(lambda k=k: calls.append(k)) for k in 'abc'}
    rows = results.rounds(ways, 'b', parser().parse_args(['--rounds',str(n)]))
    turns = [calls[i:i+3] for i in range(0, len(calls), 3)]  # the first warms up
    assert len(turns) == n+1 and all(sorted(t) == ['a','b','c'] for t in turns) and len(set(map(tuple, turns))) > 1
    assert [r['way'] for r in rows] == ['a','b','c'] and 'ratio' not in rows[1] and rows[0]['ratio'] > 0
    assert ('q25' in rows[0]) == (n >= 3)  # of fewer than three rounds there are no quartiles

@pytest.mark.parametrize('page,name', TABLES)
def test_results_are_stored(page, name):
    "For every table and data set: all seeds, versions, a command that names it, and numbers"
    t = TABLES[page,name]
    for data in t.data:
        ls = [l for l in results.lines(page, results.RESULTS) if (l['table'],l['data']) == (name,data)]
        assert {l['seed'] for l in ls} >= ({None} if t.seeds is None else set(range(t.seeds))), data
        for l in ls:
            values = [v for r in l['rows'] for v in r.values()]
            assert l['env']['torch'] and f'tools/bench {page} {name}' in l['command'] and l['rows']
            assert not any('/' in str(v) and Path(str(v)).is_absolute() for v in values)
            assert sum(isinstance(v, float) and math.isfinite(v) for v in values) >= len(l['rows'])

# Seconds of one operation each
SLOW = {
    ('unet_norms','cost'),
    ('speed','steps'),
    ('speed','memory'),
    ('speed','windows'),
    ('speed','lockstep_exact'),
    ('speed','population'),
    ('speed','lockstep_seconds')}

@pytest.mark.parametrize('page,name', [k for k in TABLES if k not in SLOW])
def test_tables_can_be_made(page, name):
    "The first rows, of few images"
    torch.manual_seed(0)
    n,t = '256' if name == 'samples' else '64',TABLES[page,name]
    a = parser().parse_args([page, name, '--images', n, '--epochs', '1', '--rounds', '1'])
    rows = list(itertools.islice(t.rows(t.data[0], 0, a), 2))
    assert len(rows) == 2 and all(isinstance(r, dict) for r in rows)

PICTURES = {
    'outcome': ('hep2','accuracy','t'),
    'cosines': ('t',),
    'lag': ('t',),
    'domains': ('t',),
    'samples': ('t',),
    'dice': ('nuclei','t'),
    'exposure': ('t',),
    'intensity': ('t',),
    'memory': ('unet','t'),
    'modelled': ('resnet50','t'),
    'lock_step': ('t',),
    'steps': ('t',),
    'by_hand': ('t',),
    'composition': ('t',),
    'population': ('t',),
    'exact': ('t',),
    'unet_cost': ('t',),
    'normalize_cost': ('t',),
    'conversion': ('t',)}

@pytest.mark.parametrize('name,args', PICTURES.items())
def test_pictures_are_drawn_from_stored_results(name, args):
    "Something is drawn, every number is finite, and what is drawn has a name"
    ax = getattr(pictures, name)(*args).axes[0]
    ys = [float(y) for line in ax.lines for y in line.get_ydata()] + [p.get_width() for p in ax.patches]
    assert len(ys) >= 2 and all(map(math.isfinite, ys)) and ax.get_title('left') + ax.get_title() == 't'
    names = ax.get_legend().get_texts() if ax.get_legend() else ax.get_yticklabels()
    assert len(names) >= 2 and all(re.search('[a-zA-Z]', o.get_text()) for o in names)

def test_pictures_show_what_the_pages_say():
    "The batch of 32 and 'window' at one height, plain accumulation below; more than one seed gives a band"
    ax = pictures.outcome('drawn', 'macro F1', 't').axes[0]
    of = {line.get_label():line.get_ydata() for line in ax.lines}
    large = of['batch of 32'][0]
    assert of["'window'"] == pytest.approx(large) and max(of['plain accumulation']) < large
    assert len(ax.collections) == 2

def test_the_front_picture_is_drawn_light_and_dark(tmp_path):
    "Of the same results comes the same file"
    front.draw(tmp_path)
    light,dark = (tmp_path/f'front-{k}.svg' for k in ('light','dark'))
    before = light.read_bytes()
    assert before != dark.read_bytes() and b'#d5d8e2' in dark.read_bytes() and b'#d5d8e2' not in before
    front.draw(tmp_path)
    assert light.read_bytes() == before

@pytest.mark.parametrize('name', ['light','dark'])
def test_the_front_picture_is_of_the_stored_results(name):
    assert front.digest() in (front.FILES/f'front-{name}.svg').read_text()

def test_errors_of_the_command(capsys):
    with pytest.raises(SystemExit): main(['accumulate','outcome','--epochs','1'])
    assert '--out' in capsys.readouterr().err
    with pytest.raises(SystemExit): main(['accumulate','--hep2','nowhere'])
    assert 'no such folder' in capsys.readouterr().err
    with pytest.raises(SystemExit): main(['accumulate','nothing'])
    assert 'it has fidelity, outcome' in capsys.readouterr().err

def test_two_phase_is_the_large_batch_in_one_piece():
    "With one micro-batch its forward is the batch's, its running statistics are, and its gradient is not"
    torch.manual_seed(0)
    model,x = small_resnet(3, 2, 4).double().train(),torch.randn(8,3,16,16, dtype=torch.float64)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): torch.nn.init.uniform_(m.weight, .5, 1.5)
    two = TwoPhase(deepcopy(model), 2)
    p,q = model(x),two(x)
    (p**2).mean().backward()
    (q**2).mean().backward()
    n = x.shape[0]*4  # values per channel in the last layers: as constants there are the unbiased variances
    assert (p-q).abs().max() < p.abs().max()/n**.5
    for a,b in zip(model.buffers(), two.model.buffers()):
        if a.is_floating_point(): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    g,h = (torch.cat([o.grad.flatten() for o in m.parameters()]) for m in (model,two.model))
    assert torch.cosine_similarity(g, h, 0) < .999

def test_renorm_is_bn_until_it_is_warm():
    pytest.importorskip('torchrl')
    bn = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).train()
    x = torch.randn(2,3,4,4)
    new = renorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).train(), 4)
    torch.testing.assert_close(new(x), bn(x), rtol=1e-4, atol=1e-5)
    for _ in range(9): new(x)
    assert new[0].num_batches_tracked <= 5
