"""What a policy of the lab may be told, and the variations whose effect is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rkv_vllm.policies import weights
from rkv_vllm.settings.config import RkvConfig


@dataclass(frozen=True)
class RkvSettings:
    """Constants of rkv_spec 1; those of the paper by default.

    Attributes:
        lam: weight of importance.
        threshold: cosine similarity above which two keys count as duplicates.
        queries: newest queries that give importance.
        pool: width of the max-pool of importance.
    """

    lam: float = 0.1
    threshold: float = 0.5
    queries: int = 8
    pool: int = 7


@dataclass(frozen=True)
class InvariantSettings:
    """Constants of rkv_spec 4.

    Attributes:
        lam: weight of importance.
        queries: newest queries that give importance.
        pool: width of the max-pool of importance.
        values: share of the values' similarity in redundancy, the rest being the keys'; 0: keys alone.
    """

    lam: float = weights(RkvConfig())["invariant"]
    queries: int = 16
    pool: int = 3
    values: float = 0.0


Settings = RkvSettings | InvariantSettings

#: What is varied, one constant at a time.
VARIATIONS: dict[type[Settings], dict[str, tuple[float, ...]]] = {
    RkvSettings: {
        "lam": (0.0, 0.05, 0.2, 0.4, 1.0),
        "threshold": (0.3, 0.7, 0.9),
        "queries": (4, 16, 32),
        "pool": (1, 3, 15),
    },
    InvariantSettings: {
        "lam": (0.2, 0.3, 0.5, 0.6, 1.0),
        "queries": (4, 8, 32),
        "pool": (1, 7, 15),
        "values": (0.3, 0.5),
    },
}
#: Tokens between two rounds; of another buffer all rows of a batch are.
BUFFERS = (32, 64, 256)
POLICIES: dict[str, type[Settings]] = {"rkv": RkvSettings, "invariant": InvariantSettings}


def variations(base: Settings) -> Iterator[tuple[str, Settings]]:
    """The settings themselves, and each of them with one constant changed; with what was changed."""
    yield "", base
    for name, values in VARIATIONS[type(base)].items():
        for value in values:
            yield f"{name} {value:g}", replace(base, **{name: value})


def described(settings: Settings) -> dict[str, Any]:
    """For a result's file."""
    policy = next(name for name, kind in POLICIES.items() if kind is type(settings))
    return {"policy": policy, **asdict(settings)}
