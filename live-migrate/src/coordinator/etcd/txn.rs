//! A transaction of etcd as data, and in the JSON of its gateway (`/v3/kv/txn`).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::EtcdError;

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Compare {
    /// The key was made at this revision; 0: it is not there.
    Created(String, i64),
    /// The key was last written at this revision; 0: it is not there.
    Modified(String, i64),
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Writes a key; it goes with its lease, 0 for none.
    Put(String, String, i64),
    /// Removes a key.
    Delete(String),
    /// Removes keys from the first on, before the second.
    DeleteRange(String, String),
    /// Reads a key.
    Get(String),
}

/// All of it, at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Txn {
    /// All must hold.
    pub compare: Vec<Compare>,
    /// Done if they do.
    pub then: Vec<Op>,
    /// Done if not.
    pub otherwise: Vec<Op>,
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kv {
    /// Its name.
    pub key: String,
    /// What is in it.
    pub value: String,
    /// When it was made.
    pub created: i64,
    /// When it was last written.
    pub modified: i64,
    /// With which lease; 0 for none.
    pub lease: i64,
}

/// What a transaction was answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answer {
    /// The conditions held.
    pub succeeded: bool,
    /// Of the store then: of this transaction, if it wrote.
    pub revision: i64,
    /// What the [`Op::Get`]s found, in their order.
    pub found: Vec<Option<Kv>>,
}

impl Op {
    /// Bytes of it, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // What etcd adds is a few bytes a field.
        32 + match self {
            Self::Put(key, value, _) => key.len() + value.len(),
            Self::Delete(key) | Self::Get(key) => key.len(),
            Self::DeleteRange(from, to) => from.len() + to.len(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Put(key, value, lease) => {
                json!({"request_put": {"key": encode(key), "value": encode(value), "lease": lease.to_string()}})
            }
            Self::Delete(key) => json!({"request_delete_range": {"key": encode(key)}}),
            Self::DeleteRange(from, to) => {
                json!({"request_delete_range": {"key": encode(from), "range_end": encode(to)}})
            }
            Self::Get(key) => json!({"request_range": {"key": encode(key)}}),
        }
    }
}

impl Compare {
    fn json(&self) -> Value {
        match self {
            Self::Created(key, at) => {
                json!({"key": encode(key), "target": "CREATE", "create_revision": at.to_string()})
            }
            Self::Modified(key, at) => {
                json!({"key": encode(key), "target": "MOD", "mod_revision": at.to_string()})
            }
        }
    }
}

impl Txn {
    /// The body of the request.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "compare": self.compare.iter().map(Compare::json).collect::<Vec<_>>(),
            "success": self.then.iter().map(Op::json).collect::<Vec<_>>(),
            "failure": self.otherwise.iter().map(Op::json).collect::<Vec<_>>(),
        })
    }
}

impl Answer {
    /// From the body of the answer. Fields that are zero or false are left out there.
    ///
    /// # Errors
    /// It is not one.
    pub fn of(body: &Value) -> Result<Self, EtcdError> {
        let responses = body["responses"].as_array().map_or(&[][..], Vec::as_slice);
        let ranges = responses.iter().filter_map(|response| response.get("response_range"));
        let found: Result<_, _> =
            ranges.map(|range| range["kvs"].get(0).map(Kv::of).transpose()).collect();
        Ok(Self {
            succeeded: body["succeeded"] == true,
            revision: number(&body["header"]["revision"]),
            found: found?,
        })
    }
}

impl Kv {
    /// As etcd tells it.
    ///
    /// # Errors
    /// It is not one.
    pub fn of(kv: &Value) -> Result<Self, EtcdError> {
        let key = decode(&kv["key"]).ok_or_else(|| EtcdError::Value {
            key: "a key".to_owned(),
            what: "it is not text".to_owned(),
        })?;
        let value = decode(&kv["value"]).ok_or_else(|| EtcdError::Value {
            key: key.clone(),
            what: "it is not text".to_owned(),
        })?;
        let of = |name: &str| number(&kv[name]);
        Ok(Self {
            key,
            value,
            created: of("create_revision"),
            modified: of("mod_revision"),
            lease: of("lease"),
        })
    }
}

/// Numbers of 64 bits come as text.
pub(super) fn number(value: &Value) -> i64 {
    value.as_str().and_then(|text| text.parse().ok()).or(value.as_i64()).unwrap_or(0)
}

pub(super) fn encode(text: &str) -> String {
    BASE64.encode(text)
}

fn decode(value: &Value) -> Option<String> {
    let text = value.as_str().unwrap_or_default();
    String::from_utf8(BASE64.decode(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As etcd 3.4.23 was seen to take and give it.
    #[test]
    fn the_gateways_json() {
        let txn = Txn {
            compare: vec![Compare::Created("leader".to_owned(), 0)],
            then: vec![Op::Put("leader".to_owned(), "me".to_owned(), 7)],
            otherwise: vec![Op::Get("leader".to_owned())],
        };
        assert_eq!(
            txn.json(),
            json!({"compare": [{"key": "bGVhZGVy", "target": "CREATE", "create_revision": "0"}],
                "success": [{"request_put": {"key": "bGVhZGVy", "value": "bWU=", "lease": "7"}}],
                "failure": [{"request_range": {"key": "bGVhZGVy"}}]})
        );
        let answer = json!({"header": {"revision": "2"}, "responses": [{"response_range": {"kvs": [
            {"key": "bGVhZGVy", "create_revision": "2", "mod_revision": "2", "value": "bWU=", "lease": "7"}]}}]});
        let kv = Kv {
            key: "leader".to_owned(),
            value: "me".to_owned(),
            created: 2,
            modified: 2,
            lease: 7,
        };
        let expected = Answer { succeeded: false, revision: 2, found: vec![Some(kv)] };
        assert_eq!(Answer::of(&answer), Ok(expected));
        let nothing = json!({"header": {"revision": "3"}, "succeeded": true,
            "responses": [{"response_put": {}}, {"response_range": {}}]});
        assert_eq!(
            Answer::of(&nothing),
            Ok(Answer { succeeded: true, revision: 3, found: vec![None] })
        );
        let odd = json!({"responses": [{"response_range": {"kvs": [{"key": "!"}]}}]});
        assert!(Answer::of(&odd).is_err());
    }
}
