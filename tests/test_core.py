"Promises of `dd3g.core` that a notebook cannot show: a full disk, other processes, other builds of torch."
import errno, os, subprocess, sys

import pytest, torch
from dd3g.core import UserError, cli, fix_torchvision, read_records, record, seed_of, seeded_randn, sha, whole_file

def python(code, **env): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **env})

def stopped(capsys, fn):
    "Run `fn` inside `cli`: exit code, lines on stderr."
    with pytest.raises(SystemExit) as e:
        with cli(): fn()
    return e.value.code, capsys.readouterr().err.splitlines()

def raiser(e):
    def f(): raise e
    return f

@pytest.mark.parametrize('error, code', [(UserError('duck.jpg: no such\nfile'), 2), (KeyboardInterrupt(), 130),
    (OSError(errno.ENOSPC, 'No space left on device', 'x.ply'), 2), (OSError(errno.EROFS, 'Read-only file system', 'x.ply'), 2)])
def test_cli_says_one_line(capsys, error, code):
    got, lines = stopped(capsys, raiser(error))
    assert (got, len(lines)) == (code, 1) and lines[0].startswith('dd3g: ')

def test_cli_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        with cli(): 1/0

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    (tmp_path/'a.ply').write_text('old')
    def save():
        with whole_file(tmp_path/'a.ply') as tmp:
            tmp.write_text('half')
            with open('/dev/full', 'w') as f: f.write('the rest') # the kernel's own "No space left on device"
    code, lines = stopped(capsys, save)
    assert (code, len(lines)) == (2, 1) and 'No space' in lines[0]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {'a.ply': 'old'}

def test_folders_that_cannot_be(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='choose another folder'):
        with whole_file(tmp_path/'file'/'a.png'): pass

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match='cannot write there'):
        with whole_file(tmp_path/'a.png'): pass

def test_a_killed_writer_leaves_the_old_file(tmp_path):
    (tmp_path/'a.txt').write_text('old')
    r = python(f'import os\nfrom dd3g.core import whole_file\nwith whole_file({str(tmp_path/"a.txt")!r}) as t: t.write_text("half"); os._exit(9)')
    assert r.returncode == 9 and (tmp_path/'a.txt').read_text() == 'old'

def test_golden_noise():
    "Quadruples on disk hold seeds, not noise: these numbers may never change."
    assert seed_of('noise', 'mug-0001', 7) == 7960222415386884258
    want = torch.tensor([[1.5410, -.2934, -2.1788], [-.1468, .7861, .9468]])
    assert torch.allclose(seeded_randn([0, 7], 3), want, atol=1e-4)
    assert sha('duck') == sha(b'duck') and sha(torch.zeros(2)) != sha(torch.zeros(2, 1))

def test_records_survive_writers_side_by_side(tmp_path):
    code = f'from dd3g.core import record\nfor i in range(5): record("r", root={str(tmp_path)!r}, i=i)'
    procs = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    assert [p.wait() for p in procs] == [0, 0]
    rows = read_records('r', root=tmp_path)
    assert sorted(r['i'] for r in rows) == sorted(2*list(range(5))) and all(r['torch'] == torch.__version__ for r in rows)
    assert read_records('none', root=tmp_path) == []

def test_whatever_torchvision_is_here_its_users_import():
    r = python('from dd3g.core import fix_torchvision; fix_torchvision(); import torchvision, lpips, torchmetrics, timm, open_clip\nfrom diffusers import AutoencoderKL')
    assert r.returncode == 0, r.stderr[-2000:]

def test_a_fitting_pair_is_left_alone():
    code = 'import torch; torch.version.cuda = "13.0"\nimport dd3g.core as c\nassert c.fix_torchvision() is False and c._tv_lib is None'
    r = python(code)
    assert r.returncode == 0, r.stderr[-2000:]
