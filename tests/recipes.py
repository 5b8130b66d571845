"""The cells of the page "In any loop". `accelerate launch tests/recipes.py FOLDER` runs its windows in two processes,
on a net without BatchNorm, and writes to FOLDER/RANK.json how far the weights are from those of one process"""
import ast
import json
import os
import sys
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DistributedSampler, TensorDataset

from helpers import ROOT, tilted

N = 22

@cache
def cells() -> dict[str,list[str]]:
    "Get the shown code of the page, by section"
    res,section = {},None
    for c in json.loads((ROOT/'nbs/any_loop.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        for line in source.splitlines():
            if c['cell_type'] == 'markdown' and line.startswith('## '): section = line[3:].split(' {#')[0]
        if c['cell_type'] == 'code' and not source.startswith('#| '): res.setdefault(section, []).append(source)
    return res

def definitions(source:str) -> str:
    "Leave imports, functions and classes of a cell"
    kinds = ast.Import,ast.ImportFrom,ast.FunctionDef,ast.ClassDef
    return ast.unparse([o for o in ast.parse(source).body if isinstance(o, kinds)])

def run_cells(section:str, only_definitions=False, **given) -> dict:
    "Run the cells of `section`, after those that all need; get the names that they define, or are `given`"
    names = {'__name__':'any_loop'}
    for source in [o for s in ('The task', section) for o in cells()[s]]:
        exec(definitions(source) if only_definitions else source, names)
    names.update(given)
    return names


# --- In several processes

def without_bn():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4)]
    return nn.Sequential(*layers).double()

def recipe(section:str) -> dict:
    "Get the recipes of a section, with a net and data of this test's own"
    data = TensorDataset(tilted(N), torch.arange(N) % 4)
    return run_cells(section, only_definitions=True, net=without_bn, data=data)

def error(model, names, steps) -> float:
    "Compare with the training in one process, with all samples of a step in one batch"
    want,(xs,ys) = without_bn(),names['data'].tensors
    opt = names['sgd'](want)
    for step in steps*2:
        F.cross_entropy(want(xs[step]), ys[step]).backward()
        opt.step()
        opt.zero_grad()
    return max((a-b).abs().max().item() for a,b in zip(model.parameters(), want.parameters()))

# Samples of each step: two micro-batches of 3 in each of two processes. Lightning deals samples, its last ones have 2
DEALT = [list(range(12)), list(range(12,N))]
# Accelerate deals batches, and fills the last one up with the first samples
FILLED = [list(range(12)), [*range(12,N), 0, 1]]

def accelerate():
    p = recipe('Accelerate')
    prepared = p['prepared']
    p['prepared'] = lambda bs, n: prepared(bs, 2)
    return error(p['accelerate_windowed'](), p, FILLED)

def trainer():
    p = recipe('Hugging Face Trainer')
    return error(p['train'](p['WindowTrainer'], 3, 2).model, p, FILLED)

def lightning(steps, get_kwargs):
    "Fit with samples in their order; Lightning's own sampler would shuffle them"
    p = recipe('Lightning')
    in_order = DistributedSampler(p['data'], 2, int(os.environ['RANK']), shuffle=False)
    p['DataLoader'] = partial(torch.utils.data.DataLoader, sampler=in_order)
    kw = get_kwargs(p)
    model = p['fit'](3, *kw.pop('callbacks', ()), devices=2, strategy='ddp', use_distributed_sampler=False, **kw)
    return error(model, p, steps)

def accumulated():
    return lightning(DEALT, lambda p: dict(callbacks=[p['Accumulated']()], accumulate_grad_batches=2))

def manual(): return lightning([list(range(N))], lambda p: dict(module=p['Manual']))  # four micro-batches are a step

def main(path):
    torch.set_num_threads(1)
    errors = {f.__name__:f() for f in (accelerate, trainer, accumulated, manual)}
    (Path(path)/f'{torch.distributed.get_rank()}.json').write_text(json.dumps(errors))

if __name__ == '__main__': main(sys.argv[1])
