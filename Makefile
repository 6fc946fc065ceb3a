# make demo    sees FVAE-LoRA work on real images, in a few minutes, without a network beyond the package registry
# make test    runs the tests; what takes minutes, or TRL, sentence-transformers, Lightning, ONNX, trackers, bitsandbytes or torchao, waits for make test-slow
# make check   lint, format and types
# make test-oldest   the method's tests against the oldest supported peft and transformers
# make test-peft     peft's own test-suite, with FVAE-LoRA in LoRA's place
# make bench         what training and inference cost beside LoRA, with targets
# make test-hour     what takes longest: the whole benchmark here and through SLURM, peft's suite of the oldest version
# make docs          builds the site of the docs into site/
# make dist          builds wheel and sdist, checks them, installs the wheel where nothing else is and runs the short demo there
# make release       the same for a new version: puts it into the changelog, commits and tags it (CONTRIBUTING.md)
# Each sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
OLDEST := .venv-oldest
INTEGRATION_TESTS := tests/test_examples.py tests/test_onnx_export.py tests/test_quantised.py tests/test_trl.py \
  tests/test_sentence_transformers.py tests/experiments/test_tracking.py
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo docs test test-slow test-hour check test-oldest test-peft bench dist release setup clean python-is-new-enough

setup: $(VENV)/.ready

demo: setup
	@echo "== demo: FVAE-LoRA, LoRA and a linear probe on handwritten digits (a few minutes; Ctrl-C, then again, resumes)"
	@$(BIN)/fvae-lora demo $(DEMO_FLAGS)

test: setup
	@echo "== tests"
	@$(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

test-slow: $(VENV)/.integrations
	@echo "== the slow tests, and those with other libraries"
	@$(BIN)/python -m pytest -n 2 -m "slow and not hour" $(PYTEST_FLAGS)
	@$(BIN)/python -m pytest -n 2 $(INTEGRATION_TESTS) $(PYTEST_FLAGS)

test-hour: setup $(OLDEST)/.ready
	@echo "== six data sets, every method, two seeds, at a tiny size, on this machine and through SLURM; the longest tests"
	@$(BIN)/python -m pytest -m hour $(PYTEST_FLAGS)
	@$(OLDEST)/bin/python tests/peft_suite/run.py

check: setup
	@echo "== lint, format, types"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

test-oldest: $(OLDEST)/.ready
	@echo "== the method's tests against $$(grep -E '^(peft|transformers)==' constraints-oldest.txt | tr '\n' ' ')"
	@$(OLDEST)/bin/python -m pytest -n 2 $(PYTEST_FLAGS) --ignore tests/experiments --ignore tests/report

test-peft: setup
	@echo "== peft's own tests, with FVAE-LoRA in LoRA's place"
	@$(BIN)/python tests/peft_suite/run.py

bench: setup
	@echo "== cost beside LoRA's: on a quiet machine, some ten minutes; the record is benchmarks/cost.json"
	@$(BIN)/python benchmarks/cost.py --out benchmarks/cost.json $(BENCH_FLAGS)

docs: $(VENV)/.docs
	@echo "== the site, with every link checked"
	@$(BIN)/python docs/site/build.py

dist: $(VENV)/.release
	@echo "== wheel and sdist, in dist: built, checked, installed in an environment of their own, and tried there"
	@$(BIN)/python tools/release.py --dist

release: $(VENV)/.release
	@echo "== release: version and changelog, wheel and sdist, tag; pushing it is left to you"
	@$(BIN)/python tools/release.py $(if $(filter command line,$(origin VERSION)),$(VERSION))

python-is-new-enough:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; Python 3.11 or later is needed" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (Debian: python3-venv)" >&2; exit 2; }

# torch comes first and by its exact version, so that no other package picks a build of its own.
$(VENV)/.ready: pyproject.toml constraints.txt | python-is-new-enough
	@echo "== setting up $(VENV): about a gigabyte and a minute or two, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.integrations: $(VENV)/.ready
	@echo "== adding other libraries to $(VENV), once"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[integrations]'
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	@echo "== adding what builds the site to $(VENV), once"
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(VENV)/.release: $(VENV)/.ready
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[release]'
	@touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt | python-is-new-enough
	@echo "== setting up $(OLDEST), once"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf site $(VENV) $(OLDEST) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
