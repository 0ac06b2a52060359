"Test sets in the layouts they are published in, with their traps."
import json, math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dd3g.cameras import orbit, ring
from dd3g.core import UserError, sha
from dd3g.testsets import (LENS, LISTED, Case, Frozen, Protocol, asked, cases_of, chosen, find_objects, freeze, listed, listed_cases, listed_pictures, main, opencv_c2w, picture_cases, read_cases, read_exr, read_model,
                           texture_of, tone_map)

P = Protocol(size=32, input_size=48, views=4)
OBJ = '\n'.join(['mtllib {m}', *(f'v {x} {y} {z}' for z in (0, 2) for y in (0, 1) for x in (0, 1)), 'vt 0.25 0.5', 'vt 0.75 0.5', 'usemtl material_0',
                 'f 1/1 2/1 6/1', 'f 1/1 6/1 5/1', 'f 4/2 3/2 7/2', 'f 4/2 7/2 8/2', 'f 2/2 4/2 8/2', 'f 2/2 8/2 6/2', 'f 3/1 1/1 5/1', 'f 3/1 5/1 7/1', 'f 5/1 6/1 8/1', 'f 5/1 8/1 7/1', 'f 1/2 4/2 2/2', 'f 1/2 3/2 4/2', ''])

def tower(folder, name='model.obj', texture='texture.png', mtl=True, picture=None):
    "A box twice as high (z) as wide; texture: left half red, right half blue."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(OBJ.format(m='model.mtl') if mtl else OBJ.format(m='').replace('mtllib \n', '').replace('usemtl material_0\n', ''))
    if mtl: (folder/'model.mtl').write_text(f'newmtl material_0\nKd 1 1 1\nmap_Kd {texture}\n')
    if picture:
        picture.parent.mkdir(parents=True, exist_ok=True); im = Image.new('RGB', (8, 8), (220, 20, 20)); im.paste((20, 20, 220), (4, 0, 8, 8)); im.save(picture)

def box_of(alpha): ys, xs = np.nonzero(alpha > 128); return xs.max()-xs.min()+1, ys.max()-ys.min()+1

@pytest.mark.draws
@pytest.mark.parametrize('layout', ['published', 'flattened', 'ycb'])
def test_textured_and_upright(tmp_path, layout):
    root = tmp_path/'set'
    if layout == 'published': tower(root/'Tower'/'meshes', picture=root/'Tower'/'materials'/'textures'/'texture.png')
    if layout == 'flattened': tower(root/'Tower', mtl=False, picture=root/'Tower'/'texture.png')
    if layout == 'ycb': tower(root/'003_tower'/'google_16k', 'textured.obj', 'texture_map.png', picture=root/'003_tower'/'google_16k'/'texture_map.png')
    e, = find_objects(root)
    assert e.layout == ('ycb' if layout == 'ycb' else 'gso') and e.name == ('003_tower' if layout == 'ycb' else 'Tower')
    c, = cases_of(e, P)
    w, h = box_of(c.truth[0, 3].numpy()); rgb = c.truth[0].numpy().astype(int); on = rgb[3] > 200
    assert h > 1.3*w # it stands
    assert (rgb[0][on]-rgb[1][on]).mean() > 30 or (rgb[2][on]-rgb[1][on]).mean() > 30 # it is painted, not grey

def test_gso_folder_is_full_of_other_things(tmp_path):
    root = tmp_path/'gso'
    for n in ('A', 'B'):
        tower(root/n/'meshes', picture=root/n/'materials'/'textures'/'texture.png'); (root/n/'thumbnails').mkdir(); Image.new('RGB', (4, 4)).save(root/n/'thumbnails'/'0.jpg')
        (root/n/'model.config').write_text('<model/>'); (root/n/'metadata.pbtxt').write_text('')
    assert [e.name for e in find_objects(root)] == ['A', 'B'] and texture_of(root/'A'/'meshes'/'model.obj').name == 'texture.png'
    (root/'B'/'materials'/'textures'/'texture.png').unlink()
    with pytest.raises(UserError, match='grey object'): read_model(find_objects(root)[1], P)

def test_ycb_one_mesh_an_object(tmp_path):
    for k in ('google_64k', 'google_16k', 'poisson', 'tsdf'): tower(tmp_path/'001_x'/k, 'textured.obj')
    tower(tmp_path/'002_y', 'textured.obj'); tower(tmp_path/'002_y', 'textured_simple.obj')
    assert [(e.name, e.path.parent.name, e.path.name) for e in find_objects(tmp_path)] == [('001_x', 'google_16k', 'textured.obj'), ('002_y', '002_y', 'textured.obj')]

def cameras(): return orbit(torch.tensor([10., 100., 200., 300.]), torch.tensor([20., -5., 45., 0.]), torch.tensor([1.6, 1.9, 2.2, 1.5])[:, None], LENS)

def picture(i, size=40):
    out = np.zeros((size, size, 4), np.uint8); out[8:32, 10:20+3*i] = (200, 60*i, 30, 255)
    return Image.fromarray(out)

def zero123(folder, cams=None, sizes=None):
    "Blender's script: world-to-camera of an OpenGL camera."
    cams = cams or cameras(); folder.mkdir(parents=True, exist_ok=True)
    for i, M in enumerate(cams.c2w.double().numpy()):
        gl = M.copy(); gl[:3, 1:3] *= -1
        picture(i).resize(((sizes or [40]*9)[i],)*2, Image.NEAREST).save(folder/f'{i:03d}.png')
        np.save(folder/f'{i:03d}.npy', np.concatenate([gl[:3, :3].T, -gl[:3, :3].T@gl[:3, 3:]], 1))

@pytest.mark.parametrize('below', ['', 'render_mvs_25/model'])
def test_zero123_and_free3d(tmp_path, below):
    zero123(tmp_path/'set'/'duck'/below)
    e, = find_objects(tmp_path/'set'); c, = cases_of(e, P); want = cameras()
    assert (e.name, e.layout, c.cams.n, c.ring) == ('duck', 'zero123', 3, False) and abs(c.cams.fov-49.13) < .01
    assert torch.allclose(c.source.azimuth, torch.tensor([90.]), atol=1e-3) and torch.allclose(c.source.elevation, torch.tensor([20.]), atol=1e-3)
    assert torch.allclose(c.cams.azimuth, (want.azimuth[1:]+80)%360, atol=1e-2) and torch.allclose(c.cams.elevation, want.elevation[1:], atol=1e-2)
    assert torch.allclose(c.cams.positions.norm(dim=1), torch.tensor([1.9, 2.2, 1.5]), atol=1e-4)
    assert torch.allclose((c.cams.w2c@torch.tensor([0, 0, 0, 1.]))[:, 2], torch.tensor([1.9, 2.2, 1.5]), atol=1e-4) # the origin lies ahead: no axis left flipped

def test_view_without_pose_and_mixed_sizes(tmp_path):
    zero123(tmp_path/'set'/'duck', sizes=[40, 24, 40, 64]); (tmp_path/'set'/'duck'/'001.npy').unlink()
    c, = cases_of(find_objects(tmp_path/'set')[0], P)
    assert c.cams.n == 2 and '1 views without pose (001), left out' in c.notes[0] and 'pictures of 40, 64 px' in c.notes[1] and c.truth.shape[-1] == 32

@pytest.mark.parametrize('spoil, why', [(lambda d: np.save(d/'002.npy', np.eye(3)), '002.npy: holds'), (lambda d: (d/'002.npy').write_bytes(b'x'), '002.npy: cannot be read'),
    (lambda d: np.save(d/'001.npy', -np.eye(4)[:3]), '001.npy: its left 3x3 part is no rotation'), (lambda d: [(d/f'{i:03d}.npy').unlink() for i in range(1, 4)], '1 views have both'),
    (lambda d: picture(0).convert('RGB').save(d/'000.png'), 'no alpha channel'), (lambda d: Image.new('RGBA', (40, 30)).save(d/'001.png'), 'square ones are needed')])
def test_bad_zero123(tmp_path, spoil, why):
    zero123(tmp_path/'set'/'duck'); spoil(tmp_path/'set'/'duck')
    with pytest.raises(UserError, match=why) as e: cases_of(find_objects(tmp_path/'set')[0], P)
    assert '\n' not in str(e.value)

def test_pickled_pose_is_not_opened(tmp_path):
    zero123(tmp_path/'s'/'duck'); np.save(tmp_path/'s'/'duck'/'001.npy', np.array([{'a': 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match='001.npy: cannot be read'): cases_of(find_objects(tmp_path/'s')[0], P)

def rtmv(folder, change=None, n=3):
    OpenEXR = pytest.importorskip('OpenEXR'); folder.mkdir(parents=True, exist_ok=True)
    mid, half, s = np.array([5., -2, 1]), .6/3**.5*4, 4.
    for i, M in enumerate(cameras().c2w.double().numpy()[:n]):
        gl = M.copy(); gl[:3, 1:3] *= -1; gl[:3, 3] = gl[:3, 3]*s+mid
        m = dict(cam2world=gl.T.tolist(), width=40, height=40, intrinsics=dict(fx=50., fy=50., cx=20, cy=20), scene_center_3d_box=mid.tolist(), scene_min_3d_box=(mid-half).tolist(), scene_max_3d_box=(mid+half).tolist())
        if change: change(i, m)
        (folder/f'{i:05d}.json').write_text(json.dumps(dict(camera_data=m, objects=[])))
        x = np.zeros((40, 40, 4), np.float16); x[10:30, 10:30] = (.216, 4., 0, 1)
        OpenEXR.File(dict(compression=OpenEXR.ZIP_COMPRESSION, type=OpenEXR.scanlineimage), dict(RGBA=x)).write(str(folder/f'{i:05d}.exr'))

def test_rtmv(tmp_path):
    rtmv(tmp_path/'bricks'/'V7'); e, = find_objects(tmp_path); c, = cases_of(e, P); want = cameras()
    assert (e.name, e.layout, e.group) == ('bricks/V7', 'rtmv', 'bricks') and abs(c.cams.fov-2*math.degrees(math.atan(.4))) < 1e-3
    assert torch.allclose(c.cams.positions.norm(dim=1), want.positions[1:3].norm(dim=1), atol=1e-4) # recentred and scaled: the box of side 4 times ours
    assert torch.allclose(c.cams.azimuth, (want.azimuth[1:3]+80)%360, atol=1e-2) and torch.allclose(c.cams.elevation, want.elevation[1:3], atol=1e-2)
    assert torch.allclose(c.truth[0, :3, 16, 16].float()/255, torch.tensor([.5028, 1, 0]), atol=.01) # sRGB, clipped

def test_rtmv_traps(tmp_path):
    rtmv(tmp_path/'a'/'V', lambda i, m: m.update(cam2world=np.array(m['cam2world']).T.tolist()))
    with pytest.raises(UserError, match='not stored by rows'): cases_of(find_objects(tmp_path/'a')[0], P)
    rtmv(tmp_path/'b'/'V', lambda i, m: m.pop('scene_center_3d_box'))
    with pytest.raises(UserError, match='00000.json: camera_data has no sound scene_center_3d_box'): cases_of(find_objects(tmp_path/'b')[0], P)
    rtmv(tmp_path/'c'/'V'); (tmp_path/'c'/'V'/'00002.exr').unlink()
    c, = cases_of(find_objects(tmp_path/'c')[0], P); assert c.cams.n == 1 and '1 poses without picture' in c.notes[0]
    (tmp_path/'c'/'V'/'00001.exr').write_bytes(b'no'); 
    with pytest.raises(UserError, match='00001.exr: cannot be read as EXR'): cases_of(find_objects(tmp_path/'c')[0], P)
    (tmp_path/'c'/'V'/'00000.json').write_text('{')
    with pytest.raises(UserError, match='00000.json: is no RTMV'): cases_of(find_objects(tmp_path/'c')[0], P)

def test_exr_without_its_package_says_so(tmp_path, monkeypatch):
    import cv2, importlib.util
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'OpenEXR' else find(n, *a)); monkeypatch.setattr(cv2, 'getBuildInformation', lambda: 'OpenEXR:   NO')
    (tmp_path/'a.exr').write_bytes(b'')
    with pytest.raises(UserError, match='pip install OpenEXR'): read_exr(tmp_path/'a.exr')

def test_tone_map_order():
    "White, clip, curve: half a pixel of light 1 over white stays white; a blown-out pixel is clipped before the curve."
    x = tone_map(np.array([[[1, 1, 1, .5], [9, 0, 0, 1]]], np.float32)); rgb = x[:3]*x[3:]+1-x[3:]
    assert torch.allclose(rgb[:, 0, 0], torch.ones(3)) and torch.allclose(rgb[:, 0, 1], torch.tensor([1., 0, 0]))

def test_opencv_c2w(): # a camera at (0, 0, 5) that looks down, Blender's identity
    M = opencv_c2w(np.concatenate([np.eye(3), [[0], [0], [-5.]]], 1))
    assert torch.allclose(M[:3, 3], torch.tensor([0, 0, 5.])) and torch.allclose(M[:3, 2], torch.tensor([0, 0, -1.]))

def test_chosen_views():
    assert chosen(list(range(13)), Protocol(posed_views=24)) == list(range(13)) and len(chosen(list(range(150)), Protocol(posed_views=24))) == 25

def test_layouts_refused(tmp_path):
    with pytest.raises(UserError, match='no such folder'): find_objects(tmp_path/'gone')
    with pytest.raises(UserError, match='no objects of any layout'): find_objects(tmp_path)
    with pytest.raises(UserError, match='there are auto'): find_objects(tmp_path, 'shapenet')

def test_plain_models_groups_and_names(tmp_path):
    for q in ('a/x.glb', 'b/x.glb', 'b/y.obj'): (tmp_path/q).parent.mkdir(exist_ok=True); (tmp_path/q).write_bytes(b'')
    assert [(e.name, e.group) for e in find_objects(tmp_path)] == [('a/x', 'a'), ('b/x', 'b'), ('y', 'b')]

def test_protocol_hash():
    assert Protocol().hash == Protocol().hash != Protocol(views=16).hash

# drawn once

def sample_cases(size=24, views=3):
    gen = torch.Generator().manual_seed(0); out = []
    for i, n in enumerate(('a', 'deep/b')):
        for az in ((0., 90.) if i else (0.,)):
            rgba = torch.rand(4, 20, 20, generator=gen) if i else torch.randint(0, 256, (4, 20, 20), generator=gen).float()/255 # one that 8 bits cannot hold
            cams = ring(views, 3.3+i)
            out.append((Case(n, rgba, cams.views([0]), cams, torch.randint(0, 256, (views, 4, size, size), generator=gen).byte(), True, az, ('a note',)*i), f'set {i}'))
    return out

FP = Protocol(size=24, input_size=20, views=3)

@pytest.mark.parametrize('name', ['set.tar', 'folder'])
def test_frozen_comes_back_to_the_bit(tmp_path, name):
    cases = sample_cases(); index = freeze(cases, FP, tmp_path/name)
    f = Frozen(tmp_path/name)
    assert f.protocol == FP and index['objects_hash'] == sha(listed(cases)) and [(e.name, e.group, e.layout) for e in find_objects(tmp_path/name)] == [('a', 'set 0', 'frozen'), ('deep/b', 'set 1', 'frozen')]
    back, bad = read_cases(tmp_path/name, 'auto', asked(tmp_path/name, Protocol()))
    assert not bad and sha(listed(back)) == sha(listed(cases))
    for (a, g), (b, h) in zip(cases, back):
        assert g == h and a.key == b.key and a.notes == b.notes and a.ring == b.ring and torch.equal(a.truth, b.truth) and torch.equal(a.rgba, b.rgba) and torch.equal(a.cams.c2w, b.cams.c2w) and torch.equal(a.source.c2w, b.source.c2w) and (a.cams.fov, a.source.fov) == (b.cams.fov, b.source.fov)
    freeze(cases, FP, tmp_path/f'twice-{name}', index['name'])
    if name.endswith('tar'): assert (tmp_path/name).read_bytes() == (tmp_path/f'twice-{name}').read_bytes()

def test_frozen_protocol_is_its_own(tmp_path):
    freeze(sample_cases(), FP, tmp_path/'s.tar')
    assert asked(tmp_path/'s.tar', Protocol(normalise='ball')) == replace(FP, normalise='ball') and asked(tmp_path, Protocol(size=48)) == Protocol(size=48)
    with pytest.raises(UserError, match='have views 3, not 6'): asked(tmp_path/'s.tar', Protocol(views=6))
    with pytest.raises(UserError, match='frozen with size 24, not 128'): Frozen(tmp_path/'s.tar').cases('a', Protocol(views=3, input_size=20))

def test_damaged_and_foreign_sets_are_one_line(tmp_path):
    freeze(sample_cases(), FP, tmp_path/'s'); freeze(sample_cases(), FP, tmp_path/'s.tar')
    change = lambda f, g: f.write_bytes(g(f.read_bytes()))
    def says(match, path=tmp_path/'s'):
        with pytest.raises(UserError, match=match) as e: [c for x in find_objects(path) for c in Frozen(path).cases(x.name)]
        assert '\n' not in str(e.value)
    change(tmp_path/'s'/'0001.truth.png', lambda d: d[:-20]+bytes([d[-20] ^ 1])+d[-19:]); says('0001.truth.png is damaged')
    (tmp_path/'s'/'0001.truth.png').unlink(); says('0001.truth.png is absent')
    good = (tmp_path/'s'/'set.json').read_text()
    for a, b, why in (('"version": 1, "name"', '"version": 9, "name"', 'another version'), ('"align_step": 30.0', '"align_step": 31.0', 'another version'), ('dd3g frozen test set', 'something', 'no frozen test set'), ('"protocol"', '"protocoll"', 'damaged|no frozen')):
        (tmp_path/'s'/'set.json').write_text(good.replace(a, b)); says(why)
    old = replace(FP, version=1)
    (tmp_path/'s'/'set.json').write_text(json.dumps(dict(json.loads(good), protocol=asdict(old), protocol_hash=old.hash))); says('another version') # it fits itself, and means something else today
    (tmp_path/'s'/'set.json').write_text('{"kind": '); says('damaged')
    for n, d in (('empty.tar', b''), ('text.tar', b'hello'*500), ('cut.tar', (tmp_path/'s.tar').read_bytes()[:9000])): (tmp_path/n).write_bytes(d); says('damaged|no frozen test set', tmp_path/n)
    says('no such folder', tmp_path/'gone.tar')

def test_pictures_without_truth(tmp_path):
    (tmp_path/'pics').mkdir()
    for i in range(3): im = Image.new('RGBA', (40, 40)); im.paste((200, 50*i, 0, 255), (10, 8, 30, 33)); im.save(tmp_path/'pics'/f'{i}.png')
    cases = picture_cases(tmp_path/'pics', replace(FP, elevation=2.), 2)
    freeze(cases, FP, tmp_path/'p.tar'); back, _ = read_cases(tmp_path/'p.tar', 'auto', FP)
    assert [c.name for c, _ in back] == ['0.png', '1.png'] and back[0][0].truth is None and torch.equal(back[1][0].rgba, cases[1][0].rgba) and abs(float(back[0][0].source.elevation)-2) < 1e-3

def test_rings_are_a_test_set(tmp_path):
    from dd3g.objects import _png, _write_shard
    x = torch.zeros(8, 4, 24, 24, dtype=torch.uint8); x[:, 0] = torch.arange(8, dtype=torch.uint8)[:, None, None]; x[:, 3, 4:20, 4:20] = 255
    meta = lambda o, r: dict(name=f'o{o}', family=f'f{o}', source='procedural' if o else 'files', ring=r, elevation=float(r), azimuths=[45.*j for j in range(8)], radius=1.5, fov=49.1, size=24)
    (tmp_path/'r').mkdir(); _write_shard(tmp_path/'r'/'rings-00000.tar', [(o, meta(o, r), _png(x)) for o in range(2) for r in range(2)])
    p = asked(tmp_path/'r', Protocol(views=4, inputs=2, azimuth=45.)); back, _ = read_cases(tmp_path/'r', 'auto', p)
    assert (p.size, p.input_size, p.views) == (24, 24, 4) and [(c.name, g, c.azimuth) for c, g in back] == [('o0', 'files', 45.), ('o0', 'files', 225.), ('o1', 'procedural', 45.), ('o1', 'procedural', 225.)]
    assert back[0][0].truth[:, 0, 0, 0].tolist() == [1, 3, 5, 7] and back[1][0].truth[:, 0, 0, 0].tolist() == [5, 7, 1, 3] and 'not by pyrender' in back[0][0].notes[0]
    with pytest.raises(UserError, match='have size 24, not 64'): asked(tmp_path/'r', Protocol(size=64))
    main(f'freeze --objects {tmp_path}/r --out {tmp_path}/r.tar --held-out .5'.split())
    assert len(Frozen(tmp_path/'r.tar').entries()) == 1

def test_list_of_held_out_pictures(tmp_path, capsys):
    from dd3g.objects import is_procedural, procedural_name, read_splits
    rows, lists = listed_pictures(), read_splits()
    assert len(rows) == 200 and all(r['seed'] >= 3_000_000 and r['name'] == procedural_name(r['seed']) for r in rows)
    assert not {r['name'] for r in rows} & {*lists['validation']['procedural'], *(n for n in lists['three_d_set']['order'] if is_procedural(n))}
    def says(match, line):
        with pytest.raises(SystemExit): main(f'freeze --listed --out {tmp_path}/x.tar {line}'.split())
        assert match in (err := capsys.readouterr().err) and len(err.splitlines()) == 1 and not (tmp_path/'x.tar').exists()
    for flag in ('--azimuth 45', '--elevation 3', '--inputs 2'): says('each picture of the list has its own', flag)
    for flag in ('--pictures', '--held-out .1', f'--names {tmp_path}/n.txt', '--layout gso', '--seed 3'): says('give one of the two', flag)
    says('--limit -1: at least 0', '--limit -1'); says('--size 0: at least 16', '--size 0'); says('--views 0: at least 1', '--views 0'); says('no list of splits', f'--objects {tmp_path}/none.json')
    own = dict(rule={}, training={}, validation={})
    for i, pics in enumerate((None, [], 'all', [dict(name='car-1', seed='1', azimuth=0, elevation=0)], [dict(name='car-1', seed=1, azimuth=0)])):
        (tmp_path/f'{i}.json').write_text(json.dumps(own | ({} if pics is None else dict(pictures=pics)))); says('lists no held-out pictures', f'--objects {tmp_path}/{i}.json')
    with pytest.raises(UserError, match='another version of dd3g'): listed_cases([dict(rows[0], name='mug-3000000')], P)

@pytest.mark.draws
def test_held_out_pictures_are_drawn_as_listed(tmp_path):
    from dd3g.objects import procedural, render_model
    rows = [r for r in listed_pictures() if r['azimuth'] not in (0, 30)]; rows = [rows[0], rows[-1]]
    (tmp_path/'own.json').write_text(json.dumps(dict(rule={}, training={}, validation={}, pictures=[rows[0]]*3+[rows[1]])))
    main(f'freeze --listed --objects {tmp_path}/own.json --limit 2 --out {tmp_path}/f.tar --size 32 --input-size 48 --views 4'.split()) # two, evenly: the first and the last
    assert asked(tmp_path/'f.tar', Protocol()) == P
    back, bad = read_cases(tmp_path/'f.tar', 'auto', P)
    assert not bad and [(c.key, g) for c, g in back] == [(r['name'], LISTED) for r in rows]
    for (c, _), r in zip(back, rows):
        want = render_model(procedural(r['seed']), ring(4, r['elevation'], r['azimuth']), 32)
        assert torch.equal(c.truth, want) and c.ring and torch.allclose(c.cams.c2w, ring(4, r['elevation']).c2w, atol=1e-5) and torch.allclose(c.source.c2w, c.cams.c2w[:1])
        assert c.rgba.shape == (4, 48, 48) and not torch.equal(c.truth[0], render_model(procedural(r['seed']), ring(4, 0., 30.), 32)[0])

@pytest.mark.draws
def test_frozen_models_are_judged_alike(tmp_path):
    "Live and frozen: one protocol, one list of objects, equal scores."
    from dd3g.evaluate import run, EvaluateArgs
    from dd3g.gaussians import demo_gaussians
    from dd3g.splats import save_splats
    for n in 'ab': tower(tmp_path/'models'/n, 'textured.obj', picture=tmp_path/'models'/n/'texture.png'); save_splats(demo_gaussians(300, seed=ord(n)), tmp_path/'plys'/f'{n}.ply', 'dd3g')
    main(f'freeze --objects {tmp_path}/models --out {tmp_path}/f.tar --size 32 --input-size 48 --views 4'.split())
    ask = lambda o, p: run(EvaluateArgs(objects=o, plys=(tmp_path/'plys',), out=tmp_path/f'{o.name}.json', lpips=(), pictures=False, protocol=p), quiet=True)
    a, b = ask(tmp_path/'models', P), ask(tmp_path/'f.tar', Protocol())
    assert all(a[k] == b[k] for k in ('protocol_hash', 'objects_hash', 'protocol', 'floors')) and a['methods'] == b['methods']
