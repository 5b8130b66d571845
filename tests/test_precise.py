import random

import numpy as np, pytest, torch
import torch.multiprocessing as mp
from torch import nn
from fastai.basics import DataLoader, DataLoaders, Datasets, TfmdDL

from fastai_bn.precise import *
from conftest import At, F64, conv_net, get_dls, get_learner, labels, snapshot, tilted


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

@pytest.mark.parametrize('cls,size', [(nn.BatchNorm1d,()), (nn.BatchNorm1d,(7,)), (nn.BatchNorm3d,(2,3,4)), (nn.SyncBatchNorm,(4,4))])
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
    np.testing.assert_allclose(m[0].running_mean, reference([x])[0], rtol=1e-7)

def test_dropout_is_off_and_comes_back():
    m = nn.Sequential(nn.Dropout(.9), nn.BatchNorm2d(3), nn.Dropout(.3).eval(), nn.BatchNorm2d(3).eval()).double()
    modes = [o.training for o in m.modules()]
    x = tilted(16)
    precise_bn(m, x.split(4), progress=False)
    np.testing.assert_allclose(m[1].running_var, reference([x])[1], rtol=1e-12)
    assert [o.training for o in m.modules()] == modes
    assert (m[3].running_var != 1).any()  # eval mode is no reason to leave a layer out: a model is in it after validation

def test_a_layer_used_twice_or_never():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.twice,self.never = nn.BatchNorm2d(3),nn.BatchNorm2d(5)
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
    torch.testing.assert_close([m[i].running_var for i in (1,4)], [ref[i].running_var for i in (1,4)], rtol=1e-12, atol=0)

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
    assert t.columns.tolist() == ['layer','channels','samples','values','mean_shift','var_ratio']
    assert t.layer[0] == '0' and t.channels[0] == 3
    assert t.mean_shift[0] == pytest.approx(.5, rel=1e-9) and t.var_ratio[0] == pytest.approx(4**(1/3), rel=1e-9)
    t = precise_bn(m, [x], progress=False)
    assert t.mean_shift[0] < 1e-12 and t.var_ratio[0] == pytest.approx(1, rel=1e-12)

def test_blank_channels():
    x = tilted(8); x[:,1] = 0
    m = first_bn()
    t = precise_bn(m, [x], progress=False)
    assert m[0].running_var[1] == 0 and np.isfinite(t.var_ratio[0]) and np.isfinite(t.mean_shift[0])

def test_batches_of_all_shapes():
    x,y = tilted(4),labels(4)
    ref = first_bn(); precise_bn(ref, [x], progress=False)
    for b in (x, (x,), (x,y), [x,y]):
        m = first_bn(); precise_bn(m, [b], progress=False)
        assert torch.equal(m[0].running_var, ref[0].running_var)
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm2d(3).double()
        def forward(self, a, b): return self.bn(a+b)
    m = Two(); precise_bn(m, [(x,x,y)], n_inp=2, progress=False)
    np.testing.assert_allclose(m.bn.running_var, reference([2*x])[1], rtol=1e-12)

def test_a_last_batch_of_one_behind_pooling():
    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)).double()
    x = tilted(9)
    assert precise_bn(m, x.split(4), progress=False).samples[0] == 9
    np.testing.assert_allclose(m[2].running_var, reference([x.mean((2,3))])[1], rtol=1e-12)
    with pytest.raises(ValueError, match="layer '2'"): precise_bn(m, x.split(1), progress=False)

# --- Nothing else changes

def rng(): return random.random(), np.random.rand(), torch.rand(1).item()

def test_random_numbers_go_on_as_if_nothing_was():
    learn = get_learner(get_dls(tilted(20), labels(20), 4, shuffle=True), conv_net())
    def after(f):
        random.seed(1); np.random.seed(1); torch.manual_seed(1)
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
        dl = torch.utils.data.DataLoader(list(zip(x,labels(20))), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
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
    m.insert(2, Bad()); m[0].eval(); m.train(False); m[3].train()
    before,modes = snapshot(m),[o.training for o in m.modules()]
    state = torch.get_rng_state()
    with pytest.raises(exc): precise_bn(m, data())
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)
    assert [o.training for o in m.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any('forward' in o.__dict__ for o in m.modules()) and m[1].momentum == .1

def test_values_that_are_not_finite():
    x = tilted(8); x[5,1,2,2] = float('nan')
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

# --- Learner

def test_learner_takes_all_of_the_training_set():
    xs = tilted(21)
    learn = get_learner(get_dls(xs, labels(21), 4, drop_last=True, shuffle=True, valid=(xs[:3],labels(3))), first_bn(), cbs=[])
    learn.model(xs)
    t = learn.precise_bn()
    assert t.samples[0] == 21
    np.testing.assert_allclose(learn.model[0].running_var, reference([xs])[1], rtol=1e-9)
    assert learn.precise_bn(n=10).samples[0] == 12

def test_learner_on_another_domain():
    xs = tilted(21)
    learn = get_learner(get_dls(xs, labels(21), 4), first_bn())
    other = 5*tilted(10, seed=3)+2
    for dl in (get_dls(other, labels(10), 5).valid, torch.utils.data.DataLoader(list(zip(other,labels(10))), batch_size=5), other.split(5)):
        learn.model[0].reset_running_stats()
        learn.precise_bn(dl=dl)
        np.testing.assert_allclose(learn.model[0].running_mean, reference([other])[0], rtol=1e-9)

def test_multi_input_learner():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn,self.l = nn.BatchNorm2d(3),nn.Linear(3,5)
        def forward(self, a, b): return self.l(self.bn(a+b).mean((2,3)))
    xs,ys = tilted(8).float(),labels(8)
    ds = Datasets(range(8), [[At(xs)],[At(xs)],[At(ys)]], n_inp=2)
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
    with pytest.raises(ValueError, match='n='): precise_bn(conv_net(), [tilted(4)], n=n)

def test_a_tensor_is_no_batches():
    with pytest.raises(ValueError, match='split'): precise_bn(conv_net(), tilted(4))

def test_no_data():
    m = conv_net(); before = snapshot(m)
    with pytest.raises(ValueError, match='no batch'): precise_bn(m, [])
    torch.testing.assert_close(snapshot(m), before, rtol=0, atol=0)

@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(3,3,3)), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), nn.Sequential(nn.BatchNorm2d(3).requires_grad_(False))])
def test_nothing_to_update_says_so(model):
    with pytest.warns(UserWarning, match='no layer to update'): t = precise_bn(model, [tilted(4)])
    assert len(t) == 0 and 'mean_shift' in t

# --- Several processes

def _rank(rank, world, path, q):
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    x = tilted(11)
    m = first_bn()
    t = precise_bn(m, (x[:8].split(4) if rank==0 else x[8:].split(2)), progress=False)
    q.put((rank, m[0].running_mean.tolist(), m[0].running_var.tolist(), t.samples[0].item(), t['values'][0].item()))
    torch.distributed.destroy_process_group()

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
