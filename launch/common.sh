# shellcheck shell=bash
# What the launch scripts share; they source it.

dry_run=false

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# need VARIABLE MEANING: ends the script if the variable is unset or empty.
need() {
  [[ -n ${!1:-} ]] || die "$1 is not set: $2"
}

# quoted WORD...: the words on one line, as a shell reads them again.
quoted() {
  local word separator='' safe='^[A-Za-z0-9_@%+=:,./-]+$'
  for word; do
    if [[ $word =~ $safe ]]; then
      printf '%s%s' "$separator" "$word"
    elif [[ $word != *[\'[:cntrl:]]* ]]; then
      printf "%s'%s'" "$separator" "$word"
    else
      printf '%s%q' "$separator" "$word"
    fi
    separator=' '
  done
}

# call COMMAND...: runs a command and shows it; a dry run only shows it.
call() {
  if $dry_run; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# Reads [--dry_run] COMMAND [-- FLAG...] into dry_run, command and train_flags.
read_arguments() {
  command=''
  train_flags=()
  while (($#)); do
    case $1 in
      --dry_run) dry_run=true ;;
      --help | -h)
        usage
        exit
        ;;
      --)
        shift
        train_flags=("$@")
        return
        ;;
      -*) die "$1 is not a flag; flags of the training go after --; see --help" ;;
      *)
        [[ -z $command ]] || die "one command at a time: $command or $1"
        command=$1
        ;;
    esac
    shift
  done
}

# The variables that every way of launching needs.
need_run() {
  need PROJECT "the Google Cloud project"
  need ZONE "the zone of the TPUs, such as us-west4-a"
  need NAME "what to call the run; the same name goes on with it"
  need BUCKET "where the table is and the results go, such as gs://my-bucket"
  [[ $BUCKET =~ ^gs://[^/]+(/.*[^/])?$ ]] || die "BUCKET is $BUCKET; it looks like gs://my-bucket, without a / at its end"
  # Queued resources, pods and workloads are named after it.
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] || die "NAME is $NAME; use a-z, 0-9 and -, at most 32, a letter first"
  ACCELERATOR=${ACCELERATOR:-v5litepod-16}
  CONFIG=${CONFIG:-configs/fleet.py:sd15}
  CONCEPTS=${CONCEPTS:-$BUCKET/concepts.jsonl}
}

# training WORKDIR [SHARD]: sets `training` to what Python is given on every host.
training() {
  training=(-m perfusion_jax.train --config "$CONFIG" "--config.concepts=$CONCEPTS")
  training+=(--workdir "$1" --distributed)
  [[ -z ${2:-} ]] || training+=(--shard "$2")
  # An empty array is an unset variable to the bash of macOS.
  training+=(${train_flags[@]+"${train_flags[@]}"})
}

# fetch RUN: copies what a run has written, its checkpoints left out, from the bucket to runs/RUN.
fetch() {
  call mkdir -p "runs/$1"
  call gcloud storage rsync --recursive '--exclude=(^|/)(checkpoints|compiled)/.*' "$BUCKET/runs/$1" "runs/$1"
}
