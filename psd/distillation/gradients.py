"""Gradients that are given, and gradients that are scaled on their way through networks in half precision."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LOSS_SCALE = 2.0**12  # a reward's gradient at one value of an image is smaller than float16's smallest numbers


class GivenGradient(torch.autograd.Function):
    """A loss with a given value, whose gradient is a given one."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, at: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, outer: Float[Tensor, ""]) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return outer * gradient, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, outer: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * outer, None  # type: ignore[attr-defined]


def scale_gradient(values: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """The same values, whose gradient is multiplied."""
    scaled: Tensor = _Scaled.apply(values, factor)  # type: ignore[no-untyped-call]
    return scaled
