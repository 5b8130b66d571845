"""Memory and time of one window as one BN batch under several budgets, beside what else one can do

    python tools/paging.py resnet50                                  # 16 images at 128 pixels, on the CPU
    python tools/paging.py unet
    python tools/paging.py resnet50 --device cuda --bs 32 --size 224 [--bf16]
"""
import argparse, statistics, time
from contextlib import ExitStack, nullcontext

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from fastai.vision.all import DynamicUnet, create_body
from torchvision.models import resnet18, resnet50
from fastai_bn.paging import ActivationPager, moved_bytes

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('model', choices=['resnet50','unet'])
p.add_argument('--bs',      type=int, default=16)
p.add_argument('--micro',   type=int, default=2, help='micro-batch of plain accumulation')
p.add_argument('--size',    type=int, default=128)
p.add_argument('--budgets', type=float, nargs='*', default=[.5, .25, .1, 0], help="shares of the large batch's peak; 0: one byte")
p.add_argument('--repeat',  type=int, default=5)
p.add_argument('--threads', type=int, default=2)
p.add_argument('--device',  default='cpu')
p.add_argument('--bf16', action='store_true')
a = p.parse_args()
torch.set_num_threads(a.threads)
cuda = a.device.startswith('cuda')
MiB = 2**20

torch.manual_seed(0)
unet = a.model == 'unet'
model = (DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (a.size,a.size)) if unet else resnet50(num_classes=10)).train().to(a.device)
x = torch.randn(a.bs, 3, a.size, a.size, device=a.device)
y = torch.randint(0, 2, (a.bs,a.size,a.size) if unet else (a.bs,), device=a.device)
state = {k:v.clone() for k,v in model.state_dict().items()}

def window(bs):
    "Forward and backward of all, in batches of `bs`"
    for xb,yb in zip(x.split(bs), y.split(bs)):
        with torch.autocast(a.device.split(':')[0], torch.bfloat16, enabled=a.bf16): loss = F.cross_entropy(model(xb), yb)*(len(xb)/a.bs)
        loss.backward()

def on_host():
    "Saved tensors wait in host memory"
    if cuda: return torch.autograd.graph.save_on_cpu(pin_memory=True)
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)  # save_on_cpu copies nothing here

class PerBatch:
    "A pager's block around each micro-batch, as AccumulateGradBN has it"
    def __init__(self, pager): self.pager = pager
    def run(self):
        for xb,yb in zip(x.split(a.micro), y.split(a.micro)):
            with self.pager: (F.cross_entropy(model(xb), yb)*(len(xb)/a.bs)).backward()

def timed(f):
    model.load_state_dict(state); model.zero_grad(set_to_none=True)
    if cuda: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
    start = time.perf_counter(); f()
    if cuda: torch.cuda.synchronize()
    seconds = time.perf_counter()-start
    return seconds,(torch.cuda.max_memory_allocated()-before)/MiB if cuda else None

def paged(pager, bs=None):
    def f():
        with pager: window(bs or a.bs)
    return f

def saved_on_host():
    with on_host(): window(a.bs)

pagers = {}
def pager(name, budget): pagers[name] = ActivationPager(budget); return pagers[name]

count = pager('large batch', None); paged(count)()
large = count.peak
grads = [p.grad.clone() for p in model.parameters()]
accumulated = pager(f'{a.micro} x {a.bs//a.micro}, plain accumulation', None)
model.load_state_dict(state); model.zero_grad(set_to_none=True); PerBatch(accumulated).run()
saved = pager('saved tensors in host memory', None)
def both():
    with saved, on_host(): window(a.bs)
if not a.bf16: model.load_state_dict(state); model.zero_grad(set_to_none=True); both()

ways = {'large batch':lambda: window(a.bs), f'{a.micro} x {a.bs//a.micro}, plain accumulation':lambda: window(a.micro), 'saved tensors in host memory':saved_on_host,
        'paged, no limit':paged(pager('paged, no limit', None))}
for b in dict.fromkeys([accumulated.peak, *[max(1, int(s*large)) for s in a.budgets]]):
    ways[f'paged, {b/MiB:.0f} MiB'] = paged(pager(f'paged, {b/MiB:.0f} MiB', b))

seconds,memory,rows = {k:[] for k in ways},{},{}
for i in range(a.repeat+1):  # in turn: the machine may be slower for a while. The first round warms up, and is the first window of each pager
    for k,f in ways.items():
        before = pagers[k].moved if k in pagers else 0
        s,mem = timed(f)
        memory[k] = max(mem or 0, memory.get(k, 0)) if i else 0
        if i: seconds[k].append(s)
        if k.startswith('paged'):
            assert all(torch.equal(g, q.grad) for g,q in zip(grads, model.parameters())) or cuda, k
            rows.setdefault(k, {})[f'moved, window {i+1}'] = (pagers[k].moved-before)/MiB
plain = statistics.median(seconds[f'{a.micro} x {a.bs//a.micro}, plain accumulation'])
table = pd.DataFrame({k:dict(peak=pagers[k].peak/MiB, host=pagers[k].host_peak/MiB, **{w:rows.get(k, {}).get(w) for w in ('moved, window 1','moved, window 2')},
                             seconds=statistics.median(s), to_plain=statistics.median(u/v for u,v in zip(s, seconds[f'{a.micro} x {a.bs//a.micro}, plain accumulation'])),
                             to_large=statistics.median(u/v for u,v in zip(s, seconds['large batch']))) for k,s in seconds.items()}).T
if cuda: table['max_memory_allocated'] = pd.Series(memory)
print(f"{a.model}, {a.bs} x {a.size} px, {'bf16' if a.bf16 else 'float32'}, {a.device}, {a.threads} threads, torch {torch.__version__}; MiB, medians of {a.repeat}\n")
print(table.round(2).to_string())
print(f"\nlargest operation's own tensors and what cannot move: {pagers['paged, no limit'].need/MiB:.1f} MiB ({pagers['paged, no limit'].need_op})")
order = count.order
print('\nMiB that demand paging would move in the same order:')
print(pd.DataFrame({f'{b/MiB:.0f} MiB':{k:moved_bytes(order, b, k)/MiB for k in ('lru','belady')} for b in dict.fromkeys([accumulated.peak, *[max(1, int(s*large)) for s in a.budgets]])}).T.round(0).to_string())
