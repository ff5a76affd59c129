"""The sizing table of docs/deployment.md."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from rkv_vllm.cli import app

ROOT = Path(__file__).resolve().parents[2]
#: What a configuration needs to be read, beside the shape.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def sizing_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing_table", ROOT / "scripts" / "sizing_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sizing_table", module)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_that_the_script_prints(sizing_table: ModuleType) -> None:
    """A change of the arithmetic, or of the page, shows."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    _, _, rest = page.partition("<!-- sizing -->\n")
    assert rest.partition("\n<!-- /sizing -->")[0] == sizing_table.table()


def test_the_doctor_counts_the_same(sizing_table: ModuleType, tmp_path: Path) -> None:
    """For the pool and the model of one row, from the model's own configuration."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    [model] = [each for each in sizing_table.MODELS if each.name == "R1-Distill-Llama-8B"]
    size = 50 << 30
    pool = sizing_table.Pool.of_bytes(size, sizing_table.PAGE_SIZE, model.shape.bytes_per_token)
    words = ["doctor", tmp_path, "--kv-budget", 1024, "--length", 16384, "--block-size", 16, "--json"]
    with patch.dict(os.environ):  # where vLLM sets variables for its workers
        result = CliRunner().invoke(app, [*map(str, words), f"--kv-cache-memory-bytes={size}"])
    found = json.loads(result.stdout)
    # The page size of a GPU is none of a CPU; what fits is counted all the same.
    assert all("--block-size" in problem for problem in found["problems"])
    full, bounded = found["sizes"]["rows"]
    assert full["requests"] == sizing_table.requests(pool, 16384, None)
    assert bounded["requests"] == sizing_table.requests(pool, 16384, 1024)
