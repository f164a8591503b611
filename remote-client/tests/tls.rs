//! NBD through TLS, against real servers: who is let in, who is not, and why.

mod common;
mod nbd_server;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use baton_remote_client::{Op, VolumeState};
use common::{Buffer, eventually, opened, refused, run, stamped_load};
use nbd_server::{NbdServer, disk, skip_without};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

const BYTES: u64 = 8 << 20;
/// What is final is said long before.
const SHORT: Duration = Duration::from_secs(10);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signed");
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// Writes `WHO-cert.pem` and `WHO-key.pem`.
    fn issue(&self, dir: &Path, who: &str, host: &str, years: (i32, i32)) {
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        params.distinguished_name.push(rcgen::DnType::CommonName, who);
        params.not_before = date_time_ymd(years.0, 1, 1);
        params.not_after = date_time_ymd(years.1, 1, 1);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        write(&dir.join(format!("{who}-cert.pem")), &certificate.pem());
        write(&dir.join(format!("{who}-key.pem")), &key.serialize_pem());
    }

    /// A folder in which this authority is trusted.
    fn folder(&self, dir: &Path, name: &str) -> PathBuf {
        let folder = dir.join(name);
        std::fs::create_dir(&folder).expect("folder");
        write(&folder.join("ca-cert.pem"), &self.certificate.pem());
        folder
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// RFC 7919's group. qemu-nbd would look for one of its own, which can take 20 s.
fn fix_group(dir: &Path) {
    write(&dir.join("dh-params.pem"), include_str!("nbd_server/ffdhe2048.pem"));
}

const GOOD: (i32, i32) = (2020, 2120);

/// It reads what it has written, in small and in large pieces.
fn works(uri: &str) {
    let volume = opened(uri);
    let mut queue = volume.open_queue(0, 8).expect("queue");
    for len in [512, 4096, 3 << 20] {
        let mut data =
            Buffer((0..len).map(|n: usize| u8::try_from(n % 251).expect("small")).collect());
        assert_eq!(run(&mut *queue, Op::Write { offset: 512 }, &mut data), Ok(()), "{uri}");
        assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(vec![])), Ok(()));
        let mut back = Buffer(vec![0; len]);
        assert_eq!(run(&mut *queue, Op::Read { offset: 512 }, &mut back), Ok(()));
        assert!(back.0 == data.0, "{uri}: {len} bytes");
    }
}

fn is_refused(uri: &str, says: &str) {
    let begun = Instant::now();
    let error = refused(uri, SHORT).to_string();
    assert!(error.contains(says), "{uri}: {error}");
    assert!(error.starts_with("no TLS with the NBD server at "), "{error}");
    assert!(begun.elapsed() < SHORT, "it is final: {error}");
}

/// A server of each kind with these certificates.
fn x509_servers(dir: &Path, folder: &Path, verify: bool) -> [(NbdServer, &'static str); 3] {
    let path = disk(dir, BYTES);
    fix_group(folder);
    let certificates = format!("--tls-certificates={}", text(folder));
    let mut args = vec!["--tls=require", &certificates];
    if verify {
        args.push("--tls-verify-peer");
    }
    args.extend(["file", &path]);
    let object = format!(
        "tls-creds-x509,id=t,endpoint=server,dir={},verify-peer={}",
        text(folder),
        if verify { "yes" } else { "no" }
    );
    let kept: Vec<PathBuf> = ["a", "c"].iter().map(|name| dir.join(name)).collect();
    kept.iter().for_each(|dir| std::fs::create_dir(dir).expect("folder"));
    [
        (NbdServer::nbdkit(&kept[0], &args), ""),
        (NbdServer::nbdkit_tcp(dir, &args), ""),
        (
            NbdServer::qemu(
                &kept[1],
                &["--shared=8", "--object", &object, "--tls-creds", "t", &path],
            ),
            "disk",
        ),
    ]
}

fn skip(test: &str) -> bool {
    skip_without(test, "nbdkit") || skip_without(test, "qemu-nbd")
}

#[test]
fn a_certificate_that_is_trusted_lets_everything_through() {
    if skip("a_certificate_that_is_trusted_lets_everything_through") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let ours = Authority::new("ours");
    let server = ours.folder(dir.path(), "server");
    ours.issue(&server, "server", "127.0.0.1", GOOD);
    let client = ours.folder(dir.path(), "client");
    for (server, export) in x509_servers(dir.path(), &server, false) {
        let folder = text(&client);
        // Over TCP the host's name is that of the URI.
        let hostname = format!("tls-certificates={folder}&tls-hostname=127.0.0.1");
        works(&server.tls_uri("", export, &hostname));
        if server.uri(export).starts_with("nbd://") {
            works(&server.tls_uri("", export, &format!("tls-certificates={folder}")));
        }
        // In clear text it does not serve.
        let error = refused(&server.uri(export), SHORT).to_string();
        assert!(error.contains("requires TLS; write nbds://"), "{error}");
        // Nobody is looked at.
        works(&server.tls_uri("", export, "tls-verify-peer=0"));
        is_refused(
            &server.tls_uri("", export, &format!("tls-certificates={folder}&tls-hostname=other")),
            "its certificate is not for `other`",
        );
        is_refused(
            &server.tls_uri("", export, "tls-hostname=127.0.0.1"),
            "no authority that we trust has signed its certificate",
        );
        let nothing = dir.path().join("nothing");
        is_refused(
            &server.tls_uri(
                "",
                export,
                &format!("tls-certificates={}&tls-hostname=h", text(&nothing)),
            ),
            "cannot read ",
        );
    }
}

#[test]
fn what_is_not_to_be_trusted_is_not() {
    if skip("what_is_not_to_be_trusted_is_not") {
        return;
    }
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    for (by, years, says) in [
        (&other, GOOD, "no authority that we trust has signed its certificate"),
        (&ours, (2001, 2002), "its certificate has expired"),
        (&ours, (2100, 2120), "its certificate is not valid yet"),
    ] {
        let dir = tempfile::tempdir().expect("directory");
        let folder = by.folder(dir.path(), "server");
        by.issue(&folder, "server", "127.0.0.1", years);
        let client = ours.folder(dir.path(), "client");
        let path = disk(dir.path(), BYTES);
        let certificates = format!("--tls-certificates={}", text(&folder));
        let server =
            NbdServer::nbdkit_tcp(dir.path(), &["--tls=require", &certificates, "file", &path]);
        is_refused(&server.tls_uri("", "", &format!("tls-certificates={}", text(&client))), says);
        // qemu-nbd looks at its own certificate and does not start.
    }
}

/// A server that asks for a certificate of the client.
#[test]
fn a_client_shows_its_certificate() {
    if skip("a_client_shows_its_certificate") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let server = ours.folder(dir.path(), "server");
    ours.issue(&server, "server", "localhost", GOOD);
    let [none, good, bad] = ["none", "good", "bad"].map(|name| ours.folder(dir.path(), name));
    ours.issue(&good, "client", "vm-host", GOOD);
    other.issue(&bad, "client", "vm-host", GOOD);
    for (server, export) in x509_servers(dir.path(), &server, true) {
        let uri = |folder: &Path| {
            let more = format!("tls-certificates={}&tls-hostname=localhost", text(folder));
            server.tls_uri("", export, &more)
        };
        works(&uri(&good));
        for folder in [&none, &bad] {
            let error = refused(&uri(folder), SHORT).to_string();
            // A server may also just hang up.
            let known = error.contains("it refuses our certificate")
                || error.contains("perhaps it wants a certificate of ours");
            assert!(known, "{error}");
        }
    }
    std::fs::rename(bad.join("client-cert.pem"), good.join("client-cert.pem")).expect("moved");
    let path = disk(dir.path(), BYTES);
    let certificates = format!("--tls-certificates={}", text(&server));
    let kit = NbdServer::nbdkit(dir.path(), &["--tls=require", &certificates, "file", &path]);
    let more = format!("tls-certificates={}&tls-hostname=localhost", text(&good));
    is_refused(&kit.tls_uri("", "", &more), "does not belong to the certificate beside it");
}

#[test]
fn a_key_that_both_have_lets_everything_through_and_another_does_not() {
    if skip("a_key_that_both_have_lets_everything_through_and_another_does_not") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let keys = dir.path().join("keys.psk");
    write(&keys, "alice:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n");
    let mine = dir.path().join("mine.psk");
    write(
        &mine,
        "alice:ff112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n\
         bob:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\nzoe:xx\n",
    );
    let path = disk(dir.path(), BYTES);
    let psk = format!("--tls-psk={}", text(&keys));
    fix_group(dir.path());
    let object = format!("tls-creds-psk,id=t,endpoint=server,dir={}", text(dir.path()));
    let kept = dir.path().join("q");
    std::fs::create_dir(&kept).expect("folder");
    for (server, export) in [
        (NbdServer::nbdkit(dir.path(), &["--tls=require", &psk, "file", &path]), ""),
        (NbdServer::nbdkit_tcp(dir.path(), &["--tls=require", &psk, "file", &path]), ""),
        (
            NbdServer::qemu(&kept, &["--shared=8", "--object", &object, "--tls-creds", "t", &path]),
            "disk",
        ),
    ] {
        let uri = |user: &str, file: &Path| {
            server.tls_uri(&format!("{user}@"), export, &format!("tls-psk-file={}", text(file)))
        };
        works(&uri("alice", &keys));
        is_refused(&uri("alice", &mine), "it does not take user `alice` with this key");
        is_refused(&uri("bob", &mine), "it does not take user `bob` with this key");
        is_refused(&uri("carol", &mine), "has no user `carol`");
        is_refused(&uri("zoe", &mine), "the key of user `zoe`");
        is_refused(&uri("alice", Path::new("/none")), "cannot read /none");
    }
}

/// A server of certificates, asked with a key, and the other way round.
#[test]
fn a_key_is_no_certificate() {
    if skip("a_key_is_no_certificate") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let keys = dir.path().join("keys.psk");
    write(&keys, "alice:00112233445566778899aabbccddeeff\n");
    let ours = Authority::new("ours");
    let folder = ours.folder(dir.path(), "server");
    ours.issue(&folder, "server", "127.0.0.1", GOOD);
    let certificates = format!("--tls-certificates={}", text(&folder));
    let psk = format!("--tls-psk={}", text(&keys));
    let with_certificate =
        NbdServer::nbdkit_tcp(dir.path(), &["--tls=require", &certificates, "memory", "1M"]);
    let with_key = NbdServer::nbdkit_tcp(dir.path(), &["--tls=require", &psk, "memory", "1M"]);
    is_refused(
        &with_certificate.tls_uri("alice@", "", &format!("tls-psk-file={}", text(&keys))),
        "it does not take user `alice`",
    );
    is_refused(
        &with_key.tls_uri("", "", &format!("tls-certificates={}", text(&folder))),
        "has keys and no certificates",
    );
}

/// Nothing is ever said in clear text to a server that does not offer TLS.
#[test]
fn clear_text_is_no_way_out() {
    if skip("clear_text_is_no_way_out") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = disk(dir.path(), BYTES);
    let keys = dir.path().join("keys.psk");
    write(&keys, "alice:0011\n");
    let kit = NbdServer::nbdkit_tcp(dir.path(), &["file", &path]);
    let qemu = NbdServer::qemu(dir.path(), &["--shared=2", &path]);
    for (server, export) in [(&kit, ""), (&qemu, "disk")] {
        let uri = server.tls_uri("alice@", export, &format!("tls-psk-file={}", text(&keys)));
        let error = refused(&uri, SHORT).to_string();
        assert!(
            error.contains("does not offer TLS, and nbds:// is never served without"),
            "{error}"
        );
    }
}

/// Connections that are lost are made anew, with TLS, and with what the files then hold.
#[test]
fn kills_under_load_are_only_a_pause_through_tls_too() {
    const NAME: &str = "kills_under_load_are_only_a_pause_through_tls_too";
    if skip(NAME) {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let keys = dir.path().join("keys.psk");
    write(&keys, "alice:00112233445566778899aabbccddeeff\n");
    let path = disk(dir.path(), BYTES);
    let psk = format!("--tls-psk={}", text(&keys));
    let args = ["--tls=require", &psk, "--filter=delay", "file", &path, "wdelay=3ms"];
    let mut server = NbdServer::nbdkit(dir.path(), &args);
    let volume = opened(&server.tls_uri("alice@", "", &format!("tls-psk-file={}", text(&keys))));
    let deadline = Instant::now() + Duration::from_secs(3);
    let workers = stamped_load(&volume, 2, deadline);
    for round in 1.. {
        if Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        server.kill();
        // The next one has another key.
        write(&keys, &format!("alice:{round:032x}\n"));
        server.restart();
    }
    let mut queues: Vec<_> = workers.into_iter().map(|w| w.join().expect("worker")).collect();
    eventually("connected again", || {
        queues.iter_mut().for_each(|(queue, _)| queue.poll(&mut Vec::new()));
        volume.state() == VolumeState::Connected
    });
    let rounds: u32 = queues.iter().map(|(_, rounds)| rounds).sum();
    assert!(rounds > 10, "hardly any progress: {rounds}");
}
