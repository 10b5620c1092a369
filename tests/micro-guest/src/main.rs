//! Builds the micro guest's image folder and prints its path as the last line.

use anyhow::Context as _;
use clap::Parser;
use std::path::PathBuf;

/// Builds the image of the micro guest, unless the cache has it.
#[derive(Debug, Parser)]
struct Arguments {
    /// The folder of images.
    #[arg(long)]
    output: PathBuf,
    /// The static `mayfly-agent`.
    #[arg(long)]
    agent: PathBuf,
    /// The static `micro-rdp` [default: beside the agent].
    #[arg(long)]
    rdp: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let rdp = arguments
        .rdp
        .unwrap_or_else(|| arguments.agent.with_file_name("micro-rdp"));
    let folder = mayfly_micro_guest::build(&arguments.agent, &rdp, &arguments.output)
        .context("building the micro guest")?;
    println!("{}", folder.display());
    Ok(())
}
