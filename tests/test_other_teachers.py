"SV3D behind the common door: its ODE, its body against diffusers, its files; what any teacher refuses."
import json
from dataclasses import replace

import pytest
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dd3g.rollout as R
from dd3g.cameras import four_views, view_cameras
from dd3g.config import SCALES, AutoencoderConfig, EncoderConfig
from dd3g.core import UserError, fix_torchvision, seeded_randn
from dd3g.ddim import integrate, rollout
from dd3g.other_teachers import SV3D, OrbitConfig, OrbitSchedule, angles, open_teacher, orbit_rollout, orbit_unet, triangle, walk
from dd3g.teacher import MultiViewTeacher, inspect
from dd3g.train import main as train
from test_checkpoints import Parts

TOY = OrbitConfig(size=16, n_views=5, channels=(32, 64), layers=1, heads=(2, 4), context_dim=32, told=(32, 64, 64), ae=AutoencoderConfig((32, 32), 1), encoder=EncoderConfig('clip', 28, 14, 32, 2, 2))
SAID = dict(block_out_channels=[32, 64], layers_per_block=1, num_attention_heads=[2, 4], cross_attention_dim=32, projection_class_embeddings_input_dim=160, sample_size=8, num_frames=5)


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    return SV3D(TOY).eval().requires_grad_(False)


@pytest.fixture
def inputs(teacher):
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), seeded_randn([1, 2], *teacher.noise_shape), teacher.cameras(torch.zeros(2), torch.tensor([0., 10.]))


def write(teacher, path):
    def part(name, tensors, **said):
        (path/name).mkdir(parents=True)
        if tensors: save_file({k: v.contiguous() for k, v in tensors.items()}, path/name/'model.safetensors')
        (path/name/'config.json').write_text(json.dumps(said))
    part('unet', teacher.unet.state_dict(), **SAID), part('vae', teacher.ae.state_dict()), part('image_encoder', teacher.encoder.state_dict(), num_attention_heads=2)
    part('scheduler', None), part('feature_extractor', None)
    return path


def test_schedule_is_karras():
    s = OrbitSchedule()
    i = torch.arange(50, dtype=torch.float64)/49
    want = (700**(1/7) + i*(.002**(1/7)-700**(1/7)))**7
    torch.testing.assert_close(s.sigma[s.timesteps(50)].double(), want, rtol=1e-4, atol=0.)
    assert s.levels(50)[-1] == 1 and len(s.levels(50)) == 51
    with pytest.raises(UserError, match='must be 1 to'): s.timesteps(0)


def test_a_point_is_found_exactly():
    "Data are one point: the perfect F is known and the ODE ends there, whatever the noise."
    s, star = OrbitSchedule(), torch.tensor([1., -2., .5])
    def eps(z, t):
        a = s.abar[t]
        v = (a.sqrt()*z - star)/(1-a).sqrt() # v of x0 = star
        return s.to_eps(v, z, torch.full((len(z),), t))
    torch.testing.assert_close(integrate(eps, s, seeded_randn(range(4), 3), 50), star.expand(4, 3), rtol=1e-3, atol=1e-3)


def test_body_is_diffusers(teacher):
    even = replace(TOY, told=(32, 32, 32))
    torch.manual_seed(1)
    body = orbit_unet(even).eval().requires_grad_(False)
    x, c, t, told = seeded_randn(range(2), 5, 8, 8, 8), seeded_randn(range(2), 1, 32), torch.tensor([1.3, -.4]), torch.rand(2, 3)
    torch.testing.assert_close(walk(body, x, t, [n[:, None].expand(2, 5) for n in told.T], even.told, c), body(x, t, c, told).sample, rtol=1e-4, atol=1e-5)


def test_orbit(teacher):
    cams = SV3D.cameras(teacher, 0., 10.)
    polar, azimuth = angles(cams)
    torch.testing.assert_close(azimuth.rad2deg(), torch.tensor([72., 144., 216., 288., 0.]), rtol=0, atol=.01)
    torch.testing.assert_close(polar.rad2deg(), torch.full((5,), 80.), rtol=0, atol=.01)
    torch.testing.assert_close(triangle(5, 2.5), torch.tensor([1., 1.75, 2.5, 1.75, 1.]))
    assert teacher.cameras(torch.zeros(3), torch.zeros(3)).c2w.shape == (3, 5, 4, 4)


def test_rollout(teacher, inputs):
    image, noise, cams = inputs
    z = rollout(teacher, teacher.schedule, image, cams, noise, guidance=2., steps=2)
    assert z.shape == noise.shape and z.isfinite().all() and torch.equal(z, rollout(teacher, teacher.schedule, image, cams, noise, guidance=2., steps=2))
    assert isinstance(teacher, MultiViewTeacher)
    one = rollout(teacher, teacher.schedule, image, cams, noise, guidance=1., steps=2)
    torch.testing.assert_close(orbit_rollout(teacher, image, noise, cams, guidance=1., steps=2), one, rtol=1e-3, atol=1e-3) # sigma = 700 magnifies rounding
    other = rollout(teacher, teacher.schedule, 1-image, cams, noise, guidance=1., steps=2)
    turned = rollout(teacher, teacher.schedule, image, teacher.cameras(torch.zeros(2), torch.tensor([30., 40.])), noise, guidance=1., steps=2)
    assert not torch.allclose(other, one, atol=1e-4) and not torch.equal(turned, one)
    assert teacher.decode(z[:, :1]).shape == (2, 1, 3, 16, 16) and teacher.encode(image[:, None]).shape == (2, 1, 4, 8, 8)


def test_hidden_condition_is_zeros(teacher, inputs):
    cond = teacher.encode_condition(inputs[0])
    assert cond.tokens.any() and not any(x.any() for x in cond.null())
    raw = teacher.ae.moments(inputs[0])[0]
    torch.testing.assert_close(cond.latent, raw, rtol=1e-4, atol=1e-5) # unscaled, as in SVD


def test_cameras_it_does_not_know(teacher, inputs):
    image, noise, _ = inputs
    with pytest.raises(UserError, match='4 cameras.*knows 5'): rollout(teacher, teacher.schedule, image, four_views(torch.zeros(2), torch.zeros(2)), noise, steps=2)


def test_files(teacher, tmp_path, inputs):
    path = write(teacher, tmp_path/'sv3d')
    again = open_teacher(path)
    assert type(again) is SV3D and again.fingerprint() == teacher.fingerprint() and again.cfg == TOY
    assert inspect(path)['kind'] == 'sv3d'
    conf = path/'unet'/'config.json'
    conf.write_text(json.dumps({k: v for k, v in SAID.items() if k != 'num_attention_heads'}))
    with pytest.raises(UserError, match='num_attention_heads'): open_teacher(path)
    conf.write_text(json.dumps(SAID))
    f = path/'unet'/'model.safetensors'
    state = load_file(f)
    save_file({k: v for k, v in state.items() if k != 'conv_out.bias'}, f)
    with pytest.raises(UserError, match='unet.conv_out.bias: missing'): open_teacher(path)
    save_file(dict(state, **{'conv_out.bias': torch.full((4,), float('inf'))}), f)
    with pytest.raises(UserError, match='conv_out.bias has NaN or infinite'): open_teacher(path)


def rolled(capsys, *args):
    try: R.main([*map(str, args)]); code = 0
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    return code, out.out, [l for l in out.err.splitlines() if l.startswith('dd3g: ')]


@pytest.fixture
def pics(tmp_path):
    (tmp_path/'pics').mkdir()
    for i in range(3):
        x = np.zeros((40, 40, 4), np.uint8); x[8:30, 10:32] = [60*i, 120, 200-60*i, 255]
        Image.fromarray(x).save(tmp_path/'pics'/f'{i}.png')
    return tmp_path/'pics'


def test_sv3d_by_the_program(teacher, tmp_path, capsys, pics):
    "Opened by its kind in a process that never named its module; C fixed but for its elevation; N with one frame more; verified, seen, refused."
    path, out = write(teacher, tmp_path/'sv3d'), tmp_path/'quads'
    args = ['--teacher', path, '--pictures', pics, '--out', out, '--diffusion.sample-steps', 2, '--count', 3]
    assert rolled(capsys, *args)[:2] == (0, f'{out}: 3 quadruples made, 0 were there\n')
    assert rolled(capsys, *args)[:2] == (0, f'{out}: 0 quadruples made, 3 were there\n')
    data = R.Quadruples(out)
    b, q = data.fetch(range(3), 'cpu'), data.get(0)['record']
    assert b['oi'].shape == (3, 5, 3, 16, 16) and data.noise_shape == (6, 4, 8, 8) and b['background'].eq(1).all() and b['offset'].eq(90+72).all()
    torch.testing.assert_close(view_cameras(teacher.config.view, b['offset'], b['elevation']).c2w, teacher.cameras(torch.zeros(3), b['elevation']).c2w, rtol=0, atol=1e-5)
    direct = orbit_rollout(teacher, b['image'][:1], b['noise'][:1, :5], teacher.cameras(torch.zeros(1), b['elevation'][:1]), steps=2)
    assert (R.to_bytes(teacher.decode(direct))/255.-b['oi'][:1]).abs().max() <= 1.5/255
    code, said, _ = rolled(capsys, 'verify', *args[:-2], '--verify', 3)
    assert code == 0 and '3 equal byte for byte' in said
    assert rolled(capsys, 'stats', '--out', out)[0] == 0 and (out/'sheet.jpg').stat().st_size > 500
    for more, why in [(['--view.size', 48], 'view.size cannot be chosen'), (['--prompt', 'a duck'], 'knows no words'), (['--compile'], 'leave --compile away'), (['--diffusion.sample-steps', 3], 'steps was 2, is 3')]:
        code, said, err = rolled(capsys, *args, *more)
        assert (code, said) == (2, '') and why in err[-1]


def test_mvdream_by_the_program(tmp_path, capsys, pics):
    path, out, lines = Parts(ip=False).folder(tmp_path/'mvdream'), tmp_path/'quads', tmp_path/'prompts.txt'
    lines.write_text('a duck\n\n  a teapot \n')
    args = ['--teacher', path, '--out', out, '--diffusion.sample-steps', 2, '--rollout-batch', 2, '--shard', 2, '--store', 'latents']
    assert rolled(capsys, *args, '--prompts', lines, '--count', 5)[:2] == (0, f'{out}: 5 quadruples made, 0 were there\n')
    data = R.Quadruples(out, decode=R.Teacher.from_pretrained(path).decode)
    recs, b = [data.get(i)['record'] for i in range(5)], data.fetch(range(5), 'cpu')
    assert [r['picture']['prompt'] for r in recs] == ['a duck', 'a teapot', 'a duck', 'a teapot', 'a duck'] and [r['k'] for r in recs] == [0, 0, 1, 1, 2]
    assert data.names[:2] == ['a duck', 'a teapot'] and b['offset'].eq(0).all()
    assert (b['image']-b['oi'][:, 1]).abs().max() < .02 and not torch.equal(b['oi'][0], b['oi'][2]) # II is the second view; another N, another duck
    code, said, _ = rolled(capsys, 'verify', *args, '--prompts', lines, '--verify', 5)
    assert code == 0 and '5 equal byte for byte' in said
    one = tmp_path/'one'
    assert rolled(capsys, *args, '--prompt', 'a duck', '--count', 1, '--out', one)[0] == 0
    assert torch.equal(R.Quadruples(one).get(0)['z'], data.get(0)['z']) # a sample does not know the prompts beside it
    empty = tmp_path/'empty.txt'; empty.write_text(' \n')
    for more, why in [(['--pictures', pics], 'reads words, not pictures'), (['--prompts', tmp_path/'none.txt'], 'cannot be read'), (['--prompts', empty], 'holds no prompts'),
                      (['--prompt', 'a', '--prompts', lines], 'give one of them'), ([], '--pictures is missing'), (['--prompt', 'a cat'], 'pictures was')]:
        code, said, err = rolled(capsys, *args, *more)
        assert (code, said) == (2, '') and why in err[-1], err


def test_words_for_imagedream(tmp_path, capsys, pics):
    "A prompt beside pictures is said of all of them; without pictures it is refused."
    path = Parts().folder(tmp_path/'imagedream')
    c = R.Teacher.from_pretrained(path).cfg
    flags = ['--teacher', path, '--diffusion.sample-steps', 1, '--rollout-batch', 1, '--count', 1, '--scale', 'paper', *[f'--view.size={c.view.size}', '--ae.channels', 32, 32, '--ae.layers', c.ae.layers, '--ae.groups', c.ae.groups]]
    t, e = c.teacher, c.teacher.encoder
    for k in ('channels', 'res_blocks', 'head_dim', 'depth', 'groups', 'context_dim', 'text_tokens', 'camera_dim', 'image_tokens', 'resampler_depth', 'resampler_heads', 'resampler_head_dim'): flags += [f'--teacher.{k.replace("_", "-")}', getattr(t, k)]
    for k in ('size', 'patch', 'width', 'depth', 'heads'): flags += [f'--teacher.encoder.{k}', getattr(e, k)]
    flags += ['--teacher.mult', *t.mult, '--teacher.attention', *t.attention, '--teacher.encoder.kind', 'clip']
    said = {w: rolled(capsys, *flags, '--pictures', pics, '--out', tmp_path/f'w{i}', *w) for i, w in enumerate([(), ('--prompt', 'a red duck')])}
    assert all(x[0] == 0 for x in said.values()), said
    a, b = (R.Quadruples(tmp_path/f'w{i}') for i in (0, 1))
    assert a.settings['teacher'] != b.settings['teacher'] and not torch.equal(a.get(0)['oi'], b.get(0)['oi'])
    assert 'reads pictures; give --pictures' in rolled(capsys, *flags, '--out', tmp_path/'no', '--prompt', 'a duck')[2][0]


def test_training_with_a_published_teacher(tmp_path, capsys, teacher):
    "Its folder is enough: it lends its encoder and verifies; SV3D only rolls out."
    path, tiny = Parts().folder(tmp_path/'imagedream'), SCALES['tiny']
    t = R.Teacher.from_pretrained(path)
    c = replace(tiny, ae=t.cfg.ae, diffusion=replace(t.cfg.diffusion, sample_steps=1), rollout_batch=2)
    R.write_quadruples(R.Roller(t, c), R.TensorPictures(torch.rand(2, 4, 32, 32)), 2, tmp_path/'quads', quiet=True)
    flags = ('--ae.channels 32 32 --ae.layers 1 --ae.groups 32 --diffusion.prediction epsilon --pairs 0 --fit.steps 2 --fit.batch 1 --loss.sds-every 1 --student.gaussians-per-token 2 '
             f'--student.pd-blocks 5 --quads {tmp_path}/quads --out {tmp_path}/run').split()
    G = train([*flags, '--teacher', str(path)])
    assert (tmp_path/'run'/'student.safetensors').exists() and all(torch.equal(v, t.ae.state_dict()[k]) for k, v in G.latent_encoder.state_dict().items())
    for other, why in [(write(teacher, tmp_path/'sv3d'), 'holds SV3D, which rolls out but does not verify'), (tmp_path/'nowhere', 'no such file')]:
        with pytest.raises(SystemExit): train([*flags, '--teacher', str(other), '--out', str(tmp_path/'no')])
        assert why in capsys.readouterr().err


def test_temporal_decoder(tmp_path):
    "Stable Video Diffusion's decoder: recognised by its tensors, all frames of an orbit together, orbits apart."
    torch.manual_seed(0)
    t = SV3D(replace(TOY, temporal=True)).eval().requires_grad_(False)
    with torch.no_grad():
        for p in t.ae.parameters(): p += .02*torch.randn_like(p)
    again = open_teacher(write(t, tmp_path/'svd'))
    assert again.cfg.temporal and again.fingerprint() == t.fingerprint()
    z = seeded_randn([0, 1], 5, 4, 8, 8)
    x = t.decode(z)
    assert x.shape == (2, 5, 3, 16, 16) and torch.allclose(t.decode(z[1]), x[1], atol=1e-5) and not torch.allclose(t.decode(z[:, :4]), x[:, :4], atol=1e-5)
    assert t.encode(x).shape == z.shape


def test_published_size():
    with torch.device('meta'): big = SV3D()
    assert big.unet.add_embedding.linear_1.weight.shape == (1280, 1280) and big.noise_shape == (21, 4, 72, 72) and big.n_views == 21


@pytest.mark.cuda
def test_cuda_agrees_with_cpu(teacher, inputs):
    image, noise, cams = inputs
    on = SV3D(TOY).to('cuda').eval().requires_grad_(False)
    on.load_state_dict(teacher.state_dict())
    t = torch.tensor([500, 20])
    a, b = teacher.denoise(noise, t, teacher.encode_condition(image), cams), on.denoise(noise.to('cuda'), t.to('cuda'), on.encode_condition(image.to('cuda')), cams.to('cuda'))
    teacher.schedule.to('cpu')
    torch.testing.assert_close(b.cpu(), a, rtol=1e-2, atol=1e-2)
    z = orbit_rollout(on, image.to('cuda'), noise.to('cuda'), steps=2)
    assert z.device.type == 'cuda' and z.isfinite().all()
