//! The orchestrator's one binary.

use clap::Parser;
use mayfly_orchestrator::provider::qemu::uplink;
use mayfly_orchestrator::{image, supervise};

#[derive(Parser)]
#[command(version, about)]
enum Cli {
    /// Desktop images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Holds one child process for the orchestrator
    #[command(hide = true)]
    Supervise(supervise::SuperviseCommand),
    /// Runs a machine with its network
    #[command(hide = true)]
    Uplink(uplink::UplinkCommand),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse() {
        // These two live as long as a desktop and handle signals themselves: no runtime, no threads before them.
        Cli::Supervise(command) => supervise::run(&command),
        Cli::Uplink(command) => uplink::run(&command),
        Cli::Image(command) => tokio::runtime::Runtime::new()?.block_on(image::run(command)),
    }
}
