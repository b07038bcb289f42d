"""A host of containers in a guest: the guest's TPM as hardware, and device nodes for containers.

What the kernel of the machine that runs the tests may lack is all here: a TPM driver, the logs of
firmware and IMA, vtpm_proxy, CUSE.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
from tests.swtpm.program import OURS

from holdfast.eventlog import ima
from holdfast.evidence.bundle import Evidence
from holdfast.evidence.pcrs import decode_pcrs
from holdfast.tpm2.algorithms import Alg

from . import payload
from .conftest import Vm
from .host import RUN, ContainerHost, write

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
SETUP = str(Path(OURS[0]).with_name("holdfast-swtpm-setup"))
NONCE = "00112233445566778899aabbccddeeff"
IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
# In band, as the driver does it (TPM2_CC_SET_LOCALITY): by a client, for each locality.
SET_LOCALITY = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for locality in range(5):
    try:
        os.write(fd, bytes.fromhex("80010000000b20001000") + bytes([locality]))
        print(os.read(fd, 100).hex())
    except OSError as error:
        print(error.errno)
"""
# Commands one after the other for some seconds; how many were answered how.
LOOP = """
import os, sys, time
fd, answers, end = os.open(sys.argv[1], os.O_RDWR), {}, time.time() + float(sys.argv[2])
while time.time() < end:
    try:
        os.write(fd, bytes.fromhex("80010000000c0000017b0008"))
        answer = os.read(fd, 4096)[6:10].hex()
    except OSError as error:
        answer = str(error.errno)
    answers[answer] = answers.get(answer, 0) + 1
    if sum(answers.values()) % 50 == 0:
        open("/run/served", "a").write("x")
print(answers)
"""


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CA of the maker of the guest's TPM: a directory with its configuration."""
    place = tmp_path_factory.mktemp("maker")
    (place / "ca").mkdir()
    (place / "localca.conf").write_text(
        f"statedir = {place}/ca\nsigningkey = {place}/ca/key.pem\n"
        f"issuercert = {place}/ca/issuer.pem\ncertserial = {place}/ca/serial\n"
    )
    (place / "options").write_text("--platform-manufacturer Lab\n--platform-version 1\n"
                                   "--platform-model Guest\n")  # fmt: skip
    (place / "setup.conf").write_text(
        f"create_certs_tool = {shutil.which('swtpm_localca')}\n"
        f"create_certs_tool_config = {place}/localca.conf\n"
        f"create_certs_tool_options = {place}/options\nactive_pcr_banks = sha256\n"
    )
    return place


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory, archive: Path, maker: Path) -> Iterator[Vm]:
    place = tmp_path_factory.mktemp("host")
    made = Vm(
        place / "vm", archive, append="ima_policy=tcb", disks=(payload.build(place),), memory=1536
    )
    state = made.directory / "state"
    state.mkdir()
    subprocess.run(
        [SETUP, "--tpm2", "--tpmstate", str(state), "--createek", "--create-ek-cert",
         "--lock-nvram", "--config", str(maker / "setup.conf"), "--vmid", "lab-host"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        made.start()
        yield made
        print(made.guest.run(f"cat {RUN}/log", check=False))  # shown where a test failed
    finally:
        made.end()


@pytest.fixture(scope="module")
def host(vm: Vm) -> ContainerHost:
    made = ContainerHost(vm.guest)
    identity = pyrage.x25519.Identity.generate()
    said = made.prepare(str(identity.to_public()))
    assert said["host_ek_certificate"] is True
    assert said["stand_in"] is False
    made.start()
    write(vm.guest, "/run/locality.py", SET_LOCALITY)
    write(vm.guest, "/run/loop.py", LOOP)
    return made


def numbers(host: ContainerHost, vtpm: str, kind: str) -> list[str]:
    """The two nodes in the container: `kind` and numbers of each."""
    text = host.inside(vtpm, 'stat -c "%F %t:%T" /dev/tpm0 /dev/tpmrm0')
    found = re.findall(r"^(.*) ([0-9a-f]+:[0-9a-f]+)$", text, re.MULTILINE)
    assert [what for what, _ in found] == [kind] * 2, text
    return [number for _, number in found]


USE = """
set -e
cd /tmp
for t in device:/dev/tpm0 device:/dev/tpmrm0; do
  export TPM2TOOLS_TCTI=$t
  tpm2 createprimary -Q -c p.ctx
  tpm2 create -Q -C p.ctx -G ecc -u k.pub -r k.priv
  tpm2 load -Q -C p.ctx -u k.pub -r k.priv -c k.ctx
  echo hello > m
  tpm2 sign -Q -c k.ctx -g sha256 -o s m
  tpm2 verifysignature -Q -c k.ctx -m m -s s
  tpm2 startauthsession --policy-session -S s.ctx
  tpm2 policypcr -Q -S s.ctx -l sha256:13
  tpm2 flushcontext s.ctx
  tpm2 pcrextend 16:sha256=%s
  tpm2 pcrextend 10:sha256=%s 2> refused && exit 9
  case "$(cat refused)" in *0x907*) ;; *) exit 8;; esac
  tpm2 flushcontext -t
done
unset TPM2TOOLS_TCTI
tpm2 getcap handles-transient
tpm2 getcap handles-loaded-session
tpm2 getcap handles-saved-session
tpm2 pcrread sha256:0,1,2,3,4,5,6,7,16
""" % ("ab" * 32, "cd" * 32)  # noqa: UP031 - braces are the shell's


def test_the_guest_s_tpm_is_its_hardware(host: ContainerHost) -> None:
    text = host.run("holdfast doctor")
    assert re.search(r"ok host TPM: IBM .* at device:/dev/tpmrm0", text)
    assert re.search(r"ok host event log: \d+ events lead to the host TPM's PCRs", text)


@pytest.mark.parametrize("kind", ["vtpm-proxy", "cuse"])
def test_a_container_has_device_nodes_and_unmodified_tools_use_them(
    host: ContainerHost, kind: str
) -> None:
    name = kind
    host.run(f"holdfast create {name} --devices {kind}")
    place = host.bundle(name)
    host.begin(name, place)
    first = numbers(host, name, "character special file")
    said = host.inside(name, USE)
    assert "- 0x" not in said.split("sha256:")[0]  # the resource manager left nothing
    values = dict(re.findall(r"(\d+) *: 0x([0-9A-F]{64})", said))
    ours = host.run("tpm2_pcrread sha256:0,1,2,3,4,5,6,7")
    hosts = dict(re.findall(r"(\d+) *: 0x([0-9A-F]{64})", ours))
    assert hosts == {pcr: value for pcr, value in values.items() if pcr != "16"}
    assert len(hosts) == 8
    assert values["16"] != "0" * 64
    # The nodes that the host has go with the run, and those of the next are others' successors.
    host.end(name)
    host.begin(name, host.bundle(name))
    numbers(host, name, "character special file")
    host.end(name)
    host.run(f"holdfast rm {name}")
    gone = host.run(
        "for d in /dev/tpm* /dev/holdfast/*/*; do [ -c $d ] && stat -c %t:%T $d; done; true"
    )
    assert not set(first) & set(gone.split())


def test_what_is_there_is_chosen_and_shown(host: ContainerHost) -> None:
    host.run("holdfast create chosen")
    assert host.state("chosen")["devices"] == "auto"
    assert (
        host.run("ls /dev/tpm* | wc -l").strip() == "4"  # the guest's own two, and these
    )
    refused = host.run("holdfast create x --devices usb", check=False)
    assert "devices are one of auto, fuse, cuse, vtpm-proxy" in refused
    host.run("holdfast rm chosen")


def test_no_client_sets_a_locality_in_band(host: ContainerHost) -> None:
    host.run("holdfast create locality --devices vtpm-proxy")
    host.begin("locality", host.bundle("locality"))
    index = next(
        number for number in range(1, 9)
        if host.run(f"test -c /dev/tpm{number} && echo y", check=False).strip() == "y"
    )  # fmt: skip
    by_tpm0 = host.run(f"python3 /run/locality.py /dev/tpm{index}").split()
    by_manager = host.run(f"python3 /run/locality.py /dev/tpmrm{index}").split()
    assert by_tpm0 == ["14"] * 5  # EFAULT: the driver keeps that command to itself
    assert by_manager == ["80010000000a000b0143"] * 5
    # And who has the server's end: a vTPM of ours never runs a command at another locality.
    refused = host.inside("locality", f"tpm2 pcrextend 17:sha256={'00' * 32} 2>&1", check=False)
    assert "0x907" in refused
    host.end("locality")
    host.run("holdfast rm locality")


def until_served(host: ContainerHost) -> None:
    """Wait until the loop has had a hundred answers more."""
    host.run(
        "size() { stat -c %s /run/served 2>/dev/null || echo 0; }; had=$(size); "
        "for turn in $(seq 200); do [ $(size) -ge $((had + 2)) ] && exit 0; sleep 0.1; done; exit 1"
    )


@pytest.mark.parametrize("kind", ["vtpm-proxy", "cuse"])
def test_open_nodes_go_on_when_worker_or_daemon_die(host: ContainerHost, kind: str) -> None:
    name = f"dies-{kind}"
    host.run(f"holdfast create {name} --devices {kind}")
    host.begin(name, host.bundle(name))
    node = f"/dev/holdfast/{name}/tpm0" if kind == "cuse" else "$(ls /dev/tpm[1-9])"
    host.run(f"python3 /run/loop.py {node} 12 > /run/answers 2>&1 & echo $! > /run/looping")
    until_served(host)
    host.run(f"kill -9 {host.worker()}")
    until_served(host)
    host.run(
        'for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = holdfast-daemon ] && '
        "kill -9 ${p#/proc/}; done; true"
    )
    host.run("while [ -d /proc/$(cat /run/looping) ]; do sleep 0.2; done", seconds=60)
    answers = host.run("cat /run/answers")
    # A response that nobody had read went with its worker: empty. A command was in flight: EIO; by
    # vtpm_proxy TPM_RC_CANCELED, what the driver makes of that in its own commands, or ETIME: for a
    # short command it waits two seconds.
    counts = ast.literal_eval(answers)
    assert counts.pop("00000000") > 100, answers
    assert sum(counts.values()) <= 5, answers
    assert set(counts) <= ({"5", ""} if kind == "cuse" else {"00000909", "", "1", "62"}), answers
    host.answers()
    value = host.state(name)
    assert (value["state"], value["restarts"]) == ("active", 1)
    assert len(host.inside(name, "tpm2 getrandom --hex 8")) == 16
    host.end(name)
    host.run(f"holdfast rm {name}")


@pytest.mark.parametrize("kind", ["vtpm-proxy", "cuse"])
def test_a_container_that_lives_on_never_finds_another_tpm_at_its_nodes(
    host: ContainerHost, kind: str
) -> None:
    """Its nodes and its leave to use them outlive its vTPM; the kernel gives numbers anew."""

    def dead(container: str) -> bool:
        said = host.inside(container, "tpm2 getrandom --hex 8", check=False)
        return "ERROR" in said and not re.search(r"^[0-9a-f]{16}$", said, re.MULTILINE)

    seen: set[str] = set()
    # Its vTPM is destroyed, and another one made.
    host.run(f"holdfast create alice --devices {kind}")
    host.begin("alice", host.bundle("alice"))
    seen.update(numbers(host, "alice", "character special file"))
    host.run("holdfast stop alice && holdfast rm alice")
    host.run(f"holdfast create carol --devices {kind}")
    host.begin("carol", host.bundle("carol"))
    fresh = numbers(host, "carol", "character special file")
    assert not seen & set(fresh)
    seen.update(fresh)
    assert dead("alice")
    # Its vTPM goes to another container.
    host.run("holdfast stop carol")
    host.begin("carol-2", host.bundle("carol", "carol-2"))
    fresh = numbers(host, "carol-2", "character special file")
    assert not seen & set(fresh)
    seen.update(fresh)
    assert dead("alice")
    assert dead("carol")
    # Holdfast ends and begins again.
    host.stop()
    host.start()
    host.begin("carol-3", host.bundle("carol", "carol-3"))
    fresh = numbers(host, "carol-3", "character special file")
    assert not seen & set(fresh)
    assert len(host.inside("carol-3", "tpm2 getrandom --hex 8")) == 16
    assert all(map(dead, ("alice", "carol", "carol-2")))
    # Once they have ended, their numbers are free.
    host.run("for c in alice carol carol-2 carol-3; do runc --root /run/runc delete -f $c; done")
    host.end("carol")
    host.run("holdfast rm carol")
    host.run(f"holdfast create later --devices {kind}")
    host.begin("later", host.bundle("later"))
    assert set(numbers(host, "later", "character special file")) & seen
    host.end("later")
    host.run("holdfast rm later; ! ls /run/hf/run/nodes/*.json")


def test_a_container_in_a_user_namespace_is_refused_nodes_and_given_files(
    host: ContainerHost,
) -> None:
    """runc would bind the host's /dev/tpm0 there: the host's own TPM."""
    mapped = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    linux = {
        "namespaces": [{"type": t} for t in ("pid", "ipc", "uts", "mount", "network", "user")],
        "uidMappings": mapped, "gidMappings": mapped,
    }  # fmt: skip
    for name, devices in (("nodes", "vtpm-proxy"), ("files", "fuse")):
        host.run(f"holdfast create {name} --devices {devices}")
        place = host.bundle(name, linux=linux)
        host.run(f"chown -R 100000:100000 {place}/rootfs && chmod 755 /run/bundles {place}")
        said = host.begin(name, place, check=False)
        if name == "nodes":
            assert "--devices fuse" in said, said
            assert host.state(name)["state"] == "off"
        else:
            assert len(host.inside(name, "tpm2 getrandom --hex 8")) == 16, said
            host.end(name)
        host.run(f"runc --root /run/runc delete -f {name}; holdfast rm {name}", check=False)


def test_evidence_reaches_down_to_a_hardware_tpm_and_its_maker(
    host: ContainerHost, maker: Path, tmp_path: Path
) -> None:
    host.run("holdfast create attested")
    host.begin("attested", host.bundle("attested"))
    host.run(f"holdfast attest attested --nonce {NONCE} --out {RUN}/evidence.json")
    evidence, root = tmp_path / "evidence.json", tmp_path / "site-root.pem"
    evidence.write_bytes(host.read(f"{RUN}/evidence.json"))
    root.write_bytes(host.read(f"{RUN}/out/site-root-ca.pem"))
    log = host.read(IMA_LOG).decode()
    host.end("attested")
    host.run("holdfast rm attested")
    makers = tmp_path / "maker.pem"
    makers.write_bytes(
        b"".join(
            (maker / "ca" / name).read_bytes()
            for name in ("swtpm-localca-rootca-cert.pem", "issuer.pem")
        )
    )
    policy = tmp_path / "policy.toml"
    make = [HOLDFAST, "policy", "create", evidence, "--nonce", NONCE, "--site-root", root,
            "--ek-root", makers, "--out", policy]  # fmt: skip
    done = subprocess.run(make, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    judge = [HOLDFAST, "verify", evidence, "--policy", policy, "--nonce", NONCE, "--json"]
    done = subprocess.run(judge, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    # Not by hardware that another maker made.
    other = policy.with_name("other.toml")
    stranger = tmp_path / "stranger.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", os.devnull, "-out", stranger, "-subj", "/CN=stranger", "-days", "9"],
        check=True, capture_output=True,
    )  # fmt: skip
    make[make.index(makers)], make[make.index(policy)] = stranger, other
    done = subprocess.run(make, capture_output=True, text=True, check=False)
    assert done.returncode != 0, "a policy was learned from evidence that it refuses"
    # What IMA measured in this host until then leads to the PCR 10 that its TPM quoted.
    quoted = decode_pcrs(Evidence.decode(evidence.read_bytes()).host.pcrs)[Alg.SHA256][10]
    value, seen = bytes(32), []
    for pcr, entry in ima.parse_ascii(log):
        assert pcr == 10
        value = hashlib.sha256(value + entry.digest(Alg.SHA256)).digest()
        seen.append(value)
    assert quoted in seen


def serve_a_driver(host: ContainerHost, name: str) -> str:
    """Another TPM of this machine, by holdfast-swtpm: N of its /dev/tpmN."""
    started = host.run(
        f"mkdir -p /run/{name}; setsid holdfast-swtpm chardev --tpm2 --vtpm-proxy --tpmstate "
        f"dir=/run/{name} --pid file=/run/{name}/pid > /run/{name}/out 2>&1 < /dev/null & "
        f"for turn in $(seq 100); do grep -q New /run/{name}/out && break; sleep 0.2; done; "
        f"cat /run/{name}/out"
    )
    found = re.match(r"New TPM device: /dev/tpm(\d+) \(major/minor = \d+/\d+\)", started)
    assert found, started
    for node in (f"tpm{found[1]}", f"tpmrm{found[1]}"):
        host.run(f"for turn in $(seq 50); do [ -c /dev/{node} ] && exit 0; sleep 0.2; done; exit 1")
    return found[1]


def end_driver(host: ContainerHost, name: str) -> None:
    host.run(
        f"kill $(cat /run/{name}/pid); for turn in $(seq 50); do [ -e /run/{name}/pid ] || exit 0; "
        "sleep 0.2; done; exit 1"
    )


def test_a_program_that_serves_a_driver_ends_when_it_is_told_to(host: ContainerHost) -> None:
    number = serve_a_driver(host, "plain")
    for node in (f"tpm{number}", f"tpmrm{number}"):
        assert len(host.run(f"tpm2_getrandom -T device:/dev/{node} --hex 8")) == 16
    end_driver(host, "plain")
    host.run(f"! ls /dev/tpm{number}")
    assert "tpm2-00.permall" in host.run("ls /run/plain")


def test_another_tpm_of_the_machine_is_passed_through(host: ContainerHost) -> None:
    number = serve_a_driver(host, "second")
    refused = host.run("holdfast create x --mode passthrough --tpm /dev/tpm0", check=False)
    assert "is this host's anchor" in refused
    host.run(f"holdfast create passed --mode passthrough --tpm /dev/tpm{number}")
    host.begin("passed", host.bundle("passed"))
    numbers(host, "passed", "character special file")
    host.inside(
        "passed",
        "cd /tmp && tpm2 createprimary -Q -c p && tpm2 nvdefine -Q 0x1500001 -s 4 && "
        "echo -n abcd > v && tpm2 nvwrite -Q 0x1500001 -i v",
    )
    busy = f"python3 -c 'import os; os.open(\"/dev/tpm{number}\", os.O_RDWR)' 2>&1"
    assert "Device or resource busy" in host.run(busy, check=False)
    host.end("passed")
    assert host.run(f"tpm2_nvread -T device:/dev/tpm{number} -s 4 0x1500001") == "abcd"
    assert host.run(f"tpm2_getcap -T device:/dev/tpm{number} handles-transient").strip() == ""
    host.run("holdfast rm passed")
    end_driver(host, "second")
