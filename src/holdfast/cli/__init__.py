"""The command line. `main` decides, before anything heavy is imported, whether it is a hook."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `holdfast`."""
    if sys.argv[1:2] == ["hook"]:
        from holdfast.oci.hook import main as hook  # noqa: PLC0415 - a hook must start fast

        sys.exit(hook(sys.argv[2:]))
    from holdfast.cli.app import run  # noqa: PLC0415 - Typer and Rich cost a tenth of a second

    run()
