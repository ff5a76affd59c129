"""A scheduler for tests whose compactions evict nothing and move everything."""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from rkv_vllm.decisions.messages import Compaction, CompactionPlan, TokenCompaction, attach_plan, plan_of
from rkv_vllm.scheduling.scheduler import CompactingSchedulerMixin

#: Decoded tokens between two moves of a request.
EVERY = 16


class IdentityScheduler(CompactingSchedulerMixin, Scheduler):
    """Every `EVERY` decoded tokens, each running request's KV moves into other pages, whole."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        moved = self.move([request for request in self.running if _decoded(request) in range(0, 4096, EVERY)])
        output = super().schedule(throttle_prefills)
        plan = plan_of(output)
        assert not plan.rounds, "an identity run evicts nothing"
        attach_plan(output, CompactionPlan(moved, plan.captures))
        return output

    def move(self, requests: list[Request]) -> list[Compaction]:
        """Gives each request fresh pages, then returns all the old ones to the pool."""
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        pool, pages = self.kv_cache_manager.block_pool, manager.req_to_blocks
        moved: list[Compaction] = []
        leaving = []
        for request in requests:
            before = pages[request.request_id]
            after = pool.get_new_blocks(len(before))
            pages[request.request_id] = after
            leaving.extend(before)
            moved.append(
                TokenCompaction(
                    request_id=request.request_id,
                    source_pages=(tuple(page.block_id for page in before),),
                    target_pages=(tuple(page.block_id for page in after),),
                    length=request.num_computed_tokens,
                    keep=request.num_computed_tokens,
                    evicted=0,
                    policy="recency",
                    query_row=-1,
                )
            )
        pool.free_blocks(reversed(leaving))
        return moved


def _decoded(request: Request) -> int:
    return request.num_computed_tokens - request.num_prompt_tokens
