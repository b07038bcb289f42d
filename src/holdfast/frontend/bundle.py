"""A bundle with a vTPM, for runtimes without CDI: bare runc, crun.

Duty: apply a vTPM's CDI edits to a configuration (config.json), as a CDI library would. Not here:
reading and writing the file. Rules: a pure function; our createRuntime hook comes last of its
stage; what is there already is never replaced silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from holdfast.errors import Conflict, InvalidInput

Json = dict[str, Any]


def with_vtpm(config: Mapping[str, Any], edits: Mapping[str, Any]) -> Json:
    """A copy of `config` with the edits of `cdi.container_edits`.

    Environment variables of the same name are replaced, as CDI has it. Raises Conflict where a
    destination or hook of ours is taken, InvalidInput where the configuration has not the shape of
    one.
    """
    result = copy.deepcopy(dict(config))
    process = result.get("process")
    if not isinstance(process, dict):
        raise InvalidInput("the configuration has no process to give a vTPM to")
    process["env"] = _environment(_list(process, "env"), edits["env"])
    result["mounts"] = _mounts(_list(result, "mounts"), edits["mounts"])
    if edits.get("deviceNodes"):
        result["linux"] = _devices(result.get("linux"), edits["deviceNodes"])
    hooks = result.get("hooks")
    if hooks is None:
        hooks = {}
    if not isinstance(hooks, dict):
        raise InvalidInput("the configuration's hooks are not an object")
    for hook in edits["hooks"]:
        stage = hook["hookName"]
        there = _list(hooks, stage)
        if any(_field(entry, "path") == hook["path"] for entry in there):
            raise Conflict(f"the configuration has {hook['path']} as a {stage} hook already")
        entry = {key: value for key, value in hook.items() if key != "hookName"}
        hooks[stage] = [*there, entry]
    result["hooks"] = hooks
    return result


def _environment(there: list[Any], ours: list[str]) -> list[Any]:
    names = {item.partition("=")[0] for item in ours}
    return [
        item for item in there if not isinstance(item, str) or item.partition("=")[0] not in names
    ] + ours


def _mounts(there: list[Any], ours: list[Json]) -> list[Any]:
    taken = {_field(mount, "destination") for mount in there}
    for mount in ours:
        if mount["containerPath"] in taken:
            raise Conflict(f"the configuration mounts something at {mount['containerPath']}")
    return there + [
        {
            "destination": mount["containerPath"],
            "type": mount["type"],
            "source": mount["hostPath"],
            "options": list(mount["options"]),
        }
        for mount in ours
    ]


def _devices(linux: Any, ours: list[Json]) -> Json:
    """The section with our device nodes, and the control group's leave to use them."""
    linux = {} if linux is None else linux
    if not isinstance(linux, dict):
        raise InvalidInput("the configuration's linux is not an object")
    resources = {} if linux.get("resources") is None else linux["resources"]
    if not isinstance(resources, dict):
        raise InvalidInput("the configuration's linux.resources is not an object")
    devices, rules = _list(linux, "devices"), _list(resources, "devices")
    taken = {_field(device, "path") for device in devices}
    for node in ours:
        if node["path"] in taken:
            raise Conflict(f"the configuration makes something at {node['path']}")
        number = {"type": node["type"], "major": node["major"], "minor": node["minor"]}
        devices = [*devices, {"path": node["path"], **number, "fileMode": node["fileMode"]}]
        rules = [*rules, {"allow": True, **number, "access": node["permissions"]}]
    return {**linux, "devices": devices, "resources": {**resources, "devices": rules}}


def _list(section: Json, key: str) -> list[Any]:
    value = section.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidInput(f"{key} of the configuration is not a list")
    return value


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise InvalidInput(f"an entry of the configuration is not an object: {str(entry)[:40]}")
    return entry.get(key)
