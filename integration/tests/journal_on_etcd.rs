//! The coordinator's journal on a real etcd, as a user of the library: the same promises as on a file, one writer at a
//! time whatever is late or asked twice, and one clear sentence for each way in which etcd can be of no use.

use baton_integration::etcd::{Certificates, Etcd, skip_without_etcd};
use baton_integration::proxy::Proxy;
use baton_integration::workspace::TestDir;
use baton_live_migrate::client::Endpoint;
use baton_live_migrate::coordinator::etcd::EtcdError;
use baton_live_migrate::coordinator::etcd::chain::{self, Chain, Keys, Lead, Leader};
use baton_live_migrate::coordinator::etcd::client::Client;
use baton_live_migrate::coordinator::etcd::settings::Settings;
use baton_live_migrate::coordinator::etcd::store::EtcdStore;
use baton_live_migrate::coordinator::journal::{
    Change, EVENTS_MAX, Event, Found, Journal, JournalError,
};
use serde_json::json;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(20);

fn settings(endpoints: &[String]) -> Settings {
    Settings {
        members: endpoints.iter().map(|endpoint| endpoint.parse().unwrap()).collect(),
        prefix: "/baton/".to_owned(),
        name: "c1".to_owned(),
        advertise: "http://127.0.0.1:1".parse::<Endpoint>().unwrap(),
        lease_ttl: Duration::from_secs(60),
        call_timeout: Duration::from_secs(2),
        user: None,
        ca: None,
        cert: None,
        ignore_lease: false,
    }
}

fn keys() -> Keys {
    Keys::under("/baton/")
}

fn who(instance: &str) -> Leader {
    let text = str::to_owned;
    Leader { name: text("c"), api: text("http://c:1"), term: 0, instance: text(instance) }
}

/// Takes the lead, from whoever has it.
async fn lead(client: &Client, instance: &str, term_min: u64) -> Result<Lead, EtcdError> {
    let (leader, counter) = chain::looked(&client.txn(&chain::look(&keys())).await?)?;
    if let Some((_, old)) = leader {
        client.revoke(old.lease).await?;
    }
    let (lease, _) = client.grant(Duration::from_secs(60)).await?;
    let who = who(instance);
    let answer = client.txn(&chain::campaign(&keys(), &who, lease, counter, term_min)).await?;
    // The counter has a new revision when somebody else was faster.
    chain::elected(&who, lease, &answer)?.ok_or(EtcdError::Deposed)
}

async fn open(
    client: &Arc<Client>,
    lead: Lead,
    patience: Duration,
) -> Result<(Journal, Found, watch::Receiver<bool>), JournalError> {
    let (lost, is_lost) = watch::channel(false);
    let (store, found) = EtcdStore::open(Arc::clone(client), keys(), lead, patience, lost).await?;
    Ok((Journal::of(Arc::new(store), found.seq, None)?, found, is_lost))
}

fn client(etcd: &Etcd) -> Arc<Client> {
    Arc::new(Client::new(&settings(&etcd.endpoints())).unwrap())
}

fn event(n: u64) -> Event {
    let (kind, subject) = ("test".to_owned(), String::new());
    Event { seq: 0, kind, subject, at_unix_us: n, data: json!(null) }
}

fn told(events: impl IntoIterator<Item = u64>) -> Change {
    Change { events: events.into_iter().map(event).collect(), ..Change::default() }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// The first two tests of `coordinator::journal`, on this store.
#[test]
fn the_term_grows_events_keep_their_numbers_and_the_log_has_a_bound() {
    if skip_without_etcd("the_term_grows_events_keep_their_numbers_and_the_log_has_a_bound") {
        return;
    }
    let dir = TestDir::new("journal-etcd").unwrap();
    let etcd = Etcd::start(dir.path(), 1).unwrap();
    let client = client(&etcd);
    runtime().block_on(async {
        let first = lead(&client, "a", 0).await.unwrap();
        assert_eq!(first.term, 1);
        let (journal, found, _) = open(&client, first, PATIENCE).await.unwrap();
        assert_eq!((found.term, found.rows.len(), found.seq), (1, 0, 0));
        journal.write(told([1, 2])).await.unwrap();
        let vm =
            Change { vm: Some(("web".to_owned(), json!({"name": "web"}))), ..Change::default() };
        journal.write(vm).await.unwrap();

        let second = lead(&client, "b", 7).await.unwrap();
        assert_eq!(second.term, 7, "a higher one was seen at a server");
        let (journal, found, _) = open(&client, second, PATIENCE).await.unwrap();
        assert_eq!((found.seq, found.vms["web"]["name"].as_str()), (2, Some("web")));
        journal.write(told([3])).await.unwrap();
        let (events, oldest) = journal.events_after(1, 10).await.unwrap();
        let seen: Vec<_> = events.iter().map(|event| (event.seq, event.at_unix_us)).collect();
        assert_eq!((seen, oldest), (vec![(2, 2), (3, 3)], 1));
        assert_eq!(lead(&client, "c", 0).await.unwrap().term, 8);

        let third = lead(&client, "d", 0).await.unwrap();
        let (journal, ..) = open(&client, third, PATIENCE).await.unwrap();
        // At once, so that they are put together as far as a transaction goes.
        let writes: Vec<_> = (0..EVENTS_MAX / 50 + 10)
            .map(|n| {
                let journal = journal.clone();
                tokio::spawn(async move { journal.write(told(n * 50..n * 50 + 50)).await })
            })
            .collect();
        for write in writes {
            write.await.unwrap().unwrap();
        }
        let last = *journal.latest().borrow();
        let (events, oldest) = journal.events_after(0, usize::MAX).await.unwrap();
        assert_eq!((last, events.last().unwrap().seq), (EVENTS_MAX + 503, last));
        assert_eq!(events.first().unwrap().seq, oldest);
        let kept = events.len() as u64;
        assert!((EVENTS_MAX..EVENTS_MAX + 200).contains(&kept), "{kept} are kept");
        assert!(events.windows(2).all(|two| two[1].seq == two[0].seq + 1));
        assert!(journal.writes() < EVENTS_MAX / 50, "{} transactions", journal.writes());
    });
}

/// A write that is late, because its writer was frozen or the network was slow.
#[test]
fn a_deposed_writer_writes_nothing_and_hears_why() {
    if skip_without_etcd("a_deposed_writer_writes_nothing_and_hears_why") {
        return;
    }
    let dir = TestDir::new("deposed-etcd").unwrap();
    let etcd = Etcd::start(dir.path(), 1).unwrap();
    let client = client(&etcd);
    runtime().block_on(async {
        let old = lead(&client, "a", 0).await.unwrap();
        let (journal, _, mut lost) = open(&client, old, PATIENCE).await.unwrap();
        journal.write(told([1])).await.unwrap();
        let tail = client.range("/baton/tail", "/baton/tail\0", 1).await.unwrap();
        let late = Chain::behind(keys(), old, tail.first()).unwrap();
        let (meant, late_txn) = late.next(&[&told([99])]).unwrap();

        let new = lead(&client, "b", 0).await.unwrap();
        let before = etcd.values("/baton/").unwrap();
        // Before the new one has written anything.
        let answer = client.txn(&late_txn).await.unwrap();
        assert_eq!(late.judge(&meant, &answer), Ok(chain::Verdict::Deposed));
        let error = journal.write(told([2])).await.expect_err("deposed").to_string();
        assert!(error.contains("another coordinator leads"), "{error}");
        assert!(*lost.wait_for(|lost| *lost).await.unwrap());
        assert_eq!(etcd.values("/baton/").unwrap(), before);

        let (journal, ..) = open(&client, new, PATIENCE).await.unwrap();
        journal.write(told([3])).await.unwrap();
        // A copy of a write that is done is not done again, behind a newer one.
        let tail = client.range("/baton/tail", "/baton/tail\0", 1).await.unwrap();
        let here = Chain::behind(keys(), new, tail.first()).unwrap();
        let (first, first_txn) = here.next(&[&told([4])]).unwrap();
        let answer = client.txn(&first_txn).await.unwrap();
        let chain::Verdict::Done(revision) = here.judge(&first, &answer).unwrap() else { panic!() };
        let answer = client.txn(&first_txn).await.unwrap();
        assert_eq!(here.judge(&first, &answer), Ok(chain::Verdict::Done(revision)), "asked again");
        let mut next = here.clone();
        next.advance(first, revision);
        let (second, second_txn) = next.next(&[&told([5])]).unwrap();
        client.txn(&second_txn).await.unwrap();
        let before = etcd.values("/baton/").unwrap();
        client.txn(&first_txn).await.unwrap();
        assert_eq!(etcd.values("/baton/").unwrap(), before, "behind {second:?}");
    });
}

/// An answer that is lost: asked again, it is known; not known, nothing is written behind it.
#[test]
fn a_write_in_doubt_is_asked_for_again_or_the_last_one() {
    if skip_without_etcd("a_write_in_doubt_is_asked_for_again_or_the_last_one") {
        return;
    }
    let dir = TestDir::new("doubt-etcd").unwrap();
    let etcd = Etcd::start(dir.path(), 1).unwrap();
    let proxy = Proxy::of_bytes(etcd.clients()[0]).unwrap();
    let direct = client(&etcd);
    let mut through = settings(&[format!("http://{}", proxy.address())]);
    through.call_timeout = Duration::from_millis(300);
    let through = Arc::new(Client::new(&through).unwrap());
    runtime().block_on(async {
        let right = lead(&direct, "a", 0).await.unwrap();
        let (journal, ..) = open(&through, right, PATIENCE).await.unwrap();
        proxy.hold_requests();
        let waits = journal.clone();
        let written = tokio::spawn(async move { waits.write(told([1])).await });
        // Several tries are on the way when they are let go.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert!(!written.is_finished());
        proxy.release_requests();
        written.await.unwrap().expect("once is enough");
        let events = etcd.values("/baton/events/").unwrap();
        assert_eq!(events.len(), 1, "{events:?}");

        let (journal, _, mut lost) =
            open(&through, right, Duration::from_millis(500)).await.unwrap();
        proxy.fall_silent();
        let error = journal.write(told([2])).await.expect_err("in doubt").to_string();
        assert!(error.contains("did not say whether"), "{error}");
        assert!(error.contains("ask again with the same id"), "{error}");
        proxy.speak();
        let error = journal.write(told([3])).await.expect_err("nothing behind it").to_string();
        assert!(error.contains("writes nothing any more"), "{error}");
        assert!(*lost.wait_for(|lost| *lost).await.unwrap());
    });
}

fn sentence(settings: &Settings) -> String {
    let client = Client::new(settings).unwrap();
    let said = runtime().block_on(lead(&client, "x", 0)).expect_err("no use").to_string();
    eprintln!("{said}");
    assert!(!said.contains('\n') && said.len() < 500, "{said}");
    said
}

fn secret(dir: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[test]
fn users_and_certificates_are_used_and_what_is_wrong_with_them_is_said() {
    if skip_without_etcd("users_and_certificates_are_used_and_what_is_wrong_with_them_is_said") {
        return;
    }
    let dir = TestDir::new("trust-etcd").unwrap();
    let tls = Certificates::make(dir.path()).unwrap();
    let etcd = Etcd::start_with(dir.path(), 1, Some(tls.clone()), &[]).unwrap();
    for args in [
        &["user", "add", "root:rp"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "baton"],
        &["role", "grant-permission", "baton", "readwrite", "--prefix=true", "/baton/"],
        &["user", "add", "bob:bp"],
        &["user", "grant-role", "bob", "baton"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).unwrap();
    }
    let mut good = settings(&etcd.endpoints());
    good.ca = Some(tls.file("ca.pem"));
    good.cert = Some((tls.file("client.pem"), tls.file("client.key")));
    good.user = Some(("bob".to_owned(), secret(dir.path(), "password", "bp\n")));
    let client = Arc::new(Client::new(&good).unwrap());
    runtime().block_on(async {
        let right = lead(&client, "a", 0).await.unwrap();
        let (journal, ..) = open(&client, right, PATIENCE).await.unwrap();
        journal.write(told([1])).await.unwrap();
    });

    let nobody = Settings { user: None, ..good.clone() };
    assert!(sentence(&nobody).contains("asks for a user"));
    let wrong = secret(dir.path(), "wrong", "bq");
    let wrong = Settings { user: Some(("bob".to_owned(), wrong)), ..good.clone() };
    assert!(sentence(&wrong).contains("user `bob` with this password"));
    let elsewhere = Settings { prefix: "/other/".to_owned(), ..good.clone() };
    let client = Client::new(&elsewhere).unwrap();
    let look = chain::look(&Keys::under("/other/"));
    let said = runtime().block_on(client.txn(&look)).expect_err("forbidden").to_string();
    assert!(said.contains("user `bob`") && said.contains("/other/"), "{said}");

    let other = dir.join("other");
    fs::create_dir(&other).unwrap();
    let strangers = Certificates::make(&other).unwrap();
    let stranger = Settings { ca: Some(strangers.file("ca.pem")), ..good.clone() };
    assert!(sentence(&stranger).contains("do not trust each other"));
    let none = Settings { cert: None, ..good.clone() };
    let said = sentence(&none);
    assert!(said.contains("showed none") || said.contains("certificate"), "{said}");
    let plain = settings(&[etcd.endpoints()[0].replace("https", "http")]);
    let said = sentence(&plain);
    assert!(said.contains("etcd"), "{said}");
    let public = dir.join("public");
    fs::write(&public, "bp").unwrap();
    let public = Settings { user: Some(("bob".to_owned(), public)), ..good };
    assert!(
        Client::new(&public)
            .expect_err("everybody reads it")
            .to_string()
            .contains("everybody can read")
    );
}

#[test]
fn what_is_no_etcd_is_away_or_full_is_said() {
    if skip_without_etcd("what_is_no_etcd_is_away_or_full_is_said") {
        return;
    }
    let dir = TestDir::new("full-etcd").unwrap();
    let quota = ["--quota-backend-bytes", "2000000"];
    let etcd = Etcd::start_with(dir.path(), 1, None, &quota).unwrap();
    // Its own port for the other members.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other: SocketAddr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno\n");
        }
    });
    let said = sentence(&settings(&[format!("http://{other}")]));
    assert!(said.contains("is not etcd's client port") && said.contains("2379"), "{said}");
    let nobody = format!("http://{}", baton_integration::port::free_port().unwrap());
    let said = sentence(&settings(std::slice::from_ref(&nobody)));
    assert!(said.contains("cannot be reached") && said.contains(&nobody), "{said}");
    // One of several that is wrong is no harm.
    let mixed = [nobody, format!("http://{other}"), etcd.endpoints()[0].clone()];
    let client = Arc::new(Client::new(&settings(&mixed)).unwrap());
    runtime().block_on(async {
        let right = lead(&client, "a", 0).await.unwrap();
        let (journal, ..) = open(&client, right, PATIENCE).await.unwrap();
        journal.write(told([1])).await.unwrap();
        let huge = Event { kind: "k".repeat(2 << 20), ..event(1) };
        let huge = Change { events: vec![huge], ..Change::default() };
        let said = journal.write(huge).await.expect_err("too large").to_string();
        assert!(
            said.contains("more than etcd takes") && said.contains("nothing was started"),
            "{said}"
        );
        let filler = "x".repeat(100_000);
        // The alarm is raised by a write that comes too late.
        let full =
            (0..100).find_map(|n| etcd.ctl(&["put", &format!("/filler/{n}"), &filler]).err());
        let full = full.expect("it is never full").to_string();
        assert!(full.contains("space exceeded"), "{full}");
        let said = journal.write(told([2])).await.expect_err("full").to_string();
        assert!(said.contains("no space left") && said.contains("alarm disarm"), "{said}");
        // Room again: the journal goes on where it was.
        etcd.ctl(&["del", "--prefix", "/filler/"]).unwrap();
        let status = etcd.ctl(&["endpoint", "status", "-w", "json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let revision = status[0]["Status"]["header"]["revision"].to_string();
        etcd.ctl(&["compact", &revision]).unwrap();
        etcd.ctl(&["defrag"]).unwrap();
        etcd.ctl(&["alarm", "disarm"]).unwrap();
        journal.write(told([2])).await.unwrap();
        assert_eq!(etcd.values("/baton/events/").unwrap().len(), 2);
    });
}
