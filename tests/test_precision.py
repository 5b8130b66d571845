"Mixed precision: fastai's callback, with the autocast and the scaler of the CPU (its own are CUDA's)"
import pytest
import torch
from fastai.vision.all import Adam, Callback, MixedPrecision, SGD

from fastai_bn.all import AccumulateGradBN
from helpers import assert_pristine, conv_net, do_fit, get_dls, get_learner, labels, quiet_budget, snapshot, tilted

pytestmark = [quiet_budget, pytest.mark.usefixtures('all_move')]

class OnCPU(MixedPrecision):
    "`MixedPrecision` on a CPU"
    name = 'mixed_precision'
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.float16 if self.amp_mode.value == 'fp16' else torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, enabled=self.amp_mode.value == 'fp16')
    def after_batch(self):
        if self.training: self.seen = [*getattr(self, 'seen', []), self.learn.scaler.get_scale()]

class Overflow(Callback):
    "An infinite gradient in one iteration; from an infinite activation, if `of_activations`"
    order = MixedPrecision.order+1
    def __init__(self, at, of_activations=False): self.at,self.of_activations = at,of_activations
    def before_batch(self):
        if self.training and self.of_activations and self.train_iter == self.at: self.learn.xb = (self.xb[0]*1e30,)
    def before_backward(self):
        if not self.of_activations and self.train_iter == self.at: self.learn.loss_grad = self.loss_grad*float('inf')

class States(Callback):
    order = 90
    def before_fit(self): self.states,self.windows = [snapshot(self.model)],0
    def after_step(self): self.windows += 1
    def after_batch(self):
        if self.windows == len(self.states): self.states.append(snapshot(self.model))

MODES = dict(
    none={},
    two=dict(bn_bs=2),
    window=dict(bn_bs='window'),
    budget=dict(bn_bs='window', budget=2**13),
    pieces=dict(bn_bs='window', micro_bs=3),
    all=dict(bn_bs=8, micro_bs=3, budget=2**13))

def fit(kw, amp, *cbs, bs=4, n=48, epochs=1, opt_func=SGD):
    ours = [] if kw is None else [AccumulateGradBN(4, **kw)]
    dls,cbs = get_dls(tilted(n).float(), labels(n), bs),[*ours, OnCPU(amp), *cbs, States()]
    learn = get_learner(dls, conv_net().float(), cbs, opt_func=opt_func)
    do_fit(learn, epochs)
    assert_pristine(learn)
    if kw and 'budget' in kw: assert learn.accumulate_grad_bn.pager.moved
    return learn

@pytest.mark.parametrize('amp', ['fp16','bf16'])
@pytest.mark.parametrize('mode', ['window','budget'])
@pytest.mark.parametrize('opt_func', [SGD, Adam])
def test_the_window_is_the_large_batch(mode, amp, opt_func):
    big,ours = fit(None, amp, bs=16, epochs=2, opt_func=opt_func),fit(MODES[mode], amp, epochs=2, opt_func=opt_func)
    for a,b in zip(big.states.states, ours.states.states): assert all(torch.equal(a[k], b[k]) for k in a)
    full = get_learner(get_dls(tilted(48).float(), labels(48), 16), conv_net().float(), opt_func=opt_func)
    do_fit(full, 2)
    assert not torch.equal(full.model[0].weight, ours.model[0].weight)  # it did run in half precision

@pytest.mark.parametrize('amp', ['fp16','bf16'])
@pytest.mark.parametrize('mode', MODES)
def test_scaler_acts_once_per_window(mode, amp):
    learn = fit(MODES[mode], amp, epochs=2)
    assert learn.states.windows == 6 and learn.model[1].num_batches_tracked == 6

@pytest.mark.parametrize('of_activations', [False,True])
@pytest.mark.parametrize('mode', MODES)
def test_an_overflow_in_mid_window_skips_all_of_it_and_nothing_else(mode, of_activations):
    per = dict(none=4, two=8, all=2).get(mode, 1)
    at = per + per//2  # in the second of three windows
    learn = fit(MODES[mode], 'fp16', Overflow(at, of_activations))
    s,clean = learn.states.states,fit(MODES[mode], 'fp16').states.states
    assert len(s) == 4 and all(o.isfinite().all() for state in s for o in state.values())
    assert all(torch.equal(s[1][k], clean[1][k]) for k in s[1])
    # neither weights nor running statistics nor their counter
    assert all(torch.equal(s[1][k], s[2][k]) for k in s[1])
    assert not torch.equal(s[2]['0.weight'], s[3]['0.weight']) and s[3]['1.num_batches_tracked'] == 2
    scales = learn.mixed_precision.seen
    # once, at the end of the window
    assert scales == [2.**8]*(2*per-1) + [2.**7]*(per+1)

@pytest.mark.parametrize('mode', MODES)
def test_every_window_overflows(mode):
    class Always(Overflow):
        def before_backward(self): self.learn.loss_grad = self.loss_grad*float('inf')
    learn = fit(MODES[mode], 'fp16', Always(0))
    begun = conv_net().float().state_dict()
    assert all(torch.equal(v, begun[k]) for k,v in learn.model.state_dict().items())
