"""What a compaction round may be asked for; imports nothing, so that settings can use it."""

from __future__ import annotations

from typing import Literal

Scope = Literal["head", "layer", "global"]
"""Who shares one set of kept tokens: no other KV head, the heads of a layer, or all layers."""

Order = Literal["temporal", "score"]
"""How the kept candidates lie afterwards: oldest first, or best first; the window comes last as it was."""
