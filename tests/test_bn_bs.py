"The batch of BN: `bn_bs`. In float32 and to the last bit, unless a test says otherwise"
import copy
import itertools
import weakref
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import (
    Adam, Callback, CancelBatchException, CrossEntropyLossFlat, CutMix, DataLoader, DataLoaders, Datasets,
    EarlyStoppingCallback, GradientClip, MixUp, SGD, SaveModelCallback, TensorCategory, TensorImage, TfmdDL,
    load_learner, noop, params, set_seed)
from fastai.callback.data import PartialDL
from fastai.distributed import DistributedDL, DistributedTrainer

from fastai_bn.accumulate import *
from fastai_bn.batches import BNBatches, join
from helpers import (
    ADAM, Boom, CPUScaler, Checkpointed, DoAt, ItemOf, Norms, RaiseAt, Steps, assert_differ, assert_equal_states,
    assert_pristine, assert_same, assert_same_bits, assert_same_fit, conv_net, counted_ce, do_fit, fits, get_dls,
    get_learner, head_net, labels, learner, mean_ce, one_cycle, reference_fit, shuffled, small_unet, tilted,
    windows_of)

class Half(DistributedDL):
    "One of two processes' share, without a process group"
    def _broadcast(self, t, rank): return list(t)

WINDOWS = pytest.mark.parametrize('bs,n_step', [(2,8), (1,16), (4,4)])


# --- 'window': the fit of the large batch

@WINDOWS
@pytest.mark.parametrize('n,last', [(64,'step'), (70,'step'), (70,'drop'), (79,'drop')])
def test_window_is_the_large_batch(bs, n_step, n, last):
    big,ours = fits(n, bs, n_step, last=last)
    assert_same_fit(big, ours)
    assert len(ours.recorder.losses) == 3*(n//16 + (n%16 > 0 and last=='step'))

def test_other_modes_are_not():
    set_seed(3); big = one_cycle(learner(shuffled(64, 16)))
    for kw in (dict(), dict(bn_bs=8)):
        set_seed(3)
        assert_differ(big.model, one_cycle(learner(shuffled(64, 4), cbs=AccumulateGradBN(4, **kw))).model)

@pytest.mark.parametrize('bs', [3, 16])
def test_int_of_the_windows_size_is_the_window(bs):
    def fit(bn_bs):
        set_seed(3)
        return one_cycle(learner(shuffled(50, bs), cbs=AccumulateGradBN(4, bn_bs=bn_bs)))
    assert_same_fit(fit(4*bs), fit('window'))

@pytest.mark.parametrize('kw', [dict(), dict(bn_bs='window'), dict(bn_bs=8)])
def test_n_step_1_is_no_accumulation(kw):
    def fit(*cbs):
        set_seed(3)
        return one_cycle(learner(shuffled(60, 8), cbs=cbs))
    assert_same_fit(fit(), fit(AccumulateGradBN(1, **kw)))

def test_fine_tune_and_layers_used_twice():
    def make(): return Norms().float()
    def tune(learn):
        set_seed(7)
        with learn.no_logging(): learn.fine_tune(2, 1e-2)
        return learn
    def split(m): return [params(m.m.c), params(m.m.head)]
    assert_same_fit(*fits(70, 2, 8, make, train=tune, learner_kw=lambda: dict(splitter=split)))

@pytest.mark.slow
@pytest.mark.parametrize('n,num_it', [(64,100), (70,12), (48,9), (16,7)])
def test_lr_find_has_the_large_batchs_curve(n, num_it, tmp_path):
    def find(learn):
        set_seed(7)
        with learn.no_logging(): learn.found = learn.lr_find(num_it=num_it, show_plot=False, stop_div=False)
        return learn
    big,ours = fits(n, 2, 8, train=find, learner_kw=lambda: dict(path=tmp_path))
    assert len(big.recorder.losses) == num_it
    assert_same_fit(big, ours)
    assert big.found == ours.found

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_window_with_mixed_samples(cb):
    assert_same_fit(*fits(70, 2, 8, cbs=cb, learner_kw=lambda: dict(loss_func=CrossEntropyLossFlat())))

@pytest.mark.parametrize('cb', [lambda: GradientClip(.1), CPUScaler], ids=['clip','amp'])
def test_window_with_other_callbacks(cb): assert_same_fit(*fits(70, 2, 8, cbs=cb))

def test_window_with_a_step_that_overflows():
    big,ours = fits(70, 2, 8, cbs=lambda: CPUScaler(overflow_at=[2]))
    assert_equal_states(dict(big.model.named_parameters()), dict(ours.model.named_parameters()))
    # The step that was skipped left no trace
    assert ours.model[1].num_batches_tracked == big.model[1].num_batches_tracked-1

def test_save_model_and_early_stopping(tmp_path):
    class SaveAt(Callback):
        def after_batch(self):
            if self.training and self.iter==2 and self.epoch==1: self.learn.save('mid')
    got = []
    for kind,bs,cbs in (('big',16,[]),('ours',2,[AccumulateGradBN(8, bn_bs='window')])):
        set_seed(3)
        stop = EarlyStoppingCallback(patience=1, min_delta=10.)
        cbs = [*cbs, SaveAt(), SaveModelCallback(), stop]
        learn = learner(shuffled(70, bs), head_net(), cbs, path=tmp_path/kind)
        got.append(one_cycle(learn, 6))
    assert_same_fit(*got)
    assert len(got[1].recorder.values) == 2
    for name in ('mid','model'):
        a,b = (torch.load(tmp_path/k/'models'/f'{name}.pth', weights_only=False) for k in ('big','ours'))
        for k,v in a.get('model', a).items(): assert torch.equal(v, b.get('model', b)[k])

def test_export_and_fit_on(tmp_path):
    ours = fits(64, 2, 8)[1]
    ours.export(tmp_path/'e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.dls = ours.dls
    for l in (ours,loaded):
        set_seed(1)
        l.dls.train.rng.seed(0)
        l.create_opt()
        l.logger = noop
        do_fit(l)
    assert_same_bits(ours.model, loaded.model)

@pytest.mark.slow
def test_unet():
    def make():
        torch.manual_seed(0)
        return small_unet((32,32))
    xs = tilted(12, size=(32,32)).float()
    ys = (xs.mean(1)>0).long()
    def fit(bs, *cbs):
        set_seed(3)
        learn = learner(get_dls(xs, ys, bs), make(), cbs, loss_func=CrossEntropyLossFlat(axis=1), metrics=[])
        do_fit(learn, 1, 1e-3)
        return learn
    assert_same_bits(fit(6).model, fit(1, AccumulateGradBN(6, bn_bs='window')).model)
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointed_layers_count_once(reentrant):
    def fit(bs, model, *cbs):
        set_seed(3)
        return one_cycle(learner(shuffled(64, bs), model, cbs)).model
    plain = fit(16, conv_net().float())
    ours = fit(2, Checkpointed(conv_net().float(), reentrant), AccumulateGradBN(8, bn_bs='window'))
    assert_same_bits(plain, ours.net)

@pytest.mark.slow
def test_compiled_model():
    torch._dynamo.reset()
    def fit(bs, *cbs):
        set_seed(3)
        return one_cycle(learner(shuffled(64, bs), torch.compile(head_net(p=0.), backend='aot_eager'), cbs))
    big,ours = fit(16),fit(2, AccumulateGradBN(8, bn_bs='window'))
    for a,b in zip(big.model.state_dict().values(), ours.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- Ints: the fit by hand

SIZES = [(24,4,3,2), (24,4,3,6), (24,4,3,12), (23,4,3,6), (23,4,3,4), (23,2,6,4), (21,4,3,3), (24,6,2,4), (30,5,4,2)]

@pytest.mark.parametrize('n,bs,n_step,bn_bs', SIZES)
@pytest.mark.parametrize('last', ['step','drop'])
def test_int_is_the_fit_by_hand(n, bs, n_step, bn_bs, last):
    xs,ys = tilted(n),labels(n)
    cb = AccumulateGradBN(n_step, bn_bs=bn_bs, last=last)
    learn = get_learner(get_dls(xs, ys, bs), conv_net(), cb, opt_func=Adam)
    do_fit(learn, 3)
    size = n_step*bs
    w = [[(a,b) for a,b in zip(xs[i:i+size].split(bn_bs), ys[i:i+size].split(bn_bs))] for i in range(0, n, size)]
    if last=='drop' and n%size: w.pop()  # short: fewer samples
    assert_same(learn.model, reference_fit(conv_net(), w, mean_ce, Adam, n_epoch=3), ADAM)
    assert_pristine(learn)
    assert len(learn.recorder.losses) == 3*sum(map(len, w))

def test_lr_find_with_an_int(tmp_path):
    learn = learner(shuffled(70, 4), cbs=[AccumulateGradBN(4, bn_bs=8), Steps()], path=tmp_path)
    with learn.no_logging(): learn.lr_find(num_it=13, show_plot=False, stop_div=False)
    assert len(learn.steps.at) == 13

@pytest.mark.parametrize('bn_bs', ['window', 6])
def test_ignored_targets_weigh_nothing(bn_bs):
    xs,ys = tilted(24),labels(24)
    ys[[1,2,3,13,14]] = -100
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), AccumulateGradBN(6, bn_bs=bn_bs))
    do_fit(learn, 2)
    w = windows_of(xs, ys, 12, 1) if bn_bs=='window' else windows_of(xs, ys, 6, 2)
    assert_same(learn.model, reference_fit(conv_net(), w, counted_ce, n_epoch=2))


# --- Re-batching

CUTS = [(2,4,'window'), (2,4,4), (4,2,1), (3,2,2), (1,6,3), (5,1,'window'), (2,6,3)]

@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('last', ['step','drop'])
@pytest.mark.parametrize('bs,n_step,bn_bs', CUTS)
def test_every_sample_once_in_order_and_as_many_batches_as_promised(bs, n_step, bn_bs, last, drop_last):
    for n in range(bs*n_step, 4*bs*n_step+1):
        dl = DataLoader(list(zip(range(n), range(0, 10*n, 10))), bs=bs, drop_last=drop_last)
        batches = BNBatches(dl, n_step, float('inf') if bn_bs=='window' else bn_bs, last=='drop')
        got,ends = zip(*[(b,batches.last) for b in batches])
        assert len(got) == len(batches)
        x = torch.cat([b[0] for b in got]).tolist()
        expect = n - n%bs if drop_last else n
        if last=='drop': expect -= expect%(bs*n_step)
        assert x == list(range(expect)) and torch.cat([b[1] for b in got]).tolist() == [10*i for i in x]
        size = bs*n_step if bn_bs=='window' else bn_bs
        at = torch.tensor([len(b[0]) for b in got]).cumsum(0).tolist()
        for b,e,p in zip(got, ends, at):
            assert e == (p % (bs*n_step) == 0 or p == len(x))
            assert len(b[0]) == size or e
        assert len(set(at)) == len(at)

Pair = namedtuple('Pair', 'a b')

def test_joining_keeps_structure_and_types():
    def batch(i):
        image = TensorImage(torch.full((2,3,4,4), float(i)), extra='meta')
        info = {'ids':[f'a{i}', f'b{i}'], 'm':torch.tensor([i,i])}
        return image,info,Pair(torch.ones(2)*i, None),TensorCategory(torch.tensor([i,i]))
    a = join([batch(0), batch(1)])
    assert type(a) is tuple and type(a[0]) is TensorImage and a[0].extra == 'meta' and a[0].shape == (4,3,4,4)
    assert a[1]['ids'] == ['a0','b0','a1','b1'] and a[1]['m'].tolist() == [0,0,1,1]
    assert type(a[2]) is Pair and a[2].a.tolist() == [0,0,1,1] and a[2].b is None and type(a[3]) is TensorCategory
    b = batch(0)
    assert join([b]) is b  # no copy

@pytest.mark.parametrize('bn_bs', [float('inf'), 2, 8])
@pytest.mark.parametrize('last', ['step','drop'])
@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('kind', ['torch','partial','distributed'])
def test_other_dataloaders_keep_the_promise_too(kind, drop_last, last, bn_bs):
    xs = torch.arange(26)
    if kind == 'torch': dl = torch.utils.data.DataLoader(xs[:13], batch_size=4, drop_last=drop_last)
    elif kind == 'partial': dl = PartialDL(xs, bs=4, partial_n=13, drop_last=drop_last)
    else: dl = Half(DataLoader(xs, bs=4, drop_last=drop_last), rank=1, world_size=2)
    b = BNBatches(dl, 2, bn_bs, last=='drop')
    sizes = [len(o) for o in b]
    n = 12 if drop_last else 13
    if last == 'drop': n -= n%8
    assert sum(sizes) == n and len(b) == len(sizes)
    assert b.bs == (8 if bn_bs == float('inf') else bn_bs)

@pytest.mark.parametrize('bn_bs', [float('inf'), 4])
def test_inputs_are_there_once(bn_bs):
    "When a BN batch has been joined, what it was joined from is gone"
    alive = []
    def make(i):
        b = torch.full((2,3), float(i)),torch.zeros(2)
        alive.extend(weakref.ref(t) for t in b)
        return b
    class DL:
        bs = 2
        def __len__(self): return 8
        def __iter__(self): return map(make, range(8))
    for x,y in BNBatches(DL(), 4, bn_bs, False):
        assert not [r for r in alive if r() is not None]

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net,self.lin = conv_net(nc=4).float(),nn.Linear(3,4)
    def forward(self, x, d): return self.net(x), self.lin(d['v'])

@pytest.mark.parametrize('bn_bs', ['window', 8])
def test_several_inputs_and_targets(bn_bs):
    xs,ys = tilted(32).float(),labels(32, 4)
    class Items:
        def __len__(self): return 32
        def __getitem__(self, i): return xs[i], {'v':xs[i].mean((1,2))}, ys[i], ys[31-i]
    def loss(pred, a, b): return F.cross_entropy(pred[0], a) + F.cross_entropy(pred[1], b)
    def fit(bs, *cbs):
        dls = DataLoaders(DataLoader(Items(), bs=bs), DataLoader(Items(), bs=5), device='cpu')
        dls.n_inp = 2
        learn = get_learner(dls, TwoInputs(), cbs, loss_func=loss, opt_func=Adam)
        do_fit(learn, 2)
        return learn
    big = fit(16) if bn_bs=='window' else fit(8, AccumulateGradBN(2))
    ours = fit(2, AccumulateGradBN(8, bn_bs=bn_bs))
    assert_same_bits(big.model, ours.model)

def test_worker_processes():
    xs,ys = tilted(20).float(),labels(20)
    def fit(bs, *cbs):
        set_seed(3)
        items = Datasets(range(20), [[ItemOf(xs)],[ItemOf(ys)]])
        train = TfmdDL(items, bs=bs, num_workers=2, shuffle=True)
        dls = DataLoaders(train, get_dls(xs, ys, 4).valid, device='cpu')
        return one_cycle(learner(dls, cbs=cbs), 2)
    assert_same_fit(fit(8), fit(2, AccumulateGradBN(4, bn_bs='window')))

def test_re_batching_comes_after_the_distributed_trainers_dataloader():
    class Distribute(Callback):
        order = DistributedTrainer.order
        def before_train(self):
            assert isinstance(self.dl, TfmdDL)
            self.learn.dl = Half(self.dl, rank=1, world_size=2)
    class See(Callback):
        order,sizes = 30,[]
        def before_train(self): self.n = len(self.dl)
        def before_batch(self):
            if self.training: self.sizes.append(len(self.y))
    xs,ys = tilted(64),labels(64)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(8, bn_bs='window'), Distribute(), See()])
    do_fit(learn)
    assert learn.see.sizes == [16,16] and learn.see.n == 2
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs[32:], ys[32:], 16, 1), mean_ce))

def test_the_progress_bar_counts_windows():
    learn = learner(shuffled(70, 2), cbs=AccumulateGradBN(8, bn_bs='window'))
    totals = []
    class Bar(Callback):
        order = 60  # as ProgressCallback
        def before_train(self): totals.append(len(self.dl))
        def after_train(self): totals.append((self.iter+1, self.learn.n_iter))
    learn.add_cb(Bar())
    do_fit(learn)
    assert totals == [5, (5,5)]

def test_validation_and_prediction_are_untouched():
    sizes = []
    class See(Callback):
        def before_batch(self):
            if not self.training: sizes.append(len(self.y))
    learn = learner(shuffled(64, 2), cbs=[AccumulateGradBN(8, bn_bs='window'), See()])
    do_fit(learn)
    assert sizes == [5]*2
    learn.get_preds()
    assert sizes == [5]*4
    learn.validate()
    do_fit(learn)
    assert_pristine(learn)

def test_validation_in_mid_epoch():
    def validate(learn):
        learn.validate()
        learn.model.train()
        learn.training = True
    xs,ys = tilted(48),labels(48)
    mid_valid = DoAt('after_batch', 1, validate, order=70)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(8, bn_bs=4), mid_valid])
    orders = []
    class See(Callback):
        def after_loss(self):
            if self.training: orders.append(self.learn.accumulate_grad_bn.order)
    learn.add_cb(See())
    do_fit(learn)
    assert set(orders) == {AccumulateGradBN.order}
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 4, 4), mean_ce))


# --- Nothing is left behind

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_backward', 'before_step'])
def test_a_cancelled_batch_leaves_nothing(event):
    xs,ys = tilted(64),labels(64)
    cancel = RaiseAt(event, 1, CancelBatchException(), 20)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(4, bn_bs='window'), cancel])
    do_fit(learn)
    w = windows_of(xs, ys, 16, 1)
    del w[1]
    assert_same(learn.model, reference_fit(conv_net(), w, mean_ce))

EVENTS = ['before_train','before_batch','after_pred','after_loss','after_backward','before_step','after_batch']

@pytest.mark.parametrize('where', EVENTS)
def test_exceptions_restore(where):
    xs,ys = tilted(64),labels(64)
    cb = RaiseAt(where, None if where == 'before_train' else 1, Boom('x'), order=20)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(4, bn_bs='window'), cb])
    with pytest.raises(Boom): do_fit(learn)
    if where != 'before_train': assert_pristine(learn)
    learn.remove_cb(cb)
    before = copy.deepcopy(learn.model)
    learn.create_opt()
    do_fit(learn)
    assert_same(learn.model, reference_fit(before, windows_of(xs, ys, 16, 1), mean_ce))
    assert_pristine(learn)
def test_an_exception_before_the_first_batch_leaves_the_order_of_events_right():
    orders = []
    class See(Callback):
        order = 11
        def before_train(self): orders.append((type(self.dl), self.learn.accumulate_grad_bn.order > self.order))
        def after_loss(self):
            if self.training: orders.append(self.learn.accumulate_grad_bn.order)
    xs,ys = tilted(32),labels(32)
    boom = RaiseAt('before_train', None, Boom('x'), order=30)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(8, bn_bs='window'), See(), boom])
    with pytest.raises(Boom): do_fit(learn)
    learn.remove_cb(boom)
    orders.clear()
    do_fit(learn)
    assert orders[0] == (TfmdDL, True) and set(orders[1:]) == {AccumulateGradBN.order}
    assert_pristine(learn)


# --- Bad input

@pytest.mark.parametrize('bn_bs', [0, -1, 2., 'all', True, [4]])
def test_bad_bn_bs(bn_bs):
    with pytest.raises(ValueError, match='`bn_bs` must be'): AccumulateGradBN(4, bn_bs=bn_bs)

@pytest.mark.parametrize('bn_bs', [3, 5, 16])
def test_not_a_divisor(bn_bs):
    learn = get_learner(get_dls(tilted(16), labels(16), 2), conv_net(), AccumulateGradBN(4, bn_bs=bn_bs))
    text = rf"must divide n_step\*bs=8.*got {bn_bs} with n_step=4 and the DataLoader's bs=2"
    with pytest.raises(ValueError, match=text): do_fit(learn)
    assert_pristine(learn)

def test_items_of_several_sizes():
    class Items:
        def __len__(self): return 8
        def __getitem__(self, i): return torch.zeros(3,6+i,6), 0
    dls = DataLoaders(DataLoader(Items(), bs=1), DataLoader(Items(), bs=1), device='cpu')
    learn = get_learner(dls, conv_net().float(), AccumulateGradBN(4, bn_bs='window'))
    text = r'cannot be joined.*the batch\[0\] is of \[1, 3, 6, 6\], \[1, 3, 7, 6\].*Resize.*bn_bs=None'
    with pytest.raises(ValueError, match=text): do_fit(learn)
    assert_pristine(learn)
    learn = get_learner(dls, conv_net().float(), AccumulateGradBN(4))
    do_fit(learn)  # and None it takes

def plain_fit(net, windows, n_epoch):
    "A loop by hand over batches (x, y)"
    opt = SGD(list(net.train().parameters()), lr=.05, wd=0.)
    for _ in range(n_epoch):
        for x,y in windows:
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    return net

@pytest.mark.parametrize('last', ['step','drop'])
def test_batches_of_any_size(last):
    "As of a sampler that fills buckets, with PyTorch's DataLoader: it has no batch size then"
    xs,ys,sizes = tilted(29),labels(29),[1,4,2,5,3,1,2,6,2,1,2]
    ends = list(itertools.accumulate(sizes))
    groups = [list(range(e-n, e)) for e,n in zip(ends, sizes)]
    windows = [sum(groups[i:i+3], []) for i in range(0, len(groups), 3)]
    def go(groups, model, *cbs):
        dl = torch.utils.data.DataLoader(list(zip(xs, ys)), batch_sampler=groups)
        learn = get_learner(DataLoaders(dl, dl, device='cpu'), model, cbs)
        do_fit(learn, 2, .05)
        return learn.model
    def without():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108,5)).double()
    kw = dict(bn_bs='window', last=last)
    whole = windows if last == 'step' else windows[:-1]
    big = go(whole, conv_net())
    assert_same(go(groups, conv_net(), AccumulateGradBN(3, **kw)), big, 0)
    assert_same(go(groups, conv_net(), AccumulateGradBN(3, **kw, micro_bs=2)), big, 1e-10)
    with pytest.warns(UserWarning, match='no BatchNorm'): small = go(groups, without(), AccumulateGradBN(3, last=last))
    assert_same(small, go(whole, without()), 1e-11)  # each sample weighs the same
    with pytest.raises(ValueError, match='bn_bs'): go(groups, conv_net(), AccumulateGradBN(3, bn_bs=4))

@pytest.mark.parametrize('bn_bs', [None, 'window'])
@pytest.mark.parametrize('at', [(1,4,2), (4,1,11)])
def test_n_step_may_change_between_epochs(at, bn_bs):
    class Schedule(Callback):
        def before_epoch(self): self.learn.accumulate_grad_bn.n_step = at[self.epoch]
    xs,ys = tilted(22),labels(22)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(at[0], bn_bs=bn_bs), Schedule()])
    do_fit(learn, 3, .05)
    ref = conv_net()
    for k in at:
        if bn_bs is None: reference_fit(ref, windows_of(xs, ys, 2, k), mean_ce, lr=.05)
        else: plain_fit(ref, zip(xs.split(2*k), ys.split(2*k)), 1)
    assert_same(learn.model, ref, 1e-11)

def test_n_step_may_change_in_mid_epoch():
    "From the next window on; nothing of the one that is open is lost"
    def shorten(learn): learn.accumulate_grad_bn.n_step = 2
    cbs = [AccumulateGradBN(4), DoAt('after_batch', 4, shorten), Steps()]
    learn = get_learner(get_dls(tilted(22), labels(22), 2), conv_net(), cbs)
    do_fit(learn)
    assert learn.steps.at == [8,12,16,20,22]

def test_inputs_within_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.net,self.lin = conv_net(),nn.Linear(7,5).double()
        def forward(self, t): return self.lin(torch.cat([self.net(t[0]), t[1]], 1))
    xs,zs,ys = tilted(16),torch.randn(16,2, dtype=torch.float64),labels(16)
    def go(bs, *cbs):
        dl = torch.utils.data.DataLoader([((x,z),y) for x,z,y in zip(xs, zs, ys)], batch_size=bs)
        learn = get_learner(DataLoaders(dl, dl, device='cpu'), Two(), cbs)
        do_fit(learn, 2, .05)
        return learn
    assert_same(go(2, AccumulateGradBN(4, bn_bs='window')).model, go(8).model, 0)
    assert_same(go(2, AccumulateGradBN(4, bn_bs='window', micro_bs=2)).model, go(8).model, 1e-10)
    assert go(2).precise_bn().samples.tolist() == [16,16]

def test_one_sample_at_the_end_names_the_layer():
    learn = get_learner(get_dls(tilted(17).float(), labels(17), 1), head_net(), AccumulateGradBN(16, bn_bs='window'))
    with pytest.raises(ValueError, match=r"layer '9' \(BatchNorm1d"): do_fit(learn)
    assert_pristine(learn)
