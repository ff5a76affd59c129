"""vLLM's scheduler, or ours, with a made-up model: an engine core in small that needs no GPU."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.config.scheduler import SchedulerPolicy
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rkv_vllm.host.kv_cache_spec import CompactingSpec
from rkv_vllm.scheduling.scheduler import CompactingAsyncScheduler, CompactingScheduler

VOCABULARY = 32_000

# Once: hashes of running requests build on it.
init_none_hash(sha256)


class ModellessEngine:
    """A scheduler with one step in flight, or two if it is asynchronous. The made-up model answers each step
    with a token for every request whose prompt is computed.
    """

    def __init__(
        self,
        rkv: dict[str, Any] | None,
        *,
        pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        asynchronous: bool = True,
        policy: SchedulerPolicy = "fcfs",
        groups: Sequence[KVCacheSpec | None] = (None,),
    ) -> None:
        """`rkv`: fields of `RkvConfig`; None: stock vLLM. `pages`: that requests can hold. `groups`: as of
        `make_scheduler`."""
        self.scheduler = make_scheduler(
            rkv,
            num_blocks=pages + 1,  # one of which vLLM keeps for itself
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            asynchronous=asynchronous,
            policy=policy,
            groups=groups,
        )
        self._block_hasher = get_request_block_hasher(page_size, sha256)
        self._in_flight: deque[tuple[SchedulerOutput, set[str]]] = deque()
        self._depth = 2 if asynchronous else 1

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        max_tokens: int,
        *,
        extra_args: dict[str, Any] | None = None,
        stop: str | None = None,
        priority: int = 0,
        resumable: bool = False,
    ) -> None:
        """Adds a request; `extra_args` are as over the API, `resumable` means a streaming-input session."""
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=prompt_token_ids,
                sampling_params=SamplingParams(
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    extra_args=extra_args,
                    stop=stop,
                    detokenize=stop is not None,
                ),
                pooling_params=None,
                block_hasher=self._block_hasher,
                priority=priority,
                resumable=resumable,
            )
        )

    def schedule(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        in_prompt = {
            request_id
            for request_id in output.num_scheduled_tokens
            if requests[request_id].num_computed_tokens < requests[request_id].num_tokens
        }
        self._in_flight.append((output, in_prompt))
        return output

    def update(self) -> list[EngineCoreOutput]:
        """Answers the oldest step, if as many are in flight as may be."""
        if len(self._in_flight) < self._depth:
            return []
        output, in_prompt = self._in_flight.popleft()
        request_ids = list(output.num_scheduled_tokens)
        answer = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=[
                [] if request_id in in_prompt else [index % VOCABULARY]
                for index, request_id in enumerate(request_ids)
            ],
        )
        of_clients = self.scheduler.update_from_output(output, answer).values()
        return [each for outputs in of_clients for each in outputs.outputs]


def make_scheduler(
    rkv: dict[str, Any] | None,
    *,
    num_blocks: int,
    page_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    asynchronous: bool,
    vocabulary: int = VOCABULARY,
    prefix_caching: bool = True,
    policy: SchedulerPolicy = "fcfs",
    v2_runner: bool = True,
    num_drafts: int = 0,
    groups: Sequence[KVCacheSpec | None] = (None,),
    dense_retention: bool = False,
    **scheduler_settings: Any,
) -> Scheduler:
    """vLLM's own scheduler, or ours, for a model that exists as a configuration only.

    Args:
        rkv: fields of `RkvConfig`; None: stock vLLM.
        num_blocks: of the pool, vLLM's null block included.
        v2_runner: whether it is told, as on a GPU, that Model Runner V2 runs its steps.
        num_drafts: tokens that n-gram speculation drafts for a request and step.
        groups: KV cache groups of its layers; None: full attention.
        dense_retention: whether the prefix cache keeps all pages of windows.
        **scheduler_settings: other fields of vLLM's `SchedulerConfig`.
    """
    cache_config = CacheConfig(block_size=page_size, enable_prefix_caching=prefix_caching)
    cache_config.num_gpu_blocks = num_blocks
    model_config = _model_config(max_model_len, vocabulary)
    speculation = (
        SpeculativeConfig(
            method="ngram_gpu" if asynchronous else "ngram",
            num_speculative_tokens=num_drafts,
            target_model_config=model_config,
            target_parallel_config=ParallelConfig(),
        )
        if num_drafts
        else None
    )
    vllm_config = VllmConfig(
        model_config=model_config,
        speculative_config=speculation,
        cache_config=cache_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            policy=policy,
            **scheduler_settings,
        ),
        additional_config={} if rkv is None else {"rkv": rkv},
    )
    vllm_config.scheduler_config.async_scheduling = asynchronous  # the CPU platform turns it off
    spec_class = FullAttentionSpec if rkv is None else CompactingSpec
    full = spec_class(block_size=page_size, num_kv_heads=1, head_size=8, dtype=torch.float32)
    classes: tuple[type[Scheduler], type[Scheduler]] = (
        (Scheduler, AsyncScheduler) if rkv is None else (CompactingScheduler, CompactingAsyncScheduler)
    )
    scheduler = classes[asynchronous](
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec([f"layer.{index}"], spec or full) for index, spec in enumerate(groups)
            ],
            prefix_cache_retention_interval=None if dense_retention else 0,
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=page_size,
        log_stats=True,
    )
    scheduler.use_v2_model_runner = v2_runner
    return scheduler


@functools.cache
def _model_config(max_model_len: int, vocabulary: int) -> ModelConfig:
    """Configuration of a model that exists as a file only."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(settings))
        return ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_model_len,
        )
