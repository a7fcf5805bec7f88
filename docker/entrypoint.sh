#!/bin/sh
# Before the command of every container: passwords from their secret files to where the libraries look for them, so that
# they stand in no environment that `docker inspect` shows, and in no argument.
set -eu
umask 027
if [ -r /run/secrets/database ]; then
    # user, host and database stand in BDENSE_STORAGE; libpq refuses a password file that others may read.
    export PGPASSFILE=/tmp/.pgpass
    (umask 077; printf '*:*:*:*:%s\n' "$(sed 's/[\\:]/\\&/g' /run/secrets/database)" > "$PGPASSFILE")
fi
if [ -r /run/secrets/ray_token ]; then
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token
fi
exec "$@"
