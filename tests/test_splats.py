"Gaussian files of other people: recognised, stood up, coloured, or refused in one line."
import math

import numpy as np
import pytest
import torch

from dd3g.cameras import orbit, ring
from dd3g.core import UserError
from dd3g.gaussians import SH_C0, Gaussians, demo_gaussians, ply_header, ply_rows, quat_to_matrix
from dd3g.render import render
from dd3g.splats import FRAMES, MAX_GAUSSIANS, Splats, activations, draw, frame, harmonics, load_splats, recognise, save_splats

@pytest.fixture(scope='module')
def g():
    out = demo_gaussians(300); out.alpha[::2] = .9995
    return out

def write(path, cols, comment=None, big=False):
    "A PLY by hand: dict of columns."
    n = len(next(iter(cols.values())))
    head = ['ply', f'format binary_{"big" if big else "little"}_endian 1.0', *([f'comment {comment}'] if comment else []), f'element vertex {n}', *[f'property float {f}' for f in cols], 'end_header', '']
    path.write_bytes('\n'.join(head).encode()+np.stack(list(cols.values()), 1).astype('>f4' if big else '<f4').tobytes())
    return path

def proper(g, normals=True, rest=0):
    "Columns as Inria's code stores them, computed here with formulas of our own."
    out = dict(zip('xyz', g.mu.numpy().T.astype(float)))
    if normals: out |= {k: np.zeros(g.n) for k in ('nx', 'ny', 'nz')}
    out |= {f'f_dc_{i}': (g.color[:, i].numpy()-.5)/.28209479177387814 for i in range(3)} | {f'f_rest_{i}': np.zeros(g.n) for i in range(rest)}
    a = g.alpha.double().numpy(); out['opacity'] = np.log(a/(1-a))
    return out | {f'scale_{i}': np.log(g.scale[:, i].numpy()) for i in range(3)} | {f'rot_{i}': g.quat[:, i].numpy() for i in range(4)}

@pytest.mark.parametrize('convention', ['dd3g', 'inria', 'lgm', 'tgs'])
def test_round_trip(g, tmp_path, convention):
    s = load_splats(save_splats(g, tmp_path/'a.ply', convention))
    assert s.convention == convention and not s.notes
    assert (s.g.mu-g.mu).abs().max() < 1e-5 and (s.g.covariance()-g.covariance()).abs().max() < 1e-6 and (s.g.color-g.color).abs().max() < 1e-5
    assert (s.g.alpha-g.alpha).abs().max() < (6e-4 if convention == 'tgs' else 1e-5)

def test_lgm_axes(g, tmp_path):
    "LGM: y up, its azimuth 0 looks from +z. A point that LGM holds above the object is above it here."
    c = proper(g.take(slice(20)), normals=False); c['x'][0], c['y'][0], c['z'][0] = 0, 2., 0
    c['x'][1], c['y'][1], c['z'][1] = 0, 0, 3.
    s = load_splats(write(tmp_path/'a.ply', c))
    assert s.convention == 'lgm' and torch.allclose(s.g.mu[0], torch.tensor([0, 0, 2.]), atol=1e-5) and torch.allclose(s.g.mu[1], torch.tensor([3., 0, 0]), atol=1e-5)

def test_camera_axes(g, tmp_path):
    "Inria's: x right, y down, z away from the camera. What is far from the input's camera is at -x here."
    c = proper(g.take(slice(20)), rest=9); c['x'][0], c['y'][0], c['z'][0] = 1., 2., 3.
    s = load_splats(write(tmp_path/'a.ply', c))
    assert (s.convention, s.degree) == ('inria', 1) and torch.allclose(s.g.mu[0], torch.tensor([-3., 1, -2]), atol=1e-5)

def test_frames_are_rotations():
    for f in FRAMES: assert torch.allclose(frame(f)@frame(f).T, torch.eye(3)) and torch.linalg.det(frame(f)) > 0

def test_plain_values_are_noticed(g, tmp_path):
    c = proper(g, normals=False) | {f'scale_{i}': g.scale[:, i].numpy() for i in range(3)} | dict(opacity=g.alpha.numpy()) | {f'f_dc_{i}': g.color[:, i].numpy() for i in range(3)}
    s = load_splats(write(tmp_path/'plain.ply', c))
    assert len(s.notes) == 1 and 'plain.ply: scale, opacity, colour stored after activation' in s.notes[0]
    assert torch.allclose(s.g.alpha, g.alpha, atol=1e-6) and (s.g.covariance()-g.covariance()[...]).abs().max() < 1 and torch.allclose(s.g.scale.sort(1)[0], g.scale.sort(1)[0], atol=1e-6)
    only = proper(g) | dict(opacity=g.alpha.numpy())
    s = load_splats(write(tmp_path/'only.ply', only))
    assert 'only.ply: opacity stored' in s.notes[0] and torch.allclose(s.g.alpha, g.alpha, atol=1e-6)
    with pytest.raises(UserError, match='as wide as the whole object'): load_splats(tmp_path/'plain.ply', plain=(False, False, False))

def test_few_gaussians_are_believed(): assert activations(np.full((5, 3), .1), np.full(5, .5), np.full((5, 3), .5)) == (False,)*3

def test_saturated_colours_are_not_plain(g):
    "Pale colours have coefficients between 0 and 1, too: only plain scales make them suspect."
    assert activations(np.full((50, 3), -4.), np.linspace(-3, 3, 50), np.full((50, 3), .4)) == (False,)*3

@pytest.mark.parametrize('degree', [1, 2, 3])
def test_harmonics(g, tmp_path, degree):
    "f_rest of Inria: all of red first. Colour by hand: .5 + C0 dc + sum."
    K = (degree+1)**2-1; rest = np.random.default_rng(0).normal(0, .1, (g.n, 3, K))
    c = proper(g, rest=3*K) | {f'f_rest_{i}': rest.reshape(g.n, -1)[:, i] for i in range(3*K)}
    s = load_splats(write(tmp_path/'a.ply', c), 'dd3g'); cam = orbit(30., 20.)
    d = torch.nn.functional.normalize(g.mu-cam.positions[0], dim=1)
    x, y, z = d.T.double().numpy()
    first = -.4886025119029199*y*rest[:, 0, 0]+.4886025119029199*z*rest[:, 0, 1]-.4886025119029199*x*rest[:, 0, 2] # red, degree 1, Inria's constants
    got = s.seen_from(cam).color[0]
    if degree == 1: assert np.abs(got[:, 0].numpy()-np.maximum(g.color[:, 0].numpy()+first, 0)).max() < 1e-5
    assert s.degree == degree and (got-g.color).abs().max() > .05
    t = load_splats(write(tmp_path/'t.ply', proper(g, rest=3*K) | {f'f_rest_{i}': rest.transpose(0, 2, 1).reshape(g.n, -1)[:, i] for i in range(3*K)}), 'tgs')
    assert torch.allclose(t.sh, s.sh) # the other order, the same coefficients
    assert load_splats(tmp_path/'a.ply', 'dd3g', dc_only=True).sh is None

def test_turning_turns_harmonics(g):
    gen = torch.Generator().manual_seed(0); s = Splats(g, torch.randn(g.n, 15, 3, generator=gen)*.1, torch.eye(3))
    c, n = math.cos(.7), math.sin(.7); R = torch.tensor([[c, -n, 0], [n, c, 0], [0, 0, 1]])
    a, b = draw(s.transform(R), orbit(90., 5.), 32).rgb, draw(s, orbit(90-math.degrees(.7), 5.), 32).rgb
    assert (a-b).abs().max() < 1e-3 and (draw(Splats(g.transform(R), s.sh, torch.eye(3)), orbit(90., 5.), 32).rgb-b).abs().max() > .02

def test_splat_file(g, tmp_path):
    s = load_splats(save_splats(g, tmp_path/'a.splat', 'viewer'))
    assert s.convention == 'viewer' and (render(s.g, ring(2), 32).rgb-render(g, ring(2), 32).rgb).abs().max() < .03
    from dd3g.generate import splat_bytes
    (tmp_path/'ours.splat').write_bytes(splat_bytes(g)) # what the page embeds, in our axes
    assert torch.allclose(load_splats(tmp_path/'ours.splat', 'dd3g').g.mu, g.mu[g.alpha > 1/255], atol=1e-6)

def test_recognised():
    names = list(proper(demo_gaussians(20)))
    assert recognise(names, ['dd3g: z up']) == 'dd3g' and recognise([n for n in names if n[0] != 'n'], []) == 'lgm' and recognise(names, []) == 'inria'
    clip = math.log(999.); o = np.r_[np.linspace(-5, 5, 30), clip]
    assert recognise([*names, 'f_rest_0'], [], o) == 'tgs' and recognise([*names, 'f_rest_0'], [], o*1.2) == 'inria'

def test_own_files_are_known(g, tmp_path):
    assert load_splats(g.save_ply(tmp_path/'a.ply')).convention == 'dd3g'
    assert torch.equal(load_splats(tmp_path/'a.ply').g.mu, Gaussians.load_ply(tmp_path/'a.ply').mu)

def test_big_endian_and_extra_fields(g, tmp_path):
    c = proper(g) | dict(red=np.zeros(g.n), confidence=np.ones(g.n))
    assert torch.allclose(load_splats(write(tmp_path/'a.ply', c, big=True), 'dd3g').g.mu, g.mu)

@pytest.mark.parametrize('field, value, why', [('x', np.nan, 'in x, the first in row 5'), ('rot_2', np.inf, 'in rot_2, the first in row 5'), ('opacity', np.nan, 'in opacity'), ('scale_1', np.inf, 'in scale_1'), ('f_rest_3', np.nan, 'in f_rest_3')])
def test_not_numbers(g, tmp_path, field, value, why):
    c = proper(g, rest=9); c[field] = np.array(c[field], float); c[field][5] = value
    with pytest.raises(UserError, match=why) as e: load_splats(write(tmp_path/'bad.ply', c))
    assert 'bad.ply' in str(e.value) and '\n' not in str(e.value)

def test_infinities_that_mean_something(g, tmp_path):
    c = proper(g); c['opacity'][0], c['opacity'][1], c['scale_0'][2] = np.inf, -np.inf, -np.inf
    s = load_splats(write(tmp_path/'a.ply', c))
    assert s.g.alpha[0] == 1 and s.g.alpha[1] == 0 and s.g.scale[2].min() < 1e-30 and all(x.isfinite().all() for x in s.g.tensors)

def test_ten_million_are_refused_from_the_header(g, tmp_path):
    p = write(tmp_path/'many.ply', proper(g)); p.write_bytes(p.read_bytes().replace(b'vertex 300', b'vertex 10000000'))
    with pytest.raises(UserError, match=f'holds 10,000,000 Gaussians, {MAX_GAUSSIANS:,} are the most'): load_splats(p)
    with pytest.raises(UserError, match='holds 300 Gaussians, 200 are'): load_splats(write(tmp_path/'some.ply', proper(g)), limit=200)

def test_rows_are_mapped_not_read(g, tmp_path):
    p = write(tmp_path/'a.ply', proper(g)); elements, _, start = ply_header(p)
    assert isinstance(ply_rows(p, *elements[0][1:], start), np.memmap)

@pytest.mark.parametrize('data, why', [(b'', 'not a PLY'), (b'ply\nformat ascii 1.0\nend_header\n', 'format ascii'), (b'ply\nformat binary_little_endian 1.0\nelement vertex 0\nproperty float x\nend_header\n', 'lacks y'),
    (b'ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty list uchar int f\nend_header\n', 'not a list of Gaussians'), (b'ply\nformat binary_little_endian 1.0\nelement vertex x\nend_header\n', 'header cannot be understood'),
    (b'ply\nformat binary_little_endian 1.0\nelement chunk 1\nproperty float min_x\nelement vertex 1\nproperty uint packed_position\nend_header\n'+b'\0'*8, 'fields that are not known')])
def test_no_splat_file(tmp_path, data, why):
    (tmp_path/'x.ply').write_bytes(data)
    with pytest.raises(UserError, match=why) as e: load_splats(tmp_path/'x.ply')
    assert 'x.ply' in str(e.value)

def test_cut_files(g, tmp_path):
    p = write(tmp_path/'a.ply', proper(g)); p.write_bytes(p.read_bytes()[:-3])
    with pytest.raises(UserError, match='cut off'): load_splats(p)
    (tmp_path/'b.splat').write_bytes(b'\0'*31)
    with pytest.raises(UserError, match='multiple of 32'): load_splats(tmp_path/'b.splat')
    (tmp_path/'c.splat').write_bytes(b'')
    with pytest.raises(UserError, match='no Gaussians'): load_splats(tmp_path/'c.splat')
