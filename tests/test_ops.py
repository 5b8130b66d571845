"""PyTorch's own data bases of operators and modules in the pager: everything that it can move leaves before each call,
and the bits are the same.

`make test` tries a fixed part. All of it, which takes some minutes:

    FASTAI_BN_OPS=all python -m pytest -s tests/test_ops.py"""
import contextlib
import itertools
import os
from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fastai_bn import remaker, storages
from fastai_bn.paging import ActivationPager
from helpers import data_base, tensors

ALL = os.environ.get('FASTAI_BN_OPS') == 'all'
PARTS = 4  # tests, so that processes share the work
FIRST = None if ALL else 2  # samples of each operator and type
MOST_USED = torch.float32,torch.complex64
DTYPES = (*MOST_USED, torch.float64, torch.bfloat16, torch.int64, torch.bool) if ALL else MOST_USED
# What is in there is anybody's guess
NOT_FILLED = 'empty','empty_like','empty_permuted','empty_strided','new_empty','new_empty_strided'
# PyTorch takes another formula within any dispatch mode in these ways; the page on paging says so
OTHER_FORMULA = {
    **dict.fromkeys(('prod','cumprod','masked.prod'), ('backward','double_backward','forward_mode')),
    **dict.fromkeys(('linalg.det','linalg.vander','masked.cumprod'), ('double_backward',)),
    **dict.fromkeys(('matmul','__rmatmul__','native_group_norm'), ('forward_mode',)),
    **dict.fromkeys(('nn.CrossEntropyLoss','nn.LinearCrossEntropyLoss'), ('forward',))}
pytestmark = pytest.mark.filterwarnings('ignore')


class Idle(TorchDispatchMode):
    "A mode that does nothing"
    supports_higher_order_operators = True
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return func(*args, **(kwargs or {}))

@pytest.fixture(autouse=True)
def _everything_can_move(monkeypatch):
    "Samples are small"
    monkeypatch.setattr(storages, 'MIN_BYTES', 1)

def copied(o):
    if type(o) is not torch.Tensor or o.layout is not torch.strided: return o
    return o.detach().clone().requires_grad_(o.requires_grad)

def all_away(*trees):
    "Use all tensors of `trees`, and let them leave for something else"
    for t in tensors(*trees):
        if t.layout is torch.strided: torch.ops.aten.alias(t.detach())
    torch.zeros(2).add_(1)

def differentiable(*trees): return [t for t in tensors(*trees) if t.requires_grad]

def grad(outs, leaves, **kw):
    "Gradients of the sum of all values; none without outputs or leaves"
    if not outs or not leaves: return ()
    return torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], allow_unused=True, **kw)

def forward(f, inputs): return tensors(f(*inputs)),

def backward(f, inputs):
    outs = differentiable(f(*inputs))
    return outs,grad(outs, differentiable(inputs))

def double_backward(f, inputs):
    outs,leaves = differentiable(f(*inputs)),differentiable(inputs)
    grads = differentiable(grad(outs, leaves, create_graph=True))
    return grads,grad(grads, leaves)

def forward_mode(f, inputs):
    "Only the first of the inputs that have a gradient has a tangent, so that others are PyTorch's zero tensors"
    first = next(iter(differentiable(inputs)), None)
    if first is None: return ((),)
    def dual(t):
        if t is first: return fwAD.make_dual(t.detach(), torch.ones_like(t))
        return t.detach() if isinstance(t, torch.Tensor) else t
    with fwAD.dual_level():
        outs = tensors(f(*tree_map(dual, inputs)))
        return [tuple(o for o in fwAD.unpack_dual(t) if o is not None) for t in outs],

def result(way, f, inputs, mode=None):
    "What `f` makes of copies of `inputs`"
    inputs = tree_map(copied, inputs)
    torch.default_generator.manual_seed(0)
    with mode or contextlib.nullcontext():
        if isinstance(mode, ActivationPager): all_away(inputs)
        return [t.detach() for t in tensors(way(f, inputs))]

def numbers(t):
    "The values of `t`, NaN as one of them"
    t = t.to_dense() if t.layout is not torch.strided else t
    t = t.resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t

def same(a, b):
    def equal(p, q):
        p,q = numbers(p),numbers(q)
        return p.shape == q.shape and p.dtype == q.dtype and bool(((p == q) | (p != p) & (q != q)).all())
    return len(a) == len(b) and all(map(equal, a, b))

class Tally:
    "Counts, and what went wrong"
    def __init__(self): self.n,self.wrong = Counter(),[]

    def check(self, op, way, f, inputs, what=''):
        name,pager = f'{op} {what} {way.__name__}',ActivationPager(1)
        try: want = result(way, f, inputs)
        except Exception:
            self.n['fails in PyTorch itself'] += 1
            return
        self.n['tried'] += 1
        try: got = result(way, f, inputs, pager)
        except Exception as e:
            self.wrong.append(f'{name}: {type(e).__name__} {str(e)[:200]}')
            return
        self.n['bytes moved'] += pager.moved
        if same(got, want): self.n['same bits'] += 1
        elif not same(want, result(way, f, inputs)): self.n['other bits each time'] += 1
        elif same(got, result(way, f, inputs, Idle())):  # PyTorch takes another formula within any mode
            self.n['same bits as within an idle mode'] += 1
            if way.__name__ not in OTHER_FORMULA.get(op, ()): self.wrong.append(f'{name}: another formula')
        else: self.wrong.append(name)

    def done(self):
        if ALL: print(dict(self.n), *sorted(set(self.wrong)), sep='\n')
        assert self.n['tried'] > 150 and self.n['bytes moved'] > 10_000
        assert self.n['fails in PyTorch itself']+self.n['other bits each time'] < .02*self.n['tried'], self.n
        assert not self.wrong, (self.n, len(self.wrong), self.wrong[:20])

def has_grad(op, dtype): return op.supports_autograd and dtype in op.supported_backward_dtypes('cpu')

def ways_of(op, dtype):
    "How to run an operator"
    if not has_grad(op, dtype): return [forward]
    ways = [backward]
    if ALL or dtype is torch.float32:
        ways += [double_backward]*op.supports_gradgrad + [forward_mode]*op.supports_forward_ad
    return ways

def check_operator(tally, op, dtype):
    "Run the first samples of an operator in all ways"
    torch.manual_seed(0)
    samples = list(itertools.islice(op.sample_inputs_func(op, 'cpu', dtype, has_grad(op, dtype)), FIRST))
    what = f'{op.variant_test_name} {dtype}'
    for s in samples:
        def f(x, args, kwargs): return s.output_process_fn_grad(op(x, *args, **kwargs))
        for way in ways_of(op, dtype): tally.check(op.name, way, f, (s.input,s.args,s.kwargs), what)

@pytest.mark.parametrize('part', range(PARTS))
def test_operators(part):
    tally = Tally()
    for op in data_base('common_methods_invocations', 'op_db')[part::PARTS]:
        if op.name in NOT_FILLED: continue
        for dtype in DTYPES:
            if op.supports_dtype(dtype, 'cpu'): check_operator(tally, op, dtype)
    tally.done()

@pytest.fixture
def _all_is_made_again(monkeypatch):
    "What leaves is made again wherever that can be, whatever it costs"
    def fits(self, rec, used): return self.find(rec.value, self._next_use(rec)) is not None
    monkeypatch.setattr(remaker.Chooser, 'fits', fits)
    monkeypatch.setattr(remaker.Chooser, 'is_chosen', lambda self, rec: self.choice is not None)

@pytest.mark.usefixtures('_all_is_made_again')
@pytest.mark.parametrize('part', range(PARTS))
def test_operators_made_again(part):
    "All that an operator makes is dropped, and made by the operator again; the first of two blocks checks it"
    made,wrong,differed = 0,[],set()
    for op in data_base('common_methods_invocations', 'op_db')[part::PARTS]:
        if op.name in NOT_FILLED or not has_grad(op, torch.float32): continue
        torch.manual_seed(0)
        for s in itertools.islice(op.sample_inputs_func(op, 'cpu', torch.float32, True), 1):
            def f(x, args, kwargs): return s.output_process_fn_grad(op(x, *args, **kwargs))
            pager,inputs = ActivationPager(1),(s.input,s.args,s.kwargs)
            try: want = result(used_later, f, inputs, Idle())
            except Exception: continue
            for _ in range(2): got = result(used_later, f, inputs, pager)
            made += pager.remade
            if pager.differed: differed.add(op.name)
            if not (same(got, want) or not same(want, result(used_later, f, inputs, Idle()))): wrong.append(op.name)
    assert made > 1000 and not wrong and not differed, (made, wrong, differed)

def used_later(f, inputs):
    "Results and gradients, which all wait for something else before they are used"
    outs,grads = backward(f, inputs)
    torch.zeros(2).add_(1)
    return [t.detach()+0 if t.layout is torch.strided else t for t in tensors((outs, grads))]

def as_function(info, sample, training):
    "What a module gives, the gradients of its parameters, and its buffers, for a sample's arguments"
    def f(args, kwargs):
        made = sample.constructor_input
        m = info.module_cls(*made.args, **made.kwargs).train(training)
        out,ps = m(*args, **kwargs),list(m.parameters())
        sums = [o.sum() for o in differentiable(out)]
        grads = torch.autograd.grad(sums, ps, allow_unused=True) if ps else ()
        return out,grads,list(m.buffers())
    return f

@pytest.mark.parametrize('training', [True, False])
def test_modules(training):
    tally = Tally()
    for info in data_base('common_modules', 'module_db'):
        torch.manual_seed(0)
        kw = dict(device='cpu', dtype=torch.float32, requires_grad=True, training=training)
        for sample in info.module_inputs_func(info, **kw)[:FIRST]:
            inputs = sample.forward_input.args,sample.forward_input.kwargs
            tally.check(info.name, forward, as_function(info, sample, training), inputs)
    tally.done()
