# shellcheck shell=bash
# Packages the tools need: what is missing is named, then installed with apt. To be sourced.
#
# sudo is used only when not root. The apt configuration is touched in one case alone: QEMU's packages on this machine
# come from its release's backports, the suite is not enabled, and the machine is nobody's desk (CI, a container); see
# need_qemu.

say() { printf '%s: %s\n' "${TOOL:-tools}" "$*" >&2; }
die() {
    say "$*"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

have_package() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt_install() {
    command -v apt-get >/dev/null || die "needs $* and this machine has no apt-get; install them by hand"
    say "installing packages: $*"
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
    as_root "${apt[@]}" install --no-install-recommends "$@" >/dev/null 2>&1 && return
    # Most often the package lists are missing or old.
    as_root "${apt[@]}" update >&2 || say "apt-get update failed; trying with the lists there are"
    as_root "${apt[@]}" install --no-install-recommends "$@" >&2 || die "apt-get could not install: $*"
}

# need PROGRAM=PACKAGE...: installs the packages of those programs that are not there. A word without '=' is a package
# that brings no program (a library, a kernel).
need() {
    local word missing=()
    for word in "$@"; do
        case $word in
        *=*) PATH=$PATH:/usr/sbin:/sbin command -v "${word%%=*}" >/dev/null || missing+=("${word#*=}") ;;
        *) have_package "$word" || missing+=("$word") ;;
        esac
    done
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

# True on a machine that no person has set up for themselves: CI, a container, a root shell without a terminal.
is_disposable_machine() {
    [ -n "${CI:-}" ] || [ -e /.dockerenv ] || [ -e /run/.containerenv ] ||
        { [ "$(id -u)" = 0 ] && [ -z "${SUDO_USER:-}" ] && ! [ -t 0 ]; }
}

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# Enables the release's backports by adding them to the Suites of the sources file that is there.
enable_backports() {
    local suite=$1 file
    apt-cache policy 2>/dev/null | grep "n=$suite," >/dev/null && return
    file=$(grep -lsE "^Suites:.*\\b${suite%-backports}-updates\\b" /etc/apt/sources.list.d/*.sources | head -1)
    [ -n "$file" ] || die "cannot enable $suite: no sources file names ${suite%-backports}-updates"
    say "adding the suite $suite to $file"
    as_root sed -i -E "/^Suites:.*\\b$suite\\b/! s/^(Suites:.*\\b${suite%-backports}-updates\\b)/\\1 $suite/" "$file"
    as_root apt-get -qq update >&2 || die "apt-get update failed after enabling $suite"
}

# QEMU (system emulator and tools). The one that is there is used. Where only its tools are there and come from
# backports, the release's own emulator would remove them: then the emulator is taken from backports too.
need_qemu() {
    local wanted=() suite installed candidate
    command -v qemu-system-x86_64 >/dev/null || wanted+=(qemu-system-x86)
    command -v qemu-img >/dev/null || wanted+=(qemu-utils)
    [ ${#wanted[@]} = 0 ] && return
    installed=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
    if [ -n "$installed" ] && [[ " ${wanted[*]} " == *" qemu-system-x86 "* ]]; then
        candidate=$(apt-cache policy qemu-system-x86 2>/dev/null | sed -n 's/^ *Candidate: //p')
        if [ -z "$candidate" ]; then
            as_root apt-get -qq update >&2 || true
            candidate=$(apt-cache policy qemu-system-x86 2>/dev/null | sed -n 's/^ *Candidate: //p')
        fi
        if [ "$candidate" != "$installed" ]; then
            suite=$(codename)-backports
            if ! apt-cache policy 2>/dev/null | grep "n=$suite," >/dev/null && ! is_disposable_machine; then
                die "qemu-utils $installed is here but no qemu-system-x86 of that version; enable $suite (or the source" \
                    "qemu-utils came from), install qemu-system-x86, and run this again"
            fi
            enable_backports "$suite"
            apt_install -t "$suite" qemu-system-x86 qemu-utils
            return
        fi
    fi
    apt_install "${wanted[@]}"
}
