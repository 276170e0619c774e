//! Forgetting items: out of the history, out of what serves, and out of every generation that they have gone into.

use types::{AdapterId, GenerationId, HistoryItem, HistoryStats, ItemId, Job, Provenance, TrainingOptions};

use crate::records::HistoryCursor;
use crate::sql::generations::Generation;
use crate::sql::{self, Connection, UserKey};
use crate::{Demand, Forgotten, Origin, Selection, Store, StoreError, item_hash};

impl Store {
    /// Deletes items, and with them whatever has come of them, in one transaction: generations that have learnt from one
    /// of them or were judged by one (or may have been), checkpoints, and the running job, which is cancelled. If the head
    /// is among them, the newest generation that is left for the same base takes its place, or the base. A job is enqueued
    /// that learns what is left from fresh weights, at once, with the hyper-parameters that a job asked for which it takes
    /// the place of, or else with those of the head, or of the newest generation that is deleted. So what is published in
    /// the end is what would have been had the items never come.
    ///
    /// Where nothing is left, nothing that a job has made stays, whatever it is known to have learnt, and no job either.
    /// Uploaded generations have learnt from no item, and stay. Pins keep a generation from being pruned or deleted, not
    /// from being forgotten. Answers to uploads stay (they hold no content): an upload that is repeated late does not
    /// bring the items back.
    ///
    /// `None` if there is no such user.
    ///
    /// # Errors
    /// If the rows cannot be deleted; then nothing is.
    pub async fn forget_items(
        &self,
        adapter: &AdapterId,
        selection: &Selection,
    ) -> Result<Option<Forgotten>, StoreError> {
        let (store, adapter, selection) = (self.clone(), adapter.clone(), selection.clone());
        Self::to_the_end(async move {
            let _moving = store.moving(&adapter);
            let mut tx = store.write().await?;
            let Some(user) = sql::users::find(&mut tx, &adapter).await? else { return Ok(None) };
            let all = sql::items::list(&mut tx, user.key, HistoryCursor::START, None).await?;
            let chosen = chosen(&all, &selection);
            // The whole history is forgotten even if nothing of it is left: an adapter may be.
            if chosen.is_empty() && selection != Selection::All {
                return Ok(Some(Forgotten { items: 0, generations: Vec::new(), head: user.head, job: None }));
            }
            let mut gone = HistoryStats::default();
            for (place, item) in &chosen {
                sql::items::delete_one(&mut tx, user.key, place.seq).await?;
                gone.items += 1;
                gone.bytes += (item.output.len() + item.input.as_ref().map_or(0, String::len)) as u64;
            }
            sql::users::shrink(&mut tx, user.key, gone).await?;
            let is_left = all.len() > chosen.len();
            let hashes: Vec<_> = chosen.iter().map(|(_, item)| item_hash(item)).collect();
            let extent = if is_left { Extent::Items(&hashes) } else { Extent::All };
            let Withdrawn { generations, head, training } =
                forget_generations(&mut tx, &adapter, &user, extent).await?;
            sql::checkpoints::delete(&mut tx, user.key).await?;
            let job = store.relearn(&mut tx, user.key, is_left, training).await?;
            Self::mark_erasure(&mut tx).await?;
            tx.commit().await?;
            store.interrupt();
            store.sweep(&adapter).await;
            store.wipe().await;
            Ok(Some(Forgotten { items: gone.items, generations, head, job }))
        })
        .await
    }

    /// Calls the user's jobs off that may have read what is gone; one that waits learns what is left, if anything is.
    /// `training` is for where neither has asked for anything.
    async fn relearn(
        &self,
        db: &mut Connection,
        user: UserKey,
        is_left: bool,
        training: Option<TrainingOptions>,
    ) -> Result<Option<Job>, StoreError> {
        let then = match is_left {
            true => "items of its history were erased; another job learns what is left",
            false => "the history was erased",
        };
        let running = sql::jobs::running(db, user).await?;
        let queued = sql::jobs::queued(db, user).await?;
        if let Some(running) = &running {
            self.call_off(db, &running.id, then).await?;
        }
        if is_left {
            // The newest wish counts.
            let asked = [&queued, &running].into_iter().flatten().find_map(|job| job.training.clone());
            let training = asked.or(training);
            let demand = Demand { urgent: true, from_scratch: true, training, ..Demand::default() };
            return Ok(Some(self.queued_job(db, user, &demand).await?));
        }
        if let Some(queued) = queued {
            self.call_off(db, &queued.id, then).await?;
        }
        Ok(None)
    }
}

/// How much is forgotten.
#[derive(Clone, Copy)]
enum Extent<'a> {
    /// The items with these hashes.
    Items(&'a [[u8; 32]]),
    /// The whole history.
    All,
}

/// The selected items of a history in its order.
fn chosen<'a>(
    all: &'a [(HistoryCursor, HistoryItem)],
    selection: &Selection,
) -> Vec<&'a (HistoryCursor, HistoryItem)> {
    let all_of = |keep: &dyn Fn(&HistoryItem) -> bool| all.iter().filter(|(_, item)| keep(item)).collect();
    match selection {
        Selection::All => all.iter().collect(),
        Selection::Item(id) => all_of(&|item| item.id == *id),
        Selection::Times(from, to) => all_of(&|item| {
            from.is_none_or(|from| item.created_at >= from) && to.is_none_or(|to| item.created_at <= to)
        }),
        Selection::Items(from, to) => {
            // An end that is not there selects nothing: it must not open the range.
            let place = |id: &ItemId| all.iter().position(|(_, item)| item.id == *id);
            let first = from.as_ref().map_or(Some(0), place);
            let last = to.as_ref().map_or(all.len().checked_sub(1), place);
            let range = first.zip(last).filter(|(first, last)| first <= last);
            range.map_or_else(Vec::new, |(first, last)| all[first..=last].iter().collect())
        }
    }
}

/// What was deleted of a user's generations.
struct Withdrawn {
    generations: Vec<GenerationId>,
    /// The head that is left.
    head: Option<GenerationId>,
    /// How the head was trained, or the newest of the generations that are gone.
    training: Option<TrainingOptions>,
}

/// Deletes the generations that what is forgotten has gone into.
async fn forget_generations(
    db: &mut Connection,
    adapter: &AdapterId,
    user: &sql::users::User,
    extent: Extent<'_>,
) -> Result<Withdrawn, StoreError> {
    let all = sql::generations::list(db, user.key, None, None).await?;
    let all: Vec<_> = all.into_iter().map(|(_, generation)| generation).collect();
    let base = all.iter().find(|generation| Some(generation.id) == user.head).map(|head| head.base);
    let (mut gone, mut left) = (Vec::new(), Vec::new());
    for generation in all {
        let seen = sql::lessons::seen(db, user.key, &generation.id).await?;
        let tainted = match extent {
            Extent::Items(items) => seen.is_some_and(|seen| seen.has_any(items)),
            Extent::All => seen.is_some() || generation.origin == Origin::Trained,
        };
        if tainted { gone.push(generation) } else { left.push(generation) }
    }
    let mut head = user.head;
    let is_head = |generation: &&Generation| Some(generation.id) == head;
    let current = left.iter().find(is_head).or(gone.iter().find(is_head));
    let training = current.into_iter().chain(&gone).find_map(training_of);
    if gone.iter().any(|generation| Some(generation.id) == head) {
        let next = left.iter().find(|generation| Some(generation.base) == base).map(|next| next.id);
        sql::users::move_head(db, user.key, head.as_ref(), next.as_ref()).await?;
        head = next;
    }
    for generation in &gone {
        sql::garbage::insert(db, adapter, &generation.folder).await?;
        sql::generations::delete(db, user.key, &generation.id).await?;
    }
    let generations = gone.into_iter().map(|generation| generation.id).collect();
    Ok(Withdrawn { generations, head, training })
}

/// Every hyper-parameter that a generation was trained with; `None` if it was not trained here, or before that was
/// written down.
fn training_of(generation: &Generation) -> Option<TrainingOptions> {
    let trained = generation.origin == Origin::Trained;
    let provenance = trained.then(|| serde_json::from_value::<Provenance>(generation.meta.clone()).ok());
    provenance.flatten().map(|provenance| provenance.options())
}
