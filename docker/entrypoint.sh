#!/bin/sh
# Runs before the command of every container: takes passwords from their secret files to where the libraries look for them.
# No environment that `docker inspect` shows, no argument and no disk holds them.
set -eu
umask 027

there() {   # whether this container was given that secret; a secret that cannot be read is an error
    [ -e "/run/secrets/$1" ] || return 1
    if [ ! -r "/run/secrets/$1" ] || [ ! -s "/run/secrets/$1" ]; then
        echo "the secret file $1 is empty or cannot be read by user $(id -u); see docker/secrets.sh" >&2
        exit 2
    fi
}

if there database; then
    # BDENSE_STORAGE has user, host and database. libpq refuses a password file that others may read.
    export PGPASSFILE=/dev/shm/.pgpass
    (umask 077; printf '*:*:*:*:%s\n' "$(sed 's/[\\:]/\\&/g' /run/secrets/database)" > "$PGPASSFILE")
fi
if there ray_token; then
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token
fi
exec "$@"
