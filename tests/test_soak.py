"""Many windows: nothing grows, and the running statistics are still the reference's. 60 windows a mode; `FASTAI_BN_SOAK=34 pytest -s tests/test_soak.py` makes 2,040 and
says what grew"""
import ctypes, gc, os, threading, time
from collections import Counter

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fastai_bn.all import AccumulateGradBN
from conftest import assert_pristine, assert_same, conv_net, do_fit, get_dls, get_learner, labels, reference_fit, tilted, windows_of
from fastai.basics import Callback

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')
BS,STEP,PER_EPOCH = 2,4,20  # windows of 8 samples, 20 in an epoch
EPOCHS = 3*int(os.environ.get('FASTAI_BN_SOAK', 1))
MODES = dict(none=({},2), one=(dict(bn_bs=4),4), window=(dict(bn_bs='window'),8), budget=(dict(bn_bs='window', budget=2**13),8), pieces=(dict(bn_bs='window', micro_bs=3),8),
             all=(dict(bn_bs='window', micro_bs=3, budget=2**13),8), int_all=(dict(bn_bs=4, micro_bs=3, budget=2**13),4))

def rss():
    "Bytes of this process, what the C library could give back left out"
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')

class Watch(Callback):
    "What there is after each epoch"
    order = 90
    def before_fit(self): self.notes,self.rss = [],[]
    def after_epoch(self):
        self.rss.append(rss())
        if self.epoch not in (1, self.n_epoch-1): return
        objects = Counter(f'{type(o).__module__}.{type(o).__name__}' for o in gc.get_objects())
        ours = {k:n for k,n in objects.items() if k.startswith(('fastai_bn','torch.','greenlet'))}
        tensors = sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor and o.layout is torch.strided)
        p = self.learn.accumulate_grad_bn.pager
        tracked = None if p is None else (p.peak, p.host_peak, sum(n*len(b) for n,b in p._copies.pool.items()), p._copies.used)
        hooks = sum(len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in self.model.modules()) + len(nn.modules.module._global_forward_pre_hooks)
        self.notes.append(dict(objects=ours, tensors=tensors, tracked=tracked, threads=threading.active_count(), hooks=hooks))

@pytest.mark.parametrize('mode', MODES)
def test_nothing_grows(mode):
    kw,bn_bs = MODES[mode]
    n = BS*STEP*PER_EPOCH
    xs,ys = tilted(n),labels(n)
    learn = get_learner(get_dls(xs, ys, BS, valid=(xs[:2],ys[:2])), conv_net(), [AccumulateGradBN(STEP, **kw), Watch()])
    learn.remove_cb(learn.recorder)  # it keeps every loss
    t = time.perf_counter()
    do_fit(learn, EPOCHS, lr=1e-3)
    t = time.perf_counter()-t
    first,last = learn.watch.notes
    grown = learn.watch.rss[-1]-learn.watch.rss[(EPOCHS-1)//4]
    assert first == last
    assert grown < 2**23, grown
    ref = reference_fit(conv_net(), windows_of(xs, ys, bn_bs, BS*STEP//bn_bs), lambda p,y: (F.cross_entropy(p, y, reduction='sum'), len(y)), n_epoch=EPOCHS, lr=1e-3)
    assert_same(learn.model, ref, 1e-9)
    assert_pristine(learn)
    err = max(((a-b).abs().max()/b.abs().max().clamp(min=1)).item() for a,b in zip(learn.model.buffers(), ref.buffers()))
    print(f'\n{mode}: {EPOCHS*PER_EPOCH} windows, {t:.0f} s, resident {learn.watch.rss[-1]/2**20:.0f} MiB, grown by {grown} bytes, tensors {last["tensors"]} bytes, {last["threads"]} thread(s), '
          f'{last["hooks"]} hooks, running statistics to {err:.0e}')
