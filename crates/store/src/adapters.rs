//! Generations: publish and fetch.

use std::sync::Arc;

use bytes::Bytes;
use types::{AdapterId, GenerationId, JobOutcome};

use crate::AdapterFile::{Config, Weights};
use crate::blobs::Blobs;
use crate::jobs::{check_outcome, fenced};
use crate::lineage::move_head;
use crate::reading::{Rest, at_once, fingerprint};
use crate::sql::generations::Generation;
use crate::sql::{self, Connection, UserKey};
use crate::{
    AdapterFile, AdapterFiles, Expected, Fence, GenerationRecord, Lesson, Manifest, NewGeneration, Origin,
    Store, StoreError,
};

impl AdapterFile {
    /// The file's name, as HF peft saves and loads it.
    fn name(self) -> &'static str {
        match self {
            Self::Config => "adapter_config.json",
            Self::Weights => "adapter_model.safetensors",
        }
    }
}

/// What a publish is for.
struct Target {
    adapter: AdapterId,
    expected_head: Expected,
    finish: Option<(Fence, JobOutcome)>,
    lesson: Option<Lesson>,
}

impl Store {
    /// Stores a generation and makes it the head, if the head is still `expected_head` (`None`: no
    /// head yet; [`Expected::Any`]: whatever it is).
    ///
    /// The files are written and synced first; then one transaction moves the head, records the
    /// generation and ends the job that `finish` names. So a head is never half a generation, and a
    /// job whose generation is head is never run again. With `finish`, the job must be one of this
    /// user's; without (an uploaded adapter), the user or the shared adapter is created if need be.
    ///
    /// Publishing a generation that the user has already replaces its files by these same bytes,
    /// which repairs a damaged one. Runs to its end even if the caller goes away.
    ///
    /// # Errors
    /// [`StoreError::HeadMoved`] if somebody else has published meanwhile, [`StoreError::Fenced`] if
    /// the worker has lost the job, [`StoreError::GenerationConflict`] if the id is taken by other
    /// bytes, [`StoreError::NotFound`] if the user was erased meanwhile. Nothing is changed then.
    pub async fn publish(
        &self,
        adapter: &AdapterId,
        generation: NewGeneration,
        expected_head: impl Into<Expected>,
        finish: Option<(Fence, JobOutcome)>,
    ) -> Result<GenerationRecord, StoreError> {
        let expected_head = expected_head.into();
        let target = Target { adapter: adapter.clone(), expected_head, finish, lesson: None };
        self.publish_whole(target, generation).await
    }

    /// [`Store::publish`] for a job that has trained: notes which items have gone into the weights and what that cost,
    /// all in the transaction that moves the head.
    ///
    /// # Errors
    /// Those of [`Store::publish`].
    pub async fn publish_lesson(
        &self,
        adapter: &AdapterId,
        generation: NewGeneration,
        expected_head: Option<GenerationId>,
        finish: (Fence, JobOutcome),
        lesson: Lesson,
    ) -> Result<GenerationRecord, StoreError> {
        let (adapter, expected_head, lesson) = (adapter.clone(), expected_head.into(), Some(lesson));
        let target = Target { adapter, expected_head, finish: Some(finish), lesson };
        self.publish_whole(target, generation).await
    }

    async fn publish_whole(
        &self,
        target: Target,
        generation: NewGeneration,
    ) -> Result<GenerationRecord, StoreError> {
        if let Some((_, outcome)) = &target.finish {
            check_outcome(outcome)?;
        }
        let store = self.clone();
        Self::to_the_end(async move { store.publish_to(&target, generation).await }).await
    }

    async fn publish_to(&self, target: &Target, new: NewGeneration) -> Result<GenerationRecord, StoreError> {
        let folder = Blobs::new_folder(&target.adapter, &new.id);
        let user = self.announce(target, &folder).await?;
        let result = self.write_and_move(target, user, new, &folder).await;
        let unused = match &result {
            Ok((_, replaced)) => replaced.as_deref(),
            Err(_) => Some(folder.as_str()),
        };
        if let Some(unused) = unused
            && let Err(error) = self.discard(unused).await
        {
            tracing::warn!(%error, folder = unused, "adapter files stay until the store is opened again");
        }
        if target.finish.is_some() {
            self.sweep(&target.adapter).await;
        }
        result.map(|(generation, _)| {
            let head = Some(generation.id);
            generation.into_record(head)
        })
    }

    /// Notes in the database that `folder` is about to be written, so that it is found and deleted if
    /// this process dies before a generation owns it. Refuses early what would be refused later.
    async fn announce(&self, target: &Target, folder: &str) -> Result<UserKey, StoreError> {
        let mut tx = self.write().await?;
        let user = match &target.finish {
            None => sql::users::ensure(&mut tx, &target.adapter, self.now()).await?,
            Some((fence, _)) => {
                let user = sql::users::find(&mut tx, &target.adapter).await?.ok_or_else(|| fenced(fence))?;
                if !sql::jobs::holds(&mut tx, user.key, fence).await? {
                    return Err(fenced(fence));
                }
                user
            }
        };
        if !target.expected_head.admits(user.head) {
            return Err(StoreError::HeadMoved { current: user.head });
        }
        sql::garbage::insert_pending(&mut tx, &target.adapter, folder).await?;
        tx.commit().await?;
        Ok(user.key)
    }

    /// Returns the generation and the folder that it no longer needs.
    async fn write_and_move(
        &self,
        target: &Target,
        user: UserKey,
        new: NewGeneration,
        folder: &str,
    ) -> Result<(Generation, Option<String>), StoreError> {
        let (config, new_config) = fingerprint(new.config, at_once()).await?;
        let (weights, new_weights) = fingerprint(new.weights, at_once()).await?;
        let generation = Generation {
            id: new.id,
            parent: new.parent,
            base: new.base,
            folder: folder.to_owned(),
            config,
            weights,
            meta: new.meta,
            created_at: self.now(),
            origin: if target.finish.is_some() { Origin::Trained } else { Origin::Imported },
            pinned: false,
            packed: None,
        };
        self.blobs().write(folder, [(Config.name(), new_config), (Weights.name(), new_weights)]).await?;

        let _moving = self.moving(&target.adapter);
        let mut tx = self.write().await?;
        // `announce` has seen that the job is this user's.
        if let Some((fence, outcome)) = &target.finish
            && !sql::jobs::succeed(&mut tx, fence, outcome, self.now()).await?
        {
            return Err(fenced(fence));
        }
        // The user of this name may be another one by now, or none.
        let current = sql::users::find(&mut tx, &target.adapter).await?.filter(|found| found.key == user);
        if current.is_none() {
            return Err(StoreError::not_found("user", &target.adapter));
        }
        let (generation, replaced) = record(&mut tx, target, user, generation).await?;
        if target.finish.is_some() {
            sql::users::accept(&mut tx, user).await?;
        }
        if let (Some((fence, outcome)), Some(lesson)) = (&target.finish, &target.lesson) {
            let learnt = Manifest::of(lesson.manifest.clone());
            let judged = judged(&mut tx, user, &generation, lesson).await?;
            sql::lessons::insert_manifest(&mut tx, user, &generation.id, &learnt, &judged, &lesson.baseline)
                .await?;
            sql::lessons::insert_progress(&mut tx, user, &fence.job, lesson, outcome, self.now()).await?;
        }
        sql::garbage::delete(&mut tx, folder).await?;
        move_head(&mut tx, &target.adapter, target.expected_head, Some(generation.id)).await?;
        tx.commit().await?;
        Ok((generation, replaced))
    }

    /// Deletes files that no generation owns, then the note about them.
    pub(crate) async fn discard(&self, folder: &str) -> Result<(), StoreError> {
        self.blobs().delete(folder).await?;
        let mut tx = self.write().await?;
        sql::garbage::delete(&mut tx, folder).await?;
        tx.commit().await?;
        Ok(())
    }

    /// The generation that new requests get; `None` if there is none, or no such user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn head(&self, adapter: &AdapterId) -> Result<Option<GenerationRecord>, StoreError> {
        let found = sql::generations::find_of(&mut *self.reader().await?, adapter, None).await?;
        Ok(found.map(|head| {
            let id = head.id;
            head.into_record(Some(id))
        }))
    }

    /// One generation of the user.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn generation(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
    ) -> Result<Option<GenerationRecord>, StoreError> {
        let mut tx = self.read().await?;
        let Some(user) = sql::users::find(&mut tx, adapter).await? else { return Ok(None) };
        let found = sql::generations::find(&mut tx, user.key, id).await?;
        Ok(found.map(|generation| generation.into_record(user.head)))
    }

    /// The files of a generation, exactly as published: length and SHA-256 are checked at every call.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the user has no such generation, [`StoreError::Corrupt`] if a file
    /// is missing or is not what was published.
    pub async fn fetch(&self, adapter: &AdapterId, id: &GenerationId) -> Result<AdapterFiles, StoreError> {
        self.fetch_gently(adapter, id, at_once()).await
    }

    /// As [`Store::fetch`]; after each piece of the work that reads and checks the files `rest` is told how long it took, and may
    /// let some time pass.
    ///
    /// # Errors
    /// As [`Store::fetch`].
    pub async fn fetch_gently(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        rest: Arc<Rest>,
    ) -> Result<AdapterFiles, StoreError> {
        let [config, weights] = self.fetch_files(adapter, id, [Config, Weights], &rest).await?;
        Ok(AdapterFiles { config, weights })
    }

    /// As [`Store::fetch`], one file alone.
    ///
    /// # Errors
    /// As [`Store::fetch`].
    pub async fn fetch_file(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        file: AdapterFile,
    ) -> Result<Bytes, StoreError> {
        self.fetch_files(adapter, id, [file], &at_once()).await.map(|[content]| content)
    }

    async fn fetch_files<const N: usize>(
        &self,
        adapter: &AdapterId,
        id: &GenerationId,
        wanted: [AdapterFile; N],
        rest: &Arc<Rest>,
    ) -> Result<[Bytes; N], StoreError> {
        let mut seen = None;
        loop {
            let generation = sql::generations::find_of(&mut *self.reader().await?, adapter, Some(id)).await?;
            let generation = generation.ok_or_else(|| StoreError::not_found("generation", id))?;
            match self.read_files(&generation, wanted, rest).await {
                // The files may just have been deleted or replaced: then the row says so now.
                Err(error) if seen.as_ref() == Some(&generation.folder) => return Err(error),
                Err(_) => seen = Some(generation.folder),
                Ok(files) => return Ok(files),
            }
        }
    }

    async fn read_files<const N: usize>(
        &self,
        generation: &Generation,
        wanted: [AdapterFile; N],
        rest: &Arc<Rest>,
    ) -> Result<[Bytes; N], StoreError> {
        let mut contents = [const { Bytes::new() }; N];
        for (content, file) in contents.iter_mut().zip(wanted) {
            *content = self.read_file(generation, file, rest).await?;
        }
        Ok(contents)
    }

    async fn read_file(
        &self,
        generation: &Generation,
        file: AdapterFile,
        rest: &Arc<Rest>,
    ) -> Result<Bytes, StoreError> {
        let (name, expected) = match file {
            Config => (file.name(), generation.config),
            Weights => (file.name(), generation.weights),
        };
        let corrupt = |reason: String| StoreError::Corrupt { generation: generation.id, reason };
        let found = self.blobs().read(&generation.folder, name, expected.bytes, Arc::clone(rest)).await?;
        let (found, bytes) = found.ok_or_else(|| {
            corrupt(format!("{name} is missing, or its length is not {} bytes", expected.bytes))
        })?;
        if found != expected {
            return Err(corrupt(format!("the sha-256 of {name} is not that of the published file")));
        }
        Ok(bytes)
    }
}

/// The items that a new generation was judged by, with those that judged what it has gone on from.
async fn judged(
    db: &mut Connection,
    user: UserKey,
    generation: &Generation,
    lesson: &Lesson,
) -> Result<Manifest, StoreError> {
    let own = Manifest::of(lesson.judged.clone());
    let Some(parent) = generation.parent.filter(|_| !lesson.from_scratch) else { return Ok(own) };
    let before = sql::lessons::judged(db, user, &parent).await?;
    Ok(before.map_or(own.clone(), |before| own.and(before)))
}

/// Inserts the row of a generation. If the user has the generation, its row is pointed to the new
/// copy of the files; the folder of the old copy is returned, noted as garbage.
async fn record(
    db: &mut Connection,
    target: &Target,
    user: UserKey,
    new: Generation,
) -> Result<(Generation, Option<String>), StoreError> {
    let Some(old) = sql::generations::find(db, user, &new.id).await? else {
        sql::generations::insert(db, user, &new).await?;
        return Ok((new, None));
    };
    if (old.base, old.config, old.weights) != (new.base, new.config, new.weights) {
        return Err(StoreError::GenerationConflict { id: new.id });
    }
    sql::generations::move_to(db, user, &new.id, &new.folder).await?;
    sql::garbage::insert(db, &target.adapter, &old.folder).await?;
    let replaced = old.folder.clone();
    Ok((Generation { folder: new.folder, packed: None, ..old }, Some(replaced)))
}
