"""Optimization: one asset on its way from a prompt to a scene, step by step, resumable: on a CPU bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psd.cameras import CameraSampler, LaterCameras
from psd.distillation.distillation import Distillation
from psd.phases import phase
from psd.prompts import PromptEncoder
from psd.random import forked_devices
from psd.scenes.backgrounds import Background
from psd.scenes.base import Scene


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The scene's optimiser; learning rates are the scene's own."""

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-15  # a voxel that is rarely seen has tiny gradients, which a larger eps would drown


@dataclass(frozen=True, kw_only=True)
class StepReport:
    step: int  # the one just done, from 0
    terms: Mapping[str, float]
    unet_calls: int  # see DistillationLoss


class Optimization:
    """A scene, what pulls at it, and the random numbers that it draws.

    Random numbers come from a generator of its own, on the CPU, so that they are the same on every device, and from a
    private copy of torch's global generators: several optimisations may take turns in one process.
    """

    def __init__(
        self,
        *,
        scene: Scene,
        background: Background,
        cameras: CameraSampler,
        distillation: Distillation,
        prompt_encoder: PromptEncoder,
        prompt: str,
        seed: int,
        adam: AdamConfig = AdamConfig(),
        later_cameras: LaterCameras | None = None,
    ) -> None:
        self.scene = scene
        self.background = background
        self.distillation = distillation
        self.next_step = 0
        self._cameras = cameras
        self._later_cameras = later_cameras
        self._prompt_encoder = prompt_encoder
        self._prompt = prompt
        self._device = next(scene.parameters()).device
        self._generator = torch.Generator().manual_seed(seed)
        self._global_rng = _GlobalRng(self._device, seed)
        groups: list[dict[str, Any]] = [dict(group) for group in (*scene.param_groups(), *background.param_groups())]
        self._optimizer = torch.optim.Adam(groups, betas=adam.betas, eps=adam.eps)

    def step(self) -> StepReport:
        """Raises:
        FloatingPointError: a loss, or the gradient, is not finite; names it and the step. The scene has not moved.
        """
        with self._global_rng.active():
            return self._step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step depends on, apart from what the constructor is given."""
        return {
            "next_step": self.next_step,
            "scene": self.scene.state_dict(),
            "background": self.background.state_dict(),
            "distillation": self.distillation.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "global_rng": self._global_rng.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: it was written on a GPU and is loaded on a CPU, or the other way round.
        """
        if len(state["global_rng"]) != len(self._global_rng.state):
            here, there = ("a CPU", "a GPU") if self._device.type == "cpu" else ("a GPU", "a CPU")
            raise ValueError(
                f"this state is of an optimisation on {there}, whose random numbers {here} cannot continue"
            )
        self.next_step = state["next_step"]
        self.scene.load_state_dict(state["scene"])
        self.background.load_state_dict(state["background"])
        self.distillation.load_state_dict(state["distillation"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        self._global_rng.state = [part.cpu() for part in state["global_rng"]]

    def _step(self) -> StepReport:
        step = self.next_step
        drawn = self._sampler(step)(self._generator)
        cameras = drawn.to(self._device)
        with phase("render"):
            # A picture paints its own background, so it is always the same one that the prior is told of.
            flat = self.scene.num_dimensions == 2
            background = self.background.fixed(cameras) if flat else self.background.sample(self._generator, cameras)
            render = self.scene.render(cameras, background.rgb)
            regularization = self.scene.regularization(render, step)
        prompt = self._prompt_encoder(self._prompt, drawn, background.phrase)  # looks at angles: on the CPU, no wait
        rgb = render.rgb[:1] if flat else render.rgb  # every camera sees the same picture
        loss = self.distillation(rgb, prompt, None if flat else cameras, step, self._generator)
        with phase("backward"):
            self._optimizer.zero_grad()
            torch.stack([loss.total, *regularization.values()]).sum().backward()
        losses = {name: value.detach() for name, value in regularization.items()}
        terms = _finite(loss.terms | losses | {"gradient": self._gradient_norm()}, step)
        with phase("optimizer"):
            self._optimizer.step()
            self.scene.on_step(step)
        self.next_step = step + 1
        return StepReport(step=step, terms=terms, unet_calls=loss.unet_calls)

    def _gradient_norm(self) -> Tensor:
        """That of all that the optimiser moves; not finite if anything in it is not."""
        parameters = (each for group in self._optimizer.param_groups for each in group["params"])
        return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])

    def _sampler(self, step: int) -> CameraSampler:
        later = self._later_cameras
        return later.sampler if later is not None and step >= later.start else self._cameras


class _GlobalRng:
    """torch's global generators as one optimisation sees them: ``state`` while it rests, installed while it runs."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._devices = forked_devices(device)
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self.state = self._read()

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self.state[0])
            for device, part in zip(self._devices, self.state[1:], strict=True):
                torch.cuda.set_rng_state(part, device)
            try:
                yield
            finally:
                self.state = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]


def _finite(terms: Mapping[str, Tensor], step: int) -> dict[str, float]:
    """The terms as numbers, with one wait for the device."""
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {step}; lower the learning rate or the guidance scale")
    return values
