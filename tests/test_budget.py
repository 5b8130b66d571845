"`AccumulateGradBN(budget=...)`: the large batch's fit to the last bit, whatever the budget"
import copy

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from fastai.vision.all import (Callback, CancelBatchException, CrossEntropyLossFlat, GradientAccumulation,
                               MixUp, load_learner, set_seed)

from fastai_bn.accumulate import *
from fastai_bn.paging import ActivationPager
from helpers import (Boom, CPUScaler, RaiseAt, assert_pristine, assert_same_fit, do_fit, fits, get_dls, get_learner,
                     head_net, labels, learner, one_cycle, reference_fit, shuffled, small_unet,
                     snapshot, tilted, wide, wide_dls, windows_of)

pytestmark = pytest.mark.filterwarnings('ignore:A budget on the CPU', 'ignore:.*alone needs')

@pytest.fixture(scope='module')
def peak():
    "Bytes that a window of 16 takes"
    x,y = next(iter(wide_dls(16, 16).train))
    with ActivationPager(None) as p: F.cross_entropy(wide()(x), y).backward()
    assert p.peak > 16*16*16*16*4*3
    return p.peak

def fit_pair(n, bs, n_step, budget, last='step', cbs=lambda: [], **kw):
    def fit(bs, *mine):
        set_seed(3)
        return one_cycle(learner(wide_dls(n, bs, last=='drop'), wide(), [*mine, *cbs()], **kw))
    return fit(bs*n_step),fit(bs, AccumulateGradBN(n_step, bn_bs='window', last=last, budget=budget))

@pytest.mark.slow
@pytest.mark.parametrize('share', [.5, .1, 0])
@pytest.mark.parametrize('n,bs,n_step,last', [(48,2,8,'step'), (54,1,16,'step'), (54,4,4,'step'), (54,2,8,'drop')])
def test_any_budget_is_the_large_batch(peak, n, bs, n_step, last, share):
    big,ours = fit_pair(n, bs, n_step, max(1, int(share*peak)), last)
    assert_same_fit(big, ours)
    pager = ours.accumulate_grad_bn.pager
    assert pager.moved > 0 and pager.host_peak > 0 and pager.peak < peak

@pytest.mark.slow
@pytest.mark.parametrize('bn_bs', [None, 4, 8])
def test_a_budget_changes_no_other_mode_either(bn_bs):
    def fit(budget):
        set_seed(3)
        return one_cycle(learner(wide_dls(54, 4), wide(), AccumulateGradBN(4, bn_bs=bn_bs, budget=budget)))
    a,b = fit(None),fit(1)
    assert_same_fit(a, b)
    assert b.accumulate_grad_bn.pager.moved > 0 and a.accumulate_grad_bn.pager is None

@pytest.mark.parametrize('cbs', [lambda: [CPUScaler()], lambda: [MixUp()]], ids=['amp','mixup'])
def test_budget_with_other_callbacks(cbs):
    assert_same_fit(*fit_pair(48, 2, 8, 1, cbs=cbs, loss_func=CrossEntropyLossFlat()))

@pytest.mark.slow
def test_unet():
    xs = tilted(8, size=(64,64)).float()
    ys = (xs.mean(1)>0).long()
    def fit(bs, *cbs):
        set_seed(3)
        model = small_unet((64,64))
        learn = learner(get_dls(xs, ys, bs), model, cbs, loss_func=CrossEntropyLossFlat(axis=1), metrics=[])
        do_fit(learn, 1, 1e-3)
        return learn
    big,ours = fit(4),fit(1, AccumulateGradBN(4, bn_bs='window', budget='2MB'))
    for (k,a),b in zip(big.model.state_dict().items(), ours.model.state_dict().values()): assert torch.equal(a, b), k
    assert ours.accumulate_grad_bn.pager.moved > 0

def test_callbacks_may_read_without_dispatch():
    "A NumPy view of what was moved away would be of freed memory"
    class Read(Callback):
        order = 8
        def after_loss(self):
            if not self.training: return
            for _ in range(3): torch.randn(200,200).mul(2).add(1)  # others use memory meanwhile
            self.seen = [t.detach().numpy().copy() for t in (self.x,self.y,self.pred,self.loss)]
        def after_batch(self):
            if self.training:
                for a,t in zip(self.seen, (self.x,self.y,self.pred,self.loss)):
                    assert (torch.as_tensor(a) == t.detach()).all() and t.isfinite().all()
                self.n = getattr(self, 'n', 0)+1
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.c,self.b = nn.Conv2d(3,16,3,padding=1),nn.BatchNorm2d(16)
        def forward(self, x): return self.b(self.c(x)).relu()
    xs = tilted(32, size=(16,16)).float()
    dls,cbs = get_dls(xs, xs.repeat(1,6,1,1)[:,:16], 2),[AccumulateGradBN(8, bn_bs='window', budget=1), Read()]
    learn = get_learner(dls, Big(), cbs, loss_func=nn.MSELoss())
    do_fit(learn)
    assert learn.read.n == 2

EVENTS = ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_batch']

@pytest.mark.parametrize('where', EVENTS)
def test_exceptions_leave_no_mode_behind(where):
    xs,ys = tilted(32, size=(16,16)).float(),labels(32)
    cbs = [AccumulateGradBN(8, bn_bs='window', budget=1), RaiseAt(where, 1, Boom('x'), 20)]
    learn = get_learner(get_dls(xs, ys, 2), wide(), cbs)
    with pytest.raises(Boom): do_fit(learn)
    assert not _get_current_dispatch_mode_stack()
    assert_pristine(learn)
    assert all(p.isfinite().all() and p.untyped_storage().nbytes() for p in learn.model.state_dict().values())
    learn.remove_cb(learn.raise_at)
    do_fit(learn)

@pytest.mark.parametrize('where', ['after_pred','after_loss','before_backward'])
def test_cancelled_batches_leave_no_mode_behind(where):
    xs,ys = tilted(32, size=(16,16)).float(),labels(32)
    cbs = [AccumulateGradBN(8, bn_bs='window', budget=1), RaiseAt(where, 0, CancelBatchException(), 20)]
    learn = get_learner(get_dls(xs, ys, 2), wide(p=0), cbs)
    modes = []
    class See(Callback):
        def after_batch(self): modes.append(_get_current_dispatch_mode_stack())
    learn.add_cb(See())
    do_fit(learn)
    assert len(modes) > 2 and not any(modes)
    ref = get_learner(get_dls(xs[16:], ys[16:], 16), wide(p=0))
    do_fit(ref)
    for a,b in zip(learn.model.state_dict().values(), ref.model.state_dict().values()): assert torch.equal(a, b)

def test_export_with_a_budget(tmp_path):
    learn = one_cycle(learner(wide_dls(32, 2), wide(), AccumulateGradBN(8, bn_bs='window', budget='1MB')), 1)
    learn.export(tmp_path/'e.pkl')
    cb = load_learner(tmp_path/'e.pkl').accumulate_grad_bn
    assert cb.pager.budget == '1MB' and cb.pager.moved == 0 and cb.bn_bs == 'window'
    assert copy.deepcopy(learn.accumulate_grad_bn).budget == '1MB'

@pytest.mark.parametrize('bn_bs', ['window', 4])
def test_export_and_save_in_mid_window(tmp_path, bn_bs):
    class MidExport(Callback):
        order = 70
        def after_batch(self):
            if self.training and self.iter == 1:
                self.learn.export(tmp_path/'e.pkl')
                self.learn.save(tmp_path/'s')
    learn = learner(wide_dls(32, 2), wide(), [AccumulateGradBN(8, bn_bs=bn_bs, budget=1), MidExport()])
    do_fit(learn)
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.dls = learn.dls
    do_fit(loaded)  # fits on
    assert not _get_current_dispatch_mode_stack()
    assert all(v.isfinite().all() for v in loaded.model.state_dict().values())

def test_lr_find_with_a_budget(tmp_path):
    def find(**kw):
        set_seed(3)
        learn = learner(wide_dls(32, 2), wide(), AccumulateGradBN(8, bn_bs='window', **kw), path=tmp_path)
        with learn.no_logging(): learn.lr_find(num_it=7, show_plot=False, stop_div=False)
        return [o.item() for o in learn.recorder.losses]
    assert find() == find(budget=1)

def test_validation_runs_outside_the_budget():
    learn = learner(wide_dls(32, 2), wide(), AccumulateGradBN(8, bn_bs='window', budget=1))
    modes = []
    class See(Callback):
        def after_pred(self): modes.append((self.training, len(_get_current_dispatch_mode_stack())))
    learn.add_cb(See())
    do_fit(learn)
    assert set(modes) == {(True,1), (False,0)}

@pytest.mark.parametrize('budget', [0, -1, 1., 2.5, True, 'lots', '6', [1]])
def test_bad_budget(budget):
    with pytest.raises(ValueError, match='`budget` must be'): AccumulateGradBN(4, budget=budget)

@pytest.mark.slow
@pytest.mark.parametrize('in_place', [False,True])
def test_a_compiled_model_says_that_it_runs_uncompiled(in_place):
    torch._dynamo.reset()
    model = head_net(p=0.).double()
    if in_place: model.compile(backend='aot_eager')
    else: model = torch.compile(model, backend='aot_eager')
    learn = get_learner(get_dls(tilted(16), labels(16), 4), model, AccumulateGradBN(2, bn_bs='window', budget=2**30))
    with pytest.warns(UserWarning, match='runs uncompiled'): do_fit(learn, 1)
