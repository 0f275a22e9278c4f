"""``python -m orchestrator.cli`` is the same as ``psd``."""

from __future__ import annotations

from orchestrator.cli import main

raise SystemExit(main())
