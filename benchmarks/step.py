"""What a step costs under each method: milliseconds, phase by phase, and memory.

python -m benchmarks.step                        # the built-in world's checkpoints
python -m benchmarks.step --prior mid-size       # random weights: on a CPU, a step of a second or so
python -m benchmarks.step --prior sd21-size      # random weights of MVDream's and HPSv2.1's size; for a GPU
python -m benchmarks.step --prior DIR --reward DIR
python -m benchmarks.step --prior sd21-size --scene hash_grid --methods 'PSD*' --warmup 0 --steps 4
python -m benchmarks.step --prior sd21-size --count     # computes nothing: the networks' operations, phase by phase

The methods take turns, step by step, so that a busy machine slows all alike. A number is the mean of four medians, one
for every fourth step, so that work that is due every fourth step counts. The floor is what a method would cost if it
differed from SDS in nothing but the number of views that the UNet denoises. Memory is the most that a step of the
method ever held, the models included: of a GPU what torch allocated, else what the process had in memory. Below the
table PSD is held against the goals of this project: at most 1.15 times DreamDPO, and at most 2.2 times SDS.

Counted are the floating-point operations of matrix products, convolutions and attention, by torch's ``FlopCounterMode``
on the meta device: what a step would cost where these take all of the time. Rendering is none of them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

import psd
from psd.cameras import CameraSampler
from psd.distillation.distillation import Distillation
from psd.distillation.negative_embedding import NegativeEmbeddingConfig
from psd.distillation.residuals import X0Reconstruction
from psd.distillation.reward_gradient import RewardGradientConfig, RewardImage
from psd.distillation.weightings import DreamDpoWeighting, MinMaxWeighting, PreferenceWeighting, SingleWeighting
from psd.optimization import Optimization
from psd.phases import phase, record_phases
from psd.priors.base import NoiseSchedule, Prior
from psd.priors.latent_diffusion import LatentDiffusionParts
from psd.priors.multiview import MultiviewPrior
from psd.prompts import PromptEncoder
from psd.rewards.base import Reward
from psd.rewards.clip_preference import ClipPreferenceReward
from psd.rewards.preprocessing import Preprocessing
from psd.scenes.backgrounds import FlatBackground
from psd.scenes.base import Scene
from psd.scenes.hash_grid import HashGrid, HashGridConfig
from psd.scenes.voxel_grid import VoxelGrid, VoxelGridConfig
from psd.schedules import Constant

ROOT = Path(__file__).parents[1]
CHECKPOINTS = Path(psd.__file__).parent / "toybox" / "checkpoints"
PHASES = ("render", "encode", "unet", "decode", "reward", "negative", "backward", "optimizer")
START, END = "<|startoftext|>", "<|endoftext|>"
CYCLE = 4  # steps; work that is not due at every step is due every fourth
NUM_VIEWS = 4
PROMPT = "a red cube"
SCENES = ("voxel_grid", "hash_grid")
SDS, DREAM_DPO = "SDS", "DreamDPO"
PSD = ("PSD, preference alone", f"PSD, negative embedding every {CYCLE}th step")
GOALS = {DREAM_DPO: 1.15, SDS: 2.2}  # the most that PSD may cost, in steps of another method


@dataclass(frozen=True, kw_only=True)
class Size:
    """Models with random weights, and the pictures that they are shown."""

    image_size: int  # of renders
    max_tokens: int
    text: dict[str, int]
    unet: dict[str, Any]
    autoencoder: dict[str, Any]
    vision: dict[str, int]  # the reward's
    reward_text: dict[str, int]


def _transformer(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SIZES = {
    "toybox-size": Size(
        image_size=32,
        max_tokens=32,
        text=_transformer(96, 2, 4),
        unet={
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "attention_head_dim": (4, 8),
            "norm_num_groups": 16,
        },
        autoencoder={
            "latent_channels": 8,
            "encoder_block_out_channels": (48, 48, 48),
            "decoder_block_out_channels": (48, 48, 48),
            "num_encoder_blocks": (1, 2, 2),
            "num_decoder_blocks": (2, 2, 1),
        },
        vision=_transformer(128, 4, 4) | {"image_size": 32, "patch_size": 4},
        reward_text=_transformer(96, 2, 4),
    ),
    "mid-size": Size(
        image_size=64,
        max_tokens=77,
        text=_transformer(256, 4, 4),
        unet={
            "sample_size": 16,
            "block_out_channels": (96, 192, 384),
            "layers_per_block": 1,
            "attention_head_dim": (2, 4, 8),
        },
        autoencoder={"block_out_channels": (32, 64, 64)},
        vision=_transformer(256, 6, 4) | {"image_size": 64, "patch_size": 8},
        reward_text=_transformer(256, 4, 4),
    ),
    "sd21-size": Size(
        image_size=256,
        max_tokens=77,
        text=_transformer(1024, 23, 16),
        unet={
            "sample_size": 32,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20, 20),
        },
        autoencoder={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        vision=_transformer(1280, 32, 16) | {"image_size": 224, "patch_size": 14},
        reward_text=_transformer(1024, 24, 16),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a step of one method."""

    phases: dict[str, float]  # milliseconds, or 10^9 operations where they are counted
    unet_calls: float  # views denoised
    peak_gb: float | None

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    def floor(self, baseline: Cost) -> float:
        unet = baseline.phases["unet"]
        return (baseline.total + unet * (self.unet_calls / baseline.unet_calls - 1)) / baseline.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default=str(CHECKPOINTS / "prior"), help=f"a folder, or {', '.join(SIZES)}")
    parser.add_argument("--reward", default=str(CHECKPOINTS / "reward"), help="a folder, beside a prior's")
    parser.add_argument("--scene", choices=SCENES, default=SCENES[0], help="hash_grid: with MVDream's settings")
    names = f"names or patterns of what to measure beside {SDS} and {DREAM_DPO}, with which all is compared"
    previews = "with a model of random weights: candidates are decoded by a tiny autoencoder of TAESD's form"
    parser.add_argument("--previewer", action="store_true", help=previews)
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="NAME", help=names)
    parser.add_argument("--steps", type=int, default=20, help="of each method, after the warm-up; a multiple of 4")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each method that do not count")
    parser.add_argument("--count", action="store_true", help="count operations instead of measuring milliseconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the networks; bfloat16 on a GPU")
    options = parser.parse_args()
    if options.steps % CYCLE or options.steps < CYCLE:
        parser.error(f"--steps must be a multiple of {CYCLE}, got {options.steps}")
    with_decoder = [name for name, size in SIZES.items() if "block_out_channels" in size.autoencoder]
    if options.previewer and options.prior not in with_decoder:
        parser.error(f"--previewer needs --prior {' or '.join(with_decoder)}")
    if options.count:
        options.device = "meta"
    torch.set_num_threads(options.threads)
    diffusers_logging.set_verbosity_error()  # it warns of casts
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    try:
        prior, reward, image_size = load_models(options, dtype)
    except ValueError as error:
        parser.error(str(error))
    settings = chosen(options.methods)
    if options.count:
        costs = count(settings, prior, reward, image_size)
        print(f"`{_command()}` at {_commit()}: {NUM_VIEWS} views.\n\n{table(costs, 'GFLOP')}\n\n{verdict(costs)}")
        return
    print(measure_and_report(optimizations(settings, prior, reward, image_size, options), options, dtype))


def measure_and_report(runs: dict[str, Optimization], options: argparse.Namespace, dtype: torch.dtype) -> str:
    machine = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{options.threads} thread{'s' * (options.threads > 1)} of {_processor()}"
    )
    head = f"`{_command()}` at {_commit()}: {machine}, torch {torch.__version__}, {dtype}, {NUM_VIEWS} views."
    costs = measure(runs, options.steps, options.warmup, options.device)
    return f"{head}\n\n{table(costs, 'ms')}\n\n{verdict(costs)}"


def _command() -> str:
    return f"python -m benchmarks.step {' '.join(sys.argv[1:])}".strip()


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return found or "an unknown commit"


def chosen(patterns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What methods are made of, on top of MVDream's residual; the two that all are compared with, always."""
    settings: dict[str, dict[str, Any]] = {
        SDS: {"weighting": SingleWeighting()},
        DREAM_DPO: {"weighting": DreamDpoWeighting()},
        "DreamReward, while it uses the reward": {
            "weighting": SingleWeighting(),
            "reward_gradient": RewardGradientConfig(image=RewardImage.DENOISED),
        },
        "RewardSDS, K = 7": {
            "weighting": MinMaxWeighting(num_candidates=7, num_best=2, num_worst=2, best_weight=0.9, worst_weight=0.1)
        },
        PSD[0]: {"weighting": PreferenceWeighting()},
        PSD[1]: {
            "weighting": PreferenceWeighting(),
            "negative_embedding": NegativeEmbeddingConfig(interval=CYCLE),
        },
    }
    wanted = (SDS, DREAM_DPO, *patterns)
    return {name: parts for name, parts in settings.items() if any(fnmatchcase(name, pattern) for pattern in wanted)}


def optimizations(
    settings: Mapping[str, Mapping[str, Any]],
    prior: Prior,
    reward: Reward,
    image_size: int,
    options: argparse.Namespace,
) -> dict[str, Optimization]:
    """Every method with the same prior, reward, scene and cameras."""
    device = options.device
    return {
        name: Optimization(
            scene=_scene(options.scene).to(device),
            background=FlatBackground(),
            cameras=_cameras(image_size),
            distillation=Distillation(prior=prior, residual=X0Reconstruction(), reward=reward, **parts).to(device),
            prompt_encoder=PromptEncoder(prior),
            prompt=PROMPT,
            seed=0,
        )
        for name, parts in settings.items()
    }


def _cameras(image_size: int) -> CameraSampler:
    return CameraSampler(
        height=image_size,
        width=image_size,
        group_size=NUM_VIEWS,
        elevation_deg=(10, 35),
        fov_deg=(40, 40),
        distance_scale=(1, 1),
    )


def _scene(kind: str) -> Scene:
    if kind == "hash_grid":
        return HashGrid(HashGridConfig())
    return VoxelGrid(VoxelGridConfig(coarse_steps=0, sparsity=Constant(1.0), smoothness=1.0))


def measure(runs: Mapping[str, Optimization], num_steps: int, num_warmup: int, device: str) -> dict[str, Cost]:
    seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
    calls: dict[str, list[int]] = defaultdict(list)
    memory, peaks = PeakMemory(device), defaultdict[str, float](float)
    for step in range(num_warmup + num_steps):
        for name, optimization in runs.items():
            memory.reset()
            with record_phases() as phases:
                report = optimization.step()
            peaks[name] = max(peaks[name], memory.gb())
            if step >= num_warmup:
                seconds[name].append(dict(phases))
                calls[name].append(report.unet_calls)
    return {
        name: Cost(
            phases={name: 1000 * _typical([row.get(name, 0.0) for row in rows]) for name in PHASES},
            unet_calls=statistics.mean(calls[name]),
            peak_gb=peaks[name] or None,
        )
        for name, rows in seconds.items()
    }


def count(settings: Mapping[str, Mapping[str, Any]], prior: Prior, reward: Reward, image_size: int) -> dict[str, Cost]:
    """Of models on the meta device, from a step with what is due every fourth step and one without."""
    reward(torch.rand(NUM_VIEWS, 3, image_size, image_size, device="meta"), [PROMPT] * NUM_VIEWS)  # it reads it once
    costs = {}
    for name, parts in settings.items():
        distillation = Distillation(prior=prior, residual=X0Reconstruction(), reward=reward, **parts).to("meta")
        (due, calls_when_due), (idle, calls) = (
            _count_step(distillation, prior, image_size, step) for step in (0, CYCLE - 1)
        )
        costs[name] = Cost(
            phases={name: idle[name] + (due[name] - idle[name]) / CYCLE for name in PHASES},
            unet_calls=calls + (calls_when_due - calls) / CYCLE,
            peak_gb=None,
        )
    return costs


def _count_step(distillation: Distillation, prior: Prior, image_size: int, step: int) -> tuple[dict[str, float], int]:
    """10^9 operations by phase, and UNet calls."""
    generator = torch.Generator().manual_seed(0)
    cameras = _cameras(image_size)(generator)
    prompt = PromptEncoder(prior)(PROMPT, cameras)
    rgb = torch.rand(NUM_VIEWS, 3, image_size, image_size, device="meta", requires_grad=True) * 1  # no leaf: a render
    with FlopCounterMode(display=False) as counter, record_phases(counter.get_total_flops) as operations:
        loss = distillation(rgb, prompt, cameras.to(torch.device("meta")), step, generator)
        with phase("backward"):
            loss.total.backward()
    return {name: operations[name] / 1e9 for name in PHASES}, loss.unet_calls


class PeakMemory:
    """The most memory in use since the last reset. Of the CPU's only Linux keeps account; elsewhere it is 0."""

    def __init__(self, device: str) -> None:
        self._is_gpu = device == "cuda"
        self._forget, self._status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def reset(self) -> None:
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif self._forget.exists():
            self._forget.write_text("5")  # proc(5): the peak is what is in memory now

    def gb(self) -> float:
        if self._is_gpu:
            return torch.cuda.max_memory_allocated() / 1e9
        lines = self._status.read_text().splitlines() if self._forget.exists() else []
        return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), 0.0)


def _typical(seconds: list[float]) -> float:
    return statistics.mean(statistics.median(seconds[first::CYCLE]) for first in range(CYCLE))


def table(costs: dict[str, Cost], unit: str) -> str:
    """Markdown. ``unit`` is that of the phases."""
    baseline = costs[SDS]
    columns = ("method", "UNet calls", unit, "× SDS", "floor", "memory, GB", *PHASES)
    lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
    for name, cost in costs.items():
        cells = [
            name,
            f"{cost.unet_calls:g}",
            f"{cost.total:.0f}",
            f"{cost.total / baseline.total:.2f}",
            f"{cost.floor(baseline):.2f}",
            "-" if cost.peak_gb is None else f"{cost.peak_gb:.1f}",
            *(f"{cost.phases[name]:.0f}" for name in PHASES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(costs: dict[str, Cost]) -> str:
    """PSD in steps of the other methods, against the goals."""
    lines = []
    for name in (name for name in PSD if name in costs):
        ratios = {other: costs[name].total / costs[other].total for other in GOALS}
        parts = [f"{ratio:.2f} x {other} (goal: at most {GOALS[other]:g})" for other, ratio in ratios.items()]
        met = all(ratio <= GOALS[other] for other, ratio in ratios.items())
        lines.append(f"- {name}: {', '.join(parts)}: {'met' if met else 'not met'}")
    return "\n".join(lines)


def load_models(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Prior, Reward, int]:
    """The prior, the reward, and the size of renders."""
    if options.prior in SIZES:
        return random_models(SIZES[options.prior], options.device, dtype, previewer=options.previewer)
    return (
        MultiviewPrior.from_pretrained(options.prior, device=options.device, dtype=dtype),
        ClipPreferenceReward.from_pretrained(options.reward, device=options.device, dtype=dtype),
        32,
    )


def random_models(size: Size, device: str, dtype: torch.dtype, *, previewer: bool = False) -> tuple[Prior, Reward, int]:
    tokenizer = _letters(size.max_tokens)
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": size.max_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    depth = len(size.unet["block_out_channels"])
    with torch.device(device):  # drawn where they are used: on a CPU, MVDream's take minutes
        unet = UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",) * (depth - 1) + (_last_block(depth, "Down"),),
            up_block_types=(_last_block(depth, "Up"),) + ("CrossAttnUpBlock2D",) * (depth - 1),
            cross_attention_dim=size.text["hidden_size"],
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=16,
            **size.unet,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(**size.text, **words))
        clip = CLIPConfig(
            text_config=size.reward_text | words,
            vision_config=CLIPVisionConfig(**size.vision).to_dict(),
            projection_dim=size.reward_text["hidden_size"],
        )
        parts = LatentDiffusionParts(
            unet=unet.to(dtype),
            autoencoder=_autoencoder(size).to(dtype),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            noise_schedule=NoiseSchedule(NoiseSchedule.scaled_linear().alphas_cumprod.to(device)),
            prediction_type="v_prediction",  # without training, the noise that it implies is at least finite
            previewer=_tiny_autoencoder(size).to(dtype) if previewer else None,
        )
        judge = CLIPModel(clip).to(dtype)
    preprocessing = Preprocessing(image_size=size.vision["image_size"], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return MultiviewPrior(parts), ClipPreferenceReward(judge, tokenizer, preprocessing), size.image_size


def _last_block(depth: int, direction: str) -> str:
    """Stable Diffusion does not attend on its last level; the built-in world's two levels both do."""
    return f"CrossAttn{direction}Block2D" if depth == 2 else f"{direction}Block2D"


def _autoencoder(size: Size) -> AutoencoderKL | AutoencoderTiny:
    if "encoder_block_out_channels" in size.autoencoder:
        return AutoencoderTiny(**size.autoencoder)
    depth = len(size.autoencoder["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        **size.autoencoder,
    )


def _tiny_autoencoder(size: Size) -> AutoencoderTiny:
    """TAESD at Stable Diffusion's four levels, with fewer where the autoencoder has fewer."""
    depth = len(size.autoencoder["block_out_channels"])
    return AutoencoderTiny(
        encoder_block_out_channels=(64,) * depth,
        decoder_block_out_channels=(64,) * depth,
        num_encoder_blocks=(1,) + (3,) * (depth - 1),
        num_decoder_blocks=(3,) * (depth - 1) + (1,),
    )


def _letters(max_tokens: int) -> CLIPTokenizer:
    """Every letter is a token."""
    tokens = [*ascii_lowercase, ",", *(f"{letter}</w>" for letter in f"{ascii_lowercase},"), START, END]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=max_tokens)


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
