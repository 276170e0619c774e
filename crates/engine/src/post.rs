//! How the events of a step reach their readers: all of a step's in one go.
//!
//! A model thread that hands each event to its reader wakes the reader's thread each time. That thread then takes the
//! processor from the model thread, sends one token on and gives it back: two changes of context a token. So the model
//! thread leaves a step's events in the post and wakes a carrier once, a task on the readers' own runtime, where to hand
//! out an event is no more than to queue its reader. There is never more in the post than the readers' channels have room for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::request::Letter;

/// The events on their way, and who carries them.
#[derive(Default)]
pub(crate) struct Post {
    bag: Mutex<Bag>,
    rung: Notify,
}

#[derive(Default)]
struct Bag {
    letters: Vec<Letter>,
    /// Whether there is a carrier.
    carried: bool,
    /// Whether the model thread has left its last.
    closed: bool,
}

impl Post {
    fn bag(&self) -> MutexGuard<'_, Bag> {
        self.bag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is there; true if nothing comes after it.
    fn empty(&self, letters: &mut Vec<Letter>) -> bool {
        let mut bag = self.bag();
        std::mem::swap(&mut bag.letters, letters);
        bag.closed
    }

    /// Carries events until the model thread has left its last one. There is one carrier: while it is there, another has
    /// nothing to do and ends at once.
    pub(crate) async fn carry(self: Arc<Self>) {
        if std::mem::replace(&mut self.bag().carried, true) {
            return;
        }
        let carrier = Carrier(self);
        let mut letters = Vec::new();
        loop {
            let closed = carrier.0.empty(&mut letters);
            letters.drain(..).for_each(Letter::deliver);
            if closed {
                return;
            }
            carrier.0.rung.notified().await;
        }
    }
}

/// Leaves no event behind when its task ends, in whatever way.
struct Carrier(Arc<Post>);

impl Drop for Carrier {
    fn drop(&mut self) {
        let mut bag = self.0.bag();
        // Under the lock, so that what comes later, by hand, comes later.
        bag.letters.drain(..).for_each(Letter::deliver);
        bag.carried = false;
    }
}

/// The model thread's end: events of the step so far.
pub(crate) struct Outbox {
    letters: Vec<Letter>,
    post: Arc<Post>,
}

impl Outbox {
    pub(crate) fn new(post: Arc<Post>) -> Self {
        Self { letters: Vec::new(), post }
    }

    pub(crate) fn push(&mut self, letter: Letter) {
        self.letters.push(letter);
    }

    /// Sends everything on its way: with the carrier, or by hand if there is none.
    pub(crate) fn send(&mut self) {
        if self.letters.is_empty() {
            return;
        }
        let mut bag = self.post.bag();
        if !bag.carried {
            drop(bag);
            return self.letters.drain(..).for_each(Letter::deliver);
        }
        bag.letters.append(&mut self.letters);
        drop(bag);
        self.post.rung.notify_one();
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.send();
        self.post.bag().closed = true;
        self.post.rung.notify_one();
    }
}

#[cfg(test)]
#[path = "post_tests.rs"]
mod tests;
