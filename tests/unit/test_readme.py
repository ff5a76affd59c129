"""What the documents say about this package is what the package, or its tests, say."""

from __future__ import annotations

from pathlib import Path

import model_families
import pytest

from rkv_vllm.host import compatibility
from rkv_vllm.settings import policy_table
from rkv_vllm.settings.policy_table import POLICY_NAMES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "name", "table"),
    [
        ("README.md", "compatibility", compatibility.markdown_table()),
        ("README.md", "policies", policy_table.markdown_table()),
        ("docs/models.md", "families", model_families.works_table()),
        ("docs/models.md", "refused", model_families.refused_table()),
    ],
)
def test_documents_have_the_tables_of_the_code(file: str, name: str, table: str) -> None:
    """Proves that the tables which users read are those that the code, or the tests, are made from."""
    text = (ROOT / file).read_text()
    found = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    assert found.strip() == table


@pytest.mark.parametrize("file", ["README.md", "docs/serving.md"])
def test_documents_name_every_policy(file: str) -> None:
    """Proves that the lists of policies in the documents are those of the table."""
    listed = ", ".join(f"`{name}`" for name in POLICY_NAMES)
    assert f"what scores tokens: {listed}" in (ROOT / file).read_text()
