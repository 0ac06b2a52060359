"The package is what the notebooks export, nothing more and nothing less."
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

NUMBERED = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    from nbdev.export import nb_export
    top = tmp_path_factory.mktemp('project') # same layout, since exported files name their notebook by a relative path
    (top/'nbs').mkdir()
    for p in NUMBERED: nb_export(shutil.copy(p, top/'nbs'/p.name), lib_path=top/'dd3g')
    return top/'dd3g'

@pytest.mark.parametrize('nb', NUMBERED, ids=lambda p: p.stem)
def test_module_is_its_notebook(nb, exported):
    name = nb.stem.split('_', 1)[1]+'.py'
    assert (ROOT/'dd3g'/name).read_text(encoding='utf-8') == (exported/name).read_text(encoding='utf-8'), f'dd3g/{name} was edited by hand or not exported: run nbdev_export'

def test_nothing_else_in_the_package(exported):
    have = {p.relative_to(ROOT/'dd3g').as_posix() for p in (ROOT/'dd3g').rglob('*.py')}
    assert have - {'__init__.py', '_modidx.py'} == {p.name for p in exported.glob('*.py')} - {'__init__.py', '_modidx.py'}

def test_version():
    settings = dict(l.split(' = ', 1) for l in (ROOT/'settings.ini').read_text().splitlines() if ' = ' in l)
    assert f"'{settings['version']}'" in (ROOT/'dd3g/__init__.py').read_text().replace('"', "'")
