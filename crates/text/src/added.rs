//! Added tokens: those found in the text before it is cut into words, and the special ones among them.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::ops::RangeInclusive;

use tokenizers::{AddedToken, AddedVocabulary};

use crate::TextError;

/// The added tokens of a vocabulary, in two readings.
pub(crate) struct Added {
    /// All of them are found.
    pub(crate) parse: AddedVocabulary,
    /// Special ones are ordinary text; the others (which the model treats as words) are still found.
    pub(crate) literal: AddedVocabulary,
    /// Texts of the special tokens, longest first.
    special: Vec<String>,
    /// The first and last characters of those texts.
    ends: HashSet<char>,
}

impl Added {
    /// Takes over the added tokens of `core`.
    ///
    /// Special tokens are always looked for in the text as given, never in its normalised form: otherwise a
    /// normaliser could make one out of a user's harmless text.
    pub(crate) fn new(core: &tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        let mut tokens: Vec<(u32, AddedToken)> = core.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_by_key(|&(id, _)| id);
        for (_, token) in &mut tokens {
            token.normalized &= !token.special;
        }
        let special =
            tokens.iter().filter(|(_, token)| token.special).map(|(_, token)| token.content.clone());
        let mut special: Vec<String> = special.filter(|text| !text.is_empty()).collect();
        special.sort_by_key(|text| Reverse(text.len()));
        let ends = special
            .iter()
            .flat_map(|text| text.chars().next().into_iter().chain(text.chars().last()))
            .collect();

        let mut parse = AddedVocabulary::new();
        parse.add_tokens(
            tokens.iter().map(|(_, token)| token.clone()),
            core.get_model(),
            core.get_normalizer(),
        )?;
        for (id, token) in &tokens {
            if parse.token_to_id(&token.content, core.get_model()) != Some(*id) {
                return Err(format!("the added token {:?} does not keep its id {id}", token.content).into());
            }
        }
        let mut literal = parse.clone();
        literal.set_encode_special_tokens(true);
        Ok(Self { parse, literal, special, ends })
    }

    /// The special tokens' texts that occur in any of `texts`, longest first, so that none is taken apart by a
    /// shorter one inside it.
    pub(crate) fn special_in(&self, texts: &[&str]) -> Vec<String> {
        let special =
            self.special.iter().filter(|special| texts.iter().any(|text| text.contains(special.as_str())));
        special.cloned().collect()
    }

    /// Characters of `texts` with which a special token could begin or end although none of the texts holds a whole
    /// one: a template might put a text beside another, or beside words of its own, or take something out of it. Also
    /// the first character of a text that could be the middle of a special token.
    pub(crate) fn suspects_in(&self, texts: &[&str]) -> Vec<String> {
        let ends = texts.iter().flat_map(|text| text.chars()).filter(|c| self.ends.contains(c));
        let longest = self.special.first().map_or(0, String::len);
        let short = texts.iter().map(|text| text.trim()).filter(|text| text.len() < longest);
        let middles = short.filter(|text| self.special.iter().any(|special| special.contains(text)));
        let suspects: BTreeSet<char> = ends.chain(middles.filter_map(|text| text.chars().next())).collect();
        suspects.into_iter().map(String::from).collect()
    }

    /// How often each special token's text occurs in `text`.
    pub(crate) fn count_in(&self, text: &str) -> Vec<usize> {
        self.special.iter().map(|special| text.matches(special.as_str()).count()).collect()
    }
}

/// Single characters that stand in for what a template must not see in users' texts.
///
/// The characters come from a private-use plane and occur in none of the texts they are used in, so nothing a user
/// writes can collide with them. A template may copy, trim, split or change the case of the text around them.
#[derive(Debug, Default)]
pub(crate) struct Masks(Vec<(char, String)>);

/// Supplementary private use area A.
const STAND_INS: RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';

impl Masks {
    /// A stand-in for each of `hidden`, none of which occurs in `texts` or `template`. Earlier ones are hidden first.
    ///
    /// # Errors
    /// If the texts leave no character free: then nothing may be rendered.
    pub(crate) fn new(hidden: Vec<String>, texts: &[&str], template: &str) -> Result<Self, TextError> {
        if hidden.is_empty() {
            return Ok(Self::default());
        }
        let texts = texts.iter().chain([&template]);
        let taken: HashSet<char> =
            texts.flat_map(|text| text.chars()).filter(|c| STAND_INS.contains(c)).collect();
        let mut free = STAND_INS.filter(|c| !taken.contains(c));
        let masks = hidden.into_iter().map(|text| Some((free.next()?, text)));
        masks.collect::<Option<_>>().map(Self).ok_or(TextError::PrivateUse)
    }

    /// `text` with everything hidden.
    pub(crate) fn hide(&self, text: &str) -> String {
        self.iter().fold(text.to_owned(), |text, (stand_in, special)| match text.contains(special) {
            true => text.replace(special, stand_in.encode_utf8(&mut [0; 4])),
            false => text,
        })
    }

    /// `text` with the stand-ins replaced by what they stand for.
    pub(crate) fn reveal(&self, text: String) -> String {
        self.iter().fold(text, |text, (stand_in, special)| text.replace(stand_in, special))
    }

    /// Each stand-in with what it stands for.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (char, &str)> {
        self.0.iter().map(|(stand_in, special)| (*stand_in, special.as_str()))
    }
}
