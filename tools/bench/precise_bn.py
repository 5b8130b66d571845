"Moving averages and population statistics: by epoch, batch and number of samples; domains; what batches are made of"
import random

import torch
from torch import Tensor, nn
from fastai.basics import Callback
from fastai_bn.all import bn_layers, bn_state, load_bn_state, precise_bn
from bench.common import Images, drawn, drawn_tensors, hep2, learner, score
from bench.results import Table

LR = 3e-3

def images(data:str, a) -> Images:
    "The images of a data set, twice as many as elsewhere"
    return drawn(a.images or 2048) if data == 'drawn' else hep2(a.hep2, a.images or 2048)

def lr(bs:int) -> float:
    "The learning rate, as the root of the batch"
    return LR*min(2, (bs/32)**.5)

def shuffled(n:int, seed:int=0) -> Tensor:
    "A random order that is always the same"
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

def population(model:nn.Module, x:Tensor, bn_bs:int, n:int=10_000):
    "Precise statistics of samples in a random order"
    return precise_bn(model, x[shuffled(len(x), n)].split(bn_bs), n=n, progress=False)

class ByEpoch(Callback):
    "Scores after each epoch with the moving averages and with precise statistics, at the DataLoader's batch and at 64"
    order = 70
    def __init__(self, o:Images): self.o,self.rows = o,[]
    def after_epoch(self):
        own,bs = bn_state(self.model),self.dls.bs
        self.note('moving averages')
        for name,bn_bs in ('precise_bn()',bs),('precise_bn(bn_bs=64)',64):
            t = population(self.model, self.o.train[0], bn_bs)
            self.note(name, mean_shift=t.mean_shift.max(), var_ratio=t.var_ratio.max())
            load_bn_state(self.model, own)

    def note(self, statistics:str, **kw):
        loss = self.learn.train_loss.epochs[-1]
        row = dict(bs=self.dls.bs, epoch=self.epoch+1, statistics=statistics, train_loss=loss)
        self.rows.append({**row, **score(self.model, self.o), **kw})

def epochs(data:str, seed:int, a):
    "Four epochs of one-cycle at batches of 2 to 512; the learning rate as the root of the batch, at most doubled"
    o = images(data, a)
    for bs in (2,8,32,128,512):
        if bs > len(o.train[0]): continue
        learn = learner(o, seed, bs, [cb := ByEpoch(o)])
        learn.fit_one_cycle(a.epochs or 4, lr(bs))
        yield from cb.rows

def samples(data:str, seed:int, a):
    "In the middle of training, at a batch of 128: statistics of n samples, drawn five times"
    o = images(data, a)
    learn = learner(o, seed, 128)
    learn.fit(a.epochs or 2, lr(128))
    yield dict(n='moving averages', draw=0, **score(learn.model, o))
    for n in (32,100,320,1000,3200):
        if n > len(o.train[0]): continue
        for draw in range(5):
            i = shuffled(len(o.train[0]), 100*n+draw)[:n]
            precise_bn(learn.model, o.train[0][i].split(32), n=n, progress=False)
            yield dict(n=str(n), draw=draw, **score(learn.model, o))
    population(learn.model, o.train[0], 32)
    yield dict(n='all', draw=0, **score(learn.model, o))

class FreezeLast(Callback):
    "BN layers in eval mode, with precise statistics, for the last quarter of the epochs"
    order = 5
    def __init__(self, x:Tensor): self.x = x
    def before_train(self):
        first = self.n_epoch - max(1, self.n_epoch//4)
        if self.epoch < first: return
        if self.epoch == first: population(self.model, self.x, 64)
        for m in bn_layers(self.model).values(): m.eval()

@torch.no_grad()
def by_own_batches(model:nn.Module, o:Images, bs:int) -> dict:
    "Scores with the statistics of batches of `bs` validation images"
    state,predict = bn_state(model),model.train()
    i = shuffled(len(o.valid[0]))
    class Predict(nn.Module):
        def forward(self, x):
            for m in bn_layers(predict).values(): m.train()
            return torch.cat([predict(b) for b in x.split(bs)])
    res = score(Predict(), o, tuple(t[i] for t in o.valid))
    load_bn_state(model, state)
    return res

def bn_batch(data:str, seed:int, a):
    """Trained at a batch of 2 and of 32: the BN batch of the precise pass, batch statistics at inference, BN frozen at
    the end"""
    o,n = images(data, a),a.epochs or 4
    for bs in (2,32):
        def row(way, **kw):
            head = dict(bs=bs, way=way, train_loss=learn.train_loss.epochs[-1])
            return {**head, **(kw or score(learn.model, o))}
        learn = learner(o, seed, bs)
        learn.fit_one_cycle(n, lr(bs))
        yield row('moving averages')
        for bn_bs in (2,8,32,128,512):
            population(learn.model, o.train[0], bn_bs)
            yield row(f'precise_bn(bn_bs={bn_bs})')
        yield row(f"statistics of the {bs} images at hand", **by_own_batches(learn.model, o, bs))
        learn = learner(o, seed, bs, [FreezeLast(o.train[0])])
        learn.fit_one_cycle(n, lr(bs))
        yield row('BN frozen in the last quarter')

SHIFTS = {
    'as they are': lambda x: x,
    '0.3 times as bright': lambda x: .3*x,
    '0.4 times the contrast, on a bright ground': lambda x: .4*x+.5}

def domain(data:str, seed:int, a):
    "Another laboratory: its images by statistics of the training set, and of themselves, without labels (AdaBN)"
    o = images(data, a)
    learn = learner(o, seed, 32)
    learn.fit_one_cycle(a.epochs or 4, LR)
    population(learn.model, o.train[0], 64)
    own,(x,y) = bn_state(learn.model),o.valid
    if data == 'drawn': others = {f'lab_shift={s}':lab(s, len(x)) for s in (0,.5,1.)}
    else: others = {k:(changed(x, f, o),y) for k,f in SHIFTS.items()}
    for name,xy in others.items():
        load_bn_state(learn.model, own)
        yield dict(images=name, statistics='training set', **score(learn.model, o, xy))
        for n in (32,len(xy[0])):
            load_bn_state(learn.model, own)
            precise_bn(learn.model, xy[0][:n].split(32), n=n, progress=False)
            statistics = '32 of these images' if n == 32 else 'these images'
            yield dict(images=name, statistics=statistics, **score(learn.model, o, xy))

def changed(x:Tensor, f, o:Images) -> Tensor:
    "`f` of HEp-2 images as they were before they were standardised, whose blacks are 0 and whites 1"
    lo,hi = o.train[0].min(),o.train[0].max()
    return f((x-lo)/(hi-lo))*(hi-lo)+lo

def lab(shift:float, n:int, seed:int=1) -> tuple:
    "Drawn images of another laboratory, standardised as those of the first are"
    home,_ = drawn_tensors(512, 32)
    x,y = drawn_tensors(n, 32, seed, shift)
    return (x-home.mean((0,2,3), keepdim=True))/home.std((0,2,3), keepdim=True),y

def order(n:int, bs:int, mixed:bool) -> list:
    "An epoch's order of images, the second half of which are another laboratory's: mixed, or a batch from one"
    if mixed: return random.sample(range(n), n)
    batches = []
    for first in (0,n//2):
        idx = random.sample(range(first, first+n//2), n//2)
        batches += [idx[j:j+bs] for j in range(0, n//2, bs)]
    return sum(random.sample(batches, len(batches)), [])

def joined(labs:list, part:slice) -> tuple:
    "The same part of each laboratory's images and labels, one after the other"
    return tuple(torch.cat([t[part] for t in ts]) for ts in zip(*labs))

def by_lab(model:nn.Module, o:Images, per_lab:list|None) -> dict:
    "Scores of each laboratory's half of the validation, with statistics of images of its own if they are given"
    rows = {}
    for k,name in enumerate('AB'):
        if per_lab: precise_bn(model, per_lab[k].split(32), progress=False)
        rows[name] = score(model, o, tuple(t[k*256:(k+1)*256] for t in o.valid))
    return {f'{c} {name}':r[c] for c in ('valid_loss','score') for name,r in rows.items()}

def composition(data:str, seed:int, a):
    """Two laboratories (lab_shift 0 and 1), batches of 32: mixed or of one each; statistics of both together, and of
    each for itself"""
    n = (a.images or 2048)//64*32
    labs = [lab(s, n+256, seed=2+int(s)) for s in (0.,1.)]
    o = Images(joined(labs, slice(n)), joined(labs, slice(n, None)))
    for mixed in (True,False):
        learn = learner(o, seed, 32)
        learn.dls.train.get_idxs = lambda: order(2*n, 32, mixed)
        learn.fit_one_cycle(a.epochs or 4, LR)
        xs = [t[0][:n] for t in labs]
        both = torch.cat(xs)[shuffled(2*n)]
        ways = {'moving averages':None, 'of both, batches mixed':[both,both], 'of each laboratory for itself':xs}
        batches,loss = 'mixed' if mixed else 'of one laboratory',learn.train_loss.epochs[-1]
        for name,per_lab in ways.items():
            yield dict(batches=batches, statistics=name, train_loss=loss, **by_lab(learn.model, o, per_lab))

TABLES = dict(
    epochs=Table(epochs, ('drawn','hep2')),
    samples=Table(samples, ('drawn','hep2')),
    bn_batch=Table(bn_batch, ('drawn','hep2')),
    domain=Table(domain, ('drawn','hep2')),
    composition=Table(composition))
