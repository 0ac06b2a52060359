"The rivals of Table II and the switch between backbones: shapes, gradients, precision, compilation, files older than the switch, the programs."
import hashlib, json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dd3g.backbones import BACKBONES, build_student, main, size_of, with_backbone
from dd3g.cameras import four_views, ring
from dd3g.config import OLDER, SCALES, Config, FitConfig, StudentConfig, check, config_hash, from_dict, to_json
from dd3g.core import PACKAGE, UserError, seeded_randn
from dd3g.generate import Generator, main as generate
from dd3g.loop import load_weights, save_weights
from dd3g.metrics import psnr
from dd3g.pepd import PEPD, in_bf16
from dd3g.render import render
from dd3g.splatter_image import input_camera, pixel_rays
from dd3g.tgs import project, read_planes, write_planes

TINY, RIVALS = SCALES['tiny'], ['splatter_image', 'tgs']
CFG = {k: with_backbone(TINY, k) for k in BACKBONES}

def inputs(n=2):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 32, 32, generator=g), seeded_randn(range(n), *TINY.noise_shape), four_views(45.*torch.arange(n), 0.)

def made(name, shake=0.):
    torch.manual_seed(0)
    net = build_student(CFG[name]).eval()
    if shake:
        for p in net.parameters(): nn.init.normal_(p, std=shake)
    return net

@pytest.mark.parametrize('name', RIVALS)
def test_untrained_is_a_soft_centred_body(name):
    with torch.no_grad(): g = made(name)(*inputs())
    assert g.batch == (2,) and g.n == CFG[name].student.gaussians
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in g.tensors)
    assert .3 < g.color.min() and g.color.max() < .7 and g.alpha.max() < .3
    a = render(g[0], ring(4), 32).alpha[:, 0]
    at = torch.linspace(-1, 1, 32)
    assert (a.amax((1, 2)) > .3).all()
    for axis in (at, at[:, None]): assert ((a*axis).sum((1, 2))/a.sum((1, 2))).abs().max() < .1

@pytest.mark.parametrize('name', RIVALS)
def test_deaf_to_noise_and_cameras_not_to_the_picture(name):
    net, (x, N, C) = made(name, .05), inputs()
    with torch.no_grad():
        g = net(x, N, C)
        assert torch.equal(g.mu, net(x).mu) and torch.equal(g.mu, net(x, -N, four_views(torch.tensor([7., 9.]), 5.)).mu)
        assert (g.mu-net(1-x, N, C).mu).abs().max() > 1e-4
        one = net(x[1:])                                                   # the other member of the batch has no say
    torch.testing.assert_close(one.mu[0], g.mu[1], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('name', RIVALS)
def test_gradients_reach_every_weight(name):
    net, (x, _, C) = made(name, .05), inputs()
    render(net(x), C, 32).rgb.square().mean().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []

@pytest.mark.parametrize('name', RIVALS)
def test_two_steps_teach_everything(name):
    "As made, without shaking: zero-initialised branches wake in the first step and pass gradients on in the second."
    net, (x, N, C) = made(name).train(), inputs()
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(3):
        loss = (render(net(x, N, C), C, 32).rgb-x[:, None]).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
    assert [k for k, p in net.named_parameters() if not p.grad.any()] == []

@pytest.mark.parametrize('name', RIVALS)
def test_half_precision_keeps_positions(name):
    net, (x, N, C) = made(name, .02), inputs()
    with torch.no_grad():
        g, h = net(x, N, C), in_bf16(net)(x, N, C)
        with torch.autocast('cpu', torch.bfloat16): a = net(x, N, C)
    for other in (h, a):
        assert all(t.dtype == torch.float32 for t in other.tensors)
        assert (other.mu-g.mu).norm(dim=-1).max() < .02
    half = in_bf16(net)
    tensors = dict([*half.named_parameters(), *half.named_buffers()])
    assert all(tensors[k].dtype == torch.float32 for k in net.exact) and sum(t.dtype == torch.bfloat16 for t in tensors.values()) > 10

@pytest.mark.parametrize('name', RIVALS)
def test_compiles_in_one_piece(name):
    net, (x, _, _) = made(name, .05), inputs()
    with torch.no_grad(): want = net(x)
    net.compile(backend='eager', fullgraph=True)
    with torch.no_grad(): got = net(x)
    torch.testing.assert_close(got.mu, want.mu, atol=1e-5, rtol=1e-5)

def test_pixels_and_points_agree_on_the_camera():
    o, rays = pixel_rays(TINY.view, 8)
    p = (o[:, None, None]+1.3*rays).flatten(1).T
    at = project(p[None], input_camera(TINY.view).w2c[0], 1/torch.tan(torch.deg2rad(torch.tensor(TINY.view.fov/2))).item())[0].view(8, 8, 2)
    k = (torch.arange(8)+.5)/4-1
    torch.testing.assert_close(at, torch.stack([k.expand(8, 8), k[:, None].expand(8, 8)], -1), atol=1e-5, rtol=0)
    a = render_dot(torch.tensor([[0., .3, .3]])) # the renderer's own camera sees it upper right
    assert a.argmax() // 32 < 16 and a.argmax() % 32 > 16

def render_dot(mu):
    from dd3g.gaussians import Gaussians
    return render(Gaussians(mu, torch.full((1, 3), .03), torch.tensor([[1., 0, 0, 0]]), torch.zeros(1, 3), torch.ones(1)), input_camera(TINY.view), 32).alpha[0, 0]

def test_planes_keep_axes_apart():
    p = torch.tensor([[[.125, -.375, .625]]])
    sheet = write_planes(p, torch.ones(1, 1, 1), 8)[0, ..., 0]
    assert [tuple(s.nonzero()[0].tolist()) for s in sheet] == [(4, 2), (4, 6), (2, 6)]
    torch.testing.assert_close(read_planes(write_planes(p, torch.tensor([[[2., -1.]]]), 8), p)[0, 0], torch.tensor([2., -1]*3))

def test_sizes():
    n = [size_of(with_backbone(SCALES['small'], b))['parameters'] for b in BACKBONES]
    assert max(n) <= 1.2e7 and max(n) < 1.7*min(n) # the other scales are in the notebook
    assert [with_backbone(SCALES['paper'], b).student.gaussians for b in BACKBONES] == [157_184, 16_384, 16_384]

def test_the_program_prints(capsys):
    main(['--json'])
    assert [r['backbone'] for r in json.loads(capsys.readouterr().out)] == list(BACKBONES)
    with pytest.raises(SystemExit): main(['--student.backbone', 'nerf'])

@pytest.mark.parametrize('change, word', [(dict(backbone='nerf'), 'student.backbone'), (dict(splatter_image=replace(TINY.student.splatter_image, groups=7)), 'splatter_image'),
    (dict(tgs=replace(TINY.student.tgs, heads=5)), 'tgs.heads'), (dict(tgs=replace(TINY.student.tgs, upsample=(0,))), 'upsample')])
def test_nonsense_is_refused(change, word):
    with pytest.raises(UserError, match=word): check(replace(TINY, student=replace(TINY.student, **change)))

# Files older than the switch

def test_older_files_mean_pepd():
    d = json.loads(to_json(TINY))
    without = lambda part, cls: {k: v for k, v in d[part].items() if k not in OLDER[cls]}
    old = {**d, 'student': without('student', StudentConfig), **{k: without(k, FitConfig) for k in ('fit', 'fit_ae', 'fit_teacher')}}
    cfg = from_dict(Config, old)
    assert cfg.student.backbone == 'pepd' and cfg.student.lookup == 'none'
    assert config_hash(cfg) == hashlib_of(old)                                   # the name its run had
    with pytest.raises(UserError, match='pd_blocks'): from_dict(Config, {**old, 'student': {k: v for k, v in old['student'].items() if k != 'pd_blocks'}})
    with pytest.raises(UserError, match='nonsense'): from_dict(Config, {**old, 'nonsense': 1})

def hashlib_of(d):
    from dd3g.core import sha
    return sha(json.dumps(d, indent=1))

def test_every_later_field_is_a_field(): # a misspelt entry would be an unknown field of every older file
    from dataclasses import fields
    for cls, later in OLDER.items(): assert set(later) <= {f.name for f in fields(cls)}

def test_a_rivals_name_depends_on_its_own_sizes_only():
    a = CFG['tgs']
    other = lambda cfg, name, **kw: replace(cfg, student=replace(cfg.student, **{name: replace(getattr(cfg.student, name), **kw)}))
    assert config_hash(a) == config_hash(other(a, 'splatter_image', channels=32)) != config_hash(other(a, 'tgs', points=64))
    assert len({config_hash(c) for c in CFG.values()}) == 3

def test_weights_before_the_switch_still_load(tmp_path):
    "The same weights under a configuration without the later fields: loaded, and equal bit for bit in what they generate."
    torch.manual_seed(0)
    plain = replace(TINY, student=replace(TINY.student, **OLDER[StudentConfig]))
    d = json.loads(to_json(plain))
    for k in OLDER[StudentConfig]: del d['student'][k]
    net = PEPD(plain); net(*inputs())
    save_weights(net, tmp_path/'old.safetensors', d, 'student'); save_weights(net, tmp_path/'new.safetensors', plain, 'student')
    assert 'backbone' not in load_weights(tmp_path/'old.safetensors', 'student')[1]['student']
    old, new = (Generator.from_pretrained(tmp_path/f'{k}.safetensors', 'cpu') for k in ('old', 'new'))
    x = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(old(x).tensors, new(x).tensors))

def test_the_shipped_checkpoint_loads():
    g = Generator.from_pretrained(PACKAGE/'weights'/'mini.safetensors', 'cpu')
    x = torch.zeros(4, g.cfg.view.size, g.cfg.view.size); x[:, 16:48, 16:48] = 1.
    assert g(x).n == g.cfg.student.gaussians and all(t.isfinite().all() for t in g(x).tensors)

# The programs

@pytest.mark.parametrize('name', RIVALS)
def test_a_rival_is_saved_loaded_and_drawn_with(name, tmp_path, capsys):
    net = made(name, .03)
    save_weights(net, tmp_path/'s.safetensors', CFG[name], 'student')
    gen = Generator.from_pretrained(tmp_path/'s.safetensors', 'cpu')
    assert type(gen.model) is BACKBONES[name]
    x = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): want = net((x[:3]*x[3:]+1-x[3:])[None])
    torch.testing.assert_close(gen(x).mu, want.mu[0])
    from PIL import Image
    Image.fromarray((x*255).byte().permute(1, 2, 0).numpy()).save(tmp_path/'p.png')
    generate([str(tmp_path/'p.png'), '--checkpoint', str(tmp_path/'s.safetensors'), '--out', str(tmp_path/'out')])
    assert list((tmp_path/'out').rglob('*.ply'))

@pytest.mark.parametrize('name', RIVALS)
def test_learns_one_picture(name):
    net, (x, N, C) = made(name).train(), inputs(1)
    yy, xx = torch.meshgrid(*[torch.linspace(-1, 1, 32)]*2, indexing='ij')
    x = torch.where((xx**2+yy**2)[None, None] < .3, torch.tensor([.8, .2, .1]).view(1, 3, 1, 1), 1.)
    C = four_views(90., 0.)
    C = type(C)(C.c2w.view(1, 4, 4, 4), C.fov)
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3, betas=(.9, .99))
    score = []
    for _ in range(8):
        views = render(net(x, N, C), C, 32).rgb[0]
        score.append(psnr(views, x.expand(4, -1, -1, -1)).mean().item())
        opt.zero_grad(); (views-x).square().mean().backward(); opt.step()
    assert score[-1] > score[0]+1, score
