"""What the README says about this package is what the package says."""

from __future__ import annotations

from pathlib import Path

from rkv_vllm.host.compatibility import markdown_table

README = Path(__file__).parents[2] / "README.md"


def test_readme_has_the_compatibility_table_of_the_code() -> None:
    """The table that users read is the one that the start-up check is made from."""
    text = README.read_text()
    table = text.partition("<!-- compatibility -->")[2].partition("<!-- /compatibility -->")[0]
    assert table.strip() == markdown_table()
