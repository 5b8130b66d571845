"""The README's measurements on HEp-2 cells: `python tools/hep2.py ways FOLDER --seed 0`, or `precise`. Writes a JSON line per result.

`FOLDER` holds train/ and valid/ with a folder per class (ICPR 2014: 8,705 + 2,175 images, 78 px, shown at 64). One thread: 40 minutes and an hour.

ways: three epochs of one recipe with the BN batch made in six ways; two that are the same training end with the same hash of all weights.
precise: validation by epoch with the moving averages and with precise statistics; a shift of brightness and contrast, before and after AdaBN."""
import argparse, hashlib, json, warnings
warnings.filterwarnings('ignore')

import torch
from fastai.vision.all import Callback, F, GradientAccumulation, Tensor, set_seed
from fastai_bn import demo
from fastai_bn.all import AccumulateGradBN, bn_state, load_bn_state, precise_bn

WAYS = {'batch 32': (32, None), '2 x 16, GradientAccumulation': (2, lambda: GradientAccumulation(32)), '2 x 16, AccumulateGradBN(16)': (2, lambda: AccumulateGradBN(16)),
        "2 x 16, bn_bs='window'": (2, lambda: AccumulateGradBN(16, bn_bs='window', last='drop')), "1 x 32, bn_bs='window'": (1, lambda: AccumulateGradBN(32, bn_bs='window', last='drop')),
        '2 x 16, bn_bs=8': (2, lambda: AccumulateGradBN(16, bn_bs=8, last='drop'))}
SHIFTS = {'none': lambda x: x, 'darker': lambda x: .3*x, 'brighter': lambda x: .4*x+.5}

def show(**kw): print(json.dumps(kw), flush=True)

@torch.no_grad()
def score(learn, f=lambda x: x) -> tuple[float,float]:
    "Loss and accuracy on the validation images, changed by `f`"
    learn.model.eval()
    loss = hits = n = 0
    for x,y in learn.dls.valid:
        p,y = learn.model(f(x.as_subclass(Tensor))),y.as_subclass(Tensor)
        loss,hits,n = loss+F.cross_entropy(p, y, reduction='sum').item(),hits+(p.argmax(1)==y).sum().item(),n+len(y)
    return loss/n,hits/n

def fit(a, bs:int, cbs=()):
    set_seed(a.seed)
    learn = demo._learner(demo._dls(a, bs), [])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr, cbs=cbs)
    return learn

def ways(a):
    for name,(bs,cb) in WAYS.items():
        learn = fit(a, bs, [log := demo._Log(), *([cb()] if cb else [])])
        sha = hashlib.sha256(b''.join(o.contiguous().numpy().tobytes() for o in learn.model.state_dict().values())).hexdigest()
        show(way=name, seed=a.seed, train=log.losses[-1], valid=score(learn), sha=sha[:12])

class ByEpoch(Callback):
    "Validates with the moving averages, with precise statistics at the DataLoader's batch and at 64"
    order = 70
    def after_epoch(self):
        learn,own = self.learn,bn_state(self.model)
        res = dict(ema=score(learn))
        for name,bn_bs in ('precise',None),('precise, bn_bs=64',64):
            learn.precise_bn(bn_bs=bn_bs)
            res[name] = score(learn)
            load_bn_state(self.model, own)
        show(bs=self.dls.bs, seed=self.seed, epoch=self.epoch, **res)

def precise(a):
    for bs in (2,32,256):
        cb = ByEpoch(); cb.seed = a.seed
        learn = fit(a, bs, cb)
        with learn.no_bar(): learn.precise_bn()
        own = bn_state(learn.model)
        for name,f in SHIFTS.items():
            before = score(learn, f)
            precise_bn(learn.model, [f(x.as_subclass(Tensor)) for x,_ in learn.dls.valid], bn_bs=64, progress=False)
            show(bs=bs, seed=a.seed, shift=name, before=before, adabn=score(learn, f))
            load_bn_state(learn.model, own)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('ways','precise')); p.add_argument('folder'); p.add_argument('--seed', type=int, default=0); p.add_argument('--epochs', default='3')
    a = p.parse_args()
    torch.set_num_threads(1)
    globals()[a.what](demo.parser().parse_args(['--images', a.folder, '--epochs', a.epochs, '--seed', str(a.seed)]))
