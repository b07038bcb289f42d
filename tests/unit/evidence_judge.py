"""A site with two hosts and two vTPMs, and how tests have evidence of them judged."""

from __future__ import annotations

import datetime
from typing import Any
from uuid import UUID

import pytest

from holdfast.appraise.learn import learn_policy
from holdfast.appraise.result import AttestedContainer
from holdfast.appraise.verifier import STEPS, appraise
from holdfast.errors import AppraisalError
from holdfast.evidence.bundle import Evidence
from tests.unit.evidence_maker import (
    AUDIENCE,
    NONCE,
    NOW,
    USER_DATA,
    Given,
    Host,
    Site,
    Vtpm,
    make,
    policy_for,
)

SITE = Site()
HOST = Host(SITE)
WEB = Vtpm(HOST)
POLICY = policy_for(HOST)
OTHER_HOST = Host(SITE, "host-2")
DB = Vtpm(HOST, "db", UUID("1f0e6f1e-8c3a-4a53-9f0e-6f1e8c3a4a53"), rsa=1)
DAY = datetime.timedelta(days=1)


def judge(evidence: Evidence | Given, policy: Any = POLICY, **arguments: Any) -> AttestedContainer:
    data = (make(evidence) if isinstance(evidence, Given) else evidence).encode_json()
    given = {
        "nonce": NONCE, "audience": AUDIENCE, "user_data": USER_DATA, "now": NOW, **arguments,
    }  # fmt: skip
    return appraise(data, policy, **given)


def refused(
    step: str, why: str, evidence: Evidence | Given, policy: Any = POLICY, **args: Any
) -> None:
    """Assert that the appraisal ends at `step`, with `why` in its reason."""
    assert step in dict(STEPS)
    with pytest.raises(AppraisalError) as caught:
        judge(evidence, policy, **args)
    assert caught.value.step == step, str(caught.value)
    assert why in caught.value.why, str(caught.value)


def learned(vtpm: Vtpm, **given: Any) -> str:
    data = make(Given(vtpm, **given)).encode_cbor()
    trust = policy_for(vtpm.host).trust
    return learn_policy(data, trust, NONCE, AUDIENCE, USER_DATA, NOW)
