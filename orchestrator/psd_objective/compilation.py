"""Compiling a network takes minutes, and happens within a run, too: at the first step that has another batch size."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

from torch._dynamo.callback import callback_handler

from orchestrator.heartbeat import patience

_under_way = ExitStack()


@cache
def excuse_compiling() -> None:
    """From now on this process asks for patience while torch compiles."""
    callback_handler.register_start_callback(lambda _: _under_way.enter_context(patience()))
    callback_handler.register_end_callback(lambda _: _under_way.close())
