"What a window takes, by the pager: bytes, seconds side by side, and modelled seconds on graphics cards"
from argparse import Namespace
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpoints
from torchvision.models import resnet18, resnet50
from fastai.vision.all import DynamicUnet, create_body
from fastai_bn.all import ActivationPager, MicroBatched, bn_layers, capture_moments
from fastai_bn.counting import CountedWindows
from fastai_bn.plan import planned
from fastai_bn.replay import moved_bytes
from fastai_bn.virtual import find_card
from bench.results import rounds

MiB = 2**20

def unet(size:int) -> nn.Module: return DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (size,size))

def fewer(a, n:int) -> Namespace:
    "The same arguments, with `n` rounds at most"
    return Namespace(**{**vars(a), 'rounds':min(n, a.rounds)})

def syncs(a):
    "What waits for the device"
    return torch.cuda.synchronize if a.device.startswith('cuda') else None

def repeated(n:int, *makes) -> list:
    "`n` times a layer made by each of `makes`"
    return [make() for _ in range(n) for make in makes]

# Under a budget

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
    return torch.autograd.graph.saved_tensors_hooks(unseen_copy, lambda t: t)

def unseen_copy(t:Tensor) -> Tensor:
    "Copy `t`; the pager does not count that"
    with torch._C._DisableTorchDispatch(): return t.detach().clone()

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
        # By way; MiB that each block moved, and made again; has it the same gradient?
        self.pagers,self.moved,self.equal = {},{},{}
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

    def counted(self, name:str, f, *args):
        "Have `f` run in a pager of its own"
        p,moved = ActivationPager(*args),[]
        self.pagers[name],self.moved[name] = p,moved
        def run():
            before = p.moved,p.remade
            with p: f()
            moved.append(((p.moved-before[0])/MiB, (p.remade-before[1])/MiB))
        return run

    def checked(self, name:str, *args):
        "Have the batch run paged, and compare its gradient with that of the batch that was not"
        run = self.counted(name, self.whole, *args)
        def check():
            run()
            same = all(torch.equal(g, p.grad) for g,p in zip(self.grads, self.model.parameters()))
            self.equal[name] = self.equal.get(name, True) and same
        return check

    def row(self, way:str) -> dict:
        "What the pager of a way has counted, and what policies would have moved"
        p,moved = self.pagers[way],self.moved.get(way) or [(None, None)]
        is_hidden = way.startswith('saved')  # its copies are not the pager's
        order,policies = self.pagers[MADE].order,('lru','belady','remake')
        least = {f'{k}_MiB':moved_bytes(order, p.budget, k)/MiB for k in policies} if p.budget else {}
        return dict(peak_MiB=p.peak/MiB, host_MiB=None if is_hidden else p.host_peak/MiB, moved_first_MiB=moved[0][0],
                    moved_MiB=moved[-1][0], remade_MiB=moved[-1][1],
                    largest_operation_MiB=self.pagers['paged, no limit'].need/MiB, same_bits=self.equal.get(way),
                    **least)

MADE = 'made again, no limit'

def memory(data, seed, a):
    """16 images of 128 pixels (U-Net: 96) as one BN batch: peak of activations as the pager counts it, seconds; the
    gradients of all 'paged' are compared bit for bit"""
    torch.manual_seed(0)
    model,make = net(data, 96 if data == 'unet' else 128, a)
    blocks = checkpointed(model)  # before it has run: then fastai's U-Net has activations in its hooks
    paged = Paged(model, *make(16))
    ways = {
        'plain accumulation, 8 x 2': partial(paged.plain, 2),
        'large batch': paged.whole,
        'saved tensors in host memory': partial(paged.saved, a),
        'activation checkpointing, each block': partial(paged.whole, blocks)}
    for name,f in list(ways.items())[1:]: paged.counted(name, f, None)()
    large = paged.pagers['large batch'].peak
    p = paged.pagers['plain accumulation, 8 x 2'] = ActivationPager(None)
    paged.plain(2, lambda: p)
    ways['paged, no limit'] = paged.checked('paged, no limit', None)
    ways[MADE] = paged.checked(MADE, None, True)
    budgets = [(p.peak, ", plain accumulation's peak", None), (large//2, '', None), (large//2, ', copies only', False),
               (large//4, '', None), (large//10, '', None), (1, '', None)]
    for b,why,remake in budgets:
        name = f'paged, {b/MiB:.0f} MiB{why}'
        ways[name] = paged.checked(name, b, remake)
    rows = rounds(ways, 'plain accumulation, 8 x 2', fewer(a, 3 if data == 'unet' else a.rounds), syncs(a))
    for row in rows: yield {**row, **paged.row(row['way'])}

CARDS = 'T4','V100','A100'

def modelled(data, seed, a):
    """Seconds on cards that are not there, modelled: one BN batch of a ResNet-50 (64 x 224 pixels), of fastai's U-Net
    (16 x 256), without the pager; and under shares of what it takes, by copies alone and with what is made again"""
    n,size = (16, 256) if data == 'unet' else (64, 224)
    model,make = net(data, size, Namespace(device='cpu'))
    with planned(model, F.cross_entropy) as fakes:
        x,y = (fakes.all_in((t,)) for t in make(n))
        part = [(t[0][:n//8],) for t in (x, y)]
        for card in CARDS:
            def row(*args, remake=False, **kw):
                return CountedWindows(model, F.cross_entropy, fakes, find_card(card), remake=remake).row(*args, **kw)
            whole = row('large batch', x, y)
            rows = [row('plain accumulation, 8 micro-batches', *part, n_step=8), whole,
                    row(MADE, x, y, remake=True)]
            for share in (.6,.4,.2):
                limit = int(share*whole['peak'])
                rows += [row(f'{100*share:.0f} %, copies only', x, y, limit),
                         row(f'{100*share:.0f} %, made again', x, y, limit, remake=True)]
            for r in rows: yield modelled_row(card, r, whole['seconds'])

def modelled_row(card:str, row:dict, seconds:float) -> dict:
    "What is stored of a window, and its time in terms of `seconds`"
    sizes = {f'{k}_MiB':row[k]/MiB for k in ('peak','host','moved','remade')}
    return dict(card=card, way=row['way'], seconds=row['seconds'], ratio=row['seconds']/seconds, **sizes)

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

