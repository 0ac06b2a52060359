"Quadruples of true views: nested sets, the right view at the right azimuth, the same shards as a teacher's."
import dataclasses, io, json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dd3g.config import SCALES
from dd3g.core import UserError
from dd3g.images import composite
from dd3g.meter import as_rolled, fits
from dd3g.rollout import Quadruples, fault, to_bytes
from dd3g.true_views import TRUE, TrueViews, nested_set, on_ring, ring_index, true_quadruple, write_true_quadruples

CFG = SCALES['tiny']

class FakeRings:
    "Rings in memory: the red of view j of ring i says which it is."
    def __init__(self, objects=6, rings=2, ring=8, size=32):
        v = CFG.view
        self.size, self.ring = size, ring
        self.meta = [dict(name=f'thing {o}', family=f'family {o//2}', source='test', ring=r, elevation=o-2.5+r, azimuths=[360*j/ring for j in range(ring)], radius=v.radius, fov=v.fov, size=size, sha=f'{o}-{r}') for o in range(objects) for r in range(rings)]
    def __len__(self): return len(self.meta)
    def get(self, i):
        x = torch.zeros(self.ring, 4, self.size, self.size, dtype=torch.uint8)
        x[:, 0, 8:24, 8:24] = torch.arange(self.ring, dtype=torch.uint8)[:, None, None]*10+5; x[:, 1, 8:24, 8:24] = i; x[:, 3, 8:24, 8:24] = 255
        return x

def test_nested_whatever_the_order():
    meta = FakeRings(40).meta
    names = lambda part, m=meta: {m[i]['name'] for i in nested_set(m, part)}
    assert [len(names(p)) for p in (.05, .1, .3, 1.)] == [2, 4, 12, 40] and names(.05) < names(.1) < names(.3) < names(1.)
    assert names(.1, meta[::-1]) == names(.1) and all(sum(meta[i]['name'] == n for i in nested_set(meta, .1)) == 2 for n in names(.1))
    for bad in (0., 1.5):
        with pytest.raises(UserError, match='--part'): nested_set(meta, bad)

def test_views_stand_where_c_says():
    source, view = TrueViews(FakeRings()), on_ring(CFG.view, 8)
    for i in range(40):
        rec, rgba, oi = true_quadruple(i, source, view)
        who, b = rec['picture'], rec['background']
        assert rec['elevation'] == source.rings.meta[who['ring']]['elevation'] and rec['offset'] % 45 == 0
        ring = source.rings.get(who['ring']).float()/255
        for v in range(4): # azimuth of view v is offset + 90 v; that of ring view j is 90 + 45 (j - j0)
            j = [j for j in range(8) if (90+45*(j-who['view'])-rec['offset']-90*v) % 360 == 0]
            assert len(j) == 1 and torch.equal(oi[v], to_bytes(composite(ring[j[0]], b)))
        assert torch.equal(rgba, source.rings.get(who['ring'])[who['view']])

def test_eight_azimuths_an_object_each_as_often():
    source = TrueViews(FakeRings(ring=16))
    for n in range(len(source)):
        uses = Counter(source.where(n, k, 0) for k in range(24))
        assert len(uses) == 8 and set(uses.values()) == {3} and len({i for i, _ in uses}) == 2 and sorted(j % 2 for _, j in uses) in ([0]*8, [1]*8)

def test_offsets_a_ring_does_not_have():
    free = replace(CFG.view, offset_step=0.)
    assert (on_ring(free, 16).offset_step, on_ring(replace(free, offset_step=45.), 8).offset_step, on_ring(replace(free, offset_step=22.5), 8).offset_step) == (22.5, 45., 45.)
    with pytest.raises(UserError, match='no 4'): on_ring(free, 6)
    fixed = replace(CFG.view, fixed_cameras=True)
    rec, rgba, oi = true_quadruple(3, TrueViews(FakeRings()), on_ring(fixed, 8))
    assert rec['offset'] == 0 and rec['elevation'] != 0 and torch.equal(oi[1], to_bytes(composite(rgba[None].float()/255, rec['background']))[0])

def test_shards_resume_and_are_equal(tmp_path):
    rings = FakeRings()
    assert write_true_quadruples(rings, None, CFG, tmp_path/'a', 40, shard=16, quiet=True) == dict(shards=[0, 1, 2], made=40, kept=0)
    write_true_quadruples(rings, None, CFG, tmp_path/'b', 20, shard=16, quiet=True) # killed here, say
    (tmp_path/'b'/'quads-00000.tar').write_bytes((tmp_path/'b'/'quads-00000.tar').read_bytes()[:5000])
    assert fault(tmp_path/'b'/'quads-00000.tar')
    assert write_true_quadruples(rings, None, CFG, tmp_path/'b', 40, shard=16, quiet=True)['shards'] == [0, 1, 2] # the last one was shorter
    for s in range(3): assert (tmp_path/'a'/f'quads-0000{s}.tar').read_bytes() == (tmp_path/'b'/f'quads-0000{s}.tar').read_bytes()
    with pytest.raises(UserError, match='other settings'): write_true_quadruples(rings, [0, 1], CFG, tmp_path/'a', 40, shard=16, quiet=True)
    with pytest.raises(UserError, match='another fov'): write_true_quadruples(rings, None, replace(CFG, view=replace(CFG.view, fov=40.)), tmp_path/'c', 8, quiet=True)
    with pytest.raises(UserError, match='rings of 32 px'): write_true_quadruples(rings, None, replace(CFG, view=replace(CFG.view, size=64)), tmp_path/'c', 8, quiet=True)

def test_training_takes_them_from_any_teacher(tmp_path):
    write_true_quadruples(FakeRings(), None, CFG, tmp_path, 16, quiet=True)
    data = Quadruples(tmp_path)
    fits(tmp_path, data.settings, CFG, 'a fingerprint'); assert as_rolled(CFG, data.settings) == CFG
    with pytest.raises(UserError, match='give their --scale'): fits(tmp_path, data.settings, SCALES['mini'], 'x')
    with pytest.raises(UserError, match='not by other'): fits(tmp_path, dict(data.settings, teacher='one'), CFG, 'other')
    from dd3g.meter import names_of
    assert data.settings['teacher'] == TRUE and set(names_of(data)) == {f'family {i}' for i in range(3)}
    batch = data.fetch([0, 9], 'cpu')
    assert batch['oi'].shape == (2, 4, 3, 32, 32) and batch['noise'].std() > .9 and json.dumps(data.get(0)['record'])

def test_a_student_trains_on_them(tmp_path, capsys):
    from dd3g.teacher import Teacher
    from dd3g.train import main
    torch.manual_seed(0); Teacher(CFG).save(tmp_path/'teacher.safetensors')
    write_true_quadruples(FakeRings(), None, CFG, tmp_path/'quads', 16, quiet=True)
    main(f'--quads {tmp_path}/quads --teacher {tmp_path}/teacher.safetensors --out {tmp_path}/run --pairs 0 --fit.steps 2 --fit.batch 2 --fit.warmup 0 --fit.save-every 2 --fit.grid-every 2 --objective explicit --loss.lambda-lpips 0'.split())
    assert (tmp_path/'run'/'student.safetensors').exists()
