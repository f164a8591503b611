//! `baton-bench-null`: the backend's own disk server on a volume that does nothing. For `baton-bench compare --a
//! baton-null --b qsd-null`, which sets it against qemu-storage-daemon's null-co; started by nobody else.

mod volume;

use anyhow::Context;
use baton_backend::disk::{DiskOptions, DiskServer, Shutdown};
use baton_backend::socket::{FrontEnds, Permissions};
use clap::Parser;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use volume::{NullVolume, SECTOR_BYTES};

/// Serves a disk that completes everything at once and keeps nothing.
#[derive(Debug, Parser)]
#[command(name = "baton-bench-null")]
struct Cli {
    /// Where a front-end connects
    #[arg(long)]
    socket_path: PathBuf,
    /// Queues offered
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Size of the disk, bytes
    #[arg(long, default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(SECTOR_BYTES..))]
    size: u64,
    /// Microseconds to look for requests before sleeping, as baton-backend has it
    #[arg(long, default_value_t = 0)]
    poll_us: u64,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let permissions = Permissions { mode: 0o600, group: None };
    let front_ends = FrontEnds::bind(&cli.socket_path, &permissions)?;
    let options = DiskOptions {
        name: "null".to_owned(),
        num_queues: cli.num_queues,
        // As baton-backend has it.
        queue_size: 128,
        read_only: false,
        poll_us: cli.poll_us,
    };
    let server = DiskServer::new(Arc::new(NullVolume::new(cli.size)), &options, None)
        .context("cannot serve the disk")?;
    // Until it is killed: nothing is kept that an end could lose.
    let shutdown = Shutdown::new()?;
    let _ = writeln!(std::io::stderr(), "listening socket={}", cli.socket_path.display());
    server.run(front_ends, &shutdown);
    Ok(())
}
