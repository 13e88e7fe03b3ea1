# Every target works on a fresh machine: python3 >= 3.10 with venv and headers, make, a C++ compiler.
# VENV=path uses (or creates) another environment; an existing one keeps the torch it has.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.14.1
TORCHVISION ?= torchvision==0.29.1
# One GPU architecture with PTX is what the tests need (the simulator runs the PTX); releases build RELEASE_ARCHS of setup.py.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX

PY := $(VENV)/bin/python
STAMP := $(VENV)/.dl4ds_kernels-setup
PYTEST := $(PY) -m pytest
# Tests run in this many processes; each keeps about one core busy and takes up to 4 GiB.
TEST_JOBS ?= 2

.PHONY: help setup build demo test test-fast test-full test-asan sim gates bench lint format docs tour dist clean
help:           ## this list
	@grep -E '^[a-z-]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/: *[^#]*##/:/' | awk -F': *' '{printf "  make %-10s %s\n", $$1, $$2}'

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml requirements-build.txt | $(PY)
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "python >= 3.10 is needed"; exit 1; }
	@$(PY) -c "import torch, torchvision" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)" "$(TORCHVISION)"
	$(PY) -m pip install -q -r requirements-build.txt
	@if $(PY) -c "import sys, torch; sys.exit(torch.version.cuda is None)"; then \
	    $(PY) -m pip install -q "cuda-toolkit[nvcc,cccl]==$$($(PY) -c 'import torch; print(torch.version.cuda)').*"; fi
	@# Headers of CUTLASS for the build, later a trained face cascade for NMS: without what they depend on.
	-$(PY) -m pip install -q --no-deps nvidia-cutlass==4.2.0.0
	$(PY) -m pip install -q --no-build-isolation -e ".[test]"
	-$(PY) -m pip install -q --no-deps facenet-pytorch==2.6.0
	@touch $@

build: $(STAMP) ## compile what changed (seconds when nothing did)
	@$(PY) setup.py -q build_ext --inplace

setup: build    ## environment and build, shared by every other target

demo: build     ## the main job: a stock ResNet-50 on a real photograph, optimized, checked, timed, reported
	$(PY) -m dl4ds_kernels demo --html demo_report.html

test: build     ## the test suite
	$(PYTEST) -m "not full" -n $(TEST_JOBS) --dist worksteal

test-fast: build ## the inner loop, under 3 minutes
	$(PYTEST) -m "not full and not slow" -n $(TEST_JOBS) --dist worksteal -x

test-full: build ## everything, long runs included (hours): bench/results/test-full.md
	@$(PYTEST) --junitxml=build/test-full.xml; code=$$?; \
	$(PY) tools/test_summary.py build/test-full.xml --title "make test-full" --out bench/results/test-full.md; exit $$code

test-asan: build ## the CPU kernels under AddressSanitizer and UBSan: bench/results/test-asan.md
	$(PY) -m tests.sanitize --report bench/results/test-asan.md

sim: build      ## every GPU kernel of one op on the PTX simulator: make sim OP=add_act
	$(PYTEST) tests/test_cuda_kernels.py tests/ptxsim/test_gates.py -m "not full" -k "$(OP)"

gates: build    ## docs/kernel-gates.md: every GPU kernel and its gates, on the PTX simulator
	$(PY) -m tests.ptxsim gates --docs docs/kernel-gates.md

bench: build    ## regenerate bench/results and the README figures
	$(PY) bench/run.py

docs: build     ## the documentation site in build/site: strict, no network while building
	@$(PY) -c "import mkdocs, material, mkdocstrings, nbclient" 2>/dev/null || $(PY) -m pip install -q -e ".[docs]" --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

tour: build     ## execute the notebooks of the documentation again
	$(PY) docs/tour/make.py

dist: $(STAMP)  ## sdist and wheel for every release architecture, built twice and compared, SBOM and SHA256SUMS in dist/
	@$(PY) -c "import cyclonedx" 2>/dev/null || $(PY) -m pip install -q "cyclonedx-python-lib>=8"
	$(if $(filter file,$(origin TORCH_CUDA_ARCH_LIST)),env -u TORCH_CUDA_ARCH_LIST) $(PY) tools/dist.py --twice

lint: $(STAMP)  ## ruff and clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP) ## apply ruff and clang-format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' | xargs -r $(VENV)/bin/clang-format -i

clean:          ## remove build products (the environment stays)
	rm -rf build dist dl4ds_kernels/*.so dl4ds_kernels/_build_info.json *.egg-info
