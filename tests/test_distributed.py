"Two processes, started as a user would, each with its own half of the data: `ranks.py` says what they do. Here is what it has to be"
import os, pickle, subprocess, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn

import ranks
from fastai_bn.all import AccumulateGradBN, MicroBatched
from conftest import F64, Inputs, conv_net, do_fit, get_dls, get_learner, reference_fit, tilted, windows_of
from ranks import BS, EMPTY, MODES, STEP, data

@pytest.fixture(scope='session')
def got(tmp_path_factory):
    "What `ranks.jobs` have returned, for each process"
    path = tmp_path_factory.mktemp('ranks')
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':os.pathsep.join([str(Path(ranks.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])}
    launch = '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0'
    run = subprocess.run([sys.executable, *launch.split(), ranks.__file__, path], env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    return [pickle.loads((path/f'{r}.pkl').read_bytes()) for r in (0,1)]

def close(a, b, tol=1e-9):
    assert a.keys() == b.keys()
    for k in a:
        err,size = (a[k].to(F64)-b[k].to(F64)).abs().max().item(),max(1, b[k].to(F64).abs().max().item())
        assert err <= tol*size, (k, err)

def together(xs, bs=BS):
    "The samples in the order in which one process with batches of `2*bs` sees what two with `bs` see"
    return torch.stack([o.unflatten(0, (-1,bs)) for o in xs.chunk(2)], 1).flatten(0, 2)

def one_process(kw, empty=(), epochs=2):
    "The fit in one process, with batches of both"
    xs,ys = [together(o, min(BS, kw['bn_bs']) if isinstance(kw.get('bn_bs'), int) else BS) for o in data(empty)]
    kw = {**kw, **({'bn_bs':2*kw['bn_bs']} if isinstance(kw.get('bn_bs'), int) else {})}
    learn = get_learner(get_dls(xs, ys, 2*BS), conv_net(), [AccumulateGradBN(STEP, **kw), ranks.Watch()])
    do_fit(learn, epochs)
    return learn

def large_batch(epochs=2):
    "fastai's own fit with 32 samples in a batch"
    learn = get_learner(get_dls(*map(together, data()), 2*BS*STEP), conv_net(), ranks.Watch())
    do_fit(learn, epochs)
    return learn

quiet = pytest.mark.filterwarnings('ignore:.*budget.*', 'ignore:.*alone needs.*')


# --- SyncBatchNorm: BN over both

@pytest.mark.parametrize('mode', ['window','budget','pieces','all'])
def test_two_processes_of_2_x_8_are_one_with_32(got, mode):
    learn = large_batch()
    for o in got:
        o = o[f'sync {mode}']
        close(o['state'], learn.model.state_dict())
        assert o['steps'] == learn.watch.steps == 4
        assert o['losses'][-1][1] == pytest.approx(learn.recorder.values[-1][1], rel=1e-5)  # valid_loss; the training loss is smoothed over micro-batches

@quiet
@pytest.mark.parametrize('mode', MODES)
def test_sync_bn_is_one_process_with_batches_of_both(got, mode):
    learn = one_process(MODES[mode])
    for o in got: close(o[f'sync {mode}']['state'], learn.model.state_dict())

def test_the_modes_differ(got):
    "so the tests above can fail"
    a,b,c = [got[0][f'sync {k}']['state']['0.weight'] for k in ('none','eight','window')]
    assert min((a-b).abs().max(), (b-c).abs().max()) > 1e-3
    assert (got[0]['own window']['state']['0.weight']-c).abs().max() > 1e-3

@quiet
@pytest.mark.parametrize('mode', ['none','window','pieces'])
@pytest.mark.parametrize('empty', EMPTY)
def test_sync_bn_with_targets_that_do_not_count(got, mode, empty):
    learn = one_process(MODES[mode], EMPTY[empty])
    for o in got:
        close(o[f'sync {mode}, empty {empty}']['state'], learn.model.state_dict())
        assert o[f'sync {mode}, empty {empty}']['steps'] == learn.watch.steps

def test_one_value_per_channel_in_each_process_is_two_together(got):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4,5)).double()
    do_fit(get_learner(get_dls(*[together(o, 1) for o in data()], 2), model, [AccumulateGradBN(4)]))
    for o in got: close(o['single'], model.state_dict())

def test_captured_moments_are_those_of_both(got):
    x = tilted(7).transpose(0, 1).flatten(1)
    for o in got:
        assert len(o['captured']) == 2  # asked twice, told the same
        for n,mean,var in o['captured']:
            assert n == 7*36
            torch.testing.assert_close(mean, x.mean(1), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(var, x.var(1), rtol=1e-10, atol=1e-12)

def test_a_second_fit_in_the_context_and_one_more(got):
    learn = large_batch(1)
    for _ in range(2): do_fit(learn)
    for o in got: close(o['again'], learn.model.state_dict())


# --- A plain loop

def test_a_window_in_a_plain_loop(got):
    "Windows of both, with micro-batches that lack targets; running statistics of each process's own"
    xs,ys = data(ranks.EMPTY_MICRO)
    micro = list(zip(xs.split(4), ys.split(4)))
    mine = [micro[r::2][:5] for r in (0,1)]
    ref = reference_fit(conv_net(), [mine[0][s]+mine[1][s] for s in (slice(0, 3), slice(3, 5))], lambda p,y: (F.cross_entropy(p, y, reduction='sum'), (y != -100).sum()))
    for o in got:
        for k,v in ref.named_parameters(): torch.testing.assert_close(o['window'][k], v.detach(), rtol=1e-10, atol=1e-11)
    assert not torch.equal(got[0]['window']['1.running_mean'], got[1]['window']['1.running_mean'])


# --- BN of each process's own

def by_hand(bn_bs, empty=(), epochs=2):
    "Weights, and process 0's running statistics, which are also process 1's when its next forward pass begins (`broadcast_buffers`)"
    model = conv_net().train()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    halves = [[o.chunk(2)[r] for o in data(empty)] for r in (0,1)]
    windows = list(zip(*(windows_of(*h, bn_bs, BS*STEP//bn_bs) for h in halves)))
    inputs = Inputs(model)
    for _ in range(epochs):
        for per_rank in windows:
            total = sum((y != -100).sum() for w in per_rank for _,y in w)
            keep = [(m.running_mean.clone(), m.running_var.clone()) for m in inputs.layers]
            loss,pooled = 0,[]
            for w in per_rank:
                loss = loss + sum(F.cross_entropy(model(x), y, reduction='sum') for x,y in w)
                pooled.append(inputs.pooled())
            if total == 0:
                for m,(rm,rv) in zip(inputs.layers, keep): m.running_mean.copy_(rm); m.running_var.copy_(rv)
                continue
            opt.zero_grad(); (loss/total).backward(); opt.step()
            for m,(rm,rv),(mean,var) in zip(inputs.layers, keep, pooled[0]):
                m.running_mean.copy_(.9*rm + .1*mean)
                m.running_var.copy_(.9*rv + .1*var)
    inputs.remove()
    return model.state_dict()

def same_as_by_hand(got, key, ref):
    for r,o in enumerate(got):
        state = o[key]['state']
        for k,v in ref.items():
            if 'num_batches' in k or ('running' in k and r): continue
            torch.testing.assert_close(state[k], v, rtol=1e-9, atol=1e-10, msg=lambda s: f'{key} {k} {s}')

@pytest.mark.parametrize('mode,bn_bs', [('none',2), ('eight',8), ('eight_pieces',8), ('window',16), ('budget',16), ('pieces',16), ('all',16)])
def test_own_bn_with_gradients_of_both(got, mode, bn_bs): same_as_by_hand(got, f'own {mode}', by_hand(bn_bs))

@pytest.mark.parametrize('mode,bn_bs', [('none',2), ('window',16), ('pieces',16)])
@pytest.mark.parametrize('empty', EMPTY)
def test_own_bn_with_targets_that_do_not_count(got, mode, bn_bs, empty): same_as_by_hand(got, f'own {mode}, empty {empty}', by_hand(bn_bs, EMPTY[empty]))


# --- Both

def test_gradients_are_reduced_once_per_window(got):
    n = 0
    for o in got:
        for k,v in o.items():
            if not (k.startswith(('own ','sync ')) and 'empty' not in k): continue
            assert v['reduced'] == v['steps'] == 4, k  # 2 epochs of 2 windows; one bucket
            n += 1
    assert n == 2*(2*len(MODES)-1)

def population(model, x):
    layers,seen = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)],[]
    hook = layers[0].register_forward_pre_hook(lambda m,a: seen.append(a[0].transpose(0, 1).flatten(1)))
    with torch.no_grad(): model.eval()(x)
    hook.remove()
    return seen[0].mean(1),seen[0].var(1)

@pytest.mark.parametrize('sync', [True,False])
def test_population_statistics_of_both(got, sync):
    a,b = [o[f'statistics {sync}'] for o in got]
    close(a['state'], b['state'], 1e-12)
    mean,var = population(ranks.first_bn(), tilted(21))
    for o in (a,b):
        for s in (o['after'],o['state']):
            torch.testing.assert_close(s['0.running_mean'], mean, rtol=1e-9, atol=1e-10)  # every sample once, though shares are uneven; BN batches of 8, as in the training with SyncBatchNorm, make 16 of 8
            torch.testing.assert_close(s['0.running_var'], var, rtol=1e-9, atol=1e-10)
        for t,n in (o['report'],21),(o['table'],21),(o['few'],16 if sync else 8): assert list(t.samples) == [n,n]
        torch.testing.assert_close(o['report'].var_ratio.to_numpy()[:1], o['report'].var_ratio.to_numpy()[:1]*0+1, rtol=1e-9, atol=1e-9)  # `PreciseBN` had just been there

@quiet
@pytest.mark.parametrize('sync', [True,False])
@pytest.mark.parametrize('micro_bs', [None,3])
def test_micro_batched_in_a_plain_loop(got, micro_bs, sync):
    model = conv_net()
    xs,ys = data()
    if sync: F.cross_entropy(model(xs), ys).backward()
    else: sum(F.cross_entropy(model(x), y)/2 for x,y in zip(xs.chunk(2), ys.chunk(2))).backward()
    for o in got:
        o = o[f'loop {micro_bs} {sync}']
        close(o['grads'], {k:p.grad for k,p in model.named_parameters()})
        if sync: close(o['state'], model.state_dict())

@quiet
@pytest.mark.parametrize('micro_bs', [None,4])
@pytest.mark.parametrize('sizes', [(8,3),(2,9)])
def test_batches_of_other_sizes_in_each_process(got, micro_bs, sizes):
    "in one of them a single piece"
    model = conv_net()
    xs,ys = [o[:sum(sizes)] for o in data()]
    F.cross_entropy(model(xs), ys).backward()
    for o in got:
        o = o[f'loop {micro_bs} {sizes}']
        close(o['grads'], {k:p.grad for k,p in model.named_parameters()})
        close(o['state'], model.state_dict())

@pytest.mark.parametrize('mode', ['none','eight'])
@pytest.mark.parametrize('event', ['before_backward','before_batch'])
def test_a_window_whose_last_gradient_is_cancelled_makes_no_step(got, event, mode):
    "Its gradients were not exchanged. All processes stay the same"
    a,b = [o[f'cancel {event} {mode}'] for o in got]
    close(a['state'], b['state'], 1e-14)
    assert a['state']['1.num_batches_tracked'] == b['state']['1.num_batches_tracked'] == 1

@pytest.mark.parametrize('mode', ['none','window','eight'])
def test_lr_find_is_refused(got, mode): assert [o[f'lr_find {mode}'] for o in got] == ['refused']*2


# --- DataParallel

def test_parallel_ctx_is_refused_and_leaves_the_model():
    model = conv_net()
    learn = get_learner(get_dls(*data(), BS), model, AccumulateGradBN(4))
    with pytest.raises(ValueError, match='distrib_ctx'):
        with learn.parallel_ctx(): do_fit(learn)
    assert learn.model is model
    do_fit(learn)

def test_copies_of_micro_batched_are_refused():
    with pytest.raises(ValueError, match='distrib_ctx'): MicroBatched(conv_net(), 2)._replicate_for_data_parallel()  # as `replicate` does for each GPU
