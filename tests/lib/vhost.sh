# shellcheck shell=bash
# What the tests share in which QEMU is the front-end and cowhand vhost-user-blk the disk. To be sourced after harness.sh; then
# the current directory is $T, so that sockets have short names. The processor is emulated everywhere (TCG): nothing here needs KVM.
#   serve NAME IMAGE...      a back-end, as process $backend, what it says in NAME.log; each IMAGE is a DISK with socket=
#   machine NAME DISK... [-- OPTION...]   QEMU, as process $qemu, what it says in NAME.stderr, the console in NAME.console;
#                            DISK is a socket, with options of the device behind a comma; OPTIONs are QEMU's
# Nothing of it outlives the test.

need python3=python3
cd "$T" || exit
ln -s "$GUEST/base.qcow2" base.qcow2

# serve_with OPTION... -- NAME IMAGE...: the same with options of cowhand vhost-user-blk.
serve() { serve_with -- "$@"; }
serve_with() {
    local options=() image name
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    name=$2
    shift 2
    for image; do options+=(--image "$image"); done
    setpriv --pdeathsig KILL "$BIN" --log-level info vhost-user-blk --allow-dir "$T" --allow-dir "$GUEST" "${options[@]}" >>"$name.log" 2>&1 4>&- &
    backend=$!
}

# listening SOCKET...: until all of them are there, at most 20 s.
listening() {
    local socket tries=0
    for socket; do
        until [ -S "$socket" ]; do
            tries=$((tries + 1))
            if [ $tries -gt 200 ]; then
                echo "no socket $socket"
                return 1
            fi
            sleep 0.1
        done
    done
}

# check_here NAME COMMAND...: as check, but by this shell, which alone can wait for what it started.
check_here() {
    local name=$1
    shift
    if "$@" >"$T/said" 2>&1; then
        ok "$name"
    else
        not_ok "$name"
        note "$(cat "$T/said")"
    fi
}

# backend_ends: SIGTERM ends the back-end with status 0 within 20 s.
backend_ends() {
    local status=0
    kill -TERM "$backend" || return 1
    await 20 gone "$backend" || kill -KILL "$backend"
    wait "$backend" || status=$?
    [ $status = 0 ] || echo "exit status $status"
    [ $status = 0 ]
}

# The memory is a file that the back-end maps too. The second serial port is how the test tells the guest something (tell).
machine() {
    local name=$1 disks=() index=0 word
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        word=${1#*,}
        [ "$word" != "$1" ] || word=
        disks+=(-chardev "socket,id=disk$index,path=${1%%,*},reconnect-ms=100"
            -device "vhost-user-blk-pci,chardev=disk$index${word:+,$word}")
        index=$((index + 1))
        shift
    done
    [ $# = 0 ] || shift
    rm -f "$name".tell.* "$name.qmp"
    mkfifo "$name.tell.in" "$name.tell.out"
    setpriv --pdeathsig KILL qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
        -M q35,memory-backend=memory,hpet=off -accel tcg,thread=multi,tb-size=512 -cpu max -smp 2 -m 512 \
        -object memory-backend-memfd,id=memory,size=512M,share=on \
        -chardev "file,id=console,path=$name.console" -device isa-serial,chardev=console \
        -chardev "pipe,id=tell,path=$name.tell" -device isa-serial,chardev=tell \
        -qmp "unix:$name.qmp,server=on,wait=off" "${disks[@]}" "$@" >"$name.stderr" 2>&1 4>&- &
    qemu=$!
}

# debian SCRIPT: QEMU's options that boot the guest from its first disk, to run the script once it is up. The script comes on a
# disk of QEMU's own: a kernel's command line has room for 2 KiB.
debian() {
    local command='sh /dev/disk/by-id/virtio-script' text
    text=$(
        cat <<'SCRIPT'
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
told() { echo "$1"; read -r x <&3; }
SCRIPT
        echo "$1"
    )
    # Whole sectors, filled with what a shell passes over.
    printf '%s\n%*s' "$text" $((511 - ${#text} % 512)) '' >script
    options=(-drive "if=none,id=script,file=script,format=raw,readonly=on" -device "virtio-blk-pci,drive=script,serial=script"
        -kernel "$GUEST/vmlinuz" -initrd "$GUEST/initrd" -append
        "console=ttyS0 root=/dev/vda1 rw mitigations=off random.trust_cpu=on panic=-1 cowhand.cmd=$(base64_of "$command")")
}

# await SECONDS COMMAND...: until the command succeeds.
await() {
    local until=$(($(date +%s) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $until ] || return 1
        sleep 0.1
    done
}
gone() { ! kill -0 "$1" 2>/dev/null || [ "$(cut -d' ' -f3 "/proc/$1/stat" 2>/dev/null)" = Z ]; }

# says NAME SECONDS REGEX: until the console has such a line. Fails when the machine has gone, or the time has.
says() {
    local until=$(($(date +%s) + $2))
    until console "$1" 2>/dev/null | grep -E -- "$3" >/dev/null; do
        if gone "$qemu" || [ "$(date +%s)" -ge $until ]; then
            said "$1" "$3"
            return
        fi
        sleep 0.2
    done
}

# tell NAME: what the guest's `told` waits for.
tell() { echo go >"$1.tell.in"; }

# ends NAME SECONDS: the guest powers off within that time, and QEMU ends with status 0.
ends() {
    local status=0
    await "$2" gone "$qemu" || {
        echo "still running after $2 s; the console's end:"
        console "$1" | tail -15
        kill -KILL "$qemu"
    }
    wait "$qemu" || status=$?
    [ $status = 0 ] && return
    echo "QEMU's status: $status"
    tail -5 "$1.stderr"
    return 1
}

qmp() { python3 "$REPO/tests/lib/qmp.py" "$@"; }
# The bytes of a file that the file system has given it.
room_of() { echo $(($(stat -c '%b * %B' "$1"))); }

# A test that goes on after a failure would only wait: give_up WHAT ends it.
give_up() {
    not_ok "$*"
    tail -5 ./*.log ./*.stderr 2>/dev/null | note_all
    exit 1
}
note_all() { sed 's/^/# /'; }

export QEMU_AUDIO_DRV=none
