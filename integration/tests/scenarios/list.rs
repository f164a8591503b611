//! docs/scenarios.md names tests that there are.

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_scenario_is_listed_with_tests_that_exist() {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let list = fs::read_to_string(root.join("docs/scenarios.md")).unwrap();
    let mut sources = String::new();
    for part in ["integration/tests", "storage-server", "live-migrate/tests"] {
        read(&root.join(part), &mut sources);
    }
    for number in 1..=22 {
        let begins = format!("| F{number} |");
        let row = list.lines().find(|line| line.starts_with(&begins)).expect("every scenario");
        for name in row.split('`').skip(1).step_by(2).filter(|word| is_function(word)) {
            let begins = format!("fn {}", name.trim_end_matches('*'));
            let whole = if name.ends_with('*') { "" } else { "(" };
            assert!(sources.contains(&format!("{begins}{whole}")), "F{number}: there is no {name}");
        }
    }
}

/// Neither a file nor a command, nor a point of the fault matrix.
fn is_function(word: &str) -> bool {
    word.contains('_') && word.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_' | '*'))
}

fn read(dir: &Path, into: &mut String) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}
