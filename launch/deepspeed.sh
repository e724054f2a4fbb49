#!/usr/bin/env bash
# The deepspeed launcher; the arguments are those of `axialtrain train`:
#   PROCESSES=4 launch/deepspeed.sh experiment=quickstart mesh=2x2     # this machine
#   HOSTFILE=launch/hostfile.example launch/deepspeed.sh ...           # all hosts of the file
# HOSTFILE      lines of "HOST slots=N"; Python, code and data lie at the same place on all hosts
# RUNNER        pdsh (what deepspeed itself takes), openmpi, or ssh, which needs nothing else
# MASTER_ADDR, MASTER_PORT   the first host, as the others reach it (its name in the file), 29500
# SSH_ARGS, LAUNCHER_ARGS    arguments of ssh; of pdsh or mpirun
# FORWARD       names of more variables for the hosts, where everybody can read them in a list of
#               processes: keys belong into the hosts' own files, like ~/.deepspeed_env
# Nothing is started again: start the same command with resume=auto and a hydra.run.dir.
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3} is not here" >&2; exit 2; }
run=("$PYTHON" -m deepspeed.launcher.runner "--master_port=${MASTER_PORT:=29500}")
main=(--module --no_local_rank axialtrain.cli "${COMMAND:-train}") # it adds --local_rank, which Hydra refuses
[ -n "${HOSTFILE:-}" ] || exec "${run[@]}" --hostfile=/dev/null "--num_accelerators=${PROCESSES:--1}" "${main[@]}" "$@"
! grep -nvE '^\s*(#|$)|^[^#"[:space:]]+\s+slots=[1-9][0-9]*\s*$' "$HOSTFILE" >&2 || exit 2 # no such lines
mapfile -t hosts < <(sed -nE 's/^([^#[:space:]]+)\s+slots=([0-9]+)\s*$/\1 \2/p' "$HOSTFILE")
[ ${#hosts[@]} != 0 ] || { echo "HOSTFILE=$HOSTFILE names no host" >&2; exit 2; }; first=${hosts[0]% *} ours='(NCCL|GLOO|FI|UCX)_.*|MASTER_(ADDR|PORT)|PYTHONPATH|OMP_NUM_THREADS|DS_ACCELERATOR|WANDB_MODE'
export MASTER_ADDR=${MASTER_ADDR:-${first#*@}} MASTER_PORT
mapfile -t names < <(compgen -e | grep -xE "$ours${FORWARD:+|${FORWARD// /|}}")
if [ "${RUNNER:=pdsh}" = ssh ]; then # deepspeed's own part of a host, started by us
  info='' setup="{ read -r _; kill -TERM \$\$; } <&0 > /dev/null 2>&1 & cd $(printf %q "$PWD")"
  for host in "${hosts[@]}"; do info+=",\"${host% *}\":[$(seq -s, 0 $((${host#* } - 1)))]"; done
  for name in "${names[@]}"; do setup+=" && export $name=$(printf %q "${!name}")"; done
  # Standard input is a host's lifeline: its part gets SIGTERM when this script is ended or lost.
  life=$(mktemp -u) && mkfifo -m 600 "$life" && exec 3<> "$life" && exec 4< "$life" && rm "$life"
  trap 'exec 3>&-' HUP INT TERM; status=''
  for i in "${!hosts[@]}"; do
    part=("$PYTHON" -m deepspeed.launcher.launch "--world_info=$(base64 -w0 <<< "{${info#,}}" | tr +/ -_)"
      "--node_rank=$i" "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT" "${main[@]}" "$@")
    remote="bash -c $(printf %q "$setup && exec$(printf ' %q' "${part[@]}") < /dev/null")"
    # shellcheck disable=SC2086 # SSH_ARGS are several
    ssh -o BatchMode=yes -o ServerAliveInterval=15 ${SSH_ARGS:-} "${hosts[i]% *}" "$remote" <&4 3>&- 4<&- &
  done
  while [ -n "$(jobs -p)" ]; do # the first that fails ends all, when they have said what they know
    wait -n || { code=$?; [ -n "$status" ] || { status=$code; sleep 5; exec 3>&-; }; }
  done
  exit "${status:-0}"
fi
# deepspeed reads one file of variables. This one is gone when nobody has it open any more.
file=$(mktemp) && exec 3<> "$file" && export DS_ENV_FILE=/dev/fd/3 && rm "$file"
[ ! -e ~/.deepspeed_env ] || cat ~/.deepspeed_env >&3
for name in "${names[@]}"; do # what else there is, the hosts' shells would change
  [[ ${!name} =~ ^[A-Za-z0-9_@+=:,./-]*$ ]] || { echo "only RUNNER=ssh can take $name=${!name}" >&2; exit 2; }
  echo "$name=${!name}" >&3
done
run+=("--hostfile=$HOSTFILE" "--master_addr=$MASTER_ADDR" --no_ssh_check --force_multi "--launcher=$RUNNER")
if [ "$RUNNER" = openmpi ]; then # its processes know themselves by names of its own
  for name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE; do rank+="export $name=\$OMPI_COMM_WORLD_${name/WORLD_/}; "; done
  exec "${run[@]}" "--launcher_args=--bind-to none --mca plm_rsh_args '${SSH_ARGS:-}' ${LAUNCHER_ARGS:-}" \
    --no_python bash -c "$rank"'exec "$@"' rank "$PYTHON" -u -m axialtrain.cli "${COMMAND:-train}" "$@"
fi
export PDSH_SSH_ARGS_APPEND=${SSH_ARGS:-} # a shell of each host reads the arguments again, and
for arg; do arg=${arg//%/%%}              # those with a space deepspeed quotes; %h is pdsh's
  case $arg in *' '*) arg=${arg//\\/\\\\} arg=${arg//\$/\\\$} arg=${arg//\`/\\\`} ;; *) printf -v arg %q "$arg" ;; esac
  main+=("$arg")
done
exec "${run[@]}" "--launcher_args=${LAUNCHER_ARGS:-}" "${main[@]}"
