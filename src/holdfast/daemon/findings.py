"""What was looked at, and found: the words of `doctor` and `status`.

Not here: looking (`doctor`, `ground`, `instances`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

_LEVELS: Final = ("problem", "warning", "note", "ok")  # the worst first


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `level` ok, note, warning or problem."""

    what: str
    level: str
    says: str


def worst(levels: Iterable[str]) -> str:
    """The worst level of all; note where there is none."""
    return min(levels, key=_LEVELS.index, default="note")


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings as the API gives them; the verdict is ok where nothing is to be done."""
    level = worst(finding.level for finding in findings)
    verdict = level if level in ("problem", "warning") else "ok"
    return {"verdict": verdict, "findings": [asdict(finding) for finding in findings]}
