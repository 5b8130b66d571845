"What the pager costs per operation in Python, in bytecodes: a count that no machine changes"
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import mobilenet_v2

from fastai_bn import storages
from fastai_bn.paging import ActivationPager

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')

class Empty(TorchDispatchMode):
    "What any dispatch mode costs"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))

def bytecodes(f) -> int:
    "Count what the interpreter executes in `f`"
    n = 0
    def trace(frame, event, arg):
        nonlocal n
        frame.f_trace_opcodes,frame.f_trace_lines = True,False
        n += event == 'opcode'
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try: f()
    finally: sys.settrace(before)
    return n

@pytest.fixture
def window(monkeypatch):
    "A small window with many operations, all of whose storages count"
    monkeypatch.setattr(storages, 'MIN_BYTES', 1)
    torch.manual_seed(0)
    model,x = mobilenet_v2(width_mult=.1).train(),torch.randn(2, 3, 32, 32)
    def run(mode):
        model.zero_grad(set_to_none=True)
        with mode: model(x).sum().backward()
    return run

@pytest.mark.parametrize('share,remake,most', [(None,False,1050), (2,False,1150), (2,None,1250), (.5,False,1450)])
def test_bytecodes_beyond_an_empty_mode(window, share, remake, most):
    "Counting, with room, with room by default, paging; some 10 % more than today's"
    window(free := ActivationPager(None))
    window(empty := Empty())
    empty.n = 0
    base = bytecodes(lambda: window(empty))
    pager = ActivationPager(share and int(share*free.peak), remake)
    for _ in range(5): window(pager)
    assert (bytecodes(lambda: window(pager))-base)/empty.n < most
