"Running tables, storing their results, and showing them"
import argparse, datetime, json, multiprocessing, platform, random, time
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

def environment(a) -> dict:
    "Machine and versions"
    def has(p):
        try: return version(p)
        except PackageNotFoundError: return None
    import torch
    gpu = torch.cuda.get_device_name() if a.device.startswith('cuda') else None
    packages = 'torch','torchvision','fastai','timm','fvcore','monai','albumentations','kornia','torchio','opacus','torchrl','torchgpipe'
    return dict(date=datetime.date.today().isoformat(), machine=f'{platform.machine()}, {multiprocessing.cpu_count()} cores' + (f', {gpu}' if gpu else ''),
                python=platform.python_version(), **{p:has(p) for p in packages})

def one(page:str, name:str, data:str, seed:int|None, a) -> dict:
    "A line of results"
    import torch
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = list(import_module(f'bench.{page}').TABLES[name].rows(data, seed, a))
    args = [f'--{k} {v}' for k in ('images','epochs') if (v := getattr(a, k))] + ([f'--{data} FOLDER'] if data in ('hep2','nuclei') else [])
    command = ' '.join(['python tools/bench', page, name, *([] if seed is None else [f'--seeds {seed}']), *args])
    if a.device != 'cpu': command += f' --device {a.device}'
    return dict(table=name, data=data, seed=seed, device=a.device, command=command, seconds=round(time.perf_counter()-start), env=environment(a), rows=rows)

def run(page:str, tables:dict, a:argparse.Namespace):
    "Make the tables' rows, as many at a time as there are cores, store and print them"
    tasks = []
    for name,t in tables.items():
        for data in t.data if a.data is None else [d for d in t.data if d == a.data]:
            if data in ('hep2','nuclei') and not getattr(a, data): print(f'{page} {name}: SKIPPED on {data}, whose folder --{data} names'); continue
            tasks += [(name, data, s) for s in ([None] if t.seeds is None else a.seeds or range(5 if a.full else t.seeds))]
    alone = [o for o in tasks if o[2] is None]
    with ProcessPoolExecutor(a.jobs, multiprocessing.get_context('spawn')) as pool:
        jobs = {pool.submit(one, page, *o, a):o for o in tasks if o not in alone}
        for job in as_completed(jobs): store(page, job.result(), a.out)
    for o in alone: store(page, one(page, *o, a), a.out)

def lines(page:str, out:Path) -> list[dict]:
    f = Path(out)/f'{page}.jsonl'
    return [json.loads(l) for l in f.read_text(encoding='utf-8').splitlines()] if f.exists() else []

def store(page:str, line:dict, out:Path):
    "Put a line in the place of an earlier one of the same table, data, seed and device"
    key = lambda l: (l['table'], l['data'], -1 if l['seed'] is None else l['seed'], l['device'])
    kept = sorted([*(l for l in lines(page, out) if key(l) != key(line)), line], key=key)
    out.mkdir(parents=True, exist_ok=True)
    (out/f'{page}.jsonl').write_text('\n'.join(map(json.dumps, kept))+'\n', encoding='utf-8')
    print(f"\n{page} {line['table']}, {line['data']}" + ('' if line['seed'] is None else f", seed {line['seed']}") + f": {line['seconds']} s\n"
          + pd.DataFrame(line['rows']).to_string(index=False, float_format='{:.4g}'.format), flush=True)

def rounds(ways:dict, base:str, a, sync=None) -> list[dict]:
    "Seconds of each of `ways`, which take turns `a.rounds` times: median, and median and quartiles of the ratio to `base` in the same round"
    def timed(f):
        start = time.perf_counter(); f()
        if sync: sync()
        return time.perf_counter()-start
    for f in ways.values(): timed(f)
    names = list(ways)
    order = random.Random(0)
    df = pd.DataFrame([{k:timed(ways[k]) for k in order.sample(names, len(names))} for _ in range(a.rounds)])[names]
    ratios = df.div(df[base], axis=0)
    spread = lambda r: dict(q25=r.quantile(.25), q75=r.quantile(.75)) if a.rounds >= 3 else {}
    return [dict(way=k, seconds=df[k].median(), **({} if k == base else dict(ratio=ratios[k].median(), **spread(ratios[k]))), rounds=a.rounds) for k in names]

# What the pages use

RESULTS = Path(__file__).resolve().parents[2]/'nbs/benchmarks/results'

def load(page:str, table:str) -> pd.DataFrame:
    "All rows of a table, with columns for data and seed"
    return pd.DataFrame([dict(data=l['data'], seed=l['seed'], **r) for l in lines(page, RESULTS) if l['table'] == table for r in l['rows']])

def spread(df:pd.DataFrame, by, value:str, fmt:str='.3f', columns=None) -> pd.DataFrame:
    "Mean (smallest to largest, unless all are the same to the digits shown) of `value` over seeds, a row for each of `by`, in the order in which they come"
    def text(s):
        lo,mid,hi = (f'{v:{fmt}}' for v in (s.min(),s.mean(),s.max()))
        return '' if s.isna().all() else mid if lo == hi else f'{mid} ({lo} to {hi})'
    keys = [by] if isinstance(by, str) else list(by)
    res = df.groupby(keys + ([columns] if columns else []), sort=False, dropna=False)[value].agg(text)
    return res.unstack(columns).fillna('')[list(dict.fromkeys(df[columns]))] if columns else res.to_frame(value)

def versions(page:str) -> pd.DataFrame:
    "Packages that its runs had; '' where a peer was not installed and so skipped"
    return pd.DataFrame([l['env'] for l in lines(page, RESULTS)]).drop(columns=['date','machine']).fillna('').drop_duplicates()

def measured(page:str) -> pd.DataFrame:
    "What each table is made of: data, seeds, seconds, machine, command"
    ls = [dict(table=l['table'], data=l['data'], seeds='' if l['seed'] is None else str(l['seed']), seconds=l['seconds'], date=l['env']['date'], machine=l['env']['machine'],
               torch=l['env']['torch'], command=l['command'].replace(f"--seeds {l['seed']}", '--seeds ...')) for l in lines(page, RESULTS)]
    keys = ['table','data','date','machine','torch','command']
    return pd.DataFrame(ls).groupby(keys, sort=False).agg(seeds=('seeds',', '.join), seconds=('seconds',lambda s: '' if s.isna().any() else f'{s.min():.0f}' if s.min() == s.max() else f'{s.min():.0f} to {s.max():.0f}')).reset_index()
