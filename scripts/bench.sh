#!/usr/bin/env bash
# Run every benchmark, one after another on a machine that should have nothing else to do; the
# results go to benchmarks/results/NAME.json. A script that needs more than is here says so and is counted.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python}")
bundle=${BUNDLE:-bundles/assistant-intents}
mkdir -p benchmarks/results
failed=()
for script in benchmarks/*.py; do
  name=$(basename "$script" .py)
  case $name in
    report | link_process) continue ;;
    # Need bundles that are made first (codec_bundles.py), or are parts of codec_table.py.
    codec_bundles | codec_peers | codec_table | codec_table_text) continue ;;
    device_runtime) arguments=("$bundle") ;;
    unary_or_stream | worker_overhead) arguments=(--bundle "$bundle") ;;
    codec_quality) arguments=(--bundle "$bundle" --limit 1000) ;;
    *) arguments=() ;;
  esac
  echo "== $name ${arguments[*]}" >&2
  "$python" "$script" "${arguments[@]}" --json "benchmarks/results/$name.json" >&2 || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "not measured: ${failed[*]} (their messages are above)" >&2
  exit 1
fi
