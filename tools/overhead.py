"""What the callback and precise_bn cost: `python tools/overhead.py`. Ratios are medians of pairs measured one after the other.

1. A training step of resnet18 (bs 4, 96 px) with AccumulateGradBN against fastai's GradientAccumulation.
2. precise_bn against a plain forward pass without gradients over the same batches, and fvcore's update_bn_stats where it is installed."""
import cProfile, platform, pstats, statistics, time, warnings
warnings.filterwarnings('ignore')

import torch
from torch import nn
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, DynamicUnet, GradientAccumulation, Learner, create_body, no_random, resnet18
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
    try: from fvcore.nn.precise_bn import update_bn_stats  # pip install fvcore
    except ImportError: update_bn_stats = None
    def compare(name, model, xs, pairs=PAIRS):
        "precise_bn and fvcore's update_bn_stats against a plain forward pass, one after the other"
        model.train()
        def plain():
            with torch.no_grad():
                for x in xs: model(x)
        ways = [plain, lambda: precise_bn(model, xs, progress=False)]
        if update_bn_stats: ways.append(lambda: update_bn_stats(model, xs, len(xs)))
        for f in ways: f()
        r = [[timed(f) for f in ways] for _ in range(pairs)]
        print(f'{name}, {len(xs)} batches: quartiles of {pairs} ratios to a plain forward pass: precise_bn {quartiles([o[1]/o[0] for o in r])}'
              + (f', fvcore {quartiles([o[2]/o[0] for o in r])}' if update_bn_stats else ''))
    for bs in (4,32): compare(f'resnet18 96 px, bs {bs}', resnet18(weights=None, num_classes=10), torch.randn(max(256,8*bs),3,96,96).split(bs))
    unet = DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (96,96))
    compare('U-Net (resnet18) 96 px, bs 4', unet, torch.randn(64,3,96,96).split(4), 7)
    head = nn.Sequential(create_body(resnet18(weights=None), cut=-2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048,8192), nn.ReLU(), nn.Linear(8192,8192), nn.ReLU(), nn.Linear(8192,10))
    compare('resnet18 with a head of 84 million weights without BN, 96 px, bs 4', head, torch.randn(64,3,96,96).split(4), 7)
