//! The fields of `adapter_config.json`: read one by one, refused by name.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::error::PeftError;

/// Longest `adapter_config.json` that is read.
const MAX_CONFIG: usize = 1 << 20;

/// Most entries of a list or an object in a config.
pub(crate) const MAX_ENTRIES: usize = 512;

/// An object's members in the order of the file, each key once.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Members<T>(pub(crate) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ordered<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Ordered<T> {
            type Value = Members<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object without duplicate keys")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut members = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("duplicate key {key:?}")));
                    }
                    members.push((key, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Ordered(PhantomData))
    }
}

impl<T: Serialize> Serialize for Members<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

/// A JSON value; the members of an object that is a field's value keep their order.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Field {
    Object(Members<Value>),
    /// Anything else, and an object that has a key twice.
    Plain(Value),
}

/// The config's fields.
pub(crate) struct Fields(Members<Field>);

impl Field {
    /// Null, false, empty: what peft writes for a feature that is not used.
    fn is_off(&self) -> bool {
        match self {
            Self::Object(members) => members.0.is_empty(),
            Self::Plain(Value::Null | Value::Bool(false)) => true,
            Self::Plain(Value::Array(items)) => items.is_empty(),
            Self::Plain(Value::String(text)) => text.is_empty(),
            Self::Plain(_) => false,
        }
    }

    fn excerpt(&self) -> String {
        let text = match self {
            Self::Object(_) => "{...}".to_owned(),
            Self::Plain(value) => value.to_string(),
        };
        if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
    }
}

const NULL: &Value = &Value::Null;

impl Fields {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, PeftError> {
        if bytes.len() > MAX_CONFIG {
            return Err(PeftError::Json("it is longer than 1 MiB".into()));
        }
        serde_json::from_slice(bytes).map(Self).map_err(|error| PeftError::Json(error.to_string()))
    }

    fn field(&self, name: &str) -> Option<&Field> {
        self.0.0.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }

    /// A field's value; null if it is not there.
    ///
    /// # Errors
    /// When it is an object.
    pub(crate) fn get(&self, name: &str) -> Result<&Value, PeftError> {
        match self.field(name) {
            None => Ok(NULL),
            Some(Field::Object(_) | Field::Plain(Value::Object(_))) => {
                Err(PeftError::field(name, "must not be an object"))
            }
            Some(Field::Plain(value)) => Ok(value),
        }
    }

    /// Refuses fields that are neither known nor off.
    pub(crate) fn only(&self, known: &[&[&str]]) -> Result<(), PeftError> {
        let is_known = |field: &str| known.iter().any(|list| list.contains(&field));
        match self.0.0.iter().find(|(field, value)| !is_known(field) && !value.is_off()) {
            None => Ok(()),
            Some((field, value)) => {
                Err(PeftError::Unsupported { field: field.clone(), value: value.excerpt() })
            }
        }
    }

    /// Refuses every value of a field but those given; null and absent pass if `or_none`.
    pub(crate) fn one_of(&self, name: &str, values: &[Value], or_none: bool) -> Result<(), PeftError> {
        match self.field(name) {
            None | Some(Field::Plain(Value::Null)) if or_none => Ok(()),
            None => Err(PeftError::field(name, "is missing")),
            Some(Field::Plain(value)) if values.contains(value) => Ok(()),
            Some(value) => Err(PeftError::Unsupported { field: name.into(), value: value.excerpt() }),
        }
    }

    /// A boolean, false if it is not there.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, PeftError> {
        match self.get(name)? {
            Value::Null => Ok(false),
            Value::Bool(on) => Ok(*on),
            _ => Err(PeftError::field(name, "must be a boolean")),
        }
    }

    /// The members of an object in the order of the file, empty if it is not there.
    pub(crate) fn members<T>(
        &self,
        name: &str,
        read: impl Fn(&str, &Value) -> Result<T, PeftError>,
    ) -> Result<Vec<(String, T)>, PeftError> {
        match self.field(name) {
            None | Some(Field::Plain(Value::Null)) => Ok(Vec::new()),
            Some(Field::Object(members)) if members.0.len() <= MAX_ENTRIES => members
                .0
                .iter()
                .map(|(key, value)| Ok((key.clone(), read(&format!("{name}.{key}"), value)?)))
                .collect(),
            Some(Field::Object(_)) => {
                Err(PeftError::field(name, format!("has more than {MAX_ENTRIES} entries")))
            }
            Some(Field::Plain(_)) => Err(PeftError::field(name, "must be an object without duplicate keys")),
        }
    }
}

/// An integer from 1 to `max`.
pub(crate) fn count(field: &str, value: &Value, max: usize) -> Result<usize, PeftError> {
    match value.as_u64() {
        Some(count @ 1..) if count <= max as u64 => Ok(count as usize),
        _ => Err(PeftError::field(field, format!("must be an integer from 1 to {max}"))),
    }
}

/// A number from 0 to a million.
pub(crate) fn finite(field: &str, value: &Value) -> Result<f64, PeftError> {
    match value.as_f64() {
        Some(number) if number.is_finite() && (0.0..=1e6).contains(&number) => Ok(number),
        _ => Err(PeftError::field(field, "must be a number from 0 to 1000000")),
    }
}

/// The file's content as HF peft writes it: keys sorted, indented by two. The members of a field keep their order.
pub(crate) fn render(fields: &[(&str, &dyn erased::Json)]) -> Vec<u8> {
    let mut fields: Vec<(&str, String)> =
        fields.iter().map(|(name, value)| (*name, value.pretty())).collect();
    fields.sort_unstable();
    let lines: Vec<String> =
        fields.iter().map(|(name, value)| format!("  \"{name}\": {}", value.replace('\n', "\n  "))).collect();
    format!("{{\n{}\n}}\n", lines.join(",\n")).into_bytes()
}

pub(crate) mod erased {
    //! Values of any type that JSON can hold.

    /// Something that can be printed as JSON.
    pub(crate) trait Json {
        /// Indented by two.
        fn pretty(&self) -> String;
    }

    impl<T: serde::Serialize> Json for T {
        fn pretty(&self) -> String {
            serde_json::to_string_pretty(self).unwrap_or_else(|_| "null".into())
        }
    }
}
