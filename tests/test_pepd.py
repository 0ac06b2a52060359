"The student: counted without weights, soft before training, the same in half precision, neighbours looked up once."
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dd3g.cameras import four_views, ring
from dd3g.config import SCALES, EncoderConfig
from dd3g.core import UserError, seeded_randn
from dd3g.decoding import ProgressiveDecoding, spread
from dd3g.layers import Near, PointBlock, VectorAttention, compile_blocks, neighbours
from dd3g.pepd import PEPD, count_flops, in_bf16, main, summary
from dd3g.render import render
from dd3g.teacher import ImageEncoder

TINY = SCALES['tiny']

def inputs(cfg, n=2):
    return torch.rand(n, 3, *[cfg.view.size]*2, generator=torch.Generator().manual_seed(0)), seeded_randn(range(n), *cfg.noise_shape), four_views(torch.linspace(0, 45, n), torch.zeros(n))

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
    c = SCALES[scale].student
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
