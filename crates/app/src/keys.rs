//! Whose keys there are: the operator's of the tenant `default`, and those of a file.
//!
//! No message here holds what may be a key, not even one that stands in the wrong place.

use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use serde_json::{Map, Value};
use server::{ApiKey, Auth};
use sha2::{Digest, Sha256};
use types::hash_from_hex;

use crate::settings::ServiceArgs;

/// Fewest characters of a key.
const LEAST: usize = 16;

/// Who may ask, as the settings say.
///
/// # Errors
/// When a key is wrong or there twice, the file cannot be read, or a server beyond loopback has no keys.
pub(crate) fn auth(args: &ServiceArgs) -> anyhow::Result<Auth> {
    let mut keys = Vec::new();
    if let Some(key) = &args.api_key {
        let sha256 = digest(key).map_err(|problem| anyhow!("--api-key: {problem}"))?;
        keys.push(ApiKey { sha256, tenant: "default".parse()?, operator: true });
    }
    if let Some(path) = &args.api_keys {
        let file = || format!("--api-keys {}", path.display());
        let listed = read(path).with_context(file)?;
        for (at, key) in listed.iter().enumerate() {
            let is_it = |other: &ApiKey| other.sha256 == key.sha256;
            if let Some(first) = listed[..at].iter().position(is_it) {
                bail!("{}: entry {}: is the same key as entry {}", file(), at + 1, first + 1);
            }
            ensure!(!keys.iter().any(is_it), "{}: entry {}: is the same key as --api-key", file(), at + 1);
        }
        keys.extend(listed);
    }
    ensure!(
        !keys.is_empty() || args.listen.ip().is_loopback(),
        "--listen {}: listening beyond loopback needs --api-key or --api-keys (ATELIER_API_KEY, ATELIER_API_KEYS)",
        args.listen
    );
    Ok(if keys.is_empty() { Auth::Open } else { Auth::Keys(keys) })
}

/// The keys of a file.
fn read(path: &Path) -> anyhow::Result<Vec<ApiKey>> {
    let text = std::fs::read_to_string(path)?;
    if is_open_to_all(&std::fs::metadata(path)?) {
        tracing::warn!(file = %path.display(), "every user of this machine can read or change the API keys");
    }
    parse(&text)
}

/// Whether users other than the owner and its group may read or write the file.
#[cfg(unix)]
fn is_open_to_all(file: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.permissions().mode() & 0o006 != 0
}

#[cfg(not(unix))]
fn is_open_to_all(_: &std::fs::Metadata) -> bool {
    false
}

fn parse(text: &str) -> anyhow::Result<Vec<ApiKey>> {
    let whole: Value = serde_json::from_str(text).context("is not JSON")?;
    let Value::Array(entries) = whole else { bail!("must be a list: [{{\"tenant\": ..., \"key\": ...}}]") };
    ensure!(!entries.is_empty(), "the list is empty");
    let read = |(at, value)| entry(value).with_context(|| format!("entry {}", at + 1));
    entries.iter().enumerate().map(read).collect()
}

fn entry(value: &Value) -> anyhow::Result<ApiKey> {
    let fields = value.as_object().context("must be an object with the fields tenant and key (or sha256)")?;
    let is_unknown = |name: &&String| !["tenant", "key", "sha256", "operator"].contains(&name.as_str());
    if let Some(name) = fields.keys().find(is_unknown) {
        // A longer one may be a key.
        let name = if name.len() < LEAST { format!(": {name}") } else { String::new() };
        bail!("has an unknown field{name}; there are tenant, key, sha256 and operator");
    }
    let tenant = string(fields, "tenant")?.context("tenant: is missing")?;
    let tenant = tenant.parse().context("tenant")?;
    let operator = match fields.get("operator") {
        None => false,
        Some(Value::Bool(operator)) => *operator,
        Some(_) => bail!("operator: must be true or false"),
    };
    let sha256 = match (string(fields, "key")?, string(fields, "sha256")?) {
        (Some(key), None) => digest(key).map_err(|problem| anyhow!("key: {problem}"))?,
        (None, Some(hex)) => hash_from_hex(hex).context("sha256: must be 64 hexadecimal digits")?,
        (None, None) => bail!("key: is missing, and so is sha256"),
        (Some(_), Some(_)) => bail!("key: stands beside sha256; one of them is enough"),
    };
    Ok(ApiKey { sha256, tenant, operator })
}

fn string<'a>(fields: &'a Map<String, Value>, name: &str) -> anyhow::Result<Option<&'a str>> {
    let read = |value: &'a Value| value.as_str().with_context(|| format!("{name}: must be a string"));
    fields.get(name).map(read).transpose()
}

/// The hash of a key, if it is long enough and a header can carry it.
fn digest(key: &str) -> Result<[u8; 32], String> {
    if key.chars().count() < LEAST {
        return Err(format!("must have at least {LEAST} characters"));
    }
    let can_be_sent = |c: char| c.is_ascii_graphic() || c == ' ';
    if key.trim() != key || !key.chars().all(can_be_sent) {
        return Err("may hold visible ASCII characters only, and blanks between them".into());
    }
    Ok(Sha256::digest(key).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Cli, Command};
    use clap::Parser as _;

    const LONG: &str = "a-key-of-enough-characters";
    const OTHER: &str = "another key, with blanks in it";

    /// What becomes of a server with these arguments and, if there is one, this file of keys.
    fn outcome(arguments: &[&str], file: Option<&str>) -> Result<Auth, String> {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("keys.json");
        let path = path.to_str().expect("path");
        let mut words = [&["atelier", "serve"], arguments].concat();
        if let Some(text) = file {
            std::fs::write(path, text).expect("written");
            words.extend(["--api-keys", path]);
        }
        let Ok(Cli { command: Command::Serve(args) }) = Cli::try_parse_from(words) else {
            return Err("the command line".into());
        };
        auth(&args).map_err(|error| {
            let said = format!("{error:#}");
            assert!(file.is_none() || said.contains(path), "names the file: {said}");
            said
        })
    }

    /// Why the settings are refused.
    fn refusal(arguments: &[&str], file: Option<&str>) -> String {
        outcome(arguments, file).expect_err("they are wrong")
    }

    /// Tenant, operator and hash of each key, in order.
    fn known(auth: Result<Auth, String>) -> Vec<(String, bool, [u8; 32])> {
        match auth {
            Ok(Auth::Keys(keys)) => {
                keys.into_iter().map(|key| (key.tenant.to_string(), key.operator, key.sha256)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn hash(key: &str) -> [u8; 32] {
        Sha256::digest(key).into()
    }

    fn hex(key: &str) -> String {
        hash(key).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn keys_come_from_the_file_and_the_command_line() {
        let file = format!(
            r#"[{{"tenant": "acme", "key": "{LONG}"}},
                {{"tenant": "initech", "sha256": "{}", "operator": true}},
                {{"tenant": "acme", "sha256": "{}", "operator": false}}]"#,
            hex(OTHER),
            hex("a third").to_uppercase(),
        );
        let listed = [
            ("acme".to_owned(), false, hash(LONG)),
            ("initech".to_owned(), true, hash(OTHER)),
            ("acme".to_owned(), false, hash("a third")),
        ];
        assert_eq!(known(outcome(&[], Some(&file))), listed);
        let own = "the operator's own key";
        let both = known(outcome(&["--api-key", own], Some(&file)));
        assert_eq!(both[0], ("default".to_owned(), true, hash(own)));
        assert_eq!(both[1..], listed);
        assert_eq!(known(outcome(&["--api-key", own], None)), both[..1]);
        // Beyond loopback either is enough, and without both it is not.
        assert_eq!(known(outcome(&["--listen", "0.0.0.0:0"], Some(&file))), listed);
        assert!(matches!(outcome(&[], None), Ok(Auth::Open)));
        let refused = refusal(&["--listen", "0.0.0.0:0"], None);
        assert!(refused.contains("--api-key or --api-keys"), "{refused}");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_by_entry_and_field_and_without_keys() {
        let hex = hex(LONG);
        let [good, same] = [format!(r#""key": "{LONG}""#), format!(r#""sha256": "{hex}""#)];
        for (entries, words) in [
            ("[".to_owned(), "is not JSON: EOF"),
            (String::new(), "is not JSON"),
            (format!(r#"{{"{LONG}": "acme"}}"#), "must be a list"),
            (format!(r#""{LONG}""#), "must be a list"),
            ("[]".to_owned(), "the list is empty"),
            (format!(r#"["{LONG}"]"#), "entry 1: must be an object"),
            (format!(r#"[{{{good}}}]"#), "entry 1: tenant: is missing"),
            (format!(r#"[{{"tenant": "", {good}}}]"#), "entry 1: tenant: tenant must have 1 to 64"),
            (format!(r#"[{{"tenant": "a b", {good}}}]"#), "entry 1: tenant: tenant may hold"),
            (format!(r#"[{{"tenant": 7, {good}}}]"#), "entry 1: tenant: must be a string"),
            (format!(r#"[{{"tenant": "a", "key": ["{LONG}"]}}]"#), "entry 1: key: must be a string"),
            (r#"[{"tenant": "a", "sha256": 7}]"#.to_owned(), "entry 1: sha256: must be a string"),
            (
                format!(r#"[{{"tenant": "a", {good}, "operator": "{LONG}"}}]"#),
                "entry 1: operator: must be true or false",
            ),
            (
                format!(r#"[{{"tenant": "a", {good}, "tennant": "a"}}]"#),
                "entry 1: has an unknown field: tennant; there are tenant, key, sha256 and operator",
            ),
            (format!(r#"[{{"tenant": "a", "{LONG}": true}}]"#), "entry 1: has an unknown field; there are"),
            (r#"[{"tenant": "a"}]"#.to_owned(), "entry 1: key: is missing, and so is sha256"),
            (format!(r#"[{{"tenant": "a", {good}, {same}}}]"#), "entry 1: key: stands beside sha256"),
            (
                format!(r#"[{{"tenant": "a", {good}}}, {{"tenant": "a", "key": "fifteen letters"}}]"#),
                "entry 2: key: must have at least 16 characters",
            ),
            (format!(r#"[{{"tenant": "a", "key": "{LONG} "}}]"#), "entry 1: key: may hold visible ASCII"),
            (format!(r#"[{{"tenant": "a", "key": "{LONG}\n{LONG}"}}]"#), "entry 1: key: may hold visible"),
            (format!(r#"[{{"tenant": "a", "key": "{LONG}é"}}]"#), "entry 1: key: may hold visible ASCII"),
            (
                format!(r#"[{{"tenant": "a", "sha256": "{}"}}]"#, &hex[1..]),
                "entry 1: sha256: must be 64 hexadecimal digits",
            ),
            (format!(r#"[{{"tenant": "a", "sha256": "{hex}00"}}]"#), "entry 1: sha256: must be 64"),
            (format!(r#"[{{"tenant": "a", "sha256": "+{}"}}]"#, &hex[1..]), "entry 1: sha256: must be 64"),
            (
                format!(r#"[{{"tenant": "a", {good}}}, {{"tenant": "b", {same}}}]"#),
                "entry 2: is the same key as entry 1",
            ),
        ] {
            let said = refusal(&[], Some(&entries));
            assert!(said.contains(words), "{entries}: {said}");
            assert!(!said.contains(LONG) && !said.contains(&hex), "{said}");
        }
        // Sixteen are enough.
        let least = outcome(&[], Some(r#"[{"tenant": "a", "key": "sixteen letters."}]"#));
        assert_eq!(known(least), [("a".to_owned(), false, hash("sixteen letters."))]);
    }

    #[test]
    fn what_is_wrong_with_the_settings_is_said_without_keys() {
        let file = format!(r#"[{{"tenant": "a", "key": "{OTHER}"}}, {{"tenant": "a", "key": "{LONG}"}}]"#);
        let twice = refusal(&["--api-key", LONG], Some(&file));
        assert!(twice.ends_with("entry 2: is the same key as --api-key"), "{twice}");
        assert!(!twice.contains(LONG), "{twice}");
        let short = refusal(&["--api-key", "fifteen letters"], None);
        assert_eq!(short, "--api-key: must have at least 16 characters");
        let absent = refusal(&["--api-keys", "absent/keys.json"], None);
        assert!(absent.starts_with("--api-keys absent/keys.json: "), "{absent}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_everybody_can_read_or_change_is_noticed() {
        use std::os::unix::fs::PermissionsExt as _;
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = [0o600, 0o640, 0o644, 0o602].map(|mode| {
            file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).expect("mode");
            is_open_to_all(&file.as_file().metadata().expect("metadata"))
        });
        assert_eq!(open, [false, false, true, true]);
    }
}
