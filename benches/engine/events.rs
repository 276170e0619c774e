//! The events of a streamed answer.

use serde_json::Value;

/// What has come of a stream and is not yet a whole line.
#[derive(Default)]
pub(crate) struct Events {
    pending: Vec<u8>,
}

impl Events {
    /// Takes in what has come; the events that are whole by now. The mark of the end is none.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> anyhow::Result<Vec<Value>> {
        self.pending.extend_from_slice(bytes);
        let whole = self.pending.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = self.pending.drain(..whole).collect();
        let data = lines.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"data: "));
        data.filter(|data| data.starts_with(b"{")).map(|data| Ok(serde_json::from_slice(data)?)).collect()
    }
}
