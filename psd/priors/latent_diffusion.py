"""What all latent diffusion priors share: the parts of a checkpoint in diffusers' layout, and how they are run.

What stays in float32 whatever the networks' precision: the text encoder (each text is embedded once), the noise
schedule, the turn from v to noise, and all that is computed from predictions. Within the networks, PyTorch's
normalisations and attention add up in float32 by themselves.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from psd.cameras import Cameras
from psd.checkpoint_files import check_weights, load_model, read_json
from psd.priors.base import Adapter, NoiseSchedule
from psd.priors.diffusers_folder import (
    DIFFUSERS_WEIGHTS,
    TEXT_ENCODER_WEIGHTS,
    PriorKind,
    check_previewer_folder,
    check_prior_folder,
    prediction_type,
)
from psd.priors.lora import LowRankAdapter

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
Model = TypeVar("Model", bound=nn.Module)
PredictionType = Literal["epsilon", "v_prediction"]

_AUTOENCODERS: dict[str, type[Autoencoder]] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentDiffusionParts:
    """The parts of one latent diffusion model."""

    unet: UNet2DConditionModel
    autoencoder: Autoencoder
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_schedule: NoiseSchedule
    prediction_type: PredictionType
    previewer: AutoencoderTiny | None = None  # decodes the same latents, quicker

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        kind: PriorKind,
        *,
        previewer: str | os.PathLike[str] | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LatentDiffusionParts:
        """Loads safetensors from a local folder; never from the network.

        The text encoder is in float32, and so is, with float16, an autoencoder that would overflow (diffusers'
        ``force_upcast``, the default of Stable Diffusion's).

        Raises:
            ValueError: the folder, a file in it or its weights are missing, or it holds another kind of model.
        """
        root, tiny = Path(folder), None
        check_prior_folder(root, kind)
        if previewer is not None:
            check_previewer_folder(Path(previewer), root)
            tiny = _load_diffusers(AutoencoderTiny, Path(previewer), dtype).to(device)
        config = read_json(root / "vae" / "config.json", kind="autoencoder")
        upcasts = dtype == torch.float16 and config.get("force_upcast", config["_class_name"] == "AutoencoderKL")
        vae_dtype = torch.float32 if upcasts else dtype
        return cls(
            unet=_load_diffusers(UNet2DConditionModel, root / "unet", dtype).to(device),
            autoencoder=_load_diffusers(_AUTOENCODERS[config["_class_name"]], root / "vae", vae_dtype).to(device),
            text_encoder=_load_text_encoder(root).to(device),
            tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
            noise_schedule=_load_schedule(root, device),
            prediction_type=prediction_type(root),
            previewer=tiny,
        )


class LatentDiffusionPrior(ABC):
    """A frozen latent diffusion model; what its network is asked, and with which conditions, is a subclass's matter.

    Takes ownership of the modules: freezes them and moves them to channels-last.
    """

    def __init__(
        self, parts: LatentDiffusionParts, *, group_size: int, compile_unet: bool = False, vae_slicing: bool = False
    ) -> None:
        for module in (parts.unet, parts.autoencoder, parts.text_encoder, parts.previewer):
            if module is not None:
                module.requires_grad_(False).eval()
        self.noise_schedule = parts.noise_schedule
        self.group_size = group_size
        self._unet = parts.unet.to(memory_format=torch.channels_last)
        self._autoencoder = parts.autoencoder.to(memory_format=torch.channels_last)
        self._previewer = parts.previewer and parts.previewer.to(memory_format=torch.channels_last)
        self._text_encoder = parts.text_encoder
        self._tokenizer = parts.tokenizer
        self._prediction_type = parts.prediction_type
        self._is_compiled = compile_unet
        self._image_size = self._unet.config.sample_size * 2 ** (len(self._autoencoder.config.block_out_channels) - 1)
        if vae_slicing:
            self._autoencoder.enable_slicing()
        if compile_unet:
            self._unet.compile(dynamic=False)

    @abstractmethod
    def predict_noise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        """See ``Prior``."""

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens dim"]:
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        hidden: Tensor = self._text_encoder(
            tokens.input_ids.to(self._text_encoder.device, non_blocking=True)
        ).last_hidden_state
        return hidden.float()

    def overflow(self, prompt: str) -> str:
        kept = self._max_tokens - 2  # start and end of text
        words = self._tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self._tokenizer.decode(words[kept:])) if len(words) > kept else ""

    def encode(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c lh lw"]:
        """The mean latent: nothing is drawn, unlike in diffusers' pipelines."""
        size = (self._image_size, self._image_size)
        if rgb.shape[-2:] != size:
            rgb = F.interpolate(rgb, size, mode="bilinear", antialias=True)
        images = _channels_last(rgb * 2 - 1, self._autoencoder.dtype)
        encoded = self._autoencoder.encode(images)
        latents: Tensor = (
            encoded.latents if isinstance(self._autoencoder, AutoencoderTiny) else encoded.latent_dist.mean
        )
        scaled: Tensor = latents.float() * self._autoencoder.config.scaling_factor
        return scaled

    def decode(self, z: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
        return _decoded(self._autoencoder, z)

    @torch.no_grad()
    def preview(self, z: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
        """By the previewer, if the prior was given one."""
        return _decoded(self._previewer or self._autoencoder, z)

    def make_adapter(self, rank: int) -> Adapter:
        """LoRA in the network's attention layers.

        Raises:
            ValueError: the network is compiled.
        """
        if self._is_compiled:
            raise ValueError("a compiled network cannot learn the renders' score; set prior.compile to false")
        return LowRankAdapter(self._unet, rank, self.predict_noise)

    def _denoise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        *,
        class_labels: Float[Tensor, "b labels"] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "b c lh lw"]:
        """The network's prediction as noise; differentiable in ``text`` and in an adapter's weights."""
        dtype = self._unet.dtype
        output = self._unet(
            _channels_last(z_t.detach(), dtype),
            t,
            encoder_hidden_states=text.to(dtype),
            class_labels=None if class_labels is None else class_labels.to(dtype),
            cross_attention_kwargs=cross_attention_kwargs,
        )
        predicted: Tensor = output.sample.float()
        if self._prediction_type == "epsilon":
            return predicted
        # v = alpha eps - sigma z_0 (Salimans & Ho 2022, appendix D), hence eps = alpha v + sigma z_t.
        return self.noise_schedule.alpha(t) * predicted + self.noise_schedule.sigma(t) * z_t.detach()

    @property
    def _max_tokens(self) -> int:
        return min(int(self._tokenizer.model_max_length), int(self._text_encoder.config.max_position_embeddings))


def _decoded(autoencoder: Autoencoder, z: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b 3 h w"]:
    """An autoencoder's own scale is 1 where it takes the network's latents as they are, as tiny ones do."""
    latents = _channels_last(z / autoencoder.config.scaling_factor, autoencoder.dtype)
    images: Tensor = autoencoder.decode(latents).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _channels_last(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def _load_schedule(root: Path, device: torch.device | str) -> NoiseSchedule:
    """On the device, where every step looks into it."""
    config = read_json(root / "scheduler" / "scheduler_config.json", kind="scheduler")
    names = {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    }
    scheduler = DDIMScheduler(**{name: config[name] for name in names & config.keys()})
    return NoiseSchedule(scheduler.alphas_cumprod.float().to(device))


def _load_text_encoder(root: Path) -> CLIPTextModel:
    return load_model(
        lambda: CLIPTextModel.from_pretrained(
            root / "text_encoder",
            variant=check_weights(root / "text_encoder", TEXT_ENCODER_WEIGHTS),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        ),
        root / "text_encoder",
    )


def _load_diffusers(model_class: type[Model], folder: Path, dtype: torch.dtype) -> Model:
    """In ``dtype`` from the start: diffusers warns of a later cast, whether or not the model minds."""
    from_pretrained: Callable[..., tuple[Model, dict[str, Any]]] = model_class.from_pretrained  # type: ignore[attr-defined]
    return load_model(
        lambda: from_pretrained(
            folder,
            variant=check_weights(folder, DIFFUSERS_WEIGHTS),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            low_cpu_mem_usage=True,  # no random weights first
            torch_dtype=dtype,
        ),
        folder,
    )
