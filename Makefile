# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, once.
# `make test-all` runs the slow tests, too. `make test-serving` runs the tests on all servers, each in an environment
# of its own. `make docs` builds the documentation as a site, `make docs-check` runs every block of code in it, and
# `make pictures` draws its pictures.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

TRITON := .venv-triton
MLSERVER := .venv-mlserver
KSERVE := .venv-kserve
RAY := .venv-ray
OLDEST := .venv-oldest

# Two processes, which hand each other the tests that are left at the end.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-all test-oldest test-serving test-ray lint docs docs-check pictures triton mlserver kserve clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m "not servers"

test-serving: $(INSTALLED) triton mlserver kserve test-ray
	$(BIN)/python -m pytest -m "servers or not servers" tests/serving

# Ray Serve and Ray Data, on a cluster of two nodes on this machine. Each file in a process of its own: where Ray
# fails a check of its own it ends the process. Ray warns of itself: -W default.
test-ray: $(RAY)/.installed
	status=0; for file in tests/serving/test_ray_*.py; do \
	    $(RAY)/bin/python -m pytest $$file -W default --show-capture=no || status=1; \
	done; exit $$status

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/site/index.html"

docs-check: $(INSTALLED)
	$(PYTEST) -m "slow or not slow" tests/docs

pictures: $(INSTALLED)
	for script in docs/pictures/draw_*.py; do $(BIN)/python $$script || exit 1; done

# The lower bounds of pyproject.toml, with the oldest Python: PYTHON=python3.10 make test-oldest. 7 GB of disk, as there
# is no CPU build of this torch on the package index. Old packages warn: -W default.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -W default tests/test_transform.py tests/test_cli.py tests/loading/test_loading.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pn_compiler
	$(BIN)/lint-imports

# torchvision and timm have no CPU builds of their own dependencies: they are installed without them.
$(INSTALLED): pyproject.toml constraints.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-models.txt
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(RAY)/.installed: pyproject.toml constraints.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[images,ray]' pytest pytest-timeout
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[images,plot,private,safetensors]' \
	    huggingface_hub hypothesis pytest pytest-timeout safetensors scikit-learn scipy tqdm
	$(OLDEST)/bin/python -m pip install --quiet --no-deps torchvision==0.24.0 timm==1.0.31
	touch $@

triton: $(TRITON)/.installed
mlserver: $(MLSERVER)/.installed
kserve: $(KSERVE)/.installed

# A server in an environment of its own, from the file of its name in tests/serving/.
.venv-%/.installed: tests/serving/requirements-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf $(VENV) $(TRITON) $(MLSERVER) $(KSERVE) $(RAY) $(OLDEST) build dist demo_output model_repository .pytest_cache .mypy_cache .ruff_cache *.egg-info
