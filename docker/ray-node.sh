#!/bin/sh
# A node of the Ray cluster: `ray-node.sh head` and `ray-node.sh worker` run until they end; `ray-node.sh driver` runs in the
# background, because a command that drives the cluster needs a node of its own.
set -eu
# Without a token Ray runs code that anyone sends it.
: "${RAY_AUTH_TOKEN_PATH:?the secret ray_token was not given to this container}"
address=$(hostname -i | cut -d' ' -f1)   # Ray would look for a route to the internet, and there is none
store="--object-store-memory=${OBJECT_STORE_BYTES:-104857600}"   # no large object passes through it
node="--node-ip-address=$address --disable-usage-stats $store"
case "$1" in
head) exec ray start $node --head --port=6379 --include-dashboard=false --num-cpus=0 --num-gpus=0 --block ;;
# Without --num-gpus Ray counts the container's GPUs.
worker) exec ray start $node --address=ray-head:6379 --num-cpus="${WORKER_CPUS:-1}" --block ;;
driver) exec ray start $node --address=ray-head:6379 --num-cpus=0 --num-gpus=0 ;;
*) echo "ray-node.sh: head, worker or driver, not '$1'" >&2; exit 2 ;;
esac
