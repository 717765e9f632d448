#!/bin/sh
# Become user 65534 with CAP_BPF alone, or with nothing where the container was not given it,
# and start the server. Needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP, which Docker gives.
set -eu
kept=-all,+bpf
setpriv --inh-caps=$kept --ambient-caps=$kept true 2>/dev/null || kept=-all
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \
	--bounding-set=$kept --inh-caps=$kept --ambient-caps=$kept "$@"
