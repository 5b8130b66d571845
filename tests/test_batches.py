"What a sample is: batches of everything that people's collate functions return, joined, cut and counted"
from collections import namedtuple

import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, L, Learner, MSELossFlat, noop
from fastai.callback.progress import ProgressCallback

from fastai_bn.all import AccumulateGradBN, loss_denominator
from fastai_bn.batches import Ahead, BNBatches, CannotJoin, cut, join, join_part, n_samples, size_of
from conftest import assert_same, do_fit

N_BOXES = [4,2,1,1,2,3,0,1]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
AREAS = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))

def boxes(i): return dict(boxes=torch.full((N_BOXES[i],4), float(i)), area=AREAS[i])
def stack(idx, f): return torch.stack([f(i) for i in idx])

# Collate functions as people write them: indices -> inputs and targets. The loss asks the targets for areas
KINDS = dict(
    targets_list=lambda idx: (stack(idx, IMAGES.__getitem__), [boxes(i) for i in idx]),
    both_lists=lambda idx: ([IMAGES[i] for i in idx], [boxes(i) for i in idx]),
    both_tuples=lambda idx: (tuple(IMAGES[i] for i in idx), tuple(boxes(i) for i in idx)),
    fastcore_lists=lambda idx: (stack(idx, IMAGES.__getitem__), L(boxes(i) for i in idx)),
    ids=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], list(idx)),
    names=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], [f'{i}.png' for i in idx]),
    nones=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], [None for _ in idx]),
    arrays=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], np.array(idx)),
    temperature=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], torch.tensor(.5)),
    a_number=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], .5),
    class_weights=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], torch.arange(5.)),
    ragged=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], [torch.full((N_BOXES[i],4), 1.) for i in idx]),
    ctc=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], torch.cat([torch.full((N_BOXES[i],), i) for i in idx]), torch.tensor([N_BOXES[i] for i in idx])),
    flattened=lambda idx: (stack(idx, IMAGES.__getitem__), AREAS[idx], torch.cat([torch.full((3,), i) for i in idx])))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.c,self.bn,self.l = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.Linear(4,1)
    def forward(self, x): return self.l(self.bn(self.c(x if torch.is_tensor(x) else torch.stack(list(x)))).mean((2,3)))

def loss_func(pred, ts, *rest):
    "Uses all of the targets, in their order"
    areas = ts if torch.is_tensor(ts) else torch.stack([t['area'] for t in ts])
    counts = torch.zeros(len(pred), 1) if torch.is_tensor(ts) else torch.tensor([[float(len(t['boxes']))] for t in ts])
    for o in rest:
        if isinstance(o, list): counts = counts + torch.tensor([[float(len(str(e))) if not torch.is_tensor(e) else float(len(e))] for e in o])
        elif torch.is_tensor(o) and o.dim() and len(o) == len(pred): counts = counts + o[:,None]
    return F.mse_loss(pred, areas+counts)

def fit(kind, bs, *cbs, drop_last=False):
    dl = torch.utils.data.DataLoader(range(8), batch_size=bs, collate_fn=KINDS[kind], drop_last=drop_last)
    dls = DataLoaders(dl, dl, device='cpu')
    dls.n_inp = 1
    learn = Learner(dls, Net(), loss_func=loss_func, cbs=list(cbs), opt_func=SGD)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    do_fit(learn, 2, .1)
    return learn.model

@pytest.mark.parametrize('bs', [1, 2, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_a_window_is_the_large_batch_whatever_is_in_it(kind, bs):
    big,ours = fit(kind, 8),fit(kind, bs, AccumulateGradBN(8//bs, bn_bs='window'))
    for (k,a),b in zip(big.state_dict().items(), ours.state_dict().values()): assert torch.equal(a, b), k

@pytest.mark.parametrize('kind', [k for k in KINDS])
def test_batches_are_cut_as_well(kind):
    "BN batches of 2 out of micro-batches of 4: as micro-batches of 2"
    a,b = fit(kind, 2, AccumulateGradBN(4)),fit(kind, 4, AccumulateGradBN(2, bn_bs=2))
    assert_same(a, b, 1e-6)

@pytest.mark.parametrize('kind', ['targets_list','both_lists','ctc','ragged'])
def test_samples_weigh_the_same_whatever_they_have(kind):
    "Micro-batches of 3, 3 and 2 images: no BN, so that a window is one batch to rounding. Boxes and characters do not count"
    class Plain(Net):
        def __init__(self): super().__init__(); self.bn = nn.Identity()
    def weights(bs, *cbs):
        torch.manual_seed(1)
        dl = torch.utils.data.DataLoader(range(8), batch_size=bs, collate_fn=KINDS[kind])
        dls = DataLoaders(dl, dl, device='cpu')
        dls.n_inp = 1
        learn = Learner(dls, Plain(), loss_func=loss_func, cbs=list(cbs), opt_func=SGD)
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
        with pytest.warns(UserWarning, match='no BatchNorm') if cbs else noop_context(): do_fit(learn, 1, .1)
        return learn.model
    assert_same(weights(8), weights(3, AccumulateGradBN(3)), 1e-6)

class noop_context:
    def __enter__(self): return self
    def __exit__(self, *args): return False

def test_denominators_are_samples():
    targets = [dict(boxes=torch.zeros(4,4)), dict(boxes=torch.zeros(1,4))]
    assert loss_denominator(nn.MSELoss(), None, targets) == 2
    assert loss_denominator(nn.CTCLoss(), None, torch.zeros(11), torch.tensor([5,6]), n=2) == 2
    assert loss_denominator(nn.CrossEntropyLoss(), None, torch.tensor([1,-100,2])) == 2

@pytest.mark.parametrize('micro,text', [
    ([(torch.zeros(2,3), torch.tensor(.1)), (torch.zeros(2,3), torch.tensor(.2))], r'\[1\] is of \[\] for 2 samples'),
    ([(torch.zeros(2,3), torch.zeros(5,6)), (torch.zeros(2,3), torch.zeros(4,6))], r'\[1\] is of \[5, 6\], \[4, 6\] for 2 samples'),
    ([(torch.zeros(2,3,4),), (torch.zeros(2,3,5),)], r'\[0\] is of \[2, 3, 4\], \[2, 3, 5\]'),
    ([(torch.zeros(2,3), 'a'), (torch.zeros(2,3), 'b')], r"\[1\] is of 'a', 'b'"),
    ([(torch.zeros(2,3), dict(a=1)), (torch.zeros(2,3), dict(b=1))], r'\[1\] is of dict of 1'),
    ([(torch.zeros(2,3), [torch.zeros(2)]*3), (torch.zeros(2,3), [torch.zeros(2)]*4)], r'\[1\] is of list of 3, list of 4'),
    ([(torch.zeros(2,3), dict(t=np.float64(1))), (torch.zeros(2,3), dict(t=np.float64(2)))], r"\['t'\] is of"),
    ([(torch.zeros(2,3), None), (torch.zeros(2,3), torch.zeros(2))], r'\[1\] is of None, \[2\]')])
def test_what_cannot_be_joined_is_named(micro, text):
    with pytest.raises(CannotJoin, match=text): join(micro)

def test_the_fit_says_what_to_do():
    dl = DataLoader([(torch.randn(2,3,6,6+i), torch.zeros(2,1)) for i in range(2)], bs=None)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), Net(), loss_func=MSELossFlat(), cbs=AccumulateGradBN(2, bn_bs='window'))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match=r'cannot be joined.*\[2, 3, 6, 6\], \[2, 3, 6, 7\].*Resize.*bn_bs=None'): learn.fit(1)

Pair = namedtuple('Pair', 'a b')

@pytest.mark.parametrize('b,n', [
    ((torch.zeros(5,3), torch.zeros(5)), 5), (([torch.zeros(3,8,8)]*2, [dict(a=torch.zeros(3))]*2), 2), (([torch.zeros(3,8,8)]*3, [dict(a=torch.zeros(1))]*3), 3),
    (((torch.zeros(4,3), torch.zeros(4,2)), torch.zeros(4)), 4), (([torch.zeros(2,3), torch.zeros(2,2)], torch.zeros(2,1)), 2), ((dict(x=torch.zeros(4,3), t=1.), torch.zeros(4)), 4),
    ((['a','b','c'], torch.zeros(3)), 3), ((Pair(torch.zeros(2,3), torch.zeros(2)), torch.zeros(2)), 2), ((torch.zeros(6,3),), 6), ((np.zeros((4,2)), np.zeros(4)), 4), ((torch.zeros(0,3), torch.zeros(0)), 0),
    (([torch.zeros(3,5,7), torch.zeros(3,6,4), torch.zeros(3,2,2), torch.zeros(3,9,9)], torch.zeros(4)), 4)])
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
    b = (torch.randn(7,3), dict(y=torch.arange(7), names=list('abcdefg'), w=.3), (torch.randn(7,2), [dict(n=i) for i in range(7)]))
    pieces = cut(b, [2,4,1])
    back = join(pieces, [2,4,1])
    assert torch.equal(back[0], b[0]) and torch.equal(back[1]['y'], b[1]['y']) and back[1]['names'] == b[1]['names'] and back[1]['w'] == .3
    assert torch.equal(back[2][0], b[2][0]) and back[2][1] == b[2][1]

def test_detections_of_micro_batches_are_joined():
    pred = join_part([[dict(s=torch.zeros(3)), dict(s=torch.zeros(0))], [dict(s=torch.ones(1))]], [2,1], 'the prediction')
    assert [len(o['s']) for o in pred] == [3,0,1]

@pytest.mark.parametrize('make', [lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
                                  lambda x: x.transpose(1, -1).contiguous().transpose(1, -1)], ids=['rows','columns','channels_last','transposed'])
@pytest.mark.parametrize('shape', [(8,5), (8,3,4,6), (8,1,4,6)])
@pytest.mark.parametrize('k', [1,2,3])
def test_joined_tensors_have_the_memory_layout_of_their_parts(make, shape, k):
    big = make(torch.randn(shape))
    parts = big.split(k) if k == 1 else [o.clone(memory_format=torch.preserve_format) for o in big.split(k)]  # of one sample alone it cannot be told
    got, = join([(o,) for o in parts])
    assert torch.equal(got, big) and got.stride() == big.stride()


# --- DataLoaders that are something else than they say

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, says, has): self.says,self.has = says,has
    def __len__(self): return self.says
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        return iter([(torch.randn(3, generator=g), torch.randn(1, generator=g)) for _ in range(self.has)])

class Steps(Callback):
    order = -100
    def before_fit(self): self.n,self.at = 0,[]
    def after_pred(self): self.n += len(self.x)*self.training
    def after_step(self): self.at.append(self.n)

@pytest.mark.parametrize('kw', [{}, dict(last='drop'), dict(bn_bs='window'), dict(bn_bs=4), dict(bn_bs='window', last='drop'), dict(bn_bs=2, last='drop')], ids=str)
@pytest.mark.parametrize('says,has', [(16,36), (16,32), (16,34), (2,20), (14,16), (36,16), (36,36), (30,20)])
@pytest.mark.filterwarnings('ignore:Length of IterableDataset')
def test_streams_step_in_windows_until_they_end(kw, says, has):
    dl = torch.utils.data.DataLoader(Stream(says, has), batch_size=2)
    m = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3,1))
    learn = Learner(DataLoaders(dl, dl, device='cpu'), m, loss_func=MSELossFlat(), cbs=[AccumulateGradBN(4, **kw), Steps()], opt_func=SGD)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
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
