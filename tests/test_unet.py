"U-Nets in GroupNorm: every scope in every shape that fastai offers, its freezing, saving and loading"
import gc, re, warnings
from functools import partial

import pytest, timm, torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from fastai.vision.all import (
    BnFreeze, CrossEntropyLossFlat, DataLoaders, Dice, MSELossFlat, NormType, OptimWrapper, ProgressCallback, UnetBlock,
    load_learner, noop, resnet18, set_seed, unet_learner, xresnet18)
import helpers
from fastai_bn.all import AccumulateGradBN, gn_unet_learner
from fastai_bn.groupnorm import _Standardized

SCOPES = [('all',False), ('all',True), ('decoder',False), ('decoder',True), ('none',False)]
xres = partial(xresnet18, widen=.25)

def bns(m): return [o for o in m.modules() if isinstance(o, _BatchNorm)]
def gns(m): return [o for o in m.modules() if isinstance(o, nn.GroupNorm)]

@pytest.fixture(autouse=True)
def _freed():
    "Learners are cycles of references, and of half a GB with Adam's state"
    yield
    gc.collect()

def get_dls(n_in=3, size=(32,32), bs=2, n=4):
    g = torch.Generator().manual_seed(0)
    xs = torch.rand(n, n_in, *size, generator=g)
    items = [(x, (x[0] > .5).long()) for x in xs]
    return DataLoaders.from_dsets(items, items, bs=bs, num_workers=0, device='cpu')

def get_unet(dls=None, arch=xres, make=gn_unet_learner, **kw):
    kw = {**dict(pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1)), **kw}
    learn = make(dls or get_dls(), arch, **kw)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn

def fits(learn):
    "One epoch changes nearly all trained parameters (not what a zero hides, as in attention), and all stay finite"
    before = {k:p.detach().clone() for k,p in learn.model.named_parameters() if p.requires_grad}
    learn.fit(1, 1e-3)
    for k,p in learn.model.named_parameters(): assert torch.isfinite(p).all(), k
    same = [k for k,p in learn.model.named_parameters() if k in before and torch.equal(p, before[k])]
    assert len(same) <= .05*len(before), same


# --- What is where

OTHERS = [partial(timm.create_model, 'efficientnet_b0'), partial(timm.create_model, 'resnet10t')]

@pytest.mark.parametrize('arch,scope,ws', [
    *[(a, *o) for a in (resnet18,xres) for o in SCOPES], *[(a, s, True) for a in OTHERS for s in ('all','decoder')],
])
def test_norms_are_where_the_scope_says(arch, scope, ws):
    dls = get_dls()
    learn = get_unet(dls, arch, scope=scope, ws=ws)
    m = learn.model
    ref = get_unet(dls, arch, unet_learner).model
    enc,rest = m.layers[0],m.layers[1:]
    assert not bns(rest) and bool(gns(rest)) == (scope != 'none')
    if scope == 'all': assert not bns(m) and len(gns(enc)) == len(bns(ref.layers[0]))
    else: assert len(bns(enc)) == len(bns(ref.layers[0])) and not gns(enc)
    others = [o for o in m.modules() if isinstance(o, (nn.InstanceNorm2d, nn.LayerNorm))]
    assert all(isinstance(o, nn.GroupNorm) for o in others)
    logits = [o for o in m.layers if type(o).__name__ == 'ConvLayer']
    assert len(logits) == 1 and [type(o) for o in logits[0]] == [nn.Conv2d]
    assert logits[0][0].bias is not None
    assert any(isinstance(o, _Standardized) for o in enc.modules()) == (ws and scope == 'all')
    assert any(isinstance(o, _Standardized) for o in rest.modules()) == ws
    assert [type(o).__name__ for o in m.layers[2:]] == [type(o).__name__ for o in ref.layers[2:]]
    n_blocks = len([o for o in m.layers if isinstance(o, UnetBlock)])
    if scope != 'none': assert len(gns(rest)) == 1+2+4*n_blocks+1+2
    fits(learn)

def test_num_groups():
    m = get_unet(get_dls(), resnet18, num_groups=4).model
    # 96 + 3 at the end, with the image
    assert {(o.num_groups, o.num_channels == 99) for o in gns(m)} == {(4,False), (3,True)}

@pytest.mark.parametrize('name,kw', [
    ('scope',dict(scope='encoder')), ('norm_type',dict(norm_type=NormType.Instance)),
    ('ws',dict(scope='none', ws=True)), ('num_groups',dict(num_groups=0)),
])
def test_bad_arguments(name, kw):
    with pytest.raises(ValueError, match=f'^`{name}` must be .*, got {re.escape(repr(kw[name]))}'): get_unet(**kw)

def test_logits_say_how_much():
    "A normalised logit has the same mean and variance for every image: it cannot say that there is nothing"
    set_seed(0)
    m = get_unet(get_dls(size=(64,64))).model.eval()
    x = torch.rand(8,3,64,64)*torch.logspace(-2, 1, 8)[:,None,None,None]
    y = m(x)[:,0].flatten(1)
    assert y.mean(1).std() > .02 and y.std(1).std() > .02


# --- In every shape

@pytest.mark.parametrize('kw', [
    dict(self_attention=True), dict(blur=True), dict(bottle=True), dict(y_range=(-1,2)), dict(n_in=4), dict(n_in=1),
    dict(last_cross=False), dict(act_cls=nn.SiLU), dict(blur=True, blur_final=False, bottle=True, self_attention=True),
])
@pytest.mark.parametrize('scope,ws', [('all',True), ('decoder',False), ('none',False)])
def test_options_of_the_unet(scope, ws, kw):
    learn = get_unet(get_dls(kw.get('n_in', 3), (64,64)), scope=scope, ws=ws, **kw)
    y = learn.model.eval()(learn.dls.one_batch()[0])
    assert y.shape == (2,2,64,64) and not bns(learn.model if scope == 'all' else learn.model.layers[1:])
    if 'y_range' in kw: assert -1 < y.min() and y.max() < 2
    fits(learn)

@pytest.mark.parametrize('size', [(33,47), (65,64), (50,50)])
@pytest.mark.parametrize('scope,ws', SCOPES)
def test_odd_sizes(scope, ws, size):
    learn = get_unet(get_dls(size=size), scope=scope, ws=ws)
    fits(learn)
    # and others than it was made for
    assert learn.model.eval()(torch.rand(1,3,41,70)).shape == (1,2,41,70)

@pytest.mark.parametrize('scope,ws', SCOPES)
def test_batch_size_1(scope, ws):
    "A BN encoder needs more than one position at its end; GroupNorm does not"
    fits(get_unet(get_dls(bs=1, size=(32,32) if scope == 'all' else (64,64)), scope=scope, ws=ws))

def test_other_tasks():
    dls = get_dls()
    learn = get_unet(dls, n_out=3, y_range=(0,1), loss_func=MSELossFlat())
    assert learn.model(dls.one_batch()[0]).shape == (2,3,32,32) and learn.n_out == 3


# --- One image and the others

@pytest.mark.parametrize('mode', [True,False])
def test_one_image_does_not_depend_on_the_others(mode):
    set_seed(0)
    x = (torch.rand(4,3,64,64)*torch.tensor([1.,3,.1,9])[:,None,None,None]).double()
    for ws in (False,True):
        m = get_unet(get_dls(size=(64,64)), scope='all', ws=ws).model.double().train(mode)
        with torch.no_grad(): assert (m(x[:1])-m(x)[:1]).abs().max() < 1e-6
    m = get_unet(get_dls(size=(64,64)), make=unet_learner).model.double().train(mode)
    with torch.no_grad(): err = (m(x[:2])[:1]-m(x)[:1]).abs().max()
    # BN in training mode: what else is in the batch shows
    assert (err > 1e-2) if mode else (err < 1e-6)


# --- Pretrained encoders

@pytest.fixture
def arch(tmp_path):
    "A ResNet-18 whose 'pretrained' weights lie in a file"
    set_seed(1)
    m = resnet18()
    for o in bns(m):
        nn.init.normal_(o.weight, 1, .1)
        nn.init.normal_(o.bias, 0, .1)
        nn.init.normal_(o.running_mean)
        nn.init.uniform_(o.running_var, .5, 2)
    torch.save(m.state_dict(), tmp_path/'w.pth')
    def f(pretrained=True):
        net = resnet18()
        if pretrained: net.load_state_dict(torch.load(tmp_path/'w.pth', weights_only=True))
        return net
    f.state = m.state_dict()
    return f

@pytest.mark.parametrize('scope,ws', [('all',True), ('decoder',False), ('none',False)])
def test_pretrained_weights_freezing_and_fine_tuning(arch, scope, ws):
    with warnings.catch_warnings(record=True) as rec:
        warnings.simplefilter('always')
        learn = get_unet(arch=arch, scope=scope, ws=ws, pretrained=True)
    assert sum('fine-tune' in str(w.message) for w in rec) == (scope == 'all')
    m = learn.model
    full = resnet18()
    full.load_state_dict(arch.state)
    body = nn.Sequential(*list(full.children())[:-2])
    for p,q in zip(m.layers[0].parameters(), body.parameters(), strict=True): assert torch.equal(p, q)
    if scope != 'all':
        for a,b in zip(bns(m.layers[0]), bns(full)): assert torch.equal(a.running_mean, b.running_mean)
    norms = {id(p) for o in bns(m)+gns(m) for p in o.parameters()}
    assert {id(p) for ps in learn.opt.param_lists for p in ps} == {id(p) for p in m.parameters()}
    for k,p in m.named_parameters():
        assert p.requires_grad == (not k.startswith('layers.0.') or id(p) in norms), k
        assert learn.opt.state[p].get('do_wd', True) == (id(p) not in norms and not k.endswith('bias')), k
    conv = m.layers[0][0].weight.clone()
    fits(learn)
    assert torch.equal(conv, m.layers[0][0].weight)
    learn.unfreeze()
    assert all(p.requires_grad for p in m.parameters())
    learn.fine_tune(1, freeze_epochs=1)
    assert not torch.equal(conv, m.layers[0][0].weight)

def test_norms_stay_frozen_without_train_bn(arch):
    with pytest.warns(UserWarning, match='fine-tune'):
        learn = get_unet(arch=arch, pretrained=True, train_bn=False, wd_bn_bias=True)
    assert not any(p.requires_grad for p in learn.model.layers[0].parameters())
    assert all(p.requires_grad for p in learn.model.layers[1:].parameters())
    assert all(learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters())
    assert learn.pretrained and learn.arch is arch

@pytest.mark.parametrize('n_in', [1,4])
def test_pretrained_weights_for_other_channels(arch, n_in):
    learn = get_unet(get_dls(n_in), arch=arch, scope='decoder', pretrained=True, n_in=n_in)
    w,saved = learn.model.layers[0][0].weight,arch.state['conv1.weight']
    assert w.shape[1] == n_in and torch.equal(w[:,0], saved.sum(1) if n_in == 1 else saved[:,0])
    fits(learn)

def test_running_statistics_are_kept_by_bnfreeze(arch):
    "As the documentation says: without train_bn, as long as the encoder is frozen"
    for train_bn in (False,True):
        learn = get_unet(get_dls(size=(64,64)), arch=arch, scope='decoder', pretrained=True, train_bn=train_bn,
                         cbs=BnFreeze())
        learn.fit(1, 1e-3)
        kept = torch.equal(learn.model.layers[0][1].running_mean, arch.state['bn1.running_mean'])
        assert kept == (not train_bn)

def test_an_encoder_with_group_norm_of_its_own(arch):
    for scope in ('all','decoder','none'):
        f = lambda pretrained: resnet18(norm_layer=partial(nn.GroupNorm, 32))
        learn = get_unet(arch=f, scope=scope, pretrained=True)
        norms = gns(learn.model.layers[0])
        assert norms and all(o.weight.requires_grad and learn.opt.state[o.weight]['do_wd'] is False for o in norms)

def test_own_splitter_and_optimizer(arch):
    def split(m): return [list(m[0].parameters()), list(m[1:].parameters())]
    opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)
    with pytest.warns(UserWarning, match='fine-tune'):
        learn = get_unet(arch=arch, pretrained=True, splitter=split, opt_func=opt_func)
    assert [len(o) for o in learn.opt.param_lists] == [len(o) for o in split(learn.model)]
    fits(learn)

@pytest.mark.parametrize('scope,ws', SCOPES)
def test_summary_export_load_save(tmp_path, scope, ws):
    xs = torch.rand(4,3,32,32)
    dls = helpers.get_dls(xs, (xs[:,0] > .5).long(), 2)
    learn = get_unet(dls, scope=scope, ws=ws, path=tmp_path, metrics=Dice())
    assert 'GroupNorm' in str(learn.summary()) or scope == 'none'
    fits(learn)
    x = xs[:2]
    with torch.no_grad(): y = learn.model.eval()(x)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'export.pkl')
    with torch.no_grad(): torch.testing.assert_close(new.model.eval()(x), y)
    f = learn.save('a')
    learn.fit(1, .01)
    learn.load('a')
    with torch.no_grad(): torch.testing.assert_close(learn.model.eval()(x), y)

def test_decoder_scope_with_an_exact_window():
    "The encoder's BN takes part in AccumulateGradBN: 2 x 2 is the batch of 4"
    models = []
    for bs,cbs in (4,[]),(2,[AccumulateGradBN(2, bn_bs='window')]):
        set_seed(0)
        learn = get_unet(get_dls(bs=bs, n=8), scope='decoder', cbs=cbs)
        learn.fit(1, 1e-3)
        models.append(learn.model.state_dict())
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
