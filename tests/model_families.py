"""Families of models that run with R-KV, as tiny models of random weights, and those that do not and why.

They are the tables of `docs/models.md`; `tests/engine/test_model_families.py` runs every family of the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: of the family.
        examples: models that people serve.
        architecture: vLLM's class.
        model_type: of transformers' configuration.
        config: what is added to `TINY`, or replaces it there.
        pairs: how it rotates keys of `TINY`'s 32 dimensions.
        varies: whether keys of one token differ by more than their rotation: because dimensions are weighed
            after it, or a layer before looks at an attention sink.
        unrotated: whether layers of full attention leave the embedding aside that lies beside them.
    """

    name: str
    examples: str
    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: RotaryPairs = RotaryPairs(rotated=32)  # noqa: RUF009
    varies: bool = False
    unrotated: bool = False

    @property
    def has_windows(self) -> bool:
        return "layer_types" in self.config

    def save(self, folder: Path) -> Path:
        """Writes a tiny model's `config.json`, for `--load-format dummy`."""
        config = {"architectures": [self.architecture], "model_type": self.model_type, **TINY, **self.config}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder


@dataclass(frozen=True)
class Refused:
    """Models that the server does not start with."""

    name: str
    examples: str
    reason: str


#: Two layers of four query heads and two KV heads of 32.
TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_OWN_HEADS = {"num_key_value_heads": 4}
#: Tokens that layers with a window see, or that make a chunk.
WINDOW = 64
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = (
    Family(
        "Llama 2 and 3, and what is built like them",
        "Llama-3.1-8B-Instruct, R1-Distill-Llama-8B, Yi-1.5, Falcon3, SmolLM2",
        "LlamaForCausalLM",
        "llama",
    ),
    Family("Qwen2, Qwen2.5", "QwQ-32B, R1-Distill-Qwen-14B, Qwen2.5-Math-7B", "Qwen2ForCausalLM", "qwen2"),
    Family("Qwen3", "Qwen3-8B, DeepSeek-R1-0528-Qwen3-8B", "Qwen3ForCausalLM", "qwen3"),
    Family(
        "Qwen2-MoE",
        "Qwen1.5-MoE-A2.7B",
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    Family("Qwen3-MoE", "Qwen3-30B-A3B", "Qwen3MoeForCausalLM", "qwen3_moe", _EXPERTS),
    Family(
        "Mistral without a window",
        "Mistral-7B-Instruct-v0.3, Mistral-Nemo, Mathstral",
        "MistralForCausalLM",
        "mistral",
        {"sliding_window": None},
    ),
    Family(
        "Mixtral",
        "Mixtral-8x7B-Instruct-v0.1",
        "MixtralForCausalLM",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    Family("Phi-3 and Phi-4", "Phi-4, Phi-4-reasoning", "Phi3ForCausalLM", "phi3", {"sliding_window": None}),
    Family(
        "Phi-1 and Phi-2",
        "phi-2",
        "PhiForCausalLM",
        "phi",
        {"layer_norm_eps": 1e-5, **_OWN_HEADS},
        pairs=RotaryPairs(16),
    ),
    Family("Gemma 1", "gemma-7b-it", "GemmaForCausalLM", "gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    Family("OLMo 2", "OLMo-2-1124-7B-Instruct", "Olmo2ForCausalLM", "olmo2"),
    Family("OLMoE", "OLMoE-1B-7B-0924", "OlmoeForCausalLM", "olmoe", {**_EXPERTS}),
    Family("Granite 3", "granite-3.3-8b-instruct", "GraniteForCausalLM", "granite"),
    Family(
        "Granite-MoE",
        "granite-3.1-3b-a800m-instruct",
        "GraniteMoeForCausalLM",
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family("SmolLM3", "SmolLM3-3B", "SmolLM3ForCausalLM", "smollm3", {"use_sliding_window": False}),
    Family(
        "StableLM",
        "stablelm-2-1_6b",
        "StableLmForCausalLM",
        "stablelm",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        pairs=RotaryPairs(8),
    ),
    Family(
        "GPT-NeoX",
        "pythia-6.9b",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {"layer_norm_eps": 1e-5, "rotary_pct": 0.25, **_OWN_HEADS},
        pairs=RotaryPairs(8),
    ),
    Family(
        "GPT-2",
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 4096, "n_inner": 256},
        pairs=UNROTATED,
    ),
    Family(
        "Cohere Command R",
        "c4ai-command-r-v01",
        "CohereForCausalLM",
        "cohere",
        {"logit_scale": 0.06},
        pairs=RotaryPairs(32, interleaved=True),
    ),
    Family(
        "GLM-4, dense",
        "GLM-4-9B-0414, GLM-Z1-9B-0414",
        "Glm4ForCausalLM",
        "glm4",
        pairs=RotaryPairs(16, interleaved=True),
    ),
    Family(
        "GLM-4 before 0414",
        "glm-4-9b-chat-hf",
        "GlmForCausalLM",
        "glm",
        pairs=RotaryPairs(16, interleaved=True),
    ),
    Family("Seed-OSS", "Seed-OSS-36B-Instruct", "SeedOssForCausalLM", "seed_oss"),
    Family(
        "Nemotron",
        "Minitron-8B-Base",
        "NemotronForCausalLM",
        "nemotron",
        {"norm_eps": 1e-5},
        pairs=RotaryPairs(16),
    ),
    Family(
        "ERNIE 4.5, dense",
        "ERNIE-4.5-0.3B-PT",
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        pairs=RotaryPairs(32, interleaved=True),
    ),
    Family(
        "Hunyuan, dense",
        "Hunyuan-7B-Instruct",
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        varies=True,
    ),
    Family("Apertus", "Apertus-8B-Instruct-2509", "ApertusForCausalLM", "apertus"),
    Family(
        "gpt-oss",
        "gpt-oss-20b, gpt-oss-120b",
        "GptOssForCausalLM",
        "gpt_oss",
        {
            **_WINDOWS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
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
        varies=True,
    ),
    Family(
        "Gemma 2",
        "gemma-2-9b-it",
        "Gemma2ForCausalLM",
        "gemma2",
        {**_WINDOWS, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    Family(
        "Gemma 3, text",
        "gemma-3-12b-it, gemma-3-1b-it",
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_WINDOWS, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    Family(
        "Gemma 4, text",
        "gemma-4-12b-it",
        "Gemma4ForCausalLM",
        "gemma4_text",
        {**_WINDOWS, "global_head_dim": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        pairs=RotaryPairs(64),
    ),
    Family(
        "Cohere Command A and R7B",
        "c4ai-command-a-03-2025",
        "Cohere2ForCausalLM",
        "cohere2",
        {**_WINDOWS, "logit_scale": 0.25},
        pairs=RotaryPairs(32, interleaved=True),
        unrotated=True,
    ),
    Family("OLMo 3", "Olmo-3-7B-Think", "Olmo3ForCausalLM", "olmo3", _WINDOWS),
    Family("EXAONE 4", "EXAONE-4.0-32B", "Exaone4ForCausalLM", "exaone4", _WINDOWS, unrotated=True),
    Family(
        "Llama 4, text",
        "Llama-4-Scout-17B-16E-Instruct",
        "Llama4ForCausalLM",
        "llama4_text",
        {
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 256,
        },
        pairs=UNROTATED,
    ),
)

REFUSED = (
    Refused("Mistral with a window", "Mistral-7B-v0.1", "all layers have a sliding window"),
    Refused("DeepSeek V2, V3 and R1", "DeepSeek-R1, DeepSeek-V3.1, Kimi-K2", "multi-head latent attention"),
    Refused(
        "hybrids of attention and state-space layers",
        "Qwen3-Next, Qwen3.5, Nemotron-H, Jamba, Granite 4.0-H",
        "state-space or linear-attention layers have another cache",
    ),
    Refused("BLOOM, MPT, Baichuan-13B", "bloom-7b1, mpt-7b", "ALiBi: a bias by the distance between slots"),
    Refused("Whisper, T5 and other encoder-decoders", "whisper-large-v3", "attention to an encoder's tokens"),
    Refused("embedding and reward models", "Qwen3-Embedding-8B", "nothing is decoded"),
)


def works_table() -> str:
    """The first table of the page."""
    rows = [f"| {each.name} | {each.examples} | `{each.architecture}` |" for each in FAMILIES]
    return "\n".join(["| family | for example | vLLM's class |", "|---|---|---|", *rows])


def refused_table() -> str:
    """The second table of the page."""
    rows = [f"| {each.name} | {each.examples} | {each.reason} |" for each in REFUSED]
    return "\n".join(["| family | for example | because |", "|---|---|---|", *rows])
