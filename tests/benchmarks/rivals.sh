#!/usr/bin/env bash
# A virtual environment for bench_rivals.py: the tools of rivals.txt, and this package, compiled against the same torch.
# Usage: bash tests/benchmarks/rivals.sh FOLDER [--without-awq-ext]
# --without-awq-ext: the libraries that this package imports, but not the package: for a compiled one on PYTHONPATH.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?FOLDER is missing: where to put the environment}

python3 -m venv "$folder"
install() { "$folder/bin/pip" install --quiet --no-compile "$@"; }
# torch by itself first: a resolver that may still choose takes the newest one, a CUDA build of several GB
install torch==2.13.0 numpy
if [ "${2:-}" = --without-awq-ext ]; then
  install greenlet rich safetensors tqdm typer
else
  install "scikit-build-core>=0.11" cmake ninja
  # a build folder of its own: the one in the tree belongs to the environment that the tree is developed in
  install --no-build-isolation -C "build-dir=$folder/build" "$here/../.."
fi

without=()
while read -r tool; do
  # pip says of every package which of the things it requires are missing: nothing is wrong
  install --no-deps "$tool" 2>"$folder/install.log" || { cat "$folder/install.log" >&2; without+=("$tool"); }
done < <(grep -v '^#' "$here/rivals.txt")
[ ${#without[@]} = 0 ] || echo "WITHOUT ${without[*]}: not to be had for this machine; the benchmark runs without" >&2
echo "$folder/bin/python $here/bench_rivals.py"
