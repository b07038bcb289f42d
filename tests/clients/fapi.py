"""FAPI's programs with a profile, key stores and a configuration of the test's own."""

from __future__ import annotations

import json
from pathlib import Path

from .tools import Package, environment

PROFILES = Path("/etc/tpm2-tss/fapi-profiles")  # Debian's, of package libtss2-fapi-common
ECC, RSA = "P_ECCP256SHA256", "P_RSA2048SHA256"


def configuration(directory: Path, tcti: str, profile: str, **more: object) -> Path:
    """Write FAPI's configuration file."""
    places = {name: directory / name for name in ("user_dir", "system_dir", "log_dir")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    settings = {
        "profile_name": profile,
        "profile_dir": str(PROFILES),
        **{name: str(place) for name, place in places.items()},
        "tcti": tcti,
        "system_pcrs": [],
        # FAPI knows the certificates of TPMs' makers alone, and fetches what lies between.
        "ek_cert_less": "yes",
        **more,
    }
    path = directory / "fapi.json"
    path.write_text(json.dumps(settings))
    return path


class Fapi(Package):
    """Programs tss2_*, called as in a shell with the names of their options in full."""

    def __init__(self, directory: Path, tcti: str, profile: str, ran: set[str]) -> None:
        path = configuration(directory, tcti, profile)
        super().__init__(directory, environment(TSS2_FAPICONF=str(path), TPM2TOOLS_TCTI=tcti), ran)

    def _command(self, name: str, options: dict[str, str]) -> list[str]:
        return [f"tss2_{name}", *(f"--{key}={value}" for key, value in options.items())]

    def __call__(self, name: str, given: bytes = b"", **options: str) -> bytes:
        """Run it; it must succeed. What it says."""
        output = self.out(*self._command(name, options), given=given)
        self._ran.add(f"tss2_{name}")
        return output

    def result(self, name: str, option: str, **options: str) -> bytes:
        """Run it; what it puts into the file that `option` names."""
        (self.directory / "result").unlink(missing_ok=True)
        self(name, **options, **{option: "result"})
        return self.read("result")

    def refused(self, code: int, name: str, **options: str) -> None:
        """Run it; it must say that this is why not."""
        said = self.fails(*self._command(name, options))
        assert f"(0x{code:X})" in said, (name, options, said)

    def policy(self, name: str, *elements: dict[str, object]) -> None:
        """A policy by that name."""
        text = json.dumps({"description": name, "policy": elements})
        self.write(f"{name}.json", text.encode())
        self("import", path=f"/policy/{name}", importData=f"{name}.json")
