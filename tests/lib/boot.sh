# shellcheck shell=sh
# Inside the world: boots one guest after another. To be sourced in $FILES.

# boot NAME CPUS debian|busybox CMDLINE BASE64_SCRIPT [OPTION...]: runs a guest to its end; leaves NAME.status, .console,
# .stderr and .seconds in $OUT. The options are cowhand's (--disk ...); --timeout and --on-reboot replace the usual.
boot() {
    boot_begin "$@"
    boot_end
}

# The same in two halves: between them the guest runs, as process $boot_pid.
boot_begin() {
    boot_name=$1 boot_cpus=$2 boot_kind=$3 boot_cmdline=$4 boot_script=$5
    shift 5
    case $boot_kind in
    debian) boot_initrd=initrd boot_cmdline="root=/dev/vda1 rw $boot_cmdline" ;;
    stock) boot_initrd=initrd-stock boot_cmdline="root=/dev/vda1 rw $boot_cmdline" ;;
    *) boot_initrd=initrd-busybox ;;
    esac
    case " $* " in
    *" --timeout "*) ;;
    *) set -- --timeout 400s "$@" ;;
    esac
    case " $* " in
    *" --on-reboot "*) ;;
    *) set -- --on-reboot exit "$@" ;;
    esac
    boot_start=$(date +%s)
    "$COWHAND" run --kernel vmlinuz --initrd $boot_initrd \
        --cmdline "console=ttyS0 $boot_cmdline${boot_script:+ cowhand.cmd=$boot_script}" \
        --cpus "$boot_cpus" --serial "file:$OUT/$boot_name.console" "$@" \
        >"$OUT/$boot_name.stdout" 2>"$OUT/$boot_name.stderr" &
    boot_pid=$!
}

boot_end() {
    boot_status=0
    wait "$boot_pid" || boot_status=$?
    echo "$boot_status" >"$OUT/$boot_name.status"
    echo $(($(date +%s) - boot_start)) >"$OUT/$boot_name.seconds"
    echo "$boot_name: status $boot_status after $(cat "$OUT/$boot_name.seconds") s"
}

# wait_for_line NAME REGEX SECONDS: until the console has such a line.
wait_for_line() {
    waited=0
    until grep -qE "$2" "$OUT/$1.console" 2>/dev/null; do
        [ "$waited" -lt "$3" ] && kill -0 "$boot_pid" 2>/dev/null || return 1
        sleep 1
        waited=$((waited + 1))
    done
}
