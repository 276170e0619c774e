//! What can go wrong between text and tokens.

/// Why text could not be turned into tokens, or a vocabulary could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file of the model folder does not hold what it should.
    #[error("{file}: {detail}")]
    File {
        /// Which file.
        file: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// A field of the GGUF metadata does not hold what it should.
    #[error("tokenizer.ggml.{field}: {detail}")]
    Gguf {
        /// The key, without its `tokenizer.ggml.` prefix.
        field: String,
        /// What is wrong with it.
        detail: String,
    },
    /// `tokenizer.ggml.model` names a kind of vocabulary that is not supported.
    #[error(
        "tokenizer.ggml.model is {0:?}: only \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) are supported"
    )]
    GgufModel(String),
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not known; guessing one would silently degrade answers.
    #[error("tokenizer.ggml.pre is {0:?}, which is not a known pre-tokenizer")]
    GgufPreTokenizer(String),
    /// The decoder of `tokenizer.json` is of a kind that cannot be run token by token.
    #[error("tokenizer.json: decoder {0} is not supported")]
    Decoder(String),
    /// The chat template is longer than [`crate::MAX_TEMPLATE_BYTES`].
    #[error("chat template has {bytes} bytes, the limit is {max}")]
    TemplateTooLong {
        /// What was given.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The chat template does not compile, or fails on these messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The chat template itself refused the messages (`raise_exception`).
    #[error("the model's chat template does not accept these messages: {0}")]
    TemplateRefused(String),
    /// The model brings no chat template.
    #[error("this model has no chat template: use plain text completion instead")]
    NoChatTemplate,
    /// The messages use so many private-use characters that none is left to protect special tokens with.
    #[error("messages: too many different private-use characters")]
    PrivateUse,
    /// The text is longer than [`crate::MAX_TEXT_BYTES`].
    #[error("text has {bytes} bytes, the limit is {max}")]
    TextTooLong {
        /// What was given.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A stop string is empty, so it would match everywhere.
    #[error("stop: string {index} is empty")]
    EmptyStop {
        /// Position in the list.
        index: usize,
    },
    /// The tokenizer failed on a text.
    #[error("encoding failed: {0}")]
    Encode(String),
}

impl TextError {
    /// Whether the caller's input caused it, so that the message is for the caller; otherwise it is for the operator.
    #[must_use]
    pub fn is_callers_fault(&self) -> bool {
        match self {
            Self::TemplateRefused(_)
            | Self::NoChatTemplate
            | Self::PrivateUse
            | Self::TextTooLong { .. }
            | Self::EmptyStop { .. } => true,
            Self::File { .. }
            | Self::Gguf { .. }
            | Self::GgufModel(_)
            | Self::GgufPreTokenizer(_)
            | Self::Decoder(_)
            | Self::TemplateTooLong { .. }
            | Self::Template(_)
            | Self::Encode(_) => false,
        }
    }
}
