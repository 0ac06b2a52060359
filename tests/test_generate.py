"The program as a user meets it: files that appear, one clear line for what cannot work."
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dd3g.config import SCALES
from dd3g.core import UserError
from dd3g.gaussians import Gaussians
from dd3g.generate import Generator, find_pictures, main, name_outputs, tidy
from dd3g.loop import save_weights
from dd3g.pepd import PEPD

TINY = SCALES['tiny']
FAST = ['--size', '32', '--frames', '8']

@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    "An untrained student, small."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights')/'tiny.safetensors'
    save_weights(PEPD(TINY), path, TINY, 'student', torch.bfloat16)
    return path

@pytest.fixture
def duck(tmp_path):
    "A picture with alpha."
    (tmp_path/'in').mkdir(exist_ok=True)
    img = Image.new('RGBA', (80, 80)); img.paste((240, 200, 30, 255), (20, 10, 60, 70)); img.save(tmp_path/'in'/'duck.png')
    return tmp_path/'in'/'duck.png'

def run(capsys, *args):
    "The program in this process: exit code and the lines it said."
    try: main([*map(str, args)]); code = 0
    except SystemExit as e: code = e.code
    return code, [l for l in capsys.readouterr().err.splitlines() if l.startswith('dd3g:')]

def files(d): return sorted(p.name for p in d.iterdir()) if d.exists() else []

def test_four_files(checkpoint, duck, tmp_path, capsys):
    code, said = run(capsys, duck, '--out', tmp_path/'out', '--checkpoint', checkpoint, *FAST)
    assert (code, said) == (0, []) and files(tmp_path/'out') == ['duck.html', 'duck.mp4', 'duck.ply', 'duck.png']
    g = Gaussians.load_ply(tmp_path/'out'/'duck.ply')
    want = Generator.from_pretrained(checkpoint)(duck, seed=0)
    assert torch.equal(g.mu, want.mu.cpu())
    assert Image.open(tmp_path/'out'/'duck.png').size == (9*36+4, 40)
    page = (tmp_path/'out'/'duck.html').read_text()
    assert '{{' not in page and 'src=' not in page and 'http' not in page # nothing from elsewhere

def test_specks_are_left_out(checkpoint, duck, tmp_path, capsys, monkeypatch):
    gen = Generator.from_pretrained(checkpoint)
    g, view = gen(duck, seed=0), gen.cfg.view
    n = g.n//3
    g.scale[:n] = 1e-4; g.alpha[n:n+5] = 0 # too small; not there
    left = tidy(g, view)
    assert torch.equal(left.mu, g.mu[n+5:]) and tidy(g, view, 0.).n == g.n and tidy(g.map(lambda x: x*0), view).n == g.n
    monkeypatch.setattr(Generator, '__call__', lambda self, *a, **kw: g)
    run(capsys, duck, '--out', tmp_path/'a', '--checkpoint', checkpoint, *FAST)
    run(capsys, duck, '--out', tmp_path/'b', '--checkpoint', checkpoint, '--specks', *FAST)
    assert [Gaussians.load_ply(tmp_path/k/'duck.ply').n for k in 'ab'] == [left.n, g.n]

def test_film_has_its_frames(checkpoint, duck, tmp_path, capsys):
    import imageio_ffmpeg
    run(capsys, duck, '--out', tmp_path/'out', '--checkpoint', checkpoint, '--size', '34', '--frames', '5')
    reader = imageio_ffmpeg.read_frames(str(tmp_path/'out'/'duck.mp4')); meta = next(reader)
    assert meta['codec'] == 'h264' and meta['pix_fmt'].startswith('yuv420p') and meta['size'] == (34, 34) and len(list(reader)) == 5

def test_samples_and_seeds(checkpoint, duck, tmp_path, capsys):
    run(capsys, duck, '--out', tmp_path/'a', '--checkpoint', checkpoint, '--samples', '3', '--seed', '5', *FAST)
    run(capsys, duck, '--out', tmp_path/'b', '--checkpoint', checkpoint, '--seed', '6', *FAST)
    assert files(tmp_path/'a') == sorted(f'duck-seed{s}.{x}' for s in (5, 6, 7) for x in ('html', 'mp4', 'ply', 'png'))
    assert (tmp_path/'a'/'duck-seed6.ply').read_bytes() == (tmp_path/'b'/'duck.ply').read_bytes()

def test_cameras_may_be_negative(checkpoint, duck, tmp_path, capsys):
    code, said = run(capsys, duck, '--out', tmp_path/'out', '--checkpoint', checkpoint, '--cameras', '-30', '-5', *FAST)
    assert (code, said) == (0, [])
    gen = Generator.from_pretrained(checkpoint)
    assert torch.equal(Gaussians.load_ply(tmp_path/'out'/'duck.ply').mu, gen(duck, cams=(-30., -5.)).mu.cpu())

def test_batch_is_its_members(checkpoint, duck):
    gen = Generator.from_pretrained(checkpoint)
    both = gen.batch([duck, Image.open(duck).rotate(90)], [3, 4], [(10., 0.), (0., 5.)])
    alone = gen(duck, 3, (10., 0.))
    assert both.batch == (2,) and torch.allclose(both[0].mu, alone.mu, atol=1e-4)

def test_a_picture_may_be_a_tensor(checkpoint, duck):
    gen = Generator.from_pretrained(checkpoint)
    assert torch.equal(gen(gen.prepare(duck)).mu, gen(duck).mu)
    assert gen(torch.rand(4, 50, 60)).n == gen(duck).n

def test_bad_pictures_do_not_stop_the_others(checkpoint, duck, tmp_path, capsys):
    d = duck.parent
    (d/'empty.png').touch(); (d/'short.png').write_bytes(duck.read_bytes()[:100]); Image.new('RGB', (1, 1)).save(d/'dot.png')
    Image.new('RGBA', (64, 64)).save(d/'clear.png'); Image.new('1', (20_000, 20_000)).save(d/'huge.png')
    names = ['empty.png', 'short.png', 'missing.png', 'duck.png', 'dot.png', 'clear.png', 'huge.png']
    code, said = run(capsys, *(d/n for n in names), '--out', tmp_path/'out', '--checkpoint', checkpoint, *FAST)
    assert code == 2 and len(said) == 6 and files(tmp_path/'out') == ['duck.html', 'duck.mp4', 'duck.ply', 'duck.png']
    assert all(str(d/n) in line for n, line in zip([n for n in names if n != 'duck.png'], said))

def test_folders_and_equal_names(checkpoint, duck, tmp_path, capsys):
    (tmp_path/'more').mkdir(); Image.open(duck).rotate(90).save(tmp_path/'more'/'duck.webp', lossless=True); (tmp_path/'more'/'notes.txt').touch()
    code, said = run(capsys, duck, tmp_path/'more', duck, '--out', tmp_path/'out', '--checkpoint', checkpoint, *FAST)
    assert code == 0 and files(tmp_path/'out') == sorted(f'{n}.{x}' for n in ('duck', 'duck_2') for x in ('html', 'mp4', 'ply', 'png'))
    assert len(said) == 1 and 'duck_2' in said[0]
    assert name_outputs([Path('a/x.png'), Path('b/x_2.png'), Path('c/X.png')]) == ['x', 'x_2', 'X_3']
    (tmp_path/'void').mkdir()
    with pytest.raises(UserError, match='no pictures'): find_pictures([tmp_path/'void'])

def broken(kind, d, checkpoint):
    "A checkpoint that cannot be used."
    path = d/f'{kind}.safetensors'
    if kind == 'truncated': path.write_bytes(checkpoint.read_bytes()[:5000])
    if kind == 'text': path.write_text('no weights')
    if kind == 'empty': path.touch()
    if kind == 'flipped': b = bytearray(checkpoint.read_bytes()); b[len(b)//2] ^= 0x55; path.write_bytes(bytes(b))
    if kind == 'other_configuration': save_weights(PEPD(TINY), path, replace(TINY, student=replace(TINY.student, width=64)), 'student')
    if kind == 'other_version': save_weights(PEPD(TINY), path, dict(view={}), 'student')
    if kind == 'other_kind': save_weights(torch.nn.Linear(2, 2), path, TINY, 'teacher')
    if kind == 'foreign': from safetensors.torch import save_file; save_file(dict(x=torch.zeros(2)), path)
    return path

@pytest.mark.parametrize('kind', ['missing', 'truncated', 'text', 'empty', 'flipped', 'other_configuration', 'other_version', 'other_kind', 'foreign'])
def test_bad_checkpoints(kind, checkpoint, duck, tmp_path, capsys):
    path = broken(kind, tmp_path, checkpoint)
    code, said = run(capsys, duck, '--out', tmp_path/'out', '--checkpoint', path, *FAST)
    assert code == 2 and len(said) == 1 and str(path) in said[0] and files(tmp_path/'out') == []

@pytest.mark.parametrize('args,word', [([], 'no picture'), (['x.png', '--samples', '0'], 'at least 1'), (['x.png', '--frames', '0'], 'at least 1'), (['x.png', '--size', '33'], 'even'), (['x.png', '--cameras', '0', '95'], 'elevation')])
def test_bad_flags(args, word, tmp_path, capsys):
    code, said = run(capsys, *args, '--out', tmp_path/'out')
    assert code == 2 and len(said) == 1 and word in said[0]

@pytest.mark.parametrize('where', ['file', 'in_file', 'proc'])
def test_unwritable_folder(where, duck, tmp_path, capsys):
    (tmp_path/'file').touch()
    out = dict(file=tmp_path/'file', in_file=tmp_path/'file'/'deep', proc=Path('/proc/dd3g'))[where]
    code, said = run(capsys, duck, '--out', out, *FAST)
    assert code == 2 and len(said) == 1 and str(out.parent if where == 'in_file' else out) in said[0]

def program(*args, **env):
    "The program as its own process."
    return subprocess.run([sys.executable, '-m', 'dd3g.generate', *map(str, args)], capture_output=True, text=True, timeout=300, env=dict(os.environ, HF_HUB_OFFLINE='1', **env))

def test_as_a_process(checkpoint, duck, tmp_path):
    r = program(duck, tmp_path/'none.png', '--out', tmp_path/'out', '--checkpoint', checkpoint, *FAST)
    assert r.returncode == 2 and 'Traceback' not in r.stderr and files(tmp_path/'out') == ['duck.html', 'duck.mp4', 'duck.ply', 'duck.png']
    said = [l for l in r.stderr.splitlines() if 'dd3g:' in l]
    assert len(said) == 1 and 'none.png' in said[0] and r.stdout == ''

def test_as_a_process_with_nothing_to_do(tmp_path):
    r = program('--out', tmp_path/'out')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and r.stderr.startswith('dd3g: ')

@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() == 0, reason='root may write anywhere')
def test_read_only_folder(duck, tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    r = program(duck, '--out', tmp_path/'locked')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and str(tmp_path/'locked') in r.stderr
