//! `resources/openapi.yaml` against the server: what it says is answered so, and nothing else is.

use std::collections::BTreeSet;

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

use crate::api::{Error, ErrorKind};
use crate::server::Limits;
use crate::testing::World;

const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"];
const RESIZE: &str = "/v1/disks/{id}/resize";
const GROW: &str = r#"{"size":2147483648,"shrink":false}"#;

struct Description(Yaml);

impl Description {
    fn new() -> Self {
        Self(YamlLoader::load_from_str(include_str!("../../../resources/openapi.yaml")).unwrap().remove(0))
    }

    /// What a `$ref` stands for, or the node itself.
    fn resolved<'a>(&'a self, node: &'a Yaml) -> &'a Yaml {
        match node["$ref"].as_str() {
            None => node,
            Some(reference) => {
                let found = reference.strip_prefix("#/").unwrap().split('/').fold(&self.0, |node, key| &node[key]);
                assert!(!found.is_badvalue(), "{reference} names nothing");
                self.resolved(found)
            }
        }
    }

    /// Path, method and status of everything that is described, with the description of the answer.
    fn answers(&self) -> Vec<(String, String, u16, &Yaml)> {
        let mut answers = Vec::new();
        for (path, operations) in self.0["paths"].as_hash().unwrap() {
            for (method, operation) in operations.as_hash().unwrap() {
                for (status, answer) in operation["responses"].as_hash().unwrap() {
                    let method = method.as_str().unwrap().to_uppercase();
                    let status = status.as_str().unwrap().parse().unwrap();
                    answers.push((path.as_str().unwrap().into(), method, status, self.resolved(answer)));
                }
            }
        }
        answers
    }

    /// Asserts that a value is what a schema says.
    fn check(&self, schema: &Yaml, value: &Value, at: &str) {
        let schema = self.resolved(schema);
        for key in schema.as_hash().unwrap().keys() {
            let known =
                ["type", "description", "default", "required", "properties", "additionalProperties", "items", "enum"];
            assert!(known.contains(&key.as_str().unwrap()), "{at}: this test knows no {key:?}");
        }
        match schema["type"].as_str().unwrap() {
            "string" => assert!(value.is_string(), "{at}: {value}"),
            "integer" => assert!(value.is_u64(), "{at}: {value}"),
            "boolean" => assert!(value.is_boolean(), "{at}: {value}"),
            "array" => {
                for value in value.as_array().unwrap_or_else(|| panic!("{at}: {value}")) {
                    self.check(&schema["items"], value, &format!("{at}[]"));
                }
            }
            "object" => {
                let value = value.as_object().unwrap_or_else(|| panic!("{at}: {value}"));
                assert_eq!(schema["additionalProperties"].as_bool(), Some(false), "{at}");
                for name in schema["required"].as_vec().unwrap() {
                    assert!(value.contains_key(name.as_str().unwrap()), "{at}: no {name:?}");
                }
                for (name, value) in value {
                    let property = &schema["properties"][name.as_str()];
                    assert!(!property.is_badvalue(), "{at}: {name} is not described");
                    self.check(property, value, &format!("{at}.{name}"));
                }
            }
            other => panic!("{at}: this test knows no type {other}"),
        }
        if let Some(values) = schema["enum"].as_vec() {
            assert!(values.iter().any(|v| v.as_str() == value.as_str()), "{at}: {value}");
        }
    }
}

/// How to get an answer.
struct Case {
    path: &'static str,
    method: &'static str,
    status: u16,
    id: &'static str,
    query: &'static str,
    body: String,
    fails: Option<ErrorKind>,
}

fn case(path: &'static str, method: &'static str, status: u16, body: &str) -> Case {
    Case { path, method, status, id: "vda", query: "", body: body.into(), fails: None }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let large = " ".repeat(70_000);
    for (path, method, body) in [("/v1/disks", "GET", ""), ("/v1/disks/{id}", "GET", ""), (RESIZE, "POST", GROW)] {
        cases.push(case(path, method, 200, body));
        cases.push(Case { query: "?x=1", ..case(path, method, 400, body) });
        cases.push(case(path, method, 400, "{"));
        cases.push(case(path, method, 413, &large));
        for kind in [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Corrupt, ErrorKind::Internal] {
            cases.push(Case { fails: Some(kind), ..case(path, method, 500, body) });
        }
        if path.contains("{id}") {
            cases.push(Case { id: "none", ..case(path, method, 404, body) });
            cases.push(Case { id: "b%2F%C3%B6%201", ..case(path, method, 200, body) });
        }
    }
    cases.push(case(RESIZE, "POST", 409, r#"{"size":512}"#));
    for kind in [ErrorKind::Locked, ErrorKind::ReadOnly, ErrorKind::Unsupported] {
        cases.push(Case { fails: Some(kind), ..case(RESIZE, "POST", 409, GROW) });
    }
    cases
}

#[test]
fn every_answer_that_is_described_is_given_and_no_other() {
    let description = Description::new();
    let mut given = BTreeSet::new();
    for case in cases() {
        let Case { path, method, status, .. } = case;
        let world = World::new(Limits::default());
        *world.disks.fails.lock().unwrap() = case.fails.map(|kind| Error::new(kind, "so it is"));
        let target = path.replace("{id}", case.id) + case.query;
        let (got, head, body) = world.ask(method, &target, &case.body);
        assert_eq!(got, status, "{method} {target}: {body}");
        assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
        let answers = description.answers();
        let described = answers.iter().find(|(p, m, s, _)| (p.as_str(), m.as_str(), *s) == (path, method, status));
        let Some((.., answer)) = described else {
            panic!("{method} {path} answers {status}, and that is not described")
        };
        let schema = &answer["content"]["application/json"]["schema"];
        description.check(schema, &serde_json::from_str(&body).unwrap(), &format!("{method} {path} {status}"));
        given.insert((path.to_string(), method.to_string(), status));
    }
    let described: BTreeSet<_> = description.answers().into_iter().map(|(p, m, s, _)| (p, m, s)).collect();
    assert_eq!(given, described, "given, and described");
}

#[test]
fn no_path_and_no_method_is_answered_that_is_not_described() {
    let description = Description::new();
    let world = World::new(Limits::default());
    let described: BTreeSet<_> = description.answers().into_iter().map(|(path, method, ..)| (path, method)).collect();
    let paths: BTreeSet<_> = described.iter().map(|(path, _)| path.clone()).collect();
    for path in paths {
        let allowed = METHODS.iter().filter(|method| described.contains(&(path.clone(), method.to_string())));
        let allow = format!("allow: {}", allowed.map(|method| method.to_string()).collect::<Vec<_>>().join(", "));
        for method in METHODS.iter().filter(|method| !described.contains(&(path.clone(), method.to_string()))) {
            let (status, head, body) = world.ask(method, &path.replace("{id}", "vda"), "");
            assert_eq!(status, 405, "{method} {path}");
            assert!(head.contains(&allow), "{head}");
            let body = serde_json::from_str(&body).unwrap();
            description.check(&description.0["components"]["schemas"]["ErrorBody"], &body, "405");
        }
    }
    for path in
        ["/", "/v1", "/v1/vm", "/v1/jobs", "/v1/events", "/metrics", "/v1/disks/vda/snapshot", "/v1/disks/vda/resize/x"]
    {
        for method in METHODS {
            assert_eq!(world.ask(method, path, "").0, 404, "{method} {path}");
        }
    }
}

#[test]
fn requests_have_the_fields_that_are_described_and_no_other() {
    let description = Description::new();
    let world = World::new(Limits::default());
    let schema = description
        .resolved(&description.0["paths"][RESIZE]["post"]["requestBody"]["content"]["application/json"]["schema"]);
    let described: BTreeSet<_> =
        schema["properties"].as_hash().unwrap().keys().map(|name| name.as_str().unwrap().to_string()).collect();
    // GROW has all that there are, and is taken.
    let all: Value = serde_json::from_str(GROW).unwrap();
    description.check(schema, &all, "Resize");
    assert_eq!(all.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>(), described);
    let required: Vec<_> = schema["required"].as_vec().unwrap().iter().filter_map(Yaml::as_str).collect();
    for name in &described {
        let mut less = all.clone();
        less.as_object_mut().unwrap().remove(name);
        let (status, _, body) = world.ask("POST", "/v1/disks/vda/resize", &less.to_string());
        assert_eq!(status == 400, required.contains(&name.as_str()), "without {name}: {body}");
    }
}

#[test]
fn kinds_of_errors_are_all_described() {
    use ErrorKind::{
        Corrupt, Internal, Invalid, Io, Locked, MethodNotAllowed, NoSpace, NotFound, ReadOnly, Refused, TooLarge,
        Unsupported,
    };
    let description = Description::new();
    let kind = &description.0["components"]["schemas"]["ErrorBody"]["properties"]["error"]["properties"]["kind"];
    let described: BTreeSet<_> =
        kind["enum"].as_vec().unwrap().iter().map(|k| k.as_str().unwrap().to_string()).collect();
    let all = [
        Corrupt,
        Internal,
        Invalid,
        Io,
        Locked,
        MethodNotAllowed,
        NoSpace,
        NotFound,
        ReadOnly,
        Refused,
        TooLarge,
        Unsupported,
    ];
    let names = all.map(|kind| serde_json::to_value(kind).unwrap().as_str().unwrap().to_string());
    assert_eq!(BTreeSet::from(names), described);
}
