"""What `image_normalize` costs: `python tools/normalize.py`. 16 x 3 x 256 x 256 float32 and uint8 on the CPU, all ways in turn; medians, and ratios side by side.

MONAI's `NormalizeIntensity` takes part if it is installed (`pip install monai`)."""
import argparse, time
import numpy as np, torch
import torch.nn.functional as F
from fastai_bn.all import image_normalize

def stretched(x:np.ndarray) -> np.ndarray:
    "As csbdeep does it: two percentiles of the image's channels, in NumPy"
    lo,hi = (np.percentile(x, q, axis=(1,2), keepdims=True) for q in (1,99.8))
    return ((x-lo)/(hi-lo+1e-20)).astype(np.float32)

def main(a):
    torch.set_num_threads(a.threads)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(16,3,256,256, generator=g)*200+50*torch.randn(16,3,1,1, generator=g)
    xs = {'float32':x, 'uint8':x.clamp(0, 255).byte()}
    ways = {'F.instance_norm':lambda x: F.instance_norm(x.float()), "per='channel', stat='std'":image_normalize, "per='image', stat='std'":lambda x: image_normalize(x, 'image'),
            "stat='minmax'":lambda x: image_normalize(x, stat='minmax'), "stat='percentile'":lambda x: image_normalize(x, stat='percentile'), "mask='nonzero'":lambda x: image_normalize(x, mask='nonzero'),
            'np.percentile per image':lambda x: [stretched(o) for o in x.numpy()]}
    try:
        from monai.transforms import NormalizeIntensity
        norm = NormalizeIntensity(channel_wise=True)
        ways['MONAI NormalizeIntensity(channel_wise=True) per image'] = lambda x: [norm(o) for o in x]
    except ImportError: pass
    for dtype,x in xs.items():
        ts = {k:[] for k in ways}
        for i in range(a.n+1):
            for k,f in ways.items():
                t = time.perf_counter(); f(x)
                if i: ts[k].append(time.perf_counter()-t)
        base = np.array(ts['F.instance_norm'])
        for k,t in ts.items(): print(f"{dtype:8} {k:55} {1e3*np.median(t):7.2f} ms   {np.median(np.array(t)/base):6.2f} times instance_norm")
        for peer,own in ('MONAI NormalizeIntensity(channel_wise=True) per image',"per='channel', stat='std'"),('np.percentile per image',"stat='percentile'"):
            if peer in ts: print(f"{dtype:8} {peer} over {own}: {np.median(np.array(ts[peer])/np.array(ts[own])):.1f}")

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('-n', type=int, default=15, help='rounds')
    main(p.parse_args())
