"""Ray, all of it: a pool of actors that follows a cluster. Nothing else in this project imports ray."""

from __future__ import annotations

from orchestrator.ray_pool.pool import RayPool

__all__ = ["RayPool"]
