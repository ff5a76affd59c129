"""The settings in force for one of vLLM's requests."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.request import Request

from rkv_vllm.settings.config import CompactionSettings, RkvConfig
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import RequestedSettings

logger = init_logger(__name__)


def settings_of(request: Request, config: RkvConfig, final_length: int) -> CompactionSettings | None:
    """What the request is compacted by; None: it keeps its full cache.

    Args:
        request: new.
        config: the server's settings.
        final_length: tokens that the request has when it ends at the latest.

    Raises: CannotBeServed where what it asks for contradicts itself or the server's settings.
    """
    # A streaming-input session edits its own past, which a compacted cache cannot follow.
    if request.resumable:
        return None
    extra_args = None if request.sampling_params is None else request.sampling_params.extra_args
    try:
        asked = RequestedSettings.from_extra_args(extra_args)
    except ValueError as error:
        # The front end refuses such a request; one that came another way must not stop the engine.
        logger.warning("Request %s: %s; the server's default is used", request.request_id, error)
        asked = RequestedSettings()
    return config.resolve(asked, RequestSize(prompt=request.num_prompt_tokens, longest=final_length))
