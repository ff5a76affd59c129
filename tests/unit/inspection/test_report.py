"""What is written for a page: arrays survive, texts cannot break out, and it is small."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode

import made_up
import numpy as np
import pytest

from rkv_vllm.inspection.page import page
from rkv_vllm.inspection.report import Inspection, Packed, first_difference


@pytest.mark.parametrize(
    ("most", "missing", "dtype"),
    [(0, None, "uint8"), (255, None, "uint8"), (256, None, "uint16"), (65535, None, "uint16"),
     (65536, None, "uint32"), (254, -1, "uint8"), (255, -1, "uint16"), (65535, -1, "uint32")],
)  # fmt: skip
def test_arrays_survive_in_the_smallest_type(most: int, missing: int | None, dtype: str) -> None:
    """What is missing is the type's largest number, which nothing else is."""
    values = np.array([[0, most], [1 if most else 0, -1 if missing else 0]])
    packed = Packed.pack(values, missing)
    largest = np.iinfo(packed.dtype).max
    assert packed.dtype == dtype
    assert np.array_equal(packed.unpack(), np.where(values == -1, largest, values))
    assert len(gzip.decompress(b64decode(packed.data))) == values.size * np.dtype(dtype).itemsize


def test_the_page_has_the_data_and_no_token_breaks_out() -> None:
    """A text that ends a script, or begins a comment in one, leaves the data what they were."""
    found = made_up.report(tokens=40, layers=1, heads=2, budgets=(16,), buffer=8, prompt=4)
    run = found.runs[0].model_copy(update={"tokens": ["</script><script>alert(1)", "<!--", "\u2028"]})
    found = found.model_copy(update={"runs": [run, *found.runs[1:]]})
    html = page(found)
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', html)
    assert Inspection.model_validate(json.loads(data)) == found
    assert "alert(1)" in data and "<" not in data
    assert "{{" not in html.replace(data, "")


def test_a_long_answer_is_small_without_scores() -> None:
    """When every token of 16,384 left, in 36 layers of 8 heads, takes less than a byte and a half each."""
    found = made_up.report(tokens=16384, layers=36, heads=8, budgets=(1024,))
    forgotten = found.runs[1].forgotten
    assert forgotten is not None
    assert len(forgotten.left.data) < 1.5 * 16384 * 36 * 8


def test_where_answers_part() -> None:
    """At the first other token, or where one of them ends."""
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
