"""The table of features, and the refusal at start that is made from it."""

from __future__ import annotations

import operator
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform

from rkv_vllm.host.cache_dtype import cache_dtype, device_problem
from rkv_vllm.host.compatibility import (
    FEATURES,
    markdown_table,
    refuse_unsupported,
    refuse_unsupported_layers,
)


def text_config(**fields: Any) -> Any:
    """What is read of a model's config."""
    written = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, **fields}
    return SimpleNamespace(to_dict=lambda: written)


def configuration(**changes: Any) -> Any:
    """What the check reads of a VllmConfig; a change is named `part__field`, or `field` of the whole."""
    config = SimpleNamespace(
        speculative_config=None,
        use_v2_model_runner=False,
        quant_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(
            kv_offloading_size=None, cache_dtype="auto", kv_cache_dtype_skip_layers=[]
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            pipeline_parallel_size=1,
            world_size=1,
        ),
        additional_config={"rkv": {}},
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        model_config=SimpleNamespace(
            use_mla=False,
            is_encoder_decoder=False,
            is_diffusion=False,
            is_attention_free=False,
            is_hybrid=False,
            runner_type="generate",
            attention_chunk_size=None,
            uses_alibi=False,
            architectures=["LlamaForCausalLM"],
            hf_text_config=text_config(),
        ),
    )
    model: Any = config.model_config
    model.get_sliding_window = lambda: model.hf_text_config.to_dict().get("sliding_window")
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        owner = getattr(config, part) if part else config
        assert hasattr(owner, field)
        setattr(owner, field, value)
    return config


def checkpoint(kv_cache_scheme: dict[str, Any] | None) -> CompressedTensorsConfig:
    """What vLLM reads of a checkpoint of compressed-tensors, with FP8 weights."""
    settings = {"format": "float-quantized", "quant_method": "compressed-tensors", "config_groups": {}}
    return CompressedTensorsConfig.from_config(settings | {"kv_cache_scheme": kv_cache_scheme})


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

#: vLLM's names of caches that can be read; all others are refused.
READ = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")

DRAFTS = SimpleNamespace(use_ngram=lambda: True)
EAGLE = SimpleNamespace(use_ngram=lambda: False)

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("speculation by other means than n-grams", {"speculative_config": EAGLE}),
    ("speculation on GPUs", {"speculative_config": DRAFTS, "use_v2_model_runner": True}),
    (
        "speculation with pipeline parallelism",
        {"speculative_config": DRAFTS, "parallel_config__pipeline_parallel_size": 2},
    ),
    ("KV connectors and offloading", {"kv_transfer_config": object()}),
    ("KV connectors and offloading", {"cache_config__kv_offloading_size": 4.0}),
    ("context parallelism", {"parallel_config__decode_context_parallel_size": 2}),
    ("context parallelism", {"parallel_config__prefill_context_parallel_size": 2}),
    ("micro-batching (dual batch overlap)", {"parallel_config__use_ubatching": True}),
    *(
        ("KV cache quantised in another way", {"cache_config__cache_dtype": dtype})
        for dtype in get_args(CacheDType)
        if dtype not in READ
    ),
    ("KV cache with layers of different types", {"cache_config__kv_cache_dtype_skip_layers": ["0"]}),
    ("multi-head latent attention", {"model_config__use_mla": True}),
    *(
        (
            "page granularity or a shared scope with tensor or pipeline parallelism",
            {"parallel_config__world_size": 2, "additional_config": {"rkv": settings}},
        )
        for settings in ({"granularity": "page"}, {"scope": "layer"}, {"scope": "global"})
    ),
    *(
        (
            "encoder-decoder, diffusion, state-space and pooling models",
            {f"model_config__{field}": value},
        )
        for field, value in (
            ("is_encoder_decoder", True),
            ("is_diffusion", True),
            ("is_attention_free", True),
            ("is_hybrid", True),
            ("runner_type", "pooling"),
        )
    ),
]


WINDOWS = "sliding-window attention in all layers"
HEADS = "layers with other head counts or sizes than the first"
SLIDING = ["sliding_attention", "full_attention"]
REFUSED += [
    *(
        (name, {"model_config__hf_text_config": text_config(**fields)})
        for name, fields in (
            (WINDOWS, {"sliding_window": 1024}),
            (WINDOWS, {"sliding_window": 1024, "layer_types": ["sliding_attention"] * 2}),
            (HEADS, {"num_attention_heads_per_layer": [8, 4]}),
            (HEADS, {"num_key_value_heads": [2, 4]}),
            (HEADS, {"head_dim": 64, "per_layer_config": {"1": {"head_dim": 128}}}),
        )
    ),
    (
        "windows without the hybrid KV cache manager",
        {
            "scheduler_config__disable_hybrid_kv_cache_manager": True,
            "model_config__hf_text_config": text_config(sliding_window=1024, layer_types=SLIDING),
        },
    ),
    ("ALiBi", {"model_config__uses_alibi": True}),
]


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None, "layer_types": SLIDING},
        {"sliding_window": 1024, "layer_types": SLIDING},
        {"sliding_window": 1024, "layer_types": SLIDING, "per_layer_config": {"0": {"head_dim": 128}}},
        {"sliding_window": 1024, "layer_types": SLIDING, "num_kv_heads_per_layer": [8, 2]},
        {"sliding_window": 1024, "layer_types": ["full_attention"] * 2},
        {"num_attention_heads_per_layer": [8, 8]},
        {"head_dim": 64, "per_layer_config": {"0": {"head_dim": 128}, "1": {"head_dim": 128}}},
        {"num_kv_shared_layers": 1},
        {"intermediate_size": [256, 512]},
        {"num_hidden_layers": None, "n_layer": 2},
    ],
    ids=str,
)
def test_what_a_config_names_without_using_it_passes(fields: dict[str, Any]) -> None:
    """Proves that windows beside full attention, whatever their heads are, a window without layers, layers
    without a window, and lists of equal numbers are plain."""
    refuse_unsupported(configuration(model_config__hf_text_config=text_config(**fields)))


def test_a_plain_configuration_passes() -> None:
    """Proves that nothing is refused on the installed vLLM where no refused feature is in use."""
    for dtype in READ:
        refuse_unsupported(configuration(cache_config__cache_dtype=dtype))


@pytest.mark.parametrize(("feature", "change"), REFUSED)
def test_each_refused_feature_is_refused(feature: str, change: dict[str, Any]) -> None:
    """Proves that each use of a refused feature stops the start, by name and with its reason."""
    problem = next(row.problem for row in FEATURES if row.name == feature)
    with pytest.raises(ValueError) as refused:
        refuse_unsupported(configuration(**change))
    assert str(refused.value).splitlines()[1:] == [f"  - {problem}"]
    assert problem.startswith(f"{feature} is not supported: ")


def test_ngram_speculation_passes() -> None:
    """Proves that drafts from n-grams, which keep no cache, pass on a CPU and one pipeline stage."""
    refuse_unsupported(configuration(speculative_config=DRAFTS))
    refuse_unsupported(configuration(use_v2_model_runner=True))
    refuse_unsupported(configuration(parallel_config__pipeline_parallel_size=2))


def test_several_ranks_are_refused_for_common_decisions_only() -> None:
    """Proves that tensor and pipeline parallelism pass by token and head, and one rank passes by any."""
    for settings in ({}, {"order": "score"}):
        refuse_unsupported(configuration(parallel_config__world_size=2, additional_config={"rkv": settings}))
    for settings in ({"granularity": "page"}, {"scope": "layer"}, {"scope": "global"}):
        refuse_unsupported(configuration(additional_config={"rkv": settings}))


def test_what_a_checkpoint_makes_of_the_cache() -> None:
    """Proves that a checkpoint which turns FP8 on in the worker is recognised, and that the operator's word
    goes before it."""
    for asked, scheme, found in (
        ("auto", None, "auto"),
        ("auto", FP8, "fp8"),
        ("auto", FP8 | {"strategy": "attn_head"}, "fp8"),
        ("bfloat16", FP8, "bfloat16"),
        ("fp8_e5m2", None, "fp8_e5m2"),
    ):
        config = configuration(quant_config=checkpoint(scheme), cache_config__cache_dtype=asked)
        assert cache_dtype(config) == found
        refuse_unsupported(config)


def test_every_feature_that_can_be_seen_is_tested() -> None:
    """Proves that the cases above miss no row of the table."""
    assert {name for name, _ in REFUSED} == {row.name for row in FEATURES if row.in_use is not None}
    assert not any(row.works for row in FEATURES if row.in_use is not None)


def test_all_problems_in_one_error() -> None:
    """Proves that one error lists every refused feature in use and every method that differs."""
    changes = {name: value for _, change in REFUSED for name, value in change.items()}
    changes["model_config__hf_text_config"] = text_config(sliding_window=1024)
    changes["speculative_config"] = EAGLE  # on two pipeline stages
    contract = {"vllm.config.VllmConfig.no_such_method": ()}
    with pytest.raises(ValueError) as refused:
        refuse_unsupported(configuration(**changes), contract)
    message = str(refused.value)
    for name, _ in REFUSED:
        # No layer of full attention is left whose heads could differ.
        assert message.count(f"  - {name} is not supported") == (name != HEADS)
    assert "no_such_method does not exist" in message


def layer(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "alibi_slopes": None,
        "attn_type": "decoder",
        "kv_cache_dtype": "auto",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 64,
        "backend": "FLASH_ATTN",
        **changes,
    }
    return SimpleNamespace(
        impl=SimpleNamespace(alibi_slopes=fields.pop("alibi_slopes")),
        attn_backend=SimpleNamespace(get_name=partial(str, fields.pop("backend"))),
        **fields,
    )


def test_plain_layers_pass() -> None:
    """Proves that full-attention decoder layers are accepted."""
    refuse_unsupported_layers({"0": layer(), "1": layer()})
    for dtype in READ:
        refuse_unsupported_layers({str(index): layer(kv_cache_dtype=dtype) for index in range(2)})


def test_fp8_that_a_gpu_or_its_attention_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that e4m3 is refused where no kernel can read it, and e5m2 where vLLM stores something else."""
    e4m3, e5m2 = layer(kv_cache_dtype="fp8"), layer(kv_cache_dtype="fp8_e5m2", backend="TRITON_ATTN")
    with pytest.raises(ValueError, match=r"which takes it for e4m3 .* is not supported \(layer 0\)"):
        refuse_unsupported_layers({"0": e5m2})
    refuse_unsupported_layers({"0": layer(kv_cache_dtype="fp8", backend="TRITON_ATTN")})
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    for capability, refused in ((80, True), (89, False), (90, False)):
        monkeypatch.setattr(
            current_platform, "has_device_capability", partial(operator.ge, capability), raising=False
        )
        assert bool(device_problem("fp8")) == bool(device_problem("fp8_e4m3")) == refused
        assert not device_problem("fp8_e5m2") and not device_problem("auto")
        if refused:
            with pytest.raises(ValueError, match=r"before compute capability 8\.9"):
                refuse_unsupported_layers({"0": e4m3})
        else:
            refuse_unsupported_layers({"0": e4m3})


def test_all_problems_of_layers_in_one_error() -> None:
    """Proves that each kind of refused layer is named once, with the first layer that has it."""
    layers = {
        "0": layer(),
        "2": layer(alibi_slopes=[0.5]),
        "4": layer(attn_type="encoder"),
        "5": layer(kv_cache_dtype="int8_per_token_head"),
        "6": layer(num_kv_heads=4),
        "7": layer(kv_cache_dtype="fp8"),
    }
    with pytest.raises(ValueError) as refused:
        refuse_unsupported_layers(layers)
    assert str(refused.value).splitlines()[1:] == [
        "  - ALiBi is not supported (layer 2)",
        "  - attention of type encoder is not supported (layer 4)",
        "  - a KV cache of type int8_per_token_head (--kv-cache-dtype fp8 works) is not supported (layer 5)",
        "  - attention whose heads differ from the first layer's is not supported (layer 6)",
        "  - a KV cache of another type than the first layer's is not supported (layer 7)",
    ]


def test_a_model_without_attention_is_refused() -> None:
    """Proves that a model in which no layer was found does not pass by having no problem."""
    with pytest.raises(ValueError, match="no layer of full attention"):
        refuse_unsupported_layers({})


def test_table_lists_each_feature_once() -> None:
    """Proves that the README's table has a row of three columns for each feature, and no feature twice."""
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(FEATURES)
    assert {line.count("|") for line in lines} == {4}
    assert len({row.name for row in FEATURES}) == len(FEATURES)
