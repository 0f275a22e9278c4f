"""The world's prior: a multi-view UNet in MVDream's form and its text encoder, trained together on cached latents."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from psd.priors.multiview import CrossViewAttention
from psd.toybox.grammar import BACKGROUNDS, Description
from psd.toybox.train.autoencoder import LATENT_CHANNELS
from psd.toybox.train.data import Scenes
from psd.toybox.train.loop import Clock, cosine_lr, update_average
from psd.toybox.train.tokenizer import MAX_TOKENS

TEXT_WIDTH = 96
GROUP_SIZE = 4
GROUPS_A_STEP = 8
AVERAGE_HORIZON = 1000
DROP_OBJECT, DROP_PHRASE = 0.12, 0.10  # classifier-free guidance: how often a caption lacks its object, its background


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 8),  # the number of heads, as diffusers names it
        norm_num_groups=16,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )
    unet.set_attn_processor(CrossViewAttention())
    return unet.to(memory_format=torch.channels_last)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training; the learning rate falls along half a cosine to ``final`` times its peak."""

    minutes: float
    learning_rate: float
    final: float
    kind_weights: Mapping[str, float]  # how often a kind of scene is drawn


# Stripes of two similar colours are learnt last, so the later phases show more of them.
PHASES = (
    Phase(minutes=48, learning_rate=8e-4, final=0.4, kind_weights={"plain": 0.40, "striped": 0.25, "stacked": 0.35}),
    Phase(minutes=27, learning_rate=5e-4, final=0.01, kind_weights={"plain": 0.20, "striped": 0.50, "stacked": 0.30}),
    Phase(minutes=25, learning_rate=5e-4, final=0.01, kind_weights={"plain": 0.20, "striped": 0.50, "stacked": 0.30}),
    Phase(minutes=18, learning_rate=4e-4, final=0.01, kind_weights={"plain": 0.20, "striped": 0.50, "stacked": 0.30}),
)


class Denoiser(nn.Module):
    """UNet and text encoder as one module, so that both are trained by one optimiser."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet, self.text_encoder = build_unet(), build_text_encoder(tokenizer)

    def forward(
        self,
        z_t: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        tokens: Int[Tensor, "g length"],
        cameras: Float[Tensor, "b 16"],
    ) -> Float[Tensor, "b c h w"]:
        text = self.text_encoder(tokens).last_hidden_state.repeat_interleave(GROUP_SIZE, dim=0)
        views = {"num_views": GROUP_SIZE}
        prediction: Tensor = self.unet(z_t, t, text, class_labels=cameras, cross_attention_kwargs=views).sample
        return prediction


@dataclass(frozen=True, eq=False)
class Latents:
    """The training set as the prior sees it."""

    z: Float[Tensor, "n 4 c h w"]
    cameras: Float[Tensor, "n 4 16"]
    phrases: Sequence[str]
    descriptions: Sequence[Description]


@torch.inference_mode()
def encode(scenes: Scenes, vae: AutoencoderTiny) -> Latents:
    names = list(BACKGROUNDS)
    rgb = scenes.rgb.flatten(0, 1)
    z = torch.cat([vae.encoder(part.float() / 127.5 - 1) for part in rgb.split(256)]) * vae.config.scaling_factor
    return Latents(
        z.unflatten(0, (-1, GROUP_SIZE)),
        scenes.cameras,
        [names[p] for p in scenes.phrases.tolist()],
        scenes.descriptions,
    )


def caption(description: Description, phrase: str, rng: random.Random) -> str:
    """A training caption: stripes in either order, parts dropped for classifier-free guidance."""
    sentence = str(description)
    top = description.top
    if top.stripe is not None and rng.random() < 0.5:
        article = "an" if top.stripe[0] in "aeiou" else "a"
        sentence = f"{article} {top.stripe} and {top.color} striped {top.shape}"
    parts = []
    if rng.random() >= DROP_OBJECT:
        parts.append(sentence)
    if rng.random() >= DROP_PHRASE:
        parts.append(phrase)
    return ", ".join(parts)


def train(
    data: Latents, tokenizer: CLIPTokenizer, phase: Phase, clock: Clock, out: Path, *, resume: bool, seed: int
) -> None:
    """v-prediction, uniform steps, one t a group. Saves the averaged weights to ``out`` every few minutes.

    With ``resume`` it starts from the weights in ``out``.
    """
    torch.manual_seed(seed)
    model = Denoiser(tokenizer)
    if resume:
        model.unet.load_state_dict(load_file(out / "unet" / "diffusion_pytorch_model.safetensors"))
        model.text_encoder.load_state_dict(load_file(out / "text_encoder" / "model.safetensors"))
    average = deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    alphas = build_scheduler().alphas_cumprod
    chances = _chances(data.descriptions, phase.kind_weights)
    for fraction in clock:
        cosine_lr(optimizer, phase.learning_rate, fraction, final=phase.final)
        index = torch.multinomial(chances, GROUPS_A_STEP, generator=generator)
        captions = [caption(data.descriptions[i], data.phrases[i], rng) for i in index.tolist()]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        z = data.z[index].flatten(0, 1)
        t = torch.randint(len(alphas), (GROUPS_A_STEP,), generator=generator).repeat_interleave(GROUP_SIZE)
        noise = torch.randn(z.shape, generator=generator)
        alpha, sigma = (a[t].sqrt()[:, None, None, None] for a in (alphas, 1 - alphas))
        z_t = (alpha * z + sigma * noise).to(memory_format=torch.channels_last)
        prediction = model(z_t, t, tokens, data.cameras[index].flatten(0, 1))
        loss = (prediction - (alpha * noise - sigma * z)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, clock.step, AVERAGE_HORIZON)
        clock.report(loss=loss, grad_norm=norm)
        if clock.step % 500 == 499:
            save(average, tokenizer, out)
    save(average, tokenizer, out)


def _chances(descriptions: Sequence[Description], kind_weights: Mapping[str, float]) -> Float[Tensor, " n"]:
    counts = Counter(description.kind for description in descriptions)
    return torch.tensor([kind_weights[d.kind] / counts[d.kind] for d in descriptions])


def save(model: Denoiser, tokenizer: CLIPTokenizer, out: Path) -> None:
    deepcopy(model.unet).half().save_pretrained(out / "unet")
    deepcopy(model.text_encoder).half().save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")
    build_scheduler().save_pretrained(out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
