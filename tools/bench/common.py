"Data, nets and fits that the pages share"
import importlib
import tempfile
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, find_bs, noop, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import Image
from fastai_bn.all import HPA_LABELS, HPADataLoaders, make_hpa
from fastai_bn.demo import small_resnet

warnings.filterwarnings('ignore', '.*(scheduler.step|torch.jit)')

@dataclass
class Images:
    "A classification: images [N, C, H, W], standardised per channel; targets [N], or [N, L] of several labels"
    train: tuple
    valid: tuple
    @property
    def multi(self) -> bool: return self.train[1].dim() == 2
    @property
    def n_out(self) -> int: return self.train[1].shape[1] if self.multi else int(self.train[1].max())+1
    def loss(self, pred:Tensor, y:Tensor, **kw) -> Tensor:
        f = F.binary_cross_entropy_with_logits if self.multi else F.cross_entropy
        return f(pred, y, **kw)

def standardised(train:tuple, valid:tuple, n_train:int, n_valid:int) -> Images:
    "Standardise images by mean and standard deviation of all training images, and take the first of them"
    x = train[0]
    mean,std = x.mean((0,2,3), keepdim=True),x.std((0,2,3), keepdim=True)
    def part(t, n): return (t[0][:n]-mean)/std,t[1][:n]
    return Images(part(train, n_train), part(valid, n_valid))

@lru_cache(8)
def drawn_tensors(n:int, size:int, seed:int=0, lab_shift:float=0.) -> tuple[Tensor,Tensor]:
    "Drawn images as `make_hpa` writes them, [n, 4, size, size] from 0 to 1, and their labels [n, 28]"
    with tempfile.TemporaryDirectory() as d:
        make_hpa(d, n, size, seed, lab_shift=lab_shift, progress=False)
        dls = HPADataLoaders.from_folder(d, size, 1, num_workers=0)
        items = sorted([o for ds in (dls.train_ds, dls.valid_ds) for o in ds.items])
        load = dls.train_ds.tls[0].tfms
        ys = torch.zeros(n, 28)
        for y,(_,names) in zip(ys, items): y[[HPA_LABELS.index(o) for o in names]] = 1
        return torch.stack([load(o) for o in items]).as_subclass(Tensor),ys

@lru_cache(4)
def drawn(n_train:int, n_valid:int=512, size:int=32) -> Images:
    "Drawn images in the style of the Human Protein Atlas, several labels each"
    x,y = drawn_tensors(n_train+n_valid, size)
    return standardised((x[:n_train],y[:n_train]), (x[n_train:],y[n_train:]), n_train, n_valid)

@lru_cache(4)
def hep2(folder:Path, n_train:int, n_valid:int=1024, size:int=32) -> Images:
    "HEp-2 cells of six classes, in an order that is random and always the same"
    def load(f):
        image = Image.open(f).convert('L').resize((size,size), Image.BOX)
        return torch.tensor(np.array(image), dtype=torch.float32)[None]/255
    def read(part, n):
        fs = sorted(folder.glob(f'{part}/*/*.png'))
        fs = [fs[i] for i in np.random.default_rng(0).permutation(len(fs))[:n]]
        vocab = sorted({f.name for f in (folder/part).iterdir() if f.is_dir()})
        targets = torch.tensor([vocab.index(f.parent.name) for f in fs])
        return torch.stack([load(f) for f in fs]),targets
    return standardised(read('train', n_train), read('valid', n_valid), n_train, n_valid)

def images(data:str, a) -> Images:
    "The images of a data set that tables of classification use"
    return drawn(a.images or 1024) if data == 'drawn' else hep2(a.hep2, a.images or 2048)

def net(o:Images) -> nn.Module:
    "The demo's ResNet at half its width: 0.3 million parameters, 12 BN layers"
    return small_resnet(o.train[0].shape[1], o.n_out, 16)

class TrainLoss(Callback):
    "The mean training loss of each epoch over its samples"
    order = 60
    def __init__(self): self.epochs = []  # not in before_fit, which validation calls too
    def before_train(self): self.total,self.n = 0.,0
    def after_batch(self):
        if not self.training: return
        n = find_bs(self.yb)
        self.total += self.loss.item()*n
        self.n += n
    def after_train(self): self.epochs.append(self.total/self.n)

def learner(o:Images, seed:int, bs:int, cbs=(), make=net) -> Learner:
    "The same weights and order of images for every seed, whatever `bs` and callbacks"
    set_seed(seed)
    def dl(t, **kw): return DataLoader(list(zip(*t)), num_workers=0, **kw)
    dls = DataLoaders(dl(o.train, bs=bs, shuffle=True, drop_last=True), dl(o.valid, bs=64), device='cpu')
    learn = Learner(dls, make(o), loss_func=o.loss, cbs=[*cbs, TrainLoss()])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@torch.no_grad()
def score(model:nn.Module, o:Images, xy:tuple=None) -> dict:
    "Validation loss, and accuracy, or macro F1 where each label is predicted as often as it occurs"
    (x,y),mode = xy or o.valid,model.training
    model.eval()
    p = torch.cat([model(b) for b in x.split(64)])
    model.train(mode)
    value = macro_f1(p, y) if o.multi else (p.argmax(1) == y).float().mean().item()
    return dict(valid_loss=o.loss(p, y).item(), score=value)

def macro_f1(pred:Tensor, y:Tensor) -> float:
    """F1 at the threshold at which as many are predicted as there are, where it is precision and recall, averaged over
    labels that occur 10 times"""
    counts = [int(t.sum()) for t in y.T]
    res = [t[p.topk(k).indices].mean().item() for p,t,k in zip(pred.T, y.T, counts) if k >= 10]
    return float(np.mean(res)) if res else float('nan')

def peer(name:str):
    "A module that may not be installed: None, and a line that says so"
    try: return importlib.import_module(name)
    except ImportError as e:
        print(f"SKIPPED: {name} is not installed ({e}): pip install -e '.[bench]'")
        return None
