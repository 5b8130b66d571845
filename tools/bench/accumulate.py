"What a window of 32 is worth in micro-batches: its gradient, and what training with it gives"
import hashlib
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from fastai.basics import Callback
from fastai.vision.all import GradientAccumulation
from fastai_bn.all import AccumulateGradBN, bn_layers, bn_state, bn_to_gn, precise_bn, weight_standardize
from bench.common import Images, images, learner, net, peer, score
from bench.results import Table

WINDOW,MICRO,LR = 32,(1,2,4,8),3e-3

class TwoPhase(nn.Module):
    """The statistics of the whole window first, without gradients, and then as constants for each micro-batch.

    Running statistics follow once"""
    def __init__(self, model:nn.Module, micro_bs:int):
        super().__init__()
        self.model,self.micro_bs = model,micro_bs

    def forward(self, x:Tensor) -> Tensor:
        if not self.training: return self.model(x)
        layers = bn_layers(self.model).values()
        running = [(m, m.momentum, m.running_mean, m.running_var) for m in layers]
        for m in layers:
            m.momentum = 1.
            m.running_mean,m.running_var = torch.zeros_like(m.running_mean),torch.ones_like(m.running_var)
        with torch.no_grad(): self.model(x)
        for m in layers: m.training = False
        pred = torch.cat([self.model(b) for b in x.split(self.micro_bs)])
        for m,momentum,mean,var in running:  # new tensors: backward needs those that the micro-batches had
            m.running_mean,m.running_var = mean.lerp(m.running_mean, momentum),var.lerp(m.running_var, momentum)
            m.training,m.momentum = True,momentum
        return pred

class Frozen(nn.Module):
    "BN layers in eval mode, with the precise statistics of the net as it begins"
    def __init__(self, model:nn.Module, x:Tensor):
        super().__init__()
        self.model = model
        precise_bn(model, x[:512].split(64), progress=False)
    def forward(self, x:Tensor) -> Tensor:
        for m in bn_layers(self.model).values(): m.training = False
        return self.model(x)

def renorm(model:nn.Module, warmup:int) -> nn.Module:
    "torchrl's BatchRenorm in place of each BN layer"
    class Renorm(peer('torchrl.modules').BatchRenorm1d):
        def forward(self, x):
            # It takes n for the variance from the first axis, so the samples' pixels stand in a row; and it does not
            # clamp its count itself
            self.num_batches_tracked.clamp_(max=self.warmup_steps)
            rows = x.movedim(1, -1).flatten(0, -2)
            return super().forward(rows).view(*x.shape[:1], *x.shape[2:], -1).movedim(-1, 1)
    for name,m in list(bn_layers(model).items()):
        new = Renorm(m.num_features, warmup_steps=warmup, smooth=True)
        new.weight,new.bias = m.weight,m.bias
        parent,_,child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, new)
    return model

def vgg(o:Images) -> nn.Sequential:
    "Like a VGG-11, an eighth as wide, without BN"
    layers,ni = [],o.train[0].shape[1]
    for nf in (8,'M',16,'M',32,32,'M',64,64,'M',64,64):
        if nf == 'M':
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(ni, nf, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
        layers += [conv, nn.ReLU()]
        ni = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, o.n_out))

def with_momentum(o, momentum:float) -> nn.Module:
    model = net(o)
    for m in bn_layers(model).values(): m.momentum = momentum
    return model

def ways(o:Images, n_micro:int) -> dict:
    """Per way and micro-batch: the DataLoader's batch, callbacks, and how its net is made.

    `n_micro`: micro-batches of the whole fit, per sample of a micro-batch"""
    def accumulate(bs): return [] if bs == WINDOW else [GradientAccumulation(WINDOW)]
    def plain(make): return lambda bs: (bs, accumulate(bs), make)
    def ours(**kw): return lambda bs: (bs, [AccumulateGradBN(WINDOW//bs, **kw)], net)
    def slow(bs): return bs,accumulate(bs),partial(with_momentum, momentum=.1*bs/WINDOW)
    def two_phase(bs): return WINDOW,[],lambda o: TwoPhase(net(o), bs)
    def renormed(bs): return bs,accumulate(bs),lambda o: renorm(net(o), max(1, n_micro//bs//3))
    def gn(o): return bn_to_gn(net(o), num_groups=8)
    res = {
        'batch of 32, BN': plain(net),
        'plain accumulation': plain(net),
        'plain, BN momentum 0.1/n_step': slow,
        'AccumulateGradBN': ours(),
        'AccumulateGradBN(bn_bs=8)': ours(bn_bs=8),
        "AccumulateGradBN(bn_bs='window')": ours(bn_bs='window'),
        'two-phase': two_phase,
        'BatchRenorm (torchrl)': renormed,
        'frozen BN': plain(lambda o: Frozen(net(o), o.train[0])),
        'GroupNorm': plain(gn),
        'GroupNorm, weights standardised': plain(lambda o: weight_standardize(gn(o))),
        'no norm (VGG)': plain(vgg)}
    if peer('torchrl') is None: del res['BatchRenorm (torchrl)']
    return res

#: Ways in which micro-batches only cut what the net does with each sample: one is enough to see what training gives
ANY_MICRO = 'two-phase','frozen BN','GroupNorm','GroupNorm, weights standardised'

def sizes(way:str) -> tuple:
    "The micro-batches that a way is tried with"
    if way.startswith('batch of'): return WINDOW,
    if way.startswith('no norm'): return 2,WINDOW
    return (8,) if way in ANY_MICRO else MICRO

def fingerprint(model) -> str:
    "A hash of the weights: fits with the same one are the same"
    content = b''.join(p.detach().contiguous().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(content).hexdigest()[:12]

def outcome(data:str, seed:int, a):
    "Train each way with one recipe: one-cycle, Adam; windows of 32"
    o,epochs = images(data, a),a.epochs or 4
    for name,way in ways(o, len(o.train[0])*epochs).items():
        for bs in sizes(name):
            dl_bs,cbs,make = way(bs)
            learn = learner(o, seed, dl_bs, cbs, make)
            learn.fit_one_cycle(epochs, LR)
            row = dict(way=name, micro=bs, train_loss=learn.train_loss.epochs[-1], **score(learn.model, o),
                       weights=fingerprint(learn.model))
            yield row
            if name not in ('plain accumulation','AccumulateGradBN'): continue
            precise_bn(learn.model, o.train[0].split(64), progress=False)
            yield {**row, 'way':f'{name}, then precise_bn', **score(learn.model, o)}

class Gradient(Callback):
    "Keeps the gradient of the first step"
    order = 40
    def before_step(self): self.kept = torch.cat([p.grad.flatten() for p in self.model.parameters()])

def windows(o:Images) -> list:
    "The first four windows of the training images, in float64"
    def double(t): return t.double() if t.is_floating_point() else t
    cuts = [tuple(double(t[i:i+WINDOW]) for t in o.train) for i in range(0, 4*WINDOW, WINDOW)]
    return [Images(c, c) for c in cuts if len(c[0]) == WINDOW]

def started(o:Images, seed:int, make) -> nn.Module:
    "A net after 60 steps of the batch of 32, in float64"
    learn = learner(o, seed, WINDOW, make=make)
    learn.fit(max(1, 60*WINDOW//len(o.train[0])), LR)
    return learn.model.double()

def fidelity(data:str, seed:int, a):
    """After 60 steps of the batch of 32, in float64: the gradient of a window beside that of the same net on one batch
    of 32; means over 4 windows"""
    o,start = images(data, a),{}
    for name,way in ways(o, 1).items():
        if 'momentum' in name or name.startswith('batch of'): continue  # the gradient is that of plain accumulation
        own = any(k in name for k in ('GroupNorm','no norm'))           # another net, with its own batch of 32
        key = name if own else 'BN'
        if key not in start: start[key] = started(o, seed, way(WINDOW)[2] if own else net)
        for bs in MICRO:
            dl_bs,cbs,_ = way(bs)
            cos,err = [],[]
            for w in windows(o):
                got = gradient(w, adapted(name, start[key], bs, o), dl_bs, cbs)
                want = gradient(w, deepcopy(start[key]), WINDOW, [])
                cos.append(torch.cosine_similarity(got, want, 0).item())
                err.append(((got-want).norm()/want.norm()).item())
            yield dict(way=name, micro=bs, cosine=sum(cos)/len(cos), error=sum(err)/len(err))

def adapted(name:str, model:nn.Module, bs:int, o:Images) -> nn.Module:
    "`model` as the way has it, with its weights"
    model = deepcopy(model)
    if name == 'two-phase': return TwoPhase(model, bs)
    if name == 'frozen BN': return Frozen(model, o.train[0].double())
    if name.startswith('BatchRenorm'):
        state = bn_state(model)
        model = renorm(model, 1).double()
        own = dict(model.named_buffers())
        for k,b in state.items(): own[k].copy_(b)
    return model

def gradient(window:Images, model:nn.Module, bs:int, cbs:list) -> Tensor:
    keep = Gradient()
    learn = learner(window, 0, bs, [*cbs, keep], lambda _: model)
    learn.loss_func = window.loss
    learn.remove_cbs([learn.recorder])
    with learn.no_logging(): learn.fit(1, 0.)
    return keep.kept

TABLES = dict(fidelity=Table(fidelity, ('drawn','hep2')), outcome=Table(outcome, ('drawn','hep2')))
