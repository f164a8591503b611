//! A small client of QEMU's control protocol: one command at a time, events kept in order.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// QEMU's main loop can be held up by a slow vhost-user backend; this is beyond any such wait in a test.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let mut qmp =
            Self { reader: BufReader::new(stream), partial: Vec::new(), events: VecDeque::new() };
        let greeting =
            qmp.next_message(Instant::now() + COMMAND_TIMEOUT)?.context("no greeting")?;
        if greeting.get("QMP").is_none() {
            bail!("this is no QMP server: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot send {command}"))?;
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            let Some(mut message) = self.next_message(deadline)? else {
                bail!("no answer to {command}")
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!(
                    "{command}: {}",
                    error["desc"].as_str().unwrap_or("an error without a description")
                );
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for the next event for which `wanted` holds. Others before it are dropped.
    pub fn wait_event(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            match self.next_message(deadline)? {
                Some(message) if message.get("event").is_some() => self.events.push_back(message),
                Some(_) => {}
                None => bail!("the event did not come in {timeout:?}"),
            }
        }
    }

    /// Waits for a MIGRATION event with this status.
    pub fn wait_migration(&mut self, status: &str, timeout: Duration) -> Result<Value> {
        self.wait_event(timeout, |e| e["event"] == "MIGRATION" && e["data"]["status"] == status)
            .with_context(|| format!("waiting for the migration to be {status}"))
    }

    fn next_message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            // What has arrived of a line stays in `partial` when the time is up in its middle.
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => bail!("QEMU closed its control socket"),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return Ok(Some(
                        serde_json::from_slice(&line)
                            .context("QEMU sent something that is no JSON")?,
                    ));
                }
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e).context("reading QEMU's control socket"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn server(script: Vec<(&'static str, String)>) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            for (expect, answer) in script {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                assert!(line.contains(expect), "{line}");
                // In two halves, as a slow sender would.
                let (a, b) = answer.split_at(answer.len() / 2);
                stream.write_all(a.as_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(30));
                stream.write_all(b.as_bytes()).unwrap();
            }
            std::thread::sleep(Duration::from_secs(5));
        });
        (dir, path)
    }

    #[test]
    fn answers_errors_and_events_are_told_apart() {
        let (_dir, path) = server(vec![
            ("qmp_capabilities", "{\"return\": {}}\n".into()),
            ("query-status", "{\"event\": \"STOP\"}\n{\"return\": {\"running\": true}}\n".into()),
            ("cont", "{\"error\": {\"desc\": \"not now\"}}\n".into()),
        ]);
        let mut qmp = Qmp::connect(&path).unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["running"], true);
        assert_eq!(qmp.execute("cont", json!({})).unwrap_err().to_string(), "cont: not now");
        qmp.wait_event(Duration::from_secs(1), |e| e["event"] == "STOP").unwrap();
        assert!(qmp.wait_event(Duration::from_millis(20), |_| true).is_err());
    }
}
