//! The model's chat template: Jinja as Hugging Face's `transformers` runs it, bounded.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use time::OffsetDateTime;
use types::Timestamp;

use crate::{ChatOptions, TextError, python_json};

/// Longest chat template that is compiled, in bytes; the longest known ones have about 20,000.
pub const MAX_TEMPLATE_BYTES: usize = 256 * 1024;

/// Work one rendering may do, in minijinja's fuel: about one per instruction and one per 64 bytes handled. A turn of
/// an ordinary template costs some 30 plus its text.
const FUEL: u64 = 5_000_000;

const NAME: &str = "chat template";

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// What a template said with `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

impl ChatTemplate {
    /// Compiles `source`. `names` are the special tokens' texts, by the names templates know (`bos_token`).
    pub(crate) fn compile(source: String, names: &[(&'static str, String)]) -> Result<Self, TextError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TextError::TemplateTooLong { bytes: source.len(), max: MAX_TEMPLATE_BYTES });
        }
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        environment.add_test("iterable", is_iterable);
        for (name, text) in names {
            environment.add_global(*name, text.as_str());
        }
        environment.add_template_owned(NAME, without_generation_marks(&source)).map_err(failed)?;
        Ok(Self { environment, source })
    }

    /// The template as given.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation; `messages` are maps with `role`, `content` and perhaps `name`.
    pub(crate) fn render(&self, messages: Vec<Value>, options: &ChatOptions) -> Result<String, TextError> {
        let now = options.now;
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let rendered = template.render(context! {
            messages,
            add_generation_prompt => options.add_generation_prompt,
            tools => (),
            documents => (),
            strftime_now => Value::from_function(move |format: &str| strftime(now, format)),
        });
        rendered.map_err(failed)
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refused(message)))
}

fn failed(error: Error) -> TextError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut words = Vec::new();
    while let Some(cause) = source {
        if let Some(Refused(message)) = cause.downcast_ref() {
            return TextError::TemplateRefused(message.clone());
        }
        words.push(cause.to_string());
        source = cause.source();
    }
    TextError::Template(words.join(": "))
}

/// In Jinja, unlike minijinja, none cannot be iterated over; templates ask before they count tools.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// JSON as Python writes it; `indent` is the only option templates use.
fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii is not supported"));
    }
    options.assert_all_used()?;
    let text = python_json::dumps(&value, indent);
    let text = text.map_err(|error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
    Ok(Value::from_safe_string(text))
}

/// `datetime.now().strftime(format)`, in UTC.
fn strftime(now: Timestamp, format: &str) -> Result<String, Error> {
    let wrong = |detail: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {detail}"));
    let items =
        time::format_description::parse_strftime_owned(format).map_err(|error| wrong(error.to_string()))?;
    let now = OffsetDateTime::from_unix_timestamp(now.seconds()).map_err(|error| wrong(error.to_string()))?;
    now.format(&items).map_err(|error| wrong(error.to_string()))
}

/// `{% generation %}` marks the assistant's words for training in `transformers` and prints nothing: here it becomes a
/// condition that always holds, which keeps the template's control of blanks.
fn without_generation_marks(source: &str) -> String {
    let mut clean = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((start, end)) =
        rest.find("{%").and_then(|start| Some((start, start + rest[start..].find("%}")? + 2)))
    {
        let tag = &rest[start..end];
        clean.push_str(&rest[..start]);
        match tag[2..tag.len() - 2].trim_matches(['-', '+']).trim() {
            "generation" => clean.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => clean.push_str(&tag.replace("endgeneration", "endif")),
            _ => clean.push_str(tag),
        }
        rest = &rest[end..];
    }
    clean.push_str(rest);
    clean
}
