"What is no lesson in 40_losses and 41_curriculum: precision, parts of a batch, frozen things."
from dataclasses import replace

import pytest
import torch

from dd3g.config import SCALES
from dd3g.curriculum import draw_t, step_weight
from dd3g.ddim import Schedule
from dd3g.losses import explicit, opacity, random_background, sds, sds_gradient, surrogate, verification_cameras
from dd3g.loop import step_generator
from dd3g.teacher import Teacher

CFG = SCALES['tiny']


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    return Teacher(CFG).eval().requires_grad_(False)


def pictures(n=2): return torch.rand(n, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(True)


def verify(teacher, pics, gen=None, **loss):
    cams = verification_cameras(len(pics), CFG.view, step_generator(0, 0))
    return sds(pics, cams, pics[:, 1].detach(), teacher, Schedule(CFG.diffusion), torch.full((len(pics),), 100), gen or step_generator(0, 1), replace(CFG.loss, **loss))


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('weight', ['sigma_over_alpha', 'one', 'one_minus_abar'])
def test_autograd_gives_the_sds_gradient(reduction, weight):
    "d L_IV / d z = w(t)(eps_phi - eps), over the stated normaliser."
    s, g = Schedule(CFG.diffusion), torch.Generator().manual_seed(0)
    z, eps, guess = (torch.randn(3, 4, 4, 8, 8, generator=g) for _ in range(3))
    t = torch.tensor([20, 100, 300])
    grad = sds_gradient(lambda z_t, t: guess, z, eps, t, s, weight)
    w = {'sigma_over_alpha': ((1-s.abar)/s.abar).sqrt(), 'one': torch.ones(1000), 'one_minus_abar': 1-s.abar}[weight][t]
    torch.testing.assert_close(grad, w.view(-1, 1, 1, 1, 1)*(guess-eps))
    z.requires_grad_(True)
    got, = torch.autograd.grad(surrogate(z, grad, reduction), z)
    torch.testing.assert_close(got*(z.numel() if reduction == 'mean' else 12), grad, rtol=1e-4, atol=1e-5)


def test_nothing_reaches_the_teacher(teacher):
    pics = pictures()
    loss, logs = verify(teacher, pics)
    loss.backward()
    assert pics.grad.isfinite().all() and pics.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(v.requires_grad for v in logs.values())


def test_autocast_keeps_the_loss_in_float32(teacher):
    exact = verify(teacher, pictures())[0]
    with torch.autocast('cpu', torch.bfloat16): loss = verify(teacher, pictures())[0]
    assert loss.dtype == torch.float32 and opacity(torch.rand(9).bfloat16()).dtype == torch.float32
    assert abs(loss-exact)/exact < .1


def test_parts_of_a_batch_draw_what_the_whole_would():
    "Gradient accumulation and several processes see the same noise, background, t and cameras."
    part = lambda k: step_generator(7, 3, start=2*k, total=4)
    whole = step_generator(7, 3, start=0, total=4)
    for f in (lambda n, g: random_background(n, g), lambda n, g: draw_t(n, 0, 9, CFG.loss, g), lambda n, g: verification_cameras(n, CFG.view, g).c2w):
        torch.testing.assert_close(torch.cat([f(2, part(0)), f(2, part(1))]), f(4, step_generator(7, 3, start=0, total=4)))
    assert whole.total == 4


def test_explicit_logs_keep_no_storage():
    "A list of logged scalars must not keep pictures alive."
    a, b = torch.rand(2, 2, 4, 3, 32, 32)
    _, logs = explicit(a, b, None, replace(CFG.loss, lambda_lpips=0.))
    assert all(v.untyped_storage().nbytes() <= 64 for v in logs.values())


def test_opacity_extremes():
    alpha = torch.tensor([0., 1e-30, .5, 1.], requires_grad=True)
    opacity(alpha).backward()
    assert alpha.grad.isfinite().all()


def test_steps_without_verifier():
    l = replace(CFG.loss, sds_every=4)
    assert [bool(step_weight(i, 8, l)) for i in range(8)] == [False]*3+[True]+[False]*3+[True]
    assert step_weight(7, 8, replace(l, implicit=False)) == 0
