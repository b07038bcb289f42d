"""A program that stands where swtpm_setup stands: it makes a TPM's state, as its maker would."""
