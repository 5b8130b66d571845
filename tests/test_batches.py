"What a sample is: batches of everything that people's collate functions return, joined, cut and counted"
import contextlib
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import SGD, DataLoader, DataLoaders, L, Learner, MSELossFlat

from fastai_bn.all import AccumulateGradBN, loss_denominator
from fastai_bn.batches import Ahead, BNBatches, CannotJoin, cut, join, join_part, n_samples, size_of
from helpers import Steps, assert_same, assert_same_bits, do_fit, silent

N_BOXES = [4,2,1,1,2,3,0,1]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AREAS = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))

def boxes(i): return dict(boxes=torch.full((N_BOXES[i],4), float(i)), area=AREAS[i])
def images(idx): return torch.stack([IMAGES[i] for i in idx])

def ctc_targets(idx):
    "Characters of all samples in a row, and how many each has"
    characters = torch.cat([torch.full((N_BOXES[i],), i) for i in idx])
    return characters,torch.tensor([N_BOXES[i] for i in idx])

# What people's collate functions return beside images and areas, from indices
EXTRAS = dict(
    ids=lambda idx: list(idx),
    names=lambda idx: [f'{i}.png' for i in idx],
    nones=lambda idx: [None for _ in idx],
    arrays=lambda idx: np.array(idx),
    string_arrays=lambda idx: np.array([f'{i}.png' for i in idx]),
    temperature=lambda idx: torch.tensor(.5),
    a_number=lambda idx: .5,
    class_weights=lambda idx: torch.arange(5.),
    ragged=lambda idx: [torch.full((N_BOXES[i],4), 1.) for i in idx],
    flattened=lambda idx: torch.cat([torch.full((3,), i) for i in idx]))

def with_extra(f): return lambda idx: (images(idx), AREAS[idx], f(idx))

# Collate functions as people write them: indices -> inputs and targets. The loss asks the targets for areas
KINDS = dict(
    targets_list=lambda idx: (images(idx), [boxes(i) for i in idx]),
    both_lists=lambda idx: ([IMAGES[i] for i in idx], [boxes(i) for i in idx]),
    both_tuples=lambda idx: (tuple(IMAGES[i] for i in idx), tuple(boxes(i) for i in idx)),
    fastcore_lists=lambda idx: (images(idx), L(boxes(i) for i in idx)),
    **{k:with_extra(f) for k,f in EXTRAS.items()},
    ctc=lambda idx: (images(idx), AREAS[idx], *ctc_targets(idx)))

class Net(nn.Module):
    def __init__(self, bn=True):
        super().__init__()
        torch.manual_seed(1)
        self.c,self.l = nn.Conv2d(3,4,3),nn.Linear(4,1)
        self.bn = nn.BatchNorm2d(4) if bn else nn.Identity()

    def forward(self, x):
        x = x if torch.is_tensor(x) else torch.stack(list(x))
        return self.l(self.bn(self.c(x)).mean((2,3)))

def loss_func(pred, ts, *rest):
    "Uses all of the targets, in their order"
    areas = ts if torch.is_tensor(ts) else torch.stack([t['area'] for t in ts])
    counts = torch.zeros(len(pred), 1) if torch.is_tensor(ts) else column(len(t['boxes']) for t in ts)
    for o in rest:
        if isinstance(o, list): counts = counts + column(len(e if torch.is_tensor(e) else str(e)) for e in o)
        elif torch.is_tensor(o) and o.dim() and len(o) == len(pred): counts = counts + o[:,None]
    return F.mse_loss(pred, areas+counts)

def column(values): return torch.tensor([[float(v)] for v in values])

def fit(kind, bs, *cbs, n_epoch=2, bn=True):
    dl = torch.utils.data.DataLoader(range(8), batch_size=bs, collate_fn=KINDS[kind])
    dls = DataLoaders(dl, dl, device='cpu')
    dls.n_inp = 1
    learn = silent(Learner(dls, Net(bn), loss_func=loss_func, cbs=list(cbs), opt_func=SGD))
    do_fit(learn, n_epoch, .1)
    return learn.model

@pytest.mark.parametrize('bs', [1, 2, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_a_window_is_the_large_batch_whatever_is_in_it(kind, bs):
    assert_same_bits(fit(kind, 8), fit(kind, bs, AccumulateGradBN(8//bs, bn_bs='window')))

@pytest.mark.parametrize('kind', KINDS)
def test_batches_are_cut_as_well(kind):
    "BN batches of 2 out of micro-batches of 4: as micro-batches of 2"
    a,b = fit(kind, 2, AccumulateGradBN(4)),fit(kind, 4, AccumulateGradBN(2, bn_bs=2))
    assert_same(a, b, 1e-6)

@pytest.mark.parametrize('kind', ['targets_list','both_lists','ctc','ragged'])
def test_samples_weigh_the_same_whatever_they_have(kind):
    "Micro-batches of 3, 3 and 2 images. Without BN a window is one batch to rounding: boxes, characters do not count"
    def weights(bs, *cbs):
        warns = pytest.warns(UserWarning, match='no BatchNorm') if cbs else contextlib.nullcontext()
        with warns: return fit(kind, bs, *cbs, n_epoch=1, bn=False)
    assert_same(weights(8), weights(3, AccumulateGradBN(3)), 1e-6)
def test_denominators_are_samples():
    targets = [dict(boxes=torch.zeros(4,4)), dict(boxes=torch.zeros(1,4))]
    assert loss_denominator(nn.MSELoss(), None, targets) == 2
    assert loss_denominator(nn.CTCLoss(), None, torch.zeros(11), torch.tensor([5,6]), n=2) == 2
    assert loss_denominator(nn.CrossEntropyLoss(), None, torch.tensor([1,-100,2])) == 2

PAIR = torch.zeros(2,3)  # the input of two samples

@pytest.mark.parametrize('micro,text', [
    ([(PAIR, torch.tensor(.1)), (PAIR, torch.tensor(.2))], r'\[1\] is of \[\] for 2 samples'),
    ([(PAIR, torch.zeros(5,6)), (PAIR, torch.zeros(4,6))], r'\[1\] is of \[5, 6\], \[4, 6\] for 2 samples'),
    ([(torch.zeros(2,3,4),), (torch.zeros(2,3,5),)], r'\[0\] is of \[2, 3, 4\], \[2, 3, 5\]'),
    ([(PAIR, 'a'), (PAIR, 'b')], r"\[1\] is of 'a', 'b'"),
    ([(PAIR, dict(a=1)), (PAIR, dict(b=1))], r'\[1\] is of dict of 1'),
    ([(PAIR, [torch.zeros(2)]*3), (PAIR, [torch.zeros(2)]*4)], r'\[1\] is of list of 3, list of 4'),
    ([(PAIR, dict(t=np.float64(1))), (PAIR, dict(t=np.float64(2)))], r"\['t'\] is of"),
    ([(PAIR, None), (PAIR, torch.zeros(2))], r'\[1\] is of None, \[2\]')])
def test_what_cannot_be_joined_is_named(micro, text):
    with pytest.raises(CannotJoin, match=text): join(micro)

def test_the_fit_says_what_to_do():
    dl = DataLoader([(torch.randn(2,3,6,6+i), torch.zeros(2,1)) for i in range(2)], bs=None)
    dls = DataLoaders(dl, dl, device='cpu')
    learn = silent(Learner(dls, Net(), loss_func=MSELossFlat(), cbs=AccumulateGradBN(2, bn_bs='window')))
    text = r'cannot be joined.*\[2, 3, 6, 6\], \[2, 3, 6, 7\].*Resize.*bn_bs=None'
    with pytest.raises(ValueError, match=text): learn.fit(1)

Pair = namedtuple('Pair', 'a b')

IMAGE = torch.zeros(3,8,8)
CROPS = [torch.zeros(3,5,7), torch.zeros(3,6,4), torch.zeros(3,2,2), torch.zeros(3,9,9)]

@pytest.mark.parametrize('b,n', [
    ((torch.zeros(5,3), torch.zeros(5)), 5),
    (([IMAGE]*2, [dict(a=torch.zeros(3))]*2), 2),
    (([IMAGE]*3, [dict(a=torch.zeros(1))]*3), 3),
    (((torch.zeros(4,3), torch.zeros(4,2)), torch.zeros(4)), 4),
    (([torch.zeros(2,3), torch.zeros(2,2)], torch.zeros(2,1)), 2),
    ((dict(x=torch.zeros(4,3), t=1.), torch.zeros(4)), 4),
    ((['a','b','c'], torch.zeros(3)), 3),
    ((Pair(torch.zeros(2,3), torch.zeros(2)), torch.zeros(2)), 2),
    ((torch.zeros(6,3),), 6),
    ((np.zeros((4,2)), np.zeros(4)), 4),
    ((torch.zeros(0,3), torch.zeros(0)), 0),
    ((CROPS, torch.zeros(4)), 4)])
def test_the_size_of_a_batch_is_that_of_its_inputs(b, n): assert size_of(b, 1) == n

def test_the_dataloaders_size_decides_where_the_batch_does_not():
    images = [torch.zeros(3,8,8)]*2
    assert n_samples((images,), (), bs=2) == 2 and n_samples((images,)) == 3

def test_parts_of_all_samples_are_no_samples():
    "Two inputs of two samples each, as default_collate makes them of a tuple"
    a,b = torch.randn(2,3),torch.randn(2,5)
    for pair in [a,b],(a,b):
        x,_ = join([(pair, torch.zeros(2)), (pair, torch.zeros(2))])
        assert type(x) is type(pair) and [o.shape for o in x] == [(4,3),(4,5)]
        assert [[p.shape for p in o[0]] for o in cut((pair, torch.zeros(2)), [1,1])] == [[(1,3),(1,5)]]*2

def test_three_images_of_three_channels():
    "Where shapes do not decide, other lists of samples do"
    images,targets = [torch.full((3,4,4), float(i)) for i in range(3)],[dict(k=torch.zeros(i)) for i in range(3)]
    x,y = join([(images, targets), (images, targets)])
    assert len(x) == len(y) == 6 and all(o.shape == (3,4,4) for o in x)
    x,_ = join([(images, torch.zeros(3)), (images, torch.zeros(3))])  # three inputs, as far as anybody can tell
    assert [o.shape for o in x] == [(6,4,4)]*3

def test_cut_and_join_are_inverse():
    second = dict(y=torch.arange(7), names=list('abcdefg'), w=.3)
    b = (torch.randn(7,3), second, (torch.randn(7,2), [dict(n=i) for i in range(7)]))
    pieces = cut(b, [2,4,1])
    back = join(pieces, [2,4,1])
    assert torch.equal(back[0], b[0]) and torch.equal(back[1]['y'], b[1]['y'])
    assert back[1]['names'] == b[1]['names'] and back[1]['w'] == .3
    assert torch.equal(back[2][0], b[2][0]) and back[2][1] == b[2][1]

def test_arrays_of_strings_are_cut_and_joined():
    "NumPy's as well as lists: names of samples"
    names = np.array(['a.png','b.png','c.png'])
    pieces = cut((torch.arange(3), names), [2,1])
    assert [o[1].tolist() for o in pieces] == [['a.png','b.png'],['c.png']]
    assert all(isinstance(o[1], np.ndarray) for o in pieces)
    assert join(pieces, [2,1])[1].tolist() == names.tolist()

def test_detections_of_micro_batches_are_joined():
    first,second = [dict(s=torch.zeros(3)), dict(s=torch.zeros(0))],[dict(s=torch.ones(1))]
    pred = join_part([first, second], [2,1], 'the prediction')
    assert [len(o['s']) for o in pred] == [3,0,1]

LAYOUTS = dict(
    rows=lambda x: x,
    columns=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    channels_last=lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    transposed=lambda x: x.transpose(1, -1).contiguous().transpose(1, -1))

@pytest.mark.parametrize('make', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('shape', [(8,5), (8,3,4,6), (8,1,4,6)])
@pytest.mark.parametrize('k', [1,2,3])
def test_joined_tensors_have_the_memory_layout_of_their_parts(make, shape, k):
    big = make(torch.randn(shape))
    parts = big.split(k)
    # Of one sample alone it cannot be told
    if k > 1: parts = [o.clone(memory_format=torch.preserve_format) for o in parts]
    got, = join([(o,) for o in parts])
    assert torch.equal(got, big) and got.stride() == big.stride()


# --- DataLoaders that are something else than they say

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, says, has): self.says,self.has = says,has
    def __len__(self): return self.says
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        return iter([(torch.randn(3, generator=g), torch.randn(1, generator=g)) for _ in range(self.has)])

ENDS = [{}, dict(last='drop'), dict(bn_bs='window'), dict(bn_bs=4), dict(bn_bs='window', last='drop'),
        dict(bn_bs=2, last='drop')]

@pytest.mark.parametrize('kw', ENDS, ids=str)
@pytest.mark.parametrize('says,has', [(16,36), (16,32), (16,34), (2,20), (14,16), (36,16), (36,36), (30,20)])
@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_streams_step_in_windows_until_they_end(kw, says, has):
    dl = torch.utils.data.DataLoader(Stream(says, has), batch_size=2)
    m = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3,1))
    dls = DataLoaders(dl, dl, device='cpu')
    learn = Learner(dls, m, loss_func=MSELossFlat(), cbs=[AccumulateGradBN(4, **kw), Steps()], opt_func=SGD)
    silent(learn)
    if kw.get('last') == 'drop' and says < 8:
        with pytest.raises(ValueError, match='no optimizer step'): do_fit(learn)
        return
    do_fit(learn, 2)
    one = list(range(8, has+1, 8)) + ([has] if has%8 and kw.get('last') != 'drop' else [])
    assert learn.steps.at[:len(one)] == one and len(learn.steps.at) == 2*len(one)
    assert m[0].num_batches_tracked == 2*len(one)

def test_nothing_is_fetched_ahead_before_the_end_that_was_said():
    "So that the order of random numbers, of transforms and of dropout, is that of the large batch"
    fetched = []
    class DL:
        bs,n = 2,12
        def __len__(self): return 6
        def __iter__(self):
            for i in range(6):
                fetched.append(i)
                yield torch.zeros(2,3),torch.zeros(2)
    for k,_ in enumerate(BNBatches(DL(), 2, None, False)): assert fetched == list(range(k+1))
    fetched.clear()
    for k,_ in enumerate(BNBatches(DL(), 2, float('inf'), False)): assert fetched == list(range(2*k+2))

def test_ahead():
    a = Ahead([1,2])
    assert not a.is_done() and not a.is_done() and next(a) == 1 and next(a) == 2 and a.is_done() and list(a) == []
