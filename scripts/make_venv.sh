#!/bin/sh
# Makes a virtual environment with the first Python >= 3.11 that can, or says what to install.
# Usage: [PYTHON=python3.12] scripts/make_venv.sh DIRECTORY
set -eu
venv=$1

say() { printf '%s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Debian ships the venv module without ensurepip until python3-venv is installed.
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

found=
lacking=
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3 /usr/bin/python3}; do
    is_new_enough "$python" || continue
    if has_venv "$python"; then
        found=$python
        break
    fi
    lacking=${lacking:-$python}
done

if [ -z "$found" ] && [ -n "$lacking" ]; then
    package=$("$lacking" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        say "$lacking cannot make virtual environments: it lacks the ensurepip module."
        say "Install it (Debian, Ubuntu: sudo apt-get install $package) and run make again."
        exit 1
    fi
    say "$lacking lacks the ensurepip module: installing $package"
    apt-get update && apt-get install --yes --no-install-recommends "$package"
    found=$lacking
fi

if [ -z "$found" ]; then
    say "No Python 3.11 or newer among: ${PYTHON:-python3.11 python3.12 python3.13 python3}."
    say "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv),"
    say "or name it: make PYTHON=/path/to/python3.12 ..."
    exit 1
fi

say "Making $venv with $("$found" --version) ($(command -v "$found"))"
"$found" -m venv --clear "$venv"
