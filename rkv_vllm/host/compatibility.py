"""The one table of vLLM features: works, or refused at start and why. The README's table is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rkv_vllm.host import model_layers
from rkv_vllm.host.cache_dtype import FP8, PLAIN, cache_dtype, device_problem
from rkv_vllm.host.contract import CONTRACT, Contract, contract_problems
from rkv_vllm.settings.config import RkvConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        in_use: whether a configuration uses a refused feature; None: it is not seen there.
        remedy: what to do with which option, for whoever uses it.
    """

    name: str
    works: bool
    remark: str
    in_use: Callable[[VllmConfig], bool] | None = None
    remedy: str = ""

    @property
    def problem(self) -> str:
        """One line for whoever uses a refused feature."""
        return "; ".join(filter(None, (f"{self.name} is not supported: {self.remark}", self.remedy)))


def _refused(
    name: str, remark: str, in_use: Callable[[VllmConfig], bool] | None = None, remedy: str = ""
) -> Feature:
    return Feature(name, works=False, remark=remark, in_use=in_use, remedy=remedy)


def _works(name: str, remark: str) -> Feature:
    return Feature(name, works=True, remark=remark)


def _needs_one_decision_for_all_ranks(vllm_config: VllmConfig) -> bool:
    """Whether one decision covers several heads or layers, which may lie on other ranks."""
    config = RkvConfig.from_additional_config(vllm_config.additional_config)
    return config.granularity == "page" or config.scope != "head"


FEATURES: tuple[Feature, ...] = (
    _works(
        "prefix caching",
        "shared and cached pages are never written; compaction copies out of them, "
        "and what is computed after a request's first compaction is not cached",
    ),
    _works("chunked prefill", "prompts are compacted when decoding begins"),
    _works("async scheduling", "compactions follow from counts, not from sampled tokens"),
    _works(
        "CUDA graphs",
        "lengths lie in buffers that graphs read; "
        "on one GPU, more than 256 decoding requests take the fastest graph",
    ),
    _works("preemption", "a resumed request replays its compactions and gives the same output"),
    _works("admission", "a request waits until there is room for what those that run will grow to"),
    _works("logprobs, penalties, stop conditions, structured output", "all see logical lengths"),
    _works("several samples of a prompt (n > 1)", "each is compacted by itself"),
    _works("LoRA adapters", "a page is shared between requests of one adapter only, as in stock vLLM"),
    _works("priority scheduling", "no room is kept for requests that are less urgent than a new one"),
    _works("`repetition_detection`", "ends the loops that a small budget can cause"),
    _works("`thinking_token_budget`", "counts the tokens of the text, whatever has left the cache"),
    _works("KV events", "a page is announced as long as it holds what its hash says"),
    _works("several API servers", "metrics add up over them; limits count for each"),
    _works(
        "sliding-window and chunked attention beside full attention (gpt-oss, Gemma, Llama 4)",
        "layers of full attention are compacted, windows stay as they are",
    ),
    _works("layers that read another one's cache", "they find what the other one's queries have kept"),
    _works(
        "FP8 KV cache (`fp8`, `fp8_e4m3`, `fp8_e5m2`)",
        "asked for, or by the checkpoint; tokens are moved as they are stored, "
        "and scores count the scales of keys and queries",
    ),
    _works(
        "n-gram speculation on a CPU (`ngram`)",
        "gives the answers without it, sampled ones as likely: drafts end where a compaction is due, "
        "which waits until it is known how many of them were right",
    ),
    _refused(
        "speculation by other means than n-grams",
        "what drafts has a cache of its own, which would not be compacted",
        lambda c: c.speculative_config is not None and not c.speculative_config.use_ngram(),
        'on a CPU --speculative-config with method "ngram" works',
    ),
    _refused(
        "speculation on GPUs",
        "model checks pass, n-grams and async scheduling included, but no GPU has run it yet",
        lambda c: c.speculative_config is not None and c.use_v2_model_runner,
        "leave out --speculative-config",
    ),
    _refused(
        "speculation with pipeline parallelism",
        "earlier ranks learn too late which drafts were rejected",
        lambda c: c.speculative_config is not None and c.parallel_config.pipeline_parallel_size > 1,
        "leave out --speculative-config or --pipeline-parallel-size",
    ),
    _refused(
        "KV connectors and offloading",
        "they map pages to token positions, which a compacted request has not",
        lambda c: c.kv_transfer_config is not None or c.cache_config.kv_offloading_size is not None,
        "leave out --kv-transfer-config and --kv-offloading-size",
    ),
    _refused(
        "context parallelism",
        "slots are interleaved over ranks",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1
            or c.parallel_config.prefill_context_parallel_size > 1
        ),
        "leave out --decode-context-parallel-size and --prefill-context-parallel-size",
    ),
    _refused(
        "micro-batching (dual batch overlap)",
        "attention metadata is built per micro-batch",
        lambda c: c.parallel_config.use_ubatching,
        "leave out --enable-dbo and --ubatch-size",
    ),
    _refused(
        "KV cache quantised in another way",
        "keys are packed or rotated, or each has a scale of its own beside it, which scores cannot read",
        lambda c: cache_dtype(c) not in (*PLAIN, *FP8),
        "--kv-cache-dtype fp8 works, and bfloat16",
    ),
    _refused(
        "KV cache with layers of different types",
        "one round moves the tokens of all layers",
        lambda c: bool(c.cache_config.kv_cache_dtype_skip_layers),
        "leave out --kv-cache-dtype-skip-layers",
    ),
    _refused(
        "multi-head latent attention", "the cache holds latents, not keys", lambda c: c.model_config.use_mla
    ),
    _refused(
        "encoder-decoder, diffusion, state-space and pooling models",
        "no growing cache of decoded tokens, or another one beside it",
        lambda c: (
            c.model_config.is_encoder_decoder
            or c.model_config.is_diffusion
            or c.model_config.is_attention_free
            or c.model_config.is_hybrid
            or c.model_config.runner_type != "generate"
        ),
    ),
    _refused(
        "page granularity or a shared scope with tensor or pipeline parallelism",
        "each rank would score its own heads and layers, and keep other tokens",
        lambda c: c.parallel_config.world_size > 1 and _needs_one_decision_for_all_ranks(c),
        "leave out --kv-granularity and --kv-scope",
    ),
    _refused(
        "sliding-window attention in all layers",
        "no layer keeps more than its window; `--disable-sliding-window` works, up to the window",
        lambda c: model_layers.has_only_windows(c.model_config),
    ),
    _refused(
        "windows without the hybrid KV cache manager",
        "layers with a window would share pages with those that are compacted",
        lambda c: (
            bool(c.scheduler_config.disable_hybrid_kv_cache_manager)
            and model_layers.has_windows(c.model_config)
        ),
        "leave out --disable-hybrid-kv-cache-manager",
    ),
    _refused("ALiBi", "the bias is a distance between slots", lambda c: c.model_config.uses_alibi),
    _refused(
        "layers with other head counts or sizes than the first",
        "all share one ring of queries",
        lambda c: model_layers.has_unequal_heads(c.model_config),
    ),
    _refused("streaming input sessions", "such a request keeps its full cache; others are compacted"),
)


NEEDS_V1_RUNNER = "rkv-vllm needs the V1 model runner on a CPU; unset VLLM_USE_V2_MODEL_RUNNER"
NEEDS_V2_RUNNER = (
    "rkv-vllm needs Model Runner V2 on a GPU; vLLM chose V1 for this configuration (its log says why), or "
    "VLLM_USE_V2_MODEL_RUNNER=0 is set"
)


def refuse_unsupported(vllm_config: VllmConfig, *contracts: Contract) -> None:
    """Checks everything that can be known before the model is loaded.

    Args:
        vllm_config: the engine's configuration, complete.
        contracts: methods that the caller relies on beside those of the core.

    Raises: ValueError with every problem in it: features in use that are refused, and methods of vLLM that
    are not what rkv-vllm was written against.
    """
    _raise_if(unsupported_features(vllm_config) + contract_problems(CONTRACT, *contracts))


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """The refused features that a configuration uses, one line each; empty where there are none."""
    return [
        feature.problem for feature in FEATURES if feature.in_use is not None and feature.in_use(vllm_config)
    ]


def wrong_runner(vllm_config: VllmConfig, on_cpu: bool) -> list[str]:
    """What is wrong with the model runner that vLLM chose, one line; empty where it is the right one."""
    if vllm_config.use_v2_model_runner != on_cpu:
        return []
    return [NEEDS_V1_RUNNER if on_cpu else NEEDS_V2_RUNNER]


def refuse_unsupported_layers(layers: Mapping[str, Attention]) -> None:
    """Checks the layers of a loaded model that are to be compacted.

    Raises: ValueError with every problem in it, each named with the first layer that has it.
    """
    problems: dict[str, str] = {}
    shapes = {name: (layer.num_heads, layer.num_kv_heads, layer.head_size) for name, layer in layers.items()}
    dtypes = {name: layer.kv_cache_dtype for name, layer in layers.items()}
    for name, layer in layers.items():
        if shapes[name] != next(iter(shapes.values())):
            problems.setdefault("attention whose heads differ from the first layer's", name)
        if layer.impl.alibi_slopes is not None:
            problems.setdefault("ALiBi", name)
        if dtypes[name] not in (*PLAIN, *FP8):
            problems.setdefault(f"a KV cache of type {dtypes[name]} (--kv-cache-dtype fp8 works)", name)
        elif dtypes[name] != next(iter(dtypes.values())):
            problems.setdefault("a KV cache of another type than the first layer's", name)
        if dtypes[name] == "fp8_e5m2" and layer.attn_backend.get_name() == "TRITON_ATTN":
            problems.setdefault(
                "fp8_e5m2 in vLLM's Triton attention, which takes it for e4m3 (--kv-cache-dtype fp8)", name
            )
        if layer.attn_type != "decoder":
            problems.setdefault(f"attention of type {layer.attn_type}", name)
    found = [f"{problem} is not supported (layer {name})" for problem, name in problems.items()]
    found += filter(None, map(device_problem, dict.fromkeys(dtypes.values())))
    _raise_if(found if layers else ["the model has no layer of full attention"])


def _raise_if(problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"rkv-vllm cannot run this configuration:\n{listed}")


def markdown_table() -> str:
    """The table for the README."""
    rows = [
        f"| {feature.name} | {'works' if feature.works else 'refused'} | {feature.remark} |"
        for feature in FEATURES
    ]
    return "\n".join(["| vLLM feature | | why, or how |", "|---|---|---|", *rows])
