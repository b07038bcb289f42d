"""A program that stands where swtpm stands: its options, its sockets, its files, its controls.

It is a plain TPM for virtual machines and tests: unlinked, and trusted by whoever starts it.
"""
