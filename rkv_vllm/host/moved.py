"""What lies in other modules of vLLM in some of the releases that rkv-vllm works with."""

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.exceptions import ChatTemplateResolutionError
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ImportError:  # before 0.33
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.renderers.chat_utils import ChatTemplateResolutionError
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

__all__ = [
    "ChatTemplateResolutionError",
    "cli_env_setup",
    "get_kv_cache_groups",
    "make_arg_parser",
    "validate_parsed_serve_args",
]
