//! `cargo xtask chaos`: see [`mayfly_tests::chaos`]. Writes `chaos.json` to `$MAYFLY_REPORTS`.

use anyhow::{Result, ensure};
use clap::Parser;
use mayfly_tests::lab::Lab;
use mayfly_tests::{chaos, machine};
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// How long everything that can fail does
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Draws the faults of an earlier report
    #[arg(long)]
    seed: Option<u64>,
    /// An orchestrator of a version from which they are upgraded meanwhile; given by `cargo xtask chaos`
    #[arg(long, requires = "older_commit")]
    older: Option<PathBuf>,
    /// Its commit; given by `cargo xtask chaos`
    #[arg(long)]
    older_commit: Option<String>,
    /// Where chaos.json goes; given by `cargo xtask chaos`
    #[arg(long)]
    reports: Option<PathBuf>,
    /// The commit that is tested; given by `cargo xtask chaos`
    #[arg(long)]
    commit: Option<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let machine = machine::facts()?;
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}");
    let length = Duration::from_secs(args.minutes * 60);
    let chaos = chaos::run(seed, length, args.older.as_deref()).await?;
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("chaos.json");
    let report = json!({
        "commit": args.commit,
        "older_commit": args.older_commit,
        "machine": machine,
        "chaos": chaos,
    });
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{report:#}\n{}", path.display());
    ensure!(
        chaos.ok,
        "seed {seed}: {:?} {:?}",
        chaos.wrong,
        chaos.leftovers
    );
    Ok(())
}
