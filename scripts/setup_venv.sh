#!/usr/bin/env bash
# Makes a virtual environment with everything moe_kernels needs, or says what is missing and how to get it.
#   scripts/setup_venv.sh FOLDER TORCH_REQUIREMENT [PACKAGE...]
set -euo pipefail

venv=$1 torch=$2
shift 2

missing() {
  printf '\nmoe_kernels: %s\n' "$1" >&2
  exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || missing "no $python; install Python 3.10 or later, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  missing "Python 3.10 or later is needed, $python is $("$python" --version 2>&1); set PYTHON to a later one"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  missing "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  missing "the headers of $python are missing; on Debian and Ubuntu: apt-get install python3-dev"

compiler=${CXX:-g++}
command -v "$compiler" >/dev/null ||
  missing "no C++ compiler ($compiler); on Debian and Ubuntu: apt-get install g++, or set CXX"
echo 'template <class T> concept C = true; template <C T> int f(T) { return [] <int N>() { return N; }.template operator()<0>(); } int main() { return f(1); }' |
  "$compiler" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
  missing "$compiler does not compile C++20; g++ 11 or later is needed: set CXX"

free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kb" -gt 8000000 ] || [ -e "$venv/ready" ] ||
  missing "8 GB of free disk are needed for PyTorch and the tools, $((free_kb / 1000000)) GB are free here"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2>"$venv/pip.log" && return
  grep -v '^WARNING' "$venv/pip.log" | tail -n 15 >&2
  missing "pip could not install $*; is the network (or the package index) reachable? The whole log is in $venv/pip.log"
}

echo "moe_kernels: installing $torch and tools into $venv (minutes, the first time)"
install "$torch" numpy
install "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" ninja pytest pytest-xdist hypothesis expecttest "$@"
touch "$venv/ready"
