"""A disk with Holdfast as it is in this tree, installed: for guests that are hosts of containers.

It carries the packages of the virtual environment that runs the tests, without those that only
developers want, and an image for a container. The guest's Python is Debian's, of the same version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from tests.system.rootfs import PROGRAMS, make_rootfs

from .guest import ROOT

SIZE = "400M"
LIBRARIES = ("libtss2-tcti-device", "libtss2-tcti-swtpm")
MOUNT = """
mkdir -p /mnt/holdfast && mount -o ro /dev/vdb /mnt/holdfast
mount --bind /mnt/holdfast/packages /usr/local/lib/python3.11/dist-packages
mount --bind /mnt/holdfast/bin /usr/local/bin
"""
_PROGRAM = """#!/usr/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""


def wanted(name: str, found: dict[str, Path]) -> None:
    """Follow what a distribution requires, from `name` on."""
    made = distribution(name)
    key = re.sub(r"[-_.]+", "-", made.metadata["Name"]).lower()
    if key in found:
        return
    found[key] = Path(str(made.locate_file("")))
    for requirement in made.requires or ():
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
        if extra and not (name == "holdfast" and extra[1] == "host"):
            continue
        try:
            wanted(match[0], found)
        except ModuleNotFoundError:
            assert ";" in requirement, requirement  # of another platform or version


def build(work: Path) -> Path:
    """Make the image of the disk."""
    place = work / "payload"
    packages, programs = place / "packages", place / "bin"
    programs.mkdir(parents=True)
    found: dict[str, Path] = {}
    wanted("holdfast", found)
    for name in found:
        if name == "holdfast":
            continue
        for file in distribution(name).files or ():
            if file.parts[0] == ".." or "__pycache__" in file.parts:
                continue
            source = Path(str(file.locate()))
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    shutil.copytree(
        ROOT / "src" / "holdfast", packages / "holdfast",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    for entry in distribution("holdfast").entry_points.select(group="console_scripts"):
        module, _, function = entry.value.partition(":")
        program = programs / entry.name
        program.write_text(_PROGRAM.format(module=module, function=function))
        program.chmod(0o755)
    rootfs = make_rootfs(place / "rootfs", (*PROGRAMS, "tpm2", "stat"))
    for library in LIBRARIES:  # which it opens by name
        for file in Path("/usr/lib/x86_64-linux-gnu").glob(f"{library}.so*"):
            shutil.copy(file, rootfs / "lib/x86_64-linux-gnu", follow_symlinks=False)
    subprocess.run(
        ["python3", "-m", "compileall", "-q", "-j0", packages], check=False, capture_output=True
    )
    image = work / "payload.ext4"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", place, image, SIZE], check=True)
    return image


if __name__ == "__main__":
    import sys

    print(build(Path(sys.argv[1])), sysconfig.get_python_version())
