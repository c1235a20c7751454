#!/usr/bin/env bash
# Generate protos/molehill_protos/v1 from protos/molehill/v1.
#   scripts/protos.sh           write the generated code
#   scripts/protos.sh --check   write nothing; fail when the committed code differs from what the sources give
set -euo pipefail
cd "$(dirname "$0")/.."

generate() { # generate DIR: DIR/molehill_protos/v1/*_pb2.py and *_pb2.pyi, and *_pb2_grpc.py where there is a service
  # The virtual path makes the generated modules import each other as molehill_protos.v1.
  local protoc=("${PYTHON:-python}" -W error -m grpc_tools.protoc -Imolehill_protos/v1=protos/molehill/v1)
  "${protoc[@]}" --python_out="$1" --pyi_out="$1" $(cd protos/molehill/v1 && printf 'molehill_protos/v1/%s ' *.proto)
  "${protoc[@]}" --grpc_python_out="$1" $(cd protos/molehill/v1 && grep -l '^service' *.proto | sed 's|^|molehill_protos/v1/|')
}

case "${1:-}" in
  "")
    rm -f protos/molehill_protos/v1/*_pb2*.py protos/molehill_protos/v1/*_pb2.pyi
    generate protos
    ;;
  --check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    if ! diff -ru -x __init__.py -x __pycache__ "$fresh/molehill_protos/v1" protos/molehill_protos/v1; then
      echo "protos/molehill_protos differs from protos/molehill: run scripts/protos.sh" >&2
      exit 1
    fi
    ;;
  *)
    echo "usage: scripts/protos.sh [--check]" >&2
    exit 2
    ;;
esac
