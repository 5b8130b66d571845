"""The recipes of the page "In any loop", run against the installed libraries: each test executes the page's own cells.
And what else a user of these libraries meets: precision, clipping, limits, schedules, exceptions"""
import copy
import json
import logging
import subprocess
import sys
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recipes
from fastai_bn.all import AccumulateGradBN, ActivationPager
from helpers import (
    LAUNCH, Boom, assert_differ, assert_equal_states, assert_same, assert_same_bits, conv_net, do_fit, get_dls,
    get_learner, labels, mean_ce, process_env, quiet_budget, reference_fit, snapshot, stand_ins, tilted, windows_of)

pytestmark = quiet_budget
TOL = 1e-12  # of weights and statistics of size one, after four steps
LIBRARIES = {'Lightning':'lightning.pytorch', 'Accelerate':'accelerate', 'Hugging Face Trainer':'transformers'}

@cache
def page(section:str) -> dict:
    "Run the page's cells of `section`, after those that all need; get the names that they define"
    if section in LIBRARIES: pytest.importorskip(LIBRARIES[section], reason=f'{LIBRARIES[section]} is not installed')
    if section == 'Lightning': logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    return recipes.run_cells(section)

def by_hand(names, n_epoch=2, n=4, model=None, **kw):
    "The same accumulation by hand: the mean over all samples, and pooled statistics"
    windows = windows_of(names['xs'], names['ys'], 3, n)
    return reference_fit(model or names['net'](), windows, mean_ce, n_epoch=n_epoch, **kw)

def check(names, usual, windowed, paged):
    "The library's own accumulation differs, a window is the accumulation by hand, a pager gives the large batch"
    assert_differ(usual, names['want'])
    assert_differ(windowed, names['want'])
    assert_same(windowed, by_hand(names), TOL)
    assert_same_bits(paged, names['want'])
    assert not stand_ins(windowed)
    assert usual[1].num_batches_tracked == 16 and windowed[1].num_batches_tracked == 4


# --- The recipes

def test_plain_pytorch():
    p = page('Plain PyTorch')
    check(p, *p['models'].values())

def test_lightning():
    p = page('Lightning')
    check(p, *p['lit'].values())
    assert_same(p['manual'], by_hand(p), TOL)

def test_accelerate():
    p = page('Accelerate')
    check(p, *p['accelerated'].values())

def test_trainer():
    p = page('Hugging Face Trainer')
    check(p, *p['trained'].values())

@pytest.mark.parametrize('section,run', [
    ('Plain PyTorch', lambda p: p['paged']()),
    ('Lightning', lambda p: p['fit'](12, p['Paged']('300KB'))),
    ('Accelerate', lambda p: p['accelerate_paged']()),
    ('Hugging Face Trainer', lambda p: p['train'](p['PagedTrainer'], 12, budget='300KB'))],
    ids=['plain', 'lightning', 'accelerate', 'trainer'])
def test_pagers_are_at_work(section, run, monkeypatch):
    "Four windows, and something leaves in them"
    p,pagers = page(section),[]
    class Seen(ActivationPager):
        n_blocks = 0
        def __init__(self, *args):
            super().__init__(*args)
            pagers.append(self)
        def __exit__(self, *exc):
            super().__exit__(*exc)
            self.n_blocks += 1
    monkeypatch.setitem(p, 'ActivationPager', Seen)
    run(p)
    assert [o.n_blocks for o in pagers] == [4] and pagers[0].moved > 0


# --- Lightning

def single(classifier):
    "A module in single precision, on larger images: a pager leaves small tensors where they are"
    class Single(classifier):
        def __init__(self):
            super().__init__()
            self.model.float()
        def training_step(self, batch, batch_idx):
            xb,yb = batch
            return super().training_step((xb.float().repeat(1,1,4,4), yb), batch_idx)
    return Single

@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed'])
@pytest.mark.parametrize('bs,n,budget', [(12,1,'1.5MB'), (3,4,'400KB')], ids=['large', 'accumulated'])
def test_paged_batches_in_another_precision(bs, n, budget, precision):
    "Whatever Lightning trains: with the pager it has the same bits"
    p = page('Lightning')
    kw = dict(module=single(p['Classifier']), precision=precision, accumulate_grad_batches=n)
    cb = p['Paged'](budget)
    assert_same_bits(p['fit'](bs, cb, **kw), p['fit'](bs, **kw))
    assert cb.pager.moved + cb.pager.remade > 0

@pytest.mark.parametrize('kw', [
    dict(limit_train_batches=6),
    dict(val_check_interval=3, limit_val_batches=2),
    dict(max_steps=3)], ids=str)
def test_accumulated_with_options_of_the_trainer(kw):
    "A validation in mid-window changes nothing; a limit makes the last window shorter"
    p,seen = page('Lightning'),[]
    class Validated(p['Classifier']):
        def validation_step(self, batch, batch_idx): seen.append(F.cross_entropy(self.model(batch[0]), batch[1]))
        def val_dataloader(self): return p['DataLoader'](p['data'], 5)
    got = p['fit'](3, p['Accumulated'](), module=Validated, accumulate_grad_batches=4, **kw)
    windows = windows_of(p['xs'], p['ys'], 3, 4)
    if 'limit_train_batches' in kw: windows[1] = windows[1][:2]
    windows = (windows*2)[:kw.get('max_steps', 4)]
    assert_same(got, reference_fit(p['net'](), windows, mean_ce), TOL)
    assert seen

def test_accumulated_beside_clipping():
    "Gradients are those of the mean when Lightning clips them"
    p,norms = page('Lightning'),[]
    class Clipped(p['Classifier']):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            norms.append(nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val).item())
    p['fit'](3, p['Accumulated'](), module=Clipped, accumulate_grad_batches=4, gradient_clip_val=1e-9)
    model = p['net']().train()
    (x,y), = [map(torch.cat, zip(*w)) for w in windows_of(p['xs'], p['ys'], 3, 4)[:1]]
    sum(F.cross_entropy(model(a), b, reduction='sum')/12 for a,b in zip(x.split(3), y.split(3))).backward()
    want = torch.cat([o.grad.flatten() for o in model.parameters()]).norm().item()
    assert len(norms) == 4 and norms[0] == pytest.approx(want, rel=TOL)

def test_accumulated_beside_a_loss_scaler():
    "The gradient is that of the scaled loss until Lightning unscales it"
    p = page('Lightning')
    class Scaled(p['pl'].plugins.MixedPrecision):
        def autocast_context_manager(self): return nullcontext()
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    got = p['fit'](3, p['Accumulated'](), plugins=[Scaled('16-mixed', 'cpu', scaler)], accumulate_grad_batches=4)
    assert_same(got, by_hand(p), TOL)
    assert scaler.get_scale() == 2.**10

def test_accumulated_with_a_schedule():
    "One micro-batch to a step in the first epoch, four in the second"
    p = page('Lightning')
    schedule = p['pl'].callbacks.GradientAccumulationScheduler({0:1, 1:4})
    got = p['fit'](3, p['Accumulated'](), schedule)
    assert_same(got, by_hand(p, 1, 4, by_hand(p, 1, 1)), TOL)

@pytest.mark.parametrize('name', ['Paged', 'Accumulated'])
@pytest.mark.parametrize('way', ['forward', 'none'])
def test_a_batch_without_a_backward_pass(name, way):
    "An exception in `training_step`, or None from it: the callback leaves nothing behind, and can be used again"
    p = page('Lightning')
    class Fails(p['Classifier']):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1 and way == 'forward': raise Boom
            return None if batch_idx == 1 else loss
    cb = p[name]()
    fit = lambda module: p['fit'](3, cb, module=module, accumulate_grad_batches=4)
    if way == 'none': model = fit(Fails)
    else:
        with pytest.raises(Boom): fit(Fails)
        model = p['net']()
    assert not stand_ins(model)
    want = by_hand(p) if name == 'Accumulated' else p['lit']['accumulate_grad_batches']
    assert_same(fit(p['Classifier']), want, TOL)

def test_a_skipped_micro_batch_does_not_count():
    p = page('Lightning')
    class Skips(p['Classifier']):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss
    got = p['fit'](3, p['Accumulated'](), module=Skips, accumulate_grad_batches=4)
    windows = windows_of(p['xs'], p['ys'], 3, 4)
    del windows[0][1]
    assert_same(got, reference_fit(p['net'](), windows*2, mean_ce), TOL)

def test_two_passes_in_a_training_step():
    "Statistics are updated once per pass of the model and step, as with the large batch"
    p = page('Lightning')
    class Twice(p['Classifier']):
        def training_step(self, batch, batch_idx):
            xb,yb = batch
            return F.cross_entropy(self.model(xb), yb) + F.cross_entropy(self.model(xb*1.5), yb)
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.)
    got = p['fit'](3, p['Accumulated'](), module=Twice, accumulate_grad_batches=4)
    large = p['fit'](12, module=Twice)
    first = lambda m: {k:v for k,v in m[1].state_dict().items()}
    for k,v in first(large).items(): torch.testing.assert_close(first(got)[k], v, rtol=TOL, atol=TOL)

@pytest.mark.parametrize('averages_first', [False, True])
def test_an_average_has_weights_and_statistics_of_the_same_step(averages_first):
    "Lightning's own average, before and after the callback: both are those of the last step, at a decay of zero"
    p = page('Lightning')
    average = p['pl'].callbacks.WeightAveraging(avg_fn=lambda averaged, current, n: current)
    cbs = [average, p['Accumulated']()]
    assert_same(p['fit'](3, *cbs[::1 if averages_first else -1], accumulate_grad_batches=4), by_hand(p), TOL)


# --- Accelerate and the Trainer

def resnet():
    "A tiny ResNet of transformers, which computes its loss itself"
    from transformers import ResNetConfig, ResNetForImageClassification
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4,8], depths=[1,1], layer_type='basic', num_labels=4)
    return ResNetForImageClassification(config).double()

class Logits(nn.Module):
    "Give the logits of a model of transformers"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x).logits

def test_a_model_of_transformers():
    p = page('Hugging Face Trainer')
    large = p['train'](p['Trainer'], 12, model=resnet())
    assert_same_bits(p['train'](p['PagedTrainer'], 12, budget='100KB', model=resnet()), large)
    windowed = p['train'](p['WindowTrainer'], 3, 4, model=resnet())
    assert_same(windowed, by_hand(p, model=Logits(resnet())).model, TOL)
    assert_differ(p['train'](p['Trainer'], 3, 4, model=resnet()), windowed)

def test_callbacks_of_the_trainer_see_the_statistics_of_the_step():
    p,seen = page('Hugging Face Trainer'),[]
    from transformers import TrainerCallback
    class See(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kw): seen.append(snapshot(model.model))
    model = p['train'](p['WindowTrainer'], 3, 4, callbacks=[See()])
    assert len(seen) == 4
    assert_equal_states(seen[-1], model.model.state_dict())

@pytest.mark.parametrize('name', ['PagedTrainer', 'WindowTrainer'])
def test_an_exception_in_the_trainer(name):
    p = page('Hugging Face Trainer')
    class Fails(p[name]):
        def compute_loss(self, *args, **kw):
            loss = super().compute_loss(*args, **kw)
            if self.state.global_step == 1: raise Boom
            return loss
    model = p['WithLoss']()
    with pytest.raises(Boom): p['train'](Fails, 3, 4, model=model)
    assert not stand_ins(model)
    with ActivationPager(None): pass  # none is open

# --- The DataLoader gives the optimizer's batch

def test_slices_of_the_page():
    p = page("The DataLoader gives the optimizer's batch")
    assert_same(p['in_slices'], p['want'])

@pytest.mark.parametrize('bs,micro_bs', [(8,2), (8,3), (12,12), (23,1)])
@pytest.mark.parametrize('kw', [{}, dict(budget='300KB')], ids=str)
def test_slices_of_a_learners_batch(bs, micro_bs, kw):
    "`n_step` 1 and `micro_bs`: the large batch, exact to rounding, in as many steps and batches"
    def fit(*cbs):
        learn = get_learner(get_dls(tilted(23), labels(23), bs), conv_net(), cbs)
        do_fit(learn, 2)
        return learn
    got,want = fit(AccumulateGradBN(1, micro_bs=micro_bs, **kw)),fit()
    assert_same(got.model, want.model)
    assert len(got.recorder.losses) == len(want.recorder.losses) == 2*-(-23//bs)

def test_the_libraries_large_batch_is_that_of_plain_pytorch():
    "So one reference serves all"
    p = page('Lightning')
    assert_same_bits(p['fit'](12), p['want'])
    t = page('Hugging Face Trainer')
    assert_same_bits(copy.deepcopy(t['train'](t['Trainer'], 12)).model, t['want'])

def test_windows_in_two_processes(tmp_path):
    "Gradients are averaged once per window: weights are those of one process with all samples"
    for name in LIBRARIES.values(): pytest.importorskip(name, reason=f'{name} is not installed')
    env = {**process_env(), 'OMP_NUM_THREADS':'1'}
    command = [sys.executable, *LAUNCH, recipes.__file__, tmp_path]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    for rank in (0, 1):
        errors = json.loads((tmp_path/f'{rank}.json').read_text())
        assert errors.keys() == {'accelerate','trainer','accumulated','manual'} and max(errors.values()) < TOL
