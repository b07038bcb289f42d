"""Where PCR 0 begins, asked of a TPM: the boots that tpm2_eventlog before 5.6 cannot replay.

tests/unit/test_eventlog_tcg2.py has the same asked of a tpm2_eventlog that can.
"""

from __future__ import annotations

import pytest

from holdfast.engine.libtpms import Engine
from holdfast.eventlog import replay, tcg2
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import HASH_SIZES, Alg, digest
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.structures import PcrSelection

BANKS = (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512)
FIRMWARE = b"a root of trust that measures itself"


def event(pcr: int, event_type: int, data: bytes, hashed: bytes | None = None) -> tcg2.Tcg2Event:
    measured = data if hashed is None else hashed
    return tcg2.Tcg2Event(pcr, event_type, {alg: digest(alg, measured) for alg in BANKS}, data)


def startup_locality(value: int) -> tcg2.Tcg2Event:
    none = {alg: bytes(HASH_SIZES[alg]) for alg in BANKS}
    return tcg2.Tcg2Event(0, tcg2.EV_NO_ACTION, none, b"StartupLocality\0" + bytes((value,)))


def pcrs(engine: Engine, alg: Alg) -> dict[int, bytes]:
    answer = engine.process(rq.pcr_read(PcrSelection.of(alg, range(8))))
    return dict(enumerate(rq.pcr_read_values(answer)[1]))


@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_tpm_that_boots_so_has_the_pcrs_that_its_log_leads_to(engine: Engine, start: int) -> None:
    events = [startup_locality(start)]
    if start == 4:
        events.append(event(0, tcg2.EV_EFI_HCRTM_EVENT, b"HCRTM", FIRMWARE))
    events += [
        event(0, tcg2.EV_S_CRTM_VERSION, b"v\0"),
        event(4, tcg2.EV_EFI_ACTION, b"Calling EFI Application from Boot Option"),
        event(0, tcg2.EV_SEPARATOR, bytes(4)),
    ]
    log = tcg2.parse(tcg2.encode(tcg2.build(events, BANKS)))
    engine.manufacture()
    if start == 4:
        engine.late_launch(FIRMWARE)  # before TPM2_Startup it is the H-CRTM (Part 1, 10.6.2)
    rq.response(Cc.Startup, engine.process(rq.startup(), start if start != 4 else 0))
    for item in log.events[1:]:
        if item.event_type != tcg2.EV_EFI_HCRTM_EVENT:
            extend = rq.pcr_extend(item.pcr, item.digests)
            rq.response(Cc.PCR_Extend, engine.process(extend))
    assert log.startup_locality == start
    predicted = replay.pcr_values(log)
    for alg in (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512):
        assert pcrs(engine, alg) == {pcr: predicted[alg][pcr] for pcr in range(8)}, alg
    starts = {replay.initial(BANKS, other)[Alg.SHA256][0] for other in (0, 3, 4)}
    assert len(starts) == 3  # so that a wrong one would show
