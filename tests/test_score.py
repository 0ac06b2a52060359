"Warm restarts, the teacher's score, the lists of splits, the teacher that ships."
import json, os, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch

from dd3g import teach as room
from dd3g.cameras import view_cameras
from dd3g.config import SCALES
from dd3g.core import PACKAGE, UserError
from dd3g.loop import read_log
from dd3g.objects import families_by_rule, family_of, make_splits, procedural_name, read_splits, split_families, write_rings
from dd3g.objects import main as objects_main
from dd3g.teach import begin_from, by_view, consistency, diversity, explained, held_out_rings, main, silhouettes, wishes
from dd3g.teacher import Teacher, count
from dd3g.true_views import nested_set

TINY  = SCALES['tiny']
QUICK = ('--scale tiny --held-out .3 --samples 0 --fit-ae.steps 3 --fit-ae.batch 4 --fit-teacher.batch 4 --fit-teacher.steps 4 --fit-teacher.log-every 2 '
         '--fit-teacher.grid-every 1000 --diffusion.sample-steps 3').split()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two rings of each of five objects, and a teacher trained on them for four steps."
    at = tmp_path_factory.mktemp('score')
    write_rings([('procedural', i) for i in range(5)], at/'rings', TINY.view, renderer='points', rings_per_object=2, workers=0)
    main([*QUICK, '--data', str(at/'rings'), '--out', str(at/'first')])
    return at


# warm restarts

def test_warm_restart(runs, capsys):
    first, args = runs/'first'/'teacher.safetensors', [*QUICK, '--data', str(runs/'rings'), '--start', str(runs/'first'/'teacher.safetensors'), '--half']
    main([*args, '--out', str(runs/'more')])
    said = capsys.readouterr()
    a, b = Teacher.load(first), Teacher.load(runs/'more'/'teacher.safetensors')
    assert f'begins from {first} (fingerprint {a.fingerprint()})' in said.err and b.cfg.ae == a.cfg.ae
    for k, v in a.ae.state_dict().items(): assert torch.equal(v.bfloat16().float(), b.ae.state_dict()[k]), k # not trained again
    assert not (runs/'more'/'autoencoder').exists()
    assert any(not torch.equal(v.bfloat16().float(), b.unet.state_dict()[k]) for k, v in a.unet.state_dict().items())
    main([*args, '--out', str(runs/'more')]) # done: the same again, and silent about a beginning
    again = capsys.readouterr()
    assert b.fingerprint() in again.out and 'begins from' not in again.err


@pytest.mark.parametrize('args, says', [
    (['--start', 'FIRST', '--out', 'first'], 'this run would overwrite it'),
    (['--start', 'NONE', '--out', 'x'], 'no such file'),
    (['--start', 'FIRST', '--out', 'x', '--diffusion.prediction', 'epsilon'], 'diffusion.prediction is v there and epsilon here'),
    (['--start', 'FIRST', '--out', 'x', '--teacher.channels', '32'], 'teacher.channels is 16 there and 32 here'),
])
def test_start_refuses(runs, capsys, args, says):
    args = [str(runs/'first'/'teacher.safetensors') if a == 'FIRST' else str(runs/'none') if a == 'NONE' else str(runs/a) if a in ('first', 'x') else a for a in args]
    with pytest.raises(SystemExit) as e: main([*QUICK, '--data', str(runs/'rings'), *args])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count('\n') == 1


def test_a_folder_that_began_elsewhere(runs, capsys):
    with pytest.raises(SystemExit): main([*QUICK, '--data', str(runs/'rings'), '--start', str(runs/'first'/'unet'/'none'), '--out', str(runs/'first')])
    T = Teacher.load(runs/'first'/'teacher.safetensors')
    torch.manual_seed(1); torch.nn.init.normal_(T.unet.out[-1].weight); T.save(runs/'other.safetensors')
    with pytest.raises(SystemExit) as e: main([*QUICK, '--data', str(runs/'rings'), '--start', str(runs/'other.safetensors'), '--out', str(runs/'first')])
    assert e.value.code == 2 and 'config.start was None' in capsys.readouterr().err


def test_what_only_steers_may_differ(runs):
    cfg = replace(TINY, teacher=replace(TINY.teacher, canonical=.9, min_snr=5.), diffusion=replace(TINY.diffusion, guidance=3.), view=replace(TINY.view, elevation=(-2., 2.)))
    T, cfg = begin_from(runs/'first'/'teacher.safetensors', cfg)
    assert cfg.ae.scaling == T.cfg.ae.scaling != TINY.ae.scaling and cfg.teacher.min_snr == 5


def test_two_processes(runs):
    "One writes and speaks; the loss is that of one process; torchrun leaves --warm-start alone."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env  = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    args = [*QUICK, '--data', str(runs/'rings'), '--warm-start', str(runs/'first'/'teacher.safetensors')]
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port), '-m', 'dd3g.teach', *args, '--out', str(runs/'two')], env=env, capture_output=True, text=True, timeout=200)
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stderr.count('begins from') == 1 and r.stdout.count('fingerprint') == 1
    main([*args, '--out', str(runs/'one')])
    one, two = ([x['loss'] for x in read_log(runs/f/'unet')] for f in ('one', 'two'))
    assert one == pytest.approx(two, rel=1e-3)


# the score

def body(radius, n=1):
    "Silhouettes of a ball: the same disc from everywhere."
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 32)]*2, indexing='ij')
    return 1-.8*((x**2+y**2) < radius**2).float().expand(n, 4, 3, 32, 32)


def test_consistency_of_balls():
    cams = view_cameras(TINY.view, torch.zeros(2), torch.tensor([0., 5.]))
    assert consistency(body(.5, 2), cams).min() > .98
    odd = body(.5, 2).clone(); odd[:, 2] = body(.15, 2)[:, 2]            # one view shows a smaller thing
    low = consistency(odd, cams)
    assert (low < .75).all() and (low > .2).all()
    empty = body(.5, 2).clone(); empty[:, 1] = 1.                         # one view shows nothing: nothing is explained
    assert consistency(empty, cams).max() == 0
    own, hull = explained(silhouettes(body(.5, 2)), cams)
    assert own.shape == (2, 4, 32, 32) and not (hull & ~own).any()


def test_numbers_with_known_answers():
    true, view = torch.zeros(3, 4, 3, 8, 8), TINY.view
    got = torch.stack([true+.1, true-.1, true+.3])                        # mean .1
    res = by_view(true, got, true+.5, view)
    assert res['side'].tolist() == pytest.approx([(20+20+10.4576)/3]*3, abs=1e-3) and res['side_mean_of_3'].tolist() == pytest.approx([20]*3, abs=1e-3)
    assert res['side_best_of_3'].tolist() == pytest.approx([20]*3, abs=1e-3) and res['back_billboard'].tolist() == pytest.approx([6.0206]*3, abs=1e-3)
    d = diversity(true, got, view)
    assert d['side_pair'].tolist() == pytest.approx([(.2+.2+.4)/3]*3, abs=1e-6) and d['side_std'].tolist() == pytest.approx([.2]*3, abs=1e-6)
    assert d['side_energy'].tolist() == pytest.approx([2*.5/3-.8/3]*3, abs=1e-6)


def test_wishes_say_how_far():
    s = dict(side_gain=1.2, side_gap=3.4, front=28.)
    w = wishes(s | dict(intervals={k: [0, 1] for k in s}))
    assert [x['met'] for x in w] == [False, True, True] and [x['margin'] for x in w] == [-.8, .1, 0.]


def test_score_program_and_record(runs, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(room, 'record', lambda name, **kw: rows.append((name, kw)))
    main(['score', '--teacher', str(runs/'first'/'teacher.safetensors'), '--data', str(runs/'rings'), '--held-out', '.4', '--samples', '4', '--steps', '2', '--sweep', '1', '2',
          '--azimuths', '2', '--sheet', str(runs/'sheet.jpg'), '--record'])
    (name, r), out = rows[0], capsys.readouterr().out
    assert name == 'reproduce' and r['kind'] == 'teacher' and r['scale'] == 'tiny' and str(runs) not in r['command'] and (runs/'sheet.jpg').stat().st_size > 1000
    json.dumps(r)
    assert r['objects'][0]+r['objects'][1] == 5 and len(set(r['names'])) == len(r['names']) == r['scores']['objects'] # one ring an object
    assert {'front', 'side_mean_of_4', 'back_best_of_4', 'side_billboard', 'consistency', 'consistency_true', 'side_pair', 'side_energy', 'energy_floor', 'autoencoder'} <= set(r['scores'])
    assert [g for g, _ in r['sweep']] == [1., 2.] and [a for a, _ in r['azimuths']] == [0., 180.] and r['seconds'] > 0
    assert out.count('NOT MET') >= 1 and 'margin' in out
    for bad in (['--samples', '1'], ['--azimuths', '3'], ['--sweep', '-1'], ['--data', str(runs/'first')]):
        with pytest.raises(SystemExit) as e: main(['score', '--teacher', str(runs/'first'/'teacher.safetensors'), '--data', str(runs/'rings'), '--held-out', '.4', '--steps', '1', '--sweep-scored', '0', *bad])
        assert e.value.code == 2


def test_score_ignores_batches(runs, monkeypatch):
    T = Teacher.load(runs/'first'/'teacher.safetensors')
    rgba, e, *_ = held_out_rings([runs/'rings'], TINY.view, .4, 3)
    a = room.held_out_views(T, rgba, e, 2, 2)[2]
    monkeypatch.setattr(room, 'CPU_BATCH', 4)
    torch.testing.assert_close(room.held_out_views(T, rgba, e, 2, 2)[2], a, atol=1e-4, rtol=1e-4)


# splits

def world(n): return [dict(name=f, family=f) for f in map(procedural_name, range(n))]

def listed(part):
    return [dict(name=f'{g}/{n}', family=family_of(n)) for g, ns in read_splits()[part]['models'].items() for n in ns]


def test_lists_are_what_the_rule_said():
    s = read_splits()
    rule, val = s['rule'], s['validation']
    assert families_by_rule(listed('training')+listed('validation')+world(rule['asked']), rule['held_out'], rule['seed']) == {*val['families'], *val['procedural']}
    assert len(listed('training')+listed('validation')) == rule['models'] == 1806
    assert {m['family'] for m in listed('validation')} == set(val['families']) and {m['family'] for m in listed('training')} == set(s['training']['families'])
    assert not set(val['families']) & set(s['training']['families'])
    assert sorted(map(len, s['tests'].values())) == [11, 18] and len({p['seed'] for p in s['pictures']}) == 200
    assert not {n for ns in s['tests'].values() for n in ns} & {m['name'].split('/')[1] for m in listed('training')+listed('validation')}
    assert all(procedural_name(p['seed']) == p['name'] for p in s['pictures'][:20])
    text = (PACKAGE/'assets'/'splits.json').read_text()
    assert '/home' not in text and '/work' not in text and '/opt' not in text and '\\' not in text


def test_the_3d_set_is_nested_and_the_one_that_is_used():
    s = read_splits()
    meta = [m for m in listed('training')+world(s['rule']['procedural']) if m['family'] not in s['validation']['procedural']]
    counts, order = s['three_d_set']['counts'], s['three_d_set']['order']
    assert counts['100 %'] == len(meta)
    for part in (5, 10, 30): assert {meta[i]['name'] for i in nested_set(meta, part/100)} == set(order[:counts[f'{part} %']])


@pytest.mark.parametrize('n', [300, 2500, 9000])
def test_more_objects_move_nobody(n):
    meta = listed('training')+listed('validation')+world(n)
    train, held = split_families(meta)
    got, val = {meta[i]['family'] for i in held}, read_splits()['validation']
    assert got == set(val['families']) | {f for f in val['procedural'] if int(f.split('-')[1]) < n} and len(train)+len(held) == len(meta)


def test_own_folders_follow_the_rule():
    mine = [dict(name=f'mine/zq{k}{i}', family=f'zq{k}') for k in 'abcdefghijklmnopqrstuvwxyz' for i in range(4)]
    alone = {mine[i]['family'] for i in split_families(mine)[1]}
    assert alone == families_by_rule(mine, .05, 0) and alone
    both = mine+world(400)
    assert {both[i]['family'] for i in split_families(both)[1]} - {m['family'] for m in world(400)} == alone
    assert split_families(world(50), .3) == split_families(world(50), .3, lists={}) # another part: only the rule


def test_splits_program(tmp_path, capsys):
    objects_main(['splits', '--count', '60', '--pictures', '4', '--out', str(tmp_path/'s.json')])
    s = read_splits(str(tmp_path/'s.json'))
    assert s['rule']['models'] == 0 and s['validation']['procedural'] and len(s['pictures']) == 4 and s == make_splits(count=60, ruled=60, pictures=4, view=TINY.view)
    (tmp_path/'bad.json').write_text('[]')
    with pytest.raises(UserError, match='no list of splits'): read_splits(str(tmp_path/'bad.json'))
    with pytest.raises(SystemExit) as e: objects_main(['splits', '--models', str(tmp_path/'none'), '--out', str(tmp_path/'t.json')])
    assert e.value.code == 2 and 'no such folder' in capsys.readouterr().err


# the teacher that ships

def test_shipped():
    T = Teacher.shipped()
    assert T.cfg.view.size == 64 and count(T) < 8e6 and not any(p.requires_grad for p in T.parameters())
    assert (PACKAGE/'weights'/'mini_teacher.safetensors').stat().st_size <= 16 << 20
    with pytest.raises(UserError, match='train one by'): Teacher.shipped('paper')


def test_the_package_brings_it(monkeypatch):
    "What setup.py ships covers weights and lists."
    import setuptools
    seen, root = {}, PACKAGE.parent
    if not (root/'setup.py').exists(): pytest.skip('installed without its source')
    monkeypatch.setattr(setuptools, 'setup', lambda **kw: seen.update(kw)); monkeypatch.chdir(root)
    exec(compile((root/'setup.py').read_text(encoding='utf-8'), str(root/'setup.py'), 'exec'), dict(__file__=str(root/'setup.py'), __name__='__main__'))
    ships = {p for g in seen['package_data']['dd3g'] for p in PACKAGE.glob(g)}
    assert {PACKAGE/'weights'/'mini_teacher.safetensors', PACKAGE/'assets'/'splits.json'} <= ships
