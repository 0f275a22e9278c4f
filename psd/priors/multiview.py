"""Multi-view diffusion in MVDream's form, from a checkpoint folder in diffusers' format.

The network is diffusers' own UNet: cameras enter as class embeddings, and self-attention runs across the views of a
group (MVDream, arXiv 2308.16512, section 3.1).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from psd.cameras import Cameras
from psd.checkpoint_files import check_folder, check_weights, load_model, read_json
from psd.priors.base import NoiseSchedule

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
Model = TypeVar("Model", bound=nn.Module)
PredictionType = Literal["epsilon", "v_prediction"]

_KIND = "multi-view prior (a diffusers folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/)"
_CAMERA_DIM = 16
_AUTOENCODERS: dict[str, type[Autoencoder]] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


class MultiviewPrior:
    """A frozen camera-conditioned latent diffusion model that denoises ``group_size`` views together.

    Without cameras it is an ordinary single-image model, as MVDream is in its 2D mode. Takes ownership of the modules:
    freezes them, moves them to channels-last and sets the UNet's attention processors.
    """

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        autoencoder: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        noise_schedule: NoiseSchedule,
        prediction_type: PredictionType,
        group_size: int = 4,
    ) -> None:
        for module in (unet, autoencoder, text_encoder):
            module.requires_grad_(False).eval()
        unet.set_attn_processor(CrossViewAttention())
        unet.class_embedding = OptionalCameraEmbedding(unet.class_embedding)
        self.noise_schedule = noise_schedule
        self.group_size = group_size
        self._unet = unet.to(memory_format=torch.channels_last)
        self._autoencoder = autoencoder.to(memory_format=torch.channels_last)
        self._text_encoder = text_encoder
        self._tokenizer = tokenizer
        self._prediction_type = prediction_type
        self._image_size = unet.config.sample_size * 2 ** (len(autoencoder.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group_size: int = 4,
    ) -> MultiviewPrior:
        """Loads safetensors from a local folder; never from the network.

        Raises:
            ValueError: the folder, a file in it or its weights are missing, or it holds another kind of model.
        """
        root = Path(folder)
        check_folder(root, kind=_KIND)
        read_json(root / "model_index.json", kind=_KIND)
        read_json(root / "tokenizer" / "tokenizer_config.json", kind="tokenizer")
        noise_schedule, prediction_type = _load_schedule(root / "scheduler")
        unet, autoencoder, text_encoder = _load_unet(root / "unet"), _load_autoencoder(root / "vae"), _load_text(root)
        return cls(
            unet=unet.to(device, dtype),
            autoencoder=autoencoder.to(device, dtype),
            text_encoder=text_encoder.to(device, dtype),
            tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
            noise_schedule=noise_schedule,
            prediction_type=prediction_type,
            group_size=group_size,
        )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "b tokens dim"]:
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        hidden: Tensor = self._text_encoder(tokens.input_ids.to(self._text_encoder.device)).last_hidden_state
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
        latents = _channels_last(z / self._autoencoder.config.scaling_factor, self._autoencoder.dtype)
        images: Tensor = self._autoencoder.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def predict_noise(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        if cameras is not None and (cameras.group_size != self.group_size or len(cameras) % self.group_size):
            raise ValueError(
                f"this prior denoises {self.group_size} views together, got {len(cameras)} cameras in groups of "
                f"{cameras.group_size}; set group_size={self.group_size} in the camera sampler"
            )
        dtype = self._unet.dtype
        labels = z_t.new_empty(len(z_t), 0) if cameras is None else cameras.conditioning().to(z_t.device)
        with torch.set_grad_enabled(text.requires_grad and torch.is_grad_enabled()):
            output = self._unet(
                _channels_last(z_t.detach(), dtype),
                t,
                encoder_hidden_states=text.to(dtype),
                class_labels=labels.to(dtype),
                cross_attention_kwargs={"num_views": 1 if cameras is None else self.group_size},
            )
            predicted: Tensor = output.sample.float()
            if self._prediction_type == "epsilon":
                return predicted
            # v = alpha eps - sigma z_0 (Salimans & Ho 2022, appendix D), hence eps = alpha v + sigma z_t.
            return self.noise_schedule.alpha(t) * predicted + self.noise_schedule.sigma(t) * z_t.detach()

    @property
    def _max_tokens(self) -> int:
        return min(int(self._tokenizer.model_max_length), int(self._text_encoder.config.max_position_embeddings))


class CrossViewAttention:
    """diffusers' attention, with self-attention joined over ``num_views`` consecutive images of the batch."""

    def __init__(self) -> None:
        self._attend = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b l c"],
        encoder_hidden_states: Float[Tensor, "b tokens dim"] | None = None,
        attention_mask: Tensor | None = None,
        num_views: int = 1,
    ) -> Float[Tensor, "b l c"]:
        joins = encoder_hidden_states is None
        queries = hidden_states.unflatten(0, (-1, num_views)).flatten(1, 2) if joins else hidden_states
        attended: Tensor = self._attend(attn, queries, encoder_hidden_states, attention_mask)
        return attended.reshape(hidden_states.shape)


class OptionalCameraEmbedding(nn.Module):
    """The camera's embedding, or zero for labels of width 0, which stand for "no camera".

    diffusers insists on class labels once a model has a class embedding; a zero leaves the time embedding as it is.
    """

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, labels: Float[Tensor, "b camera"]) -> Float[Tensor, "b dim"] | Float[Tensor, "b 1"]:
        embedding: Tensor = self.projection(labels) if labels.shape[1] else labels.new_zeros(len(labels), 1)
        return embedding


def _channels_last(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


def _load_schedule(folder: Path) -> tuple[NoiseSchedule, PredictionType]:
    config = read_json(folder / "scheduler_config.json", kind="scheduler")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{folder / 'scheduler_config.json'}: prediction_type {prediction_type!r} is not supported; "
            "it must be 'epsilon' or 'v_prediction'"
        )
    names = {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    }
    scheduler = DDIMScheduler(**{name: config[name] for name in names & config.keys()})
    return NoiseSchedule(scheduler.alphas_cumprod.float()), prediction_type


def _load_unet(folder: Path) -> UNet2DConditionModel:
    config = read_json(folder / "config.json", kind="UNet folder")
    _check_class(folder, config.get("_class_name"), ["UNet2DConditionModel"])
    if (config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")) != (
        "projection",
        _CAMERA_DIM,
    ):
        raise ValueError(
            f"the UNet in {folder} takes no cameras: a multi-view prior has class_embed_type 'projection' and "
            f"projection_class_embeddings_input_dim {_CAMERA_DIM}"
        )
    return _load_diffusers(UNet2DConditionModel, folder)


def _load_autoencoder(folder: Path) -> Autoencoder:
    class_name = read_json(folder / "config.json", kind="autoencoder folder").get("_class_name")
    _check_class(folder, class_name, list(_AUTOENCODERS))
    return _load_diffusers(_AUTOENCODERS[str(class_name)], folder)


def _load_text(root: Path) -> CLIPTextModel:
    folder = root / "text_encoder"
    architectures = read_json(folder / "config.json", kind="text encoder folder").get("architectures") or [None]
    _check_class(folder, architectures[0], ["CLIPTextModel"])
    check_weights(folder, "model.safetensors")
    return load_model(
        lambda: CLIPTextModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
        ),
        folder,
    )


def _load_diffusers(model_class: type[Model], folder: Path) -> Model:
    check_weights(folder, "diffusion_pytorch_model.safetensors")
    from_pretrained: Callable[..., tuple[Model, dict[str, Any]]] = model_class.from_pretrained  # type: ignore[attr-defined]
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    return load_model(lambda: from_pretrained(folder, low_cpu_mem_usage=False, **options), folder)


def _check_class(folder: Path, found: object, supported: list[str]) -> None:
    if found not in supported:
        raise ValueError(f"{folder} holds a {found}; this prior takes {' or '.join(supported)}")
