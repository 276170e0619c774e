//! Conversations to tokens, keeping apart what the template says and what users wrote.

use minijinja::Value;
use types::Timestamp;

use crate::added::Masks;
use crate::tokenizer::{Inner, check_length};
use crate::{TextError, Tokenizer};

/// Who speaks. Not free text, as some templates build special tokens out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The instructions before the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool the model called.
    Tool,
}

impl Role {
    /// The name that chat templates know.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The speaker's or the tool's name, for templates that show it.
    pub name: Option<String>,
}

impl Message {
    /// A message without a name.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), name: None }
    }
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChatOptions {
    /// End with the opening of the assistant's turn, for the model to go on from.
    pub add_generation_prompt: bool,
    /// The time that templates may print (`strftime_now`), in UTC.
    pub now: Timestamp,
}

impl Tokenizer {
    /// The conversation as the model's chat template writes it, for people to read.
    ///
    /// Do not encode this text with [`crate::Special::Parse`]: in it, a special token that a user typed looks like one
    /// that the template wrote. [`Tokenizer::render_chat_tokens`] tells them apart.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat_tokens`].
    pub fn render_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<String, TextError> {
        let (text, masks) = self.inner().render(messages, options)?;
        Ok(masks.reveal(text))
    }

    /// The token ids of the conversation as the model's chat template writes it.
    ///
    /// Special tokens come from the template only. Where a content or name holds a special token's text, that place
    /// carries a stand-in character through the template, and its characters are encoded as they are, in their
    /// context. All other contents go through the template unchanged, so their ids equal those of Hugging Face's
    /// `apply_chat_template(tokenize=True)`. A template that looks for a special token's text inside a content, or
    /// measures or slices the content, sees one character there. Should the template join parts of a special token
    /// (from two contents, or a content and its own words), the characters that begin and end such tokens are hidden
    /// in the same way.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`]; [`TextError::TemplateRefused`] with the template's own words;
    /// [`TextError::Template`] if it fails otherwise; [`TextError::TextTooLong`] for contents or a rendered text above
    /// [`crate::MAX_TEXT_BYTES`]; [`TextError::PrivateUse`] for contents made to exhaust the stand-ins.
    pub fn render_chat_tokens(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, TextError> {
        let (text, masks) = self.inner().render(messages, options)?;
        self.inner().encode_masked(&text, &masks)
    }
}

impl Inner {
    /// The rendered conversation, with stand-ins where users wrote what would become special tokens.
    fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<(String, Masks), TextError> {
        let template = self.template.as_ref().ok_or(TextError::NoChatTemplate)?;
        let written = |message| {
            let Message { content, name, .. }: &Message = message;
            [Some(content.as_str()), name.as_deref()].into_iter().flatten()
        };
        let texts: Vec<&str> = messages.iter().flat_map(written).collect();
        check_length(texts.iter().map(|text| text.len()).sum())?;
        let render = |masks: &Masks| {
            let turns = messages.iter().map(|message| turn(message, masks));
            template.render(turns.collect(), options)
        };
        let special = self.added.special_in(&texts);
        let suspects = self.added.suspects_in(&texts);
        let masks = Masks::new(special.clone(), &texts, template.source())?;
        let text = render(&masks)?;
        if suspects.is_empty() {
            return Ok((text, masks));
        }
        // No text holds a whole special token now, but the template may have joined parts of one. Then it has more of
        // them than it writes when users' texts cannot take part in any.
        let strict = Masks::new([special, suspects].concat(), &texts, template.source())?;
        let strict_text = render(&strict)?;
        if self.added.count_in(&text) == self.added.count_in(&strict_text) {
            Ok((text, masks))
        } else {
            Ok((strict_text, strict))
        }
    }

    /// The token that the template puts after an answer.
    pub(crate) fn closing_token(&self) -> Option<u32> {
        const MARK: char = '\u{f0000}';
        let messages = [Message::new(Role::User, "?"), Message::new(Role::Assistant, MARK)];
        let options = ChatOptions { add_generation_prompt: false, now: Timestamp(0) };
        let (text, masks) = self.render(&messages, &options).ok()?;
        let (_, after) = text.rsplit_once(MARK)?;
        let ids = self.encode_masked(after, &masks).ok()?;
        ids.into_iter().find(|id| self.eos.contains(id))
    }
}

/// A message as templates see it.
fn turn(message: &Message, masks: &Masks) -> Value {
    let mut fields = vec![
        ("role", Value::from(message.role.as_str())),
        ("content", Value::from(masks.hide(&message.content))),
    ];
    fields.extend(message.name.as_deref().map(|name| ("name", Value::from(masks.hide(name)))));
    Value::from_pairs(fields)
}
