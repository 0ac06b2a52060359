"""Quadruples under what happens to long runs: kill -9, several processes, damage, a full disk, pictures that cannot be used."""
import errno, json, os, signal, subprocess, sys, time
from dataclasses import replace

import numpy as np, pytest, torch
from PIL import Image

import dd3g.rollout as R
from dd3g.config import SCALES
from dd3g.core import UserError, seeded_randn
from dd3g.rollout import (FolderPictures, Quadruples, RingPictures, Roller, TensorPictures, compare, fault, file_sha, index_path, main, picture_family, plan, roll, to_bytes, verify,
                          write_quadruples)
from dd3g.teacher import Teacher, shake

CFG = replace(SCALES['tiny'], diffusion=replace(SCALES['tiny'].diffusion, sample_steps=2), rollout_batch=2)
FLAGS = '--diffusion.sample-steps 2 --rollout-batch 2 --shard 2'.split()

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A teacher's file and five pictures."
    out = tmp_path_factory.mktemp('home')
    torch.manual_seed(0)
    teacher = Teacher(CFG); shake(teacher); teacher.eval().requires_grad_(False)
    teacher.save(out/'teacher.safetensors')
    (out/'pics').mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        x = np.zeros((40, 40, 4), np.uint8); x[8:30, 10:32] = [*rng.integers(0, 255, 3), 255]
        Image.fromarray(x).save(out/'pics'/f'{i}.png')
    return out

@pytest.fixture(scope='module')
def roller(home): return Roller(Teacher.load(home/'teacher.safetensors'), CFG)

@pytest.fixture(scope='module')
def source(home): return FolderPictures(home/'pics', CFG.view.size)

def shas(out): return {p.name: file_sha(p) for p in out.glob('*.tar')}

def args(home, out, *more): return ['--teacher', str(home/'teacher.safetensors'), '--pictures', str(home/'pics'), '--out', str(out), *FLAGS, *more]

@pytest.fixture(scope='module')
def quads(home, roller, source, tmp_path_factory):
    out = tmp_path_factory.mktemp('quads')/'q'
    write_quadruples(roller, source, 8, out, 'both', shard=2, quiet=True)
    return out

def test_noise_and_pictures_come_back_bit_for_bit(quads, roller, source):
    data = Quadruples(quads)
    got = data.fetch([6, 1], 'cpu')
    for row, i in enumerate((6, 1)):
        rec, rgba = plan(i, source, CFG.view)
        assert torch.equal(got['noise'][row], seeded_randn([rec['noise_seed']], *CFG.noise_shape)[0])
        assert torch.equal(to_bytes(got['rgba'][row]), rgba)
        assert got['offset'][row] == rec['offset'] and got['background'][row] == np.float32(rec['background'])
        stored = data.get(i)['record']
        assert {k: stored[k] for k in rec} == rec and stored['teacher'] == roller.settings['teacher'] and stored['micro_batch'] == 2

def test_webdataset_reads_a_shard(quads):
    wds = pytest.importorskip('webdataset')
    rows = list(wds.WebDataset(str(quads/'quads-00001.tar'), shardshuffle=False))
    assert [r['__key__'] for r in rows] == ['000000002', '000000003']
    assert {'json', 'ii.png', 'oi.npy', 'z.npy'} <= set(rows[0]) and json.loads(rows[0]['json'])['index'] == 2

def test_processes_and_count_do_not_matter(home, quads, roller, source, tmp_path, monkeypatch):
    for r in range(3): write_quadruples(roller, source, 8, tmp_path/'q', 'both', shard=2, rank=r, world=3, quiet=True)
    assert shas(tmp_path/'q') == shas(quads)
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '1') # as torchrun sets them
    main(args(home, tmp_path/'cli', '--count', '8', '--store', 'both'))
    assert sorted(shas(tmp_path/'cli')) == ['quads-00001.tar', 'quads-00003.tar']
    assert all(shas(quads)[k] == v for k, v in shas(tmp_path/'cli').items())
    one = roll(roller, source, 3, quiet=True) # half a micro-batch at the end
    for i in range(3): assert torch.equal(one['oi'][i], Quadruples(quads).get(i)['oi'])

def test_kill_9_and_continue(home, quads, tmp_path):
    code = 'import torch; torch.set_num_threads(1); import time, dd3g.rollout as R; w = R.write_shard\ndef slow(*a, **k): time.sleep(.3); w(*a, **k)\nR.write_shard = slow\nR.main(%r)'
    p = subprocess.Popen([sys.executable, '-c', code % args(home, tmp_path/'q', '--count', '8', '--store', 'both')],
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    t0 = time.time()
    while not (tmp_path/'q'/'quads-00000.json').exists() and time.time()-t0 < 90: time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert 1 <= len(shas(tmp_path/'q')) < 4
    main(args(home, tmp_path/'q', '--count', '8', '--store', 'both'))
    assert shas(tmp_path/'q') == shas(quads)

def test_full_disk_keeps_what_is_finished(home, tmp_path, monkeypatch, capsys):
    main(args(home, tmp_path/'q', '--count', '2'))
    before = shas(tmp_path/'q')
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(R.os, 'fsync', full)
    with pytest.raises(SystemExit) as e: main(args(home, tmp_path/'q', '--count', '8'))
    assert e.value.code == 2 and 'No space left' in capsys.readouterr().err
    assert shas(tmp_path/'q') == before and {p.name for p in (tmp_path/'q').iterdir()} == {'quads-00000.tar', 'quads-00000.json', 'settings.json'}

def test_damage_is_found_and_mended(home, quads, roller, source, tmp_path):
    write_quadruples(roller, source, 8, tmp_path/'q', 'both', shard=2, quiet=True)
    q = tmp_path/'q'
    tar = q/'quads-00002.tar'
    raw = tar.read_bytes()
    tar.write_bytes(raw[:2000]+bytes([raw[2000] ^ 1])+raw[2001:])
    (q/'quads-00001.tar').unlink()
    assert fault(tar) == 'its checksum is wrong' and fault(tar, check=False) == ''
    with pytest.raises(UserError, match='quads-00001.tar: missing'): Quadruples(q)
    left = Quadruples(q, cache='ram', on_error='skip')
    assert len(left) == 4 and len(left.report) == 2
    index_path(q/'quads-00003.tar').write_text('{') # a damaged index
    assert write_quadruples(roller, source, 8, q, 'both', shard=2, quiet=True)['shards'] == [1, 2, 3]
    assert shas(q) == shas(quads)

def test_pictures_that_cannot_be_used_are_left_out(home, quads, roller, tmp_path, capsys):
    import shutil
    shutil.copytree(home/'pics', tmp_path/'pics')
    (tmp_path/'pics'/'2.png').write_bytes(b'not a picture')
    bad = FolderPictures(tmp_path/'pics', CFG.view.size)
    write_quadruples(roller, bad, 8, tmp_path/'q', 'both', shard=2, quiet=True)
    data, whole = Quadruples(tmp_path/'q'), Quadruples(quads)
    assert [data.get(i)['record']['index'] for i in range(len(data))] == [0, 1, 3, 4, 5, 6]
    assert torch.equal(data.get(2)['oi'], whole.get(3)['oi']) # its neighbour is missing, its bytes are the same
    assert '2.png' in capsys.readouterr().err

def test_rings_give_view_and_elevation():
    class Fake:
        size, ring = 32, 8
        meta = [dict(name='a', family='A', sha='1', elevation=4.), dict(name='b', sha='2', elevation=-3.)] # the second of unknown family
        def __len__(self): return 2
        def get(self, i): return torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 4, 32, 32)+100*i
    src = RingPictures(Fake(), 32)
    recs = [plan(i, src, CFG.view) for i in range(20)]
    for i, (r, x) in enumerate(recs):
        assert r['elevation'] == Fake.meta[i % 2]['elevation'] and x[0, 0, 0] == r['picture']['view']+100*(i % 2)
    assert len({r['picture']['view'] for r, _ in recs}) > 3 and len({r['noise_seed'] for r, _ in recs}) == 20
    assert [picture_family(r) for r, _ in recs[:4]] == ['A', 'b']*2 and list(recs[0][0]['picture']) == ['name', 'family', 'sha', 'view']
    with pytest.raises(UserError, match='32 px'): RingPictures(Fake(), 64)

def test_verify(home, quads, roller, source, capsys, tmp_path):
    assert verify(Quadruples(quads), roller, 3, source) == ([], [float('inf')]*3)
    main(args(home, quads, '--verify', '2'))
    assert '2 equal byte for byte' in capsys.readouterr().out
    with pytest.raises(SystemExit): main(args(home, quads, '--verify', '2', '--diffusion.guidance', '4'))
    assert 'guidance is 2.0 there, 4.0 here' in capsys.readouterr().err
    other = Roller(Teacher.load(home/'teacher.safetensors'), CFG, seed=1)
    assert any('noise_seed' in line for line in verify(Quadruples(quads), other, 1, source)[0])

def test_verify_takes_records_without_a_family(roller, tmp_path, monkeypatch):
    "Quadruples of rings did not always name the family: older ones are not wrong, another family is."
    class Rocks:
        size, ring = CFG.view.size, 4
        meta = [dict(name=f'rock {i}', family='rock', sha=str(i), elevation=0.) for i in range(2)]
        def __len__(self): return 2
        def get(self, i): return torch.full((4, 4, self.size, self.size), 80*(i+1), dtype=torch.uint8)
    now = RingPictures(Rocks(), CFG.view.size)
    monkeypatch.setattr(Rocks, 'meta', [{k: v for k, v in m.items() if k != 'family'} for m in Rocks.meta]); then = RingPictures(Rocks(), CFG.view.size)
    write_quadruples(roller, then, 2, tmp_path/'old', shard=2, quiet=True); old = Quadruples(tmp_path/'old')
    monkeypatch.undo(); write_quadruples(roller, now, 2, tmp_path/'new', shard=2, quiet=True); new = Quadruples(tmp_path/'new')
    assert (old.names, new.names) == (['rock 0', 'rock 1'], ['rock', 'rock']) and torch.equal(old.get(1)['oi'], new.get(1)['oi'])
    assert verify(old, roller, 2, now)[0] == [] == verify(new, roller, 2, now)[0]
    monkeypatch.setattr(Rocks, 'meta', [dict(m, family='moss') for m in Rocks.meta])
    assert 'picture differ' in verify(new, roller, 2, now)[0][0]

def test_bf16_is_the_same_function(roller, source):
    low = Roller(roller.teacher, CFG, precision='bf16')
    a, b = roll(roller, source, 2, quiet=True), roll(low, source, 2, quiet=True)
    assert next(roller.teacher.unet.parameters()).dtype == torch.float32 # the caller's teacher is left alone
    assert compare(a['oi'], b['oi']) > 20 and low.settings['teacher'] == roller.settings['teacher']

def test_user_mistakes(home, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    for flags, says in [(['--pictures', str(tmp_path/'empty')], 'holds no pictures'), (['--teacher', ''], '--teacher is missing'), (['--scale', 'mini'], 'trained for another configuration'),
                        (['--teacher', str(home/'pics'/'0.png')], 'damaged')]:
        with pytest.raises(SystemExit) as e: main(args(home, tmp_path/'x', '--count', '2', *flags))
        err = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and says in err[-1] and 'Traceback' not in ''.join(err)
    with pytest.raises(UserError, match='python -m dd3g.rollout'): Quadruples(tmp_path/'empty')
