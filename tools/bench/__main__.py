"""The benchmarks behind the docs' pages

    python tools/bench                                  # every page at its default size, on drawn images: some minutes
    python tools/bench accumulate outcome --seeds 7     # one table, at another seed
    python tools/bench --full --hep2 FOLDER --nuclei FOLDER   # five seeds, and real images

A table's results go to OUT/PAGE.jsonl, a line for each data set and seed, which take the place of earlier ones; the
pages in nbs/benchmarks are drawn from there. FOLDER of HEp-2 cells holds train/ and valid/ with a folder per class;
that of nuclei images/ID.png and labels/ID.png (0: background)."""
import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')  # before torch: fits run side by side, one thread each
root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root/'tools'))
PAGES = 'front','accumulate','precise_bn','unet_norms','image_norm','speed'

def parser():
    p = argparse.ArgumentParser(prog='python tools/bench', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('page', nargs='?', choices=PAGES, help='none: all')
    p.add_argument('tables', nargs='*', help='none: all of the page')
    p.add_argument('--full', action='store_true', help='five seeds in place of three')
    p.add_argument('--seeds', type=int, nargs='+', help='in place of 0, 1 and 2')
    p.add_argument('--hep2', type=Path, metavar='FOLDER', help='HEp-2 cells')
    p.add_argument('--nuclei', type=Path, metavar='FOLDER', help='nuclei and their masks')
    p.add_argument('--data', choices=('drawn','hep2','nuclei','resnet18','resnet50','unet'),
                   help='one data set, or net, of the tables')
    p.add_argument('--images', type=int, help="training images, in place of each data set's own number")
    p.add_argument('--epochs', type=int, help="in place of each table's own number")
    p.add_argument('--rounds', type=int, default=5, help='of timings, in which all ways take turns')
    p.add_argument('--device', default='cpu', help='of the timings')
    p.add_argument('--jobs', type=int, default=os.cpu_count(), help='fits side by side; timings run alone')
    p.add_argument('--out', type=Path, default=root/'nbs/benchmarks/results')
    return p

def check(p:argparse.ArgumentParser, a:argparse.Namespace):
    "Exit with a message if arguments do not go together"
    if (a.images or a.epochs) and a.out == p.get_default('out'):
        p.error('--images and --epochs make other tables than those that are stored: give --out')
    for o in 'hep2','nuclei':
        folder = getattr(a, o)
        if folder and not folder.is_dir(): p.error(f'--{o} {folder}: there is no such folder')

def main(args=None):
    from bench.results import run
    p = parser()
    a = p.parse_args(args)
    check(p, a)
    for page in [a.page] if a.page else PAGES:
        tables = importlib.import_module(f'bench.{page}').TABLES
        wrong = set(a.tables)-set(tables)
        if wrong: p.error(f'{page} has no table {", ".join(wrong)}: it has {", ".join(tables)}')
        run(page, {k:t for k,t in tables.items() if not a.tables or k in a.tables}, a)

if __name__ == '__main__': main()
