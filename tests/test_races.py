"Copies on other streams: nothing is read, written to or freed while somebody else is at it, and every wait is needed"
import ast
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _push_mode

import fastai_bn
from fastai_bn import records, storages
from fastai_bn.lockstep import MicroBatched
from fastai_bn.paging import ActivationPager
from streams import Device, on_device, Stream

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')

@pytest.fixture(autouse=True)
def _small_storages_move(monkeypatch): monkeypatch.setattr(storages, 'MIN_BYTES', 1024)


# --- The clocks

def test_copies_without_waits_race():
    d = Device()
    d.launch((), ['x'], 'make')
    with d.out: d.launch(['x'], ['host'], 'copy')
    assert len(d.races) == 1

def test_waits_give_an_order():
    d = Device()
    d.launch((), ['x'], 'make')
    d.out.wait_stream(d.main)
    with d.out: d.launch(['x'], ['host'], 'copy')
    d.launch(['x'], (), 'read beside a read')
    assert not d.races
    d.launch((), ['x'], 'write')
    assert len(d.races) == 1
    d.main.wait_event(d.out.record_event())
    d.launch((), ['x'], 'write')
    assert len(d.races) == 1


# --- What a pager does

def net():
    torch.manual_seed(0)
    def block(ni): return [nn.Conv2d(ni, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(8, 3)
    return nn.Sequential(*block(3), *block(8), *block(8), nn.Dropout(.2), *block(8), *head)

def plain(model, x, pager):
    with pager: model(x).square().mean().backward()

def in_a_thread(model, x, pager):
    "Backward from another thread, which is set to what this one is, as autograd does on an accelerator"
    with pager:
        loss,modes = model(x).square().mean(),_get_current_dispatch_mode_stack()
        def backward():
            for m in modes: _push_mode(m)
            loss.backward()
        (t := threading.Thread(target=backward)).start()
        t.join()

def dying(model, x, pager):
    "Tensors die while a copy of theirs is under way"
    with pager:
        many = [model[0](x) for _ in range(6)]
        while many: many.pop(0 if len(many)%2 else -1)
        model(x).square().mean().backward()

def failing(model, x, pager):
    "An exception in mid-block"
    try:
        with pager:
            loss = model(x).square().mean()
            loss.backward(retain_graph=True)
            raise KeyError
    except KeyError: pass

def unforeseen(model, x, pager):
    "Another order of operations than before, with writes"
    pager.turn = getattr(pager, 'turn', 0)+1
    with pager:
        y = model[:2](x)
        z = [y*i for i in range(4)]
        if pager.turn%2: y.add_(1)
        sum([o.sin() for o in reversed(z)]).add(y).sum().backward()

def fickle(model, x, pager):
    "In the last window things die before the time at which they were to leave"
    pager.turn = getattr(pager, 'turn', 0)+1
    with pager:
        many = []
        for _ in range(8): many = [*many[-1 if pager.turn == 4 else 0:], model[0](x)]
        torch.stack([o.sum() for o in reversed(many)]).sum().backward()

def lock_step(model, x, pager): plain(MicroBatched(model, 2), x, pager)

def leaving(model, x, pager):
    "What is alive at the end of the block comes back"
    with pager: kept = [m(x) for m in (model[0], model[:2], model[:6]) for _ in range(2)]
    for o in kept: o.sum().backward()

SCENES = {o.__name__:o for o in (plain, in_a_thread, dying, fickle, failing, unforeseen, lock_step, leaving)}
BUDGETS = {'1 byte':(1, False), 'little':(60_000, False), 'half':(150_000, False), 'much':(300_000, False),
           'remade':(150_000, None), 'little remade':(60_000, None), 'saves':(None, True)}

def races_in(monkeypatch, scene, budget):
    "Four windows"
    with on_device(monkeypatch) as device:
        model,x,pager = net(),torch.randn(8, 3, 16, 16),ActivationPager(*budget)
        for _ in range(4):
            model.zero_grad()
            SCENES[scene](model, x, pager)
    return device.races,pager

@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('scene', SCENES)
def test_nothing_races(monkeypatch, scene, budget):
    races,pager = races_in(monkeypatch, scene, BUDGETS[budget])
    assert not races
    if budget != 'saves': assert pager.moved


# --- Without one of the waits

def _calls(name):
    "Where in the package `name` is called"
    found = []
    for f in sorted(Path(fastai_bn.__file__).parent.glob('*.py')):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            is_call = isinstance(node, ast.Call) and getattr(node.func, 'attr', None) == name
            if is_call: found.append((f.name, node.lineno))
    return found

def _is_at(place):
    "Is the caller's caller at this place?"
    frame = sys._getframe(2)
    return (Path(frame.f_code.co_filename).name, frame.f_lineno) == place

WAITS = [(kind, place, who) for kind,names in dict(wait_for_copy=('',), wait_stream=('into','out'),
         wait_event=('main',)).items() for place in _calls(kind) for who in names]

def without(monkeypatch, kind, place, who):
    "Have the wait at a place do nothing, if it is this stream that waits"
    cls = records.Record if kind == 'wait_for_copy' else Stream
    real = getattr(cls, kind)
    def wait(self, arg):
        if not _is_at(place) or getattr(self, 'name', '') != who: return real(self, arg)
        if kind == 'wait_for_copy': self.event = None
    monkeypatch.setattr(cls, kind, wait)

@pytest.mark.parametrize('kind,place,who', WAITS, ids=map(str, WAITS))
def test_every_wait_is_needed(monkeypatch, kind, place, who):
    without(monkeypatch, kind, place, who)
    assert any(races_in(monkeypatch, s, b)[0] for s in SCENES for b in BUDGETS.values())
