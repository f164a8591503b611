//! Who lets whom in, and what both sides say when they do not.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use baton_live_migrate::client::{CallError, Client, Endpoint, Method};
use baton_live_migrate::dev_ca::{self, DevCa, DevCaError};
use baton_live_migrate::door::{Address, Door, DoorError, Peer};
use baton_live_migrate::identity::{Identity, Role};
use baton_live_migrate::problem::Problem;
use baton_live_migrate::tls::{Credentials, CredentialsError, HandshakeError, TlsFiles};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

const LIMIT: Duration = Duration::from_secs(20);

fn id(text: &str) -> Identity {
    text.parse().expect("an identity")
}

fn files(dir: &Path, stem: &str) -> TlsFiles {
    TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{stem}.pem")),
        key: dir.join(format!("{stem}.key")),
    }
}

/// Certificate of `identity` by `ca`, valid for a year from `start`.
fn credentials(ca: &DevCa, identity: &str, start: OffsetDateTime) -> Credentials {
    let dir = tempfile::tempdir().expect("temp dir");
    let (cert, key) = ca.issue(&id(identity), start).expect("issued");
    for (name, text) in [("ca.pem", ca.certificate()), ("x.pem", cert), ("x.key", key)] {
        std::fs::write(dir.path().join(name), text).expect("write");
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(dir.path().join(name), private).expect("mode");
    }
    Credentials::load(&files(dir.path(), "x")).expect("good")
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

fn long_ago() -> OffsetDateTime {
    now() - time::Duration::days(1000)
}

/// What both sides say of one connection: the server, and the client at its handshake or first read.
async fn both_say(
    server: Credentials,
    client: Credentials,
    expected: &str,
) -> (Result<Identity, HandshakeError>, Result<(), HandshakeError>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let serve = async {
        let (stream, _) = listener.accept().await.expect("accept");
        server.accept(stream).await.map(|(_, identity)| identity)
    };
    let call = async {
        let stream = TcpStream::connect(address).await.expect("connect");
        let mut stream = client.connect(stream, &id(expected)).await?;
        match stream.read(&mut [0]).await {
            // The server said nothing, and closed.
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(HandshakeError::of_io(&error)),
        }
    };
    let both = async { tokio::join!(serve, call) };
    tokio::time::timeout(LIMIT, both).await.expect("no hang")
}

#[tokio::test]
async fn each_learns_who_the_other_is() {
    let ca = DevCa::new().expect("CA");
    let server = credentials(&ca, "baton://host/a", now());
    let client = credentials(&ca, "baton://coordinator/c", now());
    assert_eq!(client.identity(), &id("baton://coordinator/c"));
    let (at_server, at_client) = both_say(server, client, "baton://host/a").await;
    assert_eq!(at_server, Ok(id("baton://coordinator/c")));
    assert_eq!(at_client, Ok(()));
}

#[tokio::test]
async fn another_host_at_the_address_is_named() {
    let ca = DevCa::new().expect("CA");
    let server = credentials(&ca, "baton://host/b", now());
    let client = credentials(&ca, "baton://coordinator/c", now());
    let (at_server, at_client) = both_say(server, client, "baton://host/a").await;
    assert!(matches!(at_server, Err(HandshakeError::Refused(_))), "{at_server:?}");
    let told = at_client.expect_err("refused").to_string();
    assert!(told.contains("baton://host/b, not baton://host/a"), "{told}");
}

#[tokio::test]
async fn another_authority_is_refused_on_both_sides() {
    let (one, other) = (DevCa::new().expect("CA"), DevCa::new().expect("CA"));
    let server = credentials(&one, "baton://host/a", now());
    let client = credentials(&other, "baton://coordinator/c", now());
    let (at_server, at_client) = both_say(server, client, "baton://host/a").await;
    assert_eq!(at_client, Err(HandshakeError::OtherAuthority));
    // Not "does not speak TLS": the authorities have one name, and keys that differ.
    let told = at_server.expect_err("refused").to_string();
    assert!(told.contains("another authority"), "{told}");
    assert!(told.contains("need certificates of the same one"), "{told}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_both_sides() {
    let ca = DevCa::new().expect("CA");
    let good = |who| credentials(&ca, who, now());
    let old = |who| credentials(&ca, who, long_ago());
    let (at_server, at_client) =
        both_say(good("baton://host/a"), old("baton://coordinator/c"), "baton://host/a").await;
    assert_eq!(at_server, Err(HandshakeError::Expired));
    let told = at_client.expect_err("refused").to_string();
    assert!(told.contains("expired"), "{told}");
    let (at_server, at_client) =
        both_say(old("baton://host/a"), good("baton://coordinator/c"), "baton://host/a").await;
    assert_eq!(at_client, Err(HandshakeError::Expired));
    let told = at_server.expect_err("refused").to_string();
    assert!(told.contains("expired"), "{told}");
}

/// A clock that is wrong looks like this: nobody is told only to renew what is good.
#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_is_not_said_to_have_expired_only() {
    let ca = DevCa::new().expect("CA");
    let good = |who| credentials(&ca, who, now());
    let early = |who| credentials(&ca, who, now() + time::Duration::days(100));
    let (at_server, at_client) =
        both_say(good("baton://host/a"), early("baton://coordinator/c"), "baton://host/a").await;
    assert_eq!(at_server, Err(HandshakeError::Expired));
    let told = at_client.expect_err("refused").to_string();
    assert!(told.contains("not valid yet") && told.contains("clock"), "{told}");
    let (at_server, at_client) =
        both_say(early("baton://host/a"), good("baton://coordinator/c"), "baton://host/a").await;
    assert_eq!(at_client, Err(HandshakeError::Expired));
    let told = at_server.expect_err("refused").to_string();
    assert!(told.contains("not valid yet") && told.contains("clock"), "{told}");
}

#[tokio::test]
async fn no_certificate_is_refused_on_both_sides() {
    let ca = DevCa::new().expect("CA");
    let server = credentials(&ca, "baton://host/a", now());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let mut roots = rustls::RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(ca.certificate().as_bytes()).expect("PEM");
    roots.add(root).expect("root");
    // The server's certificate has no DNS name, so this client trusts anybody: it is the other side that is tried.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let serve = async {
        let (stream, _) = listener.accept().await.expect("accept");
        server.accept(stream).await.map(|(_, identity)| identity)
    };
    let call = async {
        let stream = TcpStream::connect(address).await.expect("connect");
        let name = "x.invalid".try_into().expect("name");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, stream).await?;
        stream.read(&mut [0]).await
    };
    let (at_server, at_client) = tokio::join!(serve, call);
    assert_eq!(at_server, Err(HandshakeError::NoCertificate));
    let told = HandshakeError::of_io(&at_client.expect_err("refused")).to_string();
    assert!(told.contains("we showed none"), "{told}");
}

#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![
            rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
            rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
            rustls::SignatureScheme::ED25519,
        ]
    }
}

/// Says who asks; only a coordinator may ask for the secret.
async fn serve(door: Door) {
    let router = Router::new()
        .route("/me", get(async |ConnectInfo(peer): ConnectInfo<Peer>| format!("\"{peer}\"")))
        .route(
            "/secret",
            get(async |ConnectInfo(peer): ConnectInfo<Peer>| {
                peer.require(&[Role::Coordinator])?;
                Ok::<_, Problem>("7")
            }),
        );
    let service = router.into_make_service_with_connect_info::<Peer>();
    tokio::spawn(async move { axum::serve(door, service).await });
}

#[tokio::test]
async fn a_role_that_may_not_is_told_who_may() {
    let ca = DevCa::new().expect("CA");
    let server = credentials(&ca, "baton://host/a", now());
    let address = "127.0.0.1:0".parse().expect("address");
    let door = Door::open(&address, Some(&server)).await.expect("opens");
    let endpoint: Endpoint = format!("https://{}", door.address()).parse().expect("endpoint");
    serve(door).await;
    let client = |who| {
        let credentials = Some(Arc::new(credentials(&ca, who, now())));
        Client::new(id("baton://host/a"), endpoint.clone(), credentials, LIMIT)
    };
    let coordinator = client("baton://coordinator/c");
    assert_eq!(
        coordinator.call(Method::GET, "/me", None).await.expect("ok"),
        "baton://coordinator/c"
    );
    assert_eq!(coordinator.call(Method::GET, "/secret", None).await.expect("ok"), 7);
    match client("baton://host/b").call(Method::GET, "/secret", None).await {
        Err(CallError::Refused { status: 403, kind, detail, .. }) => {
            assert_eq!(kind, "baton:forbidden");
            assert!(
                detail.contains("baton://host/b") && detail.contains("coordinator"),
                "{detail}"
            );
        }
        other => panic!("{other:?}"),
    }
    let stranger = DevCa::new().expect("CA");
    let credentials = Some(Arc::new(credentials(&stranger, "baton://coordinator/c", now())));
    let stranger = Client::new(id("baton://host/a"), endpoint.clone(), credentials, LIMIT);
    let refused = stranger.call(Method::GET, "/me", None).await.expect_err("refused");
    let CallError::Distrust { source, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(*source, HandshakeError::OtherAuthority);
    let expired = Client::new(
        id("baton://host/a"),
        endpoint.clone(),
        Some(Arc::new(self::credentials(&ca, "baton://coordinator/c", long_ago()))),
        LIMIT,
    );
    let refused = expired.call(Method::GET, "/me", None).await.expect_err("refused");
    let CallError::Distrust { source, .. } = refused else { panic!("{refused:?}") };
    assert!(source.to_string().contains("our certificate has expired"), "{source}");
    let without = Client::new(id("baton://host/a"), endpoint, None, LIMIT);
    let refused = without.call(Method::GET, "/me", None).await;
    assert!(matches!(refused, Err(CallError::NoCredentials { .. })), "{refused:?}");
}

#[tokio::test]
async fn this_host_comes_in_by_socket_and_loopback() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("s");
    let address: Address = format!("unix:{}", path.display()).parse().expect("address");
    let call = async |endpoint: &str| {
        let endpoint = endpoint.parse().expect("endpoint");
        let client = Client::new(id("baton://host/a"), endpoint, None, LIMIT);
        client.call(Method::GET, "/me", None).await
    };
    {
        let door = Door::open(&address, None).await.expect("opens");
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        let again = Door::open(&address, None).await;
        assert!(matches!(again, Err(DoorError::Taken(_))), "{again:?}");
        serve(door).await;
        let who = format!("user {} of this host", nix::unistd::getuid());
        assert_eq!(call(&address.to_string()).await.expect("ok"), who);
    }
    let loopback = "127.0.0.1:0".parse().expect("address");
    let door = Door::open(&loopback, None).await.expect("opens");
    let endpoint = format!("http://{}", door.address());
    serve(door).await;
    assert_eq!(call(&endpoint).await.expect("ok"), "somebody on this host");
}

#[tokio::test]
async fn plaintext_to_other_hosts_is_refused_in_one_sentence() {
    for text in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let address: Address = text.parse().expect("address");
        let refused = Door::open(&address, None).await.expect_err("refused");
        assert!(matches!(refused, DoorError::Plaintext(_)), "{refused:?}");
        assert!(refused.to_string().contains("add [tls]"), "{refused}");
    }
    for bad in ["localhost:1", "unix:s", "1.2.3.4", ""] {
        assert!(bad.parse::<Address>().is_err(), "{bad}");
    }
    let everywhere: SocketAddr = "0.0.0.0:0".parse().expect("address");
    let ca = DevCa::new().expect("CA");
    let server = credentials(&ca, "baton://host/a", now());
    Door::open(&Address::Tcp(everywhere), Some(&server)).await.expect("with certificates it may");
}

#[test]
fn one_command_makes_an_authority_once() {
    let dir = tempfile::tempdir().expect("temp dir");
    let dir: &TempDir = &dir;
    let at = dir.path().join("ca");
    let who = [id("baton://host/a"), id("baton://coordinator/c")];
    assert!(matches!(dev_ca::write(&at, &[]), Err(DevCaError::Nobody)));
    let twice = [who[0].clone(), who[0].clone()];
    assert!(matches!(dev_ca::write(&at, &twice), Err(DevCaError::Twice(_))));
    assert!(!at.exists(), "nothing half-made");
    dev_ca::write(&at, &who).expect("made");
    for (name, mode) in
        [("ca.key", 0o600), ("host-a.key", 0o600), ("host-a.pem", 0o644), ("ca.pem", 0o644)]
    {
        let meta = std::fs::metadata(at.join(name)).expect(name);
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
    }
    let before = std::fs::read(at.join("ca.key")).expect("key");
    assert!(matches!(dev_ca::write(&at, &who), Err(DevCaError::Exists(_))));
    assert_eq!(std::fs::read(at.join("ca.key")).expect("key"), before);

    let good = files(&at, "host-a");
    assert_eq!(Credentials::load(&good).expect("good").identity(), &who[0]);
    let mixed = TlsFiles { key: at.join("coordinator-c.key"), ..good.clone() };
    assert!(matches!(Credentials::load(&mixed), Err(CredentialsError::Mismatch { .. })));
    let nobody = TlsFiles { cert: at.join("ca.pem"), key: at.join("ca.key"), ..good.clone() };
    assert!(matches!(Credentials::load(&nobody), Err(CredentialsError::Identity { .. })));
    let missing = TlsFiles { cert: at.join("none"), ..good.clone() };
    assert!(matches!(Credentials::load(&missing), Err(CredentialsError::File { .. })));
    let everybody = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(&good.key, everybody).expect("mode");
    let told = Credentials::load(&good).expect_err("refused").to_string();
    assert!(told.contains("chmod 600"), "{told}");
}
