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
    "The statistics of the whole window first, without gradients, and then as constants for each micro-batch; running statistics follow once"
    def __init__(self, model:nn.Module, micro_bs:int):
        super().__init__()
        self.model,self.micro_bs = model,micro_bs
    def forward(self, x:Tensor) -> Tensor:
        if not self.training: return self.model(x)
        layers = bn_layers(self.model).values()
        running = [(m, m.momentum, m.running_mean, m.running_var) for m in layers]
        for m in layers: m.momentum,m.running_mean,m.running_var = 1.,torch.zeros_like(m.running_mean),torch.ones_like(m.running_var)
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
        def forward(self, x):  # the samples' pixels in a row, as it takes n for the variance from the first axis; and it does not clamp its count itself
            self.num_batches_tracked.clamp_(max=self.warmup_steps)
            return super().forward(x.movedim(1, -1).flatten(0, -2)).view(*x.shape[:1], *x.shape[2:], -1).movedim(-1, 1)
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
        if nf == 'M': layers.append(nn.MaxPool2d(2)); continue
        conv = nn.Conv2d(ni, nf, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity='relu')
        layers += [conv, nn.ReLU()]; ni = nf
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, o.n_out))

def with_momentum(o, momentum:float) -> nn.Module:
    model = net(o)
    for m in bn_layers(model).values(): m.momentum = momentum
    return model

def ways(o:Images, n_micro:int) -> dict:
    "Per way and micro-batch: the DataLoader's batch, callbacks, and how its net is made. `n_micro`: micro-batches of the whole fit, per sample of a micro-batch"
    accumulate = lambda bs: [] if bs == WINDOW else [GradientAccumulation(WINDOW)]
    ours = lambda bs,**kw: [AccumulateGradBN(WINDOW//bs, **kw)]
    gn = lambda o,ws=False: (weight_standardize if ws else nn.Identity())(bn_to_gn(net(o), num_groups=8))
    plain = lambda make: lambda bs: (bs, accumulate(bs), make)
    res = {'batch of 32, BN':                plain(net),
           'plain accumulation':             plain(net),
           'plain, BN momentum 0.1/n_step': lambda bs: (bs, accumulate(bs), partial(with_momentum, momentum=.1*bs/WINDOW)),
           'AccumulateGradBN':               lambda bs: (bs, ours(bs), net),
           'AccumulateGradBN(bn_bs=8)':      lambda bs: (bs, ours(bs, bn_bs=8), net),
           "AccumulateGradBN(bn_bs='window')": lambda bs: (bs, ours(bs, bn_bs='window'), net),
           'two-phase':                      lambda bs: (WINDOW, [], lambda o: TwoPhase(net(o), bs)),
           'BatchRenorm (torchrl)':          lambda bs: (bs, accumulate(bs), lambda o: renorm(net(o), max(1, n_micro//bs//3))),
           'frozen BN':                      plain(lambda o: Frozen(net(o), o.train[0])),
           'GroupNorm':                      plain(gn),
           'GroupNorm, weights standardised': plain(partial(gn, ws=True)),
           'no norm (VGG)':                  plain(vgg)}
    if peer('torchrl') is None: del res['BatchRenorm (torchrl)']
    return res

#: Ways in which micro-batches only cut what the net does with each sample: one is enough to see what training gives
ANY_MICRO = 'two-phase','frozen BN','GroupNorm','GroupNorm, weights standardised'

def sizes(way:str) -> tuple:
    return (WINDOW,) if way.startswith('batch of') else (8,) if way in ANY_MICRO else (2,WINDOW) if way.startswith('no norm') else MICRO

def param_bytes(model) -> bytes: return b''.join(p.detach().contiguous().numpy().tobytes() for p in model.parameters())

def outcome(data:str, seed:int, a):
    "Train each way with one recipe: one-cycle, Adam; windows of 32"
    o,epochs = images(data, a),a.epochs or 4
    for name,way in ways(o, len(o.train[0])*epochs).items():
        for bs in sizes(name):
            dl_bs,cbs,make = way(bs)
            learn = learner(o, seed, dl_bs, cbs, make)
            learn.fit_one_cycle(epochs, LR)
            row = dict(way=name, micro=bs, train_loss=learn._log.losses[-1], **score(learn.model, o), weights=hashlib.sha256(param_bytes(learn.model)).hexdigest()[:12])
            yield row
            if name not in ('plain accumulation','AccumulateGradBN'): continue
            precise_bn(learn.model, o.train[0].split(64), progress=False)
            yield {**row, 'way':f'{name}, then precise_bn', **score(learn.model, o)}

class Gradient(Callback):
    "Keeps the gradient of the first step"
    order = 40
    def before_step(self): self.kept = torch.cat([p.grad.flatten() for p in self.model.parameters()])

def fidelity(data:str, seed:int, a):
    "After 60 steps of the batch of 32, in float64: the gradient of a window beside that of the same net on one batch of 32; means over 4 windows"
    o,start = images(data, a),{}
    f64 = lambda t: tuple(x.double() if x.is_floating_point() else x for x in t)
    for name,way in ways(o, 1).items():
        if 'momentum' in name or name.startswith('batch of'): continue  # the gradient is that of plain accumulation
        own = any(k in name for k in ('GroupNorm','no norm'))           # another net, with its own batch of 32
        key = name if own else 'BN'
        if key not in start:
            _,cbs,make = way(WINDOW) if own else (0, [], net)
            learn = learner(o, seed, WINDOW, make=make)
            learn.fit(max(1, 60*WINDOW//len(o.train[0])), LR)
            start[key] = learn.model.double()
        for bs in MICRO:
            cos,err = [],[]
            for i in range(n := min(4, len(o.train[0])//WINDOW)):
                x,y = f64(tuple(t[i*WINDOW:(i+1)*WINDOW] for t in o.train))
                window = Images((x,y), (x,y))
                dl_bs,cbs,make = way(bs)
                g,ref = (gradient(window, m, b, c) for m,b,c in ((adapted(name, start[key], bs, o), dl_bs, cbs), (deepcopy(start[key]), WINDOW, [])))
                cos.append(torch.cosine_similarity(g, ref, 0).item()); err.append(((g-ref).norm()/ref.norm()).item())
            yield dict(way=name, micro=bs, cosine=sum(cos)/n, error=sum(err)/n)

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
    learn = learner(window, 0, bs, [*cbs, keep := Gradient()], lambda _: model)
    learn.loss_func = window.loss
    with learn.no_logging(): learn.remove_cbs([learn.recorder]); learn.fit(1, 0.)
    return keep.kept

TABLES = dict(fidelity=Table(fidelity, ('drawn','hep2')), outcome=Table(outcome, ('drawn','hep2')))
