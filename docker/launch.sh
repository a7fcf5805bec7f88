#!/bin/sh
# Joins the cluster, then runs the study to its end; or the verb that is given, which then runs its rows there.
# Ends with 0 once it is complete or was stopped by `bdense-search stop`, with 2 where something is to be mended by hand.
# When Ray's head or the workers died it joins again and carries on.
set -u

become_the_command() {   # in the background the shell itself, so that it gets the signals
    if [ $# -gt 0 ]; then exec bdense-search "$@"; else exec bdense-search launch "$STUDY" ${LAUNCH_OPTIONS:-}; fi
}

ended= child=
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
exit 130
