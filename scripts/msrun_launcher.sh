#!/usr/bin/env bash
# MindFormers' msrun_launcher.sh, the same positional arguments: starts a command in every rank with MindSpore's msrun.
#
# PYTHON chooses the interpreter, and with it msrun (default: the project's .venv, else python3 and msrun on PATH);
# MF_LOG_SUFFIX is added to the log directory; TRANSFORM_CKPT_NPU=0 or 1 says whether there are NPUs instead of looking
# for /dev/davinci*.  With JOIN=True the exit code is that of the job; with False msrun returns at once.
set -euo pipefail

usage() {
  cat >&2 <<USAGE
usage: $0 EXECUTE_ORDER [WORKER_NUM]
       $0 EXECUTE_ORDER WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       $0 EXECUTE_ORDER WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT
EXECUTE_ORDER is one word, for example "run_mindformer.py --config X.yaml --run_mode train".
Defaults: WORKER_NUM 8, LOCAL_WORKER as WORKER_NUM, MASTER_ADDR 127.0.0.1, MASTER_PORT 8118, NODE_RANK 0,
LOG_DIR output/msrun_log, JOIN False, CLUSTER_TIME_OUT 7200 (seconds).
USAGE
  [ -z "${1:-}" ] || echo "error: $1" >&2
  exit 2
}

address=127.0.0.1 port=8118 node=0 log_dir=output/msrun_log join=False timeout=7200
workers=${2:-8}
local_workers=$workers
case $# in
  1 | 2) ;;
  6) port=$3 log_dir=$4 join=$5 timeout=$6 ;;
  9) local_workers=$3 address=$4 port=$5 node=$6 log_dir=$7 join=$8 timeout=$9 ;;
  *) usage "$# arguments, expected 1, 2, 6 or 9" ;;
esac
for number in WORKER_NUM="$workers" LOCAL_WORKER="$local_workers" MASTER_PORT="$port" NODE_RANK="$node"; do
  [[ ${number#*=} =~ ^[0-9]+$ ]] || usage "${number/=/ is \'}' and not a number"
done
[[ $timeout =~ ^-?[0-9]+$ ]] || usage "CLUSTER_TIME_OUT is '$timeout' and not a number"
[ "$local_workers" -le "$workers" ] || usage "LOCAL_WORKER $local_workers is more than WORKER_NUM $workers"
case $join in
  True | true) join=True ;;
  False | false) join=False ;;
  *) usage "JOIN is '$join', expected True or False" ;;
esac

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
root=$(dirname "$here")
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
python=$(command -v "$python") || { echo "error: $python: not found: PYTHON names the interpreter" >&2; exit 3; }
PATH="$(dirname "$python"):$PATH" # msrun starts `python`, and lies beside it
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
command -v msrun >/dev/null || { echo "error: msrun: not found: install mindspore for $python" >&2; exit 3; }

# words as a shell splits them, quotes included, but nothing in them is run or expanded
mapfile -d '' -t order < <(
  "$python" -c 'import shlex, sys; print(*shlex.split(sys.argv[1]), sep="\0", end="\0")' "$1" 2>/dev/null
)
[ -n "${order[0]:-}" ] || usage "EXECUTE_ORDER is empty, or has a quote that is not closed: $1"
for i in 0 1; do # the script, after `python` where that is the first word
  word=${order[i]:-}
  case $word in
    *.py)
      [ -e "$word" ] || [ ! -e "$root/$word" ] || order[i]=$root/$word
      [ -e "${order[i]}" ] || { echo "error: $word: not found, neither here nor in $root" >&2; exit 3; }
      break
      ;;
  esac
done

log_dir=$log_dir${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
options=("--worker_num=$workers" "--local_worker_num=$local_workers" "--master_port=$port" "--log_dir=$log_dir"
  "--join=$join" "--cluster_time_out=$timeout")
[ "$local_workers" -eq "$workers" ] || options+=("--master_addr=$address" "--node_rank=$node")
npus=(/dev/davinci[0-9]*)
npu=${TRANSFORM_CKPT_NPU:-$([ -e "${npus[0]}" ] && echo 1 || echo 0)}
[ "$npu" = 0 ] || options+=(--bind_core=True)
echo "msrun ${options[*]}$(printf ' %q' "${order[@]}")"
echo "logs: $(realpath -ms -- "$log_dir")"
exec msrun "${options[@]}" "${order[@]}"
