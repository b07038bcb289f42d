"""Event logs: records, their encodings, the PCR values they lead to. Pure: bytes in, values out.

    tcg2     the host firmware's binary log: read, written, and what of it may be believed
    records  our own records (TCG CEL) and how their digests follow from their content
    ima      what was executed, as IMA templates
    cel      records as JSON, JSON text sequence and TLV
    replay   PCR values

A log proves nothing by itself: it must lead to PCR values that a TPM has signed.
"""
