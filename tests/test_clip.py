"CLIP similarity: known answers, checkpoints in every form, and no number without its name."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dd3g.clip import Clip, ClipProtocol, FeatureCache, draw, fit, load_tower, main, preprocessing, random_tower, reference, score, stems, thin, tower, visual_state, weights_file
from dd3g.core import UserError
from dd3g.gaussians import Gaussians, demo_gaussians

@pytest.fixture(scope='module')
def pics(): return torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def clip(): return Clip('random', where='cpu')

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A whole network of open_clip with random weights, as a state dictionary."
    import open_clip
    torch.manual_seed(0)
    return open_clip.create_model('ViT-S-32-alt', load_weights=False).state_dict()

def test_itself_scores_one(clip, pics):
    s = score(clip, pics, [[p, p] for p in pics])
    assert abs(s['mean']-1) < 1e-5 and s['retrieval'] == 1 and s['shuffled'] < 1 and abs(s['margin']-(1-s['shuffled'])) < 1e-5

def test_mean_by_hand(clip, pics):
    f = clip.embed(pics)
    s = score(clip, pics[:2], [pics[1:4], pics[3:]], ['a', 'b'])
    a, b = (f[1:4]@f[0]).mean().item(), (f[3:]@f[1]).mean().item()
    assert np.allclose([o['score'] for o in s['objects']], [a, b], atol=1e-6) and abs(s['mean']-(a+b)/2) < 1e-6
    assert abs(s['objects'][0]['other']-(f[1:4]@f[1]).mean().item()) < 1e-6 and abs(s['objects'][1]['worst']-(f[3:]@f[1]).min().item()) < 1e-6

def test_every_form_of_a_checkpoint(small, pics, tmp_path):
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in small.items()}, tmp_path/'open_clip_model.safetensors')
    torch.save(small, tmp_path/'b.pt'); torch.save({'state_dict': {'module.'+k: v for k, v in small.items()}}, tmp_path/'c.bin')
    got = [Clip(str(p), 'ViT-S-32-alt', 'cpu').embed(pics) for p in (tmp_path/'open_clip_model.safetensors', tmp_path, tmp_path/'b.pt', tmp_path/'c.bin')]
    assert all(torch.equal(got[0], g) for g in got[1:])
    import open_clip
    m = open_clip.create_model('ViT-S-32-alt', load_weights=False); m.load_state_dict(small); m.eval()
    from dd3g.clip import as_rgb
    pre = open_clip.image_transform(m.visual.image_size, is_train=False)
    with torch.no_grad(): want = m.encode_image(torch.stack([pre(as_rgb(p)) for p in pics]), normalize=True)
    assert (got[0]-want).abs().max() < 1e-5 # what open_clip itself gives

def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'hacked'), 'w'))
    torch.save({'visual.x': Evil()}, tmp_path/'x.pt')
    with pytest.raises(UserError, match='cannot be read'): visual_state(tmp_path/'x.pt')
    assert not (tmp_path/'hacked').exists()

def test_wrong_weights_are_refused(small, tmp_path):
    from safetensors.torch import save_file
    torch.save(small, tmp_path/'s.pt'); torch.save({'text.x': torch.zeros(1)}, tmp_path/'t.pt')
    (tmp_path/'cut.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a": '); (tmp_path/'cut.pt').write_bytes((tmp_path/'s.pt').read_bytes()[:5000])
    save_file({'vision_model.embeddings.x': torch.zeros(1)}, tmp_path/'hf.safetensors')
    for name, words in (('t.pt', 'no weights of an image tower'), ('cut.safetensors', 'cannot be read'), ('cut.pt', 'cannot be read'), ('hf.safetensors', 'transformers layout')):
        with pytest.raises(UserError, match=words): visual_state(tmp_path/name)
    with pytest.raises(UserError, match='--arch'): load_tower(tmp_path/'s.pt', 'ViT-B-32')
    with pytest.raises(UserError, match='no such network'): tower('ViT-none')
    with pytest.raises(UserError, match='no such tag of ViT-B-32; its tags: openai'): weights_file('nothing', 'ViT-B-32')
    with pytest.raises(UserError, match='not on this machine'): weights_file('laion2b_s39b_b160k', 'ViT-bigG-14')

def test_towers_with_tables_outside_their_weights():
    "On the meta device such a table would stay empty."
    assert not [n for n, b in tower('EVA02-B-16').named_buffers() if b.is_meta]

def test_preprocessing_is_found(tmp_path):
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(preprocess_cfg=dict(mean=[.5]*3, std=[.5]*3))))
    assert preprocessing('x', tmp_path/'m.safetensors', 'ViT-L-14')['mean'] == [.5]*3
    assert preprocessing('laion2b_s32b_b82k', tmp_path/'none'/'m', 'ViT-L-14')['mean'] == (.5, .5, .5) # this tag was trained with other numbers than OpenAI's
    assert preprocessing('x', tmp_path/'none'/'m', 'ViT-L-14')['source'].startswith('assumed')

def test_cache_survives_and_knows_its_network(pics, tmp_path):
    a = Clip('random', where='cpu', cache=tmp_path/'c.sqlite'); f = a.embed(pics)
    b = Clip('random', where='cpu', cache=tmp_path/'c.sqlite')
    b.net = None # so it cannot compute
    assert torch.equal(b.embed(pics), f)
    c = FeatureCache(tmp_path/'c.sqlite', 'another network')
    assert c.get('x') is None
    (tmp_path/'bad.sqlite').write_bytes(b'not a database at all'*100)
    with pytest.raises(UserError, match='--cache'): FeatureCache(tmp_path/'bad.sqlite', 'k')

def test_random_network_is_the_same_everywhere(pics):
    state = torch.get_rng_state()
    assert torch.equal(random_tower().conv1.weight, random_tower().conv1.weight) and not torch.equal(random_tower(1).conv1.weight, random_tower().conv1.weight)
    assert torch.equal(torch.get_rng_state(), state)

def test_fit_ignores_strays_and_scale():
    g = demo_gaussians(2000)
    far = Gaussians(*[torch.cat([x, x[:5]]) for x in (g.mu, g.scale, g.quat, g.color, g.alpha)]); far.mu[-5:] = 50.
    a, b = fit(g), fit(Gaussians(g.mu*7+3, g.scale*7, g.quat, g.color, g.alpha))
    assert torch.allclose(a.mu, b.mu, atol=1e-4) and torch.allclose(a.scale, b.scale, atol=1e-5)
    c = fit(far); assert (c.mu[:2000]-a.mu).abs().max() < .05
    none = Gaussians(g.mu, g.scale, g.quat, g.color, g.alpha*0); assert torch.equal(fit(none).mu, g.mu)

def test_reference_is_square_on_white(tmp_path):
    im = Image.new('RGBA', (60, 30)); im.paste((200, 0, 0, 255), (20, 5, 40, 25)); im.save(tmp_path/'a.png')
    r = reference(tmp_path/'a.png')
    assert r.size == (60, 60) and r.getpixel((0, 0)) == (255, 255, 255) and r.getpixel((30, 30)) == (200, 0, 0)
    assert reference(tmp_path/'a.png', .5).getpixel((0, 0)) == (128, 128, 128)

def test_folders_of_renders(tmp_path):
    for n in ('duck/b.png', 'duck/a.png', 'mug_001.png', 'mug_000.png', 'toy_car.png'):
        (tmp_path/n).parent.mkdir(exist_ok=True); Image.new('RGB', (8, 8)).save(tmp_path/n)
    assert {k: [p.name for p in v] for k, v in stems(tmp_path).items()} == {'duck': ['a.png', 'b.png'], 'mug': ['mug_000.png', 'mug_001.png'], 'toy_car': ['toy_car.png']}
    assert thin(range(16), 8) == list(range(0, 16, 2)) and thin(range(3), 8) == [0, 1, 2]

@pytest.fixture
def made(tmp_path):
    (tmp_path/'in').mkdir(); (tmp_path/'ply').mkdir()
    for i, n in enumerate(('duck', 'mug')):
        im = Image.new('RGBA', (64, 64)); im.paste((200, 30*i, 50, 255), (16, 16, 48, 48)); im.save(tmp_path/'in'/f'{n}.png'); demo_gaussians(100).save_ply(tmp_path/'ply'/f'{n}.ply')
    demo_gaussians(100).save_ply(tmp_path/'ply'/'alone.ply')
    return tmp_path

def run(made, *args):
    try: main(['--inputs', str(made/'in'), '--out', str(made/'o.json'), '--size', '64', '--views', '2', *map(str, args)]); return 0
    except SystemExit as e: return e.code

def test_every_output_says_that_it_means_nothing(made, capsys):
    assert run(made, '--plys', made/'ply', '--weights', 'random') == 0
    said = capsys.readouterr(); out = json.loads((made/'o.json').read_text())
    assert all('means nothing' in l for l in said.out.splitlines()) and 'means nothing' in out['metric'] and out['warning'] and out['means_something'] is False and out['network']['means_something'] is False
    assert out['no_input'] == ['alone'] and 'alone' in said.err and len(out['objects']) == 2 and out['protocol']['views'] == 2

@pytest.mark.parametrize('args, words', [([], 'one of --renders'), (['--plys', '{p}/ply', '--checkpoint', 'default'], 'one of --renders'), (['--plys', '{p}/none'], 'no such folder'),
    (['--plys', '{p}/in'], 'no object has the name'), (['--plys', '{p}/ply', '--record', 'x'], 'does not enter the records'), (['--plys', '{p}/ply', '--views', '0'], 'at least one view'), (['--checkpoint', '{p}/x.safetensors'], 'no such checkpoint')])
def test_mistakes_are_one_line(made, capsys, args, words):
    assert run(made, *[a.format(p=made) for a in args], '--weights', 'random') == 2
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('dd3g:')]
    assert words in lines[-1] and not (made/'o.json').exists()

def test_drawing_is_the_protocol():
    x = draw(demo_gaussians(200), ClipProtocol(views=3, size=48, background=0.))
    assert x.shape == (3, 3, 48, 48) and x[:, :, 0, 0].max() == 0
