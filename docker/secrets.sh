#!/bin/sh
# Makes the passwords that docker-compose.yml takes from docker/secrets/, those that are not there yet.
# The folder is closed to other users of this machine; the files in it can be read in the containers, by users of other numbers.
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
