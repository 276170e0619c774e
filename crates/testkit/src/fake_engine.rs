//! An engine without a model, for the ways in which a real one fails.

use std::sync::{Mutex, PoisonError};

use engine::{Engine, EngineStats, Event, Generate, Limits, SubmitError, TokenSink, TokenStream, channel};

/// How the engine treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Refuses: its queue is full.
    Busy,
    /// Takes requests and gives them up.
    Failing,
    /// Takes requests and says nothing.
    Silent,
    /// Panics.
    Panicking,
    /// Has stopped, and refuses.
    Stopped,
}

/// An engine in one mood.
#[derive(Debug)]
pub struct FakeEngine {
    mood: Mood,
    /// Sequences taken and not answered.
    silent: Mutex<Vec<TokenSink>>,
}

impl FakeEngine {
    /// An engine in this mood.
    #[must_use]
    pub fn new(mood: Mood) -> Self {
        Self { mood, silent: Mutex::default() }
    }

    /// Sequences that were taken and whose readers are still there.
    pub fn readers(&self) -> usize {
        let silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.iter().filter(|sink| !sink.is_cancelled()).count()
    }
}

impl Engine for FakeEngine {
    fn submit(&self, job: Generate) -> Result<TokenStream, SubmitError> {
        let (sink, stream) = channel(job.params.max_tokens);
        match self.mood {
            Mood::Busy => return Err(SubmitError::Busy { waiting: 128 }),
            Mood::Failing => {
                assert!(sink.send(Event::Failed { deadline: false, reason: "a secret cause".into() }));
            }
            Mood::Silent => self.silent.lock().unwrap_or_else(PoisonError::into_inner).push(sink),
            Mood::Panicking => panic!("a secret panic"),
            Mood::Stopped => return Err(SubmitError::Stopped),
        }
        Ok(stream)
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    fn limits(&self) -> Limits {
        Limits { context: 256, vocabulary: 320, queue: 128, batch: 4 }
    }

    fn stopped(&self) -> Option<String> {
        (self.mood == Mood::Stopped).then(|| "a secret cause".into())
    }
}
