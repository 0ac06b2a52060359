"The knowledge-loss meter: students with known answers, the same numbers from the program, one line for a mistake."
import json
from dataclasses import replace

import pytest, torch

from dd3g.config import SCALES
from dd3g.gaussians import Gaussians
from dd3g.layers import ImageTo3D
from dd3g.loop import save_weights
from dd3g.meter import MeterArgs, as_rolled, knowledge_loss, main, measure, n_survival, names_of, split_pictures, two_draws, wilson
from dd3g.metrics import Perceptual
from dd3g.pepd import PEPD
from dd3g.rollout import Quadruples, Roller, TensorPictures, write_quadruples
from dd3g.teacher import Teacher, shake

TINY = replace(SCALES['tiny'], diffusion=replace(SCALES['tiny'].diffusion, sample_steps=2), rollout_batch=4)

class Dots(ImageTo3D):
    "A few large Gaussians whose colour is N's own first numbers, or deaf to it."
    def __init__(self, gain): super().__init__(); self.gain = gain
    def forward(self, image, noise=None, cams=None):
        B = len(image)
        mu = torch.tensor([[0., 0, .3], [0, 0, -.3], [.3, 0, 0], [-.3, 0, 0], [0, .3, 0], [0, -.3, 0]]).expand(B, 6, 3)
        color = (.5+.1*self.gain*noise[:, 0, :3, 0, :1].mT.expand(B, 6, 3)).clamp(0, 1)
        return Gaussians(mu, torch.full((B, 6, 3), .12), torch.tensor([1., 0, 0, 0]).expand(B, 6, 4), color, torch.full((B, 6), .9))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('meter')
    torch.manual_seed(0)
    T = Teacher(TINY); shake(T); T.eval().requires_grad_(False); T.save(d/'teacher.safetensors')
    g = torch.Generator().manual_seed(0)
    rgba = torch.rand(4, 4, 32, 32, generator=g); rgba[:, 3] = 1
    write_quadruples(Roller(T, TINY), TensorPictures(rgba, names=list('abcd')), 8, d/'quads', shard=4, quiet=True)
    torch.manual_seed(0); save_weights(PEPD(TINY), d/'student.safetensors', TINY, 'student')
    return d, T

def as_teacher(model, pairs): # a teacher with the views of some student, made through the meter's own renderer
    from dd3g.meter import student_views
    with torch.no_grad():
        one = lambda k, turn=0.: student_views(model, dict(pairs, noise=pairs['noise'][:, k]), TINY, turn)
        return dict(pairs, oi=torch.stack([one(0), one(1)], 1), unseen=one(0, 45.))

def test_known_students(made):
    d, T = made
    pairs = as_teacher(Dots(1.), two_draws(T, Quadruples(d/'quads'), range(8), TINY))
    copies, deaf, halves, against = (knowledge_loss(Dots(x), pairs, TINY, Perceptual('random-squeeze')) for x in (1., 0., .5, -1.))
    assert copies['own_n'] == 1 and copies['explained'] == pytest.approx(1, abs=1e-5) and copies['psnr'] > 90 and copies['unseen_psnr'] > 90
    assert copies['ssim'] == pytest.approx(1, abs=1e-4) and copies['rLPIPS-squeeze'] < 1e-6 and copies['psnr_other'] < copies['psnr']
    assert deaf['own_n'] == .5 and deaf['explained'] == 0 and deaf['amplitude'] == 0
    assert halves['own_n'] == 1 and halves['explained'] == pytest.approx(.75, abs=2e-3) and halves['amplitude'] == pytest.approx(.5, abs=2e-3)
    assert against['own_n'] == 0 and against['explained'] == pytest.approx(-3, abs=.02)
    assert copies['pairs'] == 8 and copies['own_n_low'] > .6

def test_intervals():
    g = torch.Generator().manual_seed(0)
    OI, G = torch.rand(400, 2, 1, 3, 4, 4, generator=g), torch.rand(400, 2, 1, 3, 4, 4, generator=g)
    got = n_survival(G, OI)
    assert got['own_n_low'] < .5 < got['own_n_high'] and got['explained_low'] < -1 < got['explained_high'] # independent and as strong: 1 - (1+1)
    assert wilson(0, 0) == (0., 1.) and wilson(5, 10)[0] == pytest.approx(.2366, abs=1e-4)

def test_seeds_and_unseen(made):
    d, T = made
    data = Quadruples(d/'quads')
    a, b, c = two_draws(T, data, [0, 1], TINY), two_draws(T, data, [0, 1], TINY), two_draws(T, data, [0, 1], TINY, seed=1)
    assert torch.equal(a['oi'], b['oi']) and not torch.equal(a['oi'], c['oi'])
    assert a['oi'].shape == (2, 2, 4, 3, 32, 32) and a['unseen'].shape == (2, 4, 3, 32, 32)
    assert not torch.equal(a['oi'][:, 0], a['oi'][:, 1]) and not torch.equal(a['unseen'], a['oi'][:, 0])

def test_names(made):
    d, _ = made
    assert names_of(Quadruples(d/'quads')) == list('abcdabcd') == names_of(Quadruples(d/'quads', cache='ram'))
    rows, held = split_pictures(list('abcdabcd'), .25)
    assert len(held) == 2 and len(rows) == 6 and split_pictures(['a', 'b'], 1.) == ([], [0, 1])

def test_program(made, tmp_path, capsys):
    d, T = made
    args = f'--checkpoint {d}/student.safetensors --quads {d}/quads --teacher {d}/teacher.safetensors --held-out 1 --pairs 2 --out {tmp_path}/m.json'.split()
    got = main(args)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path/'m.json').read_text()) and line['pairs'] == 2 and line['psnr'] == pytest.approx(got['psnr'], abs=1e-4)
    assert as_rolled(SCALES['tiny'], Quadruples(d/'quads').settings).diffusion.sample_steps == 2 # measured with the steps that made them

@pytest.mark.parametrize('change, says', [(dict(checkpoint=None), '--checkpoint is missing'), (dict(quads='nowhere'), 'no settings.json|no such'), (dict(scale=64), 'their --scale'), (dict(other=1), 'made by teacher')])
def test_mistakes(made, tmp_path, change, says):
    from dd3g.core import UserError
    d, T = made
    a = MeterArgs(d/'student.safetensors', str(d/'quads'), d/'teacher.safetensors', pairs=1)
    if 'scale' in change:
        big = replace(TINY, view=replace(TINY.view, size=64)); save_weights(PEPD(big), tmp_path/'big.safetensors', big, 'student'); a = replace(a, checkpoint=tmp_path/'big.safetensors')
    elif 'other' in change: torch.manual_seed(1); Teacher(TINY).save(tmp_path/'t.safetensors'); a = replace(a, teacher=tmp_path/'t.safetensors')
    else: a = replace(a, **change)
    with pytest.raises(UserError, match=says) as e: measure(a)
    assert '\n' not in str(e.value)
