"Every program: help made of field comments, one line and exit code 2 for a wrong flag."
import importlib, re, subprocess, sys

import pytest
from conftest import ROOT

PROGRAMS = [p.stem for p in sorted((ROOT/'dd3g').glob('*.py')) if "__name__ == '__main__'" in p.read_text(encoding='utf-8')]
EXPECTED = 'objects teach rollout train generate bench'.split()

def run(module, args, capsys, monkeypatch):
    "Run a program's main in this process: exit code, stdout, stderr. A wide terminal keeps help lines whole."
    monkeypatch.setenv('COLUMNS', '1000'); monkeypatch.setattr(sys, 'argv', [f'dd3g.{module}'])
    code = 0
    try: importlib.import_module(f'dd3g.{module}').main(args)
    except SystemExit as e: code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err

def comments(source, cls='Args'):
    "Comments of the fields of a module's dataclasses of arguments."
    for body in re.findall(rf'^class \w*{cls}\w*.*?:\n((?:    .*\n|\n)+)', source, re.M):
        yield from re.findall(r'^    \w+:.*?\s# (.+)$', body, re.M)

def test_all_programs_are_there(): assert not set(EXPECTED) - set(PROGRAMS)

def plain(text): return re.sub(r'[^\w]+', ' ', re.sub(r'\x1b\[[0-9;]*m', '', text))

@pytest.mark.parametrize('module', PROGRAMS)
def test_help(module, capsys, monkeypatch):
    code, out, err = run(module, ['--help'], capsys, monkeypatch)
    text = out+err
    for sub in getattr(importlib.import_module(f'dd3g.{module}'), 'COMMANDS', {}): text += ''.join(run(module, [sub, '--help'], capsys, monkeypatch)[1:])
    assert code == 0 and 'Traceback' not in text
    said = list(comments((ROOT/'dd3g'/f'{module}.py').read_text(encoding='utf-8')))
    missing = [c for c in said if plain(c)[:40] not in plain(text)]
    assert said and not missing, f'{module}: not in --help: {missing}'

@pytest.mark.parametrize('module', PROGRAMS)
def test_wrong_flag(module, capsys, monkeypatch):
    code, out, err = run(module, ['--no-such-flag', '1'], capsys, monkeypatch)
    assert code == 2 and 'Traceback' not in out+err and err.strip()

def test_from_a_shell():
    r = subprocess.run([sys.executable, '-m', 'dd3g.train', '--scale', 'huge'], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 2 and r.stderr.strip().splitlines()[-1].startswith('dd3g: --scale huge') and 'Traceback' not in r.stderr
