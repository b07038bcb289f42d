"""Holdfast: a TPM 2.0 of its own for every Linux container, held fast to the host's TPM."""

__version__ = "0.1.0"
