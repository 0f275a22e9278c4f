"""Schedules from their settings."""

from __future__ import annotations

from orchestrator.experiment_config.schedules import CosineConfig, LinearConfig, PiecewiseConfig, ScheduleConfig
from psd.schedules import Constant, Cosine, Linear, Piecewise, Schedule


def build_schedule(config: ScheduleConfig) -> Schedule:
    match config:
        case LinearConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Linear(start=start, end=end, start_step=start_step, end_step=end_step)
        case CosineConfig(start=start, end=end, start_step=start_step, end_step=end_step):
            return Cosine(start=start, end=end, start_step=start_step, end_step=end_step)
        case PiecewiseConfig(knots=knots):
            return Piecewise(knots)
        case float(value):
            return Constant(value)
