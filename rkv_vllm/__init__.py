"""R-KV decode-time KV cache compression inside stock vLLM.

Importing this package imports neither vLLM nor torch: vLLM's own processes load it early, as a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rkv_vllm.settings.engine_args import rkv_engine_args as rkv_engine_args

__version__ = "0.1.0"
__all__ = ["__version__", "rkv_engine_args"]


def __getattr__(name: str) -> Any:
    if name == "rkv_engine_args":
        from rkv_vllm.settings.engine_args import rkv_engine_args

        return rkv_engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
