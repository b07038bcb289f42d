# Every target sets up what it needs first (scripts/setup: Debian packages, virtual environment).
# These run side by side, each list in one process and in this order: engine before whatever else has
# a TPM in its process, swtpm_setup and podman in one process each. Of tests/system, those that have
# a whole Holdfast of their own run beside the rest.
BESIDE_A = tests/cli tests/engine tests/hwtpm tests/keeper tests/swtpm
BESIDE_B = tests/clients tests/differential tests/unit
HOSTS = steps sleep_steps sleep_host recover_commands rekey rekey_recovery copied disk_faults \
	host_tpm_faults wear power_cut doctor clone metrics
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
	.venv/bin/python scripts/beside "$(BESIDE_A)" "$(BESIDE_B)"
	.venv/bin/python scripts/beside "tests/system $(HOSTS:%=--ignore=tests/system/test_%.py)" \
		"$(HOSTS:%=tests/system/test_%.py)"

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
	.venv/bin/python scripts/beside "-rs lab/test_host.py" "-rs lab/test_newer_libtpms.py lab/test_vm.py"

soak: setup
	HOLDFAST_SOAK=1 .venv/bin/python -m pytest -q tests/system/test_faults.py tests/system/test_frames.py \
		tests/system/test_steps.py tests/system/test_sleep_steps.py tests/system/test_histories.py \
		tests/differential/test_generated.py

clean:
	rm -rf .venv build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
