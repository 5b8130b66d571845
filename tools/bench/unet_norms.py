"U-Nets with BN and GroupNorm at 1 to 8 images: Dice, and what the norms cost"
import io, tempfile
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path

import numpy as np, torch
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Dice, Image, Normalize, NormType, ProgressCallback, TensorImage, TensorMask, noop, resnet18, set_seed,
                               unet_learner, valley, xresnet18)
from fastai_bn.all import AccumulateGradBN, ActivationPager, LoadHPA, gn_unet_learner, make_hpa
from bench.results import Table, rounds

arch = partial(xresnet18, widen=.5)
VARIANTS = {'BN (unet_learner)':unet_learner, 'BN, in the decoder too (norm_type=NormType.Batch)':partial(unet_learner, norm_type=NormType.Batch), "GroupNorm, scope='all'":partial(gn_unet_learner, scope='all'), "scope='all', ws=True":partial(gn_unet_learner, scope='all', ws=True),
            "scope='decoder'":partial(gn_unet_learner, scope='decoder'), "scope='none'":partial(gn_unet_learner, scope='none'), "BN, bn_bs='window' over 8":unet_learner}
WINDOW = list(VARIANTS)[-1]

@lru_cache(2)
def nuclei(folder:Path, n_train:int|None) -> tuple[list,list]:
    "The middle 256 pixels of each field and mask, at half the resolution; every fifth validates"
    def field(f):
        im,mask = (Image.open(f.parent.parent/d/f.name) for d in ('images','labels'))
        x,y = (im.width-256)//2,(im.height-256)//2
        im,mask = (np.array(o.crop((x, y, x+256, y+256)).resize((128,128), r)) for o,r in ((im,Image.BOX),(mask,Image.NEAREST)))
        return TensorImage(torch.tensor(im, dtype=torch.float32)[None]/255),TensorMask(torch.tensor((mask > 0).astype(np.int64)))
    fs = sorted((folder/'images').glob('*.png'))
    train,valid = ([field(f) for i,f in enumerate(fs) if (i%5 == 0) == v] for v in (False,True))
    return train[:n_train],valid

@lru_cache(2)
def drawn(n_train:int|None, size:int=64) -> tuple[list,list]:
    "Drawn images without their channel of nuclei, and the mask of these"
    n_train,n_valid = n_train or 128,48
    with tempfile.TemporaryDirectory() as d, redirect_stdout(io.StringIO()):
        make_hpa(d, n_train+n_valid, size, masks=True)
        load,ids = LoadHPA(Path(d)/'train', size, 'rgy'),sorted(f.stem for f in Path(d).glob('masks/*.png'))
        items = [(TensorImage(load(i).as_subclass(torch.Tensor)), TensorMask(torch.tensor((np.array(Image.open(f'{d}/masks/{i}.png')) > 0).astype(np.int64)))) for i in ids]
    return items[:n_train],items[n_train:]

def fields(data:str, a) -> tuple[list,list]: return drawn(a.images) if data == 'drawn' else nuclei(a.nuclei, a.images)

def unet(items:tuple, seed:int, bs:int, make=unet_learner, cbs=(), tfm=None):
    "An XResNet-18 of half width with a U-Net's decoder, from scratch; images by the training images' own mean and standard deviation, or `tfm`"
    set_seed(seed)
    xs = torch.stack([x for x,_ in items[0]]).as_subclass(torch.Tensor)
    stats = [f(xs, (0,2,3)).tolist() for f in (torch.mean,torch.std)]
    dls = DataLoaders.from_dsets(*items, bs=bs, val_bs=8, after_batch=[tfm or Normalize.from_stats(*stats, cuda=False)], num_workers=0, device='cpu')
    learn = make(dls, arch, n_in=xs.shape[1], n_out=2, pretrained=False, normalize=False, last_cross=False, loss_func=CrossEntropyLossFlat(axis=1), metrics=Dice(), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def found_lr(items:tuple, **kw) -> float: return unet(items, 0, 4, **kw).lr_find(num_it=60, show_plot=False, suggest_funcs=(valley,)).valley

def dice(data:str, seed:int, a):
    "Two epochs of one-cycle at 1, 2, 4 and 8 images; each variant with the learning rate that lr_find gives it at 4, times the root of the batch over 4"
    items = fields(data, a)
    for name,make in VARIANTS.items():
        lr = found_lr(items, make=make)
        for bs in (8,) if name == WINDOW else (1,2,4,8):
            learn = unet(items, seed, bs, make) if name != WINDOW else unet(items, seed, 2, make, AccumulateGradBN(4, bn_bs='window', last='drop'))
            learn.fit_one_cycle(a.epochs or 2, lr*(bs/4)**.5)
            train = torch.stack(learn.recorder.losses[-20:]).mean().item()
            loss,score = learn.validate()
            yield dict(norm=name, bs=bs, lr=lr, train_loss=train, valid_loss=loss, dice=score)

COSTS = {'unet_learner':unet_learner, 'unet_learner(norm_type=NormType.Batch)':partial(unet_learner, norm_type=NormType.Batch),
         **{f"gn_unet_learner(scope='{s}'{', ws=True'*ws})":partial(gn_unet_learner, scope=s, ws=ws) for s in ('none','decoder','all') for ws in (False,True) if (s,ws) != ('none',True)}}

def cost(data:str, seed, a):
    "Forward, loss and backward of a U-Net with a ResNet-18 and each norm, beside `unet_learner`; share of the time that norms and standardised weights take; peak of what a step makes"
    bs,size = 2,128
    x,y = torch.randn(bs, 3, size, size),torch.randint(0, 2, (bs,size,size))
    dls = DataLoaders.from_dsets([(x[0],y[0])]*bs, [(x[0],y[0])]*bs, bs=bs, num_workers=0, device='cpu')
    models = {k:make(dls, resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1)).model.train() for k,make in COSTS.items()}
    step = lambda m: CrossEntropyLossFlat(axis=1)(m(x), y).backward()
    for row in rounds({k:partial(step, m) for k,m in models.items()}, 'unet_learner', a):
        m = models[row['way']]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: step(m)
        evs = p.key_averages()
        share = lambda *ks: sum(e.self_cpu_time_total for e in evs if e.key in [f'aten::{q}{k}{b}' for k in ks for q in ('','native_') for b in ('','_backward')])/sum(e.self_cpu_time_total for e in evs)
        with (pager := ActivationPager(None)): step(m)
        yield {**row, 'norms':share('batch_norm','group_norm'), 'weights':share('layer_norm'), 'peak_MiB':pager.peak/2**20}

TABLES = dict(dice=Table(dice, ('drawn','nuclei')), cost=Table(cost, seeds=None))
