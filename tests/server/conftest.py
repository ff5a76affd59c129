"""Helpers of the server's tests."""

from __future__ import annotations

import sys
from pathlib import Path

# Tests import the modules beside this file by name.
sys.path.insert(0, str(Path(__file__).parent))
