"""What evidence says about itself, for people who look before they believe.

Everything returned is a claim of whoever wrote the bytes: no signature, proof or log is checked.
Not here: judgement (`appraise`), printing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning

from holdfast.errors import DecodeError
from holdfast.eventlog import cel, tcg2
from holdfast.eventlog.records import Record
from holdfast.evidence.bundle import Evidence, Quote
from holdfast.evidence.pcrs import decode_pcrs
from holdfast.evidence.round import Leaf
from holdfast.tpm2.algorithms import HASH_NAMES
from holdfast.tpm2.structures import Attest, Public, QuoteInfo

EVENTS_MAX: Final = 1000  # of one log that are described; the rest are counted
_CERTIFICATES: Final = (
    "root_certificate",
    "host_ak_certificate",
    "host_ek_certificate",
    "ca_certificate",
    "ak_certificate",
    "ek_rsa_certificate",
    "ek_ecc_certificate",
)
_PUBLICS: Final = ("host_ak", "host_ek", "ak", "ek_rsa", "ek_ecc")
_X509_ERRORS: Final = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    CryptographyDeprecationWarning,
)


def describe(evidence: Evidence) -> dict[str, Any]:
    """The untrusted contents as JSON values. A part that does not decode is {"unreadable": why}."""
    companions = evidence.companions
    return {
        "unverified": True,
        "leaf": _part(lambda: _leaf(Leaf.decode(evidence.leaf))),
        "round": {"tree_size": evidence.proof.tree_size, "index": evidence.proof.index},
        "vtpm_quote": _part(lambda: _quote(evidence.vtpm)),
        "host_quote": _part(lambda: _quote(evidence.host)),
        "certificates": {
            name.removesuffix("_certificate"): _part(partial(_certificate, data))
            for name in _CERTIFICATES
            if (data := getattr(companions, name))
        },
        "names": {
            name: _part(partial(_name, data))
            for name in _PUBLICS
            if (data := getattr(companions, name))
        },
        "unlinked": companions.statement.unlinked,
        "notes": list(companions.statement.notes),
        "host_log": _part(lambda: _host_log(companions.host_log)) if companions.host_log else None,
        "container_log": _part(lambda: _container_log(companions.container_log)),
        "sizes": {label: len(value) for label, value in sorted(evidence.members().items())},
    }


def _part(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DecodeError as error:
        return {"unreadable": str(error)}
    except _X509_ERRORS as error:
        return {"unreadable": f"certificate: {error}"}


def _name(data: bytes) -> str:
    return Public.decode(data).name.hex()


def _leaf(leaf: Leaf) -> dict[str, Any]:
    return {
        "version": leaf.version,
        "nonce": leaf.nonce.hex(),
        "audience": leaf.audience,
        "user_data_sha256": leaf.user_data.hex(),
        "instance": str(leaf.instance),
        "ek_name": leaf.ek_name.hex(),
        "ak_name": leaf.ak_name.hex(),
        "host_log_index": leaf.host_log_index,
        "epoch": leaf.epoch,
        "run": leaf.run,
        "clear_count": leaf.clear_count,
        "lineage": leaf.lineage,
    }


def _quote(quote: Quote) -> dict[str, Any]:
    attest = Attest.decode(quote.attest)
    clock = attest.clock_info
    described: dict[str, Any] = {
        "extra_data": attest.extra_data.hex(),
        "firmware_version": f"{attest.firmware_version:016x}",
        "clock": clock.clock,
        "reset_count": clock.reset_count,
        "restart_count": clock.restart_count,
        "safe": clock.safe,
        "pcrs": {
            HASH_NAMES[alg]: {str(pcr): value.hex() for pcr, value in bank.items()}
            for alg, bank in decode_pcrs(quote.pcrs).items()
        },
    }
    if not isinstance(attest.attested, QuoteInfo):
        raise DecodeError("TPMS_ATTEST", "is not a quote")
    described["selection"] = {
        HASH_NAMES[alg]: list(pcrs) for alg, pcrs in attest.attested.selection.banks
    }
    return described


def _certificate(data: bytes) -> dict[str, Any]:
    certificate = x509.load_der_x509_certificate(data)
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "serial": f"{certificate.serial_number:x}",
    }


def _host_log(data: bytes) -> dict[str, Any]:
    log = tcg2.parse(data)
    return {
        "banks": [HASH_NAMES[alg] for alg in log.algorithms],
        "events": [
            {"number": number, "pcr": event.pcr, "type": event.type_name}
            for number, event in enumerate(log.events[:EVENTS_MAX])
        ],
        "count": len(log.events),
    }


def _container_log(data: bytes) -> dict[str, Any]:
    records = cel.decode_json(data)
    return {"events": [_record(record) for record in records[:EVENTS_MAX]], "count": len(records)}


def _record(record: Record) -> dict[str, Any]:
    return {
        "number": record.recnum,
        "pcr": record.pcr,
        "type": record.content_type,
        "content": dict(record.content),
    }
