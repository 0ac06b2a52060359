"The student: counted without weights, soft before training, the same in half precision, neighbours looked up once."
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dd3g.cameras import four_views, ring, view_cameras
from dd3g.config import OLDER, SCALES, Config, EncoderConfig, StudentConfig, check, from_dict, to_json
from dd3g.core import UserError, seeded_randn
from dd3g.decoding import ProgressiveDecoding, spread
from dd3g.layers import Near, PointBlock, VectorAttention, compile_blocks, neighbours
from dd3g.pattern import PICTURE, GaussianLookup, Sight, TokenLookup, color_logit, look_up, noise_and_cameras, project
from dd3g.pepd import PEPD, count_flops, in_bf16, main, summary
from dd3g.render import render
from dd3g.teacher import ImageEncoder

TINY = SCALES['tiny']

def inputs(cfg, n=2):
    return torch.rand(n, 3, *[cfg.view.size]*2, generator=torch.Generator().manual_seed(0)), seeded_randn(range(n), *cfg.noise_shape), four_views(torch.linspace(0, 45, n), torch.zeros(n))

def student(cfg=TINY, **fields): return replace(cfg, student=replace(cfg.student, **fields))

def shaken(cfg=TINY, seed=0):
    torch.manual_seed(seed)
    net = PEPD(cfg).eval()
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=.05)
    return net.requires_grad_(False)

@pytest.mark.parametrize('scale, tokens, gaussians', [('tiny', 67, 1608), ('mini', 307, 7982), ('small', 307, 19648), ('paper', 307, 157_184)])
def test_counts(scale, tokens, gaussians):
    s = summary(SCALES[scale])
    assert (s['tokens'], s['gaussians']) == (tokens, gaussians)
    assert sum(p['parameters'] for p in s['parts']) == s['parameters'] and sum(p['flops'] for p in s['parts']) == s['flops']
    assert all(p['flops'] > 0 for p in s['parts'] if p['part'] != 'the rest')

def test_flops_by_hand():
    "A network of known cost, and the feed-forward layers of the paper's decoder."
    with torch.device('meta'): assert count_flops(nn.Conv2d(2, 3, 3, padding=1), torch.zeros(1, 2, 5, 5))[1][''] == 2*9*2*3*25
    c = SCALES['paper'].student
    ff = next(p for p in summary(SCALES['paper'])['parts'] if p['part'] == 'PD: feed-forward')
    assert ff['flops'] == c.pd_blocks*2*2*(2*c.width**2)*c.tokens

def test_summary_program(capsys):
    main(['summary', '--scale', 'paper', '--json'])
    s = json.loads(capsys.readouterr().out)
    assert s['scale'] == 'paper' and s['gaussians'] == 157_184 and s['parameters'] > 5e8 and s['flops'] > 1e12
    main(['summary', '--scale', 'tiny'])
    assert '1,608 Gaussians' in capsys.readouterr().out

@pytest.mark.parametrize('scale', ['tiny', 'mini', 'paper'])
def test_untrained_body_is_soft_centred_and_grey(scale):
    c = replace(SCALES[scale].student, lookup='none', lookup_picture=False)
    torch.manual_seed(1)
    with torch.no_grad(): g = ProgressiveDecoding(replace(c, pd_blocks=5))(torch.randn(1, c.tokens, c.width))[0] # new blocks are the identity: their number changes nothing
    v, at = render(g, ring(4), 64, 1.), torch.linspace(-1, 1, 64)
    a = v.alpha[:, 0]
    assert .4 < a.amax((1, 2)).min() and a[:, 0, 0].max() < .35                   # neither nothing nor a wall
    assert .3 < a[:, 16:48, 24:40].mean() < .97                                   # one sees it, and through it
    off = torch.stack([(a*at).sum((1, 2)), (a*at[:, None]).sum((1, 2))])/a.sum((1, 2))
    assert off.abs().max() < .08
    assert .2 < g.color.min() and g.color.max() < .8 and g.color.std() < .1
    assert v.rgb.diff(dim=-1).abs().mean() < .04                                  # not noise, in which neighbouring pixels differ by a third

def test_gaussians_of_a_token_start_apart():
    d = torch.cdist(spread(512), spread(512))+9*torch.eye(512)
    assert d.min() > .01 and spread(512).norm(dim=-1).max() < .71

def test_half_precision_keeps_positions():
    net = shaken()
    half = in_bf16(net)
    kept = {n for n, t in [*half.named_parameters(), *half.named_buffers()] if t.dtype == torch.float32}
    assert kept == {'pd.anchor', 'pd.spread', 'encoder.mean', 'encoder.std'} and next(net.parameters()).dtype == torch.float32
    a, b = net(*inputs(TINY)), half(*inputs(TINY))
    assert all(x.dtype == torch.float32 for x in b.tensors) and (a.mu-b.mu).abs().max() < .02
    assert not torch.equal(a.mu, b.mu) # or nothing was halved

def test_autocast_and_float32_agree():
    net, x = shaken(), inputs(TINY)
    with torch.autocast('cpu', torch.bfloat16): b = net(*x)
    assert b.mu.dtype == torch.float32 and (net(*x).mu-b.mu).abs().max() < .02

def test_shared_positions_are_everyones():
    torch.manual_seed(0)
    va, x, pos = VectorAttention(16, 4), torch.randn(3, 9, 16), torch.randn(1, 9, 3)
    same = pos.expand(3, -1, -1).contiguous()
    assert torch.allclose(va(x, pos), va(x, same), atol=1e-5)
    near = neighbours(same, 4)
    assert isinstance(near, Near) and torch.equal(va(x, near), va(x, same))
    assert near.idx.shape == (3, 9, 4) and (near.off[:, :, 0] == 0).all()

def test_gradients_reach_shared_anchors():
    "One anchor for a whole batch gets the sum of what each object asks of it."
    torch.manual_seed(0)
    va, x = VectorAttention(16, 4), torch.randn(3, 9, 16)
    pos = torch.randn(1, 9, 3, requires_grad=True)
    one, = torch.autograd.grad(va(x, pos).square().sum(), pos)
    many, = torch.autograd.grad(va(x, pos.expand(3, -1, -1)).square().sum(), pos)
    assert torch.allclose(one, many, atol=1e-4) and one.abs().sum() > 0

def test_compiled_blocks_are_the_same_network():
    net = shaken(replace(TINY, student=replace(TINY.student, pd_blocks=5)))
    want, names = net(*inputs(TINY)), list(net.state_dict())
    blocks = compile_blocks(net, backend='eager')
    assert sum(isinstance(b, PointBlock) for b in blocks) == 5 and list(net.state_dict()) == names
    assert torch.allclose(net(*inputs(TINY)).mu, want.mu, atol=1e-5)

def test_published_encoders_are_frozen_and_found_or_named(tmp_path):
    cfg = replace(TINY, student=replace(TINY.student, encoder=EncoderConfig('dinov2', 28, 14, 48, 2, 3)))
    net = PEPD(cfg)
    assert not any(p.requires_grad for p in net.encoder.parameters()) and any(p.requires_grad for p in net.pd.parameters())
    net.encoder.net.save_pretrained(tmp_path/'dino')
    again = PEPD(cfg, tmp_path/'dino')
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(net.encoder.eval()(x), again.encoder.eval()(x), atol=1e-6)
    with pytest.raises(UserError, match='no weights of a Dinov2Model'): ImageEncoder(cfg.student.encoder, tmp_path/'nothing')

def test_projection_by_hand():
    "The input camera stands at (1.5, 0, 0): +y is right, +z is up, +x is nearer; the camera behind sees +y on the left."
    tan = torch.tensor(49.1/2).deg2rad().tan()
    uv, height = project(torch.tensor([[[0., .3, .2], [.5, .3, .2], [0., 0, 0]]]), four_views(torch.zeros(1)))
    assert torch.allclose(uv[0, 1], torch.tensor([[.2, -.2/1.5], [.3, -.2], [0., 0]])/tan, atol=1e-5)
    assert torch.allclose(uv[0, 3, 1], torch.tensor([-.15, -.1])/tan, atol=1e-5)
    assert torch.allclose(uv[0, 0, 0], torch.tensor([0., -.2/1.8])/tan, atol=1e-5)            # azimuth 0 at (0, -1.5, 0): +y is further away, +x to the right
    assert torch.allclose(height[0, :, 1], torch.tensor([-.3, .5, .3, -.5]), atol=1e-5)

def test_projection_is_the_renderers():
    "A small Gaussian is drawn at the pixel where `project` says that it is seen, at any C."
    from dd3g.gaussians import Gaussians
    at, cams = torch.tensor([[.21, -.33, .18]]), four_views(torch.tensor([30.]), torch.tensor([5.]))
    g = Gaussians(at, torch.full((1, 3), .01), torch.tensor([[1., 0, 0, 0]]), torch.ones(1, 3), torch.ones(1))
    a = render(g, cams[0], 64, 0.).alpha[:, 0]
    x = torch.arange(64)+.5
    drawn = torch.stack([(a*x).sum((1, 2)), (a*x[:, None]).sum((1, 2))], -1)/a.sum((1, 2))[:, None]
    assert torch.allclose(drawn, (project(at[None], cams)[0][0, :, 0]+1)*32, atol=.1)

def test_reading_is_bilinear_and_empty_outside():
    maps = torch.arange(16.).view(1, 1, 1, 4, 4).expand(1, 4, 1, 4, 4)
    tan = torch.tensor(49.1/2).deg2rad().tan()
    y = lambda u: [0., (u*1.5*tan).item(), 0.] # is seen at u by the input camera
    got = look_up(torch.tensor([[y(-.75), y(-.5), y(0.), y(3.)]]), Sight(maps, four_views(torch.zeros(1)))).view(4, 4, 2)[:, 1, 0]
    assert torch.allclose(got, torch.tensor([6., 6.5, 7.5, 0.]), atol=1e-4) # between rows 1 and 2: column 0 is 4 and 8

def test_turning_the_cameras_turns_what_is_read():
    maps, at = torch.randn(1, 4, 20, 8, 8), torch.rand(1, 50, 3)-.5
    c, s = torch.tensor(40.).deg2rad().cos(), torch.tensor(40.).deg2rad().sin()
    R = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    one, other = (Sight(maps, four_views(torch.tensor([a]))) for a in (0., 40.))
    assert (look_up(at, one)-look_up(at, other)).abs().mean() > .1
    assert torch.allclose(look_up(at, one), look_up(at@R.T, other), atol=1e-4) # who turns along reads the same

def test_positions_are_read_in_float32():
    "Under autocast a place may not move: bf16 cannot tell 1.5 from 1.496."
    maps, at, cams = torch.randn(1, 4, 20, 32, 32), torch.rand(1, 500, 3)-.5, four_views(torch.tensor([10.]))
    want = look_up(at, Sight(maps, cams))
    with torch.autocast('cpu', torch.bfloat16): got = look_up(at, Sight(maps, cams))
    assert got.dtype == torch.float32 and torch.equal(got, want)

@pytest.mark.parametrize('lookup, part', [('tokens', TokenLookup), ('gaussians', GaussianLookup)])
def test_gradients_reach_the_lookup(lookup, part):
    net = shaken(student(lookup=lookup)).requires_grad_().train()
    net(*inputs(TINY)).color.square().sum().backward()
    new = [p for m in net.modules() if isinstance(m, part) for p in m.parameters()]
    assert new and all(p.grad is not None and p.grad.abs().sum() > 0 for p in new)

def test_through_the_lookup_alone_noise_is_heard():
    "Pattern tokens silenced: what N still changes went through the maps, and gradients of that reach Pattern Extraction."
    net = shaken(student(lookup='gaussians'))
    net.pe.tokens = lambda maps: torch.zeros(len(maps), 50, TINY.student.width)
    image, noise, cams = inputs(TINY)
    assert not torch.equal(net(image, noise, cams).color, net(image, -noise, cams).color)
    net.requires_grad_()(image, noise, cams).color.sum().backward()
    assert net.pe.conv_in.weight.grad.abs().sum() > 0
    fifth = noise.clone(); fifth[:, -1] += 1 # the picture's frame has no camera
    assert torch.equal(net(image, noise, cams).color, net(image, fifth, cams).color)

def test_without_lookup_nothing_changed():
    "Eq. 2 written out: tokens of picture and pattern, one after the other, are all that decoding gets; and a lookup changes no other weight of equal seed."
    net, (image, noise, cams) = shaken(), inputs(TINY)
    tokens, nc = net.image_tokens(image), noise_and_cameras(noise, cams, net.latent_encoder(image))
    by_hand = net.pd(torch.cat([tokens, net.pe(nc, tokens)], 1))
    assert all(torch.equal(a, b) for a, b in zip(net(image, noise, cams).tensors, by_hand.tensors))
    assert not [k for k in net.state_dict() if 'at_' in k]
    for lookup in ('tokens', 'gaussians'):
        torch.manual_seed(0); plain = PEPD(TINY).state_dict()
        torch.manual_seed(0); other = PEPD(student(lookup=lookup)).state_dict()
        assert len(other) > len(plain) and all(torch.equal(v, other[k]) for k, v in plain.items())

def test_older_files_mean_no_lookup():
    d = json.loads(to_json(SCALES['mini']))
    assert d['student']['lookup'] == 'gaussians' and {'lookup', 'lookup_hidden', 'lookup_picture', 'picture'} <= set(OLDER[StudentConfig])
    for k in ('lookup', 'lookup_hidden', 'lookup_picture', 'picture'): del d['student'][k]
    old = from_dict(Config, d)
    assert old.student.lookup == 'none' and 'lookup' not in [p['part'] for p in summary(old)['parts']]

def test_lookup_is_counted():
    c = SCALES['mini']; c = replace(c, student=replace(c.student, lookup_picture=False))
    row = next(p for p in summary(c)['parts'] if p['part'] == 'lookup')
    s = SCALES['mini'].student
    assert row['parameters'] == (21*4+3)*s.lookup_hidden+s.lookup_hidden + s.width*s.lookup_hidden + 7*s.lookup_hidden+7
    assert row['flops'] == 2*s.lookup_hidden*(s.gaussians*(21*4+3+7)+s.tokens*s.width)

@pytest.mark.parametrize('lookup', ['tokens', 'gaussians'])
def test_lookup_in_half_precision_and_autocast(lookup):
    net, x = shaken(student(lookup=lookup)), inputs(TINY)
    want, half = net(*x), in_bf16(net)(*x)
    with torch.autocast('cpu', torch.bfloat16): auto = net(*x)
    for g in (half, auto): assert g.mu.dtype == torch.float32 and (g.mu-want.mu).abs().max() < .03 and (g.color-want.color).abs().max() < .05

def test_lookup_needs_maps():
    with pytest.raises(UserError, match='give --student.lookup none'): check(student(pattern='constant', lookup='gaussians'))
    check(student(pattern='shuffled', lookup='gaussians'))
    with pytest.raises(UserError, match='student.lookup'): check(student(lookup='pixels'))

def test_noise_is_shuffled_in_training_only():
    net, (image, noise, cams) = shaken(student(pattern='shuffled')), inputs(TINY, 3)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors))
    assert same(net(image, noise, cams), shaken()(image, noise, cams)) # the weights of `pe`, and in use its Gaussians
    assert same(net.train()(image, noise, cams), net.eval()(image, noise[[2, 0, 1]], cams))
    assert not same(net.train()(image, noise, cams), net.eval()(image, noise, cams))

def looker():
    "A shaken tiny student that looks at the picture, and its inputs."
    net, x = shaken(student(lookup='gaussians', lookup_picture=True)).eval(), inputs(TINY)
    return net, x

def test_a_pixel_is_read_in_its_line_of_sight():
    "White but for one dot: those Gaussians change colour more than a token's worth that the picture's camera sees at the dot."
    net, (_, N, C) = looker()
    sight = lambda p: Sight(torch.zeros(1, 4, 20, 8, 8), C[:1], torch.cat([p, torch.zeros(1, PICTURE, 32, 32)], 1), net.eye(C[:1]))
    mu, h, pic = torch.rand(1, 4, 500, 3)*.8-.4, torch.randn(1, 4, TINY.student.width), torch.ones(1, 3, 32, 32)
    dot = pic.clone(); dot[..., 10, 20] = 0.
    with torch.no_grad(): a, b = (net.pd.at_gaussians(mu, h, sight(p))[1] for p in (pic, dot))
    uv, _ = project(mu.flatten(1, 2), net.eye(C[:1]))
    off = ((uv[0, 0]+1)*16-torch.tensor([20.5, 10.5])).abs().amax(-1)
    change = (a-b).norm(dim=-1).flatten()
    assert (change[off > 1] == 0).all() and (change[off < .8] > 0).all() and (off < .8).any()

def test_the_pictures_eye_does_not_follow_the_cameras():
    net, _ = looker()
    e = net.eye(view_cameras(TINY.view, torch.tensor([0., 135.]), torch.tensor([4., -3.])))
    assert torch.allclose(e.azimuth, torch.full((2, 1), 90.), atol=1e-3) and torch.allclose(e.elevation, torch.tensor([[4.], [-3.]]), atol=1e-3)

def test_looking_at_the_picture_trains_and_is_refused_without_a_lookup():
    net, x = looker()
    g = net.requires_grad_().train()(*x)
    (g.color.square().sum()+g.mu.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*net.skin.parameters(), *net.pd.at_gaussians.parameters()])
    with pytest.raises(UserError, match='lookup_picture'): check(student(lookup='none', lookup_picture=True))
    row = [next(p for p in summary(student(lookup='gaussians', lookup_picture=k))['parts'] if p['part'] == 'lookup')['parameters'] for k in (False, True)]
    c = TINY.student
    assert row[1]-row[0] == (4+PICTURE)*c.lookup_hidden + 4*(c.lookup_hidden+1) + 3*9*PICTURE+PICTURE + PICTURE*9*PICTURE+PICTURE

def test_color_logit_is_the_sigmoids_inverse():
    x = torch.rand(100)*.98+.01
    assert torch.allclose(color_logit(x).sigmoid(), x, atol=1e-6) and color_logit(torch.tensor([0., 1.])).isfinite().all()
