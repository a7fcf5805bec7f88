#!/bin/sh
# Joins the cluster, then runs the study; or the verb that is given, which then runs its rows there.
set -eu
ray-node.sh driver > /tmp/ray-start.log 2>&1 || { cat /tmp/ray-start.log >&2; exit 1; }
export RAY_ADDRESS=ray-head:6379
if [ $# -gt 0 ]; then exec bdense-search "$@"; fi
exec bdense-search launch "$STUDY" ${LAUNCH_OPTIONS:-}
