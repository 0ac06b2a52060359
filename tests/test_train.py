"The training program: the chain in small, exact resume, falling loss, clear refusals."
import json
from dataclasses import replace

import pytest
import torch

from dd3g.config import SCALES, from_dict, Config
from dd3g.loop import fit, load_into, load_weights, read_log
from dd3g.pepd import PEPD
from dd3g.rollout import Quadruples
from dd3g.train import Joint, Subset, main, new_student, split_pictures
from dd3g.teacher import Teacher

SMALL = ('--objects 4 --quadruples 8 --rollout-batch 8 --fit-ae.steps 2 --fit-teacher.steps 2 --fit-ae.batch 4 --fit-teacher.batch 4 '
         '--diffusion.sample-steps 4 --fit.steps 4 --fit.batch 2 --fit.save-every 2 --fit.log-every 1 --fit.grid-every 4 --pairs 1').split()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('train')
    main([*SMALL, '--out', str(out)])
    return out


def test_chain_leaves_everything(run):
    for f in ('rings', 'pictures', 'teacher/teacher.safetensors', 'quads', 'grids/0000004.jpg', 'validation.jsonl', 'student.safetensors'): assert (run/f).exists(), f
    state, cfg = load_weights(run/'student.safetensors', 'student')
    load_into(PEPD(from_dict(Config, cfg)), state)
    v = json.loads((run/'validation.jsonl').read_text().splitlines()[-1])
    assert v['pairs'] == 1 and 0 <= v['own_n'] <= 1 and v['psnr'] > 0
    log = read_log(run/'student')
    assert [r['step'] for r in log] == [1, 2, 3, 4] and {'mse', 'iv', 'on', 'beta', 'grad/es'} <= {k for r in log for k in r}


def test_second_run_skips_every_stage(run, capfd):
    main([*SMALL, '--out', str(run)])
    assert capfd.readouterr().err.count('there already') == 4


def test_latent_encoder_is_the_teachers(run):
    T = Teacher.load(run/'teacher'/'teacher.safetensors')
    G = new_student(replace(SCALES['tiny'], ae=T.cfg.ae), T)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(G.latent_encoder(x), T.encode(x))
    assert not any(p.requires_grad for p in G.latent_encoder.parameters()) and G.n_params() > 0


def test_resume_is_exact(run, tmp_path):
    "Two steps, a stop, two more: bit-equal to four, verifier and all."
    T = Teacher.load(run/'teacher'/'teacher.safetensors')
    cfg = replace(SCALES['tiny'], ae=T.cfg.ae, fit=replace(SCALES['tiny'].fit, steps=4, batch=2, save_every=2, log_every=1, warmup=0, cosine=False))
    cfg = replace(cfg, loss=replace(cfg.loss, sds_every=2))
    data = Quadruples(run/'quads', cache='ram')
    class Stop(Exception): pass
    def go(out, stop=None):
        joint = Joint(cfg, T)
        def loss(model, batch, step, gen):
            if step == stop: raise Stop
            return joint(model, batch, step, gen)
        return fit(new_student(cfg, T), loss, data, cfg.fit, out, config=cfg, quiet=True).state_dict()
    whole = go(tmp_path/'a')
    with pytest.raises(Stop): go(tmp_path/'b', 3)
    again = go(tmp_path/'b')
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_loss_falls(run, tmp_path):
    "Explicit supervision fits eight quadruples of plain pictures."
    cfg = SCALES['tiny']
    cfg = replace(cfg, loss=replace(cfg.loss, implicit=False, lambda_lpips=0., opacity=0.), fit=replace(cfg.fit, steps=40, batch=4, log_every=5, grid_every=1000, lr=4e-3))
    data = Quadruples(run/'quads', cache='ram')
    G = new_student(cfg)
    fit(G, Joint(cfg, balance_every=0), data, cfg.fit, tmp_path, config=cfg, quiet=True)
    mse = [r['mse'] for r in read_log(tmp_path)]
    assert mse[-1] < .7*mse[0], mse


def test_families_stay_together():
    names = [f'{k}' for k in 'aabbccddee']*3
    rows, held = split_pictures(names, .2)
    assert sorted(rows+held) == list(range(30)) and not {names[i] for i in rows} & {names[i] for i in held} and held
    assert split_pictures(['a']*3, .5) == ([0, 1, 2], [])
    assert len(Subset([0]*30, held)) == len(held)


@pytest.mark.parametrize('args, says', [
    (['--scale', 'huge'], 'there are tiny'),
    (['--quads', '/nowhere', '--teacher', '/nowhere.safetensors'], 'no such file'),
    (['--quads', '/nowhere'], '--quads without --teacher'),
    (['--scale', 'paper'], 'name --quads and --teacher'),
    (['--loss.eta', '-1'], 'loss.eta'),
])
def test_one_line_and_code_2(args, says, tmp_path, capfd):
    with pytest.raises(SystemExit) as e: main([*args, '--out', str(tmp_path/'out')])
    err = capfd.readouterr().err.strip()
    assert e.value.code == 2 and says in err and len(err.splitlines()) == 1
    assert not (tmp_path/'out').exists()


def test_quadruples_of_another_teacher_are_refused(run, tmp_path, capfd):
    torch.manual_seed(1)
    other = Teacher(replace(SCALES['tiny'])); other.save(tmp_path/'other.safetensors')
    with pytest.raises(SystemExit): main([*SMALL, '--quads', str(run/'quads'), '--teacher', str(tmp_path/'other.safetensors'), '--out', str(tmp_path/'out')])
    assert 'made by teacher' in capfd.readouterr().err


def test_other_settings_are_refused(run, capfd):
    with pytest.raises(SystemExit): main([*SMALL, '--objects', '5', '--out', str(run)])
    assert 'made with other settings' in capfd.readouterr().err
