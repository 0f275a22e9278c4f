"""Reward functions that installed packages offer. Imports none of them, and no torch."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

GROUP = "psd.rewards"


def find_function(name: str) -> EntryPoint:
    """The entry point of that name, not loaded.

    Raises:
        ValueError: no installed package offers that name, or several do.
    """
    offered = entry_points(group=GROUP)
    found = {entry.value: entry for entry in offered if entry.name == name}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(f"several packages offer the reward function {name!r}: {', '.join(sorted(found))}")
    known = ", ".join(sorted({entry.name for entry in offered})) or "none"
    raise ValueError(
        f"no installed package offers a reward function {name!r} (offered: {known}); "
        f'a package does so in its pyproject.toml: [project.entry-points."{GROUP}"] {name} = "module:callable"'
    )
