//! `cargo xtask demo`: the README's first command.

use crate::guests;
use crate::house::House;
use crate::packages::{self, Purpose};
use crate::run;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Without a screen and by itself: clicks, connects, types, closes, and writes target/reports/demo.json
    #[arg(long)]
    headless: bool,
}

/// Where the orchestrator listens by default.
const ORCHESTRATOR: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 5000);

pub(crate) fn run(house: &House, args: &DemoArgs) -> Result<()> {
    use Purpose::{Build, Image, Run, Test};
    let has_screen = ["DISPLAY", "WAYLAND_DISPLAY"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    if !args.headless && !has_screen {
        bail!("this machine has no screen (no DISPLAY); try: cargo xtask demo --headless");
    }
    packages::ensure(if args.headless {
        &[Build, Image, Run, Test]
    } else {
        &[Build, Image, Run]
    })?;
    guests::programs(house)?;
    let image = guests::image(house, &[])?;
    if args.headless {
        let mut demo = house.command(house.binary("demo"));
        demo.env("MAYFLY_PROGRAMS", house.target.join("debug"))
            .env("MAYFLY_DESKTOP_IMAGE", image)
            .env("MAYFLY_REPORTS", house.reports()?);
        return run::run(&mut demo);
    }
    with_screen(house, &image)
}

fn with_screen(house: &House, image: &std::path::Path) -> Result<()> {
    // Ctrl-C goes to the tray app, which destroys what lives and ends; only then comes the orchestrator's turn.
    ctrlc::set_handler(|| {}).context("taking over Ctrl-C")?;
    let mut orchestrator = Running(
        house
            .command(house.binary("mayfly-orchestrator"))
            .arg("serve")
            .process_group(0)
            .env("MAYFLY_PROVIDER__QEMU__IMAGE", image)
            .stdin(Stdio::null())
            .spawn()
            .context("starting mayfly-orchestrator")?,
    );
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        // First: another orchestrator may answer there, and ours has ended because of it.
        if let Some(status) = orchestrator.0.try_wait()? {
            bail!("the orchestrator did not start: {status}; its reason stands above");
        }
        if healthy() {
            break;
        }
        if Instant::now() > patience {
            bail!("the orchestrator does not answer at http://{ORCHESTRATOR}/healthz");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    println!(
        "\nMayfly sits in the tray: click it and choose \"New desktop\".\n\
         The orchestrator listens at http://{ORCHESTRATOR}. Ctrl-C ends both, and every desktop."
    );
    let mut launcher = Running(
        house
            .command(house.binary("mayfly-launcher"))
            .spawn()
            .context("starting mayfly-launcher")?,
    );
    let status = launcher.0.wait()?;
    // The tray app leaves when the end is promised; the orchestrator stays until it has come.
    let patience = Instant::now() + Duration::from_secs(60);
    while sessions().is_some_and(|count| count > 0) {
        if Instant::now() > patience {
            bail!("a desktop is still there; `cargo xtask demo` takes it up again");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    if !status.success() {
        bail!("the tray app ended: {status}");
    }
    Ok(())
}

/// Whether the orchestrator answers `GET /healthz` with 200.
fn healthy() -> bool {
    ask("/healthz").is_some()
}

/// How many sessions live at the orchestrator.
fn sessions() -> Option<u64> {
    let answer: serde_json::Value = serde_json::from_str(&ask("/api/sessions")?).ok()?;
    answer["count"].as_u64()
}

/// The body of the orchestrator's answer with 200.
fn ask(path: &str) -> Option<String> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&ORCHESTRATOR, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        // HTTP/1.0: the answer is not sent in chunks.
        write!(
            stream,
            "GET {path} HTTP/1.0\r\nHost: {ORCHESTRATOR}\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?;
    (status == "200").then(|| body.to_owned())
}

/// A child that is asked to end when the demonstration does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let pid = self.0.id().to_string();
            let _ = std::process::Command::new("kill")
                .args(["-TERM", &pid])
                .status();
            let _ = self.0.wait();
        }
    }
}
