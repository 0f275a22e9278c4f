"""MVDream in plain torch, with the names of its published checkpoint: what the converted diffusers model must equal.

Written from the papers and the published layout alone: a UNet whose self-attention joins the views of a group and whose
time embedding is shifted by a camera's, an autoencoder, and OpenCLIP's text tower up to its last but one layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS, HEAD_WIDTH = 32, 64


class ResBlock(nn.Module):
    def __init__(self, channels: int, time_width: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, num_views: int) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(HEAD_WIDTH)).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width), CrossAttention(width, text_width)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GEGLU(width), nn.Dropout(0), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, num_views: int) -> Tensor:
        together = x.reshape(-1, num_views * x.shape[1], x.shape[2])  # the views of a group, one long sequence
        normed = self.norm1(together)
        x = (together + self.attn1(normed, normed)).reshape(x.shape)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, text_width)])

    def forward(self, x: Tensor, time: Tensor, text: Tensor, num_views: int) -> Tensor:
        hidden = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        hidden = self.proj_out(self.transformer_blocks[0](hidden, text, num_views))
        return x + hidden.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, num_views: int) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, num_views: int) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class ConvIn(nn.Conv2d):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return super().forward(x)


class MultiviewUNet(nn.Module):
    """Attention on every level but the last."""

    def __init__(self, widths: tuple[int, ...] = (64, 128), num_blocks: int = 1, text_width: int = 64) -> None:
        super().__init__()
        base, time_width = widths[0], 4 * widths[0]
        self.base = base
        self.time_embed = nn.Sequential(nn.Linear(base, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.camera_embed = nn.Sequential(nn.Linear(16, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        blocks, skips, channels = [nn.ModuleList([ConvIn(4, base, 3, padding=1)])], [base], base
        last = len(widths) - 1
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                layers: list[nn.Module] = [ResBlock(channels, time_width, width)]
                layers += [SpatialTransformer(width, text_width)] if level != last else []
                blocks.append(nn.ModuleList(layers))
                channels = width
                skips.append(channels)
            if level != last:
                blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, time_width, channels),
                SpatialTransformer(channels, text_width),
                ResBlock(channels, time_width, channels),
            ]
        )
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), time_width, width)]
                layers += [SpatialTransformer(width, text_width)] if level != last else []
                layers += [Upsample(width)] if level and i == num_blocks else []
                blocks.append(nn.ModuleList(layers))
                channels = width
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, base), nn.SiLU(), nn.Conv2d(base, 4, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, cameras: Tensor | None, num_views: int) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.base // 2) / (self.base // 2))
        angles = t[:, None] * frequencies
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if cameras is not None:
            time = time + self.camera_embed(cameras)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, time, text, num_views)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, time, text, num_views)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, time, text, num_views)
        return self.out(x)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels, eps=1e-6), nn.GroupNorm(GROUPS, out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(self.norm(x)).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


def mid_of(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = (
        ResnetBlock(channels, channels),
        AttnBlock(channels),
        ResnetBlock(channels, channels),
    )
    return mid


class Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], num_blocks: int, latents: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, channels = nn.ModuleList(), widths[0]
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList([ResnetBlock(channels if j == 0 else width, width) for j in range(num_blocks)])
            if i < len(widths) - 1:
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
            self.down.append(level)
            channels = width
        self.mid = mid_of(channels)
        self.norm_out = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], num_blocks: int, latents: int) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latents, channels, 3, padding=1)
        self.mid = mid_of(channels)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = nn.ModuleList(
                [ResnetBlock(channels if j == 0 else width, width) for j in range(num_blocks + 1)]
            )
            if i:
                level.upsample = nn.Module()
                level.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            levels.insert(0, level)
            channels = width
        self.up = nn.ModuleList(levels)  # numbered as the encoder's levels are, walked from the last
        self.norm_out = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (32, 64), num_blocks: int = 1, latents: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, num_blocks, latents), Decoder(widths, num_blocks, latents)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)

    def encode(self, images: Tensor) -> Tensor:
        """The mean latents of images in [-1, 1]."""
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class OpenClipText(nn.Module):
    def __init__(self, num_words: int, num_positions: int, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_words, width)
        self.positional_embedding = nn.Parameter(torch.randn(num_positions, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualAttentionBlock(width) for _ in range(num_layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the last layer, normalised by the final norm."""
        mask = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks[:-1]:
            x = block(x, mask)
        return self.ln_final(x)


class CondStage(nn.Module):
    def __init__(self, model: OpenClipText) -> None:
        super().__init__()
        self.model = model


class PublishedMvdream(nn.Module):
    """The whole checkpoint: `model.diffusion_model`, `first_stage_model`, `cond_stage_model.model`, the schedule."""

    def __init__(self, num_words: int, num_positions: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = MultiviewUNet()
        self.first_stage_model = FirstStage()
        self.cond_stage_model = CondStage(OpenClipText(num_words, num_positions))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
