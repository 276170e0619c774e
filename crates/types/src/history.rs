//! What users bring: history items.

use serde::{Deserialize, Serialize};

use crate::{ItemId, Timestamp};

/// One input/output pair of a user (or output only), as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HistoryItem {
    /// Unique within the user.
    pub id: ItemId,
    /// What the user was given; absent for plain text.
    pub input: Option<String>,
    /// What the user wrote or chose.
    pub output: String,
    /// When; the order of a history is (created_at, position of arrival).
    pub created_at: Timestamp,
    /// The caller's own data, kept and returned as given.
    pub metadata: Option<serde_json::Value>,
}

/// An item as uploaded; what is absent is filled in on arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct NewItem {
    /// The caller's id; an id that exists already for this user marks a duplicate.
    pub id: Option<ItemId>,
    /// What the user was given; absent for plain text.
    pub input: Option<String>,
    /// What the user wrote or chose; never empty.
    pub output: String,
    /// When; the time of arrival if absent.
    pub created_at: Option<Timestamp>,
    /// The caller's own data.
    pub metadata: Option<serde_json::Value>,
}

/// How much history a user has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HistoryStats {
    /// Number of items.
    pub items: u64,
    /// UTF-8 bytes of all inputs and outputs.
    pub bytes: u64,
}
