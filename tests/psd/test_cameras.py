"""Cameras against rays and matrices worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from psd.cameras import Cameras, CameraSampler, turntable


def orbit(azimuth_deg, elevation_deg, *, distance=2.0, fov_deg=90.0, height=2, width=2):
    azimuth, elevation = torch.broadcast_tensors(torch.tensor(azimuth_deg), torch.tensor(elevation_deg))
    ones = torch.ones_like(azimuth)
    return Cameras.orbit(
        azimuth_deg=azimuth,
        elevation_deg=elevation,
        distance=distance * ones,
        fov_deg=fov_deg * ones,
        height=height,
        width=width,
    )


def degrees_apart(a, b):
    return ((a - b + 180) % 360 - 180).abs()


ANGLES = torch.cartesian_prod(torch.arange(0.0, 360.0, 37.0), torch.tensor([-90.0, -45.0, 0.0, 30.0, 90.0])).T


class TestOrbit:
    def test_camera_on_the_x_axis(self):
        # Seen from +x with z up, the world's y axis points right and the camera's z axis points back at the camera.
        expected = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).float()
        assert_close(orbit([0.0], [0.0]).c2w[0], expected)

    def test_azimuth_grows_counter_clockwise_seen_from_above(self):
        assert_close(orbit([90.0], [0.0]).c2w[0, :3, 3], torch.tensor([0.0, 2.0, 0.0]), atol=1e-6, rtol=0)

    def test_elevation_lifts_the_camera(self):
        position = orbit([0.0], [30.0]).c2w[0, :3, 3]
        assert_close(position, torch.tensor([math.sqrt(3), 0.0, 1.0]))

    def test_axes_are_a_right_handed_orthonormal_frame(self):
        rotation = orbit(*ANGLES.tolist()).c2w[:, :3, :3]
        assert_close(rotation.mT @ rotation, torch.eye(3).expand_as(rotation), atol=1e-6, rtol=0)
        assert_close(torch.linalg.det(rotation), torch.ones(len(rotation)))

    def test_every_camera_looks_at_the_origin_from_its_distance_and_stands_upright(self):
        cameras = orbit(*ANGLES.tolist(), distance=3.0)
        position, backward = cameras.c2w[:, :3, 3], cameras.c2w[:, :3, 2]
        assert_close(position, 3 * backward)
        assert_close(position.norm(dim=-1), torch.full((len(cameras),), 3.0))
        right, up = cameras.c2w[:, :3, 0], cameras.c2w[:, :3, 1]
        assert_close(right[:, 2], torch.zeros(len(cameras)))  # the horizon is level
        assert (up[:, 2] > -1e-6).all()

    def test_last_row_is_homogeneous(self):
        cameras = orbit(*ANGLES.tolist())
        assert_close(cameras.c2w[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(len(cameras), 4))

    def test_angles_are_read_back_from_the_matrices(self):
        azimuth, elevation = torch.cartesian_prod(torch.arange(0.0, 360.0, 37.0), torch.arange(-80.0, 81.0, 20.0)).T
        cameras = orbit(azimuth.tolist(), elevation.tolist(), distance=1.7)
        assert degrees_apart(cameras.azimuth_deg, azimuth).max() < 1e-3
        assert cameras.azimuth_deg.min() >= 0
        assert_close(cameras.elevation_deg, elevation, atol=1e-3, rtol=0)


class TestRays:
    # 2 x 2 pixels, field of view 90: the image plane at distance 1 spans [-1, 1], pixel centres lie at +-0.5.
    @pytest.mark.parametrize(
        ("azimuth", "elevation", "top_left", "bottom_right"),
        [
            (0.0, 0.0, (-1.0, -0.5, 0.5), (-1.0, 0.5, -0.5)),  # right = +y, up = +z, forward = -x
            (90.0, 0.0, (0.5, -1.0, 0.5), (-0.5, -1.0, -0.5)),  # right = -x, up = +z, forward = -y
            (0.0, 90.0, (-0.5, -0.5, -1.0), (0.5, 0.5, -1.0)),  # right = +y, up = -x, forward = -z
        ],
    )
    def test_corner_directions(self, azimuth, elevation, top_left, bottom_right):
        _, directions = orbit([azimuth], [elevation]).rays()
        norm = math.sqrt(1.5)
        assert_close(directions[0, 0, 0], torch.tensor(top_left) / norm)
        assert_close(directions[0, 1, 1], torch.tensor(bottom_right) / norm)

    def test_field_of_view_is_vertical_and_pixels_are_square(self):
        # One row, three columns, field of view 2 atan(1/2): the plane is 1 high and 3 wide, centres at x = -1, 0, 1.
        _, directions = orbit([0.0], [0.0], fov_deg=math.degrees(2 * math.atan(0.5)), height=1, width=3).rays()
        expected = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
        assert_close(directions[0, 0], torch.nn.functional.normalize(expected, dim=-1))

    def test_each_view_has_its_own_field_of_view(self):
        cameras = orbit([0.0, 0.0], [0.0, 0.0])
        fov_deg = torch.tensor([90.0, math.degrees(2 * math.atan(0.5))])
        cameras = Cameras(c2w=cameras.c2w, fov_deg=fov_deg, height=2, width=2)
        _, directions = cameras.rays()
        assert_close(directions[0, 0, 1], torch.tensor([-1.0, 0.5, 0.5]) / math.sqrt(1.5))
        assert_close(directions[1, 0, 1], torch.tensor([-1.0, 0.25, 0.25]) / math.sqrt(1.125))

    def test_origins_are_the_camera_positions(self):
        cameras = orbit(*ANGLES.tolist(), height=3, width=5)
        origins, directions = cameras.rays()
        assert origins.shape == directions.shape == (len(cameras), 3, 5, 3)
        assert_close(origins, cameras.c2w[:, None, None, :3, 3].expand(-1, 3, 5, -1))

    def test_directions_are_unit_vectors(self):
        _, directions = orbit(*ANGLES.tolist(), height=3, width=5).rays()
        assert_close(directions.norm(dim=-1), torch.ones(directions.shape[:-1]))

    def test_the_central_ray_hits_the_origin(self):
        origins, directions = orbit(*ANGLES.tolist(), distance=2.0, height=3, width=5).rays()
        hit = origins[:, 1, 2] + 2 * directions[:, 1, 2]
        assert_close(hit, torch.zeros_like(hit), atol=1e-6, rtol=0)


class TestConditioning:
    def test_row_major_matrix_with_the_position_on_the_unit_sphere(self):
        expected = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]).float()
        assert_close(orbit([0.0], [0.0], distance=3.0).conditioning()[0], expected)

    def test_distance_does_not_matter(self):
        near, far = (orbit(*ANGLES.tolist(), distance=distance) for distance in (0.5, 7.0))
        assert_close(near.conditioning(), far.conditioning())

    def test_the_cameras_stay_as_they_are(self):
        cameras = orbit([10.0], [20.0], distance=3.0)
        before = cameras.c2w.clone()
        cameras.conditioning()
        assert_close(cameras.c2w, before, atol=0, rtol=0)


class TestBatch:
    def test_a_slice_keeps_views_and_settings(self):
        cameras = CameraSampler(height=3, width=5, num_groups=2, group_size=2).evenly(4, 10.0)
        part = cameras[2:4]
        assert len(part) == 2
        assert (part.height, part.width, part.group_size) == (3, 5, 2)
        assert_close(part.c2w, cameras.c2w[2:4])
        assert_close(part.fov_deg, cameras.fov_deg[2:4])

    def test_another_resolution_sees_the_same_frame(self):
        coarse = orbit([0.0], [0.0], height=1, width=1)
        fine = coarse.at_resolution(3, 3)
        assert_close(fine.rays()[1][:, 1:2, 1:2], coarse.rays()[1])

    def test_to_moves_every_tensor(self):
        cameras = orbit([0.0], [0.0]).to("meta")
        assert {cameras.c2w.device.type, cameras.fov_deg.device.type} == {"meta"}


class TestSampler:
    sampler = CameraSampler(
        height=8,
        width=8,
        num_groups=400,
        group_size=4,
        elevation_deg=(-10.0, 50.0),
        fov_deg=(20.0, 60.0),
        distance_scale=(0.8, 1.2),
    )

    @staticmethod
    def scale(cameras):
        return cameras.c2w[:, :3, 3].norm(dim=-1) * torch.tan(torch.deg2rad(cameras.fov_deg) / 2)

    def test_every_group_is_a_full_turn_in_even_steps(self, generator):
        cameras = self.sampler(generator)
        azimuth = cameras.azimuth_deg.view(400, 4)
        assert cameras.group_size == 4
        assert degrees_apart(azimuth, azimuth[:, :1] + torch.tensor([0.0, 90.0, 180.0, 270.0])).max() < 1e-3

    def test_a_group_shares_elevation_field_of_view_and_distance(self, generator):
        cameras = self.sampler(generator)
        for values in (cameras.elevation_deg, cameras.fov_deg, self.scale(cameras)):
            groups = values.view(400, 4)
            assert_close(groups, groups[:, :1].expand(-1, 4), atol=1e-3, rtol=0)

    def test_draws_fill_their_ranges_and_stay_inside(self, generator):
        cameras = self.sampler(generator)
        first_azimuth = cameras.azimuth_deg.view(400, 4)[:, 0]
        draws = [
            (first_azimuth, 0, 90),
            (cameras.elevation_deg, -10, 50),
            (cameras.fov_deg, 20, 60),
            (self.scale(cameras), 0.8, 1.2),
        ]
        for values, low, high in draws:
            unit = (values - low) / (high - low)
            assert unit.min() > -1e-4
            assert unit.max() < 1 + 1e-4
            assert unit.min() < 0.02
            assert unit.max() > 0.98
            assert unit.mean() == pytest.approx(0.5, abs=0.06)  # four standard errors of 400 uniform draws

    def test_draws_are_independent_of_each_other(self, generator):
        cameras = self.sampler(generator)
        values = [cameras.azimuth_deg, cameras.elevation_deg, cameras.fov_deg, self.scale(cameras)]
        correlation = torch.corrcoef(torch.stack([value.view(400, 4)[:, 0] for value in values]))
        assert (correlation - torch.eye(4)).abs().max() < 0.2  # four standard errors

    def test_only_the_generator_decides(self, generator):
        state = generator.get_state()
        first, second = self.sampler(generator), self.sampler(generator)
        again = self.sampler(generator.set_state(state))
        assert_close(again.c2w, first.c2w, atol=0, rtol=0)
        assert not torch.equal(second.c2w, first.c2w)

    def test_a_range_of_one_value_is_that_value(self, generator):
        sampler = CameraSampler(
            height=8, width=8, elevation_deg=(15.0, 15.0), fov_deg=(40.0, 40.0), distance_scale=(1.0, 1.0)
        )
        cameras = sampler(generator)
        assert_close(cameras.elevation_deg, torch.full((4,), 15.0), atol=1e-3, rtol=0)
        assert_close(cameras.c2w[:, :3, 3].norm(dim=-1), torch.full((4,), 1 / math.tan(math.radians(20))))

    def test_the_unit_sphere_fills_the_frame_at_scale_one(self, generator):
        # At distance 1 / tan(fov / 2) the tangent plane through the origin is exactly 2 high.
        sampler = CameraSampler(height=1, width=1, fov_deg=(30.0, 50.0), distance_scale=(1.0, 1.0))
        cameras = sampler(generator)
        distance = cameras.c2w[:, :3, 3].norm(dim=-1)
        assert_close(distance * torch.tan(torch.deg2rad(cameras.fov_deg) / 2), torch.ones(4))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"elevation_deg": (30.0, 0.0)}, "elevation_deg must be .* low <= high"),
            ({"elevation_deg": (0.0, 91.0)}, r"elevation_deg must lie in \[-90, 90\]"),
            ({"fov_deg": (0.0, 60.0)}, r"fov_deg must lie in \(0, 180\)"),
            ({"fov_deg": (15.0, 180.0)}, r"fov_deg must lie in \(0, 180\)"),
            ({"distance_scale": (0.0, 1.0)}, "distance_scale must be > 0"),
            ({"num_groups": 0}, "num_groups and group_size must be >= 1"),
            ({"group_size": 0}, "num_groups and group_size must be >= 1"),
            ({"height": 0}, "height and width must be >= 1"),
        ],
    )
    def test_impossible_settings_are_refused(self, setting, message):
        with pytest.raises(ValueError, match=message):
            CameraSampler(**{"height": 8, "width": 8} | setting)


class TestHeldOutViews:
    sampler = CameraSampler(height=8, width=8, group_size=4, fov_deg=(30.0, 50.0), distance_scale=(0.8, 1.0))

    def test_groups_interleave_to_one_even_turn(self):
        cameras = self.sampler.evenly(8, 15.0)
        expected = torch.tensor([0.0, 90.0, 180.0, 270.0, 45.0, 135.0, 225.0, 315.0])
        assert degrees_apart(cameras.azimuth_deg, expected).max() < 1e-3
        assert cameras.group_size == 4

    def test_elevation_is_given_and_the_rest_is_mid_range(self):
        cameras = self.sampler.evenly(4, 15.0)
        assert_close(cameras.elevation_deg, torch.full((4,), 15.0), atol=1e-3, rtol=0)
        assert_close(cameras.fov_deg, torch.full((4,), 40.0))
        assert_close(cameras.c2w[:, :3, 3].norm(dim=-1), torch.full((4,), 0.9 / math.tan(math.radians(20))))

    @pytest.mark.parametrize("num_views", [0, 6])
    def test_half_a_group_is_refused(self, num_views):
        with pytest.raises(ValueError, match="positive multiple of the group size 4"):
            self.sampler.evenly(num_views, 15.0)

    def test_framing_steps_back_until_the_sphere_is_in_every_picture(self):
        framing = self.sampler.framing(1.15)
        for cameras in (framing.evenly(4, 15.0), framing(torch.Generator().manual_seed(0))):
            angle = torch.asin(1.15 / cameras.c2w[:, :3, 3].norm(dim=-1))
            assert (angle <= torch.deg2rad(cameras.fov_deg) / 2 + 1e-6).all()
        assert framing.framing(1.0) == framing  # near enough already

    def test_turntable_is_one_turn_of_single_views(self):
        cameras = turntable(self.sampler, num_frames=6, elevation_deg=20.0)
        assert degrees_apart(cameras.azimuth_deg, torch.arange(6) * 60.0).max() < 1e-3
        assert_close(cameras.elevation_deg, torch.full((6,), 20.0), atol=1e-3, rtol=0)
        assert_close(cameras.c2w[:, :3, 3].norm(dim=-1), torch.full((6,), 0.9 / math.tan(math.radians(20))))
        assert (cameras.group_size, cameras.height, cameras.width) == (1, 8, 8)
