//! Who may do what, by certificate.

use std::sync::Arc;

use baton_live_migrate::client::{CallError, Client, Endpoint, Method};
use baton_live_migrate::coordinator::config::Config;
use baton_live_migrate::coordinator::server;
use baton_live_migrate::dev_ca::DevCa;
use baton_live_migrate::identity::Identity;
use baton_live_migrate::tls::{Credentials, TlsFiles};
use serde_json::{Value, json};

use super::support::{LIMIT, kind};

/// Certificates of `identity` in a directory of their own.
fn files(dir: &std::path::Path, ca: &DevCa, name: &str, identity: &str) -> TlsFiles {
    use std::os::unix::fs::PermissionsExt;
    let id: Identity = identity.parse().expect("an identity");
    let (cert, key) = ca.issue(&id, time::OffsetDateTime::now_utc()).expect("issued");
    let at = |suffix: &str| dir.join(format!("{name}{suffix}"));
    std::fs::write(at(".ca"), ca.certificate()).expect("write");
    std::fs::write(at(".pem"), cert).expect("write");
    std::fs::write(at(".key"), key).expect("write");
    std::fs::set_permissions(at(".key"), std::fs::Permissions::from_mode(0o600)).expect("mode");
    TlsFiles { ca: at(".ca"), cert: at(".pem"), key: at(".key") }
}

#[tokio::test]
async fn operators_may_all_and_hosts_only_what_concerns_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let ca = DevCa::new().expect("an authority");
    let own = files(dir.path(), &ca, "c", "baton://coordinator/c");
    let text = format!(
        "listen = \"127.0.0.1:0\"\njournal = \"{}\"\n[tls]\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n\
         [[host]]\nname = \"host-a\"\nagent = \"https://127.0.0.1:1\"\n[[host]]\nname = \"host-b\"\nagent = \"https://127.0.0.1:1\"\n",
        dir.path().join("j").display(),
        own.ca.display(),
        own.cert.display(),
        own.key.display()
    );
    let file = dir.path().join("c.toml");
    std::fs::write(&file, &text).expect("written");
    // With a host's certificate no agent would obey it: said at the start.
    let wrong = files(dir.path(), &ca, "h", "baton://host/host-a");
    let other = dir.path().join("h.toml");
    let text = text.replace("c.pem", "h.pem").replace("c.key", "h.key");
    assert!(text.contains(&wrong.cert.display().to_string()));
    std::fs::write(&other, text).expect("written");
    let refused = server::start(Config::load(&other).expect("good")).await.expect_err("a host's");
    assert!(refused.to_string().contains("baton://host/host-a"), "{refused}");
    let program = env!("CARGO_BIN_EXE_baton-coordinator");
    let ended = std::process::Command::new(program).arg("--config").arg(&other).output();
    let code = ended.expect("it runs").status.code();
    assert_eq!(code, Some(2), "systemd does not start it again");
    let coordinator = server::start(Config::load(&file).expect("good")).await.expect("it starts");
    let endpoint: Endpoint =
        format!("https://{}", coordinator.address).parse().expect("an endpoint");
    let client = |name: &str, identity: &str| {
        let credentials = Credentials::load(&files(dir.path(), &ca, name, identity)).expect("good");
        let who = "baton://coordinator/c".parse().expect("an identity");
        Client::new(who, endpoint.clone(), Some(Arc::new(credentials)), LIMIT)
    };
    let operator = client("me", "baton://operator/me");
    let (a, z) = (client("a", "baton://host/host-a"), client("z", "baton://host/host-z"));
    let fence = json!({"dead_host": "host-a", "reason": "a test"});
    let handoff = json!({"from": "host-a", "to": "host-b"});
    let put = "/v1/vms/web/handoffs/01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let call = async |client: &Client, method: Method, path: &str, body: &Value| {
        client.call(method, path, Some(body)).await
    };
    // No host may fence, nor have a VM migrated, nor move what is not its own.
    for (client, method, path, body) in [
        (&a, Method::POST, "/v1/vms/web:fence", &fence),
        (&z, Method::POST, "/v1/vms/web:fence", &fence),
        (
            &a,
            Method::POST,
            "/v1/vms/web/migrations",
            &json!({"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "to": "host-b"}),
        ),
        (&z, Method::PUT, put, &handoff),
    ] {
        let (problem, detail) = kind(call(client, method.clone(), path, body).await);
        assert_eq!(problem, "baton:forbidden", "{path}");
        assert!(detail.contains("operator"), "{detail}");
        // They may look, so they are told of the VM what the journal knows.
        for part in ["the volumes of `web` is not known here", "nothing was armed"] {
            assert!(detail.contains(part), "{part}: {detail}");
        }
        assert_eq!(detail.contains("say from and to"), method == Method::PUT, "{detail}");
    }
    // What is let in gets as far as the agents, which do not exist.
    for (client, method, path, body) in [
        (&operator, Method::POST, "/v1/vms/web:fence", &fence),
        (&operator, Method::PUT, put, &handoff),
        (&a, Method::PUT, put, &handoff),
    ] {
        let (problem, _) = kind(call(client, method, path, body).await);
        assert_eq!(problem, "baton:agent-unreachable", "{path}");
    }
    a.call(Method::GET, "/v1/vms", None).await.expect("hosts may look");
    // Another name than the one that was called is not spoken to.
    let who = "baton://coordinator/other".parse().expect("an identity");
    let credentials =
        Credentials::load(&files(dir.path(), &ca, "me", "baton://operator/me")).expect("good");
    let wrong = Client::new(who, endpoint, Some(Arc::new(credentials)), LIMIT);
    let error = wrong.call(Method::GET, "/v1/vms", None).await.expect_err("somebody else");
    assert!(matches!(error, CallError::Distrust { .. }), "{error}");
    coordinator.stop().await;
}
