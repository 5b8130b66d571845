import copy
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fastai.basics import (Callback, CancelValidException, DataLoader, DataLoaders, Datasets, L, Learner, MSELossFlat,
                           TfmdDL, accuracy, noop, set_seed)
from fastai.callback.core import FetchPredsCallback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import ShortEpochCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import load_learner

import fastai_bn.precise
from fastai_bn.accumulate import AccumulateGradBN
from fastai_bn.moments import BNMoments, bn_layers, capture_moments
from fastai_bn.population import Population
from fastai_bn.precise import PreciseBN, bn_state, load_bn_state, precise_bn
from helpers import (F64, ItemOf, assert_pristine, conv_net, do_fit, get_dls, get_learner, labels, rounding, snapshot,
                      tilted)


def reference(xs):
    "Two passes in NumPy over all values of all samples"
    a = np.concatenate([x.double().numpy().swapaxes(0,1).reshape(x.shape[1],-1) for x in xs], 1)
    return a.mean(1), a.var(1, ddof=1)

def first_bn(cls=nn.BatchNorm2d, **kw): return nn.Sequential(cls(3, **kw), nn.Flatten(), nn.LazyLinear(2)).double()

@pytest.mark.parametrize('sizes', [[1]*7, [2]*4, [5,1], [3,4,2], [4,4,1], [8]])
def test_against_numpy(sizes):
    x = tilted(sum(sizes))
    m = first_bn()
    t = precise_bn(m, x.split(sizes), progress=False)
    mean,var = reference([x])
    np.testing.assert_allclose(m[0].running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(m[0].running_var, var, rtol=1e-12)
    assert t.samples[0] == len(x) and t['values'][0] == len(x)*36
    mean_of_vars = np.mean([reference([o])[1] for o in x.split(sizes)], 0)
    if len(sizes) > 1: assert not np.allclose(mean_of_vars, var, rtol=.02)

KINDS = [(nn.BatchNorm1d,()), (nn.BatchNorm1d,(7,)), (nn.BatchNorm3d,(2,3,4)), (nn.SyncBatchNorm,(4,4))]

@pytest.mark.parametrize('cls,size', KINDS)
def test_all_kinds_of_bn(cls, size):
    x = tilted(8, size=size)
    m = first_bn(cls)
    precise_bn(m, x.split(3), progress=False)
    mean,var = reference([x])
    np.testing.assert_allclose(m[0].running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(m[0].running_var, var, rtol=1e-12)

def test_timm_bn_with_dropout_inside():
    timm = pytest.importorskip('timm')
    m = nn.Sequential(timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout), nn.BatchNorm2d(3)).double()
    m.train()
    x = tilted(8)
    precise_bn(m, [x], progress=False)
    np.testing.assert_allclose(m[0].running_var, reference([x])[1], rtol=1e-12)
    y = torch.relu((x-x.mean((0,2,3),True))/(x.var((0,2,3),keepdim=True,correction=0)+m[0].eps).sqrt())
    np.testing.assert_allclose(m[1].running_var, reference([y])[1], rtol=1e-9)

def test_float32_at_mean_5000():
    x = torch.randn(500,3,4,4) + 5000
    m = first_bn().float()
    precise_bn(m, x.split(2), progress=False)
    np.testing.assert_allclose(m[0].running_var, reference([x])[1], rtol=1e-3)
    # the mean of a batch is rounded, and the result
    np.testing.assert_allclose(m[0].running_mean, reference([x])[0], rtol=rounding(4, 1, torch.float32))

def test_dropout_is_off_and_comes_back():
    m = nn.Sequential(nn.Dropout(.9), nn.BatchNorm2d(3), nn.Dropout(.3).eval(), nn.BatchNorm2d(3).eval()).double()
    modes = [o.training for o in m.modules()]
    x = tilted(16)
    precise_bn(m, x.split(4), progress=False)
    np.testing.assert_allclose(m[1].running_var, reference([x])[1], rtol=1e-12)
    assert [o.training for o in m.modules()] == modes
    # eval mode is no reason to leave a layer out: a model is in it after validation
    assert (m[3].running_var != 1).any()

def test_a_layer_used_twice_or_never():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice,self.never = nn.BatchNorm2d(3),nn.BatchNorm2d(5)
        def forward(self, x): return self.twice(2*self.twice(x)+1)
    m,x = Net().double(),tilted(6)
    t = precise_bn(m, [x], progress=False).set_index('layer')
    y = 2*(x-x.mean((0,2,3),True))/(x.var((0,2,3),keepdim=True,correction=0)+m.twice.eps).sqrt()+1
    np.testing.assert_allclose(m.twice.running_var, reference([x,y])[1], rtol=1e-9)
    assert t.loc['twice','values'] == 2*6*36
    assert t.loc['never','samples'] == t.loc['never','values'] == 0 and np.isnan(t.loc['never','mean_shift'])
    assert (m.never.running_var == 1).all() and (m.never.running_mean == 0).all()

def test_frozen_layers_stay_unless_asked_for():
    m = conv_net()
    for p in m[1].parameters(): p.requires_grad_(False)
    x = tilted(8)
    assert precise_bn(m, [x], progress=False).layer.tolist() == ['4']
    assert (m[1].running_mean == 0).all()
    assert precise_bn(m, [x], frozen=True, progress=False).layer.tolist() == ['1','4']
    assert (m[1].running_mean != 0).all()
    no_affine = nn.Sequential(nn.BatchNorm2d(3, affine=False)).double()  # has nothing to freeze
    assert len(precise_bn(no_affine, [x], progress=False)) == 1

def test_momentum_and_counter_are_untouched():
    for mom in (None, .1, 0.):
        m = first_bn(momentum=mom)
        m[0].num_batches_tracked += 7
        rm = m[0].running_mean
        precise_bn(m, [tilted(4)], progress=False)
        assert m[0].momentum == mom and m[0].num_batches_tracked == 7 and m[0].running_mean is rm

def test_same_as_the_large_batch_of_torch():
    m,x = conv_net(momentum=1.),tilted(8)
    ref = conv_net(momentum=1.)
    ref(x)
    precise_bn(m, [x], progress=False)
    for i in (1,4): torch.testing.assert_close(m[i].running_var, ref[i].running_var, rtol=1e-12, atol=0)

@pytest.mark.parametrize('n,samples', [(1,4), (4,4), (5,8), (10_000,18)])
def test_n(n, samples):
    t = precise_bn(first_bn(), tilted(18).split(4), n=n, progress=False)
    assert t.samples[0] == samples

def test_table_says_how_far_off():
    x = tilted(16)
    m = first_bn()
    mean,var = reference([x])
    m[0].running_mean.copy_(torch.tensor(mean + .5*np.sqrt(var+m[0].eps)))
    m[0].running_var.copy_(torch.tensor((var+m[0].eps)*[.5,2,4]-m[0].eps))
    t = precise_bn(m, [x], progress=False)
    names = 'layer channels samples values mean_shift var_ratio worst_channel batch_noise'
    assert t.columns.tolist() == names.split()
    assert t.worst_channel[0] == 2 and np.isnan(t.batch_noise[0])
    assert t.layer[0] == '0' and t.channels[0] == 3
    assert t.mean_shift[0] == pytest.approx(.5, rel=1e-9) and t.var_ratio[0] == pytest.approx(4**(1/3), rel=1e-9)
    t = precise_bn(m, [x], progress=False)
    assert t.mean_shift[0] < 1e-12 and t.var_ratio[0] == pytest.approx(1, rel=1e-12)

def test_blank_channels():
    x = tilted(8)
    x[:,1] = 0
    m = first_bn()
    t = precise_bn(m, [x], progress=False)
    assert m[0].running_var[1] == 0 and np.isfinite(t.var_ratio[0]) and np.isfinite(t.mean_shift[0])

def test_batches_of_all_shapes():
    x,y = tilted(4),labels(4)
    ref = first_bn()
    precise_bn(ref, [x], progress=False)
    for b in (x, (x,), (x,y), [x,y]):
        m = first_bn()
        precise_bn(m, [b], progress=False)
        assert torch.equal(m[0].running_var, ref[0].running_var)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3).double()
        def forward(self, a, b): return self.bn(a+b)
    m = Two()
    precise_bn(m, [(x,x,y)], n_inp=2, progress=False)
    np.testing.assert_allclose(m.bn.running_var, reference([2*x])[1], rtol=1e-12)

def test_a_last_batch_of_one_behind_pooling():
    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)).double()
    x = tilted(9)
    assert precise_bn(m, x.split(4), progress=False).samples[0] == 9
    np.testing.assert_allclose(m[2].running_var, reference([x.mean((2,3))])[1], rtol=1e-12)
    with pytest.raises(ValueError, match="layer '2'"): precise_bn(m, x.split(1), progress=False)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3).double()
    def forward(self, image, scale=1.): return self.bn(image*scale)
class Whole(Named):
    def forward(self, batch): return self.bn(batch['image'])
class Any(Named):
    def forward(self, **kw): return self.bn(kw['image'])

@pytest.mark.parametrize('cls', [Named, Whole, Any])
def test_dict_batches(cls):
    x = tilted(9)
    m = cls()
    batches = [dict(image=o, label=labels(len(o))) for o in x.split(4)]
    assert precise_bn(m, batches, progress=False).samples[0] == 9  # the single one joins
    np.testing.assert_allclose(m.bn.running_var, reference([x])[1], rtol=1e-12)
    if cls is Named:
        precise_bn(m, [dict(image=x, scale=2.)], progress=False)
        np.testing.assert_allclose(m.bn.running_var, reference([2*x])[1], rtol=1e-12)

def test_autocast():
    x,m = torch.randn(40,3,8,8)+2,conv_net().float()
    ref = conv_net().float()
    precise_bn(ref, x.split(8), progress=False)
    with torch.autocast('cpu', torch.bfloat16): precise_bn(m, x.split(8), progress=False)
    for k in (1,4):
        assert not torch.equal(m[k].running_var, ref[k].running_var) and m[k].running_var.dtype == torch.float32
        torch.testing.assert_close(m[k].running_var, ref[k].running_var, rtol=.03, atol=1e-4)

@pytest.mark.parametrize('sizes', [[1]*12, [2]*6, [5,5,2], [12]])
@pytest.mark.parametrize('bn_bs', [1, 4, 6, 12, 50])
def test_bn_bs_is_the_batch_that_normalises(sizes, bn_bs):
    x,m,ref = tilted(12),conv_net(),conv_net()
    precise_bn(ref, x.split(bn_bs), progress=False)
    precise_bn(m, x.split(sizes), bn_bs=bn_bs, progress=False)
    assert all(torch.equal(a, b) for a,b in zip(m.state_dict().values(), ref.state_dict().values()))
    if len(sizes) > 1 and bn_bs > max(sizes):
        as_they_come = conv_net()
        precise_bn(as_they_come, x.split(sizes), progress=False)
        assert not torch.allclose(as_they_come[4].running_var, m[4].running_var, rtol=1e-3)

def test_bn_bs_and_n():
    assert precise_bn(conv_net(), tilted(40).split(2), n=9, bn_bs=4, progress=False).samples[0] == 12
    learn = get_learner(get_dls(tilted(21), labels(21), 2), conv_net())
    assert learn.precise_bn(bn_bs=8).samples[0] == 21
    ref = conv_net()
    precise_bn(ref, tilted(21).split(8), progress=False)

@pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')
def test_budget_changes_no_bit():
    def wide():
        torch.manual_seed(0)
        layers = nn.Conv2d(3,16,3),nn.BatchNorm2d(16),nn.ReLU(),nn.Conv2d(16,16,3),nn.BatchNorm2d(16)
        return nn.Sequential(*layers)
    x = torch.randn(20,3,32,32)
    a,b = wide(),wide()
    precise_bn(a, x.split(4), bn_bs=10, progress=False)
    precise_bn(b, x.split(4), bn_bs=10, budget=1, progress=False)
    assert all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))
    assert a[1].running_mean.abs().max() > 0

# --- Work stops after the last BN layer

class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0
    def forward(self, x):
        self.n += 1
        return x

def test_what_comes_after_the_last_layer_runs_once():
    m,ref,x = conv_net(),conv_net(),tilted(12)
    m.append(head := Counted())
    precise_bn(m, x.split(3), progress=False)
    assert head.n == 1
    total = BNMoments()
    for b in x.split(3):  # all the way
        with torch.no_grad(), capture_moments(bn_layers(ref)) as cap: ref(b)
        total = total.merge(cap.moments)
    layers = bn_layers(m)
    for k,o in total.items(): torch.testing.assert_close(layers[k].running_var, o.var(), rtol=0, atol=0)
    assert not any(o._forward_hooks for o in m.modules())

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['twice','never','sometimes twice','compiled'])
def test_it_runs_through_where_stopping_is_not_safe(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.head,self.n = nn.BatchNorm2d(3),nn.BatchNorm2d(3),Counted(),0
        def forward(self, x):
            self.n += 1
            x = self.a(x)
            if kind == 'twice' or (kind == 'sometimes twice' and self.n == 2): x = self.a(2*x+1)
            if kind != 'never': x = self.b(x)
            return self.head(x)
    m,x = Net().double(),tilted(12)
    run = torch.compile(m, backend='eager') if kind == 'compiled' else m
    t = precise_bn(run, x.split(3), progress=False)
    assert m.head.n >= (2 if kind == 'sometimes twice' else 4)
    if kind == 'sometimes twice': assert t['values'].tolist() == [5*3*36, 12*36]
    if kind == 'never': assert t.samples.tolist() == [12,0] and t.worst_channel[1] == -1
    assert not any(o._forward_hooks for o in m.modules())

def test_an_except_clause_in_the_model_does_not_swallow_the_stop():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn,self.head = nn.BatchNorm2d(3),Counted()
        def forward(self, x):
            try: x = self.bn(x)
            except Exception: raise AssertionError
            return self.head(x)
    m = Net().double()
    precise_bn(m, tilted(12).split(3), progress=False)
    assert m.head.n == 1

# --- Batch noise

def test_batch_noise_by_hand():
    x = tilted(12)
    t = precise_bn(first_bn(), x.split(3), progress=False)
    mean,var = x.mean((0,2,3)),x.var((0,2,3), correction=0)
    between = torch.stack([((b.mean((0,2,3))-mean)**2) for b in x.split(3)]).mean(0)
    assert t.batch_noise[0] == pytest.approx((between/(var+1e-5)).mean().sqrt().item(), rel=1e-9)
    def noise(bs):
        values = torch.randn(4000,3,1,1, dtype=F64)
        return precise_bn(first_bn(), values.split(bs), progress=False).batch_noise[0]
    # independent values: one over the root of their number
    assert [noise(4), noise(16)] == pytest.approx([.5, .25], rel=.05)
    blank = tilted(8)
    blank[:,1] = 0
    assert np.isfinite(precise_bn(first_bn(), blank.split(4), progress=False).batch_noise[0])

# --- One set of statistics per domain

def test_bn_state_round_trip():
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    m = nn.Sequential(nn.BatchNorm2d(3, momentum=None), untracked, nn.BatchNorm2d(3)).double()
    m(tilted(4))
    keep = bn_state(m)
    assert list(keep) == [f'{i}.{k}' for i in (0,2) for k in ('running_mean','running_var','num_batches_tracked')]
    weights,rm = snapshot(m),m[0].running_mean
    m(tilted(4, seed=1))
    assert not torch.equal(keep['0.running_mean'], m[0].running_mean)  # a copy
    load_bn_state(m, keep)
    torch.testing.assert_close(snapshot(m), weights, rtol=0, atol=0)
    assert m[0].running_mean is rm
    assert list(bn_state(m[0])) == ['running_mean','running_var','num_batches_tracked']

OTHERS = [nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
          nn.Sequential(nn.Conv2d(3,3,1)), nn.BatchNorm2d(3)]

@pytest.mark.parametrize('other', OTHERS)
def test_another_models_state(other):
    m = nn.Sequential(nn.BatchNorm2d(3))
    m(torch.randn(4,3,2,2))
    before = snapshot(m)
    with pytest.raises(ValueError, match="another model's"): load_bn_state(m, bn_state(other))
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)

# --- Nothing else changes

def rng(): return random.random(), np.random.rand(), torch.rand(1).item()

def test_random_numbers_go_on_as_if_nothing_was():
    learn = get_learner(get_dls(tilted(20), labels(20), 4, shuffle=True), conv_net())
    def after(f):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        f()
        return rng()
    assert after(lambda: None) == after(lambda: learn.precise_bn())
    dl,m = torch.utils.data.DataLoader(tilted(20), batch_size=4, shuffle=True),conv_net()
    assert after(lambda: None) == after(lambda: precise_bn(m, dl, progress=False))
    assert after(lambda: None) != after(lambda: list(dl))  # it does draw

def test_the_training_dataloader_shuffles_on_as_if_nothing_was():
    def order(f):
        random.seed(0)
        learn = get_learner(get_dls(tilted(20), labels(20), 4, shuffle=True), conv_net())
        f(learn)
        return torch.cat([b[1] for b in learn.dls.train])
    assert torch.equal(order(lambda l: None), order(lambda l: l.precise_bn()))
    assert torch.equal(order(lambda l: None), order(lambda l: l.precise_bn(dl=l.dls.train)))

def test_a_dataloaders_own_generator_goes_on_as_if_nothing_was():
    x,m = tilted(20),conv_net()
    def torch_order(f):
        g = torch.Generator().manual_seed(3)
        dl = torch.utils.data.DataLoader(list(zip(x,labels(20))), batch_size=4, shuffle=True, generator=g)
        f(dl)
        return torch.cat([b[1] for b in dl])
    def fastai_order(f):
        random.seed(0)
        dl = get_dls(x, labels(20), 4, shuffle=True).train
        f(dl)
        return torch.cat([b[1] for b in dl])
    for order in (torch_order,fastai_order):
        assert torch.equal(order(lambda dl: None), order(lambda dl: precise_bn(m, dl, progress=False)))
        assert not torch.equal(order(lambda dl: None), order(list))

@pytest.mark.parametrize('kind', ['torch','iterable'])
def test_learner_with_other_dataloaders(kind):
    x,items = tilted(12),list(zip(tilted(12),labels(12)))
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(items)
        def __len__(self): return 12
    dl = torch.utils.data.DataLoader(items, batch_size=4, shuffle=True) if kind=='torch' else DataLoader(Stream(), bs=4)
    learn = get_learner(DataLoaders(dl, dl, device='cpu'), first_bn())
    assert learn.precise_bn().samples[0] == 12
    np.testing.assert_allclose(learn.model[0].running_var, reference([x])[1], rtol=1e-9)

@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['model', 'data'])
def test_exceptions_change_nothing(where, exc):
    class Bad(nn.Module):
        n = 0
        def forward(self, x):
            self.n += 1
            if self.n == 3 and where=='model': raise exc
            return x
    def data():
        yield from tilted(4).split(2)
        if where == 'data': raise exc
        yield tilted(2)
    m = conv_net()
    m.insert(2, Bad())
    m[0].eval()
    m.train(False)
    m[3].train()
    before,modes = snapshot(m),[o.training for o in m.modules()]
    state = torch.get_rng_state()
    with pytest.raises(exc): precise_bn(m, data())
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)
    assert [o.training for o in m.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any('forward' in o.__dict__ for o in m.modules()) and m[1].momentum == .1

def test_values_that_are_not_finite():
    x = tilted(8)
    x[5,1,2,2] = float('nan')
    m = conv_net()
    before = snapshot(m)
    with pytest.raises(ValueError, match="layer '1'.*not finite"): precise_bn(m, x.split(4), progress=False)
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)

def test_training_goes_on_afterwards():
    m,x = conv_net(),tilted(8)
    precise_bn(m, [x], progress=False)
    m(x).sum().backward()  # buffers written under inference_mode would raise here
    assert m[0].weight.grad is not None

def test_no_gradients_are_kept():
    m = conv_net()
    seen = []
    m[4].register_forward_hook(lambda mod,a,o: seen.append(o.requires_grad))
    precise_bn(m, [tilted(4)], progress=False)
    assert seen == [False] and all(p.grad is None for p in m.parameters())

@pytest.mark.slow
def test_a_population_needs_no_learner():
    "It is plain PyTorch"
    code = ("import sys, fastai_bn.population, fastai_bn.report\n"
            "print({'fastai.learner','fastai.basics','fastai_bn.accumulate'} & sys.modules.keys())")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'

# --- Learner

def test_learner_takes_all_of_the_training_set():
    xs = tilted(21)
    dls = get_dls(xs, labels(21), 4, drop_last=True, shuffle=True, valid=(xs[:3],labels(3)))
    learn = get_learner(dls, first_bn(), cbs=[])
    learn.model(xs)
    t = learn.precise_bn()
    assert t.samples[0] == 21
    np.testing.assert_allclose(learn.model[0].running_var, reference([xs])[1], rtol=1e-9)
    assert learn.precise_bn(n=10).samples[0] == 12

def test_learner_on_another_domain():
    xs = tilted(21)
    learn = get_learner(get_dls(xs, labels(21), 4), first_bn())
    other = 5*tilted(10, seed=3)+2
    of_torch = torch.utils.data.DataLoader(list(zip(other,labels(10))), batch_size=5)
    for dl in (get_dls(other, labels(10), 5).valid, of_torch, other.split(5)):
        learn.model[0].reset_running_stats()
        learn.precise_bn(dl=dl)
        np.testing.assert_allclose(learn.model[0].running_mean, reference([other])[0], rtol=1e-9)

def test_multi_input_learner():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn,self.l = nn.BatchNorm2d(3),nn.Linear(3,5)
        def forward(self, a, b): return self.l(self.bn(a+b).mean((2,3)))
    xs,ys = tilted(8).float(),labels(8)
    ds = Datasets(range(8), [[ItemOf(xs)],[ItemOf(xs)],[ItemOf(ys)]], n_inp=2)
    learn = get_learner(DataLoaders(TfmdDL(ds, bs=4), TfmdDL(ds, bs=4), device='cpu'), Two())
    learn.precise_bn()
    np.testing.assert_allclose(learn.model.bn.running_var, reference([2*xs])[1], rtol=1e-5)

def test_bar(capsys):
    x = torch.utils.data.DataLoader(tilted(12), batch_size=4)
    precise_bn(first_bn(), x, progress=True)
    assert '[4/12' in (out := capsys.readouterr().out) and '[12/12' in out
    precise_bn(first_bn(), x, progress=False)
    assert capsys.readouterr().out == ''

# --- Bad input

@pytest.mark.parametrize('n', [0, -1, 2.5, '10', True, None])
def test_bad_n(n):
    with pytest.raises(ValueError, match='`n` must be'): precise_bn(conv_net(), [tilted(4)], n=n)

def test_a_tensor_is_no_batches():
    with pytest.raises(ValueError, match='split'): precise_bn(conv_net(), tilted(4))

def test_no_data():
    m = conv_net()
    before = snapshot(m)
    with pytest.raises(ValueError, match='no batch'): precise_bn(m, [])
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)

NOTHING = [nn.Sequential(nn.Conv2d(3,3,3)), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
           nn.Sequential(nn.BatchNorm2d(3).requires_grad_(False))]

@pytest.mark.parametrize('model', NOTHING)
def test_nothing_to_update_says_so(model):
    with pytest.warns(UserWarning, match='no layer to update'): t = precise_bn(model, [tilted(4)])
    assert len(t) == 0 and 'mean_shift' in t

@pytest.mark.parametrize('bn_bs', [0, -1, 2.5, 'window', True])
def test_bad_bn_bs(bn_bs):
    with pytest.raises(ValueError, match='`bn_bs` must be'): precise_bn(conv_net(), [tilted(4)], bn_bs=bn_bs)

def test_items_of_several_sizes_cannot_be_joined():
    batches = [tilted(2), tilted(2, size=(8,8))]
    with pytest.raises(ValueError, match='cannot be joined'): precise_bn(conv_net(), batches, bn_bs=4, progress=False)
    precise_bn(conv_net(), batches, progress=False)

# --- Report

def test_report_changes_nothing(capsys):
    import matplotlib.pyplot as plt
    learn = get_learner(get_dls(tilted(20), labels(20), 2, shuffle=True), conv_net())
    do_fit(learn)
    before,modes,state = snapshot(learn.model),[o.training for o in learn.model.modules()],torch.get_rng_state()
    n = len(plt.get_fignums())
    t = learn.bn_report()
    assert len(plt.get_fignums()) == n+1 and len(plt.gcf().axes) == 3
    plt.close('all')
    torch.testing.assert_close(snapshot(learn.model), before, rtol=0, atol=0)
    assert [o.training for o in learn.model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    said,advice = capsys.readouterr().out,t.attrs['advice']
    assert ' '.join(advice) in ' '.join(said.split('\n')) and 'precise_bn' in advice[0]
    learn.bn_report(plot=False)
    assert not plt.get_fignums()
    off = ['mean_shift','var_ratio']
    torch.testing.assert_close(learn.precise_bn(n=1000)[off].values, t[off].values, rtol=0, atol=0)
    learn.precise_bn(bn_bs=20)
    assert 'precise_bn' not in ' '.join(learn.bn_report(dl=tilted(20).split(20), plot=False).attrs['advice'])

# --- While training

def precise_fit(cb, n_epoch=3, cbs=(), lr=.1, **kw):
    xs,ys = tilted(24),labels(24)
    # each DataLoader draws its own generator's seed when it is made
    random.seed(0)
    torch.manual_seed(0)
    dls = get_dls(xs, ys, 2, shuffle=True, valid=(tilted(10, seed=5),labels(10, seed=5)))
    learn = get_learner(dls, conv_net(), [*L(cb), *L(cbs)], metrics=accuracy, **kw)
    do_fit(learn, n_epoch, lr)
    return learn

class Stats(Callback):
    "What `after_epoch` finds, where SaveModelCallback and early stopping look"
    order = 55
    def before_fit(self): self.stats,self.valid = [],[]
    def after_epoch(self):
        if not hasattr(self, 'epoch') or len(self.recorder.values) == len(self.stats): return
        self.stats.append(bn_state(self.model))
        self.valid.append(list(self.recorder.values[-1]))

def test_the_callback_does_not_hide_the_method():
    learn = precise_fit(PreciseBN(), 1)
    assert callable(learn.precise_bn_cb) and len(learn.precise_bn()) == len(bn_layers(learn.model))
    learn.remove_cb(PreciseBN)
    assert not hasattr(learn, 'precise_bn_cb') and len(learn.precise_bn()) > 0

def test_training_is_not_changed():
    a = precise_fit([])
    b = precise_fit(PreciseBN())
    for (k,p),q in zip(a.model.named_parameters(), b.model.parameters()): assert torch.equal(p, q), k
    assert [o.item() for o in a.recorder.losses] == [o.item() for o in b.recorder.losses]
    assert not torch.equal(a.model[1].running_var, b.model[1].running_var)
    assert a.recorder.values[-1][1] != b.recorder.values[-1][1]

@pytest.mark.parametrize('every,epochs', [(1,[0,1,2,3,4]), (2,[1,3,4]), (9,[4])])
def test_every(every, epochs, monkeypatch):
    calls = []
    class Epoch(Callback):
        def before_epoch(self): self.now = self.learn.epoch
    real,clock = fastai_bn.precise.measure,Epoch()
    def measure(*args, **kwargs):
        calls.append(clock.now)
        return real(*args, **kwargs)
    monkeypatch.setattr(fastai_bn.precise, 'measure', measure)
    learn = precise_fit(PreciseBN(every=every), 5, clock)
    assert calls == epochs
    # order matters in deeper layers only
    ref = conv_net()
    ref.load_state_dict(learn.model.state_dict())
    precise_bn(ref, tilted(24).split(2), progress=False)
    torch.testing.assert_close(learn.model[1].running_var, ref[1].running_var, rtol=1e-12, atol=0)

def test_what_is_recorded_is_validated_with_precise_statistics():
    learn = precise_fit(PreciseBN())
    final = list(learn.recorder.values[-1])[1:]
    with learn.no_logging(): assert list(learn.validate()) == final

@pytest.mark.slow
@pytest.mark.parametrize('name', ['valid_loss','accuracy'])
def test_keep_if_better_never_loses(name):
    learn = precise_fit(PreciseBN(keep_if_better=name), 6, Stats())
    plain,always = precise_fit([], 6, Stats()),precise_fit(PreciseBN(), 6, Stats())
    i = 1 if name == 'valid_loss' else 2
    better = min if name == 'valid_loss' else max
    # later the moving averages begin elsewhere
    assert learn.stats.valid[0][i] == better(plain.stats.valid[0][i], always.stats.valid[0][i])
    assert [v[0] for v in learn.stats.valid] == [v[0] for v in plain.stats.valid]  # train loss
    assert len(learn.recorder.values) == 6
    final = learn.stats.valid[-1][1:]
    # what is recorded is the score of the statistics that are there
    with learn.no_logging(): assert list(learn.validate()) == final

@pytest.mark.parametrize('good', [False, True])
def test_keep_if_better_decides_by_the_score(good, capsys, monkeypatch):
    real = Population.write
    def write_bad(population):
        real(population)
        population.layers['1'].running_var.fill_(1e-12)
    if good: monkeypatch.setattr(Population, 'write', write_bad)  # precise statistics that are bad
    class Spoil(Callback):
        order = 40
        def after_train(self):
            if not good: self.model[1].running_var.fill_(1e-12)
    xs,ys = tilted(24),labels(24)
    cbs = [PreciseBN(keep_if_better='valid_loss'), Spoil(), Stats()]
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), cbs, metrics=accuracy)
    lines = []
    learn.logger = lines.append
    learn.fit(2, .1)
    bad = learn.model[1].running_var.max() < 1e-5
    assert not bad  # whichever was spoilt, the other was kept
    out = capsys.readouterr().out
    assert ('are kept' in out) == good
    assert [len(v) for v in learn.recorder.values] == [3,3] and all(len(o) == 5 for o in lines)
    final = learn.stats.valid[-1][1:]
    assert list(learn.validate()) == final

def test_saved_model_has_the_statistics_that_were_kept(tmp_path):
    learn = precise_fit(PreciseBN(keep_if_better='valid_loss'), 4, [SaveModelCallback(), Stats()], path=tmp_path)
    best = min(range(4), key=lambda i: learn.stats.valid[i][1])
    # the best is loaded at the end
    for k,v in learn.stats.stats[best].items(): assert torch.equal(learn.model.state_dict()[k], v)

def test_lr_find_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(fastai_bn.precise, 'measure', lambda *a, **k: 1/0)
    learn = get_learner(get_dls(tilted(24), labels(24), 2), conv_net(), PreciseBN(), path=tmp_path)
    with learn.no_logging(): learn.lr_find(num_it=30, show_plot=False)
    learn.validate()
    learn.get_preds()

def test_with_accumulation():
    xs,ys = tilted(24),labels(24)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(4, bn_bs='window'), PreciseBN()])
    do_fit(learn, 2)
    assert_pristine(learn)
    rm = learn.model[1].running_var.clone()
    precise_bn(learn.model, xs.split(2), progress=False)
    torch.testing.assert_close(rm, learn.model[1].running_var, rtol=1e-9, atol=0)

def pooled_head():
    pool = nn.AdaptiveAvgPool2d(1),nn.Flatten()
    return nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), *pool, nn.BatchNorm1d(4), nn.Linear(4,5)).double()

@pytest.mark.parametrize('bn_bs,size', [('window',8), (4,4)])
def test_the_bn_batch_is_that_of_the_training(bn_bs, size):
    "At bs=1 behind pooling there is no other"
    xs,ys = tilted(24),labels(24)
    learn = get_learner(get_dls(xs, ys, 1), pooled_head(), [AccumulateGradBN(8, bn_bs=bn_bs), PreciseBN()])
    measured = [] # the BN batches of the last pass, in the order of its own shuffling
    def keep(m, args):
        if m[1].training and not torch.is_grad_enabled(): measured.append(args[0])
    hook = learn.model.register_forward_pre_hook(keep)
    do_fit(learn)
    hook.remove()
    measured = measured[-24//size:]
    assert [len(x) for x in measured] == [size]*(24//size)
    ref = copy.deepcopy(learn.model)
    precise_bn(ref, measured, progress=False)
    torch.testing.assert_close(bn_state(learn.model), bn_state(ref), rtol=1e-9, atol=1e-12)
    learn.bn_report(plot=False)
    with pytest.raises(ValueError, match='precise_bn'): learn.precise_bn(bn_bs=1)

class Interrupt(Callback):
    order = 60
    def __init__(self, event): setattr(self, event, self.now)
    def now(self):
        if not self.training and self.learn.n_epoch == 1 or hasattr(self, 'after_train'): raise KeyboardInterrupt

@pytest.mark.parametrize('event', ['after_train','before_validate','after_loss','after_validate'])
@pytest.mark.parametrize('keep', [None, 'valid_loss'])
def test_an_interrupted_validation_leaves_nothing_behind(event, keep):
    xs,ys = tilted(24),labels(24)
    cb = Interrupt(event)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [PreciseBN(keep_if_better=keep), cb])
    with pytest.raises(KeyboardInterrupt): do_fit(learn)
    learn.remove_cb(cb)
    before = bn_state(learn.model)
    with learn.no_logging():
        learn.validate()
        learn.get_preds()
    torch.testing.assert_close(bn_state(learn.model), before, rtol=0, atol=0)
    assert '_do_epoch_validate' not in vars(learn)

@pytest.mark.parametrize('keep', [None, 'valid_loss'])
def test_others_may_validate_and_predict_meanwhile(keep):
    a = precise_fit(PreciseBN(keep_if_better=keep), 2)
    b = precise_fit(PreciseBN(keep_if_better=keep), 2, FetchPredsCallback())
    assert len(a.recorder.values) == 2 and all(len(v) == 3 for v in a.recorder.values)
    # predicting draws from `random`: another order in the precise pass
    assert list(a.recorder.values[-1]) == pytest.approx(list(b.recorder.values[-1]), rel=.01)

@pytest.mark.parametrize('name', ['_rmse', 'mse'])
def test_scores_of_which_lower_is_better(name):
    better,nan = fastai_bn.precise._better,float('nan')
    assert better(name, 1., 2.) and not better(name, 2., 1.)
    assert better(name, 1., nan) and not better(name, nan, 1.) and not better(name, nan, nan)
    assert better('accuracy', 2., 1.)

@pytest.mark.parametrize('keep', [None, 'valid_loss'])
def test_epochs_without_a_score(keep):
    class NoValid(Callback):
        def before_validate(self): raise CancelValidException
    learn = precise_fit(PreciseBN(keep_if_better=keep), 2, NoValid())
    assert learn.model[1].running_mean.abs().max() > 0
    precise_fit(PreciseBN(keep_if_better=keep), 2, ShortEpochCallback(pct=.3, short_valid=True))

@pytest.mark.parametrize('keep', ['time', 'train_loss'])
def test_no_score_to_compare(keep):
    cb = PreciseBN(keep_if_better=keep)
    with pytest.raises(ValueError, match=f"must be one of valid_loss, accuracy, got '{keep}'$"): precise_fit(cb)

def test_weights_that_are_not_finite_do_not_end_the_fit():
    class Diverge(Callback):
        def after_train(self): self.model[0].weight.data.fill_(float('nan'))
    with pytest.warns(UserWarning, match='PreciseBN, epoch 0.*not finite'):
        learn = precise_fit(PreciseBN(keep_if_better='valid_loss'), 2, Diverge())
    assert len(learn.recorder.values) == 2

def test_without_a_recorder():
    learn = get_learner(get_dls(tilted(24), labels(24), 2), conv_net(), PreciseBN())
    learn.remove_cbs([learn.progress] if hasattr(learn, 'progress') else [])
    learn.remove_cb(learn.recorder)
    learn.fit(1, .1)
    assert learn.model[1].running_mean.abs().max() > 0

def test_report_of_statistics_that_are_nan(capsys):
    learn = get_learner(get_dls(tilted(24), labels(24), 8), conv_net())
    learn.precise_bn()
    learn.model[4].running_var.fill_(float('nan'))
    assert "'4'" in learn.bn_report(plot=False).attrs['advice'][0]
    import matplotlib.pyplot as plt
    learn.bn_report()
    plt.close('all')

def test_weighted_dataloaders_keep_their_weights():
    from fastai.callback.data import WeightedDL
    xs,ys = tilted(32),labels(32)
    seen = set()
    class See(nn.Module):
        def forward(self, x):
            seen.update(i for i in range(32) if any(torch.equal(xs[i], o) for o in x))
            return x
    ds = Datasets(range(32), [[ItemOf(xs)],[ItemOf(ys)]])
    dl = WeightedDL(ds, bs=4, shuffle=True, num_workers=0, wgts=[1.]*4+[0.]*28)
    learn = get_learner(DataLoaders(dl, dl, device='cpu'), nn.Sequential(See(), *conv_net()))
    learn.precise_bn()
    assert seen == {0,1,2,3}

def test_a_samplers_own_generator_goes_on_as_if_nothing_was():
    g = torch.Generator().manual_seed(3)
    data = list(zip(tilted(20),labels(20)))
    dl = torch.utils.data.DataLoader(data, batch_size=4, sampler=torch.utils.data.RandomSampler(data, generator=g))
    state = g.get_state()
    precise_bn(conv_net(), dl, progress=False)
    assert torch.equal(g.get_state(), state)

def test_dict_batches_of_a_compiled_model():
    m,x = Named(),tilted(8)
    precise_bn(torch.compile(m, backend='eager'), [dict(image=x, label=labels(8))], progress=False)
    np.testing.assert_allclose(m.bn.running_var, reference([x])[1], rtol=1e-12)

def test_only_a_last_single_sample_joins():
    sizes = []
    m = nn.Sequential(nn.BatchNorm2d(3), nn.Identity()).double()
    m[0].register_forward_pre_hook(lambda m,a: sizes.append(len(a[0])))
    precise_bn(m, tilted(8).split([2,1,1,3,1]), progress=False)
    assert sizes == [2,1,1,4]

@pytest.mark.parametrize('kw', [dict(n=0), dict(every=0), dict(every=1.5), dict(n=True)])
def test_bad_arguments_of_the_callback(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be an integer >= 1'): PreciseBN(**kw)

def test_a_score_that_is_not_recorded():
    cb = PreciseBN(keep_if_better='f1')
    text = "`keep_if_better` must be one of valid_loss, accuracy, got 'f1'"
    with pytest.raises(ValueError, match=text): precise_fit(cb)

# --- Several processes

def _rank(rank, world, path, q):
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    x = tilted(11)
    m = first_bn()
    t = precise_bn(m, (x[:8].split(4) if rank==0 else x[8:].split(2)), progress=False)
    q.put((rank, m[0].running_mean.tolist(), m[0].running_var.tolist(), t.samples[0].item(), t['values'][0].item()))
    torch.distributed.destroy_process_group()

def _learner_rank(rank, world, path, q):
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    set_seed(0)  # as one does: then all would draw the same order
    learn = get_learner(get_dls(tilted(21), labels(21), 4, shuffle=True), first_bn())
    t = learn.precise_bn()
    mean,var = learn.model[0].running_mean.tolist(),learn.model[0].running_var.tolist()
    q.put((rank, mean, var, t.samples[0].item(), learn.precise_bn(n=8).samples[0].item()))
    torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_processes_share_a_learners_data(tmp_path):
    ctx = mp.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_learner_rank, args=(r, 2, tmp_path/'pg', q), daemon=True) for r in range(2)]
    [p.start() for p in ps]
    res = [q.get(timeout=120) for _ in ps]
    [p.join(60) for p in ps]
    mean,var = reference([tilted(21)])
    for _,m,v,samples,few in res:
        np.testing.assert_allclose(m, mean, rtol=1e-9)
        np.testing.assert_allclose(v, var, rtol=1e-9)
        assert samples == 21 and few == 8

@pytest.mark.slow
def test_two_processes_with_uneven_data(tmp_path):
    ctx = mp.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_rank, args=(r, 2, tmp_path/'pg', q)) for r in range(2)]
    [p.start() for p in ps]
    res = [q.get(timeout=120) for _ in ps]
    [p.join() for p in ps]
    mean,var = reference([tilted(11)])
    for _,m,v,samples,values in res:
        np.testing.assert_allclose(m, mean, rtol=1e-12)
        np.testing.assert_allclose(v, var, rtol=1e-12)
        assert samples == 11 and values == 11*36


# --- Nothing to measure

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn,self.l = nn.BatchNorm2d(3),nn.Linear(108,5)
    def forward(self, x): return self.l(x.flatten(1))

def test_report_of_layers_that_are_not_called(capsys):
    learn = get_learner(get_dls(tilted(12), labels(12), 4), Unused().double())
    t = learn.bn_report()
    assert t.samples.tolist() == [0] and 'No BN layer was called' in capsys.readouterr().out
    assert learn.precise_bn().samples.tolist() == [0]

def test_a_dataloader_that_does_not_say_its_batch_size():
    "`bn_bs='window'` is as many samples as come then; here batches are taken as they come"
    items = list(zip(tilted(12), labels(12)))
    dl = torch.utils.data.DataLoader(items, batch_sampler=[range(i, i+4) for i in range(0, 12, 4)])
    learn = get_learner(DataLoaders(dl, dl, device='cpu'), conv_net(), AccumulateGradBN(2, bn_bs='window'))
    assert learn.precise_bn().samples.tolist() == [12,12]
    ref = conv_net()
    precise_bn(ref, tilted(12).split(4), progress=False)
    torch.testing.assert_close(bn_state(learn.model), bn_state(ref), rtol=1e-12, atol=0)

def test_a_learner_without_training_data_says_so(tmp_path):
    xs,ys = tilted(12),labels(12)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), AccumulateGradBN(2, bn_bs='window'), path=tmp_path)
    do_fit(learn)
    learn.export('exported.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'exported.pkl')
    before = snapshot(new.model)
    for f in (new.precise_bn, lambda: new.bn_report(plot=False)):
        with pytest.raises(ValueError, match='no training data.*dl='): f()
    with pytest.raises(ValueError, match='no data.*dl'): new.precise_bn(dl=[])
    torch.testing.assert_close(snapshot(new.model), before, rtol=0, atol=0)
    new.precise_bn(dl=list(zip(xs.split(5), ys.split(5))))
    ref = copy.deepcopy(learn.model)
    precise_bn(ref, xs.split(5), bn_bs=8, progress=False)  # as that of the fit
    torch.testing.assert_close(bn_state(new.model), bn_state(ref), rtol=1e-10, atol=1e-12)

def test_lazy_layers_have_to_see_a_batch_first():
    def net():
        pool = nn.AdaptiveAvgPool2d(1),nn.Flatten()
        head = nn.LazyBatchNorm1d(affine=False),nn.LazyLinear(5)
        return nn.Sequential(nn.LazyConv2d(4,3), nn.LazyBatchNorm2d(), *pool, *head).double()
    xs,ys = tilted(16),labels(16)
    def learner(*cbs): return get_learner(get_dls(xs, ys, 4), net(), cbs)
    def capture(m):
        with capture_moments(bn_layers(m)): m(xs)
    calls = [lambda: precise_bn(net(), xs.split(4), progress=False), lambda: bn_state(net()), lambda: capture(net()),
             lambda: learner().precise_bn(), lambda: learner().bn_report(plot=False)]
    modes = {}, dict(bn_bs='window'), dict(bn_bs=2), dict(bn_bs='window', micro_bs=2)
    fits = [lambda kw=kw: do_fit(learner(AccumulateGradBN(2, **kw))) for kw in modes]
    for f in [*calls, *fits]:
        with pytest.raises(ValueError, match="layer '1' is lazy .*run a batch through the model first"): f()
    m = net()
    m(xs[:2])
    assert len(precise_bn(m, xs.split(4), progress=False)) == 2


# --- The model that is validated

class Average(Callback):
    "An average of the weights, brought in for the validation: as another model, or in place"
    def __init__(self, in_place=False, buffers=True, order=0):
        self.in_place,self.buffers,self.order = in_place,buffers,order

    def before_fit(self): self.avg,self.offs = copy.deepcopy(self.learn.model),[]
    def after_batch(self):
        if not self.training: return
        with torch.no_grad():
            for a,b in zip(self.avg.parameters(), self.learn.model.parameters()): a.lerp_(b, .1)
            for a,b in zip(self.avg.buffers(), self.learn.model.buffers()): a.copy_(b)
    def _state(self, m): return m.state_dict() if self.buffers else dict(m.named_parameters())
    def before_validate(self):
        if not self.in_place:
            self.kept,self.learn.model = self.learn.model,self.avg
            return
        self.kept = {k:v.detach().clone() for k,v in self._state(self.learn.model).items()}
        self._load(self._state(self.avg))
    def after_validate(self):
        self.offs.append(off(self.learn.model))
        if self.in_place: self._load(self.kept)
        else: self.learn.model = self.kept
    def _load(self, state):
        with torch.no_grad():
            for k,v in self._state(self.learn.model).items(): v.copy_(state[k])

DRIFT = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))*3+2

def off(m):
    "How far the running mean is from the population's, in standard deviations"
    y = m[0](DRIFT)
    return ((m[1].running_mean-y.mean(0))/y.std(0)).abs().max().item()

@pytest.mark.parametrize('order', [-50, 0, 70])
@pytest.mark.parametrize('kw', [dict(), dict(in_place=True), dict(in_place=True, buffers=False)], ids=str)
@pytest.mark.parametrize('keep', [None, 'valid_loss'])
def test_the_model_that_is_validated_has_precise_statistics(order, kw, keep):
    dl = DataLoader(list(zip(DRIFT, torch.randn(64,1, generator=torch.Generator().manual_seed(1)))), bs=8)
    torch.manual_seed(2)
    m = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), nn.Linear(4,1))
    cbs = [PreciseBN(keep_if_better=keep), Average(order=order, **kw)]
    learn = Learner(DataLoaders(dl, dl, device='cpu'), m, loss_func=MSELossFlat(), cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    with learn.no_logging(): learn.fit(3, .1)
    if keep is None: assert off(m) < 1e-3 and max(learn.average.offs) < 1e-3
    else: assert min(learn.average.offs) < 1e-3  # of two validations one has precise statistics
    assert learn.model is m and not {'_do_epoch_validate','all_batches','__reduce_ex__'} & vars(learn).keys()
    if not kw and keep is None: assert off(learn.average.avg) < 1e-3  # and it keeps them

@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('by', ['callback','metric'])
@pytest.mark.parametrize('keep', [None, 'valid_loss'])
def test_an_exception_in_validation_leaves_the_statistics_of_the_trained_weights(keep, by, exc):
    "Not those of the weights that were swapped in for it. With `keep_if_better` no score says that they are better"
    class Watch(Callback):
        order = 80
        def before_fit(self): self.runs = 0
        def after_train(self): self.moving = bn_state(self.learn.model)
        def before_validate(self): self.runs += 1
        def fails(self, where): return where == by and self.runs == (1 if keep is None else 2)
        def after_pred(self):
            if not self.training and self.fails('callback'): raise exc('in validation')
    watch = Watch()
    def metric(pred, targ):
        if watch.fails('metric'): raise exc('in validation')
        return pred.mean()
    dl = DataLoader(list(zip(DRIFT, torch.randn(64,1, generator=torch.Generator().manual_seed(1)))), bs=8)
    m = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), nn.Linear(4,1))
    cbs = [PreciseBN(keep_if_better=keep), Average(in_place=True, buffers=False), watch]
    learn = Learner(DataLoaders(dl, dl, device='cpu'), m, loss_func=MSELossFlat(), metrics=metric, cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    with learn.no_logging(), pytest.raises(exc): learn.fit(1, .1)
    assert watch.runs == (1 if keep is None else 2)
    assert off(m) > .01  # the average's weights are still there, and the statistics are not theirs
    learn.average._load(learn.average.kept)
    if keep is None: assert off(m) < 1e-3
    else: torch.testing.assert_close(bn_state(m), watch.moving, rtol=0, atol=0)
    assert not {'_do_epoch_validate','all_batches','__reduce_ex__'} & vars(learn).keys()


# --- Inputs by the learner's rule, and wrappers

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn,self.l = nn.BatchNorm1d(3),nn.Linear(5,1)
    def forward(self, image, meta): return self.l(torch.cat([self.bn(image), meta], 1))

class Anything(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.loss,self.net = nn.MSELoss(),net
    def forward(self, *args, **kwargs): return self.net(*args, **kwargs)

WRAPPERS = dict(
    plain=lambda m: m,
    averaged=AveragedModel,
    parallel=nn.DataParallel,
    own=Anything,
    nested=lambda m: Anything(AveragedModel(m)),
    compiled=lambda m: torch.compile(m, backend='eager'),
    compiled_own=lambda m: torch.compile(Anything(m), backend='eager'))

@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_dicts_for_wrapped_models(wrap):
    x = torch.randn(16,3)*2+1
    batches = [dict(image=x[i:i+4], meta=torch.randn(4,2), label=torch.zeros(4), name=['a']*4) for i in range(0,16,4)]
    net = Two()
    m = wrap(net)
    precise_bn(m, batches, progress=False)
    bn = next(o for o in m.modules() if isinstance(o, nn.BatchNorm1d))
    torch.testing.assert_close(bn.running_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bn.running_var, x.var(0), rtol=1e-5, atol=1e-5)

def test_inputs_are_all_but_the_last_where_the_dataloaders_do_not_say():
    x,z,y = torch.randn(16,3)*2+1,torch.randn(16,2),torch.randn(16,1)
    dl = torch.utils.data.DataLoader(list(zip(x, z, y)), batch_size=4)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), Two(), loss_func=MSELossFlat(), cbs=PreciseBN())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        for f in (learn.precise_bn, lambda: learn.bn_report(plot=False)): assert f().samples.tolist() == [16]
    torch.testing.assert_close(learn.model.bn.running_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    x = torch.randn(16,3)
    alone = DataLoader(list(zip(x)), bs=4)
    learn = Learner(DataLoaders(alone, alone, device='cpu'), nn.Sequential(nn.BatchNorm1d(3)), loss_func=noop)
    with learn.no_bar(): learn.precise_bn()
    torch.testing.assert_close(learn.model[0].running_mean, x.mean(0), rtol=1e-5, atol=1e-5)

def test_a_count_of_inputs_that_is_unknown():
    "All parts of a batch but the last, or the only one"
    x,z,y = torch.randn(16,3)*2+1,torch.randn(16,2),torch.randn(16,1)
    batches = list(zip(x.split(4), z.split(4), y.split(4)))
    a,b,alone = Two(),Two(),nn.Sequential(nn.BatchNorm1d(3))
    precise_bn(a, batches, n_inp=None, progress=False)
    precise_bn(b, batches, n_inp=2, progress=False)
    torch.testing.assert_close(bn_state(a), bn_state(b), rtol=0, atol=0)
    precise_bn(alone, [(xb,) for xb in x.split(4)], n_inp=None, progress=False)
    torch.testing.assert_close(alone[0].running_mean, x.mean(0))
    with pytest.raises(TypeError, match='meta'): precise_bn(Two(), batches, progress=False)  # 1 is the default

@pytest.mark.parametrize('n_inp', [0, -1, 1.5, True])
def test_bad_n_inp(n_inp):
    with pytest.raises(ValueError, match='`n_inp` must be an integer >= 1'):
        precise_bn(conv_net(), [tilted(4)], n_inp=n_inp)


# --- DataLoaders with a state of their own

def seen_by(dl, n=10_000):
    "The rows that `precise_bn` takes of a learner's training DataLoader"
    rows = []
    class Note(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)
        def forward(self, *xb):
            rows.extend(xb[-1][:,-1].tolist())
            return self.bn(xb[-1][:,-1:].float())
    learn = Learner(DataLoaders(dl, dl, device='cpu'), Note(), loss_func=noop)
    with learn.no_bar(): learn.precise_bn(n=n)
    return rows

X33 = torch.arange(33.)[:,None]

def test_weights_stay_and_equal_ones_give_every_row_once():
    from fastai.callback.data import WeightedDL
    ds = Datasets(range(33), [[ItemOf(X33)],[ItemOf(X33)]])
    def seen(wgts): return seen_by(WeightedDL(ds, bs=4, wgts=wgts, shuffle=True, drop_last=True, num_workers=0))
    assert sorted(seen([1.]*33)) == list(range(33))
    got = seen([float(i%2) for i in range(33)])
    assert len(got) == 33 and all(i%2 for i in got)

def test_tabular_rows_once():
    import pandas as pd
    from fastai.tabular.core import TabularPandas
    from fastai.tabular.all import RegressionBlock, TabularDataLoaders
    df = pd.DataFrame(dict(a=np.arange(33.), y=0.))
    columns = dict(procs=[], cat_names=[], cont_names=['a'], y_names='y', y_block=RegressionBlock())
    dls = TabularDataLoaders.from_df(df, **columns, bs=4, device='cpu', valid_idx=[32])
    assert sorted(seen_by(dls.train)) == list(range(32))

def test_a_choice_of_items_stays():
    from fastai.callback.data import PartialDL
    ds = Datasets(range(33), [[ItemOf(X33)],[ItemOf(X33)]])
    got = seen_by(PartialDL(ds, bs=4, partial_n=10, num_workers=0))
    assert len(got) == len(set(got)) == 10

def test_own_items_and_their_order_stay():
    class Odd(DataLoader):
        # which `new` does not know
        def __init__(self, *args, secret, **kwargs):
            super().__init__(*args, **kwargs)
            self.secret = secret
        def get_idxs(self): return [i for i in range(self.n) if i%self.secret]
    dl = Odd(list(zip(X33, X33)), bs=4, secret=3)
    assert seen_by(dl) == [i for i in range(33) if i%3]
    assert list(dl.get_idxs()) == [i for i in range(33) if i%3] and dl.fake_l.d is dl
    listed = DataLoader(list(zip(X33, X33)), bs=4, get_idxs=lambda: [7,7,3])
    assert seen_by(listed) == [7,7,3]

def test_the_training_dataloader_draws_as_if_nothing_had_been():
    def idxs(measure):
        set_seed(3)
        dl = DataLoader(list(zip(X33, X33)), bs=4, shuffle=True)
        if measure: seen_by(dl)
        return [b[0].flatten().tolist() for b in dl]
    assert idxs(True) == idxs(False)

@pytest.mark.parametrize('workers', [0, 1])
def test_copies_of_dataloaders_with_workers(workers):
    dl = DataLoader(list(zip(X33, X33)), bs=4, shuffle=True, drop_last=True, num_workers=workers)
    assert sorted(seen_by(dl)) == list(range(33)) and len(list(dl)) == 8
