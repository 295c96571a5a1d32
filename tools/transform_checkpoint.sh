#!/usr/bin/env bash
# MindFormers' transform_checkpoint.sh: the same positional arguments.
#   transform_checkpoint.sh SRC_CHECKPOINT SRC_STRATEGY|None DST_DIR DST_STRATEGY|None WORLD_SIZE PROCESS_NUM [PREFIX]
# Logs go to ./log/transform.log (and are shown); the exit code is that of the transform, also when a worker fails.
set -uo pipefail
if [ "$#" -lt 6 ] || [ "$#" -gt 7 ]; then
  echo "usage: $0 SRC_CHECKPOINT SRC_STRATEGY|None DST_DIR DST_STRATEGY|None WORLD_SIZE PROCESS_NUM [PREFIX]" >&2
  exit 2
fi
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${PYTHON:-python3}
[ -x "$here/../.venv/bin/python" ] && [ -z "${PYTHON:-}" ] && python="$here/../.venv/bin/python"
mkdir -p log || exit 5
"$python" "$here/transform_checkpoint.py" \
  --src_checkpoint "$1" --src_strategy "$2" --dst_checkpoint_dir "$3" --dst_strategy "$4" \
  --world_size "$5" --transform_process_num "$6" --prefix "${7:-checkpoint_}" 2>&1 | tee log/transform.log
exit "${PIPESTATUS[0]}"
