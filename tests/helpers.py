"What several tests need: tilted data, float64 learners, callbacks, and a training loop written by hand to compare with"
import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from fastai.basics import (SGD, Adam, Callback, CancelStepException, DataLoaders, Datasets, L, Learner, TfmdDL,
                           accuracy, noop, set_seed)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import to_float
from fastai.vision.learner import create_body
from fastai.vision.models.unet import DynamicUnet
from fastai.vision.models.xresnet import xresnet18

from fastai_bn.all import AccumulateGradBN

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f.stem for f in (ROOT/'fastai_bn').glob('*.py') if f.stem not in ('__init__','_modidx','all'))
F64 = torch.float64

class Boom(Exception): pass


# --- Tolerances

def rounding(terms=1_000, gain=10., dtype=F64):
    """Bound how far two orders of the same arithmetic may be apart, relative to the largest value, on any processor.

    A sum of `terms` numbers errs by up to terms*u of the sum of their magnitudes (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2), u being half of the machine epsilon; what follows, layers and steps, multiplies
    that by `gain`. Faults in what is computed show at 1e-4 and more (`assert_differ`)."""
    return terms*gain*torch.finfo(dtype).eps/2

# Adam's step divides by |gradient| + eps: near zero it moves by lr/eps = .1/1e-5 times what the gradient does
ADAM = rounding(gain=1e4)
# Errors of two ways to round the same sums have a ratio of this order; a formula that cancels (as E[x^2]-E[x]^2) loses
# whole digits
AS_GOOD = 4


# --- Data and nets

def tilted(n, ni=3, size=(6,6), seed=0):
    "Draw samples whose every channel has its own mean and scale: pooled and averaged statistics differ visibly"
    g = torch.Generator().manual_seed(seed)
    one = (n, ni) + (1,)*len(size)
    return (torch.randn(n, ni, *size, generator=g, dtype=F64)*(.2 + 3*torch.rand(one, generator=g, dtype=F64))
            + 3*torch.randn(one, generator=g, dtype=F64))

def labels(n, nc=5, seed=0): return torch.randint(0, nc, (n,), generator=torch.Generator().manual_seed(seed))

def conv_net(nf=4, nc=5, momentum=.1, seed=0):
    "Two convolutions, each with BN, and a linear head"
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3,nf,3), nn.BatchNorm2d(nf, momentum=momentum), nn.ReLU(),
              nn.Conv2d(nf,nf,3,padding=1), nn.BatchNorm2d(nf, momentum=momentum)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf,nc)).double()

def small_unet(size):
    "fastai's U-Net on a narrow xresnet18"
    return DynamicUnet(create_body(xresnet18(widen=.25), n_in=3, pretrained=False, cut=-4), 2, size)

def head_net(p=.3):
    "Dropout, and a head whose BatchNorm1d gets one value per sample"
    torch.manual_seed(1)
    body = [nn.Conv2d(3,8,3,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(p),
            nn.Conv2d(8,8,3,padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Dropout(p), nn.Linear(8,5)]
    return nn.Sequential(*body, *head)

def wide(p=.3):
    "As `head_net`, with storages that are large enough to be moved"
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3,16,3,padding=1,bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(p),
        nn.Conv2d(16,16,3,padding=1), nn.BatchNorm2d(16, momentum=None), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(p), nn.Linear(16,5))

def wide_dls(n, bs, drop_last=False):
    "Shuffled batches for `wide`"
    xs,ys = tilted(n, size=(16,16)).float(),labels(n)
    train = get_dls(xs, ys, bs, shuffle=True, drop_last=drop_last).train
    return DataLoaders(train, get_dls(xs[:10], ys[:10], 5).train, device='cpu')

class Norms(nn.Module):
    "BN layers to freeze, without running statistics, unused, used twice, and without parameters"
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.m = nn.ModuleDict(dict(
            c=nn.Conv2d(3,4,3), frozen=nn.BatchNorm2d(4), untracked=nn.BatchNorm2d(4, track_running_stats=False),
            unused=nn.BatchNorm2d(4), twice=nn.BatchNorm2d(4), plain=nn.BatchNorm2d(4, affine=False),
            head=nn.Linear(4,5))).double()

    def forward(self, x):
        m = self.m
        x = m.twice(m.untracked(m.frozen(m.c(x))))
        x = m.plain(m.twice(F.relu(x)))
        return m.head(x.mean((2,3)))

class Checkpointed(nn.Module):
    "A `conv_net` whose parts are computed again in the backward pass"
    def __init__(self, net, reentrant):
        super().__init__()
        self.net,self.reentrant = net,reentrant

    def forward(self, x):
        x = checkpoint(self.net[:3], x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return self.net[5:](checkpoint(self.net[3:5], x, use_reentrant=self.reentrant))

class ItemOf:
    "A picklable `i -> xs[i]`"
    def __init__(self, xs): self.xs = xs
    def __call__(self, i): return self.xs[i]


# --- Learners

class Float32Loss(Callback):
    "fastai's Recorder cannot average a float64 loss"
    order = -20
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def get_dls(xs, ys, bs, valid=None, **kw):
    def dl(x, y, **kw): return TfmdDL(Datasets(range(len(x)), [[ItemOf(x)],[ItemOf(y)]]), bs=bs, num_workers=0, **kw)
    return DataLoaders(dl(xs, ys, **kw), dl(*(valid or (xs,ys))), device='cpu')

def silent(learn):
    "Remove the progress bar and the log"
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn

def get_learner(dls, model, cbs=(), loss_func=None, opt_func=SGD, wd=0., **kw):
    loss_func,cbs = loss_func or nn.CrossEntropyLoss(),[Float32Loss(), *L(cbs)]
    return silent(Learner(dls, model, loss_func=loss_func, opt_func=opt_func, cbs=cbs, wd=wd, **kw))

def do_fit(learn, n_epoch=1, lr=.1, **kw):
    with learn.no_logging(): learn.fit(n_epoch, lr, **kw)

def shuffled(n, bs, drop_last=False, **kw):
    "Make float32 DataLoaders of `n` samples in a random order"
    xs,ys = tilted(n).float(),labels(n)
    train = get_dls(xs, ys, bs, shuffle=True, drop_last=drop_last, **kw).train
    return DataLoaders(train, get_dls(xs[:10], ys[:10], 5).train, device='cpu')

def learner(dls, model=None, cbs=(), opt_func=Adam, wd=.1, metrics=accuracy, **kw):
    "Make a learner that records all there is to record"
    learn = get_learner(dls, model or head_net(), cbs, opt_func=opt_func, wd=wd, metrics=metrics, **kw)
    learn.recorder.train_metrics = True
    return learn

def one_cycle(learn, n_epoch=3):
    "Fit with a seeded order of data, whatever was drawn before"
    set_seed(7)
    with learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-2)
    return learn

def fits(n, bs, n_step, make=head_net, cbs=lambda: (), train=one_cycle, last='step', seed=3, learner_kw=lambda: {},
         **kw):
    "The same training with a large batch, and with windows of as many samples that are one BN batch"
    def fit(bs, *mine):
        set_seed(seed)
        return train(learner(shuffled(n, bs, last == 'drop'), make(), [*mine, *L(cbs())], **learner_kw()))
    return fit(bs*n_step),fit(bs, AccumulateGradBN(n_step, bn_bs='window', last=last, **kw))


# --- Callbacks

class DoAt(Callback):
    "Call `f(learn)` the first time that `event` comes in training iteration `at`; None: whenever"
    def __init__(self, event, at, f, order=0):
        self.event,self.at,self.f = event,at,f
        self.order,self.done = order,False
        setattr(self, event, self._do)

    def _do(self):
        if self.done or not self._is_here(): return
        self.done = True
        self.f(self.learn)

    def _is_here(self): return self.at is None or (self.training and self.iter == self.at)

class RaiseAt(DoAt):
    "Raise `exc` the first time that `event` comes in training iteration `at`"
    def __init__(self, event, at, exc, order=0):
        super().__init__(event, at, self._raise, order)
        self.exc = exc
    def _raise(self, learn): raise self.exc

class Steps(Callback):
    "Note after how many samples each step was made"
    order = -100
    def before_fit(self): self.n,self.at = 0,[]
    def after_pred(self): self.n += len(self.x)*self.training
    def after_step(self): self.at.append(self.n)

class CPUScaler(Callback):
    "MixedPrecision's events with a scaler that works on a CPU; overflows when told"
    order = MixedPrecision.order
    def __init__(self, overflow_at=()): self.overflow_at,self.n = overflow_at,0
    def before_batch(self):
        self.ac = torch.autocast('cpu', dtype=torch.bfloat16)
        self.ac.__enter__()
    def after_pred(self): self.learn.pred = to_float(self.pred)
    def after_loss(self): self.ac.__exit__(None, None, None)
    def before_backward(self): self.learn.loss_grad = self.loss_grad*1024
    def before_step(self):
        self.n += 1
        for p in self.model.parameters(): p.grad /= 1024
        if self.n in self.overflow_at: raise CancelStepException


# --- The fit by hand

def mean_ce(p, y):
    "Sum and denominator of the mean cross entropy"
    return F.cross_entropy(p, y, reduction='sum'),len(y)

def counted_ce(p, y):
    "The same, where targets of -100 do not count"
    return F.cross_entropy(p, y, reduction='sum'),(y != -100).sum()

class Inputs:
    "Collect what BN layers see, with hooks of PyTorch's own"
    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.xs = [[] for _ in self.layers]
        self.hooks = [m.register_forward_pre_hook(self._hook(xs)) for m,xs in zip(self.layers, self.xs)]

    def _hook(self, xs):
        def note(m, args):
            if m.training: xs.append(args[0].detach().clone())
        return note

    def pooled(self):
        "Per layer: pooled mean and unbiased variance of all that came since the last call, or None"
        res = []
        for xs in self.xs:
            x = torch.cat([t.transpose(0,1).flatten(1) for t in xs], 1) if xs else None
            res.append(None if x is None else (x.mean(1), x.var(1)))
            xs.clear()
        return res

    def remove(self):
        for h in self.hooks: h.remove()

def running_of(layers):
    "Copy running means and variances"
    return [(m.running_mean.clone(), m.running_var.clone()) for m in layers]

def reference_fit(model, windows, loss_sum, opt_func=SGD, n_epoch=1, lr=.1):
    """Train by hand. `windows`: lists of batches (x,y).

    A window's gradient is that of the sum of `loss_sum(pred,y)[0]` over that of `loss_sum(pred,y)[1]`; running
    statistics get the pooled moments of the window's batches once a step."""
    model.train()
    opt,inputs = opt_func(list(model.parameters()), lr=lr, wd=0.),Inputs(model)
    for _ in range(n_epoch):
        for w in windows:
            before = running_of(inputs.layers)
            parts = [loss_sum(model(x), y) for x,y in w]
            seen = inputs.pooled()
            (sum(s for s,_ in parts)/sum(d for _,d in parts)).backward()
            opt.step()
            opt.zero_grad()
            for m,old,new in zip(inputs.layers, before, seen):
                if m.training and new is not None: _update(m, old, new, len(w))
    inputs.remove()
    return model

def _update(m, old, new, n_forwards):
    "Move the statistics of BN layer `m` once from `old` to `new`, where its own forward did so `n_forwards` times"
    m.num_batches_tracked -= n_forwards-1
    f = 1/m.num_batches_tracked.item() if m.momentum is None else m.momentum
    m.running_mean.copy_((1-f)*old[0] + f*new[0])
    m.running_var.copy_((1-f)*old[1] + f*new[1])

def windows_of(xs, ys, bs, n_step, last='step'):
    "Cut samples into windows: lists of up to `n_step` batches of `bs`"
    b = list(zip(xs.split(bs), ys.split(bs)))
    windows = [b[i:i+n_step] for i in range(0, len(b), n_step)]
    return [w for w in windows if len(w) == n_step or last == 'step']


# --- What has to be so

def assert_same(a, b, tol=rounding()):
    "Same state to `tol`, relative to the size of each tensor"
    a,b = a.state_dict(),b.state_dict()
    assert a.keys() == b.keys()
    for k in a:
        err = (a[k]-b[k]).double().abs().max() if a[k].numel() else torch.tensor(0.)
        bound = tol*max(1, b[k].double().abs().max().item())
        assert err.item() <= bound, k

def assert_equal_states(a, b):
    "The same tensors to the last bit, in the order of `a`; names may differ, as those of a model within another do"
    for (k,p),q in zip(a.items(), b.values(), strict=True): assert torch.equal(p, q), k

def assert_same_bits(a, b): assert_equal_states(a.state_dict(), b.state_dict())

def assert_differ(a, b, tol=1e-4):
    assert any((p-q).abs().max() > tol for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def snapshot(model): return copy.deepcopy(model.state_dict())

def stand_ins(model):
    "List what stands in for methods of a model's modules"
    return [k for m in model.modules() for k in ('forward','__reduce_ex__') if k in vars(m)]

def assert_pristine(learn):
    "No trace of a callback on model or learner"
    assert not stand_ins(learn.model)
    for m in learn.model.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks
        if isinstance(m, nn.modules.batchnorm._BatchNorm): assert m.momentum != 1.
    places = {'all_batches','one_batch','_backward','_step','_do_epoch_validate','__reduce_ex__'}
    assert not places & vars(learn).keys()

def assert_same_fit(big, ours):
    "Weights, buffers, optimizer state, and all that was recorded"
    assert_same_bits(big.model, ours.model)
    for p,q in zip(big.opt.state_dict()['state'], ours.opt.state_dict()['state'], strict=True):
        for k in p: assert torch.equal(torch.as_tensor(p[k]), torch.as_tensor(q[k])), k
    r,s = big.recorder,ours.recorder
    assert r.values == s.values and r.lrs == s.lrs and r.iters == s.iters
    assert [o.item() for o in r.losses] == [o.item() for o in s.losses] and len(r.losses) > 0
    assert_pristine(ours)
    assert all('order' not in vars(cb) for cb in ours.cbs if isinstance(cb, AccumulateGradBN))


# --- The package, processes and warnings

def public_names():
    "List module and name of all that is public, where it is defined: `moments` still has what has moved to `capture`"
    res = [('precise','Learner.precise_bn'), ('precise','Learner.bn_report')]
    for m in MODULES:
        mod = importlib.import_module(f'fastai_bn.{m}')
        res += [(m,n) for n in mod.__all__ if getattr(getattr(mod, n), '__module__', mod.__name__) == mod.__name__]
    return res

def public_object(module, name):
    "Get what a public name stands for"
    if '.' in name: return getattr(Learner, name.partition('.')[2])
    return getattr(importlib.import_module(f'fastai_bn.{module}'), name)

def data_base(module, name):
    "Import `name` without what PyTorch's test machinery does to a process, to its flags and to Hypothesis"
    with pytest.MonkeyPatch.context() as p:
        p.setattr(torch.backends, 'disable_global_flags', lambda: None)
        profile = hypothesis.settings.get_current_profile_name()
        try: return getattr(importlib.import_module(f'torch.testing._internal.{module}'), name)
        finally: hypothesis.settings.load_profile(profile)

def tensors(*trees): return [t for t in tree_iter(trees) if isinstance(t, torch.Tensor)]

# Arguments of Python that start a script in two processes
LAUNCH = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
          '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']

def process_env():
    "The environment of a process of its own that is to find this package"
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    return {**os.environ, 'PYTHONPATH':path}

def in_a_process(code, timeout=200):
    "Run `code`, which may use the files of this folder, in a process of its own, where small storages are moved, too"
    setup = 'import torch\nfrom fastai_bn import storages\nstorages.MIN_BYTES = 256\ntorch.set_num_threads(1)\n'
    command = [sys.executable, '-W', 'ignore', '-c', setup+code]
    return subprocess.run(command, env=process_env(), cwd=ROOT/'tests', capture_output=True, text=True, timeout=timeout)

# A budget on the CPU is for tests alone, and a tiny one for what moves
quiet_budget = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')
