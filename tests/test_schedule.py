"Copies begin early, on paper: what moves is what demand paging moves, and the limit holds"
import sys

import pytest
import torch

from fastai_bn import storages
from fastai_bn.forecast import Forecast, Order, Step
from fastai_bn.paging import ActivationPager
from fastai_bn.replay import Replay
from fastai_bn.schedule import Schedule
from helpers import small_unet

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')


def there_and_back() -> Order:
    "Storages 0 to 3 of 10 bytes are made one from the other, and used again from the last to the first"
    steps = [Step(None, (), (), (), 0, 10, [0])]
    steps += [Step('forward', (i,), (), (), 10*(i+1), 10, [i+1]) for i in range(3)]
    steps += [Step('backward', (i,), (), (i+1,) if i < 3 else (), 10*(i+1), 0, []) for i in (3,2,1,0)]
    return Order(steps, [10]*4)

def test_by_hand():
    "With room for three, one has to leave at step 3; its copy begins behind step 1, and it returns once 3 is dead"
    moves = Schedule(there_and_back(), 30, False).moves
    assert {i:tuple(m) for i,m in moves.items()} == {2:([0],[],[]), 3:([],[0],[]), 5:([],[],[0])}

def test_the_first_that_is_needed_returns_first():
    "With room for two: 0 and 1 leave; 1 returns when 3 is dead, 0 when 2 is"
    moves = Schedule(there_and_back(), 20, False).moves
    assert {i:tuple(m) for i,m in moves.items()} == {2:([0],[0],[]), 3:([1],[1],[]), 5:([],[],[1]), 6:([],[],[0])}

def test_with_room_for_all_nothing_happens(): assert not Schedule(there_and_back(), 40, False).moves


# --- Recorded orders

@pytest.fixture(scope='module')
def order():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(storages, 'MIN_BYTES', 1024)
        torch.manual_seed(0)
        model,x,pager = small_unet((32,32)),torch.randn(4, 3, 32, 32),ActivationPager(None, True)
        with pager: model(x).square().mean().backward()
        return pager.order

def top(order): return max(s.base+s.grow for s in order.steps)

def on_paper(order, schedule, replay):
    "Follow a schedule: the bytes that it copies, and the most that is there beyond what demand paging has there"
    moved,over,away,copied = 0,0,set(),set()
    for i in range(len(order.steps)):
        m = schedule.moves.get(i)
        for o in m.copy if m else ():
            assert o not in away and order.last_use(o, i) < i
            copied.add(o)
            moved += order.sizes[o]
        for o in m.leave if m else ():
            away.add(o)
        for o in m.load if m else ():
            assert o in away and o in copied
            away.remove(o)
            moved += order.sizes[o]
        away -= set(order.steps[i].uses)  # made again
        there = order.steps[i].base + order.steps[i].grow - sum(order.sizes[o] for o in away)
        over = max(over, there-max(schedule.limit, replay.tops[i]))
        away.update(o for n,o,what in replay.log if n == i and what == 'late')
    return moved,over

@pytest.mark.parametrize('remake', [False, True])
@pytest.mark.parametrize('share', [.7, .5, .3, .1])
def test_it_moves_what_demand_paging_moves_and_keeps_the_limit(order, share, remake):
    limit = int(share*top(order))
    schedule = Schedule(order, limit, remake)
    replay = Replay(order, limit, choice=schedule.choice).run()
    ends = sum(order.sizes[o] for o in replay.away)  # these return when the block ends
    moved,over = on_paper(order, schedule, replay)
    assert moved == replay.moved-ends > 0
    if not remake: assert over <= 0

def test_copies_begin_before_they_are_waited_for(order):
    "Most of what leaves has begun to be copied some steps before, and most of what returns is ahead of its use"
    schedule = Schedule(order, top(order)//2, False)
    left = {o:i for i,m in schedule.moves.items() for o in m.leave}
    ahead = [left[o]-i for i,m in schedule.moves.items() for o in m.copy]
    early = [order.next_use(o, i)-i for i,m in schedule.moves.items() for o in m.load]
    assert sum(n > 4 for n in ahead) > len(ahead)/2 and sum(n > 4 for n in early) > len(early)/2


# --- Followed

def unet_window(monkeypatch):
    "Make what runs a window of a U-Net within a pager and returns its gradients"
    monkeypatch.setattr(storages, 'MIN_BYTES', 1024)
    model,x = small_unet((32,32)),torch.randn(4, 3, 32, 32)
    def window(pager):
        model.zero_grad()
        with pager: model(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]
    return window

@pytest.mark.parametrize('share', [.6, .3])
def test_a_pager_follows_it(monkeypatch, share):
    window = unet_window(monkeypatch)
    want = window(free := ActivationPager(None))
    pager = ActivationPager(int(share*free.peak), False)
    for _ in range(3): window(pager)
    before,pager.peak,expected = pager.moved,0,Replay(pager.order, pager.budget).run()
    assert all(map(torch.equal, window(pager), want))
    assert pager.moved-before == expected.moved and pager.peak <= max(pager.budget, pager.need)


def test_what_is_refused_ahead_of_its_use_returns_when_it_is_used(monkeypatch):
    window = unet_window(monkeypatch)
    want = window(free := ActivationPager(None))
    pager,real,refused = ActivationPager(free.peak//2, False),storages.Ledger.load,[]
    for _ in range(3): window(pager)
    def load(self, rec):
        if rec.away and sys._getframe(1).f_code.co_name == '_move':
            refused.append(rec.label)
            raise torch.OutOfMemoryError
        real(self, rec)
    monkeypatch.setattr(storages.Ledger, 'load', load)
    assert all(map(torch.equal, window(pager), want)) and refused


# --- The forecast: while a block does what the one before did, nothing is recorded

def first_block():
    f = Forecast(None)
    for n in (10,20,30): f.appear(n)
    for k,uses in (('a',(0,)),('b',(0,1)),('c',(1,2))): f.follow(k, uses, (), 60)
    f.dead.append(0)
    f.follow('d', (2,), (), 50)
    return f.learned()

def follow(f, *steps):
    for k,uses in steps: f.follow(k, uses, (), 60)

def test_the_same_again_is_the_same_order():
    before = first_block()
    f = Forecast(before)
    for n in (10,20,30): f.appear(n)
    follow(f, ('a',(0,)), ('b',(0,1)), ('c',(1,2)))
    f.dead.append(0)
    follow(f, ('d',(2,)))
    assert f.exact and f.learned() is before

@pytest.mark.parametrize('at', range(4))
def test_a_block_that_departs_is_recorded_from_its_beginning(at):
    "With what died in this block, and when"
    before = first_block()
    f,steps = Forecast(before),[('a',(0,)), ('b',(0,1)), ('c',(1,2)), ('d',(2,))]
    for n in (10,20,30): f.appear(n)
    follow(f, *steps[:at])
    f.dead.append(1)
    follow(f, ('other',(2,)))
    got = f.learned()
    assert not f.exact and got is not before
    assert [s.op for s in got.steps[1:]] == [k for k,_ in steps[:at]]+['other']
    assert got.sizes == [10,20,30] and got.ends == {1:at+1} | ({0:4} if at > 3 else {})
    assert before.ends == {0:4} and len(before.steps) == 5

def test_a_storage_of_another_size_departs():
    f = Forecast(first_block())
    f.appear(10)
    f.appear(21)
    assert not f.exact and f.order.sizes == [10,21] and f.order.steps[0].new == [0,1]
