"""The training loop under what happens to long runs: kill -9, several processes, bf16, a changed configuration."""
import errno, json, os, signal, socket, subprocess, sys, time, types
from dataclasses import asdict, replace

import pytest, torch
from torch import nn

from dd3g.config import FitConfig
from dd3g.core import UserError, cli
from dd3g.loop import Muon, Run, TensorData, checkpoints, draw, fit, load_weights, matrices, orthogonal, read_log, read_tensors, refuse_changes, resume, tensors_of

CFG = FitConfig(steps=20, batch=8, lr=.05, warmup=3, cosine=True, ema=.9, save_every=5, log_every=5, grid_every=10)
SCRIPT = """
import sys, time, torch
sys.path.insert(0, {here!r})
from test_loop import CFG, data, loss_of, model
from dataclasses import replace
from dd3g.loop import fit
fit(model(), loss_of({slow}), data(), replace(CFG, **{more}), {out!r}, device='cpu', quiet=True)
"""

def data():
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(1))
    return TensorData(x=x, y=x.sum(1, keepdim=True))

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16, affine=False, momentum=None), nn.Dropout(.1), nn.Linear(16, 1))

def plain_model():
    torch.manual_seed(0)
    return nn.Linear(4, 1)

def loss_of(slow=0.):
    def loss(m, batch, step, gen):
        time.sleep(slow)
        mse = ((m(batch['x'])-batch['y']+.1*draw(gen, torch.randn, len(batch['x']), 1))**2).mean()
        return mse, dict(mse=mse, twice=2.)
    return loss

def child(out, slow=0., env=None, **more):
    code = SCRIPT.format(here=os.path.dirname(__file__), slow=slow, more=more, out=str(out))
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})})

def last(out): return read_tensors(checkpoints(out)[-1])[0]

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def test_kill_9_and_continue(tmp_path):
    fit(model(), loss_of(), data(), CFG, tmp_path/'straight', device='cpu', quiet=True)
    p = child(tmp_path/'killed', slow=.1)
    t0 = time.time()
    while not checkpoints(tmp_path/'killed') and time.time()-t0 < 60: time.sleep(.02)
    time.sleep(.15)
    assert p.poll() is None, 'it should still be running'
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert not (tmp_path/'killed'/'student.safetensors').exists()
    fit(model(), loss_of(), data(), CFG, tmp_path/'killed', device='cpu', quiet=True)
    a, b = last(tmp_path/'straight'), last(tmp_path/'killed')
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    drop = lambda rows: [{k: v for k, v in r.items() if k != 'samples_per_s'} for r in rows]
    assert drop(read_log(tmp_path/'straight')) == drop(read_log(tmp_path/'killed'))

def test_a_live_run_owns_its_folder(tmp_path):
    p = child(tmp_path/'run', slow=.2)
    try:
        t0 = time.time()
        while not (tmp_path/'run'/'.lock').exists() and time.time()-t0 < 60: time.sleep(.05)
        time.sleep(.1)
        with pytest.raises(UserError, match='another live run'): fit(model(), loss_of(), data(), CFG, tmp_path/'run', device='cpu', quiet=True)
    finally: p.kill(); p.wait()

def test_two_processes_make_the_run_of_one(tmp_path):
    "Equal global batch: the same samples, the same noise, the same weights up to rounding."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    code = SCRIPT.format(here=os.path.dirname(__file__), slow=0, more={}, out=str(tmp_path/'two')).replace('model()', 'plain_model()').replace(', model', ', plain_model')
    env = lambda r: {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'true', 'RANK': str(r), 'LOCAL_RANK': str(r), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    ps = [subprocess.Popen([sys.executable, '-c', code], env=env(r)) for r in range(2)]
    assert [p.wait(timeout=120) for p in ps] == [0, 0]
    fit(plain_model(), loss_of(), data(), CFG, tmp_path/'one', device='cpu', quiet=True)
    one, two = read_log(tmp_path/'one'), read_log(tmp_path/'two')
    assert [r['step'] for r in one] == [r['step'] for r in two]
    for a, b in zip(one, two): assert abs(a['loss']-b['loss']) <= 1e-5*a['loss']
    for k, v in last(tmp_path/'one').items(): torch.testing.assert_close(v, last(tmp_path/'two')[k], rtol=1e-5, atol=1e-6)

def test_bf16_prefetch_frozen_and_extra(tmp_path):
    net, count = model(), torch.zeros(1)
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.clone()
    def loss(m, batch, step, gen):
        count.add_(1)
        assert torch.is_autocast_enabled('cpu') if hasattr(torch, 'is_autocast_enabled') else True
        return loss_of()(m, batch, step, gen)
    got = fit(net, loss, data(), replace(CFG, precision='bf16', accumulate=2), tmp_path, device='cpu', prefetch=2, extra_state=dict(count=count), quiet=True)
    t = last(tmp_path)
    assert t['extra.count'].item() == 40 and 'weights.0.weight' not in t and torch.equal(got[0].weight, frozen)
    assert all(v.dtype == torch.float32 for k, v in t.items() if 'num_batches' not in k)
    rows = read_log(tmp_path)
    assert rows[-1]['twice'] == 2. and rows[-1]['loss'] < rows[0]['loss'] and rows[-1]['step'] == 20
    state, config = load_weights(tmp_path/'student.safetensors', 'student')
    assert torch.equal(state['0.weight'], frozen) and config['steps'] == 20
    assert len(checkpoints(tmp_path)) == CFG.keep

def test_compiled_names(tmp_path):
    "Compiling in place leaves the names of weights alone (checked without running the compiler)."
    net = plain_model(); net.compile()
    assert list(net.state_dict()) == ['weight', 'bias']

def test_refusals(tmp_path):
    fit(plain_model(), loss_of(), data(), CFG, tmp_path/'a', device='cpu', quiet=True)
    small = TensorData(**{k: v[:40] for k, v in data().tensors.items()})
    for d, cfg, net, says in [(data(), replace(CFG, lr=.1), plain_model(), 'fit.lr was 0.05'), (small, CFG, plain_model(), 'samples was 50, is 40'), (data(), CFG, model(), 'another model')]:
        with pytest.raises(UserError, match=says): fit(net, loss_of(), d, cfg, tmp_path/'a', device='cpu', quiet=True)
    fit(plain_model(), loss_of(), data(), replace(CFG, lr=.1), tmp_path/'a', device='cpu', quiet=True, force=True)
    with pytest.raises(UserError, match='multiple of 3'): fit(plain_model(), loss_of(), data(), replace(CFG, accumulate=3), tmp_path/'b', device='cpu', quiet=True)
    with pytest.raises(UserError, match='no samples'): fit(plain_model(), loss_of(), TensorData(x=torch.zeros(0, 4)), CFG, tmp_path/'c', device='cpu', quiet=True)
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='choose another folder'): fit(plain_model(), loss_of(), data(), CFG, tmp_path/'file'/'d', device='cpu', quiet=True)

def test_log_survives_a_cut_line(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [dict(step=1, loss=2.)]

def test_cut_line_is_repaired_on_continuing(tmp_path):
    "A crash in the middle of a line must not swallow the next one."
    fit(plain_model(), loss_of(), data(), CFG, tmp_path, device='cpu', quiet=True)
    with open(tmp_path/'log.jsonl', 'a') as f: f.write('{"step": 20, "lo')
    (tmp_path/'student.safetensors').unlink()
    fit(plain_model(), loss_of(), data(), replace(CFG, steps=25), tmp_path, device='cpu', quiet=True)
    assert [r['step'] for r in read_log(tmp_path)] == [5, 10, 15, 20, 25] and len((tmp_path/'log.jsonl').read_text().splitlines()) == 5

def test_lock_of_the_dead_and_of_the_living(tmp_path):
    "Killed here: taken over at once. On another machine: after a minute of silence."
    lock = tmp_path/'.lock'
    go = lambda: fit(plain_model(), loss_of(), data(), replace(CFG, steps=5), tmp_path, device='cpu', quiet=True)
    lock.write_text(json.dumps(dict(pid=2**22+1, host='node-b')))
    with pytest.raises(UserError, match='process 4194305 on node-b, last sign of life'): go()
    os.utime(lock, (time.time()-90,)*2); go()
    lock.write_text(json.dumps(dict(pid=2**22+1, host=socket.gethostname()))); go()
    lock.write_text('half a li'); go()
    assert lock.read_text() == ''

def test_without_file_locks_the_process_is_looked_up(tmp_path, monkeypatch):
    import fcntl
    from dd3g.loop import only_one
    def none(*a): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', none)
    lock, alive = tmp_path/'.lock', os.getppid()
    lock.write_text(json.dumps(dict(pid=alive, host=socket.gethostname())))
    with pytest.raises(UserError, match=f'process {alive} on'):
        with only_one(tmp_path): pass
    lock.write_text(json.dumps(dict(pid=2**22+1, host=socket.gethostname())))
    with only_one(tmp_path): assert json.loads(lock.read_text())['pid'] == os.getpid()

def test_bad_batches_are_named_and_limited(tmp_path):
    class Named(TensorData):
        def ids(self, rows): return [f'sample {i}' for i in rows]
    bad = lambda at: (lambda m, b, step, gen: ((loss_of()(m, b, step, gen)[0]*float('nan') if step in at else loss_of()(m, b, step, gen)[0]), {}))
    got = fit(plain_model(), bad({7}), Named(**data().tensors), CFG, tmp_path/'one', device='cpu', quiet=True)
    row, = [json.loads(l) for l in (tmp_path/'one'/'bad_batches.jsonl').read_text().splitlines()]
    assert row['step'] == 7 and len(row['samples']) == 8 and row['ids'] == [f'sample {i}' for i in row['samples']] and got.weight.isfinite().all()
    assert read_tensors(checkpoints(tmp_path/'one')[-1])[1]['skipped'] == 1 # counted
    for at, more, says in [(set(range(4, 99)), dict(patience=5), 'steps in a row had a NaN'), (set(range(0, 99, 2)), dict(limit=4), 'of 10 steps had a NaN')]:
        with pytest.raises(UserError, match=says) as e: fit(plain_model(), bad(at), data(), CFG, tmp_path/says[:5], device='cpu', quiet=True, **more)
        assert 'bad_batches.jsonl' in str(e.value) and '\n' not in str(e.value)

def test_full_disk_stops_cleanly(tmp_path, monkeypatch, capsys):
    "One line, code 2, the last checkpoint whole, no half-written file; with room again the run is the uninterrupted one."
    import safetensors.torch
    from safetensors import SafetensorError
    fit(plain_model(), loss_of(), data(), CFG, tmp_path/'a', device='cpu', quiet=True)
    save, n = safetensors.torch.save_file, []
    def full(tensors, path, **kw):
        n.append(1)
        if len(n) < 3: return save(tensors, path, **kw)
        open(path, 'wb').write(b'half'); raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(SystemExit) as e, cli(): fit(plain_model(), loss_of(), data(), CFG, tmp_path/'b', device='cpu', quiet=True)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and len(err.splitlines()) == 1 and 'free some space' in err
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path/'b')] == ['checkpoint-0000005.safetensors', 'checkpoint-0000010.safetensors'] and not list((tmp_path/'b').glob('.*.tmp*'))
    fit(plain_model(), loss_of(), data(), CFG, tmp_path/'b', device='cpu', quiet=True)
    assert all(torch.equal(v, last(tmp_path/'b')[k]) for k, v in last(tmp_path/'a').items())

def test_parts_may_change_between_run_and_continuation(tmp_path):
    fit(plain_model(), loss_of(), data(), replace(CFG, steps=10), tmp_path, device='cpu', quiet=True)
    fit(plain_model(), loss_of(), data(), replace(CFG, accumulate=2), tmp_path, device='cpu', quiet=True)
    with pytest.raises(UserError, match='fit.batch was 8, is 16.*--force'): fit(plain_model(), loss_of(), data(), replace(CFG, steps=30, batch=16), tmp_path, device='cpu', quiet=True)

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_what_is_restored_is_what_was_saved(tmp_path, device):
    "Weights, averages, moments, the extra tensor and the step: bit for bit, on any device."
    c = replace(CFG, steps=5, batch=4, precision='bf16')
    extra = lambda: dict(scale=torch.zeros(3, device=device))
    first = extra(); first['scale'] += 7
    fit(model(), loss_of(), data(), c, tmp_path, device=device, quiet=True, extra_state=first)
    run = Run(model(), loss_of(), replace(c, steps=10), tmp_path, dict(kind='student', samples=50, fit=asdict(c), config=asdict(c)), device, extra_state=extra())
    assert not resume(run, 'student') and run.done == 5
    own, saved = tensors_of(run), last(tmp_path)
    assert own.keys() == saved.keys() and all(v.device.type == device and torch.equal(v.cpu(), saved[k]) for k, v in own.items()) and own['extra.scale'][0] == 7

def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 1))

def test_muon_stops_and_continues(tmp_path):
    "A run that is stopped in the middle ends as one that was not, and not where Adam ends."
    c = replace(CFG, muon=2.)
    def stopping(m, batch, step, gen):
        if step == 12: raise KeyboardInterrupt
        return loss_of()(m, batch, step, gen)
    assert matrices(wide_model()) == ['2.weight', '4.weight']
    fit(wide_model(), loss_of(), data(), c, tmp_path/'a', device='cpu', quiet=True)
    with pytest.raises(KeyboardInterrupt): fit(wide_model(), stopping, data(), c, tmp_path/'b', device='cpu', quiet=True)
    fit(wide_model(), loss_of(), data(), c, tmp_path/'b', device='cpu', quiet=True)
    fit(wide_model(), loss_of(), data(), CFG, tmp_path/'c', device='cpu', quiet=True)
    a, b = last(tmp_path/'a'), last(tmp_path/'b')
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert not torch.equal(a['weights.2.weight'], last(tmp_path/'c')['weights.2.weight'])
    with pytest.raises(UserError, match='fit.muon was 2.0, is 0.0'): fit(wide_model(), loss_of(), data(), replace(CFG, steps=30), tmp_path/'a', device='cpu', quiet=True)

def test_a_run_older_than_a_field_goes_on(tmp_path):
    "A folder made before `muon` existed is continued by Adam, and refused to Muon."
    c = replace(CFG, steps=10)
    fit(wide_model(), loss_of(), data(), c, tmp_path, device='cpu', quiet=True)
    run = Run(wide_model(), loss_of(), c, tmp_path, dict(kind='student', samples=50, fit=asdict(c), config={}), 'cpu')
    old = dict(run.head, fit={k: v for k, v in run.head['fit'].items() if k != 'muon'})
    refuse_changes(run, old)
    run.head = dict(run.head, fit=asdict(replace(c, muon=2.)))
    with pytest.raises(UserError, match='fit.muon was None, is 2.0'): refuse_changes(run, old)

def test_a_matrix_without_gradient_stays(tmp_path):
    "A layer that no loss has reached yet does not move; nor does its momentum leave zero."
    m = wide_model(); params = dict(m.named_parameters()); opt = Muon(params, replace(CFG, muon=2.), matrices(m))
    before = params['4.weight'].detach().clone()
    m[2](torch.rand(8, 16)).square().mean().backward(); opt.step(.1, torch.zeros(()))
    assert torch.equal(params['4.weight'], before) and not opt.state()['m.4.weight'].any() and opt.state()['m.2.weight'].any()

@pytest.mark.cuda
def test_muon_on_a_gpu_goes_the_same_way():
    "bfloat16 there, float32 here: nearly the same direction, all singular values near one."
    x = torch.randn(5, 48, 128, generator=torch.Generator().manual_seed(0))
    a, b = orthogonal(x), orthogonal(x.cuda()).cpu()
    assert torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).min() > .99 and .6 < torch.linalg.svdvals(b).min() and torch.linalg.svdvals(b).max() < 1.3

def test_boards_get_numbers_and_pictures(tmp_path, monkeypatch):
    "TensorBoard's file appears by itself; Weights & Biases when asked for."
    seen = []
    run = types.SimpleNamespace(log=lambda row, step: seen.append((step, set(row))), finish=lambda: seen.append('end'))
    wb = types.ModuleType('wandb'); wb.init, wb.Image = lambda **kw: seen.append(kw['project']) or run, lambda x: x.shape
    wb.__spec__ = types.SimpleNamespace(name='wandb')
    grid = lambda m, step: dict(psnr=1., grid=torch.rand(3, 8, 16))
    monkeypatch.setitem(sys.modules, 'wandb', wb)
    fit(plain_model(), loss_of(), data(), CFG, tmp_path, device='cpu', quiet=True, on_grid=grid, wandb='dd3g')
    assert seen[0] == 'dd3g' and seen[-1] == 'end' and (10, {'psnr', 'grid'}) in seen and any('loss' in x[1] for x in seen[1:-1])
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    acc = events.EventAccumulator(str(tmp_path/'tensorboard')); acc.Reload()
    assert {'loss', 'lr', 'psnr'} <= set(acc.Tags()['scalars']) and acc.Tags()['images'] == ['grid']
    assert [e.step for e in acc.Scalars('loss')] == [5, 10, 15, 20]

def test_wandb_missing_is_one_line(tmp_path, monkeypatch):
    import dd3g.loop as L
    find = L.importlib.util.find_spec
    monkeypatch.setattr(L.importlib.util, 'find_spec', lambda n, *a: None if n == 'wandb' else find(n, *a))
    with pytest.raises(UserError, match='pip install wandb'): fit(plain_model(), loss_of(), data(), CFG, tmp_path, device='cpu', quiet=True, wandb='dd3g')
