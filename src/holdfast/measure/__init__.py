"""Turn a container's bundle into measured facts, and facts into the contents of events.

Duty: read layers, mount tables and configurations, strictly and bounded, and say what they are in
values that can be predicted offline. Not here: extending PCRs (`instance`), encoding events
(`eventlog`), judging facts (`appraise`), talking to a runtime (`oci`).
Rules: file I/O and nothing else; a symbolic link inside a measured tree is never followed; what
changes while it is read raises. `docs/measuring.md` is the format's specification.
"""
