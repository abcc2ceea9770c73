# shellcheck shell=bash
# Where the tools keep things, and which world this machine offers for guests. To be sourced.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that is made lies below: kernels, guests, results. Deleting it costs only time.
# shellcheck disable=SC2034
CACHE=${COWHAND_CACHE:-$REPO/target}

# True when the host's own KVM can run a stock kernel: the processor virtualizes, and /dev/kvm lets us in.
native_kvm_works() {
    [ "$(uname -m)" = x86_64 ] && grep -qwE 'vmx|svm' /proc/cpuinfo && (exec 3<>/dev/kvm) 2>/dev/null
}

# Prints native or emulated. COWHAND_WORLD overrides what the machine says.
choose_world() {
    case ${COWHAND_WORLD:-auto} in
    native | emulated) echo "$COWHAND_WORLD" ;;
    auto) if native_kvm_works; then echo native; else echo emulated; fi ;;
    *)
        echo "COWHAND_WORLD is ${COWHAND_WORLD}; it can be auto, native or emulated" >&2
        return 2
        ;;
    esac
}

# Waits until fewer emulated machines run than there are processors, and holds a place among them for as long as this script
# lives, or until it closes descriptor 4 (what it starts in the background should not inherit it).
take_place() {
    local place said=false
    mkdir -p "$CACHE/world"
    while :; do
        for place in $(seq "$(nproc)"); do
            exec 4>"$CACHE/world/place.$place"
            if flock -n 4; then return; fi
        done
        $said || say "as many emulated machines as processors run already; waiting for one to end"
        said=true
        sleep 1
    done
}
