#!/bin/sh
# Hashes the password from its secret file and starts nginx, with TLS if docker-compose.tls.yml asks for it.
set -eu
umask 077
case "${TLS:+tls}${BIND:-127.0.0.1}" in
tls* | 127.* | "[::1]" | localhost) ;;
*)
    echo "BIND=$BIND without TLS would send the password unencrypted: add docker-compose.tls.yml to COMPOSE_FILE in .env," \
        "or set BIND=127.0.0.1 (docs/running.md)" >&2
    exit 2
    ;;
esac
for secret in dashboard ${TLS:+tls_certificate tls_key}; do
    if [ ! -r "/run/secrets/$secret" ] || [ ! -s "/run/secrets/$secret" ]; then
        echo "the secret file $secret is missing, empty or cannot be read by user $(id -u); see docker/secrets.sh" >&2
        exit 2
    fi
done
printf '%s:%s\n' "${DASHBOARD_USER:-bdense}" "$(openssl passwd -6 -in /run/secrets/dashboard)" > /tmp/htpasswd
cp "/etc/bdense/${TLS:-plain}.conf" /tmp/listen.conf
exec nginx -c /etc/bdense/nginx.conf -g 'daemon off;'
