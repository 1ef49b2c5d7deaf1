#!/usr/bin/env bash
# A run on TPUs of a Google Kubernetes Engine cluster, as a JobSet: one pod a host, restarted together.
#
#   launch/gke.sh --name=NAME --image=IMAGE --topology=4x4x8 --accelerator=tpu-v5p-slice --bucket=BUCKET \
#       -- ivr_jax.train --config=emu35_sft --workdir=/mnt/runs/emu35/sft
#
#   --dry-run        print the JobSet, and send nothing to the cluster
#   --restarts=10    how often a failed or pre-empted run goes on by itself
#   --chips=4        chips a host (4 on v5p and v4 and most of v5e, v6e)
#   --account=NAME   Kubernetes service account that may use the bucket (default: default)
#
# Needed in the cluster: the JobSet operator, a node pool with this topology, the Cloud Storage FUSE driver.
# IMAGE is what `docker build --build-arg EXTRA=tpu -f launch/Containerfile .` made, pushed to your registry.
# Pre-emption sends SIGTERM: the run saves and exits; the JobSet starts all pods anew, and they go on at the saved step.
# Untested: no cluster was at hand; --dry-run's output is checked as YAML alone.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $* See launch/gke.sh --help." >&2; exit 2; }

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/tpu_flags.sh
source "$here/tpu_flags.sh"

dry="" name="" image="" topology="" accelerator="" bucket="" restarts=10 chips=4 account=default command=()
while (($#)); do
  case "$1" in
    --dry-run) dry=yes ;;
    --name=?*) name="${1#*=}" ;;
    --image=?*) image="${1#*=}" ;;
    --topology=?*) topology="${1#*=}" ;;
    --accelerator=?*) accelerator="${1#*=}" ;;
    --bucket=?*) bucket="${1#*=}" ;;
    --restarts=?*) restarts="${1#*=}" ;;
    --chips=?*) chips="${1#*=}" ;;
    --account=?*) account="${1#*=}" ;;
    -h | --help) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) fail "unknown argument '$1'." ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z][a-z0-9-]{0,40}$ ]] || fail "--name must be of small letters, digits and dashes."
[[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology must be like 4x4x8."
[[ "$chips" =~ ^[1-9][0-9]*$ && "$restarts" =~ ^[0-9]+$ ]] || fail "--chips and --restarts must be whole numbers."
[[ -n "$image" && -n "$accelerator" && -n "$bucket" ]] || fail "--image, --accelerator and --bucket are needed."
((${#command[@]})) || fail "say what to run after --, as: -- ivr_jax.train --config=emu35_sft --workdir=/mnt/runs/sft."

total=$((${topology//x/*}))
hosts=$((total / chips))
((hosts * chips == total)) || fail "$total chips do not divide over hosts of $chips."
kind="$(sed -e 's/^tpu-//' -e 's/-.*//' <<< "$accelerator")"

# Text as a YAML double-quoted scalar.
quoted() { printf '"%s"' "$(sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' <<< "$1")"; }

jobset() {
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              serviceAccountName: $(quoted "$account")
              restartPolicy: Never
              terminationGracePeriodSeconds: 600
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$accelerator")
                cloud.google.com/gke-tpu-topology: $(quoted "$topology")
              containers:
                - name: run
                  image: $(quoted "$image")
                  env:
                    - name: LIBTPU_INIT_ARGS
                      value: $(quoted "$(libtpu_flags "$kind")")
                  args:
$(for word in "${command[@]}"; do echo "                    - $(quoted "$word")"; done)
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - name: runs
                      mountPath: /mnt/runs
              volumes:
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(quoted "$bucket")
                      mountOptions: "implicit-dirs"
YAML
}

if [[ -n "$dry" ]]; then
  jobset
else
  jobset | kubectl apply -f -
  echo "follow it with: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name"
fi
