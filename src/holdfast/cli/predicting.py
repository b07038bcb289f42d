"""`policy predict`: the boot state that the next boot will have, from the log of this one.

Not here: how it is computed (`eventlog.predict`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from holdfast.cli import output
from holdfast.cli.given import ConfigFile, Json, must_be_root, read_file
from holdfast.cli.output import MARKS
from holdfast.cli.programs import keeper, settings_of
from holdfast.errors import DecodeError, IntegrityError, InvalidInput
from holdfast.eventlog import tcg2
from holdfast.eventlog.predict import Change, Expected, Prediction, application, predict
from holdfast.eventlog.predict import contradictions as contradicted
from holdfast.eventlog.tcg2 import Tcg2Log

DEFAULT_PCRS: Final = "0,2,4,7"
IMAGE_MAX: Final = 512 << 20  # bytes in an EFI program
DIGEST_SIZE: Final = 32
_NUMBER_DIGITS: Final = 5
Many = list[str] | None


def predict_boot(
    event_log: Annotated[
        Path | None, typer.Option(help="A TCG2 event log, instead of this host's.")
    ] = None,
    pcrs: Annotated[
        str, typer.Option(help="PCRs to predict; of this host, those that were approved.")
    ] = "",
    boot_application: Annotated[
        Many,
        typer.Option(
            metavar="OLD=NEW",
            help="EFI program (shim, boot loader, kernel) that takes another's place. OLD: a file, "
            r"a path as the log has it (\EFI\…), or its event's number.",
        ),
    ] = None,
    replace_digest: Annotated[
        Many,
        typer.Option(
            metavar="PCR:OLD=NEW",
            help="A digest that takes another's place: firmware, by its maker's reference values. "
            "OLD: a digest in hex, or an event's number.",
        ),
    ] = None,
    drop: Annotated[
        Many, typer.Option(metavar="PCR:OLD", help="What will not be measured any more.")
    ] = None,
    append: Annotated[
        Many, typer.Option(metavar="PCR:NEW", help="What will be measured last of all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the values here.")] = None,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Predict the boot state of the next boot, for holdfast policy authorize --values.

    Everything is taken as it was in this boot but what is named. It says what became of each
    event, and warns of what it cannot foresee.
    """
    data, wanted = _source(event_log, pcrs, config)
    changes: list[Change] = []
    warnings: list[str] = []
    for text in boot_application or ():
        more, said = _application(data, text)
        changes += more
        warnings += said
    changes += [_replaced(text) for text in replace_digest or ()]
    changes += [_dropped(text) for text in drop or ()]
    changes += [_appended(text) for text in append or ()]
    found = predict(data, wanted, changes)
    warnings += found.warnings
    values = {str(pcr): value.hex() for pcr, value in found.values.items()}
    if out is not None:
        out.write_text(json.dumps(values, indent=2) + "\n")
    if as_json:
        events = [_event(each) for each in found.events]
        full = {"bank": "sha256", "values": values, "events": events, "warnings": warnings}
        sys.stdout.write(json.dumps(full, indent=2) + "\n")
        return
    with output.standard_error(out is None):
        _tell(found, warnings)
    if out is None:
        sys.stdout.write(json.dumps(values, indent=2) + "\n")


def _source(event_log: Path | None, pcrs: str, config: Path | None) -> tuple[Tcg2Log, list[int]]:
    """The log and the PCRs; IntegrityError if this host's log is not that of its TPM."""
    if event_log is not None:
        return _parsed(event_log), _numbers(pcrs or DEFAULT_PCRS)
    must_be_root("predicting from this host's log")
    settings = settings_of(config)
    state = keeper(["boot-state", f"--dir={settings['keeper']}", f"--tcti={settings['tcti']}"])
    wanted = _numbers(pcrs) if pcrs else state["pcrs"]
    path = Path(settings["event_log"])
    log = _parsed(path)
    shown = {int(pcr): bytes.fromhex(value) for pcr, value in state["present"].items()}
    wrong = contradicted(log, shown, wanted)
    if wrong:
        raise IntegrityError(
            f"{path} does not lead to what the host TPM has in PCR {', '.join(map(str, wrong))}: "
            "something extended it besides what the log says, so it cannot be predicted from it"
        )
    return log, wanted


def _parsed(path: Path) -> Tcg2Log:
    try:
        return tcg2.parse(read_file(path, tcg2.LOG_MAX))
    except DecodeError as error:
        raise InvalidInput(f"{path} is no event log: {error.why}") from None


def _application(log: Tcg2Log, text: str) -> tuple[list[Change], list[str]]:
    option = f"--boot-application {text}"
    old, equals, new = text.partition("=")
    if not old or not equals or not new:
        raise InvalidInput(f"{option}: it is OLD=NEW")
    there: bytes | int | str
    if _is_number(old):
        there = int(old)
    elif old.startswith("\\"):
        there = old
    else:
        there = read_file(Path(old), IMAGE_MAX)
    try:
        return application(log, there, read_file(Path(new), IMAGE_MAX), option)
    except DecodeError as error:
        raise InvalidInput(f"{option}: not an EFI program: {error.why}") from None


def _replaced(text: str) -> Change:
    option = f"--replace-digest {text}"
    pcr, rest = _pcr(text, option)
    old, equals, new = rest.partition("=")
    if not equals:
        raise InvalidInput(f"{option}: it is PCR:OLD=NEW")
    return Change(pcr, _old(old, option), _digest(new, option), option)


def _dropped(text: str) -> Change:
    option = f"--drop {text}"
    pcr, old = _pcr(text, option)
    return Change(pcr, _old(old, option), None, option)


def _appended(text: str) -> Change:
    option = f"--append {text}"
    pcr, new = _pcr(text, option)
    return Change(pcr, None, _digest(new, option), option)


def _pcr(text: str, option: str) -> tuple[int, str]:
    pcr, colon, rest = text.partition(":")
    if not colon or not _is_number(pcr):
        raise InvalidInput(f"{option}: it begins with a PCR's number and a colon")
    return int(pcr), rest


def _old(text: str, option: str) -> bytes | int:
    return int(text) if _is_number(text) else _digest(text, option)


def _digest(text: str, option: str) -> bytes:
    try:
        value = bytes.fromhex(text.removeprefix("sha256:"))
    except ValueError:
        value = b""
    if len(value) != DIGEST_SIZE:
        raise InvalidInput(f"{option}: {text[:80]!a} is not a SHA-256 digest in hex")
    return value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(map(_is_number, parts)):
        raise InvalidInput(f"{text!a} is not a list of PCRs such as {DEFAULT_PCRS}")
    return sorted(set(map(int, parts)))


def _event(each: Expected) -> dict[str, Any]:
    return {
        "event": each.number,
        "pcr": each.pcr,
        "type": each.type_name,
        "says": each.says,
        "fate": each.fate,
        "digest": each.digest.hex(),
        "was": each.was.hex(),
        "by": each.by,
    }


def _tell(found: Prediction, warnings: list[str]) -> None:
    for pcr, value in found.values.items():
        events = [each for each in found.events if each.pcr == pcr]
        fates = ("kept", "replaced", "dropped", "appended")
        counts = [(fate, sum(each.fate == fate for each in events)) for fate in fates]
        told = ", ".join(f"{count} {fate}" for fate, count in counts if count) or "no events"
        output.line(f"PCR {pcr}: {value.hex()}: {told}")
        for each in events:
            output.line(_said(each))
    for text in warnings:
        output.line(text, MARKS["warning"])


def _said(each: Expected) -> str:
    digest = f"{each.digest.hex()[:16]}…"
    if each.fate == "replaced":
        digest = f"{each.was.hex()[:16]}… becomes {digest}"
    number = "new" if each.number is None else str(each.number)
    parts = (f"{number:>5} {each.fate:8}", each.type_name, each.says, digest)
    return " ".join(part for part in parts if part)
