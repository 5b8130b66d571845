"What each part costs beside its peers: seconds side by side, memory, exactness"
import warnings
from argparse import Namespace
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import numpy as np, torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18, resnet50
from fastai.basics import DataLoaders, Learner, noop, no_random
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import DynamicUnet, GradientAccumulation, create_body
from fastai_bn.all import AccumulateGradBN, ActivationPager, MicroBatched, bn_layers, bn_to_gn, capture_moments, precise_bn
from fastai_bn.paging import moved_bytes
from bench.common import peer
from bench.results import Table, rounds

MiB = 2**20
warnings.filterwarnings('ignore', '.*(A budget on the CPU|alone needs)')

def unet(size): return DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (size,size))
def fewer(a, n:int): return Namespace(**{**vars(a), 'rounds':min(n, a.rounds)})
def syncs(a): return torch.cuda.synchronize if a.device.startswith('cuda') else None

# Training steps

class Batches(list): device = torch.device('cpu')

def fit(model:nn.Module, batches:list, cbs):
    "One epoch as a function without arguments"
    dls = DataLoaders(Batches(batches), Batches(batches[:1]), device='cpu')
    learn = Learner(dls, model, loss_func=F.cross_entropy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return lambda: learn.fit(1)

def batches(n:int, bs:int, ni:int, size:int, n_out:int=10): return [(torch.randn(bs,ni,size,size), torch.randint(0, n_out, (bs,))) for _ in range(n)]

def per_step(rows:list, n:int, base:str) -> list:
    "Milliseconds of a micro-batch, and how many more than `base`"
    t = {r['way']:r['seconds'] for r in rows}
    return [dict(way=r.pop('way'), ms=1e3*r.pop('seconds')/n, more_ms=1e3*(t[k]-t[base])/n, **r) for r in rows for k in [r['way']]]

def steps(data, seed, a):
    "A ResNet-18, 4 images of 96 pixels (and of 8, where there is little but Python), steps of 8 micro-batches, by fastai's Learner; epochs of 16"
    n,n_step,bs = 16,8,4
    with no_random(): model = resnet18(weights=None, num_classes=10)
    deferred = peer('torchgpipe.batchnorm')
    for size in (96,8):
        bl = batches(n, bs, 3, size)
        new = lambda: deepcopy(model)
        ways = {'GradientAccumulation':fit(new(), bl, GradientAccumulation(bs*n_step)),
                'AccumulateGradBN':fit(new(), bl, AccumulateGradBN(n_step)),
                "AccumulateGradBN(bn_bs='window')":fit(new(), bl, AccumulateGradBN(n_step, bn_bs='window')),
                "AccumulateGradBN(bn_bs='window', micro_bs=4)":fit(new(), bl, AccumulateGradBN(n_step, bn_bs='window', micro_bs=4)),
                'GradientAccumulation, SyncBatchNorm of one process':fit(nn.SyncBatchNorm.convert_sync_batchnorm(new()), bl, GradientAccumulation(bs*n_step))}
        if deferred: ways["GradientAccumulation, torchgpipe's DeferredBatchNorm"] = fit(deferred.DeferredBatchNorm.convert_deferred_batch_norm(new(), n_step), bl, GradientAccumulation(bs*n_step))
        for row in per_step(rounds(ways, 'GradientAccumulation', a), n, 'GradientAccumulation'): yield dict(pixels=size, **row)

def scaling(data, seed, a):
    "What AccumulateGradBN adds to a micro-batch of GradientAccumulation, by micro-batches per step, channels and depth of a plain convolutional net (2 images of 8 pixels)"
    for what,sizes in dict(n_step=(2,8,32,128), channels=(16,64,256), layers=(4,16,64)).items():
        for k in sizes:
            kw = {**dict(n_step=8, channels=32, layers=8), what:k}
            nf,n = kw['channels'],max(32, kw['n_step'])
            model = nn.Sequential(nn.Conv2d(3, nf, 1), *[o for _ in range(kw['layers']) for o in (nn.Conv2d(nf,nf,3,padding=1,bias=False), nn.BatchNorm2d(nf), nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(nf,10))
            bl = batches(n, 2, 3, 8)
            rows = rounds({'GradientAccumulation':fit(deepcopy(model), bl, GradientAccumulation(2*kw['n_step'])), 'AccumulateGradBN':fit(model, bl, AccumulateGradBN(kw['n_step']))}, 'GradientAccumulation', a)
            yield dict(varied=what, size=k, **per_step(rows, n, 'GradientAccumulation')[1])

# Population statistics

def population(data, seed, a):
    "Statistics of all samples, beside a forward pass without gradients over the same batches"
    fvcore = peer('fvcore.nn.precise_bn')
    head = nn.Sequential(create_body(resnet18(weights=None), cut=-2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048,8192), nn.ReLU(), nn.Linear(8192,8192), nn.ReLU(), nn.Linear(8192,10))
    for name,model,n,bs in ('ResNet-18, bs 4',resnet18(num_classes=10),64,4),('ResNet-18, bs 32',resnet18(num_classes=10),128,32),('U-Net (ResNet-18), bs 4',unet(96),24,4),('84 million weights behind the last BN, bs 4',head,32,4):
        model.train()
        xs = torch.randn(n,3,96,96).split(bs)
        def forward():
            with torch.no_grad():
                for x in xs: model(x)
        def torch_update():
            with torch.no_grad(): update_bn(xs, model)
        ways = {'forward pass':forward, 'precise_bn':lambda: precise_bn(model, xs, progress=False), 'torch update_bn':torch_update}
        if fvcore: ways['fvcore update_bn_stats'] = lambda: fvcore.update_bn_stats(model, xs, len(xs), progress='none')
        for row in rounds(ways, 'forward pass', a): yield dict(net=name, **row)

def tilted(n:int, dtype) -> Tensor:
    "Samples that differ in mean and scale, in an order: the first are dark, the last bright"
    g = torch.Generator().manual_seed(0)
    return torch.randn(n,3,6,6, dtype=dtype, generator=g)*torch.rand(n,1,1,1, dtype=dtype, generator=g) + torch.linspace(-2, 2, n, dtype=dtype).view(-1,1,1,1)

def exact(data, seed, a):
    "Largest error of the first BN layer's statistics against NumPy's of all samples: of the mean in standard deviations, of the unbiased variance relative"
    fvcore = peer('fvcore.nn.precise_bn')
    ways = {'precise_bn':lambda m, xs: precise_bn(m, xs, progress=False), 'torch update_bn':lambda m, xs: update_bn(xs, m)}
    if fvcore: ways['fvcore update_bn_stats'] = lambda m, xs: fvcore.update_bn_stats(m, xs, len(xs), progress='none')
    far = torch.randn(500,3,4,4, generator=torch.Generator().manual_seed(0))+5000
    cases = {**{f'float64, tilted, {k}':(tilted(sum(s), torch.float64), s) for k,s in {'bs 1':[1]*64, 'bs 2':[2]*32, 'bs 2, last 1':[2]*32+[1], 'bs 32, last 5':[32,32,5], 'uneven':[5,1,16,2,40]}.items()},
             'float32, mean 5000, std 1, bs 2':(far,[2]*250), 'float32, mean 5000, std 1, bs 32':(far,[32]*15+[20])}
    for case,(x,sizes) in cases.items():
        v = np.ascontiguousarray(x.double().numpy().swapaxes(0, 1).reshape(x.shape[1], -1))
        for name,f in ways.items():
            m = nn.Sequential(nn.BatchNorm2d(3)).to(x.dtype).train()
            f(m, list(x.split(sizes)))
            error = lambda got,want,unit: float(np.max(np.abs(got.double().numpy()-want)/unit))
            mean,var = v.mean(1),v.var(1, ddof=1)
            yield dict(samples=case, way=name, mean_error=error(m[0].running_mean, mean, var**.5), var_error=error(m[0].running_var, var, var))

# Memory

def net(name:str, size:int, a) -> tuple[nn.Module,callable]:
    "A net in training mode, and what makes images and targets for it"
    model = (unet(size) if name == 'unet' else dict(resnet18=resnet18, resnet50=resnet50)[name](num_classes=2)).train().to(a.device)
    return model,lambda n: (torch.randn(n,3,size,size, device=a.device), torch.randint(0, 2, (n,size,size) if name == 'unet' else (n,), device=a.device))

def accumulated(model, x, y, bs:int, around=nullcontext):
    "Forward, loss and backward in batches of `bs`"
    for xb,yb in zip(x.split(bs), y.split(bs)):
        with around(): (F.cross_entropy(model(xb), yb)*(len(xb)/len(x))).backward()

def on_host(a):
    "Saved tensors wait in host memory: `save_on_cpu`, which copies nothing where the device is the CPU"
    if a.device.startswith('cuda'): return torch.autograd.graph.save_on_cpu(pin_memory=True)
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)

def memory(data, seed, a):
    "16 images of 128 pixels (U-Net: 96) as one BN batch: peak of activations as the pager counts it, seconds; the gradients of all 'paged' are compared bit for bit"
    torch.manual_seed(0)
    (model,make),n,micro = net(data, 96 if data == 'unet' else 128, a),16,2
    (x,y),pagers,moved = make(n),{},{}  # the MiB that each block moved
    blocks = deepcopy(model)
    apply_activation_checkpointing(blocks, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: type(m).__name__ in ('BasicBlock','Bottleneck','UnetBlock'))
    def whole(model=model):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
    def plain(around=nullcontext): model.zero_grad(set_to_none=True); accumulated(model, x, y, micro, around)
    def saved():
        with on_host(a): whole()
    def pager(name, budget=None): pagers[name] = ActivationPager(budget); return pagers[name]
    def counted(name, f, budget=None):
        p,moved[name] = pager(name, budget),[]
        def run():
            before = p.moved
            with p: f()
            moved[name].append((p.moved-before)/MiB)
        return run
    whole()
    grads = [p.grad.clone() for p in model.parameters()]
    counted('large batch', whole)()
    order = pagers['large batch'].order
    p = pager('plain accumulation, 8 x 2'); plain(lambda: p)
    counted('saved tensors in host memory', saved)(); counted('activation checkpointing, each block', partial(whole, blocks))()
    ways = {'plain accumulation, 8 x 2':plain, 'large batch':whole, 'saved tensors in host memory':saved, 'activation checkpointing, each block':partial(whole, blocks), 'paged, no limit':counted('paged, no limit', whole)}
    large = pagers['large batch'].peak
    for b,why in (p.peak,", plain accumulation's peak"),(large//2,''),(large//4,''),(large//10,''),(1,''): ways[f'paged, {b/MiB:.0f} MiB{why}'] = counted(f'paged, {b/MiB:.0f} MiB{why}', whole, b)
    equal = {}
    def checked(k, f):
        def run(): f(); equal[k] = equal.get(k, True) and all(torch.equal(g, q.grad) for g,q in zip(grads, model.parameters()))
        return run
    rows = rounds({k:checked(k, f) if k.startswith('paged') else f for k,f in ways.items()}, 'plain accumulation, 8 x 2', fewer(a, 3 if data == 'unet' else a.rounds), syncs(a))
    for row in rows:
        q = pagers[row['way']]
        yield {**row, 'peak_MiB':q.peak/MiB, 'host_MiB':None if row['way'].startswith('saved') else q.host_peak/MiB, **dict(zip(('moved_first_MiB','moved_MiB'), (m[0],m[-1]) if (m := moved.get(row['way'])) else (None,None))), 'largest_operation_MiB':pagers['paged, no limit'].need/MiB, 'same_bits':equal.get(row['way']),
               **({f'{k}_MiB':moved_bytes(order, q.budget, k)/MiB for k in ('lru','belady')} if q.budget else {})}

class ByHand(nn.Module):
    "BN as in the textbook, of PyTorch's operations"
    def __init__(self, nf:int): super().__init__(); self.weight,self.bias = nn.Parameter(torch.ones(nf,1,1)),nn.Parameter(torch.zeros(nf,1,1))
    def forward(self, x):
        mean = x.mean((0,2,3), keepdim=True)
        var = (x-mean).pow(2).mean((0,2,3), keepdim=True)
        return (x-mean)/(var+1e-5).sqrt()*self.weight + self.bias

def by_hand(data, seed, a):
    "Eight layers of convolution, BN and ReLU on 16 x 32 x 64 x 64: BN written by hand, native, and as this package has it. Forward and backward"
    x = torch.randn(16,32,64,64, device=a.device)
    def stack(norm): return nn.Sequential(*[o for _ in range(8) for o in (nn.Conv2d(32,32,3,padding=1,bias=False), norm(32), nn.ReLU())]).to(a.device).train()
    native,hand = stack(nn.BatchNorm2d),stack(ByHand)
    lock = MicroBatched(native, 4)
    def step(model): model(x).mean().backward()
    def captured():
        with capture_moments(bn_layers(native)): step(native)
    ways = {'native BN':partial(step, native), 'native BN, moments captured':captured, 'lock step, micro-batches of 4':partial(step, lock), 'BN by hand':partial(step, hand),
            'plain accumulation, micro-batches of 4':lambda: [native(b).mean().backward() for b in x.split(4)]}
    for row in rounds(ways, 'native BN', a, syncs(a)):
        with (p := ActivationPager(None)): ways[row['way']]()
        yield {**row, 'peak_MiB':p.peak/MiB}

# Lock step

def lockstep_exact(data, seed, a):
    "Micro-batches in lock step against one batch of 16, float64: relative errors of prediction, gradients and buffers"
    small = lambda conv,bn: nn.Sequential(conv(3,8,3), bn(8), nn.ReLU(), conv(8,8,3), bn(8, momentum=None), nn.ReLU(), conv(8,10,1))
    nets = {'ResNet-18':(lambda: resnet18(num_classes=10), (64,64)), 'ResNet-50':(lambda: resnet50(num_classes=10), (64,64)), 'U-Net':(lambda: unet(64), (64,64)),
            '1-d':(lambda: small(nn.Conv1d, nn.BatchNorm1d), (64,)), '3-d':(lambda: small(nn.Conv3d, nn.BatchNorm3d), (12,12,12))}
    if timm := peer('timm'): nets['EfficientNet-B0'] = lambda: timm.create_model('efficientnet_b0', num_classes=10),(64,64)
    for name,(make,size) in nets.items():
        torch.manual_seed(0)
        m = make().double().train()
        state,x = deepcopy(m.state_dict()),torch.randn(16,3,*size, dtype=torch.float64)
        def run(f):
            m.load_state_dict(state); m.zero_grad(set_to_none=True)
            pred = f(x)
            y = torch.arange(16).view(-1, *[1]*(pred.dim()-2)).expand(16, *pred.shape[2:]) % pred.shape[1]
            F.cross_entropy(pred, y).backward()
            return pred.detach(),torch.cat([p.grad.flatten() for p in m.parameters()]),torch.cat([b.double().flatten() for b in m.buffers()])
        want = run(m)
        for k in (1,2,3,8): yield dict(net=name, micro=k, **{n:((g-w).norm()/w.norm()).item() for n,g,w in zip(('prediction','gradients','buffers'), run(MicroBatched(m, k)), want)})

def lockstep_seconds(data, seed, a):
    "8 x 2 images of 128 pixels (U-Net: 96), without a budget"
    model,make = net(data, 96 if data == 'unet' else 128, a)
    (x,y),lock = make(16),MicroBatched(model, 2)
    ways = {'plain accumulation':lambda: accumulated(model, x, y, 2), 'lock step':lambda: F.cross_entropy(lock(x), y).backward(), 'large batch':lambda: F.cross_entropy(model(x), y).backward()}
    return rounds(ways, 'plain accumulation', a, syncs(a))

def windows(data, seed, a):
    "A U-Net at 64 pixels, windows of 8, 32 and 128 as micro-batches of 2 under one budget, half of what plain accumulation takes"
    torch.manual_seed(0)
    (model,make),p = net('unet', 64, a),ActivationPager(None)
    x,y = make(16)
    accumulated(model, x, y, 2, lambda: p)
    budget = p.peak//2
    for n in (8,32,128):
        (x,y),lock,pager = make(n),MicroBatched(model, 2),ActivationPager(budget)
        def paged():
            with pager: F.cross_entropy(lock(x), y).backward()
        ways = {'plain accumulation':lambda: accumulated(model, x, y, 2), 'lock step, paged':paged}
        for row in rounds(ways, 'plain accumulation', fewer(a, 1 if n > 32 else a.rounds), syncs(a)):
            q = p if row['way'] == 'plain accumulation' else pager
            yield {'window':n, **row, 'budget_MiB':budget/MiB if q is pager else None, 'peak_MiB':q.peak/MiB, 'host_MiB':q.host_peak/MiB}

# Conversions

def conversion(data, seed, a):
    "BN to GroupNorm of a ResNet-18 whose BN has weights and biases: the package's, Opacus'"
    def conditioned():
        torch.manual_seed(0)
        m = resnet18(num_classes=10)
        for o in m.modules():
            if isinstance(o, nn.BatchNorm2d): nn.init.uniform_(o.weight, .5, 1.5); nn.init.normal_(o.bias); o.eps = 1e-3
        return m
    m = conditioned()
    ways = {'copy.deepcopy':lambda: deepcopy(m), 'bn_to_gn':lambda: bn_to_gn(m)}
    if o := peer('opacus.validators'): ways['Opacus ModuleValidator.fix'] = lambda: o.ModuleValidator.fix(m)
    for row in rounds(ways, 'copy.deepcopy', a):
        new = ways[row['way']]()
        pairs = [(b,g) for (_,b),(_,g) in zip(m.named_modules(), new.named_modules()) if isinstance(b, nn.BatchNorm2d)]
        yield {**row, 'weights_kept':all(torch.equal(b.weight, g.weight) and torch.equal(b.bias, g.bias) for b,g in pairs), 'eps_kept':all(b.eps == g.eps for b,g in pairs)}

TABLES = {k:Table(f, d, None) for k,(f,d) in dict(steps=(steps,('drawn',)), scaling=(scaling,('drawn',)), population=(population,('drawn',)), exact=(exact,('drawn',)), memory=(memory,('resnet50','unet')),
          by_hand=(by_hand,('drawn',)), lockstep_exact=(lockstep_exact,('drawn',)), lockstep_seconds=(lockstep_seconds,('resnet18','unet')), windows=(windows,('unet',)), conversion=(conversion,('drawn',))).items()}
