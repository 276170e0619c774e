//! The layers: which crate of the workspace may depend on which.

use serde_json::Value;

/// Each crate and the workspace crates it may use.
///
/// Three rows say more than the layers ask for: `train` computes its frozen products with `kernels` directly, because
/// they are no candle tensors; `server` names `peft`'s lease, which it carries from `adapters` to `engine`; `xtask`
/// gets the API's description from `server`.
const ALLOWED: [(&str, &[&str]); 14] = [
    ("types", &[]),
    ("kernels", &[]),
    ("text", &["types"]),
    ("store", &["types"]),
    ("telemetry", &["types"]),
    ("peft", &["types", "kernels"]),
    ("model", &["types", "kernels", "peft"]),
    ("adapters", &["types", "peft", "store"]),
    ("engine", &["types", "peft", "model"]),
    ("personalize", &["types", "text"]),
    ("train", &["types", "kernels", "peft", "model"]),
    ("worker", &["types", "store", "text", "peft", "model", "train", "personalize"]),
    ("server", &["types", "text", "engine", "adapters", "store", "personalize", "telemetry", "peft"]),
    ("xtask", &["server"]),
];

/// Violations in the output of `cargo metadata --no-deps`. Development dependencies are exempt.
pub(crate) fn violations(metadata: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for package in array(&metadata["packages"]) {
        let name = text(&package["name"]);
        let manifest = text(&package["manifest_path"]);
        if allows(name, "").is_none() {
            found.push(format!("{manifest}:1: {name} has no row among the layers in xtask"));
            continue;
        }
        for dependency in array(&package["dependencies"]) {
            // A workspace crate is a path dependency; a development dependency says so in its kind.
            if dependency["path"].is_null() || dependency["kind"] == "dev" {
                continue;
            }
            let used = text(&dependency["name"]);
            if allows(name, used) != Some(true) {
                found.push(format!("{manifest}:1: {name} must not depend on {used}"));
            }
        }
    }
    found
}

/// Whether `name` may use `used`; nothing for a crate without a row.
fn allows(name: &str, used: &str) -> Option<bool> {
    match name {
        "testkit" => Some(true),
        "atelier" => Some(!["testkit", "xtask"].contains(&used)),
        _ => ALLOWED.iter().find(|row| row.0 == name).map(|row| row.1.contains(&used)),
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    //! Edges that must and must not pass.
    use super::*;
    use serde_json::json;

    fn check(name: &str, used: &str, kind: Value) -> usize {
        let dependency = json!({"name": used, "kind": kind, "path": "/somewhere"});
        let package = json!({"name": name, "manifest_path": "Cargo.toml", "dependencies": [dependency]});
        violations(&json!({"packages": [package]})).len()
    }

    #[test]
    fn edges_follow_the_layers() {
        assert_eq!(check("model", "peft", Value::Null), 0);
        assert_eq!(check("atelier", "worker", Value::Null), 0);
        assert_eq!(check("testkit", "server", Value::Null), 0);
        assert_eq!(check("types", "testkit", json!("dev")), 0);
    }

    #[test]
    fn wrong_edges_are_found() {
        assert_eq!(check("peft", "model", Value::Null), 1);
        assert_eq!(check("engine", "store", Value::Null), 1);
        assert_eq!(check("types", "text", json!("build")), 1);
        assert_eq!(check("atelier", "testkit", Value::Null), 1);
        assert_eq!(check("atelier", "xtask", Value::Null), 1);
    }

    #[test]
    fn every_crate_needs_a_row() {
        let packages = json!([{"name": "newcomer", "manifest_path": "Cargo.toml", "dependencies": []}]);
        assert_eq!(violations(&json!({ "packages": packages })).len(), 1);
    }
}
