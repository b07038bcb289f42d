"""IBM's TSS: over the ports of a container's network, as `raw` and as `mssim`, and over the device.

Each program is a process, and what one loads the next one uses by its handle.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.serve import Serve, container

from .conftest import SUFFIX
from .tools import Programs, environment

MESSAGE = b"what is said"
PORTS = {"raw": "swtpm", "mssim": "mssim"}
INDEX = "01500600"
NOT_RUN = {
    "tssntc2getconfig": "a vendor's command of Nuvoton's chips",
    "tssntc2lockconfig": "a vendor's command of Nuvoton's chips",
    "tssntc2preconfig": "a vendor's command of Nuvoton's chips",
    "tsseventextend": "extends PCRs 0-7, the host's: a machine's boot log is its input",
    "tssimaextend": "extends PCR 10, the host's",
}


class Ibm(Programs):
    """IBM's programs, called as in a shell: `tpm("sign -hk 80ff0000 -if message")`."""

    def __init__(self, directory: Path, inside: tuple[str, ...], ran: set[str], **way: str) -> None:
        # Sessions are kept in files, in the clear: else each process would have a key of its own.
        super().__init__(
            directory, environment(TPM_DATA_DIR=str(directory), TPM_ENCRYPT_SESSIONS="0", **way)
        )
        self._inside = inside
        self._ran = ran

    def _command(self, line: str) -> list[str]:
        return [*self._inside, *shlex.split(f"tss{line}")]

    def __call__(self, line: str) -> str:
        """Run it; it must succeed. What it says."""
        output = self.out(*self._command(line))
        self._ran.add(f"tss{line.split(maxsplit=1)[0]}")
        return output.decode()

    def handle(self, line: str) -> str:
        """Run it; the handle that it says it got."""
        words = self(line).lower().split()
        return words[words.index("handle") + 1]

    def refused(self, code: int, line: str) -> None:
        """Run it; the TPM must answer `code`."""
        said = self.fails(*self._command(line))
        assert f"rc {code:08x}" in said, (line, said)
        self._ran.add(f"tss{line.split(maxsplit=1)[0]}")


@pytest.fixture(scope="module")
def reached(host: Serve) -> Iterator[Callable[[str], tuple[tuple[str, ...], dict[str, str]]]]:
    """How a program gets to the vTPM in that way: what is put before it, and its environment."""
    with ExitStack() as stack:
        known: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}

        def of(way: str) -> tuple[tuple[str, ...], dict[str, str]]:
            if way in known:
                return known[way]
            name = f"ibm-{SUFFIX}-{way}"
            ports = {"ports": PORTS[way]} if way in PORTS else {}
            host.create(name, "linked", **ports)
            running = stack.enter_context(container(name))
            if way not in PORTS:
                device = str(host.place(name) / "dev" / way)
                known[way] = (), {"TPM_INTERFACE_TYPE": "dev", "TPM_DEVICE": device}
            else:
                pid = subprocess.run(
                    ["podman", "inspect", "--format", "{{.State.Pid}}", running],
                    capture_output=True, text=True, check=True,
                ).stdout.strip()  # fmt: skip
                known[way] = (
                    ("nsenter", "-t", pid, "-n"),
                    {"TPM_INTERFACE_TYPE": "socsim", "TPM_SERVER_TYPE": way},
                )
            return known[way]

        yield of


WAYS = ("raw", "mssim", "tpm0")
RAN: dict[str, set[str]] = {way: set() for way in WAYS}


@pytest.fixture(params=WAYS)
def tpm(
    request: pytest.FixtureRequest,
    reached: Callable[[str], tuple[tuple[str, ...], dict[str, str]]],
    tmp_path: Path,
) -> Iterator[Ibm]:
    inside, way = reached(request.param)
    made = Ibm(tmp_path, inside, RAN[request.param], **way)
    yield made
    for index in made("getcapability -cap 1 -pr 01500000 -pc 8").split()[2:]:
        if index.startswith("015"):
            made(f"nvundefinespace -hi o -ha {index}")
    for first in ("80000000", "02000000", "03000000"):
        lines = made(f"getcapability -cap 1 -pr {first} -pc 40").split()[2:]
        for handle in lines:
            made(f"flushcontext -ha {handle}")
    assert made("getcapability -cap 1 -pr 80000000").startswith("0 handles")


def storage(tpm: Ibm) -> str:
    return tpm.handle("createprimary -hi o -ecc nistp256 -opu primary.pub")


def key(tpm: Ibm, parent: str, options: str, name: str = "key") -> str:
    pem = "" if "-des" in options or "-kh" in options else f"-opem {name}.pem"
    tpm(f"create -hp {parent} {options} -opu {name}.pub -opr {name}.priv {pem}")
    return tpm.handle(f"load -hp {parent} -ipu {name}.pub -ipr {name}.priv")


def verified(tpm: Ibm, name: str = "key", signature: str = "signature") -> None:
    """OpenSSL verifies it; the signature is a TPMT_SIGNATURE, whose last bytes are RSA's."""
    raw = tpm.read(signature)[-256:]
    tpm.write("raw", raw)
    verify = ("openssl", "dgst", "-sha256", "-verify", f"{name}.pem", "-signature", "raw")
    assert b"Verified OK" in tpm.out(*verify, "message")


def name_of(tpm: Ibm, public: str) -> None:
    """`name`: of the object whose TPM2B_PUBLIC that is."""
    tpm.write("name", b"\0\x0b" + hashlib.sha256(tpm.read(public)[2:]).digest())


# --- keys ----------------------------------------------------------------------------------------


def test_signatures(tpm: Ibm) -> None:
    tpm.write("message", MESSAGE)
    parent = storage(tpm)
    rsa = key(tpm, parent, "-si -rsa")
    tpm(f"sign -hk {rsa} -if message -os signature -ipu key.pub")
    verified(tpm)
    tpm(f"verifysignature -hk {rsa} -if message -is signature")
    tpm("verifysignature -ipem key.pem -if message -is signature")
    tpm.write("other", b"something else")
    tpm.refused(0x2DB, f"verifysignature -hk {rsa} -if other -is signature")
    elliptic = key(tpm, parent, "-si -ecc nistp256", "ecc")
    tpm(f"sign -hk {elliptic} -ecc -if message -os signature")
    tpm(f"verifysignature -hk {elliptic} -ecc -if message -is signature")
    tpm("loadexternal -ipu ecc.pub")
    tpm(f"readpublic -ho {elliptic} -opem shown.pem")
    assert tpm.read("shown.pem") == tpm.read("ecc.pem")


def test_programs_that_do_it_all_in_one_connection(tpm: Ibm) -> None:
    """A session that is salted and bound, and parameters that are encrypted."""
    tpm("signapp -ic text")
    tpm("signapp -ic text -pwsess")
    tpm("writeapp")
    tpm("writeapp -pwsess")
    tpm("createek -alg ec -cp")
    tpm("createek -alg rsa -ce")


def test_encryption(tpm: Ibm) -> None:
    tpm.write("message", MESSAGE)
    parent = storage(tpm)
    rsa = key(tpm, parent, "-den -rsa -pwdk word")
    tpm(f"rsaencrypt -hk {rsa} -id message -oe cipher")
    tpm(f"rsadecrypt -hk {rsa} -pwdk word -ie cipher -od plain")
    assert tpm.read("plain").endswith(MESSAGE)
    tpm.refused(0x9A2, f"rsadecrypt -hk {rsa} -pwdk wrong -ie cipher")
    aes = key(tpm, parent, "-des", "aes")
    for more in ("", "-2"):
        tpm(f"encryptdecrypt -hk {aes} -if message -of cipher {more}")
        assert tpm.read("cipher") != MESSAGE
        tpm(f"encryptdecrypt -hk {aes} -d -if cipher -of plain {more}")
        assert tpm.read("plain") == MESSAGE


def test_hashes_and_hmacs_at_once_and_in_parts(tpm: Ibm) -> None:
    tpm.write("message", MESSAGE)
    tpm.write("rest", b" and more")
    tpm("hash -hi o -if message -oh digest -tk ticket")
    assert tpm.read("digest") == hashlib.sha256(MESSAGE).digest()
    sequence = tpm.handle("hashsequencestart -halg sha256 -pwda word")
    tpm(f"sequenceupdate -hs {sequence} -pwds word -if message")
    tpm(f"sequencecomplete -hs {sequence} -pwds word -if rest -of digest")
    assert tpm.read("digest") == hashlib.sha256(MESSAGE + b" and more").digest()
    parent = storage(tpm)
    hmac = key(tpm, parent, "-kh")
    tpm(f"hmac -hk {hmac} -if message -os one")
    sequence = tpm.handle(f"hmacstart -hk {hmac} -pwda word")
    tpm(f"sequencecomplete -hs {sequence} -pwds word -if message -of two")
    assert tpm.read("one")[-32:] == tpm.read("two")


def test_keys_move_and_change(tpm: Ibm) -> None:
    tpm.write("message", MESSAGE)
    parent = storage(tpm)
    other = tpm.handle("createprimary -hi o -rsa -opu other.pub")
    policy = tpm.handle("startauthsession -se t")
    tpm(f"policycommandcode -ha {policy} -cc 14b")
    tpm(f"policygetdigest -ha {policy} -of policy")
    mine = key(tpm, parent, "-si -rsa -kt nf -kt np -pol policy")
    session = tpm.handle("startauthsession -se p")
    tpm(f"policycommandcode -ha {session} -cc 14b")
    tpm(f"duplicate -ho {mine} -hp {other} -od dup -oss seed -se0 {session} 0")
    tpm(f"import -hp {other} -ipu key.pub -id dup -iss seed -opr moved.priv")
    moved = tpm.handle(f"load -hp {other} -ipu key.pub -ipr moved.priv")
    tpm(f"sign -hk {moved} -if message -os signature")
    verified(tpm)
    name_of(tpm, "key.pub")
    tpm(f"rewrap -ho {other} -hn {parent} -id dup -in name -iss seed -od dup2 -oss seed2")
    tpm(f"import -hp {parent} -ipu key.pub -id dup2 -iss seed2 -opr back.priv")
    back = tpm.handle(f"load -hp {parent} -ipu key.pub -ipr back.priv")
    tpm(f"sign -hk {back} -if message -os signature")
    verified(tpm)
    tpm.out("openssl", "genrsa", "-out", "outside.pem", "2048")
    tpm(f"importpem -hp {parent} -ipem outside.pem -opu out.pub -opr out.priv -pwdk word")
    outside = tpm.handle(f"load -hp {parent} -ipu out.pub -ipr out.priv")
    tpm(f"sign -hk {outside} -pwdk word -if message -os signature")
    tpm(f"objectchangeauth -hp {parent} -ho {outside} -pwdo word -pwdn new -opr changed.priv")
    changed = tpm.handle(f"load -hp {parent} -ipu out.pub -ipr changed.priv")
    tpm(f"sign -hk {changed} -pwdk new -if message -os signature")
    tpm(f"contextsave -ha {changed} -of context")
    tpm(f"flushcontext -ha {changed}")
    again = tpm.handle("contextload -if context")
    tpm(f"sign -hk {again} -pwdk new -if message -os signature")
    tpm(f"evictcontrol -hi o -ho {again} -hp 81000600")
    tpm("sign -hk 81000600 -pwdk new -if message -os signature")
    tpm("evictcontrol -hi o -ho 81000600 -hp 81000600")
    tpm(f"createloaded -hp {parent} -si -ecc nistp256")


def test_credentials(tpm: Ibm) -> None:
    parent = tpm.handle("createprimary -hi e -rsa")
    target = key(tpm, parent, "-sir -ecc nistp256")
    tpm.write("credential", b"sixteen bytes...")
    name_of(tpm, "key.pub")
    tpm(f"makecredential -ha {parent} -icred credential -in name -ocred blob -os secret")
    tpm(f"activatecredential -ha {target} -hk {parent} -icred blob -is secret -ocred opened")
    assert tpm.read("opened") == b"sixteen bytes..."


def test_elliptic_commitments(tpm: Ibm) -> None:
    tpm("eccparameters -cv nistp256 -of parameters")
    assert bytes.fromhex("5ac635d8aa3a93e7b3ebbd55769886bc") in tpm.read("parameters")
    tpm("ecephemeral -ecc nistp256 -oq point")
    parent = storage(tpm)
    daa = key(tpm, parent, "-dau -ecc nistp256")
    tpm(f"commit -hk {daa} -Ef E")
    assert len(tpm.read("E")) > 60


# --- attestation ---------------------------------------------------------------------------------


def test_attestations_are_signed(tpm: Ibm) -> None:
    tpm.write("nonce", b"nonce")
    parent = storage(tpm)
    tpm(
        f"create -hp {parent} -sir -rsa -opu key.pub -opr key.priv -opem key.pem -tk ticket"
        " -ch hash"
    )
    signer = tpm.handle(f"load -hp {parent} -ipu key.pub -ipr key.priv")
    tpm(f"nvdefinespace -ha {INDEX} -hi o -sz 4")
    tpm(f"nvwrite -ha {INDEX} -ic data")
    session = tpm.handle("startauthsession -se h")
    tpm(f"getrandom -by 8 -se0 {session} 81")
    out = "-os signature -oa message -qd nonce"
    for line in (
        f"quote -hk {signer} -hp 0 -hp 13 {out}",
        f"certify -ho {signer} -hk {signer} {out}",
        f"certifycreation -ho {signer} -hk {signer} -tk ticket -ch hash {out}",
        f"gettime -hk {signer} {out}",
        f"nvcertify -ha {INDEX} -hk {signer} -sz 4 -os signature -oa message",
        f"getcommandauditdigest -hk {signer} {out}",
        f"getsessionauditdigest -hs {session} -hk {signer} {out}",
    ):
        tpm(line)
        assert tpm.read("message")[:4] == b"\xffTCG"
        assert (b"\0\5nonce" in tpm.read("message")) == ("-qd" in line)
        verified(tpm)
    tpm(f"nvundefinespace -ha {INDEX} -hi o")


# --- NV ------------------------------------------------------------------------------------------


def test_nv_of_every_kind(tpm: Ibm) -> None:
    def index(options: str) -> None:
        tpm(f"nvdefinespace -ha {INDEX} -hi o {options}")

    def gone() -> None:
        tpm(f"nvundefinespace -ha {INDEX} -hi o")

    tpm.write("data", MESSAGE)
    index(f"-sz {len(MESSAGE)} -pwdn word +at wd +at rst")
    tpm(f"nvwrite -ha {INDEX} -pwdn word -if data")
    tpm(f"nvread -ha {INDEX} -pwdn word -sz {len(MESSAGE)} -of read")
    assert tpm.read("read") == MESSAGE
    tpm.refused(0x9A2, f"nvread -ha {INDEX} -pwdn wrong -sz 4")
    # It asks for the size of a buffer, and then uses a session of another process.
    session = tpm.handle("startauthsession -se h -sym aes")
    tpm(f"nvwrite -ha {INDEX} -pwdn word -if data -se0 {session} 21")
    tpm(f"nvread -ha {INDEX} -pwdn word -sz {len(MESSAGE)} -of read -se0 {session} 1")
    assert tpm.read("read") == MESSAGE
    assert f"data size {len(MESSAGE)}" in tpm(f"nvreadpublic -ha {INDEX}")
    tpm(f"nvwritelock -ha {INDEX} -pwdn word")
    tpm.refused(0x148, f"nvwrite -ha {INDEX} -pwdn word -if data")
    tpm(f"nvreadlock -ha {INDEX} -pwdn word")
    tpm.refused(0x148, f"nvread -ha {INDEX} -pwdn word -sz 4")
    gone()
    index("-ty c")
    tpm(f"nvincrement -ha {INDEX}")
    tpm(f"nvread -ha {INDEX} -sz 8 -of one")
    tpm(f"nvincrement -ha {INDEX}")
    tpm(f"nvread -ha {INDEX} -sz 8 -of two")
    values = [int.from_bytes(tpm.read(name), "big") for name in ("one", "two")]
    assert values[1] == values[0] + 1
    gone()
    index("-ty b")
    tpm(f"nvsetbits -ha {INDEX} -bit 0 -bit 63")
    tpm(f"nvread -ha {INDEX} -sz 8 -of read")
    assert tpm.read("read") == bytes.fromhex("8000000000000001")
    gone()
    index("-ty e")
    tpm(f"nvextend -ha {INDEX} -if data")
    tpm(f"nvread -ha {INDEX} -sz 32 -of read")
    assert tpm.read("read") == hashlib.sha256(bytes(32) + MESSAGE).digest()
    gone()
    index("-sz 4 +at gl")
    tpm(f"nvwrite -ha {INDEX} -ic data")
    tpm("nvglobalwritelock -hia o")
    tpm.refused(0x148, f"nvwrite -ha {INDEX} -ic more")
    gone()


def test_the_password_of_an_index_is_changed_by_its_policy(tpm: Ibm) -> None:
    trial = tpm.handle("startauthsession -se t")
    tpm(f"policycommandcode -ha {trial} -cc 13b")
    tpm(f"policyauthvalue -ha {trial}")
    tpm(f"policygetdigest -ha {trial} -of policy")
    tpm(f"nvdefinespace -ha {INDEX} -hi o -sz 4 -pwdn before -pol policy")
    session = tpm.handle("startauthsession -se p")
    tpm(f"policycommandcode -ha {session} -cc 13b")
    tpm(f"policyauthvalue -ha {session}")
    tpm(f"nvchangeauth -ha {INDEX} -pwdo before -pwdn after -se0 {session} 0")
    tpm(f"nvwrite -ha {INDEX} -pwdn after -ic data")
    tpm(f"nvundefinespace -ha {INDEX} -hi o")


# --- policies ------------------------------------------------------------------------------------


def seal(tpm: Ibm, parent: str, more: str = "-uwa") -> str:
    tpm.write("secret", MESSAGE)
    tpm(
        f"create -hp {parent} -bl -if secret -kt f -kt p -pol policy {more}"
        " -opu sealed.pub -opr sealed.priv"
    )
    return tpm.handle(f"load -hp {parent} -ipu sealed.pub -ipr sealed.priv")


def unseals(tpm: Ibm, parent: str, *steps: str, more: str = "") -> None:
    """Seal under the policy of these steps; unseal by them, and not without."""
    trial = tpm.handle("startauthsession -se t")
    for step in steps:
        tpm(step.format(session=trial))
    tpm(f"policygetdigest -ha {trial} -of policy")
    tpm(f"flushcontext -ha {trial}")
    sealed = seal(tpm, parent, "-uwa -pwdk word")
    session = tpm.handle("startauthsession -se p")
    for step in steps:
        tpm(step.format(session=session))
    tpm(f"unseal -ha {sealed} -pwd word -of opened -se0 {session} 0 {more}")
    assert tpm.read("opened") == MESSAGE
    bare = tpm.handle("startauthsession -se p")
    tpm(f"policycommandcode -ha {bare} -cc 173")
    tpm.refused(0x99D, f"unseal -ha {sealed} -of opened -se0 {bare} 1")
    for handle in (bare, sealed):
        tpm(f"flushcontext -ha {handle}")


def test_policies(tpm: Ibm) -> None:
    parent = storage(tpm)
    tpm(f"nvdefinespace -ha {INDEX} -hi o -sz 4")
    tpm(f"nvwrite -ha {INDEX} -ic data")
    tpm.write("first", bytes(32))
    tpm.write("second", hashlib.sha256(b"x").digest())
    for step in (
        "policypcr -ha {session} -bm 2000",
        "policyauthvalue -ha {session}",
        "policypassword -ha {session}",
        f"policynv -ha {INDEX} -hs {{session}} -ic data -op 0",
        "policysecret -ha 40000001 -hs {session}",
        "policycountertimer -ha {session} -ic ~ -op 5",
        "policyor -ha {session} -if first -if second",
    ):
        unseals(tpm, parent, step)
    tpm(f"nvundefinespace -ha {INDEX} -hi o")


def test_policies_for_one_use(tpm: Ibm) -> None:
    """What no unsealing fits: the digest is what OpenSSL computes, or the restart forgets it."""
    session = tpm.handle("startauthsession -se p")
    tpm(f"policynvwritten -hs {session} -ws y")
    tpm(f"policygetdigest -ha {session} -of digest")
    code, written = (0x18F).to_bytes(4, "big"), b"\1"
    assert tpm.read("digest") == hashlib.sha256(bytes(32) + code + written).digest()
    tpm(f"policyrestart -ha {session}")
    tpm.write("hash", bytes(32))
    tpm(f"policycphash -ha {session} -cp hash")
    tpm(f"policygetdigest -ha {session} -of digest")
    code = (0x16E).to_bytes(4, "big")
    assert tpm.read("digest") == hashlib.sha256(bytes(32) + code + bytes(32)).digest()
    tpm(f"policyrestart -ha {session}")
    tpm(f"policytemplate -ha {session} -te hash")
    tpm(f"policygetdigest -ha {session} -of digest")
    code = (0x190).to_bytes(4, "big")
    assert tpm.read("digest") == hashlib.sha256(bytes(32) + code + bytes(32)).digest()
    # The same by IBM's calculator.
    tpm.write("terms", b"00000190" + b"00" * 32 + b"\n")
    tpm("policymaker -if terms -of made")
    assert tpm.read("made") == tpm.read("digest")
    tpm.write("pcrs", b"00" * 32 + b"\n")
    tpm("policymakerpcr -bm 010000 -if pcrs -of term")
    assert tpm.read("term").startswith(b"0000017f")


def test_signed_and_authorized_policies(tpm: Ibm) -> None:
    parent = storage(tpm)
    tpm.out("openssl", "genrsa", "-out", "signer.pem", "-traditional", "2048")
    tpm.out("openssl", "rsa", "-in", "signer.pem", "-pubout", "-out", "public.pem")
    signer = tpm.handle("loadexternal -ipem public.pem -hi o")
    unseals(tpm, parent, f"policysigned -hk {signer} -ha {{session}} -sk signer.pem")
    session = tpm.handle("startauthsession -se p -on nonce")
    tpm(
        f"policysigned -hk {signer} -ha {session} -sk signer.pem -in nonce -exp -300"
        " -tk ticket -to timeout"
    )
    tpm(f"policyrestart -ha {session}")
    tpm(f"readpublic -ho {signer} -opu signer.pub")
    name_of(tpm, "signer.pub")
    tpm(f"policyticket -ha {session} -to timeout -na name -tk ticket")
    # Authorized afterwards.
    trial = tpm.handle("startauthsession -se t")
    tpm(f"policycommandcode -ha {trial} -cc 15e")
    tpm(f"policygetdigest -ha {trial} -of approved")
    tpm.out("openssl", "dgst", "-sha256", "-sign", "signer.pem", "-out", "raw", "approved")
    tpm(f"verifysignature -hk {signer} -if approved -is raw -raw -tk ticket")
    tpm(f"policyrestart -ha {session}")
    tpm(f"policycommandcode -ha {session} -cc 15e")
    tpm(f"policyauthorize -ha {session} -appr approved -skn name -tk ticket")
    tpm(f"policyrestart -ha {session}")
    tpm.refused(0x1C4, f"policyauthorize -ha {session} -appr approved -skn name -tk ticket")
    tpm(f"nvdefinespace -ha {INDEX} -hi o -sz 34")
    tpm.write("stored", b"\0\x0b" + tpm.read("approved"))
    tpm(f"nvwrite -ha {INDEX} -if stored")
    tpm(f"policycommandcode -ha {session} -cc 15e")
    tpm(f"policyauthorizenv -ha {INDEX} -hs {session}")
    tpm(f"nvundefinespace -ha {INDEX} -hi o")


# --- the TPM -------------------------------------------------------------------------------------


def test_pcrs(tpm: Ibm) -> None:
    for number in (16, 23):
        tpm(f"pcrreset -ha {number}")
        tpm(f"pcrextend -ha {number} -ic text -halg sha256")
        tpm(f"pcrread -ha {number} -halg sha256 -of value")
        padded = b"text".ljust(32, b"\0")
        value = hashlib.sha256(bytes(32) + padded).digest()
        assert tpm.read("value") == value
        # TSS 1045 knows three hashes: it takes no answer of libtpms, which tells of all four.
        tpm.refused(0x95, f"pcrevent -ha {number} -ic event")
        tpm(f"pcrread -ha {number} -halg sha256 -of value")
        event = hashlib.sha256(b"event").digest()
        assert tpm.read("value") == hashlib.sha256(value + event).digest()
        sequence = tpm.handle("hashsequencestart -halg null -pwda word")
        tpm.refused(0x95, f"eventsequencecomplete -ha {number} -hs {sequence} -pwds word")
        tpm(f"pcrreset -ha {number}")
    for number in (0, 10, 15, 17, 22):
        tpm.refused(0x907, f"pcrextend -ha {number} -ic text -halg sha256")
        tpm.refused(0x907, f"pcrevent -ha {number} -ic text")
        tpm.refused(0x907, f"pcrreset -ha {number}")


def test_what_it_is_and_tells(tpm: Ibm) -> None:
    assert len(tpm("getrandom -by 16 -ns").strip()) == 32
    tpm.write("stir", b"stir")
    tpm("stirrandom -if stir")
    assert "TPM_PT_MANUFACTURER" in tpm("getcapability -cap 6 -pr 100")
    before = tpm("readclock")
    assert "resetCount" in before
    tpm.refused(0x100, "startup -c")  # it is done
    tpm("shutdown -c")
    assert "TPM_RC_LOCALITY" in tpm("returncode 907")
    tpm.write("packet", b"80010000000c0000017b0008 ")
    tpm("timepacket -if packet -l 5")
    if tpm.environment.get("TPM_SERVER_TYPE") == "mssim":
        tpm("powerup")  # acknowledged, and nothing happens
        counts = [line for line in tpm("readclock").split("\n") if "Count" in line]
        assert counts == [line for line in before.split("\n") if "Count" in line]


def test_the_owner_s_own(tpm: Ibm) -> None:
    tpm("hierarchychangeauth -hi o -pwdn word")
    tpm.refused(0x9A2, "createprimary -hi o -ecc nistp256")
    tpm("hierarchychangeauth -hi o -pwda word")
    tpm("dictionaryattackparameters -nmt 5 -nrt 100 -lr 100")
    tpm("dictionaryattacklockreset")
    tpm("clockrateadjust -hi o -adj 1")
    tpm("clockrateadjust -hi o -adj -1")
    tpm("clockset -hi o -time 90000000")
    tpm("setprimarypolicy -hi o")


def test_the_platform_is_not_the_container_s(tpm: Ibm) -> None:
    for line in (
        "changeeps", "changepps", "pcrallocate -sha1", "clear -hi p", "clearcontrol -hi p",
        "hierarchycontrol -hi p -he o -state 0", "createprimary -hi p -ecc nistp256",
        "clockset -hi p -time 99999999999", "clockrateadjust -hi p", "setprimarypolicy -hi p",
        f"nvdefinespace -ha {INDEX} -hi p -sz 4",
        "nvundefinespacespecial -ha 01c00002",
    ):  # fmt: skip
        tpm.refused(0x9A2, line)


# --- what is left --------------------------------------------------------------------------------


@pytest.fixture
def managed(
    reached: Callable[[str], tuple[tuple[str, ...], dict[str, str]]], tmp_path: Path
) -> Ibm:
    inside, way = reached("tpmrm0")
    return Ibm(tmp_path, inside, set(), **way)


def test_over_tpmrm0_a_program_keeps_to_itself(managed: Ibm) -> None:
    """As with the kernel's: what a process loaded goes when it closes the device."""
    assert len(managed("getrandom -by 16 -ns").strip()) == 32
    managed("signapp -ic text")
    parent = storage(managed)
    managed.refused(0x910, f"create -hp {parent} -si -ecc nistp256")
    assert managed("getcapability -cap 1 -pr 80000000").startswith("0 handles")


def test_every_program_of_tss2_is_run(request: pytest.FixtureRequest) -> None:
    collected = {item.originalname for item in request.session.items if item.path == Path(__file__)}
    here = {name for name in globals() if name.startswith("test_")}
    if left_out := here - collected:
        pytest.skip(f"not all tests were chosen: {len(left_out)} were left out")
    listed = subprocess.run(["dpkg", "-L", "tss2"], capture_output=True, check=True)
    lines = listed.stdout.decode().split("\n")
    there = {Path(line).name for line in lines if line.startswith("/usr/bin/")}
    assert len(there) > 100
    assert set(NOT_RUN) <= there
    for way in WAYS:
        expected = there - set(NOT_RUN) - (set() if way == "mssim" else {"tsspowerup"})
        assert (way, sorted(expected - RAN[way])) == (way, [])
