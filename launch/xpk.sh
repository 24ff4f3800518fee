#!/usr/bin/env bash
# Trains a fleet on a GKE cluster of TPU slices through xpk: a workload for each shard of the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

usage() {
  cat <<'USAGE'
usage: PROJECT=... ZONE=... CLUSTER=... IMAGE=... NAME=... BUCKET=gs://... launch/xpk.sh [--dry_run] COMMAND [-- TRAIN_FLAG...]

  create   submit the shards as the workloads NAME-0, NAME-1, ...; those that are preempted are restarted
  status   list them
  fetch    copy what is finished from BUCKET/runs/NAME-0, ... to runs/NAME-0, ...
  delete   delete the workloads

--dry_run prints the commands and runs none of them.

  SHARDS       number of parts that the table is split into, a slice for each [1]
  ACCELERATOR  type and size of a slice [v5litepod-16]
  CONFIG       [configs/fleet.py:sd15]
  CONCEPTS     the table [BUCKET/concepts.jsonl]
USAGE
}

workload() {
  call xpk workload "$@" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
}

create() {
  training "$BUCKET/runs/$NAME-$1" "$1/$SHARDS"
  # xpk sends SIGTERM to the shell that it gives the command to, and restarts only on the exit statuses that are
  # named, and on those of what was killed (from 127 on): 1 is that of a run that was told to stop or has lost a host.
  # Left out is 2, of bad input.
  workload create --workload="$NAME-$1" --tpu-type="$ACCELERATOR" --num-slices=1 --docker-image="$IMAGE" \
    --max-restarts=100 --restart-on-exit-codes=1 --termination-grace-period-seconds=120 \
    --command="exec python $(quoted "${training[@]}")"
}

read_arguments "$@"
case $command in
  create | status | fetch | delete) ;;
  '') die "no command; see --help" ;;
  *) die "$command is not a command; see --help" ;;
esac
need_run
need CLUSTER "a cluster made by xpk cluster create"
SHARDS=${SHARDS:-1}
[[ $SHARDS =~ ^[1-9][0-9]*$ ]] || die "SHARDS is $SHARDS; it is a number"
if [[ $command == create ]]; then
  need IMAGE "the image built from launch/Dockerfile"
fi
if [[ $command == status ]]; then
  workload list --filter-by-job="$NAME-"
  exit
fi
for ((shard = 0; shard < SHARDS; shard++)); do
  case $command in
    create) create "$shard" ;;
    fetch) fetch "$NAME-$shard" ;;
    delete) workload delete --workload="$NAME-$shard" --force ;;
  esac
done
