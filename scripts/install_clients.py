"""Prepare `.cache/clients`: the clients of other projects with which tests ask a running server.

They want packages, and versions of them, that vLLM's environment must not be given. So they get one of their
own, which looks into `.venv` for all that fits: that saves a second torch. It prints where its Python is, and
does nothing else where nothing has changed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / ".cache" / "clients"
CLIENTS = (
    "guidellm==0.8.1",
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "openai-agents==0.24.0",
)


def main() -> int:
    """To be run by the Python of `.venv`."""
    python = TARGET / "bin" / "python"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    wanted = hashlib.sha256(repr((CLIENTS, packages, sys.version)).encode()).hexdigest()
    stamp = TARGET / "installed"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        venv.create(TARGET, clear=True, with_pip=True)
        [own] = TARGET.glob("lib/python*/site-packages")
        (own / "beneath.pth").write_text("\n".join(packages) + "\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", *CLIENTS]
        if (code := subprocess.run(pip, stdout=sys.stderr).returncode) != 0:
            return code
        stamp.write_text(wanted)
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
