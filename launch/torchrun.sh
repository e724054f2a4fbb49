#!/usr/bin/env bash
# torchrun with a c10d rendezvous; the arguments are those of `axialtrain train`:
#   PROCESSES=4 launch/torchrun.sh experiment=quickstart mesh=2x2        # this machine
#   NODES=2 PROCESSES=8 RENDEZVOUS=node0 launch/torchrun.sh ...          # the same on each node
#   HOSTFILE=launch/hostfile.example launch/torchrun.sh ...              # once: ssh to each host
# NODES         how many, or FEWEST:MOST with mesh.data=auto, which goes on with those that are left
# PROCESSES     of a node, one a GPU without; a hostfile says it itself (slots=N)
# RENDEZVOUS    HOST[:PORT] of the first node, by a name or address that all others reach
# IS_FIRST      true on that node, false on others; torchrun compares host names without
# LOCAL_ADDR    by which the others reach this node, where its host name is no such name
# MAX_RESTARTS  how often lost processes are started again (0); SAVE_SECONDS: see docs/launching.md
# HOSTFILE      lines of "HOST slots=N"; Python, code and data lie at the same place on all hosts
# SSH_ARGS, FORWARD   arguments of ssh; names of more variables for the hosts, where everybody can
#               read them in a list of processes: keys belong into the hosts' own files
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3} is not here" >&2; exit 2; }
node() { # PROCESSES IS_FIRST LOCAL_ADDR ARGUMENTS: sets `run`, the command of one node
  run=(${MAX_RESTARTS:+env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1} # or torch 2.13 loses new nodes
    "$PYTHON" -m torch.distributed.run "--nnodes=$NODES" "--nproc-per-node=$1" --rdzv-backend=c10d
    "--rdzv-endpoint=$RENDEZVOUS" "--rdzv-id=$RUN_ID" "--max-restarts=${MAX_RESTARTS:-0}"
    "--rdzv-conf=${RDZV_CONF:-join_timeout=900}${2:+,is_host=$2}" ${3:+"--local-addr=$3"}
    "--shutdown-timeout=${SAVE_SECONDS:-300}" -m axialtrain.cli "${COMMAND:-train}" "${@:4}")
}
if [ -z "${HOSTFILE:-}" ]; then
  [ "${NODES:=1}" != 1 ] || : "${RENDEZVOUS:=localhost:0}" # any free port
  : "${RENDEZVOUS:?set it to HOST[:PORT] of the first of $NODES nodes}" "${RUN_ID:=axialtrain}"
  node "${PROCESSES:-auto}" "${IS_FIRST:-}" "${LOCAL_ADDR:-}" "$@"
  exec "${run[@]}"
fi
! grep -nvE '^\s*(#|$)|^[^#[:space:]]+\s+slots=[1-9][0-9]*\s*$' "$HOSTFILE" >&2 || exit 2 # no such lines
mapfile -t hosts < <(sed -nE 's/^([^#[:space:]]+)\s+slots=([0-9]+)\s*$/\1 \2/p' "$HOSTFILE")
[ ${#hosts[@]} != 0 ] || { echo "HOSTFILE=$HOSTFILE names no host" >&2; exit 2; }; first=${hosts[0]% *}
: "${NODES:=${#hosts[@]}}" "${RENDEZVOUS:=${first#*@}}" "${RUN_ID:=axialtrain-$(date +%s)-$$}"
# A host's standard input is its lifeline: torchrun gets SIGTERM when it ends, because this script
# was told to end or was killed, or because the connection is lost.
setup="{ read -r _; kill -TERM \$\$; } <&0 > /dev/null 2>&1 & cd $(printf %q "$PWD")"
ours='(NCCL|GLOO|FI|UCX)_.*|PYTHONPATH|OMP_NUM_THREADS|DS_ACCELERATOR|WANDB_MODE'
for name in $(compgen -e | grep -xE "$ours${FORWARD:+|${FORWARD// /|}}"); do
  setup+=" && export $name=$(printf %q "${!name}")"
done
life=$(mktemp -u) && mkfifo -m 600 "$life" && exec 3<> "$life" && exec 4< "$life" && rm "$life"
trap 'exec 3>&-' HUP INT TERM; pids=() end='' status=0
for host in "${hosts[@]}"; do slots=${host#* } host=${host% *}
  node "$slots" "$([ "$host" = "$first" ] && echo true || echo false)" "${host#*@}" "$@"
  remote="bash -c $(printf %q "$setup && exec$(printf ' %q' "${run[@]}") < /dev/null")"
  # shellcheck disable=SC2086 # SSH_ARGS are several
  ssh -o BatchMode=yes -o ServerAliveInterval=15 ${SSH_ARGS:-} "$host" "$remote" <&4 3>&- 4<&- &
  pids+=($!)
done
while [ ${#pids[@]} != 0 ]; do
  sleep 1
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2> /dev/null && continue
    wait "${pids[i]}" || { code=$? && end=${end:-$((SECONDS + 30))} && ((status)) || status=$code; }
    unset "pids[i]"
  done # A lost host comes back by nobody: the others have 30 s to say what they know, and are ended.
  [[ -z $end || $NODES == *:* || $SECONDS -lt $end ]] || exec 3>&-
done
exit "$status"
