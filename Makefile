# Two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

RAY := .venv-ray

.PHONY: demo test test-ray lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits.py

test: lint
	$(BIN)/python -m pytest

# Ray Serve and Ray Data, on a cluster of two nodes on this machine. Ray warns of itself: -W default.
test-ray: $(RAY)/.installed
	$(RAY)/bin/python -m pytest tests/serving/test_ray_*.py -W default --show-capture=no

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

$(RAY)/.installed: pyproject.toml constraints.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[images,ray]' pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(RAY) build dist demo_output .pytest_cache .mypy_cache .ruff_cache *.egg-info
