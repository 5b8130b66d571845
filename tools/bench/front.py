"The picture on the first page: training losses of three ways, and the memory of a large batch under budgets"
import hashlib
from pathlib import Path

from fastai.vision.all import GradientAccumulation
from matplotlib import rc_context
from fastai_bn.all import AccumulateGradBN
from fastai_bn.picture import count_memory, picture
from bench.common import images, learner
from bench.results import RESULTS, Table, load

BS,N_STEP,LR = 2,16,3e-3
LARGE,PLAIN,WINDOW = 'batch of 32','2 x 16',"2 x 16, bn_bs='window'"
FILES = RESULTS.parents[1]/'images'

def losses(data, seed, a):
    "Training loss by epoch of the demo's net on its kind of images: one recipe, one-cycle to 3e-3 with Adam"
    n = BS*N_STEP
    ways = {
        LARGE: (n, []),
        PLAIN: (BS, [GradientAccumulation(n)]),
        WINDOW: (BS, [AccumulateGradBN(N_STEP, bn_bs='window', last='drop')])}
    for way,(bs,cbs) in ways.items():
        learn = learner(images(data, a), seed, bs, cbs)
        learn.fit_one_cycle(a.epochs or 6, LR)
        for epoch,loss in enumerate(learn.train_loss.epochs, 1): yield dict(way=way, epoch=epoch, train_loss=loss)

CARDS = 'T4','V100','A100'

def memory(data, seed, a):
    "Peaks of a ResNet-50's activations, and its windows' seconds on cards that are not there, modelled"
    for card in CARDS:
        for row in count_memory(BS, N_STEP, card=card).to_dict('records'): yield dict(card=card, **row)

def digest() -> str:
    "Hash the results that the picture is drawn from, so that a picture of others can be told"
    return hashlib.sha256((RESULTS/'front.jsonl').read_bytes()).hexdigest()[:16]

def draw(folder:Path=FILES):
    "Draw the stored results, for light and for dark pages"
    by_way = load('front', 'losses').pivot_table('train_loss', ['way','seed'], 'epoch', sort=False)
    curves = {k:by_way.loc[k].to_numpy() for k in (LARGE,PLAIN,WINDOW)}
    taken = load('front', 'memory')
    taken = taken[taken.card == CARDS[0]]
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(Date=None, Description=f'results {digest()}')
    for name,dark in ('light',False),('dark',True):
        fig = picture(curves, taken, BS, N_STEP, dark)
        # A drawing of the same numbers is the same file
        with rc_context({'svg.hashsalt':'fastai_bn'}):
            fig.savefig(folder/f'front-{name}.svg', metadata=about, transparent=True)

TABLES = dict(losses=Table(losses), memory=Table(memory, data=('resnet50',), seeds=None))

if __name__ == '__main__': draw()
