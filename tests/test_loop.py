"""The training loop under what happens to long runs: kill -9, several processes, bf16, a changed configuration."""
import json, os, signal, socket, subprocess, sys, time
from dataclasses import replace

import pytest, torch
from torch import nn

from dd3g.config import FitConfig
from dd3g.core import UserError
from dd3g.loop import TensorData, checkpoints, draw, fit, load_weights, read_log, read_tensors

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
