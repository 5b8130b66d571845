import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastai_bn.moments import *
from helpers import F64, conv_net, tilted

def of(moments): return dict(moments.items())


@pytest.mark.parametrize('sizes', [(8,), (1,1,1,1,1,1,1,1), (3,5), (1,6,1)])
def test_merged_parts_are_the_whole(sizes):
    x = tilted(8)
    parts = [Moments.of(o) for o in x.split(list(sizes))]
    m = parts[0].merge(*parts[1:])
    ref = x.numpy().transpose(1,0,2,3).reshape(3,-1)
    assert m.count == ref.shape[1]
    np.testing.assert_allclose(m.mean, ref.mean(1), rtol=1e-12)
    np.testing.assert_allclose(m.var(), ref.var(1, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(m.var(unbiased=False), ref.var(1), rtol=1e-12)
    if len(sizes) > 1:  # the mean of variances is something else
        assert not np.allclose(np.mean([p.var(unbiased=False).numpy() for p in parts], 0), ref.var(1), rtol=.05)

def test_merge_changes_neither():
    a,b = Moments.of(tilted(4)),Moments.of(tilted(3, seed=1))
    before = [o.clone() for o in (a.mean,a.m2,b.mean,b.m2)]
    a.merge(b)
    assert all(torch.equal(p,q) for p,q in zip(before, (a.mean,a.m2,b.mean,b.m2)))

def test_merge_with_nothing():
    a = Moments.of(tilted(4))
    none = Moments(0, torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64))
    for m in (a.merge(none), none.merge(a)):
        assert m.count==a.count and torch.allclose(m.mean, a.mean) and torch.allclose(m.m2, a.m2)

def test_float32_at_mean_5000():
    x = torch.randn(64,2,8,8) + 5000
    ref = x.double().var((0,2,3))
    parts = [Moments.of(o) for o in x.split(2)]
    torch.testing.assert_close(parts[0].merge(*parts[1:]).var().double(), ref, rtol=1e-3, atol=0)
    bn = nn.BatchNorm2d(2)
    total = BNMoments()
    for o in x.split(2):
        with capture_moments({'bn':bn}) as cap: bn(o)
        total = total.merge(cap.moments)
    torch.testing.assert_close(of(total)['bn'].var(), ref, rtol=1e-3, atol=0)
    naive = x.square().mean((0,2,3)) - x.mean((0,2,3))**2
    assert ((naive-ref)/ref).abs().max() > .1

def test_bn_layers():
    shared = nn.BatchNorm1d(2)
    inner = nn.Sequential(shared, nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    m = nn.Sequential(nn.BatchNorm2d(2), shared, inner, nn.GroupNorm(1,2), nn.InstanceNorm2d(2))
    assert list(bn_layers(m)) == ['0','1','2.1','2.2']
    assert list(bn_layers(nn.BatchNorm2d(2))) == ['']


BNS = [(nn.BatchNorm1d,(),8), (nn.BatchNorm1d,(5,),4), (nn.BatchNorm2d,(4,4),2), (nn.BatchNorm3d,(2,3,4),2),
       (nn.SyncBatchNorm,(4,4),2)]

@pytest.mark.parametrize('momentum', [.1, .37, None])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('cls,size,bs', BNS)
def test_capture_then_update_is_what_torch_does(cls, size, bs, affine, momentum):
    a = cls(3, momentum=momentum, affine=affine).double()
    b = copy.deepcopy(a)
    for seed in range(3):
        x = tilted(bs, size=size, seed=seed)
        before = {k:v.clone() for k,v in a.state_dict().items()}
        with capture_moments({'bn':a}) as cap: y = a(x)
        assert all(torch.equal(before[k], v) for k,v in a.state_dict().items())  # not yet
        assert torch.equal(y, b(x))
        update_running_stats({'bn':a}, cap.moments)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-13, atol=1e-13)

def test_timm_bn_with_activation():
    timm = pytest.importorskip('timm')
    a = timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout).double()
    b = copy.deepcopy(a)
    x = tilted(4)
    torch.manual_seed(0)
    with capture_moments(bn_layers(a)) as cap: y = a(x)
    torch.manual_seed(0)
    assert torch.equal(y, b(x)) and (y>=0).all()
    update_running_stats(bn_layers(a), cap.moments)
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-13, atol=1e-13)

def test_gradients_are_the_native_ones():
    m,x = conv_net(),tilted(4)
    def grads():
        m.zero_grad()
        m(x).square().sum().backward()
        return [p.grad.clone() for p in m.parameters()]
    ref = grads()
    with capture_moments(bn_layers(m)): got = grads()
    assert all(torch.equal(p,q) for p,q in zip(ref,got))

def test_a_layer_used_twice_pools():
    bn = nn.BatchNorm2d(3).double()
    x,y = tilted(4),tilted(2, seed=1)
    with capture_moments({'bn':bn}) as cap:
        bn(x)
        bn(y)
    both = Moments.of(torch.cat([x,y]))
    torch.testing.assert_close(of(cap.moments)['bn'].var(), both.var(), rtol=1e-12, atol=0)
    assert of(cap.moments)['bn'].count == both.count

def test_what_does_not_count():
    layers = dict(ev=nn.BatchNorm2d(3).eval(), untracked=nn.BatchNorm2d(3, track_running_stats=False),
                  off=nn.BatchNorm2d(3), unused=nn.BatchNorm2d(3))
    layers['off'].track_running_stats = False
    before = copy.deepcopy({k:m.state_dict() for k,m in layers.items()})
    x = tilted(4).float()
    with capture_moments(layers) as cap:
        for k in ('ev','untracked','off'): layers[k](x)
    assert of(cap.moments) == {}
    update_running_stats(layers, cap.moments)
    torch.testing.assert_close(before, {k:m.state_dict() for k,m in layers.items()}, rtol=0, atol=0)

def test_empty_batch_counts_for_nothing():
    bn = nn.BatchNorm2d(3).double()
    x = tilted(4)
    with capture_moments({'bn':bn}) as cap:
        bn(x)
        bn(x[:0])
    torch.testing.assert_close(of(cap.moments)['bn'].mean, x.mean((0,2,3)))

def test_nan_does_not_outlive_its_capture():
    bn = nn.BatchNorm2d(3).double()
    x = tilted(4)
    with capture_moments({'bn':bn}) as cap: bn(x*float('nan'))
    assert of(cap.moments)['bn'].mean.isnan().all()
    with capture_moments({'bn':bn}) as cap: bn(x)
    assert of(cap.moments)['bn'].mean.isfinite().all() and bn.running_mean.isfinite().all()

class Boom(nn.Module):
    def forward(self, x): raise KeyboardInterrupt

def test_exceptions_restore():
    bn = nn.BatchNorm2d(3)
    m = nn.Sequential(bn, Boom())
    bn_in_forward = nn.BatchNorm2d(7)  # raises inside its own forward: wrong number of channels
    rm,nbt = bn.running_mean,bn.num_batches_tracked
    with pytest.raises(KeyboardInterrupt):
        with capture_moments(bn_layers(m)): m(torch.randn(2,3,4,4))
    with pytest.raises(RuntimeError):
        with capture_moments({'b':bn_in_forward}): bn_in_forward(torch.randn(2,3,4,4))
    for l in (bn, bn_in_forward):
        assert 'forward' not in l.__dict__ and l.momentum == .1
        assert l.num_batches_tracked == 0 and (l.running_var==1).all()
    # the objects themselves: references to them stay good
    assert bn.running_mean is rm and bn.num_batches_tracked is nbt

def test_somebody_elses_forward_stays():
    bn = nn.BatchNorm2d(3)
    orig,calls = bn.forward,[]
    mine = lambda x: (calls.append(1), orig(x))[1]
    bn.forward = mine
    with capture_moments({'bn':bn}) as cap: bn(torch.randn(2,3,4,4))
    assert calls == [1] and bn.__dict__['forward'] is mine and 'bn' in of(cap.moments)

def test_inner_capture_gets_the_moments():
    bn = nn.BatchNorm2d(3)
    x = torch.randn(2,3,4,4)
    with capture_moments({'bn':bn}) as outer:
        with capture_moments({'bn':bn}) as inner: bn(x)
        assert of(inner.moments) and not of(outer.moments)
        bn(x)
        assert of(outer.moments)
    assert 'forward' not in bn.__dict__

def test_one_value_per_channel_names_the_layer():
    m = nn.Sequential(nn.Conv2d(3,4,1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"layer '1\.1' \(BatchNorm2d.*at least 2 samples"):
        with capture_moments(bn_layers(m)): m(torch.randn(1,3,4,4))

def test_half_precision_buffers():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)).bfloat16()
    with capture_moments(bn_layers(m)) as cap: m(torch.randn(8,3,6,6).bfloat16())
    update_running_stats(bn_layers(m), cap.moments)
    assert m[1].running_var.dtype == torch.bfloat16 and of(cap.moments)['1'].mean.dtype == F64

def test_autocast_and_channels_last():
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    x = torch.randn(8,3,6,6).to(memory_format=torch.channels_last)
    with torch.autocast('cpu', dtype=torch.bfloat16), capture_moments(bn_layers(m)) as cap: m(x)
    ref = Moments.of(m[0](x))
    torch.testing.assert_close(of(cap.moments)['1'].var().float(), ref.var(), rtol=.05, atol=1e-3)

def test_layers_of_several_dtypes_and_widths():
    layers = dict(a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(65).double(), c=nn.BatchNorm2d(64).bfloat16(),
                  d=nn.BatchNorm2d(1))
    refs,total = copy.deepcopy(layers),BNMoments()
    xs = {k:tilted(4, m.num_features).to(m.weight.dtype) for k,m in layers.items()}
    for _ in range(2):
        with capture_moments(layers) as cap:
            for k,m in layers.items(): assert torch.equal(m(xs[k]), refs[k](xs[k]))
        update_running_stats(layers, cap.moments)
        total = total.merge(cap.moments)
    for k,m in layers.items():
        tol = dict(rtol=2e-2, atol=1e-2) if k == 'c' else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m.state_dict(), refs[k].state_dict(), **tol)
        assert of(total)[k].count == 2*4*36 and of(total)[k].mean.shape == (m.num_features,)

def test_captures_of_different_layers_do_not_merge():
    x = torch.randn(4,3,5,5)
    ms = []
    for k in 'ab':
        bn = nn.BatchNorm2d(3)
        with capture_moments({k:bn}) as cap: bn(x)
        ms.append(cap.moments)
    with pytest.raises(ValueError, match='different layers'): ms[0].merge(ms[1])
    assert of(BNMoments().merge(ms[0])).keys() == of(ms[0].merge(BNMoments())).keys() == {'a'}
