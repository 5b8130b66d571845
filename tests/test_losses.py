"Losses that look at the whole batch: what the page `nbs/losses.ipynb` defines, in float64"
import ast
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastai_bn.all import AccumulateGradBN, ActivationPager, bn_layers, bn_to_gn
from helpers import F64, ROOT, assert_equal_states, quiet_budget, rounding

pytestmark = quiet_budget
BUDGET = '11MiB'
DEFINES = ast.Import,ast.ImportFrom,ast.FunctionDef,ast.ClassDef

class Page:
    "What the cells that are shown define, imports included. Nothing else of the page is run"
    def __init__(self, name):
        self.names = {}
        for c in json.loads((ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))['cells']:
            source = ''.join(c['source'])
            if c['cell_type'] != 'code' or source.startswith('#| hide'): continue
            nodes = [o for o in ast.parse(source).body if isinstance(o, DEFINES)]
            exec(compile(ast.Module(nodes, []), name, 'exec'), self.names)

    def __getattr__(self, name): return self.names[name]

@pytest.fixture(scope='module')
def page():
    page = Page('losses')
    torch.manual_seed(0)
    page.names['patterns'] = torch.randn(8,3,4,4)
    page.names['data'] = page.draw(32)
    return page

@pytest.fixture(scope='module')
def start(page):
    "A net that has made some steps, and a batch of 16"
    torch.manual_seed(1)
    model = page.net().double()
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(6):
        x1,x2,y = batch(page)
        page.nt_xent(*page.embed(model, x1, x2), y).backward()
        opt.step()
        opt.zero_grad()
    return model,batch(page)

def batch(page, n=16):
    x1,x2,y = page.draw(n)
    return x1.to(F64),x2.to(F64),y

LOSSES = 'nt_xent','vicreg','barlow_twins','sup_con','batch_hard'
every_loss = pytest.mark.parametrize('loss', LOSSES)

def gradients(page, start, loss, *ways, convert=lambda m: m, bs=8):
    "The gradients that ways leave, and the models"
    model,whole = convert(start[0]),start[1]
    micro = list(zip(*(o.split(bs) for o in whole)))
    return [page.gradient(way, model, page.names[loss], micro) for way in ways]

def cosine(a, b): return F.cosine_similarity(a, b, dim=0).item()
def error(a, b): return ((a-b).norm()/a.norm()).item()

@every_loss
def test_the_paged_large_batch_is_the_large_batch_bit_for_bit(page, start, loss):
    (g,a),(h,b) = gradients(page, start, loss, page.large, partial(page.large, budget=BUDGET))
    assert torch.equal(g, h)
    assert_equal_states(dict(a.named_buffers()), dict(b.named_buffers()))

@every_loss
def test_the_others_are_not(page, start, loss):
    (g,_),(accumulated,_),(cached,_) = gradients(page, start, loss, page.large, page.accumulated, page.grad_cache)
    for h in (accumulated, cached):
        assert cosine(g, h) < .99
        assert error(g, h) > .05

@every_loss
@pytest.mark.filterwarnings('ignore:The model was trained with BatchNorm')
def test_gradcache_is_exact_without_bn(page, start, loss):
    ways = page.large,page.accumulated,page.grad_cache
    (g,_),(accumulated,_),(cached,_) = gradients(page, start, loss, *ways, convert=bn_to_gn)
    assert error(g, cached) < rounding(gain=1e4)
    assert error(g, accumulated) > 1e-3

@every_loss
def test_lock_step_agrees_to_rounding(page, start, loss):
    (g,_),(h,_) = gradients(page, start, loss, page.large, page.lock_step, bs=2)
    assert error(g, h) < rounding(gain=1e4)

def test_gradcache_counts_each_batch_once(page, start):
    model,n = start[0],start[0][7].num_batches_tracked
    (_,cached),(_,large) = gradients(page, start, 'nt_xent', page.grad_cache, page.large)
    assert all(m.num_batches_tracked == n+2 for m in bn_layers(cached).values())
    assert all(m.num_batches_tracked == n+1 for m in bn_layers(large).values())
    assert all(m.num_batches_tracked == n for m in bn_layers(model).values())

@every_loss
def test_peaks(page, start, loss):
    "Micro-batches take about half, GradCache no more than that, and the large batch fits into as much"
    def peak(way, budget=None):
        pager = ActivationPager(budget)
        for _ in range(2):
            pager.peak = 0
            with pager: gradients(page, start, loss, way)
        return pager.peak
    large,accumulated,cached = map(peak, (page.whole, page.accumulated, page.grad_cache))
    assert accumulated < .6*large and cached < 1.05*accumulated
    assert peak(page.whole, accumulated) < 1.05*accumulated

@every_loss
def test_in_a_learner(page, loss):
    f = page.names[loss]
    large = page.fit(f, 16)
    assert page.same(large, page.fit(f, 8, AccumulateGradBN(2, bn_bs='window')))
    assert not page.same(large, page.fit(f, 8, AccumulateGradBN(2)))
