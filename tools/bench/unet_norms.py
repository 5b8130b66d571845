"U-Nets with BN and GroupNorm at 1 to 8 images: Dice, and what the norms cost"
import io
import tempfile
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import (
    CrossEntropyLossFlat, DataLoaders, Dice, Image, Normalize, NormType, ProgressCallback, TensorImage, TensorMask,
    noop, resnet18, set_seed, unet_learner, valley, xresnet18)
from fastai_bn.all import AccumulateGradBN, ActivationPager, LoadHPA, gn_unet_learner, make_hpa
from bench.results import Table, rounds

arch = partial(xresnet18, widen=.5)
VARIANTS = {
    'BN (unet_learner)': unet_learner,
    'BN, in the decoder too (norm_type=NormType.Batch)': partial(unet_learner, norm_type=NormType.Batch),
    "GroupNorm, scope='all'": partial(gn_unet_learner, scope='all'),
    "scope='all', ws=True": partial(gn_unet_learner, scope='all', ws=True),
    "scope='decoder'": partial(gn_unet_learner, scope='decoder'),
    "scope='none'": partial(gn_unet_learner, scope='none'),
    "BN, bn_bs='window' over 8": unet_learner}
WINDOW = list(VARIANTS)[-1]

@lru_cache(2)
def nuclei(folder:Path, n_train:int|None) -> tuple[list,list]:
    "The middle 256 pixels of each field and mask, at half the resolution; every fifth validates"
    def read(f, folder, resample):
        im = Image.open(f.parent.parent/folder/f.name)
        x,y = (im.width-256)//2,(im.height-256)//2
        return np.array(im.crop((x, y, x+256, y+256)).resize((128,128), resample))
    def field(f):
        image = torch.tensor(read(f, 'images', Image.BOX), dtype=torch.float32)[None]/255
        return TensorImage(image),mask_of(read(f, 'labels', Image.NEAREST))
    fs = sorted((folder/'images').glob('*.png'))
    train,valid = ([field(f) for i,f in enumerate(fs) if (i%5 == 0) == v] for v in (False,True))
    return train[:n_train],valid

def mask_of(labels:np.ndarray) -> TensorMask:
    "Nuclei are 1, whatever their number"
    return TensorMask(torch.tensor((labels > 0).astype(np.int64)))

@lru_cache(2)
def drawn(n_train:int|None, size:int=64) -> tuple[list,list]:
    "Drawn images without their channel of nuclei, and the mask of these"
    n_train,n_valid = n_train or 128,48
    with tempfile.TemporaryDirectory() as d, redirect_stdout(io.StringIO()):
        make_hpa(d, n_train+n_valid, size, masks=True)
        load,ids = LoadHPA(Path(d)/'train', size, 'rgy'),sorted(f.stem for f in Path(d).glob('masks/*.png'))
        masks = [mask_of(np.array(Image.open(f'{d}/masks/{i}.png'))) for i in ids]
        items = [(TensorImage(load(i).as_subclass(torch.Tensor)), mask) for i,mask in zip(ids, masks)]
    return items[:n_train],items[n_train:]

def fields(data:str, a) -> tuple[list,list]:
    "Fields of nuclei and their masks, to train and to validate with"
    return drawn(a.images) if data == 'drawn' else nuclei(a.nuclei, a.images)

def unet(items:tuple, seed:int, bs:int, make=unet_learner, cbs=(), tfm=None):
    """An XResNet-18 of half width with a U-Net's decoder, from scratch.

    Images by the training images' own mean and standard deviation, or `tfm`"""
    set_seed(seed)
    xs = torch.stack([x for x,_ in items[0]]).as_subclass(torch.Tensor)
    stats = [f(xs, (0,2,3)).tolist() for f in (torch.mean,torch.std)]
    tfm = tfm or Normalize.from_stats(*stats, cuda=False)
    dls = DataLoaders.from_dsets(*items, bs=bs, val_bs=8, after_batch=[tfm], num_workers=0, device='cpu')
    learn = make(dls, arch, n_in=xs.shape[1], n_out=2, pretrained=False, normalize=False, last_cross=False,
                 loss_func=CrossEntropyLossFlat(axis=1), metrics=Dice(), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def found_lr(items:tuple, **kw) -> float:
    "The learning rate that lr_find gives at 4 images"
    return unet(items, 0, 4, **kw).lr_find(num_it=60, show_plot=False, suggest_funcs=(valley,)).valley

def dice(data:str, seed:int, a):
    """Two epochs of one-cycle at 1, 2, 4 and 8 images; each variant with the learning rate that lr_find gives it at 4,
    times the root of the batch over 4"""
    items = fields(data, a)
    for name,make in VARIANTS.items():
        lr = found_lr(items, make=make)
        for bs in (8,) if name == WINDOW else (1,2,4,8):
            n_step = 4 if name == WINDOW else 1
            cbs = AccumulateGradBN(n_step, bn_bs='window', last='drop') if n_step > 1 else ()
            learn = unet(items, seed, bs//n_step, make, cbs)
            learn.fit_one_cycle(a.epochs or 2, lr*(bs/4)**.5)
            train = torch.stack(learn.recorder.losses[-20:]).mean().item()
            loss,score = learn.validate()
            yield dict(norm=name, bs=bs, lr=lr, train_loss=train, valid_loss=loss, dice=score)

def gn_name(scope:str, ws:bool) -> str: return f"gn_unet_learner(scope='{scope}'{', ws=True'*ws})"

KINDS = [('none',False), ('decoder',False), ('decoder',True), ('all',False), ('all',True)]
COSTS = {
    'unet_learner': unet_learner,
    'unet_learner(norm_type=NormType.Batch)': partial(unet_learner, norm_type=NormType.Batch),
    **{gn_name(s, ws):partial(gn_unet_learner, scope=s, ws=ws) for s,ws in KINDS}}

def keys_of(*kinds:str) -> set:
    "The profiler's names of operators, forward and backward"
    return {f'aten::{native}{k}{end}' for k in kinds for native in ('','native_') for end in ('','_backward')}

def share(events, *kinds:str) -> float:
    "The share of the time that operators take"
    keys = keys_of(*kinds)
    own = sum(e.self_cpu_time_total for e in events if e.key in keys)
    return own/sum(e.self_cpu_time_total for e in events)

def cost(data:str, seed, a):
    """Forward, loss and backward of a U-Net with a ResNet-18 and each norm, beside `unet_learner`; share of the time
    that norms and standardised weights take; peak of what a step makes"""
    bs,size = 2,128
    x,y = torch.randn(bs, 3, size, size),torch.randint(0, 2, (bs,size,size))
    items = [(x[0],y[0])]*bs
    dls = DataLoaders.from_dsets(items, items, bs=bs, num_workers=0, device='cpu')
    loss_func = CrossEntropyLossFlat(axis=1)
    kw = dict(pretrained=False, n_out=2, loss_func=loss_func)
    models = {k:make(dls, resnet18, **kw).model.train() for k,make in COSTS.items()}
    def step(m): loss_func(m(x), y).backward()
    for row in rounds({k:partial(step, m) for k,m in models.items()}, 'unet_learner', a):
        m,pager = models[row['way']],ActivationPager(None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: step(m)
        with pager: step(m)
        events = p.key_averages()
        yield {**row, 'norms':share(events, 'batch_norm', 'group_norm'), 'weights':share(events, 'layer_norm'),
               'peak_MiB':pager.peak/2**20}

TABLES = dict(dice=Table(dice, ('drawn','nuclei')), cost=Table(cost, seeds=None))
