"The paper in miniature: which runs there are, that a whole reproduction works, and what the scheduler does with time, failures, twins and kill -9."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest

from dd3g import reproduce as R
from dd3g.config import SCALES
from dd3g.core import UserError

TINY = SCALES['tiny']
FEW  = ('--scale tiny --objects 8 --fit-ae.steps 2 --fit-teacher.steps 2 --quadruples 12 --diffusion.sample-steps 2 --steps 2 --pairs 2 --judged 2 --samples 2 '
        '--lpips squeeze --swept 0 --lifted 0 --seeds 0 --lrs 1e-3 --core').split()

def program(out, *more, few=FEW): # the program in this process
    R.main([*few, '--out', str(out), *map(str, more)])

def refused(capsys, *args): # its one line
    with pytest.raises(SystemExit) as e: R.main(list(args))
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('dd3g')]
    assert e.value.code == 2 and len(said) == 1, said
    return said[0]

@pytest.mark.parametrize('scale', ['tiny', 'mini', 'small'])
def test_every_run_has_a_name_of_its_own_and_a_sound_configuration(scale):
    cfg  = SCALES[scale]
    runs = R.runs_of(cfg, seeds=(0, 1))
    assert len({r.name for r in runs}) == len(runs)
    for r in runs:
        c = R.config_of(r, cfg)
        assert r.set in R.SETS and c.fit.seed == r.seed and c.fit.steps == r.steps and not any(x in r.name for x in '/ "\'%')
    tables = {t: {r.row for r in runs if r.table == t} for t in ('II', 'III', 'IV', 'wrong')}
    assert tables == dict(II={'a', 'b', 'c', "c'", 'c"', 'd', 'd+lookup', 'd+picture'}, III={'explicit', 'implicit', 'joint'}, IV={'n rendered', 'n synthetic', 'n/2 + n', 'n + 2n'}, wrong=set(R.WRONG))
    budgets = {(r.table, r.steps) for r in runs if r.table != 'main'}
    assert len({s for _, s in budgets}) == 1, 'all tables have one budget'

def test_runs_differ_in_what_their_row_says():
    of = {r.row: R.config_of(r, TINY) for r in R.runs_of(TINY, core=True, seeds=(0,), lrs=(1e-3,)) if r.table == 'II'}
    assert [of[k].student.backbone for k in 'abc'] == ['tgs', 'splatter_image', 'pepd']
    assert [of[k].student.pattern for k in ('c', "c'", 'c"', 'd')] == ['none', 'constant', 'shuffled', 'pe']
    assert of['d'].student.lookup == 'none' != of['d+lookup'].student.lookup
    assert [of[k].student.lookup_picture for k in ('d', 'd+lookup', 'd+picture')] == [False, False, True]
    assert not any(c.loss.implicit for c in of.values())

def test_parts_are_nested_and_the_same_in_any_order():
    names = [f'family {i}' for i in range(500)]
    parts = [{n for n in names if R.rank(n) < x} for x in (.1, .3, 1.)]
    assert parts[0] < parts[1] < parts[2] == set(names)

def test_nonsense_is_one_line(capsys, tmp_path):
    for args, word in (('--steps -1', 'at least 0'), ('--only all', '--only all'), ('--runs V-*', 'no such run'), ('--data nowhere', 'no such folder'), ('--seeds 0 0', 'twice'),
                       ('--teacher gone.safetensors', 'no such file'), ('--samples 1', 'at least 2'), ('--lrs -1', 'above 0'), ('--only runs', 'tests'), ('--only teacher', 'no rings')):
        assert word in refused(capsys, '--scale', 'tiny', '--out', str(tmp_path/'x'), *args.split())

# --- the scheduler, with jobs that only pretend ---

class Job: # what `start` returns: done at once, or when `hold` says
    def __init__(self, folder, plan):
        self.pid, self.code = 0, plan.get(folder.name, 0)
        job = json.loads((folder/'job.json').read_text())
        if self.code == 0:
            r = job['run']
            row = dict(kind='run', name=folder.name, table=r['table'], row=r['row'], budget=r['budget'], seed=r['seed'], objective=r['objective'], lr=job['config']['fit']['lr'], steps=r['steps'],
                       batch=8, samples_per_s=80. if r['objective'] == 'explicit' else 40., seconds=1., diverged=False, meter=dict(psnr=20+(job['config']['fit']['lr'] == 2e-3), own_n=.5), set=r['set'])
            (folder/'result.json').write_text(json.dumps(dict(key=job['key'], wall=r['steps']*.1+1, rows=[row, dict(kind='eval', run=folder.name, set='YCB')])))
            (folder/'student').mkdir(exist_ok=True)
        else: (folder/'log.txt').write_text('first line\nit went wrong\n')
    def poll(self): return self.code if self.code is not None else None
    def wait(self, *a): self.code = 143

@pytest.fixture
def pretend(tmp_path, monkeypatch):
    started, plan = [], {}
    def start(folder, gpu=None, share=1, **env): started.append(folder.name); return Job(folder, plan)
    monkeypatch.setattr(R, 'start', start); monkeypatch.setattr(R, 'told_of', lambda out, s: dict(hash=s, teacher='t')); monkeypatch.setattr(R, 'stop', lambda p: p.wait())
    (tmp_path/'tests').mkdir(); (tmp_path/'tests'/'stage.json').write_text('{"key": "k", "what": ""}')
    def go(runs, **kw):
        a = R.checked(replace(R.ReproduceArgs(), out=tmp_path, jobs=1, cfg=TINY, **kw))
        s = R.Scheduler(a, runs); s.run_all()
        return s
    return go, started, plan, tmp_path

CORE = R.runs_of(TINY, core=True, seeds=(0, 1), lrs=(1e-3, 2e-3), steps=10)
D    = [r for r in CORE if r.row == 'd' or r.table == 'III']

def test_best_rate_twins_and_equal_time(pretend):
    go, started, _, out = pretend
    s = go(D)
    got = {n: r['rows'][0] for n, r in R.results_of(out).items()}
    assert set(got) == {r.name for r in D} and not s.failed and not s.late
    assert started[:2] == ['II-d-lr1e-3-s0', 'II-d-lr2e-3-s0']
    assert got['II-d-s1']['lr'] == got['III-joint-s0']['lr'] == 2e-3 # the better of the two
    assert got['III-explicit-s0']['same_as'] == 'II-d-lr2e-3-s0' and got['III-explicit-s1']['same_as'] == 'II-d-s1' and 'III-explicit-s0' not in started
    assert got['III-joint-time-s0']['steps'] == 5 # half as fast, half the steps
    assert go(D).failed == {} and len(started) == len(set(started)), 'nothing is done twice'

def test_a_failure_stops_nobody_and_is_tried_again(pretend):
    go, started, plan, out = pretend
    plan['II-d-lr1e-3-s0'] = 1
    s = go(D)
    assert list(s.failed) == ['II-d-lr1e-3-s0'] and 'it went wrong' in s.failed['II-d-lr1e-3-s0'] and len(R.results_of(out)) == len(D)-1
    plan.clear(); go(D)
    assert len(R.results_of(out)) == len(D) and started.count('II-d-lr1e-3-s0') == 2

def test_nothing_starts_that_would_end_too_late(pretend):
    go, started, plan, out = pretend
    go(D[:1])
    long = [replace(r, steps=10_000) for r in D[1:3]] # 1,000 s at the speed of the first
    s = go(long, minutes=1)
    assert len(started) == 1 and [r.name for r in s.late] == [r.name for r in long]

def test_time_ends_what_still_runs(pretend):
    go, started, plan, out = pretend
    plan[D[0].name] = None # never ends
    t = time.time(); s = go(D[:1], minutes=.01)
    assert time.time()-t < 5 and [r.name for r in s.late] == [D[0].name] and not s.failed

def test_other_settings_are_refused(pretend):
    go, *_, out = pretend
    go(D[:1])
    with pytest.raises(UserError, match='other settings'): go([replace(D[0], steps=11)])

# --- really ---

@pytest.fixture(scope='module')
def world(tmp_path_factory): # rings, teacher, quadruples, tests
    out = tmp_path_factory.mktemp('reproduce')
    program(out, '--only', 'rings', 'teacher', 'scores', 'quadruples', 'tests')
    return out

@pytest.mark.draws
def test_a_whole_reproduction(world, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(R, 'RECORDS', tmp_path/'records')
    ask = '--runs', 'II-c-*', 'II-d+lookup-*', '--record'
    program(world, *ask)
    assert '2 of 2 runs are done' in capsys.readouterr().out
    lines = (tmp_path/'records'/'reproduce.jsonl').read_text().splitlines()
    rows  = [json.loads(l) for l in lines]
    kinds = {r['kind'] for r in rows}
    assert kinds == {'teacher', 'quadruples', 'floor', 'ceiling', 'run', 'eval', 'figure'}
    for r in rows: assert {'scale', 'config', 'commit', 'device', 'command', 'date'} <= set(r) and r['command'].startswith('python -m dd3g.reproduce')
    run, ev = (next(r for r in rows if r['kind'] == k) for k in ('run', 'eval'))
    assert {'name', 'table', 'row', 'lr', 'seed', 'steps', 'batch', 'samples', 'set', 'objective', 'budget', 'overrides', 'parameters', 'gaussians', 'gflops', 'seconds', 'diverged', 'skipped', 'meter', 'weights'} <= set(run)
    assert run['meter']['pairs'] == 2 and {'psnr', 'ssim', 'rLPIPS-squeeze', 'iou', 'sharpness', 'mean_of_k_psnr', 'best_of_k_psnr', 'energy'} <= set(ev['aligned'])
    assert {'white', 'chroma', 'protocol_hash', 'objects_hash', 'per_object'} <= set(ev)
    for f in [r for r in rows if r['kind'] == 'figure']: assert (tmp_path/'records'/'strips'/f['strip']).stat().st_size <= 60_000
    program(world, *ask)
    again = (tmp_path/'records'/'reproduce.jsonl').read_text().splitlines()
    assert [l for l in again if '"kind": "figure"' not in l] == [l for l in lines if '"kind": "figure"' not in l], 'nothing is recorded twice'

@pytest.mark.draws
def test_pools_begun_at_once_are_the_same_pools(world, monkeypatch, tmp_path):
    "Two GPUs, acted by this process: both share the teacher's pools, a third job makes true views and packs them itself."
    out, began = tmp_path/'two', []
    for k in ('rings', 'teacher'): shutil.copytree(world/k, out/k)
    class Now:
        def __init__(self, folder, gpu=None, share=1, **env):
            began.append((folder.name, gpu, env.get('RANK')))
            with monkeypatch.context() as m:
                for k, v in env.items(): m.setenv(k, v)
                R.worker(folder)
        def wait(self): return 0
        def poll(self): return 0
    monkeypatch.setattr(R, 'gpus', lambda: ['0', '1']); monkeypatch.setattr(R, 'start', Now)
    program(out, '--only', 'quadruples', '--runs', 'premise-true-5-s0', few=[x for x in FEW if x != '--core'])
    assert began == [(p, g, g) for p in ('rendered', 'synthetic') for g in '01']+[('true-5', None, '0')]
    one, two = (R.told_of(o, 'n + 2n') for o in (world, out))
    assert {k: one[k] for k in ('hash', 'views', 'n')} == {k: two[k] for k in ('hash', 'views', 'n')} and R.told_of(out, 'true 5 %')['n'] == 4
    program(out, '--only', 'quadruples', '--runs', 'premise-true-5-s0', few=[x for x in FEW if x != '--core'])
    assert len(began) == 5, 'nothing is made twice'

@pytest.mark.draws
def test_killed_and_continued(world):
    "kill -9 of the scheduler: its worker ends too, and the same command ends where an uninterrupted one does."
    steps = [x if x != '2' or FEW[i-1] != '--steps' else '8' for i, x in enumerate(FEW)]+['--fit.save-every', '2', '--fit.log-every', '2', '--runs', 'II-c-*', '--only', 'runs']
    home = world/'runs'/'II-c-lr1e-3-s0'
    shutil.rmtree(home, ignore_errors=True)
    p = subprocess.Popen([sys.executable, '-m', 'dd3g.reproduce', *steps, '--out', str(world), '--jobs', '1'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time()+90
    while not list((home/'student').glob('checkpoint-*')) and time.time() < end: time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    pid = json.loads((home/'student'/'.lock').read_text() or '{}').get('pid')
    end = time.time()+20
    while pid and Path(f'/proc/{pid}').exists() and time.time() < end: time.sleep(.1)
    assert not pid or not Path(f'/proc/{pid}').exists(), 'the worker outlived its scheduler'
    program(world, few=steps)
    first = json.loads((home/'result.json').read_text())['rows'][0]
    shutil.rmtree(home)
    program(world, few=steps)
    assert json.loads((home/'result.json').read_text())['rows'][0]['weights'] == first['weights'] and first['steps'] == 8

@pytest.mark.draws
def test_a_student_that_diverges_is_a_result(world, monkeypatch):
    def fit(model, loss, data, cfg, out, **kw):
        out.mkdir(parents=True, exist_ok=True); (out/'bad_batches.jsonl').write_text('{}\n')
        raise UserError('10 steps in a row had a NaN or infinite loss')
    monkeypatch.setattr(R, 'fit', fit)
    program(world, '--runs', 'II-a-*', '--only', 'runs', 'report')
    r = R.results_of(world)['II-a-lr1e-3-s0']
    assert r['rows'][0]['diverged'] and r['rows'][0]['meter'] is None and len(r['rows']) == 1 and R.best_lr(R.results_of(world), 'a') is None

@pytest.mark.parametrize('n', [1, 2, 3, 8])
def test_figures_show_what_runs_kept(monkeypatch, tmp_path, n):
    "Views are kept of two cases of each set; a run of an earlier version kept the first two; only what all have is shown, under its own name."
    import torch
    from types import SimpleNamespace as NS
    from safetensors.torch import save_file
    from dd3g.cameras import ring
    from dd3g.testsets import Case, Protocol
    cases = [(Case(f'thing {i}', torch.full((4, 16, 16), i/10), ring(1), ring(4), torch.full((4, 4, 16, 16), 25*i, dtype=torch.uint8), True), '') for i in range(n)]
    monkeypatch.setattr(R, 'sets_of', lambda out: [NS(file='s', name='s', cases=cases, p=Protocol(size=16, input_size=16), drawn=None)])
    monkeypatch.setattr(R, 'best_run', lambda results, table, row: dict(a='new', b='old' if n < 3 else None).get(row))
    few = R.few_of(n)
    assert len(few) == min(n, 2) and all(i < n for i in few) and (n < 4 or 0 not in few)
    kept = dict(new=dict(views=torch.stack([torch.full((4, 3, 16, 16), 10*i, dtype=torch.uint8) for i in few]), cases=torch.tensor(few)), old=dict(views=torch.zeros(min(n, 2), 4, 3, 16, 16, dtype=torch.uint8)))
    for k, x in kept.items(): (tmp_path/'runs'/k).mkdir(parents=True); save_file(x, tmp_path/'runs'/k/'s.views')
    a, wrote = R.ReproduceArgs(scale='tiny', out=tmp_path), []
    (tmp_path/'results'/'strips').mkdir(parents=True)
    R.table_figure(a, lambda kind, **f: wrote.append(f), '6', {})
    assert wrote[0]['rows'] == [f'thing {i}, {s}' for i in few for s in ('side', 'back')] and wrote[0]['columns'][2:] == (['a', 'b'] if n < 3 else ['a'])

def test_figures_without_students_or_rings(world, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(R, 'best_run', lambda *a: None)
    R.make_figures(R.ReproduceArgs(scale='tiny', out=tmp_path)) # no test sets there, none needed
    assert 'need a student' in capsys.readouterr().err
