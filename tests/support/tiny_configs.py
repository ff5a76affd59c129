"""Folders with the `config.json` of small models of many kinds; their weights are made up by vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_families import TINY

_COMMON: dict[str, Any] = {**TINY, "tie_word_embeddings": True, "torch_dtype": "float32"}
_ALTERNATING = ["sliding_attention", "full_attention"]

#: What differs by kind; an ellipsis removes a field.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    # As Qwen 2.5 has it: a window that is not used.
    "qwen2-window-unused": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 1024,
        "use_sliding_window": False,
        "max_window_layers": 2,
    },
    "mistral-0.1": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 1024,
    },
    "mistral-0.3": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    },
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": 1024,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 1024,
        "layer_types": _ALTERNATING,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3n": {
        "model_type": "gemma3n_text",
        "architectures": ["Gemma3nForCausalLM"],
        "sliding_window": 1024,
        "layer_types": _ALTERNATING * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [256] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
    },
    # Its full-attention layers have heads of another size.
    "gemma4": {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "sliding_window": 1024,
        "layer_types": _ALTERNATING,
        "global_head_dim": 64,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "cohere2": {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "sliding_window": 1024,
        "layer_types": _ALTERNATING,
        "logit_scale": 0.25,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "sliding_window": 128,
        "layer_types": _ALTERNATING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama4": {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "attention_chunk_size": 1024,
        "no_rope_layers": [1, 0],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 256,
    },
    "falcon-alibi": {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "alibi": True,
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": 4,
        "num_key_value_heads": ...,
        "head_dim": ...,
    },
    "falcon": {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": 4,
        "num_key_value_heads": ...,
        "head_dim": ...,
    },
    "bloom": {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "n_layer": 2,
        "n_head": 4,
        "seq_length": 4096,
    },
    # Latent attention, as DeepSeek has it.
    "deepseek2": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "head_dim": ...,
        "num_key_value_heads": 4,
        "n_routed_experts": ...,
        "first_k_dense_replace": 2,
    },
    # State-space layers beside attention.
    "nemotron-h": {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 64,
        "mlp_hidden_act": "relu2",
    },
    "bert": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "num_key_value_heads": ...,
        "head_dim": ...,
    },
}


def make_config(folder: Path, kind: str, changes: Mapping[str, Any] | None = None) -> Path:
    """Writes the config of a kind of model into a folder of its own.

    Returns: the folder, which vLLM takes as a model with `--load-format dummy` and `--skip-tokenizer-init`.
    """
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    fields = {**_COMMON, **KINDS[kind], **(changes or {})}
    written = {name: value for name, value in fields.items() if value is not ...}
    (place / "config.json").write_text(json.dumps(written))
    return place
