"""What each of several processes does: `accelerate launch tests/ranks.py FOLDER` makes all calls of `jobs`, and writes
what they return to FOLDER/RANK.pkl"""
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastai.basics import Callback, CancelBackwardException, CancelBatchException
from fastai.callback.schedule import *
from fastai.distributed import DistributedTrainer

from fastai_bn import storages
from fastai_bn.all import (AccumulateGradBN, ActivationPager, MicroBatched, PreciseBN, Window, bn_layers,
                           capture_moments)
from helpers import RaiseAt, conv_net, do_fit, get_dls, get_learner, labels, snapshot, tilted

N,BS,STEP = 64,2,8
BUDGET = 2**14
MODES = dict(
    none={},
    carry=dict(n_step=5, last='carry'),
    one=dict(bn_bs=1),
    eight=dict(bn_bs=8),
    window=dict(bn_bs='window'),
    budget=dict(bn_bs='window', budget=BUDGET),
    pieces=dict(bn_bs='window', micro_bs=3),
    all=dict(bn_bs='window', micro_bs=5, budget=BUDGET),
    auto=dict(bn_bs='window', micro_bs='auto', budget=BUDGET),
    eight_pieces=dict(bn_bs=8, micro_bs=3))

# Ignored targets, by sample
EMPTY = dict(some=[2,3,7,40], micro=[0,1,16,17], window=list(range(16)), half=list(range(32)), all=list(range(N)))
# One target in a micro-batch of 4; all of two micro-batches
EMPTY_MICRO = [3,20,21,22,23,28,29,30,31]

def data(empty=()):
    "Make samples and targets, of which those in `empty` do not count"
    ys = labels(N)
    ys[list(empty)] = -100
    return tilted(N),ys

def pooled_head():
    "One value per sample and channel, behind pooling"
    torch.manual_seed(3)
    body = [nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.BatchNorm1d(4), nn.Linear(4,5)).double()

def first_bn():
    "Normalise the data themselves"
    torch.manual_seed(2)
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3,4,3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64,5)).double()

class Reduced(Callback):
    "Count the all-reduces of gradients"
    order,n = DistributedTrainer.order+1,0
    def before_fit(self): self.model.register_comm_hook(self, lambda self,bucket: self.reduce(bucket))
    def reduce(self, bucket):
        self.n += 1
        mean = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda f: f.value()[0])

class Watch(Callback):
    "Count steps"
    def before_fit(self): self.steps = 0
    def after_step(self): self.steps += 1


def accumulating(n_step=STEP, **kw): return AccumulateGradBN(n_step, **kw)


# --- What they do

def trained(mode, bn, empty=None, cbs=(), epochs=2):
    "Fit in a `mode`, with BN over both processes ('sync') or of each one's `own`, and targets that do not count"
    cbs = [accumulating(**MODES[mode]), *cbs, Watch(), Reduced()]
    learn = get_learner(get_dls(*data(EMPTY.get(empty, ())), BS), conv_net(), cbs)
    with learn.distrib_ctx(sync_bn=bn == 'sync', cpu=True): do_fit(learn, epochs)
    assert not isinstance(learn.model, DistributedDataParallel)
    pager = learn.accumulate_grad_bn.pager
    assert pager is None or pager.moved
    return dict(state=snapshot(learn.model), steps=learn.watch.steps, reduced=learn.reduced.n,
                losses=list(learn.recorder.values))

# Where all processes cancel the same batch: the exception, and the last iteration of a window by mode
CANCELS = dict(
    before_backward=(CancelBackwardException, dict(none=7, eight=1)),
    before_batch=(CancelBatchException, dict(none=15, eight=3)))

def cancelled(event, mode):
    "Fit one epoch in which a window's last gradient is cancelled"
    exc,at = CANCELS[event]
    return trained(mode, 'sync', cbs=[RaiseAt(event, at[mode], exc())], epochs=1)

def single_values():
    "Fit with a micro-batch of one: one value per channel in each process, two in both"
    learn = get_learner(get_dls(*data(), 1), pooled_head(), [AccumulateGradBN(4)])
    with learn.distrib_ctx(cpu=True): do_fit(learn)
    return snapshot(learn.model)

def statistics(bn):
    "Get the statistics of 21 samples, of which each process has another number, with `PreciseBN` and without"
    cbs = [PreciseBN(keep_if_better='valid_loss')] if bn == 'sync' else []
    learn = get_learner(get_dls(tilted(21), labels(21), 4, shuffle=True), first_bn(), [*cbs, PreciseBN()])
    with learn.distrib_ctx(sync_bn=bn == 'sync', cpu=True):
        do_fit(learn, 2)
        after = snapshot(learn.model)
        report = learn.bn_report(plot=False)
        few = learn.precise_bn(n=8)
        table = learn.precise_bn()
    return dict(after=after, report=report, table=table, few=few, state=snapshot(learn.model))

def plain_loop(micro_bs, bn, sizes=(N//2,N//2)):
    "Compute a gradient of `MicroBatched` in DistributedDataParallel, without fastai"
    model = conv_net()
    if bn == 'sync': model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(MicroBatched(model, micro_bs) if micro_bs else model)
    xs,ys = [o[:sum(sizes)].split(sizes)[dist.get_rank()] for o in data()]
    with ActivationPager(BUDGET): (F.cross_entropy(ddp(xs), ys, reduction='sum')*2/sum(sizes)).backward()
    return dict(grads={k:p.grad for k,p in model.named_parameters()}, state=snapshot(model))

def window_loop():
    "Run `Window` in a plain loop: each process has every other micro-batch of 4, and windows of 3 and 2"
    xs,ys = data(EMPTY_MICRO)
    micro = list(zip(xs.split(4), ys.split(4)))[dist.get_rank()::2][:5]
    model = conv_net()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    opt,window = torch.optim.SGD(model.parameters(), lr=.1),Window(ddp, 3)
    for i,(x,y) in enumerate(micro):
        last = i in (2,4)
        with window.begin(last):
            with window.forward(x): pred = ddp(x)
            loss,n = F.cross_entropy(pred, y),(y != -100).sum().item()
            with window.backward(): window.share(loss, n).backward()
            window.add()
        if last and window.finish():
            opt.step()
            window.commit()
        if last: opt.zero_grad()
    return snapshot(model)

def captured():
    "Capture moments of a SyncBatchNorm whose processes have batches of different sizes; ask for them twice"
    model,r = nn.SyncBatchNorm(3).double(),dist.get_rank()
    x = tilted(7)[:3] if r == 0 else tilted(7)[3:]
    with capture_moments(bn_layers(model)) as cap: model(x)
    return [(o.count, o.mean, o.var()) for _ in range(2) for _,o in cap.moments.items()]

def lr_find(mode):
    "Have lr_find refused"
    path = Path(sys.argv[1])/str(dist.get_rank())
    learn = get_learner(get_dls(*data(), BS), conv_net(), [AccumulateGradBN(4, **MODES[mode]), Watch()], path=path)
    with pytest.raises(ValueError, match='in one process'):
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_logging(): learn.lr_find(num_it=11, show_plot=False)
    return 'refused'

def again():
    "Fit three times, each in a context of its own"
    learn = get_learner(get_dls(*data(), BS), conv_net(), [AccumulateGradBN(STEP, bn_bs='window')])
    for _ in range(3):
        with learn.distrib_ctx(cpu=True): do_fit(learn)
    return snapshot(learn.model)

def jobs():
    "List all calls: a function and its arguments"
    for mode in MODES:
        yield trained, mode, 'sync'
        if mode != 'one': yield trained, mode, 'own'  # one value per channel is no batch
    for empty in EMPTY:
        for mode in ('none','window','pieces'):
            for bn in ('sync','own'): yield trained, mode, bn, empty
    for bn in ('sync','own'):
        yield statistics, bn
        for micro_bs in (None,3): yield plain_loop, micro_bs, bn
    for micro_bs in (None,4):
        for sizes in ((8,3),(2,9)): yield plain_loop, micro_bs, 'sync', sizes
    for event in CANCELS:
        for mode in ('none','eight'): yield cancelled, event, mode
    for mode in ('none','window','eight'): yield lr_find, mode
    for f in (single_values,captured,again,window_loop): yield f,

if __name__ == '__main__':
    import sync_cpu  # patches
    torch.set_num_threads(1)
    for text in ('A budget on the CPU','.*alone needs'): warnings.filterwarnings('ignore', text)
    storages.MIN_BYTES = 256  # else nothing here is large enough to be moved
    res = {}
    for f,*args in jobs():
        torch.manual_seed(0)
        res[f.__name__,*args] = f(*args)
        print(f.__name__, *args, flush=True)
    (Path(sys.argv[1])/f'{dist.get_rank()}.pkl').write_bytes(pickle.dumps(res))
    dist.destroy_process_group()
