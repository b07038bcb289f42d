"""Evidence about one vTPM: the deep-quote round, and the collection it travels in. Pure.

    dcbor     deterministic CBOR: one encoding for each value
    pcrs      PCR values and the ledger digest as bytes
    round     qualifying data, leaves, Merkle tree, what the host TPM signs
    bundle    `Evidence`: one CMW collection in JSON or CBOR
    oids      what certificates in it are marked with

Everything here is a claim: bytes that have the right form. Not here: collecting it (`attest`), and
judging it (`appraise`, which alone can make an `Attested…` value of it).
"""
