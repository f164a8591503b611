//! One HTTP exchange over a stream that is connected already, with JSON bodies.
//!
//! Does not know where the stream leads: a TLS connection to an agent, a unix
//! socket of cloud-hypervisor. One connection carries one exchange: calls are
//! rare here, and nothing is left open that could be half-dead at the next one.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header;
pub(crate) use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

/// A machine's status with a hundred disks is far below; what is longer is not for us.
pub(crate) const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    /// The connection broke, or the peer does not speak HTTP.
    #[error("the connection failed before an answer was complete")]
    Connection(#[source] hyper::Error),
    /// The answer broke off or is longer than anything expected.
    #[error("the answer broke off or is too long")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The path or the host is not one.
    #[error("`{0}` cannot be asked for")]
    Request(String),
    /// Nothing came in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Silent(Duration),
}

/// One more header of a request.
pub(crate) type Header<'a> = (&'static str, &'a str);

/// Sends one request and reads the whole answer, within `timeout`.
///
/// # Cancel safety
/// Dropping the future closes the connection; the peer may still act.
pub(crate) async fn exchange<S>(
    stream: S,
    host: &str,
    what: (Method, &str),
    body: Option<&Value>,
    timeout: Duration,
) -> Result<(StatusCode, Bytes), ExchangeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    exchange_with(stream, host, what, &[], body, (timeout, ANSWER_BYTES_MAX)).await
}

/// [`exchange`], with more headers and another limit for the answer's bytes.
///
/// # Cancel safety
/// As [`exchange`].
pub(crate) async fn exchange_with<S>(
    stream: S,
    host: &str,
    (method, path): (Method, &str),
    headers: &[Header<'_>],
    body: Option<&Value>,
    (timeout, bytes_max): (Duration, usize),
) -> Result<(StatusCode, Bytes), ExchangeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut request = hyper::Request::builder();
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request
        .method(method)
        .uri(path)
        .header(header::HOST, host)
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()))))
        .map_err(|_| ExchangeError::Request(path.to_owned()))?;
    let talk = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(ExchangeError::Connection)?;
        let ask = async {
            let response = sender.send_request(request).await.map_err(ExchangeError::Connection)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), bytes_max);
            let body = body.collect().await.map_err(ExchangeError::Body)?.to_bytes();
            Ok((status, body))
        };
        tokio::pin!(ask);
        tokio::select! {
            answer = &mut ask => answer,
            // The connection may end right behind the answer that it carried.
            ended = connection => match ended {
                Ok(()) => ask.await,
                Err(error) => Err(ExchangeError::Connection(error)),
            },
        }
    };
    match tokio::time::timeout(timeout, talk).await {
        Ok(answer) => answer,
        Err(_) => Err(ExchangeError::Silent(timeout)),
    }
}
