//! What the API takes, what it refuses, and how it says so.

use std::sync::Arc;

use baton_live_migrate::client::{Client, Method};
use baton_live_migrate::tls::{Credentials, TlsFiles};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Agent, LIMIT, WEB, refused, wait};

fn vm(volume: &str) -> Value {
    json!({"disks": [{"name": "root", "volume": volume}], "vmm": "qemu"})
}

#[tokio::test]
async fn the_host_is_described() {
    let agent = Agent::start().await;
    let host = agent.get("/v1/host").await.expect("facts");
    assert_eq!(host["name"], "host-a");
    assert!(host["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{host}");
    assert!(host["kernel"].as_str().is_some_and(|kernel| !kernel.is_empty()), "{host}");
    let vms = agent.get("/v1/vms").await.expect("list");
    assert_eq!(vms["host"], "host-a");
    assert_eq!(vms["vms"][0]["definition"]["name"], "web");
    let document = agent.get("/openapi.json").await.expect("document");
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")));
}

#[tokio::test]
async fn a_vm_that_was_sent_is_remembered() {
    let mut agent = Agent::start().await;
    let sent = agent.put("/v1/vms/db", vm("baton://s:1/db")).await.expect("sent");
    assert_eq!(sent["name"], "db");
    agent.put("/v1/vms/db", vm("baton://s:1/db")).await.expect("the same again");
    agent.end(Signal::SIGKILL);
    agent.run().await;
    let view = agent.get("/v1/vms/db").await.expect("remembered");
    assert_eq!(view["definition"]["disk"][0]["volume"], "baton://s:1/db");
    assert_eq!(view["vmm"]["run"], "gone", "{view}");
    assert_eq!(view["status"], Value::Null);

    agent.put("/v1/vms/db/backend", json!({"role": "standby"})).await.expect("started");
    let other = refused(agent.put("/v1/vms/db", vm("baton://s:1/other")).await);
    assert_eq!((other.0, other.1.as_str()), (409, "baton:backend-runs"));
    let forget = refused(agent.delete("/v1/vms/db").await);
    assert_eq!((forget.0, forget.1.as_str()), (409, "baton:backend-runs"));
    agent.delete("/v1/vms/db/backend").await.expect("stopped");
    agent.delete("/v1/vms/db").await.expect("forgotten");
    assert_eq!(refused(agent.get("/v1/vms/db").await).1, "baton:no-such-vm");
    agent.end(Signal::SIGTERM);
    agent.run().await;
    assert_eq!(refused(agent.get("/v1/vms/db").await).1, "baton:no-such-vm");
}

/// One that was deposed and does not know it yet.
#[tokio::test]
async fn what_a_coordinator_of_a_lower_term_asks_for_is_refused_and_not_done() {
    let mut agent = Agent::start().await;
    let define = json!({"role": "owner"});
    let path = "/v1/vms/web/backend";
    let asked = agent.client().of_term(7).call(Method::GET, "/v1/events", None).await;
    asked.expect("a look tells the term, too");
    agent.end(Signal::SIGKILL);
    agent.run().await;
    let old = agent.client().of_term(6);
    let (status, kind, detail) = refused(old.call(Method::PUT, path, Some(&define)).await);
    assert_eq!((status, kind.as_str()), (409, "baton:stale-term"));
    assert!(detail.contains("term 7") && detail.contains("nothing was done"), "{detail}");
    let web = agent.get("/v1/vms/web").await.expect("an operator has no term");
    assert_eq!(web["backend"]["run"], "stopped", "{web}");
    assert_eq!(agent.get("/v1/host").await.expect("facts")["coordinator_term"], 7);
    agent.client().of_term(7).call(Method::PUT, path, Some(&define)).await.expect("obeyed");
    refused(old.call(Method::DELETE, path, None).await);
    agent.client().of_term(8).call(Method::DELETE, path, None).await.expect("obeyed");
}

#[tokio::test]
async fn the_configuration_has_the_last_word() {
    let agent = Agent::start().await;
    let same = json!({"disks": [
        {"name": "root", "volume": "baton://s:1/root"}, {"name": "data", "volume": "baton://s:1/data"}
    ], "vmm": "none"});
    let held = agent.put("/v1/vms/web", same).await.expect("the same disks");
    assert_eq!(held["vmm"], "qemu", "the host's own definition holds");
    let other = refused(agent.put("/v1/vms/web", vm("baton://s:1/root")).await);
    assert_eq!((other.0, other.1.as_str()), (409, "baton:vm-configured"));
    assert_eq!(refused(agent.delete("/v1/vms/web").await).1, "baton:vm-configured");
}

#[tokio::test]
async fn nobody_runs_programs_or_reads_files_from_outside() {
    let agent = Agent::start().await;
    let mut command = vm("baton://s:1/db");
    command["incoming_command"] = json!(["/bin/sh"]);
    for body in [command, vm("file:///etc/shadow"), vm("baton+unix:///v?socket=/s")] {
        let (status, kind, _) = refused(agent.put("/v1/vms/db", body).await);
        assert_eq!((status, kind.as_str()), (403, "baton:not-from-outside"));
    }
    assert_eq!(refused(agent.get("/v1/vms/db").await).0, 404, "nothing half-made");
    for uri in ["exec:cat", "file:/x", "fd:1"] {
        for action in ["migrate", "incoming"] {
            let path = format!("/v1/vms/web/vmm/{action}");
            let (status, kind, detail) = refused(agent.post(&path, json!({"uri": uri})).await);
            assert_eq!((status, kind.as_str()), (400, "baton:bad-request"), "{uri}");
            assert!(detail.contains("tcp:"), "{detail}");
        }
    }
    let mut agent = Agent::with(
        "exec_pretended \"$@\"",
        "",
        &format!("[danger_zone]\nenabled = true\nremote_files = true\n{WEB}"),
    );
    agent.run().await;
    agent.put("/v1/vms/db", vm("file:///x")).await.expect("allowed");
}

#[tokio::test]
async fn each_mistake_has_a_type_and_a_sentence() {
    let agent = Agent::start().await;
    let two = json!({"disks": [{"name": "a", "volume": "baton://s:1/v"}, {"name": "a", "volume": "baton://s:1/w"}]});
    for (method, path, body, status, kind, names) in [
        (Method::GET, "/v1/vms/none", Value::Null, 404, "baton:no-such-vm", "host-a"),
        (
            Method::PUT,
            "/v1/vms/none/backend",
            json!({"role": "owner"}),
            404,
            "baton:no-such-vm",
            "none",
        ),
        (Method::POST, "/v1/vms/none/vmm/stop", json!({}), 404, "baton:no-such-vm", "none"),
        (Method::POST, "/v1/vms/none/backend/seal", json!({}), 404, "baton:no-such-vm", "none"),
        (
            Method::PUT,
            "/v1/vms/web/backend",
            json!({"role": "king"}),
            400,
            "baton:bad-request",
            "king",
        ),
        (Method::PUT, "/v1/vms/web/backend", json!({"rôle": 1}), 400, "baton:bad-request", "role"),
        (Method::PUT, "/v1/vms/a%20b", vm("baton://s:1/v"), 400, "baton:bad-request", "a b"),
        (Method::PUT, "/v1/vms/x", two, 400, "baton:bad-request", "share the name"),
        (
            Method::PUT,
            "/v1/vms/x",
            json!({"name": "y", "disks": []}),
            400,
            "baton:bad-request",
            "one name",
        ),
        (Method::PUT, "/v1/vms/x", json!({"disks": [], "x": 1}), 400, "baton:bad-request", "`x`"),
        (Method::PUT, "/v1/vms/x", json!([]), 400, "baton:bad-request", "no definition"),
        (Method::POST, "/v1/vms/web/backend/seal", json!({}), 409, "baton:backend-absent", "PUT"),
        (Method::POST, "/v1/vms/web/vmm/stop", json!({}), 409, "baton:vmm-absent", "QEMU"),
        (
            Method::GET,
            "/v1/vms/web/vmm?wait_ms=60001",
            Value::Null,
            400,
            "baton:bad-request",
            "60000",
        ),
        (Method::GET, "/v1/vms/web/vmm?wait=1", Value::Null, 400, "baton:bad-request", "wait"),
        (Method::GET, "/nothing", Value::Null, 404, "baton:no-such-route", "openapi"),
        (Method::DELETE, "/v1/host", Value::Null, 405, "baton:method", "openapi"),
    ] {
        let what = format!("{method} {path} {body}");
        let body = (!body.is_null()).then_some(body);
        let (got, got_kind, detail) = refused(agent.call(method, path, body).await);
        assert_eq!((got, got_kind.as_str()), (status, kind), "{what}: {detail}");
        assert!(detail.contains(names), "{what}: {detail}");
    }
    let vms = agent.get("/v1/vms").await.expect("list");
    assert_eq!(vms["vms"].as_array().map(Vec::len), Some(1), "nothing half-made");
}

#[tokio::test]
async fn commands_of_a_handoff_reach_the_backend_and_its_words_come_back() {
    let agent = Agent::start().await;
    agent.start_backend("owner").await;
    for command in ["seal", "activate", "abdicate"] {
        let path = format!("/v1/vms/web/backend/{command}");
        let answer = agent.post(&path, json!({})).await.expect("did");
        assert_eq!(answer["did"], command);
    }
    let (status, kind, detail) =
        refused(agent.post("/v1/vms/web/backend/reclaim", json!({})).await);
    assert_eq!((status, kind.as_str()), (409, "baton:lost-race"));
    assert_eq!(detail, "the destination owns the volumes");
}

#[tokio::test]
async fn only_coordinators_and_operators_come_in_by_network() {
    let mut agent = Agent::with("exec_pretended \"$@\"", "", WEB);
    let tls = agent.path("tls");
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_baton-agent"))
        .args(["dev-ca", "--host", "host-a", "--host", "host-b", "--coordinator", "c"])
        .args(["--operator", "me", "--dir"])
        .arg(&tls)
        .output()
        .expect("dev-ca");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let files = |who: &str| TlsFiles {
        ca: tls.join("ca.pem"),
        cert: tls.join(format!("{who}.pem")),
        key: tls.join(format!("{who}.key")),
    };
    let with_tls = |who: &str| {
        let TlsFiles { ca, cert, key } = files(who);
        format!(
            "host = \"host-a\"\n[tls]\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
            ca.display(),
            cert.display(),
            key.display()
        )
    };
    let config = std::fs::read_to_string(agent.path("agent.toml")).expect("read");
    let unix = format!("unix:{}", agent.path("agent.sock").display());
    let config = config.replace(&unix, "127.0.0.1:0");
    let write = |who: &str| {
        let config = config.replace("host = \"host-a\"\n", &with_tls(who));
        std::fs::write(agent.path("agent.toml"), config).expect("write");
    };
    // With another host's certificate it does not even start.
    write("host-host-b");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_baton-agent"))
        .arg("--config")
        .arg(agent.path("agent.toml"))
        .output()
        .expect("agent");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "systemd does not start it again: {said}");
    assert!(said.contains("baton://host/host-b") && said.contains("host-a"), "{said}");

    write("host-host-a");
    agent.spawn();
    let listening = async || agent.log().contains("listening api=");
    wait("it listens", listening).await;
    let log = agent.log();
    let (_, address) = log.rsplit_once("listening api=").expect("address");
    let address = address.lines().next().expect("a line");
    let call = async |who: &str| {
        let credentials = Arc::new(Credentials::load(&files(who)).expect("good"));
        let endpoint = format!("https://{address}").parse().expect("endpoint");
        let host = "baton://host/host-a".parse().expect("identity");
        Client::new(host, endpoint, Some(credentials), LIMIT)
            .call(Method::GET, "/v1/vms", None)
            .await
    };
    assert_eq!(call("coordinator-c").await.expect("let in")["host"], "host-a");
    assert_eq!(call("operator-me").await.expect("let in")["host"], "host-a");
    let (status, kind, detail) = refused(call("host-host-b").await);
    assert_eq!((status, kind.as_str()), (403, "baton:forbidden"));
    assert!(detail.contains("coordinator or operator"), "{detail}");
}
