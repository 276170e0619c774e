//! One history item as a training example.

use text::{ChatOptions, Message, Role, Special, TextError, Tokenizer};
use types::{Example, HistoryItem};

/// Turns an item into tokens the way requests are turned into tokens, so that what was learnt is found again.
///
/// With an input: the input as a user's message through the model's chat template (as `/v1/chat/completions`
/// does), then the output; the loss counts on the output and the end of the turn. A model without a template
/// reads input and output with a line break between. Without an input: the output as plain text, all of it
/// counts.
///
/// # Errors
/// When the text is too long to tokenise, or the template refuses it.
pub fn example(tokenizer: &Tokenizer, item: &HistoryItem) -> Result<Example, TextError> {
    let mut tokens = match &item.input {
        Some(input) if tokenizer.has_chat_template() => {
            let message = Message::new(Role::User, input.as_str());
            let options = ChatOptions { add_generation_prompt: true, now: item.created_at };
            tokenizer.render_chat_tokens(&[message], &options)?
        }
        Some(input) => tokenizer.encode_prompt(&format!("{input}\n"), Special::Literal)?,
        None => tokenizer.encode_prompt("", Special::Literal)?,
    };
    let answer_start = tokens.len().max(1);
    tokens.extend(tokenizer.encode(&item.output, Special::Literal)?);
    tokens.extend(tokenizer.end_of_turn());
    Ok(Example { tokens, answer_start })
}
