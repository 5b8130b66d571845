"""Averaged models, as PyTorch and timm make them: whose running statistics they have, and that `precise_bn` and
`PreciseBN` give them their own"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from timm.utils import ModelEmaV2, ModelEmaV3
from fastai.basics import Callback, DataLoader, DataLoaders

from fastai_bn.all import AccumulateGradBN, PreciseBN, bn_layers, bn_state, precise_bn
from helpers import conv_net, do_fit, get_learner, labels, snapshot, tilted

DECAY,TOL = .8,1e-12
COPIED,AVERAGED = 'copied','averaged'
EMA = dict(multi_avg_fn=get_ema_multi_avg_fn(DECAY))
# A kind of average, and what becomes of buffers in it
KINDS = dict(
    swa=(lambda m: AveragedModel(m), COPIED),
    ema=(lambda m: AveragedModel(m, **EMA), COPIED),
    ema_buffers=(lambda m: AveragedModel(m, use_buffers=True, **EMA), AVERAGED),
    timm_v2=(lambda m: ModelEmaV2(m, DECAY), AVERAGED),
    timm_v3=(lambda m: ModelEmaV3(m, DECAY), AVERAGED),
    timm_v3_no_buffers=(lambda m: ModelEmaV3(m, DECAY, exclude_buffers=True), COPIED))
each_kind = pytest.mark.parametrize('make,buffers', KINDS.values(), ids=KINDS)

def update(average, model):
    "Update an average of any kind"
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)

def statistics(model): return {k:v for k,v in bn_state(model).items() if not k.endswith('num_batches_tracked')}

def population(model, xs):
    "Get the statistics of all samples in one batch, with the weights of `model`"
    model = copy.deepcopy(model).train()
    for m in bn_layers(model).values(): m.momentum = 1.
    with torch.no_grad(): model(xs)
    return statistics(model)

def apart(a, b): return max((a[k]-b[k]).abs().max().item() for k in a)

def train(make, xs, ys, bs=6):
    "Train, with an average of each step; what the model's statistics were after the steps"
    model = conv_net().train()
    opt,average,seen = torch.optim.SGD(model.parameters(), lr=.2),make(model),[statistics(model)]
    for x,y in list(zip(xs.split(bs), ys.split(bs)))*2:
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        update(average, model)
        seen.append({k:v.clone() for k,v in statistics(model).items()})
    return model,average,seen

@each_kind
def test_an_average_has_statistics_of_other_weights(make, buffers):
    "Of the last weights, where buffers are copied; else the average of what there was"
    xs,ys = tilted(24),labels(24)
    model,average,seen = train(make, xs, ys)
    if buffers == COPIED: want = seen[-1]
    else:
        # PyTorch's average begins with the first update, timm's with the model that it is made of
        begin = 1 if isinstance(average, AveragedModel) else 0
        want = {k:v.clone() for k,v in seen[begin].items()}
        for o in seen[begin+1:]: want = {k:DECAY*v + (1-DECAY)*o[k] for k,v in want.items()}
    assert apart(statistics(average.module), want) < 1e-6  # a decay in single precision
    assert apart(want, population(average.module, xs)) > .01

@each_kind
@pytest.mark.parametrize('n_batches', [1, 4])
def test_precise_bn_gives_an_average_its_own_statistics(make, buffers, n_batches):
    xs,ys = tilted(24),labels(24)
    model,average,_ = train(make, xs, ys)
    before,weights = snapshot(model),snapshot(average.module)
    precise_bn(average, xs.split(24//n_batches), bn_bs=24, progress=False)
    assert apart(statistics(average.module), population(average.module, xs)) < TOL
    assert all(torch.equal(v, weights[k]) for k,v in average.module.named_parameters())
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())  # the trained model is as it was

class Validated(Callback):
    "Validate an average that another library makes"
    def __init__(self, make): self.make = make
    def before_fit(self): self.average,self.offs = self.make(self.learn.model),[]
    def after_step(self): update(self.average, self.learn.model)
    def before_validate(self): self.kept,self.learn.model = self.learn.model,self.average
    def after_validate(self):
        # the first layer's: what it sees does not depend on the BN batch
        net = self.average.module
        first = next(iter(bn_layers(net)))
        got = {k:v for k,v in statistics(net).items() if k.startswith(first)}
        self.offs.append(apart(got, population(net, DATA)))
        self.learn.model = self.kept

DATA = tilted(24)

@each_kind
@pytest.mark.parametrize('cbs', [[], [AccumulateGradBN]], ids=['plain', 'accumulated'])
def test_the_average_that_is_validated_has_precise_statistics(make, buffers, cbs):
    def fit(*more):
        dl = DataLoader(list(zip(DATA, labels(24))), bs=6)
        own = [cb(2) for cb in cbs]
        learn = get_learner(DataLoaders(dl, dl, device='cpu'), conv_net(), [Validated(make), *own, *more])
        do_fit(learn, 2)
        return learn.validated.offs
    ours,theirs = fit(PreciseBN()),fit()
    assert min(theirs) > .01 and max(ours) < TOL
