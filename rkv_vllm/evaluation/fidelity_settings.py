"""The settings that a fidelity run compares."""

from __future__ import annotations

from collections.abc import Sequence

from rkv_vllm.settings.config import CompactionSettings, RkvConfig
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import RequestedSettings

#: How one request keeps its cache; None is the full cache, the control.
Setting = CompactionSettings | None


def settings_of(
    config: RkvConfig,
    size: RequestSize,
    budgets: Sequence[int],
    buffers: Sequence[int],
    policies: Sequence[str],
) -> list[Setting]:
    """The control, then every combination, for windows of this size.

    Raises: ValueError that names the field of a value out of bounds.
    """
    settings: list[Setting] = [None]
    for policy in policies:
        for buffer in buffers:
            for budget in budgets:
                asked = {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy}
                if budget == 0:
                    raise ValueError("rkv_budget 0 is the full cache, which is always measured")
                settings.append(config.resolve(RequestedSettings.from_extra_args(asked), size))
    return settings
