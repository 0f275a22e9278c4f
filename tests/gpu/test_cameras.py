"""Cameras are made where the generator is."""

from __future__ import annotations

import pytest
import torch

from psd.cameras import CameraSampler


@pytest.mark.gpu
def test_a_cuda_generator_gives_cuda_cameras():
    cameras = CameraSampler(height=4, width=4)(torch.Generator("cuda").manual_seed(0))
    origins, directions = cameras.rays()
    assert {origins.device.type, directions.device.type, cameras.fov_deg.device.type} == {"cuda"}
