//! The command as a shell sees it: what it prints and how it exits, against servers that answer in every wrong way.
//! The real storage server is in `integration/tests/cli.rs`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

fn baton(server: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(args)
        .env("BATON_SERVER", server)
        // Must not be asked: storage servers are neighbours.
        .env("http_proxy", "http://127.0.0.1:1")
        .env("ALL_PROXY", "http://127.0.0.1:1")
        .stdin(Stdio::null())
        .output()
        .expect("the command runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

/// Serves one connection with fixed bytes; returns what was asked.
fn answer_once(answer: &'static str) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let asked = read_request(&mut stream);
        stream.write_all(answer.as_bytes()).expect("answer");
        asked
    });
    (address, server)
}

fn http(status: &str, body: &str) -> &'static str {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}")
        .leak()
}

fn read_request(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    let mut buf = [0; 4096];
    loop {
        let n = stream.read(&mut buf).expect("read");
        text.push_str(std::str::from_utf8(&buf[..n]).expect("text"));
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>())
        });
        if body.len() >= length.map_or(0, |length| length.expect("a number")) || n == 0 {
            return text;
        }
    }
}

#[test]
fn wrong_use_is_one_sentence_and_status_2() {
    for (args, says) in [
        (&["volume", "create", "v", "--size", "10X"][..], "10X"),
        (&["volume", "create", "v"], "--size"),
        (&["volume", "create", "../v", "--size", "1G"], "letters, digits"),
        (&["volume", "show", "a/b"], "letters, digits"),
        (&["volume", "list", "--server", "nonsense"], "HOST:PORT"),
        (&["volume", "list", "--server", "https://127.0.0.1:1"], "plain HTTP"),
        (&["volume", "fence", "v"], "--reason"),
        (&["volume", "fence", "v", "--reason", " "], "say why"),
        (&["volume", "frobnicate"], "frobnicate"),
        // No terminal to ask on: refused before anything is sent, and never waits.
        (&["volume", "delete", "v"], "--yes"),
    ] {
        let output = baton("127.0.0.1:1", args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn nobody_there_is_status_3() {
    // Bound and dropped: refused.
    let free = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("bound");
    let output = baton(&free.to_string(), &["volume", "list"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("http://{free}")), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1);
}

#[test]
fn a_refusal_is_printed_as_the_server_put_it() {
    let body =
        r#"{"type":"t","title":"volume exists","detail":"choose another name","status":409}"#;
    let (address, server) = answer_once(http("409 Conflict", body));
    let output = baton(&address, &["volume", "create", "v", "--size", "1G"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "baton: volume exists: choose another name (t)\n");
    let asked = server.join().expect("served");
    assert!(asked.starts_with("POST /v1/volumes HTTP/1.1\r\n"), "{asked}");
    let body: String = asked.split("\r\n\r\n").nth(1).expect("a body").split_whitespace().collect();
    assert_eq!(body, r#"{"name":"v","size_bytes":1073741824}"#);
}

#[test]
fn what_is_not_a_storage_server_is_status_4() {
    for answer in [
        http("200 OK", "<html"),
        http("404 Not Found", "not found"),
        // A coordinator, or an agent.
        http("404 Not Found", r#"{"type":"baton:no-such-route","title":"There is nothing here"}"#),
        http("500 Oops", r#"{"title":"pool failed","detail":"the disk broke"}"#),
        "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        "SSH-2.0-nonsense\r\n\r\n",
        "",
    ] {
        let (address, server) = answer_once(answer);
        let output = baton(&address, &["volume", "list"]);
        assert_eq!(output.status.code(), Some(4), "{answer}: {}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
        server.join().expect("served");
    }
}

#[test]
fn what_is_not_a_coordinator_is_status_4() {
    let body = r#"{"type":"baton:no-such-route","title":"There is nothing here"}"#;
    let (address, server) = answer_once(http("404 Not Found", body));
    let url = format!("http://{address}");
    let output = baton("127.0.0.1:1", &["vm", "list", "--coordinator", &url]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(
        stderr(&output).contains(&format!("{url} is not a coordinator")),
        "{}",
        stderr(&output)
    );
    server.join().expect("served");
}

#[test]
fn json_is_what_the_server_said() {
    let body = r#"{"volumes":[{"name":"a","from_the_future":true}]}"#;
    let (address, server) = answer_once(http("200 OK", body));
    let output = baton("127.0.0.1:1", &["volume", "list", "--json", "--server", &address]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("\"from_the_future\": true"), "{text}");
    server.join().expect("served");
}
