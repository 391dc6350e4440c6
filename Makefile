# Words: demo test test-all check bench docs build gpu. Each sets up what it needs, once, in .venv (tools/dev.py says how).
# MEMKERNELS_PYTHON=/path/to/python uses that interpreter and its packages as they are: no .venv, no pip.
PYTHON ?= python3

.PHONY: demo test test-all check bench docs build gpu clean
demo test test-all check bench docs build:
	@$(PYTHON) tools/dev.py $@ $(ARGS)

gpu:
	@MEMKERNELS_PYTHON="$${MEMKERNELS_PYTHON:-$(PYTHON)}" $(PYTHON) tools/dev.py gpu --results "$(or $(RESULTS),gpu-results)" $(ARGS)

clean:
	rm -rf build .venv *.egg-info memkernels/*.so memkernels/_build_info.json
