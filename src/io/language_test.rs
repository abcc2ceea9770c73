use super::*;

/// Options, and then the operands or what is wrong.
type Taken = (Vec<(char, String)>, Result<Vec<String>, String>);

fn taken(line: &str, known: &str) -> Taken {
    let words = words(line);
    let mut options = Options::new(&words, known);
    let mut found = Vec::new();
    loop {
        match options.next() {
            Ok(Some((letter, argument))) => found.push((letter, argument.to_string())),
            Ok(None) => return (found, Ok(options.operands().into_iter().map(str::to_string).collect())),
            Err(message) => return (found, Err(message)),
        }
    }
}

fn all(options: &[(char, &str)], operands: &[&str]) -> Taken {
    let options = options.iter().map(|(letter, argument)| (*letter, argument.to_string())).collect();
    (options, Ok(operands.iter().map(|word| word.to_string()).collect()))
}

#[test]
fn options_may_stand_anywhere_and_together() {
    assert_eq!(taken("write 0 -qP3 1k -z", "P:qz"), all(&[('q', ""), ('P', "3"), ('z', "")], &["0", "1k"]));
    assert_eq!(taken("read  -P  0x5   - 7", "P:"), all(&[('P', "0x5")], &["-", "7"]));
}

#[test]
fn two_hyphens_end_the_options() {
    assert_eq!(taken("write -q -- -1 -q", "q"), all(&[('q', "")], &["-1", "-q"]));
}

#[test]
fn unknown_options_and_missing_arguments_are_told_as_getopt_does() {
    assert_eq!(taken("w -qx 1", "q"), (vec![('q', String::new())], Err("w: invalid option -- 'x'".into())));
    assert_eq!(taken("open -o", "o:").1, Err("open: option requires an argument -- 'o'".into()));
    assert_eq!(taken("w -:", "o:").1, Err("w: invalid option -- ':'".into()));
}

#[test]
fn an_empty_line_has_no_words() {
    assert!(words("   ").is_empty());
}
