"""The keeper: the one process that holds the root key and speaks to the host's TPM."""
