#!/usr/bin/env bash
# One vLLM server over the GPUs of several machines, which Ray joins. Every machine has the same vLLM, Ray and model path.
#
#   node.sh worker OWN_IP HEAD_IP                          on each machine but the first; ends with the cluster
#   node.sh head OWN_IP MACHINES GPUS_EACH MODEL [FLAG..]  on the first; flags are vLLM's
#
# Waits for all GPUs up to WAIT_S seconds (600). Ray and the links between workers are neither encrypted nor
# authenticated: use addresses of a private network.
set -euo pipefail

export VLLM_HOST_IP=${2:?own address}
case ${1:?head or worker} in
worker)
    exec ray start --block --address="${3:?address of the head}:6379" --node-ip-address="$VLLM_HOST_IP"
    ;;
head)
    machines=${3:?number of machines} gpus=${4:?GPUs of each machine} model=${5:?model}
    shift 5
    ray start --head --port=6379 --node-ip-address="$VLLM_HOST_IP"
    trap 'ray stop' EXIT
    python3 - "$((machines * gpus))" "${WAIT_S:-600}" <<'PYTHON'
import sys
import time

import ray

wanted, wait_s = int(sys.argv[1]), float(sys.argv[2])
deadline = time.monotonic() + wait_s
ray.init(address="auto", log_to_driver=False)
while (found := int(ray.cluster_resources().get("GPU", 0))) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"{found} GPUs of {wanted} are there after {wait_s:g} s; is node.sh running on every machine?")
    time.sleep(1)
PYTHON
    vllm serve "$model" --distributed-executor-backend=ray --tensor-parallel-size="$gpus" \
        --pipeline-parallel-size="$machines" --generation-config=vllm "$@" &
    server=$!
    trap 'kill "$server"' TERM INT
    wait "$server" || wait "$server"  # the first one ends when a signal comes
    ;;
*)
    echo "node.sh: $1 came, expected head or worker" >&2
    exit 2
    ;;
esac
