//! Reads the tokenizer files of a Hugging Face folder.

use serde_json::Value;
use tokenizers::PostProcessor;

use crate::TextError;
use crate::tokenizer::Parts;

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";

fn wrong(file: &'static str, detail: impl ToString) -> TextError {
    TextError::File { file, detail: detail.to_string() }
}

/// The tokenizer and its special ids, from the content of the files.
pub(crate) fn parts(
    tokenizer_json: &[u8],
    tokenizer_config: Option<&[u8]>,
    chat_template: Option<&str>,
    generation_config: Option<&[u8]>,
) -> Result<Parts, TextError> {
    let core = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(|error| wrong(TOKENIZER, error))?;
    check_added_ids(tokenizer_json, &core)?;
    let config = object(CONFIG, tokenizer_config)?;
    let generation = object(GENERATION, generation_config)?;

    let mut names = Vec::new();
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        names.extend(token_text(&config, name)?.map(|text| (name, text.to_owned())));
    }
    let named = |name: &str| -> Result<Option<u32>, TextError> {
        let Some((_, text)) = names.iter().find(|(known, _)| *known == name) else { return Ok(None) };
        let id = core.token_to_id(text);
        id.map(Some).ok_or_else(|| wrong(CONFIG, format!("{name} {text:?} is not in the vocabulary")))
    };
    let bos = named("bos_token")?.or(ids(&generation, "bos_token_id")?.first().copied());
    let mut eos: Vec<u32> = named("eos_token")?.into_iter().collect();
    eos.extend(ids(&generation, "eos_token_id")?);
    let add_bos = match &config["add_bos_token"] {
        Value::Bool(add) => *add,
        _ => bos.is_some() && begins_with(&core, bos)?,
    };
    let chat_template = match chat_template {
        Some(template) => Some(template.to_owned()),
        None => template_in(&config["chat_template"])?,
    };
    Ok(Parts { core, bos, eos, end_of_turn: None, add_bos, chat_template, names })
}

/// The library numbers added tokens itself and only warns when that disagrees with the file. Wrong ids would feed the
/// model nonsense, so this is an error here.
fn check_added_ids(tokenizer_json: &[u8], core: &tokenizers::Tokenizer) -> Result<(), TextError> {
    let file: Value = serde_json::from_slice(tokenizer_json).map_err(|error| wrong(TOKENIZER, error))?;
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let id = core.token_to_id(text);
        if !text.is_empty() && id.map(u64::from) != token["id"].as_u64() {
            return Err(wrong(
                TOKENIZER,
                format!("added token {text:?} should be {}, but is {id:?}", token["id"]),
            ));
        }
    }
    Ok(())
}

fn object(file: &'static str, content: Option<&[u8]>) -> Result<Value, TextError> {
    let Some(content) = content else { return Ok(Value::Null) };
    let value: Value = serde_json::from_slice(content).map_err(|error| wrong(file, error))?;
    if value.is_object() { Ok(value) } else { Err(wrong(file, "is not a JSON object")) }
}

/// A special token of `tokenizer_config.json`: a string, or an object with the string as `content`.
fn token_text<'a>(config: &'a Value, name: &str) -> Result<Option<&'a str>, TextError> {
    match &config[name] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        Value::Object(token) => match token.get("content") {
            Some(Value::String(text)) => Ok(Some(text)),
            _ => Err(wrong(CONFIG, format!("{name} has no content"))),
        },
        _ => Err(wrong(CONFIG, format!("{name} is neither a string nor an object"))),
    }
}

/// Token ids of `generation_config.json`: one, a list, or none.
fn ids(generation: &Value, name: &str) -> Result<Vec<u32>, TextError> {
    let values = match &generation[name] {
        Value::Null => return Ok(Vec::new()),
        Value::Array(values) => values.as_slice(),
        value => std::slice::from_ref(value),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = values.iter().map(id).collect();
    ids.ok_or_else(|| wrong(GENERATION, format!("{name} is neither a token id nor a list of them")))
}

/// Whether the tokenizer's own post-processing puts `bos` before a text.
fn begins_with(core: &tokenizers::Tokenizer, bos: Option<u32>) -> Result<bool, TextError> {
    if core.get_post_processor().is_none_or(|processor| processor.added_tokens(false) == 0) {
        return Ok(false);
    }
    let encoding = core.encode_fast("a", true).map_err(|error| wrong(TOKENIZER, error))?;
    Ok(encoding.get_ids().first().copied() == bos)
}

/// The template of `tokenizer_config.json`: a string, or a list of named ones of which `default` is meant.
fn template_in(value: &Value) -> Result<Option<String>, TextError> {
    let template = match value {
        Value::Null => return Ok(None),
        Value::String(template) => Some(template.as_str()),
        Value::Array(named) => {
            named.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
        }
        _ => None,
    };
    let template =
        template.ok_or_else(|| wrong(CONFIG, "chat_template is neither a text nor a list with a default"))?;
    Ok(Some(template.to_owned()))
}
