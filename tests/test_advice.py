"`learn.memory_plan()`: the plan of a learner is its fit with `AccumulateGradBN`, and its advice holds"
import copy
import re

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from fastai.vision.all import SGD, Adam, CrossEntropyLossFlat, Lamb, MixedPrecision

from fastai_bn import advice
from fastai_bn.advice import measured_peak, run_in_window
from fastai_bn.all import CARDS, AccumulateGradBN
from fastai_bn.counting import CountedWindows
from fastai_bn.plan import planned
from helpers import do_fit, get_dls, get_learner, labels, quiet_budget

pytestmark = [quiet_budget, pytest.mark.usefixtures('all_move')]

def big_net():
    conv = lambda ni,nf: nn.Sequential(nn.Conv2d(ni, nf, 3, padding=1), nn.BatchNorm2d(nf), nn.ReLU(inplace=True))
    return nn.Sequential(conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), nn.Dropout(.2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 5))

def make(model=None, bs=2, cbs=(), opt_func=SGD, size=32):
    torch.manual_seed(0)
    xs,ys = torch.randn(32, 3, size, size),labels(32)
    kw = dict(loss_func=CrossEntropyLossFlat(), opt_func=opt_func)
    return get_learner(get_dls(xs, ys, bs), model or big_net(), cbs, **kw)

def pager_of(n_epoch=1, n_step=4, **kw):
    "Fit, and return the pager"
    learn = make(cbs=[AccumulateGradBN(n_step, bn_bs='window', **kw)])
    do_fit(learn, n_epoch)
    return learn.accumulate_grad_bn.pager

def found_in(df, way): return df[df.way == way].iloc[0]

@pytest.mark.parametrize('micro_bs', [None, 3])
def test_the_plan_is_the_fit_to_the_byte(micro_bs):
    learn = make()
    whole = found_in(learn.memory_plan(4, plot=False), 'whole')
    memory = whole.weights + (.6*whole.peak if micro_bs is None else .9*whole.floor)
    plan = learn.memory_plan(4, memory=int(memory/.9), plot=False)
    row = found_in(plan, 'budget' if micro_bs is None else 'lockstep')
    pager = pager_of(budget=int(row.budget), micro_bs=None if micro_bs is None else int(row.micro_bs))
    assert (row.peak, row.floor, row.host) == (pager.peak, pager.need, pager.host_peak)

SAYS = dict(
    whole=(lambda o: 2*o.total, r"bn_bs='window'\)"),
    budget=(lambda o: .9*o.total, r"bn_bs='window', budget=\d+\)"),
    lockstep=(lambda o: (.9*o.floor+o.weights)/.9, r"bn_bs='window', micro_bs=\d+, budget=\d+\)"),
    nothing=(lambda o: o.weights, 'nothing makes it fit'))

@pytest.mark.parametrize('way', SAYS)
def test_the_advice_is_a_call_that_holds(way, capsys):
    learn = make()
    whole = found_in(learn.memory_plan(4, plot=False), 'whole')
    assert "Name the device's memory" in capsys.readouterr().out
    memory,says = SAYS[way]
    memory = int(memory(whole))
    df = learn.memory_plan(4, memory=memory, plot=False)
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and re.search(says, said), said
    if way == 'nothing': return
    assert found_in(df, way).total <= .9*memory
    args = said[said.index('AccumulateGradBN('):]
    cb = eval(args, dict(AccumulateGradBN=AccumulateGradBN))
    do_fit(make(cbs=cb))
    if cb.pager is not None: assert cb.pager.peak + whole.weights <= .9*memory

@pytest.mark.parametrize('card,share', [('T4',.7), ('A100',.3)])
def test_the_advice_is_as_fast_as_the_best_of_many(card, share, capsys):
    "In modelled time, of budgets and sizes of pieces that are powers of two"
    learn = make(size=512)
    whole = found_in(learn.memory_plan(4, plot=False), 'whole')
    usable = int(share*whole.peak)
    df = learn.memory_plan(4, memory=int((usable+whole.weights)/.9)+1, card=card, plot=False)
    mine = found_in(df, 'lockstep' if 'micro_bs' in capsys.readouterr().out else 'budget')
    with planned(learn.model, learn.loss_func) as fakes:
        windows = CountedWindows(learn.model, learn.loss_func, fakes, CARDS[card], run_in_window, keep_grads=True)
        b = fakes.all_in(((torch.empty(8, 3, 512, 512),), (torch.empty(8, dtype=torch.long),)))
        rows = [windows.row('any', *b, usable*i//10, k) for i in (4, 7, 9, 10) for k in (None, 4, 2)]
    assert mine.seconds <= 1.05*min(o['seconds'] for o in rows if o['peak'] <= usable)

def test_a_large_budget_is_said_in_mib(capsys):
    make(size=512).memory_plan(8, memory='130MiB', plot=False)
    assert re.search(r"budget='\d+MiB'", capsys.readouterr().out)

def test_the_learner_is_left_as_it_was():
    learn = make(opt_func=Adam)
    learn.model.eval()
    before = copy.deepcopy(learn.model.state_dict())
    state = torch.get_rng_state(),learn.dls.train.rng.getstate()
    learn.memory_plan(4, memory='1MiB', plot=False)
    assert_same_bits_of(before, learn.model.state_dict())
    assert not learn.model.training and learn.opt is None and all(p.grad is None for p in learn.model.parameters())
    assert torch.equal(torch.get_rng_state(), state[0]) and learn.dls.train.rng.getstate() == state[1]

def assert_same_bits_of(a, b): assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_it_plans_training_with_what_is_frozen_and_in_the_precision_of_the_fit():
    plain = make().memory_plan(4, plot=False).peak[0]
    learn = make()
    learn.model.eval()
    assert learn.memory_plan(4, plot=False).peak[0] == plain
    assert make(cbs=MixedPrecision()).memory_plan(4, plot=False).peak[0] < .7*plain
    learn = make()
    for p in learn.model[:4].parameters(): p.requires_grad_(False)
    assert learn.memory_plan(4, plot=False).peak[0] < .7*plain

def test_a_real_micro_batch_is_measured_without_a_trace():
    learn = make()
    model = learn.model
    xb,yb = learn.dls.one_batch()
    model(xb).sum().backward()
    before,grads = copy.deepcopy(model.state_dict()),[p.grad.clone() for p in model.parameters()]
    model.eval()
    peak = measured_peak(model, learn.loss_func, (xb,), (yb,))
    assert peak == found_in(learn.memory_plan(4, plot=False), 'accumulated').peak
    assert_same_bits_of(before, model.state_dict())
    assert all(torch.equal(p.grad, g) for p,g in zip(model.parameters(), grads)) and not model.training

def test_a_device_that_takes_more_has_less_to_give(monkeypatch, capsys):
    "An accelerator whose micro-batch takes twice what was planned"
    learn = make()
    df = learn.memory_plan(4, plot=False)
    whole,accumulated = found_in(df, 'whole'),found_in(df, 'accumulated')
    monkeypatch.setattr(advice, '_device_of', lambda model: torch.device('xpu'))
    monkeypatch.setattr(advice, 'measured_peak', lambda *args: 2*accumulated.peak)
    learn.memory_plan(4, memory=int(1.5*whole.total), plot=False)
    said = capsys.readouterr().out
    assert 'times the planned' in said and 'budget=' in said

def test_an_optimizer_that_reads_values_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="without the optimizer's state"):
        df = make(opt_func=Lamb).memory_plan(4, plot=False)
    assert df.weights[0] == make().memory_plan(4, plot=False).weights[0]

def test_the_picture():
    make().memory_plan(4, memory='1MiB')
    ax = plt.gca()
    assert ax.get_xlabel() == 'GiB moved in a window' and "the device's memory" in ax.get_legend_handles_labels()[1]
    plt.close('all')
    make().memory_plan(4, card='T4')
    assert 'modelled' in plt.gca().get_xlabel()
    plt.close('all')

def test_a_card_has_its_memory(capsys):
    df = make().memory_plan(4, card='T4', plot=False)
    assert df.seconds.notna().all()
    assert f'{CARDS["T4"].memory/2**30:.2f} GiB' in capsys.readouterr().out

@pytest.mark.parametrize('kw,said', [
    (dict(n_step=0), 'got 0'), (dict(card='K80'), 'T4'),
    (dict(memory=.5), '`memory`.*got 0.5'), (dict(memory='much'), '`memory`.*much')])
def test_bad_arguments(kw, said):
    with pytest.raises(ValueError, match=said): make().memory_plan(**kw)
