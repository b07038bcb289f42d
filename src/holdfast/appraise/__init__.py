"""Judge evidence: bytes, policy, challenge and clock in; an `AttestedContainer` out. Pure.

    policy        what is wanted: TOML to frozen values
    verifier      the numbered steps of docs/verification.md
    certificates  step 3 and 4: chains up to the pinned site root, host EK chains
    logs          steps 9 and 10: logs that lead to what was quoted
    reference     step 11: measured values against the policy's
    result        what was established: plain words, EAR claims, JWT
    learn         a policy from a known-good run

Not here: collecting evidence (`attest`), its forms (`evidence`), keys of a verifier's own.
"""
