"""What goes wrong, goes wrong anywhere: an error, an interrupt or a cancelled batch, epoch or fit at each point of a
window, in each mode. Afterwards weights and running statistics are those of the last step that was made, nothing of
ours is left on model, learner or interpreter, and the next fit is the fit that a new learner makes"""
import ast
import copy
import gc
import multiprocessing
import os
import random
import sys
import threading
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from fastai.vision.all import (
    Adam, Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
    CancelStepException, CancelTrainException, CancelValidException, DataLoaders, TerminateOnNaNCallback, TfmdDL)

import fastai_bn
from fastai_bn.all import AccumulateGradBN, ActivationPager, MicroBatched, precise_bn
from helpers import (
    F64, Boom, DoAt, RaiseAt, assert_same, conv_net, do_fit, get_dls, get_learner, in_a_process, labels, mean_ce,
    quiet_budget, reference_fit, snapshot, tilted)

pytestmark = [quiet_budget, pytest.mark.usefixtures('all_move')]

BUDGET = 2**14
MODES = dict(
    none={},
    two=dict(bn_bs=2),
    eight=dict(bn_bs=8),
    window=dict(bn_bs='window'),
    budget=dict(bn_bs='window', budget=BUDGET),
    pieces=dict(bn_bs='window', micro_bs=3),
    all=dict(bn_bs='window', micro_bs=3, budget=BUDGET),
    auto=dict(bn_bs='window', micro_bs='auto'),
    int_all=dict(bn_bs=8, micro_bs=3, budget=BUDGET))
modes = pytest.mark.parametrize('mode', MODES)
main_modes = pytest.mark.parametrize('mode', ['none','eight','window','int_all'])  # the others are parts of these
N,BS,STEP = 32,4,4  # two windows of 16 in an epoch

class Faulty(nn.Module):
    """Identity that raises when told: in the `at`-th forward pass in training mode, or in the backward pass of what
    that made. In lock step each micro-batch has one"""
    plan = dict(exc=None, at=-1, backward=False, n=0)  # of all instances: modules' own attributes are a micro-batch's

    @classmethod
    def reset(cls, exc=None, at=-1, backward=False): cls.plan.update(exc=exc, at=at, backward=backward, n=0)
    def forward(self, x):
        if not self.training or self.plan['exc'] is None: return x
        now = self.plan['n'] == self.plan['at']
        self.plan['n'] += 1
        if not now: return x
        if not self.plan['backward']: raise self.plan['exc']
        return Raise.apply(x, self.plan['exc'])

class Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exc):
        ctx.exc = exc
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g): raise ctx.exc

class FaultyDL(TfmdDL):
    "Raises when told, instead of giving batch `at`"
    exc,at = None,-1
    def __iter__(self):
        for i,b in enumerate(super().__iter__()):
            if i == self.at and self.exc is not None: raise self.exc
            yield b

class FaultyLoss(nn.Module):
    "Cross entropy that raises when told, in the `at`-th batch of the training"
    def __init__(self):
        super().__init__()
        self.exc,self.at,self.n = None,-1,0

    def forward(self, p, y):
        if torch.is_grad_enabled():
            self.n += 1
            if self.n-1 == self.at and self.exc is not None: raise self.exc
        return F.cross_entropy(p, y)

def net():
    "The faulty layer in the middle"
    m = conv_net()
    return nn.Sequential(*m[:3], Faulty(), *m[3:])

def make(mode, *cbs, model=None, **kw):
    torch.manual_seed(0)
    xs,ys = tilted(N),labels(N)
    dls = get_dls(xs, ys, BS, valid=(xs[:4],ys[:4]))
    dls = DataLoaders(FaultyDL(dls.train.dataset, bs=BS, num_workers=0), dls.valid, device='cpu')
    return get_learner(dls, model or net(), [AccumulateGradBN(STEP, **MODES[mode]), *cbs], loss_func=FaultyLoss(), **kw)

def traces():
    "What the interpreter would show of us"
    methods = '__repr__','tolist','numpy','data_ptr','__dlpack__','_typed_storage'
    return dict(
        threads=[o.name for o in threading.enumerate()],
        modes=len(_get_current_dispatch_mode_stack()),
        functions=torch.overrides._len_torch_function_stack(),
        subclasses=torch._C._is_torch_function_enabled(),
        hooks=len(nn.modules.module._global_forward_pre_hooks),
        grad=torch.is_grad_enabled(),
        autocast=torch.is_autocast_enabled('cpu'),
        tensor={k:vars(torch.Tensor).get(k) for k in methods})

@cache
def clean(mode):
    "The states of a fit without faults: at the beginning, and after each step"
    learn = make(mode, cb := States())
    do_fit(learn)
    pager = learn.accumulate_grad_bn.pager
    assert pager is None or pager.moved or mode == 'auto'
    return cb.states

@cache
def after_step(mode, step): return after(mode, clean(mode)[step])

def after(mode, state):
    "What a new learner makes of `state` in a fit"
    new = make(mode)
    new.model.load_state_dict(state)
    do_fit(new)
    return new.model.state_dict()

class States(Callback):
    "The state at the beginning, and at the end of each iteration that made a step"
    order = 90
    def before_fit(self): self.states,self.stepped = [snapshot(self.model)],False
    def after_step(self): self.stepped = True
    def after_batch(self): self._note()
    def after_train(self): self._note()
    def _note(self):
        if self.stepped: self.states.append(snapshot(self.model))
        self.stepped = False

def same(a, b): return all(torch.equal(a[k], b[k]) for k in b)

def check(learn, mode, step, before, between=False):
    "All is as after `step` steps, nothing is left, and the next fit is that of a new learner"
    assert traces() == before
    for m in learn.model.modules():
        assert 'forward' not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks
        if isinstance(m, nn.modules.batchnorm._BatchNorm): assert m.momentum == .1
    places = ['one_batch','_backward','_step']
    if not between: places += ['all_batches','__reduce_ex__']
    assert not set(places) & vars(learn).keys()
    if learn.opt is not None: assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    Faulty.reset()
    cb = learn.accumulate_grad_bn
    if not between: assert cb.window is cb.batches is None
    if step is not None: assert same(learn.model.state_dict(), clean(mode)[step])
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, DoAt)])
    learn.dls.train.exc = learn.loss_func.exc = None
    want = after(mode, learn.model.state_dict()) if step is None else after_step(mode, step)
    learn.create_opt()
    do_fit(learn)
    assert same(learn.model.state_dict(), want)
    assert traces() == before

def per_window(mode):
    "Iterations of a window"
    return dict(none=4, two=8, eight=2, int_all=2).get(mode, 1)

def iters(mode):
    """Iterations to fail in, and how many steps have been made by then.

    The first of a fit, and in the second window the first, one in its middle and its last"""
    per = per_window(mode)
    return sorted({(i, i//per) for i in (0, per, per+per//2, 2*per-1)})


# --- Errors, interrupts, cancellations

ERRORS = [Boom, KeyboardInterrupt]

def plan_error(learn, mode, where, i, exc):
    "Have the data, the loss or the model fail in iteration `i`"
    if where == 'data': learn.dls.train.exc,learn.dls.train.at = exc,first_batch(mode, i)
    elif where == 'loss': learn.loss_func.exc,learn.loss_func.at = exc,i
    else:
        calls = {'pieces':6,'all':6,'int_all':3}.get(mode, 1)  # of the layer in an iteration: pieces of 3
        Faulty.reset(exc, i*calls + calls//2, where == 'backward')

def first_batch(mode, i):
    "The DataLoader's batch that begins iteration `i`"
    return i*STEP//per_window(mode)

@modes
@pytest.mark.parametrize('exc', ERRORS)
def test_errors_in_model_loss_and_data(mode, exc):
    before = traces()
    for where in ('forward','backward','loss','data'):
        for i,step in iters(mode):
            learn = make(mode)
            plan_error(learn, mode, where, i, exc('x'))
            with pytest.raises(exc): do_fit(learn)
            check(learn, mode, step, before)

EVENTS = ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_batch']

@main_modes
@pytest.mark.parametrize('exc,order', [(Boom,0), (Boom,20), (KeyboardInterrupt,0)])
def test_errors_in_callbacks(mode, exc, order):
    before = traces()
    for event in EVENTS:
        for i,step in iters(mode):
            last = (i+1) % per_window(mode) == 0
            if event == 'before_step' and order == 20 and not last: continue  # skipped there
            learn = make(mode, RaiseAt(event, i, exc('x'), order))
            with pytest.raises(exc): do_fit(learn)
            check(learn, mode, step + (event == 'after_batch' and last), before)

CANCELS = [CancelBatchException, CancelBackwardException, CancelStepException]

@main_modes
@pytest.mark.parametrize('exc', CANCELS)
def test_cancellations(mode, exc):
    "fastai takes them as it does; nothing is left, and the next fit is right"
    before = traces()
    for event in EVENTS:
        for order in (0, 20):
            for i,_ in iters(mode)[-2:]:
                if exc is CancelBackwardException and event != 'before_backward': continue
                if exc is CancelStepException and event != 'before_step': continue
                learn = make(mode, RaiseAt(event, i, exc(), order))
                too_late = event == 'after_batch' and exc is CancelBatchException  # fastai does not catch it
                outcome = pytest.raises(CancelBatchException) if too_late else nullcontext()
                with outcome: do_fit(learn)
                check(learn, mode, None, before)

@main_modes
@pytest.mark.parametrize('exc', [CancelTrainException, CancelEpochException, CancelFitException])
def test_a_window_that_is_cancelled_leaves_the_last_step(mode, exc):
    before = traces()
    for event in EVENTS:
        for order,at in (0, iters(mode)[-2:]), (20, iters(mode)[-1:]):
            for i,step in at:
                last = (i+1) % per_window(mode) == 0
                learn = make(mode, RaiseAt(event, i, exc(), order))
                do_fit(learn)
                check(learn, mode, step + (event == 'after_batch' and last), before)

@modes
def test_cancelled_validation(mode):
    before = traces()
    for event in ('before_validate','after_pred'):
        cb = RaiseAt('before_validate', None, CancelValidException())
        learn = make(mode, DoAt(event, None, lambda learn: None), cb)
        do_fit(learn)
        learn.remove_cb(cb)
        check(learn, mode, 2, before)
# --- A fit inside a fit

@modes
@pytest.mark.parametrize('event', ['before_batch','after_loss','after_backward','after_batch','before_epoch'])
def test_a_fit_in_an_epoch_of_the_same_learner_is_refused(mode, event):
    before = traces()
    at = None if event == 'before_epoch' else per_window(mode)
    learn = make(mode, DoAt(event, at, do_fit, order=20))
    with pytest.raises(RuntimeError, match='fit .*of (the same|this) learner'): do_fit(learn)
    steps = 1 + (event == 'after_batch' and per_window(mode) == 1)
    check(learn, mode, None if event == 'before_epoch' else steps, before)

@modes
@pytest.mark.parametrize('event', ['before_fit','after_train','after_epoch','after_fit'])
def test_a_fit_between_epochs_is_fine(mode, event):
    before = traces()
    learn = make(mode, DoAt(event, None, do_fit))
    do_fit(learn)
    check(learn, mode, None, before)

@modes
def test_another_learner_of_the_same_model_in_a_fit(mode):
    """Between windows it is as if one fit had been put into the other. It ends the window in which it comes, as all
    gradients are the model's"""
    before = traces()
    one = make(mode)
    def train_one(learn):
        do_fit(one)
        learn.model.train()
    boss = DoAt('after_batch', per_window(mode)-1, train_one)
    two = make(mode, boss, model=one.model)
    do_fit(two)
    want = make(mode)
    want.model.load_state_dict(clean(mode)[1])
    do_fit(want)
    rest = get_learner(get_dls(tilted(N)[16:], labels(N)[16:], BS), want.model, AccumulateGradBN(STEP, **MODES[mode]))
    do_fit(rest)
    assert same(one.model.state_dict(), want.model.state_dict())
    two.remove_cb(boss)
    for o in (one,two): check(o, mode, None, before)

def test_learners_in_turn():
    for mode in MODES:
        one = make(mode)
        two = make(mode, model=one.model)
        do_fit(one)
        do_fit(two)
        ref = make(mode)
        do_fit(ref)
        ref.create_opt()
        do_fit(ref)
        assert same(one.model.state_dict(), ref.model.state_dict())


# --- Copies

@modes
@pytest.mark.parametrize('event', ['after_epoch','after_fit'])
def test_a_copy_of_the_learner_is_on_its_own(mode, event):
    "fastai's learners cannot be copied in mid-epoch, nor those of any loop with a graph under way"
    before,copies = traces(),[]
    learn = make(mode, DoAt(event, None, lambda l: copies.append(copy.deepcopy(l))))
    do_fit(learn)
    c, = copies
    c.logger = learn.logger
    for step in (2, None):
        check(c, mode, step, before)  # fits
        assert same(learn.model.state_dict(), clean(mode)[2])
    check(learn, mode, 2, before)


# --- Numbers that are none

@modes
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_and_a_callback_that_ends_the_fit(mode, value):
    """`TerminateOnNaNCallback` acts after the batch: an open window is dropped, one that is complete was a step, as it
    is with a large batch"""
    class Spoil(Callback):
        order = -30
        def after_loss(self):
            if not self.training or self.iter != per_window(mode): return
            self.learn.loss_grad = self.loss_grad*value
            self.learn.loss = self.loss*value
    before = traces()
    learn = make(mode, Spoil(), TerminateOnNaNCallback())
    do_fit(learn)
    learn.remove_cb(Spoil)
    if per_window(mode) > 1: return check(learn, mode, 1, before)
    assert all(torch.isnan(p).any() for p in learn.model.parameters() if p.dim() > 1)  # a large batch's would be, too
    assert all(b.isfinite().all() for b in learn.model.buffers())
    learn.model.load_state_dict(clean(mode)[1])
    check(learn, mode, 1, before)

@modes
def test_data_that_is_not_finite(mode):
    """The window that it is in is that of plain PyTorch: NaN in all of it. With a callback that cancels such batches it
    is as if the batch never was"""
    class Skip(Callback):
        order = -5
        def before_batch(self):
            if self.training and not self.x.isfinite().all(): raise CancelBatchException
    before,bad = traces(),tilted(N)
    bad[N//2+1] = float('nan')
    learn = make(mode, Skip())
    learn.dls = get_dls(bad, labels(N), BS, valid=(tilted(4),labels(4)))
    do_fit(learn)
    assert all(o.isfinite().all() for o in learn.model.state_dict().values())
    learn.remove_cb(Skip)
    learn.dls = make(mode).dls
    check(learn, mode, None, before)


# --- Batches of other sizes

class Sizes(TfmdDL):
    "Batches of these sizes, of what the dataset has"
    sizes = ()
    def __iter__(self):
        i = 0
        for k in self.sizes:
            yield self.stacked(range(i, i+k)) if k else self.empty()
            i += k

    def stacked(self, idx):
        items = [self.dataset[j] for j in idx]
        return torch.stack([x for x,_ in items]),torch.stack([y for _,y in items])

    def empty(self): return torch.zeros(0,3,6,6, dtype=F64),torch.zeros(0, dtype=torch.long)
    def __len__(self): return len(self.sizes)

def sized(mode, sizes):
    learn = make(mode)
    xs,ys = tilted(N),labels(N)
    dl = Sizes(get_dls(xs, ys, BS).train.dataset, bs=BS, num_workers=0)
    dl.sizes = sizes
    learn.dls = DataLoaders(dl, learn.dls.valid, device='cpu')
    return learn

@pytest.mark.parametrize('mode', ['none','window','budget','pieces','all'])
def test_batches_of_odd_sizes(mode):
    "A window is `n_step` batches whatever their sizes: the gradient is that of the mean over all their samples"
    before,sizes = traces(),[4,1,3,8, 2,6,4,4]
    learn = sized(mode, sizes)
    do_fit(learn)
    b = list(zip(tilted(N).split(sizes), labels(N).split(sizes)))
    windows = [b[:4],b[4:]]
    if mode != 'none': windows = [[joined(w)] for w in windows]
    assert_same(learn.model, reference_fit(net(), windows, mean_ce), 1e-11)
    learn.dls = make(mode).dls
    check(learn, mode, None, before)
def joined(batches): return tuple(torch.cat(o) for o in zip(*batches))
@modes
def test_an_empty_batch(mode):
    "counts for nothing"
    before = traces()
    learn = sized(mode, [4,4,0,4,4, 4,4,4])
    do_fit(learn)
    assert all(o.isfinite().all() for o in learn.model.state_dict().values())
    xs,ys = tilted(N)[:28],labels(N)[:28]
    k = {'none':4,'two':2,'eight':8,'int_all':8}.get(mode, 16)
    def cut(a, b): return list(zip(xs[a:b].split(k), ys[a:b].split(k)))
    assert_same(learn.model, reference_fit(net(), [cut(0, 12),cut(12, 28)], mean_ce), 1e-11)
    learn.dls = make(mode).dls
    check(learn, mode, None, before)


# --- A worker process that dies

class Deadly:
    "A dataset that takes its process down"
    def __init__(self, at): self.at,self.xs,self.ys = at,tilted(N),labels(N)
    def __len__(self): return N
    def __getitem__(self, i):
        if i == self.at and multiprocessing.parent_process() is not None: os._exit(3)
        return self.xs[i],self.ys[i]

DEATHS = 'none','eight','window','all'

def failure(learn):
    "How a fit fails. Nothing keeps the error, as its frames have the dead worker's queue"
    try: do_fit(learn)
    except (RuntimeError,OSError,EOFError) as e: return type(e),str(e)
    raise AssertionError('it lives')

def deaths():
    "Have workers die, in each mode, in the second window"
    # Without PyTorch's signal handler, which tells of a death wherever the process is by then, and more than once: the
    # queue tells, too
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True
    for mode in DEATHS:
        before = traces()
        learn = make(mode)
        learn.dls = DataLoaders(TfmdDL(Deadly(N-5), bs=BS, num_workers=1), learn.dls.valid, device='cpu')
        # It is the queue that tells, or the batch that the worker was handing over
        kind,text = failure(learn)
        assert issubclass(kind, (OSError,EOFError)) or 'DataLoader worker' in text, text
        learn.dls = make(mode).dls
        gc.collect()
        for o in threading.enumerate():
            if o.name != 'MainThread': o.join(5)  # the queue's, of which PyTorch lets go late
        check(learn, mode, 1, before)
    print('survived', len(DEATHS))

def test_worker_processes_that_die():
    run = in_a_process('import test_faults\ntest_faults.deaths()')
    assert run.stdout.strip() == f'survived {len(DEATHS)}', run.stderr[-3000:]


# --- Weights that are loaded in mid-fit

@modes
@pytest.mark.parametrize('event', ['after_backward','after_batch'])
def test_load_in_mid_fit(mode, event, tmp_path):
    """What is loaded is the model from then on. The window goes on with its gradient, as with plain accumulation; its
    statistics count as those of any window"""
    before,i = traces(),per_window(mode)-1
    saved = make(mode)
    do_fit(saved)
    saved.save(tmp_path/'m')
    start = snapshot(saved.model)
    seen = []
    def load(learn):
        learn.load(tmp_path/'m', with_opt=False)
        seen.append(snapshot(learn.model))
    learn = make(mode, DoAt(event, i, load, order=30), cb := States())
    do_fit(learn)
    assert same(seen[0], start) and len(cb.states) == 3
    first = cb.states[1]
    if event == 'after_batch': assert same(first, start)  # it came after the step
    elif per_window(mode) == 1:  # as natively: the forward pass came before
        assert all(torch.equal(first[k], start[k]) for k in start if 'running' in k or 'num' in k)
    else:
        ref,base = clean(mode)[1],clean(mode)[0]
        for k in start:  # the window's moments
            if 'running' not in k: continue
            torch.testing.assert_close(first[k]-.9*start[k], ref[k]-.9*base[k], rtol=1e-9, atol=1e-11)
    check(learn, mode, None, before)


# --- An interrupt at any line of ours

OURS = str(Path(fastai_bn.__file__).parent)

@cache
def unasked(file):
    """Numbers of lines before which Python looks for no signal, so that no interrupt can come there.

    It looks where a function begins, after a call, and in loops: not at `try`, and not between what it has tried and
    what comes first in `finally`"""
    tries = [o for o in ast.walk(ast.parse(Path(file).read_text())) if isinstance(o, ast.Try)]
    return {o.lineno for o in tries} | {n for o in tries for n in first_lines(o.finalbody)}

def first_lines(body):
    "Numbers of the lines of `body` before which nothing is called"
    if not body: return []
    first = body[0]
    branches = [first.body, first.orelse] if isinstance(first, ast.If) else []
    return [first.lineno, *(n for b in branches for n in first_lines(b))]

@cache
def leaves(code, line):
    """Positions in `code` where a `with` statement of `line` ends.

    A signal that comes in its body is raised there, one that comes later within `__exit__`: between them Python looks
    for none. (A trace function's error would be raised there, and nothing would be closed.)"""
    if line not in with_lines(code.co_filename): return set()
    starts = [start for start,_,n in code.co_lines() if n == line]
    return set(starts[1:])

@cache
def with_lines(file):
    "Numbers of the lines on which a `with` statement or what it opens begins"
    withs = [o for o in ast.walk(ast.parse(Path(file).read_text())) if isinstance(o, ast.With)]
    return {o.lineno for o in withs} | {item.context_expr.lineno for o in withs for item in o.items}

class Interrupt:
    "Trace the lines of ours that `f()` runs, with a `KeyboardInterrupt` at the `k`-th, or when line `at` first comes"
    def __init__(self, f, k=None, at=None):
        self.k,self.at = k,at
        self.n,self.seen = 0,{}             # how many lines were run, and which ones: by file and number
        self.where,self.came_out = '',False # the place of the interrupt; has it come out of `f`?
        hook,sys.unraisablehook = sys.unraisablehook,self.lost
        sys.settrace(self.call)
        try: f()
        except KeyboardInterrupt: self.came_out = True
        finally:
            sys.settrace(None)
            sys.unraisablehook = hook
        assert self.came_out or not self.where, self.where

    def call(self, frame, event, arg): return self.line if frame.f_code.co_filename.startswith(OURS) else None

    def line(self, frame, event, arg):
        here = frame.f_code.co_filename,frame.f_lineno
        is_asked = here[1] not in unasked(here[0]) and frame.f_lasti not in leaves(frame.f_code, here[1])
        if event == 'line' and is_asked:
            self.n += 1
            self.seen[here] = self.n
            if self.n == self.k or here == self.at: self.interrupt(here)
        return self.line

    def interrupt(self, here):
        self.where = here
        sys.settrace(None)
        raise KeyboardInterrupt

    def lost(self, unraisable):
        "Forget an interrupt in a weak reference's callback, from which Python lets nothing out"
        if unraisable.exc_type is KeyboardInterrupt: self.where = ''

SOAK = int(os.environ.get('FASTAI_BN_SOAK', 0))  # all tests of this kind more often with FASTAI_BN_SOAK=10

def is_step(state, states, i):
    "The weights of step `i`, and its running statistics or those of the step before: they are written a moment later"
    counted = [k for k in state if 'running' in k or 'num_batches' in k]
    def same_as(j, keys): return all(torch.equal(state[k], states[j][k]) for k in keys)
    if not same_as(i, state.keys()-counted): return False
    kinds = [[k for k in counted if name in k] for name in ('running','num_batches')]
    return all(any(same_as(j, keys) for j in (i, i-1) if j >= 0) for keys in kinds)

@modes
def test_an_interrupt_at_any_line(mode):
    before,states = traces(),clean(mode)
    n,n_hit = Interrupt(lambda: do_fit(make(mode))).n,0
    ks = random.Random(n).sample(range(1, n+1), 12*max(1, SOAK))
    for k in ks:
        learn = make(mode)
        where = Interrupt(lambda: do_fit(learn), k).where
        if not where: continue  # there may be a few lines less: the garbage collector's calls
        n_hit += 1
        assert any(is_step(learn.model.state_dict(), states, i) for i in range(len(states))), where
        # Between the beginning of an epoch and that of its loop nobody closes; the next fit does
        check(learn, mode, None, before, between=True)
        assert learn.accumulate_grad_bn.window is None and 'all_batches' not in vars(learn)
    assert n > 1000 and n_hit > .8*len(ks)

def interrupts(make, f):
    "Yield what `make` made after `f` of it, interrupted where a line of ours first comes: each third (with SOAK, each)"
    seen = list(Interrupt(lambda: f(make())).seen)
    places = seen[::1 if SOAK else 3]
    n_hit = 0
    for at in places:
        o = make()
        if not Interrupt(lambda: f(o), at=at).where: continue
        n_hit += 1
        yield o
    assert len(seen) > 100 and n_hit > .8*len(places)

def test_precise_bn_writes_all_or_nothing():
    before,batches = traces(),tilted(12).split(4)
    old,want = snapshot(conv_net()),conv_net()
    precise_bn(want, batches, progress=False)
    for m in interrupts(conv_net, lambda m: precise_bn(m, batches, progress=False, budget=BUDGET)):
        assert same(m.state_dict(), old) or same(m.state_dict(), want.state_dict())
        assert all(o.training for o in m.modules())
        assert not any('forward' in vars(o) or o._forward_hooks for o in m.modules())
        assert traces() == before
        precise_bn(m, batches, progress=False)
        assert same(m.state_dict(), want.state_dict())

@pytest.mark.parametrize('micro_bs', [None,3])
def test_pager_and_lock_step_in_a_plain_loop(micro_bs):
    before,xs,ys = traces(),tilted(8),labels(8)
    def make():
        m = conv_net()
        return m,MicroBatched(m, micro_bs) if micro_bs else m,ActivationPager(BUDGET)
    def step(made):
        _,model,pager = made
        with pager: F.cross_entropy(model(xs), ys).backward()
    want = make()
    step(want)
    old = snapshot(make()[0])
    for made in interrupts(make, step):
        m = made[0]
        assert traces() == before and not any('forward' in vars(k) for k in m.modules())
        assert all(k.momentum == .1 for k in (m[1],m[4]))
        m.load_state_dict(old)
        m.zero_grad()
        step(made)
        assert same(m.state_dict(), want[0].state_dict())
        assert all(torch.equal(p.grad, q.grad) for p,q in zip(m.parameters(), want[0].parameters()))


# --- Saved in mid-window, loaded in a new process

def saving(path):
    "In the middle of the second window"
    for mode in MODES:
        per = per_window(mode)
        at = per + (per-1)//2 if per > 1 else 0
        save = DoAt('after_batch', at, lambda l: l.save(path/mode, with_opt=True))
        do_fit(make(mode, save, opt_func=Adam))

def going_on(path):
    for mode in MODES:
        learn = make(mode, opt_func=Adam)
        learn.load(path/mode, with_opt=True)
        do_fit(learn)
        torch.save(learn.model.state_dict(), path/f'{mode}-done.pth')

def test_a_new_process_goes_on_after_the_last_step(tmp_path):
    "Weights, running statistics and the optimizer are there; the window under way is not, and begins anew"
    saving(tmp_path)
    run = in_a_process(f'import test_faults\ntest_faults.going_on(test_faults.Path({str(tmp_path)!r}))')
    assert run.returncode == 0, run.stderr[-3000:]
    for mode in MODES:
        learn = make(mode, opt_func=Adam)
        dls = learn.dls
        learn.dls = get_dls(tilted(N)[:16], labels(N)[:16], BS)
        do_fit(learn)  # the first window
        saved = torch.load(tmp_path/f'{mode}.pth', weights_only=False)['model']
        assert same(saved, snapshot(learn.model))
        learn.dls = dls
        do_fit(learn)
        assert same(torch.load(tmp_path/f'{mode}-done.pth'), learn.model.state_dict())

@modes
def test_start_epoch(mode):
    learn,cb = make(mode),States()
    learn.add_cb(cb)
    do_fit(learn, 3, start_epoch=2)
    assert len(cb.states) == 3 and same(cb.states[2], clean(mode)[2])
    check(learn, mode, 2, traces())
