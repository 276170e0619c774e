//! Text to token ids and back, for a whole text at a time.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use tokenizers::{AddedVocabulary, Model, ModelWrapper, OffsetType, PreTokenizer, Token};
use types::TokenizerSource;

use crate::added::{Added, Masks};
use crate::pieces::Pieces;
use crate::template::ChatTemplate;
use crate::{TextError, gguf, hugging_face};

/// Longest text that is encoded, in bytes of UTF-8; about 130,000 tokens of English.
///
/// The expressions that cut a text into words give up after a million steps of backtracking, without saying so, and a
/// run of blanks needs one step per blank: the limit stays clear of that.
pub const MAX_TEXT_BYTES: usize = 512 * 1024;

/// Special tokens that end an answer in the model families served here, under whatever key their files list them.
pub(crate) const END_OF_TURN: [&str; 13] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
];

/// What the text of a special token, such as `<|im_end|>`, means where it occurs in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// The special token.
    Parse,
    /// The characters as they stand. The result holds no special token at all, save the vocabulary's own one for
    /// unknown characters. (Added tokens that are not special, such as `<think>` in some models, are words of the
    /// model's language and are found in either reading.)
    Literal,
}

/// What a vocabulary's source says, before it becomes a [`Tokenizer`].
pub(crate) struct Parts {
    pub(crate) core: tokenizers::Tokenizer,
    pub(crate) bos: Option<u32>,
    /// Ids that end an answer, the most important first.
    pub(crate) eos: Vec<u32>,
    /// The id that ends a turn, if the source tells it apart from the end of a text.
    pub(crate) end_of_turn: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) chat_template: Option<String>,
    /// `bos_token` and its like, for the chat template.
    pub(crate) names: Vec<(&'static str, String)>,
}

/// A model's vocabulary with its chat template. Cloning is cheap; all methods may run on many threads at once.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

pub(crate) struct Inner {
    core: tokenizers::Tokenizer,
    pub(crate) added: Added,
    pieces: Pieces,
    bos: Option<u32>,
    add_bos: bool,
    pub(crate) eos: Vec<u32>,
    end_of_turn: Option<u32>,
    /// What the model gives for characters it does not know.
    unknown: Option<u32>,
    pub(crate) template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Builds the tokenizer from the files or metadata a model brings along.
    ///
    /// # Errors
    /// If a file or field is broken, or names a kind of vocabulary, pre-tokenizer or decoder that is not supported, or
    /// if the chat template does not compile. A missing template is no error here, see [`TextError::NoChatTemplate`].
    pub fn new(source: &TokenizerSource) -> Result<Self, TextError> {
        let parts = match source {
            TokenizerSource::HuggingFace {
                tokenizer_json,
                tokenizer_config,
                chat_template,
                generation_config,
            } => hugging_face::parts(
                tokenizer_json,
                tokenizer_config.as_deref(),
                chat_template.as_deref(),
                generation_config.as_deref(),
            )?,
            TokenizerSource::Gguf(vocabulary) => gguf::parts(vocabulary)?,
        };
        Self::assemble(parts)
    }

    fn assemble(parts: Parts) -> Result<Self, TextError> {
        let Parts { core, bos, mut eos, end_of_turn, add_bos, chat_template, names } = parts;
        let unknown = match core.get_model() {
            ModelWrapper::BPE(model) => model.unk_token.as_ref().and_then(|token| model.token_to_id(token)),
            _ => {
                let detail = "only models of type BPE are supported".to_owned();
                return Err(TextError::File { file: "tokenizer.json", detail });
            }
        };
        let added = Added::new(&core).map_err(|error| TextError::Encode(error.to_string()))?;
        let pieces = Pieces::new(&core)?;
        let known = END_OF_TURN.iter().filter_map(|text| core.token_to_id(text));
        eos.extend(known.filter(|&id| pieces.is_special(id)));
        let mut seen = HashSet::new();
        eos.retain(|&id| seen.insert(id));
        let template = chat_template.map(|source| ChatTemplate::compile(source, &names)).transpose()?;
        let mut inner = Inner { core, added, pieces, bos, add_bos, eos, end_of_turn, unknown, template };
        inner.end_of_turn = inner.closing_token().or(inner.end_of_turn).or(inner.eos.first().copied());
        Ok(Self(Arc::new(inner)))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// The token ids of `text`, with nothing added before or after.
    ///
    /// Plain computation: about a millisecond for 2 KB, up to a second at the limit, so an async caller with a long
    /// text hands it to a blocking thread.
    ///
    /// Bytes that the vocabulary has no token for are left out, as in Hugging Face's tokenizers (SmolLM2 lacks six
    /// control characters, for example).
    ///
    /// # Errors
    /// If the text is longer than [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        self.0.encode(text, special)
    }

    /// The token ids of a raw prompt: [`Tokenizer::encode`], begun with the beginning-of-sequence token if the model
    /// wants one and the text does not bring it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode(text, special)?;
        if let Some(bos) = self.bos().filter(|bos| self.add_bos() && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The text of a whole sequence, special tokens left out. Bytes that are no UTF-8 become U+FFFD; ids outside the
    /// vocabulary are passed over.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_bytes(ids.iter().filter(|&&id| !self.is_special(id)))
    }

    /// As [`Tokenizer::decode`], with the texts of special tokens.
    #[must_use]
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.decode_bytes(ids.iter())
    }

    fn decode_bytes<'a>(&self, ids: impl Iterator<Item = &'a u32>) -> String {
        let bytes: Vec<u8> = ids.filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        let text = if self.0.pieces.leading_blank() { bytes.strip_prefix(b" ") } else { None };
        String::from_utf8_lossy(text.unwrap_or(&bytes)).into_owned()
    }

    /// The token that begins a sequence, if the vocabulary has one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.0.bos
    }

    /// Whether raw prompts begin with [`Tokenizer::bos`]. Chat templates bring their own.
    #[must_use]
    pub fn add_bos(&self) -> bool {
        self.0.add_bos
    }

    /// All tokens that end an answer: those the model's files name, first, then its other special tokens that are
    /// known to end turns or texts. Without repetition.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.0.eos
    }

    /// The token with which the model ends its own turn, so the one to train it on: what the chat template puts after
    /// an answer, else what the model's files name.
    #[must_use]
    pub fn end_of_turn(&self) -> Option<u32> {
        self.0.end_of_turn
    }

    /// Ids run below this number. The model's output may be wider (padding).
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.0.pieces.len()
    }

    /// Whether this is a control token, which is no part of the text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.0.pieces.is_special(id)
    }

    /// The bytes a token stands for, which need not be whole characters; for special tokens their text, such as
    /// `<|im_end|>`. `None` if no token has this id.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.0.pieces.get(id)
    }

    /// [`Tokenizer::token_bytes`] as text, with U+FFFD for parts of characters; empty if no token has this id.
    #[must_use]
    pub fn token_text(&self, id: u32) -> Cow<'_, str> {
        self.token_bytes(id).map_or(Cow::Borrowed(""), String::from_utf8_lossy)
    }

    /// Whether the model brings a chat template.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.0.template.is_some()
    }

    /// Whether a whole text begins with a blank that is not part of it (SentencePiece).
    pub(crate) fn leading_blank(&self) -> bool {
        self.0.pieces.leading_blank()
    }
}

impl Inner {
    fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, TextError> {
        check_length(text.len())?;
        let added = match special {
            Special::Parse => &self.added.parse,
            Special::Literal => &self.added.literal,
        };
        self.ids(added, text, &Masks::default())
    }

    /// The ids of `text`, in which special tokens' texts are special tokens except where `masks` hide them.
    pub(crate) fn encode_masked(&self, text: &str, masks: &Masks) -> Result<Vec<u32>, TextError> {
        check_length(text.len())?;
        self.ids(&self.added.parse, text, masks)
    }

    /// The steps of Hugging Face's `encode`, by hand for two reasons: the reading of special tokens is chosen per call,
    /// and what masks hide comes back after special tokens are found and before the text is cut into words, so it is
    /// read in its context like any other text.
    fn ids(&self, added: &AddedVocabulary, text: &str, masks: &Masks) -> Result<Vec<u32>, TextError> {
        let steps = || -> tokenizers::Result<Vec<u32>> {
            let mut cut = added.extract_and_normalize(self.core.get_normalizer(), text);
            cut.normalize(|part| {
                for (stand_in, hidden) in masks.iter() {
                    if part.get().contains(stand_in) {
                        part.replace(stand_in, hidden)?;
                    }
                }
                Ok(())
            })?;
            if let Some(pre_tokenizer) = self.core.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut cut)?;
            }
            cut.tokenize(|word| self.word(word.get()))?;
            Ok(cut.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        };
        steps().map_err(|error| TextError::Encode(error.to_string()))
    }

    /// The tokens of one word. A word that happens to be spelt like a special token is taken character by character:
    /// special tokens come from the template alone.
    fn word(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        let model = self.core.get_model();
        let forged = |token: &Token| self.pieces.is_special(token.id) && Some(token.id) != self.unknown;
        let tokens = model.tokenize(word)?;
        if !tokens.iter().any(forged) {
            return Ok(tokens);
        }
        let mut single = Vec::with_capacity(word.len());
        for c in word.chars() {
            single.extend(model.tokenize(c.encode_utf8(&mut [0; 4]))?);
        }
        single.retain(|token| !forged(token));
        Ok(single)
    }
}

pub(crate) fn check_length(bytes: usize) -> Result<(), TextError> {
    if bytes > MAX_TEXT_BYTES {
        return Err(TextError::TextTooLong { bytes, max: MAX_TEXT_BYTES });
    }
    Ok(())
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}
