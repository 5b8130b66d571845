"`AccumulateGradBN` with each micro-batch a BN batch: whole fits beside the loop written by hand, and what may go wrong"
import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import (
    Adam, BCEWithLogitsLossFlat, BnFreeze, Callback, CancelBatchException, CancelEpochException, CancelFitException,
    CancelTrainException, CrossEntropyLossFlat, CutMix, DataLoader, DataLoaders, EarlyStoppingCallback,
    FocalLossFlat, GradientAccumulation, GradientClip, MSELossFlat, MixUp, MixedPrecision, SGD, SaveModelCallback,
    TfmdDL, accuracy, load_learner, noop, params)

from fastai_bn.accumulate import *
from helpers import (
    ADAM, F64, Boom, CPUScaler, Checkpointed, DoAt, Inputs, Norms, RaiseAt, assert_differ, assert_pristine, assert_same,
    conv_net, counted_ce, do_fit, get_dls, get_learner, labels, mean_ce, reference_fit, rounding, small_unet, snapshot,
    stand_ins, tilted, windows_of)

sgd_adam = pytest.mark.parametrize('opt_func', [SGD, Adam], ids=['sgd','adam'])


# --- The window's gradient and statistics, through whole fits, against the loop written by hand

@sgd_adam
@pytest.mark.parametrize('momentum', [.1, .3, None])
@pytest.mark.parametrize('n,bs,n_step', [(24,4,3), (23,4,3), (22,2,4), (24,3,1), (20,4,16)])
def test_fit_is_the_fit_by_hand(n, bs, n_step, momentum, opt_func):
    xs,ys = tilted(n),labels(n)
    learn = get_learner(get_dls(xs, ys, bs), conv_net(momentum=momentum), AccumulateGradBN(n_step), opt_func=opt_func)
    do_fit(learn, 3)
    ref = reference_fit(conv_net(momentum=momentum), windows_of(xs, ys, bs, n_step), mean_ce, opt_func, 3)
    assert_same(learn.model, ref, ADAM if opt_func is Adam else rounding())
    assert_pristine(learn)

def test_plain_accumulation_is_not_it():
    xs,ys = tilted(24),labels(24)
    def fit(cb):
        learn = get_learner(get_dls(xs, ys, 4), conv_net(), cb)
        do_fit(learn)
        return learn.model
    assert_differ(fit(AccumulateGradBN(3)), fit(GradientAccumulation(12)))

def test_last_drop():
    xs,ys = tilted(23),labels(23)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), AccumulateGradBN(4, last='drop'))
    do_fit(learn, 2)
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 4, 4, 'drop'), mean_ce, n_epoch=2))

def test_numpy_integer_n_step(): assert AccumulateGradBN(np.int64(3)).n_step == 3

def test_without_bn_the_window_is_the_large_batch():
    xs,ys = tilted(22),labels(22)
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108,8), nn.Tanh(), nn.Linear(8,5)).double()
    def fit(bs, *cbs):
        learn = get_learner(get_dls(xs, ys, bs), net(), cbs, opt_func=Adam)
        do_fit(learn, 3, 1e-2)
        return learn.model
    with pytest.warns(UserWarning, match='no BatchNorm') as w: small = fit(2, AccumulateGradBN(4))
    assert len(w) == 1  # once, not per epoch
    assert_same(small, fit(8), ADAM)


# --- Denominators

def seg_data(n=10):
    g = torch.Generator().manual_seed(3)
    ys = torch.randint(0, 4, (n,6,6), generator=g)
    for i in range(n): ys[i].view(-1)[:3*i] = 9  # ignored, more from image to image
    return tilted(n),ys

def seg_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3,6,3,padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6,4,1)).double()

W = torch.tensor([1.,5.,.2,3.], dtype=F64)
def ce_parts(p, y, **kw):
    "Sum and denominator of PyTorch's weighted mean, by its documentation"
    w = kw.get('weight', torch.ones(4, dtype=F64))
    keep = y != kw.get('ignore_index', -100)
    return F.cross_entropy(p, y, reduction='sum', **kw), w[y[keep]].sum()

def flat(**kw):
    "fastai's losses compute in float32 whatever comes"
    return CrossEntropyLossFlat(axis=1, **{k:v.float() if isinstance(v, torch.Tensor) else v for k,v in kw.items()})

LOSSES = dict(
    nn=(nn.CrossEntropyLoss, rounding()),
    flat=(flat, 1e-6),
    partial=(partial(partial, F.cross_entropy), rounding()))

@pytest.mark.parametrize('kw', [dict(ignore_index=9), dict(ignore_index=9, weight=W)], ids=['ignore','ignore+weight'])
@pytest.mark.parametrize('make,tol', LOSSES.values(), ids=LOSSES)
def test_ignored_pixels_and_class_weights(make, tol, kw):
    xs,ys = seg_data()
    windows = windows_of(xs, ys, 2, 4)
    learn = get_learner(get_dls(xs, ys, 2), seg_net(), AccumulateGradBN(4), loss_func=make(**kw))
    do_fit(learn, 2)
    ref = reference_fit(seg_net(), windows, partial(ce_parts, **kw), n_epoch=2)
    assert_same(learn.model, ref, tol)
    mean_of_means = reference_fit(seg_net(), windows, lambda p,y: (F.cross_entropy(p, y, **kw), 1), n_epoch=2)
    assert_differ(learn.model, mean_of_means)

def test_nll_loss_and_class_probabilities():
    y = torch.tensor([0,-100,2])
    assert loss_denominator(nn.NLLLoss(), None, y) == 2
    assert loss_denominator(F.nll_loss, None, y) == 2
    assert loss_denominator(nn.CrossEntropyLoss(weight=torch.ones(3)), None, torch.rand(4,3)) == 4

def test_bce_and_mse_count_samples():
    def mean_error(p, y): return (p-y).abs().mean()
    for l in (BCEWithLogitsLossFlat(), nn.MSELoss(), MSELossFlat(), F.l1_loss, mean_error, FocalLossFlat()):
        assert loss_denominator(l, None, torch.rand(3,7)) == 3

SUMS = dict(
    nn=(nn.CrossEntropyLoss(reduction='sum'), rounding()),
    flat=(CrossEntropyLossFlat(reduction='sum'), 1e-6),
    partial=(partial(F.cross_entropy, reduction='sum'), rounding()))

@pytest.mark.parametrize('loss,tol', SUMS.values(), ids=SUMS)
def test_summed_loss_is_not_divided(loss, tol):
    xs,ys = tilted(10),labels(10)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), AccumulateGradBN(4), loss_func=loss)
    do_fit(learn, 2, 1e-3)
    assert_same(learn.model, summed_reference(xs, ys), tol)

def summed_reference(xs, ys):
    "The gradient of the plain sum: denominators that add up to 1, whatever the window's length"
    w = windows_of(xs, ys, 2, 4)
    parts = [[((x,len(o)),y) for x,y in o] for o in w]
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()
        def forward(self, xn): return self.net(xn[0]),xn[1]
    def loss_sum(p, y): return F.cross_entropy(p[0], y, reduction='sum'),1/p[1]
    return reference_fit(Net(), parts, loss_sum, n_epoch=2, lr=1e-3).net

def test_weight_callable():
    xs,ys = tilted(10),labels(10)
    def denominator(p, y): return (y+1).sum()
    def loss(p, y): return F.cross_entropy(p, y, reduction='sum')/denominator(p, y)
    def loss_sum(p, y): return F.cross_entropy(p, y, reduction='sum'),denominator(p, y)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), AccumulateGradBN(4, weight=denominator), loss_func=loss)
    do_fit(learn, 2)
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 2, 4), loss_sum, n_epoch=2))

@pytest.mark.parametrize('bad', [-1, float('nan'), float('inf')])
def test_weight_callable_returns_nonsense(bad):
    learn = get_learner(get_dls(tilted(4), labels(4), 2), conv_net(), AccumulateGradBN(2, weight=lambda *_: bad))
    with pytest.raises(ValueError, match='denominator'): do_fit(learn)
    assert_pristine(learn)

@pytest.mark.parametrize('empty', [[0], [1], [3], [4], [0,1,2,3], [0,1,2,3,4]])
def test_a_batch_with_every_target_ignored_counts_for_nothing(empty):
    xs,ys = tilted(10),labels(10)
    for i in empty: ys[2*i:2*i+2] = -100
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(4), Track()], opt_func=Adam)
    do_fit(learn, 2, 1e-2)
    assert all(p.isfinite().all() for p in learn.model.state_dict().values())
    losses = learn.recorder.losses
    assert len(losses) == 2*(5-len(empty)) and all(l.isfinite() for l in losses)  # empty ones are not logged
    w = [w for w in windows_of(xs, ys, 2, 4) if any((y!=-100).any() for _,y in w)]  # a window of nothing makes no step
    assert learn.track.steps == 2*len(w)
    assert_same(learn.model, reference_fit(conv_net(), w, counted_ce, Adam, n_epoch=2, lr=1e-2), ADAM)


# --- Steps, logs, schedule

class Track(Callback):
    order = 60
    def before_fit(self): self.steps,self.logged,self.lrs = 0,[],[]
    def before_step(self): self.cancelled = False
    def after_cancel_step(self): self.cancelled = True
    def after_step(self):
        if self.cancelled: return
        self.steps += 1
        self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_batch(self):
        if self.training: self.logged.append(self.loss.item())

@pytest.mark.parametrize('n,last,steps', [(24,'step',3), (25,'step',4), (25,'drop',3), (24,'drop',3)])
def test_number_of_steps(n, last, steps):
    learn = get_learner(get_dls(tilted(n), labels(n), 2), conv_net(), [AccumulateGradBN(4, last=last), Track()])
    do_fit(learn, 2)
    assert learn.track.steps == 2*steps
    assert learn.model[1].num_batches_tracked == 2*steps

def test_the_loss_that_is_logged_is_unscaled():
    xs,ys = tilted(8),labels(8)
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(4), Track()])
    do_fit(learn, 1, 0.)
    model = conv_net().train()
    want = torch.stack([F.cross_entropy(model(x), y) for x,y in zip(xs.split(2), ys.split(2))])
    torch.testing.assert_close(torch.tensor(learn.track.logged), want.float())

@pytest.mark.parametrize('n,num_it', [(40,7), (40,13), (44,12), (8,9)])
def test_lr_find_makes_num_it_steps(n, num_it):
    learn = get_learner(get_dls(tilted(n), labels(n), 2), conv_net(), [AccumulateGradBN(4), Track()])
    before = snapshot(learn.model)
    with learn.no_logging(): learn.lr_find(num_it=num_it, show_plot=False, stop_div=False)
    assert learn.track.steps == num_it
    assert learn.track.lrs == sorted(learn.track.lrs) and 5 < learn.track.lrs[-1] <= 10
    torch.testing.assert_close(snapshot(learn.model), before, rtol=0, atol=0)
    assert_pristine(learn)
    do_fit(learn, 1)  # as many as ever
    assert learn.track.steps == -(-n//8)

def test_fit_one_cycle_and_fine_tune():
    xs,ys = tilted(24),labels(24)
    def split(m): return [params(m[:3]), params(m[3:])]
    learn = get_learner(get_dls(xs, ys, 2), conv_net(), [AccumulateGradBN(4), Track()], splitter=split)
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
        assert learn.track.steps == 6
        assert max(learn.track.lrs) <= 1e-2 and learn.track.lrs[-1] < 1e-3
        learn.fine_tune(1)
    assert_pristine(learn)


# --- Nothing leaks

def test_a_fit_leaves_nothing_for_the_next():
    xs,ys = tilted(23),labels(23)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), AccumulateGradBN(4, last='drop'))
    for _ in range(2): do_fit(learn, 1)
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 4, 4, 'drop'), mean_ce, n_epoch=2))

@pytest.mark.parametrize('order', [0, 20])
@pytest.mark.parametrize('at', [0, 1, 3, 5])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss'])
def test_a_cancelled_batch_is_as_if_it_never_was(event, at, order):
    xs,ys = tilted(24),labels(24)
    cancel = RaiseAt(event, at, CancelBatchException(), order)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), cancel])
    do_fit(learn, 1)
    keep = [i for i in range(6) if i != at]
    batches = list(zip(xs.split(4), ys.split(4)))
    ref = reference_fit(conv_net(), [[batches[i] for i in o] for o in (keep[:3],keep[3:])], mean_ce)
    assert_same(learn.model, ref)
    assert_pristine(learn)

@pytest.mark.parametrize('order', [0, 20])
@pytest.mark.parametrize('event', ['after_backward','before_step'])
@pytest.mark.parametrize('at', [2, 5])
def test_a_batch_cancelled_with_its_gradient_takes_the_window_along(event, order, at):
    xs,ys = tilted(24),labels(24)
    cancel = RaiseAt(event, at, CancelBatchException(), order)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), cancel])
    do_fit(learn, 1)
    w = windows_of(xs, ys, 4, 3)
    del w[at//3]
    assert_same(learn.model, reference_fit(conv_net(), w, mean_ce))

@pytest.mark.parametrize('exc', [CancelTrainException, CancelEpochException, CancelFitException])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_batch'])
def test_cancelled_epochs_and_fits_leave_nothing(event, exc):
    xs,ys = tilted(24),labels(24)
    cb = RaiseAt(event, 4, exc())
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), cb])
    do_fit(learn, 1)
    assert cb.done
    w = windows_of(xs, ys, 4, 3)
    assert_same(learn.model, reference_fit(conv_net(), w[:1], mean_ce))
    assert_pristine(learn)
    learn.remove_cb(cb)
    learn.opt.clear_state()
    do_fit(learn, 1)
    assert_same(learn.model, reference_fit(conv_net(), [w[0], *w], mean_ce))

class BoomAt(nn.Module):
    "Identity that raises on the `at`-th forward or backward"
    def __init__(self, at, in_backward=False, exc=Boom):
        super().__init__()
        self.n,self.at = 0,at
        self.in_backward,self.exc = in_backward,exc
    def forward(self, x):
        self.n += self.training
        if self.n == self.at and self.training:
            if not self.in_backward: raise self.exc
            x.register_hook(self._raise)
        return x
    def _raise(self, g): raise self.exc

WHERE = ['forward','backward','loss','before_batch','after_pred','after_loss','after_backward','before_step',
         'after_step','after_batch']

@pytest.mark.parametrize('exc', [Boom, KeyboardInterrupt])
@pytest.mark.parametrize('where', WHERE)
def test_exceptions_restore(where, exc):
    xs,ys = tilted(24),labels(24)
    model,cbs,loss = conv_net(),[AccumulateGradBN(3)],nn.CrossEntropyLoss()
    calls = [0]
    def bad_loss(p, y):
        calls[0] += 1
        if calls[0] == 6: raise exc
        return F.cross_entropy(p, y)
    boom = BoomAt(6, where=='backward', exc)
    if where in ('forward','backward'): model.insert(3, boom)
    elif where == 'loss': loss = bad_loss
    else: cbs.append(RaiseAt(where, 5, exc('x')))
    learn = get_learner(get_dls(xs, ys, 4), model, cbs, loss_func=loss)
    with pytest.raises(exc): do_fit(learn)
    if where in ('forward','backward'): del model[3]
    assert not stand_ins(model) and not any(m._forward_hooks for m in model.modules())
    w = windows_of(xs, ys, 4, 3)
    # The whole first window, nothing of the second
    if where == 'after_batch': assert_same(model, reference_fit(conv_net(), w, mean_ce))
    elif where != 'after_step': assert_same(model, reference_fit(conv_net(), w[:1], mean_ce))
    assert learn.validate()[0] == learn.validate()[0]  # still usable
    before,learn.loss_func = copy.deepcopy(model),nn.CrossEntropyLoss()
    learn.remove_cbs(learn.cbs.filter(lambda cb: isinstance(cb, RaiseAt)))
    learn.create_opt()
    do_fit(learn)
    assert_same(model, reference_fit(before, w, mean_ce))
    assert_pristine(learn)

@pytest.mark.slow
@pytest.mark.parametrize('exc', [Boom, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['data','before_batch','after_batch','before_train'])
@pytest.mark.parametrize('how', ['learner','fit'])
def test_exceptions_around_a_batch_leave_nothing(where, how, exc):
    xs,ys = tilted(24),labels(24)
    class BadDL(TfmdDL):
        def __iter__(self):
            for i,b in enumerate(super().__iter__()):
                if where=='data' and i==4: raise exc
                yield b
    good,cbs = get_dls(xs, ys, 4),[AccumulateGradBN(3)]
    dls = DataLoaders(BadDL(good.train.dataset, bs=4), good.valid, device='cpu')
    if where != 'data': cbs.append(RaiseAt(where, 4, exc('x'), order=20))
    learn = get_learner(dls, conv_net(), cbs if how=='learner' else [])
    learn.create_opt()
    if where == 'before_train': learn.iter,learn.training = 4,True
    with pytest.raises(exc): do_fit(learn, cbs=cbs if how=='fit' else None)
    w = windows_of(xs, ys, 4, 3)
    done = w[:0] if where == 'before_train' else w[:1]
    assert_same(learn.model, reference_fit(conv_net(), done, mean_ce))
    assert all(p.grad is None or (p.grad==0).all() for p in learn.model.parameters())
    if where == 'before_train': return  # its own loop never began
    assert_pristine(learn)
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, (AccumulateGradBN,RaiseAt))])
    learn.dls = good
    do_fit(learn)  # and fastai's own way works as ever

def test_validation_that_leaves_the_learner_in_evaluation():
    xs,ys = tilted(24),labels(24)
    validate = DoAt('after_batch', 4, lambda l: l.validate())
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), validate])
    do_fit(learn)
    w = windows_of(xs, ys, 4, 3)
    assert_same(learn.model, reference_fit(conv_net(), [w[0], w[1][:2]], mean_ce))  # the third was not trained on

def test_a_tiny_first_denominator_does_not_inflate_the_rest():
    xs,ys = tilted(12, size=(8,8)),(tilted(12, size=(8,8)).mean(1)>0).long()
    ys[:3].view(-1)[1:] = -100
    seen = []
    class See(Callback):
        order = 7
        def after_loss(self): seen.append((self.loss_grad.abs()/self.loss.abs()).item())
    learn = get_learner(get_dls(xs, ys, 3), seg_net(), [AccumulateGradBN(4), See()])
    do_fit(learn)
    assert max(seen) < 1.001
    assert_same(learn.model, reference_fit(seg_net(), windows_of(xs, ys, 3, 4), counted_ce))

def test_data_parallel_is_refused():
    learn = get_learner(get_dls(tilted(8), labels(8), 4), nn.DataParallel(conv_net()), AccumulateGradBN(2))
    with pytest.raises(ValueError, match='distrib_ctx'): do_fit(learn)

def back_to_training(learn):
    "fastai's `validate` and `get_preds` within a fit leave the learner in evaluation"
    learn.model.train()
    learn.training = True
    learn.dl = learn.dls.train

USES = dict(
    validate=lambda l: l.validate(),
    get_preds=lambda l: l.get_preds(),
    inner=lambda l: l.get_preds(inner=True),
    model=lambda l: l.model.eval()(tilted(4)))

@pytest.mark.parametrize('what', USES)
@pytest.mark.parametrize('at', [0, 1, 4])
def test_validation_and_predictions_in_mid_window_do_not_count(what, at):
    def use(learn):
        USES[what](learn)
        back_to_training(learn)
    xs,ys = tilted(24),labels(24)
    cb = DoAt('after_batch', at, use)
    learn = get_learner(get_dls(xs, ys, 4, valid=(tilted(2, seed=8),labels(2))), conv_net(), [AccumulateGradBN(3), cb])
    do_fit(learn)
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 4, 3), mean_ce))

def test_buffers_in_mid_window_are_the_running_statistics():
    seen = []
    xs,ys = tilted(24),labels(24)
    def note(learn): seen.append(snapshot(learn.model))
    events = ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_batch']
    cbs = [DoAt(e, 4, note) for e in events]
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), *cbs])
    do_fit(learn)
    ref = reference_fit(conv_net(), windows_of(xs, ys, 4, 3)[:1], mean_ce)
    assert len(seen) == len(events)
    for o in seen:
        for k,v in ref.state_dict().items(): torch.testing.assert_close(o[k], v, rtol=1e-12, atol=1e-12)

PLACES = [('after_batch',0), ('after_step',70), ('after_pred',0), ('after_pred',70), ('before_backward',0),
          ('after_backward',0)]

@pytest.mark.parametrize('event,order', PLACES)
def test_save_pickle_and_deepcopy_in_mid_window(event, order, tmp_path):
    xs,ys = tilted(24),labels(24)
    copies = []
    def do(l):
        l.save(tmp_path/'m', with_opt=False)
        copies.extend([copy.deepcopy(l.model), pickle.loads(pickle.dumps(l.model))])
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), DoAt(event, 5, do, order)])
    do_fit(learn)
    assert len(copies) == 2
    x = tilted(4)
    for c in copies:
        assert 'forward' not in stand_ins(c)
        torch.testing.assert_close(c.state_dict(), torch.load(tmp_path/'m.pth'), rtol=0, atol=0)
        before = snapshot(learn.model)
        c.train()(x)  # the copy is on its own
        torch.testing.assert_close(snapshot(learn.model), before, rtol=0, atol=0)

def test_export_in_mid_fit(tmp_path):
    class ExportEach(Callback):
        def after_epoch(self): self.learn.export(tmp_path/'e.pkl')
    xs,ys = tilted(24),labels(24)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), ExportEach()])
    do_fit(learn)
    assert_same(load_learner(tmp_path/'e.pkl').model, learn.model)

def test_export_after_fit_loads_and_fits_on(tmp_path):
    xs,ys = tilted(24),labels(24)
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), AccumulateGradBN(3))
    do_fit(learn)
    learn.export(tmp_path/'e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.dls = learn.dls
    for l in (learn,loaded):
        l.create_opt()
        l.logger = noop
        do_fit(l)
    assert_same(loaded.model, learn.model)

def test_batches_that_the_dataloader_owed_still_make_a_step():
    class Short(DataLoader):
        def __len__(self): return 10
    xs,ys = tilted(20),labels(20)
    dls = DataLoaders(Short(list(zip(xs,ys)), bs=4), get_dls(xs, ys, 4).valid, device='cpu')
    learn = get_learner(dls, conv_net(), AccumulateGradBN(3))
    do_fit(learn)
    assert_same(learn.model, reference_fit(conv_net(), windows_of(xs, ys, 4, 3), mean_ce))


# --- Which layers count

def test_frozen_eval_untracked_and_unused_layers_are_left_alone():
    xs,ys = tilted(24),labels(24)
    def make():
        model = Norms()
        for p in model.m.frozen.parameters(): p.requires_grad_(False)
        return model
    class Freeze(Callback):  # as BnFreeze, which fails on layers without parameters
        def before_train(self): self.model.m.frozen.eval()
    learn = get_learner(get_dls(xs, ys, 4), make(), [AccumulateGradBN(3), Freeze()])
    do_fit(learn, 2)
    m = learn.model.m
    for k in ('frozen','unused'):
        assert m[k].num_batches_tracked == 0 and (m[k].running_mean==0).all() and (m[k].running_var==1).all()
    assert m.untracked.running_mean is None
    for k in ('twice','plain'): assert m[k].num_batches_tracked == 4 and (m[k].running_mean!=0).any()

def test_bn_freeze():
    model = conv_net()
    def split(m): return [params(m[:2]), params(m[2:])]
    learn = get_learner(get_dls(tilted(8), labels(8), 4), model, [AccumulateGradBN(2), BnFreeze()], train_bn=False,
                        splitter=split)
    learn.freeze()
    do_fit(learn)
    assert model[1].num_batches_tracked == 0 and (model[1].running_mean == 0).all()
    assert model[4].num_batches_tracked == 1

def test_a_layer_used_twice_gets_both():
    xs,ys = tilted(12),labels(12)
    learn = get_learner(get_dls(xs, ys, 4), Norms(), AccumulateGradBN(3))
    do_fit(learn, 1, 0.)
    model = Norms().train()
    inputs = Inputs(model)
    for x in xs.split(4): model(x)
    for m,o in zip(inputs.layers, inputs.pooled()):
        if o is None or m.running_mean is None: continue
        got = learn.model.m[[k for k,v in model.m.items() if v is m][0]]
        torch.testing.assert_close(got.running_mean, .1*o[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.running_var, .9+.1*o[1], rtol=1e-12, atol=1e-12)

def test_frozen_parameters_do_not_freeze_the_statistics():  # as in torch: that is what eval mode is for
    model = conv_net()
    for p in model[1].parameters(): p.requires_grad_(False)
    learn = get_learner(get_dls(tilted(8), labels(8), 4), model, AccumulateGradBN(2))
    do_fit(learn)
    assert model[1].num_batches_tracked == 1

KINDS = [(nn.BatchNorm1d,(7,)), (nn.BatchNorm2d,(4,4)), (nn.BatchNorm3d,(2,3,4)), (nn.SyncBatchNorm,(4,4))]

@pytest.mark.parametrize('cls,size', KINDS)
def test_all_kinds_of_bn(cls, size):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(cls(3), nn.Flatten(), nn.Linear(3*math.prod(size),5)).double()
    xs,ys = tilted(10, size=size),labels(10)
    learn = get_learner(get_dls(xs, ys, 2), make(), AccumulateGradBN(3))
    do_fit(learn, 2)
    assert_same(learn.model, reference_fit(make(), windows_of(xs, ys, 2, 3), mean_ce, n_epoch=2))

def test_timm_bn_with_activation():
    timm = pytest.importorskip('timm')
    def make():
        torch.manual_seed(0)
        body = [nn.Conv2d(3,4,3), timm.layers.BatchNormAct2d(4)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,5)).double()
    xs,ys = tilted(10),labels(10)
    learn = get_learner(get_dls(xs, ys, 2), make(), AccumulateGradBN(3))
    do_fit(learn, 2)
    assert_same(learn.model, reference_fit(make(), windows_of(xs, ys, 2, 3), mean_ce, n_epoch=2))

@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    xs,ys = tilted(24),labels(24)
    learn = get_learner(get_dls(xs, ys, 4), Checkpointed(conv_net(), reentrant), AccumulateGradBN(3))
    do_fit(learn, 2)
    assert_same(learn.model.net, reference_fit(conv_net(), windows_of(xs, ys, 4, 3), mean_ce, n_epoch=2))

@pytest.mark.slow
def test_unet():
    m = small_unet((32,32)).double()
    ref = copy.deepcopy(m)
    xs = tilted(6, size=(32,32))
    ys = (xs.mean(1)>0).long()
    learn = get_learner(get_dls(xs, ys, 2), m, AccumulateGradBN(2), loss_func=CrossEntropyLossFlat(axis=1))
    do_fit(learn, 1, 1e-3)
    def loss_sum(p, y): return F.cross_entropy(p, y, reduction='sum'),y.numel()
    reference_fit(ref, windows_of(xs, ys, 2, 2), loss_sum, lr=1e-3)
    assert_same(m, ref, 1e-9)


# --- With other callbacks

def test_gradient_clip_sees_the_window_once():
    xs,ys = tilted(24),labels(24)
    norms = []
    class Clip(GradientClip):
        def before_step(self): norms.append(nn.utils.clip_grad_norm_(self.parameters(), self.max_norm).item())
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), [AccumulateGradBN(3), Clip(.05)])
    do_fit(learn)
    assert len(norms) == 2
    model = conv_net().train()
    (sum(F.cross_entropy(model(x), y, reduction='sum') for x,y in windows_of(xs, ys, 4, 3)[0])/12).backward()
    assert norms[0] == pytest.approx(nn.utils.clip_grad_norm_(model.parameters(), 1e9).item(), rel=1e-12)
    assert AccumulateGradBN.order < MixedPrecision.order < GradientClip.order

def test_mixed_precision_acts_once_per_window():
    xs,ys = tilted(24).float(),labels(24)
    cb = CPUScaler()
    learn = get_learner(get_dls(xs, ys, 4), conv_net().float(), [AccumulateGradBN(3), cb])
    do_fit(learn, 2)
    assert cb.n == 4 and learn.model[1].num_batches_tracked == 4
    ref = reference_fit(conv_net().float(), windows_of(xs, ys, 4, 3), mean_ce, n_epoch=2)
    assert_nearer(learn.model, ref, conv_net().float())

def assert_nearer(a, b, far):
    "bfloat16 has few digits: `a`'s weights are much nearer to `b`'s than to `far`'s"
    dist = lambda m: torch.cat([(p-q).flatten() for p,q in zip(a.parameters(), m.parameters())]).norm()
    assert dist(b) < .15*dist(far)

def test_a_skipped_step_drops_the_window():
    xs,ys = tilted(24).float(),labels(24)
    learn = get_learner(get_dls(xs, ys, 4), conv_net().float(), [AccumulateGradBN(3), CPUScaler(overflow_at=[1])])
    do_fit(learn)
    w = windows_of(xs, ys, 4, 3)
    assert learn.model[1].num_batches_tracked == 1
    start = conv_net().float()
    ref = reference_fit(conv_net().float(), w[1:], mean_ce)
    assert_nearer(learn.model, ref, start)
    both = reference_fit(conv_net().float(), w, mean_ce)
    with pytest.raises(AssertionError): assert_nearer(learn.model, both, start)

@pytest.mark.parametrize('cls', [MixUp, CutMix])
def test_mixup_weighs_samples(cls):
    xs,ys = tilted(10).float(),labels(10)
    seen = []
    class See(Callback):
        order = 5
        def after_loss(self): seen.append((self.loss_grad.item(), len(self.y)))
    class Scaled(Callback):
        order = 7
        def after_loss(self): seen.append(self.loss_grad.item())
    cbs = [AccumulateGradBN(3), cls(), See(), Scaled()]
    learn = get_learner(get_dls(xs, ys, 4), conv_net().float(), cbs, loss_func=CrossEntropyLossFlat())
    do_fit(learn)
    train = list(zip(seen[::2], seen[1::2]))[:3]
    assert [n for (_,n),_ in train] == [4,4,2]
    # The last knows how many there are
    for ((loss,n),scaled),all in zip(train, (12,12,10)): assert scaled == pytest.approx(loss*n/all, rel=1e-5)
    assert_pristine(learn)

def test_save_model_early_stopping_and_train_metrics(tmp_path):
    xs,ys = tilted(24),labels(24)
    cbs = [AccumulateGradBN(3), SaveModelCallback(), EarlyStoppingCallback(patience=1, min_delta=10.)]
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), cbs, metrics=accuracy, path=tmp_path)
    learn.recorder.train_metrics = True
    do_fit(learn, 5)
    assert (tmp_path/'models'/'model.pth').exists() and len(learn.recorder.values) == 2

def test_ddp_all_reduces_once_per_window(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/pg', rank=0, world_size=1)
    try:
        xs,ys = tilted(24),labels(24)
        model = nn.parallel.DistributedDataParallel(conv_net(), broadcast_buffers=False)
        reduced = []
        def hook(state, bucket):
            reduced.append(1)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        model.register_comm_hook(None, hook)
        learn = get_learner(get_dls(xs, ys, 4), model, AccumulateGradBN(4))
        do_fit(learn)
        assert len(reduced) == 2
        assert_same(model.module, reference_fit(conv_net(), windows_of(xs, ys, 4, 4), mean_ce))
    finally: torch.distributed.destroy_process_group()

# Process and number of the targets that are ignored
EMPTY = {
    'none': [],
    'some': [(1,0),(1,1),(1,2),(0,7)],
    'last micro-batch': [(1,i) for i in range(8,12)],
    'window of one': [(1,i) for i in range(12)],
    'window of both': [(r,i) for i in range(12) for r in (0,1)]}

def _rank(rank, world, path, q):
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=world)
    torch.set_num_threads(1)
    res = {}
    for k,empty in EMPTY.items():
        xs,ys = rank_data(rank, empty)
        model = nn.parallel.DistributedDataParallel(conv_net(), broadcast_buffers=False)
        do_fit(get_learner(get_dls(xs, ys, 4), model, AccumulateGradBN(3)), 2)
        res[k] = {n:v.tolist() for n,v in model.module.state_dict().items()}
    q.put((rank, res))
    torch.distributed.destroy_process_group()

def rank_data(rank, empty):
    xs,ys = tilted(24, seed=rank),labels(24, seed=rank)
    for r,i in empty:
        if r == rank: ys[i] = -100
    return xs,ys

@pytest.mark.slow
def test_two_processes_with_other_denominators(tmp_path):
    ctx = torch.multiprocessing.get_context('spawn')
    q = ctx.Queue()
    ps = [ctx.Process(target=_rank, args=(r, 2, tmp_path/'pg', q), daemon=True) for r in range(2)]
    for p in ps: p.start()
    got = dict(q.get(timeout=60) for _ in ps)
    for p in ps: p.join(60)
    for k,empty in EMPTY.items(): check_ranks([got[r][k] for r in (0,1)], empty)

def check_ranks(got, empty):
    "Both processes have the weights of a fit with the windows of both, and each its own running statistics"
    w = [a+b for a,b in zip(*(windows_of(*rank_data(r, empty), 4, 3) for r in (0,1)))]
    w = [o for o in w if any((y!=-100).any() for _,y in o)]
    ref = reference_fit(conv_net(), w, counted_ce, n_epoch=2)
    for r in (0,1):
        for k,v in ref.named_parameters():
            mine = torch.tensor(got[r][k], dtype=F64)
            torch.testing.assert_close(mine, v.detach(), rtol=1e-10, atol=1e-11)
    assert got[0]['1.running_mean'] != got[1]['1.running_mean']  # each its own

@pytest.mark.slow
def test_compiled_model():
    xs,ys = tilted(24),labels(24)
    torch._dynamo.reset()
    learn = get_learner(get_dls(xs, ys, 4), torch.compile(conv_net(), backend='aot_eager'), AccumulateGradBN(3))
    do_fit(learn, 2)
    assert torch._dynamo.utils.counters['frames']['ok'] > 0  # it did compile
    assert_same(learn.model._orig_mod, reference_fit(conv_net(), windows_of(xs, ys, 4, 3), mean_ce, n_epoch=2))

def test_two_learners_share_a_model():
    xs,ys = tilted(24),labels(24)
    model = conv_net()
    for _ in range(2): do_fit(get_learner(get_dls(xs, ys, 4), model, AccumulateGradBN(3)))
    assert_same(model, reference_fit(conv_net(), windows_of(xs, ys, 4, 3), mean_ce, n_epoch=2))


# --- Bad input

@pytest.mark.parametrize('kw,match', [
    (dict(n_step=0), 'n_step.*0'),
    (dict(n_step=-3), 'n_step'),
    (dict(n_step=2.), r'n_step.*2\.0'),
    (dict(n_step='4'), 'n_step'),
    (dict(n_step=True), 'n_step'),
    (dict(n_step=None), 'n_step'),
    (dict(last='keep'), "'step', 'drop' or 'carry'"),
    (dict(weight=3), 'callable')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): AccumulateGradBN(**kw)

def test_one_value_per_channel_names_the_layer_and_changes_nothing():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4,5)]
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), *head).double()
    before = snapshot(model)
    learn = get_learner(get_dls(tilted(4), labels(4), 1), model, AccumulateGradBN(4))
    with pytest.raises(ValueError, match=r"layer '4' \(BatchNorm1d.*bs=2.*GroupNorm"): do_fit(learn)
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
    assert_pristine(learn)

def test_no_batches():
    learn = get_learner(get_dls(tilted(3), labels(3), 4, drop_last=True), conv_net(), AccumulateGradBN(4))
    with pytest.raises(ValueError, match='no batch'): do_fit(learn)
    assert_pristine(learn)

def test_an_epoch_without_any_step():
    learn = get_learner(get_dls(tilted(6), labels(6), 2), conv_net(), AccumulateGradBN(4, last='drop'))
    with pytest.raises(ValueError, match='at most the 3 batches of an epoch, got 4'): do_fit(learn)

def test_two_accumulators():
    learn = get_learner(get_dls(tilted(6), labels(6), 2), conv_net(), [AccumulateGradBN(4), GradientAccumulation(8)])
    with pytest.raises(ValueError, match='gradient_accumulation'): do_fit(learn)
