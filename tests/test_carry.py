"`AccumulateGradBN(last='carry')`: fits beside the loop by hand that stops at no epoch's end; how fits end and break"
import copy
import pickle

import pytest
import torch
from torch import nn
from fastai.vision.all import (
    Adam, Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
    CancelTrainException, CancelValidException, EarlyStoppingCallback, SaveModelCallback, SGD, load_learner, noop)

from fastai_bn.accumulate import *
from fastai_bn.all import PreciseBN
from helpers import (
    ADAM, Boom, CPUScaler, DoAt, Steps, assert_differ, assert_pristine, assert_same, conv_net, counted_ce, do_fit,
    get_dls, get_learner, labels, mean_ce, reference_fit, rounding, snapshot, tilted)

N,BS,N_STEP = 22,4,4  # 6 micro-batches an epoch, of which the last has 2 samples: a window and a half

def endless(n, bs, n_step, n_epoch):
    "Cut the micro-batches of `n_epoch` epochs into windows, past all ends of epochs"
    micro = list(zip(tilted(n).split(bs), labels(n).split(bs)))*n_epoch
    return [micro[i:i+n_step] for i in range(0, len(micro), n_step)]

def by_hand(windows, opt_func=SGD, model=None): return reference_fit(model or conv_net(), windows, mean_ce, opt_func)

def carrier(*cbs, n=N, bs=BS, n_step=N_STEP, model=None, opt_func=SGD, **kw):
    "Make a learner that carries windows on"
    cbs = [AccumulateGradBN(n_step, last='carry', **kw), *cbs]
    return get_learner(get_dls(tilted(n), labels(n), bs), model or conv_net(), cbs, opt_func=opt_func)

def assert_no_gradient(learn):
    assert not any(p.grad.any() for p in learn.model.parameters() if p.grad is not None)

class At(DoAt):
    "`DoAt` an event of one epoch, in training or validation"
    def __init__(self, event, epoch, at, f, order=0):
        super().__init__(event, at, f, order)
        self.at_epoch = epoch
    def _is_here(self): return self.epoch == self.at_epoch and (self.at is None or self.iter == self.at)

def raising(exc):
    def f(learn): raise exc
    return f


# --- The loop that never stops at an epoch's end

@pytest.mark.parametrize('opt_func', [SGD, Adam], ids=['sgd','adam'])
@pytest.mark.parametrize('n,bs,n_step,n_epoch', [
    (22,4,4,1), (22,4,4,3), (22,4,4,4), (24,4,3,2), (20,4,16,4), (20,4,16,3), (22,2,1,2), (6,2,7,5)])
def test_fit_is_the_loop_that_never_stops(n, bs, n_step, n_epoch, opt_func):
    learn = carrier(Steps(), n=n, bs=bs, n_step=n_step, opt_func=opt_func)
    do_fit(learn, n_epoch)
    windows = endless(n, bs, n_step, n_epoch)
    assert_same(learn.model, by_hand(windows, opt_func), ADAM if opt_func is Adam else rounding())
    assert len(learn.steps.at) == len(windows)
    assert_pristine(learn)
    assert_no_gradient(learn)

def test_it_is_another_fit_than_with_step():
    learn = carrier()
    do_fit(learn, 3)
    stepped = get_learner(get_dls(tilted(N), labels(N), BS), conv_net(), AccumulateGradBN(N_STEP))
    do_fit(stepped, 3)
    assert_differ(learn.model, stepped.model)

def test_without_bn_it_is_the_large_batch():
    "The samples of all epochs in a row, in batches of 16"
    xs,ys = tilted(N),labels(N)
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(108,8), nn.Tanh(), nn.Linear(8,5)).double()
    with pytest.warns(UserWarning, match='no BatchNorm'):
        learn = carrier(model=net(), bs=2, n_step=8)
        do_fit(learn, 3)
    rows = torch.cat([xs]*3),torch.cat([ys]*3)
    windows = list(zip(*[o.split([16]*4+[2]) for o in rows]))
    assert_same(learn.model, by_hand([[w] for w in windows], model=net()))

@pytest.mark.parametrize('kw', [
    dict(budget='1GiB'), dict(budget=2**14), dict(micro_bs=2), dict(micro_bs=1, budget=2**14)])
@pytest.mark.filterwarnings('ignore:.*ActivationPager')
def test_with_a_budget_and_in_pieces(kw):
    learn = carrier(**kw)
    do_fit(learn, 3)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

def test_weights_of_micro_batches_go_on_too():
    "Targets that do not count in one epoch, and a window across its end"
    n = 24
    xs,ys = tilted(n),labels(n)
    ys[13:23] = -100
    learn = get_learner(get_dls(xs, ys, 4), conv_net(), AccumulateGradBN(4, last='carry'))
    do_fit(learn, 2)
    micro = list(zip(xs.split(4), ys.split(4)))*2
    ref = reference_fit(conv_net(), [micro[i:i+4] for i in range(0, 12, 4)], counted_ce)
    assert_same(learn.model, ref)

def test_mixed_precision_unscales_what_was_carried():
    learn = carrier(CPUScaler(), model=conv_net().float())
    learn.dls = get_dls(tilted(N).float(), labels(N), BS)
    do_fit(learn, 2)
    assert learn.cpu_scaler.n == 3 == learn.model[1].num_batches_tracked
    micro = [[(x.float(), y) for x,y in w] for w in endless(N, BS, N_STEP, 2)]
    ref = by_hand(micro, model=conv_net().float())
    dist = lambda a,b: torch.cat([(p-q).flatten() for p,q in zip(a.parameters(), b.parameters())]).norm()
    assert dist(learn.model, ref) < .15*dist(conv_net().float(), ref)  # bfloat16 has few digits

def test_n_step_may_change_between_epochs():
    class Schedule(Callback):
        def before_epoch(self): self.learn.accumulate_grad_bn.n_step = (4,3,5)[self.epoch]
    learn = carrier(Schedule(), n=24)
    do_fit(learn, 3)
    micro = list(zip(tilted(24).split(4), labels(24).split(4)))*3
    ends = [0, 4, 7, 10, 15, 18]  # 2 are carried into the epoch of 3, 2 into that of 5
    assert_same(learn.model, by_hand([micro[a:b] for a,b in zip(ends, ends[1:])]))


# --- In between

def test_validation_and_checkpoints_see_the_last_step(tmp_path):
    "What an epoch leaves is in the gradient alone"
    seen = []
    class See(Callback):
        def before_validate(self): seen.append(snapshot(self.model))
    learn = carrier(See(), SaveModelCallback(every_epoch=True, with_opt=True))
    learn.path = tmp_path
    do_fit(learn, 2)
    ref = by_hand(endless(N, BS, N_STEP, 1)[:1])  # 6 micro-batches: one whole window
    saved = torch.load(tmp_path/'models'/'model_0.pth', weights_only=False)
    for o in (seen[0], saved['model']):
        for k,v in ref.state_dict().items(): torch.testing.assert_close(o[k], v, rtol=1e-12, atol=1e-12)
    assert learn.model[1].num_batches_tracked == 3

def test_predictions_validation_and_population_statistics_in_between_change_nothing():
    def look(learn):
        learn.validate()
        learn.get_preds()
    between = At('after_epoch', 0, None, look)
    copied = At('after_epoch', 1, None, lambda learn: (copy.deepcopy(learn.model), pickle.dumps(learn.model)))
    learn = carrier(between, copied)
    do_fit(learn, 3)
    assert between.done and copied.done
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

@pytest.mark.parametrize('use', [
    lambda learn: learn.model.zero_grad(),
    lambda learn: learn.model(learn.dls.one_batch()[0]).sum().backward()], ids=['zeroed','added to'])
def test_gradients_are_anybodys_in_between(use):
    "As for saliency maps. Running statistics that such a pass moves are its own"
    def keep_buffers(learn):
        learn.model.eval()
        use(learn)
        learn.model.train()
    learn = carrier(At('after_epoch', 0, None, keep_buffers))
    do_fit(learn, 3)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

def test_predictions_before_each_epoch_change_nothing():
    class Look(Callback):
        order,busy = -5,False
        def before_epoch(self):
            if self.busy: return
            self.busy = True
            n = self.epoch
            self.learn.get_preds()
            self.learn.epoch = n
            self.busy = False
    learn = carrier(Look())
    do_fit(learn, 3)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_a_validation_in_mid_epoch_changes_nothing(epoch):
    "It begins and ends as a fit does, and resets fastai's count of epochs"
    def look(learn):
        dl,n = learn.dl,learn.epoch
        learn.validate()
        learn.dl,learn.epoch,learn.training = dl,n,True
        learn.model.train()
    learn = carrier(looked := At('after_batch', epoch, 1, look))
    do_fit(learn, 3)
    assert looked.done
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

def test_precise_statistics_are_of_the_weights_of_the_last_step():
    learn,plain = carrier(PreciseBN()),carrier()
    do_fit(learn, 2)
    do_fit(plain, 2)
    for p,q in zip(learn.model.parameters(), plain.model.parameters()): assert torch.equal(p, q)

def test_schedules_count_micro_batches_and_one_cycle_ends_with_the_fit():
    lrs = []
    class See(Callback):
        def after_step(self): lrs.append(self.opt.hypers[-1]['lr'])
    learn = carrier(See())
    with learn.no_logging(): learn.fit_one_cycle(4, 1e-2)
    assert len(lrs) == 6 and max(lrs) <= 1e-2 and lrs[-1] < 1e-4

@pytest.mark.parametrize('n,num_it', [(40,7), (22,13), (44,12), (8,9), (24,6)])
def test_lr_find_makes_num_it_steps(n, num_it):
    learn = carrier(Steps(), n=n, bs=2, n_step=5)
    before = snapshot(learn.model)
    with learn.no_logging(): learn.lr_find(num_it=num_it, show_plot=False, stop_div=False)
    assert learn.steps.at == [sum(len(x) for w in endless(n, 2, 5, 99)[:i+1] for x,_ in w) for i in range(num_it)]
    torch.testing.assert_close(snapshot(learn.model), before, rtol=0, atol=0)
    assert_pristine(learn)
    assert_no_gradient(learn)


# --- How a fit ends or breaks

def test_each_fit_ends_with_its_own_step():
    learn = carrier()
    for _ in range(2): do_fit(learn, 1)
    ref = conv_net()
    for _ in range(2): by_hand(endless(N, BS, N_STEP, 1), model=ref)
    assert_same(learn.model, ref)

@pytest.mark.parametrize('patience,n_whole', [(1,3), (2,4)])
def test_a_cancelled_fit_drops_what_it_carried(patience, n_whole):
    "After 2 epochs nothing is left, after 3 half a window"
    learn = carrier(EarlyStoppingCallback(patience=patience, min_delta=1e9))
    do_fit(learn, 9)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)[:n_whole]))
    assert_no_gradient(learn)
    assert_pristine(learn)

# Event, epoch, iteration, exception; steps before it: 3 windows take two epochs
BREAKS = {
    'fit in training': ('after_batch', 1, 0, CancelFitException(), 1),
    'fit in validation': ('before_validate', 0, None, CancelFitException(), 1),
    'error in training': ('before_batch', 1, 1, Boom("x"), 1),
    'error in the backward pass': ('after_loss', 1, 1, Boom("x"), 1),
    'error at the end of an epoch': ('after_epoch', 0, None, Boom("x"), 1),
    'error in validation': ('before_validate', 2, None, Boom("x"), 4),
    'interrupt in validation': ('before_validate', 0, None, KeyboardInterrupt(), 1)}

@pytest.mark.parametrize('event,epoch,at,exc,steps', BREAKS.values(), ids=BREAKS)
def test_a_fit_that_breaks_leaves_nothing_for_the_next(event, epoch, at, exc, steps, request):
    learn = carrier(breaker := At(event, epoch, at, raising(exc)))
    try: do_fit(learn, 4)
    except (Boom, KeyboardInterrupt): pass
    assert breaker.done
    ref = by_hand(endless(N, BS, N_STEP, 4)[:steps])
    assert_same(learn.model, ref)
    assert_pristine(learn)
    if 'training' not in request.node.callspec.id: assert_no_gradient(learn)
    learn.remove_cb(breaker)
    do_fit(learn, 3)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3), model=ref))
    assert_pristine(learn)

@pytest.mark.parametrize('epoch,steps', [(0,1), (1,3), (2,4)])
def test_a_fit_that_is_taken_up_again_begins_with_a_window_of_its_own(epoch, steps):
    "By `start_epoch`, after an error in validation: no checkpoint has the gradient"
    learn = carrier(breaker := At('before_validate', epoch, None, raising(Boom('x'))))
    with pytest.raises(Boom): do_fit(learn, 5)
    learn.remove_cb(breaker)
    do_fit(learn, 5, start_epoch=epoch+1)
    ref = by_hand(endless(N, BS, N_STEP, 5)[:steps])
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 4-epoch), model=ref))

def test_another_fit_without_the_callback_has_no_gradient_to_begin_with():
    learn = get_learner(get_dls(tilted(N), labels(N), BS), conv_net())
    cbs = [AccumulateGradBN(N_STEP, last='carry'), At('before_validate', 0, None, raising(KeyboardInterrupt()))]
    with pytest.raises(KeyboardInterrupt): do_fit(learn, 3, cbs=cbs)
    assert_no_gradient(learn)
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 1)[:1]))

@pytest.mark.parametrize('exc', [CancelTrainException(), CancelEpochException()], ids=['train','epoch'])
def test_a_cancelled_epoch_drops_its_window(exc):
    "The window that it went on with, too"
    learn = carrier(cancel := At('before_batch', 1, 1, raising(exc)))
    do_fit(learn, 3)
    assert cancel.done
    micro = endless(N, BS, 6, 1)[0]
    assert_same(learn.model, by_hand([micro[:4], micro[:4], micro[4:]]))

@pytest.mark.parametrize('exc', [CancelValidException(), CancelEpochException()], ids=['valid','epoch'])
def test_a_cancelled_validation_changes_nothing(exc):
    learn = carrier(cancel := At('before_validate', 0, None, raising(exc)))
    do_fit(learn, 3)
    assert cancel.done
    assert_same(learn.model, by_hand(endless(N, BS, N_STEP, 3)))

def test_a_cancelled_batch_is_as_if_it_never_was():
    learn = carrier(cancel := At('before_batch', 1, 0, raising(CancelBatchException())))
    do_fit(learn, 2)
    assert cancel.done
    micro = endless(N, BS, 12, 2)[0]
    del micro[6]
    assert_same(learn.model, by_hand([micro[:4], micro[4:8], micro[8:]]))

def test_a_cancelled_step_drops_its_window():
    class Skip(Callback):
        order = -100
        def before_step(self):
            if self.model[1].num_batches_tracked == 1 and not hasattr(self, 'done'):
                self.done = True
                raise CancelStepException
    learn = carrier()
    learn.add_cb(Skip())
    learn.skip.order = learn.accumulate_grad_bn.order+1
    do_fit(learn, 2)
    micro = endless(N, BS, 4, 2)
    assert_same(learn.model, by_hand([micro[0], micro[2]]))

def test_a_fit_between_epochs_does_not_get_the_gradient():
    "The inner fit is one by itself, and the outer one goes on without what it carried"
    def inner(learn):
        learn.remove_cb(nested)
        learn.fit(1, .1)
        learn.n_epoch = 2
    nested = At('after_epoch', 0, None, inner)
    learn = carrier(nested)
    do_fit(learn, 2)
    ref = by_hand(endless(N, BS, N_STEP, 1)[:1])
    for _ in range(2): by_hand(endless(N, BS, N_STEP, 1), model=ref)
    assert_same(learn.model, ref)

def freeze(learn): learn.model[0].requires_grad_(False)

@pytest.mark.parametrize('change', [lambda learn: setattr(learn, 'model', conv_net(seed=1)), freeze],
                         ids=['model','frozen'])
def test_another_model_in_mid_window_is_refused(change):
    learn = carrier(At('after_epoch', 0, None, change))
    with pytest.raises(ValueError, match='gradients of 2 micro-batches.*carry'): do_fit(learn, 2)
    assert_pristine(learn)

def test_a_change_where_nothing_is_carried_is_none_of_our_business():
    learn = carrier(At('after_epoch', 0, None, freeze), n=16)
    do_fit(learn, 2)
    assert learn.model[1].num_batches_tracked == 2

def test_export_between_epochs_leaves_the_window_out(tmp_path):
    class Exported(Callback):
        def after_epoch(self): self.learn.export(tmp_path/f'{self.epoch}.pkl')
    learn = carrier(Exported())
    do_fit(learn, 3)
    loaded = load_learner(tmp_path/'0.pkl')
    loaded.remove_cb(loaded.exported)
    assert_same(loaded.model, by_hand(endless(N, BS, N_STEP, 1)[:1]))
    loaded.dls = learn.dls
    loaded.logger = noop
    do_fit(loaded, 3)
    ref = by_hand(endless(N, BS, N_STEP, 1)[:1])
    assert_same(loaded.model, by_hand(endless(N, BS, N_STEP, 3), model=ref))

@pytest.mark.parametrize('bn_bs', ['window', 8, 2])
def test_a_bn_batch_ends_with_its_epoch(bn_bs):
    with pytest.raises(ValueError, match=f"`last` must be 'step' or 'drop' with bn_bs={bn_bs!r}, got 'carry'"):
        AccumulateGradBN(4, bn_bs=bn_bs, last='carry')
