//! `baton-probe PORT`: answers a test's commands on a serial port, from inside a guest.

use baton_probe::agent::{Agent, Next};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

fn main() -> ExitCode {
    let Some(port) = std::env::args().nth(1) else {
        eprintln!(
            "usage: baton-probe SERIAL_PORT   (inside a test guest; see integration/src/guest.rs)"
        );
        return ExitCode::from(64);
    };
    match serve(&port) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("baton-probe: {port}: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(port)?;
    raw_mode(file.as_raw_fd())?;
    let output = Arc::new(Mutex::new(file.try_clone()?));
    let mut agent = Agent::new(output.clone());
    // The test waits for this: what it sent before the port was raw would have been echoed back at it.
    io::Write::write_all(&mut *output.lock().expect("not yet shared"), b"ready\n")?;
    for line in BufReader::new(file).lines() {
        if agent.handle(&line?) == Next::PowerOff {
            return power_off();
        }
    }
    Ok(())
}

fn raw_mode(fd: i32) -> io::Result<()> {
    // SAFETY: termios is plain data for which all zeros is a value.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: a valid descriptor and a termios to fill.
    if unsafe { libc::tcgetattr(fd, &raw mut termios) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a termios that tcgetattr filled.
    unsafe { libc::cfmakeraw(&raw mut termios) };
    // SAFETY: a valid descriptor and a valid termios.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const termios) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn power_off() -> io::Result<()> {
    // SAFETY: no arguments. The answer has been written; let the port send it before the machine goes.
    unsafe { libc::sync() };
    // SAFETY: ends the machine, as asked.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
    Err(io::Error::last_os_error())
}
