//! `mayfly` for the terminal: the launcher without windows.

mod cli;

use clap::{Parser, Subcommand};
use mayfly_session_manager::log;
use mayfly_session_manager::settings::Places;
use std::process::ExitCode;

/// A fresh desktop when you ask for one, gone when you close it.
#[derive(Debug, Parser)]
#[command(name = "mayfly", version, after_help = cli::EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask for a desktop, open it, and destroy it when it is closed.
    #[command(after_help = cli::EXIT_CODES)]
    Connect(cli::connect::Options),
    /// Show your sessions.
    List(cli::list::Options),
    /// Destroy sessions of yours.
    Destroy(cli::destroy::Options),
    /// Check what Mayfly needs on this machine.
    Doctor(cli::doctor::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let places = Places::of_person();
    log::start(places.as_ref(), "warn");
    let code = run(arguments.command, places).unwrap_or_else(|error| {
        eprintln!("mayfly: {error:#}");
        cli::USAGE
    });
    // Not `return`: a thread that waits for a key would be waited for.
    std::process::exit(code)
}

fn run(command: Command, places: Option<Places>) -> anyhow::Result<i32> {
    let places = places.ok_or_else(|| {
        anyhow::anyhow!("no home folder was found; set MAYFLY_CONFIG_DIR and MAYFLY_DATA_DIR")
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match command {
            Command::Connect(options) => cli::connect::run(options, places).await,
            Command::List(options) => cli::list::run(&options, &places).await,
            Command::Destroy(options) => cli::destroy::run(&options, &places).await,
            Command::Doctor(options) => cli::doctor::run(&options, &places).await,
        }
    })
}
