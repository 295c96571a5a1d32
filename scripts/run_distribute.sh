#!/usr/bin/env bash
# MindFormers' run_distribute.sh up to r1.2, the same arguments: starts the ranks of this node and waits for them.
#
# Environment: PYTHON chooses the interpreter (default: the project's .venv, else python3); LOCAL_DEFAULT_PATH the
# directory of outputs (default: ./output, and the project's own from its scripts directory).  Without NPUs ranks are
# joined by a scheduler, as msrun joins them: MS_SCHED_HOST and MS_SCHED_PORT choose its place; TRANSFORM_CKPT_NPU=0 or
# 1 says whether there are NPUs instead of looking for /dev/davinci*.
set -euo pipefail

usage() {
  cat >&2 <<USAGE
usage: $0 RANK_TABLE CONFIG [A,B) STATUS [EXTRA...]                     devices A to B-1 of one node
       $0 RANK_TABLE CONFIG [A,B) STATUS RANK_SIZE [EXTRA...]           ranks A to B-1 of several nodes' RANK_SIZE
       $0 RANK_TABLE CONFIG [A,B) predict [RANK_SIZE] DATA [EXTRA...]   with predict data
STATUS is train, finetune, predict or eval; EXTRA begins with -- and goes to run_mindformer.py.
It waits for the ranks: 'nohup $0 ... &' leaves them in the background.
USAGE
  [ -z "${1:-}" ] || echo "error: $1" >&2
  exit 2
}

[ "$#" -ge 4 ] || usage
table=$1 config=$2 devices=$3 status=$4
shift 4
case $status in
  train | finetune | predict | eval) ;;
  *) usage "STATUS is '$status'" ;;
esac
rank_size=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  rank_size=("$1")
  shift
fi
predict_data=()
if [ "$status" = predict ] && [ "$#" -gt 0 ] && [[ $1 != --* ]]; then
  predict_data=(--predict_data "$1")
  shift
fi
[ "$#" -eq 0 ] || [[ $1 == --* ]] || usage "unexpected argument '$1'"

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
root=$(dirname "$here")
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python

# A user's path is relative to where they stand; what is not there may lie in the project.
place() {
  if [ -e "$1" ] || [ ! -e "$root/$1" ]; then realpath -ms -- "$1"; else realpath -ms -- "$root/$1"; fi
}
table=$(place "$table")
config=$(place "$config")
[ -f "$config" ] || { echo "error: $config: not found: CONFIG is the YAML of the job" >&2; exit 3; }
script=$root/run_mindformer.py
[ -f "$script" ] || { echo "error: $script: not found" >&2; exit 3; }
facts=$(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m transform_ckpt.cli.rank_table \
  -- "$table" "$devices" ${rank_size[@]+"${rank_size[@]}"})
read -r first end world several host port <<<"$facts"

base=$PWD
[ ! "$base" -ef "$here" ] || base=$root
LOCAL_DEFAULT_PATH=$(realpath -ms -- "${LOCAL_DEFAULT_PATH:-$base/output}")
logs=$LOCAL_DEFAULT_PATH/log
export LOCAL_DEFAULT_PATH RANK_TABLE_FILE=$table RANK_SIZE=$world LOCAL_RANK_SIZE=$((end - first)) PYTHONUNBUFFERED=1
npus=(/dev/davinci[0-9]*)
npu=${TRANSFORM_CKPT_NPU:-$([ -e "${npus[0]}" ] && echo 1 || echo 0)}
unset MS_ROLE MS_WORKER_NUM MS_NODE_ID # of a job around this one

command=("$python" "$script" --config "$config" --use_parallel True --run_mode "$status"
  ${predict_data[@]+"${predict_data[@]}"} "$@")
declare -A started=() live=() log=() # by rank, or "scheduler"

# start NAME LOG: one process in a session of its own, so that its children can be ended with it
start() {
  mkdir -p "$(dirname "$2")"
  setsid "${command[@]}" >"$2" 2>&1 </dev/null &
  started[$1]=$! live[$1]=$! log[$1]=$2
}

# send SIGNAL: to every session that has not ended well; 0 asks whether any is there
send() {
  local name found=1
  for name in "${!started[@]}"; do
    if kill "-$1" -- "-${started[$name]}" 2>/dev/null || kill "-$1" "${started[$name]}" 2>/dev/null; then found=0; fi
  done
  return "$found"
}

stop() {
  trap '' INT TERM HUP
  send TERM || return 0
  local deadline=$((SECONDS + 10))
  while send 0 && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
  send KILL || true
}

failed() {
  local what="ended with exit code $2" who="rank $1" name
  if [ "$2" -gt 128 ] && name=$(kill -l $(($2 - 128)) 2>/dev/null); then what="was killed by SIG$name"; fi
  [ "$1" != scheduler ] || who="the scheduler"
  {
    echo "error: $who $what; stopping the others. The end of ${log[$1]}:"
    tail -n 30 "${log[$1]}" | sed 's/^/  | /'
  } >&2
  exit "$2"
}

# reap NAME: sets code once the process has ended; false while it runs
reap() {
  kill -0 "${live[$1]}" 2>/dev/null && return 1
  code=0
  wait "${live[$1]}" || code=$?
  unset "live[$1]"
  [ "$code" -ne 0 ] || unset "started[$1]"
}

trap stop EXIT
trap 'echo "interrupted: stopping all ranks" >&2; exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

if [ "$npu" = 0 ]; then
  export MS_WORKER_NUM=$world MS_SCHED_HOST=${MS_SCHED_HOST:-$host} MS_SCHED_PORT=${MS_SCHED_PORT:-$port}
  export MS_TOPO_TIMEOUT=${MS_TOPO_TIMEOUT:-600}
  if [ "$several" = 0 ] || [ "$first" -eq 0 ]; then
    MS_ROLE=MS_SCHED RANK_ID=0 start scheduler "$logs/scheduler.log"
    echo "scheduler: $MS_SCHED_HOST:$MS_SCHED_PORT, process ${live[scheduler]}"
  fi
  export MS_ROLE=MS_WORKER
fi
for ((i = first; i < end; i++)); do
  local_rank=$((i - first))
  if [ "$several" = 1 ]; then rank=$i device=$local_rank; else rank=$local_rank device=$i; fi
  export RANK_ID=$rank DEVICE_ID=$device LOCAL_RANK=$local_rank
  [ "$npu" != 0 ] || export MS_NODE_ID=$rank
  start "$rank" "$logs/rank_$rank/mindformer.log"
  echo "rank $rank of $world: device $device, process ${live[$rank]}"
done

ranks_left=$((end - first))
while [ "$ranks_left" -gt 0 ]; do
  for name in "${!live[@]}"; do
    reap "$name" || continue
    [ "$code" -eq 0 ] || failed "$name" "$code"
    [ "$name" = scheduler ] || ranks_left=$((ranks_left - 1))
  done
  sleep 0.2
done
for ((i = 0; i < 25; i++)); do # the scheduler ends by itself; what is left after 5 s is stopped
  if [ -z "${live[scheduler]:-}" ] || reap scheduler; then break; fi
  sleep 0.2
done
echo "done: logs are in $logs/rank_*/mindformer.log"
