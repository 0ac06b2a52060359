"The judge: equal marks for equal objects, nothing dropped in silence, statistics that keep their word."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dd3g.evaluate as E
from dd3g.cameras import orbit, ring
from dd3g.config import ViewConfig
from dd3g.core import UserError
from dd3g.evaluate import (FLOORS, Contestant, Pictures, box_of, by_object, evaluate, floors, habits, holm, judge, main, of_model, of_plys, of_renders, of_teacher,
                           open_reports, pairs, place, report, search, sign_flip, table, teacher_views, views_of, weighted_span)
from dd3g.gaussians import Gaussians
from dd3g.splats import Splats, draw, save_splats
from dd3g.testsets import Case, Protocol, shrink, turn_z

P = Protocol(size=32, input_size=32, views=12)

def thing(seed=0, n=400):
    "An object without symmetry: a coloured blob with a nose and an ear."
    gen = torch.Generator().manual_seed(seed)
    mu = torch.randn(n, 3, generator=gen)*torch.tensor([.12, .18, .15]); mu[:80] = mu[:80]*.35+torch.tensor([.35, .05, .1]); mu[80:140] = mu[80:140]*.35+torch.tensor([-.1, .3, .33-.1*seed])
    mu -= torch.stack([weighted_span(mu[:, k], torch.ones(n)).mean() for k in range(3)]) # centred, as true models are
    color = (.5+mu/.8).clamp(.05, .95); color[:80] = torch.tensor([.9, .2, .1]); color[80:140] = torch.tensor([.1, .3, .9])
    return Gaussians(mu, torch.full((n, 3), .035), torch.tensor([1., 0, 0, 0]).repeat(n, 1), color, torch.full((n,), .97))

def straight(r): return torch.cat([((r.rgb-1)/r.alpha.clamp_min(1e-3)+1).clamp(0, 1), r.alpha], 1)

def case_of(g, name='thing', p=P, elevation=10.):
    "A case whose truth is drawn from Gaussians: no mesh, no OpenGL."
    cams = ring(p.views, elevation); x = straight(draw(Splats(g), cams, p.size))
    return Case(name, x[0], cams.views([0]), cams, (x*255).round().byte(), True)

@pytest.fixture(scope='module')
def case(): return case_of(thing())

# pose and size

@pytest.mark.parametrize('turn', [0, 90, 150, 330])
def test_azimuth_is_found(case, turn):
    assert search(Splats(thing()).transform(turn_z(turn)), case, P) == -turn % 360

@pytest.mark.parametrize('scale, shift', [(1., 0.), (5., 3.), (.02, -.4)])
def test_size_and_place_do_not_matter(case, scale, shift):
    a, b = (views_of(Splats(thing()).transform(None, torch.tensor([s, -s, s/2]), k), case, P)[0] for k, s in ((1., 0.), (scale, shift)))
    assert (a-b).abs().max() < .02

def test_perfect_object_keeps_its_marks(case):
    r, _ = judge([Splats(thing())], case, P)
    assert r['turns'] == [0.] and r['aligned']['psnr'] > 32 and r['aligned']['iou'] > .9 and abs(r['aligned']['sharpness']-1) < .15

def test_rule_none_leaves_everything(case):
    s = Splats(thing()).transform(None, None, 1.3)
    assert torch.equal(place(s, case, replace(P, normalise='none')).g.mu, s.g.mu)
    with pytest.raises(UserError, match='there are view, ball and none'): place(s, case, replace(P, normalise='magic'))

def test_box_has_parts_of_pixels():
    a = torch.zeros(1, 1, 20, 20); a[..., 5:15, 3:9] = 1
    b = a.clone(); b[..., 5:15, 9] = .5
    assert torch.allclose(box_of(a)[0, :2], torch.tensor([6., 10.])) and 0 < box_of(b)[0, 2]-box_of(a)[0, 2] < 1 and box_of(0*a).abs().max() == 0

def test_stray_gaussian_moves_nothing(case):
    g = thing(); far = Gaussians(torch.tensor([[0., 0, 40.]]), torch.full((1, 3), .01), g.quat[:1], g.color[:1], g.alpha[:1])
    a, b = (views_of(Splats(x), case, P)[0] for x in (g, Gaussians.cat([g, far])))
    assert (a-b).abs().mean() < .01

def test_what_nobody_sees_moves_nothing(case, monkeypatch):
    g, n = thing(), 400
    away = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))*.1+torch.tensor([0., 0, 1.4])*(1-2*(torch.arange(n) % 2))[:, None]
    dirty = Gaussians.cat([g, Gaussians(away, torch.full((n, 3), 1e-4), g.quat[:1].expand(n, 4), g.color[:1].expand(n, 3), torch.ones(n))])
    clean = views_of(Splats(g), case, P)[0]
    assert (views_of(Splats(dirty), case, P)[0]-clean).abs().mean() < .006 and search(Splats(dirty).transform(turn_z(90)), case, P) == 270
    monkeypatch.setattr(E, 'visible', lambda g: g.alpha) # the rule of protocol version 1
    monkeypatch.setattr(E, 'to_picture', lambda s, case: s) # and no second look
    assert (views_of(Splats(dirty), case, P)[0]-clean).abs().mean() > .015

def test_many_specks_have_no_say(case, monkeypatch):
    "A tenth of all that can be seen, in pieces that nobody sees, before the object: it stays where it was along the line of sight."
    g, n, ahead = thing(), 4000, case.source.c2w[0, :3, 2]
    area = .1*E.visible(g).sum()/n
    dust = Gaussians(torch.randn(n, 3, generator=torch.Generator().manual_seed(0))*.1-ahead*.5, torch.full((n, 3), float(area)**.5), g.quat[:1].expand(n, 4), g.color[:1].expand(n, 3), torch.ones(n))
    dirty = lambda: (place(Splats(Gaussians.cat([g, dust])), case, P).g.mu[:g.n]-place(Splats(g), case, P).g.mu)@ahead
    assert dirty().abs().mean() < .02
    monkeypatch.setattr(E, 'SPECK', 0.) # the rule of protocol version 3
    assert dirty().abs().mean() > .1

def test_one_large_gaussian_does_not_run_away(case):
    "A floor, a shadow, a sky: it may be all that counts; so may a single Gaussian."
    g = thing()
    for wide in (.4, 1., 5.):
        floor = Gaussians(torch.tensor([[0., 0, -.35]]), torch.tensor([[wide, wide, .002]]), g.quat[:1], g.color[:1], torch.tensor([.9]))
        at = place(Splats(Gaussians.cat([g, floor])), case, P).g
        assert (at.mu-at.mu.mean(0)).norm(dim=1).max() < 5 and at.scale.max() < 50
    alone = place(Splats(Gaussians(torch.zeros(1, 3), torch.full((1, 3), 3.), g.quat[:1], g.color[:1], torch.ones(1))), case, P).g
    assert .05 < alone.scale.max() < 1

def test_empty_input_moves_nothing_away(case):
    blank = replace(case, rgba=case.rgba*0)
    at = place(Splats(thing()), blank, P).g
    assert at.mu.isfinite().all() and .1 < at.mu.norm(dim=1).max() < 2

def test_the_picture_mends_size_and_place(case):
    "Several at once as one by one; seen nowhere, left alone."
    right, ahead = case.source.c2w[0, :3, 0], case.source.c2w[0, :3, 2]
    home = E.to_picture(Splats(thing()), case)
    for t, k in ((.06*right, 1.), (0*right, 1.08), (-.04*right, .95)):
        s = E.to_picture(Splats(thing()).transform(None, t, k), case)
        assert (s.g.mu-home.g.mu).norm(dim=1).mean() < .02 < (t+thing().mu*(k-1)).norm(dim=1).mean()
    many = E.together([Splats(thing()).transform(None, .06*right, 1.), Splats(thing())])
    assert torch.allclose(E.to_picture(many, case).g.mu[1], home.g.mu, atol=1e-5)
    none = thing(); none.alpha *= 0
    assert E.to_picture(Splats(none), case).g.mu.isfinite().all()

def test_who_stands_in_the_frame_is_left_there(case):
    s = Splats(thing(), placed=True).transform(None, None, 1.1)
    assert torch.equal(place(s, case, P).g.mu, s.g.mu) and E.together([s, s]).placed and E.together([s, replace(s, placed=False)]) is None
    marks = [judge([replace(s, placed=k)], case, P)[0]['unaligned']['psnr'] for k in (True, False)]
    assert marks[0] < marks[1]-3 # too large, and nobody mends it
    view = ViewConfig(size=32)
    assert E.framed(case, view) and not E.framed(case, replace(view, radius=2.)) and not E.framed(case, replace(view, fov=40.)) and not E.framed(replace(case, ring=False), view)

def test_invisible_object_is_judged_as_nothing(case):
    g = thing(); g.alpha *= 0
    r, (rgb, alpha) = judge([Splats(g)], case, P)
    low = floors(case, P)['white']
    assert abs(r['aligned']['psnr']-low['psnr']) < 1e-3 and r['aligned']['iou'] == low['iou'] == pytest.approx(0, abs=1e-6) and json.dumps(r, allow_nan=False)

def test_search_looks_at_the_input_only(case):
    other = replace_truth(case, torch.zeros_like(case.truth))
    s = Splats(thing()).transform(turn_z(60))
    assert search(s, other, P) == search(s, case, P) and torch.equal(place(s, other, P).g.mu, place(s, case, P).g.mu)

def replace_truth(c, t): return Case(c.name, c.rgba, c.source, c.cams, t, c.ring)

# other people's files

def test_clothes_do_not_matter(case, tmp_path):
    g = thing(); g.alpha[::2] = .9995
    for name, conv, h, k in (('a', 'dd3g', g, {}), ('b', 'lgm', g.transform(None, torch.ones(3), 4.), {}), ('c', 'tgs', g.transform(turn_z(90.), None, .3), {}), ('d', 'inria', g.transform(turn_z(-120.)), {}), ('e', 'lgm', g, dict(plain=True))):
        save_splats(h, tmp_path/name/'thing.ply', conv, **k)
    save_splats(g, tmp_path/'f'/'thing.splat', 'viewer')
    res = evaluate([(case, '')], [of_plys(tmp_path/k) for k in 'abcdef'], P)['methods']
    got = {k: res[k]['objects'][0]['aligned']['psnr'] for k in 'abcdef'}
    assert max(abs(got[k]-got['a']) for k in 'bcde') < .3 and abs(got['f']-got['a']) < 1 and got['a'] > 30
    assert [list(res[k]['about']['conventions']) for k in 'abcdef'] == [['dd3g'], ['lgm'], ['tgs'], ['inria'], ['lgm'], ['viewer']]
    assert res['c']['objects'][0]['unaligned']['psnr'] < got['c']-3 and 'stored after activation' in res['e']['notes'][0]

def test_nothing_is_dropped_in_silence(case, tmp_path, capsys):
    for n in ('thing', 'stranger'): save_splats(thing(), tmp_path/'a'/f'{n}.ply', 'dd3g')
    (tmp_path/'a'/'second.ply').write_bytes(b'ply nonsense')
    cases = [(case, ''), (case_of(thing(1), 'second'), ''), (case_of(thing(2), 'third'), '')]
    rep = report(evaluate(cases, [of_plys(tmp_path/'a')], P), cases, P, ['x.glb: broken'])
    m = rep['methods']['a']
    assert m['extra'] == ['stranger'] and m['missing'] == ['third'] and m['failed'][0]['object'] == 'second' and 'second.ply' in m['failed'][0]['why']
    assert m['mean']['aligned']['all']['psnr']['n'] == 1 and rep['problems'] and json.dumps(rep, allow_nan=False)
    from dd3g.evaluate import say
    say(rep); err = capsys.readouterr().err.splitlines()
    assert all(any(w in l for l in err) for w in ('stranger', 'third', 'second.ply', 'x.glb'))

def test_samples_are_grouped(tmp_path):
    for n in ('a', 'b-seed0', 'b-seed10', 'b-seed2', 'sub/c'): (tmp_path/f'{n}.ply').parent.mkdir(exist_ok=True); (tmp_path/f'{n}.ply').touch()
    got = by_object(tmp_path.rglob('*.ply'), tmp_path)
    assert {k: [q.stem for q in v] for k, v in got.items()} == {'a': ['a'], 'b': ['b-seed0', 'b-seed2', 'b-seed10'], 'sub_c': ['c']}

# pictures

def write_views(folder, x, sizes=None, mode='RGBA'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, v in enumerate(x):
        im = Image.fromarray((v*255).round().byte().permute(1, 2, 0).contiguous().numpy(), 'RGBA')
        if mode == 'RGB': im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
        im.resize(((sizes or [im.width]*99)[i],)*2).save(folder/f'{i:03d}.png')

def test_renders_in_any_order_of_the_ring(case, tmp_path):
    x = straight(draw(Splats(thing()), case.cams, 32))
    write_views(tmp_path/'a'/'thing', x); write_views(tmp_path/'b'/'thing', x.roll(3, 0)); write_views(tmp_path/'c'/'thing', x, mode='RGB')
    res = {k: evaluate([(case, '')], [of_renders(tmp_path/k)], P)['methods'][k]['objects'][0] for k in 'abc'}
    assert res['a']['turns'] == [0.] and res['b']['turns'] == [270.] and res['a']['aligned']['psnr'] > 30
    assert abs(res['b']['aligned']['psnr']-res['a']['aligned']['psnr']) < 1e-3 and res['b']['unaligned']['psnr'] < res['a']['aligned']['psnr']-8 and res['c']['aligned']['psnr'] > 45 and res['c']['aligned']['iou'] > .99

def test_renders_and_plys_of_one_object_agree(case, tmp_path):
    for k in (1., .8):
        s = Splats(thing()).transform(None, None, k)
        pics = Pictures(straight(draw(s, case.cams, 32)))
        a, b = (judge([x], case, P)[0]['aligned']['psnr'] for x in (s, pics))
        assert a > 35 and b > (50 if k == 1 else 20) # pictures can be scaled in the plane only, and lose at 32 px

def test_renders_of_mixed_sizes_and_absent_views(case, tmp_path):
    x = straight(draw(Splats(thing()), case.cams, 32))
    write_views(tmp_path/'a'/'thing', x, sizes=[32, 48]*6); write_views(tmp_path/'b'/'thing', x[:7]); write_views(tmp_path/'d'/'thing', torch.cat([x, x[:2]]))
    a, b, d = (evaluate([(case, '')], [of_renders(tmp_path/k)], P)['methods'][k] for k in 'abd')
    assert 'pictures of 32x32, 48x48, all resized to 32' in a['notes'][0] and a['objects'][0]['aligned']['psnr'] > 25
    assert 'views 007, 008, 009, 010, 011 of 12 are absent' in b['failed'][0]['why'] and not b['objects']
    assert '2 pictures beyond the 12 views' in d['notes'][0] and d['objects']

def test_energy_needs_no_complete_ring(case, tmp_path):
    "A teacher that gives four of the twelve views; its own samples are nearer to it than one answer repeated."
    draws = [straight(draw(Splats(thing(s)), case.cams, 32)) for s in range(4)]
    for s, x in enumerate(draws):
        write_views(tmp_path/'t'/'thing'/f'seed{s}', x)
        for i in set(range(12))-{0, 3, 6, 9}: (tmp_path/'t'/'thing'/f'seed{s}'/f'{i:03d}.png').unlink()
    alike, same = (Contestant(n, {}, lambda c, o=o: [Splats(thing(s)) for s in o]) for n, o in (('alike', range(4)), ('same', [0]*4)))
    res = evaluate([(case, '')], [alike, same], P, teacher=of_renders(tmp_path/'t', partial=True))['methods']
    e = [res[k]['objects'][0]['aligned']['energy'] for k in ('alike', 'same')]
    assert e[0] < e[1] and res['alike']['objects'][0]['aligned']['best_of_k_psnr'] >= res['alike']['objects'][0]['aligned']['psnr']

# floors and statistics

def test_floors(case):
    other = case_of(thing(1), 'other'); total = case.white()+other.white()
    f = floors(case, P, total, 2)
    assert tuple(f) == FLOORS and f['billboard']['psnr_views'][0] > 25 and f['white']['iou'] < 1e-6
    assert torch.allclose(total-case.white(), other.white(), atol=1e-6) and 'mean object' not in floors(case, P, case.white(), 1)

def test_sign_flip_is_exact_and_agrees_with_scipy():
    from scipy.stats import permutation_test
    rng = np.random.default_rng(0)
    for n in (6, 11):
        d = rng.normal(.4, 1, n)
        want = permutation_test((d,), np.mean, permutation_type='samples', n_resamples=np.inf).pvalue
        assert sign_flip(d) == pytest.approx(want, abs=1e-9)
    d = rng.normal(.3, 1, 29)
    want = permutation_test((d,), np.mean, permutation_type='samples', n_resamples=20000, rng=1).pvalue
    assert sign_flip(d) == pytest.approx(want, abs=.015) and sign_flip(d) == sign_flip(d)
    assert sign_flip([0.]*8) == 1 and sign_flip([0.]*20) == 1

def test_holm():
    assert holm([.01, .04, .03]) == pytest.approx([.03, .06, .06]) and holm([.5, .9]) == [1., 1.] and holm([]) == []

def test_pairs_use_common_objects_only():
    row = lambda n, v: dict(object=n, group='', aligned=dict(psnr=v))
    m = dict(a=dict(objects=[row('x', 3.), row('y', 5.), row('z', 9.)]), b=dict(objects=[row('y', 4.), row('x', 1.)]))
    r, = pairs(m, metrics=('psnr',))
    assert (r['n'], r['difference']) == (2, 1.5)

def test_several_inputs_count_as_one_object(tmp_path):
    a = [replace_name(case_of(thing(s), n), n, az) for s, n in ((0, 'x'), (1, 'y')) for az in (30., 120.)]
    res = evaluate([(c, '') for c in a], [Contestant('m', {}, lambda c: [Splats(thing(0))])], P)
    rep = report(res, [(c, '') for c in a], P)
    assert rep['methods']['m']['mean']['aligned']['all']['psnr']['n'] == 2 and len(rep['methods']['m']['objects']) == 4 and [o['key'] for o in rep['objects']] == ['x@30', 'x@120', 'y@30', 'y@120']

def replace_name(c, name, az): c.name, c.azimuth = name, az; return c

def test_groups_have_means_of_their_own(case):
    cases = [(case, 'a'), (case_of(thing(1), 'q'), 'b')]
    rep = report(evaluate(cases, [Contestant('m', {}, lambda c: [Splats(thing(0))])], P), cases, P)
    assert set(rep['methods']['m']['mean']['aligned']) == {'all', 'a', 'b'} and set(rep['floors']['white']) == {'all', 'a', 'b'}
    assert '| m | 2 |' in table(rep) and '*billboard*' in table(rep, group='a')

# reports and the program

@pytest.fixture
def reports(case, tmp_path):
    "Two reports of one set, the second without one object."
    cases = [(case_of(thing(s), n), '') for s, n in enumerate(('one', 'two', 'three'))]
    for label, miss, noise in (('A', None, 0.), ('B', 'two', .04)):
        def answer(c, miss=miss, noise=noise):
            if c.name == miss: return None
            g = thing(('one', 'two', 'three').index(c.name)); g.mu += noise*torch.randn(g.mu.shape, generator=torch.Generator().manual_seed(1))
            return [Splats(g)]
        f = tmp_path/f'{label}.json'
        rep = report(evaluate(cases, [Contestant(label, {}, answer)], P, pictures=f.with_suffix('.pictures')), cases, P, perceptual=[], seconds=0.)
        f.write_text(json.dumps(rep))
    return tmp_path

def test_compare(reports, capsys):
    main(['compare', str(reports/'A.json'), str(reports/'B.json'), '--out', str(reports/'out'), '--views', '3'])
    out = capsys.readouterr()
    assert {q.name for q in (reports/'out').iterdir()} == {'best.png', 'worst.png', 'differences.png', 'scatter.png', 'table.md', 'pairs.json'}
    text = (reports/'out'/'table.md').read_text()
    assert 'Only A has: two' in text and '| A - B | psnr | 2 |' in text and 'sign-flip' in text and 'only A has two' in out.err
    assert json.loads((reports/'out'/'pairs.json').read_text())[0]['difference'] > 0

@pytest.mark.parametrize('spoil, why', [(lambda r: r.update(protocol_hash='0', protocol=dict(r['protocol'], elevation=7.)), 'elevation differ'), (lambda r: r['objects'][0].update(sha='0'), 'look different'), (lambda r: r.pop('methods'), 'no report')])
def test_incomparable_reports_are_refused(reports, spoil, why):
    r = json.loads((reports/'B.json').read_text()); spoil(r); (reports/'B.json').write_text(json.dumps(r))
    with pytest.raises(UserError, match=why): open_reports([reports/'A.json', reports/'B.json'])

def run(capsys, *args):
    try: main([*map(str, args)]); code = 0
    except SystemExit as e: code = e.code
    return code, [l for l in capsys.readouterr().err.splitlines() if l.startswith('dd3g:')]

def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path/'empty').mkdir(); save_splats(thing(), tmp_path/'p'/'x.ply', 'dd3g')
    for args, why in ((['--objects', tmp_path/'empty', '--plys', tmp_path/'p'], 'no objects'), (['--plys', tmp_path/'empty'], 'holds no .ply'), (['--renders', tmp_path/'p'], 'holds no NAME/000.png'), (['--plys', tmp_path/'p', '--method', 'a', 'b'], '2 labels for 1'),
                      (['--plys', tmp_path/'p', tmp_path/'p'], 'label of two methods'), (['--plys', tmp_path/'p', '--method', 'white'], 'are taken'), (['--plys', tmp_path/'p', '--convention', 'maya'], 'there are auto'), (['compare'], 'no report named'), (['--checkpoint', 'gone.safetensors'], 'no such checkpoint')):
        code, said = run(capsys, *args)
        assert code == 2 and len(said) == 1 and why in said[0], (args, said)

@pytest.mark.draws
def test_program(tmp_path, capsys):
    "From models to report, and the pictures that are handed out."
    from dd3g.objects import procedural
    for s, c in ((0, 'robot'), (7, 'mug')): procedural(s, c).save(tmp_path/'set'/'toys'/f'{c}.glb')
    (tmp_path/'set'/'broken.glb').write_bytes(b'glTF')
    small = ['--size', '32', '--input-size', '48', '--views', '4', '--align-step', '90']
    code, said = run(capsys, 'inputs', '--objects', tmp_path/'set', '--out', tmp_path/'in', *small)
    assert code == 0 and sorted(q.name for q in (tmp_path/'in').iterdir()) == ['mug.png', 'robot.png'] and Image.open(tmp_path/'in'/'mug.png').size == (48, 48) and 'broken.glb' in said[0]
    for n in ('robot', 'mug'): save_splats(thing(), tmp_path/'p'/f'{n}.ply', 'lgm')
    code, said = run(capsys, '--objects', tmp_path/'set', '--plys', tmp_path/'p', '--out', tmp_path/'r.json', '--lpips', 'random-squeeze', *small)
    rep = json.loads((tmp_path/'r.json').read_text())
    assert code == 0 and 'broken.glb' in said[0] and rep['perceptual'] == ['rLPIPS-squeeze'] and set(rep['methods']['p']['mean']['aligned']['all']) >= {'psnr', 'ssim', 'iou', 'sharpness', 'rLPIPS-squeeze'}
    assert all(rep[k] for k in ('protocol_hash', 'objects_hash', 'statistics', 'alignment', 'device')) and len(rep['objects']) == 2 and (tmp_path/'r.pictures'/'p'/'mug.png').exists()

def test_checkpoint_meets_a_steep_camera(tmp_path):
    "A student trained at low elevations is placed so that it believes to be seen from where the true camera is."
    from dd3g.config import SCALES
    from dd3g.evaluate import of_checkpoint
    from dd3g.generate import Generator
    from dd3g.images import recentre
    from dd3g.loop import save_weights
    from dd3g.pepd import PEPD
    torch.manual_seed(0); tiny = SCALES['tiny']
    save_weights(PEPD(tiny), tmp_path/'t.safetensors', tiny, 'student', torch.bfloat16)
    c = case_of(thing(), elevation=40.); c.ring = False
    s, _ = of_checkpoint(tmp_path/'t.safetensors', samples=2).answer(c)
    top = tiny.view.elevation[1]; rgba = recentre(c.rgba, tiny.view.size)
    g = Generator.from_pretrained(tmp_path/'t.safetensors').batch([rgba]*2, [0, 1], [(0., top)]*2)[0]
    a, b = draw(s, c.source, 32).rgb, draw(Splats(g), orbit(90., top), 32).rgb
    assert (a-b).abs().max() < .02 and of_checkpoint(tmp_path/'t.safetensors').about['sha']

# in memory: students, teachers, what is measured against a teacher

@pytest.fixture(scope='module')
def tiny():
    from dd3g.config import SCALES
    from dd3g.pepd import PEPD
    from dd3g.teacher import Teacher
    torch.manual_seed(0)
    return SCALES['tiny'], PEPD(SCALES['tiny']), Teacher(SCALES['tiny']).eval()

def test_student_in_memory_is_left_as_it_was(tiny, case):
    cfg, G, _ = tiny; G.train()
    trains = [p.requires_grad for p in G.parameters()]
    one, many = of_model(G, cfg, 'mine', samples=3), of_model(G, cfg, 'mine', samples=3, batch=2)
    a = one.answer(case); many.prepare([case_of(thing(1), 'other'), case]); b = many.answer(case)
    assert G.training and [p.requires_grad for p in G.parameters()] == trains and not a[0].g.mu.requires_grad
    assert len(a) == 3 and all(torch.allclose(x.g.mu, y.g.mu, atol=1e-5) for x, y in zip(a, b)) and one.about['seed'] == 0
    later = of_model(G, cfg, 'mine', samples=1, seed=2).answer(case)[0] # the third sample is the first of seed 2
    assert torch.allclose(later.g.mu, a[2].g.mu, atol=1e-5)

def test_many_at_once_is_one_by_one(case):
    "Samples that go through the judge together get the marks they get alone."
    gs = [thing(), thing(1), thing(2)]; gs[1] = gs[1].transform(turn_z(90.)); gs[2].alpha *= 0
    answers = [Splats(g) for g in gs]
    r, _ = judge(answers, case, P); alone = [judge([a], case, P)[0] for a in answers]
    assert r['turns'] == [t for a in alone for t in a['turns']] and r['turns'][1] == 270
    for mode in ('unaligned', 'aligned'):
        for k in ('psnr', 'ssim', 'iou', 'sharpness', 'chroma', 'white'): assert r[mode][k] == pytest.approx(np.mean([a[mode][k] for a in alone]), abs=1e-4), (mode, k)

def test_white_and_chroma():
    g = thing(); g.color[:100] = .99; g.alpha[:50] = .05
    assert habits(g)['white'].item() == pytest.approx(50/400) and habits(Gaussians(g.mu, g.scale, g.quat, g.color*0+.3, g.alpha))['chroma'] < 1e-6
    red = g.color*0; red[:, 0] = 1
    assert habits(Gaussians(g.mu, g.scale, g.quat, red, g.alpha))['chroma'].item() == pytest.approx(1)

def test_teacher_in_memory(tiny):
    cfg, G, T = tiny
    c = case_of(thing(), p=P, elevation=3.); who = of_teacher(T, samples=3, steps=2)
    views = who.answer(c); there = views[0].there
    assert len(views) == 3 and there.nonzero().flatten().tolist() == [0, 3, 6, 9]
    want = teacher_views(T, torch.stack([shrink(c.rgba, 32)]*3), torch.full((3,), 3.), [0, 1, 2], steps=2) # azimuths 0, 90, 180, 270; the ring begins at 90
    for k in range(3): assert torch.allclose(views[k].rgba[[9, 0, 3, 6], :3], want[k], atol=1e-5)
    res = evaluate([(c, '')], [who, of_model(G, cfg, 'student', samples=3)], P, teacher=who, floor=False)['methods']
    t, s = (res[k]['objects'][0]['unaligned'] for k in ('teacher', 'student'))
    assert t['energy'] < 0 < s['energy'] and t['diversity'] == pytest.approx(1) and t['own_psnr'] == 100 > t['other_psnr'] and t['teacher_sharpness'] == pytest.approx(1)
    assert t['mean_of_k_psnr'] == pytest.approx(t['there_mean_of_k_psnr'], abs=1e-3) == t['teacher_mean_of_k_psnr'] and s['teacher_mean_of_k_psnr'] == pytest.approx(t['teacher_mean_of_k_psnr']) and len(t['psnr_views']) == 4
    assert res['teacher']['notes'] == ['judged at the views that it draws only'] and 'own_psnr' in s

def test_own_is_told_only_where_n_is_the_same(tiny):
    cfg, G, T = tiny; c = case_of(thing(), elevation=3.)
    res = evaluate([(c, '')], [of_model(G, cfg, 'other seeds', samples=3, seed=5)], P, teacher=of_teacher(T, samples=3, steps=1), floor=False)['methods']['other seeds']
    assert 'own_psnr' not in res['objects'][0]['unaligned'] and 'energy' in res['objects'][0]['unaligned']

def test_pictures_nobody_knows_the_sides_of(tiny, tmp_path, capsys):
    from dd3g.testsets import freeze
    cfg, G, T = tiny; c = case_of(thing(), elevation=3.); unknown = Case('found', c.rgba, c.source, c.cams, None, True)
    rep = report(evaluate([(unknown, '')], [of_model(G, cfg, 'student', samples=2)], P, teacher=of_teacher(T, samples=2, steps=1)), [(unknown, '')], P)
    row = rep['methods']['student']['mean']['unaligned']['all']
    assert {'energy', 'diversity', 'own_psnr', 'white'} <= set(row) and 'psnr' not in row and not rep['floors'] and 'energy' in table(rep) and json.dumps(rep, allow_nan=False)
    freeze([(unknown, '')], P, tmp_path/'p.tar')
    with pytest.raises(SystemExit): main(f'--objects {tmp_path}/p.tar --out {tmp_path}/o.json --samples 2'.split())
    assert 'name a teacher' in capsys.readouterr().err
    T.save(tmp_path/'t.safetensors')
    from dd3g.loop import save_weights
    save_weights(G, tmp_path/'s.safetensors', cfg, 'student')
    main(f'--objects {tmp_path}/p.tar --checkpoint {tmp_path}/s.safetensors --teacher {tmp_path}/t.safetensors --out {tmp_path}/o.json --samples 2 --no-pictures --lpips'.split())
    assert 'energy' in json.loads((tmp_path/'o.json').read_text())['methods']['s']['mean']['aligned']['all']

def test_each_set_has_its_own_mean_object():
    cases = [(case_of(thing(s), f'a{s}'), 'a') for s in range(2)]+[(case_of(thing(s).transform(turn_z(90.)), f'b{s}'), 'b') for s in range(2)]
    res = report(evaluate(cases, [], P), cases, P)['floors']['mean object']
    alone = report(evaluate(cases[:2], [], P), cases[:2], P)['floors']['mean object']
    assert set(res) == {'all', 'a', 'b'} and res['a']['psnr']['mean'] == pytest.approx(alone['all']['psnr']['mean'], abs=1e-4) and abs(res['a']['psnr']['mean']-res['all']['psnr']['mean']) > .01

def test_contestants_are_asked_in_blocks(monkeypatch):
    monkeypatch.setattr(E, 'BLOCK', 2); seen = []
    who = E.in_batches(Contestant('x', {}, None), lambda cs: seen.append(len(cs)) or [[Splats(thing())] for _ in cs])
    cases = [(case_of(thing(), f'c{i}'), '') for i in range(3)]
    assert len(evaluate(cases, [who], P, floor=False)['methods']['x']['objects']) == 3 and seen == [2, 1]
