#!/usr/bin/env bash
# Virtual environments of the tools that read and write checkpoints like ours, one each, from requirements/*.txt.
# Usage: bash tests/counterparts/environments.sh FOLDER [NAME ...]     then: AWQ_EXT_COUNTERPARTS=FOLDER pytest tests/counterparts
# An environment that is there already, made from the same requirements, stays as it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?FOLDER is missing: where to put the environments}
shift
mkdir -p "$folder"
[ $# -gt 0 ] || set -- $(cd "$here/requirements" && ls | sed 's/\.txt$//')

make_one() {
  local requirements=$here/requirements/$1.txt environment=$folder/$1 torch unwanted caching=
  cmp -s "$requirements" "$environment/made-from.txt" && return
  rm -rf "$environment"
  python3 -m venv "$environment"
  # torch by itself first: a resolver that may still choose takes the newest one, a CUDA build of several GB
  # not compiled: of tens of thousands of files few are ever imported, and those Python compiles then
  torch=$(sed -n '/^torch==/p' "$requirements")
  [ -z "$torch" ] || "$environment/bin/pip" install --quiet --no-compile "$torch"
  # pip 23 takes a wheel that it once built for one that was built with other settings
  ! grep -q -e --config-settings "$requirements" || caching=--no-cache-dir
  "$environment/bin/pip" install --quiet --no-compile $caching -r "$requirements"
  unwanted=$(sed -n 's/^# afterwards without: \([^(]*\).*/\1/p' "$requirements")
  # shellcheck disable=SC2086
  [ -z "$unwanted" ] || "$environment/bin/pip" uninstall --quiet --yes $unwanted
  cp "$requirements" "$environment/made-from.txt"
}

for name in "$@"; do
  # in the background: on the left of || bash would go on after a failed pip
  make_one "$name" >"$folder/$name.log" 2>&1 &
  wait "$!" || { tail -n 30 "$folder/$name.log" >&2; echo "the environment $name could not be made" >&2; exit 1; }
  echo "$name"
done
