"What each of several processes does: `accelerate launch tests/ranks.py FOLDER` runs all of `jobs`, and writes what they return to FOLDER/RANK.pkl"
import pickle, sys, warnings
from pathlib import Path

import pytest, torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastai.basics import Callback, CancelBackwardException, CancelBatchException
from fastai.distributed import DistributedTrainer
from fastai.callback.schedule import *

from fastai_bn.all import AccumulateGradBN, ActivationPager, MicroBatched, PreciseBN, Window, bn_layers, capture_moments
from conftest import conv_net, do_fit, get_dls, get_learner, labels, snapshot, tilted

N,BS,STEP = 64,2,8
MODES = dict(none={}, one=dict(bn_bs=1), eight=dict(bn_bs=8), window=dict(bn_bs='window'), budget=dict(bn_bs='window', budget=2**14), pieces=dict(bn_bs='window', micro_bs=3),
             all=dict(bn_bs='window', micro_bs=5, budget=2**14), eight_pieces=dict(bn_bs=8, micro_bs=3))
EMPTY = dict(some=[2,3,7,40], micro=[0,1,16,17], window=list(range(16)), half=list(range(32)), all=list(range(N)))  # ignored targets, by sample

def data(empty=()):
    ys = labels(N)
    ys[list(empty)] = -100
    return tilted(N),ys

class Reduced(Callback):
    "Count the all-reduces of gradients"
    order,n = DistributedTrainer.order+1,0
    def before_fit(self): self.model.register_comm_hook(self, lambda self,bucket: self.reduce(bucket))
    def reduce(self, bucket):
        self.n += 1
        return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(lambda f: f.value()[0])

class Watch(Callback):
    "The state after each step, and what is logged"
    def before_fit(self): self.steps = 0
    def after_step(self): self.steps += 1

def fit(kw, sync_bn, empty=(), cbs=(), model=conv_net, epochs=2):
    learn = get_learner(get_dls(*data(empty), BS), model(), [AccumulateGradBN(STEP, **kw), *cbs, Watch(), Reduced()])
    with learn.distrib_ctx(sync_bn=sync_bn, cpu=True): do_fit(learn, epochs)
    assert not isinstance(learn.model, DistributedDataParallel)
    return dict(state=snapshot(learn.model), steps=learn.watch.steps, reduced=learn.reduced.n, losses=list(learn.recorder.values))

def single_values():
    "A micro-batch of one, behind pooling: one value per channel in each process, two in both"
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4,5)).double()
    learn = get_learner(get_dls(*data(), 1), model, [AccumulateGradBN(4)])
    with learn.distrib_ctx(cpu=True): do_fit(learn)
    return snapshot(learn.model)

def first_bn(): torch.manual_seed(2); return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64,5)).double()

def statistics(sync_bn):
    "`PreciseBN` in a fit, then the report and `precise_bn`, of 21 samples: each process has another number of them"
    xs,ys = tilted(21),labels(21)
    learn = get_learner(get_dls(xs, ys, 4, shuffle=True), first_bn(), [AccumulateGradBN(2), PreciseBN(keep_if_better='valid_loss'), PreciseBN()][1 if sync_bn else 2:])
    with learn.distrib_ctx(sync_bn=sync_bn, cpu=True):
        do_fit(learn, 2)
        after = snapshot(learn.model)
        report = learn.bn_report(plot=False)
        few = learn.precise_bn(n=8)
        table = learn.precise_bn()
    return dict(after=after, report=report, table=table, few=few, state=snapshot(learn.model))

class CancelAt(Callback):
    "All processes cancel the same batch"
    def __init__(self, event, at, exc): self.at,self.exc = at,exc; setattr(self, event, self._cancel)
    def _cancel(self):
        if self.training and self.iter == self.at: raise self.exc

def plain_loop(micro_bs, sync_bn, sizes=(N//2,N//2)):
    "`MicroBatched` in DistributedDataParallel, without fastai"
    model = conv_net()
    if sync_bn: model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ddp = DistributedDataParallel(MicroBatched(model, micro_bs) if micro_bs else model)
    xs,ys = [o[:sum(sizes)].split(sizes)[dist.get_rank()] for o in data()]
    with ActivationPager(2**14): (F.cross_entropy(ddp(xs), ys, reduction='sum')*2/sum(sizes)).backward()
    return dict(grads={k:p.grad for k,p in model.named_parameters()}, state=snapshot(model))

EMPTY_MICRO = [3,20,21,22,23,28,29,30,31]  # one target in a micro-batch of 4; all of two micro-batches

def window_loop():
    "`Window` in a plain loop: each process has every other micro-batch of 4, and windows of 3 and 2"
    xs,ys = data(EMPTY_MICRO)
    micro = list(zip(xs.split(4), ys.split(4)))[dist.get_rank()::2][:5]
    model = conv_net()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    opt,window = torch.optim.SGD(model.parameters(), lr=.1),Window(ddp, 3)
    for i,(x,y) in enumerate(micro):
        last = i in (2,4)
        with window.begin(last):
            with window.forward(x): pred = ddp(x)
            with window.backward(): window.share(F.cross_entropy(pred, y), (y != -100).sum().item()).backward()
            window.add()
        if last and window.finish():
            opt.step()
            window.commit()
        if last: opt.zero_grad()
    return snapshot(model)

def captured():
    "Moments of a SyncBatchNorm whose processes have batches of different sizes"
    model,r = nn.SyncBatchNorm(3).double(),dist.get_rank()
    x = tilted(7)[:3] if r == 0 else tilted(7)[3:]
    with capture_moments(bn_layers(model)) as cap: model(x)
    return [(o.count, o.mean, o.var()) for _ in range(2) for _,o in cap.moments.items()]

def lr_find(kw):
    learn = get_learner(get_dls(*data(), BS), conv_net(), [AccumulateGradBN(4, **kw), Watch()], path=Path(sys.argv[1])/str(dist.get_rank()))
    with pytest.raises(ValueError, match='in one process'), learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_logging(): learn.lr_find(num_it=11, show_plot=False)
    return 'refused'

def again():
    "A fit in the context, one after it, and a frozen layer"
    learn = get_learner(get_dls(*data(), BS), conv_net(), [AccumulateGradBN(STEP, bn_bs='window')])
    with learn.distrib_ctx(cpu=True): do_fit(learn)
    for _ in range(2):
        with learn.distrib_ctx(cpu=True): do_fit(learn)
    return snapshot(learn.model)

jobs = dict(
    **{f'sync {k}': (lambda kw=kw: fit(kw, True)) for k,kw in MODES.items()},
    **{f'own {k}': (lambda kw=kw: fit(kw, False)) for k,kw in MODES.items() if k != 'one'},
    **{f'{s} {k}, empty {e}': (lambda kw=kw,idx=idx,s=s: fit(kw, s=='sync', idx)) for e,idx in EMPTY.items() for k,kw in MODES.items() if k in ('none','window','pieces') for s in ('sync','own')},
    **{f'statistics {s}': (lambda s=s: statistics(s)) for s in (True,False)},
    **{f'loop {m} {s}': (lambda m=m,s=s: plain_loop(m, s)) for m in (None,3) for s in (True,False)},
    **{f'loop {m} {sizes}': (lambda m=m,sizes=sizes: plain_loop(m, True, sizes)) for m in (None,4) for sizes in ((8,3),(2,9))},
    **{f'cancel {e} {k}': (lambda e=e,at=at,x=x,k=k: fit(MODES[k], True, cbs=[CancelAt(e, at[k], x())], epochs=1)) for e,at,x in (('before_backward',dict(none=7,eight=1),CancelBackwardException), ('before_batch',dict(none=15,eight=3),CancelBatchException)) for k in ('none','eight')},
    **{f'lr_find {k}': (lambda kw=MODES[k]: lr_find(kw)) for k in ('none','window','eight')},
    single=single_values, captured=captured, again=again, window=window_loop)

if __name__ == '__main__':
    import sync_cpu  # patches
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', 'A budget on the CPU')
    res = {}
    for k,f in jobs.items():
        torch.manual_seed(0)
        res[k] = f()
        print(k, flush=True)
    (Path(sys.argv[1])/f'{dist.get_rank()}.pkl').write_bytes(pickle.dumps(res))
    dist.destroy_process_group()
