//! What a job learns from: the whole history from fresh weights, or what is new on from the head.

use std::collections::HashSet;

use peft::{AdapterWeights, BaseShape, PeftError};
use personalize::{Split, split};
use sha2::{Digest as _, Sha256};
use store::{AdapterFiles, Lesson, Manifest, OldLoss, item_hash};
use train::Recipe;
use types::{GenerationId, HistoryItem, HistoryRange};

use crate::settings::{Growth, Settings};

/// The generation that is head when the job begins.
pub(crate) struct Head {
    pub(crate) id: GenerationId,
    pub(crate) files: AdapterFiles,
    /// What has gone into it, if that is known.
    pub(crate) manifest: Option<Manifest>,
    /// Updates in it since it was last trained from fresh weights.
    pub(crate) updates: u32,
    /// Updates that the user has had since the last training from fresh weights, those that the gate kept back among them.
    pub(crate) since_full: u32,
    /// How well old items were known when everything was last learnt from fresh weights.
    pub(crate) baseline: Vec<OldLoss>,
}

impl Head {
    /// Its weights, for a base of this shape.
    pub(crate) fn weights(&self, shape: &BaseShape) -> Result<AdapterWeights, PeftError> {
        AdapterWeights::parse(&self.files.config, &self.files.weights, shape)
    }
}

/// Which items go where.
pub(crate) struct Plan {
    /// In the history's order.
    pub(crate) train: Vec<HistoryItem>,
    /// The newest, never trained on.
    pub(crate) heldout: Vec<HistoryItem>,
    /// Which of them the head has learnt, or may have.
    pub(crate) heldout_learnt: Vec<bool>,
    /// Items on which an update may not become worse: for an update old ones, those of the head's baseline among them;
    /// else those that are to be the baseline.
    pub(crate) old: Vec<HistoryItem>,
    /// What will have gone into the adapter when it is trained.
    pub(crate) learnt: Option<HistoryRange>,
    /// What is written down of it.
    pub(crate) lesson: Lesson,
}

/// Chooses. An update goes on from the head and learns the items that are new to it, with a sample of old ones; it needs
/// a head whose manifest is known, that `fits` the recipe, with updates left, something new, and held-out items that the
/// head has not learnt either (or it would be judged on what it knows). Everything else is learnt from fresh weights.
///
/// The sample is the same for the same seed and items.
pub(crate) fn plan(
    items: Vec<HistoryItem>,
    head: Option<&Head>,
    fits: bool,
    from_scratch: bool,
    settings: &Settings,
    seed: u64,
) -> Plan {
    let all = items.len() as u64;
    let parts = split(items, settings.holdout);
    let known: HashSet<[u8; 32]> = match head.and_then(|head| head.manifest.as_ref()) {
        Some(Manifest::Items(hashes)) => hashes.iter().copied().collect(),
        Some(Manifest::Unknown) | None => HashSet::new(),
    };
    let is_known = |item: &HistoryItem| known.contains(&item_hash(item));
    let new = parts.train.iter().filter(|item| !is_known(item)).count();
    let updates_left = head.is_some_and(|head| head.since_full < settings.growth.full_every);
    let update = !from_scratch
        && fits
        && updates_left
        && !known.is_empty()
        && new > 0
        && !parts.heldout.iter().any(is_known);
    let learnt = parts.train.first().zip(parts.train.last()).map(|(first, last)| HistoryRange {
        first: first.id.clone(),
        last: last.id.clone(),
        items: parts.train.len() as u64,
    });
    let unknown = head.is_some_and(|head| head.manifest == Some(Manifest::Unknown));
    let heldout_learnt = parts.heldout.iter().map(|item| unknown || is_known(item)).collect();
    let hashes = |items: &[HistoryItem]| items.iter().map(item_hash).collect::<Vec<_>>();
    if !update {
        let lesson = Lesson {
            from_scratch: true,
            items: all,
            new_items: new as u64,
            replayed_items: (parts.train.len() - new) as u64,
            manifest: hashes(&parts.train),
            judged: hashes(&parts.heldout),
            baseline: Vec::new(),
        };
        let Split { train, heldout } = parts;
        let (_, probe) = sample(&train.iter().collect::<Vec<_>>(), 0, &settings.growth, seed);
        let old = probe.into_iter().map(|at| train[at].clone()).collect();
        return Plan { train, heldout, heldout_learnt, old, learnt, lesson };
    }
    let old: Vec<&HistoryItem> = parts.train.iter().filter(|item| is_known(item)).collect();
    let (again, probe) = sample(&old, new, &settings.growth, seed);
    let baseline = head.map_or(Vec::new(), |head| head.baseline.clone());
    let measured: HashSet<[u8; 32]> = baseline.iter().map(|loss| loss.item).collect();
    let is_probed = |at: usize, item| probe.binary_search(&at).is_ok() || measured.contains(&item_hash(item));
    let old = old.iter().enumerate().filter(|(at, item)| is_probed(*at, item));
    let old = old.map(|(_, item)| HistoryItem::clone(item)).collect();
    let mut place = 0;
    let train: Vec<_> = parts
        .train
        .into_iter()
        .filter(|item| {
            let is_old = is_known(item);
            let wanted = !is_old || again.contains(&place);
            place += usize::from(is_old);
            wanted
        })
        .collect();
    let mut manifest = hashes(&train);
    manifest.extend(known);
    let lesson = Lesson {
        from_scratch: false,
        items: all,
        new_items: new as u64,
        replayed_items: again.len() as u64,
        manifest,
        judged: hashes(&parts.heldout),
        baseline,
    };
    Plan { train, heldout: parts.heldout, heldout_learnt, old, learnt, lesson }
}

/// Places of old items to learn again, and of those to measure drift on, which are others as far as there are.
fn sample(old: &[&HistoryItem], new: usize, growth: &Growth, seed: u64) -> (HashSet<usize>, Vec<usize>) {
    let lot = |item: &HistoryItem| {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(item_hash(item));
        <[u8; 32]>::from(hash.finalize())
    };
    let mut places: Vec<(usize, [u8; 32])> = old.iter().map(|item| lot(item)).enumerate().collect();
    places.sort_unstable_by_key(|(_, lot)| *lot);
    let wanted = ((new as f64 * growth.replay).ceil() as usize).max(growth.min_replay).min(old.len());
    let again = places.iter().take(wanted).map(|(at, _)| *at).collect();
    let mut probe: Vec<usize> = places.iter().rev().take(growth.drift_items).map(|(at, _)| *at).collect();
    probe.sort_unstable();
    (again, probe)
}

/// A hash of what is learnt, how, and from where on: a checkpoint of other work is of no use.
pub(crate) fn work_hash(plan: &Plan, recipe: &Recipe, start: Option<&GenerationId>) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(recipe.identity());
    hash.update(start.map_or([0; 32], |start| *start.as_bytes()));
    for item in &plan.train {
        hash.update(item_hash(item));
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use types::Timestamp;

    use super::*;

    fn item(at: i64) -> HistoryItem {
        HistoryItem {
            id: format!("i{at}").parse().unwrap_or_else(|error| panic!("{error}")),
            input: None,
            output: format!("text {at}"),
            created_at: Timestamp(at),
            metadata: None,
        }
    }

    fn head(items: std::ops::Range<i64>, updates: u32) -> Head {
        let mut hashes: Vec<_> = items.map(|at| item_hash(&item(at))).collect();
        hashes.sort_unstable();
        Head {
            id: GenerationId::from_bytes([1; 32]),
            files: AdapterFiles::default(),
            manifest: Some(Manifest::Items(hashes)),
            updates: 0,
            since_full: updates,
            baseline: Vec::new(),
        }
    }

    fn made(items: i64, head: Option<&Head>, from_scratch: bool) -> Plan {
        plan((0..items).map(item).collect(), head, true, from_scratch, &Settings::default(), 0)
    }

    #[test]
    fn an_update_learns_what_is_new_and_some_of_the_old() {
        let head = head(0..80, 0);
        let plan = made(110, Some(&head), false);
        assert_eq!((plan.lesson.from_scratch, plan.lesson.new_items), (false, 8));
        assert_eq!((plan.lesson.replayed_items, plan.train.len(), plan.heldout.len()), (8, 16, 22));
        assert!((80..88).all(|at| plan.train.contains(&item(at))));
        assert_eq!(
            plan.lesson.manifest.iter().collect::<HashSet<_>>().len(),
            88,
            "the head's items are in it too"
        );
        let learnt = plan.learnt.map(|range| (range.first, range.last, range.items));
        assert_eq!(learnt, Some((item(0).id, item(87).id, 88)), "all but the held-out ones");
        assert_eq!(plan.heldout_learnt, [false; 22]);
        assert_eq!(plan.lesson.judged, (88..110).map(|at| item_hash(&item(at))).collect::<Vec<_>>());
        assert_eq!(plan.old.len(), 32);
        assert!(
            plan.old.iter().all(|old| !plan.train.contains(old)),
            "drift is seen on what is not learnt again"
        );
        let again = made(110, Some(&head), false);
        assert_eq!(again.train, plan.train, "the sample is the same");
        // Negative control: without replay nothing old is learnt again, and the items that drift is measured on stay.
        let mut settings = Settings::default();
        (settings.growth.replay, settings.growth.min_replay) = (0.0, 0);
        let items = (0..110).map(item).collect();
        let bare = super::plan(items, Some(&head), true, false, &settings, 0);
        assert_eq!((bare.lesson.replayed_items, bare.train.len(), bare.old.len()), (0, 8, 32));
    }

    #[test]
    fn an_update_is_measured_by_the_baseline_too() {
        let loss = |at| OldLoss { item: item_hash(&item(at)), nats: 1.0, tokens: 2 };
        let whole = made(100, None, false);
        assert_eq!((whole.old.len(), whole.lesson.baseline.len()), (32, 0), "it is yet to be measured");
        assert!(whole.old.iter().all(|old| whole.train.contains(old)));
        let without = made(110, Some(&head(0..80, 0)), false);
        let others = (0..80).filter(|at| !without.old.contains(&item(*at))).take(5);
        let baseline: Vec<_> = others.map(loss).collect();
        let with = made(110, Some(&Head { baseline: baseline.clone(), ..head(0..80, 0) }), false);
        assert_eq!((with.old.len(), with.train.len()), (37, without.train.len()));
        let has = |loss: &OldLoss| with.old.iter().any(|old| item_hash(old) == loss.item);
        assert!(baseline.iter().all(has) && without.old.iter().all(|old| with.old.contains(old)));
        assert_eq!(with.lesson.baseline, baseline, "the next update is measured by it as well");
    }

    #[test]
    fn what_cannot_be_an_update_learns_everything() {
        let everything = |plan: &Plan| plan.lesson.from_scratch && plan.train.len() == 88;
        assert!(everything(&made(110, None, false)));
        assert!(everything(&made(110, Some(&head(0..80, 0)), true)));
        assert!(everything(&made(110, Some(&head(0..80, 8)), false)), "too many updates");
        assert!(everything(&made(110, Some(&head(0..88, 0)), false)), "nothing new");
        let knows = made(110, Some(&head(20..90, 0)), false);
        assert!(everything(&knows), "the head knows what would judge it");
        assert_eq!(knows.heldout_learnt, [[true; 2].as_slice(), &[false; 20]].concat());
        let unknown = Head { manifest: Some(Manifest::Unknown), ..head(0..1, 0) };
        let guarded = made(110, Some(&unknown), false);
        assert!(everything(&guarded) && guarded.heldout_learnt == [true; 22], "it may have learnt any");
        let uploaded = made(110, Some(&Head { manifest: None, ..head(0..1, 0) }), false);
        assert!(everything(&uploaded) && uploaded.heldout_learnt == [false; 22]);
    }

    #[test]
    fn other_work_has_another_hash() {
        let (one, more) = (made(50, None, false), made(51, None, false));
        let recipe = Recipe::oppu();
        let hash = work_hash(&one, &recipe, None);
        assert_eq!(hash, work_hash(&made(50, None, false), &recipe, None));
        assert_ne!(hash, work_hash(&more, &recipe, None));
        assert_ne!(hash, work_hash(&one, &Recipe { seed: 1, ..recipe.clone() }, None));
        // A server that was started again with less memory goes on with its checkpoints.
        assert_eq!(hash, work_hash(&one, &Recipe { activation_bytes: 1, ..recipe.clone() }, None));
        assert_ne!(hash, work_hash(&one, &recipe, Some(&GenerationId::from_bytes([1; 32]))));
    }
}
