"""TPM 2.0 vocabulary: structures, commands and names as values. Pure: bytes in, bytes out."""
