"""`python -m holdfast.daemon.settings`: the configuration as JSON, for the CLI."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.daemon.config import Config, load
from holdfast.errors import HoldfastError


def answer(arguments: list[str], asked: Callable[[Config], dict[str, Any]]) -> int:
    """Print as JSON what is `asked` of the configuration, or the error; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    options = parser.parse_args(arguments)
    try:
        value = asked(load(options.config))
    except (HoldfastError, OSError) as error:
        json.dump({"error": type(error).__name__, "why": str(error)}, sys.stdout)
        return 1
    json.dump(value, sys.stdout)
    return 0


def _for_cli(config: Config) -> dict[str, Any]:
    return {
        "api": str(config.paths.api),
        "keeper": str(config.paths.vault),
        "tcti": config.host.tcti,
        "event_log": str(config.host.event_log),
        "stand_in": config.host.stand_in,
        "keeper_user": config.keeper.user,
    }


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], _for_cli))
