//! Sets up tracing for the process.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::TelemetryError;

/// Writes events to standard error from now on: as JSON lines, or as text for people.
///
/// `filter` follows `tracing_subscriber`'s directives, such as `info` or `warn,server=debug`.
///
/// # Errors
/// If the filter does not parse, or if a subscriber is in place already.
pub fn init_tracing(json: bool, filter: &str) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })?;
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let set = if json {
        format.json().flatten_event(true).finish().try_init()
    } else {
        let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
        format.with_ansi(colours).finish().try_init()
    };
    set.map_err(|_| TelemetryError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_named() {
        let error = init_tracing(false, "server=loudly").expect_err("not a level");
        assert!(error.to_string().contains("server=loudly"), "{error}");
    }
}
