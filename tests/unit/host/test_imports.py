"""What is imported of vLLM, in functions too, which run only when they are called."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[3]
#: Which has both places of what moved, and must itself import.
MOVED = "rkv_vllm/host/moved.py"


def test_all_that_is_imported_of_vllm_is_there() -> None:
    """Proves of the installed release that no import fails later, in a command that nobody tried."""
    imports = {
        (path.relative_to(ROOT).as_posix(), node.module, alias.name)
        for folder in ("rkv_vllm", "kernels", "server")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(imports) > 100
    import_module("rkv_vllm.host.moved")
    missing = [each for each in sorted(imports) if each[0] != MOVED and not _exists(*each[1:])]
    assert missing == []


def _exists(module: str, name: str) -> bool:
    try:
        return hasattr(import_module(module), name) or bool(import_module(f"{module}.{name}"))
    except ImportError:
        return False
