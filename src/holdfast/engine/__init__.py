"""libtpms: one TPM per process, restored, driven and dumped. Only worker and spawner come here."""
