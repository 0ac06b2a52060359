"Published layouts: written small and random, read back, and spoilt in every way that a user meets."
import contextlib, io, json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dd3g.cameras import four_views
from dd3g.checkpoints import find, plain_clip, plain_vae, read_checkpoint, read_weights
from dd3g.config import AutoencoderConfig, EncoderConfig, TeacherConfig
from dd3g.core import UserError, fix_torchvision, seeded_randn
from dd3g.ddim import Schedule, rollout
from dd3g.loop import save_weights
from dd3g.teacher import NEGATIVE, SUFFIX, Autoencoder, ImageEncoder, MultiViewTeacher, MultiViewUNet, MVDream, Teacher, Words, inspect, main, shake

ENC = EncoderConfig('clip', 28, 14, 64, 3, 1)
NET = TeacherConfig(32, (1, 2), 1, (2, 1), 32, 1, 32, 64, 77, 16, 4, 1, 1, 64, encoder=ENC)
TEXT = dict(hidden_size=64, vocab_size=49408, max_position_embeddings=77, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act='gelu')


def part(folder, tensors, name='model', config='config', **said):
    folder.mkdir(parents=True)
    if tensors: save_file({k: v.contiguous() for k, v in tensors.items()}, folder/f'{name}.safetensors')
    (folder/f'{config}.json').write_text(json.dumps(said))


def vocabulary(folder):
    folder.mkdir(parents=True)
    chars = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    (folder/'vocab.json').write_text(json.dumps({c: i for i, c in enumerate([*chars, *[c+'</w>' for c in chars], '<|startoftext|>', '<|endoftext|>'])}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(pad_token='!', bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>', model_max_length=77)))


class Parts:
    "Random weights of every part; CLIP as open_clip holds it."
    def __init__(self, ip=True):
        fix_torchvision()
        import open_clip
        torch.manual_seed(0)
        self.net = NET if ip else replace(NET, image_tokens=0, pixel_frame=False)
        self.unet, self.ae = shake(MultiViewUNet(self.net)), Autoencoder(AutoencoderConfig((32, 32), 1)).eval()
        self.clip = open_clip.CLIP(16, dict(layers=3, width=64, head_width=64, patch_size=14, image_size=28), dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=3)).eval()
        own = self.clip.state_dict()
        self.visual = {k[7:]: v for k, v in own.items() if k.startswith('visual.')}
        self.text = {k: v for k, v in own.items() if not k.startswith('visual.')}
    def folder(self, path):
        part(path/'unet', self.unet.state_dict(), 'diffusion_pytorch_model', num_head_channels=32, model_channels=32, channel_mult=[1, 2], ip_dim=self.net.image_tokens, image_size=16, _class_name='MultiViewUNetModel')
        part(path/'vae', self.ae.state_dict(), 'diffusion_pytorch_model', scaling_factor=.18215, block_out_channels=[32, 32])
        part(path/'text_encoder', {f'text_model.{k}': v for k, v in plain_clip(self.text, True).items()}, num_attention_heads=1, hidden_act='gelu')
        vocabulary(path/'tokenizer')
        part(path/'scheduler', None, config='scheduler_config', beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012, num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type='epsilon')
        if self.net.image_tokens:
            part(path/'image_encoder', {f'vision_model.{k}': v for k, v in plain_clip(self.visual).items()}, num_attention_heads=1, hidden_act='gelu')
            part(path/'feature_extractor', None, config='preprocessor_config', size=28)
        return path
    def original(self, path, clip=True, vae='vae_model.'):
        state = {f'model.diffusion_model.{k}': v for k, v in self.unet.state_dict().items()} | {vae+k: v for k, v in compvis(self.ae.state_dict()).items()}
        if clip: state |= {f'clip_model.model.{k}': v for k, v in self.clip.state_dict().items()}
        torch.save(state | {'betas': torch.linspace(0, 1, 10), 'model_ema.decay': torch.tensor(.99)}, path)
        return path


def compvis(sd, levels=2): # diffusers' autoencoder under CompVis' names, 1x1 convolutions where it has linear layers
    out = {}
    for k, v in sd.items():
        p = k.split('.')
        s, rest = p[0], p[1:]
        if rest[0] in ('down_blocks', 'up_blocks'):
            i = int(rest[1]) if rest[0] == 'down_blocks' else levels-1-int(rest[1])
            what = f'block.{rest[3]}' if rest[2] == 'resnets' else {'downsamplers': 'downsample', 'upsamplers': 'upsample'}[rest[2]]
            rest = [rest[0].split('_')[0], str(i), what, *rest[4:]]
        elif rest[0] == 'mid_block': rest = ['mid', f'block_{int(rest[2])+1}', *rest[3:]] if rest[1] == 'resnets' else ['mid', 'attn_1', dict(group_norm='norm', to_q='q', to_k='k', to_v='v', to_out='proj_out')[rest[3]], rest[-1]]
        elif rest[0] == 'conv_norm_out': rest[0] = 'norm_out'
        if 'attn_1' in rest and v.dim() == 2: v = v[:, :, None, None]
        out['.'.join([s, *rest]).replace('conv_shortcut', 'nin_shortcut')] = v
    return out


@pytest.fixture(scope='module')
def parts(): return Parts()


@pytest.fixture(scope='module')
def published(parts, tmp_path_factory):
    d = tmp_path_factory.mktemp('published')
    return parts.folder(d/'folder'), parts.original(d/'original.pt')


@pytest.fixture(scope='module')
def teachers(published): return [Teacher.from_pretrained(p) for p in published]


@pytest.fixture
def inputs(): return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), seeded_randn(range(2), 5, 4, 16, 16), four_views(torch.tensor([0., 30.]), torch.tensor([0., 5.]))


def copy_of(folder, to):
    import shutil
    return shutil.copytree(folder, to)


def test_both_layouts_hold_the_same_teacher(parts, teachers, inputs):
    a, b = teachers
    for n, v in a.state_dict().items():
        if n != 'text': assert torch.equal(v, b.state_dict()[n]), n # the tokenizers differ
    assert replace(a.cfg, view=b.cfg.view) == b.cfg and a.cfg.teacher == NET and a.cfg.view.size == 32 # a config.json tells the side of a latent, the original does not
    image, z, cams = inputs
    t = torch.tensor([900, 10])
    cond = b.encode_condition(image)
    with torch.no_grad():
        want = parts.unet(z, t, b.text[:1].expand(2, -1, -1), cams.embedding(), b.encoder(image), parts.ae.encode(image))
        x = torch.nn.functional.interpolate(image, (28, 28), mode='bicubic', antialias=True)
        v = parts.clip.visual; x = (x-b.encoder.mean)/b.encoder.std # open_clip's own tower, up to its last block
        x = torch.cat([v.class_embedding.expand(2, 1, -1), v.conv1(x).flatten(2).mT], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for blk in list(v.transformer.resblocks)[:-1]: x = blk(x)
    torch.testing.assert_close(b.encoder(image), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.denoise(z, t, cond, cams), want, rtol=1e-4, atol=1e-4)
    assert cond.tokens.shape == (2, 77+4, 64)


def test_text_is_the_originals(parts, teachers):
    "open_clip's own text tower up to its last block, then its final norm."
    import open_clip
    c = parts.clip
    with torch.no_grad():
        x = c.token_embedding(open_clip.SimpleTokenizer()([SUFFIX, NEGATIVE, 'a duck'+SUFFIX, ''], context_length=77)) + c.positional_embedding
        for blk in list(c.transformer.resblocks)[:-1]: x = blk(x, attn_mask=c.attn_mask)
        want = c.ln_final(x)
    b = teachers[1]
    torch.testing.assert_close(torch.cat([b.text, b.embed('a duck'), b.words([''])]), want, rtol=1e-4, atol=1e-4)
    assert b.text.shape == (2, 77, 64)


def test_prompts(teachers, inputs):
    for t in teachers:
        image = inputs[0]
        plain, duck, no = t.encode_condition(image), t.encode_condition(image, 'a duck'), t.encode_condition(image, negative='')
        assert torch.equal(t.encode_condition(image, '').tokens, plain.tokens) # the usual prompt is the empty one
        assert not torch.equal(duck.tokens, plain.tokens) and torch.equal(duck.blind, plain.blind)
        assert torch.equal(no.tokens, plain.tokens) and not torch.equal(no.blind, plain.blind)
        two = t.encode_condition(image, ['a duck', 'a cup'])
        assert torch.equal(two.tokens[0], duck.tokens[0]) and not torch.equal(two.tokens[1], duck.tokens[1])
        given = t.encode_condition(image, t.words(['a duck'+SUFFIX])[0])
        assert torch.equal(given.tokens, duck.tokens)


def test_each_prompt_is_computed_once(teachers, monkeypatch):
    w, calls = teachers[0].words, []
    forward = w.net.forward
    monkeypatch.setattr(w.net, 'forward', lambda ids: calls.append(len(ids)) or forward(ids))
    w(['once', 'twice']), w(['twice', 'once', 'thrice'])
    assert calls == [2, 1]


def test_prompt_options(published):
    t = Teacher.from_pretrained(published[0], prompt='a duck', suffix='', negative='')
    assert torch.equal(t.text, t.words(['a duck', '']))
    assert t.fingerprint() != Teacher.from_pretrained(published[0]).fingerprint()


def test_opened_again_from_our_own_file(teachers, tmp_path, inputs):
    a = teachers[0]
    a.save(tmp_path/'t.safetensors')
    b = Teacher.from_pretrained(tmp_path/'t.safetensors')
    assert b.fingerprint() == a.fingerprint() and torch.equal(b.encode_condition(inputs[0]).tokens, a.encode_condition(inputs[0]).tokens)
    with pytest.raises(UserError, match='no text encoder'): b.encode_condition(inputs[0], 'a duck')
    other = {k.replace('encoder.net.vision_model.', 'encoder.net.') if '.vision_model.' in k else k.replace('encoder.net.', 'encoder.net.vision_model.'): v for k, v in a.state_dict().items()}
    save_weights(other, tmp_path/'o.safetensors', a.cfg, 'teacher') # as the other versions of transformers name it
    assert Teacher.load(tmp_path/'o.safetensors').fingerprint() == a.fingerprint()


def test_it_rolls_out(teachers, inputs):
    image, z, cams = inputs
    t = teachers[0]
    out = rollout(t, Schedule(t.cfg.diffusion), image, cams, z, steps=2)
    assert out.shape == (2, 4, 4, 16, 16) and out.isfinite().all() and isinstance(t, MultiViewTeacher)


def test_ip_weight_is_folded_in(published, tmp_path, teachers):
    d = copy_of(published[0], tmp_path/'d')
    c = json.loads((d/'unet'/'config.json').read_text())
    (d/'unet'/'config.json').write_text(json.dumps(dict(c, ip_weight=.5)))
    k = 'middle_block.1.transformer_blocks.0.attn2.to_v_ip.weight'
    torch.testing.assert_close(Teacher.from_pretrained(d).unet.state_dict()[k]*2, teachers[0].unet.state_dict()[k])


@pytest.mark.parametrize('gone', ['unet', 'vae', 'text_encoder', 'tokenizer', 'image_encoder', 'feature_extractor', 'scheduler'])
def test_missing_part(published, tmp_path, gone):
    import shutil
    d = copy_of(published[0], tmp_path/'d'); shutil.rmtree(d/gone)
    with pytest.raises(UserError, match=gone) as e: Teacher.from_pretrained(d)
    assert str(e.value).count('\n') == 0
    if gone != 'unet': Teacher.from_pretrained(d, parts=published[0])


def test_part_without_weights(published, tmp_path):
    d = copy_of(published[0], tmp_path/'d'); (d/'vae'/'diffusion_pytorch_model.safetensors').unlink()
    with pytest.raises(UserError, match='vae missing'): Teacher.from_pretrained(d)


@pytest.mark.parametrize('where, key', [('unet', 'out.2.bias'), ('unet', 'input_blocks.0.0.weight'), ('vae', 'quant_conv.bias'), ('image_encoder', 'vision_model.post_layernorm.bias'), ('text_encoder', 'text_model.final_layer_norm.bias')])
@pytest.mark.parametrize('how', ['shape', 'nan', 'gone'])
def test_spoilt_tensor(published, tmp_path, where, key, how):
    d = copy_of(published[0], tmp_path/'d')
    f = next((d/where).glob('*.safetensors'))
    state = load_file(f)
    if how == 'shape': state[key] = torch.zeros(3, *state[key].shape[1:])
    if how == 'nan': state[key].view(-1)[0] = float('nan')
    if how == 'gone': del state[key]
    save_file(state, f)
    with pytest.raises(UserError, match='NaN' if how == 'nan' else key.split('.')[-2] if where != 'unet' else r'out\.2|input_blocks\.0') as e: Teacher.from_pretrained(d)
    assert str(e.value).count('\n') == 0


def test_original_without_towers(parts, published, tmp_path):
    path = parts.original(tmp_path/'bare.pt', clip=False)
    with pytest.raises(UserError, match='text_encoder, image_encoder missing.*parts='): Teacher.from_pretrained(path)
    t = Teacher.from_pretrained(path, parts=published[0])
    assert t.embed('a duck').shape == (1, 77, 64)


class Trojan:
    def __reduce__(self): return exec, ('raise RuntimeError("the file was run")',)


def test_nothing_is_unpickled(tmp_path, parts):
    torch.save(dict(state_dict=parts.unet.state_dict(), extra=Trojan()), tmp_path/'trojan.pt')
    with pytest.raises(UserError, match='needs unpickling of .*exec'): Teacher.from_pretrained(tmp_path/'trojan.pt')
    torch.save(parts.unet, tmp_path/'module.pt')
    with pytest.raises(UserError, match='needs unpickling'): Teacher.from_pretrained(tmp_path/'module.pt')
    (tmp_path/'bin'/'unet').mkdir(parents=True)
    torch.save(dict(extra=Trojan()), tmp_path/'bin'/'unet'/'diffusion_pytorch_model.bin')
    with pytest.raises(UserError, match='needs unpickling'): Teacher.from_pretrained(tmp_path/'bin')


def test_damaged_files(tmp_path, published):
    whole = published[1].read_bytes()
    for name, data in {'cut.pt': whole[:-500], 'text.pt': b'hello', 'empty.pt': b'', 'cut.safetensors': b'\x10\0\0\0'}.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(UserError, match=name): Teacher.from_pretrained(tmp_path/name)
    torch.save([torch.ones(2)], tmp_path/'list.pt')
    with pytest.raises(UserError, match='no named tensors'): read_weights(tmp_path/'list.pt')
    torch.save(dict(a=torch.ones(2)), tmp_path/'other.pt')
    with pytest.raises(UserError, match='not an original'): Teacher.from_pretrained(tmp_path/'other.pt')
    with pytest.raises(UserError, match='no such file'): Teacher.from_pretrained(tmp_path/'none.pt')


def test_damaged_settings(published, tmp_path):
    d = copy_of(published[0], tmp_path/'a'); (d/'unet'/'config.json').write_text('{')
    with pytest.raises(UserError, match='not JSON'): Teacher.from_pretrained(d)
    d = copy_of(published[0], tmp_path/'b'); (d/'tokenizer'/'vocab.json').write_text('')
    with pytest.raises(UserError, match='tokenizer'): Teacher.from_pretrained(d)
    d = copy_of(published[0], tmp_path/'c'); (d/'scheduler'/'scheduler_config.json').write_text('{"beta_schedule": "linear"}')
    with pytest.raises(UserError, match='beta_schedule'): Teacher.from_pretrained(d)


def test_shards_and_variants(published, tmp_path, teachers):
    d = copy_of(published[0], tmp_path/'d')
    f = d/'unet'/'diffusion_pytorch_model.safetensors'
    state = load_file(f)
    save_file({k: v.half() for k, v in state.items()}, d/'unet'/'diffusion_pytorch_model.fp16.safetensors')
    assert Teacher.from_pretrained(d).fingerprint() == teachers[0].fingerprint() # full precision comes first
    f.unlink()
    assert Teacher.from_pretrained(d).unet.out[2].weight.dtype == torch.float32
    (d/'unet'/'diffusion_pytorch_model.fp16.safetensors').unlink()
    names = sorted(state)
    for i in (0, 1): save_file({k: state[k] for k in names[i::2]}, d/'unet'/f'diffusion_pytorch_model-{i+1:05d}-of-00002.safetensors')
    assert Teacher.from_pretrained(d).fingerprint() == teachers[0].fingerprint()
    (d/'unet'/'diffusion_pytorch_model-00001-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match='1 of 2 shards'): Teacher.from_pretrained(d)


def test_offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UserError, match='HF_HUB_OFFLINE=1.*hf download nobody-at-all/nothing'): find('nobody-at-all/nothing')
    with pytest.raises(UserError, match='HF_HUB_OFFLINE'): Teacher.from_pretrained('nobody-at-all/nothing/file.pt')


def test_mvdream(tmp_path):
    p = Parts(ip=False)
    for path in (p.folder(tmp_path/'d'), p.original(tmp_path/'o.pt', vae='first_stage_model.')):
        t = Teacher.from_pretrained(path)
        assert type(t) is MVDream and isinstance(t, MultiViewTeacher) and read_checkpoint(path).kind == 'mvdream'
        z, prompts, cams = seeded_randn(range(2), 5, 4, 16, 16), ['a duck', ''], four_views(torch.zeros(2), torch.zeros(2))
        with torch.no_grad(): want = p.unet(z, torch.tensor([9, 900]), t.words(['a duck'+SUFFIX, SUFFIX]), cams.embedding())
        torch.testing.assert_close(t.denoise(z, torch.tensor([9, 900]), t.encode_condition(prompts), cams), want)
        out = rollout(t, Schedule(t.cfg.diffusion), prompts, cams, z, steps=2)
        assert out.isfinite().all() and not torch.equal(out[0], out[1])
        t.save(tmp_path/'own'/'teacher.safetensors')
        again = Teacher.from_pretrained(tmp_path/'own')
        assert type(again) is MVDream and again.fingerprint() == t.fingerprint()
        with pytest.raises(UserError, match='prompts, not pictures'): t.encode_condition(torch.rand(2, 3, 32, 32))


def test_vae_names_against_diffusers_own_converter(parts):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    own = compvis(parts.ae.state_dict())
    theirs = convert_ldm_vae_checkpoint({f'first_stage_model.{k}': v for k, v in own.items()}, dict(down_block_types=['DownEncoderBlock2D']*2, up_block_types=['UpDecoderBlock2D']*2, block_out_channels=(32, 32)))
    ours = plain_vae(own)
    assert set(ours) == set(theirs) == set(parts.ae.state_dict()) and all(torch.equal(ours[k], theirs[k].reshape(ours[k].shape)) for k in ours)


def test_cameras_it_does_not_know(teachers, inputs):
    image, z, _ = inputs
    t = teachers[0]
    with pytest.raises(UserError, match='5 cameras.*knows 4'): rollout(t, Schedule(t.cfg.diffusion), image, four_views(torch.zeros(2), torch.zeros(2), n=5), z, steps=2)


def test_inspect(published, teachers, tmp_path, capsys):
    seen = [inspect(p) for p in published]
    assert [s['kind'] for s in seen] == ['imagedream']*2 and [s['layout'] for s in seen] == ['diffusers', 'original']
    assert seen[0]['fingerprint'] == teachers[0].fingerprint() and seen[0]['parts']['unet'][0] == sum(p.numel() for p in teachers[0].unet.parameters())
    main(['inspect', str(published[0])])
    out = capsys.readouterr().out
    assert teachers[0].fingerprint() in out and 'text_encoder' in out
    teachers[0].save(tmp_path/'t.safetensors')
    assert inspect(tmp_path/'t.safetensors')['fingerprint'] == teachers[0].fingerprint()
    for bad in (['inspect'], ['inspect', str(tmp_path/'none')]):
        with pytest.raises(SystemExit) as e: main(bad)
        assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_manifest_allocates_nothing(monkeypatch):
    "Every tensor of the paper's network is on the meta device."
    seen = []
    import dd3g.teacher as T
    keep = T.manifest
    monkeypatch.setattr(T, 'manifest', lambda m: seen.extend(p.device.type for p in m.state_dict().values()) or keep(m))
    with contextlib.redirect_stdout(io.StringIO()): main(['manifest', '--scale', 'paper'])
    assert len(seen) == 773 and set(seen) == {'meta'}


def there_and_back(cfg, text, path, device, dtype):
    "A teacher of any size with random weights, written in the diffusers layout and opened: its prediction, before and after."
    torch.manual_seed(0)
    with torch.device(device): a = Teacher(cfg).eval().requires_grad_(False)
    shake(a.unet.cpu()); a.to(device)
    for p in a.parameters(): p.copy_(p.to(dtype)) # the numbers that the file can hold
    a.words = Words(text)
    a.text.copy_(a.words([SUFFIX, NEGATIVE]))
    for name, m, said in (('unet', a.unet, dict(num_head_channels=cfg.teacher.head_dim, image_size=cfg.latent)), ('vae', a.ae, {}), ('image_encoder', a.encoder.net, dict(num_attention_heads=cfg.teacher.encoder.heads)), ('text_encoder', a.words.net, dict(num_attention_heads=text['num_attention_heads']))):
        part(path/name, {k: v.to(dtype if name != 'text_encoder' else v.dtype) for k, v in m.state_dict().items()}, **said)
    vocabulary(path/'tokenizer'); part(path/'scheduler', None, config='scheduler_config'); part(path/'feature_extractor', None, config='preprocessor_config')
    b = Teacher.from_pretrained(path, device=device, cfg=cfg)
    image, z, t = torch.rand(1, 3, *[cfg.view.size]*2, device=device), seeded_randn([0], *cfg.noise_shape, device=device), torch.tensor([500], device=device)
    cams, words = four_views(torch.zeros(1), torch.zeros(1)).to(device), b.text # two tokenizers
    return [m.denoise(z, t, m.encode_condition(image, words[0], words[1]), cams) for m in (a, b)], b


def test_there_and_back(tmp_path):
    from dd3g.config import SCALES
    cfg = replace(SCALES['paper'], teacher=NET, ae=AutoencoderConfig((32, 32), 1), view=replace(SCALES['paper'].view, size=32))
    (x, y), b = there_and_back(cfg, TEXT, tmp_path, 'cpu', torch.float16)
    assert torch.equal(x, y) and x.abs().max() > 1e-2 and b.embed('a duck').shape == (1, 77, 64)


@pytest.mark.cuda
def test_there_and_back_at_the_papers_size(tmp_path):
    "941.7 M + 630.8 M + 340.4 M + 83.7 M random weights through 4.8 GB of files."
    from dd3g.config import SCALES
    text = dict(hidden_size=1024, vocab_size=49408, max_position_embeddings=77, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act='gelu')
    (x, y), b = there_and_back(SCALES['paper'], text, tmp_path, 'cuda', torch.float16)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert b.cfg.teacher == SCALES['paper'].teacher and b.device.type == 'cuda' and sum(p.numel() for p in b.words.net.parameters()) == 340_387_840
