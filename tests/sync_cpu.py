"""PyTorch's `SyncBatchNorm` and fastai's `distrib_ctx(sync_bn=True)` where there is no GPU, for tests: the five kernels
that CPUs miss, and the three places that ask for another device. All else is PyTorch's and fastai's own code"""
import torch
import torch.distributed as dist
from fastai.distributed import DistributedDL

def _rows(v, x): return v.view(1, -1, *[1]*(x.dim()-2))
def _sum(x): return x.sum([d for d in range(x.dim()) if d != 1])

def stats(x, eps):
    var,mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean,(var+eps).rsqrt()

def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    n,k = counts.sum(),counts[:,None]
    mean = (k*means).sum(0)/n
    var = (k*(invstds.pow(-2)-eps + (means-mean)**2)).sum(0)/n
    if running_mean is not None:
        running_mean.copy_(running_mean*(1-momentum) + momentum*mean)
        running_var.copy_(running_var*(1-momentum) + momentum*var*n/(n-1))
    return mean,(var+eps).rsqrt()

def elemt(x, w, b, mean, invstd, eps):
    y = (x-_rows(mean, x))*_rows(invstd, x)
    return y if w is None else y*_rows(w, x)+_rows(b, x)

def backward_reduce(dy, x, mean, invstd, w, *needs):
    sum_dy,sum_dy_xmu = _sum(dy),_sum(dy*(x-_rows(mean, x)))
    return sum_dy,sum_dy_xmu,sum_dy_xmu*invstd,sum_dy

def backward_elemt(dy, x, mean, invstd, w, sum_dy, sum_dy_xmu, counts):
    n = counts.sum()
    dx = (dy - _rows(sum_dy/n, x) - (x-_rows(mean, x))*_rows(invstd**2*sum_dy_xmu/n, x))*_rows(invstd, x)
    return dx if w is None else dx*_rows(w, x)

KERNELS = dict(stats=stats, gather_stats_with_counts=gather, elemt=elemt, backward_reduce=backward_reduce,
               backward_elemt=backward_elemt)

_lib = torch.library.Library('aten', 'IMPL')
for _name,_f in KERNELS.items(): _lib.impl(f'batch_norm_{_name}', _f, 'CPU')

def _broadcast(self, t, rank):
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

# It calls .cuda()
DistributedDL._broadcast = _broadcast
# It refuses SyncBatchNorm
torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
# What SyncBatchNorm.forward accepts beside GPUs
torch._C._get_privateuse1_backend_name = lambda: 'cpu'
