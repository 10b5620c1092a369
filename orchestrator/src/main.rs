//! The orchestrator's one binary.

use clap::Parser;

#[derive(Parser)]
#[command(version, about)]
enum Cli {
    /// Desktop images
    #[command(subcommand)]
    Image(mayfly_orchestrator::image::ImageCommand),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        Cli::Image(command) => mayfly_orchestrator::image::run(command).await,
    }
}
