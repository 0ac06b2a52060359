"""MultiViewUNet against a second implementation of ImageDream's forward: levels, skips, frames and cameras written out here,
every block taken from diffusers (ResnetBlock2D, Attention with its IP adapter, FeedForward, IPAdapterPlusImageProjection)."""
import pytest
import torch, torch.nn as nn, torch.nn.functional as F

from dd3g.config import EncoderConfig, TeacherConfig
from dd3g.core import fix_torchvision, seeded_randn
from dd3g.teacher import MultiViewUNet, shake

fix_torchvision()
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import IPAdapterPlusImageProjection, TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

HEAD, CTX, WIDTH, TOKENS, WORDS = 16, 40, 24, 4, 7
CLOSE = 2e-5 # the promise is 1e-4; measured 2e-6


class Block(nn.Module):
    "One transformer of ImageDream: self-attention over all frames, cross-attention a frame, GEGLU."
    def __init__(self, ch, ip):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(32, ch, eps=1e-6), nn.Linear(ch, ch), nn.Linear(ch, ch)
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(ch), nn.LayerNorm(ch), nn.LayerNorm(ch)
        self.attn1 = Attention(ch, heads=ch//HEAD, dim_head=HEAD)
        self.attn2 = Attention(ch, cross_attention_dim=CTX, heads=ch//HEAD, dim_head=HEAD)
        if ip: self.attn2.set_processor(IPAdapterAttnProcessor2_0(ch, CTX, num_tokens=(TOKENS,), scale=1.))
        self.ff, self.ip = FeedForward(ch, activation_fn='geglu'), ip
    def forward(self, x, ctx, n):
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, h*w, c))
        y = y.reshape(b//n, n*h*w, c)
        y = (self.attn1(self.ln1(y)) + y).reshape(b, h*w, c)
        words = ctx[:, :WORDS].repeat_interleave(n, 0) # every frame, the fifth too, reads the same context
        words = (words, [ctx[:, None, WORDS:].repeat_interleave(n, 0)]) if self.ip else words
        y = self.attn2(self.ln2(y), encoder_hidden_states=words) + y
        y = self.ff(self.ln3(y)) + y
        return self.proj_out(y).reshape(b, h, w, c).permute(0, 3, 1, 2) + x


class Reference(nn.Module):
    "ImageDream (ip) or MVDream (not ip), base width ch, two levels, two residual blocks a level."
    def __init__(self, ch=64, ip=True):
        super().__init__()
        res = lambda a, b: ResnetBlock2D(in_channels=a, out_channels=b, temb_channels=4*ch, groups=32, eps=1e-5)
        pair = lambda a, b: nn.ModuleList([res(a, b), Block(b, ip)])
        self.ch, self.ip = ch, ip
        self.conv_in = nn.Conv2d(4, ch, 3, padding=1)
        self.time, self.camera = TimestepEmbedding(ch, 4*ch), TimestepEmbedding(16, 4*ch)
        self.down = nn.ModuleList([pair(ch, ch), pair(ch, ch), Downsample2D(ch, use_conv=True), pair(ch, 2*ch), pair(2*ch, 2*ch)])
        self.mid = nn.ModuleList([res(2*ch, 2*ch), Block(2*ch, ip), res(2*ch, 2*ch)])
        self.up = nn.ModuleList([pair(4*ch, 2*ch), pair(4*ch, 2*ch), pair(3*ch, 2*ch), Upsample2D(2*ch, use_conv=True), pair(3*ch, ch), pair(2*ch, ch), pair(2*ch, ch)])
        self.norm_out, self.conv_out = nn.GroupNorm(32, ch), nn.Conv2d(ch, 4, 3, padding=1)
        if ip: self.image = IPAdapterPlusImageProjection(embed_dims=WIDTH, output_dims=CTX, hidden_dims=CTX, depth=2, dim_head=64, heads=3, num_queries=TOKENS)
    def forward(self, x, t, words, cams, feats=None, picture=None): # x: (B, n, 4, h, w); cams: (B, n, 16), zeros for the picture's frame
        B, n = x.shape[:2]
        if self.ip: x, words = torch.cat([x[:, :-1], picture[:, None]], 1), torch.cat([words, self.image(feats)], 1)
        emb = self.time(Timesteps(self.ch, True, 0)(t.repeat_interleave(n))) + self.camera(cams.flatten(0, 1))
        h = self.conv_in(x.flatten(0, 1)); skips = [h]
        for m in self.down:
            h = m(h) if isinstance(m, Downsample2D) else m[1](m[0](h, emb), words, n)
            skips.append(h)
        h = self.mid[2](self.mid[1](self.mid[0](h, emb), words, n), emb)
        for m in self.up: h = m(h) if isinstance(m, Upsample2D) else m[1](m[0](torch.cat([h, skips.pop()], 1), emb), words, n)
        return self.conv_out(F.silu(self.norm_out(h))).unflatten(0, (B, n))


RES = dict(norm1='in_layers.0', conv1='in_layers.2', time_emb_proj='emb_layers.1', norm2='out_layers.0', conv2='out_layers.3', conv_shortcut='skip_connection')
INNER = {'processor.to_k_ip.0': 'to_k_ip', 'processor.to_v_ip.0': 'to_v_ip', 'ln1': 'norm1', 'ln2': 'norm2', 'ln3': 'norm3'}
PERCEIVER = {'ln0': '0.norm1', 'ln1': '0.norm2', 'attn.to_q': '0.to_q', 'attn.to_out.0': '0.to_out', 'ff.0': '1.0', 'ff.1.net.0.proj': '1.1', 'ff.1.net.2': '1.3'}

def published(ref): # the reference's weights under the published names
    sd, out = ref.state_dict(), {}
    def tail(p): # inside a ResBlock or a transformer
        if p[0] in RES: return '.'.join([RES[p[0]], *p[1:]])
        s = '.'.join(p)
        for a, b in INNER.items(): s = s.replace(a, b)
        return s if p[0] in ('norm', 'proj_in', 'proj_out') else 'transformer_blocks.0.'+s
    level = lambda i, p, last: f'{i}.{2 if last else 0}.{"conv" if last else "op"}.{p[1]}'
    for k, v in sd.items():
        p = k.split('.')
        if p[0] == 'conv_in': out[f'input_blocks.0.0.{p[1]}'] = v
        elif p[0] in ('norm_out', 'conv_out'): out[f'out.{dict(norm_out=0, conv_out=2)[p[0]]}.{p[1]}'] = v
        elif p[0] in ('time', 'camera'): out[f'{p[0]}_embed.{dict(linear_1=0, linear_2=2)[p[1]]}.{p[2]}'] = v
        elif p[0] == 'mid': out[f'middle_block.{p[1]}.{tail(p[2:])}'] = v
        elif p[0] == 'down': out['input_blocks.'+(level(int(p[1])+1, p[2:], False) if p[1] == '2' else f'{int(p[1])+1}.{p[2]}.{tail(p[3:])}')] = v
        elif p[0] == 'up': out['output_blocks.'+(level(2, p[2:], True) if p[1] == '3' else f'{int(p[1])-(int(p[1]) > 3)}.{p[2]}.{tail(p[3:])}')] = v
        elif p[1] == 'layers' and p[4] in ('to_k', 'to_v'): # one matrix in the published Resampler
            if p[4] == 'to_k': out[f'image_embed.layers.{p[2]}.0.to_kv.weight'] = torch.cat([v, sd[k.replace('to_k', 'to_v')]])
        elif p[1] == 'layers':
            a = next(a for a in PERCEIVER if '.'.join(p[3:]).startswith(a+'.'))
            out[f'image_embed.layers.{p[2]}.{PERCEIVER[a]}.{p[-1]}'] = v
        else: out['image_embed.'+'.'.join(p[1:])] = v
    return out


@pytest.fixture(scope='module', params=[True, False], ids=['imagedream', 'mvdream'])
def pair(request):
    "Reference and ours with the same random weights, none of them zero."
    torch.manual_seed(0)
    ip  = request.param
    ref = shake(Reference(ip=ip), std=1.)
    with torch.no_grad():
        for p in ref.parameters(): p.add_(torch.randn_like(p)*.02) # biases and norms away from 0 and 1
    cfg = TeacherConfig(64, (1, 2), 2, (2, 1), HEAD, 1, 32, CTX, WORDS, 16, TOKENS if ip else 0, 2, 3, 64, ip, encoder=EncoderConfig('vit', width=WIDTH))
    ours = MultiViewUNet(cfg).eval()
    ours.load_state_dict(published(ref))
    assert all(p.any() for p in ours.parameters())
    return ip, ref, ours


@pytest.fixture(scope='module')
def given():
    z, cams = seeded_randn(range(2), 5, 4, 8, 8), seeded_randn(range(10, 12), 4, 16)
    return dict(z=z, t=torch.tensor([981, 21]), words=seeded_randn(range(20, 22), WORDS, CTX), cams=cams, feats=seeded_randn(range(30, 32), 9, WIDTH), picture=seeded_randn(range(40, 42), 4, 8, 8))


def both(pair, z, t, words, cams, feats, picture):
    ip, ref, ours = pair
    with torch.no_grad():
        if ip: return ref(z, t, words, F.pad(cams, (0, 0, 0, 1)), feats, picture)[:, :4], ours(z, t, words, cams, feats, picture)
        return ref(z[:, :4], t, words, cams), ours(z[:, :4], t, words, cams)


def test_outputs_agree(pair, given):
    a, b = both(pair, **given)
    assert a.shape == b.shape == (2, 4, 4, 8, 8) and a.std() > .1
    assert (a-b).abs().max() < CLOSE


@pytest.mark.parametrize('change', ['t', 'words', 'cams', 'feats', 'picture', 'frame'])
def test_they_move_together(pair, given, change):
    "Each input changes both by the same amount; the fifth frame's noise neither by any."
    if not pair[0] and change in ('feats', 'picture', 'frame'): pytest.skip('MVDream has no picture')
    now = dict(given)
    if change == 'frame': now['z'] = torch.cat([given['z'][:, :4], given['z'][:, 4:]+100], 1)
    elif change == 't': now['t'] = torch.tensor([500, 700])
    else: now[change] = given[change]*1.5+.5
    (a, b), (a2, b2) = both(pair, **given), both(pair, **now)
    moved = (a2-a).abs().max().item()
    assert moved == 0 and torch.equal(b2, b) if change == 'frame' else moved > 1e-3
    assert ((a2-a)-(b2-b)).abs().max() < 2*CLOSE


@pytest.mark.parametrize('what', ['eps_res', 'eps_norm', 'gelu', 'swap', 'heads', 'ip', 'camera', 'order'])
def test_mistakes_would_be_seen(pair, given, what, monkeypatch):
    "The comparison notices each of the usual slips, made on purpose in ours."
    ip, ref, ours = pair
    if what == 'ip' and not ip: pytest.skip('MVDream has no image tokens')
    import dd3g.teacher as T
    blocks = [m for m in ours.modules() if isinstance(m, T.TransformerBlock3D)]
    norms  = [m for m in ours.modules() if isinstance(m, nn.GroupNorm)]
    if what == 'eps_res': [monkeypatch.setattr(m, 'eps', 1e-3) for m in norms if m.eps == 1e-5]
    if what == 'eps_norm': [monkeypatch.setattr(m, 'eps', 1e-3) for m in norms if m.eps == 1e-6]
    if what == 'gelu': monkeypatch.setattr(T.GEGLU, 'forward', lambda s, x: (lambda a, g: a*F.gelu(g, approximate='tanh'))(*s.proj(x).chunk(2, -1)))
    if what == 'swap': monkeypatch.setattr(T.GEGLU, 'forward', lambda s, x: (lambda a, g: g*F.gelu(a))(*s.proj(x).chunk(2, -1)))
    if what == 'heads': [monkeypatch.setattr(b.attn1, 'head_dim', 2*HEAD) for b in blocks]
    if what == 'ip': [monkeypatch.setattr(b.attn2.to_v_ip.weight, 'data', b.attn2.to_v_ip.weight.data*.99) for b in blocks]
    if what == 'camera': monkeypatch.setattr(ours.camera_embed[2].bias, 'data', ours.camera_embed[2].bias.data*1.01)
    if what == 'order': [monkeypatch.setattr(b, 'norm1', b.norm3) for b in blocks]
    a, b = both(pair, **given)
    assert (a-b).abs().max() > CLOSE
