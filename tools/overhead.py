"""What the callback and precise_bn cost: `python tools/overhead.py`. Ratios are medians of pairs measured one after the other.

1. A training step of resnet18 (bs 4, 96 px) with AccumulateGradBN against fastai's GradientAccumulation.
2. precise_bn against a plain forward pass without gradients over the same batches, bs 4 and 32."""
import cProfile, platform, pstats, statistics, time, warnings
warnings.filterwarnings('ignore')

import torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, GradientAccumulation, Learner, no_random, resnet18
from fastai_bn.all import AccumulateGradBN, precise_bn

torch.set_num_threads(2)
N_STEP, N_BATCH, PAIRS = 8, 32, 15
batches = [(torch.randn(4,3,96,96), torch.randint(0,10,(4,))) for _ in range(N_BATCH)]
class Batches(list): device = torch.device('cpu')

def timed(f):
    t = time.perf_counter(); f()
    return time.perf_counter()-t

def learner(cb):
    dls = DataLoaders(Batches(batches), Batches(batches[:1]), device='cpu')
    with no_random(): model = resnet18(weights=None, num_classes=10)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cb)
    learn.remove_cbs([c for c in learn.cbs if c.name=='progress'])
    learn.logger = lambda *_: None
    return learn

def quartiles(xs): return [round(o, 3) for o in statistics.quantiles(xs, n=4)]

def own_time(f):
    "Seconds in fastai_bn's functions, in contextlib, and in the native operations that these call"
    prof = cProfile.Profile(); prof.runcall(f)
    ours = lambda k: '/fastai_bn/' in k[0] or k[0].endswith('contextlib.py') or 'torch/utils/_contextlib.py' in k[0]
    total = 0
    for k,(_,_,tt,_,callers) in pstats.Stats(prof).stats.items():
        if ours(k): total += tt
        elif k[0] == '~': total += sum(v[2] for c,v in callers.items() if ours(c))
    return total

if __name__ == '__main__':
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}')
    ga,ours = learner(GradientAccumulation(4*N_STEP)),learner(AccumulateGradBN(N_STEP))
    for l in (ga,ours): l.fit(1)
    pairs = [(timed(lambda: ga.fit(1)), timed(lambda: ours.fit(1))) for _ in range(PAIRS)]
    step = statistics.median(o for _,o in pairs)/N_BATCH
    own = own_time(lambda: ours.fit(1))/N_BATCH
    print(f'AccumulateGradBN / GradientAccumulation: quartiles of {PAIRS} ratios {quartiles([b/a for a,b in pairs])}; '
          f'own time {own*1e3:.2f} ms of a step of {step*1e3:.1f} ms (profiled): {100*own/step:.2f} %')
    for bs in (4,32):
        model,xs = resnet18(weights=None, num_classes=10),torch.randn(max(256,8*bs),3,96,96).split(bs)
        model.train()
        def plain():
            with torch.no_grad():
                for x in xs: model(x)
        precise = lambda: precise_bn(model, xs, progress=False)
        plain(); precise()
        r = [(timed(plain), timed(precise)) for _ in range(PAIRS)]
        print(f'precise_bn / plain forward, bs {bs}, {len(xs)} batches: quartiles of {PAIRS} ratios {quartiles([b/a for a,b in r])}')
