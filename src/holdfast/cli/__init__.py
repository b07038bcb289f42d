"""The command line. `main` decides, before anything heavy is imported, whether it is a hook."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Entry point of `holdfast`."""
    if sys.argv[1:2] == ["hook"]:
        command = [sys.executable, "-P", "-m", "holdfast.oci.hook", *sys.argv[2:]]
        os.execv(sys.executable, command)  # noqa: S606 - our own interpreter, our own module
    try:
        from holdfast.cli.app import run  # noqa: PLC0415 - Typer and Rich cost a tenth of a second

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
