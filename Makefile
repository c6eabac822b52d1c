# make demo: the main job, from nothing.   make test: the whole suite, from nothing.   make lib: the native library, in place.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
STAMP = $(VENV)/.installed
OLDEST = build/triton-oldest

.PHONY: demo test test-all sanitize sanitize-ci lib wheel clean kernels-compiled bug-classes mutation cases compatibility own-suites
demo: $(STAMP)
	$(PYTHON) -m fusewire demo

test: $(STAMP)
	$(PYTHON) -m pytest -n 2

test-all: $(STAMP)
	FUSEWIRE_TEST_EFFORT=10 $(PYTHON) -m pytest -n 2 -m "slow or not slow"

# The environment: pinned packages, of which Python compiles what it imports, and this checkout with its library, which is built while the others come.
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile -c constraints.txt torch numpy setuptools wheel cmake ninja
	PATH="$(abspath $(VENV)/bin):$$PATH" $(VENV)/bin/python setup.py -q build_ext --inplace & native=$$!; \
	  FUSEWIRE_NATIVE=0 $(VENV)/bin/python -m pip install -q --no-compile -c constraints.txt --no-build-isolation -e ".[diffusers,report,train,dev]"; \
	  packages=$$?; wait $$native && exit $$packages
	touch $@

# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, at one ISA level: every op on every layout, on tails and empty tensors.
# Building it takes several minutes. What PyTorch itself leaks is not looked at.
ISA ?= $(if $(shell grep -m1 -o avx512bw /proc/cpuinfo),avx512,avx2)
SANITIZERS = address,undefined
SANITIZED = build/sanitize-$(ISA)
sanitize: $(STAMP)
	PATH="$(abspath $(VENV)/bin):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(PYTHON)) \
	  -DFUSEWIRE_SANITIZE=$(SANITIZERS) -DFUSEWIRE_ONLY_ISA=$(ISA) -DFUSEWIRE_LIB_DIR=$(abspath $(SANITIZED))/lib
	PATH="$(abspath $(VENV)/bin):$$PATH" cmake --build $(SANITIZED)
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  FUSEWIRE_LIB=$(SANITIZED)/lib $(PYTHON) -m pytest -n 2 -p no:cacheprovider tests/kernels -k "$(SANITIZED_TESTS)"
SANITIZED_TESTS = (strided or empty or tail or against_float64 or batch_coupling) and not triton and not isa

# The same in a third of the time, for every run of CI: the whole library, without the checks of each access for null and alignment, which take most
# of the compiler's time; every op on every layout and on empty tensors, which reach the tails too.
sanitize-ci:
	$(MAKE) sanitize SANITIZED=build/sanitize-ci SANITIZERS=address,signed-integer-overflow,shift,bounds,integer-divide-by-zero \
	  SANITIZED_TESTS="(strided_input or empty) and not triton and not isa and not cuda"

# What the Triton and the CUDA kernels compile to, without a GPU: by the pinned Triton and by the oldest that pyproject.toml allows (two hours on two
# cores; it can be interrupted, and goes on where it was; nvcc is needed).
kernels-compiled: $(STAMP) $(OLDEST)/.installed
	env -u TRITON_INTERPRET $(PYTHON) -m fusewire.kernels.compiled --keep build/compiled --oldest $(OLDEST) --write docs/kernels-compiled.md
	$(PYTHON) -m fusewire.kernels.compiled_cuda --write docs/kernels-compiled.md

$(OLDEST)/.installed: pyproject.toml | $(STAMP)
	rm -rf $(OLDEST)
	$(PYTHON) -m pip install -q --target $(OLDEST) --no-deps "triton==$(shell sed -n 's/.*"triton>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	touch $@

# Which test looks for which known failure of such kernels, in which op: runs those tests that are new (ARGUMENTS=--again: all of them, ten minutes).
bug-classes: $(STAMP)
	$(PYTHON) -m tests.reached $(ARGUMENTS)
	$(PYTHON) -m tests.bug_classes --write docs/bug-classes.md

# Whether the rooms' tests notice that a source is wrong: one textual edit after another (half an hour on
# two cores). Results that are in the JSON stay: without the file all are run anew; add ARGUMENTS=--again for those that were not killed.
mutation: $(STAMP)
	$(PYTHON) -m tests.mutation --json tests/mutants/results.json --write docs/mutation.md $(ARGUMENTS)

# How many cases of each op the rooms' tests run (ten minutes on two cores).
cases: $(STAMP)
	$(PYTHON) -m tests.cases --write docs/cases.md

lib:
	$(PYTHON) setup.py -q build_ext --inplace

wheel: $(STAMP)
	$(PYTHON) -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist src/fusewire/lib report *.egg-info src/*.egg-info

# The README's table of what goes on working: a cell is a test.
compatibility: $(STAMP)
	$(PYTHON) -m pytest -q -m "slow or not slow" tests/compat --matrix README.md

# The test suites of diffusers and transformers with everything swapped: TESTS is a folder with the tests folder of either, SOURCE says which version
# it is. Two hours on two cores; it can be interrupted, and goes on where it was.
own-suites: $(STAMP)
	$(PYTHON) -m pip install -q parameterized requests-mock torchsde httpx
	$(PYTHON) tests/own_suites.py $(TESTS) --source "$(SOURCE)" --write docs/own-suites.md
