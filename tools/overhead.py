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
batches = []
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

def profiled(f):
    "Milliseconds by cProfile (which slows Python down): in fastai_bn and contextlib with the native operations they call, and in all"
    prof = cProfile.Profile(); prof.runcall(f)
    ours = lambda k: '/fastai_bn/' in k[0] or k[0].endswith('contextlib.py')
    st = pstats.Stats(prof)
    own = sum(tt if ours(k) else sum(v[2] for c,v in callers.items() if ours(c)) if k[0]=='~' else 0 for k,(_,_,tt,_,callers) in st.stats.items())
    return own/N_BATCH*1e3,st.total_tt/N_BATCH*1e3

if __name__ == '__main__':
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}')
    for size in (96,8):  # at 8 px there is little but Python, the same as at 96 px: there the difference is sharp
        batches[:] = [(torch.randn(4,3,size,size), torch.randint(0,10,(4,))) for _ in range(N_BATCH)]
        ga,ours = learner(GradientAccumulation(4*N_STEP)),learner(AccumulateGradBN(N_STEP))
        for l in (ga,ours): l.fit(1)
        pairs = [(timed(lambda: ga.fit(1)), timed(lambda: ours.fit(1))) for _ in range(PAIRS)]
        print(f'{size} px: AccumulateGradBN / GradientAccumulation, quartiles of {PAIRS} ratios: {quartiles([b/a for a,b in pairs])}; '
              f'median step {statistics.median(a for a,_ in pairs)/N_BATCH*1e3:.1f} ms, median difference {statistics.median(b-a for a,b in pairs)/N_BATCH*1e3:.2f} ms; '
              'by cProfile %.2f ms of %.1f ms' % profiled(lambda: ours.fit(1)))
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
