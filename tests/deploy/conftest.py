"""The tests beside this file import one another's helpers by name."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# Helm's binding has no build for this platform: what needs it is not collected.
collect_ignore = [] if find_spec("helm_python") else ["test_chart.py"]
