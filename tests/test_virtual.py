"A virtual device: the real pager under a clock"
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastai_bn.all import CARDS, Card, memory_plan
from fastai_bn.counting import mixed_precision
from fastai_bn.virtual import LAUNCH
from helpers import quiet_budget

pytestmark = quiet_budget
GIB = 2**30

# Published training throughput of ResNet-50 (images/s): NVIDIA DeepLearningExamples; T4: about what several sources say
PUBLISHED = dict(T4=(140, 390), V100=(367, 1200), A100=(938, 2470))

def resnet(n, card, is_half=False, arch='resnet18', **kw):
    model = getattr(torchvision.models, arch)()
    x,y = torch.empty(n, 3, 224, 224, device='meta'),torch.empty(n, dtype=torch.long, device='meta')
    if not is_half: return memory_plan(model, x, F.cross_entropy, y, card=card, **kw)
    with mixed_precision(): return memory_plan(model, x, F.cross_entropy, y, card=card, **kw)

@pytest.mark.parametrize('card', PUBLISHED)
@pytest.mark.parametrize('is_half', [False, True])
def test_throughput_is_near_what_was_published(card, is_half):
    found = 128/resnet(128, card, is_half, 'resnet50', budgets=[]).seconds[0]
    assert abs(found/PUBLISHED[card][is_half]-1) < .15

def test_less_memory_takes_more_time_and_a_faster_bus_less():
    df = resnet(16, 'A100', n_step=2)
    paged = df[df.way == 'budget'].seconds
    assert paged.is_monotonic_increasing and paged.iloc[-1] > 2*df.seconds[0]
    fast = resnet(16, replace(CARDS['A100'], to_host=1e15, to_device=1e15))
    slow = resnet(16, replace(CARDS['A100'], to_host=1e9, to_device=1e9), budgets=int(fast.budget.iloc[-1]))
    assert fast.seconds.iloc[-1] < paged.iloc[-1] < slow.seconds.iloc[-1]

def test_the_clock_changes_no_count():
    a,b = resnet(8, None),resnet(8, 'T4')
    assert a.drop(columns='seconds').equals(b.drop(columns='seconds'))

def test_copies_take_at_least_the_time_of_the_bus_and_run_beside_the_computation():
    card = Card('mine', GIB, 1e13, 0, 1e13, 1e12, 1e9, 2e9)
    df = resnet(8, card)
    whole,paged = df.iloc[0],df.iloc[-1]
    bus = paged.moved/2/card.to_host + paged.moved/2/card.to_device
    assert bus <= paged.seconds < bus+whole.seconds

def small():
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(50)]),torch.zeros(2, 4),torch.zeros(2, 4)

def test_python_is_the_limit_of_small_operations():
    model,x,y = small()
    slow = replace(CARDS['A100'], eager=1e-3)
    a,b = [memory_plan(model, x, F.mse_loss, y, budgets=[], card=o).seconds[0] for o in (CARDS['A100'], slow)]
    assert b > 150*1e-3 and a < b/50

def test_each_kernel_has_its_launch():
    model,x,y = small()
    free = replace(CARDS['A100'], eager=0., fp32=1e30, bandwidth=1e30)
    assert memory_plan(model, x, F.mse_loss, y, budgets=[], card=free).seconds[0] >= 100*LAUNCH
