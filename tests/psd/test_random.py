"""Random numbers on their way to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from psd.random import normal


class OnGpu(Tensor):
    """Says so."""

    is_cuda = True


@pytest.mark.parametrize(("like", "pinned"), [(torch.empty(1), False), (torch.empty(1).as_subclass(OnGpu), True)])
def test_what_goes_to_a_gpu_is_drawn_into_pinned_memory(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, like: Tensor, pinned: bool
) -> None:
    asked = []
    draw = torch.randn

    def record(*args: Any, pin_memory: bool, **options: Any) -> Tensor:
        asked.append(pin_memory)
        return draw(*args, **options)

    monkeypatch.setattr(torch, "randn", record)
    state = generator.get_state()
    numbers = normal((3, 2), like, generator)
    generator.set_state(state)
    assert asked == [pinned]
    assert torch.equal(numbers, draw(3, 2, generator=generator))
