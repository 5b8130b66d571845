"Fake tensors have the sizes of the CPU's: tried with PyTorch's own data base of operators"
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastai_bn.fakes import CannotPlan, Fakes
from helpers import data_base, tensors

pytestmark = pytest.mark.filterwarnings('ignore')
REFUSED = ('ctc_loss', 'embedding_bag', 'fractional_max_pool3d', 'gaussian_nll_loss', 'multi_margin_loss',
           'multilabel_margin_loss')

class Sizes(TorchDispatchMode):
    "Note the bytes of all storages that operations return, but for views"
    def __init__(self):
        super().__init__()
        self.found = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == 'prim' or func.is_view: return out
        self.found.append((str(func), [o.untyped_storage().nbytes() for o in tensors(out)]))
        return out

def sizes(op, args, kwargs):
    "Run an operator forward and backward; return the bytes of all that was made"
    with Sizes() as mode:
        outs = [o for o in tensors(op(*args, **kwargs)) if o.requires_grad]
        ins = [o for o in tensors(args, kwargs) if o.requires_grad]
        if outs and ins: torch.autograd.grad([o.sum() for o in outs], ins, allow_unused=True)
    return mode.found

def fake_sizes(op, args, kwargs):
    fakes = Fakes()
    fake = lambda t: fakes.of(t.detach()).requires_grad_(t.requires_grad)
    args,kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
    with fakes.mode: return sizes(op, args, kwargs)

def samples(dtype):
    "A sample of the inputs of each layer and loss"
    for op in data_base('common_methods_invocations', 'op_db'):
        if not op.name.startswith('nn.functional.') or dtype not in op.supported_backward_dtypes('cpu'): continue
        found = op.sample_inputs('cpu', dtype, requires_grad=op.supports_autograd)
        for o in itertools.islice(found, 1): yield op,(o.input, *o.args),o.kwargs

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_layers_and_losses(dtype):
    different,refused,n = set(),set(),0
    for op,args,kwargs in samples(dtype):
        real,name = sizes(op, args, kwargs),op.name.removeprefix('nn.functional.')
        try: fake = fake_sizes(op, args, kwargs)
        except CannotPlan: refused.add(name)
        else:
            n += 1
            if fake != real: different.add(name)
    assert n > 60 and not different
    assert refused <= set(REFUSED)
