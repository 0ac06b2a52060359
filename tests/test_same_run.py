"Comparing runs: the orchestration with quick stand-ins for `python -m dd3g.train` (the real ones are compared in test_distributed and test_train)."
import subprocess, sys
from dataclasses import replace

import pytest

import dd3g.same_run as S
from dd3g.bench import main
from dd3g.config import SCALES
from dd3g.core import UserError, read_records

TINY = SCALES['tiny']
RUN = """
import json, sys, time
from pathlib import Path
out, steps, off = Path(sys.argv[1])/'student', int(sys.argv[2]), float(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
mark = out/f'checkpoint-{steps//2:07d}.safetensors'
resumed = mark.exists()
rows = (out/'log.jsonl').read_text().splitlines()[:steps//2] if resumed else []
for i in range(len(rows), steps):
    rows.append(json.dumps(dict(step=i+1, loss=1+.1*i+off*(resumed or 'one' not in str(out)))))
    (out/'log.jsonl').write_text('\\n'.join(rows)+'\\n')
    if i+1 == steps//2: mark.touch()
    time.sleep(.02 if resumed else .1)
if off < 0: print('dd3g: it went wrong'); print('and more'); sys.exit(2)
"""

@pytest.fixture
def quick(tmp_path, monkeypatch):
    "Runs that only write logs; `off` is added to the losses of the second and of the resumed one."
    (tmp_path/'run.py').write_text(RUN)
    state = dict(off=0., begun=[])
    def begin(folder, cfg, scale, name, n=1):
        state['begun'].append((name, n, cfg.fit.accumulate))
        with open(folder/f'{name}.txt', 'a') as f: return subprocess.Popen([sys.executable, str(tmp_path/'run.py'), str(folder/name), str(cfg.fit.steps), str(state['off'])], stdout=f, stderr=f, start_new_session=True)
    monkeypatch.setattr(S, 'begin', begin); monkeypatch.setattr(S, 'small_stage', lambda cfg, folder: None)
    return state

def test_a_killed_run_is_compared(quick, tmp_path):
    main(['resume', '--steps', '10', '--records', str(tmp_path)])
    rows = {r['bench']: r for r in read_records('bench', tmp_path)}
    gap = rows['train.resume_gap']
    assert (gap['value'], rows['train.resume_spread']['value']) == (0, 0) and gap['saved_at'] == 5 <= gap['killed_at'] < 10
    assert [b[0] for b in quick['begun']] == ['one', 'two', 'killed', 'killed']

def test_a_difference_is_seen(quick):
    quick['off'] = .3
    rows = {k: (v, w) for k, v, _, w in S.bench_resume(TINY, steps=10)}
    assert rows['train.resume_spread'][0] == pytest.approx(.3/1.5) and rows['train.resume_gap'][0] == pytest.approx(0) # as far from the first as the second is
    (key, v, _, what), = S.bench_equal(TINY, gpus=4, steps=10)
    assert key == 'train.equal_curves' and v == pytest.approx(.0) and what['processes'] == 4 and quick['begun'][-2:] == [('parts', 1, 4), ('processes', 4, 1)]

def test_a_run_that_fails_says_why(quick):
    quick['off'] = -1.
    with pytest.raises(UserError, match='parts: python -m dd3g.train failed: dd3g: it went wrong$'): list(S.bench_equal(TINY, steps=2))

def test_commands(tmp_path, monkeypatch):
    "One process is started plainly, several by torchrun; overrides travel as flags."
    seen = []
    monkeypatch.setattr(S.subprocess, 'Popen', lambda cmd, **kw: seen.append((cmd, kw['env'])))
    c = replace(TINY, fit=replace(TINY.fit, steps=3), loss=replace(TINY.loss, implicit=False))
    monkeypatch.setenv('RANK', '1')
    for n in (1, 3): S.begin(tmp_path, c, 'tiny', 'x', n)
    (one, env), (three, _) = seen
    assert one[1:5] == ['-m', 'dd3g.train', '--scale', 'tiny'] and one[-3:] == ['--loss.no-implicit', '--fit.steps', '3'] and 'RANK' not in env
    assert three[1:7] == ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '3', '-m']

def test_the_stage_is_set(tmp_path):
    c = replace(TINY, fit=replace(TINY.fit, batch=2), rollout_batch=8)
    S.small_stage(c, tmp_path)
    from dd3g.rollout import Quadruples
    from dd3g.teacher import Teacher
    data = Quadruples(tmp_path/'quads')
    assert len(data) == 8 and data.settings['teacher'] == Teacher.load(tmp_path/'teacher.safetensors').fingerprint()
