"Pictures of every kind, and every kind of picture that cannot be used."
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dd3g.core import UserError
from dd3g.images import composite, cut_out, has_alpha, load_picture, picture, recentre

def toy(size=96):
    "An orange disc with a blue one on it, RGBA."
    y, x = np.mgrid[:size, :size]/size
    out = np.zeros((size, size, 4), np.uint8)
    out[((x-.45)/.3)**2+((y-.6)/.22)**2 < 1] = (235, 130, 40, 255)
    out[(x-.62)**2+(y-.36)**2 < .15**2] = (50, 90, 200, 255)
    return Image.fromarray(out)

def on_white(img): return Image.alpha_composite(Image.new('RGBA', img.size, 'white'), img).convert('RGB')

def bomb(path, side=20_000, mode='1'): Image.new(mode, (side, side)).save(path)

def write(kind, path):
    "One picture in the given mode."
    rgb, exif = on_white(toy()), Image.Exif()
    if kind == 'I;16': Image.fromarray(np.asarray(rgb.convert('L')).astype(np.uint16)*257).save(path)
    elif kind == 'exif': exif[274] = 6; rgb.rotate(90).save(path, exif=exif, quality=95)
    elif kind == 'palette+alpha': toy().quantize(32).save(path)
    elif kind in ('RGBA', 'LA'): toy().convert(kind).save(path)
    else: rgb.convert(kind).save(path)

@pytest.mark.parametrize('kind,suffix', [('RGB', 'png'), ('RGB', 'jpg'), ('RGB', 'webp'), ('RGB', 'bmp'), ('L', 'png'), ('1', 'png'), ('P', 'png'), ('P', 'gif'), ('I;16', 'png'), ('I;16', 'tiff'),
    ('F', 'tiff'), ('CMYK', 'jpg'), ('CMYK', 'tiff'), ('exif', 'jpg'), ('exif', 'webp'), ('RGBA', 'png'), ('RGBA', 'webp'), ('LA', 'png'), ('palette+alpha', 'png'), ('YCbCr', 'jpg')])
def test_any_mode_reads_the_same(tmp_path, kind, suffix):
    f = tmp_path/f'x.{suffix}'; write(kind, f)
    got = load_picture(f)
    assert got.mode == 'RGBA' and got.size == (96, 96)
    grey = lambda im: np.asarray(on_white(im).convert('L')).astype(float)
    assert np.abs(grey(got)-grey(toy())).mean() < (40 if kind == '1' else 4 if 'P' in kind or suffix == 'jpg' else 2)

def test_transparent_grey_of_a_16_bit_png(tmp_path):
    x = np.full((32, 32), 40_000, np.uint16); x[8:24, 8:24] = 1000
    Image.fromarray(x).save(tmp_path/'x.png', transparency=40_000)
    a = np.asarray(load_picture(tmp_path/'x.png'))
    assert a[16, 16, 3] == 255 and a[0, 0, 3] == 0 and abs(int(a[16, 16, 0])-4) <= 1

def test_first_frame_of_an_animation(tmp_path, capsys):
    frames = [Image.new('RGB', (32, 32), c) for c in ('red', 'blue', 'green')]
    for suffix in ('gif', 'webp', 'png'):
        f = tmp_path/f'x.{suffix}'; frames[0].save(f, save_all=True, append_images=frames[1:], duration=50)
        assert tuple(np.asarray(load_picture(f))[5, 5, :3] > 128) == (True, False, False)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and str(f) in err and 'first' in err

def test_large_jpeg_is_decoded_small(tmp_path):
    import resource
    f = tmp_path/'big.jpg'; Image.new('L', (12_000, 12_000), 128).save(f)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert max(load_picture(f).size) <= 1536
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before < 200_000 # kB on Linux

BAD = dict(missing='no such file', folder='folder', empty='empty', text='not a picture', short_png='cut short', short_jpg='cut short', short_webp='cut short|not a picture', dot='too few', bomb='100 million', header='not a picture|cut short')
def make_bad(kind, d):
    "A file that cannot be used."
    f = d/f'{kind}.{kind.split("_")[1] if "_" in kind else "png"}'
    if kind == 'folder': f.mkdir()
    if kind == 'empty': f.touch()
    if kind == 'text': f.write_text('hello')
    if kind == 'header': f.write_bytes(b'\x89PNG\r\n\x1a\n')
    if kind == 'dot': Image.new('RGB', (1, 1)).save(f)
    if kind == 'bomb': bomb(f)
    if kind.startswith('short'):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(f)
        f.write_bytes(f.read_bytes()[:f.stat().st_size//2])
    return f

@pytest.mark.parametrize('kind', BAD)
def test_bad_files_are_named(tmp_path, kind):
    f = make_bad(kind, tmp_path)
    with pytest.raises(UserError) as e: load_picture(f)
    assert str(f) in str(e.value) and any(w in str(e.value) for w in BAD[kind].split('|'))

def test_limit_of_pil_is_left_as_it_was(tmp_path):
    was = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError): load_picture(make_bad('text', tmp_path))
    assert Image.MAX_IMAGE_PIXELS == was

def test_no_foreground(tmp_path):
    Image.new('RGBA', (64, 64), (200, 0, 0, 0)).save(tmp_path/'clear.png'); Image.new('RGB', (64, 64), 'teal').save(tmp_path/'plain.png')
    for f in tmp_path.iterdir():
        with pytest.raises(UserError) as e: picture(f, 32)
        assert str(f) in str(e.value)

def test_alpha_counts_only_if_it_says_something():
    photo = on_white(toy()).convert('RGBA'); stray = np.asarray(photo).copy(); stray[0, :3, 3] = 0
    assert has_alpha(toy()) and not has_alpha(photo) and not has_alpha(Image.fromarray(stray))

def test_cut_out_of_a_plain_scene():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :300]
    inside = ((x-150)/60)**2+((y-110)/50)**2 < 1
    rgb = np.where(inside[..., None], (210, 60, 50), (90, 120, 90))+rng.normal(0, 8, (200, 300, 3))
    a = np.asarray(cut_out(Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert('RGBA')))[..., 3] > 128
    assert (a & inside).sum()/(a | inside).sum() > .95

def test_cut_out_is_the_same_twice():
    rgb = Image.fromarray(np.random.default_rng(1).integers(0, 255, (12, 12, 3), np.uint8)).resize((150, 150), Image.BICUBIC)
    rgb.paste((230, 200, 20), (45, 50, 110, 115))
    one, two = (np.asarray(cut_out(rgb.convert('RGBA'))) for _ in range(2))
    assert (one == two).all()

@pytest.mark.parametrize('size', [(9, 9), (8, 300), (300, 8), (40, 33)])
def test_cut_out_of_odd_shapes_does_not_crash(size):
    img = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).convert('RGBA')
    try: assert cut_out(img).size == size
    except UserError: pass

def test_rembg_is_never_asked_to_download(monkeypatch, tmp_path):
    monkeypatch.setenv('U2NET_HOME', str(tmp_path))
    with pytest.raises(UserError, match='not there'): cut_out(toy(), 'rembg')
    (tmp_path/'u2net.onnx').touch()
    fake = type(sys)('rembg'); fake.new_session = lambda n: n; fake.remove = lambda im, session: im.convert('RGBA')
    fake.__spec__ = type('S', (), {})()
    monkeypatch.setitem(sys.modules, 'rembg', fake)
    assert (np.asarray(cut_out(on_white(toy()).convert('RGBA')))[..., 3] == 255).all() # the stand-in returned all of it

@pytest.mark.parametrize('border', [0., .2, .5])
@pytest.mark.parametrize('size', [16, 64, 200])
def test_recentre_fills_the_square(size, border):
    img = Image.new('RGBA', (120, 90)); img.paste((10, 200, 30, 255), (5, 60, 65, 80))
    out = recentre(img, size, border)
    ys, xs = torch.nonzero(out[3] > .5, as_tuple=True)
    assert out.shape == (4, size, size) and abs((xs.max()-xs.min()+1).item()-(1-border)*size) <= 1.5
    assert abs((xs.max()+xs.min()).item()-(size-1)) <= 1 and abs((ys.max()+ys.min()).item()-(size-1)) <= 1
    assert (out[:3, out[3] > .5]-torch.tensor([10., 200, 30])[:, None]/255).abs().max() < 1e-4 # no colour bleeds in

def test_composite_broadcasts():
    x = torch.rand(5, 2, 4, 8, 8); x[:, :, 3] = 0
    assert torch.allclose(composite(x, torch.arange(5.)/5)[:, 1, 2, 3, 3], torch.arange(5.)/5)
    assert torch.allclose(composite(x, torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))[:, 0, :, 0, 0], torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))
    assert composite(x[0, 0], .5).shape == (3, 8, 8)
