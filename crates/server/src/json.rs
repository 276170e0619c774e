//! JSON objects from clients: read with the name of the field that is wrong, and without silently passing over any.

use serde::Deserialize;
use serde::de::value::Error as NamesError;
use serde::de::{Deserializer, Error as _, Visitor};
use serde_json::{Map, Value};

use crate::error::{ApiError, Code};

/// A parameter that clients may send, with the test for values that ask for nothing.
pub(crate) type Unsupported = (&'static str, fn(&Value) -> bool);

/// What serde says of a type, and what a client is told.
const EXPECTED: [(&str, &str); 6] = [
    ("expected u32", "expected a whole number from 0 to 4294967295"),
    ("expected u64", "expected a whole number from 0 to 18446744073709551615"),
    ("expected i64", "expected a whole number"),
    ("expected f64", "expected a number"),
    ("expected usize", "expected a whole number of at least 0"),
    ("expected a boolean", "expected true or false"),
];

/// A JSON object, nested no deeper than allowed.
#[derive(Debug, Clone)]
pub(crate) struct Object(Value);

impl Object {
    /// Parses `bytes`, which may nest `depth` levels.
    pub(crate) fn parse(bytes: &[u8], depth: usize) -> Result<Self, ApiError> {
        if nesting(bytes) > depth {
            let message = format!("the JSON is nested deeper than {depth} levels");
            return Err(ApiError::new(Code::InvalidJson, message));
        }
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let map: Map<String, Value> = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            // A number too large for any type is the only thing that valid JSON can trip over here.
            match error.inner().to_string().starts_with("number out of range") {
                true => ApiError::invalid(path, "is a number out of range"),
                false => not_json(error.inner()),
            }
        })?;
        json.end().map_err(|error| not_json(&error))?;
        Ok(Self(Value::Object(map)))
    }

    /// Without the fields that are null, here and in the objects directly in it: some clients send all they know.
    pub(crate) fn without_nulls(mut self) -> Self {
        if let Some(map) = self.0.as_object_mut() {
            map.retain(|_, value| !value.is_null());
            for inner in map.values_mut().filter_map(Value::as_object_mut) {
                inner.retain(|_, value| !value.is_null());
            }
        }
        self
    }

    /// Whether it has the field.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// Reads the fields that `T` has. The error names the field.
    pub(crate) fn read<'de, T: Deserialize<'de>>(&'de self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.0).map_err(|error| {
            let path = error.path().to_string();
            let problem = error.inner().to_string();
            let within = match path.as_str() {
                "." => String::new(),
                path => format!("{path}."),
            };
            match problem.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
                Some(name) => missing(&format!("{within}{name}")),
                None => ApiError::new(Code::InvalidValue, format!("{path}: {}", plain(&problem))).param(path),
            }
        })
    }

    /// Refuses what is neither known nor harmless, and what is unsupported and asks for something.
    ///
    /// A field that is null counts as absent.
    pub(crate) fn refuse_others(
        &self,
        known: &[&[&str]],
        harmless: &[&str],
        unsupported: &[Unsupported],
    ) -> Result<(), ApiError> {
        for (name, value) in self.0.as_object().into_iter().flatten() {
            let name = name.as_str();
            if value.is_null() || harmless.contains(&name) || known.iter().any(|names| names.contains(&name))
            {
                continue;
            }
            match unsupported.iter().find(|(unsupported, _)| *unsupported == name) {
                Some((_, asks_nothing)) if asks_nothing(value) => {}
                Some(_) => {
                    let message = format!("{name}: this value is not supported by this server");
                    return Err(ApiError::new(Code::UnsupportedParameter, message).param(name));
                }
                None => {
                    let message = format!("unknown parameter: {name:?}");
                    return Err(ApiError::new(Code::UnknownParameter, message).param(name));
                }
            }
        }
        Ok(())
    }
}

/// A parameter that is needed and not there.
pub(crate) fn missing(name: &str) -> ApiError {
    ApiError::new(Code::MissingParameter, format!("the parameter {name} is missing")).param(name)
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::new(Code::InvalidJson, format!("the body is not a JSON object: {error}"))
}

/// The message without names of Rust types.
fn plain(message: &str) -> String {
    for (jargon, plain) in EXPECTED {
        if let Some(start) = message.strip_suffix(jargon) {
            return format!("{start}{plain}");
        }
    }
    message.to_owned()
}

/// How deep arrays and objects are nested.
fn nesting(json: &[u8]) -> usize {
    let (mut depth, mut deepest): (usize, usize) = (0, 0);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                while let Some(byte) = bytes.next().filter(|byte| **byte != b'"') {
                    if *byte == b'\\' {
                        bytes.next();
                    }
                }
            }
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// The names of the fields that `T` reads, as its derived `Deserialize` declares them.
pub(crate) fn fields_of<T: Deserialize<'static>>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl Deserializer<'static> for Names<'_> {
        type Error = NamesError;

        fn deserialize_any<V: Visitor<'static>>(self, _: V) -> Result<V::Value, NamesError> {
            Err(NamesError::custom("not a struct"))
        }

        fn deserialize_struct<V: Visitor<'static>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, NamesError> {
            *self.0 = fields;
            Err(NamesError::custom("the names are all that is wanted"))
        }

        serde::forward_to_deserialize_any! {
            <V: Visitor<'static>>
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // The error is how the names come out without a value.
    let _ = T::deserialize(Names(&mut names));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only their reading is looked at")]
    struct Some2 {
        count: Option<u32>,
        #[serde(rename = "type")]
        kind: Option<Vec<f64>>,
    }

    fn read(text: &str) -> Result<Some2, ApiError> {
        Object::parse(text.as_bytes(), 4)?.read()
    }

    #[test]
    fn errors_name_the_field() {
        for (text, param, part) in [
            (r#"{"count":-1}"#, "count", "a whole number from 0 to 4294967295"),
            (r#"{"count":4294967296}"#, "count", "integer `4294967296`"),
            (r#"{"count":"1"}"#, "count", "string \"1\""),
            (r#"{"count":1.5}"#, "count", "1.5"),
            (r#"{"count":1e400}"#, "count", "out of range"),
            (r#"{"type":[1,true]}"#, "type[1]", "expected a number"),
            (r#"{"type":[1,-1e999]}"#, "type[1]", "out of range"),
        ] {
            let body = read(text).expect_err(text).body().error;
            assert_eq!(body.param.as_deref(), Some(param), "{text}: {}", body.message);
            assert!(body.message.contains(part), "{text}: {}", body.message);
        }
        assert!(read(r#"{"count":null,"type":[1, 2.5],"other":[[]]}"#).is_ok());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in
            ["", "null", "[]", "1", "{", "{}}", "{} x", r#"{"a":1,}"#, "\u{feff}{}", r#"{"a":"\ud800"}"#]
        {
            let error = Object::parse(text.as_bytes(), 4).expect_err(text);
            assert_eq!(error.code(), Code::InvalidJson, "{text}");
        }
        assert!(Object::parse(b"\xff", 4).is_err());
    }

    #[test]
    fn nesting_is_counted_outside_strings() {
        assert_eq!(nesting(br#"{"a":"[[[\"[[[","b":[1,{"c":[]}]}"#), 4);
        assert_eq!(nesting(br#"{"a":"\\"},[[["#), 3);
        assert_eq!(nesting(br#"]]]]["#), 1);
        assert_eq!(nesting(br#""["#), 0);
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(4), "]".repeat(4));
        assert_eq!(Object::parse(deep.as_bytes(), 4).expect_err("deep").code(), Code::InvalidJson);
        assert!(Object::parse(deep.as_bytes(), 5).is_ok());
        // Far beyond serde's own limit, which the check comes before.
        assert!(Object::parse("[".repeat(1 << 20).as_bytes(), 32).is_err());
    }

    #[test]
    fn names_come_from_the_type() {
        assert_eq!(fields_of::<Some2>(), ["count", "type"]);
        assert!(fields_of::<u32>().is_empty());
    }

    #[test]
    fn nothing_is_passed_over_silently() {
        let check = |text: &str| {
            let object = Object::parse(text.as_bytes(), 8).expect("json");
            object.refuse_others(
                &[fields_of::<Some2>()],
                &["store"],
                &[("tools", |value| value.as_array().is_some_and(Vec::is_empty))],
            )
        };
        assert!(check(r#"{"count":1,"store":true,"tools":[],"novel":null}"#).is_ok());
        assert_eq!(check(r#"{"tools":[1]}"#).expect_err("asks").code(), Code::UnsupportedParameter);
        assert_eq!(check(r#"{"temprature":1}"#).expect_err("typo").code(), Code::UnknownParameter);
    }
}
