use super::*;

fn parsed(words: &[&str]) -> Result<Asked, Wrong> {
    Arguments::parse(words.iter().map(OsString::from).collect(), "qemu-io")
}

fn arguments(words: &[&str]) -> Arguments {
    match parsed(words) {
        Ok(Asked::Run(arguments)) => *arguments,
        _ => panic!("{words:?}"),
    }
}

fn error(words: &[&str]) -> (String, bool) {
    match parsed(words) {
        Err(wrong) => (wrong.error, !wrong.usage.is_empty()),
        Ok(_) => panic!("{words:?}"),
    }
}

#[test]
fn options_may_stand_before_and_behind_the_file() {
    let found = arguments(&["-f", "raw", "-c", "read 0 1", "x.img", "-rn", "--cmd=map", "-cquit", "--read"]);
    assert_eq!(found.settings.format.as_deref(), Some("raw"));
    assert_eq!(found.commands, ["read 0 1", "map", "quit"]);
    assert_eq!(found.file.as_deref(), Some("x.img"));
    assert!(found.settings.read_only && found.settings.cache == cowhand_block::Cache::None);
}

#[test]
fn wrong_arguments_are_told_as_getopt_does() {
    assert_eq!(error(&["-Z"]), ("qemu-io: invalid option -- 'Z'\n".into(), true));
    assert_eq!(error(&["--foo"]), ("qemu-io: unrecognized option '--foo'\n".into(), true));
    assert_eq!(error(&["-c"]), ("qemu-io: option requires an argument -- 'c'\n".into(), true));
    assert_eq!(error(&["--format"]), ("qemu-io: option '--format' requires an argument\n".into(), true));
    assert_eq!(error(&["--help=x"]), ("qemu-io: option '--help' doesn't allow an argument\n".into(), true));
    assert_eq!(error(&["a", "b"]), (String::new(), true));
    assert_eq!(error(&["-t", "x"]), ("qemu-io: Invalid cache option: x\n".into(), false));
    assert_eq!(error(&["-d", "x"]), ("qemu-io: Invalid discard option: x\n".into(), false));
    assert_eq!(error(&["-i", "x"]), ("qemu-io: Invalid aio option: x\n".into(), false));
    assert_eq!(error(&["--image-opts", "-f", "raw", "a"]).0, "qemu-io: --image-opts and -f are mutually exclusive\n");
}
