"""The small pictures with which the benchmark pages begin: a claim each, drawn from stored results.

Each is a figure by itself, so that two stand side by side on a wide page, and one above the other on a phone."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.results import load

LARGE,PLAIN,OURS,OTHER = 'C0','C1','C2','C3'
WINDOW = "AccumulateGradBN(bn_bs='window')"

def show(*figs:Figure):
    "Display figures, each by itself"
    for fig in figs: display(fig)

def small(title:str, **labels) -> tuple: # Figure and axes
    "Make a figure that notebooks do not display on their own"
    fig,ax = plt.subplots(figsize=(5.2,3.1))
    ax.set(title=title, **labels)
    plt.close(fig)
    return fig,ax

def done(fig:Figure, legend:bool=True) -> Figure:
    "Finish a figure"
    if legend: fig.axes[0].legend()
    fig.tight_layout()
    return fig

def band(ax, df:pd.DataFrame, x:str, value:str, **style):
    "Draw means over seeds, and a band from the lowest to the highest"
    g = df.groupby(x, sort=False)[value]
    mean = g.mean()
    line, = ax.plot(mean.index, mean, **style)
    ax.fill_between(mean.index, g.min(), g.max(), color=line.get_color(), alpha=.15, lw=0)

def bars(ax, means:pd.Series, fmt:str, colours=None):
    "Draw a bar with its number for each entry, the first one on top"
    at = np.arange(len(means))
    ax.barh(at, means, color=colours or LARGE, height=.6)
    for y,v in zip(at, means): ax.text(max(v, 0), y, f' {v:{fmt}}', va='center', fontsize=9)
    ax.set_yticks(at, means.index)
    ax.invert_yaxis()
    ax.margins(x=.18)

def ticks(ax, values):
    "Label an axis at these values alone"
    ax.set_xticks(values, [f'{v:g}' for v in values])
    ax.xaxis.set_minor_formatter(NullFormatter())

# Small batches in training

def outcome(data:str, score:str, title:str) -> Figure:
    "Scores by micro-batch"
    df = load('accumulate', 'outcome')
    df = df[df.data == data]
    fig,ax = small(title, xlabel='micro-batch', ylabel=score, xscale='log')
    ax.axhline(df[df.way == 'batch of 32, BN'].score.mean(), color=LARGE, label='batch of 32')
    ax.axhline(df[df.way == 'GroupNorm, weights standardised'].score.mean(), color='C7', ls=':', label='GroupNorm + WS')
    band(ax, df[df.way == 'plain accumulation'], 'micro', 'score', color=PLAIN, marker='s', label='plain accumulation')
    rings = dict(marker='o', ls='', mfc='none', ms=10)
    band(ax, df[df.way == WINDOW], 'micro', 'score', color=OURS, label="'window'", **rings)
    ticks(ax, (1,2,4,8))
    return done(fig)

def cosines(title:str) -> Figure:
    "Cosine with the gradient of 32"
    df = load('accumulate', 'fidelity')
    df = df[df.data == 'drawn']
    fig,ax = small(title, xlabel='micro-batch', ylabel="cosine with the batch of 32", xscale='log')
    for way,c in {WINDOW:OURS, 'plain accumulation':PLAIN, 'two-phase':OTHER}.items():
        label = "'window'" if way == WINDOW else way
        band(ax, df[df.way == way], 'micro', 'cosine', color=c, marker='o', label=label)
    ax.set_ylim(0, 1.06)
    ticks(ax, sorted(df.micro.unique()))
    return done(fig)

# Population statistics

KINDS = {'moving averages':(PLAIN,'moving averages'), 'precise_bn()':(OURS,'precise_bn()')}

def lag(title:str, data:str='drawn', bs:int=512) -> Figure:
    "Validation loss by epoch, at the largest batch"
    df = load('precise_bn', 'epochs')
    df = df[(df.data == data) & (df.bs == bs)]
    fig,ax = small(title, xlabel='epoch', ylabel='validation loss')
    for k,(c,label) in KINDS.items():
        band(ax, df[df.statistics == k], 'epoch', 'valid_loss', color=c, marker='o', label=label)
    ticks(ax, (1,2,3,4))
    return done(fig)

def domains(title:str) -> Figure:
    "Scores on images of another laboratory"
    df = load('precise_bn', 'domain')
    df = df[df.data == 'drawn'].replace({'images':r'lab_shift=(.*)'}, {'images':r'\1'}, regex=True)
    fig,ax = small(title, xlabel='how far the other laboratory is (lab_shift)', ylabel='macro F1')
    kinds = {'training set':(PLAIN,"the training set's statistics"), 'these images':(OURS,"these images' statistics")}
    for k,(c,label) in kinds.items():
        band(ax, df[df.statistics == k], 'images', 'score', color=c, marker='o', label=label)
    return done(fig)

def samples(title:str) -> Figure:
    "Validation loss by the number of samples"
    df = load('precise_bn', 'samples')
    df = df[df.data == 'drawn']
    fig,ax = small(title, xlabel='samples', ylabel='validation loss')
    averages = df[df.n == 'moving averages'].valid_loss.mean()
    ax.axhline(averages, color=PLAIN, label='moving averages')
    band(ax, df[df.n != 'moving averages'], 'n', 'valid_loss', color=OURS, marker='o', label='precise_bn(n)')
    return done(fig)

def composition(title:str) -> Figure:
    "Validation loss by what batches are made of"
    df = load('precise_bn', 'composition')
    df = df.assign(loss=(df['valid_loss A']+df['valid_loss B'])/2)
    fig,ax = small(title, xlabel='statistics at inference', ylabel='validation loss')
    short = {'moving averages':'averages', 'of both, batches mixed':'mixed', 'of each laboratory for itself':'own'}
    for kind,c in ('mixed',PLAIN),('of one laboratory',OURS):
        part = df[df.batches == kind].replace({'statistics':short})
        band(ax, part, 'statistics', 'loss', color=c, marker='o', label=f'batches {kind}')
    return done(fig)

def population(title:str) -> Figure:
    "Time beside a forward pass"
    df = load('speed', 'population')
    df = df[df.net == 'ResNet-18, bs 4'].fillna(dict(ratio=1)).set_index('way')
    fig,ax = small(title, xlabel='time, to a forward pass')
    bars(ax, df.ratio, '.2f', ['C7',OURS,PLAIN,OTHER])
    return done(fig, legend=False)

def exact(title:str) -> Figure:
    "Largest errors of variances"
    df = load('speed', 'exact')
    worst = df[df.samples.str.startswith('float64')].groupby('way', sort=False).var_error.max()
    fig,ax = small(title, xlabel="largest relative error of a variance, float64", xscale='log')
    bars(ax, worst, '.0e', [OURS,PLAIN,OTHER])
    return done(fig, legend=False)

# U-Nets and single images

NORMS = {'BN (unet_learner)':(PLAIN,'BN, unet_learner'), "GroupNorm, scope='all'":(OURS,'GroupNorm, gn_unet_learner'),
         'BN, in the decoder too (norm_type=NormType.Batch)':(LARGE,'BN in the decoder, too')}

def dice(data:str, title:str) -> Figure:
    "Dice by images per step"
    df = load('unet_norms', 'dice')
    df = df[df.data == data]
    fig,ax = small(title, xlabel='images per step', ylabel='Dice', xscale='log')
    for k,(c,label) in NORMS.items():
        if (df.norm == k).any(): band(ax, df[df.norm == k], 'bs', 'dice', color=c, marker='o', label=label)
    ticks(ax, (1,2,4,8))
    return done(fig)

def unet_cost(title:str) -> Figure:
    "Time beside fastai's U-Net"
    df = load('unet_norms', 'cost').fillna(dict(ratio=1)).set_index('way').ratio
    ways = {'unet_learner':'unet_learner', 'unet_learner(norm_type=NormType.Batch)':'BN in the decoder',
            "gn_unet_learner(scope='decoder')":"GN, 'decoder'", "gn_unet_learner(scope='all')":"GN, 'all'"}
    fig,ax = small(title, xlabel="time, to unet_learner's")
    bars(ax, df[list(ways)].rename(ways), '.2f', [PLAIN,LARGE,OURS,OURS])
    return done(fig, legend=False)

EXPOSURES = {'as they are':'as they are', '0.3 times as bright':'x 0.3', '2 times as bright, clipped':'x 2',
             'on a ground of 0.2':'+ 0.2', 'lab_shift=1':'other lab'}
PER = {'training set':(PLAIN,"training set's"), "per='channel', stat='std'":(OURS,'each channel'),
       "per='image', stat='std'":(LARGE,'each image')}

def exposure(title:str) -> Figure:
    "Scores on images of another exposure"
    df = load('image_norm', 'exposure').replace({'images':EXPOSURES})
    fig,ax = small(title, xlabel='validation images', ylabel='macro F1')
    for k,(c,label) in PER.items(): band(ax, df[df.norm == k], 'images', 'score', color=c, marker='o', label=label)
    return done(fig)

def intensity(title:str) -> Figure:
    "Accuracy where brightness is the label"
    df = load('image_norm', 'intensity')
    df = df[(df.half_as_bright == 'all channels') & df.norm.isin(PER)]
    means = df.groupby('norm', sort=False).score.mean()
    fig,ax = small(title, xlabel='accuracy, .5 is a guess')
    bars(ax, means.rename({k:label for k,(_,label) in PER.items()}), '.2f', [PER[k][0] for k in means.index])
    return done(fig, legend=False)

def normalize_cost(title:str) -> Figure:
    "Time beside peers"
    df = load('image_norm', 'cost').fillna(dict(ratio=1))
    df = df[df.dtype == 'float32'].set_index('way').ratio
    ways = {'image_normalize(x)':'image_normalize', 'F.instance_norm':'F.instance_norm',
            "albumentations Normalize('image_per_channel')":'albumentations',
            'MONAI NormalizeIntensity(channel_wise=True)':'MONAI'}
    ways = {k:v for k,v in ways.items() if k in df.index}
    fig,ax = small(title, xlabel="time, to F.instance_norm's")
    bars(ax, df[list(ways)].rename(ways), '.2f', [OURS,*['C7']*(len(ways)-1)])
    return done(fig, legend=False)

# Speed and memory

def memory(data:str, title:str) -> Figure:
    "Seconds and peaks of one gradient, on a CPU"
    df = load('speed', 'memory')
    df = df[df.data == data]
    fig,ax = small(title, xlabel='peak of activations, MiB', ylabel='time, to plain accumulation', xscale='log')
    paged = df[df.way.str.startswith('paged') & ~df.way.str.contains('copies')]
    ax.plot(paged.peak_MiB, paged.ratio, 'o', color=OURS, label='paged: the large batch')
    ways = {'large batch':('s',LARGE,'large batch'), 'plain accumulation, 8 x 2':('D',PLAIN,'plain accumulation'),
            'activation checkpointing, each block':('^',OTHER,'checkpointing'),
            'saved tensors in host memory':('v','C4','save_on_cpu')}
    for way,(marker,c,label) in ways.items():
        row = df[df.way == way].iloc[0].fillna(1)
        ax.plot(row.peak_MiB, row.ratio, marker, color=c, ls='', label=label)
    ticks(ax, (50,100,200,400))
    return done(fig)

def modelled(data:str, title:str) -> Figure:
    "Time on cards under shares of the memory, modelled"
    df = load('speed', 'modelled')
    df = df[df.data == data]
    fig,ax = small(title, xlabel='share of the memory', ylabel='time, to the large batch (modelled)')
    for (card,rows),c in zip(df.groupby('card', sort=False), (OURS,LARGE,'C4')):
        for end,ls in ('made again','-'),('copies only',':'):
            part = rows[rows.way.str.endswith(f'%, {end}')]
            label = card if ls == '-' else None
            ax.plot(part.way.str.split(' %').str[0].astype(int), part.ratio, ls, marker='o', color=c, label=label)
    ax.plot([], [], ':', color='C7', label='copies only')
    ax.set_xticks((20,40,60), ('20 %','40 %','60 %'))
    return done(fig)

def lock_step(title:str) -> Figure:
    "Peaks by window, under one budget"
    df = load('speed', 'windows')
    fig,ax = small(title, xlabel='images in the window', ylabel='MiB', xscale='log', yscale='log')
    ours = df[df.way == 'lock step, paged']
    ax.plot(ours.window, ours.host_MiB, 's--', color='C7', label='waiting in host memory')
    ax.plot(ours.window, ours.peak_MiB, 'o-', color=OURS, label='peak on the device')
    ticks(ax, ours.window)
    return done(fig)

def steps(title:str) -> Figure:
    "Time of a training step beside fastai's own"
    df = load('speed', 'steps')
    df = df[(df.pixels == 96) & df.way.str.match(r'(Acc|Grad)\w+(\(bn_bs=\'window\'\))?$')].fillna(dict(ratio=1))
    fig,ax = small(title, xlabel="time of a step, to GradientAccumulation's")
    means = df.set_index('way').ratio.rename({WINDOW:"'window'"})
    bars(ax, means, '.2f', [PLAIN,LARGE,OURS])
    return done(fig, legend=False)

def conversion(title:str) -> Figure:
    "Time of converting a ResNet-18, and whether it keeps what the layers have learnt"
    df = load('speed', 'conversion').fillna(dict(ratio=1))
    kept = ['keeps weights' if k else 'new weights' for k in df.weights_kept]
    fig,ax = small(title, xlabel="time, to copy.deepcopy's")
    names = [f'{way.split("(")[0]}\n{k}' for way,k in zip(df.way, kept)]
    bars(ax, pd.Series(df.ratio.values, names), '.2f', [OURS if o.startswith('bn_to_gn') else 'C7' for o in names])
    return done(fig, legend=False)

def by_hand(title:str) -> Figure:
    "Peaks of BN written by hand, and native"
    df = load('speed', 'by_hand').set_index('way')
    fig,ax = small(title, xlabel='peak of activations, MiB')
    ways = {'native BN':'native BN', 'native BN, moments captured':'captured', 'BN by hand':'by hand'}
    bars(ax, df.peak_MiB[list(ways)].rename(ways), '.0f', [LARGE,OURS,PLAIN])
    return done(fig, legend=False)
