//! What a client may ask for: the limits that are checked before any work is done.

use std::time::Duration;

use types::TrainingLimits;

/// Limits of the HTTP role. The default is what `GET /v1/limits` shows on a fresh server.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Bytes of a request's head.
    pub header_bytes: usize,
    /// Header fields of a request.
    pub header_fields: usize,
    /// Time for a request's head to arrive; also how long an idle connection is kept.
    pub header_timeout: Duration,
    /// Time for a body to arrive.
    pub body_timeout: Duration,
    /// Open connections; further ones wait to be accepted.
    pub connections: usize,
    /// Time that running answers get to finish when the server is told to stop.
    pub shutdown_grace: Duration,

    /// Bytes of a body, uploads aside.
    pub body_bytes: usize,
    /// Bytes of an upload's body.
    pub upload_bytes: usize,
    /// Bytes of an uploaded adapter's config.
    pub adapter_config_bytes: usize,
    /// Bytes of an uploaded adapter's weights.
    pub adapter_weights_bytes: usize,
    /// Adapters that are taken in at a time; each may hold several times its file's size in memory.
    pub imports: usize,
    /// Nesting of a JSON body.
    pub json_depth: usize,

    /// Answers of one request: `n`, times the number of prompts.
    pub choices: usize,
    /// Stop strings of a request.
    pub stop_strings: usize,
    /// Bytes of a stop string.
    pub stop_bytes: usize,
    /// Stop tokens of a request.
    pub stop_tokens: usize,
    /// Alternatives per token.
    pub top_logprobs: u32,
    /// Tokens with a bias.
    pub logit_bias: usize,
    /// Length of a chat answer whose request names none, if the context has room for it.
    pub default_max_tokens: u32,

    /// Sequences of one user in the engine at a time.
    pub in_flight_per_user: usize,
    /// Requests of one user that wait for their turn.
    pub queued_per_user: usize,
    /// Requests of all users that wait for their turn.
    pub queued: usize,
    /// Longest wait for a turn.
    pub queue_timeout: Duration,
    /// Longest wait for an adapter to be loaded.
    pub adapter_timeout: Duration,
    /// Longest time from a request to the end of its answer.
    pub generation_timeout: Duration,

    /// Bytes of history that a user may upload per minute.
    pub upload_bytes_per_minute: u64,
    /// Bytes of history that a user may have.
    pub history_bytes_per_user: u64,
    /// Bytes of an item's input or output.
    pub item_bytes: usize,
    /// Bytes of an item's metadata, as JSON.
    pub item_metadata_bytes: usize,
    /// Entries of one page of a list.
    pub page: u32,
    /// Hyper-parameters that may be asked for.
    pub training: TrainingLimits,
}

impl Default for Limits {
    fn default() -> Self {
        const KIB: usize = 1024;
        const MIB: usize = 1024 * KIB;
        Self {
            header_bytes: 16 * KIB,
            header_fields: 64,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            connections: 1024,
            shutdown_grace: Duration::from_secs(30),
            body_bytes: MIB,
            upload_bytes: 8 * MIB,
            adapter_config_bytes: 64 * KIB,
            adapter_weights_bytes: 64 * MIB,
            imports: 2,
            json_depth: 32,
            choices: 4,
            stop_strings: 4,
            stop_bytes: 64,
            stop_tokens: 64,
            top_logprobs: 20,
            logit_bias: 300,
            default_max_tokens: 1024,
            in_flight_per_user: 4,
            queued_per_user: 8,
            queued: 128,
            queue_timeout: Duration::from_secs(60),
            adapter_timeout: Duration::from_secs(30),
            generation_timeout: Duration::from_secs(600),
            upload_bytes_per_minute: 10 * MIB as u64,
            history_bytes_per_user: 100 * MIB as u64,
            item_bytes: 256 * KIB,
            item_metadata_bytes: 16 * KIB,
            page: 1000,
            training: TrainingLimits::default(),
        }
    }
}
