"Measuring: what was not measured is absent, what failed takes nothing with it, and the plan reads records alone."
import os, subprocess, sys

import pytest
import torch

from dd3g.bench import main
from dd3g.cameras import ring, view_cameras
from dd3g.config import SCALES
from dd3g.core import ROOT, UserError, read_records
from dd3g.generate import Generator
from dd3g.render import render
from dd3g.speed import Clock, Rehearsal, bench_plan, example, forward_of, newest, plan_hours, step_parts, untrained, within

TINY = SCALES['tiny']

def run(capsys, *args):
    try: main([*map(str, args)]); code = 0
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err

def test_program_writes_what_it_prints(tmp_path, capsys):
    code, out, _ = run(capsys, 'train', '--repeats', 1, '--batch', 2, '--objectives', 'joint', '--precision', 'bf16', '--records', tmp_path)
    rows = read_records('bench', tmp_path)
    assert code == 0 and len(out.splitlines()) == len(rows)
    assert {'train.warmup_s', 'train.samples_per_s'} <= {r['bench'] for r in rows}
    for r in rows: assert {'scale', 'batch', 'value', 'unit', 'device', 'n_gpus', 'commit', 'dirty', 'versions', 'command'} <= set(r) and r['value'] > 0
    if not torch.cuda.is_available(): assert not {'train.peak_gb', 'train.scaling_efficiency'} & {r['bench'] for r in rows} # absent, not zero

@pytest.mark.parametrize('args', [['speed'], ['train', '--objectives', 'both'], ['train', '--precision', 'half'], ['plan', '--scale', 'paper']])
def test_mistakes_are_one_line(args, tmp_path, capsys):
    code, out, err = run(capsys, *args, '--records', tmp_path)
    assert code == 2 and out == '' and len([l for l in err.splitlines() if l.startswith('dd3g:')]) == 1

def test_failing_part_leaves_the_others():
    def good(): yield 1
    def bad(): yield 2; raise RuntimeError('no')
    clock = Clock(60); clock.say = lambda text: None
    assert list(within(clock, [good, bad, good])) == [1, 2, 1]
    assert list(within(Clock(-1), [good])) == []

def test_prepared_generator_stays_close_and_leaves_the_model_alone():
    gen = Generator.from_pretrained(where='cpu')
    pics, cams = sorted((ROOT/'figures'/'inputs').glob('*.png'))[:2], ring(4)
    views = lambda: torch.stack([render(gen(p, 3), cams, 64).rgb for p in pics])
    before, model = views(), gen.model
    assert gen.fast(1, 'bf16') > 0 and gen.model is not model and next(model.parameters()).dtype == torch.float32
    assert -10*(views()-before).square().flatten(1).mean(1).max().log10() >= 40
    assert gen.recorded == {} # no GPU here

def test_fast_in_float32_changes_nothing():
    gen = untrained(TINY)
    a = forward_of(gen, 2)()
    gen.fast(2, 'fp32')
    assert torch.allclose(forward_of(gen, 2)().mu, a.mu, atol=1e-6)

def test_training_is_what_the_loop_does():
    "A rehearsal's step moves weights and verifies; its parts have all the names."
    re = Rehearsal(TINY, 'joint', 2)
    before = re.net.pd.anchor.clone()
    re.step()
    assert not torch.equal(before, re.net.pd.anchor) and re.run.done == re.cfg.fit.steps//2+1
    assert list(step_parts(re)) == ['encoders', 'PE', 'PD', 'rasteriser', 'MSE and LPIPS', 'VAE encoder', 'verifier', 'optimiser']

def known(**kw): return dict(dict(scale='paper', device='x'), **kw)

def test_plan_from_records(tmp_path):
    rows = [known(bench='rollout.quadruples_per_s', value=40., n_gpus=4), known(bench='train.samples_per_s', value=10., objective='joint', batch=6),
            known(bench='train.samples_per_s', value=25., objective='joint', batch=12), known(bench='train.samples_per_s', value=90., objective='explicit', batch=12),
            known(bench='train.samples_per_s', value=99., objective='joint', batch=12, device='y')]
    got = plan_hours(rows, 2_800_000, [0, 2])
    assert [round(r['total'], 3) for r in got] == [round(2_800_000/10/3600, 3), round(2_800_000/10/3600+2*2_800_000/25/3600, 3)] and {r['device'] for r in got} == {'x'}
    assert plan_hours(rows[1:], 10, [1]) == [] and plan_hours(rows[:1], 10, [1]) == []
    with pytest.raises(UserError, match='not both been measured'): list(bench_plan(SCALES['paper'], records=tmp_path))

def test_newer_numbers_replace_older_ones():
    rows = [known(bench='a', value=1., batch=2), known(bench='a', value=2., batch=2), known(bench='a', value=3., batch=4), known(what='a', value=4., batch=4)]
    assert [r['value'] for r in newest(rows)] == [2., 4.]

def test_efficiency_of_two_processes(tmp_path):
    "Under torchrun: one record of each number, and the rate of one process alone from the same run."
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'dd3g.bench', 'train', '--batch', '2', '--repeats', '1', '--objectives', 'explicit', '--records', str(tmp_path)]
    r = subprocess.run(cmd, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=300)
    rows = {x['bench']: x for x in read_records('bench', tmp_path)}
    assert r.returncode == 0 and list(rows) == ['train.warmup_s', 'train.samples_per_s', 'train.scaling_efficiency'], r.stderr[-2000:]
    e, rate = rows['train.scaling_efficiency'], rows['train.samples_per_s']
    assert (rate['processes'], rate['batch']) == (2, 4) and 0 < e['value'] and e['value'] == pytest.approx(rate['value']/(2*e['alone_per_s']), rel=1e-2)

def test_price_of_determinism(tmp_path, capsys):
    "On a CPU nothing is compiled, so the two rates are of one thing."
    code, out, _ = run(capsys, 'deterministic', '--repeats', 1, '--steps', 2, '--rollout-batch', 2, '--records', tmp_path)
    row, = read_records('bench', tmp_path)
    assert code == 0 and row['bench'] == 'rollout.deterministic_price' and not row['compile'] and row['value'] == pytest.approx(row['without']/row['with_rule'], rel=.01)

@pytest.mark.cuda
def test_recording_replays_the_forward_pass():
    gen = untrained(TINY)
    b = example(TINY, 2, gen.device)
    cams = view_cameras(TINY.view, torch.tensor([0., 30.]), 0., gen.device)
    with torch.no_grad(): want = gen.model(b['image'], b['noise'], cams)
    gen.fast(2, 'fp32')
    got, other = gen.recorded[2](b['image'], b['noise'], cams), gen.recorded[2](1-b['image'], -b['noise'], cams)
    assert torch.allclose(got.mu, want.mu, atol=1e-4) and torch.allclose(got.color, want.color, atol=1e-3)
    assert not torch.allclose(other.mu, want.mu, atol=1e-6) and got.mu.data_ptr() != other.mu.data_ptr()
