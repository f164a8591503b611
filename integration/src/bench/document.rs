//! The parts of docs/performance.md that are written by the commands that measured them.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

/// Puts `text` between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of `file`.
pub fn replace(file: &Path, name: &str, text: &str) -> Result<()> {
    let whole = fs::read_to_string(file).with_context(|| format!("cannot read {file:?}"))?;
    let new = replaced(&whole, name, text).with_context(|| format!("in {}", file.display()))?;
    fs::write(file, new).with_context(|| format!("cannot write {}", file.display()))
}

/// Fails unless `file` has room for a section of this name: before an hour of measuring, not after.
pub fn expect_section(file: &Path, name: &str) -> Result<()> {
    let whole = fs::read_to_string(file).with_context(|| format!("cannot read {file:?}"))?;
    replaced(&whole, name, "").map(drop).with_context(|| format!("in {}", file.display()))
}

fn replaced(whole: &str, name: &str, text: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {name}: begin -->"), format!("<!-- {name}: end -->"));
    let Some((before, rest)) = whole.split_once(&begin) else {
        bail!("there is no line `{begin}`");
    };
    let Some((_, after)) = rest.split_once(&end) else {
        bail!("there is no line `{end}` after `{begin}`");
    };
    let text = text.trim_end();
    Ok(format!("{before}{begin}\n{text}\n{end}{after}"))
}

/// The machine, as /proc tells.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("unknown").to_owned();
    described(&read("/proc/cpuinfo"), read("/proc/sys/kernel/osrelease").trim(), &load)
}

fn described(cpuinfo: &str, kernel: &str, load: &str) -> String {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, value)| value)
    };
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    format!("{cpus} CPUs ({}), Linux {kernel}, load average {load} at the end", field("model name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# P\n<!-- a: begin -->\nold\n<!-- a: end -->\nkept\n<!-- ab: begin -->\n<!-- ab: end -->\n";

    #[test]
    fn only_the_section_of_that_name_is_replaced() {
        let once = replaced(DOCUMENT, "a", "new\n").unwrap();
        assert_eq!(
            once,
            "# P\n<!-- a: begin -->\nnew\n<!-- a: end -->\nkept\n<!-- ab: begin -->\n<!-- ab: end -->\n"
        );
        assert_eq!(replaced(&once, "a", "new\n\n").unwrap(), once, "writing again changes nothing");
        assert!(replaced(DOCUMENT, "ab", "x").unwrap().contains("begin -->\nx\n<!-- ab: end"));
    }

    #[test]
    fn a_document_without_the_markers_is_refused_and_left_alone() {
        assert!(replaced(DOCUMENT, "b", "x").is_err());
        assert!(replaced("<!-- a: end --><!-- a: begin -->", "a", "x").is_err());
        let dir = crate::workspace::TestDir::new("document").unwrap();
        let file = dir.join("p.md");
        fs::write(&file, DOCUMENT).unwrap();
        assert!(expect_section(&file, "b").is_err() && replace(&file, "b", "x").is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), DOCUMENT);
        expect_section(&file, "a").unwrap();
        replace(&file, "a", "x").unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("begin -->\nx\n<!-- a: end"));
    }

    #[test]
    fn the_machine_is_named() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A (R) B\nprocessor\t: 1\nmodel name\t: A\n";
        assert_eq!(
            described(cpuinfo, "6.1", "0.50"),
            "2 CPUs (A (R) B), Linux 6.1, load average 0.50 at the end"
        );
        assert!(described("", "6.1", "0").contains("0 CPUs (unknown)"));
    }
}
