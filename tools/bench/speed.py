"What each part costs beside its peers: seconds side by side, memory, exactness"
import warnings
from argparse import Namespace
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpoints
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18, resnet50
from fastai.basics import DataLoaders, Learner, noop, no_random
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import DynamicUnet, GradientAccumulation, create_body
from fastai_bn.all import (AccumulateGradBN, ActivationPager, MicroBatched, bn_layers, bn_to_gn, capture_moments,
                           precise_bn)
from fastai_bn.paging import moved_bytes
from bench.common import peer
from bench.results import Table, rounds

MiB = 2**20
warnings.filterwarnings('ignore', '.*(A budget on the CPU|alone needs)')

def unet(size:int) -> nn.Module: return DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (size,size))

def fewer(a, n:int) -> Namespace:
    "The same arguments, with `n` rounds at most"
    return Namespace(**{**vars(a), 'rounds':min(n, a.rounds)})

def syncs(a):
    "What waits for the device"
    return torch.cuda.synchronize if a.device.startswith('cuda') else None

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

def repeated(n:int, *makes) -> list:
    "`n` times a layer made by each of `makes`"
    return [make() for _ in range(n) for make in makes]

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

# Memory

def net(name:str, size:int, a) -> tuple[nn.Module,callable]:
    "A net in training mode, and what makes images and targets for it"
    is_unet = name == 'unet'
    model = unet(size) if is_unet else dict(resnet18=resnet18, resnet50=resnet50)[name](num_classes=2)
    def make(n):
        target = (n,size,size) if is_unet else (n,)
        return torch.randn(n,3,size,size, device=a.device),torch.randint(0, 2, target, device=a.device)
    return model.train().to(a.device),make

def accumulated(model, x, y, bs:int, around=nullcontext):
    "Forward, loss and backward in batches of `bs`"
    for xb,yb in zip(x.split(bs), y.split(bs)):
        with around(): (F.cross_entropy(model(xb), yb)*(len(xb)/len(x))).backward()

def on_host(a):
    "Saved tensors wait in host memory: `save_on_cpu`, which copies nothing where the device is the CPU"
    if a.device.startswith('cuda'): return torch.autograd.graph.save_on_cpu(pin_memory=True)
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)

def checkpointed(model:nn.Module) -> nn.Module:
    "A copy whose blocks are computed again in the backward pass"
    blocks = deepcopy(model)
    def is_block(m): return type(m).__name__ in ('BasicBlock','Bottleneck','UnetBlock')
    wrapper = checkpoints.checkpoint_wrapper
    checkpoints.apply_activation_checkpointing(blocks, checkpoint_wrapper_fn=wrapper, check_fn=is_block)
    return blocks

class Paged:
    "Ways to compute one gradient, each in a pager that counts"
    def __init__(self, model:nn.Module, x:Tensor, y:Tensor):
        self.model,self.x,self.y = model,x,y
        self.pagers,self.moved,self.equal = {},{},{}  # by way; MiB that each block moved; has it the same gradient?
        self.whole()
        self.grads = [p.grad.clone() for p in model.parameters()]

    def whole(self, model:nn.Module|None=None):
        "One batch"
        model = model or self.model
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(self.x), self.y).backward()

    def plain(self, bs:int, around=nullcontext):
        "Micro-batches of `bs`"
        self.model.zero_grad(set_to_none=True)
        accumulated(self.model, self.x, self.y, bs, around)

    def saved(self, a):
        "Saved tensors in host memory"
        with on_host(a): self.whole()

    def counted(self, name:str, f, budget=None):
        "Have `f` run in a pager of its own"
        p,moved = ActivationPager(budget),[]
        self.pagers[name],self.moved[name] = p,moved
        def run():
            before = p.moved
            with p: f()
            moved.append((p.moved-before)/MiB)
        return run

    def checked(self, name:str, budget=None):
        "Have the batch run paged, and compare its gradient with that of the batch that was not"
        run = self.counted(name, self.whole, budget)
        def check():
            run()
            same = all(torch.equal(g, p.grad) for g,p in zip(self.grads, self.model.parameters()))
            self.equal[name] = self.equal.get(name, True) and same
        return check

    def row(self, way:str, order) -> dict:
        "What the pager of a way has counted, and what policies would have moved"
        p,moved = self.pagers[way],self.moved.get(way) or [None]
        is_hidden = way.startswith('saved')  # its copies are not the pager's
        least = {f'{k}_MiB':moved_bytes(order, p.budget, k)/MiB for k in ('lru','belady')} if p.budget else {}
        return dict(peak_MiB=p.peak/MiB, host_MiB=None if is_hidden else p.host_peak/MiB, moved_first_MiB=moved[0],
                    moved_MiB=moved[-1], largest_operation_MiB=self.pagers['paged, no limit'].need/MiB,
                    same_bits=self.equal.get(way), **least)

def memory(data, seed, a):
    """16 images of 128 pixels (U-Net: 96) as one BN batch: peak of activations as the pager counts it, seconds; the
    gradients of all 'paged' are compared bit for bit"""
    torch.manual_seed(0)
    model,make = net(data, 96 if data == 'unet' else 128, a)
    paged = Paged(model, *make(16))
    blocks = checkpointed(model)
    ways = {
        'plain accumulation, 8 x 2': partial(paged.plain, 2),
        'large batch': paged.whole,
        'saved tensors in host memory': partial(paged.saved, a),
        'activation checkpointing, each block': partial(paged.whole, blocks)}
    for name,f in list(ways.items())[1:]: paged.counted(name, f)()
    order,large = paged.pagers['large batch'].order,paged.pagers['large batch'].peak
    p = paged.pagers['plain accumulation, 8 x 2'] = ActivationPager(None)
    paged.plain(2, lambda: p)
    ways['paged, no limit'] = paged.checked('paged, no limit')
    budgets = [(p.peak, ", plain accumulation's peak"), (large//2, ''), (large//4, ''), (large//10, ''), (1, '')]
    for b,why in budgets:
        name = f'paged, {b/MiB:.0f} MiB{why}'
        ways[name] = paged.checked(name, b)
    rows = rounds(ways, 'plain accumulation, 8 x 2', fewer(a, 3 if data == 'unet' else a.rounds), syncs(a))
    for row in rows: yield {**row, **paged.row(row['way'], order)}

class ByHand(nn.Module):
    "BN as in the textbook, of PyTorch's operations"
    def __init__(self, nf:int):
        super().__init__()
        self.weight,self.bias = nn.Parameter(torch.ones(nf,1,1)),nn.Parameter(torch.zeros(nf,1,1))
    def forward(self, x):
        mean = x.mean((0,2,3), keepdim=True)
        var = (x-mean).pow(2).mean((0,2,3), keepdim=True)
        return (x-mean)/(var+1e-5).sqrt()*self.weight + self.bias

def by_hand(data, seed, a):
    """Eight layers of convolution, BN and ReLU on 16 x 32 x 64 x 64: BN written by hand, native, and as this package
    has it. Forward and backward"""
    x = torch.randn(16,32,64,64, device=a.device)
    def stack(norm):
        layers = repeated(8, lambda: nn.Conv2d(32,32,3,padding=1,bias=False), lambda: norm(32), nn.ReLU)
        return nn.Sequential(*layers).to(a.device).train()
    native,hand = stack(nn.BatchNorm2d),stack(ByHand)
    def step(model): model(x).mean().backward()
    def captured():
        with capture_moments(bn_layers(native)): step(native)
    def accumulate():
        for b in x.split(4): native(b).mean().backward()
    ways = {
        'native BN': partial(step, native),
        'native BN, moments captured': captured,
        'lock step, micro-batches of 4': partial(step, MicroBatched(native, 4)),
        'BN by hand': partial(step, hand),
        'plain accumulation, micro-batches of 4': accumulate}
    for row in rounds(ways, 'native BN', a, syncs(a)):
        with (p := ActivationPager(None)): ways[row['way']]()
        yield {**row, 'peak_MiB':p.peak/MiB}

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

def lockstep_seconds(data, seed, a):
    "8 x 2 images of 128 pixels (U-Net: 96), without a budget"
    model,make = net(data, 96 if data == 'unet' else 128, a)
    (x,y),lock = make(16),MicroBatched(model, 2)
    ways = {
        'plain accumulation': lambda: accumulated(model, x, y, 2),
        'lock step': lambda: F.cross_entropy(lock(x), y).backward(),
        'large batch': lambda: F.cross_entropy(model(x), y).backward()}
    return rounds(ways, 'plain accumulation', a, syncs(a))

def windows(data, seed, a):
    """A U-Net at 64 pixels, windows of 8, 32 and 128 as micro-batches of 2 under one budget, half of what plain
    accumulation takes"""
    torch.manual_seed(0)
    (model,make),plain = net('unet', 64, a),ActivationPager(None)
    accumulated(model, *make(16), 2, lambda: plain)
    budget = plain.peak//2
    for n in (8,32,128):
        (x,y),lock,pager = make(n),MicroBatched(model, 2),ActivationPager(budget)
        def paged():
            with pager: F.cross_entropy(lock(x), y).backward()
        ways = {'plain accumulation': lambda: accumulated(model, x, y, 2), 'lock step, paged': paged}
        budgets = {'plain accumulation':(plain, None), 'lock step, paged':(pager, budget/MiB)}
        for row in rounds(ways, 'plain accumulation', fewer(a, 1 if n > 32 else a.rounds), syncs(a)):
            p,limit = budgets[row['way']]
            yield {'window':n, **row, 'budget_MiB':limit, 'peak_MiB':p.peak/MiB, 'host_MiB':p.host_peak/MiB}

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
    by_hand=Table(by_hand, seeds=None),
    lockstep_exact=Table(lockstep_exact, seeds=None),
    lockstep_seconds=Table(lockstep_seconds, ('resnet18','unet'), None),
    windows=Table(windows, ('unet',), None),
    conversion=Table(conversion, seeds=None))
