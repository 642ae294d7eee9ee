# shellcheck shell=bash
# shellcheck disable=SC2034 # Some variables are only read by the scripts that source this file.
# Helpers shared by the scripts of this folder. Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
cache=${XDG_CACHE_HOME:-$HOME/.cache}

# Everything said goes to stderr: the stdout of these scripts is data that other programs read.
say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# quietly COMMAND...: shows what the command printed only if it fails.
quietly() {
    local log code=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || code=$?
    [ "$code" = 0 ] || cat "$log" >&2
    rm -f "$log"
    return "$code"
}

# need PACKAGE PROBE...: notes that the package is missing unless the command PROBE succeeds. Asking for
# what is used, rather than for the package, also accepts what came from elsewhere (a newer Java, say).
missing=()
need() {
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

# Installs what `need` noted, where that can be done without asking; elsewhere says what to install.
install_needed() {
    [ ${#missing[@]} -gt 0 ] || return 0
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    if ! command -v apt-get >/dev/null || { [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; }; then
        die "please install, by the names that your system gives to these Debian packages: ${missing[*]}"
    fi
    say "installing ${missing[*]}"
    # One broken source of many is no reason to give up: what is needed may come from the others.
    quietly "${as_root[@]}" apt-get update || say "apt-get update failed, trying with the lists that are there"
    # What is in the way, MySQL where MariaDB is wanted for example, is the user's and stays.
    quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends --no-remove "${missing[@]}"
    missing=()
}

version_at_least() { # FOUND WANTED
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# The compiler is never installed for the user: the packages of most systems are too old, and how Rust is
# installed is a choice that people make once for all their projects.
# shellcheck disable=SC2120 # Not every script needs a component.
need_rust() { # [COMPONENT...]
    local wanted found component
    command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    found=$(cargo --version 2>/dev/null | cut -d' ' -f2) || found=none
    version_at_least "${found/none/0}" "$wanted" || die "Rust $wanted or newer is needed, found: $found.
The packages of Debian and Ubuntu are often older. Install rustup (Debian 13 and Ubuntu 24.04 have it as a
package; elsewhere its own site tells how), then run: rustup default stable"
    for component in "$@"; do
        cargo "$component" --version >/dev/null 2>&1 || die "cargo $component is missing: rustup component add $component"
    done
}

# What a build of the workspace needs beside Rust. librdkafka is built from source by its own configure
# script, with a C and a C++ compiler, make and bash; SQLite and zstd come with their sources, too.
need_build() {
    need build-essential c++ --version
    need build-essential make --version
    need pkg-config pkg-config --version
    install_needed # The next two questions are put to pkg-config itself.
    need libssl-dev pkg-config --exists openssl
    need zlib1g-dev pkg-config --exists zlib
    install_needed
}
