"""Execute notebooks from a fresh kernel, in place: `python tests/execute.py nbs/12_render.ipynb ...`.

Cells that tests skip (`eval: false`, and `cuda`, `slow` without `--gpu`) are skipped here too and keep no output;
nbconvert would run them. A notebook that fails is left as it was.
"""
import os, re, sys
from pathlib import Path

import nbformat
from conftest import ROOT  # also sets the surroundings of tests
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean

os.environ.pop('MPLBACKEND', None) # pictures go into the notebook

def execute(path, skip):
    "Run all other cells in the notebook's own folder, clean, write."
    nb = nbformat.read(path, 4)
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs = []
        c.metadata = {'tags': ['skip-execution']} if re.search(rf'^#\| ?({skip})\b', c.source, re.M) else {}
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for c in nb.cells: c.metadata = {}
    path.write_text(nbformat.writes(nb)+'\n', encoding='utf-8')
    nbdev_clean(str(path))

def main(args):
    skip = 'eval: false' if '--gpu' in args else 'eval: false|cuda|slow'
    for path in [Path(a).resolve() for a in args if a != '--gpu']:
        try: execute(path, skip)
        except CellExecutionError as e: sys.exit(f'{path.name}: {re.sub(chr(27)+"[[][0-9;]*m", "", str(e))[-3000:]}')
        print(f'{path.name}: executed, {path.stat().st_size//1000} kB', flush=True)

if __name__ == '__main__': main(sys.argv[1:])
