use super::*;

#[test]
fn every_end_has_the_status_of_the_design() {
    let cases = [
        (Exit::PowerOff, 0),
        (Exit::Quit, 0),
        (Exit::Stopped("by a test"), 1),
        (Exit::Failed("test".into()), 1),
        (Exit::Reset, 32),
        (Exit::Crash("test".into()), 33),
        (Exit::Panic, 34),
        (Exit::Timeout, 124),
    ];
    for (exit, status) in cases {
        assert_eq!(report(&exit), status, "{exit:?}");
    }
}

#[test]
fn arguments_have_the_defaults_of_the_design() {
    let args = Args::try_parse_from(["run"]).unwrap();
    assert_eq!(args.memory, 512 << 20);
    assert_eq!((args.cpus, args.serial), (1, SerialConfig::Stdio));
    assert!(args.timeout.is_none() && args.kernel.is_none());
}

#[test]
fn a_run_without_a_kernel_is_a_usage_error() {
    let failure = run(&Args::try_parse_from(["run"]).unwrap()).err().unwrap();
    assert_eq!(failure.status, EXIT_USAGE);
    assert!(failure.message.contains("--kernel"));
}
