"""A small Llama in plain PyTorch, with the parameters' names of transformers' LlamaForCausalLM."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from puzzles.tokenizer import BOS, EOS, MOST_TOKENS, PAD, save

#: Rows of the embedding table: more than there are tokens.
TABLE = 256
HEAD_SIZE = 64
ROPE_THETA = 10_000.0
#: Files of weights small enough to be carried one by one.
SHARD = "12MB"


def shape(layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """A Llama with heads of 64 values, and a hidden state of as many as all heads have."""
    hidden = heads * HEAD_SIZE
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=64 * math.ceil(hidden * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        vocab_size=TABLE,
        max_position_embeddings=MOST_TOKENS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
    )


class Cache:
    """Keys and values of one layer: [2, batch, KV heads, tokens, 64], the first `used` of them written."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory, self.used = memory, 0

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns: those before and these."""
        first, self.used = self.used, self.used + keys.shape[2]
        self._memory[0, :, :, first : self.used] = keys
        self._memory[1, :, :, first : self.used] = values
        return self._memory[0, :, :, : self.used], self._memory[1, :, :, : self.used]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * HEAD_SIZE, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * HEAD_SIZE, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * HEAD_SIZE, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * HEAD_SIZE, hidden, bias=False)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        queries, keys, values = (
            project(x).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = _rotated(queries, rotary), _rotated(keys, rotary)
        if cache is not None:
            keys, values = cache.add(keys, values)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=cache is None, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What LlamaForCausalLM calls `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rotary", _rotary(MOST_TOKENS), persistent=False)
        for name, weights in self.named_parameters():
            if weights.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.num_hidden_layers) if into_residual else 0.02
                nn.init.normal_(weights, std=std)

    def forward(self, ids: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """
        Args:
            ids: [batch, tokens]; with caches, one token each.
            caches: of each layer; None: attend to these tokens alone.

        Returns: logits [batch, tokens, TABLE].
        """
        first = caches[0].used if caches is not None else 0
        x = self.model.embed_tokens(ids)
        rotary = self.rotary[:, first : first + ids.shape[1]]
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotary, caches[i] if caches is not None else None)
        return self.lm_head(self.model.norm(x))

    def caches(self, batch: int, tokens: int) -> list[Cache]:
        """Empty ones, one a layer, with room for so many tokens."""
        weights, config = self.lm_head.weight, self.config
        size = (2, batch, config.num_key_value_heads, tokens, HEAD_SIZE)
        return [Cache(weights.new_empty(size)) for _ in range(config.num_hidden_layers)]


def export(model: Llama, folder: Path) -> None:
    """Writes the model, in bfloat16, and its tokenizer as Hugging Face's libraries and vLLM read them."""
    exported = LlamaForCausalLM(model.config).bfloat16()
    exported.load_state_dict({name: weights.bfloat16() for name, weights in model.state_dict().items()})
    exported.save_pretrained(folder, max_shard_size=SHARD)
    save(folder)


def restore(model: Llama, folder: Path) -> None:
    """Gives a model the weights of an exported one.

    Raises: RuntimeError where it has another shape.
    """
    model.load_state_dict(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def _rotary(tokens: int) -> torch.Tensor:
    """Cosines and sines [2, tokens, 64]."""
    half = torch.arange(HEAD_SIZE // 2) / (HEAD_SIZE // 2)
    angles = torch.arange(tokens)[:, None] * ROPE_THETA**-half
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def _rotated(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    cosines, sines = rotary.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-right, left), dim=-1) * sines
