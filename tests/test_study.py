"The user study from folders to figures: a page driven in a browser, a server that is killed, files that Excel has touched."
import csv, http.client, io, json, os, re, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from browser import Browser, find_browser
from dd3g.core import UserError
from dd3g.study import BuildArgs, Ratings, Spread, StudyServer, Store, analyse, build, checked, find_turntables, frames_of, krippendorff, main, mean_intervals, mixed, page_data, read_key, read_ratings, simulate, suspects

METHODS, OBJECTS = ('ours', 'rival', 'third'), ('car', 'house', 'mug')

def frame(i, n, size, colour):
    im = Image.new('RGBA', size); x = size[0]*(.2+.5*i/n)
    ImageDraw.Draw(im).ellipse([x, size[1]*.3, x+size[0]*.2, size[1]*.7], fill=colour)
    return im

@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "Three methods in three forms and sizes, and the inputs."
    T = tmp_path_factory.mktemp('made')
    for k, o in enumerate(OBJECTS):
        colour = [(200, 60, 50, 255), (50, 120, 200, 255), (60, 160, 70, 255)][k]
        (T/'m'/'ours'/o).mkdir(parents=True); (T/'in').mkdir(exist_ok=True)
        for d in ('rival', 'third'): (T/'m'/d).mkdir(exist_ok=True)
        for i in range(8): frame(i, 8, (64, 48), colour).save(T/'m'/'ours'/o/f'{i:03d}.png')
        ims = [frame(i, 6, (40, 40), colour) for i in range(6)]
        ims[0].convert('P').save(T/'m'/'rival'/f'{o}.gif', save_all=True, append_images=[i.convert('P') for i in ims[1:]])
        ims[0].save(T/'m'/'third'/f'{o}.webp', save_all=True, append_images=ims[1:])
        frame(0, 1, (64, 64), colour).save(T/'in'/f'{o}.png')
    return T

def make(folders, out, **kw):
    return build(BuildArgs((str(folders/'m'),), inputs=(folders/'in',), out=out, size=48, frames=8, **kw))

@pytest.fixture
def study(folders, tmp_path): return make(folders, tmp_path/'study'), tmp_path/'study'

def code_of(*args):
    try: main([*map(str, args)]); return 0
    except SystemExit as e: return e.code

def said(capsys): return [l for l in capsys.readouterr().err.splitlines() if l.startswith('dd3g:')]

# --- building

def test_page_is_blind_and_alone(study, folders):
    key, out = study
    page = (out/'study.html').read_text()
    data = page_data(page)
    told = re.sub('base64,[^"]*', '', json.dumps(data['sets']))
    assert not [w for w in (*METHODS, *OBJECTS, str(folders)) if w in told]
    assert not re.search(r'(src|href)=["\']?(http|//)|@import|url\(|\{\{', page)
    assert all(s['items'] == sorted(s['items'], key=lambda i: i['id']) for s in data['sets']) # in the order of numbers, not of methods
    assert {i['id'] for s in data['sets'] for i in s['items']} == set(key['items'])

def test_all_turntables_are_alike(study):
    _, out = study
    import base64
    sheets = [Image.open(io.BytesIO(base64.b64decode(i['sheet'].split(',')[1]))) for s in page_data((out/'study.html').read_text())['sets'] for i in s['items']]
    assert {s.size for s in sheets} == {(3*48, 3*48)} and {s.format for s in sheets} == {'WEBP'}

def test_seed_decides(folders, tmp_path):
    a, b, c = make(folders, tmp_path/'a', sets=2), make(folders, tmp_path/'b', sets=2), make(folders, tmp_path/'c', sets=2, seed=1)
    assert a == b and (tmp_path/'a'/'study.html').read_bytes() == (tmp_path/'b'/'study.html').read_bytes()
    assert not set(a['items']) & set(c['items']) and len(a['objects']) == 2

def test_markup_in_names_is_text(folders, tmp_path):
    make(folders, tmp_path/'x', title='</script><b>T', question='</script><img src=x onerror=alert(1)>')
    page = (tmp_path/'x'/'study.html').read_text()
    assert page.count('</script>') == 2 and '<img src=x' not in page and page_data(page)['title'] == '</script><b>T'

def test_mixed_sizes_are_said(folders, tmp_path, capsys):
    make(folders, tmp_path/'x')
    line = next(l for l in said(capsys) if 'turntables differ' in l)
    assert '64x48 with 8 frames' in line and '40x40 with 6 frames' in line

def test_a_missing_method_is_named(folders, tmp_path, capsys):
    import shutil
    shutil.copytree(folders/'m', tmp_path/'m'); (tmp_path/'m'/'rival'/'mug.gif').unlink()
    args = ['build', tmp_path/'m', '--out', tmp_path/'s', '--size', 48, '--frames', 4]
    assert code_of(*args) == 2
    assert [l for l in said(capsys) if 'rival lacks mug' in l and '--drop-incomplete' in l] and not (tmp_path/'s').exists()
    assert code_of(*args, '--drop-incomplete') == 0
    key = read_key(tmp_path/'s'/'key.json')
    assert key['incomplete'] == {'mug': ['rival']} and key['objects'] == ['car', 'house']

@pytest.mark.parametrize('args, words', [
    (['build'], 'at least two methods'), (['build', '{m}/ours'], 'at least two methods'), (['build', '{m}/ours', '{m}/nowhere'], 'no such folder'),
    (['build', '{m}', '--size', '9000'], 'from 32 to 1024'), (['build', '{m}', '--inputs', '{t}'], 'no pictures'), (['serve', '{t}'], 'key.json'),
    (['analyse'], 'no ratings named'), (['analyse', '{t}/none.csv'], 'No such file'), (['fly'], 'no such command'), (['power', '--sets', '3'], 'at least 6')])
def test_mistakes_are_one_line(folders, tmp_path, capsys, args, words):
    assert code_of(*[a.format(m=folders/'m', t=tmp_path) for a in args], *(['--out', tmp_path/'o'] if args[0] == 'build' else [])) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]

def test_damaged_turntable_is_named(tmp_path):
    (tmp_path/'a.gif').write_bytes(b'GIF89a broken'); (tmp_path/'b.mp4').write_bytes(b'no film')
    for n in ('a.gif', 'b.mp4'):
        with pytest.raises(UserError, match=n): frames_of(tmp_path/n, 4, 32)

def test_one_object_several_forms(tmp_path):
    for n in ('duck.gif', 'duck.mp4', 'duck.ply', 'duck.html'): (tmp_path/n).touch()
    assert find_turntables(tmp_path) == {'duck': tmp_path/'duck.ply'} # what dd3g.generate writes can be used as it is

# --- the server

def post(port, r, tries=1, wait=.05):
    for i in range(tries):
        try:
            c = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
            c.request('POST', '/rate', json.dumps(r), {'Content-Type': 'application/json'}); a = c.getresponse(); return a.status, a.read().decode()
        except (OSError, http.client.HTTPException):
            if i == tries-1: raise
            time.sleep(wait)
        finally: c.close()

def rater(port, key, n, tries=1):
    "Rates every item, sends a third twice, changes a third; returns what it last said, once confirmed."
    rng, last = np.random.default_rng(n), {}
    for item in rng.permutation(sorted(key['items'])):
        if tries > 1: time.sleep(.02) # so that there is a middle to be killed in
        for rev in (1, 2)[:1+int(rng.random() < .3)]:
            r = dict(study=key['study'], rater=f'r{n:016x}', item=str(item), score=int(rng.integers(1, 11)), rev=rev, name=f'R{n}', seconds=1.5, time='2026-01-01T00:00:00Z', place=1)
            for _ in range(1+int(rng.random() < .3)): assert post(port, r, tries)[0] == 200
        last[r['rater'], r['item']] = r['score']
    return last

def test_many_raters_at_once(study):
    key, out = study
    n = int(os.environ.get('DD3G_RATERS', 16)) # 50 by hand
    server = StudyServer(out, port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with ThreadPoolExecutor(n) as pool: want = {k: v for d in pool.map(lambda i: rater(server.server_address[1], key, i), range(n)) for k, v in d.items()}
    server.shutdown(); server.server_close()
    got = {(r['rater'], r['item']): r['score'] for r in Store(out/'ratings.sqlite', key['study']).newest()}
    assert got == want and len(got) == n*len(key['items'])

def test_killed_while_saving(study):
    key, out = study
    start = lambda port: subprocess.Popen([sys.executable, '-c', f'import sys; from dd3g.study import main; main(["serve", {str(out)!r}, "--port", "{port}"])'], stdout=subprocess.PIPE, text=True)
    p = start(0); port = int(re.search(r':(\d+)/', p.stdout.readline())[1])
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(rater, port, key, i, 1500) for i in range(8)]
        store = Store(out/'ratings.sqlite', key['study'])
        while len(store.newest()) < 15: time.sleep(.005)
        os.kill(p.pid, signal.SIGKILL); p.wait()
        before = len(store.newest())
        p = start(port)
        want = {k: v for j in jobs for k, v in j.result().items()}
    p.kill(); p.wait()
    got = {(r['rater'], r['item']): r['score'] for r in Store(out/'ratings.sqlite', key['study']).newest()}
    assert got == want and 15 <= before < len(got) == 8*len(key['items'])

def test_full_disk_loses_nothing_confirmed(study):
    "A save that fails is said to have failed, leaves no half of itself, and the next one works."
    import sqlite3
    key, out = study
    store, item = Store(out/'ratings.sqlite', key['study']), sorted(key['items'])[0]
    rating = lambda n: checked(dict(study=key['study'], rater=f'r{n:016x}', item=item, score=5, rev=1, name='n'*60), key)
    store.db.execute(f'PRAGMA max_page_count={store.db.execute("PRAGMA page_count").fetchone()[0]+1}')
    saved, n = [], 0
    with pytest.raises(sqlite3.OperationalError, match='full'):
        while n < 5000: store.add(rating(n)); saved.append(f'r{n:016x}'); n += 1
    assert saved and [r['rater'] for r in store.newest()] == saved
    store.db.execute('PRAGMA max_page_count=100000')
    assert store.add(rating(n)) == 'new' and len(store.newest()) == len(saved)+1

def test_only_its_own_study(study, folders, tmp_path):
    key, out = study
    ok = dict(study=key['study'], rater='r'+'0'*16, item=sorted(key['items'])[0], score=5, rev=1)
    assert checked(ok, key)['score'] == 5
    for bad in (dict(study='x'), dict(rater="r'; DROP TABLE rating;"), dict(item='i0'), dict(score=0), dict(score=11), dict(score='5'), dict(score=True), dict(score=5.5), dict(rev=0), dict(rev=2**60), dict(name='x'*61), dict(name=5), dict(time='<b>'), dict(seconds=float('nan'))):
        with pytest.raises(ValueError): checked(ok | bad, key)
    for bad in ([], None, 'x', 5, {}):
        with pytest.raises(ValueError): checked(bad, key)
    Store(out/'ratings.sqlite', key['study'])
    with pytest.raises(UserError, match='already collects'): make(folders, out)
    with pytest.raises(UserError, match='another study'): Store(out/'ratings.sqlite', 'other')

def test_server_bounds(study):
    key, out = study
    server = StudyServer(out, port=0); port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    def raw(method, path, body=b'', head={}):
        c = http.client.HTTPConnection('127.0.0.1', port, timeout=20); c.request(method, path, body, head); a = c.getresponse(); a.read(); c.close(); return a.status
    J = {'Content-Type': 'application/json'}
    assert [raw('POST', '/rate', b'x'*5000, J), raw('POST', '/rate', b'['*2000, J), raw('POST', '/rate', b'\xff', J), raw('POST', '/rate', b'{}'), raw('POST', '/x', b'{}', J), raw('POST', '/rate', b'{}', J | {'Origin': 'http://evil'})] == [413, 400, 400, 415, 404, 403]
    assert [raw('GET', p) for p in ('/', '/study.html?x', '/key.json', '/ratings.sqlite', '/../key.json', '/%2e%2e/key.json')] == [200, 200, 404, 404, 404, 404]
    with pytest.raises(UserError, match='choose another --port'): StudyServer(out, port=port)
    server.shutdown(); server.server_close()

# --- the page in a browser

needs_browser = pytest.mark.skipif(not find_browser(), reason='no Chromium on this machine: the page was not driven (apt-get install chromium)')

@needs_browser
def test_page_from_start_to_csv(study, tmp_path):
    "Mouse and keyboard, a reload in the middle, the file at the end, from file://."
    key, out = study
    url, items = (out/'study.html').as_uri(), 'sets.map(s => s.items.map(i => i.id))'
    with Browser(tmp_path/'profile') as b:
        b.downloads(tmp_path/'got'); b.goto(url)
        b.click('#name'); b.type('=Zoë; "Q"'); b.click('#start')
        b.until('views.length === 3 && views.every(v => v.shown >= 0)')
        order, who = b.js(items), b.js('state.rater')
        assert b.js('document.querySelector("#next").disabled')
        b.click('.card:nth-child(1) [data-score="7"]'); b.click('.card:nth-child(2) [data-score="4"]'); b.click('.card:nth-child(2) [data-score="5"]')
        before = b.js('angle'); b.key(' '); b.drag('.card:nth-child(3) canvas', 80)
        assert b.js('angle') != before
        b.goto('about:blank'); b.goto(url)                                                    # closed and opened again
        assert b.js(items) == order and b.js('document.querySelectorAll("[aria-checked=true]").length') == 2
        b.key('c'); b.key('0'); b.key('Enter')
        assert b.js('state.at') == 1
        for k in '123': b.key(k)
        b.key('Backspace'); assert b.js('state.at') == 0; b.key('Enter'); b.key('Enter')
        for k in '999': b.key(k)
        b.click('#next'); b.until('!document.querySelector("#end").hidden'); b.click('#save')
        for _ in range(200):
            if found := list((tmp_path/'got').glob('*.csv')): break
            time.sleep(.05)
        assert not b.errors
    rows = list(csv.DictReader(io.StringIO(found[0].read_bytes().decode('utf-8-sig'))))
    want = dict(zip(sum(order, []), [7, 5, 10, 1, 2, 3, 9, 9, 9]))
    assert {r['item']: int(r['score']) for r in rows} == want and {r['name'] for r in rows} == {'\'=Zoë; "Q"'} and {r['rater'] for r in rows} == {who}
    r = read_ratings(found, key)
    assert len(r.df) == 9 and not r.problems and not r.simulated

@needs_browser
def test_order_differs_between_raters_and_phone_fits(study, tmp_path):
    _, out = study
    with Browser(tmp_path/'p') as b:
        b.goto((out/'study.html').as_uri())
        orders = b.js('(() => { const out = []; for (let i = 0; i < 60; i++) { state = blank(); order(); out.push(JSON.stringify(sets.map(s => s.items.map(i => i.id)))); } return out; })()')
        first = [json.loads(o)[0][0] for o in orders]
        assert len(set(orders)) > 50 and len(set(first)) == 9 # every model comes first for somebody
        for w in (320, 390, 768, 1280, 1920):
            b.resize(w, 700, w < 768); b.js('state.at = 0, show(), layout()')
            assert b.js('document.documentElement.scrollWidth') <= w, f'wider than a screen of {w}'
            assert b.js('Math.min(...[...document.querySelectorAll("canvas")].map(c => c.clientWidth))') >= 220

@needs_browser
def test_page_and_server(study, tmp_path):
    "Ratings arrive, survive a server that goes away, and arrive once it is back."
    key, out = study
    server = StudyServer(out, port=0); port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Browser(tmp_path/'p') as b:
        b.goto(f'http://127.0.0.1:{port}/'); b.click('#start'); b.until('views.length === 3')
        for k in '246': b.key(k)
        b.until('unsent().length === 0'); b.key('Enter')
        server.shutdown(); server.server_close()
        for k in '135': b.key(k)
        b.until('document.querySelector("#status").textContent.includes("3 not yet sent")')
        server = StudyServer(out, port=port); threading.Thread(target=server.serve_forever, daemon=True).start()
        b.until('unsent().length === 0', 30)
        want = b.js('Object.fromEntries(Object.entries(state.ratings).map(([k, r]) => [k, r.score]))')
        assert not b.errors
    got = {r['item']: r['score'] for r in server.store.newest()}
    server.shutdown(); server.server_close()
    assert got == want and len(got) == 6

# --- reading and judging

def table(key, rater='r1', score=7): return 'study,rater,item,score\n'+''.join(f'{key["study"]},{rater},{i},{score}\n' for i in sorted(key['items']))

@pytest.mark.parametrize('encode', [lambda t: t.encode(), lambda t: b'\xef\xbb\xbf'+t.encode(), lambda t: b'\xff\xfe'+t.encode('utf-16-le'), lambda t: t.replace(',', ';').encode('cp1252'),
    lambda t: ('sep=;\n'+t.replace(',', ';')).replace('\n', '\r\n').encode(), lambda t: t.replace(',', '\t').encode(), lambda t: t.replace(',7\n', ',"7,0"\n').encode(), lambda t: t.replace('rater', ' Rater ').encode()])
def test_however_excel_saved_it(study, tmp_path, encode):
    (tmp_path/'x.csv').write_bytes(encode(table(study[0])))
    r = read_ratings([tmp_path/'x.csv'], study[0])
    assert len(r.df) == 9 and set(r.df.score) == {7.} and not r.problems

@pytest.mark.parametrize('row, words', [('{s},r1,{i},11', "score '11' is not within 1 to 10"), ('{s},r1,{i},', "score ''"), ('{s},r1,{i},NaN', "score 'NaN'"), ('{s},r1,{i},-3', 'not within'), ('{s},,{i},5', 'no rater'),
    ('{s},r1,zzz,5', "item 'zzz' is not in this study"), ('other,r1,{i},5', 'of another study'), ('{s},r1,{i},7', 'counted once'), ('{s},r1,{i},8', 'with another score; the later one (8) counts')])
def test_one_line_with_file_and_row(study, tmp_path, row, words):
    key = study[0]
    (tmp_path/'x.csv').write_text(table(key)+row.format(s=key['study'], i=sorted(key['items'])[0])+'\n')
    r = read_ratings([tmp_path/'x.csv'], key)
    assert len(r.df) == 9 and len(r.problems) == 1 and words in r.problems[0] and 'x.csv, row 11' in r.problems[0]

def test_missing_items_are_counted(study, tmp_path):
    key = study[0]
    (tmp_path/'x.csv').write_text('\n'.join(table(key).splitlines()[:-2]))
    assert '2 of 9 items are not rated' in read_ratings([tmp_path/'x.csv'], key).problems[0]

def test_foreign_table_needs_no_key(tmp_path):
    (tmp_path/'x.csv').write_text('rater;method;object;score\n'+''.join(f'p{r};{m};{o};{3+m+(r+o)%2}\n' for r in range(8) for m in range(3) for o in range(6)))
    r = read_ratings([tmp_path/'x.csv'])
    assert r.methods == ['0', '1', '2'] and analyse(r, model=False)['means']['2']['mean'] == 5.5

def test_known_answers():
    same = np.tile(np.arange(1., 7), (5, 1))
    assert krippendorff(same) == 1 and abs(krippendorff(np.random.default_rng(0).integers(1, 11, (40, 200)))) < .02
    m = mean_intervals(np.full((5, 4, 2), 3.))
    assert np.allclose(m, 3)
    a = mean_intervals(np.random.default_rng(0).normal(0, 1, (30, 20, 1)), over=(0,))[0]
    assert abs((a[2]-a[1])/(2*1.96/600**.5)-1) < .35

def test_model_recovers_what_was_put_in():
    pytest.importorskip('statsmodels', reason='statsmodels is an extra: the mixed-effects model was not fitted')
    f = mixed(simulate(dict(A=4., B=6.), 30, 12, Spread(1, .5, .2, .2, .8), seed=3, bad=0))
    d, se, p = f['effects']['B']
    assert abs(d-2) < 3*se and p < 1e-6 and abs(f['spread']['rater']-1) < .4 and abs(f['spread']['rest']-.8) < .15

def test_careless_raters_are_named_not_removed():
    r = simulate(dict(A=4., B=5., C=7.), 20, 20, Spread(1, .7, .3, .2, .8), seed=2, bad=2)
    out = analyse(r, model=False)
    assert [int(w[-2:], 16) for w in out['suspects']] == [0, 1] and out['raters'] == 20 and out['means_without_suspects'] != out['means']
    nobody = simulate(dict(A=5., B=5., C=5.), 20, 10, Spread(0, 0, 0, 0, 2), seed=1, bad=0) # pure noise: no one disagrees with the others more than they do
    assert not suspects(nobody)
    quick = Ratings(r.df.assign(seconds=np.where(r.df.rater == sorted(r.df.rater)[-1], .3, 6.)))
    assert '0.3 s' in suspects(quick)[sorted(r.df.rater)[-1]][0]

def test_simulated_numbers_stay_out(study, tmp_path, capsys):
    key, out = study
    (tmp_path/'x.csv').write_text(table(key, 'SIMULATED-1')+table(key, 'SIMULATED-2', 5).split('\n', 1)[1])
    args = ['analyse', tmp_path/'x.csv', '--key', out/'key.json', '--no-model', '--out', tmp_path/'r']
    assert code_of(*args, '--record', 'study') == 2 and 'do not enter the records' in said(capsys)[-1]
    assert code_of(*args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all('SIMULATED' in l for l in lines)
    assert json.loads((tmp_path/'r'/'result.json').read_text())['warning'].startswith('SIMULATED') and 'SIMULATED' in (tmp_path/'r'/'ratings.csv').read_text()
