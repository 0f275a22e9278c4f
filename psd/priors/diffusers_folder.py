"""What a folder in diffusers' Stable Diffusion layout must hold for a prior, told from its JSON files and headers.

Loads no torch: a checkpoint of the wrong kind is told before any worker starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from psd.checkpoint_files import check_folder, check_tokenizer, check_weights, read_json

PriorKind = Literal["stable_diffusion", "multiview"]

CAMERA_DIM = 16  # a camera is a flattened 4 x 4 matrix
UNETS = ("UNet2DConditionModel",)
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
TEXT_ENCODERS = ("CLIPTextModel",)

_TITLES: dict[PriorKind, str] = {"stable_diffusion": "Stable Diffusion prior", "multiview": "multi-view prior"}
DIFFUSERS_WEIGHTS, TEXT_ENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
_WEIGHTS = {"unet": DIFFUSERS_WEIGHTS, "vae": DIFFUSERS_WEIGHTS, "text_encoder": TEXT_ENCODER_WEIGHTS}


def check_prior_folder(root: Path, kind: PriorKind) -> None:
    """Raises:
    ValueError: the folder, a part of it or its weights are missing or not whole, or it holds another kind of model.
    """
    check_folder(root, kind=_TITLES[kind])
    layout = f"{_TITLES[kind]} (a diffusers folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/)"
    read_json(root / "model_index.json", kind=layout)
    unet, vae, text = (read_json(root / part / "config.json", kind=f"{part} of a {_TITLES[kind]}") for part in _WEIGHTS)
    _check_class(root / "unet", unet.get("_class_name"), UNETS)
    _check_class(root / "vae", vae.get("_class_name"), AUTOENCODERS)
    _check_class(root / "text_encoder", (text.get("architectures") or [None])[0], TEXT_ENCODERS)
    _check_cameras(root / "unet", unet, kind)
    _check_fit(root, unet, vae, text)
    prediction_type(root)
    check_tokenizer(root / "tokenizer", kind="tokenizer")
    for part, weights in _WEIGHTS.items():
        check_weights(root / part, weights)


def check_previewer_folder(folder: Path, root: Path) -> None:
    """Whether a folder holds a tiny autoencoder, and for latents like those of the prior in ``root``, if that is there.

    Raises:
        ValueError: it or its weights are missing or not whole, it is another model, or its latents have other channels.
    """
    check_folder(folder, kind="tiny autoencoder")
    config = read_json(folder / "config.json", kind="tiny autoencoder (as madebyollin/taesd)")
    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"{folder} holds a {config.get('_class_name')}; previews take an AutoencoderTiny, as TAESD is")
    found, prior = config.get("latent_channels", 4), root / "vae" / "config.json"
    if prior.is_file() and found != (wanted := read_json(prior, kind="autoencoder").get("latent_channels", 4)):
        raise ValueError(f"{folder} takes latents of {found} channels, those of {root} have {wanted}")
    check_weights(folder, DIFFUSERS_WEIGHTS)


def prediction_type(root: Path) -> Literal["epsilon", "v_prediction"]:
    """What the network was trained to predict.

    Raises:
        ValueError: something that cannot be turned into the noise here.
    """
    file = root / "scheduler" / "scheduler_config.json"
    found = read_json(file, kind="scheduler").get("prediction_type", "epsilon")
    if found == "epsilon":
        return "epsilon"
    if found == "v_prediction":
        return "v_prediction"
    raise ValueError(f"{file}: prediction_type {found!r} is not supported; it must be 'epsilon' or 'v_prediction'")


def _check_class(folder: Path, found: object, supported: tuple[str, ...]) -> None:
    if found not in supported:
        raise ValueError(f"{folder} holds a {found}; this prior takes {' or '.join(supported)}")


def _check_cameras(folder: Path, unet: dict[str, Any], kind: PriorKind) -> None:
    cameras = (unet.get("class_embed_type"), unet.get("projection_class_embeddings_input_dim"))
    takes_cameras = cameras == ("projection", CAMERA_DIM)
    if kind == "multiview" and not takes_cameras:
        raise ValueError(
            f"the UNet in {folder} takes no cameras: a multi-view prior has class_embed_type 'projection' and "
            f"projection_class_embeddings_input_dim {CAMERA_DIM}; for a model of single images set "
            "prior.kind=stable_diffusion"
        )
    if kind == "stable_diffusion" and takes_cameras:
        raise ValueError(f"the UNet in {folder} takes cameras: set prior.kind=multiview")
    if kind == "stable_diffusion" and cameras[0] is not None:
        raise ValueError(f"the UNet in {folder} takes {cameras[0]} class labels, which nothing here gives it")


def _check_fit(root: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> None:
    """The parts belong to one model that sees nothing but a noisy latent, the time and a text."""
    if (extra := unet.get("addition_embed_type")) is not None:
        raise ValueError(
            f"the UNet in {root / 'unet'} wants more than a text ({extra!r}, as SDXL's does); this prior takes "
            "Stable Diffusion 1.x and 2.x"
        )
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise ValueError(
            f"the UNet in {root / 'unet'} takes {channels} channels, the autoencoder's latents have {latents}: it is "
            "one for inpainting, depth or upscaling; this prior takes a text-to-image model"
        )
    wanted, width = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if wanted != width:
        raise ValueError(
            f"the UNet in {root / 'unet'} attends to text of width {wanted}, the text encoder's has {width}: "
            "they are parts of different models"
        )
