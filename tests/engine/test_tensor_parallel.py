"""Workers that share each layer, some of its heads each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import texts
import torch
from engine_process import Ask, Engine, Settings
from support.identical import assert_alike
from transformers import LlamaConfig, LlamaForCausalLM

from rkv_vllm.settings.policy_table import POLICY_NAMES

#: SmolLM2 has three KV heads.
RANKS = 3
#: `random` draws for the heads that a worker has, and comes last.


@pytest.fixture(scope="module")
def one_kv_head(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose four query heads share one KV head, with the tokenizer of the tests' model."""
    folder = tmp_path_factory.mktemp("one-kv-head")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=json.loads((model / "config.json").read_text())["vocab_size"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    random_model = LlamaForCausalLM(config)
    for weight in random_model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.12)
    random_model.save_pretrained(folder)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_ranks_that_share_a_kv_head_decide_as_one(one_kv_head: Path, encode: texts.Encode) -> None:
    """With copies of one KV head, each rank keeps what a single worker keeps, which sees all query heads."""
    asks = [
        Ask(
            encode(texts.multiples(n + 2)),
            75,
            {"rkv_budget": 48 + 8 * n, "rkv_buffer": 16, "rkv_policy": name},
        )
        for n, name in enumerate(("rkv", "snapkv", "rkv", "keydiff"))
    ]
    runs = []
    for ranks in (1, 2):
        engine = Engine(one_kv_head, Settings(ranks=ranks))
        runs.append(engine.run(asks))
        engine.close()
    expected, found = runs
    assert all(expected.compactions(index) >= 2 for index in range(len(asks)))
    assert [answer.result for answer in found.answers] == [answer.result for answer in expected.answers]
    assert_alike(found.answers, expected.answers, within=1e-2)


def test_ranks_together_decode_as_one(
    rkv: Engine, start_engine: Callable[[Settings], Engine], encode: texts.Encode
) -> None:
    """Tokens, compactions and pages are those of one worker, and the pool is whole.

    Sums over ranks round differently, so that of two tokens with nearly the same score either may stay.
    """
    asks = [Ask(encode(texts.multiples(9)), 75, {"rkv_budget": 0})] + [
        Ask(
            encode(texts.multiples(n + 2)),
            75,
            {"rkv_budget": 48 + 8 * n, "rkv_buffer": 16, "rkv_policy": name},
        )
        for n, name in enumerate(POLICY_NAMES)
    ]
    in_ranks = start_engine(Settings(ranks=RANKS)).submit(asks)
    expected = rkv.run(asks)
    found = in_ranks.result()
    assert [answer.result for answer in found.answers] == [answer.result for answer in expected.answers]
    assert all(expected.compactions(index) >= 2 for index in range(1, len(asks)))
    assert len(found.answers) == len(expected.answers)
    assert_alike(found.answers[:-1], expected.answers[:-1], within=1e-2)
