"""What GroupNorm costs in a U-Net: `python tools/unet.py`. Forward, loss and backward of fastai's `unet_learner(dls, resnet18)` and of each variant, in turn; medians and
quartiles of the ratios, the norms' own share by profile, and the peak of activations and other tensors that a step makes, parameters and their gradients apart."""
import argparse, gc, time, warnings
warnings.filterwarnings('ignore')
from functools import partial

import numpy as np, torch
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, NormType, resnet18, unet_learner
from fastai_bn.all import ActivationPager, gn_unet_learner

gn = partial(gn_unet_learner, num_groups=32)
VARIANTS = {'unet_learner': unet_learner, 'unet_learner(norm_type=NormType.Batch)': partial(unet_learner, norm_type=NormType.Batch), "scope='none'": partial(gn, scope='none'),
            "scope='decoder'": partial(gn, scope='decoder'), "scope='decoder', ws=True": partial(gn, scope='decoder', ws=True), "scope='all'": partial(gn, scope='all'),
            "scope='all', ws=True": partial(gn, scope='all', ws=True)}

def step(model, x, y):
    CrossEntropyLossFlat(axis=1)(model(x), y).backward()

def timed(model, x, y) -> float:
    t = time.perf_counter()
    step(model, x, y)
    return time.perf_counter()-t

def peak(model, x, y) -> float:
    "MiB"
    with (pager := ActivationPager(None)): step(model, x, y)
    return pager.peak/2**20

def share(model, x, y) -> tuple[float,float]:
    "Of the step's time: normalisation, and standardising weights, which is layer_norm"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: step(model, x, y)
    evs = p.key_averages()
    t = [sum(e.self_cpu_time_total for e in evs if e.key.startswith(tuple(o for k in ks for o in (f'aten::{k}', f'aten::native_{k}')))) for ks in (('batch_norm','group_norm'),('layer_norm',))]
    total = sum(e.self_cpu_time_total for e in evs)
    return t[0]/total,t[1]/total

def main(a):
    torch.set_num_threads(a.threads)
    x,y = torch.randn(a.bs, 3, a.size, a.size),torch.randint(0, 2, (a.bs, a.size, a.size))
    dls = DataLoaders.from_dsets([(x[0],y[0])]*a.bs, [(x[0],y[0])]*a.bs, bs=a.bs, num_workers=0, device='cpu')
    get = lambda make: make(dls, resnet18, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(axis=1)).model.train()
    base = get(unet_learner)
    timed(base, x, y)
    for name,make in VARIANTS.items():
        m = get(make)
        timed(m, x, y)
        ts = np.array([(timed(base, x, y), timed(m, x, y)) if i%2 else (timed(m, x, y), timed(base, x, y))[::-1] for i in range(a.n)])
        q = np.percentile(ts[:,1]/ts[:,0], (25,50,75))
        norm,ws = share(m, x, y)
        print(f'{name:40} {np.median(ts[:,1]):.3f} s  ratio {q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})  norms {100*norm:.1f} %  weights {100*ws:.1f} %  peak {peak(m, x, y):.0f} MiB', flush=True)
        del m; gc.collect()

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bs', type=int, default=2)
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('-n', type=int, default=9, help='pairs')
    main(p.parse_args())
