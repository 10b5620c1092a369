//! `cargo xtask soak`: every kill point, ten desktops at once and a long chaos, all on the real desktop image.
//!
//! What `tests/tests/micro_guest.rs` shows in every test run on the micro guest is shown here on the desktop that people get.
//! Writes `soak.json` to `$MAYFLY_REPORTS`: each point, how long it took to converge, and what was left (nothing, or the run
//! fails). The chaos is drawn from a seed, which the report names and `--seed` repeats.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use mayfly_api::{SessionPhase, StageName};
use mayfly_tests::lab::{Desk, Lab, Orchestrator, Process, Provider, image_folder};
use mayfly_tests::machine;
use mayfly_tests::sessions::Held;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Args {
    /// Length of the chaos
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Repeats the chaos of an earlier report
    #[arg(long)]
    seed: Option<u64>,
    /// How many desktops at once
    #[arg(long, default_value_t = 10)]
    desktops: usize,
    /// Where soak.json goes; given by `cargo xtask soak`
    #[arg(long)]
    reports: Option<PathBuf>,
    /// The commit that is tested; given by `cargo xtask soak`
    #[arg(long)]
    commit: Option<String>,
}

/// What was shown, and what it took.
#[derive(Debug, Serialize)]
struct Point {
    point: String,
    ms: u64,
    leftovers: Vec<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut soak = Soak {
        points: Vec::new(),
        chaos: Value::Null,
    };
    let machine = machine::facts()?;
    let outcome = soak.run(&args, seed).await;
    let report = json!({
        "ok": outcome.is_ok(),
        "error": outcome.as_ref().err().map(|error| format!("{error:#}")),
        "commit": args.commit,
        "machine": machine,
        "seed": seed,
        "points": soak.points,
        "chaos": soak.chaos,
    });
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("soak.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{}", path.display());
    outcome
}

struct Soak {
    points: Vec<Point>,
    chaos: Value,
}

impl Soak {
    async fn run(&mut self, args: &Args, seed: u64) -> Result<()> {
        self.cancels().await.context("cancel")?;
        self.kills().await.context("kill")?;
        self.many(args.desktops).await.context("many at once")?;
        let length = Duration::from_secs(args.minutes * 60);
        self.chaos(length, seed).await.context("chaos")
    }

    fn shown(&mut self, lab: &Lab, point: String, since: Instant) -> Result<()> {
        let ms = u64::try_from(since.elapsed().as_millis())?;
        println!("{:>8.1} s  {point}", since.elapsed().as_secs_f64());
        let left = lab.nothing_is_left();
        let leftovers = left.as_ref().err().map(ToString::to_string);
        self.points.push(Point {
            point,
            ms,
            leftovers: leftovers.into_iter().collect(),
        });
        left
    }

    async fn cancels(&mut self) -> Result<()> {
        let lab = Lab::new("soak cancel")?;
        let orchestrator = start(&lab).await?;
        for stage in StageName::CREATE {
            let held = Held::create(&orchestrator).await?;
            held.reach(&orchestrator, stage).await?;
            let since = Instant::now();
            let ended = held.destroyed(&orchestrator).await?;
            ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
            self.shown(&lab, format!("cancelled in {stage:?}"), since)?;
        }
        Ok(())
    }

    async fn kills(&mut self) -> Result<()> {
        let lab = Lab::new("soak kill")?;
        let mut orchestrator = start(&lab).await?;
        for stage in StageName::CREATE {
            let held = Held::create(&orchestrator).await?;
            held.reach(&orchestrator, stage).await?;
            let since = Instant::now();
            orchestrator.crash().await?;
            orchestrator.start_again(&lab).await?;
            held.ready(&orchestrator).await?;
            orchestrator.client().destroy(held.id, &held.secret).await?;
            orchestrator.crash().await?;
            orchestrator.start_again(&lab).await?;
            let ended = held.ended(&orchestrator).await?;
            ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
            let point = format!("orchestrator killed in {stage:?} and again while it destroys");
            self.shown(&lab, point, since)?;
        }
        Ok(())
    }

    async fn many(&mut self, count: usize) -> Result<()> {
        let lab = Lab::new("soak many")?;
        let orchestrator = start(&lab).await?;
        let since = Instant::now();
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(Held::create(&orchestrator).await?);
        }
        let mut addresses = BTreeSet::new();
        for held in &all {
            let session = held.ready(&orchestrator).await?;
            addresses.insert(session.rdp.context("ready without an address")?.address);
            held.call(&orchestrator).await?;
        }
        ensure!(
            addresses.len() == count,
            "{count} desktops at {addresses:?}"
        );
        let ready = since.elapsed().as_secs();
        for held in &all {
            held.destroyed(&orchestrator).await?;
        }
        let point = format!("{count} asked for at once, all ready after {ready} s, destroyed");
        self.shown(&lab, point, since)
    }

    async fn chaos(&mut self, length: Duration, seed: u64) -> Result<()> {
        let lab = Lab::new("soak chaos")?;
        let mut chaos = Chaos {
            random: fastrand::Rng::with_seed(seed),
            orchestrator: start(&lab).await?,
            desk: Desk::start(&lab).await?,
            lab: &lab,
            live: Vec::new(),
            done: BTreeMap::new(),
        };
        let begin = Instant::now();
        while begin.elapsed() < length {
            chaos.step().await?;
        }
        let since = Instant::now();
        let outcome = chaos.end().await;
        self.chaos = json!({"minutes": length.as_secs() / 60, "done": chaos.done});
        outcome?;
        self.shown(&lab, format!("chaos of {} s", length.as_secs()), since)
    }
}

async fn start(lab: &Lab) -> Result<Orchestrator> {
    let provider = Provider::Qemu(image_folder("MAYFLY_DESKTOP_IMAGE")?);
    Orchestrator::start(lab, &provider, "idle_s = 20").await
}

/// People come and go, and everything that can be killed is.
struct Chaos<'a> {
    random: fastrand::Rng,
    orchestrator: Orchestrator,
    desk: Desk,
    lab: &'a Lab,
    live: Vec<(Held, Option<Process>)>,
    done: BTreeMap<&'static str, u32>,
}

impl Chaos<'_> {
    async fn step(&mut self) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(self.random.u64(0..4000))).await;
        // Whoever has ended makes room.
        let mut live = Vec::new();
        for (held, viewer) in std::mem::take(&mut self.live) {
            if !held.get(&self.orchestrator).await?.phase.is_final() {
                live.push((held, viewer));
            }
        }
        self.live = live;
        let one = match self.live.len() {
            0 => None,
            count => Some(self.random.usize(0..count)),
        };
        // A desktop needs some seconds of peace to be made: kills are rarer than people.
        let what = match (self.random.u8(0..20), one) {
            (0..=4, _) if self.live.len() < 3 => {
                let held = Held::create(&self.orchestrator).await?;
                self.live.push((held, None));
                "desktops asked for"
            }
            (5..=9, Some(one)) => self.view(one).await?,
            (10..=12, Some(one)) if self.live[one].1.is_some() => {
                self.live[one].1.take().context("a viewer")?.crash().await?;
                "RDP clients killed"
            }
            (13, Some(one)) => {
                let held = &self.live[one].0;
                self.orchestrator
                    .client()
                    .destroy(held.id, &held.secret)
                    .await?;
                "destroys"
            }
            (14, Some(one)) => self.kill_machine(one).await?,
            (15, _) => {
                self.orchestrator.crash().await?;
                self.orchestrator.start_again(self.lab).await?;
                "orchestrators killed"
            }
            _ => return Ok(()),
        };
        println!("            {what}");
        *self.done.entry(what).or_default() += 1;
        Ok(())
    }

    async fn view(&mut self, one: usize) -> Result<&'static str> {
        let (held, viewer) = &mut self.live[one];
        if held.get(&self.orchestrator).await?.phase.is_usable() {
            *viewer = Some(held.view(self.lab, &self.desk, &self.orchestrator).await?);
            return Ok("RDP clients opened");
        }
        Ok("looks")
    }

    async fn kill_machine(&mut self, one: usize) -> Result<&'static str> {
        let session = self.live[one].0.get(&self.orchestrator).await?;
        let Some(name) = session.desktop else {
            return Ok("looks");
        };
        let folder = self.lab.path("machines").join(name.to_string());
        // Machine, uplink and supervisor name it.
        let killed = Command::new("pkill")
            .args(["-KILL", "-f"])
            .arg(folder)
            .status()
            .context("starting pkill")?;
        Ok(match killed.code() {
            Some(0) => "machines killed",
            Some(1) => "looks",
            _ => bail!("pkill: {killed}"),
        })
    }

    /// Everybody leaves.
    async fn end(&mut self) -> Result<()> {
        for (held, viewer) in std::mem::take(&mut self.live) {
            drop(viewer);
            held.destroyed(&self.orchestrator).await?;
        }
        Ok(())
    }
}
