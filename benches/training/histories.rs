//! Real histories of different lengths: the urgency of Debian uploads by package, and stars for movies by viewer.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use atelier::demo::ratings;
use text::{Special, Tokenizer};
use types::Example;

/// Items of a user at most.
const ITEMS: usize = 24;

/// The histories of `count` users, half of each kind.
pub(crate) fn users(cache: &Path, count: usize) -> anyhow::Result<Vec<Items>> {
    let mut users = uploads(count / 2)?;
    users.extend(viewers(cache, count - users.len())?);
    ensure!(users.len() == count, "only {} histories", users.len());
    Ok(users)
}

/// The same in tokens.
pub(crate) fn examples(users: &[Items], tokenizer: &Tokenizer) -> anyhow::Result<Vec<Vec<Example>>> {
    let example = |(input, output): &(String, String)| -> anyhow::Result<Example> {
        let prompt = tokenizer.encode(input, Special::Literal)?;
        let mut tokens = prompt.clone();
        tokens.extend(tokenizer.encode(output, Special::Literal)?);
        tokens.extend(tokenizer.eos_ids().first());
        Ok(Example { answer_start: prompt.len(), tokens })
    };
    users.iter().map(|items| items.iter().map(example).collect()).collect()
}

/// Inputs and outputs.
pub(crate) type Items = Vec<(String, String)>;

/// Of the packages installed here with most entries in their changelogs: the entry, and its urgency.
fn uploads(count: usize) -> anyhow::Result<Vec<Items>> {
    let mut packages = Vec::new();
    for folder in std::fs::read_dir("/usr/share/doc").context("no changelogs")? {
        let file = folder?.path().join("changelog.Debian.gz");
        if !file.is_file() {
            continue;
        }
        let text = Command::new("zcat").arg(&file).output().context("cannot run zcat")?.stdout;
        let items = entries(&String::from_utf8_lossy(&text));
        if items.len() >= 8 {
            packages.push(items);
        }
    }
    packages.sort_by_key(|items| std::cmp::Reverse(items.len()));
    packages.truncate(count);
    Ok(packages)
}

fn entries(changelog: &str) -> Items {
    let mut items = Items::new();
    let mut urgency = None;
    let mut body = String::new();
    for line in changelog.lines() {
        if let Some((_, rest)) = line.split_once("urgency=") {
            urgency = Some(rest.trim().to_lowercase());
            body.clear();
        } else if line.starts_with(" -- ") {
            if let Some(urgency) = urgency.take() {
                let entry: String = body.chars().take(1500).collect();
                let prompt =
                    "How urgent is the following upload? Just answer with low, medium, high or emergency.";
                items.push((format!("{prompt} changes: {entry} urgency:"), format!(" {urgency}")));
            }
        } else {
            body.push_str(line.trim());
            body.push(' ');
        }
    }
    items.truncate(ITEMS);
    items
}

/// Viewers of MovieLens with more and fewer ratings: the movie, and the stars.
fn viewers(cache: &Path, count: usize) -> anyhow::Result<Vec<Items>> {
    let folder = ratings(cache)?;
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).context("no ratings");
    let (movies, marks) = (read("ml-100k.item")?, read("ml-100k.inter")?);
    let fields = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
    let movies: BTreeMap<String, String> = movies
        .lines()
        .skip(1)
        .map(fields)
        .filter(|fields| fields.len() >= 4)
        .map(|fields| (fields[0].clone(), format!("{} ({}), {}", fields[1], fields[2], fields[3])))
        .collect();
    let mut viewers: BTreeMap<String, Items> = BTreeMap::new();
    for fields in marks.lines().skip(1).map(fields).filter(|fields| fields.len() >= 3) {
        let Some(movie) = movies.get(&fields[1]) else { continue };
        let prompt =
            "How many stars does this viewer give to the following movie? Just answer with 1, 2, 3, 4 or 5.";
        let item = (format!("{prompt} movie: {movie} stars:"), format!(" {}", fields[2]));
        viewers.entry(fields[0].clone()).or_default().push(item);
    }
    let mut viewers: Vec<Items> = viewers.into_values().filter(|items| items.len() >= 20).collect();
    viewers.truncate(count);
    viewers.iter_mut().for_each(|items| items.truncate(ITEMS));
    Ok(viewers)
}
