# shellcheck shell=bash
# Building cowhand as the worlds need it. To be sourced, after packages.sh and places.sh.

CARGO=${CARGO:-cargo}
static_target=x86_64-unknown-linux-gnu

need_rust() {
    need cc=gcc libc6-dev
    command -v "$CARGO" >/dev/null || die "needs Rust (cargo) on PATH: https://rustup.rs"
}

# Prints where the file is that this variable names.
given() {
    [ -f "${!1}" ] || die "$1: ${!1}: no such file"
    realpath "${!1}"
}

# Builds the static program and prints where it is. COWHAND_BIN names one that exists already.
build_cowhand() {
    if [ -n "${COWHAND_BIN:-}" ]; then
        given COWHAND_BIN
        return
    fi
    need_rust
    # The encoded form wins over RUSTFLAGS and is empty in most environments; the program must be static in all of them.
    (cd "$REPO" && env -u CARGO_ENCODED_RUSTFLAGS RUSTFLAGS="-C target-feature=+crt-static" \
        "$CARGO" build --quiet --release --locked --bin cowhand --target "$static_target") >&2 || return 1
    echo "${CARGO_TARGET_DIR:-$REPO/target}/$static_target/release/cowhand"
}

# Builds what measures the block engine and prints where it is. COWHAND_BENCH names one that exists already.
build_bench() {
    if [ -n "${COWHAND_BENCH:-}" ]; then
        given COWHAND_BENCH
        return
    fi
    need_rust
    (cd "$REPO" && "$CARGO" build --quiet --release --locked -p cowhand-bench) >&2 || return 1
    echo "${CARGO_TARGET_DIR:-$REPO/target}/release/cowhand-bench"
}
