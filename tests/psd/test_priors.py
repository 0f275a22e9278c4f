"""Priors: the contract of all of them, then the multi-view network against independent statements."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from psd.cameras import Cameras, CameraSampler
from psd.priors.base import NoiseSchedule, Prior
from psd.priors.gaussian import GaussianPrior
from psd.priors.multiview import MultiviewPrior
from psd.priors.stable_diffusion import StableDiffusionPrior
from tests.psd.checkpoints import save_prior


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prior(tmp_path_factory.mktemp("prior"), prediction_type="v_prediction")


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prior(tmp_path_factory.mktemp("prior"), autoencoder="AutoencoderKL")


@pytest.fixture(scope="module")
def single_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prior(tmp_path_factory.mktemp("prior"), cameras=False)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(folder, tmp_path / "prior")
    return tmp_path / "prior"


@pytest.fixture(params=["gaussian", "folder", "v_folder", "kl_folder", "single_folder"])
def prior(request: pytest.FixtureRequest) -> Prior:
    if request.param == "gaussian":
        return GaussianPrior(image_size=16, group_size=4)
    if request.param == "single_folder":
        return StableDiffusionPrior.from_pretrained(request.getfixturevalue(request.param))
    return MultiviewPrior.from_pretrained(request.getfixturevalue(request.param))


@pytest.fixture
def cameras(generator: torch.Generator) -> Cameras:
    return CameraSampler(height=16, width=16, num_groups=2)(generator)


class TestContract:
    def test_images_come_back_as_images(self, prior: Prior, generator: torch.Generator) -> None:
        rgb = torch.rand(2, 3, 16, 16, generator=generator)
        decoded = prior.decode(prior.encode(rgb))
        assert decoded.shape == rgb.shape
        assert decoded.min() >= 0
        assert decoded.max() <= 1

    def test_without_a_previewer_previews_are_decoded_without_a_graph(
        self, prior: Prior, generator: torch.Generator
    ) -> None:
        z = prior.encode(torch.rand(2, 3, 16, 16, generator=generator)).requires_grad_()
        shown = prior.preview(z.clone())
        assert torch.equal(shown, prior.decode(z).detach())
        assert not shown.requires_grad

    def test_autoencoder_is_differentiable(self, prior: Prior, generator: torch.Generator) -> None:
        rgb = torch.rand(2, 3, 16, 16, generator=generator, requires_grad=True)
        prior.encode(rgb).square().sum().backward()
        assert rgb.grad is not None
        assert rgb.grad.abs().max() > 0
        z = prior.encode(rgb).detach().requires_grad_()
        prior.decode(z).square().sum().backward()
        assert z.grad is not None
        assert z.grad.abs().max() > 0

    def test_noise_depends_on_text_and_time(self, prior: Prior, cameras: Cameras, generator: torch.Generator) -> None:
        z = prior.encode(torch.rand(8, 3, 16, 16, generator=generator))
        text = prior.embed(["red cube", "blue cube"])[:, None].expand(-1, 8, -1, -1)
        early, late = torch.full((8,), 100), torch.full((8,), 900)
        noise = prior.predict_noise(z, early, text[0], cameras)
        assert noise.shape == z.shape
        assert not torch.allclose(noise, prior.predict_noise(z, early, text[1], cameras))
        assert not torch.allclose(noise, prior.predict_noise(z, late, text[0], cameras))

    def test_groups_do_not_see_each_other(self, prior: Prior, cameras: Cameras, generator: torch.Generator) -> None:
        z = prior.encode(torch.rand(8, 3, 16, 16, generator=generator))
        text, t = prior.embed(["red cube"]).expand(8, -1, -1), torch.full((8,), 500)
        both = prior.predict_noise(z, t, text, cameras)
        torch.testing.assert_close(both[4:], prior.predict_noise(z[4:], t[4:], text[4:], cameras[4:]))

    def test_gradient_reaches_text_and_nothing_else(self, prior: Prior, cameras: Cameras) -> None:
        z = prior.encode(torch.rand(4, 3, 16, 16)).detach()
        text, t = prior.embed(["red cube"]).expand(4, -1, -1), torch.full((4,), 500)
        assert not prior.predict_noise(z, t, text, cameras[:4]).requires_grad
        wanted = text.clone().requires_grad_()
        prior.predict_noise(z, t, wanted, cameras[:4]).square().sum().backward()
        assert wanted.grad is not None
        assert wanted.grad.abs().max() > 0

    def test_works_without_cameras(self, prior: Prior) -> None:
        z = prior.encode(torch.rand(3, 3, 16, 16))
        text, t = prior.embed(["red cube"]).expand(3, -1, -1), torch.full((3,), 500)
        noise = prior.predict_noise(z, t, text, None)
        torch.testing.assert_close(noise[1:2], prior.predict_noise(z[1:2], t[:1], text[:1], None))


def test_gaussian_noise_is_the_posterior_mean(generator: torch.Generator) -> None:
    """Regressing the true noise on z_t over many samples finds the closed form's slope and intercept."""
    prior = GaussianPrior(image_size=1, std=0.5, dtype=torch.float64)
    text, n = prior.embed(["red cube"]), 200_000
    mean = prior.mean(text)
    t = torch.full((n,), 300)
    x = mean + 0.5 * torch.randn(n, 3, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, 1, 1, generator=generator, dtype=torch.float64)
    z_t = prior.noise_schedule.add_noise(x, noise, t)
    centred = z_t - z_t.mean(0)
    slope = (centred * noise).mean(0) / centred.square().mean(0)
    probe = torch.randn(1, 3, 1, 1, generator=generator, dtype=torch.float64)
    regressed = noise.mean(0) + slope * (probe - z_t.mean(0))
    torch.testing.assert_close(prior.predict_noise(probe, t[:1], text, None), regressed, atol=0.02, rtol=0)


def test_gaussian_text_is_fixed_by_its_letters() -> None:
    one, other = GaussianPrior(), GaussianPrior()
    assert torch.equal(one.embed(["red", "blue"]), other.embed(["blue", "red"]).flip(0))


class TestMultiview:
    def test_latents_follow_diffusers_conventions(self, folder: Path, generator: torch.Generator) -> None:
        """Images in [-1, 1] for the autoencoder, latents times the scaling factor for the UNet."""
        prior = MultiviewPrior.from_pretrained(folder)
        autoencoder = prior._autoencoder
        rgb = torch.rand(2, 3, 16, 16, generator=generator)
        latents = autoencoder.encode(rgb * 2 - 1).latents * 0.7
        torch.testing.assert_close(prior.encode(rgb), latents)
        images = autoencoder.decode(latents / 0.7).sample
        torch.testing.assert_close(prior.decode(latents), ((images + 1) / 2).clamp(0, 1))

    def test_kl_latent_is_the_posterior_mean(self, kl_folder: Path) -> None:
        prior = MultiviewPrior.from_pretrained(kl_folder)
        rgb = torch.rand(2, 3, 16, 16)
        expected = prior._autoencoder.encode(rgb * 2 - 1).latent_dist.mode() * 0.7
        torch.testing.assert_close(prior.encode(rgb), expected)

    def test_images_of_another_size_are_resized(self, folder: Path) -> None:
        prior = MultiviewPrior.from_pretrained(folder)
        flat = torch.full((1, 3, 40, 40), 0.3)
        torch.testing.assert_close(prior.encode(flat), prior.encode(flat[..., :16, :16]))

    def test_self_attention_joins_the_views(self, folder: Path, cameras: Cameras) -> None:
        """Every attn1 of the network against attention written out in plain matrices."""
        prior = MultiviewPrior.from_pretrained(folder)
        seen = _record_attention(prior._unet, ".attn1")
        z, text = prior.encode(torch.rand(8, 3, 16, 16)), prior.embed(["red cube"]).expand(8, -1, -1)
        prior.predict_noise(z, torch.full((8,), 500), text, cameras)
        assert len(seen) == 7  # two down, one in the middle, four up
        for module, hidden, output in seen:
            torch.testing.assert_close(output, _plain_cross_view_attention(module, hidden, 4), atol=1e-5, rtol=0)

    def test_one_view_reacts_to_another_of_its_group(self, folder: Path, cameras: Cameras) -> None:
        prior = MultiviewPrior.from_pretrained(folder)
        z, text = prior.encode(torch.rand(4, 3, 16, 16)), prior.embed(["red cube"]).expand(4, -1, -1)
        changed = torch.cat([z[:3], z[3:] + 1])
        t = torch.full((4,), 500)
        before = prior.predict_noise(z, t, text, cameras[:4])[0]
        assert not torch.allclose(before, prior.predict_noise(changed, t, text, cameras[:4])[0])
        alone = prior.predict_noise(z, t, text, None)[0]
        torch.testing.assert_close(alone, prior.predict_noise(changed, t, text, None)[0])

    def test_camera_reaches_the_time_embedding(self, folder: Path, cameras: Cameras) -> None:
        """The class embedding is MVDream's camera MLP: linear, SiLU, linear of the flattened matrix."""
        prior = MultiviewPrior.from_pretrained(folder)
        projection = prior._unet.class_embedding.projection
        outputs: list[Tensor] = []
        prior._unet.class_embedding.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        z, text = prior.encode(torch.rand(8, 3, 16, 16)), prior.embed(["red cube"]).expand(8, -1, -1)
        prior.predict_noise(z, torch.full((8,), 500), text, cameras)
        prior.predict_noise(z, torch.full((8,), 500), text, None)
        expected = projection.linear_2(F.silu(projection.linear_1(cameras.conditioning())))
        torch.testing.assert_close(outputs[0], expected)
        assert not outputs[1].any()

    @pytest.mark.parametrize("name", ["folder", "v_folder"])
    def test_noise_agrees_with_diffusers_scheduler(self, name: str, request: pytest.FixtureRequest) -> None:
        root = request.getfixturevalue(name)
        prior, scheduler = (
            MultiviewPrior.from_pretrained(root),
            DDIMScheduler.from_pretrained(root / "scheduler", clip_sample=False),
        )
        scheduler.set_timesteps(1000)
        z_t, text, t = torch.randn(1, 4, 8, 8), prior.embed(["red cube"]), torch.tensor([640])
        raw = prior._unet(z_t, t, encoder_hidden_states=text, class_labels=torch.zeros(1, 0)).sample
        noise = prior.predict_noise(z_t, t, text, None)
        expected = scheduler.step(raw, 640, z_t).pred_original_sample
        torch.testing.assert_close(prior.noise_schedule.denoised(z_t, noise, t), expected, atol=1e-5, rtol=1e-5)

    def test_prompt_that_is_too_long_loses_its_end(self, folder: Path) -> None:
        prior = MultiviewPrior.from_pretrained(folder)
        assert prior.overflow("red cube") == ""
        assert prior.overflow("red cube zxcvbnmasdfgqwert") == "qwert"
        cut, whole = prior.embed(["red cube zxcvbnmasdfgqwert", "red cube zxcvbnmasdfgqwerty"])
        assert torch.equal(cut, whole)

    def test_loads_in_another_precision_and_still_speaks_float32(self, folder: Path, cameras: Cameras) -> None:
        exact = MultiviewPrior.from_pretrained(folder)
        rough = MultiviewPrior.from_pretrained(folder, dtype=torch.bfloat16)
        z, t = exact.encode(torch.rand(4, 3, 16, 16)), torch.full((4,), 500)
        text = exact.embed(["red cube"]).expand(4, -1, -1)
        noise = rough.predict_noise(z, t, text, cameras[:4])
        assert noise.dtype == rough.embed(["a"]).dtype == rough.encode(torch.rand(1, 3, 16, 16)).dtype == torch.float32
        torch.testing.assert_close(noise, exact.predict_noise(z, t, text, cameras[:4]), atol=0.1, rtol=0.1)

    def test_weights_are_frozen(self, folder: Path) -> None:
        prior = MultiviewPrior.from_pretrained(folder)
        modules: list[nn.Module] = [prior._unet, prior._autoencoder, prior._text_encoder]
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
        assert not any(module.training for module in modules)

    def test_cameras_in_other_groups_are_refused(self, folder: Path) -> None:
        prior = MultiviewPrior.from_pretrained(folder)
        pair = CameraSampler(height=16, width=16, group_size=2)(torch.Generator())
        with pytest.raises(ValueError, match="denoises 4 views together, got 2 cameras in groups of 2"):
            prior.predict_noise(torch.rand(2, 4, 8, 8), torch.tensor([1, 1]), torch.rand(2, 16, 16), pair)


class TestBrokenFolders:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no multi-view prior.*nowhere: no such folder"):
            MultiviewPrior.from_pretrained(tmp_path / "nowhere")

    def test_folder_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"model_index\.json is missing"):
            MultiviewPrior.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "file",
        [
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        ],
    )
    def test_missing_weights(self, broken: Path, file: str) -> None:
        (broken / file).unlink()
        with pytest.raises(ValueError, match=f"{Path(file).parent} has no weights: {Path(file).name} is missing"):
            MultiviewPrior.from_pretrained(broken)

    def test_pickled_weights_are_not_read(self, broken: Path) -> None:
        weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(ValueError, match="a pickle: save it again"):
            MultiviewPrior.from_pretrained(broken)

    def test_truncated_weights(self, broken: Path) -> None:
        weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"safetensors is not whole: 1,000 of [\d,]+ bytes; fetch it again"):
            MultiviewPrior.from_pretrained(broken)

    def test_weights_of_a_smaller_model(self, broken: Path) -> None:
        _edit(broken / "unet" / "config.json", layers_per_block=2)
        with pytest.raises(ValueError, match=r"unet cannot be read: .* expected shape .*, but got \S+\(\[[\d, ]+\]\)$"):
            MultiviewPrior.from_pretrained(broken)

    def test_weights_of_half_a_model(self, broken: Path) -> None:
        file = broken / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        del weights["conv_in.weight"]
        save_file(weights, file)
        with pytest.raises(ValueError, match=r"unet lack 1 of the model's parameters, such as conv_in\.weight"):
            MultiviewPrior.from_pretrained(broken)

    def test_prediction_type(self, broken: Path) -> None:
        _edit(broken / "scheduler" / "scheduler_config.json", prediction_type="sample")
        with pytest.raises(ValueError, match="'sample' is not supported; it must be 'epsilon' or 'v_prediction'"):
            MultiviewPrior.from_pretrained(broken)

    def test_unet_without_cameras(self, broken: Path) -> None:
        _edit(broken / "unet" / "config.json", class_embed_type=None)
        with pytest.raises(ValueError, match="takes no cameras"):
            MultiviewPrior.from_pretrained(broken)

    @pytest.mark.parametrize(
        ("part", "key", "value"),
        [
            ("unet", "_class_name", "UNet3DConditionModel"),
            ("vae", "_class_name", "VQModel"),
            ("text_encoder", "architectures", ["T5EncoderModel"]),
        ],
    )
    def test_another_class(self, broken: Path, part: str, key: str, value: object) -> None:
        _edit(broken / part / "config.json", **{key: value})
        with pytest.raises(ValueError, match=rf"{part} holds a \w+; this prior takes"):
            MultiviewPrior.from_pretrained(broken)

    def test_config_that_is_no_json(self, broken: Path) -> None:
        (broken / "unet" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            MultiviewPrior.from_pretrained(broken)


def test_noise_schedule_is_stable_diffusions(folder: Path) -> None:
    schedule = MultiviewPrior.from_pretrained(folder).noise_schedule
    torch.testing.assert_close(schedule.alphas_cumprod, NoiseSchedule.scaled_linear().alphas_cumprod)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _record_attention(unet: nn.Module, suffix: str) -> list[tuple[nn.Module, Tensor, Tensor]]:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for name, module in unet.named_modules():
        if name.endswith(suffix):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    return seen


def _plain_cross_view_attention(attention: nn.Module, hidden: Tensor, num_views: int) -> Tensor:
    batch, length, width = hidden.shape
    outputs = []
    for group in hidden.reshape(batch // num_views, num_views * length, width):
        heads = []
        for q, k, v in zip(
            *(
                (group @ linear.weight.T).chunk(attention.heads, -1)
                for linear in (attention.to_q, attention.to_k, attention.to_v)
            ),
            strict=True,
        ):
            heads.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1) @ v)
        outputs.append(attention.to_out[0](torch.cat(heads, -1)))
    return torch.stack(outputs).reshape(batch, length, width)


class TestPreviewer:
    """A tiny autoencoder, in the form of TAESD, that decodes the latents of Stable Diffusion's own."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        return self.save(tmp_path / "tiny")

    @staticmethod
    def save(folder: Path, latent_channels: int = 4) -> Path:
        torch.manual_seed(1)
        widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        AutoencoderTiny(latent_channels=latent_channels, **widths, **blocks).save_pretrained(folder)
        return folder

    def test_it_takes_the_networks_latents_as_they_are(self, kl_folder: Path, tiny: Path) -> None:
        prior = MultiviewPrior.from_pretrained(kl_folder, previewer=tiny)
        z = torch.randn(2, 4, 8, 8)
        expected = AutoencoderTiny.from_pretrained(tiny).decode(z).sample / 2 + 0.5
        torch.testing.assert_close(prior.preview(z), expected.clamp(0, 1))
        assert not prior.preview(z.requires_grad_()).requires_grad
        assert torch.equal(prior.decode(z), MultiviewPrior.from_pretrained(kl_folder).decode(z))

    def test_others_are_refused(self, kl_folder: Path, tmp_path: Path) -> None:
        wide = self.save(tmp_path / "wide", latent_channels=16)
        with pytest.raises(ValueError, match=r"latents of 16 channels, those of .* have 4"):
            MultiviewPrior.from_pretrained(kl_folder, previewer=wide)
        with pytest.raises(ValueError, match="holds a AutoencoderKL; previews take an AutoencoderTiny, as TAESD is"):
            MultiviewPrior.from_pretrained(kl_folder, previewer=kl_folder / "vae")
