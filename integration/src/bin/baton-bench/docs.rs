//! Writing a section of docs/performance.md, which only happens when it is asked for.

use anyhow::Result;
use baton_integration::bench::document::{expect_section, machine, replace};
use clap::Args;
use std::path::{Path, PathBuf};

/// Switches of every command that has a section.
#[derive(Debug, Args)]
pub(crate) struct DocsArgs {
    /// Replace this command's section in the document
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "docs/performance.md")]
    write_docs: Option<PathBuf>,
    /// Commit to name there
    #[arg(long, default_value = "unknown")]
    pub(crate) commit: String,
}

impl DocsArgs {
    /// Fails now if the section could not be written later.
    pub(crate) fn check(&self, section: &str) -> Result<()> {
        self.write_docs.as_ref().map_or(Ok(()), |file| expect_section(file, section))
    }

    /// Writes the section, if that was asked for.
    pub(crate) fn write(&self, section: &str, text: &str) -> Result<()> {
        self.write_docs.as_ref().map_or(Ok(()), |file| replace(file, section, text))
    }

    /// The document's folder, if it is to be written.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.write_docs.as_ref().map(|file| file.parent().unwrap_or(Path::new("")))
    }

    /// "2 CPUs (...), Linux ..., idle CPUs kept from halting, commit abc".
    pub(crate) fn facts(&self, awake: bool) -> String {
        let idle = if awake { "kept from halting" } else { "free to halt" };
        format!("{}, idle CPUs {idle}, commit {}", machine(), self.commit)
    }
}
