# Sourced by the scripts beside it, from the top of the checkout.

# Install Debian packages where that is possible; elsewhere say what is wanted.
system_packages() {
    missing=
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing:$missing"
        apt-get update -qq
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing \
            >/dev/null
    else
        echo "please install (Debian's names):$missing" >&2
        return 1
    fi
}

# Print the newest Python from 3.10 on that can make virtual environments.
find_python() {
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' \
            2>/dev/null; then
            echo "$python"
            return
        fi
    done
    return 1
}

# Make .venv unless it is there already.
make_venv() {
    [ -x .venv/bin/pip ] && return
    if ! python=$(find_python); then
        system_packages python3-venv
        python=$(find_python) || {
            echo "Python 3.10 or later with venv is needed" >&2
            return 1
        }
    fi
    "$python" -m venv .venv
}
