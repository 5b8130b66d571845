"""Lock step beside plain accumulation and the large batch: exactness, seconds, memory

    python tools/lockstep.py exact                       # float64, micro-batches of 1, 2, 3 and 8 of 16
    python tools/lockstep.py seconds [--threads 1]       # 8 x 2 at 128 pixels, without a budget
    python tools/lockstep.py memory                      # a U-Net at 128 pixels: windows of 4, 16 and 64 times 2 under one budget
    python tools/lockstep.py memory --device cuda --size 512 --windows 32
"""
import argparse, statistics, time, warnings

import pandas as pd, timm, torch, torch.nn.functional as F
from fastai.vision.all import DynamicUnet, create_body
from torch import nn
from torchvision.models import resnet18, resnet50
from fastai_bn.lockstep import MicroBatched
from fastai_bn.paging import ActivationPager

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('what', choices=['exact','seconds','memory'])
p.add_argument('--size',    type=int, default=128)
p.add_argument('--micro',   type=int, default=2)
p.add_argument('--windows', type=int, nargs='*', default=[8, 32, 128], help='samples per window')
p.add_argument('--budget',  type=float, default=.5, help="share of plain accumulation's own peak")
p.add_argument('--repeat',  type=int, default=11)
p.add_argument('--threads', type=int, default=2)
p.add_argument('--device',  default='cpu')
a = p.parse_args()
torch.set_num_threads(a.threads)
warnings.filterwarnings('ignore', '.*(A budget on the CPU|alone needs)')
cuda,MiB = a.device.startswith('cuda'),2**20

def unet(size): return DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (size,size))
def small(conv, bn): return nn.Sequential(conv(3,8,3), bn(8), nn.ReLU(), conv(8,8,3), bn(8, momentum=None), nn.ReLU(), conv(8,10,1))
def relative(a, b): return ((a-b).norm()/b.norm()).item()

def exact():
    nets = dict(resnet18=(lambda: resnet18(num_classes=10), (64,64)), resnet50=(lambda: resnet50(num_classes=10), (64,64)), unet=(lambda: unet(64), (64,64)),
                efficientnet_b0=(lambda: timm.create_model('efficientnet_b0', num_classes=10), (64,64)),
                conv1d=(lambda: small(nn.Conv1d, nn.BatchNorm1d), (64,)), conv3d=(lambda: small(nn.Conv3d, nn.BatchNorm3d), (12,12,12)))
    for name,(make,size) in nets.items():
        torch.manual_seed(0)
        m = make().double().train()
        state,x = {k:v.clone() for k,v in m.state_dict().items()},torch.randn(16,3,*size, dtype=torch.float64)
        y = None
        def run(f):
            nonlocal y
            m.load_state_dict(state); m.zero_grad(set_to_none=True)
            pred = f(x)
            if y is None: y = torch.randint(0, pred.shape[1], (16,*pred.shape[2:]))
            F.cross_entropy(pred, y).backward()
            return pred.detach(),torch.cat([p.grad.flatten() for p in m.parameters()]),torch.cat([b.double().flatten() for b in m.buffers()])
        ref = run(m)
        for k in (1,2,3,8): print(f'{name:16s} {k} of 16', *[f'{n} {relative(s, t):.1e}' for n,s,t in zip(('prediction','gradients','buffers'), run(MicroBatched(m, k)), ref)], flush=True)

def timed(f, m):
    m.zero_grad(set_to_none=True)
    if cuda: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter(); f()
    if cuda: torch.cuda.synchronize()
    return time.perf_counter()-start

def data(n, unet): return torch.randn(n,3,a.size,a.size, device=a.device),torch.randint(0, 2, (n,a.size,a.size) if unet else (n,), device=a.device)

def plain(m, x, y):
    for xb,yb in zip(x.split(a.micro), y.split(a.micro)): (F.cross_entropy(m(xb), yb)*(len(xb)/len(x))).backward()

def seconds():
    for name,make in ('resnet18',lambda: resnet18(num_classes=2)),('unet',lambda: unet(a.size)):
        m = make().train().to(a.device)
        (x,y),lock = data(8*a.micro, name == 'unet'),MicroBatched(m, a.micro)
        ways = {'plain accumulation':lambda: plain(m, x, y), 'lock step':lambda: F.cross_entropy(lock(x), y).backward(), 'large batch':lambda: F.cross_entropy(m(x), y).backward()}
        runs = pd.DataFrame([{k:timed(f, m) for k,f in ways.items()} for _ in range(a.repeat+1)][1:])  # side by side; the first round warms up
        ratios = runs.div(runs['plain accumulation'], axis=0)
        print(f'{name}, {a.threads} threads, {a.repeat} rounds\n', pd.DataFrame(dict(seconds=runs.median(), to_plain=ratios.median(), q25=ratios.quantile(.25), q75=ratios.quantile(.75))).round(3), flush=True)

def memory():
    torch.manual_seed(0)
    m = unet(a.size).train().to(a.device)
    state = {k:v.clone() for k,v in m.state_dict().items()}
    (x,y),p = data(8*a.micro, True),ActivationPager(None)
    for xb,yb in zip(x.split(a.micro), y.split(a.micro)):
        with p: (F.cross_entropy(m(xb), yb)/8).backward()
    budget = int(a.budget*p.peak)
    print(f'plain accumulation, 8 x {a.micro}: peak {p.peak/MiB:.1f} MiB; budget {budget/MiB:.1f} MiB; torch {torch.__version__}')
    for n in a.windows:
        (x,y),lock,rows = data(n, True),MicroBatched(m, a.micro),[]
        for name,f,pager in (('plain accumulation',None,None),('lock step, no budget',lock,ActivationPager(None)),('lock step, paged',lock,ActivationPager(budget)),('one piece, paged',m,ActivationPager(budget))):
            if n > 32 and name in ('lock step, no budget','one piece, paged') and not cuda: continue
            def window():
                if f is None: return plain(m, x, y)
                with pager: F.cross_entropy(f(x), y).backward()
            secs = []
            for _ in range(3 if n <= 32 else 2): m.load_state_dict(state); secs.append(timed(window, m))
            rows.append(dict(way=name, peak=pager and pager.peak/MiB, need=pager and pager.need/MiB, host=pager and pager.host_peak/MiB, seconds=statistics.median(secs[1:]),
                             **(dict(max_allocated=torch.cuda.max_memory_allocated()/MiB) if cuda else {})))
        print(f'\n{n//a.micro} x {a.micro}\n', pd.DataFrame(rows).round(1).to_string(index=False), flush=True)

dict(exact=exact, seconds=seconds, memory=memory)[a.what]()
