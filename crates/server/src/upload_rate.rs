//! How much history a user may upload per minute.

use std::time::Duration;

use dashmap::DashMap;
use types::{AdapterId, Timestamp};

use crate::error::{ApiError, Code};

const MINUTE_MILLIS: u64 = 60_000;

/// Users beyond which those with nothing to wait for are forgotten.
const MANY: usize = 1024;

/// A bucket per user that holds one minute's worth of bytes and fills up evenly.
pub(crate) struct UploadRate {
    per_minute: u64,
    buckets: DashMap<AdapterId, Bucket>,
}

struct Bucket {
    left: u64,
    at: Timestamp,
}

impl Bucket {
    fn fill(&mut self, per_minute: u64, now: Timestamp) {
        let millis = u64::try_from(now.0.saturating_sub(self.at.0)).unwrap_or(0).min(MINUTE_MILLIS);
        // In 128 bits, as a configured rate may be anything.
        let more = u128::from(per_minute) * u128::from(millis) / u128::from(MINUTE_MILLIS);
        if more > 0 || now < self.at {
            self.left = self.left.saturating_add(more as u64).min(per_minute);
            self.at = now;
        }
    }
}

impl UploadRate {
    pub(crate) fn new(per_minute: u64) -> Self {
        Self { per_minute, buckets: DashMap::new() }
    }

    /// Takes `bytes` from the user's bucket, or tells when there will be enough.
    pub(crate) fn take(&self, user: &AdapterId, bytes: u64, now: Timestamp) -> Result<(), ApiError> {
        if self.buckets.len() > MANY {
            self.buckets.retain(|_, bucket| {
                bucket.fill(self.per_minute, now);
                bucket.left < self.per_minute
            });
        }
        let full = || Bucket { left: self.per_minute, at: now };
        let mut bucket = self.buckets.entry(user.clone()).or_insert_with(full);
        bucket.fill(self.per_minute, now);
        // A body larger than a minute's worth passes when the bucket is full.
        let needed = bytes.min(self.per_minute);
        let Some(left) = bucket.left.checked_sub(needed) else {
            let missing = u128::from(needed - bucket.left) * u128::from(MINUTE_MILLIS);
            let millis = missing.div_ceil(u128::from(self.per_minute.max(1))) as u64;
            let message = format!("a user may upload {} bytes of history per minute", self.per_minute);
            return Err(ApiError::new(Code::RateLimited, message).retry_after(Duration::from_millis(millis)));
        };
        bucket.left = left;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> AdapterId {
        AdapterId::new("t".parse().expect("tenant"), name.parse().expect("user"))
    }

    #[test]
    fn a_bucket_empties_and_fills() {
        let rate = UploadRate::new(600);
        let at = Timestamp;
        assert!(rate.take(&user("ann"), 500, at(0)).is_ok());
        assert!(rate.take(&user("ann"), 101, at(0)).is_err());
        assert!(rate.take(&user("bob"), 600, at(0)).is_ok());
        assert!(rate.take(&user("ann"), 101, at(99)).is_err());
        assert!(rate.take(&user("ann"), 101, at(100)).is_ok());
        assert!(rate.take(&user("ann"), 600, at(30_000)).is_err());
        assert!(rate.take(&user("ann"), 10_000, at(90_000)).is_ok(), "larger than the bucket");
        assert!(rate.take(&user("ann"), 1, at(0)).is_err(), "a clock that goes back fills nothing");
    }

    #[test]
    fn idle_users_are_forgotten() {
        let rate = UploadRate::new(600);
        for name in 0..=MANY {
            rate.take(&user(&format!("u{name}")), 1, Timestamp(0)).expect("first");
        }
        rate.take(&user("last"), 1, Timestamp(60_000)).expect("later");
        assert_eq!(rate.buckets.len(), 1);
    }
}
