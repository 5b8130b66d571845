"A plan says, to the byte, what the run on a CPU takes; nothing is allocated, and the model is left as it was"
import copy
import gc
import random
import weakref
from contextlib import nullcontext
from functools import partial

import fastai.optimizer
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from fastai.vision.all import CrossEntropyLossFlat, TensorImage

from fastai_bn.all import ActivationPager, MicroBatched, memory_plan
from fastai_bn.fakes import CannotPlan
from fastai_bn.counting import n_bytes
from fastai_bn.plan import COLUMNS
from helpers import quiet_budget, small_unet

pytestmark = [quiet_budget, pytest.mark.usefixtures('all_move')]

class Shared(nn.Module):
    "One layer twice, a plain tensor, a constant, a parameter under two names"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.head = nn.Conv2d(3, 3, 3, padding=1),nn.BatchNorm2d(3),nn.Linear(3, 5)
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.again.weight = self.conv.weight
        self.scale = torch.ones(3, 1, 1)

    def forward(self, x):
        x = (x-torch.tensor([.5,.4,.3]).view(3,1,1))*self.scale
        x = self.bn(self.conv(self.bn(self.conv(x))).relu())
        return self.head(self.again(x).mean((2,3)))

class Saving(nn.Module):
    "Activation checkpointing"
    def __init__(self, use_reentrant):
        super().__init__()
        self.body,self.head,self.use_reentrant = nn.Sequential(conv(3), conv(8)),head(8),use_reentrant
    def forward(self, x):
        return self.head(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=self.use_reentrant))

class Applied(nn.Module):
    "A function between layers"
    def __init__(self, f):
        super().__init__()
        self.a,self.b,self.f = conv(3),nn.Sequential(conv(8), head(8)),f
    def forward(self, x): return self.b(self.f(self.a(x)))

def moved(x): return F.grid_sample(x, F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), x.shape), align_corners=False)
def turned(x): return F.layer_norm(x.flatten(2), (32*32,)).permute(0, 2, 1).reshape(x.shape)

class Table(nn.Module):
    "Constants in a list, and in a dict"
    def __init__(self):
        super().__init__()
        self.a,self.b = conv(3),head(8)
        self.tables = [torch.ones(8, 32, 32), dict(more=torch.ones(32, 32))]
    def forward(self, x): return self.b(self.a(x)*self.tables[0]+self.tables[1]['more'])

class Parts(nn.Module):
    "A dict goes in, a tuple comes out"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Sequential(conv(3), head(8)),nn.Linear(4, 5)
    def forward(self, d): return self.a(d['image']),self.b(d['more'][0])

def conv(n, nf=8): return nn.Sequential(nn.Conv2d(n, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU(inplace=True))
def head(n): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 5))
def images(n=3, size=32): return torch.randn(n, 3, size, size)
def labels(n=3): return torch.randint(5, (n,))
def classify(model, size=32): return model,images(size=size),labels(),F.cross_entropy
def timm_net(name, size=32, **kw): return classify(timm.create_model(name, num_classes=5, **kw), size=size)
def tv_net(name, **kw): return classify(getattr(torchvision.models, name)(num_classes=5), **kw)
def both(p, y): return F.cross_entropy(p[0], y) + F.cross_entropy(p[1], y)

def unet():
    return small_unet((32,32)).train(),images(4),torch.randint(2, (4,32,32)),F.cross_entropy

def channels_last():
    model,x,y,loss = tv_net('resnet18')
    last = dict(memory_format=torch.channels_last)
    return model.to(**last),x.to(**last),y,loss

def norms():
    return classify(nn.Sequential(
        conv(3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.PReLU(), nn.LayerNorm(32), head(8)))

def volumes():
    body = nn.Conv3d(1, 8, 3),nn.BatchNorm3d(8),nn.ReLU(),nn.MaxPool3d(2),nn.Conv3d(8, 8, 3),nn.ELU()
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(8*4**3, 5))
    return model,torch.randn(3, 1, 14, 14, 14),labels(),F.cross_entropy

def sequences():
    body = nn.Sequential(nn.Conv1d(4, 16, 5), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(.2), nn.Conv1d(16, 16, 5))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(16*92, 5))
    return model,torch.randn(3, 4, 100),labels(),F.cross_entropy

def words():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    body = nn.Sequential(nn.Embedding(50, 32), layer, nn.Flatten(), nn.Linear(20*32, 5))
    return body,torch.randint(50, (3,20)),labels(),F.cross_entropy

def regression(loss):
    up = nn.ConvTranspose2d(8, 8, 2, 2),nn.BatchNorm2d(8),nn.Upsample(scale_factor=2)
    model = nn.Sequential(conv(3), *up, nn.Conv2d(8, 3, 1))
    return model,images(),torch.rand(3, 3, 128, 128),lambda p,y: loss(p.sigmoid(), y)

def parts():
    return Parts(),dict(image=images(), more=[torch.randn(3, 4), 'a word']),labels(),both

def frozen():
    model,x,y,loss = tv_net('resnet18')
    for m in model.layer1.modules():
        m.requires_grad_(False)
        m.eval()
    return model,x,y,loss

MODELS = dict(
    resnet18=lambda: tv_net('resnet18'),
    resnet50=lambda: tv_net('resnet50'),
    shufflenet=lambda: tv_net('shufflenet_v2_x0_5'),
    efficientnet=lambda: timm_net('efficientnet_b0'),
    convnext=lambda: timm_net('convnext_atto', size=64),
    vit=lambda: timm_net('vit_tiny_patch16_224', img_size=32),
    mobilevit=lambda: timm_net('mobilevit_xxs', size=64),
    unet=unet,
    channels_last=channels_last,
    volumes=volumes,
    sequences=sequences,
    words=words,
    shared=lambda: classify(Shared()),
    checkpointed=lambda: classify(Saving(False)),
    reentrant=lambda: classify(Saving(True)),
    parts=parts,
    frozen=frozen,
    mse=lambda: regression(F.mse_loss),
    smooth_l1=lambda: regression(F.smooth_l1_loss),
    bce=lambda: regression(F.binary_cross_entropy),
    norms=norms,
    grids=lambda: classify(Applied(moved)),
    unfolded=lambda: classify(Applied(lambda x: F.unfold(x, 3, padding=1).view(3, 72, 32, 32)[:, :8])),
    turned=lambda: classify(Applied(turned)),
    table=lambda: classify(Table()),
    weighted=lambda: (*tv_net('resnet18')[:3], nn.CrossEntropyLoss(torch.rand(5))),
    flat=lambda: (*tv_net('resnet18')[:3], CrossEntropyLossFlat(weight=torch.rand(5))))
HALVES = 'resnet18','shufflenet','vit','words','norms','convnext','mse'

def autocast(is_half): return torch.autocast('cpu', torch.bfloat16) if is_half else nullcontext()

def run(pager, model, x, y, loss, is_half=False):
    "Run a window as anybody would"
    with pager:
        with autocast(is_half): value = loss(model(x), y)
        value.backward()

def counted(pager, moved=0, remade=0):
    need = dict(floor=pager.need, floor_op=str(pager.need_op), remade=pager.remade-remade)
    return dict(peak=pager.peak, moved=pager.moved-moved, host=pager.host_peak, **need)

def real(model, x, y, loss, budget, is_half=False):
    "Run three windows, or one if nothing moves, and count as a plan does"
    pager = ActivationPager(budget)
    for _ in range(1 if budget is None else 3):
        before = pager.moved,pager.remade
        run(pager, model, x, y, loss, is_half)
        for p in model.parameters(): p.grad = None
    return counted(pager, *before)

def row_of(df, way):
    row = df[df.way == way].iloc[-1]
    return {k:row[k] for k in ('peak','moved','remade','floor','floor_op','host')}

def check_plan(kind, is_half=False):
    torch.manual_seed(0)
    model,x,y,loss = MODELS[kind]()
    whole = real(model, x, y, loss, None, is_half)
    budget = whole['peak']//3
    with autocast(is_half): df = memory_plan(model, x, loss, y, budgets=budget)
    assert row_of(df, 'whole') == whole
    found = real(model, x, y, loss, budget, is_half)
    assert found['moved'] or found['remade']
    assert row_of(df, 'budget') == found

@pytest.mark.parametrize('kind', MODELS)
def test_the_plan_is_the_run_to_the_byte(kind): check_plan(kind)

@pytest.mark.parametrize('kind', HALVES)
def test_half_precision(kind): check_plan(kind, is_half=True)

def net(): return nn.Sequential(conv(3), nn.MaxPool2d(2), conv(8), nn.Dropout(.2), head(8))
def net_and_batch(n=8):
    torch.manual_seed(0)
    return net(),torch.randn(n, 3, 16, 16),torch.randint(5, (n,))

@pytest.mark.parametrize('micro_bs', [1, 3])
def test_lock_step(micro_bs):
    model,x,y = net_and_batch()
    budget = real(model, x, y, F.cross_entropy, None)['peak']//2
    df = memory_plan(model, x, F.cross_entropy, y, micro_bs=micro_bs, budgets=[budget])
    rows = df[df.way == 'lockstep']
    assert rows.micro_bs.tolist() == [micro_bs]*2 and rows.budget.isna().tolist() == [True,False]
    assert row_of(rows[:1], 'lockstep') == real(MicroBatched(model, micro_bs), x, y, F.cross_entropy, None)
    assert row_of(rows, 'lockstep') == real(MicroBatched(model, micro_bs), x, y, F.cross_entropy, budget)

def test_accumulation_needs_what_its_largest_micro_batch_and_a_gradient_that_waits_need():
    model,x,y = net_and_batch(7)
    df = memory_plan(model, x, F.cross_entropy, y, n_step=3, budgets=[])
    pager = ActivationPager(None)
    for i in (slice(3), slice(3, 6), slice(6, 7)): run(pager, model, x[i].clone(), y[i].clone(), F.cross_entropy)
    assert row_of(df, 'accumulated') == counted(pager)

def test_without_budgets_it_tries_three_quarters_a_half_and_a_quarter():
    df = memory_plan(*args_of('parts'))
    assert list(df.columns) == COLUMNS and df.way.tolist() == ['whole']+['budget']*3
    assert df.budget.tolist()[1:] == [df.peak[0]*k//4 for k in (3,2,1)]
    assert (df.total == df.peak+df.weights).all() and df.seconds.isna().all() and (df.remade == 0).all()
    assert (df.host[1:]*2 >= df.moved[1:]).all() and df.moved.is_monotonic_increasing

def args_of(kind):
    torch.manual_seed(0)
    model,x,y,loss = MODELS[kind]()
    return model,x,loss,y

@pytest.mark.parametrize('make,states', [
    (torch.optim.Adam, 2), (partial(torch.optim.SGD, lr=.1), 0), (partial(fastai.optimizer.SGD, lr=.1, mom=.9), 1),
    (partial(fastai.optimizer.Adam, lr=.1), 2)])
def test_weights_are_parameters_gradients_buffers_and_what_the_optimizer_keeps(make, states):
    model,x,loss,y = args_of('frozen')
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    still = n_bytes([list(model.parameters()), list(model.buffers())])
    found = memory_plan(model, x, loss, y, budgets=[], opt=make).weights[0]
    n_steps = 4*sum(p.requires_grad for p in model.parameters())  # PyTorch's Adam counts steps in a tensor each
    assert 0 <= found - (still + trained*(1+states)) <= n_steps

@pytest.mark.parametrize('kind', ['shared','unet','parts','reentrant'])
def test_by_layer_the_parts_are_the_peak(kind):
    model,x,loss,y = args_of(kind)
    layers = memory_plan(model, x, loss, y, by='layer')
    assert layers.peak.sum() == real(model, x, y, loss, None)['peak']
    names = [k for k,_ in model.named_modules()]
    assert set(layers.layer) <= {*names, '(batch)', '(model)', '(loss)'} and layers.layer.is_unique

def test_a_layer_holds_what_it_makes_in_backward_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 3))
    layers = memory_plan(model, torch.randn(64, 10, 100), F.cross_entropy, torch.randint(3, (64,)), by='layer')
    held = layers.set_index('layer').peak
    assert held['(batch)'] == 64*1000*4 + 64*8
    assert held['1'] >= 64*1000*4 and held.index.tolist()[0] == '(batch)'


# --- Nothing is allocated, nothing is changed

def state_of(model):
    "All that a run could change"
    python = [{k:id(v) for k,v in vars(m).items() if not isinstance(v, (int,float))} for m in model.modules()]
    modes = [m.training for m in model.modules()]
    params = [(id(p), id(p.grad), p._version) for p in model.parameters()]
    return python,modes,params,[(id(b), b._version) for b in model.buffers()],random_states()

def random_states(): return torch.random.get_rng_state().tolist(),np.random.get_state()[1].tolist(),random.getstate()

def fakes_alive():
    gc.collect()
    return sum(isinstance(o, FakeTensor) for o in gc.get_objects())

@pytest.mark.parametrize('kind', ['unet','shared','frozen','parts','vit'])
@pytest.mark.parametrize('is_broken', [False, True])
def test_the_model_is_left_as_it_was(kind, is_broken):
    model,x,loss,y = args_of(kind)
    loss(model(x), y).backward()
    weights,before,alive = copy.deepcopy(model.state_dict()),state_of(model),fakes_alive()
    as_subclass = torch.Tensor.as_subclass
    stored = [id(h.stored) for h in getattr(model, 'sfs', [])]
    def broken(p, y): raise KeyError('mine')
    if is_broken:
        with pytest.raises(KeyError, match='mine'): memory_plan(model, x, broken, y)
    else: memory_plan(model, x, loss, y, n_step=1, micro_bs=None if kind == 'vit' else 2, budgets=[], card='T4')
    assert state_of(model) == before and fakes_alive() <= alive
    assert all(torch.equal(a, b) for a,b in zip(weights.values(), model.state_dict().values()))
    assert [id(h.stored) for h in getattr(model, 'sfs', [])] == stored
    assert torch.Tensor.as_subclass is as_subclass and not torch._C._len_torch_dispatch_stack()

def test_the_model_goes_when_it_is_deleted():
    "A plan makes no circle that would wait for the garbage collector"
    model,x,loss,y = args_of('shared')
    memory_plan(model, x, loss, y)
    gone = weakref.ref(model),weakref.ref(model.conv.weight)
    gc.collect()
    gc.disable()
    try:
        memory_plan(model, x, loss, y, budgets=[])
        del model
        assert [o() for o in gone] == [None, None]
    finally: gc.enable()

def test_a_batch_and_a_model_that_never_existed():
    "1.5 TiB of images: nothing here could hold them"
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), head(64))
        x,y = torch.empty(2**13, 3, 2**12, 2**12),torch.empty(2**13, dtype=torch.long)
    df = memory_plan(model, x, F.cross_entropy, y, n_step=2**10, budgets=['9TiB'], micro_bs=2**12)
    assert df.peak[0] > 2**45 and df.way.tolist() == ['whole','accumulated','budget','lockstep','lockstep']
    assert all(p.is_meta for p in model.parameters())

def test_devices_and_types_of_a_batch_do_not_matter():
    model,x,loss,y = args_of('resnet18')
    expected = memory_plan(model, x, loss, y)
    for o in (x.to('meta'), TensorImage(x), (x,)):
        pd.testing.assert_frame_equal(memory_plan(model, o, loss, (y,)), expected)

def test_what_a_loss_has_in_a_closure_is_left_as_it_was():
    "A head that the loss trains, and a teacher with BN: gradients and counters stay, and training goes on"
    model,last,teacher = conv(3),nn.Sequential(head(8), nn.Linear(5, 5)),nn.Sequential(conv(3), head(8))
    x,y = images(),labels()
    def loss(p, y): return F.cross_entropy(last(p)+teacher(x).detach(), y)
    last[1].weight.grad = torch.ones(5, 5)
    before = copy.deepcopy((last.state_dict(), teacher.state_dict()))
    memory_plan(model, x, loss, y)
    for a,b in zip(before, (last, teacher)): assert all(torch.equal(v, b.state_dict()[k]) for k,v in a.items())
    assert [p.grad is None for p in last.parameters()] == [True, True, False, True]
    loss(model(x), y).backward()
    assert all(type(p.grad) is torch.Tensor for p in last.parameters())

def test_no_targets():
    model,x,_ = net_and_batch()
    assert memory_plan(model, x, lambda p: p.sum(), None, budgets=[]).peak[0] > 0


# --- The pager on tensors without memory

@pytest.mark.parametrize('budget', [None, 100_000])
def test_the_pager_takes_fake_tensors(budget):
    model,x,y = net_and_batch()
    found = real(model, x, y, F.cross_entropy, budget)
    with FakeTensorMode():
        fake = net()
        x,y = torch.empty(x.shape),torch.empty(y.shape, dtype=y.dtype)
        assert real(fake, x, y, F.cross_entropy, budget) == found

@pytest.mark.parametrize('budget', [None, 100_000])
def test_the_pager_takes_meta_tensors(budget):
    model,x,y = net_and_batch()
    found = real(model, x, y, F.cross_entropy, budget)
    assert real(model.to('meta'), x.to('meta'), y.to('meta'), F.cross_entropy, budget) == found

def test_a_meta_tensor_on_the_way_is_not_counted():
    model,x,y = net_and_batch()
    with ActivationPager(None) as pager:
        value = F.cross_entropy(model(x), y)
        torch.empty(2**40, device='meta').add(1)
        value.backward()
    assert pager.peak < 2**30


# --- What cannot be planned

class Reads(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.body,self.f = conv(3),f
    def forward(self, x): return self.f(self.body(x))

class Top(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.deep = nn.Sequential(nn.Identity(), Reads(f))
        self.head = head(8)
    def forward(self, x): return self.head(self.deep(x))

@pytest.mark.parametrize('read', [
    lambda x: x*x.max().item(), lambda x: x if x.sum() > 0 else -x, lambda x: x[x > 0].reshape(-1, 8, 1, 1),
    lambda x: x[:, :, :int(x.argmax())+1], lambda x: x.nonzero().float().view(-1, 4, 1, 1).expand(-1, 8, 1, 1)])
def test_what_reads_values_is_refused_by_name(read):
    with pytest.raises(CannotPlan, match="Layer 'deep.1'.*ActivationPager"):
        memory_plan(Top(read), images(), F.cross_entropy, labels())

@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused_by_name(kind):
    model = nn.ModuleDict(dict(rnn=kind(4, 8)))
    with pytest.raises(CannotPlan, match="Layer 'rnn' .*"+kind.__name__):
        memory_plan(model, torch.randn(3, 3, 4), F.cross_entropy, labels())

@pytest.mark.parametrize('as_list', [False, True])
def test_ctc_is_refused(as_list):
    lengths = lambda n: [n]*3 if as_list else torch.full((3,), n)
    loss = lambda p,y: F.ctc_loss(p.log_softmax(-1), y, lengths(20), lengths(5))
    with pytest.raises(CannotPlan, match='ctc'):
        memory_plan(nn.Linear(4, 9), torch.randn(20, 3, 4), loss, torch.randint(1, 9, (3,5)))

@pytest.mark.parametrize('as_traced', [False, True])
def test_scripted_modules_are_refused_and_left_as_they_were(as_traced):
    deep = torch.jit.trace(conv(3), images()) if as_traced else torch.jit.script(conv(3))
    model = nn.Sequential(deep, head(8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CannotPlan, match="Layer '0' is scripted"):
        memory_plan(model, images(), F.cross_entropy, labels())
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in before.items())

def test_an_operation_without_a_fake_version_is_not_said_to_read_values():
    with pytest.raises(CannotPlan, match='no version for fake tensors'):
        memory_plan(head(3), images(), nn.MultiMarginLoss(), labels(), budgets=[])

@pytest.mark.parametrize('make', [torch.optim.ASGD, torch.optim.Adafactor])
def test_an_optimizer_that_reads_values_is_named(make):
    with pytest.raises(CannotPlan, match='`opt`.*'+make.__name__):
        memory_plan(head(3), images(), F.cross_entropy, labels(), opt=make, budgets=[])

@pytest.mark.parametrize('loss,said', [
    (lambda p,y: 1., 'float'), (lambda p,y: F.cross_entropy(p.detach(), y), 'requires a gradient'),
    (lambda p,y: p, r'\[3, 5\]')])
def test_a_loss_without_a_backward_pass(loss, said):
    with pytest.raises(ValueError, match=f'`loss_func`.*{said}'): memory_plan(head(3), images(), loss, labels())

def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match='run one batch'):
        memory_plan(nn.Sequential(nn.LazyConv2d(3, 3), head(3)), images(), F.cross_entropy, labels())

@pytest.mark.parametrize('kw,said', [
    (dict(n_step=0), 'got 0'), (dict(n_step=4), '3 samples'), (dict(n_step=1.5), 'got 1.5'),
    (dict(budgets=.5), 'got 0.5'), (dict(budgets=['2GiB', 'much']), '`budgets`.*much'),
    (dict(budgets='auto'), '`budgets`'),
    (dict(micro_bs=0), 'got 0'), (dict(micro_bs=[2, True]), 'True'),
    (dict(opt='adam'), 'got str'), (dict(card='K80'), 'RTX 3060'), (dict(by='op'), 'op')])
def test_bad_arguments(kw, said):
    model,x,loss,y = args_of('resnet18')
    with pytest.raises(ValueError, match=said): memory_plan(model, x, loss, y, **kw)
