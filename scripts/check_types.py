"""Run mypy over the package as it is imported: kernels/ and server/ as rkv_vllm.kernels and rkv_vllm.server.

setuptools maps these folders when it installs; mypy knows only folders. It is shown a tree of links instead,
and what it prints names the real files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".cache" / "types"  # always the same place: mypy remembers paths between runs


def main() -> int:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir(parents=True)
    for package, folder in sorted(mapping.items()):
        link_modules(TREE.joinpath(*package.split(".")), ROOT / folder)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--package", "rkv_vllm", *sys.argv[1:]],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(TREE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = result.stdout
    for package, folder in sorted(mapping.items(), reverse=True):  # the inner packages first
        output = output.replace(str(TREE.joinpath(*package.split(".")).relative_to(ROOT)), folder)
    print(output, end="")
    return result.returncode


def link_modules(target: Path, source: Path) -> None:
    """Make `target` a folder of links to all that is in `source`."""
    target.mkdir()
    for item in source.iterdir():
        if item.name != "__pycache__":
            (target / item.name).symlink_to(item)


if __name__ == "__main__":
    sys.exit(main())
