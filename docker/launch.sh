#!/bin/sh
# Joins the cluster, then runs the study to its end; or the verb that is given, which then runs its rows there.
# Ends with 0 once it is complete or was stopped by `bdense-search stop`, with 2 where something is to be mended by hand.
# When Ray's head or the workers died it joins again and carries on.
set -u

command_of_the_study() {
    if [ $# -gt 0 ]; then bdense-search "$@"; else bdense-search launch "$STUDY" ${LAUNCH_OPTIONS:-}; fi
}

ended=
trap 'ended=yes; kill -TERM "$child" 2>/dev/null' TERM INT
while :; do
    ray stop --force > /dev/null 2>&1
    if ray-node.sh driver > /tmp/ray-start.log 2>&1; then
        export RAY_ADDRESS=ray-head:6379
        command_of_the_study "$@" &
        child=$!
        # A signal to this shell ends a wait before the command has ended.
        while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
    else
        cat /tmp/ray-start.log >&2
        status=1
    fi
    if [ -n "$ended" ]; then exit "$status"; fi
    case "$status" in
        130) exit 0 ;;
        1) echo "joining the cluster again in 10 s" >&2; sleep 10 & wait $! ;;
        *) exit "$status" ;;
    esac
done
