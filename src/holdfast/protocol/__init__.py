"""The dialects our processes and their clients speak, as values and bytes. No I/O."""
