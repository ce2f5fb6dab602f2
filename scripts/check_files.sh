#!/bin/sh
# Two checks of what is about to be committed; names each file that fails and exits 1.
# Usage: scripts/check_files.sh end-of-file|large-file FILE...
set -eu
check=$1
shift
max_bytes=1048576
status=0

complain() {
    printf '%s\n' "$1" >&2
    status=1
}

for file in "$@"; do
    case $check in
    end-of-file)
        [ -s "$file" ] || continue
        last=$(tail -c 1 "$file" | od -An -tx1 | tr -d ' ')
        last_two=$(tail -c 2 "$file" | od -An -tx1 | tr -d ' ')
        [ "$last" = 0a ] || complain "$file: no newline at the end"
        [ "$last_two" != 0a0a ] || complain "$file: empty lines at the end"
        ;;
    large-file)
        n_bytes=$(wc -c <"$file")
        [ "$n_bytes" -le "$max_bytes" ] || complain "$file: $n_bytes bytes; the limit is $max_bytes"
        ;;
    *)
        complain "unknown check: $check"
        ;;
    esac
done
exit $status
