"""`psd convert`: a published checkpoint file as the folder that experiments name."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from orchestrator.errors import UserError

CONVERTIBLE = {
    "mvdream": "sd-v2.1-base-4view.pt",
    "hpsv2": "HPS_v2.1_compressed.pt",
    "imagereward": "ImageReward.pt",
    "reward3d": "Reward3D_Scorer.pt or Reward3D_CrossViewFusion.pt",
}


def convert_command(model: str, checkpoint: Path, out: Path, tokenizer: str | None, base: str | None) -> int:
    from orchestrator.psd_objective.conversions import convert

    try:
        convert(model, checkpoint, out, tokenizer, base)
    except ValueError as error:
        raise UserError(str(error)) from None
    Console().print(f"{model} is in {out}", highlight=False, soft_wrap=True)
    return 0
