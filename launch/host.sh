#!/usr/bin/env bash
# What tpu_vm.sh has every host of a slice do; it lies on the host in ~/perfusion_jax/launch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=runs/host.log
pid=runs/host.pid
result=runs/host.result

install() {
  # The hosts' own Python is 3.10 and JAX needs a newer one; uv brings it.
  python3 -m pip install --quiet --user uv
  uv=$(python3 -m site --user-base)/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.12 .venv
  "$uv" pip install --quiet --python .venv --constraint launch/constraints.txt --editable '.[tpu]'
}

running() {
  [[ -f $pid ]] && kill -0 "$(<"$pid")" 2>/dev/null
}

# Starts the training in the background, so that it outlives the connection.
start() {
  if running; then
    echo "runs already"
    return
  fi
  mkdir -p runs
  rm -f "$result"
  # SIGTERM, which a host that is preempted sends to all, is Python's to answer; the shell waits for it.
  # shellcheck disable=SC2016  # the inner shell expands these
  nohup bash -c 'trap : TERM; .venv/bin/python "${@:2}"; echo "$?" > "$1"' start "$result" "$@" </dev/null >>"$log" 2>&1 &
  echo "$!" >"$pid"
}

# Shows the log until the training ends, and ends with its exit status.
follow() {
  [[ -f $pid ]] || {
    echo "error: nothing was started on this host" >&2
    exit 1
  }
  tail --lines=20 --follow --pid="$(<"$pid")" "$log"
  [[ -f $result ]] || {
    echo "error: the training was killed" >&2
    exit 1
  }
  exit "$(<"$result")"
}

# Has the training save and end, as a preemption does.
stop() {
  if running; then
    pkill -TERM --parent "$(<"$pid")"
  fi
}

status() {
  tail --lines=3 "$log"
}

case ${1:-} in
  install | start | follow | stop | status) "$@" ;;
  *)
    echo "usage: launch/host.sh install | start PYTHON_ARGUMENT... | follow | stop | status" >&2
    exit 2
    ;;
esac
