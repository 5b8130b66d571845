"""PyTorch's own data bases of operators and modules in the pager: everything that it can move leaves before each call, and the bits are the same.

`make test` tries a fixed part. All of it, which takes some minutes:

    FASTAI_BN_OPS=all python -m pytest -s tests/test_ops.py"""
import contextlib, importlib, itertools, os
from collections import Counter

import hypothesis, pytest, torch
import torch.autograd.forward_ad as fwAD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from fastai_bn import storages
from fastai_bn.paging import ActivationPager

ALL = os.environ.get('FASTAI_BN_OPS') == 'all'
PARTS = 4  # tests, so that processes share the work
FIRST = None if ALL else 2  # samples of each operator and type
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.int64, torch.bool) if ALL else (torch.float32, torch.complex64)
NOT_FILLED = 'empty','empty_like','empty_permuted','empty_strided','new_empty','new_empty_strided'  # what is in there is anybody's guess
# PyTorch takes another formula within any dispatch mode in these ways; the page on paging says so
OTHER_FORMULA = dict.fromkeys(('prod','cumprod','masked.prod'), ('backward','double_backward','forward_mode')) | dict.fromkeys(('linalg.det','linalg.vander','masked.cumprod'), ('double_backward',)) | \
    dict.fromkeys(('matmul','__rmatmul__','native_group_norm'), ('forward_mode',)) | dict.fromkeys(('nn.CrossEntropyLoss','nn.LinearCrossEntropyLoss'), ('forward',))
pytestmark = pytest.mark.filterwarnings('ignore')


class Idle(TorchDispatchMode):
    "A mode that does nothing"
    supports_higher_order_operators = True
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return func(*args, **(kwargs or {}))

@pytest.fixture(autouse=True)
def _everything_can_move(monkeypatch):
    "Samples are small"
    monkeypatch.setattr(storages, 'MIN_BYTES', 1)

def data_base(module, name):
    "On import PyTorch's test machinery forbids the process to set flags, and loads settings of Hypothesis. Not in this process"
    with pytest.MonkeyPatch.context() as p:
        p.setattr(torch.backends, 'disable_global_flags', lambda: None)
        profile = hypothesis.settings.get_current_profile_name()
        try: return getattr(importlib.import_module(f'torch.testing._internal.{module}'), name)
        finally: hypothesis.settings.load_profile(profile)

def tensors(*trees): return [t for t in tree_iter(trees) if isinstance(t, torch.Tensor)]

def copied(o): return o.detach().clone().requires_grad_(o.requires_grad) if type(o) is torch.Tensor and o.layout is torch.strided else o

def all_away(*trees):
    "Use all tensors of `trees`, and let them leave for something else"
    for t in tensors(*trees):
        if t.layout is torch.strided: torch.ops.aten.alias(t.detach())
    torch.zeros(2).add_(1)

def forward(f, inputs):
    return tensors(f(*inputs)),

def backward(f, inputs):
    outs,leaves = tensors(f(*inputs)),[t for t in tensors(inputs) if t.requires_grad]
    outs = [o for o in outs if o.requires_grad]
    return outs,torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], allow_unused=True) if outs and leaves else ()

def double_backward(f, inputs):
    outs,leaves = [o for o in tensors(f(*inputs)) if o.requires_grad],[t for t in tensors(inputs) if t.requires_grad]
    if not outs or not leaves: return ((),)
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], create_graph=True, allow_unused=True)
    grads = [g for g in tensors(grads) if g.requires_grad]
    return grads,torch.autograd.grad(grads, leaves, [torch.ones_like(g) for g in grads], allow_unused=True) if grads else ()

def forward_mode(f, inputs):
    "Only the first of the inputs that have a gradient has a tangent, so that others are PyTorch's zero tensors"
    first = next((t for t in tensors(inputs) if t.requires_grad), None)
    if first is None: return ((),)
    with fwAD.dual_level():
        dual = tree_map(lambda t: fwAD.make_dual(t.detach(), torch.ones_like(t)) if t is first else t.detach() if isinstance(t, torch.Tensor) else t, inputs)
        return [tuple(o for o in fwAD.unpack_dual(t) if o is not None) for t in tensors(f(*dual))],

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
        name = f'{op} {what}'
        try: want = result(way, f, inputs)
        except Exception: self.n['fails in PyTorch itself'] += 1; return
        self.n['tried'] += 1
        pager = ActivationPager(1)
        try: got = result(way, f, inputs, pager)
        except Exception as e: self.wrong.append(f'{name} {way.__name__}: {type(e).__name__} {str(e)[:200]}'); return
        self.n['bytes moved'] += pager.moved
        if same(got, want): self.n['same bits'] += 1
        elif not same(want, result(way, f, inputs)): self.n['other bits each time'] += 1
        elif same(got, result(way, f, inputs, Idle())):  # PyTorch takes another formula within any mode
            self.n['same bits as within an idle mode'] += 1
            if way.__name__ not in OTHER_FORMULA.get(op, ()): self.wrong.append(f'{name} {way.__name__}: another formula')
        else: self.wrong.append(f'{name} {way.__name__}')
    def done(self):
        if ALL: print(dict(self.n), *sorted(set(self.wrong)), sep='\n')
        assert self.n['tried'] > 150 and self.n['bytes moved'] > 10_000
        assert self.n['fails in PyTorch itself']+self.n['other bits each time'] < .02*self.n['tried'], self.n
        assert not self.wrong, (self.n, len(self.wrong), self.wrong[:20])

@pytest.mark.parametrize('part', range(PARTS))
def test_operators(part):
    tally = Tally()
    for op in data_base('common_methods_invocations', 'op_db')[part::PARTS]:
        for dtype in DTYPES:
            if not op.supports_dtype(dtype, 'cpu') or op.name in NOT_FILLED: continue
            grad = op.supports_autograd and dtype in op.supported_backward_dtypes('cpu')
            torch.manual_seed(0)
            samples = list(itertools.islice(op.sample_inputs_func(op, 'cpu', dtype, grad), FIRST))
            ways = [backward] if grad else [forward]
            if grad and (ALL or dtype is torch.float32): ways += [double_backward]*op.supports_gradgrad + [forward_mode]*op.supports_forward_ad
            for s in samples:
                f = lambda x,args,kwargs,s=s: s.output_process_fn_grad(op(x, *args, **kwargs))
                for way in ways: tally.check(op.name, way, f, (s.input,s.args,s.kwargs), f'{op.variant_test_name} {dtype}')
    tally.done()

@pytest.mark.parametrize('training', [True, False])
def test_modules(training):
    tally = Tally()
    for info in data_base('common_modules', 'module_db'):
        torch.manual_seed(0)
        for i in info.module_inputs_func(info, device='cpu', dtype=torch.float32, requires_grad=True, training=training)[:None if ALL else 2]:
            def f(args, kwargs):
                m = info.module_cls(*i.constructor_input.args, **i.constructor_input.kwargs).train(training)
                out = m(*args, **kwargs)
                grads = torch.autograd.grad([o.sum() for o in tensors(out) if o.requires_grad], ps, allow_unused=True) if (ps := list(m.parameters())) else ()
                return out,grads,list(m.buffers())
            inputs = i.forward_input.args,i.forward_input.kwargs
            tally.check(info.name, forward, f, inputs)
    tally.done()
