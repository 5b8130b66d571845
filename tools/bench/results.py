"Running tables, storing their results, and showing them"
import argparse
import datetime
import json
import multiprocessing
import platform
import random
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable

import pandas as pd

@dataclass
class Table:
    "How the rows of a table are made"
    rows: Callable           # (data set, seed, arguments) -> iterable of dicts
    data: tuple = ('drawn',) # Names of the data sets that it is made of
    seeds: int|None = 3      # Without --full; None: a timing, which has no seeds and runs alone

PACKAGES = ['torch','torchvision','fastai','timm','fvcore','monai','albumentations','kornia','torchio','opacus',
            'torchrl','torchgpipe']

def installed(package:str) -> str|None:
    "The version of a package"
    try: return version(package)
    except PackageNotFoundError: return None

def environment(a) -> dict:
    "Machine and versions"
    import torch
    machine = [platform.machine(), f'{multiprocessing.cpu_count()} cores']
    if a.device.startswith('cuda'): machine.append(torch.cuda.get_device_name())
    return dict(date=datetime.date.today().isoformat(), machine=', '.join(machine), python=platform.python_version(),
                **{p:installed(p) for p in PACKAGES})

def command_of(page:str, name:str, data:str, seed:int|None, a) -> str:
    "The command that makes a line of results again"
    parts = ['python tools/bench', page, name]
    if seed is not None: parts.append(f'--seeds {seed}')
    parts += [f'--{k} {getattr(a, k)}' for k in ('images','epochs') if getattr(a, k)]
    if data in ('hep2','nuclei'): parts.append(f'--{data} FOLDER')
    if a.device != 'cpu': parts.append(f'--device {a.device}')
    return ' '.join(parts)

def one(page:str, name:str, data:str, seed:int|None, a) -> dict:
    "A line of results"
    import torch
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = list(import_module(f'bench.{page}').TABLES[name].rows(data, seed, a))
    return dict(table=name, data=data, seed=seed, device=a.device, command=command_of(page, name, data, seed, a),
                seconds=round(time.perf_counter()-start), env=environment(a), rows=rows)

def seeds_of(t:Table, a) -> list:
    "The seeds to run a table with"
    if t.seeds is None: return [None]
    return a.seeds or list(range(5 if a.full else t.seeds))

def is_there(page:str, name:str, data:str, a) -> bool:
    "Tell whether there is such data. If not, say how to give it"
    if data not in ('hep2','nuclei') or getattr(a, data): return True
    print(f'{page} {name}: SKIPPED on {data}, whose folder --{data} names')
    return False

def run(page:str, tables:dict, a:argparse.Namespace):
    "Make the tables' rows, as many at a time as there are cores, store and print them"
    wanted = [(name,data,t) for name,t in tables.items() for data in t.data if a.data in (None, data)]
    tasks = [(name,data,s) for name,data,t in wanted if is_there(page, name, data, a) for s in seeds_of(t, a)]
    alone = [o for o in tasks if o[2] is None]
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = {pool.submit(one, page, *o, a):o for o in tasks if o not in alone}
        for job in as_completed(jobs): store(page, job.result(), a.out)
    for o in alone: store(page, one(page, *o, a), a.out)

def lines(page:str, out:Path) -> list[dict]:
    "Read the results of a page"
    f = Path(out)/f'{page}.jsonl'
    return [json.loads(l) for l in f.read_text(encoding='utf-8').splitlines()] if f.exists() else []

def store(page:str, line:dict, out:Path):
    "Put a line in the place of an earlier one of the same table, data, seed and device"
    def key(l): return l['table'], l['data'], -1 if l['seed'] is None else l['seed'], l['device']
    kept = sorted([*(l for l in lines(page, out) if key(l) != key(line)), line], key=key)
    out.mkdir(parents=True, exist_ok=True)
    (out/f'{page}.jsonl').write_text('\n'.join(map(json.dumps, kept))+'\n', encoding='utf-8')
    seed = '' if line['seed'] is None else f", seed {line['seed']}"
    print(f"\n{page} {line['table']}, {line['data']}{seed}: {line['seconds']} s")
    print(pd.DataFrame(line['rows']).to_string(index=False, float_format='{:.4g}'.format), flush=True)

def rounds(ways:dict, base:str, a, sync=None) -> list[dict]:
    """Seconds of each of `ways`, which take turns `a.rounds` times.

    Median, and median and quartiles of the ratio to `base` in the same round"""
    def timed(f):
        start = time.perf_counter()
        f()
        if sync: sync()
        return time.perf_counter()-start
    for f in ways.values(): timed(f)
    names,order = list(ways),random.Random(0)
    turns = [order.sample(names, len(names)) for _ in range(a.rounds)]
    df = pd.DataFrame([{k:timed(ways[k]) for k in turn} for turn in turns])[names]
    ratios = df.div(df[base], axis=0)
    def ratio(k):
        r = ratios[k]
        quartiles = dict(q25=r.quantile(.25), q75=r.quantile(.75)) if a.rounds >= 3 else {}
        return dict(ratio=r.median(), **quartiles)
    return [dict(way=k, seconds=df[k].median(), **(ratio(k) if k != base else {}), rounds=a.rounds) for k in names]

# What the pages use

RESULTS = Path(__file__).resolve().parents[2]/'nbs/benchmarks/results'

def load(page:str, table:str) -> pd.DataFrame:
    "All rows of a table, with columns for data and seed"
    found = [l for l in lines(page, RESULTS) if l['table'] == table]
    return pd.DataFrame([dict(data=l['data'], seed=l['seed'], **r) for l in found for r in l['rows']])

def spread(df:pd.DataFrame, by, value:str, fmt:str='.3f', columns=None) -> pd.DataFrame:
    """Mean (smallest to largest, unless all are the same to the digits shown) of `value` over seeds.

    A row for each of `by`, in the order in which they come"""
    def text(s):
        if s.isna().all(): return ''
        lo,mid,hi = (f'{v:{fmt}}' for v in (s.min(),s.mean(),s.max()))
        return mid if lo == hi else f'{mid} ({lo} to {hi})'
    keys = [by] if isinstance(by, str) else list(by)
    if columns: keys.append(columns)
    res = df.groupby(keys, sort=False, dropna=False)[value].agg(text)
    return res.unstack(columns).fillna('')[list(dict.fromkeys(df[columns]))] if columns else res.to_frame(value)

def versions(page:str) -> pd.DataFrame:
    "Packages that its runs had; '' where a peer was not installed and so skipped"
    envs = pd.DataFrame([l['env'] for l in lines(page, RESULTS)])
    return envs.drop(columns=['date','machine']).fillna('').drop_duplicates()

def measured(page:str) -> pd.DataFrame:
    "What each table is made of: data, seeds, seconds, machine, command"
    rows = [without_seed(l) for l in lines(page, RESULTS)]
    keys = ['table','data','date','machine','torch','command']
    groups = pd.DataFrame(rows).groupby(keys, sort=False)
    return groups.agg(seeds=('seeds',', '.join), seconds=('seconds',span)).reset_index()

def without_seed(l:dict) -> dict:
    "What a line of results is made of, its seed by itself"
    env,seed = l['env'],l['seed']
    command = l['command'].replace(f'--seeds {seed}', '--seeds ...')
    return dict(table=l['table'], data=l['data'], seeds='' if seed is None else str(seed), seconds=l['seconds'],
                date=env['date'], machine=env['machine'], torch=env['torch'], command=command)

def span(s:pd.Series) -> str:
    "Smallest to largest, '' where there is none"
    if s.isna().any(): return ''
    lo,hi = f'{s.min():.0f}',f'{s.max():.0f}'
    return lo if s.min() == s.max() else f'{lo} to {hi}'
