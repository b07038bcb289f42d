"""Collecting evidence: a deep quote round, from a vTPM's own quote to the host TPM's."""
