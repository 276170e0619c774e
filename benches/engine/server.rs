//! Our side over HTTP: the real server on loopback, with an adapter published for every user.

use std::net::SocketAddr;
use std::sync::Arc;

use adapters::{AdapterCache, CacheSettings};
use peft::{LoraWeights, Storage};
use server::{App, AppState, Auth, Limits};
use store::Store;
use telemetry::Metrics;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use types::SystemClock;

use crate::adapters::publish;
use crate::ours::Ours;

/// The model's name in the API.
pub(crate) const MODEL: &str = "bench";
/// Room for all adapters in memory.
const ADAPTER_BYTES: usize = 1 << 30;

/// A running server; it ends when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
}

impl Server {
    /// Serves the model over its engine, with these adapters for the users 0, 1, ...
    pub(crate) fn start(ours: &Ours, adapters: &[LoraWeights], storage: Storage) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let address = ours.runtime.block_on(async {
            let store = Store::in_memory(Arc::new(SystemClock)).await?;
            for (number, weights) in adapters.iter().enumerate() {
                publish(&store, &ours.base, number, weights).await?;
            }
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            let app = app(ours, store, storage);
            tokio::spawn(server::serve(listener, app, stop.clone()));
            anyhow::Ok(address)
        })?;
        Ok(Self { address, stop })
    }
}

fn app(ours: &Ours, store: Store, storage: Storage) -> App {
    App::new(AppState {
        engine: Arc::new(ours.engine.clone()),
        tokenizer: ours.tokenizer.clone(),
        store: store.clone(),
        adapters: AdapterCache::new(store, ours.base.clone(), CacheSettings::new(storage, ADAPTER_BYTES)),
        model_name: MODEL.to_owned(),
        base: ours.base.clone(),
        // One user may be all sixteen clients here.
        limits: Limits { in_flight_per_user: 64, ..Limits::default() },
        auth: Auth::Open,
        clock: Arc::new(SystemClock),
        metrics: Metrics::default(),
        on_upload: Arc::new(Notify::new()),
    })
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
