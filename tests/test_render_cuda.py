"Our tiles against gsplat: projection anywhere, pictures and gradients on a CUDA device."
import math

import pytest
import torch

from dd3g.cameras import four_views
from dd3g.gaussians import Gaussians, demo_gaussians
from dd3g.render import project, render

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')


def cloud(n, seed, spread=.25, s=0., a=0.):
    "Random Gaussians with the paper's activations; `s` and `a` shift the scale and opacity logits."
    gen = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(n, *shape, generator=gen)
    return Gaussians.from_raw(r(3)*spread, r(3)*2+s, r(4), r(3), r()*2+a)


SCENES = dict(
    surface=lambda seed: demo_gaussians(3000, seed),             # thin opaque discs
    fog=lambda seed: cloud(2000, seed, s=2., a=-2.),             # large and translucent
    solid=lambda seed: cloud(2000, seed, s=2., a=8.),            # saturated: alpha reaches .999, rays end early
    dust=lambda seed: cloud(4000, seed, s=-3.),                  # below a pixel: the compensation matters
    inside=lambda seed: cloud(2000, seed, spread=1.2, s=2.),     # some behind the cameras, some in front of the near plane
    few=lambda seed: cloud(3, seed, s=4.),
)


def scene(name, batch, device):
    if not batch: return SCENES[name](0).to(device), four_views(20., 5.).to(device)
    return Gaussians.stack([SCENES[name](i) for i in range(batch[0])]).to(device), four_views(torch.tensor([20., -75.])[:batch[0]], torch.tensor([5., -3.])[:batch[0]]).to(device)


@pytest.mark.parametrize('name', ['surface', 'fog', 'dust'])
def test_projection_is_gsplats(name):
    "gsplat ships its projection in PyTorch: centres, conics, compensation, depths agree within the paper's scales."
    impl = pytest.importorskip('gsplat.cuda._torch_impl')
    g, cams = scene(name, (2,), 'cpu')
    f = 32/math.tan(math.radians(cams.fov)/2)
    sp = project(g.mu, g.scale, g.quat, g.alpha, cams.w2c, f, 64)
    radii, mean, z, conic, comp = impl._fully_fused_projection(g.mu, g.covariance(), cams.w2c, cams.K(64).expand(2, 4, 3, 3), 64, 64, calc_compensations=True)
    seen = sp.radius[..., 0] > 0
    assert seen.any() and (radii[seen] >= sp.radius[seen]).all() # ours is tighter: it knows the opacity
    ours = sp.mean, sp.conic, sp.z, (sp.log_o-g.alpha[:, None].log()).exp()
    for a, b, eps in zip(ours, (mean, conic, z, comp), (1e-4, 1e-4, 1e-5, 5e-4)): assert (a-b)[seen].abs().max() < eps


@cuda
@pytest.mark.parametrize('size', [64, 100])
@pytest.mark.parametrize('batch', [(), (2,)])
@pytest.mark.parametrize('name', SCENES)
def test_pictures_agree(name, batch, size):
    "At most one pixel in a thousand differs by more than 1e-3 (a touch at alpha = 1/255 falls either way)."
    g, cams = scene(name, batch, 'cuda')
    want = render(g, cams, size, .3, backend='gsplat')
    for device in ('cuda', 'cpu'):
        got = render(g.to(device), cams.to(device), size, .3, backend='torch')
        for k in ('rgb', 'alpha', 'depth'):
            a, b = getattr(got, k).cuda(), getattr(want, k)
            if k == 'depth': a, b = a*(want.alpha > .05), b*(want.alpha > .05) # a mean over next to nothing is noise
            assert ((a-b).abs().amax(-3) > 1e-3).float().mean() <= 1e-3, (device, k, (a-b).abs().max())


@cuda
@pytest.mark.parametrize('batch', [(), (2,)])
@pytest.mark.parametrize('name', SCENES)
def test_gradients_agree(name, batch):
    "Gradients of a random linear form of the pictures, relative to their norm."
    def grads(backend):
        g, cams = scene(name, batch, 'cuda')
        g = g.map(lambda x: x.clone().requires_grad_())
        r, gen = render(g, cams, 64, .3, backend=backend), torch.Generator('cuda').manual_seed(1)
        w = lambda x: torch.randn(x.shape, generator=gen, device='cuda')
        loss = (w(r.rgb)*r.rgb).sum()+(w(r.alpha)*r.alpha).sum()+.1*(w(r.depth)*r.depth*r.alpha.detach()).sum()
        return torch.autograd.grad(loss, g.tensors)
    for field, a, b in zip(('mu', 'scale', 'quat', 'color', 'alpha'), grads('torch'), grads('gsplat')):
        assert a.isfinite().all() and b.norm() > 0, field
        assert (a-b).norm() <= 1e-2*b.norm(), (field, ((a-b).norm()/b.norm()).item())


@cuda
def test_cuda_uses_gsplat_and_float32():
    g, cams = scene('surface', (), 'cuda')
    with torch.autocast('cuda', torch.bfloat16): got = render(g, cams, 64)
    want = render(g, cams, 64, backend='gsplat')
    assert got.rgb.dtype == torch.float32 and (got.rgb-want.rgb).abs().max() < 1e-6


@cuda
def test_nothing_in_sight():
    g, cams = scene('few', (), 'cuda')
    r = render(g.transform(None, [0., 0, 50.]), cams, 32, .25)
    assert r.alpha.max() == 0 and (r.rgb == .25).all() and r.depth.max() == 0
