//! A backend's control socket: one JSON object a line, asked and answered.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::unix;

/// A status of a hundred disks is far below.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Why a backend did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no backend answers at {}; start it with PUT .../backend", socket.display())]
    Absent {
        /// Where.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It hangs.
    #[error("the backend at {} did not answer within {} ms; it hangs, or waits for storage, and may still carry the command out", socket.display(), after.as_millis())]
    Silent {
        /// Where.
        socket: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// It understood and refused.
    #[error("{detail}")]
    Refused {
        /// Stable type of the refusal.
        kind: String,
        /// What happened and what to do.
        detail: String,
    },
    /// It ended, or is something else.
    #[error("the backend at {} broke off: {what}", socket.display())]
    Broken {
        /// Where.
        socket: PathBuf,
        /// What came instead.
        what: String,
    },
}

#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    detail: String,
}

/// The control socket of one backend.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// The one at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Where it is.
    #[must_use]
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Asks once, on a connection of its own.
    ///
    /// # Errors
    /// [`ControlError`], by who is to blame.
    ///
    /// # Cancel safety
    /// The backend may carry the command out all the same.
    pub async fn ask(&self, question: &Value, limit: Duration) -> Result<Value, ControlError> {
        let silent = |_| ControlError::Silent { socket: self.socket.clone(), after: limit };
        tokio::time::timeout(limit, self.talk(question)).await.map_err(silent)?
    }

    async fn talk(&self, question: &Value) -> Result<Value, ControlError> {
        let mut stream = unix::connect(&self.socket)
            .await
            .map_err(|source| ControlError::Absent { socket: self.socket.clone(), source })?;
        let broken = |error: io::Error| self.broken(error.to_string());
        stream.write_all(format!("{question}\n").as_bytes()).await.map_err(broken)?;
        let mut line = String::new();
        let mut reader = BufReader::new(stream.take(ANSWER_BYTES_MAX));
        reader.read_line(&mut line).await.map_err(broken)?;
        if !line.ends_with('\n') {
            return Err(self.broken("the answer has no end".to_owned()));
        }
        let mut answer: Value =
            serde_json::from_str(&line).map_err(|error| self.broken(error.to_string()))?;
        match answer.get_mut("error").map(Value::take) {
            None => Ok(answer),
            Some(error) => match serde_json::from_value(error) {
                Ok(Refusal { kind, detail }) => Err(ControlError::Refused { kind, detail }),
                Err(error) => Err(self.broken(error.to_string())),
            },
        }
    }

    fn broken(&self, what: String) -> ControlError {
        ControlError::Broken { socket: self.socket.clone(), what }
    }
}

/// Of the disks that must be drained, those that the backend's status does not
/// say so of. A disk it does not mention is one of them.
#[must_use]
pub fn not_drained(status: &Value, disks: &[&str]) -> Vec<String> {
    let shown = status["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let open = |name: &&&str| {
        !shown.iter().any(|disk| disk["name"] == **name && disk["drained"] == Value::Bool(true))
    };
    disks.iter().filter(open).map(|name| (*name).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::net::UnixListener;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Answers one question with these bytes, then closes.
    async fn answered(answer: &'static [u8]) -> Result<Value, ControlError> {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await.expect("question");
            assert_eq!(line, "{\"cmd\":\"status\"}\n");
            stream.write_all(answer).await.expect("answer");
        };
        let control = Control::new(path);
        let question = json!({"cmd": "status"});
        tokio::join!(control.ask(&question, LIMIT), serve).0
    }

    #[tokio::test]
    async fn answers_and_refusals_are_told_apart() {
        assert_eq!(answered(b"{\"a\":1}\n").await.expect("answer"), json!({"a": 1}));
        match answered(b"{\"error\":{\"type\":\"lost\",\"detail\":\"d\"}}\n").await {
            Err(ControlError::Refused { kind, detail }) => {
                assert_eq!((&*kind, &*detail), ("lost", "d"))
            }
            other => panic!("{other:?}"),
        }
        for bad in [&b""[..], b"{}", b"x\n", b"\xff\n", b"{\"error\":1}\n"] {
            let result = answered(bad).await;
            assert!(matches!(result, Err(ControlError::Broken { .. })), "{bad:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn an_endless_answer_ends() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
        });
        let result = Control::new(path).ask(&json!({}), LIMIT).await;
        assert!(matches!(result, Err(ControlError::Broken { .. })), "{result:?}");
    }

    #[tokio::test]
    async fn absence_and_silence_are_told_apart() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("s");
        let control = Control::new(path.clone());
        let short = Duration::from_millis(30);
        let ask = async || control.ask(&json!({}), short).await;
        assert!(matches!(ask().await, Err(ControlError::Absent { .. })));
        let _listener = UnixListener::bind(&path).expect("bind");
        assert!(matches!(ask().await, Err(ControlError::Silent { .. })));
    }

    #[test]
    fn drained_means_every_disk_said_so() {
        let of = |status| not_drained(&status, &["a", "b"]);
        let disk = |name, drained: Value| json!({"name": name, "drained": drained});
        let both = |one: Value| json!({"disks": [disk("a", json!(true)), one]});
        assert!(of(both(disk("b", json!(true)))).is_empty());
        for vague in [json!(false), json!("true"), json!(1), json!(null)] {
            assert_eq!(of(both(disk("b", vague))), ["b"]);
        }
        assert_eq!(of(both(disk("c", json!(true)))), ["b"]);
        for nothing in [json!({}), json!({"disks": []}), json!({"drained": true}), json!(null)] {
            assert_eq!(of(nothing), ["a", "b"]);
        }
    }
}
