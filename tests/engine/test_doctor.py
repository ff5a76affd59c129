"""`rkv-vllm doctor` on a real model's configuration; no engine is started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console
from support.tiny_configs import make_config
from typer.testing import CliRunner, Result

from rkv_vllm.cli import app
from rkv_vllm.cli.diagnosis import Diagnosis, Sizes
from rkv_vllm.cli.doctor import show
from rkv_vllm.demo.model import prepare
from rkv_vllm.host.contract import SUPPORTED

#: SmolLM2-135M: 30 layers, 3 KV heads of 64, K and V.
BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 2


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare()


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """vLLM sets variables for its workers while it makes a configuration."""
    with patch.dict(os.environ):
        yield


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "300"})


def sizes(*arguments: str | Path) -> dict[str, Any]:
    result = doctor(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["problems"] == []
    return found["sizes"]


def test_the_installation_alone() -> None:
    """Proves that without a model versions and the verdict on this vLLM are printed, and nothing else."""
    result = doctor()
    assert result.exit_code == 0
    assert "rkv-vllm" in result.stdout and "torch" in result.stdout
    assert any(release in result.stdout for release in SUPPORTED)
    assert "R-KV works with this installation." in result.stdout
    assert "KV bytes" not in result.stdout


def test_pages_and_requests_with_and_without_a_budget(model: Path) -> None:
    """Proves that vLLM's own reading of the model gives bytes, pages and requests that fit a given pool."""
    pool = f"--kv-cache-memory-bytes={1000 * 32 * BYTES_PER_TOKEN}"
    found = sizes(model, pool, "--block-size", "32", "--max-model-len", "4096", "--kv-budget", "512")
    assert found["kv_bytes_per_token"] == BYTES_PER_TOKEN
    assert (found["page_size"], found["pool_pages"], found["pool_is_estimate"]) == (32, 1000, False)
    full, bounded = found["rows"]
    assert (full["budget"], full["pages_per_request"], full["requests"]) == (None, 128, 7)
    assert (bounded["tokens_held"], bounded["pages_per_request"], bounded["requests"]) == (640, 20, 49)


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_cache_holds_twice_the_tokens_of_bfloat16(model: Path, name: str) -> None:
    """Proves bytes counted by what the cache holds, and not by the model's dtype, which stays beside it."""
    words = ("--kv-cache-memory-bytes=64M", "--dtype=bfloat16", "--max-model-len=1024")
    plain = sizes(model, *words)
    with patch("torch.cpu._is_avx512_supported", lambda: True):
        fp8 = sizes(model, *words, f"--kv-cache-dtype={name}")
    assert (plain["dtype"], fp8["dtype"]) == ("bfloat16", name)
    assert fp8["kv_bytes_per_token"] * 2 == plain["kv_bytes_per_token"] == BYTES_PER_TOKEN
    assert fp8["pool_pages"] // 2 == plain["pool_pages"] == (64 << 20) // (128 * BYTES_PER_TOKEN)


def test_a_checkpoint_that_asks_for_fp8(tmp_path: Path) -> None:
    """Proves bytes counted right where only the checkpoint says, to the worker, that the cache is in FP8."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    model = make_config(tmp_path, "llama", {"quantization_config": quantisation})
    words = ("--skip-tokenizer-init", "--num-gpu-blocks-override=400")
    with patch("torch.cpu._is_avx512_supported", lambda: True):
        found = sizes(model, *words)
    assert found["dtype"] == "fp8" and found["kv_bytes_per_token"] == 256
    assert sizes(model, *words, "--kv-cache-dtype=bfloat16")["kv_bytes_per_token"] == 512


def test_a_cpu_that_cannot_keep_fp8(model: Path) -> None:
    """Proves that what vLLM finds out in its worker is said before one is started."""
    neither = {"_is_avx512_supported": lambda: False, "_is_amx_tile_supported": lambda: False}
    with patch.multiple("torch.cpu", **neither):
        result = doctor(model, "--kv-cache-dtype=fp8", "--max-model-len=1024")
    assert result.exit_code == 1
    assert "--kv-cache-dtype fp8: FP8 KV cache on CPU requires x86 with AVX-512 or AMX" in result.stdout


def test_tables_say_the_same(model: Path) -> None:
    """Proves that the printed tables carry the numbers, for the length and the page count asked for."""
    result = doctor(
        model, "--length=1000", "--num-gpu-blocks-override=101", "--kv-budget=100", "--kv-buffer=28"
    )
    assert result.exit_code == 0
    lines = [line.replace("\u2502", " ").split() for line in result.stdout.splitlines()]
    assert ["full", "1,000", "8", "12"] in lines
    assert ["budget", "100,", "buffer", "28", "128", "1", "100"] in lines


def test_auto_is_counted_by_its_minimum(model: Path) -> None:
    """Proves that what fits of budget auto is what fits where memory is short, and that the table says so."""
    options = ("--length=1000", "--num-gpu-blocks-override=101", "--kv-min-budget=100", "--kv-buffer=28")
    result = doctor(model, "--kv-budget=auto", *options)
    assert result.exit_code == 0
    lines = [line.replace("\u2502", " ").split() for line in result.stdout.splitlines()]
    assert ["auto,", "at", "least", "budget", "100,", "buffer", "28", "128", "1", "100"] in lines
    assert "Requests with budget auto hold more" in result.stdout


@pytest.mark.parametrize(("largest_graph", "hint"), [(128, True), (599, True), (600, False), (None, False)])
def test_graphs_smaller_than_what_runs(model: Path, largest_graph: int | None, hint: bool) -> None:
    """Proves that graphs are called too small exactly where more requests fit and may run than they hold."""
    found = Sizes.model_validate(
        sizes(model, "--num-gpu-blocks-override=50000", "--kv-budget=100", "--kv-buffer=28")
    )
    found = found.model_copy(update={"largest_graph": largest_graph, "max_num_seqs": 600})
    console = Console(width=300, record=True, file=StringIO())
    show(Diagnosis(versions={}, platform="", model="m", problems=[], sizes=found), console)
    assert ("--max-cudagraph-capture-size=600" in console.export_text()) == hint


def test_tensor_parallel_ranks_share_the_heads(model: Path) -> None:
    """Proves that sizes are those of one device: 3 KV heads on 3 ranks leave one each."""
    found = sizes(model, "--tensor-parallel-size=3", "--distributed-executor-backend=mp", "--enforce-eager")
    assert found["kv_heads"] == 1 and found["kv_bytes_per_token"] == BYTES_PER_TOKEN // 3
    assert found["pool_is_estimate"] and "weights" in found["pool_source"]
    assert found["pool_pages"] > 0


def test_a_pool_too_small_for_one_request(model: Path) -> None:
    """Proves that a row that cannot be served says so, beside one that can be."""
    words = ("--block-size=32", "--max-model-len=4096", "--num-gpu-blocks-override=64", "--kv-budget=256")
    result = doctor(model, *words)
    assert result.exit_code == 1
    assert "--kv-beyond-pool" in result.stdout and "none: the pool cannot hold one" in result.stdout
    result = doctor(model, *words, "--kv-beyond-pool")
    assert result.exit_code == 0
    assert "none: the pool cannot hold one" in result.stdout


def test_the_pool_is_the_one_that_the_server_takes(model: Path) -> None:
    """Proves that the variable for CPUs goes before the option, as in vLLM, and that the doctor says so."""
    option = "--kv-cache-memory-bytes=16M"
    found = sizes(model, option, "--max-model-len=256")
    assert (found["pool_bytes"], found["pool_source"]) == (16 << 20, "--kv-cache-memory-bytes")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    found = sizes(model, option, "--max-model-len=256")
    assert found["pool_bytes"] == 1 << 30
    assert found["pool_source"] == "VLLM_CPU_KVCACHE_SPACE, which goes before --kv-cache-memory-bytes"


def test_everything_that_is_refused_is_listed(model: Path) -> None:
    """Proves that each refused feature is named, with exit code 1 for scripts."""
    connector = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    result = doctor(model, "--kv-cache-dtype=fp8_per_token_head", "--kv-transfer-config", connector)
    assert result.exit_code == 1
    assert "R-KV refuses this configuration" in result.stdout
    assert "KV connectors and offloading is not supported" in result.stdout
    assert "KV cache quantised in another way is not supported" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--kv-budget=4",), "--kv-budget: takes an integer above 8, a share"),
        (("--kv-beyond-pool",), "--kv-beyond-pool: needs a default budget"),
        (("--length=9000",), "--length: must be from 1 to max_model_len (8192), not 9000"),
        (("--max-model-len=9000",), "max_model_len"),
        (("--gpu-memory-utilization=7",), "gpu_memory_utilization"),
        (("--max-modl-len=1",), "--max-modl-len"),
        (("--scheduler-cls=mine",), "--scheduler-cls is set by rkv-vllm"),
    ],
)
def test_wrong_arguments_are_named(model: Path, arguments: tuple[str, ...], named: str) -> None:
    """Proves that a wrong argument, ours or vLLM's, ends in one error that names it."""
    result = doctor(model, *arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.output
