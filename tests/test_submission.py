"From a folder of test images to a submission's table"
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from fastai.vision.all import BCEWithLogitsLossFlat, Learner, Path, load_learner
from sklearn.metrics import f1_score

from fastai_bn.all import HPADataLoaders, LoadHPA, best_thresholds, make_hpa, submission_table
from fastai_bn.hpafiles import images_in

COLOURS = 'red','green','blue','yellow'

@pytest.fixture
def path(tmp_path):
    "A folder with train/ of 6 images, and test/ of 5 others without a table"
    path = make_hpa(tmp_path/'d', n=6, size=32)
    (make_hpa(tmp_path/'other', n=5, size=32, seed=1)/'train').rename(path/'test')
    return path

def loaders(path, **kw):
    return HPADataLoaders.from_folder(path, **{**dict(size=32, bs=2, num_workers=0, device='cpu'), **kw})

def inputs(dl): return torch.cat([b[0] for b in dl])
def loaded(folder, ids, **kw): return torch.stack([LoadHPA(folder, 32, **kw)(i) for i in ids])
IDS = [f'0001-00000{i}' for i in range(5)]


# --- Images

def test_a_folder_is_all_of_its_images_in_order(path):
    dl = loaders(path).test_dl(path/'test')
    assert [o.name for o, in dl.items] == IDS
    assert torch.equal(inputs(dl), loaded(path/'test', IDS))

@pytest.mark.parametrize('kind', [list, tuple, pd.Series, lambda o: pd.DataFrame(dict(Predicted='0', Id=o))])
def test_ids_of_a_folder(path, kind):
    "In the order that is asked for"
    some = IDS[3:]+IDS[:2]
    assert torch.equal(inputs(loaders(path).test_dl(kind(some), path/'test')), loaded(path/'test', some))
    assert torch.equal(inputs(loaders(path).test_dl(kind(some), str(path/'test'))), loaded(path/'test', some))
    here = [i.replace('0001', '0000') for i in some]
    assert torch.equal(inputs(loaders(path).test_dl(kind(here))), loaded(path/'train', here))

def test_images_are_loaded_when_they_are_needed(path):
    dl = loaders(path).test_dl(path/'test')
    for c in COLOURS: Image.fromarray(np.full((32,32), 77, np.uint8)).save(path/'test'/f'{IDS[0]}_{c}.png')
    (path/'test'/f'{IDS[4]}_red.png').unlink()
    batches = iter(dl)
    assert torch.equal(next(batches)[0][0].mean((1,2)), torch.full((4,), 77/255))
    next(batches)
    with pytest.raises(ValueError, match=f'{IDS[4]}_red.png cannot be read'): next(batches)

def test_only_the_channels_in_use_are_needed(path):
    for f in (path/'test').glob('*_yellow.png'): f.unlink()
    dl = loaders(path, channels='gb').test_dl(path/'test')
    assert torch.equal(inputs(dl), loaded(path/'test', IDS, channels='gb'))
    with pytest.raises(FileNotFoundError, match=r'_yellow.png is missing \(5 of 20 files are\)'):
        loaders(path).test_dl(path/'test')

@pytest.mark.parametrize('images,kw,error,match', [
    (Path('nowhere'), {}, ValueError, 'plain file name|cannot be read'),
    (['gone'], dict(folder='test'), FileNotFoundError, 'gone_red.png is missing'),
    (['../train/0000-000000'], dict(folder='test'), ValueError, 'plain file name'),
    ([IDS[0]], dict(folder='nowhere'), FileNotFoundError, 'There is no folder')])
def test_what_is_not_there_is_named(path, images, kw, error, match):
    kw = {k:path/v for k,v in kw.items()}
    with pytest.raises(error, match=match): loaders(path).test_dl(images, **kw).one_batch()

@pytest.mark.parametrize('rename,there', [
    (lambda f: f.with_suffix('.PNG'), '.PNG'), (lambda f: f.with_name(f.name.replace('red', 'Red')), '_Red.png'),
    (lambda f: f.with_suffix('.tif'), '.tif')])
def test_an_image_whose_files_are_not_read_is_no_image_less(path, rename, there):
    for f in (path/'test').glob(f'{IDS[1]}_*'): f.rename(rename(f))
    with pytest.raises(FileNotFoundError, match=f'{IDS[1]}_red.png is missing.*There is .*{there}'):
        loaders(path).test_dl(path/'test')

def test_what_else_lies_in_a_folder(path):
    "What unpacking leaves, the atlas' composites, other files, a string in place of a path; an Id may end in a colour"
    for name in ('._0001-000000_red.png','0001-000000_blue_red_green.jpg','notes_red','table.csv'):
        (path/'test'/name).touch()
    for f in list((path/'test').glob(f'{IDS[1]}_*.png')): f.rename(f.with_name(f.name.replace(IDS[1], 'cell_red')))
    want = [IDS[0], *IDS[2:], 'cell_red']
    for folder in (path/'test', str(path/'test')):
        assert [o.name for o, in loaders(path).test_dl(folder).items] == want

@pytest.mark.parametrize('images,match', [
    ([3], 'must be a string, got 3. Read tables with dtype=str'), ([Path('a')], 'must be a string'), ([], 'got none'),
    (pd.DataFrame(dict(Id=[1.5])), 'must be a string')])
def test_ids_that_are_none(path, images, match):
    with pytest.raises(ValueError, match=match): loaders(path).test_dl(images, path/'test')

def test_ids_may_come_one_by_one(path):
    assert torch.equal(inputs(loaders(path).test_dl((i for i in IDS), path/'test')), loaded(path/'test', IDS))

def test_an_empty_folder(path):
    (path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='has no images. Name their files Id_red.png'):
        loaders(path).test_dl(path/'empty')

OLD = ['10580_1610_C1_1','10580_1610_C1_2','3_9_A1_1']

def older_release(folder, ending):
    "The public atlas' names; each channel in its own colour, red as (255, 0, 0). Return the gray images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    on = dict(red=(1,0,0), green=(0,1,0), blue=(0,0,1), yellow=(1,1,0))
    grays = {}
    for i in OLD:
        for c,rgb in on.items():
            # smooth, as JPEG keeps colours at half of the resolution
            g = np.asarray(Image.fromarray(rng.integers(20, 200, (4,4)).astype(np.uint8)).resize((32,32), 2))
            im = Image.fromarray(np.stack([g*o for o in rgb], -1).astype(np.uint8))
            im.save(folder/f'{i}_{c}{ending}', quality=95)
            grays[i,c] = g
    return torch.stack([torch.stack([torch.from_numpy(grays[i,c].copy()) for c in COLOURS]) for i in OLD]).float()/255

@pytest.mark.parametrize('ending,tol', [('.png',1e-6), ('.jpg',.03)])
def test_the_older_release(path, ending, tol):
    want = older_release(path/'v18', ending)
    dl = loaders(path).test_dl(path/'v18')
    assert [o.name for o, in dl.items] == OLD
    assert (inputs(dl).mean((2,3))-want.mean((2,3))).abs().max() < tol

def test_the_older_release_trains_with_its_table(tmp_path):
    older_release(tmp_path/'train', '.jpg')
    pd.DataFrame(dict(Id=OLD, Target=['0 25','1','25 '])).to_csv(tmp_path/'train.csv', index=False)
    dls = loaders(tmp_path)
    assert len(dls.train_ds)+len(dls.valid_ds) == 3 and dls.one_batch()[0].shape == (2,4,32,32)

def test_png_comes_before_jpg(path):
    "A converted file is meant to be the one"
    for c in COLOURS: Image.fromarray(np.zeros((32,32), np.uint8)).save(path/'test'/f'{IDS[0]}_{c}.jpg')
    assert len(images_in(path/'test', 'rgby')) == 5
    assert torch.equal(inputs(loaders(path).test_dl(path/'test')), loaded(path/'test', IDS))
    assert LoadHPA(path/'test', 32)(IDS[0]).max() > 0


# --- Thresholds

@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans())
def test_no_threshold_is_better(seed, n, ties):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, 3, generator=g) < .3).long()
    p = torch.rand(n, 3, generator=g, dtype=torch.float64)*torch.tensor([1,.1,.01]) + .02*y
    if ties: p = p.round(decimals=1)
    t = best_thresholds(p, y)
    for k in range(3):
        score = lambda t: f1_score(y[:,k], p[:,k] >= t, zero_division=0)
        every = [score(o) for o in p[:,k]]
        assert score(t[k]) == pytest.approx(max(every) if y[:,k].any() else 0)
        assert t[k].isinf() == (not y[:,k].any())

def test_thresholds_for_single_precision_and_for_scores_of_any_range():
    p,y = torch.tensor([[-5.,3.],[2.,7.],[9.,8.]]),torch.tensor([[0,1],[1,0],[1,1]])
    t = best_thresholds(p, y)
    assert torch.equal((p >= t.to(p.dtype)).long()[:,0], y[:,0])

@pytest.mark.parametrize('p,y', [((4,3),(4,2)), ((4,),(4,)), ((0,3),(0,3))])
def test_shapes_that_differ(p, y):
    with pytest.raises(ValueError, match=r'same shape \[N, L\]'): best_thresholds(torch.rand(p), torch.zeros(y))


# --- The table

def test_the_table():
    p = torch.tensor([[.9,.1,.6],[.2,.3,.1],[.5,.1,.8]])
    assert submission_table(['a',Path('x')/'b','c'], p).values.tolist() == [['a','0 2'],['b','1'],['c','0 2']]
    assert submission_table([*'abc'], p, .95).Predicted.tolist() == ['0','1','2']  # the nearest one
    assert submission_table([*'abc'], p, torch.tensor([.5,.1,.9])).Predicted.tolist() == ['0 1','1','0 1']
    assert submission_table([*'abc'], p, np.array([2.,2.,.7])).Predicted.tolist() == ['2','2','2']
    assert submission_table([*'abc'], p, [.5,torch.inf,.9]).Predicted.tolist() == ['0','0','0']
    with pytest.raises(ValueError, match=r'\[2, L\] without NaN, a row for each image, got \[3, 3\]'):
        submission_table([*'ab'], p)
    with pytest.raises(ValueError, match='one for each of the 3 labels, got shape'):
        submission_table([*'abc'], p, [.1]*28)
    with pytest.raises(ValueError, match='loaded images have no Id'): submission_table(list(torch.rand(3,4,8,8)), p)

def test_what_stands_for_images_and_predictions():
    p = torch.tensor([[1,0],[0,1]])
    for images in (['a','b'], ('a','b'), pd.Series(['a','b']), pd.DataFrame(dict(Id=['a','b'], Predicted=0)),
                   np.array(['a','b']), (o for o in 'ab')):
        assert submission_table(images, p).values.tolist() == [['a','0'],['b','1']]
    for probs in (p.bool(), p.half(), p.double().numpy(), p.float().requires_grad_(), p.tolist()):
        assert submission_table(['a','b'], probs).Predicted.tolist() == ['0','1']
        assert best_thresholds(probs, p).tolist() == [1,1]
    assert submission_table('a', p[:1]).Id.tolist() == submission_table(Path('x')/'a', p[:1]).Id.tolist() == ['a']
    bad = torch.tensor([[.1,torch.nan],[.2,.3]])
    with pytest.raises(ValueError, match='without NaN'): submission_table(['a','b'], bad)
    with pytest.raises(ValueError, match='NaN'): best_thresholds(bad, p)
    with pytest.raises(ValueError, match=r'got \[2\]'): submission_table(['a','b'], bad[1])

def test_the_whole_way_from_a_folder_to_a_file(path, tmp_path):
    "Each image's prediction stands beside its Id, with a learner that comes from a file, too"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8,28))
    learn = Learner(loaders(path), net, loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    pd.DataFrame(dict(Id=IDS[::-1], Predicted='0')).to_csv(path/'sample_submission.csv', index=False)
    with learn.no_bar(): t = best_thresholds(*learn.get_preds())
    learn.export(tmp_path/'l.pkl')
    for l in (learn, load_learner(tmp_path/'l.pkl')):
        dl = l.dls.test_dl(pd.read_csv(path/'sample_submission.csv'), path/'test', num_workers=0, bs=2)
        with l.no_bar(): p,_ = l.get_preds(dl=dl)
        f = path/'submission.csv'
        submission_table(dl, p, t).to_csv(f, index=False)
        table = pd.read_csv(f, dtype=str)
        assert list(table.columns) == ['Id','Predicted'] and table.Id.tolist() == IDS[::-1]
        net.eval()
        for i,predicted in zip(table.Id, table.Predicted):
            with torch.no_grad(): one = net(LoadHPA(path/'test', 32)(i).as_subclass(torch.Tensor)[None]).sigmoid()
            assert predicted == submission_table([i], one, t).Predicted[0]
