"Single-image normalization: against NumPy in float64, for any size and type, and in fastai's pipelines, forth and back"
import copy, itertools, math, pickle, warnings
from collections import namedtuple

import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from fastai.vision.all import (
    CategoryBlock, DataBlock, DataLoaders, Datasets, L, ImageBlock, ImageDataLoaders, MaskBlock, Normalize, PILImage,
    PILMask, TensorBBox, TensorCategory, TensorImage, TensorImageBW, TensorMask, TensorPoint, aug_transforms,
    imagenet_stats, load_learner, model_meta, resnet18, risinstance, unet_learner, vision_learner)
from helpers import rounding
from fastai_bn.all import HPADataLoaders, ImageNormalize, image_normalize, make_hpa
from fastai_bn.hpa import TensorHPA
from fastai_bn.normalize import _Normalized
from fastai_bn.rows import _byte_percentiles, _percentile

STATS = ['std','minmax','percentile']
Pair = namedtuple('Pair', 'x y')
# moments in several accumulators, a difference, a quotient
FLOAT32 = rounding(64, 1, torch.float32)
TYPES = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.bool,
         torch.float16, torch.bfloat16, torch.float32, torch.float64]

def centre_and_scale(v, stat, q):
    if stat == 'std': return v.mean(),v.std()
    if stat == 'minmax': return v.min(),np.ptp(v)
    low,high = np.percentile(v, q)
    return low,high-low

def reference(x, per='channel', stat='std', q=(1,99.8), ok=None, eps=1e-3, n=2):
    "In NumPy, group by group: output, centre and scale"
    x = np.asarray(x, dtype=np.float64)
    groups = x.reshape(-1, math.prod(x.shape[x.ndim-n-(per == 'image'):]))
    ok = np.isfinite(groups) & (True if ok is None else np.broadcast_to(ok, x.shape).reshape(groups.shape))
    out = np.zeros_like(groups)
    for o,g,m in zip(out, groups, ok):
        fin = np.isfinite(g)
        v = g[m] if m.any() else g[fin]
        if not len(v) or v.min() == v.max(): continue
        c,s = centre_and_scale(v, stat, q)
        o[fin] = (g[fin]-c)/max(s, eps*np.ptp(v))
    return out.reshape(x.shape)

def images(shape=(3,4,9,11), seed=0):
    "Every channel has a scale and an offset of its own"
    g = torch.Generator().manual_seed(seed)
    one = shape[:2]+(1,)*(len(shape)-2)
    def rand(shape): return torch.rand(shape, generator=g, dtype=torch.float64)
    return rand(shape)*10**(4*rand(one)-2)+100*rand(one)

def close(out, ref, atol=1e-11, rtol=1e-7): np.testing.assert_allclose(out, ref, atol=atol, rtol=rtol)
def plain(x): return x.as_subclass(Tensor)


# --- The function

@pytest.mark.parametrize('stat', STATS)
@pytest.mark.parametrize('per', ['channel','image'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.uint8, torch.uint16, torch.int32])
def test_against_numpy(per, stat, dtype):
    x = images()
    x = x.to(dtype) if dtype.is_floating_point else (x*2).clamp(0, 255).to(torch.int64).to(dtype)
    out = image_normalize(x, per, stat)
    assert out.dtype == (dtype if dtype.is_floating_point else torch.float32) and out.shape == x.shape
    ref = reference(x.double() if dtype.is_floating_point else x.to(torch.int64), per, stat)
    np.testing.assert_allclose(out.numpy(), ref, rtol=0, atol=FLOAT32*max(1, np.abs(ref).max()/4))

@pytest.mark.parametrize('stat', STATS)
def test_large_images_are_as_precise(stat):
    "Enough values for the threshold before the percentiles, far from zero, many of them equal"
    g = torch.Generator().manual_seed(0)
    def rand(*shape): return torch.rand(*shape, generator=g)
    size = 2,2,300,311
    for x in (rand(*size), rand(*size)+1000, (rand(*size)*300).clamp(0,255).byte(), rand(*size).pow(30),
              rand(*size).sort(-1).values, -rand(1,1,900,900).double()*1e-30):
        close(image_normalize(x, stat=stat), reference(x, stat=stat), rtol=FLOAT32, atol=FLOAT32)

def test_percentiles_are_numpys():
    g = torch.Generator().manual_seed(0)
    for n in (1,2,3,7,100,5000,20_000):
        for y in (torch.rand(3,n, generator=g, dtype=torch.float64), torch.randint(0, 4, (3,n), generator=g).double()):
            for q in (0,.01,1,25,49.9,50,75,99,99.99,100):
                close(_percentile(y, q)[:,0], np.percentile(y, q, axis=1), rtol=1e-12, atol=1e-12)
        u = torch.randint(0, 256, (3,n), generator=g).byte()
        qs = (0,1,50.3,99.8,100)
        for q,o in zip(qs, _byte_percentiles(u, qs)): close(o[:,0], np.percentile(u, q, axis=1), rtol=1e-5, atol=0)

@pytest.mark.parametrize('shape,n,kw', [
    ((2,3,5,6),2,{}), ((3,5,6),2,{}), ((3,40),1,{}), ((2,3,4,5,6),3,{}),
    ((2,3,40),1,dict(ndim=1)), ((3,4,5,6),3,dict(ndim=3)), ((2,3,5,6),2,dict(ndim=2)),
])
@pytest.mark.parametrize('per', ['channel','image'])
def test_dimensions(shape, n, kw, per):
    x = torch.rand(shape, dtype=torch.float64)*torch.arange(1, shape[-n-1]+1).view(-1, *[1]*n)
    out,c,s = image_normalize(x, per, return_stats=True, **kw)
    np.testing.assert_allclose(out, reference(x, per, n=n), atol=1e-12)
    assert c.shape == s.shape == shape[:len(shape)-n-1]+(shape[-n-1] if per == 'channel' else 1,)+(1,)*n
    torch.testing.assert_close(out*s+c, x)

@pytest.mark.parametrize('stat', STATS)
def test_blank_and_constant_channels(stat):
    x = images()
    x[0,0],x[0,1],x[1,2] = 0,7.3,1e30
    u = x.clamp(0,255).byte()
    y,c,s = image_normalize(u, stat=stat, return_stats=True)
    assert c[0,1] == 7 and not y[0,1].any() and torch.allclose(y*s+c, u.float(), atol=1e-3)
    for dtype in (torch.float64, torch.float32, torch.float16):
        y,c,s = image_normalize(x.clamp(max=6e4).to(dtype), stat=stat, return_stats=True)
        assert not y[0,:2].any() and not y[1,2].any() and y.isfinite().all() and y[2].any()
        assert abs(c[0,1].item()-7.3) < 1e-2

@pytest.mark.parametrize('n', [10, 1000])
def test_one_bright_pixel(n):
    "eps bounds what a nearly empty channel is multiplied by, and only in relation to its range"
    x = torch.zeros(1,1,n,n, dtype=torch.float64)
    x[...,n//2,n//2] = 5
    for f in (1, 1e-20, 1e20):
        for stat in STATS: close(image_normalize(x*f, stat=stat), reference(x, stat=stat), atol=1e-9)
    if n == 1000: assert image_normalize(x, stat='percentile').max() == 1000
    assert 3 < image_normalize(x).max() <= 1000

def test_nan_and_inf_pixels():
    x = images()
    x[0,0,0,0],x[0,1,2,3],x[1,1,0,0],x[2,3] = math.nan,math.inf,-math.inf,math.nan
    for stat in STATS:
        for per in ('channel','image'):
            with pytest.warns(UserWarning, match=f'{3+99} pixel') as rec: y = image_normalize(x, per, stat)
            assert len(rec) == 1
            np.testing.assert_allclose(y, reference(x, per, stat), atol=1e-12)
            assert y[0,0,0,0] == 0 and not y[2,3].any()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image_normalize(images())

def test_a_range_that_overflows():
    x = torch.tensor([[[-3e38,3e38,0.,1e38]]])
    np.testing.assert_allclose(image_normalize(x, ndim=2), reference(x), atol=1e-6)

@pytest.mark.parametrize('stat', STATS)
def test_masks(stat):
    x = images()
    x[:,:,:3] = 0
    m = torch.rand(9,11) > .5
    by_name,by_value = ('nonzero', x.numpy() != 0),(lambda x: x > 50, x.numpy() > 50)
    for mask,ok in (by_name, by_value, *((o, m.numpy()) for o in (m, m[None,None].expand(3,1,9,11), m.float()))):
        close(image_normalize(x, stat=stat, mask=mask), reference(x, stat=stat, ok=ok))
    # an empty mask: the whole image, which is constant here
    x[0] = 0
    assert not image_normalize(x, stat=stat, mask='nonzero')[0].any()
    close(image_normalize(x, stat=stat, mask=torch.zeros(9,11)), reference(x, stat=stat))

def test_clip():
    x = images()
    y = image_normalize(x, stat='percentile')
    assert torch.equal(image_normalize(x, stat='percentile', clip=(0,1)), y.clamp(0, 1))
    assert image_normalize(x, clip=(-1,1.5)).amax() == 1.5

@pytest.mark.slow
def test_input_stays_and_gradients_pass():
    x = images((2,2,4,5)).requires_grad_()
    before = x.detach().clone()
    for stat in STATS:
        for kw in ({}, dict(eps=.4), dict(mask=torch.rand(4,5) > .3)):
            assert torch.autograd.gradcheck(lambda x: image_normalize(x, stat=stat, **kw), x)
    assert torch.equal(x, before)

def test_a_blank_channel_leaves_other_gradients_alone():
    w,x = torch.rand(2,2,4,5, dtype=torch.float64),images((2,2,4,5))
    x[0,0] = .1
    for stat in STATS:
        a,b = x.clone().requires_grad_(),x[1:].clone().requires_grad_()
        (image_normalize(a, stat=stat)*w).sum().backward()
        (image_normalize(b, stat=stat)*w[1:]).sum().backward()
        torch.testing.assert_close(a.grad[1:], b.grad)
        assert a.grad.isfinite().all()

def test_layouts_and_types_of_fastai():
    x = images((2,3,8,9)).float()
    y = image_normalize(x)
    torch.testing.assert_close(image_normalize(x.to(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(image_normalize(x.transpose(2,3)).transpose(2,3), y, rtol=1e-5, atol=1e-5)
    z = image_normalize(TensorImage(x))
    assert type(z) is TensorImage and torch.equal(z.as_subclass(Tensor), y)
    for mask in (None,'nonzero'): assert image_normalize(x[:0], mask=mask).shape == (0,3,8,9)
    u = torch.arange(16, dtype=torch.int32).to(torch.uint16).view(1,1,4,4)
    close(image_normalize(u, mask=lambda x: x > 7), reference(u.int(), ok=u.int().numpy() > 7), atol=1e-6)
    with pytest.raises(ValueError, match='`mask` must give a tensor .* got ndarray'):
        image_normalize(x, mask=lambda x: x.numpy() > 0)

@pytest.mark.parametrize('kw', [
    dict(per='batch'), dict(stat='max'), dict(q=(99,1)), dict(q=(-1,50)), dict(q=5), dict(q=(1,101)), dict(clip=(1,0)),
    dict(clip=3), dict(eps=0), dict(eps=math.inf), dict(mask='zero'), dict(mask=3), dict(mask=torch.ones(3,3)),
    dict(ndim=4), dict(ndim=1),
])
def test_bad_arguments(kw):
    name = 'x' if kw == dict(ndim=1) else next(iter(kw))
    with pytest.raises(ValueError, match=f'^`{name}` must b'): image_normalize(images(), **kw)

@pytest.mark.parametrize('x', [
    torch.rand(5), torch.rand(1,1,1,1,1,1), torch.rand(2,3,0,4), torch.rand(2,0,3,3), [1,2], np.ones((3,4,4)),
    torch.zeros(1,2,2, dtype=torch.complex64),
])
def test_no_images(x):
    with pytest.raises(ValueError, match='^`x` must be'): image_normalize(x)

sizes = st.tuples(st.integers(1,2), st.integers(1,3), st.integers(1,12), st.integers(1,12))
types,floats,stats = st.sampled_from(TYPES),st.sampled_from([torch.float32, torch.float64]),st.sampled_from(STATS)
seeds = st.integers(0, 1000)

@settings(max_examples=120, deadline=None)
@given(sizes, types, stats, st.sampled_from(['channel','image']), seeds, st.booleans(), st.booleans())
def test_any_size_and_type(shape, dtype, stat, per, seed, blank, nan):
    g = torch.Generator().manual_seed(seed)
    def rand(shape): return torch.rand(shape, generator=g, dtype=torch.float64)
    x = (rand(shape)*200*rand(shape[:2]+(1,1))).round(decimals=1)
    if blank: x[0,0] = 3
    x = x.to(torch.int64).to(dtype) if not dtype.is_floating_point and dtype != torch.bool else x.to(dtype)
    if nan and dtype.is_floating_point: x[0,0,0,0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        y = image_normalize(x, per, stat)
    ref = reference(x.to(torch.float64) if dtype != torch.uint16 else x.to(torch.int64), per, stat)
    tol = {torch.float16:1e-3, torch.bfloat16:8e-3}.get(dtype, 2*FLOAT32)
    assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    np.testing.assert_allclose(y.double(), ref, rtol=tol, atol=tol)

@settings(max_examples=120, deadline=None)
@given(sizes, floats, stats, seeds, st.integers(-20, 20), st.integers(-1000, 1000), st.booleans())
def test_scale_and_shift_of_the_input_do_not_matter(shape, dtype, stat, seed, power, shift, blank):
    "Where the input holds them exactly: integers of 12 bits, a power of two, a whole number"
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 4096, shape, generator=g).to(dtype)
    if blank: x[0,0] = 17
    y = image_normalize(x, stat=stat)
    assert (image_normalize((x+shift)*2.**power, stat=stat)-y).abs().max() < 1e-5


# --- The transform

@pytest.mark.parametrize('kw', [{}, dict(per='image', stat='percentile'), dict(stat='minmax'), dict(mask='nonzero')])
def test_decodes_each_sample(kw):
    t,x = ImageNormalize(**kw),TensorImage(images((5,3,6,7)).float())
    y = t(x)
    assert (y-image_normalize(x, **kw)).abs().max() == 0
    tol = 1e-4*(x.amax()-x.amin())
    def gives(o, want=x): return (t.decode(o)-want).abs().max() < tol
    some = torch.tensor([True,False,True,False,False])
    for i in (slice(None), slice(1,4), [3,0], torch.tensor([2,2]), some, slice(None,None,2)): assert gives(y[i], x[i])
    assert gives(torch.cat([y[3:],y[:3]]), torch.cat([x[3:],x[:3]]))
    assert gives(y.to(torch.float64)) and gives(y.detach().cpu())
    assert gives(torch.cat(tensors=(y[:2],y[2:]), axis=0))
    for o in (pickle.loads(pickle.dumps(y)), copy.deepcopy(y), y.clone(), torch.clone(y)): assert gives(o)
    assert type(t.decode(y)) is TensorImage

def test_what_is_no_longer_the_image_is_not_decoded():
    t,x = ImageNormalize(),TensorImage(images((4,3,6,7)).float())
    y = t(x)
    parts = y[0],y[:,1:],y[...,2:],*y.unbind(),*y.split(2)
    joined = torch.stack([y,y]),torch.cat([y,y], 1),torch.cat([y,y], axis=1),torch.cat([y,x])
    computed = y+1,y*2,y.flip(3),y.mean((2,3)),F.conv2d(y, torch.rand(2,3,3,3)),y.max(0).values,y.reshape(2,6,6,7)
    for o in (*parts, *joined, *computed):
        assert not isinstance(o, _Normalized) and type(o) is TensorImage and t.decode(o) is not None
        assert torch.equal(plain(t.decode(o)), plain(o))

def test_what_is_left_alone():
    t = ImageNormalize()
    typed = (TensorMask(torch.ones(2,8,8).long()), TensorBBox(torch.rand(2,3,4)), TensorPoint(torch.rand(2,3,2)),
             TensorCategory(torch.tensor([1,0])))
    others = (torch.tensor([1,2]), torch.rand(2,7), torch.zeros(2,8,8).long(), torch.ones(2,1,4,4).long(),
              torch.ones(2,1,4,4, dtype=torch.bool))
    for o in typed+others: assert t(o) is o or torch.equal(t(o), o) and type(t(o)) is type(o)
    b = (TensorImage(torch.rand(2,3,4,4)),TensorMask(torch.ones(2,4,4).long()))
    x,y = t(b)
    assert y is b[1] and torch.equal(t.decode((x,y))[1], b[1])

@pytest.mark.parametrize('x', [
    TensorImageBW(torch.rand(2,1,5,5)), TensorHPA(torch.rand(2,4,5,5), channels='rgby'), torch.rand(2,6,5,5),
    torch.rand(2,2,3,4,5),
])
def test_images_of_any_kind(x):
    t = ImageNormalize()
    y = t(x)
    assert isinstance(y, type(x)) and y.shape == x.shape and y.double().std() > .5
    back = t.decode(y)
    assert type(back) is type(x) and torch.allclose(back, x, atol=1e-5)
    assert getattr(back, 'channels', None) == getattr(x, 'channels', None)

def test_bad_options():
    with pytest.raises(ValueError, match='^`per` must be'): ImageNormalize('all')
    with pytest.raises(ValueError, match='^`q` must be'): ImageNormalize(q=(5,1))
    assert "'per': 'image'" in repr(ImageNormalize('image'))


# --- In fastai

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Photos of two classes, 'bright' and 'dark', with masks"
    path,g = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for i in range(12):
        c = ('bright','dark')[i%2]
        for d in (c, 'masks'): (path/d).mkdir(exist_ok=True)
        a = (g.random((40,40,3))*(200 if i%2 == 0 else 60)).astype(np.uint8)
        PILImage.create(a).save(path/c/f'{i}.png')
        PILMask.create((a[...,0] > 30).astype(np.uint8)).save(path/'masks'/f'{i}.png')
    return path

def files(folder): return sorted(f for f in folder.rglob('*.png') if f.parent.name != 'masks')
def parent(f): return f.parent.name
def mask_of(f): return f.parent.parent/'masks'/f.name
def some(items): return [0,1,2,6,7,8],[3,4,5,9,10,11]

def image_dls(folder, tfms=None, mask=False):
    target,get_y = (MaskBlock(codes=['a','b']),mask_of) if mask else (CategoryBlock,parent)
    block = DataBlock((ImageBlock, target), get_items=files, get_y=get_y, splitter=some,
                      batch_tfms=tfms or [*aug_transforms(), ImageNormalize()])
    return block.dataloaders(folder, bs=3, num_workers=0)

def raw(f): return torch.from_numpy(np.asarray(PILImage.create(f))).permute(2,0,1)

def test_in_a_datablock(folder):
    dls = image_dls(folder, [ImageNormalize()])
    x,y = dls.valid.one_batch()
    assert torch.allclose(x.mean((2,3)), torch.zeros(3,3), atol=1e-5)
    assert torch.allclose(x.std((2,3), unbiased=False), torch.ones(3,3), atol=1e-4)
    # the original intensities, of each image
    for (im,_),f in zip(dls.valid.decode_batch((x,y)), files(folder)[3:6]): assert (im-raw(f)).abs().max() <= 1
    dls.valid.show_batch((x,y), max_n=3)
    image_dls(folder).show_batch(max_n=2)
    # fastai gives these the first batch's type
    for new in (x.flip(3), x+0, x.clone(), x.new_empty(2,3,4,4), x[:2]): dls.valid.decode_batch((new,y))
    again = pickle.loads(pickle.dumps(dls))
    assert torch.equal(again.valid.one_batch()[0], x)

def test_in_imagedataloaders(folder, tmp_path):
    for f in files(folder):
        (tmp_path/parent(f)).mkdir(exist_ok=True)
        (tmp_path/parent(f)/f.name).write_bytes(f.read_bytes())
    tfm = ImageNormalize('image', 'minmax')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, seed=0, bs=3, num_workers=0, batch_tfms=tfm)
    x,y = dls.valid.one_batch()
    assert torch.allclose(x.amin((1,2,3)), torch.zeros(3)) and torch.allclose(x.amax((1,2,3)), torch.ones(3))
    for (im,_),f in zip(dls.valid.decode_batch((x,y)), dls.valid.items): assert (im-raw(f)).abs().max() <= 1

TARGETS = dict(floats=torch.rand(2,3,8,8), images=TensorImage(torch.rand(2,3,8,8)),
               bytes=torch.rand(2,3,8,8).to(torch.uint8), numbers=torch.rand(2))

@pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS)
def test_targets_are_no_images(target):
    """Heat maps, the clean image of a noisy one, what is to be coloured: fastai's own type dispatch knows nothing of
    inputs and targets"""
    x,tfm = torch.rand(2,3,8,8)*9,ImageNormalize()
    for b in ((x,target), [x,target]):
        out = tfm(b)
        assert type(out) is type(b) and torch.equal(out[0], image_normalize(x)) and out[1] is target
    assert torch.equal(tfm((x,))[0], image_normalize(x)) and torch.equal(tfm(x), image_normalize(x))
    a,b,y = tfm(((x,[x]),x,target))
    assert all(torch.equal(o, image_normalize(x)) for o in (a[0], a[1][0], b)) and y is target

@pytest.mark.parametrize('n_inp', [1, 2, None])
def test_the_data_say_how_many_inputs_there_are(n_inp):
    xs = [TensorImage(torch.rand(3,8,8)*9) for _ in range(4)]
    take = lambda o: o
    dsets = Datasets(xs, [[take]]*3, n_inp=n_inp)
    dls = DataLoaders.from_dsets(dsets, dsets, bs=4, num_workers=0, device='cpu', after_batch=ImageNormalize())
    b = dls.valid.one_batch()
    want = plain(image_normalize(torch.stack(xs)))
    assert [torch.equal(plain(o), want) for o in b] == [True, n_inp != 1, False]
    test = dls.test_dl(xs).one_batch()
    assert len(test) == dsets.n_inp and all(o.mean().abs() < 1e-5 for o in test)

def test_a_test_set_without_targets_has_as_many_inputs():
    "Of a data set that does not know how many inputs it has"
    x = [TensorImage(torch.rand(3,8,8)*9) for _ in range(4)]
    items = [(o,o,torch.tensor(1)) for o in x]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device='cpu', after_batch=ImageNormalize())
    want = plain(image_normalize(torch.stack(x)))
    dls.valid.one_batch()
    test,again = [o[:2] for o in items],pickle.loads(pickle.dumps(dls.valid))
    for dl in (dls.valid, dls.valid.new(test), again.new(test)):
        for o in dl.one_batch()[:2]: assert torch.equal(plain(o), want)

@pytest.mark.parametrize('make', [lambda *o: o, lambda *o: list(o), lambda *o: L(*o), Pair])
def test_kinds_of_batches(make):
    x,y = torch.rand(2,3,8,8)*9,torch.rand(2,3,8,8)
    out = ImageNormalize()(make(x, y))
    assert type(out) is type(make(x, y)) and torch.equal(out[0], image_normalize(x)) and out[1] is y

def test_a_batch_without_images_is_a_warning():
    tfm = ImageNormalize()
    b = dict(x=torch.rand(2,3,8,8))
    with pytest.warns(UserWarning, match='no images in a dict'): assert tfm(b) is b
    masks = [TensorMask(torch.ones(2,8,8)) for _ in range(2)]
    for b in ((torch.randint(9, (2,3,8,8)), torch.rand(2)), masks):
        with pytest.warns(UserWarning, match='found no image'): assert all(a is o for a,o in zip(tfm(b), b))

def test_a_mask_of_samples_is_not_taken_for_one_of_channels():
    x = images((3,3,4,5))
    per_sample,per_channel = torch.rand(3,1,4,5) > .4,torch.rand(1,3,4,5) > .4
    doubt,which = 'with samples or with channels',r'.*\[B, 1, \*\].*\[1, C, \*\]'
    for ok in (per_sample, per_channel):
        close(image_normalize(x, mask=ok), reference(x, ok=ok.numpy()))
        for mask in (ok.view(3,4,5), lambda x,ok=ok: ok.view(3,4,5)):
            with pytest.raises(ValueError, match=doubt+which): image_normalize(x, mask=mask)
    with pytest.raises(ValueError, match='must broadcast to'+which): image_normalize(x[:2], mask=per_sample[:2,0])
    # no doubt here
    close(image_normalize(x[:2], mask=per_channel[0]), reference(x[:2], ok=per_channel.numpy()))
    close(image_normalize(x[0], mask=per_channel[0]), reference(x[:1], ok=per_channel.numpy())[0])
    v = images((2,2,3,4,5))
    with pytest.raises(ValueError, match=doubt): image_normalize(v, mask=torch.rand(2,3,4,5) > .4)
    with pytest.raises(ValueError, match=doubt): image_normalize(v[:,:,0,0], ndim=1, mask=torch.rand(2,5) > .4)

def test_percentiles_of_another_stat_are_an_error():
    for stat in ('std','minmax'):
        for f in (lambda **kw: image_normalize(images(), **kw), ImageNormalize):
            with pytest.raises(ValueError, match='`q` must be left out'): f(stat=stat, q=(5,95))

@pytest.mark.slow
@pytest.mark.parametrize('mask', [False,True])
def test_learners_add_no_normalize_of_their_own(folder, mask, monkeypatch):
    "With stats as of a pretrained net"
    def arch(pretrained=False): return resnet18()
    meta = {k:v for k,v in model_meta[resnet18].items() if k != 'weights'}
    monkeypatch.setitem(model_meta, arch, {**meta, 'stats':imagenet_stats})
    learner = unet_learner if mask else vision_learner
    def make(tfms): return learner(image_dls(folder, tfms, mask), arch, n_out=2, pretrained=True)
    def norms(learn): return [type(o) for o in learn.dls.after_batch.fs.filter(risinstance(Normalize))]
    assert norms(make([ImageNormalize()])) == [ImageNormalize] and norms(make([*aug_transforms()])) == [Normalize]
    learn = make([ImageNormalize()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.show_results(max_n=2)

def test_predict_test_dl_export(folder, tmp_path):
    learn = vision_learner(image_dls(folder), resnet18, pretrained=False, n_out=2, path=tmp_path)
    fs = files(folder)
    with learn.no_bar(), learn.no_logging():
        x,*_,probs = learn.predict(fs[0], with_input=True)
        assert (x-raw(fs[0])).abs().max() <= 1
        dl = learn.dls.test_dl(fs[:5], bs=2)
        inp,preds,_ = learn.get_preds(dl=dl, with_input=True)
        # joined from three batches
        for im,f in zip(dl.decode_batch((inp,)), fs): assert (im[0]-raw(f)).abs().max() <= 1
        learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = load_learner(tmp_path/'export.pkl')
    with new.no_bar(): torch.testing.assert_close(new.predict(fs[0])[2], probs)

def test_hpa(tmp_path):
    make_hpa(tmp_path, n=8, size=32)
    dls = HPADataLoaders.from_folder(tmp_path, size=32, bs=4, batch_tfms=ImageNormalize())
    x,y = dls.one_batch()
    assert isinstance(x, TensorHPA) and torch.allclose(x.mean((2,3)), torch.zeros(4,4), atol=1e-4)
    t = dls.after_batch.fs.filter(risinstance(ImageNormalize))[0]
    back = t.decode(x)
    assert 0 <= back.min()+1e-5 and back.max() <= 1+1e-5
    dls.show_batch(max_n=2)

def test_training_does_not_slow_down_by_types():
    "After the first operation of the model nothing is left of the type"
    seen = []
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU())
    m[1].register_forward_pre_hook(lambda m,a: seen.append(type(a[0])))
    m(ImageNormalize()(TensorImage(torch.rand(2,3,8,8))))
    assert seen == [TensorImage]

def test_a_field_of_view_masks_every_batch():
    x,view = TensorImage(torch.rand(3,2,8,8)),torch.ones(8,8, dtype=torch.bool)
    view[:,4:] = False
    x[...,4:] += 100
    y = ImageNormalize(mask=view)(x)
    torch.testing.assert_close(plain(y[...,:4]), plain(image_normalize(x[...,:4])), atol=1e-5, rtol=1e-5)
    other = TensorImage(torch.rand(3,2,8,9))
    with pytest.raises(ValueError, match='`mask` must broadcast to'): ImageNormalize(mask=view)(other)


# --- Tiles

def tiles_of(x, size, n=2):
    "Yield slices of tiles of `size` that cover the last `n` dimensions of `x`; those at the ends are smaller"
    starts = [range(0, k, size) for k in x.shape[-n:]]
    yield from ((..., *[slice(a, a+size) for a in at]) for at in itertools.product(*starts))

WHOLES = {
    'near': torch.rand(3,37,41, generator=torch.Generator().manual_seed(0)),
    'far': torch.rand(3,37,41, generator=torch.Generator().manual_seed(1))*.3+1000,
    'tiny': torch.rand(3,37,41, generator=torch.Generator().manual_seed(2))*1e-20,
    'bytes': (images((1,3,37,41))[0]*2).clamp(0, 255).byte(),
    '16 bits': (images((1,3,37,41))[0]*300).to(torch.int32).clamp(0, 65535).to(torch.uint16),
    'integers': (images((1,3,37,41))[0]*1e6).long(),
    'half': torch.rand(3,37,41, generator=torch.Generator().manual_seed(3)).half(),
    'double': images((1,3,37,41))[0],
    'blank': torch.stack([torch.full((37,41), 7.3), torch.zeros(37,41), torch.rand(37,41)])}

@pytest.mark.parametrize('size', [1, 5, 16, 64])
@pytest.mark.parametrize('stat', STATS)
@pytest.mark.parametrize('per', ['channel','image'])
@pytest.mark.parametrize('x', WHOLES.values(), ids=WHOLES)
def test_tiles_are_crops_of_the_whole(x, per, stat, size):
    whole,*stats = image_normalize(x, per, stat, return_stats=True)
    for at in tiles_of(x, size):
        tile = image_normalize(x[at], stats=stats)
        assert tile.dtype == whole.dtype and torch.equal(tile, whole[at])

@pytest.mark.parametrize('x', [WHOLES[k] for k in ('near','half','blank')])
def test_asking_for_statistics_changes_nothing_near_zero(x):
    for stat in STATS:
        out,*_ = image_normalize(x, stat=stat, return_stats=True)
        assert torch.equal(image_normalize(x, stat=stat), out)

@pytest.mark.parametrize('kw', [
    dict(mask='nonzero'), dict(mask=lambda x: x > .5, stat='minmax'), dict(clip=(-1,2)), dict(eps=.5),
    dict(stat='percentile', q=(5,50), clip=(0,1))])
def test_options_are_the_wholes(kw):
    "What an option has measured is in the statistics; a clip is asked for again"
    x = WHOLES['near']
    whole,*stats = image_normalize(x, return_stats=True, **kw)
    for at in tiles_of(x, 10): assert torch.equal(image_normalize(x[at], stats=stats, clip=kw.get('clip')), whole[at])

def test_tiles_of_volumes_and_signals():
    g = torch.Generator().manual_seed(0)
    for x,n in ((torch.rand(2,9,10,11, generator=g),3), (torch.rand(2,100, generator=g),1)):
        whole,*stats = image_normalize(x, return_stats=True, ndim=n)
        for at in tiles_of(x, 4, n): assert torch.equal(image_normalize(x[at], stats=stats, ndim=n), whole[at])

def test_batches_of_tiles():
    "All of one whole, or each of its own"
    x = torch.stack([WHOLES['near'], WHOLES['near']*3+1])
    whole,*stats = image_normalize(x, return_stats=True)
    assert torch.equal(image_normalize(x[...,:8,3:9], stats=stats), whole[...,:8,3:9])
    one = [o[0] for o in stats]
    tiles = torch.stack([x[0][at] for at in tiles_of(x[0,:,:32,:32], 8)])
    for xs in (tiles, TensorImage(tiles)):
        out = image_normalize(xs, stats=one)
        assert type(out) is type(xs)
        assert torch.equal(plain(out), torch.stack([whole[0][at] for at in tiles_of(x[0,:,:32,:32], 8)]))

def test_numbers_as_statistics():
    x = WHOLES['near']
    one = np.full((3,1,1), .25)
    for stats in ((.5,.25), [torch.tensor(.5),torch.tensor(.25)], (np.float32(.5),one.astype(np.float32)),
                  (.5,one[::-1]), (.5,one.astype('>f8')), (torch.tensor([.5]).half(),torch.tensor(.25).bfloat16())):
        assert torch.equal(image_normalize(x, stats=stats), (x-.5)/.25)
    for stats in ((np.uint16(3),np.uint16(2)), (torch.tensor(3),torch.tensor(2).short()), (3,np.array(2))):
        assert torch.equal(image_normalize(x, stats=stats), (x-3)/2)
    assert not image_normalize(x, stats=(.5,0)).any()  # no contrast, no scale

def test_dead_pixels_of_a_tile():
    x = WHOLES['near'].clone()
    _,*stats = image_normalize(x, return_stats=True)
    x[0,0,:2] = torch.tensor([math.nan,math.inf])
    with pytest.warns(UserWarning, match='2 pixel.*of 192 are NaN or infinite') as rec:
        y = image_normalize(x[...,:8,:8], stats=stats)
    assert len(rec) == 1 and not y[0,0,:2].any() and y.isfinite().all()

@pytest.mark.parametrize('stats,match', [
    (3, 'pair of real tensors or numbers'), ((1,2,3), 'pair'), (('a',1), 'pair'), ((1j,1), 'pair'),
    ((torch.zeros(3,1,1)+0j,1), 'pair'),
    ((0,-1.), 'scale at least 0'), ((math.nan,1), 'finite'), ((0,math.inf), 'finite'),
    ((torch.zeros(3),torch.ones(3)), r'shape \[3, 1, 1\].*got \[3\]'),
    ((torch.zeros(4,1,1),1), r'got \[4, 1, 1\]'), ((torch.zeros(2,3,1,1),1), r'got \[2, 3, 1, 1\]'),
    ((torch.zeros(3,8,8),1), r'got \[3, 8, 8\]')])
def test_bad_statistics(stats, match):
    with pytest.raises(ValueError, match=match): image_normalize(torch.rand(3,8,8), stats=stats)
    if 'shape' in match or 'got' in match: return  # which depend on the image
    with pytest.raises(ValueError, match=match): ImageNormalize(stats=stats)

def test_tiles_of_bytes_come_as_shares_of_255():
    "As an `ImageBlock` gives them: so have the statistics to be"
    slide = (images((1,3,64,64))[0]*2).clamp(0, 255).byte()
    whole,*stats = image_normalize(slide/255, return_stats=True)
    ats = list(tiles_of(slide, 16))
    db = DataBlock((ImageBlock,CategoryBlock), get_x=lambda i: PILImage.create(slide[ats[i]].permute(1,2,0).numpy()),
                   get_y=lambda i: i%2, batch_tfms=ImageNormalize(stats=stats))
    dls = db.dataloaders(list(range(len(ats))), bs=4, shuffle=False, num_workers=0, device='cpu')
    x = next(iter(dls.test_dl(list(range(4)))))[0]
    torch.testing.assert_close(plain(x), torch.stack([whole[at] for at in ats[:4]]), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('per', ['channel','image'])
@pytest.mark.parametrize('stat', STATS)
def test_tiles_in_training_and_prediction(per, stat, tmp_path):
    "`ImageNormalize(stats=)` in a pipeline: batches are crops of the whole, decode to tiles, and come back from a file"
    whole = (images((1,3,64,64))[0]*2).clamp(0, 255).float()
    normalised,*stats = image_normalize(whole, per, stat, return_stats=True)
    ats = list(tiles_of(whole, 16))
    items = [(TensorImage(whole[at]),TensorCategory(i%2)) for i,at in enumerate(ats)]
    tfm = ImageNormalize(stats=stats)
    dls = DataLoaders.from_dsets(items, items, bs=5, shuffle=False, drop_last=False, after_batch=tfm, num_workers=0,
                                 device='cpu')
    for dl in dls:
        got = torch.cat([plain(x) for x,_ in dl])
        assert torch.equal(got, torch.stack([normalised[at] for at in ats]))
    xb = next(iter(dls.valid))[0]
    tiles = torch.stack([whole[at] for at in ats])
    torch.testing.assert_close(plain(tfm.decode(xb)), tiles[:5], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(plain(tfm.decode(xb[2:4])), tiles[2:4], rtol=1e-5, atol=1e-3)
    again = pickle.loads(pickle.dumps(tfm))
    assert torch.equal(plain(again(TensorImage(whole[None]))), normalised[None])

def test_an_overview_is_near():
    "Averaging keeps the mean, and takes noise out of the deviation"
    x = F.interpolate(torch.rand(1,3,16,16, generator=torch.Generator().manual_seed(0)), 256, mode='bilinear')[0]
    _,c,s = image_normalize(x, return_stats=True)
    _,c2,s2 = image_normalize(F.avg_pool2d(x, 4), return_stats=True)
    torch.testing.assert_close(c2, c, rtol=1e-4, atol=1e-5)
    assert (s2 < s).all() and (s2 > .9*s).all()
