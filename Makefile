# make demo   generated data, a dense b0, pruned by half, fine-tuned: one closing table, and report.html to look at
# make test   all that CI runs: format, lint, types, tests, the wheel
# make test-cuda   the tests that need a GPU, with this machine's own PyTorch: PYTHON names its interpreter, nothing is
#                  downloaded, and what it lacks (torch-pruning, say) comes from wheels: make test-cuda WHEELS=folder
# The first two set up .venv by themselves. Another Python: make demo PYTHON=python3.12
# Options for pip, for example an index with CPU builds of torch: make demo PIP_ARGS="--extra-index-url URL"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
DEMO := demo
WHEEL := build/wheel
WHEELS ?=
CARRIED := build/carried

.PHONY: demo test check-types-and-wheel run-tests test-cuda format clean

# Without --no-compile pip translates all of torch and its like to byte code, of which most is never imported.
$(VENV)/run.stamp: requirements_pruning.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed and this is {v}; name one, as in: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile --disable-pip-version-check $(PIP_ARGS) -r requirements_pruning.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements_dev.txt
	$(PY) -m pip install -q --no-compile --disable-pip-version-check $(PIP_ARGS) -r requirements_dev.txt
	@touch $@

demo: $(VENV)/run.stamp
	$(PY) -m segprune shapes $(DEMO)/shapes --num_train 2000 --num_val 160
	$(PY) train.py --data $(DEMO)/shapes --phi b0 --num_classes 8 --input_shape 128 128 \
	    --epochs 4 --scale 0.75 1.5 --drop_path 0 --save_dir $(DEMO)/logs
	$(PY) prune_train.py --model_path $(DEMO)/logs/best_epoch_weights.pth --pruning_rate 0.5 --input_shape 128 128 \
	    --data $(DEMO)/shapes --epochs 1 --save_dir $(DEMO)/logs_pruning

test: export OMP_NUM_THREADS = 1
test: $(VENV)/test.stamp
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@$(MAKE) --no-print-directory -j 2 check-types-and-wheel run-tests

# One process each, so they share two cores with the tests, which come first where they compete.
check-types-and-wheel: export OMP_NUM_THREADS = 1
check-types-and-wheel:
	nice $(PY) -m mypy
	rm -rf build dist
	nice $(PY) -m build --wheel --no-isolation > /dev/null
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(WHEEL) dist/segprune-*.whl
	cd / && PYTHONPATH=$(CURDIR)/$(WHEEL) nice $(CURDIR)/$(PY) $(CURDIR)/tests/smoke_wheel.py $(CURDIR)/$(WHEEL)

# In the files' own order: by the number of their tests, the few that take minutes would be the last, on one core.
run-tests: export OMP_NUM_THREADS = 1
run-tests:
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-cuda: export OMP_NUM_THREADS = 4
test-cuda:
	rm -rf $(CARRIED) && mkdir -p $(CARRIED)
	@wheels=$$($(PYTHON) tests/cuda/missing.py "$(WHEELS)") && test -z "$$wheels" \
	    || $(PYTHON) -m pip install -q --no-index --no-deps --target $(CARRIED) $$wheels
	PYTHONPATH=$(CURDIR)/$(CARRIED):$$PYTHONPATH $(PYTHON) -m pytest -m cuda -p no:cacheprovider --durations 10 tests/cuda

format:
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
