"""What a step costs: milliseconds of each phase under SDS and under PSD, and their ratio.

python benchmarks/step.py                      # the built-in world's checkpoints
python benchmarks/step.py --random             # random weights of the same size
python benchmarks/step.py --prior DIR --reward DIR

Steps of both methods take turns, so that a busy machine slows both alike; numbers are medians. The floor is what PSD
would cost if only its doubled number of network calls cost anything.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections import defaultdict
from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

import psd
from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.residuals import X0Reconstruction
from psd.distillation.weightings import PreferenceWeighting, SingleWeighting, Weighting
from psd.optimization import Optimization
from psd.phases import record_phases
from psd.priors.base import NoiseSchedule, Prior
from psd.priors.latent_diffusion import LatentDiffusionParts
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.preprocessing import Preprocessing
from psd.scenes.backgrounds import FlatBackground
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from psd.schedules import Constant

CHECKPOINTS = Path(psd.__file__).parent / "toybox" / "checkpoints"
PHASES = ("render", "encode", "unet", "decode", "reward", "backward", "optimizer")
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS, TEXT_WIDTH = 32, 96  # every letter is a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, default=CHECKPOINTS / "prior")
    parser.add_argument("--reward", type=Path, default=CHECKPOINTS / "reward")
    parser.add_argument("--random", action="store_true", help="random weights of the built-in checkpoints' size")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        prior, reward = random_models() if options.random else load_models(options)
    except ValueError as error:
        parser.error(f"{error}\n--random measures without checkpoints")
    methods = {
        "SDS": make(prior, reward, SingleWeighting(), options.device),
        "PSD": make(prior, reward, PreferenceWeighting(), options.device),
    }
    console = Console()
    console.print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {platform.processor()}")
    console.print(report(measure(methods, options.steps)))


def measure(methods: dict[str, Optimization], num_steps: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each phase, and of the whole step, after three steps to warm up."""
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in methods}
    for step in range(3 + num_steps):
        for name, optimization in methods.items():
            with record_phases() as phases:
                optimization.step()
            if step >= 3:
                for phase in PHASES:
                    seconds[name][phase].append(phases.get(phase, 0.0))
                seconds[name]["total"].append(sum(phases.values()))
    return {
        name: {phase: 1000 * statistics.median(values) for phase, values in phases.items()}
        for name, phases in seconds.items()
    }


def report(milliseconds: dict[str, dict[str, float]]) -> Table:
    sds, psd_ = milliseconds["SDS"], milliseconds["PSD"]
    table = Table(
        title="Milliseconds per step", caption=f"floor {1 + sds['unet'] / sds['total']:.2f}: network calls x 2"
    )
    for column in ("phase", "SDS", "PSD", "PSD / SDS"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in (*PHASES, "total"):
        if phase == "total":
            table.add_section()
        ratio = f"{psd_[phase] / sds[phase]:.2f}" if sds[phase] else "-"
        table.add_row(phase, f"{sds[phase]:.1f}", f"{psd_[phase]:.1f}", ratio)
    return table


def make(prior: Prior, reward: Reward, weighting: Weighting, device: str) -> Optimization:
    return Optimization(
        scene=VoxelGrid(VoxelGridConfig(coarse_steps=0, sparsity=Constant(1.0), smoothness=1.0)).to(device),
        background=FlatBackground(),
        cameras=CameraSampler(height=32, width=32, elevation_deg=(10, 35), fov_deg=(40, 40), distance_scale=(1, 1)),
        distillation=Distillation(prior=prior, residual=X0Reconstruction(), weighting=weighting, reward=reward),
        prompt_encoder=PromptEncoder(prior),
        prompt="a red cube",
        seed=0,
    )


def load_models(options: argparse.Namespace) -> tuple[Prior, Reward]:
    return (
        MultiviewPrior.from_pretrained(options.prior, device=options.device),
        ClipPreferenceReward.from_pretrained(options.reward, device=options.device),
    )


def random_models() -> tuple[Prior, Reward]:
    tokens = [*ascii_lowercase, ",", *(f"{letter}</w>" for letter in f"{ascii_lowercase},"), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, model_max_length=MAX_TOKENS)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    clip = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**vision).to_dict(), projection_dim=64)
    parts = LatentDiffusionParts(
        unet=random_unet(),
        autoencoder=AutoencoderTiny(
            latent_channels=8,
            encoder_block_out_channels=(48, 48, 48),
            decoder_block_out_channels=(48, 48, 48),
            num_encoder_blocks=(1, 2, 2),
            num_decoder_blocks=(2, 2, 1),
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        noise_schedule=NoiseSchedule.scaled_linear(),
        prediction_type="v_prediction",
    )
    preprocessing = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return MultiviewPrior(parts), ClipPreferenceReward(CLIPModel(clip), tokenizer, preprocessing)


def random_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 8),
        norm_num_groups=16,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )


if __name__ == "__main__":
    main()
