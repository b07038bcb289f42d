"""The CDI device `holdfast.dev/vtpm=NAME`: what a container gets when it is given that vTPM.

Duty: the Container Device Interface specification (0.5.0) of one vTPM, as a value and as a file in
a CDI directory. Not here: making what is mounted (`frontend`), what the hooks do (`oci.hook`).

Rules: one file a vTPM, replaced as a whole; mounts repeat nosuid, nodev and noexec, without which
a container in a user namespace fails with EPERM; hooks have no timeout, for a runtime that gives
up on a hook and one that waits must not differ in what they start.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from holdfast.frontend.nodes import DEVICES, Number
from holdfast.ids import InstanceName, instance_name

CDI_VERSION: Final = "0.5.0"
KIND: Final = "holdfast.dev/vtpm"
HOOK_NAME: Final = "holdfast-hook"
HOOK_STAGES: Final = ("createRuntime", "poststop")
_SAFE: Final = ("nosuid", "nodev", "noexec")
_DEVICE: Final = "/dev/tpmrm0"
_NODE_MODE: Final = 0o666  # of a container any user: who has the node may use the vTPM
# Who finds its TPM by which variable. TSS2_LOG is left alone: silencing the stack's errors would
# hide a tenant's own; naming the TCTI already stops the search that makes the noise.
ENVIRONMENT: Final = (
    f"TPM2TOOLS_TCTI=device:{_DEVICE}",  # tpm2-tools
    f"TPM2_PKCS11_TCTI=device:{_DEVICE}",  # tpm2-pkcs11
    f"TPM2OPENSSL_TCTI=device:{_DEVICE}",  # tpm2-openssl
    f"TCTI=device:{_DEVICE}",  # Keylime's agent
    "TPM_INTERFACE_TYPE=dev",  # IBM's TSS
    f"TPM_DEVICE={_DEVICE}",  # IBM's TSS
)

Json = dict[str, Any]


def container_edits(
    name: InstanceName,
    host: Path,
    hook: Path,
    hook_env: Sequence[str] = (),
    numbers: Sequence[Number] = (),
) -> Json:
    """The edits of one vTPM: `host` is its directory on the host, `hook` the hook executable.

    The devices of these `numbers` become /dev/tpm0 and tpmrm0, or if there are none, the files
    `host`/dev/tpm0 and tpmrm0 do; `host`/run becomes /run/vtpm.
    """
    told = {"env": list(hook_env)} if hook_env else {}
    mounts = [] if numbers else [_mount(host / "dev" / d, f"/dev/{d}") for d in DEVICES]
    mounts.append(_mount(host / "run", "/run/vtpm", "ro"))
    hooks = [
        {
            "hookName": stage,
            "path": str(hook),
            "args": [HOOK_NAME, stage, "--vtpm", name],
            **told,
        }
        for stage in HOOK_STAGES
    ]
    edits = {"env": list(ENVIRONMENT), "mounts": mounts, "hooks": hooks}
    if numbers:
        edits["deviceNodes"] = [
            {
                "path": f"/dev/{device}", "type": "c", "major": major, "minor": minor,
                "fileMode": _NODE_MODE, "permissions": "rw",
            }
            for device, (major, minor) in zip(DEVICES, numbers, strict=True)
        ]  # fmt: skip
    return edits


def cdi_spec(name: InstanceName, edits: Json) -> Json:
    """The specification that a CDI file of this vTPM holds."""
    return {
        "cdiVersion": CDI_VERSION,
        "kind": KIND,
        "devices": [{"name": name, "containerEdits": edits}],
    }


def spec_path(name: InstanceName, directory: Path) -> Path:
    """Where that file is: the grammar of names leaves no way out of the directory."""
    return directory / f"{KIND.replace('/', '-')}_{name}.json"


def write_spec(spec: Json, directory: Path) -> Path:
    """Write a specification in one step, readable to all, making the directory if need be.

    InvalidInput if its device's name is not that of an instance.
    """
    (device,) = spec["devices"]
    path = spec_path(instance_name(device["name"]), directory)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Runtimes read *.json and *.yaml: the unfinished file is neither.
    fd, fresh = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".new", dir=directory)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(spec, file, indent=2)
            file.write("\n")
            os.fchmod(file.fileno(), 0o644)
        os.replace(fresh, path)
    except OSError:
        os.unlink(fresh)
        raise
    return path


def remove_spec(name: InstanceName, directory: Path) -> None:
    """Remove a vTPM's file; that there is none is fine."""
    spec_path(name, directory).unlink(missing_ok=True)


def _mount(source: Path, destination: str, *options: str) -> Json:
    return {
        "hostPath": str(source),
        "containerPath": destination,
        "type": "bind",
        "options": ["bind", *options, *_SAFE],
    }
