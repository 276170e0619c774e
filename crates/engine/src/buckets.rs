//! Where what is known of steps of about the same number of rows is kept.

/// How many places there are.
pub(crate) const BUCKETS: usize = 64;

/// The place of a number of rows: one for each below sixteen, then four for each power of two.
pub(crate) fn bucket(rows: usize) -> usize {
    let rows = rows.max(1);
    let power = rows.ilog2() as usize;
    let at = if power < 4 { rows } else { 4 * power + (rows >> (power - 2)) % 4 };
    at.min(BUCKETS - 1)
}

/// The fewest rows of a place.
pub(crate) fn fewest(bucket: usize) -> usize {
    if bucket < 16 { bucket } else { (4 + bucket % 4) << (bucket / 4 - 2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_begins_where_the_one_before_ends() {
        assert_eq!((bucket(0), bucket(1), bucket(usize::MAX)), (1, 1, BUCKETS - 1));
        for at in 2..BUCKETS {
            let first = fewest(at);
            assert_eq!((bucket(first - 1), bucket(first)), (at - 1, at), "{first}");
        }
    }
}
