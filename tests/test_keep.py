"`keep_running_stats`: passes that leave BN's running statistics alone, checkpointing's second one above all"
import copy
import pickle
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from timm.layers import BatchNormAct2d
from torchvision.models import DenseNet
from fastai.basics import SGD

from fastai_bn.all import (AccumulateGradBN, ActivationPager, MicroBatched, Window, bn_layers, capture_moments,
                           hold_updates, keep_running_stats, update_running_stats)
from helpers import (
    F64, Boom, Checkpointed, Norms, assert_differ, assert_equal_states, assert_same_bits, conv_net, do_fit, get_dls,
    get_learner, labels, quiet_budget, snapshot, stand_ins, tilted)

X,Y = tilted(8),labels(8)

def with_grads(model): return {**model.state_dict(), **{f'{k}.grad':p.grad for k,p in model.named_parameters()}}

def step(model, around=nullcontext, x=X):
    "Run forward and backward, the latter inside `around()`"
    loss = F.cross_entropy(model(x), Y[:len(x)])
    with around(): loss.backward()
    return model

def assert_plain(model, plain, start):
    "Buffers and gradients are those of the plain run, which has moved them, and nothing stands in"
    assert_equal_states(with_grads(model), with_grads(plain))
    assert_differ(plain, start)
    assert not stand_ins(model)

def buffers(model): return copy.deepcopy(dict(model.named_buffers()))

def assert_keeps(model, x=X):
    "A forward pass inside predicts the same bits, and leaves the buffers: the same objects, with the same values"
    own,before = dict(model.named_buffers()),buffers(model)
    want = copy.deepcopy(model)(x)
    with keep_running_stats(model): got = model(x)
    assert torch.equal(got, want)
    assert all(p is own[k] for k,p in model.named_buffers())
    assert_equal_states(dict(model.named_buffers()), before)
    assert not stand_ins(model)


# --- Checkpointing

class InContext(nn.Module):
    "A `conv_net` whose second half is checkpointed with the context for its second run"
    def __init__(self, net, keep=keep_running_stats):
        super().__init__()
        self.net,self.keep = net,keep

    def forward(self, x):
        x = checkpoint(self.net[:5], x, use_reentrant=False, context_fn=lambda: (nullcontext(), self.keep(self.net)))
        return self.net[5:](x)

@pytest.mark.parametrize('momentum', [.1, None])
@pytest.mark.parametrize('reentrant', [True, False])
def test_around_backward(reentrant, momentum):
    plain,twice,ours = conv_net(momentum=momentum),*[Checkpointed(conv_net(momentum=momentum), reentrant) for _ in 'ab']
    for _ in range(2):
        step(plain)
        step(twice)
        step(ours, lambda: keep_running_stats(ours))
    assert_plain(ours.net, plain, conv_net())
    assert twice.net[1].num_batches_tracked == 4 and plain[1].num_batches_tracked == 2

def test_as_the_context_of_the_second_run():
    plain,ours = step(conv_net()),InContext(conv_net())
    assert_plain(step(ours).net, plain, conv_net())
    assert step(InContext(conv_net(), lambda m: nullcontext())).net[1].num_batches_tracked == 2

def test_both_places_at_once():
    ours = InContext(conv_net())
    assert_plain(step(ours, lambda: keep_running_stats(ours)).net, step(conv_net()), conv_net())

def test_a_graph_that_is_kept_enters_the_same_context_again():
    ours,plain = InContext(conv_net()),conv_net()
    for m in (ours, plain):
        loss = F.cross_entropy(m(X), Y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_plain(ours.net, plain, conv_net())

@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoints_within_a_checkpoint(reentrant):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Checkpointed(conv_net(), reentrant)
        def forward(self, x): return checkpoint(self.net, x.requires_grad_(reentrant), use_reentrant=reentrant)
    ours,twice = Outer(),step(Outer())
    assert_plain(step(ours, lambda: keep_running_stats(ours)).net.net, step(conv_net()), conv_net())
    assert twice.net.net[1].num_batches_tracked > 2

@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpoint_sequential(reentrant):
    net,plain,x = conv_net(),step(conv_net()),X.clone().requires_grad_()
    loss = F.cross_entropy(checkpoint_sequential(net, 2, x, use_reentrant=reentrant), Y)
    with keep_running_stats(net): loss.backward()
    assert_plain(net, plain, conv_net())

def test_the_densenet_of_torchvision():
    def make(memory_efficient):
        torch.manual_seed(0)
        return DenseNet(4, (2,2), 8, num_classes=5, memory_efficient=memory_efficient).double()
    x = tilted(4, size=(32,32))
    plain,twice,ours = make(False),make(True),make(True)
    step(plain, x=x)
    step(twice, x=x)
    step(ours, lambda: keep_running_stats(ours), x)
    assert_plain(ours, plain, make(False))
    assert_differ(twice, plain)

@pytest.mark.parametrize('reentrant', [True, False])
def test_frozen_layers_are_frozen_in_both_runs(reentrant):
    plain,ours = conv_net(),Checkpointed(conv_net(), reentrant)
    for net in (plain, ours.net): net[1].eval()
    step(plain)
    step(ours, lambda: keep_running_stats(ours))
    assert_plain(ours.net, plain, conv_net())
    assert plain[1].num_batches_tracked == 0

@quiet_budget
@pytest.mark.parametrize('reentrant', [True, False])
def test_under_a_budget(reentrant):
    x = tilted(8, size=(32,32))
    plain,ours = step(conv_net(), x=x),Checkpointed(conv_net(), reentrant)
    pager = ActivationPager(2**17)
    with pager: step(ours, lambda: keep_running_stats(ours), x)
    assert_plain(ours.net, plain, conv_net())
    assert pager.moved


# --- Layers of all kinds

def test_predictions_have_the_same_bits(): assert_keeps(conv_net())
def test_cumulative_statistics(): assert_keeps(step(conv_net(momentum=None)))
def test_a_layer_by_itself(): assert_keeps(nn.BatchNorm2d(3).double())
def test_a_model_without_bn(): assert_keeps(nn.Sequential(nn.Flatten(), nn.Linear(108,2)).double())
def test_inside_a_wrapper(): assert_keeps(torch.optim.swa_utils.AveragedModel(conv_net()))

def test_frozen_untracked_unused_and_shared_layers():
    model = Norms()
    model.m.frozen.eval()
    assert_keeps(model)

class Ghost(nn.BatchNorm2d):
    "Normalises the batch in parts"
    def forward(self, x): return torch.cat([super(Ghost, self).forward(o) for o in x.split(4)])

class ByHand(nn.BatchNorm2d):
    "Assigns its statistics, as people write it"
    def forward(self, x):
        mean,var = x.mean((0,2,3)),x.var((0,2,3))
        self.running_mean = .9*self.running_mean + .1*mean.detach()
        self.running_var = .9*self.running_var + .1*var.detach()
        self.num_batches_tracked += 1
        return (x-mean[:,None,None])/(var[:,None,None]+self.eps).sqrt()

class Reads(nn.BatchNorm2d):
    "Normalises by the running statistics while it trains, and updates them"
    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        super().forward(x)
        return y

class OnCPU(nn.SyncBatchNorm):
    "PyTorch's, but for its refusal of CPUs"
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        stats = self.running_mean,self.running_var
        return F.batch_norm(x, *stats, self.weight, self.bias, True, self.momentum, self.eps)

@pytest.mark.parametrize('layer', [Ghost, ByHand, Reads, OnCPU, BatchNormAct2d])
def test_layers_with_a_forward_of_their_own(layer):
    model = nn.Sequential(nn.Conv2d(3,3,3), layer(3)).double()
    before = snapshot(model)
    assert_keeps(model)
    model(X)
    assert_differ(model, nn.Sequential(nn.Conv2d(3,3,3), layer(3)).double())
    assert model[1].num_batches_tracked > before['1.num_batches_tracked']

def test_modes_may_change_inside():
    m = nn.BatchNorm2d(3).double()
    m(X)
    with keep_running_stats(m): got = m.eval()(X)
    assert torch.equal(got, m(X)) and not m.training

def test_what_is_written_inside_stays():
    "Only updates by a forward pass are kept off"
    m,state = nn.BatchNorm2d(3).double(),nn.BatchNorm2d(3).double()
    state(X)
    with keep_running_stats(m):
        m(X)
        m.load_state_dict(state.state_dict())
        m.momentum = .5
    assert_same_bits(m, state)

def test_afterwards_they_count():
    a,b = conv_net(),conv_net()
    with keep_running_stats(a): a(X)
    a(X)
    b(X)
    assert_same_bits(a, b)

@pytest.mark.parametrize('f', [torch.no_grad, torch.inference_mode, lambda: torch.autocast('cpu', torch.bfloat16)])
def test_in_other_modes(f):
    model = conv_net().float()
    before = buffers(model)
    with f(), keep_running_stats(model): model(X.float())
    assert_equal_states(dict(model.named_buffers()), before)
    step(model, x=X.float())  # nothing of inference mode is left that a backward pass could not use

def test_a_functional_call_keeps_the_buffers_that_it_is_given():
    model = conv_net()
    state = {k:v.clone() for k,v in model.state_dict().items()}
    before = copy.deepcopy(state)
    with keep_running_stats(model): torch.func.functional_call(model, state, (X,))
    assert_equal_states(state, before)


# --- Whatever happens

@pytest.mark.parametrize('exc', [Boom, KeyboardInterrupt])
def test_an_exception(exc):
    model = conv_net()
    before = buffers(model)
    def fail(m, args): raise exc
    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(exc), keep_running_stats(model): model(X)
    handle.remove()
    assert_equal_states(dict(model.named_buffers()), before)
    assert not stand_ins(model) and model[1].momentum == .1
    model(X)
    assert model[4].num_batches_tracked == 1

@pytest.mark.parametrize('reentrant', [True, False])
def test_an_exception_in_the_second_run(reentrant):
    ours,n = Checkpointed(conv_net(), reentrant),[0]
    def fail(m, args):
        n[0] += 1
        if n[0] == 2: raise Boom
    ours.net[1].register_forward_pre_hook(fail)
    with pytest.raises(Boom): step(ours, lambda: keep_running_stats(ours))
    assert not stand_ins(ours) and ours.net[1].num_batches_tracked == 1

def test_one_value_per_channel_is_named():
    with pytest.raises(ValueError, match="layer '1'"):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).double()
        with keep_running_stats(net): net(X[:1])

def test_lazy_layers_and_data_parallel_are_refused():
    with pytest.raises(ValueError, match='lazy'), keep_running_stats(nn.Sequential(nn.LazyBatchNorm2d())): pass
    with pytest.raises(ValueError, match='DataParallel'): keep_running_stats(nn.DataParallel(conv_net()))

def test_within_itself():
    model = conv_net()
    keep = keep_running_stats(model)
    with keep, keep_running_stats(model[1]), keep: model(X)
    assert model[1].num_batches_tracked == 0
    with keep:
        with keep: pass
        model(X)
        with capture_moments(bn_layers(model)) as cap:
            with keep: model(X)
            assert not cap.moments.counts
            model(X)
        assert cap.moments.counts
    assert model[1].num_batches_tracked == 0 and not stand_ins(model)

def test_contexts_that_end_in_the_order_in_which_they_began_leave_nothing():
    "As those of two threads may"
    model = conv_net()
    first,second = ExitStack(),ExitStack()
    first.enter_context(keep_running_stats(model))
    second.enter_context(keep_running_stats(model))
    first.close()
    second.close()
    assert not stand_ins(model)
    model(X)
    assert model[1].num_batches_tracked == 1

@pytest.mark.parametrize('f', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies_that_are_made_inside_count(f):
    layer = nn.BatchNorm2d(3).double()
    with keep_running_stats(layer):
        twin = f(layer)
        twin(X)
    assert not stand_ins(twin) and twin.num_batches_tracked == 1
    want = nn.BatchNorm2d(3).double()
    want(X)
    assert_same_bits(twin, want)


# --- Beside the others of this package

def test_the_innermost_context_has_the_say():
    m = nn.BatchNorm2d(3).double()
    layers = {'bn':m}
    with capture_moments(layers) as cap, keep_running_stats(m): m(X)
    assert not cap.moments.counts
    with hold_updates(layers) as updates, keep_running_stats(m): m(X)
    updates.commit()
    assert m.num_batches_tracked == 0
    with keep_running_stats(m):
        with capture_moments(layers) as cap: m(X)
        with keep_running_stats(m): m(X)
        m(X)
    assert m.num_batches_tracked == 0
    update_running_stats(layers, cap.moments)
    want = nn.BatchNorm2d(3).double()
    want(X)
    torch.testing.assert_close(m.running_var, want.running_var, rtol=1e-12, atol=0)

@pytest.mark.parametrize('n', [1, 2])
def test_a_pass_in_a_window_that_does_not_count(n):
    "An attack before the training pass of each micro-batch"
    def run(attack):
        model = conv_net()
        opt,window = SGD(list(model.parameters()), lr=.1),Window(model, n)
        for i,(x,y) in enumerate(zip(X.split(8//n), Y.split(8//n))):
            with window.begin(i+1 == n):
                if attack:
                    with keep_running_stats(model): model(x*2)
                with window.forward(x): pred = model(x)
                with window.backward(): window.share(F.cross_entropy(pred, y), len(y)).backward()
                window.add()
        window.finish()
        opt.step()
        window.commit()
        return model
    assert_same_bits(run(True), run(False))

@pytest.mark.parametrize('kw', [{}, dict(bn_bs='window'), dict(bn_bs=4)], ids=str)
def test_in_a_fit_the_window_counts_the_first_run_alone(kw):
    def fit(model):
        do_fit(get_learner(get_dls(tilted(24), labels(24), 2), model, AccumulateGradBN(4, **kw)), 2)
        return model
    assert_same_bits(fit(InContext(conv_net())).net, fit(conv_net()))

def test_lock_step_goes_by_what_it_computes():
    "MicroBatched updates the statistics itself, and inside it does not"
    model = conv_net()
    before,want = buffers(model),model(X)
    model.load_state_dict(conv_net().state_dict())
    with keep_running_stats(model): got = MicroBatched(model, 4)(X)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert_equal_states(dict(model.named_buffers()), before)

@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('in_place', [False, True])
def test_compiled_models(backend, in_place):
    torch._dynamo.reset()
    model = conv_net()
    run = model if in_place else torch.compile(model, backend=backend)
    if in_place: model.compile(backend=backend)
    want = conv_net()(X)
    before = buffers(model)
    with keep_running_stats(model): got = run(X)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert_equal_states(dict(model.named_buffers()), before)
    run(X)
    assert model[1].num_batches_tracked == 1
    torch._dynamo.reset()

def test_a_compiled_model_is_compiled_once_for_all_passes_inside():
    torch._dynamo.reset()
    n = [0]
    def backend(gm, xs):
        n[0] += 1
        return gm
    model = conv_net()
    run = torch.compile(model, backend=backend)
    counts,keep = [],keep_running_stats(model)
    for _ in range(4):
        run(X)
        with keep: run(X)
        counts.append(n[0])
    assert counts[0] == counts[-1] and model[1].num_batches_tracked == 4
    torch._dynamo.reset()

@pytest.mark.parametrize('place', ['backward', 'context_fn'])
def test_a_compiled_part_in_a_checkpoint(place):
    "The checkpoint runs compiled code again"
    torch._dynamo.reset()
    plain,net = step(conv_net()),conv_net()
    part = torch.compile(net[:5], backend='aot_eager')
    context = dict(context_fn=lambda: (nullcontext(), keep_running_stats(net))) if place == 'context_fn' else {}
    pred = net[5:](checkpoint(part, X, use_reentrant=False, **context))
    with keep_running_stats(net) if place == 'backward' else nullcontext(): F.cross_entropy(pred, Y).backward()
    torch._dynamo.reset()
    for k,p in with_grads(plain).items(): torch.testing.assert_close(with_grads(net)[k], p, rtol=1e-10, atol=1e-10)
    assert net[1].num_batches_tracked == 1
