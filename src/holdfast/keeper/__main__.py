"""`python -m holdfast.keeper`: provision and authorize for the CLI, serve for the supervisor."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from holdfast.errors import HoldfastError
from holdfast.hwtpm.context import preload
from holdfast.keeper.provision import DEFAULT_PCRS, authorize, provision
from holdfast.keeper.service import Keeper
from holdfast.linux import channel, process
from holdfast.sandbox import keeper as sandbox


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    try:
        if options.action == "provision":
            pcrs = tuple(int(pcr) for pcr in options.pcrs.split(","))
            result = provision(
                options.dir, options.tcti, options.recovery_recipient, options.out, pcrs,
                site=options.site, stand_in=options.stand_in,
            )  # fmt: skip
            if options.uid:
                _give_away(options.dir, options.uid, options.gid)
        elif options.action == "authorize":
            result = authorize(
                options.dir, options.tcti, options.identity, options.recovery_file,
                retire=options.retire,
            )  # fmt: skip
            if options.uid:
                _give_away(options.dir, options.uid, options.gid)
        else:
            return _serve(options)
    except (HoldfastError, OSError, ValueError) as error:
        json.dump({"error": type(error).__name__, "why": str(error)}, sys.stdout)
        return 1
    json.dump(result, sys.stdout)
    return 0


def _serve(options: argparse.Namespace) -> int:
    process.set_name("holdfast-keeper")
    listener = channel.listen(options.socket, 0o600)
    network = not options.tcti.startswith(("device", "swtpm:path", "mssim:path", "cmd"))
    preload(options.tcti)
    lacking = sandbox.enter(options.uid, options.gid, network=network)
    for what in lacking:
        sys.stderr.write(f"holdfast-keeper: {what}\n")
    keeper = Keeper(listener, options.dir, options.tcti)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper.run()
    with contextlib.suppress(OSError):
        options.socket.unlink()
    return 0


def _give_away(directory: Path, uid: int, gid: int) -> None:
    for path in (directory, *directory.iterdir()):
        os.chown(path, uid, gid)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast-keeper", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, required=True)
    common.add_argument("--tcti", required=True)
    common.add_argument("--uid", type=int, default=0)
    common.add_argument("--gid", type=int, default=0)
    made = actions.add_parser("provision", parents=[common])
    made.add_argument("--recovery-recipient", required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--pcrs", default=",".join(map(str, DEFAULT_PCRS)))
    made.add_argument("--site", default="Holdfast site")
    made.add_argument("--stand-in", action="store_true")
    allowed = actions.add_parser("authorize", parents=[common])
    allowed.add_argument("--identity", type=Path, required=True)
    allowed.add_argument("--recovery-file", type=Path, required=True)
    allowed.add_argument("--retire", action="store_true")
    served = actions.add_parser("serve", parents=[common])
    served.add_argument("--socket", type=Path, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
