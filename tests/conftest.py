"Shared pieces: tilted data, float64 learners and a training loop written by hand to compare with"
import os
os.environ.setdefault('MPLBACKEND', 'agg')
import copy

import pytest, torch
from torch import nn
from fastai.basics import Callback, DataLoaders, Datasets, TfmdDL, L, Learner, SGD, noop, set_seed
from fastai.callback.progress import ProgressCallback

torch.set_num_threads(int(os.environ.get('FASTAI_BN_THREADS', 1)))  # pytest runs on as many processes as there are cores
F64 = torch.float64

def rounding(terms=1_000, gain=10., dtype=F64):
    """How far two orders of the same arithmetic may be apart, relative to the largest value, on any processor.

    A sum of `terms` numbers errs by up to terms*u of the sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), u being half of the machine epsilon; what follows, layers and
    steps, multiplies that by `gain`. Faults in what is computed show at 1e-4 and more (`assert_differ`)."""
    return terms*gain*torch.finfo(dtype).eps/2

ADAM = rounding(gain=1e4)  # Adam's step divides by |gradient| + eps: near zero it moves by lr/eps = .1/1e-5 times what the gradient does
AS_GOOD = 4                # errors of two ways to round the same sums have a ratio of this order; a formula that cancels (as E[x^2]-E[x]^2) loses whole digits


SLOW = 'bench','demo','distributed','docs','faults','ops','package','precision','soak','unet'  # files that `make quick` leaves out, like tests that are marked slow

def is_slow(path): return path.stem.removeprefix('test_') in SLOW

def pytest_ignore_collect(collection_path, config):
    "Without their imports it is faster still"
    return True if config.option.markexpr == 'not slow' and is_slow(collection_path) else None

def pytest_collection_modifyitems(items):
    for o in items:
        if is_slow(o.path): o.add_marker('slow')

@pytest.fixture(autouse=True)
def _seed(): set_seed(0)


def tilted(n, ni=3, size=(6,6), seed=0):
    "Every sample and channel has its own mean and scale: pooled and averaged statistics differ visibly"
    g = torch.Generator().manual_seed(seed)
    one = (n, ni) + (1,)*len(size)
    return (torch.randn(n, ni, *size, generator=g, dtype=F64)*(.2 + 3*torch.rand(one, generator=g, dtype=F64))
            + 3*torch.randn(one, generator=g, dtype=F64))

def conv_net(nf=4, nc=5, momentum=.1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3,nf,3), nn.BatchNorm2d(nf, momentum=momentum), nn.ReLU(), nn.Conv2d(nf,nf,3,padding=1),
                         nn.BatchNorm2d(nf, momentum=momentum), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf,nc)).double()

def labels(n, nc=5, seed=0): return torch.randint(0, nc, (n,), generator=torch.Generator().manual_seed(seed))


class Float32Loss(Callback):
    "fastai's Recorder cannot average a float64 loss"
    order = -20
    def after_loss(self): self.learn.loss = self.learn.loss.float()

class At:
    "A picklable `i -> xs[i]`"
    def __init__(self, xs): self.xs = xs
    def __call__(self, i): return self.xs[i]

def get_dls(xs, ys, bs, valid=None, **kw):
    mk = lambda x,y,**k: TfmdDL(Datasets(range(len(x)), [[At(x)],[At(y)]]), bs=bs, num_workers=0, **k)
    return DataLoaders(mk(xs, ys, **kw), mk(*(valid or (xs,ys))), device='cpu')

def get_learner(dls, model, cbs=(), loss_func=None, opt_func=SGD, **kw):
    learn = Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=opt_func, cbs=[Float32Loss(), *L(cbs)], wd=kw.pop('wd', 0.), **kw)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn

def do_fit(learn, n_epoch=1, lr=.1, **kw):
    with learn.no_logging(): learn.fit(n_epoch, lr, **kw)


class Inputs:
    "Collect what BN layers see, with hooks of PyTorch's own"
    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.xs = [[] for _ in self.layers]
        self.hooks = [m.register_forward_pre_hook(lambda m,a,o=o: o.append(a[0].detach().clone()) if m.training else None) for m,o in zip(self.layers,self.xs)]
    def pooled(self):
        "Per layer: pooled mean and unbiased variance of all that came since the last call"
        res = []
        for o in self.xs:
            x = torch.cat([t.transpose(0,1).flatten(1) for t in o], 1) if o else None
            res.append(None if x is None else (x.mean(1), x.var(1)))
            o.clear()
        return res
    def remove(self): [h.remove() for h in self.hooks]

def reference_fit(model, windows, loss_sum, opt_func=SGD, n_epoch=1, lr=.1):
    """A window's gradient is that of the sum of `loss_sum(pred,y)[0]` over that of `loss_sum(pred,y)[1]`; running statistics get the
    pooled moments of the window's batches once a step. `windows`: lists of batches (x,y)."""
    model.train()
    opt,inputs = opt_func(list(model.parameters()), lr=lr, wd=0.),Inputs(model)
    for _ in range(n_epoch):
        for w in windows:
            keep = [(m.running_mean.clone(), m.running_var.clone()) for m in inputs.layers]
            parts = [loss_sum(model(x), y) for x,y in w]
            inputs_now = inputs.pooled()
            (sum(s for s,_ in parts)/sum(d for _,d in parts)).backward()
            opt.step(); opt.zero_grad()
            for m,(rm,rv),o in zip(inputs.layers, keep, inputs_now):
                if not m.training or o is None: continue
                m.num_batches_tracked -= len(w)-1
                f = 1/m.num_batches_tracked.item() if m.momentum is None else m.momentum
                m.running_mean.copy_((1-f)*rm + f*o[0])
                m.running_var.copy_((1-f)*rv + f*o[1])
    inputs.remove()
    return model

def windows_of(xs, ys, bs, n_step, last='step'):
    b = list(zip(xs.split(bs), ys.split(bs)))
    return [w for i in range(0, len(b), n_step) if len(w := b[i:i+n_step]) == n_step or last=='step']

def assert_same(a, b, tol=rounding()):
    "Same state to `tol`, relative to the size of each tensor"
    a,b = a.state_dict(),b.state_dict()
    assert a.keys() == b.keys()
    for k in a:
        err = (a[k]-b[k]).double().abs().max() if a[k].numel() else torch.tensor(0.)
        bound = tol*max(1, b[k].double().abs().max().item())
        assert err.item() <= bound, k

def assert_differ(a, b, tol=1e-4):
    assert any((p-q).abs().max() > tol for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def snapshot(model): return copy.deepcopy(model.state_dict())

def assert_pristine(learn):
    "No trace of a callback on model or learner"
    for m in learn.model.modules():
        assert not {'forward','__getstate__'} & m.__dict__.keys() and not m._forward_hooks and not m._forward_pre_hooks
        if isinstance(m, nn.modules.batchnorm._BatchNorm): assert m.momentum != 1.
    assert not {'all_batches','one_batch','_backward','_step','_do_epoch_validate','__getstate__'} & learn.__dict__.keys()
