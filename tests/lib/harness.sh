# shellcheck shell=bash
# What the tests that boot guests share: results as TAP lines, the world, and looks at disks with QEMU's and ext4's own
# tools. To be sourced by a test, which then has:
#   $BIN    cowhand, static          $GUEST  what tools/guest made          $T  an empty directory of the test's own
# A test prints `ok NAME`, `not ok NAME` or `ok NAME # SKIP why`, and what helps to understand it on lines with `# `.

set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
test_name=$(basename "$0")
export TOOL=tests/$test_name
# shellcheck source=../../tools/lib/packages.sh
. "$REPO/tools/lib/packages.sh"
# shellcheck source=../../tools/lib/places.sh
. "$REPO/tools/lib/places.sh"
# shellcheck source=../../tools/lib/build.sh
. "$REPO/tools/lib/build.sh"
PATH=$PATH:/usr/sbin:/sbin

case ${1:-} in
--help | -h)
    sed -n '2,/^[^#]/{ s/^# \{0,1\}//p; }' "$0"
    echo "Prints TAP lines; tools/test $test_name counts them. COWHAND_BIN=PATH tests that program instead of building one."
    exit
    ;;
esac

failures=0
ok() { echo "ok $*"; }
not_ok() {
    echo "not ok $*"
    failures=$((failures + 1))
}
note() { sed 's/^/# /' <<<"$*"; }
skip() { echo "ok $1 # SKIP $2"; }

# check NAME COMMAND...: one result; what the command printed is shown when it fails.
check() {
    local name=$1 said
    shift
    if said=$("$@" 2>&1); then
        ok "$name"
    else
        not_ok "$name"
        note "$said"
    fi
}

# The test's last line: a test that saw a failure ends with status 1.
finish() { [ "$failures" = 0 ]; }

BIN=$(build_cowhand) || die "cowhand does not build"
GUEST=$("$REPO/tools/guest" --compressed)
T=$CACHE/tests/$test_name
rm -rf "$T"
mkdir -p "$T"
# Two worlds run at once at most. Each emulated machine has one processor: with more, QEMU's SVM takes a guest down now and then
# (docs/testing.md says why). A guest's vCPUs share it.
world_processors=1

# world DIR SECONDS [OPTION...]: runs DIR/script with DIR/files in the world; what it leaves is in DIR/out.
world() {
    local dir=$1 seconds=$2 status=0 try
    shift 2
    # QEMU's emulation of SVM can bring down the machine that it emulates (below); that says nothing about cowhand, so it
    # gets two more tries. A guest that fails gets none.
    for try in 1 2 3; do
        status=0
        run_world "$dir" "$seconds" "$@" || status=$?
        if [ "$status" != 125 ] || [ "$try" = 3 ]; then break; fi
        note "$(basename "$dir"): the emulated machine itself broke down; again. $(tail -3 "$dir/world.log")"
        rm -rf "$dir/out" && mkdir "$dir/out"
    done
    if [ "$status" != 0 ]; then
        not_ok "$(basename "$dir"): the world's script ends with status 0, not $status"
        note "$(tail -25 "$dir/world.log")"
    fi
    return 0
}

run_world() {
    local dir=$1 seconds=$2
    shift 2
    setpriv --pdeathsig TERM "$REPO/tools/world" run --bin "$BIN" --files "$dir/files" --script "$dir/script" --out "$dir/out" \
        --timeout "$seconds" --smp "$world_processors" "$@" >"$dir/world.log" 2>&1
}

# new_world DIR GUEST_FILE...: an empty files directory with those of the guest's files and the boot function.
new_world() {
    local dir=$1 file
    shift
    mkdir -p "$dir/files" "$dir/out"
    cp "$REPO/tests/lib/boot.sh" "$dir/files/"
    for file in vmlinuz "$@"; do ln -s "$GUEST/$file" "$dir/files/$file"; done
    echo ". ./boot.sh" >"$dir/script"
}

# --- looking at what a guest left ------------------------------------------------------------------------------------

# The console without carriage returns and colours.
console() { tr -d '\r' <"$1.console" | sed 's/\x1b\[[0-9;]*[A-Za-z]//g'; }

# exited DIR/NAME STATUS: the boot ended with that status.
exited() {
    local status
    status=$(cat "$1.status" 2>/dev/null || echo "none at all")
    [ "$status" = "$2" ] && return
    echo "exit status $status instead of $2; stderr:"
    tail -5 "$1.stderr" 2>/dev/null
    echo "the console's end:"
    console "$1" 2>/dev/null | tail -15
    return 1
}

# said DIR/NAME REGEX: the console has such a line.
said() {
    # Not `grep -q`: it stops at the first hit, and what still writes to it would fail the pipe (pipefail).
    console "$1" 2>/dev/null | grep -E -- "$2" >/dev/null && return
    echo "no line on the console like: $2; its end:"
    console "$1" 2>/dev/null | tail -15
    return 1
}

# sound IMAGE FORMAT: qemu-img check finds neither corruption nor leaks. Raw images have nothing to check.
sound() { [ "$2" = raw ] || qemu-img check -f "$2" "$1"; }

# uncorrupted IMAGE: the same, leaks allowed.
uncorrupted() {
    local status=0
    qemu-img check -f qcow2 "$1" || status=$?
    [ "$status" = 0 ] || [ "$status" = 3 ]
}

# as_raw IMAGE FORMAT OUT: the whole content, as QEMU reads it.
as_raw() { qemu-img convert -f "$2" -O raw "$1" "$3"; }

# The partition lies 1 MiB into the disk (tools/guest).
partition() { echo "$1?offset=1048576"; }
clean_ext4() { e2fsck -fn "$(partition "$1")"; }

# same_files RAW GUEST_DIR WORK: the files of that directory have the checksums that its SUMS lists.
same_files() {
    rm -rf "$3" && mkdir -p "$3"
    debugfs -R "rdump $2 $3" "$(partition "$1")" >"$3.log" 2>&1
    (cd "$3/$(basename "$2")" && [ -s SUMS ] && sha256sum --quiet -c SUMS)
}

base64_of() { base64 -w0 <<<"$1"; }

# What a guest does whose disk is looked at afterwards: writes files large and small, flushes, gives some of it back, sums what is there.
# shellcheck disable=SC2034
guest_writes='mkdir /root/written; cd /root/written
head -c 16000000 /dev/urandom >large
for i in $(seq 100); do head -c $((i * 331)) /dev/urandom >small.$i; done
sync
rm small.5? /usr/bin/fio; fstrim / || true
sha256sum large small.* >SUMS; sync
echo "written: $(sha256sum <SUMS)"'

# left_files TITLE DIR/NAME IMAGE FORMAT: what that (guest_writes) has left in the image; the console is DIR/NAME's.
left_files() {
    local title=$1 name=$2 image=$3 format=$4 back=$2.back sums
    check "$title: qemu-img check" sound "$image" "$format"
    check "$title: QEMU reads it" as_raw "$image" "$format" "$back.raw"
    check "$title: ext4 is clean" clean_ext4 "$back.raw"
    check "$title: what the guest wrote is there" same_files "$back.raw" /root/written "$back"
    sums=$(sha256sum 2>/dev/null <"$back/written/SUMS" | cut -c1-64)
    check "$title: and is what the guest summed" said "$name" "^written: ${sums:-none} "
    rm -rf "$back" "$back.raw" "$back.log"
}
