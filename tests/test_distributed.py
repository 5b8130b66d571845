"Two processes, started as a user would, each with its own half of the data. What they do is in ranks.py"
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ranks
from fastai_bn.all import AccumulateGradBN, MicroBatched
from helpers import (F64, LAUNCH, Inputs, conv_net, counted_ce, do_fit, get_dls, get_learner, process_env, quiet_budget,
                     reference_fit, running_of, tilted, windows_of)
from ranks import BS, EMPTY, MODES, STEP, data

@pytest.fixture(scope='session')
def got(tmp_path_factory):
    "`got(f, *args)`: what the function `f` of `ranks` has returned, for each process"
    path = tmp_path_factory.mktemp('ranks')
    env = {**process_env(), 'OMP_NUM_THREADS':'1'}
    command = [sys.executable, *LAUNCH, ranks.__file__, path]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    results = [pickle.loads((path/f'{r}.pkl').read_bytes()) for r in (0,1)]
    return lambda f, *args: [o[f.__name__,*args] for o in results]

def close(a, b, tol=1e-9):
    assert a.keys() == b.keys()
    for k in a:
        err,size = (a[k].to(F64)-b[k].to(F64)).abs().max().item(),max(1, b[k].to(F64).abs().max().item())
        assert err <= tol*size, (k, err)

def grads(model): return {k:p.grad for k,p in model.named_parameters()}

def together(xs, bs=BS):
    "The samples in the order in which one process with batches of `2*bs` sees what two with `bs` see"
    return torch.stack([o.unflatten(0, (-1,bs)) for o in xs.chunk(2)], 1).flatten(0, 2)

def one_process(mode, empty=(), epochs=2):
    "The fit in one process, with batches of both"
    kw,bs = MODES[mode],BS
    if isinstance(kw.get('bn_bs'), int):
        bs = min(BS, kw['bn_bs'])
        kw = {**kw, 'bn_bs':2*kw['bn_bs']}
    xs,ys = [together(o, bs) for o in data(empty)]
    learn = get_learner(get_dls(xs, ys, 2*BS), conv_net(), [ranks.accumulating(**kw), ranks.Watch()])
    do_fit(learn, epochs)
    return learn

def large_batch(epochs=2):
    "fastai's own fit with 32 samples in a batch"
    learn = get_learner(get_dls(*map(together, data()), 2*BS*STEP), conv_net(), ranks.Watch())
    do_fit(learn, epochs)
    return learn


# --- SyncBatchNorm: BN over both

@pytest.mark.parametrize('mode', ['window','budget','pieces','all','auto'])
def test_two_processes_of_2_x_8_are_one_with_32(got, mode):
    learn = large_batch()
    for o in got(ranks.trained, mode, 'sync'):
        close(o['state'], learn.model.state_dict())
        assert o['steps'] == learn.watch.steps == 4
        # The loss of the validation; that of the training is smoothed over micro-batches
        assert o['losses'][-1][1] == pytest.approx(learn.recorder.values[-1][1], rel=1e-5)

@quiet_budget
@pytest.mark.parametrize('mode', MODES)
def test_sync_bn_is_one_process_with_batches_of_both(got, mode):
    learn = one_process(mode)
    for o in got(ranks.trained, mode, 'sync'): close(o['state'], learn.model.state_dict())

def test_the_modes_differ(got):
    "so the tests above can fail"
    def weight(mode, bn): return got(ranks.trained, mode, bn)[0]['state']['0.weight']
    a,b,c = [weight(k, 'sync') for k in ('none','eight','window')]
    assert min((a-b).abs().max(), (b-c).abs().max()) > 1e-3
    assert (weight('window', 'own')-c).abs().max() > 1e-3

@quiet_budget
@pytest.mark.parametrize('mode', ['none','window','pieces'])
@pytest.mark.parametrize('empty', EMPTY)
def test_sync_bn_with_targets_that_do_not_count(got, mode, empty):
    learn = one_process(mode, EMPTY[empty])
    for o in got(ranks.trained, mode, 'sync', empty):
        close(o['state'], learn.model.state_dict())
        assert o['steps'] == learn.watch.steps

def test_one_value_per_channel_in_each_process_is_two_together(got):
    model = ranks.pooled_head()
    do_fit(get_learner(get_dls(*[together(o, 1) for o in data()], 2), model, [AccumulateGradBN(4)]))
    for o in got(ranks.single_values): close(o, model.state_dict())

def test_captured_moments_are_those_of_both(got):
    x = tilted(7).transpose(0, 1).flatten(1)
    for o in got(ranks.captured):
        assert len(o) == 2  # asked twice, told the same
        for n,mean,var in o:
            assert n == 7*36
            torch.testing.assert_close(mean, x.mean(1), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(var, x.var(1), rtol=1e-10, atol=1e-12)

def test_a_second_fit_and_one_more(got):
    learn = large_batch(1)
    for _ in range(2): do_fit(learn)
    for o in got(ranks.again): close(o, learn.model.state_dict())


# --- A plain loop

def test_a_window_in_a_plain_loop(got):
    "Windows of both, with micro-batches that lack targets; running statistics of each process's own"
    xs,ys = data(ranks.EMPTY_MICRO)
    micro = list(zip(xs.split(4), ys.split(4)))
    mine = [micro[r::2][:5] for r in (0,1)]
    windows = [mine[0][:3]+mine[1][:3], mine[0][3:]+mine[1][3:]]
    ref = reference_fit(conv_net(), windows, counted_ce)
    first,second = got(ranks.window_loop)
    for k,v in ref.named_parameters():
        for o in (first,second): torch.testing.assert_close(o[k], v.detach(), rtol=1e-10, atol=1e-11)
    assert not torch.equal(first['1.running_mean'], second['1.running_mean'])


# --- BN of each process's own

def by_hand(bn_bs, empty=(), epochs=2):
    """Weights, and process 0's running statistics, which are also process 1's when its next forward pass begins
    (`broadcast_buffers`)"""
    model = conv_net().train()
    opt,inputs = torch.optim.SGD(model.parameters(), lr=.1),Inputs(model)
    halves = [[o.chunk(2)[r] for o in data(empty)] for r in (0,1)]
    windows = list(zip(*(windows_of(*h, bn_bs, BS*STEP//bn_bs) for h in halves)))
    for _ in range(epochs):
        for per_rank in windows: step_by_hand(model, opt, inputs, per_rank)
    inputs.remove()
    return model.state_dict()

def step_by_hand(model, opt, inputs, per_rank):
    "Make a step with the windows of both processes, if any target counts; its statistics are those of process 0"
    before = running_of(inputs.layers)
    losses,pooled = [],[]
    for w in per_rank:
        losses += [F.cross_entropy(model(x), y, reduction='sum') for x,y in w]
        pooled.append(inputs.pooled())
    total = sum((y != -100).sum() for w in per_rank for _,y in w)
    if total:
        opt.zero_grad()
        (sum(losses)/total).backward()
        opt.step()
    momentum = .1 if total else 0.
    for m,(mean,var),(new_mean,new_var) in zip(inputs.layers, before, pooled[0]):
        m.running_mean.copy_((1-momentum)*mean + momentum*new_mean)
        m.running_var.copy_((1-momentum)*var + momentum*new_var)

def same_as_by_hand(got, mode, bn_bs, *empty):
    "The weights of both processes, and the running statistics of the first"
    ref = by_hand(bn_bs, *[EMPTY[k] for k in empty])
    for r,o in enumerate(got(ranks.trained, mode, 'own', *empty)):
        for k,v in ref.items():
            if 'num_batches' in k or ('running' in k and r): continue
            torch.testing.assert_close(o['state'][k], v, rtol=1e-9, atol=1e-10, msg=lambda s: f'{k} {s}')

BN_BATCHES = dict(none=2, eight=8, eight_pieces=8, window=16, budget=16, pieces=16, all=16)

@pytest.mark.parametrize('mode,bn_bs', BN_BATCHES.items())
def test_own_bn_with_gradients_of_both(got, mode, bn_bs): same_as_by_hand(got, mode, bn_bs)

@pytest.mark.parametrize('mode', ['none','window','pieces'])
@pytest.mark.parametrize('empty', EMPTY)
def test_own_bn_with_targets_that_do_not_count(got, mode, empty): same_as_by_hand(got, mode, BN_BATCHES[mode], empty)


# --- Both

def test_gradients_are_reduced_once_per_window(got):
    calls = [args for f,*args in ranks.jobs() if f is ranks.trained and len(args) == 2]
    assert len(calls) == 2*len(MODES)-1
    for args in calls:
        # 2 epochs of 2 windows; one bucket
        steps = 7 if args[0] == 'carry' else 4  # 32 micro-batches in windows of 5: across the epoch's end, too
        for o in got(ranks.trained, *args): assert o['reduced'] == o['steps'] == steps, args

def population(model, x):
    "Mean and variance of what the first BN layer sees"
    inputs = Inputs(model.train())
    with torch.no_grad(): model(x)
    inputs.remove()
    return inputs.pooled()[0]

@pytest.mark.parametrize('bn', ['sync','own'])
def test_population_statistics_of_both(got, bn):
    "Every sample once, though shares are uneven"
    a,b = got(ranks.statistics, bn)
    close(a['state'], b['state'], 1e-12)
    mean,var = population(ranks.first_bn(), tilted(21))
    for o in (a,b):
        for s in (o['after'],o['state']):
            torch.testing.assert_close(s['0.running_mean'], mean, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(s['0.running_var'], var, rtol=1e-9, atol=1e-10)
        few = 16 if bn == 'sync' else 8  # BN batches of 8, as in the training with SyncBatchNorm, make 16 of 8
        for table,n in (o['report'],21),(o['table'],21),(o['few'],few): assert list(table.samples) == [n,n]
        assert o['report'].var_ratio.iloc[0] == pytest.approx(1, abs=1e-9)  # `PreciseBN` had just been there

@quiet_budget
@pytest.mark.parametrize('bn', ['sync','own'])
@pytest.mark.parametrize('micro_bs', [None,3])
def test_micro_batched_in_a_plain_loop(got, micro_bs, bn):
    model = conv_net()
    xs,ys = data()
    if bn == 'sync': F.cross_entropy(model(xs), ys).backward()
    else: sum(F.cross_entropy(model(x), y)/2 for x,y in zip(xs.chunk(2), ys.chunk(2))).backward()
    for o in got(ranks.plain_loop, micro_bs, bn):
        close(o['grads'], grads(model))
        if bn == 'sync': close(o['state'], model.state_dict())

@quiet_budget
@pytest.mark.parametrize('micro_bs', [None,4])
@pytest.mark.parametrize('sizes', [(8,3),(2,9)])
def test_batches_of_other_sizes_in_each_process(got, micro_bs, sizes):
    "in one of them a single piece"
    model = conv_net()
    xs,ys = [o[:sum(sizes)] for o in data()]
    F.cross_entropy(model(xs), ys).backward()
    for o in got(ranks.plain_loop, micro_bs, 'sync', sizes):
        close(o['grads'], grads(model))
        close(o['state'], model.state_dict())

@pytest.mark.parametrize('mode', ['none','eight'])
@pytest.mark.parametrize('event', ranks.CANCELS)
def test_a_window_whose_last_gradient_is_cancelled_makes_no_step(got, event, mode):
    "Its gradients were not exchanged. All processes stay the same"
    a,b = got(ranks.cancelled, event, mode)
    close(a['state'], b['state'], 1e-14)
    assert a['state']['1.num_batches_tracked'] == b['state']['1.num_batches_tracked'] == 1

@pytest.mark.parametrize('mode', ['none','window','eight'])
def test_lr_find_is_refused(got, mode): assert got(ranks.lr_find, mode) == ['refused']*2


# --- DataParallel

def test_parallel_ctx_is_refused_and_leaves_the_model():
    model = conv_net()
    learn = get_learner(get_dls(*data(), BS), model, AccumulateGradBN(4))
    with pytest.raises(ValueError, match='distrib_ctx'):
        with learn.parallel_ctx(): do_fit(learn)
    assert learn.model is model
    do_fit(learn)

def test_copies_of_micro_batched_are_refused():
    "as `replicate` makes them for each GPU"
    with pytest.raises(ValueError, match='distrib_ctx'): MicroBatched(conv_net(), 2)._replicate_for_data_parallel()
