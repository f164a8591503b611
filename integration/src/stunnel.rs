//! stunnel under test: TLS in front of what has none, by the example in `configs/`.

use crate::baton::{READY_TIMEOUT, wait_until};
use crate::daemon::Daemon;
use crate::port::free_port;
use crate::workspace::system_program;
use anyhow::{Result, bail};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/stunnel-storage.conf");

/// A proxy that ends TLS. Killed when dropped.
#[derive(Debug)]
pub struct Stunnel {
    /// Its process.
    pub daemon: Daemon,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Stunnel {
    /// Starts one in front of `admin`, with certificates of `tls`, where those of the example are by the same names.
    pub fn start(dir: &Path, admin: SocketAddr, tls: &Path) -> Result<Self> {
        let address = free_port()?;
        let mut text = fs::read_to_string(EXAMPLE)?;
        for (example, ours) in [
            ("10.0.0.21:7701", address.to_string()),
            ("127.0.0.1:7701", admin.to_string()),
            ("/etc/baton/tls", tls.display().to_string()),
        ] {
            if !text.contains(example) {
                bail!("no {example} in {EXAMPLE}");
            }
            text = text.replace(example, &ours);
        }
        let file = dir.join("stunnel.conf");
        fs::write(&file, text)?;
        let daemon =
            Daemon::start(dir, "stunnel", &system_program("stunnel4")?, [file.as_os_str()])?;
        wait_until("stunnel listens", READY_TIMEOUT, || TcpStream::connect(address).is_ok())?;
        Ok(Self { daemon, address })
    }
}
