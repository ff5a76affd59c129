"""What `rkv-vllm doctor` finds out: versions, what would be refused, and how many requests fit."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pydantic import BaseModel

from rkv_vllm.decisions.auto_lengths import make_request_lengths
from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.sizing import Pool, peak_slots
from rkv_vllm.host.cache_dtype import cache_dtype
from rkv_vllm.host.compatibility import unsupported_features
from rkv_vllm.host.pool import CPU_SPACE, given_pool, kv_shape, page_kinds, page_size
from rkv_vllm.host.preflight import engine_config, installation_problems, start_problems
from rkv_vllm.provenance import versions
from rkv_vllm.settings.config import RkvConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GIB = 1 << 30


class Row(BaseModel):
    """Requests of one kind in the pool; `requests` 0: not one fits. `budget` None: full cache.

    `auto`: it is that of requests with budget "auto" where memory is short, and what they hold then.
    """

    budget: int | None
    auto: bool = False
    buffer: int | None
    tokens_held: int
    pages_per_request: int
    requests: int


class Sizes(BaseModel):
    """Sizes on one device.

    Attributes:
        dtype: what the cache holds, by vLLM's name.
        layers: those that share a page.
        groups, window_groups: kinds of pages that a request has, of layers that see the whole text, and of
            layers with windows.
        pool_bytes: None where the number of pages was given.
        largest_graph: tokens of the largest CUDA graph; None: there are none.
    """

    dtype: str
    layers: int
    kv_heads: int
    head_size: int
    kv_bytes_per_token: int
    page_size: int
    length: int
    max_num_seqs: int
    largest_graph: int | None
    pool_bytes: int | None
    pool_source: str
    pool_is_estimate: bool
    pool_pages: int
    groups: int
    window_groups: int
    rows: list[Row]


class Diagnosis(BaseModel):
    """`problems` keep vLLM from starting with R-KV; `sizes` is there for a model that R-KV works with, also
    where its pool or page size is wrong. `unknown` says why there are none otherwise."""

    versions: dict[str, str]
    platform: str
    model: str | None
    problems: list[str]
    sizes: Sizes | None
    unknown: str | None = None

    @property
    def refused(self) -> bool:
        return bool(self.problems)


class UnknownWeights(Exception):
    """Nothing says how large a model's weights are."""


def diagnose(arguments: list[str], config: RkvConfig, length: int | None = None) -> Diagnosis:
    """Looks at this installation and, where there are arguments, at what they would start.

    No weights are loaded and no engine is started.

    Args:
        arguments: options of `vllm serve`, the model among them; none: the installation alone.
        config: the server's R-KV settings.
        length: tokens of a request, prompt and answer; default: max_model_len.

    Raises: ValueError, one message that names the option, where vLLM cannot make a configuration of them.
    """
    if find_spec("vllm") is None:
        problem = "vLLM is not installed: pip install 'rkv-vllm[gpu]', or `make venv` for its CPU build"
        return Diagnosis(
            versions=versions(), platform=platform.platform(), model=None, problems=[problem], sizes=None
        )
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    device = "CPU" if on_cpu else current_platform.get_device_name()
    found = Diagnosis(
        versions=versions(), platform=f"{platform.platform()}, {device}", model=None, problems=[], sizes=None
    )
    if not arguments:
        found.problems = installation_problems()
        return found
    from rkv_vllm.host.command_line import engine_arguments

    vllm_config = engine_config(engine_arguments("doctor", arguments, config))
    found.model = vllm_config.model_config.model
    found.problems = start_problems(vllm_config)
    if not unsupported_features(vllm_config):
        try:
            found.sizes = _sizes(vllm_config, config, length)
        except UnknownWeights as error:
            found.unknown = str(error)
    return found


def _sizes(vllm_config: VllmConfig, config: RkvConfig, length: int | None) -> Sizes:
    model = vllm_config.model_config
    if length is None:
        length = model.max_model_len
    elif not 0 < length <= model.max_model_len:
        raise ValueError(f"--length: must be from 1 to max_model_len ({model.max_model_len}), not {length}")
    shape, given, stored = kv_shape(vllm_config), given_pool(vllm_config), cache_dtype(vllm_config)
    if given is not None:
        pool, pool_bytes, source = given.pool, given.size_bytes, given.source
        if source == CPU_SPACE:
            source += ", which goes before --kv-cache-memory-bytes"
    else:
        pool_bytes, source = _estimated_bytes(vllm_config)
        size, kinds = page_size(vllm_config), page_kinds(vllm_config)
        pool = Pool.of_bytes(pool_bytes, size, shape.bytes_per_token, kinds)
    cached: list[RequestLengths | None] = [None]
    if (budget := config.resolve_default(length)) is not None:
        cached.append(make_request_lengths(config.granularity, 0, budget, pool.page_size))
    return Sizes(
        dtype=str(model.dtype).removeprefix("torch.") if stored == "auto" else stored,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        kv_bytes_per_token=shape.bytes_per_token,
        page_size=pool.page_size,
        length=length,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        largest_graph=vllm_config.compilation_config.max_cudagraph_capture_size or None,
        pool_bytes=pool_bytes,
        pool_source=source,
        pool_is_estimate=given is None,
        pool_pages=pool.pages,
        groups=pool.kinds.compacted,
        window_groups=len(pool.kinds.windows),
        rows=[_row(pool, length, each) for each in cached],
    )


def _row(pool: Pool, length: int, lengths: RequestLengths | None) -> Row:
    slots = peak_slots(length, lengths)
    return Row(
        budget=lengths.settings.budget if lengths else None,
        auto=lengths is not None and lengths.settings.auto is not None,
        buffer=lengths.settings.buffer if lengths else None,
        tokens_held=slots,
        pages_per_request=pool.pages_for(slots, length),
        requests=pool.requests_that_fit(slots, length),
    )


def _estimated_bytes(vllm_config: VllmConfig) -> tuple[int, str]:
    """Returns: bytes of the pool on one device, at most, and what they are made of."""
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    cache, model, parallel = vllm_config.cache_config, vllm_config.model_config, vllm_config.parallel_config
    memory = current_platform.get_device_total_memory()
    tensors = get_safetensors_params_metadata(model.model, revision=model.revision)
    tensors.pop("__metadata__", None)  # of the file, not a tensor
    stored = sum(end - start for start, end in (tensor["data_offsets"] for tensor in tensors.values()))
    if not stored:
        raise UnknownWeights(
            "How many requests fit is not known: no safetensors file says how large the weights of "
            f"{model.model} are. Give the pool's size, with --kv-cache-memory-bytes."
        )
    weights = stored // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    source = (
        f"{memory / GIB:.1f} GiB of memory x {cache.gpu_memory_utilization:g} - {weights / GIB:.1f} GiB of "
        "weights; activations and CUDA graphs take more"
    )
    return int(memory * cache.gpu_memory_utilization) - weights, source
