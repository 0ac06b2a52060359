"The training program: the chain in small, exact resume, falling loss, clear refusals."
import json, shutil
from dataclasses import replace

import pytest
import torch

from dd3g.config import SCALES, from_dict, Config
from dd3g.core import UserError
from dd3g.loop import checkpoints, fit, load_into, load_weights, read_log, read_tensors, step_generator
from dd3g.pepd import PEPD
from dd3g.curriculum import OBJECTIVES, objective_of
from dd3g.meter import names_of
from dd3g.objects import Rings
from dd3g.rollout import Quadruples, RingPictures, Roller, pictures_from, write_quadruples
from dd3g.train import Joint, Subset, held_out, load_data, main, new_student, split_pictures
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


def test_families_of_rings_are_held_out(run, tmp_path):
    "Quadruples of rings are split by the family of their object: training and meter alike; older ones, which do not tell it, by name."
    rings, T = Rings(run/'rings'), Teacher.load(run/'teacher'/'teacher.safetensors')
    names = ['rock-2', 'rock-moss', 'tree', 'cup']
    which = {n: names[k] for k, n in enumerate(dict.fromkeys(m['name'] for m in rings.meta))}
    rings.meta = [dict(m, name=which[m['name']], family=which[m['name']].split('-')[0]) for m in rings.meta]
    write_quadruples(Roller(T, replace(SCALES['tiny'], ae=T.cfg.ae, rollout_batch=8, diffusion=replace(SCALES['tiny'].diffusion, sample_steps=1))), RingPictures(rings, 32), 8, tmp_path/'q', quiet=True)
    who  = lambda rows: {data.get(i)['record']['picture']['name'] for i in rows}
    data = Quadruples(tmp_path/'q')
    assert set(names_of(data)) == {'rock', 'tree', 'cup'} and [who(x) for x in held_out(data, .25)] == [{'rock-2', 'rock-moss', 'cup'}, {'tree'}]
    data.names = [data.get(i)['record']['picture']['name'] for i in range(8)] # as an older shard's index has it
    assert [who(x) for x in held_out(data, .25)] == [{'rock-moss', 'tree', 'cup'}, {'rock-2'}]


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


@pytest.mark.parametrize('name, has, has_not', [('explicit', 'mse', 'iv'), ('implicit', 'iv', 'mse'), ('joint', 'iv', None)])
def test_the_three_runs_of_table_3(run, tmp_path, name, has, has_not):
    q = ['--quads', str(run/'quads'), '--teacher', str(run/'teacher'/'teacher.safetensors'), '--pairs', '0', '--loss.sds-every', '1', '--fit.steps', '2']
    main([*SMALL, *q, '--objective', name, '--out', str(tmp_path/'out')])
    keys = {k for r in read_log(tmp_path/'out'/'student') for k in r}
    assert has in keys and has_not not in keys and 'on' in keys
    c = read_tensors(checkpoints(tmp_path/'out'/'student')[-1])[1]['config']['loss']
    assert c['sds_schedule'] == ('high_to_low' if name == 'implicit' else 'uniform') and (c['explicit'], c['implicit']) == (name != 'implicit', name != 'explicit')


def test_paper_scale_is_section_4a():
    c = objective_of(SCALES['paper'], 'joint')
    assert c == SCALES['paper'] and set(OBJECTIVES) == {'joint', 'explicit', 'implicit'}
    assert (c.loss.lambda_mse, c.loss.lambda_lpips, c.loss.eta, c.loss.sds_t, c.loss.sds_background) == (.5, .5, .4, (20, 300), 'random')
    assert (c.view.azimuth, c.view.elevation, c.view.size, c.fit.lr, c.fit.clip_value, c.fit.batch, c.fit.weight_decay) == ((-180, 180), (-5, 5), 256, 1e-5, 5, 72, 0)


@pytest.fixture(scope='module')
def shards(run, tmp_path_factory):
    "Twelve quadruples in three shards, as pictures, as latents and in an object store, and a teacher."
    d = tmp_path_factory.mktemp('shards')
    T = Teacher.load(run/'teacher'/'teacher.safetensors')
    cfg = replace(SCALES['tiny'], ae=T.cfg.ae, rollout_batch=4, diffusion=replace(SCALES['tiny'].diffusion, sample_steps=2))
    for store in ('pictures', 'latents'): write_quadruples(Roller(T, cfg), pictures_from(run/'pictures', cfg.view), 12, d/store, store, shard=4, quiet=True)
    fs = pytest.importorskip('fsspec').filesystem('memory')
    for f in (d/'latents').iterdir(): fs.pipe(f'/dd3g-quads/{f.name}', f.read_bytes())
    return d, T, cfg


def test_a_shard_lost_before_and_one_lost_while_training(shards, tmp_path, capfd):
    d, T, cfg = shards
    shutil.copytree(d/'pictures', tmp_path/'q')
    (tmp_path/'q'/'quads-00002.tar').unlink()
    data = load_data(tmp_path/'q', T, cfg)
    assert len(data) == 8 and capfd.readouterr().err.count('quads-00002.tar: missing') == 1
    disk, told = Quadruples(tmp_path/'q', on_error='skip'), []
    sub = Subset(disk, range(8), told.append)
    before = sub.fetch([0, 3, 5], 'cpu')
    (tmp_path/'q'/'quads-00001.tar').write_bytes(b'')
    after, again = sub.fetch([0, 3, 5], 'cpu'), Subset(disk, range(8), told.append).fetch([5, 0], 'cpu')
    assert torch.equal(after['oi'][:2], before['oi'][:2]) and not torch.equal(after['oi'][2], before['oi'][2])
    assert torch.equal(again['oi'][0], after['oi'][2]) and len(told) == 2 and 'quads-00001.tar' in told[0]
    assert sub.ids([0])[0].startswith('000000000 ')
    (tmp_path/'q'/'quads-00000.tar').unlink()
    with pytest.raises(UserError, match='hardly a shard'): Subset(disk, range(8), told.append).fetch([0], 'cpu')


def test_resume_in_the_middle_of_an_epoch_from_shards(shards, tmp_path):
    "Twelve samples, batches of five: a stop at step 3 is in the second epoch. From the disk, with pictures and with latents decoded on the fly."
    d, T, cfg = shards
    cfg = replace(cfg, loss=replace(cfg.loss, implicit=False, lambda_lpips=0.), fit=replace(cfg.fit, steps=5, batch=5, save_every=3, log_every=1, warmup=0))
    class Stop(Exception): pass
    def go(out, store, stop=None):
        joint = Joint(cfg, T, balance_every=0)
        def loss(model, batch, step, gen):
            if step == stop: raise Stop
            return joint(model, batch, step, gen)
        data = Subset(Quadruples(d/store if '://' not in store else store, decode=T.decode), range(12))
        return fit(new_student(cfg, T), loss, data, cfg.fit, out, config=cfg, quiet=True, prefetch=2).state_dict()
    ends = []
    for i, store in enumerate(('pictures', 'latents', 'memory://dd3g-quads')):
        whole = go(tmp_path/f'{i}-a', store)
        with pytest.raises(Stop): go(tmp_path/f'{i}-b', store, 4)
        again = go(tmp_path/f'{i}-b', store)
        assert all(torch.equal(whole[k], again[k]) for k in whole)
        ends.append(whole)
    assert all(torch.equal(ends[1][k], ends[2][k]) for k in whole) # an object store is a folder elsewhere


def test_a_batch_of_three(shards):
    "Three objects on three greys: not one colour."
    d, T, cfg = shards
    batch = Quadruples(d/'pictures').fetch([0, 1, 2], 'cpu')
    l, _ = Joint(replace(cfg, loss=replace(cfg.loss, sds_every=1)), T)(new_student(cfg, T), batch, cfg.fit.steps-1, step_generator(0, 0))
    assert l.isfinite()


def test_validation_is_written_once_a_step_and_force_goes_on(run, tmp_path, capfd):
    q = ['--quads', str(run/'quads'), '--teacher', str(run/'teacher'/'teacher.safetensors'), '--out', str(tmp_path/'out')]
    main([*SMALL, *q, '--fit.grid-every', '2'])
    rows = lambda: [json.loads(l) for l in (tmp_path/'out'/'validation.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows()] == [2, 4] and {'psnr', 'ssim', 'rLPIPS-squeeze', 'unseen_psnr', 'own_n', 'own_n_low', 'explained', 'amplitude'} <= set(rows()[0])
    (tmp_path/'out'/'student'/'student.safetensors').unlink(); checkpoints(tmp_path/'out'/'student')[-1].unlink() # back to step 2
    with pytest.raises(SystemExit): main([*SMALL, *q, '--fit.lr', '1e-4'])
    err = capfd.readouterr().err
    assert 'fit.lr was 0.002, is 0.0001' in err and '--force' in err
    main([*SMALL, *q, '--fit.lr', '1e-4', '--fit.grid-every', '2', '--force'])
    assert [r['step'] for r in rows()] == [2, 4] and (tmp_path/'out'/'student'/'tensorboard').is_dir() == bool(__import__('importlib').util.find_spec('tensorboard'))
