# gdsdirect. `make help` lists the targets. Each sets up what it needs: Debian packages (with sudo where
# you are not root), and a virtual environment in .venv with the package built from this tree.

PYTHON ?= python3
# To build the package | to run the virtual machine
PACKAGES := gcc libc6-dev liburing-dev pkg-config python3 python3-dev python3-venv ca-certificates \
            qemu-system-x86 busybox-static kmod e2fsprogs xfsprogs xz-utils zstd util-linux dpkg
BENCH_PACKAGES := fio

ENVIRONMENT := .venv
RUN := $(ENVIRONMENT)/bin/python -P
SOURCES := pyproject.toml setup.py README.md $(wildcard csrc/*) $(wildcard gdsdirect/*)

.DELETE_ON_ERROR:
.PHONY: help demo test sanitize fuzz bench lint packages clean

help:
	@echo "make demo                      read along every way there is, in a virtual machine, with proof"
	@echo "make demo DEVICE=/dev/ng0n1    the same on a drive of this machine, read-only [PEER=PATH]"
	@echo "make test                      build, install and test the package, here and on three kernels"
	@echo "make sanitize                  the same tests of the ring under ASan and UBSan, and with debug allocators"
	@echo "make fuzz FUZZ_SECONDS=60      random commands against the rules, on /dev/null"
	@echo "make bench                     time and IOPS beside C loops, other packages and fio [ROUNDS=30]"
	@echo "make lint                      ruff, mypy, and the stubs against the installed package"
	@echo "make clean                     remove what was built"
	@echo "PYTHON=… chooses the interpreter."

demo: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/python -m lab.demo $(if $(DEVICE),--device $(DEVICE)) $(if $(PEER),--peer $(PEER))

# In a fresh environment, and with a skip for want of anything but the kernel's own doing a failure.
test: clean $(ENVIRONMENT)/installed
	GDSDIRECT_REQUIRE=lab $(RUN) -m pytest $(PYTEST)

# AddressSanitizer must be the process's first library. Leaks are looked for by tests/test_leaks.py, since
# CPython itself leaves memory at its end.
RING_TESTS := tests/test_stream.py tests/test_memory.py tests/test_alias.py tests/test_nvme_sqe.py tests/test_ask.py \
              tests/test_state_machine.py tests/test_tensor.py tests/test_batches.py tests/test_lane.py \
              tests/test_file.py tests/test_chunks.py
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

ROUNDS ?= 30
bench: PACKAGES += $(BENCH_PACKAGES)
bench: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/pip install --quiet --prefer-binary "gdsdirect[bench] @ file://$$(echo $(CURDIR)/build/wheel/*.whl)"
	$(ENVIRONMENT)/bin/python -m benchmarks --rounds $(ROUNDS)

lint: $(ENVIRONMENT)/installed
	$(ENVIRONMENT)/bin/ruff check .
	$(ENVIRONMENT)/bin/ruff format --check .
	$(ENVIRONMENT)/bin/mypy
	$(RUN) -m mypy.stubtest gdsdirect --ignore-unused-allowlist --allowlist tests/stubtest-allowlist.txt

clean:
	rm -rf $(ENVIRONMENT) .venv-sanitize build *.egg-info

# The wheel, in an environment of its own with the tools that tests need.
$(ENVIRONMENT)/installed: $(SOURCES) | packages
	test -x $(ENVIRONMENT)/bin/pip || $(PYTHON) -m venv $(ENVIRONMENT)
	rm -rf build
	CFLAGS="$(CFLAGS) -Werror" $(ENVIRONMENT)/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(ENVIRONMENT)/bin/pip install --quiet --force-reinstall --no-deps build/wheel/gdsdirect-*.whl
	$(ENVIRONMENT)/bin/pip install --quiet --prefer-binary "gdsdirect[dev] @ file://$$(echo $(CURDIR)/build/wheel/*.whl)"
	-$(ENVIRONMENT)/bin/pip install --quiet --only-binary=:all: uvloop
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
