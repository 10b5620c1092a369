//! `cargo xtask …`: everything that a newcomer, a developer or CI runs.
//!
//! The two commands of the README are `demo` and `test`. Both install what is missing (and say what, and why),
//! so that a machine with git, a C compiler and a Rust toolchain is enough.

mod ansible;
mod bare;
mod cross;
mod demo;
mod guests;
mod house;
mod icons;
mod packages;
mod run;
mod suite;
mod terraform;
mod tools;
mod ui;

use clap::{Parser, Subcommand};
use house::House;
use std::process::ExitCode;

/// Build, show and check Mayfly.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// From nothing to the tray app, with a desktop image, on this machine alone
    Demo(demo::DemoArgs),
    /// Every test, and what they need
    Test(suite::TestArgs),
    /// Build the desktop image and print its folder
    Image(guests::ImageArgs),
    /// Measure, over several runs: target/reports/bench.json
    Bench(suite::Arguments),
    /// Every case and kill point on the real desktop, and a long chaos: target/reports/soak.json
    Soak(suite::Arguments),
    /// Several orchestrators on one PostgreSQL, and everything that can fail does: target/reports/chaos.json
    Chaos(suite::ChaosArgs),
    /// The whole chain, once: a domain, a lab of Proxmox VE, a person at work: target/reports/proxmox.json
    Lab(suite::LabArgs),
    /// Draw every icon anew from icons/mayfly.svg
    Icons,
    /// Both README commands in a bare Debian root: target/reports/bare.log
    Bare(bare::BareArgs),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = House::open().and_then(|house| match args.task {
        Task::Demo(args) => demo::run(&house, &args),
        Task::Test(args) => suite::test(&house, &args),
        Task::Image(args) => guests::image_command(&house, &args),
        Task::Bench(args) => suite::bench(&house, &args),
        Task::Soak(args) => suite::soak(&house, &args),
        Task::Chaos(args) => suite::chaos(&house, &args),
        Task::Lab(args) => suite::lab(&house, &args),
        Task::Icons => icons::generate(&house.root),
        Task::Bare(args) => bare::run(&house, &args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
