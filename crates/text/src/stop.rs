//! Stop strings: ends a text before the first of them, wherever the pieces it arrives in are cut.

use crate::TextError;

/// What may be sent on after a piece of text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// Text that belongs to no stop string, possibly held back earlier.
    pub text: String,
    /// The stop string that was found, as its index in the list; nothing follows it.
    pub stop: Option<usize>,
}

/// Watches one sequence's text for stop strings.
///
/// The first stop string to be complete wins; of several that are complete at the same character, the longest (and of
/// equal ones, the first in the list). So the result does not depend on how the text is cut into pieces, and
/// generation ends as soon as it can. The stop string itself is not part of the text.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far, which may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Watches for any of `stops`; an empty list lets everything through.
    ///
    /// # Errors
    /// If one of them is empty.
    pub fn new(stops: Vec<String>) -> Result<Self, TextError> {
        match stops.iter().position(String::is_empty) {
            Some(index) => Err(TextError::EmptyStop { index }),
            None => Ok(Self { stops, held: String::new(), stopped: false }),
        }
    }

    /// Takes the next piece of text. After a stop string was found, nothing comes out any more.
    pub fn push(&mut self, piece: &str) -> Scan {
        if self.stopped {
            return Scan::default();
        }
        let before = self.held.len();
        self.held.push_str(piece);
        if let Some((start, stop)) = self.find(before) {
            self.stopped = true;
            self.held.truncate(start);
            return Scan { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let keep = self.held.split_off(self.held.len() - self.open_len());
        Scan { text: std::mem::replace(&mut self.held, keep), stop: None }
    }

    /// The text still held back, once the sequence is over.
    pub fn finish(&mut self) -> String {
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    /// The first stop string to end after the first `from` bytes, with its start.
    fn find(&self, from: usize) -> Option<(usize, usize)> {
        (from + 1..=self.held.len()).find_map(|end| {
            let text = &self.held.as_bytes()[..end];
            let complete = self.stops.iter().enumerate().filter(|(_, stop)| text.ends_with(stop.as_bytes()));
            let (index, stop) = complete.rev().max_by_key(|(_, stop)| stop.len())?;
            Some((end - stop.len(), index))
        })
    }

    /// Length of the longest end of the text that is the beginning of a stop string.
    fn open_len(&self) -> usize {
        let text = self.held.as_bytes();
        let open = |stop: &String| {
            let longest = text.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&len| text.ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
        };
        self.stops.iter().map(open).max().unwrap_or(0)
    }
}
