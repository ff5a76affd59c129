"""Print the folder of `prometheus` and `promtool`: where they are installed, or else unpacked from Debian.

Run by `make monitoring`. The package is only downloaded and unpacked into .cache/prometheus: nothing is
installed, no service is started, and no root is needed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / ".cache" / "prometheus"


def main() -> int:
    try:
        print(folder())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"install_prometheus: install prometheus and promtool on PATH: {error}", file=sys.stderr)
        return 1
    return 0


def folder() -> Path:
    found = shutil.which("prometheus"), shutil.which("promtool")
    if found[0] and found[1]:
        return Path(found[0]).parent
    binaries = TARGET / "root" / "usr" / "bin"
    if not (binaries / "promtool").exists():
        TARGET.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "prometheus"], cwd=TARGET, check=True, stdout=sys.stderr)
        [package] = TARGET.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, TARGET / "root"], check=True)
    return binaries


if __name__ == "__main__":
    sys.exit(main())
