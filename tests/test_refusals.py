"""A device that refuses memory costs time and nothing else: whatever it refuses, and whenever, results are the same

The device is simulated: a dispatch mode below the pager counts activations and refuses what is too much"""
import gc
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode
from fastai.vision.all import Callback, CrossEntropyLossFlat, MixUp, set_seed

from fastai_bn import storages
from fastai_bn.all import AccumulateGradBN, ActivationPager, precise_bn
from fastai_bn.counting import largest_piece
from fastai_bn.processes import Ranks
from fastai_bn.refusals import CALM
from helpers import (
    CPUScaler, DoAt, RaiseAt, assert_same, assert_same_bits, assert_same_fit, do_fit, get_dls, get_learner, labels,
    learner, one_cycle, quiet_budget, rounding, tensors, tilted, wide_dls)

pytestmark = quiet_budget

@pytest.fixture(scope='module', autouse=True)
def _all_move():
    "Also in fixtures of this module"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(storages, 'MIN_BYTES', 256)
        yield

EMPTY,RESIZE = nn.Module(),torch.UntypedStorage.resize_
@pytest.fixture(autouse=True)
def _no_mode_stays():
    "A device of a test that failed is not that of the next"
    yield
    while torch._C._len_torch_dispatch_stack(): _pop_mode()
    torch.UntypedStorage.resize_ = RESIZE

OOM = torch.OutOfMemoryError('Tried to allocate 2.00 GiB')

class Device(TorchDispatchMode):
    """Refuse what makes activations take more than `size` bytes, or the `at`-th operations that make any.

    It refuses after the operation has run, so that all that it writes to is written already. What returns from the
    host is refused, too"""
    counts = Counter()  # of refusals: an attribute of the device itself would be undone with a window
    def __init__(self, model, size=None, at=(), error=OOM):
        super().__init__()
        del Device.counts[id(self)]
        self.model,self.size,self.at,self.error = model,size,at,error
        self.known,self.made = {},0

    @property
    def refused(self): return Device.counts[id(self)]

    def __enter__(self):
        device,grow = self,torch.UntypedStorage.resize_
        def resize_(st, n):
            more = n-st.nbytes()
            if st._cdata in device.known and device.size is not None and more > 0 and device.used()+more > device.size:
                device.refuse()
            return grow(st, n)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.UntypedStorage, 'resize_', resize_)
        return super().__enter__()

    def __exit__(self, *exc):
        self.patch.undo()
        return super().__exit__(*exc)

    def weights(self):
        "Storages that are no activations"
        found = [*self.model.parameters(), *self.model.buffers()]
        found += [p.grad for p in self.model.parameters() if p.grad is not None]
        return {t.untyped_storage()._cdata for t in found}

    def used(self):
        storages,weights = {k:r() for k,r in self.known.items()},self.weights()
        self.known = {k:r for k,r in self.known.items() if storages[k] is not None}
        return sum(st.nbytes() for k,st in storages.items() if st is not None and k not in weights)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tensors(args, kwargs)}
        out = func(*args, **(kwargs or {}))
        self.made += any(t.untyped_storage()._cdata not in before for t in tensors(out))
        storages = [t.untyped_storage() for t in tensors(args, kwargs, out)]
        self.known.update({st._cdata:weakref.ref(st) for st in storages})
        if self.made in self.at or self.size is not None and self.used() > self.size: self.refuse()
        return out

    def refuse(self):
        Device.counts[id(self)] += 1
        self.at = [i for i in self.at if i != self.made]
        raise type(self.error)(*self.error.args)

def deep():
    torch.manual_seed(1)
    block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    body = nn.Conv2d(3, 8, 1),*[block() for _ in range(5)],nn.Dropout(.2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

class Within(Callback):
    "Training is on a `Device`, but for the optimizer's step; forward passes are counted by window"
    order = 90
    def __init__(self, **kw): self.kw = kw
    def before_fit(self):
        self.device,self.calls,self.is_on = Device(self.model, **self.kw),[],False
        self.hook = self.model.register_forward_hook(self.called)
    def called(self, *_):
        if self.training: self.calls.append((self.epoch, getattr(self.learn, 'iter', None)))
    def before_batch(self): self.switch(self.training)
    def after_backward(self): self.switch(False)
    def after_cancel_fit(self): self.switch(False)
    def after_fit(self): self.hook.remove()
    def switch(self, on):
        if on and not self.is_on: self.device.__enter__()
        if self.is_on and not on: self.device.__exit__(None, None, None)
        self.is_on = on

def fit(within=None, n_epoch=2, make=deep, cbs=(), n=48, bs=2, n_step=8, train=one_cycle, loss_func=None,
        **kw):
    set_seed(3)
    mine = [] if within is None else [within]
    acc = AccumulateGradBN(n_step, **{**dict(bn_bs='window', budget='auto'), **kw})
    learn = learner(wide_dls(n, bs), make(), [*mine, *cbs, acc], loss_func=loss_func or CrossEntropyLossFlat())
    return train(learn, n_epoch)

@pytest.fixture(scope='module')
def undisturbed():
    learn = fit()
    assert not learn.accumulate_grad_bn.pager.refused and not learn.accumulate_grad_bn.pager.moved
    return learn


# Fits

@pytest.mark.parametrize('share', [.8, .6, .45])
def test_a_smaller_device_changes_nothing(undisturbed, share):
    peak = undisturbed.accumulate_grad_bn.pager.peak
    within = Within(size=int(share*peak))
    learn = fit(within)
    pager = learn.accumulate_grad_bn.pager
    assert_same_fit(undisturbed, learn)
    print(f'{share:.0%}: refused {within.device.refused} times in {len(within.calls)} windows, limit {pager.limit:,}')
    assert within.calls == sorted(set(within.calls))  # each window ran once
    assert 0 < pager.refused == within.device.refused <= len(within.calls) and pager.moved
    assert pager.limit >= pager.need

@pytest.mark.parametrize('k', range(25))
def test_one_refusal_anywhere_changes_nothing(undisturbed, k):
    within = Within(at=[2+3*k])
    learn = fit(within)
    assert within.device.refused == learn.accumulate_grad_bn.pager.refused == 1
    assert_same_fit(undisturbed, learn)
    assert within.calls == sorted(set(within.calls))

@pytest.mark.parametrize('kw', [
    dict(cbs=lambda: [CPUScaler()]), dict(cbs=lambda: [MixUp()]), dict(micro_bs=3), dict(bn_bs=4), dict(bn_bs=None)],
    ids=['amp','mixup','lockstep','int','none'])
def test_other_ways_to_train(kw):
    cbs = kw.pop('cbs', tuple)
    ref = fit(cbs=cbs(), **kw)
    peak,need = ref.accumulate_grad_bn.pager.peak,ref.accumulate_grad_bn.pager.need
    learn = fit(Within(size=max(int(.6*peak), int(1.1*need))), cbs=cbs(), **kw)
    assert_same_fit(ref, learn)
    assert learn.accumulate_grad_bn.pager.refused

def test_lr_find_and_validation_inside_the_fit(undisturbed):
    def search(learn, n_epoch):
        with learn.no_logging(), learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
        return one_cycle(learn, n_epoch)
    size = int(.6*undisturbed.accumulate_grad_bn.pager.peak)
    a,b = fit(train=search),fit(Within(size=size), train=search)
    assert_same_fit(a, b)
    assert b.accumulate_grad_bn.pager.refused

def test_precise_bn(undisturbed):
    "Its own pager"
    x,_ = next(iter(wide_dls(48, 16).train))
    a,b = deep(),deep()
    precise_bn(a, [x], 16, bn_bs=16, budget='auto', progress=False)
    with Device(b, at=[3, 7]) as device: precise_bn(b, [x], 16, bn_bs=16, budget='auto', progress=False)
    assert device.refused == 2
    assert_same_bits(a, b)


# One operation

class Nth(TorchDispatchMode):
    "Refuse the `n`-th operation, after it has run; with `twice`, the one after it, too"
    def __init__(self, n, error=OOM, twice=False):
        super().__init__()
        self.n,self.error,self.twice,self.seen = n,error,twice,0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += 1
        if self.seen == self.n or self.twice and self.seen == self.n+1: raise type(self.error)(*self.error.args)
        return out

def normalised(x):
    bn = nn.BatchNorm1d(10)
    return torch.cat([bn(x.view(100, 10)).flatten(), bn.running_mean, bn.running_var, bn.num_batches_tracked.view(1)])

def drawn(x):
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    return torch.cat([F.dropout(x, .5), torch.rand(3, generator=g), x.new_empty(5).uniform_(), torch.randperm(4)*1.])

WRITE = dict(
    in_place=lambda x: x.add_(1),
    in_place_with_memory=lambda x: x.cumsum_(0),
    view=lambda x: x[10:500].mul_(2),
    accumulate=lambda x: x.index_put_((torch.tensor([3,3,5]),), torch.ones(3), accumulate=True),
    copy=lambda x: x[5:].copy_(x[:-5].clone()),
    out=lambda x: torch.add(x, 1, out=x),
    larger_out=lambda x: torch.cat([x, x], out=x.new_empty(0)),
    two_outs=lambda x: torch.cat(torch.topk(-x, 5, out=(x.new_empty(5), torch.empty(5, dtype=torch.long)))),
    several=lambda x: (torch._foreach_add_([x], 1.), x)[1],
    resized=lambda x: x.resize_(1500)[:1000]*1,
    batch_norm=normalised,
    random=drawn)

@pytest.mark.parametrize('name', WRITE)
def test_what_is_written_to_is_written_once(name):
    x = torch.arange(1000.)
    with (ops := Nth(0)): want = WRITE[name](x)
    for n in range(1, ops.seen+1):
        x = torch.arange(1000.)
        with Nth(n), ActivationPager('auto') as pager: got = WRITE[name](x)
        assert torch.equal(got, want) and pager.refused == 1, n

def test_what_fails_in_the_end_is_as_before():
    x,mean,var = torch.arange(1000.).view(100, 10),torch.zeros(10),torch.ones(10)
    writers = lambda: x.cumsum_(0),lambda: F.batch_norm(x, mean, var, training=True),lambda: torch.rand(3)
    before,state = x.clone(),torch.get_rng_state()
    for f in writers:
        with pytest.raises(torch.OutOfMemoryError, match=r'2\.00 GiB\n.*micro_bs'):
            with Nth(1, twice=True), ActivationPager('auto'): f()
    assert torch.equal(x, before) and not mean.any() and (var == 1).all()
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('error', [
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')], ids=['cublas','cudnn'])
def test_libraries_say_so_in_words(error):
    x = torch.ones(1000)
    with Nth(1, error), ActivationPager('auto') as pager: y = x+1
    assert (y == 2).all() and pager.refused == 1

@pytest.mark.parametrize('error', [MemoryError('host'), RuntimeError('shapes'), ValueError('x')])
def test_other_errors_pass(error):
    x = torch.ones(1000)
    with pytest.raises(type(error), match=str(error)), Nth(1, error), ActivationPager('auto') as pager: x+1
    assert not pager.refused

def test_a_number_is_a_number():
    "With a budget in bytes an error of the device is an error"
    x = torch.ones(1000)
    with pytest.raises(torch.OutOfMemoryError, match='GiB$'), Nth(1), ActivationPager('1GiB'): x+1

@pytest.mark.parametrize('n', range(1, 7))
def test_a_refused_return(monkeypatch, n):
    "Memory for what returns is refused, in mid-block or at its end"
    a,b = torch.ones(1000),torch.full((1000,), 2.)
    grow,seen = torch.UntypedStorage.resize_,[]
    def resize_(st, size):
        if size:
            seen.append(size)
            if len(seen) == n: raise type(OOM)(*OOM.args)
        return grow(st, size)
    x = torch.arange(1000.)
    with ActivationPager('auto') as pager:
        y = x+a
        block = pager._block
        block.refusals.let_leave()
        monkeypatch.setattr(torch.UntypedStorage, 'resize_', resize_)
        z = (x*b).sum() + (y*a).sum()
    monkeypatch.undo()
    assert z == (x*2).sum() + (x+1).sum() and torch.equal(y, x+1)
    assert len(seen) >= n or n > 4

def test_nothing_is_kept_alive():
    "While the operation runs again, nothing that its first try made is there"
    made = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(r() is not None for r in made)
            out = func(*args, **(kwargs or {}))
            if made: return out
            made.append(weakref.ref(out))
            raise type(OOM)(*OOM.args)
    x = torch.ones(1000)
    gc.disable()
    try:
        with Watch(), ActivationPager('auto'): y = x+1
    finally: gc.enable()
    assert made and (y == 2).all()


# The limit

def windows(pager, n, device=nullcontext):
    for _ in range(n):
        x = torch.ones(50_000)
        with device(), pager:
            saved = [x*i for i in range(10)]
            sum(saved)
            del saved

def test_the_limit_is_learned_kept_and_rises():
    pager,size = ActivationPager('auto'),1_200_000
    small = lambda: Device(EMPTY, size)
    windows(pager, 2, small)
    limit,refused = pager.limit,pager.refused
    assert refused and pager.need <= limit <= size
    windows(pager, CALM-2, small)
    assert (pager.limit,pager.refused) == (limit,refused)
    windows(pager, 40*CALM)  # others have given back their memory
    assert pager.limit is None and pager.refused == refused
    before = pager.moved
    windows(pager, 2)
    assert pager.moved == before

def test_a_limit_that_is_right_is_left_alone_more_and_more():
    pager = ActivationPager('auto')
    at = []
    for i in range(100):
        before = pager.refused
        windows(pager, 1, lambda: Device(EMPTY, 1_200_000))
        if pager.refused > before: at.append(i)
    gaps = [b-a for a,b in zip(at[1:], at[2:])]
    assert 2 <= len(gaps) and all(b >= 1.5*a for a,b in zip(gaps, gaps[1:])), at

def test_the_limit_is_not_below_one_operation():
    pager,x = ActivationPager('auto'),torch.ones(1000)
    with Nth(2), pager:
        torch.cat([x]*20)
        x+1
    assert pager.limit >= pager.need > 20*4000


# Pieces

def fit64(*cbs, n=32, n_step=8, bs=2, **kw):
    "A fit in float64 of windows of 16"
    set_seed(3)
    xs,ys = tilted(n, size=(16,16)),labels(n)
    model = deep().double()
    model[6].p = 0  # in pieces masks are others
    learn = get_learner(get_dls(xs, ys, bs), model, [*cbs, AccumulateGradBN(n_step, bn_bs='window', **kw)])
    do_fit(learn)
    return learn

def piece_of(learn): return learn.accumulate_grad_bn.piece

@pytest.fixture(scope='module')
def plan():
    "What operations of a window of 16 need, by the samples that they see"
    # The plan's loss is in float64, which fastai's Recorder does not take
    return {k:fit64(budget='1GiB', micro_bs=k).accumulate_grad_bn.pager.need+4 for k in range(1, 17)}

@pytest.mark.parametrize('k', [16, 15, 9, 4, 2, 1])
def test_the_plan_finds_the_largest_pieces(plan, k):
    learn = fit64(budget=plan[k], micro_bs='auto')
    assert piece_of(learn) == (k if k < 16 else None)
    assert learn.accumulate_grad_bn.pager.need <= plan[k]
    assert_same(learn.model, fit64().model, rounding(gain=1e3))
    if k == 16: assert_same_bits(learn.model, fit64().model)

def test_not_even_one_sample_fits(plan): assert piece_of(fit64(budget=plan[1]//2, micro_bs='auto')) == 1

@pytest.mark.parametrize('n', [2, 7, 64, 1000])
def test_few_sizes_are_tried(n):
    tried = []
    def floor(k):
        tried.append(k)
        return 500+10*k+k*k//n
    for usable in range(0, floor(n)+1, n):
        tried.clear()
        k = largest_piece(floor, n, usable)
        fits = [i for i in range(1, n+1) if 500+10*i+i*i//n <= usable]
        if not fits: assert k is None
        else: assert .9*fits[-1] <= k <= fits[-1] and len(tried) <= 12

def again(warned): return [o for o in map(str, warned) if 'lock step' in o]

@pytest.mark.parametrize('at', ['forward','backward'])
@pytest.mark.parametrize('budget', ['auto', None])
def test_a_window_that_fails_runs_once_more_in_lock_step(plan, at, budget):
    "The device has less than anybody knew"
    within = Within(size=None)
    def shrink(learn): within.device.size = plan[9]
    event = dict(forward='before_batch', backward='before_backward')[at]
    with pytest.warns(UserWarning, match='16 samples did not fit.*micro_bs=4.*to rounding') as rec:
        learn = fit64(within, DoAt(event, 1, shrink), budget=budget, micro_bs='auto')
    assert len(again(o.message for o in rec)) == 1
    assert piece_of(learn) == 4
    assert_same(learn.model, fit64().model, rounding(gain=1e3))
    do_fit(learn)
    assert piece_of(learn) == 4  # it was learned

def test_a_window_is_undone():
    "Random numbers, buffers, what model and loss count, gradients that were none, autocast, hooks for saved tensors"
    class Loss(CrossEntropyLossFlat):
        n = 0
        def __call__(self, *args, **kwargs):
            self.n += 1
            return super().__call__(*args, **kwargs)*(1+self.n/10)
    class Saved(Callback):
        def before_batch(self):
            self.n = getattr(self, 'n', 0)+self.training
            self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            self.hooks.__enter__()
        def after_backward(self): self.hooks.__exit__()
        def after_batch(self):
            if not self.training: self.hooks.__exit__()
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.n,self.table = deep(),0,torch.ones(3)
            self.generator = torch.Generator().manual_seed(2)
            self.register_buffer('seen', torch.zeros(()))
        def forward(self, x):
            self.seen += 1
            self.n += 1
            self.table *= 2
            return self.body(x+torch.rand(1)+torch.rand(1, generator=self.generator)+self.table.mean()/1e3)
    def run(*cbs):
        return fit(*cbs, make=Odd, cbs=[CPUScaler(), MixUp(), Saved()], micro_bs='auto', loss_func=Loss())
    a = run()
    failed = []
    def twice(learn):
        device = within.device
        device.at = [device.made+20,device.made+21]  # the operation and its repetition
        failed.append(learn.iter)
    within = Within()
    within.before_backward = lambda: failed or twice(within.learn)
    ignored = warnings.catch_warnings()
    with ignored:
        warnings.simplefilter('ignore')
        pieces_stay_whole = lambda self, n: None
        with pytest.MonkeyPatch.context() as m:
            m.setattr('fastai_bn.tries.Pieces.shrink', pieces_stay_whole)
            b = run(within)
    assert failed == [0] and within.device.refused == 2
    assert_same_fit(a, b)
    assert a.model.n == b.model.n and a.saved.n == b.saved.n and a.loss_func.n == b.loss_func.n
    assert not torch.is_autocast_enabled('cpu') and torch._C._autograd._top_saved_tensors_default_hooks(True) is None

@pytest.mark.parametrize('budget', ['auto', 10**9])
def test_no_window_runs_three_times(budget):
    within = Within(size=1000)
    with pytest.warns(UserWarning, match='did not fit'), pytest.raises(torch.OutOfMemoryError, match='smaller inputs'):
        fit64(within, budget=budget, micro_bs='auto')
    assert within.device.refused == (4 if budget == 'auto' else 2)

@pytest.mark.parametrize('exc', [MemoryError('host'), RuntimeError('mine')])
@pytest.mark.parametrize('event', ['before_batch','after_pred','before_backward'])
def test_errors_that_are_no_refusal_end_the_fit(exc, event):
    with pytest.raises(type(exc), match=str(exc)): fit64(RaiseAt(event, 1, exc), micro_bs='auto')

@pytest.mark.parametrize('event', ['before_batch','after_backward','after_step','after_batch'])
def test_refusals_outside_of_the_block_end_the_fit(event):
    "As in a DataLoader's transforms, and in the optimizer's step"
    exc = torch.OutOfMemoryError('elsewhere')
    with pytest.raises(torch.OutOfMemoryError, match='elsewhere$'): fit64(RaiseAt(event, 1, exc), micro_bs='auto')

def test_inputs_that_were_written_to_are_not_used_again():
    class Rude(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = deep()
        def forward(self, x): return self.body(x.mul_(2))
    with pytest.raises(torch.OutOfMemoryError, match='GiB'):
        fit(Within(at=[5, 6]), make=Rude, micro_bs='auto')

def test_what_cannot_be_planned_is_tried():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = deep()
        def forward(self, x): return self.body(x if x.sum() > 1e9 else x*2)
    with pytest.warns(UserWarning, match='begins in one piece.*cannot be planned'):
        learn = fit(make=Reads, micro_bs='auto', budget=10**9)
    assert piece_of(learn) is None

def test_processes_take_the_least():
    class Two(Ranks):
        def sync_group(self): return 'group'
        def all_reduced(self, x, group, op):
            assert (group,op) == ('group',torch.distributed.ReduceOp.MIN)
            return min(x, 3)
    pieces = fit64(micro_bs='auto', budget=10**9).accumulate_grad_bn.pieces
    pieces.is_planned = False
    learn = fit64()
    pieces.plan(learn, Two(learn.model, {}), learn.dls.one_batch(), 16)
    assert pieces.size == 3

@pytest.mark.parametrize('bn_bs', [None, 8])
def test_pieces_that_are_found_are_of_windows(bn_bs):
    with pytest.raises(ValueError, match="`micro_bs` must be .*bn_bs='window'"):
        AccumulateGradBN(4, bn_bs=bn_bs, micro_bs='auto')
