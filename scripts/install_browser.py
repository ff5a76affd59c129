"""Print where Chromium is: one that is installed, or else Debian's, which is installed first, as root.

Tests look with it at the pages that this package makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium", "fonts-dejavu-core")


def main() -> int:
    if installed() is None:
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"install_browser: install Chromium on PATH: {error}", file=sys.stderr)
            return 1
    print(installed())
    return 0


def installed() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ("update", "--quiet"),
        ("install", "--quiet", "--yes", "--no-install-recommends", *PACKAGES),
    ):
        subprocess.run(["apt-get", *command], env=environment, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
