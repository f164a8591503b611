//! `baton-vmm-stub`: a VMM without a machine, for tests that kill and freeze it. See `faults::vmm`.

use anyhow::Result;
use baton_integration::faults::vmm::{Config, Vmm};
use clap::Parser;
use std::path::PathBuf;

/// Plays a guest that stamps its disks, and obeys orders on a socket.
#[derive(Parser)]
struct Args {
    /// Number of this process, in the stamps it writes.
    #[arg(long)]
    number: u64,
    /// Where orders come, one JSON line each.
    #[arg(long)]
    control: PathBuf,
    /// Where the history goes, one JSON line for each request and answer.
    #[arg(long)]
    history: PathBuf,
    /// Directory of the guest's memory.
    #[arg(long)]
    memory: PathBuf,
    /// Socket of the back-end of each disk.
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let Args { number, control, history, memory, sockets } = Args::parse();
    Vmm::start(&Config { number, sockets, control, history, memory })?.serve()
}
