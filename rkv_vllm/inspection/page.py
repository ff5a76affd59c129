"""The page of `rkv-vllm inspect`: one file, with its data and script inside."""

from __future__ import annotations

import re
from importlib.resources import files

from rkv_vllm.inspection.report import Inspection

_PLACE = re.compile(r"\{\{([a-z.]+)\}\}")


def page(found: Inspection) -> str:
    """HTML that needs nothing but a browser, and asks for nothing."""
    folder = files("rkv_vllm.inspection")
    # `<` would end the script that holds the data, or begin a comment in it, wherever a token has one.
    parts = {"data": found.model_dump_json().replace("<", "\\u003c")}
    parts |= {name: (folder / name).read_text("utf-8").strip() for name in ("page.css", "page.js")}
    return _PLACE.sub(lambda place: parts[place[1]], (folder / "page.html").read_text("utf-8"))
