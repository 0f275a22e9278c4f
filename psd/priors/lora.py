"""LoRA (arXiv 2106.09685) beside a frozen network's attention layers, through peft."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from psd.cameras import Cameras
from psd.priors.base import Adapter
from psd.random import forked_devices

Predict: TypeAlias = Callable[[Tensor, Tensor, Tensor, Cameras | None], Tensor]

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention layer, under diffusers' names


class LowRankAdapter(Adapter):
    """Low-rank weights that a shared network works with only while this adapter is asked.

    The network gets its low-rank layers once for each rank, switched off; whose weights they use is decided call by
    call. So a network may stay warm while runs take turns, and none of them leaves a trace in it. Weights are float32
    whatever the network's precision. ``predict`` is what asks the network.
    """

    def __init__(self, network: nn.Module, rank: int, predict: Predict) -> None:
        super().__init__()
        self._slots = _insert(network, rank)
        self._predict = predict
        self.weights = nn.ParameterDict({name: _first_weight(name, slot) for name, slot in self._slots.linears.items()})

    def forward(
        self,
        z_t: Float[Tensor, "b c lh lw"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b tokens dim"],
        cameras: Cameras | None,
    ) -> Float[Tensor, "b c lh lw"]:
        with self._slots.hold(self.weights):
            return self._predict(z_t, t, text, cameras)


class _Slots:
    """The low-rank layers of one rank in a network, and the linear maps in them whose weights can be exchanged.

    A plain object, to keep the network out of the adapter's own modules.
    """

    def __init__(self, layers: list[LoraLayer], linears: dict[str, nn.Linear], adapter_name: str) -> None:
        self.linears = linears
        self._layers = layers
        self._adapter_name = adapter_name
        self._placeholders = {name: linear.weight for name, linear in linears.items()}

    @contextmanager
    def hold(self, weights: nn.ParameterDict) -> Iterator[None]:
        """The layers are on, with these weights, while the block runs."""
        for layer in self._layers:
            layer.enable_adapters(True)
            layer.set_adapter(self._adapter_name)
        for name, linear in self.linears.items():
            linear.weight = weights[name]
        try:
            yield
        finally:
            for name, linear in self.linears.items():
                linear.weight = self._placeholders[name]
            for layer in self._layers:
                layer.enable_adapters(False)


def _insert(network: nn.Module, rank: int) -> _Slots:
    """Gives the network layers of this rank unless it has them."""
    adapter_name = f"rank_{rank}"
    layers = _lora_layers(network)
    if not any(adapter_name in layer.lora_A for layer in layers):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS)
        devices = forked_devices(next(network.parameters()).device)
        with torch.random.fork_rng(devices), warnings.catch_warnings():  # peft draws weights that are never used
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of another rank
            inject_adapter_in_model(config, network, adapter_name)
        layers = _lora_layers(network)
        for layer in layers:
            layer.enable_adapters(False)
    linears = {
        f"{name}.{part}".replace(".", "/"): getattr(module, part)[adapter_name]
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
        for part in ("lora_A", "lora_B")
    }
    return _Slots(layers, linears, adapter_name)


def _lora_layers(network: nn.Module) -> list[LoraLayer]:
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _first_weight(name: str, slot: nn.Linear) -> nn.Parameter:
    """Random where the input comes in, zero where the output goes out: at first an adapter changes nothing."""
    weight = torch.zeros(slot.weight.shape)
    if name.endswith("lora_A"):
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)
