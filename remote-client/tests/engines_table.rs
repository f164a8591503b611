//! The table of docs/engines.md says what the drivers say of themselves. `BLESS=1` writes it.

use std::path::Path;

use baton_remote_client::{Capabilities, Engine};

const BEGIN: &str = "<!-- drivers: made from the code; BLESS=1 cargo test -p baton-remote-client --test engines_table -->\n";
const END: &str = "<!-- /drivers -->\n";

/// A row of the table: what it is about, and what one engine has.
type Row = (&'static str, fn(&Capabilities) -> String);

const ROWS: [Row; 7] = [
    ("`fence`", |has| format!("`{}`", has.fence)),
    ("a running VM moves", |has| if has.handoff { "yes" } else { "no" }.to_owned()),
    ("a disk has several queues", |has| has.queues.to_string()),
    ("a discard gives space back", |has| has.discard.to_string()),
    ("a running guest is told of growth", |has| has.growth.to_string()),
    ("requests wait while the storage is away", |has| has.waits.to_string()),
    ("what is sent is encrypted", |has| has.encrypted.to_string()),
];

fn table() -> String {
    let names = Engine::ALL.map(|engine| format!(" `{engine}` |")).concat();
    let mut table = format!("| |{names}\n|---|{}\n", "---|".repeat(Engine::ALL.len()));
    for (what, cell) in ROWS {
        let cells = Engine::ALL.map(|engine| format!(" {} |", cell(engine.capabilities())));
        table.push_str(&format!("| {what} |{}\n", cells.concat()));
    }
    table
}

#[test]
fn the_document_has_the_table_of_the_code() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/engines.md");
    let text = std::fs::read_to_string(&file).expect("docs/engines.md");
    let (before, rest) = text.split_once(BEGIN).expect("the place of the table");
    let (written, after) = rest.split_once(END).expect("the end of the table");
    if std::env::var_os("BLESS").is_some() {
        let text = format!("{before}{BEGIN}{}{END}{after}", table());
        std::fs::write(&file, text).expect("written");
    } else {
        assert_eq!(written, table(), "run the command that stands above the table");
    }
}
