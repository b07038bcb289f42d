"""`python -m holdfast.daemon.settings`: the configuration as JSON, for the CLI's `init`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from holdfast.daemon import config
from holdfast.errors import HoldfastError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    options = parser.parse_args(arguments)
    try:
        settings = config.load(options.config)
    except (HoldfastError, OSError) as error:
        json.dump({"error": type(error).__name__, "why": str(error)}, sys.stdout)
        return 1
    json.dump(
        {
            "keeper": str(settings.paths.state / "keeper"),
            "tcti": settings.host.tcti,
            "stand_in": settings.host.stand_in,
            "keeper_user": settings.keeper.user,
        },
        sys.stdout,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
