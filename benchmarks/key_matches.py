"""How far the search for similar keys has to go in a real model's cache: which column of a table applies.

    python benchmarks/key_matches.py --model .cache/models/SmolLM2-135M-Instruct --text docs/serving.md

The search (`kernels/matches.py`) visits a block of rows tile by tile, newest keys first, until each row
has a key that is similar to it. What it visits at most is counted here, on the CPU, from the keys that
transformers' own forward pass leaves in its cache: older tiles that it need not visit, since their keys found
nothing in newer ones, are counted too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkv_vllm.kernels.matches import match_tiles
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import SIMILARITY_THRESHOLD


def visited(keys: torch.Tensor, rows: int, columns: int) -> tuple[float, float]:
    """Share of a head's tiles that are visited, and of rows without any match, means over the heads.

    Args:
        keys: [H, N, D], N a multiple of `rows`.
        rows, columns: keys a program owns, and a tile's.
    """
    heads, length, _ = keys.shape
    unit = torch.nn.functional.normalize(keys, dim=-1)
    similar = unit @ unit.transpose(1, 2)
    similar.diagonal(dim1=1, dim2=2).zero_()
    newest = torch.where(similar > SIMILARITY_THRESHOLD, torch.arange(length), -1).amax(-1)
    tiles = length // columns
    until_match = torch.where(newest >= 0, tiles - newest // columns, tiles)
    share = until_match.view(heads, -1, rows).amax(-1).double().mean() / tiles
    return share.item(), (newest < 0).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1152)
    args = parser.parse_args()
    tiles = match_tiles(128, torch.bfloat16)
    length = args.tokens // tiles.rows * tiles.rows
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text())["input_ids"][:length]
    if len(ids) < length:
        sys.exit(f"{args.text} has {len(ids)} tokens, {length} are needed")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with torch.no_grad():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    by_layer = [visited(layer.keys[0], tiles.rows, tiles.columns) for layer in cache.layers]
    shares, without = zip(*by_layer, strict=True)
    report = {
        "command": command_line("python", "benchmarks/key_matches.py"),
        "tokens": length,
        "rows": tiles.rows,
        "columns": tiles.columns,
        "share_of_tiles_visited": round(sum(shares) / len(shares), 4),
        "share_of_keys_without_match": round(sum(without) / len(without), 4),
        "share_of_tiles_visited_by_layer": [round(share, 4) for share in shares],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
