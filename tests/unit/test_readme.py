"""What the README says about this package is what the package says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkv_vllm.host import compatibility
from rkv_vllm.settings import policy_table
from rkv_vllm.settings.config import POLICY_NAMES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "table"),
    [("compatibility", compatibility.markdown_table()), ("policies", policy_table.markdown_table())],
)
def test_readme_has_the_tables_of_the_code(name: str, table: str) -> None:
    """Proves that the tables which users read are those that the code is made from."""
    text = (ROOT / "README.md").read_text()
    found = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert found.strip() == table


@pytest.mark.parametrize("file", ["README.md", "docs/serving.md"])
def test_documents_name_every_policy(file: str) -> None:
    """Proves that the lists of policies in the documents are those of the table."""
    listed = ", ".join(f"`{name}`" for name in POLICY_NAMES)
    assert f"what scores tokens: {listed}" in (ROOT / file).read_text()
