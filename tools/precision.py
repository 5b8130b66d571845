"""How exact population statistics are: `python tools/precision.py` (fvcore's row where it is installed: pip install fvcore).

The first BN layer's running statistics against a NumPy two-pass mean and unbiased variance over all samples: largest relative error over the channels."""
import warnings
warnings.filterwarnings('ignore')

import numpy as np, pandas as pd, torch
from torch import nn
from torch.optim.swa_utils import update_bn
from fastai_bn.all import precise_bn
try: from fvcore.nn.precise_bn import update_bn_stats
except ImportError: update_bn_stats = None

def ours(m, xs): precise_bn(m, xs, progress=False)
WAYS = {'precise_bn': ours, 'torch update_bn': lambda m, xs: update_bn(xs, m), **({'fvcore update_bn_stats': lambda m, xs: update_bn_stats(m, xs, len(xs), progress='none')} if update_bn_stats else {})}

def tilted(n:int, dtype) -> torch.Tensor:
    "Samples of [n,3,6,6] that differ in mean and scale, in an order: the first are dark, the last bright"
    torch.manual_seed(0)
    return torch.randn(n,3,6,6, dtype=dtype)*torch.rand(n,1,1,1, dtype=dtype) + torch.linspace(-2, 2, n, dtype=dtype).view(-1,1,1,1)

def errors(x:torch.Tensor, sizes:list) -> dict:
    a = np.ascontiguousarray(x.double().numpy().swapaxes(0,1).reshape(x.shape[1],-1))
    mean,var,res = a.mean(1),a.var(1, ddof=1),{}
    for name,f in WAYS.items():
        m = nn.Sequential(nn.BatchNorm2d(3)).to(x.dtype).train()
        try: f(m, list(x.split(sizes)))
        except Exception as e: res[name] = type(e).__name__; continue
        res[name] = ' / '.join(f'{max(abs(g-w)/abs(w) for g,w in zip(got.tolist(), want)):.0e}' for got,want in ((m[0].running_mean,mean),(m[0].running_var,var)))
    return res

if __name__ == '__main__':
    rows = {f'float64, tilted, {name}': errors(tilted(sum(sizes), torch.float64), sizes)
            for name,sizes in {'bs 1':[1]*64, 'bs 2':[2]*32, 'bs 2, last 1':[2]*32+[1], 'bs 32, last 5':[32,32,5], 'uneven':[5,1,16,2,40]}.items()}
    torch.manual_seed(0)
    rows['float32, mean 5000, std 1, bs 2'] = errors(torch.randn(500,3,4,4)+5000, [2]*250)
    rows['float32, mean 5000, std 1, bs 32'] = errors(torch.randn(500,3,4,4)+5000, [32]*15+[20])
    print('relative error of mean / variance'); print(pd.DataFrame(rows).T.to_string())
