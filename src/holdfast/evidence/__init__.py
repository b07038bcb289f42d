"""Evidence about one vTPM: the deep-quote round, and the collection it travels in. Pure.

    dcbor     deterministic CBOR: one encoding for each value
    pcrs      PCR values and the ledger digest as bytes
    round     qualifying data, leaves, Merkle tree, what the host TPM signs (DESIGN 6)
    bundle    `Evidence`: one CMW collection in JSON or CBOR
    describe  what untrusted evidence says about itself

Everything here is a claim: bytes that have the right form. Not here: collecting it (`attest`), and
judging it (`appraise`, which alone can make an `Attested…` value of it).
"""

from __future__ import annotations

from typing import Final

# Extension of a host AK's certificate: OCTET STRING with the Name of the host EK for which the AK's
# credential was activated. The issuer puts it there; without it no EK certificate says anything
# about this AK's TPM. (ITU-T X.667: an arc of our own, from a random UUID.)
OID_ACTIVATED_EK: Final = "2.25.313474860978635988100217944922830782818"
# In an issuing CA's certificate: the Name of the AK of the host it is of, as an OCTET STRING.
OID_HOST_AK: Final = "2.25.52907855989375833159590951243373929653"
