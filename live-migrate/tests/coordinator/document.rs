//! The OpenAPI document: what is answered is what it says.

use baton_live_migrate::client::Method;
use serde_json::{Value, json};

use super::support::{Cluster, id};

/// The schema behind references.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(at) => resolved(document, document.pointer(&at[1..]).expect("a schema")),
        None => schema,
    }
}

/// Holds an answer against its schema: every key is declared, and all that must be there is.
fn check(document: &Value, schema: &Value, answer: &Value, at: &str) {
    let schema = resolved(document, schema);
    if let Some(choices) = schema["oneOf"].as_array() {
        let is_null = |choice: &&Value| choice["type"] == "null";
        if answer.is_null() {
            assert!(
                choices.iter().any(|choice| is_null(&choice)),
                "{at} may not be null: {schema}"
            );
        } else {
            let other = choices.iter().find(|choice| !is_null(choice)).expect("a choice");
            check(document, other, answer, at);
        }
        return;
    }
    match answer {
        Value::Object(fields) => {
            let declared = &schema["properties"];
            // Of another daemon, or keyed by what is shown: any will do.
            for (key, value) in fields.iter().filter(|_| declared.is_object()) {
                let at = format!("{at}.{key}");
                assert!(declared[key].is_object(), "{at} is not declared: {schema}");
                check(document, &declared[key], value, &at);
            }
            for key in schema["required"].as_array().into_iter().flatten() {
                assert!(fields.contains_key(key.as_str().expect("a name")), "{at} has no {key}");
            }
        }
        Value::Array(items) => {
            for item in items {
                check(document, &schema["items"], item, &format!("{at}[]"));
            }
        }
        other => {
            let kind = match other {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "integer",
                _ => "string",
            };
            let kinds = &schema["type"];
            let may =
                kinds == kind || kinds.as_array().is_some_and(|all| all.contains(&kind.into()));
            assert!(may, "{at} is {other}, and declared {schema}");
        }
    }
}

#[tokio::test]
async fn answers_are_as_the_document_declares_them() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator("c", "").await;
    let document = coordinator.get("/openapi.json").await;
    let held = |path: &str, method: &str, status: &str, answer: &Value| {
        let content = &document["paths"][path][method]["responses"][status]["content"];
        let schema = &content["application/json"]["schema"];
        assert!(schema.is_object(), "{method} {path} has no schema for {status}");
        check(&document, schema, answer, path);
    };
    let id = id();
    let row = coordinator.prepare(&id).await.expect("READY");
    held("/v1/vms/{vm}/handoffs/{id}", "put", "201", &row);
    for (route, path) in [
        ("/v1/vms", "/v1/vms"),
        ("/v1/vms/{vm}/access", "/v1/vms/web/access"),
        ("/v1/vms/{vm}/why", "/v1/vms/web/why"),
        ("/v1/handoffs", "/v1/handoffs"),
        ("/v1/leader", "/v1/leader"),
    ] {
        let answer = coordinator.get(path).await;
        assert!(answer.to_string().len() > 20, "{path} says nothing: {answer}");
        held(route, "get", "200", &answer);
    }
    cluster.switch();
    let row = coordinator.over(&id).await;
    held("/v1/vms/{vm}/handoffs/{id}", "get", "200", &row);
    let fence = json!({"dead_host": "host-b", "reason": "a test", "force": true});
    let fenced = coordinator.call(Method::POST, "/v1/vms/web:fence", fence).await.expect("fenced");
    held("/v1/vms/{vm}:fence", "post", "200", &fenced);
}
