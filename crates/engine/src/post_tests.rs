//! Nothing is lost or overtaken, whoever carries; and the model thread wakes nobody but the carrier.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use super::*;
use crate::request::{Event, SampledToken, TokenSink, TokenStream, channel};

fn token(id: u32) -> Event {
    Event::Token(SampledToken { id, logprob: 0.0, top: Vec::new(), stop: false })
}

/// Leaves the next token of each sequence in the post.
fn step(outbox: &mut Outbox, sinks: &[TokenSink], id: u32) {
    sinks.iter().for_each(|sink| outbox.push(sink.letter(token(id))));
    outbox.send();
}

async fn ids(mut stream: TokenStream) -> Vec<u32> {
    let mut ids = Vec::new();
    while let Some(Event::Token(token)) = stream.next().await {
        ids.push(token.id);
    }
    ids
}

/// How often somebody was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Woken {
    fn times(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

#[test]
fn a_step_wakes_the_carrier_once_and_the_carrier_its_readers() {
    let post = Arc::<Post>::default();
    let mut outbox = Outbox::new(Arc::clone(&post));
    let (sinks, mut streams): (Vec<_>, Vec<_>) = (0..16).map(|_| channel(8)).unzip();
    let (reader, carrier) = (Arc::<Woken>::default(), Arc::<Woken>::default());
    let (wakes_reader, wakes_carrier) = (Waker::from(Arc::clone(&reader)), Waker::from(Arc::clone(&carrier)));
    let wait = |streams: &mut [TokenStream]| {
        let waits = |stream: &mut TokenStream| {
            pin!(stream.next()).poll(&mut Context::from_waker(&wakes_reader)).is_pending()
        };
        streams.iter_mut().map(waits).filter(|pending| *pending).count()
    };
    // By hand, each reader is woken by whoever sends.
    assert_eq!(wait(&mut streams), 16);
    step(&mut outbox, &sinks, 0);
    assert_eq!(reader.times(), 16);
    assert_eq!(wait(&mut streams), 0);
    // With a carrier, it is the one to be woken.
    let mut carry = pin!(post.carry());
    assert!(carry.as_mut().poll(&mut Context::from_waker(&wakes_carrier)).is_pending());
    assert_eq!(wait(&mut streams), 16);
    step(&mut outbox, &sinks, 1);
    assert_eq!((reader.times(), carrier.times()), (16, 1));
    assert_eq!(wait(&mut streams), 16);
    assert!(carry.as_mut().poll(&mut Context::from_waker(&wakes_carrier)).is_pending());
    assert_eq!(reader.times(), 32);
    assert_eq!(wait(&mut streams), 0);
    // It ends with the model thread, after the last event.
    assert_eq!(wait(&mut streams), 16);
    sinks.iter().for_each(|sink| outbox.push(sink.letter(token(2))));
    drop(outbox);
    assert!(carry.as_mut().poll(&mut Context::from_waker(&wakes_carrier)).is_ready());
    assert_eq!(wait(&mut streams), 0);
}

#[test]
fn there_is_one_carrier() {
    let post = Arc::<Post>::default();
    let mut context = Context::from_waker(Waker::noop());
    let mut first = Box::pin(Arc::clone(&post).carry());
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert_eq!(pin!(Arc::clone(&post).carry()).poll(&mut context), Poll::Ready(()));
    // The second has not taken the place of the first with it.
    assert!(post.bag().carried);
    drop(first);
    assert!(!post.bag().carried);
    assert!(pin!(Arc::clone(&post).carry()).poll(&mut context).is_pending());
    // Nothing comes after the end, whenever the carrier is sent for.
    drop(Outbox::new(Arc::clone(&post)));
    for _ in 0..2 {
        assert!(pin!(Arc::clone(&post).carry()).poll(&mut context).is_ready());
    }
}

#[tokio::test]
async fn a_carrier_that_is_stopped_leaves_nothing_behind() {
    let post = Arc::<Post>::default();
    let mut outbox = Outbox::new(Arc::clone(&post));
    let (sink, stream) = channel(8);
    let sinks = [sink];
    let mut carry = Box::pin(post.carry());
    assert!(carry.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    step(&mut outbox, &sinks, 0);
    step(&mut outbox, &sinks, 1);
    drop(carry);
    step(&mut outbox, &sinks, 2);
    drop(sinks);
    assert_eq!(ids(stream).await, [0, 1, 2]);
}

#[tokio::test]
async fn nothing_is_lost_or_overtaken_while_carriers_come_and_go() {
    const STEPS: u32 = 20_000;
    let post = Arc::<Post>::default();
    let (sinks, streams): (Vec<_>, Vec<_>) = (0..4).map(|_| channel(u32::MAX >> 1)).unzip();
    let readers: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(ids(stream))).collect();
    let mut outbox = Outbox::new(Arc::clone(&post));
    let (sent, enough) = (Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
    let (count, stop) = (Arc::clone(&sent), Arc::clone(&enough));
    let thread = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            step(&mut outbox, &sinks, count.fetch_add(1, Ordering::Relaxed));
            std::thread::yield_now();
        }
    });
    let mut carriers = 0;
    while sent.load(Ordering::Relaxed) < STEPS || carriers < 500 {
        let carrier = tokio::spawn(Arc::clone(&post).carry());
        for _ in 0..carriers % 5 {
            tokio::task::yield_now().await;
        }
        carrier.abort();
        assert!(carrier.await.is_err(), "it ended by itself");
        carriers += 1;
    }
    enough.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    let sent = sent.load(Ordering::Relaxed);
    for reader in readers {
        let ids = reader.await.unwrap();
        assert!(ids.iter().copied().eq(0..sent), "{} of {sent}", ids.len());
    }
}
