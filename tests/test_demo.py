"The demo: on each kind of data, and what it says of bad arguments"
import pandas as pd, pytest, torch
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
    assert t.valid_loss.iloc[2] != t.valid_loss.iloc[3] and t.train_loss.iloc[2] == t.train_loss.iloc[3]
    assert t.seconds.iloc[3] > t.seconds.iloc[2] > 0
    # bn_bs='window'
    assert t.train_loss.iloc[4] == t.train_loss.iloc[0]
    assert t.valid_loss.iloc[4] == pytest.approx(t.valid_loss.iloc[0], rel=1e-5)

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
    def make_two(path, n, size, seed):
        calls.append(n)
        return make_hpa(path, 2, size, seed)
    monkeypatch.setattr(demo, 'make_hpa', make_two)
    assert demo._generated(16, 0) == demo._generated(16, 0) and calls == [480]
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
    ('--epochs 0','--epochs must be'), ('--n-step 0','--n-step must be'), ('--bs -1','--bs must be'),
    ('--data /nowhere','train.csv'), ('--images /nowhere','/nowhere must have images'),
    ('--data a --images b','not allowed'), ('--out /dev/null','/dev/null'), ('--size x','--size'),
])
def test_bad_arguments_are_a_line(args, msg, capsys, tmp_path):
    with pytest.raises(SystemExit) as e: demo.main(['--out', str(tmp_path), *args.split()])
    err = capsys.readouterr().err
    assert e.value.code == 2 and msg in err and 'Traceback' not in err
