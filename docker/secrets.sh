#!/bin/sh
# Makes the passwords in docker/secrets/ that docker-compose.yml needs; existing ones stay.
# The folder is closed to other users of this machine. The files in it are readable, because containers have other user ids.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
for name in database_owner database_writer database_reader ray_token dashboard; do
    file=secrets/$name
    if [ ! -s "$file" ]; then
        LC_ALL=C tr -dc 'A-Za-z0-9' < /dev/urandom | head -c 40 > "$file"
        chmod 644 "$file"
        echo "made docker/$file"
    fi
done
echo "the dashboard's password: cat docker/secrets/dashboard"
