"""All tests: `python tests`. Every notebook from a fresh kernel (nbdev_test), then pytest on this folder.

`python tests --flags "cuda slow"` also runs cells and tests that need a GPU or minutes; other arguments go to pytest.
"""
import os, re, subprocess, sys
from conftest import ROOT, cannot_draw

def notebooks_that_draw():
    "Stems of notebooks that draw meshes with pyrender, or make objects through a program."
    uses = re.compile(r'render_model|write_rings|pyrender|objects import main')
    return [p.stem for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if uses.search(p.read_text(encoding='utf-8'))]

def main(args):
    os.chdir(ROOT)
    flags, skip = '', '^[_.]'
    if '--flags' in args: at = args.index('--flags'); flags = args[at+1]; del args[at:at+2]
    if os.environ.get('CI') != 'true' and (why := cannot_draw()):
        names = notebooks_that_draw()
        print(f'NOT TESTED, pyrender cannot draw here ({why}): {" ".join(names)}. On Debian or Ubuntu: apt-get install libegl1 libgl1 libegl-mesa0', flush=True)
        skip += ''.join(f'|^{re.escape(n)}[.]' for n in names)
    workers = 1 if flags else min(2, os.cpu_count() or 1)
    run = f'from nbdev.test import nbdev_test; nbdev_test(flags={flags!r}, n_workers={workers}, timing=True, do_print=True, skip_file_re={skip!r})'
    codes = [subprocess.run([sys.executable, '-c', run]).returncode,
             subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rs', 'tests', *args]).returncode]
    if codes[0]: print('pytest aside, notebooks failed: see "nbdev Tests Failed" above', flush=True)
    return max(map(abs, codes))

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
