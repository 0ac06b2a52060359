"What all tests share: quiet, offline, repeatable surroundings, and a plain word where a machine cannot draw meshes."
import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(HF_HUB_OFFLINE='1', MPLBACKEND='agg', OMP_NUM_THREADS='1', TQDM_MININTERVAL='5') # for tests and their children
if sys.platform.startswith('linux'): SETTINGS['PYOPENGL_PLATFORM'] = 'egl' # pyrender without a display
for k, v in SETTINGS.items(): os.environ.setdefault(k, v)

_DRAW = '''
import pyrender, trimesh, numpy as np
s = pyrender.Scene(); s.add(pyrender.Mesh.from_trimesh(trimesh.creation.box()))
eye = np.eye(4); eye[2, 3] = 3; s.add(pyrender.PerspectiveCamera(1.), pose=eye)
r = pyrender.OffscreenRenderer(8, 8); assert r.render(s)[1].max() > 2; r.delete()
'''
_drawn = []

def cannot_draw(): # None, or why pyrender cannot draw here
    "Draw one box in a process of its own: a missing or broken EGL may end it."
    if not _drawn:
        r = subprocess.run([sys.executable, '-c', _DRAW], capture_output=True, text=True)
        _drawn.append(None if r.returncode == 0 else (r.stderr.strip().splitlines() or ['crashed'])[-1])
    return _drawn[0]

def pytest_configure(config):
    config.addinivalue_line('markers', 'draws: needs pyrender to draw meshes (EGL); skipped with a word where it cannot, an error in CI')
    config.addinivalue_line('markers', 'cuda: needs an NVIDIA GPU')
    config.addinivalue_line('filterwarnings', 'ignore::DeprecationWarning')

def pytest_runtest_setup(item):
    import pytest
    if item.get_closest_marker('cuda'):
        import torch
        if not torch.cuda.is_available(): pytest.skip('no NVIDIA GPU')
    if item.get_closest_marker('draws') and (why := cannot_draw()):
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(f'pyrender cannot draw here: {why}; on Debian or Ubuntu: apt-get install libegl1 libgl1 libegl-mesa0')
