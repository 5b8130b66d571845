"Single-image normalization: another exposure, and where intensity is the label"
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from fastai_bn.all import ImageNormalize, image_normalize
from bench.common import Images, drawn_tensors, learner, peer, score
from bench.results import Table, rounds
from bench.unet_norms import fields, unet

#: Of images as the microscope gives them, 0 to 1. 'training set' standardises by its mean and standard deviation per
#: channel
NORMS = {
    'training set': None,
    "per='channel', stat='std'": {},
    "per='image', stat='std'": dict(per='image'),
    "per='channel', stat='percentile'": dict(stat='percentile'),
    "per='channel', stat='minmax'": dict(stat='minmax')}
SHIFTS = {
    'as they are': lambda x: x,
    '0.3 times as bright': lambda x: .3*x,
    '2 times as bright, clipped': lambda x: (2*x).clamp(max=1),
    'on a ground of 0.2': lambda x: .8*x+.2}

def normalised(train:tuple, valid:tuple, kw) -> tuple[Images,callable]:
    "The images normalised, and what does it to others"
    mean,std = (f(train[0], (0,2,3), keepdim=True) for f in (torch.mean,torch.std))
    def standardise(x): return (x-mean)/std
    norm = standardise if kw is None else partial(image_normalize, **kw)
    return Images((norm(train[0]),train[1]), (norm(valid[0]),valid[1])),norm

def exposure(data:str, seed:int, a):
    "Drawn images, 28 labels: validation on images of another exposure, and of another laboratory"
    n = a.images or 1024
    x,y = drawn_tensors(n+512, 32)
    other = drawn_tensors(512, 32, 1, 1.)
    for name,kw in NORMS.items():
        o,norm = normalised((x[:n],y[:n]), (x[n:],y[n:]), kw)
        learn = learner(o, seed, 32)
        learn.fit_one_cycle(a.epochs or 6, 3e-3)
        cases = {**{k:(f(x[n:]),y[n:]) for k,f in SHIFTS.items()}, 'lab_shift=1':other}
        for k,(xs,ys) in cases.items():
            row = dict(norm=name, images=k, train_loss=learn.train_loss.epochs[-1])
            yield {**row, **score(learn.model, o, (norm(xs),ys))}

def nuclei(data:str, seed:int, a):
    """U-Nets with BN, 4 images, two epochs to 3e-4 (what lr_find gives for the training set's statistics): Dice on
    images of another exposure"""
    train,valid = fields(data, a)
    one = train[0][0].shape[0] == 1
    for name,kw in NORMS.items():
        if 'minmax' in name or one and 'image' in name: continue  # one channel is the image
        tfm = None if kw is None else ImageNormalize(**kw)
        learn = unet((train,valid), seed, 4, tfm=tfm)
        learn.fit_one_cycle(a.epochs or 2, 3e-4)
        for k,f in SHIFTS.items():
            learn.dls.valid.dataset = [(f(x),m) for x,m in valid]
            loss,dice = learn.validate()
            yield dict(norm=name, images=k, valid_loss=loss, dice=dice)

def labels(x:Tensor, what:str, seed:int) -> tuple[Tensor,Tensor]:
    "Images of two classes that differ only in how bright they are, and the classes"
    y = torch.randint(0, 2, (len(x),), generator=torch.Generator().manual_seed(seed))
    gain = 1-.5*y.view(-1,1,1,1)
    x = x.clone()
    if what == 'all channels': x *= gain
    else: x[:,1:2] *= gain
    return x,y

def intensity(data:str, seed:int, a):
    """Drawn images, of which every second at random has half the brightness: in all channels, or in the protein's
    (green) alone. Which ones?"""
    n = a.images or 1024
    x,_ = drawn_tensors(n+512, 32)
    for what in ('all channels','green alone'):
        xs,y = labels(x, what, seed)
        for name,kw in NORMS.items():
            o,_ = normalised((xs[:n],y[:n]), (xs[n:],y[n:]), kw)
            learn = learner(o, seed, 32)
            learn.fit_one_cycle(a.epochs or 6, 3e-3)
            yield dict(half_as_bright=what, norm=name, train_loss=learn.train_loss.epochs[-1], **score(learn.model, o))

def stretched(x) -> list:
    "Two percentiles of each channel of each image, in NumPy, as csbdeep has it"
    lo,hi = (np.percentile(x, q, axis=(2,3), keepdims=True) for q in (1,99.8))
    return ((x-lo)/(hi-lo+1e-20)).astype('float32')

def ways_of(x:Tensor) -> dict:
    "Ways to normalise the images `x`"
    ways = {
        'F.instance_norm': lambda: F.instance_norm(x.float()),
        'image_normalize(x)': lambda: image_normalize(x),
        "per='image'": lambda: image_normalize(x, 'image'),
        "stat='minmax'": lambda: image_normalize(x, stat='minmax'),
        "stat='percentile'": lambda: image_normalize(x, stat='percentile'),
        "mask='nonzero'": lambda: image_normalize(x, mask='nonzero'),
        'NumPy, two percentiles': lambda: stretched(x.numpy())}
    for theirs in (monai_ways,albumentations_ways,kornia_ways,torchio_ways): ways.update(theirs(x))
    return ways

def monai_ways(x:Tensor) -> dict:
    monai = peer('monai.transforms')
    if monai is None: return {}
    norm = monai.NormalizeIntensity(channel_wise=True)
    return {'MONAI NormalizeIntensity(channel_wise=True)': lambda: [norm(o) for o in x]}

def albumentations_ways(x:Tensor) -> dict:
    alb = peer('albumentations')
    if alb is None: return {}
    peer('cv2').setNumThreads(1)
    images = [o.permute(1,2,0).contiguous().numpy() for o in x]
    def all_by(f): return [f(image=o)['image'] for o in images]
    kinds = 'image_per_channel','image','min_max_per_channel'
    return {f"albumentations Normalize('{k}')":partial(all_by, alb.Normalize(normalization=k)) for k in kinds}

def kornia_ways(x:Tensor) -> dict:
    kornia = peer('kornia.enhance')
    if kornia is None: return {}
    return {'kornia normalize_min_max': lambda: kornia.normalize_min_max(x.float())}

def torchio_ways(x:Tensor) -> dict:
    torchio = peer('torchio')
    if torchio is None: return {}
    znorm = torchio.ZNormalization()
    subjects = [[torchio.ScalarImage(tensor=c[None,:,:,None]) for c in o] for o in x]
    return {'torchio ZNormalization, channel by channel': lambda: [[znorm(c) for c in o] for o in subjects]}

def cost(data:str, seed, a):
    "16 x 3 x 256 x 256, float32 from 0 to 255 and uint8"
    g = torch.Generator().manual_seed(0)
    xs = torch.rand(16,3,256,256, generator=g)*200+50*torch.rand(16,3,1,1, generator=g)
    for dtype,x in ('float32',xs),('uint8',xs.byte()):
        for row in rounds(ways_of(x), 'F.instance_norm', a): yield dict(dtype=dtype, **row)

TABLES = dict(
    exposure=Table(exposure),
    nuclei=Table(nuclei, ('drawn','nuclei')),
    intensity=Table(intensity),
    cost=Table(cost, seeds=None))
