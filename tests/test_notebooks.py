"House rules of the notebooks, checked without running them: readable, small, in order, and honest about what they import."
import ast, io, json, re, tokenize

import pytest
from conftest import ROOT

NBS   = sorted((ROOT/'nbs').rglob('*.ipynb'))
KNOWN = re.compile(r'#\| ?(default_exp [a-z0-9_]+|export|eval: false|hide|cuda|slow|notest)') # nbdev ignores a misspelt one silently
PATHS = re.compile(r'(?<![\w.:/-])/(?:home|Users|root|opt|mnt|srv|work)/\w|site-packages') # says whose machine it was

class Nb:
    def __init__(self, path):
        self.path, self.cells = path, json.loads(path.read_text(encoding='utf-8'))['cells']
        for c in self.cells: c['text'] = ''.join(c['source'])
        self.md      = [c for c in self.cells if c['cell_type'] == 'markdown']
        self.code    = [c for c in self.cells if c['cell_type'] == 'code']
        self.exports = [c for c in self.code if 'export' in self.flags(c)]
        self.outputs = [o for c in self.code for o in c['outputs']]
    def flags(self, c): return [l[2:].strip() for l in c['text'].splitlines() if l.startswith('#|')]
    @property
    def number(self): return int(m[1]) if (m := re.match(r'(\d+)_', self.path.stem)) else None

ORDER = {p.stem.split('_', 1)[1]: int(p.stem.split('_', 1)[0]) for p in NBS if re.match(r'\d+_', p.stem)} # module -> number
OURS  = {n.name for p in NBS for c in Nb(p).exports for n in ast.parse(c['text']).body if isinstance(n, ast.ClassDef)} # classes of the project
nbs   = pytest.mark.parametrize('nb', [pytest.param(Nb(p), id=p.relative_to(ROOT/'nbs').with_suffix('').as_posix()) for p in NBS])
def parse(src): return ast.parse('\n'.join('pass' if l.lstrip().startswith(('%', '!')) else l for l in src.splitlines()))

@nbs
def test_executed_without_errors(nb):
    run = [c for c in nb.code if c['text'].strip()]
    assert any(c['outputs'] for c in run), 'no outputs: execute it from a fresh kernel before committing'
    assert not [o['evalue'] for o in nb.outputs if o['output_type'] == 'error']

@nbs
def test_small(nb):
    assert nb.path.stat().st_size <= 300_000, 'over 300 kB: smaller pictures, JPEG'
    long = [c['text'][:60] for c in nb.cells if len(c['text'].splitlines()) > 60]
    assert not long, f'cells of more than 60 lines: {long}'

@nbs
def test_directives_are_known(nb):
    bad = [l for c in nb.code for l in c['text'].splitlines() if re.match(r'\s*#\s*\|', l) and not KNOWN.fullmatch(l)]
    assert not bad

@nbs
def test_starts_with_title_and_sentence(nb):
    lines = nb.cells[0]['text'].splitlines()
    assert nb.cells[0]['cell_type'] == 'markdown' and lines[0].startswith('# ') and any(l.startswith('> ') for l in lines)

@nbs
def test_prose_and_pictures(nb):
    if not nb.exports: return
    assert len(nb.md) >= len([c for c in nb.exports if 'eval: false' not in nb.flags(c)]), f'{len(nb.md)} cells of prose for {len(nb.exports)} of exported code'
    kinds = {k for o in nb.outputs for k in o.get('data', {})}
    assert kinds & {'image/jpeg', 'image/png', 'image/svg+xml'}, 'shows no picture'

@nbs
def test_says_nothing_about_a_machine(nb):
    found = {m[0] for c in nb.cells for m in re.finditer(PATHS.pattern+r'|/tmp/\w', c['text'])} # outputs may show a temporary folder
    found |= {m[0] for o in nb.outputs for s in [o.get('text', ''), *(v for k, v in o.get('data', {}).items() if k.startswith('text/'))] for m in PATHS.finditer(''.join(s))}
    assert not found

@nbs
def test_imports_only_lower_numbers(nb):
    for c in nb.code:
        for node in ast.walk(parse(c['text'])):
            mods = [node.module] if isinstance(node, ast.ImportFrom) and node.module else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == 'dd3g': mods = [f'dd3g.{a.name}' for a in node.names]
            if isinstance(node, ast.ImportFrom) and c in nb.exports: assert '*' not in [a.name for a in node.names], 'star import in exported code'
            for name in (m.split('.')[1] for m in mods if m.startswith('dd3g.')):
                if name.startswith('_'): continue
                assert name in ORDER, f'dd3g.{name} has no notebook'
                own = nb.path.stem.split('_', 1)[-1] == name and isinstance(node, ast.ImportFrom) # the guard imports its own main
                assert nb.number is None or own or ORDER[name] < nb.number, f'imports dd3g.{name}, which comes later'

def undocumented(cells): # what public functions leave unsaid; a namesake's comment in the same notebook will do, or one of our classes as type
    missing, said = [], {'self', 'seed', 'device'}
    for src in cells:
        commented = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.COMMENT}
        for f in ast.walk(parse(src)):
            if not isinstance(f, ast.FunctionDef): continue
            a = f.args
            for x in [*a.posonlyargs, *a.args, *a.kwonlyargs]:
                if x.lineno in commented or x.end_lineno in commented: said.add(x.arg)
        for f in parse(src).body:
            if not isinstance(f, (ast.FunctionDef, ast.ClassDef)) or f.name.startswith('_'): continue
            if not ast.get_docstring(f) and not any('patch' in ast.unparse(d) for d in f.decorator_list): missing.append((f.name, 'docstring'))
            if isinstance(f, ast.FunctionDef): missing += [(f.name, x.arg) for x in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] if not (x.annotation and ast.unparse(x.annotation) in OURS)]
    return [f'{f}({x})' for f, x in missing if x not in said]

@nbs
def test_exported_functions_are_documented(nb):
    missing = undocumented([c['text'] for c in nb.exports])
    assert not missing, f'no comment beside the argument, or no docstring: {missing}'
