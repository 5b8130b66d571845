"""Many windows: nothing grows, and the running statistics are still the reference's.

60 windows a mode; `FASTAI_BN_SOAK=34 pytest -s tests/test_soak.py` makes 2,040 and says what grew"""
import ctypes
import gc
import os
import threading
import time
from collections import Counter

import torch
from torch import nn
from fastai.basics import Callback

from fastai_bn.all import AccumulateGradBN
from helpers import (
    assert_pristine, assert_same, conv_net, do_fit, get_dls, get_learner, in_a_process, labels, mean_ce,
    reference_fit, tilted, windows_of)

BS,STEP,PER_EPOCH = 2,4,20  # windows of 8 samples, 20 in an epoch
EPOCHS = 3*int(os.environ.get('FASTAI_BN_SOAK', 1))
BUDGET = 2**13

# Arguments, and the BN batch
MODES = dict(
    none=({}, 2),
    one=(dict(bn_bs=4), 4),
    window=(dict(bn_bs='window'), 8),
    budget=(dict(bn_bs='window', budget=BUDGET), 8),
    pieces=(dict(bn_bs='window', micro_bs=3), 8),
    all=(dict(bn_bs='window', micro_bs=3, budget=BUDGET), 8),
    int_all=(dict(bn_bs=4, micro_bs=3, budget=BUDGET), 4))

def rss():
    "Bytes of this process, what the C library could give back left out"
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*os.sysconf('SC_PAGE_SIZE')

def n_hooks(model):
    "All hooks of modules and of PyTorch"
    own = sum(len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in model.modules())
    return own + len(nn.modules.module._global_forward_pre_hooks)

def growth(first, last):
    "What there is more of in the end"
    others = {k:(first[k],last[k]) for k in first if k != 'objects' and last[k] != first[k]}
    return {**others, **(Counter(last['objects']) - Counter(first['objects']))}

def is_ours(name): return name.startswith(('fastai_bn','torch.','greenlet'))

class Watch(Callback):
    "What there is after each epoch"
    order = 90
    def before_fit(self): self.notes,self.rss = [],[]
    def after_epoch(self):
        self.rss.append(rss())
        if self.epoch in (1, self.n_epoch-1): self.notes.append(self.note())

    def note(self):
        objects,pager = gc.get_objects(),self.learn.accumulate_grad_bn.pager
        names = Counter(f'{type(o).__module__}.{type(o).__name__}' for o in objects)
        return dict(
            objects={k:n for k,n in names.items() if is_ours(k)},
            tensors=sum(o.nbytes for o in objects if type(o) is torch.Tensor and o.layout is torch.strided),
            buffers=sum(o.nbytes() for o in objects if type(o) is torch.UntypedStorage),  # the pager's, on the host
            peaks=None if pager is None else (pager.peak, pager.host_peak),
            threads=threading.active_count(),
            hooks=n_hooks(self.model))

def running_error(model, ref):
    "Largest error of a buffer, relative to its largest value"
    return max(((a-b).abs().max()/b.abs().max().clamp(min=1)).item() for a,b in zip(model.buffers(), ref.buffers()))

def soak(mode):
    "Make a long fit, and check that nothing has grown in it. The process is this fit's alone: all its objects count"
    kw,bn_bs = MODES[mode]
    n = BS*STEP*PER_EPOCH
    xs,ys = tilted(n),labels(n)
    cbs = [AccumulateGradBN(STEP, **kw), Watch()]
    learn = get_learner(get_dls(xs, ys, BS, valid=(xs[:2],ys[:2])), conv_net(), cbs)
    learn.remove_cb(learn.recorder)  # it keeps every loss
    start = time.perf_counter()
    do_fit(learn, EPOCHS, lr=1e-3)
    seconds = time.perf_counter()-start
    first,last = learn.watch.notes
    grown = learn.watch.rss[-1]-learn.watch.rss[(EPOCHS-1)//4]
    assert growth(first, last) == {}, mode
    assert ('budget' in kw) == (last['peaks'] is not None and last['peaks'][1] > 0)
    assert grown < 2**23, grown
    windows = windows_of(xs, ys, bn_bs, BS*STEP//bn_bs)
    ref = reference_fit(conv_net(), windows, mean_ce, n_epoch=EPOCHS, lr=1e-3)
    assert_same(learn.model, ref, 1e-9)
    assert_pristine(learn)
    resident,error = learn.watch.rss[-1]/2**20,running_error(learn.model, ref)
    print(f'{mode}: {EPOCHS*PER_EPOCH} windows, {seconds:.0f} s, resident {resident:.0f} MiB, grown by {grown} bytes',
          f'tensors {last["tensors"]} bytes, {last["threads"]} thread(s), {last["hooks"]} hooks',
          f'running statistics to {error:.0e}', sep=', ')

def soak_all():
    for mode in MODES: soak(mode)

def test_nothing_grows():
    run = in_a_process('import test_soak\ntest_soak.soak_all()', timeout=400*EPOCHS)
    assert run.returncode == 0, run.stderr[-3000:]
    print('', run.stdout.strip(), sep='\n')
