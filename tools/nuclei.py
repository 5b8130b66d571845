"""U-Nets on real nuclei: `python tools/nuclei.py FOLDER VARIANT --seed 0`. Writes a JSON line per batch size: the Dice on the validation images.

`FOLDER` holds images/{id}.png and labels/{id}.png, a label above 0 is nucleus (DSB 2018 stage 1, fluorescence; 345 + 86 fields). Squares of 256 pixels from the middle,
shown at 128; an XResNet-18 of half width from scratch without the cross connection, two epochs of one-cycle. Every variant has the learning rate that `lr_find` gives it at a
batch of 4, times the root of the batch over 4. One thread: 8 minutes a seed and variant.

image_norm: fastai's, with `ImageNormalize` in place of the training set's mean and standard deviation; window: `AccumulateGradBN` with 4 x 2 images, BN over 8."""
import argparse, json, warnings
warnings.filterwarnings('ignore')
from pathlib import Path

import numpy as np, torch
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Dice, Image, Normalize, ProgressCallback, TensorImage, TensorMask, noop, partial, set_seed,
                               unet_learner, valley, xresnet18)
from fastai_bn.all import AccumulateGradBN, ImageNormalize, gn_unet_learner

arch = partial(xresnet18, widen=.5)
VARIANTS = dict(fastai=unet_learner, all=partial(gn_unet_learner, scope='all'), all_ws=partial(gn_unet_learner, scope='all', ws=True),
                decoder=partial(gn_unet_learner, scope='decoder'), decoder_ws=partial(gn_unet_learner, scope='decoder', ws=True),
                none=partial(gn_unet_learner, scope='none'), window=unet_learner, image_norm=unet_learner)
BATCHES = dict(window=[8], image_norm=[4])

def field(f:Path):
    "The middle 256 pixels of an image and its mask, at half the resolution"
    im,mask = (Image.open(f.parent.parent/d/f.name) for d in ('images','labels'))
    x,y = (im.width-256)//2,(im.height-256)//2
    im,mask = (np.array(o.crop((x, y, x+256, y+256)).resize((128,128), r)) for o,r in ((im,Image.BOX),(mask,Image.NEAREST)))
    return TensorImage(torch.tensor(im, dtype=torch.float32)[None]/255),TensorMask(torch.tensor((mask > 0).astype(np.int64)))

def get_dls(path, bs:int, tfms=None):
    "Every fifth image is for validation; `tfms` or the training images' own mean and standard deviation"
    fs = sorted((Path(path)/'images').glob('*.png'))
    train,valid = ([field(f) for i,f in enumerate(fs) if (i%5 == 0) == v] for v in (False,True))
    xs = torch.stack([x for x,_ in train]).as_subclass(torch.Tensor)
    return DataLoaders.from_dsets(train, valid, bs=bs, val_bs=8, after_batch=tfms or [Normalize.from_stats([xs.mean().item()], [xs.std().item()], cuda=False)], num_workers=0, device='cpu')

def learner(a, bs:int, cbs=()):
    set_seed(a.seed)
    learn = VARIANTS[a.variant](get_dls(a.path, bs, [ImageNormalize()] if a.variant == 'image_norm' else None), arch, n_in=1, n_out=2, pretrained=False, normalize=False, last_cross=False, loss_func=CrossEntropyLossFlat(axis=1),
                                metrics=Dice(), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def main(a):
    torch.set_num_threads(1)
    lr = learner(argparse.Namespace(**{**vars(a), 'seed':0}), 4).lr_find(num_it=60, show_plot=False, suggest_funcs=(valley,)).valley
    for bs in BATCHES.get(a.variant, a.bs):
        learn = learner(a, bs) if a.variant != 'window' else learner(a, 2, AccumulateGradBN(4, bn_bs='window', last='drop'))
        learn.fit_one_cycle(a.epochs, lr*(bs/4)**.5)
        train = torch.stack(learn.recorder.losses[-20:]).mean().item()
        loss,dice = learn.validate()
        print(json.dumps(dict(variant=a.variant, bs=bs, seed=a.seed, lr=round(lr, 6), dice=round(dice, 4), loss=round(loss, 4), train=round(train, 4))), flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('path', type=Path)
    p.add_argument('variant', choices=VARIANTS)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--bs', type=int, nargs='+', default=[1,2,4,8])
    p.add_argument('--epochs', type=int, default=2)
    main(p.parse_args())
