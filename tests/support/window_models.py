"""Small checkpoints of models whose layers have windows beside full attention, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY, WINDOW, CHUNK = 512, 64, 128
#: First tokens that policy recency keeps, written out here on purpose rather than taken from the package.
SINKS = 4
#: Wide enough that attention matters, and every token is another: with untied embeddings, since tied ones
#: repeat one token for ever.
_DEVIATION = 0.12
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "sliding_window": WINDOW,
}


def _gemma(version: int, layer_types: Sequence[str], **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [f"Gemma{version}ForCausalLM"],
        "model_type": f"gemma{version}_text",
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "hidden_activation": "gelu_pytorch_tanh",
        **fields,
    }


def _gemma4(layer_types: Sequence[str], shared: int) -> dict[str, Any]:
    """Heads of full attention are twice as large, so that pages of windows have twice as many tokens."""
    proportional = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    return _gemma(
        4,
        layer_types,
        num_global_key_value_heads=1,
        global_head_dim=128,
        num_kv_shared_layers=shared,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
        final_logit_softcapping=30.0,
        rope_parameters={_SLIDING: {"rope_type": "default", "rope_theta": 1e4}, _FULL: proportional},
    )


_TWO_TO_ONE = [_SLIDING, _SLIDING, _FULL] * 2
_THETAS = {
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    _FULL: {"rope_type": "default", "rope_theta": 1e6},
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "layer_types": [_SLIDING, _FULL] * 2,
        "intermediate_size": 128,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000,
        },
    },
    "Gemma 3": _gemma(3, _TWO_TO_ONE, query_pre_attn_scalar=64, rope_parameters=_THETAS),
    # vLLM makes three groups of full attention of it, each as large as that of the windows.
    "Gemma 3, mostly full": _gemma(
        3,
        [_FULL, _FULL, _SLIDING, _FULL, _FULL, _FULL, _SLIDING, _FULL],
        query_pre_attn_scalar=64,
        rope_parameters=_THETAS,
    ),
    "Gemma 4": _gemma4(_TWO_TO_ONE, shared=0),
    "Gemma 4, shared": _gemma4([*_TWO_TO_ONE, _SLIDING, _FULL], shared=2),
    "Llama 4": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "layer_types": [_CHUNKED, _CHUNKED, _CHUNKED, _FULL],
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": CHUNK,
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "sliding_window": None,
        "rope_theta": 500000.0,
    },
}


def save_checkpoint(shape: str, folder: Path) -> Path:
    """Writes config and weights of a shape; 1 to 2 M parameters, of vocabulary `VOCABULARY`, no tokenizer."""
    folder.mkdir()
    fields = {**_COMMON, **SHAPES[shape]}
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, 0.0, _DEVIATION)
        elif "sinks" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"architectures": fields["architectures"]}))
    return folder


def recency_mask(length: int, rounds: Sequence[int], budget: int) -> torch.Tensor:
    """bool [length, length], which tokens (columns) each token attends to, in a layer of full attention.

    Args:
        rounds: lengths at which all but `budget` tokens left the cache: the first `SINKS`, and the newest.
    """
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for at in rounds:
        mask[at:, SINKS : at - budget + SINKS] = False
    return mask


def teach(folder: Path, tokens: Sequence[int], full_attention: torch.Tensor) -> torch.Tensor:
    """Log-probabilities that transformers gives what follows each token: [tokens, vocabulary].

    Args:
        full_attention: as `recency_mask` gives it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    position = torch.arange(len(tokens))
    distance = position[:, None] - position
    seen = {
        _FULL: full_attention,
        _SLIDING: (distance >= 0) & (distance < WINDOW),
        _CHUNKED: (distance >= 0) & (position[:, None] // CHUNK == position // CHUNK),
    }
    added = {
        kind: torch.zeros(1, 1, len(tokens), len(tokens)).masked_fill(~mask, torch.finfo(torch.float32).min)
        for kind, mask in seen.items()
    }
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)]), attention_mask=added, use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)
