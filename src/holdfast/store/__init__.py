"""State at rest: sealed by the worker, kept by the daemon. Ciphertext only."""
