"""Trains a small Llama on puzzles of reasoning-gym, and exports it for Hugging Face's libraries and vLLM.

    cd benchmarks && python -m puzzles.train --out DIR

takes under ten minutes on one H100. It says how often the model is right as it goes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from puzzles.check import right_answers
from puzzles.lessons import IGNORED, Lessons, longest_conversation
from puzzles.model import Llama, export, restore, shape
from puzzles.questions import PUZZLES

WARM_UP = 150
#: Learning rate at the end, as a share of the highest.
LAST = 0.05
#: Steps before the clock starts: the first ones compile.
UNTIMED = 5
REPORT_EVERY = 200


def train(model: Llama, largest: Mapping[str, int], args: argparse.Namespace) -> None:
    """For `args.seconds` from the end of the first steps; checks on the way count."""
    device = model.lm_head.weight.device
    on_gpu = device.type == "cuda"
    lessons = DataLoader(
        Lessons(args.row, largest, args.seed),
        batch_size=args.rows,
        num_workers=args.workers,
        pin_memory=on_gpu,
    )
    matrices = [weights for weights in model.parameters() if weights.dim() == 2]
    scales = [weights for weights in model.parameters() if weights.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = model(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    if on_gpu:
        loss_of = torch.compile(loss_of)
    started = checked = time.monotonic()
    for step, (ids, labels) in enumerate(lessons):
        if step == UNTIMED:
            started = checked = time.monotonic()
        passed = time.monotonic() - started if step >= UNTIMED else 0.0
        if passed >= args.seconds:
            break
        cosine = (1 + math.cos(math.pi * passed / args.seconds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / WARM_UP) * (LAST + (1 - LAST) * cosine)
        ids, labels = (each.to(device, non_blocking=True).long() for each in (ids, labels))
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0:
            millions = (step + 1) * args.rows * args.row / 1e6
            print(f"step {step}: {passed:.0f} s, {millions:.0f}M tokens, loss {loss.item():.5f}", flush=True)
        if time.monotonic() - checked >= args.check_seconds and step >= UNTIMED:
            report(model, largest, args)
            checked = time.monotonic()


def report(model: Llama, largest: Mapping[str, int], args: argparse.Namespace) -> None:
    right = right_answers(model, largest, args.check_problems, args.row)
    print("right: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()), flush=True)


def sizes(words: str) -> dict[str, int]:
    """Of `name=size,...`."""
    found = {name: int(size) for name, _, size in (word.partition("=") for word in words.split(","))}
    if unknown := set(found) - set(PUZZLES):
        raise argparse.ArgumentTypeError(f"there are no {', '.join(sorted(unknown))}")
    for name, size in found.items():
        if size < PUZZLES[name].smallest:
            raise argparse.ArgumentTypeError(f"{name} begins with size {PUZZLES[name].smallest}")
    return found


def main() -> None:
    largest = ",".join(f"{name}={puzzle.largest}" for name, puzzle in PUZZLES.items())
    workers = max(1, (os.cpu_count() or 1) - 2)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, help="default: %(default)s")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--seconds", type=float, default=450, help="of training; default: %(default)s")
    add("--seed", type=int, default=0, help="of weights and questions; default: %(default)s")
    add("--puzzles", type=sizes, default=largest, help="and their largest sizes; default: %(default)s")
    add("--start", type=Path, help="folder of such a model to go on from; take another seed")
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8, help="of queries, 64 values each; default: %(default)s")
    add("--kv-heads", type=int, default=4)
    add("--row", type=int, default=2560, help="tokens of a row; default: %(default)s")
    add("--rows", type=int, default=48, help="in a step; default: %(default)s")
    add("--lr", type=float, default=1e-3, help="highest learning rate; default: %(default)s")
    add("--check-seconds", type=float, default=110, help="between checks; default: %(default)s")
    add("--check-problems", type=int, default=32, help="of each puzzle; default: %(default)s")
    add("--workers", type=int, default=workers, help="that make questions; default: %(default)s")
    args = parser.parse_args()
    try:
        longest = longest_conversation(args.puzzles)
    except ValueError as error:
        parser.error(f"argument --puzzles: {error}")
    if longest > args.row:
        parser.error(f"argument --row: the longest conversations have {longest} tokens")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(shape(args.layers, args.heads, args.kv_heads))
    if args.start is not None:
        restore(model, args.start)
    print(f"{sum(weights.numel() for weights in model.parameters()):,} parameters", flush=True)
    train(model.to("cuda" if torch.cuda.is_available() else "cpu"), args.puzzles, args)
    report(model, args.puzzles, args)
    export(model, args.out)


if __name__ == "__main__":
    main()
