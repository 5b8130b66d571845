"The demo: on each kind of data, and what it says of bad arguments"
import io
import re
from contextlib import redirect_stdout

import pandas as pd
import pytest
import torch
from PIL import Image

from fastai_bn import demo
from fastai_bn.draw import make_hpa


def test_on_a_folder_in_the_real_layout(tmp_path, capsys):
    make_hpa(tmp_path/'d', n=20, size=32)
    demo.main(f'--data {tmp_path}/d --size 32 --epochs 2 --n-step 3 --bs 2 --out {tmp_path}/out'.split())
    out,t = capsys.readouterr().out,pd.read_csv(tmp_path/'out'/'demo.csv', index_col=0)
    assert list(t.columns) == ['train_loss','valid_loss','macro_f1','seconds','steps'] and len(t) == 5
    # 16 images an epoch: 2 batches of 6; 16//3 micro-batches in two epochs, carried over; 3 windows
    assert t.steps.tolist() == [4,5,6,6,4]
    assert (tmp_path/'out'/'demo.png').stat().st_size > 10_000
    assert 'GradientAccumulation' in out and 'precise_bn' in out and 'demo.png' in out
    memory = pd.read_csv(tmp_path/'out'/'memory.csv')
    assert memory.way.tolist() == ['whole','accumulated','budget','budget','budget'] and memory.peak.gt(0).all()
    assert t.valid_loss.iloc[2] != t.valid_loss.iloc[3] and t.train_loss.iloc[2] == t.train_loss.iloc[3]
    assert t.seconds.iloc[3] > t.seconds.iloc[2] > 0
    # bn_bs='window'
    assert t.train_loss.iloc[4] == t.train_loss.iloc[0]
    assert t.valid_loss.iloc[4] == pytest.approx(t.valid_loss.iloc[0], rel=1e-5)

@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    "What a whole demo prints, an epoch each"
    path = tmp_path_factory.mktemp('demo')
    make_hpa(path/'d', n=20, size=32, progress=False)
    with redirect_stdout(io.StringIO()) as f:
        demo.main(f'--data {path}/d --size 32 --epochs 2 --n-step 4 --out {path}/out'.split())
    return f.getvalue()

def test_where_nobody_watches_an_epoch_is_a_line(printed):
    "No bar that redraws, of the fits, of `precise_bn`, or of the drawing"
    assert '\r' not in printed and '█' not in printed
    assert re.findall(r'epoch (\d) of 2: training loss \d\.\d{3}, \d+ s', printed) == ['1','2']*4
    assert max(map(len, printed.splitlines()[:-1])) <= 120  # the last names files

def test_in_a_terminal_there_are_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, '_is_terminal', lambda: True)
    make_hpa(tmp_path/'d', n=20, size=32, progress=False)
    demo.main(f'--data {tmp_path}/d --size 32 --epochs 1 --n-step 4 --out {tmp_path}/out'.split())
    out = capsys.readouterr().out
    assert '\r' in out and 'epoch 1 of' not in out

def test_the_table_says_whose_weights_are_the_same(printed):
    rows = {line[:44].strip():line for line in printed.splitlines() if re.search(r' 0\.\d+ .* \d+ s$', line)}
    same = {k:'the same bits' in v for k,v in rows.items() if not k.startswith('epoch')}
    assert same == {'batch of 8':False, '2 x 4, GradientAccumulation':False, '2 x 4, AccumulateGradBN':False,
                    'the same, then precise_bn()':False, "2 x 4, AccumulateGradBN(bn_bs='window')":True}
    assert 'with the weights of the batch of 8, bit for bit' in printed

def trained(loss, *weights):
    row = dict(train_loss=loss, valid_loss=loss, macro_f1=.5, seconds=1., steps=2)
    return demo._Trained('t', row, None, torch.tensor(weights))

def test_the_story_is_made_of_the_numbers():
    "Where accumulation does better, or a device has other bits, it says so"
    a,base = demo.parser().parse_args([]),trained(1., 3., 4.)
    def story(plain, window): return demo._story(a, dict(large=base, plain=plain, window=window))
    assert '25 % higher' in story(trained(1.25, 0., 0.), base) and 'bit for bit' in story(base, base)
    other = story(trained(.5, 0., 0.), trained(1., 3., 4.05))
    assert '50 % lower' in other and 'bit for bit' not in other and 'off by 1 %' in other

@pytest.mark.parametrize('value,base,want', [
    (1.1, 1., '10 % higher'), (1.001, 1., 'about the same'), (0., 0., '0 instead of 0'),
    (float('nan'), 1., 'nan instead of 1'), (1., float('inf'), '1 instead of inf')])
def test_losses_are_compared_also_if_odd(value, base, want): assert demo._change(value, base) == want

@pytest.mark.parametrize('folders,msg', [
    (['a'], 'several classes'),                    # one class
    (['train/a','train/b'], 'The validation set must have images')])
def test_folders_that_cannot_be_compared_are_a_line(folders, msg, tmp_path, capsys):
    "Found before anything is trained"
    for d in folders:
        (tmp_path/'d'/d).mkdir(parents=True)
        for k in range(10): Image.new('L', (20,20)).save(tmp_path/'d'/d/f'{k}.png')
    with pytest.raises(SystemExit) as e:
        demo.main(f'--images {tmp_path}/d --size 32 --bs 1 --n-step 2 --out {tmp_path}/out'.split())
    said = capsys.readouterr()
    assert e.value.code == 2 and msg in said.err and 'epoch 1' not in said.out

@pytest.mark.parametrize('split', [True, False])
def test_on_an_image_folder(tmp_path, split, capsys):
    g = torch.Generator().manual_seed(0)
    for part in ('train','valid') if split else ('.',):
        for c in ('cat','dog'):
            (tmp_path/'d'/part/c).mkdir(parents=True, exist_ok=True)
            for k in range(10):
                a = torch.randint(0, 255, (20,24), generator=g, dtype=torch.uint8).numpy()
                Image.fromarray(a).save(tmp_path/'d'/part/c/f'{k}.png')
    demo.main(f'--images {tmp_path}/d --size 32 --epochs 1 --n-step 2 --bs 4 --out {tmp_path}/out'.split())
    assert 'accuracy' in pd.read_csv(tmp_path/'out'/'demo.csv').columns

def test_generated_data_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    calls = []
    def make_two(path, n, size, seed, progress):
        calls.append(n)
        return make_hpa(path, 2, size, seed, progress=progress)
    monkeypatch.setattr(demo, 'make_hpa', make_two)
    assert demo._generated(16, 0) == demo._generated(16, 0) and calls == [1280]
    assert str(demo._generated(16, 0)).startswith(str(tmp_path))

def test_too_few_images_say_what_helps(tmp_path, capsys):
    make_hpa(tmp_path/'d', n=6, size=32)
    with pytest.raises(SystemExit): demo.main(f'--data {tmp_path}/d --size 32 --out {tmp_path}/out'.split())
    err = capsys.readouterr().err
    assert 'must have a batch of 32 images, got 5' in err and '--n-step' in err

def test_a_broken_image_is_a_line(tmp_path, capsys):
    for part in ('train','valid'):
        (tmp_path/part/'c').mkdir(parents=True)
        for k in range(4): (tmp_path/part/'c'/f'{k}.png').write_bytes(b'x')
    with pytest.raises(SystemExit): demo.main(f'--images {tmp_path} --bs 1 --n-step 2 --out {tmp_path}/out'.split())
    assert 'png' in capsys.readouterr().err

@pytest.mark.parametrize('args,msg', [
    ('--epochs 0','--epochs must be'), ('--n-step 1','--n-step must be an integer >= 2'), ('--bs -1','--bs must be'),
    ('--data /nowhere','train.csv'), ('--images /nowhere','/nowhere must have images'),
    ('--data a --images b','not allowed'), ('--out /dev/null','/dev/null'), ('--size x','--size'),
])
def test_bad_arguments_are_a_line(args, msg, capsys, tmp_path):
    with pytest.raises(SystemExit) as e: demo.main(['--out', str(tmp_path), *args.split()])
    err = capsys.readouterr().err
    assert e.value.code == 2 and msg in err and 'Traceback' not in err
