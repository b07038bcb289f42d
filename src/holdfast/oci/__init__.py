"""The faces of container runtimes: hook state, CDI specifications, bundles.

Duty: speak the OCI runtime specification and the Container Device Interface. Not here: what a
start means (`instance`, reached through `client`), or measuring a bundle (`measure`).
"""
