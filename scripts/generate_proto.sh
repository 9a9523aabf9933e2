#!/usr/bin/env bash
# Generate offramp_common/wire from proto/*.proto below a folder: generate_proto.sh FOLDER
set -euo pipefail
out=$(realpath "${1:?usage: generate_proto.sh FOLDER}")
cd "$(dirname "$0")/.."
# The virtual path makes the generated imports say offramp_common.wire, as they are installed.
"${PYTHON:-python}" -m grpc_tools.protoc -Iofframp_common/wire=proto \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" proto/*.proto
