"""The host's TPM, through tpm2-pytss. Only the keeper comes here."""
