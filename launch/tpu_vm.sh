#!/usr/bin/env bash
# Trains a fleet on one TPU slice of spot TPU VMs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

usage() {
  cat <<'USAGE'
usage: PROJECT=... ZONE=... NAME=... BUCKET=gs://... launch/tpu_vm.sh [--dry_run] COMMAND [-- TRAIN_FLAG...]

  run      all of create, install, start, follow, fetch, delete; after a preemption the same command goes on
  create   ask for the slice, anew if it was preempted, and wait until it is there
  install  copy this folder to all hosts and install it there
  start    start the training on all hosts, in the background
  follow   show the log of host 0 until the training ends, and end as it did
  stop     have the training save and end
  status   the state of the slice, and the last lines of the log
  fetch    copy what is finished from BUCKET/runs/NAME to runs/NAME
  delete   give the slice back: it is billed until then

--dry_run prints the commands and runs none of them.

  ACCELERATOR  type and size of the slice [v5litepod-16]
  RUNTIME      TPU software version that belongs to it [v2-alpha-tpuv5-lite]
  SHARD        I/N: this slice trains part I of N of the table [all of it]
  CONFIG       [configs/fleet.py:sd15]
  CONCEPTS     the table [BUCKET/concepts.jsonl]
USAGE
}

tpus() {
  call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

# on WORKER WORD...: has host.sh do something on host WORKER, or on all.
on() {
  local worker=$1
  shift
  tpus tpu-vm ssh "$NAME" --worker="$worker" --command="bash perfusion_jax/launch/host.sh $(quoted "$@")"
}

# Prints the state of the queued resource; nothing if there is none.
state() {
  tpus queued-resources list --filter="name ~ /$NAME\$" --format='value(state.state)'
}

request() {
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" --spot
}

create() {
  if $dry_run; then
    echo "# until the state is ACTIVE:"
    state
    echo "# if there is none:"
    request
    echo "# if it is SUSPENDED (preempted) or FAILED, and then once more as if there were none:"
    delete
    return
  fi
  local now requested=false
  while :; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      '')
        request
        requested=true
        ;;
      FAILED)
        ! $requested || die "the request failed; see gcloud compute tpus queued-resources describe $NAME --zone=$ZONE"
        delete
        ;;
      SUSPENDED) delete ;;
      *)
        echo "$NAME: $now" >&2
        sleep 30
        ;;
    esac
  done
}

install() {
  # What git knows or would add, as it lies here; what git ignores stays.
  call mkdir -p runs
  call bash -o pipefail -c 'git ls-files -z --cached --others --exclude-standard | tar --null -czf runs/code.tar.gz -T -'
  tpus tpu-vm scp runs/code.tar.gz "$NAME:" --worker=all
  tpus tpu-vm ssh "$NAME" --worker=all \
    --command='mkdir -p perfusion_jax && tar -xzf code.tar.gz -C perfusion_jax && bash perfusion_jax/launch/host.sh install'
}

start() {
  training "$BUCKET/runs/$NAME" "${SHARD:-}"
  on all start "${training[@]}"
}

follow() {
  on 0 follow
}

delete() {
  tpus queued-resources delete "$NAME" --force --quiet
}

run() {
  trap 'echo "the slice $NAME may still be there, and billed: give the same command again to go on, or delete" >&2' EXIT
  create
  install
  start
  follow
  fetch "$NAME"
  delete
  trap - EXIT
}

read_arguments "$@"
case $command in
  run | create | install | start | follow | stop | status | fetch | delete) ;;
  '') die "no command; see --help" ;;
  *) die "$command is not a command; see --help" ;;
esac
need_run
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
if [[ -n ${SHARD:-} ]] && ! { [[ $SHARD =~ ^[0-9]+/[0-9]+$ ]] && ((10#${SHARD%/*} < 10#${SHARD#*/})); }; then
  die "SHARD is $SHARD; it must be I/N, with I from 0 to N - 1"
fi
case $command in
  stop) on all stop ;;
  status)
    state
    on 0 status
    ;;
  fetch) fetch "$NAME" ;;
  *) "$command" ;;
esac
