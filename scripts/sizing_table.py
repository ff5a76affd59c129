"""Print the table of docs/deployment.md: how many requests fit, by model, GPU and budget.

It is the arithmetic of `rkv-vllm doctor`, for GPUs that are not there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from rkv_vllm.cli.diagnosis import GIB
from rkv_vllm.decisions.auto_lengths import make_request_lengths
from rkv_vllm.decisions.sizing import KvShape, Pool, peak_slots
from rkv_vllm.settings.config import RkvConfig

LENGTH = 16_384
PAGE_SIZE = 16
BUDGETS = (None, 4096, 2048, 1024, 512)
#: vLLM's default for --gpu-memory-utilization.
UTILISATION = 0.92
BFLOAT16 = 2


@dataclass(frozen=True)
class Model:
    """A model in bfloat16; its shape is that of its config.json."""

    name: str
    parameters: int
    shape: KvShape

    @property
    def weight_bytes(self) -> int:
        return BFLOAT16 * self.parameters


MODELS = (
    Model("Qwen3-8B", 8_190_735_360, KvShape(36, 8, 128, BFLOAT16)),
    Model("R1-Distill-Llama-8B", 8_030_261_248, KvShape(32, 8, 128, BFLOAT16)),
    Model("R1-Distill-Qwen-14B", 14_770_033_664, KvShape(48, 8, 128, BFLOAT16)),
)
#: MiB, as nvidia-smi gives them.
GPUS = {"L40S 48 GB": 46_068, "A100 80 GB": 81_920, "H100 80 GB": 81_559, "H200 141 GB": 143_771}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="tokens of a request (default: %(default)s)"
    )
    print(table(parser.parse_args().length))
    return 0


def table(length: int = LENGTH) -> str:
    """Markdown: one row a model and GPU, one column a budget.

    Args:
        length: tokens of a request, prompt and answer.
    """
    budgets = ["full cache" if budget is None else f"budget {budget}" for budget in BUDGETS]
    lines = [
        f"| model | GPU | pool, GiB | {' | '.join(budgets)} |",
        "|---|---|---" + "|---" * len(budgets) + "|",
    ]
    for model in MODELS:
        for gpu, mebibytes in GPUS.items():
            size = int((mebibytes << 20) * UTILISATION) - model.weight_bytes
            pool = Pool.of_bytes(size, PAGE_SIZE, model.shape.bytes_per_token)
            counts = " | ".join(str(requests(pool, length, budget)) for budget in BUDGETS)
            lines.append(f"| {model.name} | {gpu} | {size / GIB:.1f} | {counts} |")
    return "\n".join(lines)


def requests(pool: Pool, length: int, budget: int | None) -> int:
    """Requests of `length` tokens that fit into `pool` at the same time. `budget` None: full cache."""
    if budget is None:
        return pool.requests_that_fit(peak_slots(length, None))
    settled = RkvConfig(budget=budget).resolve_default(length)
    assert settled is not None
    return pool.requests_that_fit(
        peak_slots(length, make_request_lengths("token", 0, settled, pool.page_size))
    )


if __name__ == "__main__":
    sys.exit(main())
