#!/bin/sh
# Before the command of every container: passwords from their secret files to where the libraries look for them, so that
# they stand in no environment that `docker inspect` shows, in no argument and on no disk.
set -eu
umask 027

there() {   # whether that secret was given to this container; one that cannot be read is a mistake, not its absence
    [ -e "/run/secrets/$1" ] || return 1
    if [ ! -r "/run/secrets/$1" ] || [ ! -s "/run/secrets/$1" ]; then
        echo "the secret file $1 is empty or cannot be read by user $(id -u); see docker/secrets.sh" >&2
        exit 2
    fi
}

if there database; then
    # User, host and database stand in BDENSE_STORAGE. libpq refuses a password file that others may read.
    export PGPASSFILE=/dev/shm/.pgpass
    (umask 077; printf '*:*:*:*:%s\n' "$(sed 's/[\\:]/\\&/g' /run/secrets/database)" > "$PGPASSFILE")
fi
if there ray_token; then
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token
fi
exec "$@"
