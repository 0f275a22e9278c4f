"""MVDream's published layout, converted, against a plain statement of the model; and files that are something else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from psd.cameras import CameraSampler
from psd.priors.multiview import MultiviewPrior
from psd.priors.mvdream import convert_mvdream
from tests.psd.checkpoints import make_tokenizer
from tests.psd.mvdream_reference import PublishedMvdream


@pytest.fixture(scope="module")
def published() -> PublishedMvdream:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return PublishedMvdream(len(tokenizer), tokenizer.model_max_length).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def converted(published: PublishedMvdream, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mvdream")
    torch.save(published.state_dict(), folder / "4view.pt")
    convert_mvdream(folder / "4view.pt", folder / "out", base)
    return folder / "out"


@pytest.fixture(scope="module")
def prior(converted: Path) -> MultiviewPrior:
    return MultiviewPrior.from_pretrained(converted)


@pytest.mark.parametrize("with_cameras", [True, False])
def test_unet(published: PublishedMvdream, prior: MultiviewPrior, with_cameras: bool) -> None:
    cameras = CameraSampler(height=64, width=64, num_groups=2)(torch.Generator().manual_seed(0))
    z_t, t, text = torch.randn(8, 4, 16, 16), torch.tensor([20] * 4 + [700] * 4), torch.randn(8, 16, 64)
    with torch.no_grad():
        expected = published.model.diffusion_model(
            z_t, t, text, cameras.conditioning() if with_cameras else None, 4 if with_cameras else 1
        )
    noise = prior.predict_noise(z_t, t, text, cameras if with_cameras else None)
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_autoencoder(published: PublishedMvdream, prior: MultiviewPrior) -> None:
    rgb = torch.rand(2, 3, 64, 64)
    latents = published.first_stage_model.encode(2 * rgb - 1) * 0.18215
    torch.testing.assert_close(prior.encode(rgb), latents, atol=1e-5, rtol=0)
    images = published.first_stage_model.decode(latents / 0.18215)
    torch.testing.assert_close(prior.decode(latents), (images / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_encoder(published: PublishedMvdream, prior: MultiviewPrior) -> None:
    tokens = make_tokenizer()(["red cube"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = published.cond_stage_model.model(tokens)
    torch.testing.assert_close(prior.embed(["red cube"]), expected, atol=1e-5, rtol=0)


def test_diffusers_loads_the_folder_as_a_pipeline(converted: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(
        converted, safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True
    )
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline.unet.config.class_embed_type == "projection"


def _save(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "4view.pt")
    return folder / "4view.pt"


def test_parts_that_the_checkpoint_lacks_are_the_bases(
    published: PublishedMvdream, converted: Path, tmp_path: Path
) -> None:
    unet = {name: value for name, value in published.state_dict().items() if name.startswith("model.")}
    convert_mvdream(_save(unet, tmp_path), tmp_path / "out", converted)
    prior = MultiviewPrior.from_pretrained(tmp_path / "out")
    assert torch.equal(prior.embed(["red"]), MultiviewPrior.from_pretrained(converted).embed(["red"]))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_what_nobody_has_is_told(published: PublishedMvdream, converted: Path, tmp_path: Path, part: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(converted, base)
    shutil.rmtree(base / part)
    unet = {name: value for name, value in published.state_dict().items() if name.startswith("model.")}
    with pytest.raises(ValueError, match=f"base has no {part}/, which the checkpoint lacks, too"):
        convert_mvdream(_save(unet, tmp_path), tmp_path / "out", base)


def test_another_models_checkpoint(published: PublishedMvdream, base: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in published.state_dict().items() if "camera_embed" not in name}
    with pytest.raises(ValueError, match=r"is no MVDream checkpoint: there is no model.diffusion_model.camera_embed"):
        convert_mvdream(_save(state, tmp_path), tmp_path / "out", base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.diffusion_model.middle_block.0.in_layers.2.weight",
            "unet: .*Missing.*mid_block.resnets.0.conv1.weight",
        ),
        ("first_stage_model.decoder.conv_out.bias", "vae: .*Missing.*decoder.conv_out.bias"),
        ("cond_stage_model.model.ln_final.bias", "text_encoder: .*Missing.*final_layer_norm.bias"),
    ],
)
def test_half_a_checkpoint(published: PublishedMvdream, base: Path, tmp_path: Path, name: str, message: str) -> None:
    state = {key: value for key, value in published.state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"does not fill the {message}"):
        convert_mvdream(_save(state, tmp_path), tmp_path / "out", base)


def test_mvdream_on_stable_diffusion_1_is_refused(published: PublishedMvdream, base: Path, tmp_path: Path) -> None:
    """`sd-v1.5-4view.pt`, which lies beside the right file: its projections are convolutions."""
    state = {
        name: value[..., None, None] if name.endswith(("proj_in.weight", "proj_out.weight")) else value
        for name, value in published.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"is MVDream on Stable Diffusion 1.x, .* others; take sd-v2.1-base-4view.pt"):
        convert_mvdream(_save(state, tmp_path), tmp_path / "out", base)


def test_a_unet_without_its_first_blocks(published: PublishedMvdream, base: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in published.state_dict().items() if "input_blocks.1." not in name}
    with pytest.raises(ValueError, match=r"does not fill the unet: .*input_blocks.1.0.out_layers.3.bias.* is missing"):
        convert_mvdream(_save(state, tmp_path), tmp_path / "out", base)


def test_another_noise_schedule(published: PublishedMvdream, base: Path, tmp_path: Path) -> None:
    state = published.state_dict() | {"alphas_cumprod": torch.linspace(1, 0, 1000)}
    with pytest.raises(ValueError, match="another noise schedule"):
        convert_mvdream(_save(state, tmp_path), tmp_path / "out", base)


def test_a_pickle_with_code_in_it_is_not_run(base: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "it_ran",))

    torch.save({"model": Code()}, tmp_path / "4view.pt")
    with pytest.raises(ValueError, match="could run code, and was not read"):
        convert_mvdream(tmp_path / "4view.pt", tmp_path / "out", base)
    assert not (tmp_path / "it_ran").exists()
