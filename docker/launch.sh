#!/bin/sh
# Joins the cluster, then runs the study to its end; or the verb that is given there, such as confirm or doctor.
# Ends as the command does: 0 once the study is complete or was stopped by `bdense-search stop`, 2 where something is to be
# mended by hand. It joins again and carries on where Ray's head died, and gives up where none can be joined for 5 minutes.
set -u
CLUSTER_LOST=75   # search.errors.ClusterLostError
PATIENCE=${PATIENCE:-300} PAUSE=${PAUSE:-10}   # seconds

become_the_command() {   # in the background the shell itself, so that it gets the signals
    if [ $# -gt 0 ]; then exec bdense-search "$@"; else exec bdense-search launch "$STUDY" ${LAUNCH_OPTIONS:-}; fi
}

ended= child= joined=$(date +%s)
trap 'ended=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
while [ -z "$ended" ]; do
    ray stop --force > /dev/null 2>&1
    if ray-node.sh driver > /tmp/ray-start.log 2>&1; then
        if [ -n "$ended" ]; then break; fi   # asked to end while it joined
        export RAY_ADDRESS=ray-head:6379
        become_the_command "$@" &
        child=$!
        # A signal to this shell ends a wait before the command has ended.
        while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
        child= joined=$(date +%s)
    else
        cat /tmp/ray-start.log >&2
        status=$CLUSTER_LOST
        if [ $(($(date +%s) - joined)) -ge "$PATIENCE" ]; then exit 1; fi
    fi
    if [ -n "$ended" ]; then exit "$status"; fi
    case "$status" in
        130) exit 0 ;;
        "$CLUSTER_LOST") echo "joining the cluster again in $PAUSE s" >&2; sleep "$PAUSE" & wait $! ;;
        *) exit "$status" ;;
    esac
done
exit 130
