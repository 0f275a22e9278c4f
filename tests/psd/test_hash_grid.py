"""The hash grid: its encoding against interpolation written out, its gradient, what it skips, and that it learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from psd.scenes.hash_grid import PRIMES, HashEncoding, HashGrid, HashGridConfig
from psd.scenes.volume_rendering import SCENE_RADIUS, occupied, render_field
from tests.psd.fields import Balls, views
from tests.psd.plain_kernels import use_plain_kernels

WHITE = torch.ones(3)
SMALL = HashGridConfig(
    num_samples=24, num_levels=4, log2_table_size=9, base_resolution=5, level_scale=1.6, hidden_width=16,
    density_scale=10.0, blob_height=0.5, blob_radius=0.1, occupancy_resolution=16, occupancy_every=4,
    occupancy_decay=0.5, lr_networks=0.01, lr_encoding=0.05,
)  # fmt: skip


def written_out(encoding: HashEncoding, position: list[float]) -> list[float]:
    """Trilinear interpolation, node by node, in Python's whole numbers (instant-ngp, equations 2 to 4)."""
    features = []
    for table, resolution in zip(encoding.tables, encoding.resolutions, strict=True):
        lowest = [min(int(x * resolution), resolution - 1) for x in position]
        fraction = [x * resolution - low for x, low in zip(position, lowest, strict=True)]
        total = torch.zeros(table.shape[1])
        for corner in itertools.product((0, 1), repeat=3):
            node = [low + side for low, side in zip(lowest, corner, strict=True)]
            weight = math.prod(f if side else 1 - f for f, side in zip(fraction, corner, strict=True))
            if (resolution + 1) ** 3 <= len(table):
                entry = sum(n * (resolution + 1) ** axis for axis, n in enumerate(node))
            else:
                entry = (node[0] ^ (node[1] * 2654435761) ^ (node[2] * 805459861)) % len(table)
            total += weight * table[entry].detach()
        features += total.tolist()
    return features


def test_the_encoding_is_interpolation_between_hashed_nodes() -> None:
    encoding = HashEncoding(SMALL)
    assert encoding.resolutions == [5, 8, 12, 20]
    assert [len(table) for table in encoding.tables] == [216, 512, 512, 512]
    positions = torch.cat([torch.rand(20, 3), torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.2, 1.0, 0.6]])])
    expected = torch.tensor([written_out(encoding, position) for position in positions.tolist()])
    torch.testing.assert_close(encoding(positions), expected, atol=1e-8, rtol=1e-3)
    assert torch.equal(encoding(torch.tensor([[1.5, -2.0, 0.5]])), encoding(torch.tensor([[1.0, 0.0, 0.5]])))
    assert encoding(torch.zeros(0, 3)).shape == (0, 8)
    assert [prime % 2**32 for prime in PRIMES] == [1, 2654435761, 805459861]


def test_the_gradient_reaches_every_table_as_differences_say() -> None:
    encoding, positions = HashEncoding(SMALL), torch.rand(30, 3)
    outer = torch.randn(30, encoding.num_features)
    (encoding(positions) * outer).sum().backward()
    for table in encoding.tables:
        assert table.grad is not None
        entry = int(table.grad.abs().sum(1).argmax())
        before = float(table.grad[entry, 1])
        with torch.no_grad():
            table[entry, 1] += 1.0  # the encoding is linear in its tables
            after = (encoding(positions) * outer).sum()
            table[entry, 1] -= 1.0
            assert float(after - (encoding(positions) * outer).sum()) == pytest.approx(before, rel=1e-3)


def test_it_starts_as_a_ball_of_the_blobs_density() -> None:
    field = HashGrid(HashGridConfig(blob_height=3.0, blob_radius=0.5, density_scale=2.0, log2_table_size=10)).field()
    density = field.density(torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0, -1.0]]))
    expected = [2 * math.log1p(math.exp(height)) for height in (3.0, 0.0, -3.0)]
    assert density.tolist() == pytest.approx(expected, rel=1e-2)


def test_the_default_size_is_mvdreams() -> None:
    config = HashGridConfig()
    finest = config.base_resolution * config.level_scale ** (config.num_levels - 1)
    assert finest == pytest.approx(4096, rel=1e-3)


def test_only_occupied_cells_are_asked_and_nothing_is_lost() -> None:
    """A ball in a cell grid that knows where it is: the same picture from a fraction of the questions."""

    class Counting(Balls):
        asked = 0

        def density(self, points: torch.Tensor) -> torch.Tensor:
            type(self).asked += len(points)
            return super().density(points)

    scene, ball, cameras = HashGrid(SMALL), Counting(centres=((0.4, 0.0, 0.2),), radii=(0.4,)), views(0.0, 90.0)
    ticks = ((torch.arange(16) + 0.5) / 16 * 2 - 1) * SCENE_RADIUS
    centres = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), dim=-1)
    scene.occupancy.binaries[0] = (centres - torch.tensor([0.4, 0.0, 0.2])).norm(
        dim=-1
    ) < 0.4 + 2 * SCENE_RADIUS / 16 * math.sqrt(3) / 2
    assert occupied(scene.occupancy, torch.tensor([[0.7, 0, 0.2], [0.2, 0, 0.9], [5.0, 0, 0]])).tolist() == [
        True,
        False,
        False,
    ]
    skipping = render_field(ball, cameras, WHITE, num_samples=48, occupancy=scene.occupancy)
    num_skipping, Counting.asked = Counting.asked, 0
    everywhere = render_field(ball, cameras, WHITE, num_samples=48)
    assert torch.equal(skipping.rgb, everywhere.rgb)
    assert torch.equal(skipping.depth, everywhere.depth)
    assert num_skipping < 0.25 * Counting.asked


def test_the_first_picture_skips_what_is_empty() -> None:
    """With every sample of every ray it would take several times the memory of all that follow."""
    scene = HashGrid(HashGridConfig(num_levels=2, log2_table_size=8))
    assert occupied(scene.occupancy, 0.3 * torch.eye(3)).all()
    assert not occupied(scene.occupancy, 0.9 * torch.eye(3)).any()
    assert float(scene.occupancy.binaries.float().mean()) < 0.2


def test_it_learns_a_ball_and_then_skips_what_is_empty() -> None:
    scene = HashGrid(SMALL)
    optimizer = torch.optim.Adam(scene.param_groups(), betas=(0.9, 0.99), eps=1e-15)
    target, cameras = Balls(), views(0.0, 90.0, 180.0, 270.0, elevation_deg=20.0, size=16)
    backgrounds = [torch.full((3,), level) for level in (0.05, 0.95)]
    truths = [render_field(target, cameras, background, num_samples=48).rgb for background in backgrounds]
    errors = []
    for step in range(80):
        loss = (scene.render(cameras, backgrounds[step % 2]).rgb - truths[step % 2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scene.on_step(step)
        errors.append(float(loss.detach()))
    assert sum(errors[-2:]) < 0.1 * sum(errors[:2])
    inside, outside = torch.tensor([[0.0, 0.0, 0.4]]), torch.tensor([[0.75, 0.75, 0.0]])
    assert occupied(scene.occupancy, inside).all()
    assert not occupied(scene.occupancy, outside).any()


def test_the_way_over_kernels_sees_what_the_torch_marcher_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, cameras = rough_grid(), views(0.0, 90.0, size=24)
    slow = render_field(scene.field(), cameras, WHITE, num_samples=128, occupancy=scene.occupancy, normals=True)
    use_plain_kernels(monkeypatch)
    fast = render_field(scene.field(), cameras, WHITE, num_samples=128, occupancy=scene.occupancy, normals=True)
    for name in ("rgb", "opacity", "normals"):
        assert (getattr(fast, name) - getattr(slow, name)).abs().mean() < 0.01, name
    assert not torch.equal(fast.rgb, slow.rgb), "the steps are others"


def test_in_parts_the_way_over_kernels_has_the_same_jitter_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of a large picture marches a second time, and must meet the same samples."""
    use_plain_kernels(monkeypatch)
    scene, cameras = rough_grid(), views(0.0, 90.0, size=12)

    def render() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(3)
        rgb = render_field(
            scene.field(), cameras, WHITE, num_samples=24, occupancy=scene.occupancy, generator=generator
        ).rgb
        return rgb, torch.autograd.grad(rgb[:, 0].sum(), [*scene.parameters()])

    whole, expected = render()
    monkeypatch.setattr("psd.scenes.volume_rendering.MAX_RAYS_AT_ONCE", 50)
    pieces, found = render()
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def rough_grid() -> HashGrid:
    torch.manual_seed(0)
    scene = HashGrid(SMALL)
    with torch.no_grad():
        for table in scene.encoding.tables:
            table.normal_(std=0.3)
    scene.on_step(0)
    return scene


@pytest.mark.gpu
def test_nerfaccs_kernels_see_what_the_torch_marcher_sees() -> None:
    scene, cameras = rough_grid(), views(0.0, 90.0, size=64)
    field = scene.field()
    slow = render_field(field, cameras, WHITE, num_samples=256, occupancy=scene.occupancy)
    scene.cuda()
    fast = render_field(
        scene.field(), cameras.to("cuda"), WHITE.cuda(), num_samples=256, occupancy=scene.occupancy, normals=True
    )
    assert (fast.rgb.cpu() - slow.rgb).abs().mean() < 0.01
    assert (fast.opacity.cpu() - slow.opacity).abs().mean() < 0.01
    fast.rgb.mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in scene.parameters() if parameter.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [True, False])
def test_a_large_picture_has_its_gradient_on_a_gpu(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is marched through twice, and the second march must meet the samples of the first."""
    if not kernels:
        monkeypatch.setattr("psd.scenes.volume_rendering.has_kernels", lambda device: False)
    scene, cameras = rough_grid().cuda(), views(0.0, 90.0, size=128).to("cuda")
    generator = torch.Generator().manual_seed(0)
    rgb = render_field(
        scene.field(), cameras, WHITE.cuda(), num_samples=64, occupancy=scene.occupancy, generator=generator
    ).rgb
    rgb[:, 0].sum().backward()
    gradients = [parameter.grad for parameter in scene.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_levels": 0}, "num_levels must be >= 1"),
        ({"log2_table_size": 31}, r"log2_table_size must lie in \[1, 30\], got 31"),
        ({"level_scale": 0.5}, "level_scale must be >= 1"),
        ({"lr_networks": 0.0}, "lr_networks must be > 0"),
        ({"occupancy_decay": 1.0}, r"occupancy_decay must lie in \[0, 1\)"),
        ({"num_samples": 1}, "num_samples must be >= 2"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashGridConfig(**wrong)
