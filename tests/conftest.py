"Fixtures, and which tests are slow. What tests share otherwise is in helpers.py"
import os
import sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')  # before fastai is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))

import pytest
import torch
from fastai.basics import set_seed

from fastai_bn import storages

# pytest runs on as many processes as there are cores
torch.set_num_threads(int(os.environ.get('FASTAI_BN_THREADS', 1)))

# Files that `make quick` leaves out, like tests that are marked slow
SLOW = 'bench','demo','distributed','docs','faults','loops','ops','package','precision','soak','unet'

def is_slow(path): return path.stem.removeprefix('test_') in SLOW

def pytest_ignore_collect(collection_path, config):
    "Without their imports it is faster still"
    return True if config.option.markexpr == 'not slow' and is_slow(collection_path) else None

def pytest_collection_modifyitems(items):
    for o in items:
        if is_slow(o.path): o.add_marker('slow')

@pytest.fixture(autouse=True)
def _seed(): set_seed(0)

@pytest.fixture
def all_move(monkeypatch):
    "A pager moves the small storages of these tests, too"
    monkeypatch.setattr(storages, 'MIN_BYTES', 256)
