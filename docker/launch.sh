#!/bin/sh
# Joins the cluster, then runs the study to its end, or the given verb, such as confirm or doctor.
# Exits as the command does: 0 if the study is complete or was stopped by `bdense-search stop`, 2 if you must repair something.
# If Ray's head dies, it joins the next one and continues; it gives up after 5 minutes without a head. Ray itself may end the
# command before the command sees that the head is gone, so any failure without a head counts as its loss.
set -u
CLUSTER_LOST=75   # search.errors.ClusterLostError
PATIENCE=${PATIENCE:-300} PAUSE=${PAUSE:-10}   # seconds

ended= child= joined=$(date +%s)
# A stop that comes while it joins another head ends the next command at once.
export BDENSE_LAUNCH_FILE=/tmp/launch.json
rm -f "$BDENSE_LAUNCH_FILE"
trap 'ended=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

become_the_command() {   # by exec: the process in the background is the command itself, and gets the signals
    if [ $# -gt 0 ]; then exec bdense-search "$@"; else exec bdense-search launch "$STUDY" ${LAUNCH_OPTIONS:-}; fi
}

head_answers() { python -c 'import socket; socket.create_connection(("ray-head", 6379), 5)' 2> /dev/null; }

while [ -z "$ended" ]; do
    ray stop --force > /dev/null 2>&1
    if ray-node.sh driver > /tmp/ray-start.log 2>&1; then
        if [ -n "$ended" ]; then break; fi   # asked to end while it joined
        export RAY_ADDRESS=ray-head:6379
        become_the_command "$@" &
        child=$!
        if [ -n "$ended" ]; then kill -TERM "$child" 2>/dev/null; fi   # the signal came before its number was known
        # A signal to this shell ends a wait early, perhaps as the command ends: then its status is there for one more wait.
        while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
        wait "$child" 2>/dev/null; own=$?
        if [ "$own" -ne 127 ]; then status=$own; fi   # 127: waited for already
        child= joined=$(date +%s)
    else
        cat /tmp/ray-start.log >&2
        status=$CLUSTER_LOST
        if [ $(($(date +%s) - joined)) -ge "$PATIENCE" ]; then exit 1; fi
    fi
    if [ -n "$ended" ]; then exit "$status"; fi
    case "$status" in 0 | 2 | 130 | "$CLUSTER_LOST") ;; *) head_answers || status=$CLUSTER_LOST ;; esac
    case "$status" in
        130) exit 0 ;;
        "$CLUSTER_LOST") echo "joining the cluster again in $PAUSE s" >&2; sleep "$PAUSE" & wait $! ;;
        *) exit "$status" ;;
    esac
done
exit 130
