"`MicroBatched` and `micro_bs`: one large batch in micro-batches that meet at BN layers, equal to rounding"
import copy, gc, itertools, os, pickle, traceback, weakref
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest, timm, torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50
from fastcore.foundation import L
from fastai.callback.hook import Hook, hook_outputs
from fastai.vision.all import (SGD, CrossEntropyLossFlat, MixUp, TensorImage, load_learner,
                               set_seed)

from fastai_bn.accumulate import AccumulateGradBN
from fastai_bn.lockstep import MicroBatched
from fastai_bn.moments import bn_layers, capture_moments
from fastai_bn.paging import ActivationPager
from fastai_bn.pooled import _affine, _mean_var, _sums
from fastai_bn.precise import PreciseBN, precise_bn
from fastai_bn.threads import settings
from fastai_bn.turns import LockStep
from helpers import (AS_GOOD, Boom, CPUScaler, F64, RaiseAt, assert_pristine, assert_same, conv_net, do_fit, get_dls,
                     get_learner, labels, learner, one_cycle, rounding, small_unet, snapshot, tilted)

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')

def error(a, b):
    "Relative"
    return ((a-b).double().norm()/b.double().norm().clamp(min=1e-300)).item()

def flat(x):
    if isinstance(x, torch.Tensor): return x.flatten()
    return torch.cat([t.flatten() for t in (x.values() if isinstance(x, dict) else x)])

def weigh(p):
    "A loss with a gradient of its own for each number, which sees all of the batch"
    p = flat(p)
    return (p*torch.linspace(-1, 1, len(p), dtype=p.dtype)).sum() + p.square().mean().sqrt()

def run(f, params, x, loss=weigh, seed=1):
    "Prediction, gradient of the input, of the parameters"
    for p in params: p.grad = None
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    pred = f(x)
    loss(pred).backward()
    grads = [p.grad.flatten() for p in params if p.grad is not None]
    return flat(pred).detach(),x.grad,torch.cat(grads or [x.new_zeros(1)])

def grads(m): return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

def buffers(m): return torch.cat([b.double().flatten() for b in m.buffers()] or [torch.zeros(1)])

def compare(make, x, micro_bs, loss=weigh, tol=rounding(gain=100.), prepare=lambda m: m.train()):
    a,b = make(),make()
    prepare(a)
    prepare(b)
    ref,out = run(a, list(a.parameters()), x, loss),run(MicroBatched(b, micro_bs), list(b.parameters()), x, loss)
    for name,p,q in zip(('prediction','input','parameters'), out, ref): assert error(p, q) <= tol, (name, error(p, q))
    assert error(buffers(b), buffers(a)) <= tol
    assert_untouched(b)
    return a,b

def assert_untouched(m):
    assert not any('forward' in o.__dict__ for o in m.modules())

def seeded(f):
    def make():
        torch.manual_seed(0)
        return f().double()
    return make

unet = seeded(lambda: small_unet((32,32)))
def net(conv, bn):
    return lambda: nn.Sequential(conv(3,8,3,padding=1), bn(8), nn.ReLU(),
                                 conv(8,8,3,padding=1), bn(8, momentum=None), nn.ReLU(inplace=True))
def efficientnet(**kw): return seeded(lambda: timm.create_model('efficientnet_b0', **kw))
NETS = dict(
    resnet18=(seeded(lambda: resnet18(num_classes=10)), (3,32,32)),
    resnet50=(seeded(lambda: resnet50(num_classes=10)), (3,32,32)),
    unet=(unet, (3,32,32)),
    efficientnet=(efficientnet(num_classes=10), (3,32,32)),
    conv1d=(seeded(net(nn.Conv1d, nn.BatchNorm1d)), (3,20)),
    conv3d=(seeded(net(nn.Conv3d, nn.BatchNorm3d)), (3,6,5,4)))

@pytest.mark.slow
@pytest.mark.parametrize('micro_bs', [1, 3, 8])
@pytest.mark.parametrize('name', NETS)
def test_the_large_batch_to_rounding(name, micro_bs):
    make,size = NETS[name]
    x = tilted(16, size=size[1:], seed=2)
    a,b = compare(make, x, micro_bs)
    assert error(a(x[:8]), a(x)[:8]) > 1e-3  # a micro-batch by itself is something else

def smooth():
    "A ResNet without gates that float32's last bit could open or shut (ReLU, max pooling): they would decide the error"
    m = resnet18(num_classes=10)
    m.maxpool = nn.AvgPool2d(2)
    for o in m.modules():
        if hasattr(o, 'relu'): o.relu = nn.SiLU()
    return m

@pytest.mark.slow
def test_float32_is_as_good_as_the_large_batch():
    make = seeded(smooth)
    for seed in range(2):
        x = tilted(16, size=(48,48), seed=seed)
        exact = run(m := make().train(), list(m.parameters()), x)
        large = run(m := make().float().train(), list(m.parameters()), x.float())
        for micro_bs in (1,3,8):
            m = make().float().train()
            mine = run(MicroBatched(m, micro_bs), list(m.parameters()), x.float())
            for a,b,c in zip(mine, large, exact):
                assert error(a, c) <= AS_GOOD*error(b, c), (micro_bs, error(a, c), error(b, c))

@pytest.mark.parametrize('offset', [0., 100., 3000.])
def test_float32_far_from_zero(offset):
    x = torch.randn(16,3,8,8, dtype=F64)+offset
    def bn():
        torch.manual_seed(0)
        m = nn.BatchNorm2d(3).double()
        nn.init.normal_(m.weight)
        return m.train()
    exact,large = run(m := bn(), list(m.parameters()), x),run(m := bn().float(), list(m.parameters()), x.float())
    m = bn().float()
    mine = run(MicroBatched(m, 3), list(m.parameters()), x.float())
    for a,b,c in zip(mine, large, exact): assert error(a, c) <= AS_GOOD*error(b, c)+rounding(16*8*8, 1, torch.float32)

@pytest.mark.slow
@pytest.mark.parametrize('share', [.5, .1, 0])
def test_any_budget_is_no_budget(share):
    m,x = small_unet((64,64)).train(),tilted(8, size=(64,64)).float()
    lock,state = MicroBatched(m, 2),snapshot(m)
    def go(budget):
        m.load_state_dict(state)
        m.zero_grad(set_to_none=True)
        for _ in range(2):
            with (pager := ActivationPager(budget)): weigh(lock(x)).backward()
        return [p.grad.clone() for p in m.parameters()]+[b.clone() for b in m.buffers()],pager
    free,counted = go(None)
    paged,pager = go(max(1, int(share*counted.peak)))
    assert pager.moved and pager.peak < counted.peak
    assert all(torch.equal(a, b) for a,b in zip(free, paged))

# BN layers

class Twice(nn.Module):
    "A layer used twice, a residual and parallel branches"
    def __init__(self):
        super().__init__()
        self.bn,self.c = nn.BatchNorm2d(3),nn.BatchNorm2d(3, momentum=None)
        self.a,self.b = nn.Conv2d(3,3,3,padding=1),nn.Conv2d(3,3,1)
    def forward(self, x):
        y = self.bn(self.a(x)).relu()
        return self.bn(y+x)*self.c(self.b(x)) + self.c(y)

class Scaled(nn.BatchNorm2d):
    "A subclass that does something before and after"
    def forward(self, x): return super().forward(x*2).tanh()

def layer(f): return seeded(lambda: nn.Sequential(nn.Conv2d(3,4,3), f(4), nn.ReLU(), nn.Conv2d(4,3,1)))
def without_bias(n):
    m = nn.BatchNorm2d(n)
    m.bias = None
    return m
def bn(**kw): return partial(nn.BatchNorm2d, **kw)
LAYERS = dict(plain=nn.BatchNorm2d, no_affine=bn(affine=False), no_stats=bn(track_running_stats=False),
              no_bias=without_bias, cumulative=bn(momentum=None), momentum0=bn(momentum=0.), timm=BatchNormAct2d,
              timm_silu=partial(BatchNormAct2d, act_layer=nn.SiLU), subclass=Scaled,
              neither=bn(affine=False, track_running_stats=False))

@pytest.mark.parametrize('micro_bs', [1, 3])
@pytest.mark.parametrize('kind', LAYERS)
def test_kinds_of_layers(kind, micro_bs): compare(layer(LAYERS[kind]), tilted(8), micro_bs)

@pytest.mark.parametrize('micro_bs', [1, 3])
def test_used_twice_and_branches(micro_bs):
    a,b = compare(seeded(Twice), tilted(8), micro_bs)
    assert b.bn.num_batches_tracked == b.c.num_batches_tracked == 2

@pytest.mark.parametrize('size', [(), (7,)])
def test_1d(size): compare(seeded(lambda: nn.BatchNorm1d(3)), tilted(8, size=size), 3)

def test_frozen_and_eval_layers():
    def prepare(m):
        m.train()
        m[0].bn.requires_grad_(False)
        m[1].c.eval()
        m[1].c.running_var.fill_(2.)
    make = seeded(lambda: nn.Sequential(Twice(), Twice()))
    compare(make, tilted(8), 3, prepare=prepare)

def test_frozen_body():
    def prepare(m):
        m.train()
        for p in m[0].parameters(): p.requires_grad_(False)
    compare(seeded(lambda: nn.Sequential(Twice(), nn.Conv2d(3,3,1), nn.BatchNorm2d(3))), tilted(8), 3, prepare=prepare)

def test_bn_on_data():
    "The input needs no gradient"
    a,b,x = conv_net(),conv_net(),tilted(8)
    a = nn.Sequential(nn.BatchNorm2d(3).double(), a)
    b = nn.Sequential(nn.BatchNorm2d(3).double(), b)
    weigh(a(x)).backward()
    weigh(MicroBatched(b, 3)(x)).backward()
    assert error(grads(b), grads(a)) < 1e-12
    assert_same(b, a)

def test_no_bn():
    compare(seeded(lambda: nn.Sequential(nn.Conv2d(3,4,3), nn.GroupNorm(2,4), nn.Conv2d(4,3,1))), tilted(8), 3)

def test_eval_mode_runs_without_lock_step(monkeypatch):
    m,x = conv_net().eval(),tilted(8)
    want = m(x)
    monkeypatch.setattr(LockStep, 'run', lambda *_: pytest.fail('lock step'))
    assert error(MicroBatched(m, 3)(x), want) < 1e-14
    with torch.no_grad(): assert not MicroBatched(m, 3)(x).requires_grad

def test_layers_without_statistics_need_the_batch_in_eval_mode_too():
    m,x = layer(LAYERS['no_stats'])().eval(),tilted(8)
    assert error(MicroBatched(m, 3)(x), m(x)) < 1e-13
    assert error(torch.cat([m(o) for o in x.split(3)]), m(x)) > 1e-3

@pytest.mark.parametrize('n', [1, 2, 3])
def test_a_batch_of_one_piece_is_native(n):
    a,b,x = conv_net().train(),conv_net().train(),tilted(n)
    assert torch.equal(MicroBatched(b, 3)(x), a(x))
    assert_same(b, a, 0)

def test_one_value_per_channel():
    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)).double().train()
    compare(lambda: copy.deepcopy(m), tilted(2), 1, tol=1e-10)  # one in each micro-batch is enough
    class First(nn.Module):  # of samples that count
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3).double()
        def forward(self, x): return self.bn(x[x[:,0]>5])
    x = torch.tensor([[9.,0,0],[1,1,1],[1,1,1]], dtype=F64)
    with pytest.raises(ValueError, match="layer 'bn'"): MicroBatched(First(), 2)(x)

def test_a_micro_batch_may_have_nothing_for_a_layer():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bn = nn.BatchNorm1d(3).double()
            nn.init.normal_(self.bn.weight)
        def forward(self, x): return torch.zeros_like(x).index_put((x[:,0]>0,), self.bn(x[x[:,0]>0]))
    x = tilted(6, size=())
    x[:,0] = torch.tensor([-1,-1,1,2,1,-1])
    compare(Some, x, 2)

def test_an_output_that_is_not_used():
    class Drop(nn.Module):
        "The second micro-batch does not use what it got"
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bn,self.lin = nn.BatchNorm1d(3).double(),nn.Linear(3,3).double()
        def forward(self, x):
            h = self.lin(x)
            y = self.bn(h)
            return torch.where(x[:,:1]>0, y, h) if len(x)>2 else (y if x[0,0]>0 else h)
    x = tilted(4, size=())
    x[:,0] = torch.tensor([1.,2.,-1.,-1.])
    compare(Drop, x, 2)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    make = seeded(lambda: nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(),
                                        nn.Conv2d(4,3,1), nn.BatchNorm2d(3, affine=False)))
    x = tilted(8).float()
    ref = make().float().train()
    exact = run(ref, list(ref.parameters()), x)
    for kind in ('all','mixed'):
        a,b = make().to(dtype),make().to(dtype)
        if kind == 'mixed':
            for m in (a[1],a[4],b[1],b[4]): m.float()
        large = run(a.train(), list(a.parameters()), x.to(dtype))
        mine = run(MicroBatched(b.train(), 3), list(b.parameters()), x.to(dtype))
        for p,q,e in zip(mine, large, exact):
            assert p.dtype == q.dtype and error(p, e) <= AS_GOOD*error(q, e)+1e-3, kind
        assert error(buffers(b), buffers(a)) < 1e-2

@pytest.mark.slow
@pytest.mark.parametrize('inside', [False, True])
def test_autocast(inside):
    class Cast(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16): return self.m(x)
    make = seeded(lambda: resnet18(num_classes=3))
    x,res = tilted(8, size=(32,32)).float(),[]
    ref = make().float().train()
    exact = run(ref, list(ref.parameters()), x)
    for cut in (False,True):
        m = make().float().train()
        f = Cast(m) if inside else m
        if cut: f = MicroBatched(f, 3)
        with torch.autocast('cpu', torch.bfloat16, enabled=not inside):
            res.append(run(f, list(m.parameters()), x, lambda p: weigh(p.float())))
    assert not torch.is_autocast_enabled('cpu') and res[1][0].dtype == torch.bfloat16
    for a,b,c in zip(res[1], res[0], exact): assert error(a, c) <= AS_GOOD*error(b, c)+1e-3

def test_channels_last():
    x = tilted(8, size=(8,8)).contiguous(memory_format=torch.channels_last)
    make = seeded(net(nn.Conv2d, nn.BatchNorm2d))
    compare(lambda: make().to(memory_format=torch.channels_last), x, 3)
    pred = MicroBatched(make().to(memory_format=torch.channels_last).train(), 3)(x)
    assert pred.is_contiguous(memory_format=torch.channels_last)

def test_dropout():
    make = seeded(lambda: nn.Sequential(nn.Conv2d(3,4,3), nn.Dropout(.5), nn.BatchNorm2d(4), nn.Dropout(.5)))
    preds,x = [],tilted(8)
    for _ in range(2):
        m = MicroBatched(make().train(), 3)
        torch.manual_seed(0)
        preds.append(m(x))
    assert torch.equal(*preds) and (preds[0] == 0).double().mean() > .3

def test_backward_twice_and_never():
    m,x = conv_net().train(),tilted(8)
    loss = weigh(MicroBatched(m, 3)(x))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in m.parameters()]
    loss.backward()
    for a,p in zip(once, m.parameters()): assert error(p.grad, 2*a) < 1e-14

def test_a_second_derivative_is_an_error_that_says_what_to_do():
    "Also where the gradient that comes into BN is a constant: autograd itself would silently leave out a term there"
    refused = partial(pytest.raises, RuntimeError, match='micro_bs.*budget')
    for m in (conv_net().train(), nn.BatchNorm2d(3).double().train()):
        x = tilted(8).requires_grad_()
        for micro_bs in (1,3):
            grads = torch.autograd.grad(MicroBatched(m, micro_bs)(x).sum(), [x, *m.parameters()], create_graph=True)
            plain = torch.autograd.grad(m(x).sum(), [x, *m.parameters()], create_graph=True)
            for g,want in zip(grads, plain): assert (g-want).abs().max() < 1e-12  # the first is as ever
            with refused(): grads[0].square().sum().backward(retain_graph=True)
            for p in (x, *m.parameters()):  # also where only one derivative is asked for, if there is one
                second = lambda g: torch.autograd.grad(g.square().sum(), p, retain_graph=True, allow_unused=True)[0]
                if second(plain[0]) is None:
                    assert second(grads[0]) is None
                    continue
                with refused(): second(grads[0])
        with refused(): torch.autograd.functional.hvp(lambda x: MicroBatched(m, 3)(x).square().sum(), x, x)
        assert_untouched(m)

def test_many_first_derivatives_at_once():
    m,x,weights = nn.BatchNorm2d(3).double().train(),tilted(4, size=(2,2)),torch.rand(4,3,2,2, dtype=F64)
    for kw in ({}, dict(vectorize=True)):
        want,got = [torch.autograd.functional.jacobian(lambda x: (f(x)**3*weights).mean((0,2,3)), x, **kw)
                    for f in (m, MicroBatched(m, 3))]
        assert error(got, want) < 1e-12

def test_forward_mode_and_transforms_are_errors_that_say_what_to_do():
    m,x = conv_net().train(),tilted(8)
    f = MicroBatched(m, 3)
    refused = partial(pytest.raises, RuntimeError, match='micro_bs.*budget')
    with fwAD.dual_level(), refused(): f(fwAD.make_dual(x, torch.ones_like(x)))
    with refused(): torch.func.grad(lambda x: f(x).sum())(x)
    with refused(): torch.func.vmap(f)(x[None])
    with refused(): torch.func.jvp(f, (x,), (x,))
    assert_untouched(m)

def layouts(shape):
    "Ways to lay a tensor of this shape into memory: all orders of dimensions, and parts of larger ones"
    for order in list(itertools.permutations(range(len(shape))))[::7 if len(shape) == 5 else 1]:
        back = [order.index(i) for i in range(len(shape))]
        yield lambda t,order=order,back=back: t.permute(order).contiguous().permute(back)
    yield lambda t: torch.stack([t, t], -1)[...,0]
    yield lambda t: torch.cat([t, t], 1)[:,:t.shape[1]]
    yield lambda t: torch.cat([t.flatten(1), t.new_zeros(len(t), 7)], 1)[:,:t[0].numel()].view(t.shape)

SIZES = (8,),(8,5),(8,4,3),(8,1,4),(1,4,4),(8,3,2,2)

@pytest.mark.parametrize('shape', [(n,*size) for size in SIZES for n in (1,2)], ids=str)
def test_any_layout_of_values_and_gradients(shape):
    "Of one sample of which exactly one of the two is a view, PyTorch's CPU kernel took a layout for another"
    x,dy = tilted(shape[0], shape[1], shape[2:]),tilted(shape[0], shape[1], shape[2:], seed=1)
    mean,var,w = torch.randn(shape[1], dtype=F64),1+torch.rand(shape[1], dtype=F64),torch.rand(shape[1], dtype=F64)
    dims,wide = [i for i in range(x.dim()) if i != 1],(-1,*[1]*(x.dim()-2))
    want = (dy*(x-mean.view(wide))*(var.view(wide)+1e-5).rsqrt()).sum(dims),dy.sum(dims)
    affine = (dy-mean.view(wide))*var.view(wide).rsqrt()*w.view(wide)
    for a,b in itertools.product(layouts(shape), layouts(shape)):
        for got,ref in zip(_sums(b(dy), a(x), w, mean, var, 1e-5), want): assert error(got, ref) < 1e-12
        assert error(_mean_var(a(x))[1], x.var(dims, correction=0)) < 1e-12 or x.numel() == x.shape[1]
        assert error(_affine(a(dy), w, None, mean, var), affine) < 1e-12

class Tokens(nn.Module):
    "The stem of a hybrid transformer: the gradient comes back to BN as a transposed view"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.lin = nn.Conv2d(3,8,3,padding=1),nn.BatchNorm2d(8),nn.Linear(8,8)
    def forward(self, x):
        y = self.bn(self.conv(x)).flatten(2).transpose(1,2)
        return y+self.lin(y).tanh()

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('micro_bs', [1, 2, 3])
def test_one_sample_behind_which_layouts_change(micro_bs, memory_format):
    compare(seeded(Tokens), tilted(4, size=(4,4)).to(memory_format=memory_format), micro_bs)

def test_part_of_the_gradient():
    a,b,x = conv_net().train(),conv_net().train(),tilted(8)
    for w in ('4.weight','0.weight','7.bias'):
        g,h = (torch.autograd.grad(weigh(f(x)), m.get_parameter(w))[0] for f,m in ((a,a),(MicroBatched(b, 3),b)))
        assert error(h, g) < 1e-12
    pred = MicroBatched(b, 3)(x)
    pred[:3].sum().backward()  # some samples
    a(x)[:3].sum().backward()
    assert error(grads(b), grads(a)) < 1e-12

def test_nothing_is_kept_alive():
    m,x = conv_net().train(),tilted(8)
    gc.collect()
    gc.disable()
    try:
        for backward in (True,False):
            alive = []
            h = m[2].register_forward_hook(lambda mod, a, out: alive.append(weakref.ref(out)))
            loss = weigh(MicroBatched(m, 3)(x))
            assert len(alive) == 3 and all(o() is not None for o in alive)
            if backward: loss.backward()
            h.remove()
            del loss
            assert not any(o() is not None for o in alive)
    finally: gc.enable()

@pytest.mark.slow
def test_nothing_is_kept_alive_by_what_layers_keep():
    def fill(m):
        m.register_forward_hook(lambda mod, a, o: alive.append(weakref.ref(o)))
        return m
    alive,x = [],tilted(6, size=(32,32))
    for m in (Remembers().train(), unet().train()):
        for o in (m, next(o for o in m.modules() if isinstance(o, nn.BatchNorm2d))): fill(o)
        lock = MicroBatched(m, 2)
        gc.collect()
        gc.disable()
        try:
            live = []
            for _ in range(3):
                alive.clear()
                weigh(lock(x)).backward()
                live.append(sum(o() is not None for o in alive))
                assert len(alive) == 6
        finally: gc.enable()
        assert max(live) <= 2, live  # what the last micro-batch left in hooks and attributes

# A batch and its pieces

Pair = namedtuple('Pair', 'a b')
class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.bn,self.kind = nn.BatchNorm2d(3).double(),kind
    def forward(self, x, y=None, k=1., names=None):
        z = self.bn(x)*k
        if y is not None: z = z+y
        kinds = dict(tensor=z, tuple=(z,z.mean((2,3))), list=[z,[z.sum(1)]], dict={'a':z,'b':None,'c':z.sum((1,2,3))},
                     named=Pair(z,z.relu()), names=(z,names), none=(None,z), const=(z,3,'x'))
        return kinds[self.kind]

def leaves(o):
    if isinstance(o, torch.Tensor): return [o]
    if isinstance(o, dict): return [t for v in o.values() for t in leaves(v)]
    return [t for v in o for t in leaves(v)] if isinstance(o, (tuple,list)) else []

@pytest.mark.parametrize('kind', ['tensor','tuple','list','dict','named','names','none','const'])
def test_types_of_predictions(kind):
    a,b = Outputs(kind).train(),Outputs(kind).train()
    x,y,names = tilted(8),tilted(8, seed=1),[f'n{i}' for i in range(8)]
    p,q = a(x, y, k=torch.tensor(2.), names=names),MicroBatched(b, 3)(x, y, k=torch.tensor(2.), names=names)
    assert type(p) is type(q)
    assert [o.shape for o in leaves(p)] == [o.shape for o in leaves(q)]
    assert all(error(t, o) < 1e-13 for o,t in zip(leaves(p), leaves(q)))
    if kind == 'names': assert q[1] == names
    if kind == 'const': assert q[1:] == (3,'x')
    if kind == 'dict': assert q['b'] is None

def test_inputs_in_a_dict_and_without_a_batch():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bn = nn.BatchNorm2d(3).double()
        def forward(self, d, w, scale): return self.bn(d['x']+d['y'][0])*w[:,None,None]*scale
    x,y,w = tilted(8),tilted(8, seed=1),torch.arange(3.).double()
    a,b = M().train(),M().train()
    assert error(MicroBatched(b, 3)(dict(x=x, y=(y,None)), w, 2), a(dict(x=x, y=(y,None)), w, 2)) < 1e-13

def test_predictions_that_cannot_be_joined():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3).double()
        def forward(self, x): return self.bn(x),self.bn(x).mean()
    with pytest.raises(ValueError, match=r'prediction\[1\] is of \[\]'): MicroBatched(Mean(), 3)(tilted(8))

class Says(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.bn,self.f = nn.BatchNorm2d(3).double(),f
    def forward(self, x): return self.f(self.bn(x))

@pytest.mark.parametrize('f,text', [
    (lambda x: {f'n{len(x)}':x}, 'dict of 1'),
    (lambda x: (x,len(x)), r'prediction\[1\] is of 3, 2'),
    (lambda x: (x,x.mean((0,2,3))[:1]), r'prediction\[1\] is of \[1\] for 3'),
    (lambda x: x.movedim(0, 1), r'\[3, 3, 6, 6\] for 2|\[3, 2, 6, 6\]'),
    (lambda x: (x,x[0,0,:1].flatten()[:len(x)],x.new_zeros(len(x),len(x))),
     r'prediction\[2\] is of \[3, 3\], \[2, 2\]')])
def test_predictions_of_other_structure(f, text):
    with pytest.raises(ValueError, match=text): MicroBatched(Says(f), 3)(tilted(8))

def test_several_rows_for_a_sample():
    f = lambda x: x.movedim(1, -1).flatten(0, 2)
    a,b = Says(f).train(),Says(f).train()
    assert error(MicroBatched(b, 3)(tilted(8)), a(tilted(8))) < 1e-13

def test_no_batch_at_all():
    m = conv_net().eval()
    assert MicroBatched(m, 3)(tilted(8)[:0]).shape == (0,5)

def test_tensor_subclasses_keep_their_type():
    m = conv_net()[:2].train()
    x = tilted(8).as_subclass(TensorImage)
    assert type(MicroBatched(m, 3)(x)) is type(m(x))

# The module

def test_names_are_those_of_the_model():
    m = small_unet((32,32))
    lock = MicroBatched(m, 2)
    assert list(lock.state_dict()) == list(m.state_dict())
    assert [n for n,_ in lock.named_parameters()] == [n for n,_ in m.named_parameters()]
    assert list(bn_layers(lock)) == list(bn_layers(m)) and lock.layers is m.layers
    other = small_unet((32,32))
    assert lock.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), other.state_dict().values()))
    outer = nn.Sequential(nn.Identity(), MicroBatched(conv_net(), 2))
    assert list(outer.state_dict()) == [f'1.{k}' for k in conv_net().state_dict()]
    assert outer.load_state_dict({f'1.{k}':v for k,v in conv_net(seed=3).state_dict().items()})
    assert_same(outer[1].model, conv_net(seed=3), 0)

class Root(nn.Module):
    "State of the root itself"
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer('scale', torch.ones(1))
        self.register_buffer('cache', torch.zeros(1), persistent=False)
        self.w,self.extra = nn.Parameter(torch.ones(1)),1
    def get_extra_state(self): return self.extra
    def set_extra_state(self, o): self.extra = o
    def forward(self, x): return self.bn(x)*self.w*self.scale

def test_state_of_the_root():
    a,b = Root(),Root()
    a.extra = 7
    state = a.state_dict()
    of_bn = [f'bn.{k}' for k in a.bn.state_dict()]
    assert list(MicroBatched(a, 2).state_dict()) == list(state) == ['w','scale','_extra_state',*of_bn]
    assert MicroBatched(a, 2).state_dict()._metadata == state._metadata
    MicroBatched(b, 2).load_state_dict(state)
    assert b.extra == 7

def test_module_methods():
    m = conv_net()
    lock = MicroBatched(m, 2)
    assert lock.eval() is lock and not any(o.training for o in (lock, *m.modules()))
    assert lock.train() is lock and all(o.training for o in (lock, *m.modules()))
    lock.float()
    assert m[0].weight.dtype == torch.float32 and lock(tilted(5).float()).dtype == torch.float32
    assert 'micro_bs=2' in repr(lock) and 'BatchNorm2d' in repr(lock)
    own = lock.requires_grad_(False)
    assert own is lock and not any(p.requires_grad for p in m.parameters())

@pytest.mark.parametrize('f', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy','pickle'])
def test_copies(f):
    lock = MicroBatched(conv_net().train(), 3)
    new,x = f(lock),tilted(8)
    assert torch.equal(new(x), lock(x))
    assert new.model is not lock.model
    assert new.model[0].weight is new.get_parameter('0.weight') is not lock.model[0].weight
    new.double().load_state_dict(conv_net(seed=5).state_dict())
    assert_same(new.model, conv_net(seed=5), 0)

@pytest.mark.parametrize('micro_bs', [0, -1, 1.5, None, True, '2'])
def test_bad_micro_bs(micro_bs):
    with pytest.raises(ValueError, match='`micro_bs` must be'): MicroBatched(conv_net(), micro_bs)
    if micro_bs is not None:
        with pytest.raises(ValueError, match='`micro_bs` must be'): AccumulateGradBN(micro_bs=micro_bs)

def test_one_is_enough():
    lock = MicroBatched(conv_net().train(), 2)
    with pytest.raises(ValueError, match='one is enough'): MicroBatched(nn.Sequential(lock), 2)(tilted(8))

# State in Python

@pytest.mark.slow
def test_hooks_of_a_unet_and_of_the_user():
    make,x = unet,tilted(4, size=(32,32))
    a,b = make().train(),make().train()
    hooks = lambda m: hook_outputs([m.layers[0][4], m.layers[0][5]], detach=False)
    with hooks(a) as ha, hooks(b) as hb:
        a(x)
        MicroBatched(b, 3)(x)
        assert all(len(o.stored) == 4 for o in ha)
        assert all(o.stored.shape[0] == 1 for o in hb)  # the last micro-batch to run, as if it had been alone
    assert all(isinstance(h, Hook) for h in hb)
    compare(make, x, 1)

class Remembers(nn.Module):
    "Activations kept in several ways until the end"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3,4,3,padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                  nn.Conv2d(4,4,3,padding=1), nn.BatchNorm2d(4)).double()
        self.acts,self.stack,self.count,self.nested = {},[],0,dict(outs=[])
        self.also = self.stack
        self.body[0].register_forward_hook(lambda m, a, o: self.acts.update(conv=o))
        self.body[1].register_forward_hook(self.keep)
    def keep(self, m, a, o):
        self.stack.append(o)
        self.nested['outs'].append(o)
        m.out = o
    def forward(self, x):
        self.count += 1
        self.stack.clear()
        self.nested['outs'].clear()
        y = self.body(x)
        return y+self.acts['conv']+self.also[-1]*2+self.nested['outs'][0]*3+self.body[1].out*5

def test_activations_kept_in_python():
    a,b = compare(Remembers, tilted(8), 3)
    ids = {k:id(getattr(b, k)) for k in ('acts','stack','nested')}
    before = vars(b)
    MicroBatched(b, 3)(tilted(8))
    assert b.count == 2 and ids == {k:id(getattr(b, k)) for k in ids} and b.also is b.stack and vars(b) is before
    assert len(b.stack) == 1 and len(b.stack[0]) in (2,3) and len(b.nested['outs']) == 1

class Box:
    "Keeps, and is a hook"
    def __init__(self): self.x = None
    def __call__(self, m, a, o): self.x = o
    @classmethod
    def method(cls, m, a, o): cls.seen = True

class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Conv2d(4,4,3)).double()
        self.ns,self.items,self.hook = SimpleNamespace(),L(),[Box()]
        silent = partial(print, end='', file=open(os.devnull, 'w'))
        for h in (self.hook[0], Box.method, partial(Box.method), silent): self.body[0].register_forward_hook(h)
        self.big = [None]*2000
    def forward(self, x):
        self.ns.x,self.items.items,self.big[0] = x,[],x
        self.items.append(x*2)
        return self.body(x)+self.ns.x[:,:1,2:-2,2:-2]+self.items[0][:,1:2,2:-2,2:-2]+self.hook[0].x[:,:,1:-1,1:-1]

def test_objects_that_keep_something():
    compare(Boxes, tilted(8), 3)
    assert Box.seen

def test_buffers_that_layers_change_are_named():
    m = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3,3,1)), nn.BatchNorm2d(3)).double().train()
    with pytest.warns(UserWarning, match="changes buffers in place .the first is '_u'"): MicroBatched(m, 3)(tilted(8))
    MicroBatched(m.eval(), 3)(tilted(8))

def test_timm_features_by_hooks():
    def make():
        torch.manual_seed(0)
        return timm.create_model('efficientnet_b0', features_only=True, feature_location='expansion').double()
    a,b,x = make().train(),make().train(),tilted(6, size=(32,32))
    for p,q in zip(a(x), MicroBatched(b, 2)(x)): assert error(q, p) < 1e-12

# Settings of the thread

SETTINGS = dict(no_grad=torch.no_grad, inference=torch.inference_mode, enable=torch.enable_grad,
                hooks=lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
                device=lambda: torch.device('cpu'), pager=lambda: ActivationPager(None))

class Settings(nn.Module):
    "Contexts around BN layers within the model"
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind,self.seen = kind,[]
        self.a,self.b,self.c = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.BatchNorm2d(4)
    def forward(self, x):
        self.seen = [settings()]
        with SETTINGS[self.kind]():
            y = self.b(self.a(x))
            inner = settings()
            y = self.b(y)
            assert settings() == inner
        self.seen.append(settings())
        return self.c(self.a(x))+y.clone()

@pytest.mark.parametrize('outer', ['grad','no_grad'])
@pytest.mark.parametrize('kind', SETTINGS)
def test_settings_stay_with_their_micro_batch(kind, outer):
    a,b,x = Settings(kind).double().train(),Settings(kind).double().train(),tilted(8)
    before = settings()
    with torch.set_grad_enabled(outer == 'grad'): p,q = a(x),MicroBatched(b, 3)(x)
    assert error(q, p) < 1e-13 and q.requires_grad == p.requires_grad and settings() == before
    assert b.seen[0] == b.seen[1]
    if p.requires_grad:
        for m,o in ((a,p),(b,q)): weigh(o).backward()
        assert error(grads(b), grads(a)) < 1e-12

def test_the_callers_modes_see_every_micro_batch():
    m,x = conv_net().train(),tilted(8)
    flops = []
    for f in (m,MicroBatched(m, 3)):
        with FlopCounterMode(display=False) as counter: weigh(f(x)).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0

# What cannot work says so, and leaves nothing behind

class Paths(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind,self.a,self.b = kind,nn.BatchNorm2d(3).double(),nn.BatchNorm2d(3).double()
    def forward(self, x):
        odd = x.mean() > 0
        if self.kind == 'other': return self.b(x) if odd else self.a(x)
        if self.kind == 'more': return self.b(self.a(x)) if odd else self.a(x)
        return x if odd else self.a(x)

@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('kind,text', [('other',"layer '[ab]'.*layer '[ab]'"), ('more','end'), ('none','end')])
def test_different_paths_are_named(kind, text, flip):
    x = torch.ones(6,3,2,2, dtype=F64)
    x[:2] = -1
    m = Paths(kind).train()
    with pytest.raises(RuntimeError, match=text) as e: MicroBatched(m, 2)(-x if flip else x)
    assert 'different paths' in str(e.value)
    assert_untouched(m)
    assert m.a.num_batches_tracked == (1 if kind == 'more' else 0)  # what all did together counts
    MicroBatched(m, 2)(x.abs())  # goes on

class Fails(nn.Module):
    def __init__(self, at, error):
        super().__init__()
        self.m,self.at,self.error = conv_net(),at,error
    def forward(self, x):
        try:
            x = self.m[:2](x)
            if self.at == 'middle' and (x.shape[0] == 2): raise self.error
            x = self.m[2:](x)
            if self.at == 'end' and (x.shape[0] == 2): raise self.error
            return x
        finally: CLOSED.append(len(x))
CLOSED = []

ERRORS = Boom('x'),KeyboardInterrupt(),SystemExit(3),StopIteration()

@pytest.mark.parametrize('at', ['middle','end'])
@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
def test_exceptions_come_out_as_they_are(at, error):
    CLOSED.clear()
    m = Fails(at, error).train()
    mode,hooks = settings(),len(m.m[1]._forward_hooks)
    with pytest.raises(type(error)) as e: MicroBatched(m, 3)(tilted(8))
    assert e.value is error
    assert any('in forward' in o and 'raise self.error' in o for o in traceback.format_exception(e.value))
    assert len(CLOSED) == 3 and settings() == mode  # each has been unwound
    assert not any(type(o) is greenlet and o and o is not getcurrent() for o in gc.get_objects())
    assert_untouched(m)
    assert [b.num_batches_tracked.item() for b in bn_layers(m).values()] == [1, 1 if at == 'end' else 0]
    a,b = m.m,conv_net().train()
    b.load_state_dict(a.state_dict())
    assert error_free(a, b)

def error_free(a, b): return error(MicroBatched(a.train(), 3)(tilted(8)), b(tilted(8))) < 1e-12

def test_an_exception_frees_the_activations():
    alive = []
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU()).double().train()
    m[0].register_forward_hook(lambda mod, a, o: alive.append(weakref.ref(o)))
    def fail(mod, a, o): raise Boom('x')
    m[2].register_forward_hook(fail)
    gc.collect()
    gc.disable()
    try:
        try: MicroBatched(m, 3)(tilted(8))
        except Boom: pass
        assert len(alive) == 3 and not any(o() is not None for o in alive)
    finally: gc.enable()

def test_lazy_layers():
    m = nn.Sequential(nn.LazyConv2d(4,3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match='lazy'): MicroBatched(m, 2)(tilted(5).float())
    MicroBatched(m, 2)(tilted(2).float())
    MicroBatched(m, 2)(tilted(5).float())

def test_scripted_layers():
    m = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3).double())), nn.BatchNorm2d(3).double()).train()
    with pytest.raises(ValueError, match="'0.0'.*scripted"): MicroBatched(m, 2)(tilted(5))
    MicroBatched(m.eval(), 2)(tilted(5))

def test_a_layer_that_normalises_by_itself():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            if not self.training: return super().forward(x)
            return (x-x.mean((0,2,3), keepdim=True))/(x.std((0,2,3), keepdim=True)+self.eps)
    m = nn.Sequential(Own(3), nn.BatchNorm2d(3)).double()
    with pytest.raises(ValueError, match="Layer '0' .Own"): MicroBatched(m.train(), 2)(tilted(5))
    MicroBatched(m.eval(), 2)(tilted(5))

@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_is_refused(reentrant):
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.m = nn.Conv2d(3,3,1).double(),nn.Sequential(nn.Conv2d(3,3,1), nn.BatchNorm2d(3)).double()
        def forward(self, x): return checkpoint(self.m, self.stem(x), use_reentrant=reentrant)
    m = Saved().train()
    with pytest.raises(RuntimeError, match="Layer 'm.1' is inside activation checkpointing"):
        MicroBatched(m, 2)(tilted(5))
    assert_untouched(m)
    class Fine(Saved):
        def forward(self, x): return self.m[1](checkpoint(self.m[0], self.stem(x), use_reentrant=reentrant))
    compare(seeded(Fine), tilted(5), 2)

def test_checkpointing_all_of_it():
    a,b,x = conv_net(momentum=None).train(),conv_net(momentum=None).train(),tilted(8)
    weigh(a(x)).backward()
    weigh(checkpoint(MicroBatched(b, 3), x, use_reentrant=False)).backward()
    assert error(grads(b), grads(a)) < 1e-12

@pytest.mark.parametrize('how', ['outside','inside','layers','method'])
def test_compiled_models_run_uncompiled(how):
    "No compiler is needed for this backend"
    a,b,x = conv_net().train(),conv_net().train(),tilted(8)
    want = a(x)
    if how == 'outside': f = torch.compile(MicroBatched(b, 3), backend='eager')
    elif how == 'inside': f = MicroBatched(torch.compile(b, backend='eager'), 3)
    elif how == 'method':
        b.compile(backend='eager')
        f = MicroBatched(b, 3)
    else: f = MicroBatched(nn.Sequential(*[torch.compile(m, backend='eager') for m in b]), 3)
    if how == 'outside': pred = f(x)
    else:
        with pytest.warns(UserWarning, match='uncompiled'): pred = f(x)
    assert error(pred, want) < 1e-13
    weigh(pred).backward()
    weigh(want).backward()
    assert error(grads(b), grads(a)) < 1e-12
    assert_same(b, a)

# Captures

def test_captures_see_the_whole_batch():
    a,b,x = seeded(Twice)().train(),seeded(Twice)().train(),tilted(8)
    state = snapshot(b)
    caps = []
    for f,m in ((a,a),(MicroBatched(b, 3),b)):
        with capture_moments(bn_layers(m)) as cap: f(x)
        caps.append(dict(cap.moments.items()))
    for k,want in caps[0].items():
        got = caps[1][k]
        assert got.count == want.count and error(got.mean, want.mean) < 1e-13 and error(got.m2, want.m2) < 1e-13
    assert all(torch.equal(v, state[k]) for k,v in b.state_dict().items())

def test_precise_bn_of_it():
    a,b,x = conv_net(),conv_net(),tilted(24)
    ta,tb = precise_bn(a, x.split(8), progress=False),precise_bn(MicroBatched(b, 3), x.split(8), progress=False)
    assert_same(b, a)
    assert list(ta.layer) == list(tb.layer) and (ta.batch_noise-tb.batch_noise).abs().max() < 1e-10

# The callback

def fit(bs, *cbs, n=48, model=conv_net, epochs=2, **kw):
    set_seed(3)
    learn = get_learner(get_dls(tilted(n), labels(n), bs), model(), cbs, **kw)
    do_fit(learn, epochs)
    return learn

@pytest.mark.parametrize('micro_bs', [1, 2, 3, 5])
@pytest.mark.parametrize('n', [48, 42])
def test_the_window_in_lock_step(micro_bs, n):
    big,ours = fit(16, n=n),fit(4, AccumulateGradBN(4, bn_bs='window', micro_bs=micro_bs), n=n)
    assert_same(ours.model, big.model, 1e-10)
    assert max(abs(a-b) for a,b in zip(ours.recorder.losses, big.recorder.losses)) < 1e-6
    assert_pristine(ours)

@pytest.mark.parametrize('bn_bs', [None, 2, 8])
def test_other_batches_of_bn_in_lock_step(bn_bs):
    a,b = fit(4, AccumulateGradBN(4, bn_bs=bn_bs)),fit(4, AccumulateGradBN(4, bn_bs=bn_bs, micro_bs=1))
    assert_same(b.model, a.model, 1e-10)

@pytest.mark.parametrize('bn_bs', [8, 'window'])
def test_layers_used_twice_in_a_fit(bn_bs):
    model = seeded(lambda: nn.Sequential(Twice(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,5)))
    a = fit(4, AccumulateGradBN(4, bn_bs=bn_bs), model=model)
    b = fit(4, AccumulateGradBN(4, bn_bs=bn_bs, micro_bs=1), model=model)
    assert_same(b.model, a.model, 1e-10)
    if bn_bs == 'window': assert_same(b.model, fit(16, model=model).model, 1e-10)

def test_a_budget_in_lock_step_is_none():
    def go(budget):
        xs,ys = tilted(32, size=(24,24)).float(),labels(32)
        set_seed(3)
        model = nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(16,5))
        acc = AccumulateGradBN(8, bn_bs='window', micro_bs=4, budget=budget)
        learn = get_learner(get_dls(xs, ys, 2), model, acc)
        do_fit(learn, 2)
        return learn
    a,b = go(None),go('100kB')
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert b.accumulate_grad_bn.pager.moved

@pytest.mark.slow
def test_unet_in_lock_step():
    xs = tilted(8, size=(32,32))
    ys = (xs.mean(1)>0).long()
    def go(bs, *cbs):
        set_seed(3)
        learn = get_learner(get_dls(xs, ys, bs), unet(), cbs, loss_func=CrossEntropyLossFlat(axis=1))
        do_fit(learn, 1, 1e-2)
        return learn.model
    # fastai's loss is computed in float32
    assert_same(go(1, AccumulateGradBN(4, bn_bs='window', micro_bs=1, budget='1MB')), go(4), 1e-7)

@pytest.mark.slow
@pytest.mark.parametrize('how', ['method','wrapped'])
@pytest.mark.filterwarnings('ignore:A compiled model')
def test_a_compiled_model_in_a_fit(how):
    def model():
        m = conv_net()
        if how == 'wrapped': return torch.compile(m, backend='eager')
        m.compile(backend='eager')
        return m
    a,b = fit(4, AccumulateGradBN(4, bn_bs='window', micro_bs=3), model=model),fit(16)
    assert_same(getattr(a.model, '_orig_mod', a.model), b.model, 1e-10)

@pytest.mark.parametrize('cbs', [lambda: [CPUScaler()], lambda: [MixUp()]], ids=['amp','mixup'])
def test_with_other_callbacks(cbs):
    def go(bs, *mine):
        set_seed(3)
        dls = get_dls(tilted(32).float(), labels(32), bs)
        loss_func = CrossEntropyLossFlat()
        return one_cycle(learner(dls, conv_net().float(), [*mine, *cbs()], loss_func=loss_func, opt_func=SGD))
    a,b = go(16),go(4, AccumulateGradBN(4, bn_bs='window', micro_bs=3))
    assert_same(b.model, a.model, 5e-2 if isinstance(cbs()[0], CPUScaler) else 1e-4)

@pytest.mark.parametrize('where', ['before_batch','after_pred','after_loss','before_backward','after_backward',
                                   'before_step','after_batch'])
def test_exceptions_in_a_fit(where):
    cbs = [AccumulateGradBN(8, bn_bs='window', micro_bs=3), RaiseAt(where, 1, Boom('x'), 20)]
    learn = get_learner(get_dls(tilted(32), labels(32), 2), conv_net(), cbs)
    with pytest.raises(Boom): do_fit(learn)
    assert_pristine(learn)
    learn.remove_cb(learn.raise_at)
    do_fit(learn)

def test_exceptions_of_the_model_in_a_fit():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.m,self.left = conv_net(),[2]
        def forward(self, x):
            x = self.m[:3](x)
            if self.training and self.left[0] == 0:
                self.left[0] = -1
                raise Boom('x')
            if self.training: self.left = [self.left[0]-1]
            return self.m[3:](x)
    learn = get_learner(get_dls(tilted(32), labels(32), 2), Once(), [AccumulateGradBN(8, bn_bs='window', micro_bs=3)])
    with pytest.raises(Boom): do_fit(learn, 3)
    assert_pristine(learn)
    do_fit(learn)

def test_hooks_on_the_model_see_the_window():
    sizes = []
    m = conv_net()
    m.register_forward_hook(lambda mod, a, o: sizes.append((len(a[0]),len(o))) if mod.training else None)
    learn = get_learner(get_dls(tilted(32), labels(32), 2), m, AccumulateGradBN(8, bn_bs='window', micro_bs=3))
    do_fit(learn)
    assert sizes == [(16,16)]*2

def test_precise_bn_of_a_learner_runs_in_lock_step():
    learns = [fit(4, AccumulateGradBN(4, bn_bs='window', micro_bs=m), PreciseBN(n=40)) for m in (None,3)]
    tables = [o.precise_bn() for o in learns]
    assert_same(learns[1].model, learns[0].model, 1e-10)
    sizes = []
    h = learns[1].model[0].register_forward_hook(lambda m, a, o: sizes.append(len(o)))
    learns[1].precise_bn()
    h.remove()
    assert max(sizes) == 3

def test_export(tmp_path):
    learn = fit(4, AccumulateGradBN(4, bn_bs='window', micro_bs=3))
    learn.path = tmp_path
    learn.export('e.pkl')
    assert load_learner(tmp_path/'e.pkl').accumulate_grad_bn.micro_bs == 3

def test_a_model_that_is_micro_batched_already():
    a = fit(4, AccumulateGradBN(4, bn_bs='window'), model=lambda: MicroBatched(conv_net(), 3))
    assert_same(a.model.model, fit(16).model, 1e-10)
    with pytest.raises(ValueError, match='one is enough'):
        fit(4, AccumulateGradBN(4, bn_bs='window', micro_bs=2), model=lambda: MicroBatched(conv_net(), 3))

# The pager's advice

def test_the_pager_names_the_micro_batch_that_fits():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,16,3,padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                      nn.Conv2d(16,16,3,padding=1), nn.BatchNorm2d(16)).train()
    x = torch.randn(16,3,64,64)
    for budget in (2_500_000, 1_300_000):
        with pytest.warns(UserWarning, match=r'micro_bs=\d+ or less') as w:
            with ActivationPager(budget): m(x).square().mean().backward()
        text = next(str(o.message) for o in w if 'alone needs' in str(o.message))
        k = int(text.split('micro_bs=')[1].split()[0])
        assert 1 <= k < 16
        def need(micro_bs):
            "Of operations on activations: the prediction is there as a whole"
            m.zero_grad(set_to_none=True)
            with (p := ActivationPager(budget)): sum(m(o).square().mean() for o in x.split(micro_bs)).backward()
            return p.need
        assert need(k) <= budget < need(k+1)

def test_the_pager_promises_nothing_where_weights_are_too_large():
    m,x = nn.Sequential(nn.Linear(8,8), nn.Linear(8,20000), nn.BatchNorm1d(20000)).train(),torch.randn(16,8)
    with pytest.warns(UserWarning, match='alone needs') as w:
        with ActivationPager(300_000): m(x).square().mean().backward()
    assert not any('micro_bs' in str(o.message) for o in w)
