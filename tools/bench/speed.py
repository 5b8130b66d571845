"What each part costs beside its peers: seconds side by side, memory, exactness"
import warnings
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18, resnet50
from fastai.basics import DataLoaders, Learner, noop, no_random
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import GradientAccumulation, create_body
from fastai_bn.all import AccumulateGradBN, MicroBatched, bn_to_gn, precise_bn
from bench.common import peer
from bench.memory import by_hand, lockstep_seconds, memory, modelled, repeated, unet, windows
from bench.results import Table, rounds

warnings.filterwarnings('ignore', '.*(A budget on the CPU|alone needs)')

# Training steps

class Batches(list): device = torch.device('cpu')

def fit(model:nn.Module, batches:list, cbs):
    "One epoch as a function without arguments"
    dls = DataLoaders(Batches(batches), Batches(batches[:1]), device='cpu')
    learn = Learner(dls, model, loss_func=F.cross_entropy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return lambda: learn.fit(1)

def batches(n:int, bs:int, ni:int, size:int, n_out:int=10) -> list:
    return [(torch.randn(bs,ni,size,size), torch.randint(0, n_out, (bs,))) for _ in range(n)]

def per_step(rows:list, n:int, base:str) -> list:
    "Milliseconds of a micro-batch, and how many more than `base`"
    seconds = {r['way']:r['seconds'] for r in rows}
    res = []
    for r in rows:
        s = r.pop('seconds')
        res.append(dict(way=r.pop('way'), ms=1e3*s/n, more_ms=1e3*(s-seconds[base])/n, **r))
    return res

def steps(data, seed, a):
    """A ResNet-18, 4 images of 96 pixels (and of 8, where there is little but Python), steps of 8 micro-batches, by
    fastai's Learner; epochs of 16"""
    n,n_step,bs = 16,8,4
    with no_random(): model = resnet18(weights=None, num_classes=10)
    for size in (96,8):
        ways = step_ways(model, batches(n, bs, 3, size), n_step, bs)
        for row in per_step(rounds(ways, 'GradientAccumulation', a), n, 'GradientAccumulation'):
            yield dict(pixels=size, **row)

def step_ways(model:nn.Module, bl:list, n_step:int, bs:int) -> dict:
    "Epochs of `bl` with copies of `model`"
    def plain(m): return fit(m, bl, GradientAccumulation(bs*n_step))
    def ours(**kw): return fit(deepcopy(model), bl, AccumulateGradBN(n_step, **kw))
    ways = {
        'GradientAccumulation': plain(deepcopy(model)),
        'AccumulateGradBN': ours(),
        "AccumulateGradBN(bn_bs='window')": ours(bn_bs='window'),
        "AccumulateGradBN(bn_bs='window', micro_bs=4)": ours(bn_bs='window', micro_bs=4),
        'GradientAccumulation, SyncBatchNorm of one process':
            plain(nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(model)))}
    deferred = peer('torchgpipe.batchnorm')
    if deferred:
        converted = deferred.DeferredBatchNorm.convert_deferred_batch_norm(deepcopy(model), n_step)
        ways["GradientAccumulation, torchgpipe's DeferredBatchNorm"] = plain(converted)
    return ways

def scaling(data, seed, a):
    """What AccumulateGradBN adds to a micro-batch of GradientAccumulation, by micro-batches per step, channels and
    depth of a plain convolutional net (2 images of 8 pixels)"""
    for what,sizes in dict(n_step=(2,8,32,128), channels=(16,64,256), layers=(4,16,64)).items():
        for k in sizes:
            kw = {**dict(n_step=8, channels=32, layers=8), what:k}
            n_step = kw['n_step']
            n,model = max(32, n_step),convolutions(kw['channels'], kw['layers'])
            bl = batches(n, 2, 3, 8)
            ways = {'GradientAccumulation': fit(deepcopy(model), bl, GradientAccumulation(2*n_step)),
                    'AccumulateGradBN': fit(model, bl, AccumulateGradBN(n_step))}
            rows = rounds(ways, 'GradientAccumulation', a)
            yield dict(varied=what, size=k, **per_step(rows, n, 'GradientAccumulation')[1])

def convolutions(nf:int, n_layers:int) -> nn.Module:
    "A plain convolutional net"
    def conv(): return nn.Conv2d(nf,nf,3,padding=1,bias=False)
    layers = repeated(n_layers, conv, lambda: nn.BatchNorm2d(nf), nn.ReLU)
    return nn.Sequential(nn.Conv2d(3, nf, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf,10))

# Population statistics

def heavy_head() -> nn.Module:
    "A net with 84 million weights behind the last BN"
    body = create_body(resnet18(weights=None), cut=-2)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048,8192), nn.ReLU(), nn.Linear(8192,8192), nn.ReLU(),
            nn.Linear(8192,10)]
    return nn.Sequential(body, *head)

def population(data, seed, a):
    "Statistics of all samples, beside a forward pass without gradients over the same batches"
    nets = {
        'ResNet-18, bs 4': (resnet18(num_classes=10), 64, 4),
        'ResNet-18, bs 32': (resnet18(num_classes=10), 128, 32),
        'U-Net (ResNet-18), bs 4': (unet(96), 24, 4),
        '84 million weights behind the last BN, bs 4': (heavy_head(), 32, 4)}
    for name,(model,n,bs) in nets.items():
        xs = torch.randn(n,3,96,96).split(bs)
        for row in rounds(population_ways(model.train(), xs), 'forward pass', a): yield dict(net=name, **row)

def population_ways(model:nn.Module, xs:tuple) -> dict:
    "Passes over the batches `xs`"
    @torch.no_grad()
    def forward():
        for x in xs: model(x)
    @torch.no_grad()
    def torch_update(): update_bn(xs, model)
    ways = {
        'forward pass': forward,
        'precise_bn': lambda: precise_bn(model, xs, progress=False),
        'torch update_bn': torch_update}
    fvcore = peer('fvcore.nn.precise_bn')
    if fvcore: ways['fvcore update_bn_stats'] = lambda: fvcore.update_bn_stats(model, xs, len(xs), progress='none')
    return ways

def tilted(n:int, dtype) -> Tensor:
    "Samples that differ in mean and scale, in an order: the first are dark, the last bright"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n,3,6,6, dtype=dtype, generator=g)*torch.rand(n,1,1,1, dtype=dtype, generator=g)
    return x + torch.linspace(-2, 2, n, dtype=dtype).view(-1,1,1,1)

SIZES = {'bs 1':[1]*64, 'bs 2':[2]*32, 'bs 2, last 1':[2]*32+[1], 'bs 32, last 5':[32,32,5], 'uneven':[5,1,16,2,40]}

def error(got:Tensor, want:np.ndarray, unit:np.ndarray) -> float:
    "The largest error in a unit"
    return float(np.max(np.abs(got.double().numpy()-want)/unit))

def exact(data, seed, a):
    """Largest error of the first BN layer's statistics against NumPy's of all samples: of the mean in standard
    deviations, of the unbiased variance relative"""
    fvcore = peer('fvcore.nn.precise_bn')
    ways = {
        'precise_bn': lambda m,xs: precise_bn(m, xs, progress=False),
        'torch update_bn': lambda m,xs: update_bn(xs, m)}
    if fvcore:
        ways['fvcore update_bn_stats'] = lambda m,xs: fvcore.update_bn_stats(m, xs, len(xs), progress='none')
    far = torch.randn(500,3,4,4, generator=torch.Generator().manual_seed(0))+5000
    cases = {
        **{f'float64, tilted, {k}':(tilted(sum(s), torch.float64), s) for k,s in SIZES.items()},
        'float32, mean 5000, std 1, bs 2': (far, [2]*250),
        'float32, mean 5000, std 1, bs 32': (far, [32]*15+[20])}
    for case,(x,sizes) in cases.items():
        v = np.ascontiguousarray(x.double().numpy().swapaxes(0, 1).reshape(x.shape[1], -1))
        mean,var = v.mean(1),v.var(1, ddof=1)
        for name,f in ways.items():
            m = nn.Sequential(nn.BatchNorm2d(3)).to(x.dtype).train()
            f(m, list(x.split(sizes)))
            yield dict(samples=case, way=name, mean_error=error(m[0].running_mean, mean, var**.5),
                       var_error=error(m[0].running_var, var, var))

# Lock step

def small(conv, bn) -> nn.Module:
    "Three convolutions and two BN layers, of any number of dimensions"
    layers = [conv(3,8,3), bn(8), nn.ReLU(), conv(8,8,3), bn(8, momentum=None), nn.ReLU(), conv(8,10,1)]
    return nn.Sequential(*layers)

def exact_nets() -> dict:
    "How nets are made, and the size of their images"
    nets = {
        'ResNet-18': (lambda: resnet18(num_classes=10), (64,64)),
        'ResNet-50': (lambda: resnet50(num_classes=10), (64,64)),
        'U-Net': (lambda: unet(64), (64,64)),
        '1-d': (lambda: small(nn.Conv1d, nn.BatchNorm1d), (64,)),
        '3-d': (lambda: small(nn.Conv3d, nn.BatchNorm3d), (12,12,12))}
    timm = peer('timm')
    if timm: nets['EfficientNet-B0'] = lambda: timm.create_model('efficientnet_b0', num_classes=10),(64,64)
    return nets

def outcome(f, m:nn.Module, state:dict, x:Tensor) -> dict:
    "Run `f`, which is `m` in its way, from a state: prediction, gradients and buffers"
    m.load_state_dict(state)
    m.zero_grad(set_to_none=True)
    pred = f(x)
    classes = torch.arange(len(x)).view(-1, *[1]*(pred.dim()-2)).expand(len(x), *pred.shape[2:]) % pred.shape[1]
    F.cross_entropy(pred, classes).backward()
    return dict(prediction=pred.detach(), gradients=torch.cat([p.grad.flatten() for p in m.parameters()]),
                buffers=torch.cat([b.double().flatten() for b in m.buffers()]))

def lockstep_exact(data, seed, a):
    """Micro-batches in lock step against one batch of 16, float64: relative errors of prediction, gradients and
    buffers"""
    for name,(make,size) in exact_nets().items():
        torch.manual_seed(0)
        m = make().double().train()
        state,x = deepcopy(m.state_dict()),torch.randn(16,3,*size, dtype=torch.float64)
        want = outcome(m, m, state, x)
        for k in (1,2,3,8):
            got = outcome(MicroBatched(m, k), m, state, x)
            yield dict(net=name, micro=k, **{n:((got[n]-w).norm()/w.norm()).item() for n,w in want.items()})

# Conversions

def conditioned() -> nn.Module:
    "A ResNet-18 whose BN has weights, biases and an eps of its own"
    torch.manual_seed(0)
    m = resnet18(num_classes=10)
    for o in m.modules():
        if not isinstance(o, nn.BatchNorm2d): continue
        nn.init.uniform_(o.weight, .5, 1.5)
        nn.init.normal_(o.bias)
        o.eps = 1e-3
    return m

def conversion(data, seed, a):
    "BN to GroupNorm of a ResNet-18 whose BN has weights and biases: the package's, Opacus'"
    m,opacus = conditioned(),peer('opacus.validators')
    ways = {'copy.deepcopy': lambda: deepcopy(m), 'bn_to_gn': lambda: bn_to_gn(m)}
    if opacus: ways['Opacus ModuleValidator.fix'] = lambda: opacus.ModuleValidator.fix(m)
    for row in rounds(ways, 'copy.deepcopy', a):
        new = dict(ways[row['way']]().named_modules())
        pairs = [(bn,new[k]) for k,bn in m.named_modules() if isinstance(bn, nn.BatchNorm2d)]
        kept = all(torch.equal(bn.weight, gn.weight) and torch.equal(bn.bias, gn.bias) for bn,gn in pairs)
        yield {**row, 'weights_kept':kept, 'eps_kept':all(bn.eps == gn.eps for bn,gn in pairs)}

TABLES = dict(
    steps=Table(steps, seeds=None),
    scaling=Table(scaling, seeds=None),
    population=Table(population, seeds=None),
    exact=Table(exact, seeds=None),
    memory=Table(memory, ('resnet50','unet'), None),
    modelled=Table(modelled, ('resnet50','unet'), None),
    by_hand=Table(by_hand, seeds=None),
    lockstep_exact=Table(lockstep_exact, seeds=None),
    lockstep_seconds=Table(lockstep_seconds, ('resnet18','unet'), None),
    windows=Table(windows, ('unet',), None),
    conversion=Table(conversion, seeds=None))
