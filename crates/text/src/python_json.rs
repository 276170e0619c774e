//! JSON in the spelling of Python's `json.dumps(.., ensure_ascii=False)`, which chat templates were written against.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `value` as JSON: on one line with blanks after commas and colons, or indented by `indent` blanks a level.
pub(crate) fn dumps(value: &impl Serialize, indent: Option<usize>) -> serde_json::Result<String> {
    let mut text = Vec::new();
    match indent {
        Some(blanks) => {
            let blanks = " ".repeat(blanks);
            let formatter = PrettyFormatter::with_indent(blanks.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, OneLine))?,
    }
    String::from_utf8(text).map_err(serde::ser::Error::custom)
}

/// Python's default separators, `", "` and `": "`.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spells_as_python_does() {
        let value = minijinja::context! { b => [1, 2], a => "é<\"", none => () };
        assert_eq!(dumps(&value, None).expect("json"), r#"{"b": [1, 2], "a": "é<\"", "none": null}"#);
        let indented = dumps(&vec![1, 2], Some(2)).expect("json");
        assert_eq!(indented, "[\n  1,\n  2\n]");
    }
}
