"""The answer of a model that thinks first."""

from __future__ import annotations

START, END = "<think>", "</think>"


def after_thinking(output: str, opened: bool) -> str | None:
    """What stands behind the thinking; None where it never ended, for then there is no answer.

    Args:
        output: what the model generated.
        opened: whether the prompt ended with the start of the thinking.
    """
    _, ended, answer = output.partition(END)
    if ended:
        return answer
    return None if opened or START in output else output
