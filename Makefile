# Every target sets up what it needs first (scripts/setup: Debian packages, virtual environment).
.PHONY: help setup demo test lint bench lab soak clean

help:
	@echo "make demo    two containers with a TPM each, attested, then tampered with and refused"
	@echo "make test    the tests"
	@echo "make lint    ruff, mypy, the import contract"
	@echo "make bench   the figures, against Debian's swtpm"
	@echo "make lab     what needs another kernel, in QEMU: virtual machines with a TPM of ours"
	@echo "make soak    longer fault and fuzz runs"

setup:
	@scripts/setup

demo: setup
	@scripts/demo

test:
	@scripts/setup tests
	.venv/bin/python -m pytest -q

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p holdfast
	.venv/bin/lint-imports

bench: setup
	bench/run --all

lab: setup
	@scripts/setup-lab
	@scripts/setup-lab-sid
	.venv/bin/python -m pytest -q -rs lab

soak: setup
	HOLDFAST_SOAK=1 .venv/bin/python -m pytest -q tests/system/test_faults.py tests/system/test_frames.py \
		tests/differential/test_generated.py

clean:
	rm -rf .venv build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
