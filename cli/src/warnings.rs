//! What the drivers of volumes warn of while a command runs, for the operator: a line each on standard error, which has
//! neither answers nor `--json`. A progress line that is there makes room, and comes back by itself.

use std::io::{self, IsTerminal, Write};

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// From here on they are shown.
pub(crate) fn show() {
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(false)
        // What cannot be printed must not end the command.
        .log_internal_errors(false)
        .with_writer(Stderr { terminal: io::stderr().is_terminal() })
        .init();
}

#[derive(Clone, Copy, Debug)]
struct Stderr {
    terminal: bool,
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { terminal: self.terminal, word: "warning" }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Line {
        let word = if *meta.level() == Level::ERROR { "error" } else { "warning" };
        Line { word, ..self.make_writer() }
    }
}

/// One event, which is written at once.
#[derive(Debug)]
struct Line {
    terminal: bool,
    word: &'static str,
}

impl Line {
    fn text(&self, event: &[u8]) -> Vec<u8> {
        let over = if self.terminal { "\r\x1b[K" } else { "" };
        [format!("{over}baton: {}: ", self.word).as_bytes(), event].concat()
    }
}

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        io::stderr().lock().write_all(&self.text(event))?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminals_progress_line_makes_room() {
        let line = |terminal| Line { terminal, word: "warning" }.text(b"slow\n");
        assert_eq!(line(true), b"\r\x1b[Kbaton: warning: slow\n");
        assert_eq!(line(false), b"baton: warning: slow\n");
    }
}
