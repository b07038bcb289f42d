"""Event logs: records, their encodings, and what PCR values they lead to. Pure."""
