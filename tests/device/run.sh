#!/usr/bin/env bash
# On a machine with a GPU: builds against the torch there, checks the CUDA kernels on the GPU, times them, and writes one JSON file.
# Takes about four minutes on 16 cores, at most seven. Needs python with torch (built with CUDA) and awq_ext's dependencies (numpy, tqdm,
# safetensors, greenlet, rich, typer), cmake, ninja or make, g++ and nvcc; the source tree is left as it is.
#
#   bash tests/device/run.sh [OUT.json]            default: device.json
#   bash tests/device/run.sh --check [OUT.json]    without a GPU: says what is there, and runs the checks and the benchmark on the
#                                                  emulated GPU, at tiny sizes, with the awq_ext that python finds
#   bash tests/device/run.sh --build [90a]         without a GPU: builds for an architecture, and imports what was built
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
root=$PWD

check="" only=""
case "${1:-}" in
  --check) check=yes; shift ;;
  --build) only=${2:-90a}; shift $(($# > 1 ? 2 : 1)) ;;
esac
out=$(realpath -m "${1:-device.json}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$SECONDS
step() { printf '\n== %s (%d s) ==\n' "$*" "$((SECONDS - started))"; }
stop() { echo "run.sh: $*" >&2; exit 1; }

for package in numpy tqdm safetensors greenlet rich typer; do
  "$python" -c "import $package" || stop "$python has no $package, which awq_ext needs"
done
step "what is here"
for tool in "$python" cmake g++ nvcc nvidia-smi; do
  printf '%-12s %s\n' "$tool" "$(command -v "$tool" || echo missing)"
done
"$python" - <<'PYTHON' || stop "python cannot import torch"
import torch
print("torch       ", torch.__version__, "CUDA", torch.version.cuda)
if torch.cuda.is_available():
    print("GPU         ", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
else:
    print("GPU          none")
PYTHON

emulated=()
if [ -n "$check" ]; then
  emulated=(--emulated)
  export PYTHONPATH="$PWD/tests:$PWD/tests/device${PYTHONPATH:+:$PYTHONPATH}"
  cd "$work" || exit 1 # so that a source tree without a build does not stand before the awq_ext that is installed
else
  [ -n "$only" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || stop "torch sees no GPU: try --check"
  command -v nvcc >/dev/null || stop "nvcc is not on the path"
  command -v cmake >/dev/null || stop "cmake is not on the path: pip install cmake ninja"
  step "build"
  # sm_90 and newer have instructions that only their own code may use: the letter a
  architecture=$only-real
  [ -n "$only" ] || architecture=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9) + "-real")')
  generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  cmake -S . -B "$work/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" \
    -DAWQ_EXT_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" >"$work/log" 2>&1 &&
    cmake --build "$work/build" --target _C --parallel "$(nproc)" >>"$work/log" 2>&1 &&
    cmake --install "$work/build" --prefix "$work/site" >>"$work/log" 2>&1 || { tail -40 "$work/log" >&2; stop "the build failed"; }
  # a copy of the package beside what was built, with the name and version that it looks up
  cp -r awq_ext/. "$work/site/awq_ext.new" && rm -f "$work"/site/awq_ext.new/*.so "$work/site/awq_ext.new/_build.py"
  cp -r "$work/site/awq_ext/." "$work/site/awq_ext.new/" && rm -r "$work/site/awq_ext" && mv "$work/site/awq_ext.new" "$work/site/awq_ext"
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
  mkdir -p "$work/site/awq_ext-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: awq-ext\nVersion: %s\n' "$version" >"$work/site/awq_ext-$version.dist-info/METADATA"
  export PYTHONPATH="$work/site:$PWD/tests:$PWD/tests/device${PYTHONPATH:+:$PYTHONPATH}"
  cd "$work" || exit 1 # so that the source tree does not stand before what was built
  "$python" -c 'import awq_ext, sys; from awq_ext.kernels.cuda.library import FILE, Library; print(Library(FILE).file)' ||
    stop "what was built cannot be imported"
  [ -z "$only" ] || exit 0
  "$python" -c 'from awq_ext.kernels.cuda import found, state; import sys; print(state()); sys.exit(found() is None)' ||
    stop "the library that was built cannot be used"
fi

failed=0
step "packages that rivals need, where they are missing"
for package in transformers vllm; do
  "$python" -c "import $package" 2>/dev/null || echo "$package is missing: what needs it is left out"
done
step "checks"
timeout 120 "$python" "$root/tests/device/checks.py" "${emulated[@]}" --json "$work/checks.json" || failed=1
step "benchmark"
left=$((180 - SECONDS + started))
[ "$left" -gt 30 ] || left=30
timeout "$((left + 60))" "$python" "$root/tests/device/bench.py" "${emulated[@]}" --seconds "$left" --json "$work/bench.json" || failed=1
step "whole models"
timeout 150 "$python" "$root/tests/device/whole_models.py" "${emulated[@]}" --json "$work/models.json" || failed=1

step "results"
"$python" - "$work" "$out" "$((SECONDS - started))" "$failed" <<'PYTHON' || failed=1
import json, sys
from pathlib import Path
work, out, seconds, failed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] != "0"
read = lambda name: json.loads((work / name).read_text()) if (work / name).exists() else None
result = {"checks": read("checks.json"), "benchmark": read("bench.json"), "models": read("models.json"), "seconds": seconds, "failed": failed}
out.write_text(json.dumps(result, indent=2) + "\n")
print("wrote", out)
PYTHON
exit "$failed"
