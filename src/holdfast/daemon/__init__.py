"""The daemon: life cycle, policy, API. It sees ciphertext only and never opens the host TPM."""
