#!/usr/bin/env bash
# Fail when the committed wire code is not what proto/*.proto gives.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/generate_proto.sh "$fresh"
touch "$fresh/offramp_common/wire/__init__.py"
if ! diff -r -x __pycache__ "$fresh/offramp_common/wire" common/offramp_common/wire; then
  echo "common/offramp_common/wire is not what proto/*.proto gives: run \`make proto\` and commit it" >&2
  exit 1
fi
