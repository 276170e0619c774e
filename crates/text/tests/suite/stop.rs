//! Stop strings against a search of the whole text.

use proptest::prelude::*;
use text::{Scan, StopStrings, TextError};

fn watch(stops: &[&str]) -> StopStrings {
    StopStrings::new(stops.iter().map(|&stop| stop.to_owned()).collect()).unwrap()
}

/// The text before the stop string and the stop string's index, read off the whole text.
fn searched(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for (end, _) in text.char_indices().map(|(at, c)| (at + c.len_utf8(), c)) {
        let mut best: Option<usize> = None;
        for (index, stop) in stops.iter().enumerate() {
            let longer = best.is_none_or(|best| stop.len() > stops[best].len());
            if text[..end].ends_with(stop.as_str()) && longer {
                best = Some(index);
            }
        }
        if let Some(index) = best {
            return (text[..end - stops[index].len()].to_owned(), best);
        }
    }
    (text.to_owned(), None)
}

#[test]
fn text_is_held_back_only_while_it_may_be_a_stop_string() {
    let mut stops = watch(&["\n\nUser:"]);
    assert_eq!(stops.push("Hello.\n").text, "Hello.");
    assert_eq!(stops.push("\nUs").text, "");
    assert_eq!(stops.push("age").text, "\n\nUsage");
    assert_eq!(stops.push("\n\nUser: x"), Scan { text: String::new(), stop: Some(0) });
    assert_eq!(stops.push("more"), Scan::default());
    assert_eq!(stops.finish(), "");
}

#[test]
fn the_end_releases_what_was_held() {
    let mut stops = watch(&["END"]);
    assert_eq!(stops.push("the EN").text, "the ");
    assert_eq!(stops.finish(), "EN");
}

#[test]
fn the_first_to_be_complete_wins_and_then_the_longest() {
    assert_eq!(watch(&["abcd", "bc"]).push("xabcd"), Scan { text: "xa".to_owned(), stop: Some(1) });
    assert_eq!(watch(&["c", "abc"]).push("xabcd"), Scan { text: "x".to_owned(), stop: Some(1) });
    assert_eq!(watch(&["aa", "aa"]).push("aaa"), Scan { text: String::new(), stop: Some(0) });
    // A beginning that overlaps itself: the match starts inside the failed one.
    let mut stops = watch(&["aab"]);
    assert_eq!(stops.push("aa").text + &stops.push("ab").text, "a");
}

#[test]
fn no_stop_strings_hold_nothing_back_and_empty_ones_are_refused() {
    assert_eq!(watch(&[]).push("x").text, "x");
    let error = StopStrings::new(vec!["a".to_owned(), String::new()]).unwrap_err();
    assert_eq!(error, TextError::EmptyStop { index: 1 });
}

proptest! {
    /// However a text is cut, the outcome is that of searching it whole, and nothing is held back without need.
    #[test]
    fn cuts_do_not_matter(
        pieces in prop::collection::vec("[abé🦊]{0,4}", 0..10),
        list in prop::collection::vec("[abé🦊]{1,4}", 0..4),
    ) {
        let mut stops = StopStrings::new(list.clone()).unwrap();
        let (mut text, mut found, mut given) = (String::new(), None, String::new());
        for piece in &pieces {
            given.push_str(piece);
            let scan = stops.push(piece);
            text.push_str(&scan.text);
            if found.is_none() && scan.stop.is_none() {
                let held = &given[text.len()..];
                prop_assert!(held.is_empty() || list.iter().any(|stop| stop.starts_with(held) && stop != held));
            }
            found = found.or(scan.stop);
        }
        text.push_str(&stops.finish());
        prop_assert_eq!((text, found), searched(&pieces.concat(), &list));
    }
}
