"""What is compared: settings of single requests, and how a command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rkv_vllm.settings.config import OFF, WINDOW, AutoBudget, CompactionSettings, PolicyName, extra_args
from rkv_vllm.settings.values import AUTO

#: First tokens of a request that never leave.
Protect = int | Literal["prompt"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a request. `policy` None: full cache; `percent`: what `budget` was asked as, if it was;
    `auto`: budget "auto", with `budget` as its minimum."""

    policy: PolicyName | None = None
    budget: int = OFF
    buffer: int = 0
    protect: Protect = 0
    percent: float | None = field(default=None, compare=False)
    auto: bool = False

    @property
    def name(self) -> str:
        """`full`, or `policy:budget:buffer`, and what is protected; it names the setting in files.

        With budget "auto" the budget is `auto:minimum`.
        """
        if self.policy is None:
            return "full"
        auto = f"{AUTO}:" if self.auto else ""
        protect = f":{self.protect}" if self.protect else ""
        return f"{self.policy}:{auto}{self.budget}:{self.buffer}{protect}"

    @property
    def extra_args(self) -> dict[str, Any]:
        """As a request sends it."""
        if self.policy is None:
            return extra_args(None)
        auto = AutoBudget() if self.auto else None
        settings = CompactionSettings(self.budget, self.buffer, self.policy, auto=auto)
        return {**extra_args(settings), "rkv_protect": self.protect}


FULL_CACHE = Setting()


@dataclass(frozen=True, slots=True)
class Budget:
    """As it was asked for: `amount` tokens, or percent of the mean length with the full cache.

    `is_auto`: that is the minimum of budget "auto".
    """

    amount: float
    is_percent: bool = False
    is_auto: bool = False

    def tokens(self, full_length: float) -> int:
        """Raises: ValueError where it is no larger than the window."""
        tokens = round(self.amount * full_length / 100) if self.is_percent else round(self.amount)
        if tokens <= WINDOW:
            raise ValueError(
                f"--kv-budget: {self.amount:g} % of {full_length:g} tokens is {tokens}, "
                f"not above the window, {WINDOW}"
            )
        return tokens


def parse_budgets(text: str) -> list[Budget]:
    """`full,1024,10%,auto:10%` as budgets, in that order; `full` is always measured and adds nothing.

    Raises: ValueError that names the wrong one.
    """
    budgets = []
    for word in _words(text):
        amount_word = word.removeprefix(f"{AUTO}:")
        number, percent, rest = amount_word.partition("%")
        if word == "full":
            continue
        try:
            amount = float(number) if percent and not rest else int(amount_word)
        except ValueError:
            amount = 0
        if not (0 < amount <= 100 if percent else amount > WINDOW):
            raise ValueError(
                f"--kv-budget: takes full, tokens above {WINDOW}, percent up to 100 with %, and either of "
                f"these behind {AUTO}: as its minimum, not {word!r}"
            )
        budgets.append(Budget(amount, is_percent=bool(percent), is_auto=amount_word != word))
    return budgets


def parse_policies(text: str) -> list[PolicyName]:
    """Raises: ValueError that names the wrong one."""
    known = {name: name for name in get_args(PolicyName)}
    words = _words(text)
    if wrong := [word for word in words if word not in known]:
        raise ValueError(f"--kv-policy: takes {', '.join(known)}, not {', '.join(wrong)}")
    return [known[word] for word in words]


def parse_buffers(text: str) -> list[int]:
    """Raises: ValueError that names the wrong one."""
    words = _words(text)
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) >= WINDOW):
            raise ValueError(f"--kv-buffer: takes tokens, at least {WINDOW}, not {word!r}")
    return [int(word) for word in words]


def parse_protects(text: str) -> list[Protect]:
    """Raises: ValueError that names the wrong one."""
    protects: list[Protect] = []
    for word in _words(text):
        if word != "prompt" and not (word.isascii() and word.isdigit()):
            raise ValueError(f"--kv-protect: takes tokens from 0 on, and prompt, not {word!r}")
        protects.append("prompt" if word == "prompt" else int(word))
    return protects


def grid(
    budgets: Iterable[Budget],
    policies: Sequence[PolicyName],
    buffers: Sequence[int],
    protects: Sequence[Protect],
    full_length: float,
) -> list[Setting]:
    """The full cache, and every policy with every budget, buffer and protection, each once.

    Args:
        full_length: mean length with the full cache, in tokens; of use where a budget is in percent.

    Raises: ValueError for a percentage that is no larger than the window.
    """
    settings = [FULL_CACHE]
    for budget in budgets:
        tokens = budget.tokens(full_length)
        percent = budget.amount if budget.is_percent else None
        settings += [
            Setting(policy, tokens, buffer, protect, percent, budget.is_auto)
            for policy in policies
            for buffer in buffers
            for protect in protects
        ]
    return list(dict.fromkeys(settings))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
