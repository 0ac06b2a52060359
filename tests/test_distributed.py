"Several processes with gloo on CPUs: the run of one; compiled in one piece; folders that are not shared."
import os, re, socket, subprocess, sys
from pathlib import Path

import pytest, torch

from dd3g.loop import read_log
from dd3g.train import main

SMALL = ('--objects 4 --quadruples 8 --rollout-batch 8 --fit-ae.steps 2 --fit-teacher.steps 2 --fit-ae.batch 4 --fit-teacher.batch 4 --diffusion.sample-steps 4 --pairs 0 '
         '--student.gaussians-per-token 2 --student.pd-blocks 5 --loss.sds-every 10 --loss.lambda-lpips 0 --fit.batch 4 --fit.log-every 1 --fit.save-every 1000 --fit.grid-every 1000 --fit.warmup 0').split()

def torchrun(n, *args, **env):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **env}
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(n), '--master-port', str(port), *map(str, args)], env=env, capture_output=True, text=True, timeout=300)

def test_two_times_two_is_one(tmp_path):
    "Joint objective, 50 steps at the paper's learning rate: 2 processes x 2 parts of the batch draw the loss curve of one process."
    common = [*SMALL, '--fit.steps', '50', '--fit.lr', '1e-5']
    main([*common, '--out', str(tmp_path/'one')])
    q = ['--quads', tmp_path/'one'/'quads', '--teacher', tmp_path/'one'/'teacher'/'teacher.safetensors']
    r = torchrun(2, '-m', 'dd3g.train', *common, *q, '--out', tmp_path/'two', '--fit.accumulate', '2')
    assert r.returncode == 0, r.stderr[-2000:]
    one, two = read_log(tmp_path/'one'/'student'), read_log(tmp_path/'two'/'student')
    assert [x['step'] for x in one] == [x['step'] for x in two] == list(range(1, 51)) and any('iv' in x for x in one)
    worst = max(abs(a['loss']-b['loss'])/abs(a['loss']) for a, b in zip(one, two))
    assert worst < 1e-3, worst
    assert r.stderr.count('held-out') == 0 and len(re.findall(r'dd3g: student:', r.stderr)) == 1 # one process speaks
    r = torchrun(2, '-m', 'dd3g.train', *common, *q, '--out', tmp_path/'no', '--fit.accumulate', '4')
    assert r.returncode != 0 and 'batch=4 cannot be cut into 2 processes x 4 parts' in r.stderr

CHILD = """
import os, sys, torch
from torch import nn
from dataclasses import replace
from torch._dynamo.backends.registry import lookup_backend
from dd3g.config import FitConfig
from dd3g.core import UserError
from dd3g.loop import TensorData, fit
torch.set_num_threads(1)
graphs, plain = [], nn.Module.compile
def count(gm, inputs): graphs.append(gm); return lookup_backend('aot_eager')(gm, inputs)
nn.Module.compile = lambda self: plain(self, backend=count) # the C++ compiler is not what is tested
class Net(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b, self.c, self.o = nn.Linear(64, 6000), nn.Linear(6000, 600), nn.Linear(600, 6000), nn.Linear(6000, 1) # 31 MB: more than one bucket
    def forward(self, x): return self.o(self.c(self.b(self.a(x).relu()).relu()).relu())
x = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
loss = lambda m, b, i, g: (((m(b['x'])-b['y'])**2).mean(), {})
def go(out, **more):
    torch.manual_seed(0)
    return fit(Net(), loss, TensorData(x=x, y=x.sum(1, keepdim=True)), replace(FitConfig(steps=3, batch=4, lr=1e-4, save_every=3, log_every=1), **more), out, device='cpu', quiet=True)
out, rank = sys.argv[1], os.environ['RANK']
go(out, compile=True)
os.write(1, f'graphs {len(graphs)}\\n'.encode()) # in one piece: two processes share the pipe
try: go(out if rank == '0' else out+rank, steps=4) # the second process sees another, empty folder
except UserError as e: os.write(1, f'{e}\\n'.encode())
"""

def test_compiled_in_one_piece_and_shared_folders(tmp_path):
    (tmp_path/'child.py').write_text(CHILD)
    r = torchrun(2, tmp_path/'child.py', tmp_path/'run')
    assert r.stdout.count('graphs 1') == 2, r.stdout+r.stderr[-2000:]
    assert 'checkpoints of different steps there (3, 0)' in r.stdout, r.stdout+r.stderr[-2000:] # whoever says it first ends; the other may only see him gone
    loss = [x['loss'] for x in read_log(tmp_path/'run')]
    assert loss[-1] < loss[0]
