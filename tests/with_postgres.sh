#!/usr/bin/env bash
# Runs a command with a PostgreSQL of its own, which is gone afterwards:
#   tests/with_postgres.sh python -m pytest tests/adapters
# The server's programs come from PG_BIN, from PATH or from where Debian puts them; driver: pip install '.[postgres]'.
set -euo pipefail

programs=${PG_BIN:-}
if [ -z "$programs" ] && command -v initdb > /dev/null; then programs=$(dirname "$(command -v initdb)"); fi
if [ -z "$programs" ]; then programs=$(ls -d /usr/lib/postgresql/*/bin 2> /dev/null | sort -V | tail -n 1); fi
[ -x "$programs/initdb" ] || { echo "no PostgreSQL here: set PG_BIN to the directory of initdb" >&2; exit 2; }

directory=$(mktemp -d)
owner=()  # PostgreSQL refuses to run as root
if [ "$(id -u)" = 0 ]; then
    chown nobody "$directory"
    owner=(setpriv --reuid=nobody --regid="$(id -g nobody)" --clear-groups)
fi
run() { (cd "$directory" && "${owner[@]}" "$@"); }
finish() { run "$programs/pg_ctl" -D data -m immediate stop > /dev/null 2>&1 || true; rm -rf "$directory"; }
trap finish EXIT

run "$programs/initdb" -D data -U eda -A trust -E UTF8 > "$directory/log" 2>&1 || { cat "$directory/log" >&2; exit 1; }
port=${PG_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
run "$programs/pg_ctl" -D data -w -l server.log -o "-c listen_addresses=127.0.0.1 -p $port -k $directory -c fsync=off" \
    start > /dev/null || { cat "$directory/server.log" >&2; exit 1; }
EDA_TEST_POSTGRES_URL="postgresql://eda@127.0.0.1:$port/postgres" "$@"
