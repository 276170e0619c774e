//! A run between two steps as bytes: weights, moments, step and losses. Order and random streams follow from the job's
//! seed and the step.
//!
//! Layout, little-endian: `ATELTRN` and a version byte, the run's fingerprint (32), steps done (u32), tokens (u64), the
//! number of values (u64), a loss (f64) per step, then values, first and second moments (f32), and SHA-256 of all that.

use sha2::{Digest, Sha256};

use crate::error::TrainError;
use crate::optimiser::AdamW;

const MAGIC: &[u8; 8] = b"ATELTRN\x01";

/// What a run carries from step to step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    pub(crate) values: Vec<f32>,
    pub(crate) moments: AdamW,
    /// Of every step done, in nats per answer token.
    pub(crate) losses: Vec<f64>,
    /// Rows that went through the model.
    pub(crate) tokens: u64,
}

/// The bytes of a state of the run with this fingerprint.
pub(crate) fn write(fingerprint: &[u8; 32], state: &State) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96 + 8 * state.losses.len() + 12 * state.values.len());
    bytes.extend(MAGIC);
    bytes.extend(fingerprint);
    bytes.extend((state.losses.len() as u32).to_le_bytes());
    bytes.extend(state.tokens.to_le_bytes());
    bytes.extend((state.values.len() as u64).to_le_bytes());
    bytes.extend(state.losses.iter().flat_map(|loss| loss.to_le_bytes()));
    for values in [&state.values, &state.moments.first, &state.moments.second] {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    let sum = Sha256::digest(&bytes);
    bytes.extend(sum);
    bytes
}

/// Reads the state of the run with this fingerprint, which has `len` values.
pub(crate) fn read(bytes: &[u8], fingerprint: &[u8; 32], len: usize) -> Result<State, TrainError> {
    let damaged = || TrainError::Checkpoint("is damaged");
    let (body, sum) = bytes.split_last_chunk::<32>().ok_or_else(damaged)?;
    if !body.starts_with(&MAGIC[..7]) {
        return Err(TrainError::Checkpoint("is none of this program"));
    }
    if !body.starts_with(MAGIC) {
        return Err(TrainError::Checkpoint("is of another version"));
    }
    if Sha256::digest(body)[..] != sum[..] {
        return Err(damaged());
    }
    let mut rest = &body[MAGIC.len()..];
    if take::<32>(&mut rest).ok_or_else(damaged)? != *fingerprint {
        return Err(TrainError::Checkpoint("is of another run: recipe, examples, start or base differ"));
    }
    let steps = take(&mut rest).map(u32::from_le_bytes).ok_or_else(damaged)? as usize;
    let tokens = take(&mut rest).map(u64::from_le_bytes).ok_or_else(damaged)?;
    let values = take(&mut rest).map(u64::from_le_bytes).ok_or_else(damaged)?;
    if values != len as u64 || rest.len() as u64 != 8 * steps as u64 + 12 * values {
        return Err(damaged());
    }
    let (losses, numbers) = rest.split_at(8 * steps);
    let losses = losses.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let numbers: Vec<f32> = numbers.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let part = |at: usize| numbers[at * len..(at + 1) * len].to_vec();
    let moments = AdamW { first: part(1), second: part(2) };
    Ok(State { values: part(0), moments, losses, tokens })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_of_every_byte_is_seen() {
        let moments = AdamW { first: vec![0.5, 0.25], second: vec![1e-9, f32::MIN_POSITIVE] };
        let state = State { values: vec![1.0, -2.0], moments, losses: vec![3.0, 2.5, 2.0], tokens: 77 };
        let bytes = write(&[7; 32], &state);
        assert!(read(&bytes, &[7; 32], 2).is_ok_and(|read| read == state));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(read(&damaged, &[7; 32], 2).is_err(), "byte {at}");
            assert!(read(&bytes[..at], &[7; 32], 2).is_err(), "cut at {at}");
        }
        assert!(
            matches!(read(&bytes, &[8; 32], 2), Err(TrainError::Checkpoint(why)) if why.contains("another run"))
        );
        assert!(read(&bytes, &[7; 32], 3).is_err());
    }
}
