"""The page of `rkv-vllm inspect`: one file, with its data and scripts inside."""

from __future__ import annotations

import re
from importlib.resources import files

from rkv_vllm.inspection.report import Inspection

_PLACE = re.compile(r"\{\{([a-z.]+)\}\}")


def page(found: Inspection) -> str:
    """HTML that needs nothing but a browser, and asks for nothing."""
    folder = files("rkv_vllm.inspection") / "web"
    # `<` would end the script that holds the data, or begin a comment in it, wherever a token has one.
    data = found.model_dump_json().replace("<", "\\u003c")

    def part(place: re.Match[str]) -> str:
        return data if place[1] == "data" else (folder / place[1]).read_text("utf-8").strip()

    return _PLACE.sub(part, (folder / "page.html").read_text("utf-8"))
