"BN to GroupNorm and weight standardization: what is kept, in which nets, and what fastai makes of it"
import copy, gc, io, pickle, warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from fastai.basics import Adam, Learner, norm_bias_params
from fastai.layers import BatchNorm, BatchNorm1dFlat, NormType, SimpleCNN
from fastai.torch_core import apply_init
from fastai.vision.all import create_head, create_unet_model, resnet18, resnet50, vision_learner
from helpers import F64, assert_pristine, conv_net, do_fit, get_dls, get_learner, labels, tilted
from fastai_bn.all import AccumulateGradBN, GroupNorm, bn_to_gn, weight_standardize
from fastai_bn.groupnorm import _n_groups, _Standardized


def bns(model): return [m for m in model.modules() if isinstance(m, _BatchNorm)]
def gns(model): return [m for m in model.modules() if isinstance(m, nn.GroupNorm)]

def by_hand(x, m):
    "GroupNorm of `x` [B, C, *] with the settings of `m`, one group at a time"
    res = torch.empty_like(x)
    for b in range(len(x)):
        for c in torch.arange(x.shape[1]).chunk(m.num_groups):
            v = x[b,c]
            res[b,c] = (v-v.mean())/(v.var(unbiased=False)+m.eps).sqrt()
    one = (1,-1) + (1,)*(x.dim()-2)
    return res if m.weight is None else res*m.weight.view(one)+m.bias.view(one)

def random_affine(model):
    for p in [p for m in bns(model) for p in (m.weight, m.bias)]: nn.init.normal_(p)
    return model

@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


# --- What is kept

@pytest.mark.parametrize('cls,size', [
    (nn.BatchNorm2d,(5,4)), (nn.BatchNorm3d,(3,2,4)), (nn.BatchNorm1d,(6,)), (nn.BatchNorm1d,()),
])
def test_is_groupnorm_with_the_layers_own_parameters(cls, size):
    m = random_affine(nn.Sequential(cls(12, eps=.3).double()))
    x,kept = tilted(3, 12, size),copy.deepcopy(m)
    g = bn_to_gn(m, num_groups=4)
    assert g[0].num_groups == (1 if cls is nn.BatchNorm1d else 4) and g[0].eps == .3
    for p,q in ((g[0].weight, m[0].weight), (g[0].bias, m[0].bias)): assert torch.equal(p, q) and p is not q
    torch.testing.assert_close(g(x), by_hand(x, g[0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g.eval()(x), g.train()(x), rtol=0, atol=0)
    assert all(torch.equal(p,q) for p,q in zip(m.state_dict().values(), kept.state_dict().values())) and bns(m)

def test_inplace_keeps_objects_names_and_flags():
    m = resnet18().double()
    for p in m.layer1.parameters(): p.requires_grad_(False)
    nn.init.zeros_(m.layer2[0].bn2.weight)
    ps,mods = list(m.parameters()),list(m.modules())
    names = [k for k in m.state_dict() if not any(o in k for o in ('running_','num_batches'))]
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    assert bn_to_gn(m, inplace=True) is m and not bns(m)
    assert all(p is q for p,q in zip(ps, m.parameters(), strict=True))
    assert all(p is q for p,q in zip(mods, m.modules(), strict=True))
    assert list(m.state_dict()) == names and not list(m.buffers())
    frozen,free = m.layer1[0].bn1.weight,m.layer2[0].bn1.weight
    assert not frozen.requires_grad and free.requires_grad and frozen.dtype == F64
    assert m.layer2[0].bn2.weight.abs().sum() == 0
    before = m.layer2[0].bn2.weight.clone()
    m(tilted(2, size=(40,33))).square().sum().backward()
    opt.step()
    assert not torch.equal(before, m.layer2[0].bn2.weight)

def test_device_and_half_are_kept():
    m = bn_to_gn(nn.Sequential(nn.BatchNorm2d(8, device='meta'), nn.BatchNorm2d(8).half()))
    assert m[0].weight.is_meta and m[1].weight.dtype == torch.half

def test_conv_biases_stay():
    m = conv_net()
    g = bn_to_gn(m)
    assert torch.equal(g[0].bias, m[0].bias)

def saved(m):
    "The state of `m` as it comes back from a file"
    f = io.BytesIO()
    torch.save(m.state_dict(), f)
    f.seek(0)
    return torch.load(f, weights_only=True)

def test_weights_saved_by_hand_go_into_the_encoder():
    "As a pretrained net's: train with BN, save, load, convert"
    m = random_affine(conv_net())
    m(tilted(8))
    new = conv_net(seed=9)
    new.load_state_dict(saved(m))
    with pytest.warns(UserWarning, match='fine-tune') as rec: g = bn_to_gn(new)
    assert len(rec) == 1
    for k,p in g.named_parameters(): assert torch.equal(p, m.get_parameter(k))
    again = bn_to_gn(conv_net(seed=9))
    again.load_state_dict(saved(g))
    x = tilted(2)
    assert torch.equal(again(x), g(x))

def test_no_word_about_a_fresh_net():
    with no_warning(): bn_to_gn(resnet18())

def test_hooks_survive():
    m,seen = conv_net(),[]
    m[1].register_forward_hook(lambda m,a,o: seen.append(type(m)))
    g = bn_to_gn(m)
    for o in (g, m): o(tilted(2))
    assert seen == [GroupNorm,nn.BatchNorm2d]

def test_shared_modules_stay_shared():
    bn = nn.BatchNorm2d(8)
    g = bn_to_gn(nn.ModuleList([bn, nn.Sequential(bn), nn.BatchNorm2d(8)]))
    assert g[0] is g[1][0] and g[0] is not g[2] and len(gns(g)) == 2

def test_a_layer_without_parameters_or_statistics():
    m = nn.Sequential(nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False),
                      nn.BatchNorm2d(6, momentum=None), nn.SyncBatchNorm(6)).double()
    g,x = bn_to_gn(m, channels_per_group=2),tilted(2, 6)
    assert [o.num_groups for o in g] == [3]*4 and len(list(g.parameters())) == 6
    torch.testing.assert_close(g[0](x), by_hand(x, g[0]))
    assert torch.isfinite(g(x)).all() and 'affine=False' in repr(g[0])

def test_the_model_itself_is_a_layer(): assert type(bn_to_gn(nn.BatchNorm2d(4))) is GroupNorm

@pytest.mark.slow
def test_copy_of_a_unet_that_has_seen_a_batch():
    "fastai's U-Nets keep the encoder's activations, which have no deep copy"
    m = create_unet_model(resnet18, 2, (32,32), pretrained=False).train()
    x = torch.randn(2,3,32,32)
    m(x).sum().backward()
    stored = m.sfs[0].stored
    with pytest.warns(UserWarning, match='fine-tune'): g = bn_to_gn(m)
    assert m.sfs[0].stored is stored and g.sfs[0].stored is None
    # its own hooks
    g(x)
    assert m.sfs[0].stored is stored
    y = g(x)
    del m
    gc.collect()
    torch.testing.assert_close(g(x), y)
    assert g.sfs[0].stored is not None

def test_copy_of_a_net_with_spectral_norm_in_training():
    "It keeps a weight that is part of the graph"
    m = create_unet_model(resnet18, 2, (64,64), pretrained=False, self_attention=True).train()
    m(torch.randn(2,3,64,64)).sum().backward()
    with pytest.warns(UserWarning, match='fine-tune'): g = bn_to_gn(m)
    g(torch.randn(1,3,64,64)).sum().backward()
    assert not bns(g) and bns(m)

def test_a_state_dict_of_bn_is_loaded():
    m,g = random_affine(conv_net()),bn_to_gn(conv_net(seed=3))
    m(tilted(8))
    g.load_state_dict(m.state_dict())
    for k,p in g.named_parameters(): assert torch.equal(p, m.get_parameter(k))
    unknown = {**m.state_dict(), '1.running_max':torch.zeros(1)}
    with pytest.raises(RuntimeError, match='Unexpected'): g.load_state_dict(unknown)

@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_script_and_trace():
    m = nn.Sequential(nn.Conv2d(3,8,3), timm.layers.BatchNormAct2d(8), nn.Conv2d(8,8,3), nn.BatchNorm2d(8))
    m,x = weight_standardize(bn_to_gn(m)),torch.randn(2,3,8,8)
    for f in (torch.jit.script, partial(torch.jit.trace, example_inputs=x)): torch.testing.assert_close(f(m)(x), m(x))

def test_pickle_and_deepcopy():
    m = nn.Sequential(timm.create_model('efficientnet_b0', num_classes=2), nn.Identity())
    g,x = weight_standardize(bn_to_gn(m)).eval(),torch.randn(1,3,33,40)
    for o in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))): assert torch.equal(o(x), g(x))


# --- Which groups

@pytest.mark.parametrize('kw', [
    {}, dict(num_groups=8), dict(num_groups=1),
    dict(channels_per_group=16), dict(channels_per_group=1), dict(channels_per_group=1000),
])
def test_group_rule_never_fails(kw):
    for c in range(1, 130):
        g = _n_groups(c, **kw)
        assert c % g == 0
        if 'channels_per_group' in kw: assert g == 1 or c//g >= kw['channels_per_group']
        else: assert g <= kw.get('num_groups', 32) and (c//g >= 2 or c == 1)
        assert bn_to_gn(nn.BatchNorm2d(c), **kw)(torch.randn(1, c, 2, 2)).shape == (1,c,2,2)

@pytest.mark.parametrize('kw', [
    dict(num_groups=0), dict(num_groups=2.), dict(num_groups=True), dict(num_groups=None),
    dict(channels_per_group=0), dict(channels_per_group='2'),
])
def test_bad_numbers(kw):
    (name,value), = kw.items()
    with pytest.raises(ValueError, match=f'^`{name}` must be an integer >= 1.*, got {value!r}'):
        bn_to_gn(conv_net(), **kw)

def test_lazy_layers_have_to_see_a_batch_first():
    m = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match='lazy'): bn_to_gn(m)
    m.eval()(torch.randn(2,4,3,3))
    assert bn_to_gn(m)[0].num_channels == 4
    # which is none of our business
    bn_to_gn(nn.Sequential(nn.BatchNorm2d(4), nn.LazyInstanceNorm2d()), inplace=True)

def test_nothing_to_convert():
    with pytest.warns(UserWarning, match='no BatchNorm'): bn_to_gn(nn.Sequential(nn.Linear(2,2)))


# --- Layers that do more than normalise

def test_timm_activation_is_kept():
    m = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=partial(nn.Dropout, .5)).double()
    g,x = bn_to_gn(m).eval(),tilted(2, 8)
    torch.testing.assert_close(g(x), F.silu(by_hand(x, g)))
    set_zero = (g.train()(x) == 0).double().mean()
    assert .3 < set_zero < .7

def test_flat_1d_layer():
    m = BatchNorm1dFlat(6).double()
    g,x = bn_to_gn(m),tilted(2, 5, (6,))
    torch.testing.assert_close(g(x), F.layer_norm(x, (6,), m.weight, m.bias))
    torch.testing.assert_close(g(x[0]), F.layer_norm(x[0], (6,), m.weight, m.bias))

class Plus(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x)+1

class Renamed(nn.BatchNorm2d): pass

def test_group_norm_that_is_there_becomes_known():
    m = resnet18(norm_layer=partial(nn.GroupNorm, 32))
    with pytest.warns(UserWarning, match='no BatchNorm'): g = bn_to_gn(m)
    assert all(type(o) is GroupNorm for o in gns(g)) and type(m.bn1) is nn.GroupNorm
    act = timm.layers.GroupNormAct(8, 4, act_layer=nn.SiLU).double()
    g,x = bn_to_gn(nn.Sequential(act, nn.BatchNorm2d(8))).double(),tilted(2, 8)
    assert len(norm_bias_params(g[0], with_bias=False)) == 2
    torch.testing.assert_close(g[0](x), act(x))

def test_layers_of_constants_stay():
    import torchvision
    g = bn_to_gn(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(8), nn.BatchNorm2d(8)))
    assert type(g[0]) is torchvision.ops.FrozenBatchNorm2d and type(g[1]) is GroupNorm

def test_parametrized_layers_are_refused():
    m = nn.Sequential(nn.BatchNorm2d(4))
    nn.utils.parametrize.register_parametrization(m[0], 'weight', nn.Softplus())
    with pytest.raises(ValueError, match='parametrization'): bn_to_gn(m, inplace=True)
    assert isinstance(m[0], nn.BatchNorm2d)

@pytest.mark.parametrize('c', [1,2])
def test_inputs_of_one_or_two_features(c):
    "As `bn_cont` of a TabularModel: LayerNorm of one feature is constant, of two a sign"
    with pytest.warns(UserWarning, match=f'BatchNorm1d\\({c}\\)'): bn_to_gn(nn.BatchNorm1d(c))
    with no_warning(): bn_to_gn(nn.BatchNorm1d(3))

@pytest.mark.parametrize('num_groups,left', [(8,0.), (4,1.), (2,None)])
def test_groups_of_which_nothing_is_left_but_signs_are_a_warning(num_groups, left):
    "As behind global pooling, where a group has a value per channel: of one value 0 is left, of two -1 and 1"
    m = nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8,8,1), nn.BatchNorm2d(8))
    g = bn_to_gn(m, num_groups)
    g[4] = GroupNorm(num_groups, 8, eps=1e-9)
    g,x = g.double(),tilted(4)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        y = g(x)
        g(x[:2])
        # an empty batch is none
        g(x[:0])
    assert len([w for w in ws if 'keeps only their signs' in str(w.message)]) == (0 if left is None else 2)
    assert (left is not None) == bool(torch.allclose(y.abs(), torch.tensor(left or 0., dtype=F64), atol=1e-4))

@pytest.mark.parametrize('make', [lambda: timm.layers.BatchNormAct2d(8), lambda: BatchNorm1dFlat(2)])
def test_layers_with_more_around_the_norm_warn_of_signs_too(make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        g = bn_to_gn(make(), num_groups=4)
    x = torch.randn(3,8,1,1) if g.num_channels == 8 else torch.randn(3,5,2)
    with pytest.warns(UserWarning, match='keeps only their signs'): g(x)

def test_fx_traces_it():
    m = bn_to_gn(nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(2,3,8,8)
    act = bn_to_gn(nn.Sequential(nn.Conv2d(3,8,3), timm.layers.BatchNormAct2d(8)))
    for o in (m, act): assert torch.fx.symbolic_trace(o)(x).shape == (2,8,6,6)
    assert torch.equal(torch.fx.symbolic_trace(m)(x), m(x))
    class Tracer(torch.fx.Tracer):
        "Trace into the norm, too"
        def is_leaf_module(self, m, name): return type(m) is nn.Conv2d
    assert torch.equal(torch.fx.GraphModule(m, Tracer().trace(m))(x), m(x))

def test_compiled_code_says_nothing(monkeypatch):
    "A warning would break its graph"
    g,x = bn_to_gn(nn.BatchNorm2d(8), num_groups=4),torch.randn(3,8,1,1)
    with pytest.warns(UserWarning, match='keeps only their signs'): want = g(x)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    with no_warning(): assert torch.equal(g(x), want)

def test_own_forward_is_lost_with_a_warning():
    with pytest.warns(UserWarning, match='Plus has its own forward'): g = bn_to_gn(Plus(4))
    assert type(g) is GroupNorm
    with no_warning(): assert type(bn_to_gn(Renamed(4))) is GroupNorm

def test_head_trains_with_one_sample():
    "BN cannot: one value per channel"
    head,x = create_head(16, 3, concat_pool=True),torch.randn(1,16,4,4)
    with pytest.raises(ValueError, match='more than 1 value'): head(x)
    g = bn_to_gn(head)
    g(x).sum().backward()
    assert all(p.grad is not None for p in g.parameters()) and [m.num_groups for m in gns(g)] == [1,1]

@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'resnet18', 'efficientnet_b0', 'densenet121', 'mobilenetv3_small_050', 'dla34', 'ghostnet_050', 'hrnet_w18_small',
    'res2net50_26w_4s', 'vovnet39a', 'regnety_002', 'repvgg_a0',
])
def test_nets_of_timm(name):
    m = bn_to_gn(timm.create_model(name, num_classes=3))
    assert not bns(m) and gns(m)
    m = weight_standardize(m)
    convs = [isinstance(o, _Standardized) for o in m.modules() if isinstance(o, nn.Conv2d)]
    # the rest are of squeeze-and-excitation and such
    assert sum(convs) >= .6*len(convs)
    y = m.eval()(torch.randn(1,3,64,64))
    assert torch.isfinite(y).all()

def test_one_image_does_not_depend_on_the_others():
    x = tilted(4, size=(40,40))
    for mode in (True,False):
        g,b = bn_to_gn(resnet18()).double().train(mode),resnet18().double().train(mode)
        torch.testing.assert_close(g(x)[:1], g(x[:1]), rtol=0, atol=1e-9)
        if mode: assert (b(x)[:1]-b(x[:2])[:1]).abs().max() > 1e-3

def test_autocast():
    g = weight_standardize(bn_to_gn(resnet18()))
    with torch.autocast('cpu', torch.bfloat16): y = g(torch.randn(2,3,32,32))
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in g.parameters())


# --- fastai

def test_fastai_takes_it_for_a_norm():
    m = nn.Sequential(nn.Conv2d(3,8,1), GroupNorm(2,8), nn.Linear(8,2))
    apply_init(m)
    assert torch.equal(m[1].weight, torch.ones(8)) and m[0].bias.abs().sum() == 0
    assert len(norm_bias_params(m, with_bias=False)) == 2
    assert not len(norm_bias_params(nn.GroupNorm(2,8), with_bias=False))
    with pytest.raises(ValueError, match='divisible'): GroupNorm(3, 8)
    assert GroupNorm(2, 8, affine=False).weight is None and GroupNorm(2, 8, dtype=F64).weight.dtype == F64

@pytest.mark.parametrize('wd_bn_bias', [True,False])
@pytest.mark.parametrize('train_bn', [True,False])
def test_weight_decay_and_freezing_as_for_bn(wd_bn_bias, train_bn):
    "What Learner does to the parameters of BN it does to those of GroupNorm"
    flags = []
    for f in (lambda m: m, bn_to_gn):
        learn = get_learner(get_dls(tilted(4), labels(4), 2), f(conv_net()), opt_func=Adam, wd=.1,
                            wd_bn_bias=wd_bn_bias, train_bn=train_bn,
                            splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
        learn.freeze()
        state = learn.opt.state
        flags.append({n:(p.requires_grad, state[p].get('do_wd', True)) for n,p in learn.model.named_parameters()})
    assert flags[0] == flags[1] and flags[1]['1.weight'] == (train_bn,wd_bn_bias)

def test_a_fit_at_batch_size_1():
    learn = get_learner(get_dls(tilted(4), labels(4), 1), bn_to_gn(conv_net()))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    do_fit(learn)
    assert all(torch.isfinite(v).all() and not torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_accumulated_gradients_are_the_batchs():
    "Without BN, accumulating 1 x 4 is a batch of 4, whatever `bn_bs`"
    grads = []
    for bs,cbs in (4,[]),(1,[AccumulateGradBN(4)]):
        learn = get_learner(get_dls(tilted(8), labels(8), bs), weight_standardize(bn_to_gn(conv_net())), cbs=cbs)
        # the callback says that there is no BN
        says = pytest.warns(UserWarning, match='no BatchNorm') if cbs else nullcontext()
        with says: do_fit(learn)
        grads.append(learn.model.state_dict())
    for k in grads[0]: torch.testing.assert_close(grads[0][k], grads[1][k], rtol=1e-10, atol=1e-12)


# --- Weight standardization

def ws_by_hand(w, eps=1e-6):
    dims = tuple(range(1, w.dim()))
    return (w-w.mean(dims, keepdim=True))/(w.var(dims, keepdim=True, unbiased=False)+eps).sqrt()

@pytest.mark.parametrize('conv,f,size', [
    (nn.Conv1d,F.conv1d,(7,)), (nn.Conv2d,F.conv2d,(7,6)), (nn.Conv3d,F.conv3d,(5,6,7)),
])
def test_standardized_convolution(conv, f, size):
    m = nn.Sequential(conv(4, 6, 3, padding=1, stride=2, groups=2), nn.GroupNorm(2, 6)).double()
    w,x = weight_standardize(m),tilted(2, 4, size)
    ref = f(x, ws_by_hand(m[0].weight), m[0].bias, stride=2, padding=1, groups=2)
    torch.testing.assert_close(w[0](x), ref)
    assert torch.equal(w[0].weight, m[0].weight) and list(w.state_dict()) == list(m.state_dict())
    assert torch.autograd.gradcheck(lambda v: torch.func.functional_call(w, {'0.weight':v}, (x,)), w[0].weight)
    assert type(m[0]) is conv  # a copy
    assert type(weight_standardize(w)[0]) is type(w[0])  # again: nothing more

def test_scale_and_shift_of_the_weights_do_not_matter():
    w = weight_standardize(nn.Sequential(nn.Conv2d(3,4,3), nn.GroupNorm(2,4)).double())
    x = tilted(2)
    y = w(x)
    with torch.no_grad(): w[0].weight.mul_(7).add_(torch.randn(4,1,1,1))
    torch.testing.assert_close(w(x), y, rtol=1e-4, atol=1e-4)

class Odd(nn.Conv2d): pass

def test_which_convolutions():
    m = nn.Sequential(
        # through an activation
        nn.Conv2d(3,4,1), nn.ReLU(), nn.GroupNorm(2,4),
        # the second of two
        nn.Conv2d(4,4,1), nn.Conv2d(4,4,1), GroupNorm(2,4),
        # not before BN
        nn.Conv2d(4,4,3), nn.BatchNorm2d(4),
        # a class of its own
        Odd(4,4,1), GroupNorm(2,4),
        # one input weight
        nn.Conv2d(4,4,1,groups=4), GroupNorm(2,4),
        nn.ConvTranspose2d(4,4,1), GroupNorm(2,4),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4,4,1)), GroupNorm(2,4),
        nn.utils.spectral_norm(nn.Conv2d(4,4,1)), GroupNorm(2,4),
        # in containers, without parameters
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4,4,3)), nn.Sequential(GroupNorm(2,4,affine=False)),
        nn.Conv2d(4,4,3))
    w = weight_standardize(m)
    assert [k for k,o in w.named_modules() if isinstance(o, _Standardized)] == ['0','4','18.1']
    none = nn.Sequential(nn.Conv2d(3,4,1), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match='no convolution'): weight_standardize(none)
    r = weight_standardize(bn_to_gn(resnet50()), inplace=True)
    assert all(isinstance(o, _Standardized) for o in r.modules() if isinstance(o, nn.Conv2d))
    assert weight_standardize(r, inplace=True) is r
