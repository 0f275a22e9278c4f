"""Tiny checkpoints with random weights, in the formats of diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.configuration_clip import CLIPVisionConfig

diffusers_logging.set_verbosity_error()

START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_SIZE = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_tokenizer(max_tokens: int = 16) -> CLIPTokenizer:
    """A byte-level vocabulary that knows a few words whole and spells the others."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = ["r e", "re d</w>", "c u", "cu b", "cub e</w>", "b l", "bl u", "blu e</w>"]
    merges = [(left, right) for left, right in map(str.split, pairs)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocab = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def make_text_config(dim: int = 16, max_tokens: int = 16) -> CLIPTextConfig:
    tokenizer = make_tokenizer(max_tokens)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        projection_dim=dim,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT_SIZE,
    )


def save_prior(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    autoencoder: str = "AutoencoderTiny",
    channels: tuple[int, ...] = (16, 32),
    text_dim: int = 16,
    image_size: int = 16,
    latent_channels: int = 4,
    autoencoder_channels: tuple[int, ...] = (8, 8),
    norm_groups: int = 8,
    cameras: bool = True,
    linear_projection: bool = True,
) -> Path:
    """The f = 2^(len(autoencoder_channels) - 1) latent model of the built-in world, at any size; or, without
    cameras, one of Stable Diffusion's form: 2.x's, or 1.x's without ``linear_projection``."""
    torch.manual_seed(0)
    depth = len(channels)
    unet = UNet2DConditionModel(
        sample_size=image_size // 2 ** (len(autoencoder_channels) - 1),
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_dim,
        attention_head_dim=2,
        norm_num_groups=norm_groups,
        use_linear_projection=linear_projection,
        class_embed_type="projection" if cameras else None,
        projection_class_embeddings_input_dim=16 if cameras else None,
    )
    blocks = {"latent_channels": latent_channels, "scaling_factor": 0.7}
    if autoencoder == "AutoencoderTiny":
        vae: AutoencoderTiny | AutoencoderKL = AutoencoderTiny(
            encoder_block_out_channels=autoencoder_channels,
            decoder_block_out_channels=autoencoder_channels,
            num_encoder_blocks=(1,) * len(autoencoder_channels),
            num_decoder_blocks=(1,) * len(autoencoder_channels),
            **blocks,
        )
    else:
        vae = AutoencoderKL(
            block_out_channels=autoencoder_channels,
            down_block_types=("DownEncoderBlock2D",) * len(autoencoder_channels),
            up_block_types=("UpDecoderBlock2D",) * len(autoencoder_channels),
            norm_num_groups=norm_groups,
            **blocks,
        )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    CLIPTextModel(make_text_config(text_dim)).save_pretrained(folder / "text_encoder")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def save_reward(folder: Path, *, image_size: int = 16, dim: int = 16, patch_size: int = 8, num_layers: int = 1) -> Path:
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        projection_dim=dim,
    )
    config = CLIPConfig(text_config=make_text_config(dim).to_dict(), vision_config=vision.to_dict(), projection_dim=dim)
    CLIPModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder
