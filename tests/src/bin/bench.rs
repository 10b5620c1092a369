//! `cargo xtask bench`: how long things take, on the real parts; medians, with the machine they were measured on.
//!
//! Writes `bench.json` to `$MAYFLY_REPORTS`. Each figure stands beside what it is to be read against, from the same run.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mayfly_api::{CreateSession, Session, SessionId, SessionPhase};
use mayfly_orchestrator::supervise::{Status, Supervised};
use mayfly_tests::lab::{Desk, Lab, Launcher, Orchestrator, Provider, image_folder, until};
use mayfly_tests::machine;
use mayfly_tests::sessions::Held;
use mayfly_tests::site::{Site, in_own_network};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What is measured, in this order.
const PARTS: [&str; 4] = ["desktop", "terraform", "accept", "launcher"];
/// One step of a desktop's life takes less, emulated, on a busy machine.
const BOUND: Duration = Duration::from_secs(300);
/// Nobody beats for a session here, and its desktop may take long.
const NOBODY_BEATS: &str = "lease_s = 7200";
/// Requests of the accept measurement.
const REQUESTS: usize = 300;

#[derive(Parser)]
struct Args {
    /// Runs of each measurement
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only these parts: desktop, terraform, accept, launcher
    #[arg(long, value_delimiter = ',', value_parser = PARTS)]
    only: Vec<String>,
    /// Where bench.json goes; given by `cargo xtask bench`
    #[arg(long)]
    reports: Option<std::path::PathBuf>,
    /// Only the part on the PVE lab, in a network of its own; its figures go to this file
    #[arg(long, hide = true)]
    on_site: Option<std::path::PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.runs >= 5, "at least 5 runs make a median");
    if let Some(file) = &args.on_site {
        return Ok(std::fs::write(file, site(args.runs).await?.to_string())?);
    }
    let mut report = json!({"machine": machine::facts()?, "runs": args.runs});
    for part in PARTS {
        if !args.only.is_empty() && args.only.iter().all(|only| only != part) {
            continue;
        }
        let figures = match part {
            "desktop" => desktop(args.runs).await,
            "terraform" => elsewhere(args.runs),
            "accept" => accept().await,
            _ => launcher(args.runs).await,
        };
        report[part] = figures.context(part)?;
    }
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("bench.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{report:#}\n{}", path.display());
    Ok(())
}

/// A desktop from request to gone, `runs` times, one after the other.
async fn desktop(runs: usize) -> Result<Value> {
    let lab = Lab::new("bench desktop")?;
    let provider = Provider::Qemu(image_folder("MAYFLY_DESKTOP_IMAGE")?);
    let orchestrator = Orchestrator::start(&lab, &provider, NOBODY_BEATS).await?;
    let desk = Desk::start(&lab).await?;
    let (mut ready, mut pixel, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    let mut stages = Stages::new();
    for _ in 0..runs {
        let begin = Instant::now();
        let held = Held::create(&orchestrator).await?;
        let session = held.ready(&orchestrator).await?;
        ready.push(ms(begin));
        note(&mut stages, &session)?;

        let begin = Instant::now();
        let mut viewer = held.view(&lab, &desk, &orchestrator).await?;
        until("the desktop is on the screen", BOUND, async || {
            viewer.must_run()?;
            Ok((desk.screen().picture()?.colours() > 200).then_some(()))
        })
        .await?;
        pixel.push(ms(begin));
        drop(viewer);

        let begin = Instant::now();
        let ended = held.destroyed(&orchestrator).await?;
        ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
        gone.push(ms(begin));
        lab.nothing_is_left()?;
    }
    Ok(json!({
        "create_to_ready_ms": figures(ready),
        "of_which_stages_ms": of_stages(stages),
        "ready_to_first_pixel_ms": figures(pixel),
        "destroy_to_gone_ms": figures(gone),
    }))
}

/// Milliseconds of each stage, of every run.
type Stages = BTreeMap<String, Vec<f64>>;

fn note(stages: &mut Stages, session: &Session) -> Result<()> {
    for stage in &session.stages {
        let name = format!("{:?}", stage.name).to_lowercase();
        let duration = stage.duration_ms.unwrap_or_default();
        let entry = stages.entry(name).or_default();
        entry.push(f64::from(u32::try_from(duration)?));
    }
    Ok(())
}

fn of_stages(stages: Stages) -> BTreeMap<String, Value> {
    let each = stages.into_iter();
    each.map(|(name, all)| (name, figures(all))).collect()
}

/// Runs [`site`] in a network of its own.
fn elsewhere(runs: usize) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("figures.json");
    let arguments = [
        "--on-site".into(),
        file.clone().into(),
        "--runs".into(),
        runs.to_string().into(),
    ];
    let status = in_own_network(folder.path(), &arguments)?.status()?;
    ensure!(status.success(), "{status}");
    Ok(serde_json::from_slice(&std::fs::read(&file)?)?)
}

/// A desktop made by OpenTofu on the PVE lab, from request to gone; beside it how long its machine took to boot: from its start to the
/// end of systemd's first jobs (systemd-analyze(1)), asked from the lab. Less than nothing: it was ready before its machine had booted.
async fn site(runs: usize) -> Result<Value> {
    let mut site = Site::start(&image_folder("MAYFLY_DESKTOP_IMAGE")?, json!({}))?;
    let lab = Lab::new("bench site")?;
    let provider = Provider::Terraform(site.configuration()?);
    let orchestrator = Orchestrator::start(&lab, &provider, NOBODY_BEATS).await?;
    let (mut ready, mut before) = (Vec::new(), Vec::new());
    let (mut boot, mut outside) = (Vec::new(), Vec::new());
    let (mut apply, mut gone) = (Vec::new(), Vec::new());
    let mut stages = Stages::new();
    for _ in 0..runs {
        let begin = Instant::now();
        let held = Held::create(&orchestrator).await?;
        let machine = until("its machine runs", BOUND, async || {
            Ok(site.machines()?.into_iter().find(|m| m.running))
        })
        .await?;
        let to_start = ms(begin);
        let session = held.ready(&orchestrator).await?;
        let all = ms(begin);
        let booted = until("it has booted", BOUND, async || {
            let line = "systemctl show --value --property=FinishTimestampMonotonic";
            let finish: f64 = site.shell(machine.vmid, line)?.trim().parse()?;
            Ok((finish > 0.0).then_some(finish / 1000.0))
        })
        .await?;
        ready.push(all);
        boot.push(booted);
        before.push(to_start);
        outside.push(all - booted);
        note(&mut stages, &session)?;
        let name = session.desktop.context("a desktop")?.to_string();
        let run = Supervised::at(&lab.path("state/terraform").join(name)).status();
        let Status::Exited(exit) = run else {
            anyhow::bail!("the run of a desktop that is ready is {run:?}");
        };
        apply.push(f64::from(u32::try_from(exit.cpu_ms)?));

        let begin = Instant::now();
        let ended = held.destroyed(&orchestrator).await?;
        ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
        gone.push(ms(begin));
        lab.nothing_is_left()?;
    }
    Ok(json!({
        "create_to_ready_ms": figures(ready),
        "of_which_stages_ms": of_stages(stages),
        "until_the_machine_starts_ms": figures(before),
        "machine_boots_ms": figures(boot),
        "ready_less_the_boot_ms": figures(outside),
        "apply_cpu_ms": figures(apply),
        "destroy_to_gone_ms": figures(gone),
    }))
}

/// `POST /api/v1/sessions` until the durable answer, one caller; beside it `GET /healthz`, the same way without the store.
async fn accept() -> Result<Value> {
    let lab = Lab::new("bench accept")?;
    let limits = format!("max_queued = {}", REQUESTS + 1);
    let orchestrator = Orchestrator::start(&lab, &Provider::Simulated, &limits).await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let (mut accepted, mut healthy) = (Vec::new(), Vec::new());
    for _ in 0..REQUESTS {
        let begin = Instant::now();
        http.get(format!("{}/healthz", orchestrator.url()))
            .send()
            .await?
            .error_for_status()?;
        healthy.push(ms(begin));
        let begin = Instant::now();
        orchestrator
            .client()
            .create(&CreateSession::default(), &SessionId::new().to_string())
            .await?;
        accepted.push(ms(begin));
    }
    Ok(json!({"create_ms": figures(accepted), "baseline_healthz_ms": figures(healthy)}))
}

/// The tray app: start to icon, memory and processor time when idle.
async fn launcher(runs: usize) -> Result<Value> {
    let lab = Lab::new("bench launcher")?;
    let orchestrator = Orchestrator::start(&lab, &Provider::Simulated, "").await?;
    let desk = Desk::start(&lab).await?;
    let mut tray = Vec::new();
    for _ in 0..runs {
        let begin = Instant::now();
        let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
        launcher.tray(&desk).await?;
        tray.push(ms(begin));
        launcher.quit().await?;
    }
    let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
    launcher.tray(&desk).await?;
    let pid = launcher.process().pid();
    // Let the start itself pass; then a minute counts.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = ticks(pid)?;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let used = ticks(pid)? - before;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap_or_default();
    launcher.quit().await?;
    Ok(json!({
        "start_to_tray_ms": figures(tray),
        "idle_resident": resident.trim_start_matches("VmRSS:").trim(),
        "idle_minute_cpu_ticks_of_10_ms": used,
    }))
}

/// Processor time of a process, in clock ticks (proc(5): utime and stime).
fn ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let times = after_name.split_whitespace().skip(11).take(2);
    Ok(times.map(str::parse::<u64>).sum::<Result<u64, _>>()?)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Median, smallest and largest, to a tenth.
fn figures(mut all: Vec<f64>) -> Value {
    all.sort_by(f64::total_cmp);
    let at = |part: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a small index"
        )]
        let index = ((all.len() - 1) as f64 * part).round() as usize;
        (all[index] * 10.0).round() / 10.0
    };
    json!({"median": at(0.5), "min": at(0.0), "p99": at(0.99), "max": at(1.0), "n": all.len()})
}
