//! The `atelier` command.
#![expect(clippy::print_stdout, reason = "a command talks to its user")]

use std::path::PathBuf;

use anyhow::Context;
use atelier::demo::{self, DemoContext};
use atelier::fetch;
use atelier::service::{self, Service};
use atelier::settings::{Cli, Command, ServiceArgs};
use clap::Parser;

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let given = match &cli.command {
        Command::Serve(args) | Command::Demo { service: args, .. } => args.io_threads,
        Command::Fetch { .. } => None,
    };
    let threads = service::io_threads(given);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve(&args).await,
            Command::Demo { exit, service } => run_demo(exit, &service).await,
            Command::Fetch { cache } => {
                telemetry::init_tracing(false, "info")?;
                println!("{}", fetch::default_model(&fetch::cache_folder(cache.as_deref())?)?.display());
                Ok(())
            }
        }
    })
}

async fn serve(args: &ServiceArgs) -> anyhow::Result<()> {
    telemetry::init_tracing(args.log_json, &args.log)?;
    let data = args.data.clone().unwrap_or_else(|| PathBuf::from("atelier-data"));
    let service = Service::start(args, &data).await?;
    println!("atelier serves {} on http://{}", service.model_name, service.address);
    stopped().await?;
    service.stop().await
}

async fn run_demo(exit: bool, args: &ServiceArgs) -> anyhow::Result<()> {
    telemetry::init_tracing(args.log_json, if args.log == "info" { "warn" } else { &args.log })?;
    let cache = fetch::cache_folder(args.cache.as_deref())?;
    let data = args.data.clone().unwrap_or_else(|| cache.join("demo-data"));
    let service = Service::start(args, &data).await?;
    println!("atelier serves {} on http://{}", service.model_name, service.address);
    let context = DemoContext {
        base: service.base.clone(),
        tokenizer: service.tokenizer.clone(),
        address: service.address,
        model_name: service.model_name.clone(),
        cache,
    };
    let shown = demo::run(&context).await;
    if !exit && shown.is_ok() {
        println!("\nStill serving on http://{}; stop with Ctrl-C.", service.address);
        stopped().await?;
    }
    service.stop().await?;
    shown
}

/// Waits for Ctrl-C or a termination signal.
async fn stopped() -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result.context("cannot listen for Ctrl-C"),
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.context("cannot listen for Ctrl-C")
}
