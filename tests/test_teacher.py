"The teacher's network against the published manifests, its inert frame, its ODE against diffusers, its files."
import gzip, hashlib, json, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dd3g.cameras import four_views
from dd3g.config import SCALES
from dd3g.core import UserError, fix_torchvision, seeded_randn
from dd3g.ddim import Schedule, integrate, rollout
from dd3g.loop import step_generator
from dd3g.teach import TrainAutoencoder, TrainTeacher, autoencoder_loss, draw_sample, main, teacher_loss
from dd3g.teacher import Autoencoder, MultiViewUNet, Teacher, count, manifest, shake

TINY = SCALES['tiny']
WANT = json.loads(gzip.open(Path(__file__).parent/'fixtures'/'unet_manifests.json.gz').read())


@pytest.fixture(scope='module')
def teacher():
    torch.manual_seed(0)
    t = Teacher(TINY).requires_grad_(False).eval()
    shake(t.unet)
    return t


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=g), four_views(torch.tensor([0., 45., 90.]), torch.tensor([0., 5., -5.])), seeded_randn(range(3), *TINY.noise_shape)


@pytest.mark.parametrize('name,n,size,changes', [('imagedream', 773, 941_672_900, {}), ('mvdream', 690, 867_572_164, dict(image_tokens=0, pixel_frame=False))])
def test_manifest(name, n, size, changes):
    with torch.device('meta'): unet = MultiViewUNet(replace(SCALES['paper'].teacher, **changes))
    assert manifest(unet) == WANT[name] and len(WANT[name]) == n and count(unet) == size


def test_manifest_hash():
    lines = '\n'.join(f'{k} {s}' for k, s in sorted(WANT['imagedream'].items()))
    assert hashlib.sha256(lines.encode()).hexdigest().startswith('9bec320d31e5')


def test_manifest_program():
    out = subprocess.run([sys.executable, '-m', 'dd3g.teacher', 'manifest', '--scale', 'paper'], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == WANT['imagedream']


def test_published_forward_at_paper_shape():
    "One forward of ImageDream's network on the meta device: 5 frames, 77 words, 257 CLIP features."
    c = SCALES['paper'].teacher
    with torch.device('meta'):
        out = MultiViewUNet(c)(torch.randn(2, 5, 4, 32, 32), torch.ones(2), torch.randn(2, 77, 1024), torch.randn(2, 4, 16), torch.randn(2, 257, 1280), torch.randn(2, 4, 32, 32))
    assert out.shape == (2, 4, 4, 32, 32)


def test_fifth_frame_is_inert_and_inputs_are_kept(teacher, inputs):
    image, cams, noise = inputs
    cond, t = teacher.encode_condition(image), torch.tensor([900, 500, 10])
    other = noise.clone(); other[:, -1] = 1e4
    kept = [x.clone() for x in (other, *cond)]
    a, b, c = (teacher.denoise(z, t, cond, cams) for z in (noise, other, noise[:, :4]))
    assert torch.equal(a, b) and torch.equal(a, c) and a.abs().sum() > 0
    assert all(torch.equal(x, y) for x, y in zip(kept, (other, *cond)))


def test_condition_is_a_function_of_the_picture(teacher, inputs):
    image = inputs[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher.encode_condition(image), teacher.encode_condition(image)))
    null = teacher.encode_condition(image).null()
    assert not null.latent.any() and torch.equal(null.tokens[0], null.tokens[2])


def test_rollout_is_deterministic_and_ignores_neighbours(teacher, inputs):
    image, cams, noise = inputs
    go = lambda i: rollout(teacher, Schedule(TINY.diffusion), image[i], cams[i], noise[i], steps=6)
    all_ = go(slice(None))
    assert torch.equal(all_, go(slice(None)))
    torch.testing.assert_close(go(slice(1, 2)), all_[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['epsilon', 'v'])
def test_trajectory_of_diffusers(kind):
    fix_torchvision()
    from diffusers import DDIMScheduler
    ref = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                        timestep_spacing='leading', prediction_type={'epsilon': 'epsilon', 'v': 'v_prediction'}[kind])
    ref.set_timesteps(50)
    s, net, z = Schedule(replace(TINY.diffusion, prediction=kind)), lambda z, t: torch.cos(z+t/300), seeded_randn(range(2), 4, 4, 8, 8)
    mine = []
    integrate(lambda z, t: s.to_eps(net(z, t), z, torch.full((2,), t)), s, z, 50, lambda i, t, z, e: mine.append(z))
    for t, m in zip(ref.timesteps, mine):
        z = ref.step(net(z, int(t)), t, z).prev_sample
        assert (z-m).abs().max() <= 1e-5*max(1, z.abs().max())


def test_steps_are_one_graph():
    "Training steps compile without a graph break, so nothing in them waits for the host."
    graphs, rgba = [], torch.randint(0, 255, (2, 8, 4, 32, 32), dtype=torch.uint8)
    def backend(gm, inputs): graphs.append(gm); return gm.forward
    batch = dict(rgba=rgba, elevation=torch.zeros(2))
    for task, loss in ((TrainAutoencoder(Autoencoder(TINY.ae)), autoencoder_loss(TINY)), (TrainTeacher(Teacher(TINY), Schedule(TINY.diffusion)), teacher_loss(TINY))):
        eager = loss(task, batch, 0, step_generator(0, 0))[0]
        task.compile(backend=backend, fullgraph=True)
        got = loss(task, batch, 0, step_generator(0, 0))[0]
        got.backward()
        torch.testing.assert_close(got, eager)
        assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_samples_show_what_the_cameras_say():
    "Paint every ring view with its own grey and read the azimuths back."
    rgba = (torch.arange(8)*20).view(1, 8, 1, 1, 1).expand(16, 8, 4, 32, 32).byte().clone()
    rgba[:, :, 3] = 255
    pics, offset = draw_sample(rgba, step_generator(0, 3), TINY)
    j = (pics[:, :, 0, 0, 0]*255/20).round()
    want = (j[:, :1] + (offset[:, None] + torch.arange(4)*90 - 90)/45) % 8
    assert torch.equal(j[:, 1:], want) and 0 < (offset == 0).float().mean() < 1


def test_files(teacher, tmp_path):
    path = tmp_path/'t.safetensors'
    teacher.save(path)
    again = Teacher.load(path)
    assert again.fingerprint() == teacher.fingerprint() and not any(p.requires_grad for p in again.parameters())
    teacher.save(path, torch.bfloat16)
    assert path.stat().st_size < 2.5*count(teacher) and Teacher.load(path).fingerprint() != teacher.fingerprint()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match='t.safetensors'): Teacher.load(path)
    with pytest.raises(UserError, match='no such file'): Teacher.load(tmp_path/'none.safetensors')


def test_program_refuses(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--data', str(tmp_path), '--out', str(tmp_path/'out')])
    assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1
    with pytest.raises(SystemExit) as e: main(['--teacher.head-dim', '7'])
    assert e.value.code == 2 and 'head_dim' in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_agrees_with_cpu(teacher, inputs):
    image, cams, noise = inputs
    on = Teacher(TINY).to('cuda').eval(); on.load_state_dict(teacher.state_dict())
    z = [rollout(m, Schedule(TINY.diffusion, d), image.to(d), cams.to(d), noise.to(d), steps=10).cpu() for m, d in ((teacher, 'cpu'), (on, 'cuda'))]
    torch.testing.assert_close(*z, rtol=2e-2, atol=2e-2)
