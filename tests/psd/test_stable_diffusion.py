"""Single-view priors against diffusers' own pipeline, in every precision; folders that hold something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from psd.cameras import CameraSampler
from psd.priors.stable_diffusion import StableDiffusionPrior
from tests.psd.checkpoints import save_prior


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each prediction type."""
    return {
        kind: save_prior(
            tmp_path_factory.mktemp(kind), cameras=False, autoencoder="AutoencoderKL", prediction_type=kind
        )
        for kind in ("epsilon", "v_prediction")
    }


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(folders["epsilon"], tmp_path / "prior")
    return tmp_path / "prior"


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers_pipeline(folders: dict[str, Path], kind: str) -> None:
    """One DDIM step with guidance 7.5, by the pipeline and by our noise predictions."""
    prior = StableDiffusionPrior.from_pretrained(folders[kind])
    scheduler = DDIMScheduler.from_pretrained(folders[kind] / "scheduler", steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae=prior._autoencoder,
        text_encoder=prior._text_encoder,
        tokenizer=prior._tokenizer,
        unet=prior._unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    z_t, after = torch.randn(1, 4, 8, 8), []

    def record(_: Any, step: int, t: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append((int(t), kept["latents"].clone()))
        return kept

    pipeline(
        "a red cube", negative_prompt="blue", latents=z_t, num_inference_steps=2, guidance_scale=7.5, height=16,
        width=16, output_type="latent", callback_on_step_end=record,
    )  # fmt: skip
    (t, expected), (next_t, _) = after
    positive, negative = (
        prior.predict_noise(z_t, torch.tensor([t]), prior.embed([text]), None) for text in ("a red cube", "blue")
    )
    noise, schedule = negative + 7.5 * (positive - negative), prior.noise_schedule
    clean = schedule.denoised(z_t, noise, torch.tensor([t]))
    stepped = schedule.add_noise(clean, noise, torch.tensor([next_t]))
    torch.testing.assert_close(stepped, expected, atol=1e-5, rtol=1e-5)


def test_views_are_denoised_alone_and_cameras_change_nothing(folders: dict[str, Path]) -> None:
    prior = StableDiffusionPrior.from_pretrained(folders["epsilon"])
    cameras = CameraSampler(height=16, width=16)(torch.Generator().manual_seed(0))
    z_t, t, text = torch.randn(4, 4, 8, 8), torch.full((4,), 500), prior.embed(["red cube"]).expand(4, -1, -1)
    noise = prior.predict_noise(z_t, t, text, cameras)
    torch.testing.assert_close(noise[2:3], prior.predict_noise(z_t[2:3], t[2:3], text[2:3], None))
    assert prior.group_size == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rough_networks_and_exact_sums(folders: dict[str, Path], kind: str, dtype: torch.dtype) -> None:
    """What the rough network says differs by its rounding, what is made of it in float32 by nothing more."""
    exact = StableDiffusionPrior.from_pretrained(folders[kind])
    rough = StableDiffusionPrior.from_pretrained(folders[kind], dtype=dtype)
    assert torch.equal(rough.embed(["red cube"]), exact.embed(["red cube"]))
    z_t, t, text = torch.randn(2, 4, 8, 8), torch.tensor([30, 900]), exact.embed(["red cube"]).expand(2, -1, -1)
    noise = rough.predict_noise(z_t, t, text, None)
    torch.testing.assert_close(noise, exact.predict_noise(z_t, t, text, None), atol=0.1, rtol=0.1)
    raw = rough._unet(z_t.to(dtype), t, encoder_hidden_states=text.to(dtype)).sample.float()
    alpha, sigma = rough.noise_schedule.alpha(t), rough.noise_schedule.sigma(t)
    assert torch.equal(noise, raw if kind == "epsilon" else alpha * raw + sigma * z_t)


def test_float16_leaves_an_autoencoder_that_overflows_in_float32(folders: dict[str, Path], broken: Path) -> None:
    def autoencoder_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
        return StableDiffusionPrior.from_pretrained(folder, dtype=dtype)._autoencoder.dtype

    assert autoencoder_dtype(folders["epsilon"], torch.float16) == torch.float32
    assert autoencoder_dtype(folders["epsilon"], torch.bfloat16) == torch.bfloat16
    _edit(broken / "vae" / "config.json", force_upcast=False)
    assert autoencoder_dtype(broken, torch.float16) == torch.float16


def test_slicing_the_autoencoder_changes_its_memory_alone(folders: dict[str, Path]) -> None:
    whole = StableDiffusionPrior.from_pretrained(folders["epsilon"])
    sliced = StableDiffusionPrior.from_pretrained(folders["epsilon"], vae_slicing=True)
    rgb = torch.rand(3, 3, 16, 16)
    seen: list[int] = []
    sliced._autoencoder.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(sliced.encode(rgb), whole.encode(rgb))
    assert seen == [1, 1, 1]


def test_files_as_they_are_published(broken: Path) -> None:
    """An older text encoder's names, a tokenizer in two files, weights in half precision only."""
    expected = StableDiffusionPrior.from_pretrained(broken).embed(["a red cube"])
    file = broken / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, file, metadata={"format": "pt"})
    tokenizer = json.loads((broken / "tokenizer" / "tokenizer.json").read_text())["model"]
    (broken / "tokenizer" / "tokenizer.json").unlink()
    (broken / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(merge) for merge in tokenizer["merges"]]
    (broken / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    for part in ("unet", "vae"):
        file = broken / part / "diffusion_pytorch_model.safetensors"
        half = {name: value.half() for name, value in load_file(file).items()}
        save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    prior = StableDiffusionPrior.from_pretrained(broken)
    torch.testing.assert_close(prior.embed(["a red cube"]), expected)
    assert prior._unet.dtype == prior._autoencoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}, "prior.kind=multi"),
        ("unet", {"class_embed_type": "timestep"}, "takes timestep class labels"),
        ("unet", {"addition_embed_type": "text_time"}, r"wants more than a text \('text_time', as SDXL's does\)"),
        ("unet", {"in_channels": 9}, "takes 9 channels, the autoencoder's latents have 4: .* inpainting"),
        ("unet", {"cross_attention_dim": 1024}, "text of width 1024, the text encoder's has 16"),
        ("scheduler", {"prediction_type": "sample"}, "'sample' is not supported"),
    ],
)
def test_another_kind_of_model(broken: Path, file: str, changes: dict[str, Any], message: str) -> None:
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    _edit(broken / file / name, **changes)
    with pytest.raises(ValueError, match=message):
        StableDiffusionPrior.from_pretrained(broken)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer_config.json", r"tokenizer is no tokenizer: tokenizer_config.json is missing"),
        (
            "tokenizer.json",
            r"is no tokenizer: the tokenizer's vocabulary is missing, which is tokenizer.json, or vocab.json with",
        ),
    ],
)
def test_missing_tokenizer(broken: Path, file: str, message: str) -> None:
    (broken / "tokenizer" / file).unlink()
    with pytest.raises(ValueError, match=message):
        StableDiffusionPrior.from_pretrained(broken)


def test_a_single_file_is_no_folder(broken: Path) -> None:
    with pytest.raises(ValueError, match="it is a file; `psd convert` makes folders of some published files"):
        StableDiffusionPrior.from_pretrained(broken / "unet" / "diffusion_pytorch_model.safetensors")
