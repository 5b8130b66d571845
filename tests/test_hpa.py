"Human Protein Atlas data: what is drawn, what is read, and what is refused, hostile input included"
import filecmp, io, os, re, resource, struct, sys, tempfile, zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from fastai.vision.all import (
    CropPad, FlipItem, ItemTransform, PILImage, RandomCrop, RandomResizedCrop, RandomResizedCropGPU, Resize,
    TensorImage, TensorMultiCategory, Transform, aug_transforms, load_learner, resnet18, vision_learner)

import fastai_bn
from fastai_bn import draw, hpa
from fastai_bn.draw import _draw, _drawn, make_hpa
from fastai_bn.hpa import HPA_LABELS, HPADataLoaders, LoadHPA, TensorHPA, _validation, read_table

COLOURS = 'red','green','blue','yellow'


@pytest.fixture(scope='module')
def made(tmp_path_factory): return make_hpa(tmp_path_factory.mktemp('hpa'), n=60, size=64, masks=True)

@pytest.fixture
def small(tmp_path): return make_hpa(tmp_path/'d', n=4, size=32)

def pixels(path, i, colour): return np.asarray(Image.open(path/'train'/f'{i}_{colour}.png'))
def from_folder(path, **kw): return HPADataLoaders.from_folder(path, **{**dict(size=32, bs=2), **kw})
def rewrite(path, **cols): pd.DataFrame(cols).to_csv(path/'train.csv', index=False)
def ids(path): return list(pd.read_csv(path/'train.csv', dtype=str).Id)


# --- Drawing

def test_layout(made):
    df = pd.read_csv(made/'train.csv', dtype=str)
    assert list(df.columns) == ['Id','Target'] and len(df) == 60 and df.Id.is_unique
    assert {f.name for f in (made/'train').iterdir()} == {f'{i}_{c}.png' for i in df.Id for c in COLOURS}
    im = Image.open(made/'train'/f'{df.Id[0]}_green.png')
    assert im.size == (64,64) and im.mode == 'L'
    n = df.Target.str.split().map(len)
    assert set(n) <= {1,2,3} and set(n) >= {1,2}
    assert len(_drawn) >= 10 and all(0 <= int(o) < 28 for t in df.Target for o in t.split())

def test_same_seed_same_files_other_seed_others(tmp_path, made):
    a = make_hpa(tmp_path/'a', n=3, size=64)  # the first three of `made`
    assert all(filecmp.cmp(f, made/'train'/f.name, shallow=False) for f in (a/'train').iterdir())
    b = make_hpa(tmp_path/'b', n=3, size=64, seed=1)
    assert not set(ids(a)) & set(ids(b))
    assert (pixels(a, ids(a)[0], 'blue') != pixels(b, ids(b)[0], 'blue')).any()

# of images 0 to 2: their labels, the mean of each channel, and the highest number of a cell
TARGETS = ['1 14', '0 25', '21']
MEANS = [[35.87, 49.40, 39.84, 52.82], [48.20, 166.77, 29.00, 45.26], [52.45, 40.84, 30.99, 37.45]]
CELLS = [9, 9, 5]

def test_a_seed_draws_what_it_has_always_drawn(tmp_path):
    "To a gray value: who has drawn a folder may have trained on it"
    make_hpa(tmp_path, n=3, size=48, seed=7, masks=True, lab_shift=.5)
    assert list(pd.read_csv(tmp_path/'train.csv', dtype=str).Target) == TARGETS
    means = [[pixels(tmp_path, i, c).mean() for c in COLOURS] for i in ids(tmp_path)]
    np.testing.assert_allclose(means, MEANS, atol=.05)
    assert [np.asarray(Image.open(f)).max() for f in sorted(tmp_path.glob('masks/*'))] == CELLS

def test_what_has_moved_is_found_where_it_was():
    names = {}
    exec('from fastai_bn.hpa import *', names)
    assert names['make_hpa'] is hpa.make_hpa is draw.make_hpa
    with pytest.raises(AttributeError, match="'nothing'"): hpa.nothing

def test_labels_are_unbalanced(tmp_path):
    t = pd.read_csv(make_hpa(tmp_path, n=150, size=16)/'train.csv', dtype=str).Target
    n = np.bincount([int(l) for o in t for l in o.split()], minlength=28)
    assert (n>0).sum() >= 10 and n.max() > 8*n[n>0].min()

def test_masks_are_the_nuclei(made):
    for i in ids(made)[:5]:
        m,blue = np.asarray(Image.open(made/'masks'/f'{i}.png')),pixels(made, i, 'blue').astype(float)
        assert m.shape == blue.shape and m.max() >= 2 and blue[m>0].mean() > 2*blue[m==0].mean()

def test_labels_can_be_told_apart(tmp_path):
    "The protein's share inside nucleus, at its rim and outside differs by label"
    def share(l):
        rng = np.random.default_rng(0)
        x,nuc = _draw(rng, [l], 64, 0.)
        g = x[1]-np.median(x[1])
        return g[nuc>0].mean()-g[nuc==0].mean()
    assert share(0) > .1 and share(25) < -.02 and share(0) > 2*share(1)

def test_exposure_varies_and_lab_shift_shifts(tmp_path, made):
    other = make_hpa(tmp_path/'o', n=20, size=64, lab_shift=1.)
    def means(p): return np.array([[pixels(p, i, c).mean() for c in COLOURS] for i in ids(p)[:20]])
    a,b = means(made),means(other)
    assert (a.std(0)/a.mean(0) > .15).all()
    assert (np.abs(a.mean(0)-b.mean(0)) > a.std(0)/2).any()

def test_bar(tmp_path, capsys):
    make_hpa(tmp_path, n=2, size=16)
    assert '2/2' in capsys.readouterr().out
    make_hpa(tmp_path, n=2, size=16, progress=False)
    assert capsys.readouterr().out == ''

@pytest.mark.parametrize('kw', [
    dict(n=0), dict(n=2.5), dict(size=4), dict(size=32.), dict(seed=-1), dict(lab_shift=float('nan')),
    dict(lab_shift=float('inf')), dict(lab_shift=3),
])
def test_make_bad_arguments(tmp_path, kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): make_hpa(tmp_path/'x', **kw)
    assert not (tmp_path/'x').exists()

def test_make_again_replaces_its_own_and_refuses_others(small):
    make_hpa(small, n=2, size=32)
    assert len(list((small/'train').iterdir())) == 8
    rewrite(small, Id=['mine'], Target=['1'])
    (small/'train'/'mine_red.png').write_bytes(b'x')
    with pytest.raises(ValueError, match='another folder'): make_hpa(small, n=2, size=32)
    assert ids(small) == ['mine'] and (small/'train'/'mine_red.png').exists()
    assert len(list((small/'train').iterdir())) == 9


# --- Loading

def test_batches(made):
    dls = HPADataLoaders.from_folder(made, size=48, bs=4)
    xb,yb = dls.one_batch()
    assert xb.shape == (4,4,48,48) and xb.dtype == torch.float32 and 0 <= xb.min() and xb.max() <= 1
    assert yb.shape == (4,28) and set(yb.unique().tolist()) == {0.,1.} and dls.c == 28
    assert list(dls.vocab) == list(HPA_LABELS)
    assert len(dls.train_ds)+len(dls.valid_ds) == 60 and len(dls.valid_ds) == 12

def test_values_and_channel_order(made):
    i = ids(made)[0]
    ref = {c:pixels(made, i, colour)/255 for c,colour in zip('rgby', COLOURS)}
    for channels in ('rgby','g','bgr'):
        x = LoadHPA(made/'train', 64, channels).encodes(i)
        np.testing.assert_allclose(x.numpy(), np.stack([ref[c] for c in channels]), atol=1e-6)
    target = pd.read_csv(made/'train.csv', dtype=str).set_index('Id').Target
    ds = HPADataLoaders.from_folder(made, size=64).valid_ds
    for k in range(3):
        want = sorted(map(int, target[ds.items[k][0]].split()))
        assert ds[k][1].nonzero().flatten().tolist() == want

def test_16_bit_and_rgb_files(small):
    i = ids(small)[0]
    a = np.arange(32*32, dtype=np.uint16).reshape(32,32)*64
    Image.fromarray(a).save(small/'train'/f'{i}_red.png')
    Image.fromarray(np.full((32,32,3), 51, np.uint8)).save(small/'train'/f'{i}_green.png')
    x = LoadHPA(small/'train', 32).encodes(i)
    np.testing.assert_allclose(x[0].numpy(), a/65535, atol=1e-6)
    assert torch.allclose(torch.Tensor(x[1]), torch.tensor(.2))

@pytest.mark.parametrize('mode,colour,value', [
    ('P',None,128/255), ('LA',(128,255),128/255), ('RGBA',(51,51,51,9),.2), ('1',1,1.),
])
def test_other_kinds_of_png(small, mode, colour, value):
    i = ids(small)[0]
    im = Image.new('L', (32,32), 128).convert('P') if mode=='P' else Image.new(mode, (32,32), colour)
    im.save(small/'train'/f'{i}_red.png')
    np.testing.assert_allclose(LoadHPA(small/'train', 32).encodes(i)[0].numpy(), value, atol=1e-3)

def test_csv_with_bom_crlf_quotes_and_another_column(small):
    (small/'train.csv').write_bytes('\ufeffId,note,Target\r\n"a","x, y",3 1\r\n\r\nb,,2\r\n'.encode())
    assert read_table(small) == (['a','b'], [[HPA_LABELS[1],HPA_LABELS[3]], [HPA_LABELS[2]]])

@pytest.mark.parametrize('kw', [dict(size=0), dict(size=16.5), dict(size=None), dict(bs=0)])
def test_bad_size_and_bs(small, kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` must be'): HPADataLoaders.from_folder(small, **kw)

def test_split_is_deterministic_and_nearly_stratified():
    rng = np.random.default_rng(0)
    targets = [[str(l)] for l in rng.choice(4, p=[.6,.25,.1,.05], size=400)]
    va = _validation(targets, .2, 42)
    assert va == _validation(targets, .2, 42) and va != _validation(targets, .2, 43)
    assert va == sorted(set(va)) and set(va) < set(range(400)) and len(va) == 80
    for l in '0123':
        n = sum(t==[l] for t in targets)
        assert abs(sum(targets[i]==[l] for i in va) - .2*n) <= 1
    assert len(_validation([['a'],['b']], .01, 0)) == 1

def test_show_batch_has_a_line_per_label(made):
    import matplotlib.pyplot as plt
    dls = HPADataLoaders.from_folder(made, size=32, bs=12, channels='gb')
    dls.valid.show_batch(max_n=12)
    titles = [a.get_title() for a in plt.gcf().axes]
    assert all(set(t.split('\n')) <= set(HPA_LABELS) for t in titles if t) and any('\n' in t for t in titles)
    rgb = plt.gcf().axes[0].images[0].get_array()
    assert rgb.shape[-1] == 3 and rgb[...,0].max() == 0 and rgb[...,1].max() > 0  # green and blue only
    plt.close('all')

def test_composite_colours_and_channels():
    x = TensorHPA(torch.rand(4,8,8), channels='ybgr')
    rgb = x.composite()
    assert rgb.shape == (8,8,3) and 0 <= rgb.min() and rgb.max() <= 1
    # its own channels, not the first four
    np.testing.assert_array_equal(rgb, TensorHPA(torch.Tensor(x).flip(0), channels='rgby').composite())
    np.testing.assert_array_equal(rgb, TensorHPA(torch.Tensor(x)).composite('ybgr'))
    y = TensorHPA(torch.rand(3,8,8))
    np.testing.assert_array_equal(y.composite(), y.composite('rgb'))
    assert not TensorHPA(torch.rand(1,8,8)).composite('y')[...,2].any()

@pytest.mark.parametrize('shape,channels', [
    ((4,8,8),'rgbx'), ((4,8,8),'RGBY'), ((3,8,8),'rgby'), ((4,8,8),''), ((5,8,8),None), ((2,4,8,8),None),
    ((4,8),'rgby'),
])
def test_composite_of_what_is_no_image_or_no_channels(shape, channels):
    x = TensorHPA(torch.rand(shape))
    with pytest.raises(ValueError, match='a letter of .rgby. for each channel'): x.composite(channels)

def test_show_says_the_same():
    x = TensorHPA(torch.rand(4,8,8), channels='rgby')[:3]
    with pytest.raises(ValueError, match=r"got 'rgby' for a tensor of shape \[3, 8, 8\]"): x.show()

@pytest.mark.slow
def test_training_augmentation_export_predict(made, tmp_path):
    dls = HPADataLoaders.from_folder(made, size=32, bs=8, batch_tfms=aug_transforms(size=32))
    learn = vision_learner(dls, resnet18, n_in=4, pretrained=False, normalize=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export(tmp_path/'e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    with loaded.no_bar(), loaded.no_logging(): labels,_,probs = loaded.predict((ids(made)[0], []))
    assert probs.shape == (28,) and set(labels) <= set(HPA_LABELS)


# --- Bad input names the file or the Id

def test_no_folder_no_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match='train.csv is missing'): HPADataLoaders.from_folder(tmp_path)

@pytest.mark.parametrize('text,match', [
    ('', 'must have the columns Id and Target'), ('Id,Target\n', 'must have a row below its header'),
    ('Id,Target\na,1,2\n', "'a,1,2' must have 2 fields, got 3"), ('Id,Target\na\n', 'must have 2 fields, got 1'),
    ('Id,Target\na\0b,1\n', 'Id|csv'), ('a,b\n1,2\n', 'must have the columns Id and Target'),
    ('Id,Target\nx,1\nx,2\n', "each Id must occur once, got 'x' again"),
])
def test_bad_csv(small, text, match):
    (small/'train.csv').write_text(text)
    with pytest.raises(ValueError, match=match): HPADataLoaders.from_folder(small)

@pytest.mark.parametrize('i', ['../secret', 'a/b', 'a\\b', '..', '/etc/passwd', '', '.hidden', 'a b', 'C:x', 'x\x00'])
def test_an_id_with_a_path_in_it(small, i):
    (small/'train.csv').write_text(f'Id,Target\nok,1\n{i},2\n')
    with pytest.raises(ValueError, match='Id'): read_table(small)

@pytest.mark.parametrize('target,bad', [
    ('28','28'), ('0 -1','-1'), ('1 x','x'), ('1.0','1.0'), ('1,2','1,2'), ('٣','٣'), ('9'*50,'9'*50),
])
def test_a_label_out_of_range(small, target, bad):
    rewrite(small, Id=['ok','img7'], Target=['1',target])
    with pytest.raises(ValueError, match=f"from 0 to 27, got '{bad}' for Id 'img7'"): read_table(small)

def test_no_label_is_fine(small):
    rewrite(small, Id=['a','b'], Target=['', '3 3'])
    assert read_table(small) == (['a','b'], [[], [HPA_LABELS[3]]])

def test_a_missing_channel(small):
    f = small/'train'/f'{ids(small)[2]}_yellow.png'
    f.unlink()
    with pytest.raises(FileNotFoundError, match=f.name): HPADataLoaders.from_folder(small)
    HPADataLoaders.from_folder(small, channels='rgb')  # is not needed there

@pytest.mark.parametrize('data', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + b'\0'*40])
def test_a_broken_png(small, data):
    f = small/'train'/f'{ids(small)[0]}_blue.png'
    f.write_bytes(data)
    with pytest.raises(ValueError, match=f.name): LoadHPA(small/'train').encodes(ids(small)[0])

def test_a_truncated_png(small):
    f = small/'train'/f'{ids(small)[0]}_blue.png'
    f.write_bytes(f.read_bytes()[:-200])
    with pytest.raises(ValueError, match=f.name): LoadHPA(small/'train').encodes(ids(small)[0])

def test_channels_of_different_sizes(small):
    i = ids(small)[1]
    Image.new('L', (40,32)).save(small/'train'/f'{i}_green.png')
    with pytest.raises(ValueError, match=f"'{i}'.*green 40x32"): LoadHPA(small/'train').encodes(i)

@pytest.mark.parametrize('channels', ['', 'rgbx', 'rr', 'RGB'])
def test_bad_channels(small, channels):
    with pytest.raises(ValueError, match='`channels` must be'): HPADataLoaders.from_folder(small, channels=channels)
    with pytest.raises(ValueError, match='`channels` must be'): LoadHPA(small/'train', channels=channels)

def test_a_size_that_is_none(small):
    with pytest.raises(ValueError, match='`size` must be an integer >= 1, got 0'): LoadHPA(small/'train', 0)

def test_a_file_that_is_gone(small):
    load = LoadHPA(small/'train')
    with pytest.raises(ValueError, match='nobody_red.png cannot be read as a PNG image'): load.encodes('nobody')

def test_colour_files_are_as_bright_as_gray_ones(small):
    "Those of the atlas' own releases: each channel in its colour"
    g = np.random.default_rng(0).integers(0, 256, (32,32), dtype=np.uint8)
    on = dict(red=(1,0,0), green=(0,1,0), blue=(0,0,1), yellow=(1,1,0))
    for mode in ('RGB','RGBA','P'):
        for c,o in on.items():
            im = Image.fromarray(np.stack([g*k for k in o], -1).astype(np.uint8))
            (im.quantize(256) if mode == 'P' else im.convert(mode)).save(small/'train'/f'v18_{c}.png')
        x = LoadHPA(small/'train', 32).encodes('v18')
        # a palette rounds
        np.testing.assert_allclose(x.numpy(), np.stack([g/255]*4), atol=3/255 if mode == 'P' else 1e-6)

@pytest.mark.parametrize('other', ['blue.jpeg','blue.tif','blue.PNG','Blue.png'])
def test_files_of_another_kind_are_named(small, other):
    i = ids(small)[1]
    f = small/'train'/f'{i}_blue.png'
    f.rename(f.with_name(f'{i}_{other}'))
    there = f'There is {i}_{other}, but only {i}_blue.png'
    with pytest.raises(FileNotFoundError, match=f'{i}_blue.png is missing .*{there}'): from_folder(small)
    with pytest.raises(ValueError, match=there): LoadHPA(small/'train', 32).encodes(i)
    with pytest.raises(ValueError, match='There is no folder .*nowhere'): LoadHPA(small/'nowhere', 32).encodes(i)

@pytest.mark.parametrize('kw', [
    dict(sise=32), dict(batch_tfm=aug_transforms()), dict(splitter=None), dict(get_x=None), dict(n_inp=2),
    dict(collate_fn=None),
])
def test_a_keyword_that_nobody_knows_is_an_error(small, kw):
    name = next(iter(kw))
    with pytest.raises(TypeError, match=f'unexpected keyword argument {name!r}'): from_folder(small, **kw)

def test_keywords_of_dataloaders_are_none(small):
    dls = from_folder(small, val_bs=3, shuffle=False, drop_last=False, num_workers=0, val_num_workers=0, verbose=False,
                      device='cpu', pin_memory=False)
    assert dls.valid.bs == 3 and len(dls.train) == 2


# --- Other images: the competition's test/

def inputs(dl): return torch.cat([b[0] for b in dl])

def test_images_of_another_folder_are_loaded_when_they_are_needed(small):
    dls = from_folder(small, num_workers=0, device='cpu')
    assert type(dls) is HPADataLoaders and dls.path == small
    (small/'test').mkdir()
    for f in (small/'train').glob('*.png'): (small/'test'/f'new-{f.name}').write_bytes(f.read_bytes())
    new = [f'new-{i}' for i in ids(small)]
    want = torch.stack([LoadHPA(small/'test', 32)(i) for i in new])
    assert torch.equal(inputs(dls.test_dl([small/'test'/i for i in new])), want)
    # Ids, as ever
    here = torch.stack([LoadHPA(small/'train', 32)(i) for i in ids(small)])
    assert torch.equal(inputs(dls.test_dl(ids(small))), here)
    # what is loaded already
    assert torch.equal(inputs(dls.test_dl(list(want))), want)
    table = pd.DataFrame(dict(Id=ids(small)[:1], Predicted=[0]))
    for one in (small/'test'/new[0], ids(small)[0], want[0], table):
        assert torch.equal(dls.test_dl(one).one_batch()[0], want[:1])

@pytest.mark.parametrize('item,match', [
    ('0000-000009', r"test/.*dls.test_dl\(\[path/'test'/Id\]\)"),
    (Path('test')/'..', 'plain file name'),
    ('test/0000-000000', 'plain file name.*by a Path'),
])
def test_what_is_no_image_says_how_to_name_one(small, item, match):
    dls = from_folder(small, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match=match): dls.test_dl([item]).one_batch()


# --- Transforms that would do nothing

class OfPIL(Transform):
    def encodes(self, x:PILImage): return x

class OfImages(Transform):
    def encodes(self, x:TensorImage): return x*0

class OfLabels(Transform):
    def encodes(self, y:TensorMultiCategory): return y*0

class OfPairs(ItemTransform):
    def encodes(self, xy): return xy[0]*0,xy[1]

def annotated(x:PILImage): return x
def of_all(x): return x

@pytest.mark.parametrize('tfm', [
    Resize(16), RandomResizedCrop(16), RandomCrop(16), CropPad(16), OfPIL, OfPIL(), annotated,
])
def test_a_transform_that_would_do_nothing_is_an_error(small, tfm):
    for kw in (dict(item_tfms=tfm), dict(item_tfms=[OfImages(), tfm]), dict(batch_tfms=tfm)):
        match = f'`{next(iter(kw))}` must handle tensors .* would do nothing'
        with pytest.raises(ValueError, match=match): from_folder(small, num_workers=0, **kw)

@pytest.mark.parametrize('tfm,zero', [
    (OfImages,0), (OfImages(),0), (OfLabels(),1), (OfPairs(),0), (of_all,None), (FlipItem(1.),None), (None,None),
    ([],None),
])
def test_a_transform_that_does_something_is_none(small, tfm, zero):
    kw = dict(num_workers=0, device='cpu')
    xy = from_folder(small, item_tfms=tfm, **kw).valid.one_batch()
    if zero is not None: assert not xy[zero].any() and xy[1-zero].any()
    from_folder(small, batch_tfms=[*aug_transforms(), RandomResizedCropGPU(16)], **kw)

@pytest.mark.parametrize('valid_pct', [0, 1, -.1, 2])
def test_bad_valid_pct(small, valid_pct):
    with pytest.raises(ValueError, match='valid_pct'): HPADataLoaders.from_folder(small, valid_pct=valid_pct)

def test_a_single_image(small):
    rewrite(small, Id=ids(small)[:1], Target=['1'])
    with pytest.raises(ValueError, match='at least 2'): HPADataLoaders.from_folder(small)


# --- Hostile input: clear errors, nothing opened outside the folder, no memory taken

_opened = None
def _note_open(event, args):
    if event == 'open' and _opened is not None and isinstance(args[0], (str,bytes,Path)):
        _opened.append(os.path.realpath(os.fsdecode(args[0])))
# Python's, for good
sys.addaudithook(_note_open)

@contextmanager
def only_within(path):
    "Files that are opened within are inside `path`"
    global _opened
    _opened = []
    try: yield
    finally: names,_opened = _opened,None
    code = sys.prefix,sys.base_prefix,os.path.realpath(Path(fastai_bn.__file__).parent)
    assert not [o for o in names if not o.startswith((os.path.realpath(path), *code))], names

@contextmanager
def at_most(n):
    "Within, this process gets at most `n` bytes more of the system"
    now = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now+n, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, limits)

def png(width, height, *chunks, bits=8, colour=0):
    def chunk(k, d): return struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k+d))
    head = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    parts = (b'IHDR', head),*chunks,(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*o) for o in parts)

# 2**30 zeroes pack to 1 MB
GIGABYTE = b'a\0\0' + zlib.compress(bytes(2**30), 9)
BOMBS = {
    'gigapixel header': png(40_000, 40_000, (b'IDAT', zlib.compress(b'\0'*1000))),
    'header of 2**31 by 2**31': png(2**31-1, 2**31-1),
    'just above the limit': png(8192, 8193, (b'IDAT', zlib.compress(b'\0'*1000))),
    'no pixels': png(0, 0),
    'text that unpacks to 1 GB': png(32, 32, (b'zTXt', GIGABYTE), (b'IDAT', zlib.compress(bytes(33*32)))),
    'profile that unpacks to 1 GB': png(32, 32, (b'iCCP', GIGABYTE)),
    'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n',
    'a GIF': b'GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00'
             b',\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;',
}

@pytest.mark.parametrize('name', BOMBS)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_image_bombs(small, name):
    i = ids(small)[0]
    (small/'train'/f'{i}_red.png').write_bytes(BOMBS[name])
    load = LoadHPA(small/'train', 32)
    with at_most(2**28), only_within(small):
        if name.startswith('profile'):
            # Pillow leaves out what it cannot unpack
            with suppress(ValueError): load.encodes(i)
            return
        with pytest.raises(ValueError, match=f'{i}_red.png cannot be read as a PNG') as e: load.encodes(i)
        assert not isinstance(e.value.__cause__, MemoryError)

MILLION = ['x']*10**6
TEXTS = {
    'a million columns': ','.join(['Id','Target']+MILLION) + '\n' + ','.join(['a','1']+MILLION) + '\n',
    'a row of a million fields': 'Id,Target\n' + 'a,'*10**6 + '\n',
    'a line of 10 MB': 'Id,Target\n' + 'a'*10**7,
    'a quoted field without an end': 'Id,Target\n"' + 'a\n'*10**6,
    'NUL in an Id': 'Id,Target\na\0,1\n',
    'NUL everywhere': '\0'*10**6,
    'NUL in a label': 'Id,Target\na,1\0\n',
    'many columns of that name': 'Id,'*1000 + 'Target\n' + 'a,'*1000 + '1\n',
    'a label of 50,000 digits': 'Id,Target\na,' + '9'*50_000,
    'an Id of 60,000 letters': 'Id,Target\n' + 'a'*60_000 + ',1\n',
    'a formula': 'Id,Target\n=cmd|calc,1\n',
}
TABLES = {
    **{k:v.encode() for k,v in TEXTS.items()},
    'UTF-16': 'Id,Target\na,1\n'.encode('utf-16'),
    'Latin-1': 'Id,Target\n\xe4\xf6,1\n'.encode('latin-1'),
    'UTF-8, then Latin-1': 'Id,Target\nä,1\n'.encode() + 'ö,2\n'.encode('latin-1'),
    'random': bytes(np.random.default_rng(0).integers(0, 256, 10**5, dtype=np.uint8)),
}

@pytest.mark.parametrize('name', TABLES)
def test_hostile_tables(small, name):
    (small/'train.csv').write_bytes(TABLES[name])
    with at_most(2**26), only_within(small):
        with pytest.raises((ValueError,FileNotFoundError)) as e: from_folder(small)
    assert len(str(e.value)) < (70_000 if 'an Id' in name else 1000)

ESCAPES = ['../train', '../../etc/passwd', '/etc/passwd', '..', '.', '', 'a/b', 'a\\b', '~', '~root', 'C:', 'file:x',
           'a\0', 'a\n', 'a\u2044b', '%2e%2e%2f', '-rf *', '$HOME', '`id`', 'a;b', '\u202egnp']

@pytest.mark.parametrize('i', ESCAPES)
def test_an_id_leads_nowhere_else(small, i):
    with only_within(small), pytest.raises(ValueError, match='plain file name'): LoadHPA(small/'train', 32).encodes(i)
    (small/'train.csv').write_text(f'Id,Target\nok,1\n"{i}",2\n', newline='')
    with only_within(small), pytest.raises(ValueError): HPADataLoaders.from_folder(small, size=32)

def test_a_pipe_is_no_file(small):
    i = ids(small)[0]
    (small/'train'/f'{i}_red.png').unlink()
    os.mkfifo(small/'train'/f'{i}_red.png')  # whoever opens it waits for ever
    with pytest.raises(FileNotFoundError, match=f'{i}_red.png'): HPADataLoaders.from_folder(small, size=32)

fuzz = settings(derandomize=True, deadline=None, max_examples=300, database=None,
                suppress_health_check=list(HealthCheck))
pieces = st.sampled_from(['Id','Target','Id,Target\n','a','0000-000000','../x','1','27 3','28',',','\n','\r\n','\r','"',
                          '""','\0','\ufeff',' ','\t',';','é','/','..'])
texts = st.lists(pieces, max_size=40).map(lambda o: ''.join(o).encode())

@pytest.mark.slow
@fuzz
@given(st.one_of(st.binary(max_size=200), texts, texts.map(lambda o: b'Id,Target\n' + o)))
def test_any_table_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'train').mkdir()
        (Path(d)/'train.csv').write_bytes(data)
        with only_within(d):
            try: names,targets = read_table(Path(d))
            except ValueError as e: assert 'train.csv' in str(e) or 'plain file name' in str(e)
            else:
                assert len(names) == len(set(names)) == len(targets) > 0
                assert all(re.fullmatch(r'\w[\w.-]*|-[\w.-]*', i) for i in names)
                assert all(set(t) <= set(HPA_LABELS) for t in targets)
            # there is no image
            with pytest.raises((ValueError,FileNotFoundError)): HPADataLoaders.from_folder(d, size=16)

_image = io.BytesIO()
Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16,16)).save(_image, 'PNG')

changed = st.tuples(st.integers(0, len(_image.getvalue())-1), st.integers(0, 255))

@fuzz
@given(st.lists(changed, max_size=6), st.integers(0, 40), st.booleans())
def test_any_image_is_read_or_refused(changes, cut, fix):
    data = bytearray(_image.getvalue())
    for k,v in changes: data[k] = v
    # the header's checksum, so that what it says is believed
    if fix and len(data) > 33: data[29:33] = struct.pack('>I', zlib.crc32(bytes(data[12:29])))
    data = bytes(data[:len(data)-cut] if cut < 30 else data)
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'x_red.png').write_bytes(data)
        with only_within(d):
            try: x = LoadHPA(d, 16, channels='r').encodes('x')
            except ValueError as e: assert 'x_red.png' in str(e)
            else: assert x.shape == (1,16,16) and x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1
