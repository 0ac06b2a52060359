"""The rollout at scale: ranks, object stores, shards of pictures, and the fast path against the plain one."""
import contextlib, io, json, os, shutil, subprocess, sys, tarfile
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image

import dd3g.bench as B
import dd3g.rollout as R
from dd3g.bench import as_published, example, published_rollout
from dd3g.cameras import view_cameras
from dd3g.config import SCALES
from dd3g.core import UserError, read_records
from dd3g.ddim import Schedule, rollout
from dd3g.meter import names_of
from dd3g.rollout import (FolderPictures, Quadruples, Roller, ShardPictures, counts, fault, file_sha, main, pictures_from, plan, random_teacher, ready, shards_of, sheet, told, verify,
                          write_quadruples)
from dd3g.store import Unreachable, place
from dd3g.teacher import MultiViewUNet, SpatialTransformer3D, shake

CFG = replace(SCALES['tiny'], diffusion=replace(SCALES['tiny'].diffusion, sample_steps=2), rollout_batch=2)
FLAGS = '--diffusion.sample-steps 2 --rollout-batch 2 --shard 2'.split()

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A teacher's file, four pictures, and the same four in two tar shards."
    out = tmp_path_factory.mktemp('home')
    random_teacher(CFG).save(out/'teacher.safetensors')
    (out/'pics').mkdir(); (out/'shards').mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        x = np.zeros((40, 40, 4), np.uint8); x[8:30, 10:32] = [*rng.integers(0, 255, 3), 255]
        Image.fromarray(x).save(out/'pics'/f'{i}.png')
    for s in (0, 1):
        with tarfile.open(out/'shards'/f'pics-{s}.tar', 'w') as t:
            for i in (2*s, 2*s+1):
                for name, data in [(f'{i}.json', b'{}'), (f'{i}.png', (out/'pics'/f'{i}.png').read_bytes()), (f'{i}.seg.png', b'not this one')]:
                    info = tarfile.TarInfo(name); info.size = len(data); t.addfile(info, io.BytesIO(data))
    return out

@pytest.fixture(scope='module')
def roller(home): return Roller(random_teacher(CFG), CFG)

@pytest.fixture(scope='module')
def source(home): return FolderPictures(home/'pics', CFG.view.size)

@pytest.fixture(scope='module')
def quads(roller, source, tmp_path_factory):
    out = tmp_path_factory.mktemp('quads')/'q'
    write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True)
    return out

@pytest.fixture
def bucket():
    "An empty bucket of fsspec's memory store."
    pytest.importorskip('fsspec')
    b = place('memory://test-bucket')
    yield b
    with contextlib.suppress(FileNotFoundError): b.fs.rm('/test-bucket', recursive=True)

def shas(out): return {p.name: file_sha(p) for p in place(out).glob('*.tar')}

def args(home, out, *more): return ['--teacher', str(home/'teacher.safetensors'), '--pictures', str(home/'pics'), '--out', str(out), *FLAGS, *more]

# ranks

def test_torchrun_makes_the_same_bytes(home, quads, tmp_path):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'dd3g.rollout', *args(home, tmp_path/'q', '--count', '8', '--store', 'both')],
                       capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': '1'})
    assert r.returncode == 0, r.stderr[-2000:]
    assert shas(tmp_path/'q') == shas(quads) and r.stdout.count('4 quadruples made') == 2
    assert not [p.name for p in (tmp_path/'q').iterdir() if p.name.startswith('.')] # nothing half-written

# object stores

def test_a_bucket_holds_the_same_shards(quads, roller, source, bucket):
    out = 'memory://test-bucket/run'
    for r in (1, 0): write_quadruples(roller, source, 8, out, 'both', shard=2, rank=r, world=2, quiet=True)
    assert shas(out) == shas(quads)
    assert write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True)['made'] == 0
    a, b, c = (Quadruples(p, cache=m) for p, m in [(quads, 'none'), (out, 'none'), (out, 'ram')])
    assert len(b) == len(c) == 8
    want = a.fetch([5, 0], 'cpu')
    for got in (b.fetch([5, 0], 'cpu'), c.fetch([5, 0], 'cpu')): assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert verify(b, roller, 2, source) == ([], [float('inf')]*2)

def test_damage_in_a_bucket_is_mended(quads, roller, source, bucket):
    out = bucket/'run'
    write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True)
    tar, raw = out/'quads-00002.tar', (out/'quads-00002.tar').read_bytes()
    out.fs.pipe_file(str(tar.path), raw[:2000]+bytes([raw[2000] ^ 1])+raw[2001:])
    (out/'quads-00001.tar').unlink()
    assert fault(tar) == 'its checksum is wrong' and fault(tar, check=False) == ''
    with pytest.raises(UserError, match='quads-00001.tar: missing'): Quadruples(out)
    assert write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True, check=False)['shards'] == [1] # only lengths looked at
    assert write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True)['shards'] == [2]
    assert shas(out) == shas(quads)
    with pytest.raises(UserError, match='memory://.*seed was 0, is 1'): write_quadruples(Roller(roller.teacher, CFG, seed=1), source, 8, out, 'both', shard=2, quiet=True)

def test_a_store_that_is_down_is_not_damage(bucket, roller, source, monkeypatch):
    write_quadruples(roller, source, 2, bucket/'run', 'both', shard=2, quiet=True)
    def down(*a, **k): raise TimeoutError('connect timeout')
    monkeypatch.setattr(type(bucket.fs), 'cat_file', down)
    with pytest.raises(Unreachable, match='connect timeout.*Finished files are kept'): fault(bucket/'run'/'quads-00000.tar')
    with pytest.raises(Unreachable): write_quadruples(roller, source, 2, bucket/'run', 'both', shard=2, quiet=True)

def test_file_urls_and_unknown_ones(home, quads, tmp_path, capsys):
    main(args(home, f'file://{tmp_path}/q', '--count', '4', '--store', 'both'))
    assert all(shas(quads)[k] == v for k, v in shas(tmp_path/'q').items()) and len(shas(tmp_path/'q')) == 2
    with pytest.raises(SystemExit) as e: main(args(home, 'nowhere://x/y', '--count', '4'))
    assert e.value.code == 2 and 'nowhere://x/y' in capsys.readouterr().err.splitlines()[-1]

# where pictures come from

def test_pictures_from_shards(home, source, bucket):
    a = pictures_from(home/'shards', CFG.view)
    assert type(a) is ShardPictures and len(a) == 4
    for i in range(6): # the same picture, wherever it comes from, has the same N and C
        (r, x), (s, y) = plan(i, a, CFG.view), plan(i, source, CFG.view)
        assert torch.equal(x, y) and {k: r[k] for k in r if k != 'picture'} == {k: s[k] for k in s if k != 'picture'} and r['picture']['sha'] == s['picture']['sha']
    assert plan(1, a, CFG.view)[0]['picture']['name'] == 'pics-0.tar/1.png'
    for p in (home/'shards').glob('*.tar'): bucket.fs.pipe_file(f'/test-bucket/{p.name}', p.read_bytes())
    for pattern in (f'{home}/shards/pics-{{0..1}}.tar', f'{home}/shards/*.tar', 'memory://test-bucket/pics-{0..1}.tar', 'memory://test-bucket'):
        b = pictures_from(pattern, CFG.view)
        assert b.digest == a.digest and torch.equal(b.get(3, 0, 0)[0], a.get(3, 0, 0)[0])
    assert [p.name for p in shards_of(f'{home}/shards/pics-1.tar')] == ['pics-1.tar']

def test_bad_pictures(home, tmp_path):
    for what, says in [(f'{home}/shards/none-*.tar', 'no such shards'), (f'{home}/shards/pics-7.tar', 'no such shard')]:
        with pytest.raises(UserError, match=says): pictures_from(what, CFG.view)
    with tarfile.open(tmp_path/'a.tar', 'w:gz') as t: t.add(home/'pics'/'0.png')
    with pytest.raises(UserError, match='a.tar: damaged, or compressed'): pictures_from(tmp_path/'a.tar', CFG.view)
    with tarfile.open(tmp_path/'a.tar', 'w') as t: info = tarfile.TarInfo('x.png'); info.size = 3; t.addfile(info, io.BytesIO(b'abc'))
    with pytest.raises(UserError, match='a.tar/x.png: not a picture'): plan(0, pictures_from(tmp_path/'a.tar', CFG.view), CFG.view)

def test_a_picture_without_alpha_is_cut_out(tmp_path):
    x = np.full((60, 60, 3), 250, np.uint8); x[15:45, 20:40] = [200, 30, 30]
    Image.fromarray(x).save(tmp_path/'a.jpg', quality=95)
    alpha = plan(0, FolderPictures(tmp_path, 32), CFG.view)[1][3]
    assert .15 < (alpha > 128).float().mean() < .8

# what is stored, what is told

def test_latents_alone_are_not_decoded(roller, source, tmp_path, monkeypatch):
    def never(z): raise AssertionError('decoded')
    with monkeypatch.context() as m:
        m.setattr(roller.teacher, 'decode', never, raising=False)
        write_quadruples(roller, source, 2, tmp_path/'q', 'latents', shard=2, quiet=True)
    data = Quadruples(tmp_path/'q')
    assert set(data.table[0][1]) == {'json', 'ii.png', 'z.npy'}
    assert verify(data, roller, 2, source) == ([], [float('inf')]*2) # the stored latents bit for bit
    z = np.load(io.BytesIO(b''.join([open(data.table[0][0], 'rb').read()[a:a+n] for a, n in [data.table[0][1]['z.npy']]])))
    assert z.dtype == np.float16

def test_stats(home, quads, capsys, tmp_path):
    main(['stats', '--out', str(quads), '--sheet', str(tmp_path/'s.jpg')])
    out = capsys.readouterr().out
    assert '8 quadruples in 4 shards' in out and '2,800,000 of them' in out
    c = counts(Quadruples(quads))
    assert c['bytes'] == sum(p.stat().st_size for p in quads.glob('*.tar')) and c['bytes_each']['z.npy'] == 128+4*4*8*8*2 # npy header, float16
    assert f'{2_800_000*c["bytes"]/8/1e9:.1f} GB' in told(c)
    assert Image.open(tmp_path/'s.jpg').size[0] == 5*132+4
    assert sheet(Quadruples(quads), 3, px=16).size == (5*20+4, 3*20+4)
    shutil.copytree(quads, tmp_path/'q'); (tmp_path/'q'/'quads-00001.tar').unlink()
    main(['stats', '--out', str(tmp_path/'q')])
    assert 'quads-00001.tar: missing' in capsys.readouterr().out and (tmp_path/'q'/'sheet.jpg').exists()
    raw = bytearray((tmp_path/'q'/'quads-00002.tar').read_bytes()); raw[700] ^= 1; (tmp_path/'q'/'quads-00002.tar').write_bytes(raw)
    for flag, seen in [((), False), (('--checksums',), True)]:
        main(['stats', '--out', str(tmp_path/'q'), *flag])
        assert ('quads-00002.tar: its checksum is wrong' in capsys.readouterr().out) == seen

def test_names_come_from_the_index(quads, tmp_path, monkeypatch):
    "Who is on which side of the split is known without opening a record; an index of an older version, or none, is made up for by reading."
    names = names_of(Quadruples(quads))
    monkeypatch.setattr(Quadruples, 'read', None)
    assert names_of(Quadruples(quads, max_samples=5)) == names[:5] == [f'{i % 4}.png' for i in range(5)]
    monkeypatch.undo()
    shutil.copytree(quads, tmp_path/'q')
    old = tmp_path/'q'/'quads-00000.json'; old.write_text(json.dumps({k: v for k, v in json.loads(old.read_text()).items() if k != 'names'}))
    (tmp_path/'q'/'quads-00002.json').unlink()
    assert names_of(Quadruples(tmp_path/'q')) == names

def test_verbs_and_refusals(home, quads, capsys, tmp_path):
    main(['verify', *args(home, quads, '--verify', '2')])
    assert '2 equal byte for byte' in capsys.readouterr().out
    before = shas(quads)
    for flags, says in [(['--view.n-views', '2'], 'view.n_views is 4 there, 2 here'), (['--store', 'latents'], 'store was both, is latents'), (['--seed', '4'], 'seed was 0, is 4'),
                        (['--diffusion.guidance', '9'], 'guidance was 2.0, is 9.0'), (['--teacher', 'nobody/has-this'], 'nobody/has-this')]:
        with pytest.raises(SystemExit) as e: main(args(home, quads, '--count', '8', '--store', 'both', *flags))
        err = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and says in err[-1] and 'Traceback' not in ''.join(err), err
    assert shas(quads) == before

# speed without another result

@pytest.mark.parametrize('changes', [{}, dict(text_tokens=5, depth=2), dict(attention=(2,)), dict(pixel_frame=False, image_tokens=0, text_tokens=5)])
def test_the_fast_path_is_the_plain_one(changes):
    c = replace(CFG.teacher, **changes)
    torch.manual_seed(0)
    unet = shake(MultiViewUNet(c))
    z, t, cams = torch.randn(2, 5, 4, 8, 8), torch.tensor([900, 20]), torch.randn(2, 4, 16)
    ctx = torch.randn(2, 5+c.image_tokens, c.context_dim) if c.text_tokens else torch.randn(2, 4, c.context_dim)
    latent = torch.randn(2, 4, 8, 8) if c.pixel_frame else None
    with torch.no_grad():
        plain, fixed = unet(z, t, ctx, cams, latent=latent), unet.fixed(ctx, cams, latent=latent)
        assert torch.equal(unet(z, t, fixed), plain)
        last, whole = unet.output_blocks[-1][-1], SpatialTransformer3D.forward
        if isinstance(last, SpatialTransformer3D): # all frames to the end: the same prediction
            last.forward = lambda x, emb, context, frames, keep=None: whole(last, x, emb, context, frames)
            assert (unet(z, t, fixed)-plain).abs().max() < 1e-5*plain.abs().max()
            del last.forward
        assert (unet.to(memory_format=torch.channels_last)(z, t, fixed)-plain).abs().max() < 1e-5*plain.abs().max()

def test_keys_are_made_once_a_rollout():
    t, n = random_teacher(CFG), []
    b = example(CFG, 2)
    cams = view_cameras(CFG.view, b['offset'], b['elevation'])
    for m in t.unet.modules():
        if isinstance(m, SpatialTransformer3D): m.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda *a: n.append(1))
    layers = sum(isinstance(m, SpatialTransformer3D) for m in t.unet.modules())
    rollout(t, Schedule(CFG.diffusion), b['image'], cams, b['noise'], steps=5)
    assert len(n) == layers

@pytest.mark.parametrize('prediction', ['v', 'epsilon'])
def test_the_published_loop_gives_the_same(prediction):
    cfg = replace(CFG, diffusion=replace(CFG.diffusion, sample_steps=5, prediction=prediction))
    t, b = random_teacher(cfg), example(cfg, 3)
    cams = view_cameras(cfg.view, torch.tensor([0., 30., 70.]), b['elevation'])
    with torch.no_grad():
        ours = rollout(t, Schedule(cfg.diffusion), b['image'], cams, b['noise'])
        fast = rollout(ready(t, channels_last=True), Schedule(cfg.diffusion), b['image'], cams, b['noise'])
        ref  = published_rollout(as_published(t.unet), cfg, t.encoder(b['image']), t.encode(b['image']), cams.embedding(), b['noise'])
    for x in (ours, fast): assert (x-ref).abs().max() <= 1e-5*ref.abs().max()

def test_ready_leaves_its_teacher_alone():
    t = random_teacher(CFG)
    before = {k: (v.dtype, v.stride(), v.data_ptr()) for k, v in t.state_dict().items()}
    low = ready(t, 'bf16', channels_last=True)
    assert {p.dtype for p in low.unet.parameters()} == {torch.bfloat16} and {p.dtype for p in low.ae.parameters()} == {torch.float32}
    assert {k: (v.dtype, v.stride(), v.data_ptr()) for k, v in t.state_dict().items()} == before and low.ae is t.ae and low.unet is not t.unet
    assert all(p.any() for p in t.parameters())

def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    import errno
    from dd3g.store import write_whole
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    write_whole(tmp_path/'a.tar', b'old')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left.*a.tar'): write_whole(tmp_path/'a.tar', b'new')
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('a.tar', b'old')]

@pytest.mark.cuda
def test_gpu_bytes_and_precision(source):
    recs, pics = zip(*[plan(i, source, CFG.view) for i in range(2)])
    go = lambda dev, *a: Roller(random_teacher(CFG).to(dev), CFG, 0, *a)(list(recs), torch.stack(pics))
    (z, oi), (z2, oi2), (_, want) = go('cuda', 'bf16', True, 'flash'), go('cuda', 'bf16', True, 'flash'), go('cpu', 'fp32')
    assert torch.equal(z, z2) and torch.equal(oi, oi2) and R.compare(oi.cpu(), want) > 35

# benchmarks

def test_bench_rollout_records(tmp_path, monkeypatch, capsys):
    flags = ['rollout', '--seconds', '60', '--repeats', '1', '--diffusion.sample-steps', '2', '--rollout-batch', '2', '--records', str(tmp_path)]
    def broken(*a): raise RuntimeError('no luck'); yield
    monkeypatch.setattr(B, 'eps_error', broken) # a part that fails does not take the others with it
    B.main(flags)
    rows = read_records('bench', tmp_path)
    assert {r['bench'] for r in rows} == {'rollout.quadruples_per_s', 'rollout.reference_quadruples_per_s', 'rollout.speedup_over_reference'}
    for r in rows:
        assert set(r) >= set('bench scale batch value unit device n_gpus commit dirty versions command'.split()) and r['value'] > 0 and r['scale'] == 'tiny'
        assert r['command'] == 'python -m dd3g.bench '+' '.join(flags) and r['versions']['torch'] == torch.__version__
    best = max(r['value'] for r in rows if r['bench'].startswith('rollout.reference'))
    rate = next(r['value'] for r in rows if r['bench'] == 'rollout.quadruples_per_s')
    assert abs(next(r['value'] for r in rows if r['bench'].startswith('rollout.speedup'))/(rate/best)-1) < .01
    assert 'no luck' in capsys.readouterr().err

def test_bf16_stays_near(tmp_path):
    cfg = replace(CFG, diffusion=replace(CFG.diffusion, sample_steps=3))
    t = random_teacher(cfg); t.save(tmp_path/'t.safetensors')
    (row,) = B.eps_error(t, cfg)
    assert row[0] == 'rollout.eps_error_bf16' and 0 < row[1] < 2
    (row,) = B.bf16_psnr(tmp_path/'t.safetensors', torch.device('cpu'), 2)
    assert row[0] == 'rollout.psnr_bf16_vs_fp32' and 30 < row[1] < float('inf') and row[3]['views'] == 8
