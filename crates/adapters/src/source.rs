//! Where adapters come from: the store, or what stands for it in a test.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use store::{AdapterFiles, Rest, Store, StoreError};
use types::{AdapterId, GenerationId};

/// What a source answers, later.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// The generation that new requests get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Which one.
    pub generation: GenerationId,
    /// Hash of the base model it belongs to.
    pub base: [u8; 32],
}

/// Heads and files of adapters.
pub trait Source: Send + Sync + 'static {
    /// A number that is another one after every move of this adapter's head; see [`Store::head_moves`].
    fn moves(&self, id: &AdapterId) -> u64;

    /// The head; `None` when the user has no adapter (or does not exist).
    fn head<'a>(&'a self, id: &'a AdapterId) -> Answer<'a, Option<Head>>;

    /// The files of a generation, checked; see [`Store::fetch_gently`] for `rest`.
    fn files<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        rest: Arc<Rest>,
    ) -> Answer<'a, AdapterFiles>;

    /// What [`Source::keep`] has kept of a generation for this `packing`; see [`Store::packed`].
    fn packed<'a>(
        &'a self,
        _id: &'a AdapterId,
        _generation: GenerationId,
        _packing: &'a [u8; 32],
        _rest: Arc<Rest>,
    ) -> Answer<'a, Option<Bytes>> {
        Box::pin(async { Ok(None) })
    }

    /// Keeps the packed form of a generation; false if it does not. See [`Store::keep_packed`].
    fn keep<'a>(
        &'a self,
        _id: &'a AdapterId,
        _generation: GenerationId,
        _packing: [u8; 32],
        _packed: Bytes,
        _rest: Arc<Rest>,
    ) -> Answer<'a, bool> {
        Box::pin(async { Ok(false) })
    }
}

impl Source for Store {
    fn moves(&self, id: &AdapterId) -> u64 {
        self.head_moves(id)
    }

    fn head<'a>(&'a self, id: &'a AdapterId) -> Answer<'a, Option<Head>> {
        Box::pin(async move {
            let head = Self::head(self, id).await?;
            Ok(head.map(|head| Head { generation: head.id, base: head.base }))
        })
    }

    fn files<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        rest: Arc<Rest>,
    ) -> Answer<'a, AdapterFiles> {
        Box::pin(async move { self.fetch_gently(id, &generation, rest).await })
    }

    fn packed<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        packing: &'a [u8; 32],
        rest: Arc<Rest>,
    ) -> Answer<'a, Option<Bytes>> {
        Box::pin(async move { Self::packed(self, id, &generation, packing, rest).await })
    }

    fn keep<'a>(
        &'a self,
        id: &'a AdapterId,
        generation: GenerationId,
        packing: [u8; 32],
        packed: Bytes,
        rest: Arc<Rest>,
    ) -> Answer<'a, bool> {
        Box::pin(async move { self.keep_packed(id, &generation, packing, packed, rest).await })
    }
}
