#!/bin/sh
# The password from its secret file, hashed; TLS where a certificate was given (docker-compose.tls.yml).
set -eu
umask 077
if [ ! -s /run/secrets/dashboard ]; then
    echo "the secret file of the dashboard's password is empty or missing; run: sh docker/secrets.sh" >&2
    exit 1
fi
printf '%s:%s\n' "${DASHBOARD_USER:-bdense}" "$(openssl passwd -6 -in /run/secrets/dashboard)" > /tmp/htpasswd
if [ -r /run/secrets/tls_certificate ]; then listen=tls; else listen=plain; fi
cp "/etc/bdense/$listen.conf" /tmp/listen.conf
exec nginx -c /etc/bdense/nginx.conf -g 'daemon off;'
