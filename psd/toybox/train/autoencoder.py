"""The world's autoencoder: AutoencoderTiny, 32x32 pixels to 8x8 latents of 8 channels, each close to unit variance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from psd.toybox.train.loop import Clock, cosine_lr

LATENT_CHANNELS = 8
LATENT_NOISE = 0.1  # added before decoding in training: a smooth decoder forgives an imperfect prior
BATCH_SIZE = 32


def build(width: int = 32) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def train(views: Tensor, clock: Clock, seed: int = 0) -> AutoencoderTiny:
    """``views`` are uint8 [n, 3, 32, 32]. Loss: L1 and L2 of the pixels, unit variance of each latent channel."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for fraction in clock:
        cosine_lr(optimizer, 2e-3, fraction)
        index = torch.randint(len(views), (BATCH_SIZE,), generator=generator)
        rgb = (views[index].float() / 127.5 - 1).to(memory_format=torch.channels_last)
        z = model.encoder(rgb)
        noise = LATENT_NOISE * torch.randn(z.shape, generator=generator)
        error = model.decoder(z + noise) - rgb
        std, mean = torch.std_mean(z, dim=(0, 2, 3))
        loss = error.abs().mean() + error.square().mean() + 0.05 * ((std - 1).square() + mean.square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.report(loss=loss, l1=error.abs().mean() / 2, std=std.mean())
    return model.eval()


def save(model: AutoencoderTiny, out: Path) -> None:
    """In half precision, without the attribute that diffusers writes and then warns of when it reads it back."""
    model.half().save_pretrained(out)
    file = out / "config.json"
    config = json.loads(file.read_text())
    del config["block_out_channels"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
