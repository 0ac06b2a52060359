"Per-object fitting: the hull, batches, pictures without alpha, ceilings, the program."
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dd3g.cameras import Cameras, ring
from dd3g.config import SCALES
from dd3g.evaluate import judge
from dd3g.gaussians import Gaussians
from dd3g.lift import LiftConfig, guess_cover, hull, lift, main, of_lifted_teacher, of_true_views, read_at
from dd3g.metrics import psnr
from dd3g.render import render
from dd3g.testsets import Case, Protocol

QUICK = LiftConfig(gaussians=200, steps=30, grid=20)

def ball(center=(.1, 0., -.05), r=.25, color=(.8, .3, .2), n=300):
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    return Gaussians(d*r+torch.tensor(center), torch.full((n, 3), .04), torch.tensor([1., 0, 0, 0]).repeat(n, 1), torch.tensor(color).repeat(n, 1), torch.full((n,), .95))

def views(g, cams, size=24): r = render(g, cams, size, 1.); return r.rgb.clamp(0, 1), r.alpha

def test_read_at_finds_a_point():
    cams, x = ring(4, 10.), torch.tensor([[.2, -.1, .15]])
    dot = Gaussians(x, torch.full((1, 3), .03), torch.tensor([[1., 0, 0, 0]]), torch.ones(1, 3), torch.tensor([.99]))
    a = render(dot, cams, 48).alpha
    seen = read_at(a[None], Cameras(cams.c2w[None], cams.fov), torch.cat([x, -x]))[0, :, :, 0]
    assert seen[:, 0].min() > .4 and seen[:, 1].max() < .05

def test_hull_holds_the_object_and_little_else():
    g, cams = ball(), ring(6)
    x, w = hull(views(g, cams)[1][None], Cameras(cams.c2w[None], cams.fov), LiftConfig(grid=24))
    near = (x-torch.tensor([.1, 0, -.05])).norm(dim=1)
    assert w[0][(near > .22) & (near < .27)].mean() > .4 and w[0][near > .42].max() < .1 and w[0][near < .1].max() <= .05+1e-6

def test_fit_is_right_between_the_views_and_batches_are_fitted_alike():
    cams = ring(4, 5.); both = [views(ball(color=c), cams) for c in ((.8, .3, .2), (.2, .4, .9))]
    rgb, alpha = (torch.stack(x) for x in zip(*both)); cc = Cameras(cams.c2w.repeat(2, 1, 1, 1), cams.fov)
    g = lift(rgb, cc, alpha, QUICK)
    other = ring(4, 5., start=45.)
    for k, c in enumerate(((.8, .3, .2), (.2, .4, .9))):
        assert psnr(render(g[k], other, 24).rgb.clamp(0, 1), views(ball(color=c), other)[0]).min() > 21
    a, b, c = (lift(rgb, cc, alpha, replace(QUICK, steps=2), seed=s) for s in (0, 0, 1))
    assert torch.equal(a.mu, b.mu) and torch.equal(a.color, b.color) and not torch.equal(a.mu, c.mu)

def test_no_alpha_no_white_fog():
    "A white stripe belongs to the object; the background does not become Gaussians."
    cams = ring(4); g = ball(); g.color[(g.mu[:, 2]+.05).abs() < .05] = .99
    rgb, alpha = views(g, cams, 32)
    m, sure = guess_cover(rgb)
    assert ((m != (alpha > .5)) & (sure > 0)).float().mean() < .01 and 0 < (sure == 0).float().mean() < .4
    f = lift(rgb[None], Cameras(cams.c2w[None], cams.fov), None, QUICK)[0]
    got = views(f, ring(4, start=45.), 32)
    assert psnr(got[0], views(g, ring(4, start=45.), 32)[0]).min() > 18
    assert render(f, cams, 32, 0.).rgb[alpha.expand(-1, 3, -1, -1) < .01].mean() < .05 # on black, nothing shines beside it

def test_true_views_are_a_ceiling():
    p, cams = Protocol(size=24, input_size=24, views=6), ring(6)
    cases = []
    for c in ((.8, .3, .2), (.2, .4, .9)):
        rgb, a = views(ball(color=c), cams); x = torch.cat([((rgb-1)/a.clamp_min(1e-3)+1).clamp(0, 1), a], 1)
        cases.append(Case(str(c), x[0], cams.views([0]), cams, (x*255).round().byte(), True))
    cases.append(replace(cases[0], name='unknown', truth=None))
    who = of_true_views(QUICK); who.prepare(cases)
    assert who.answer(cases[2]) is None
    for c in cases[:2]: assert judge(who.answer(c), c, p)[0]['unaligned']['psnr'] > 23
    assert who.about['gaussians'] == 200

def test_thin_legs_are_judged_as_they_were_fitted():
    "A blurred stool's legs are haze, so its box is too low and the rule for size would spoil it; it stands where it was fitted and is left there."
    y, x = torch.meshgrid(*[torch.linspace(-.3, .3, 25)]*2, indexing='ij'); z = torch.linspace(-.35, .15, 40)
    mu = torch.cat([torch.stack([x, y, 0*x+.2], -1).flatten(0, 1), *(torch.stack([0*z+i, 0*z+j, z], 1) for i in (-.25, .25) for j in (-.25, .25))])
    n, S = len(mu), 32; thick = torch.cat([torch.full((625, 3), .03), torch.full((160, 3), .009)])
    stool = Gaussians(mu, thick, torch.tensor([1., 0, 0, 0]).repeat(n, 1), torch.tensor([.3, .2, .6]).repeat(n, 1), torch.full((n,), .9))
    cams = ring(6, 5.); rgb, a = views(stool, cams, S); x = torch.cat([((rgb-1)/a.clamp_min(1e-3)+1).clamp(0, 1), a], 1)
    case, p = Case('stool', x[0], cams.views([0]), cams, (x*255).round().byte(), True), Protocol(size=S, input_size=S, views=6)
    who = of_true_views(replace(QUICK, steps=15)); who.prepare([case])
    got = {k: judge([replace(f, placed=f.placed and k) for f in who.answer(case)], case, p)[0]['unaligned']['psnr'] for k in (True, False)}
    assert got[True] > got[False]+1 and who.answer(case)[0].placed, got
    same = lift(case.white()[None], Cameras(cams.c2w[None], cams.fov), a[None], replace(QUICK, steps=15))[0]
    assert got[True] == pytest.approx(psnr(render(same, cams, S).rgb.clamp(0, 1), case.white()).mean().item(), abs=.05)

def test_a_teachers_views_are_lifted_in_the_inputs_frame():
    from dd3g.teacher import Teacher
    torch.manual_seed(0); T = Teacher(SCALES['tiny']).eval()
    cams = ring(4, 3.); rgb, a = views(ball(), cams, 32); x = torch.cat([rgb, a], 1)
    case = Case('ball', x[0], cams.views([0]), cams, (x*255).round().byte(), True)
    got = of_lifted_teacher(T, replace(QUICK, steps=3), samples=2, steps=2).answer(case)
    assert len(got) == 2 and got[0].g.n == 200 and got[0].g.mu.isfinite().all() and not torch.equal(got[0].g.mu, got[1].g.mu)

def test_program(tmp_path, capsys):
    rgb, alpha = views(ball(), ring(4), 32); rgba = torch.cat([rgb, alpha], 1)
    for name, x in (('ball', rgba), ('flat', rgb)):
        (tmp_path/'v'/name).mkdir(parents=True)
        for i, v in enumerate(x): Image.fromarray((v*255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path/'v'/name/f'{i:03d}.png')
    main(f'--views {tmp_path}/v --out {tmp_path}/o --steps 15 --gaussians 150'.split())
    assert Gaussians.load_ply(tmp_path/'o'/'ball.ply').n == 150 and (tmp_path/'o'/'flat.jpg').exists() and 'at its 4 views' in capsys.readouterr().out
    for wrong, why in (('', 'name either'), (f'--views {tmp_path}/v --teacher x', 'name either'), (f'--views {tmp_path}/none', 'no such folder'), (f'--views {tmp_path}/o', 'holds no 000.png'),
                       (f'--views {tmp_path}/v --azimuths 0 90 180', '3 given'), (f'--views {tmp_path}/v/flat --background 0', 'nothing in them'), (f'--views {tmp_path}/v --gaussians 0', 'at least 1')):
        with pytest.raises(SystemExit) as e: main([*wrong.split(), '--out', str(tmp_path/'x')])
        err = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and why in err[-1] and err[-1].startswith('dd3g: ')
