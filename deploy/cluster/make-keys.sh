#!/bin/sh
# Keys of the compose cluster, each participant's in a volume of its own, made once.
#
# All private keys are on one machine here; docs/security.md says how real sites do it.
set -eu
umask 077
all=/keys/all
owner=10001:10001 # the user of deploy/Dockerfile

fedphd keys dev --out "$all" --edges 2 --clients 4

# give NAME: a participant gets the authority's certificate and what is its own.
give() {
    into=/keys/$1
    cp "$all/ca.pem" "$into/ca.pem"
    for part in server.pem:.pem server.key:.key node:-node; do
        file=$all/$1${part#*:}
        if [ -e "$file" ]; then cp "$file" "$into/${part%%:*}"; fi
    done
    case $1 in
    cloud) cp -R "$all/edges/." "$into/nodes" ;;
    edge-*) cp -R "$all/clients/." "$into/nodes" ;;
    esac
    chown -R "$owner" "$into"
}

for folder in /keys/*/; do
    name=$(basename "$folder")
    [ "$name" = all ] || give "$name"
done
