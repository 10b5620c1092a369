//! `cargo xtask soak`: every kill point, ten desktops at once, a long chaos and the join of a domain, all on the real desktop image;
//! a plain template, of which Ansible makes the same; and orchestrators killed at every point of their program, on every kind of machine.
//!
//! What `tests/tests/micro_guest.rs` shows in every test run on the micro guest is shown here on the desktop that people get.
//! Writes `soak.json` to `$MAYFLY_REPORTS`: each point, on what, how long it took to converge, and what was left (nothing, or the
//! run fails). The chaos is drawn from a seed, which the report names and `--seed` repeats. `--only PART` runs a part alone.

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use mayfly_api::{EndReason, Session, SessionPhase, StageName};
use mayfly_postgres::Cluster;
use mayfly_tests::deaths::{self, Death, Life};
use mayfly_tests::kills::{self, Scene};
use mayfly_tests::lab::{Desk, Lab, Orchestrator, Process, Provider, image_folder, until};
use mayfly_tests::realm::Realm;
use mayfly_tests::sessions::{END, Held};
use mayfly_tests::site::{FIRST_VM_ID, Site, in_own_network};
use mayfly_tests::{machine, plain};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
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
    /// Only this part
    #[arg(long)]
    only: Option<Part>,
    /// Where soak.json goes; given by `cargo xtask soak`
    #[arg(long)]
    reports: Option<PathBuf>,
    /// The commit that is tested; given by `cargo xtask soak`
    #[arg(long)]
    commit: Option<String>,
    /// A part on the PVE lab, in a network of its own; its points and deaths go to this file
    #[arg(long, hide = true, requires = "only")]
    on_site: Option<PathBuf>,
}

/// A part of the soak. In this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Cancels, kills and many at once, on this machine
    Here,
    /// The same on the PVE lab, and Terraform killed
    Site,
    /// People come and go, and everything that can be killed is
    Chaos,
    /// A plain cloud-init template on the PVE lab, configured by Ansible
    Plain,
    /// The join of a domain: converge, idempotence, verification
    Join,
    /// Orchestrators killed at every point of their program, on pretended machines; on SQLite and on PostgreSQL
    DeathsPretended,
    /// The same on the micro guest
    DeathsMicro,
    /// The same on the desktop
    DeathsDesktop,
    /// The same by Terraform on the PVE lab, on the micro guest; accounts in a domain there
    DeathsSite,
}

/// Many desktops at once are ready within this, emulated.
const MANY: Duration = Duration::from_secs(1800);
/// The checks of a join take some minutes, and many more on a busy machine.
const JOIN: Duration = Duration::from_secs(3600);
/// Orchestrators of pretended machines mostly wait.
const PRETENDED_AT_ONCE: usize = 6;
/// A login over RDP shows XFCE within this, emulated, on a busy machine.
const LOGIN: Duration = Duration::from_secs(600);

/// What was shown, and what it took.
#[derive(Debug, Serialize, Deserialize)]
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
        deaths: Vec::new(),
        join: Value::Null,
        chaos: Value::Null,
    };
    if let Some(file) = &args.on_site {
        let outcome = soak.on_site(&args).await;
        std::fs::write(file, serde_json::to_string(&(&soak.points, &soak.deaths))?)?;
        return outcome;
    }
    let machine = machine::facts()?;
    let outcome = soak.run(&args, seed).await;
    let report = json!({
        "ok": outcome.is_ok(),
        "error": outcome.as_ref().err().map(|error| format!("{error:#}")),
        "commit": args.commit,
        "machine": machine,
        "seed": seed,
        "points": soak.points,
        "deaths": soak.deaths,
        "join": soak.join,
        "chaos": soak.chaos,
    });
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("soak.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{}", path.display());
    outcome
}

/// Where desktops are made, and what is asked whether anything is left.
struct Place {
    lab: Lab,
    orchestrator: Orchestrator,
    /// None: on this machine.
    site: Option<Site>,
}

impl Place {
    async fn on_this_machine(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let provider = Provider::Qemu(image_folder("MAYFLY_DESKTOP_IMAGE")?);
        let orchestrator = Orchestrator::start(&lab, &provider, LIMITS).await?;
        Ok(Self {
            lab,
            orchestrator,
            site: None,
        })
    }

    async fn on_a_site(name: &str, limits: &str, changes: Value) -> Result<Self> {
        let site = Site::start(&image_folder("MAYFLY_DESKTOP_IMAGE")?, changes)?;
        let lab = Lab::new(name)?;
        // Four desktops boot at once on two emulated processors.
        let provider = Provider::Terraform(site.waiting(300)?);
        let orchestrator = Orchestrator::start(&lab, &provider, limits).await?;
        Ok(Self {
            lab,
            orchestrator,
            site: Some(site),
        })
    }

    fn scene(&mut self) -> Result<Scene<'_>> {
        Ok(Scene {
            site: self.site.as_mut().context("a site")?,
            lab: &self.lab,
            orchestrator: &mut self.orchestrator,
        })
    }

    fn nothing_is_left(&mut self) -> Result<()> {
        if let Some(site) = &mut self.site {
            let machines = site.machines()?;
            ensure!(machines.is_empty(), "the site has {machines:?}");
        }
        self.lab.nothing_is_left()
    }
}

/// Whoever leaves is followed soon; nobody beats for a session here, and the last of ten waits for minutes.
const LIMITS: &str = "idle_s = 20\nlease_s = 3600";

struct Soak {
    points: Vec<Point>,
    deaths: Vec<Death>,
    /// The checks of `tests/ad-lab/verify.py`.
    join: Value,
    chaos: Value,
}

impl Soak {
    async fn run(&mut self, args: &Args, seed: u64) -> Result<()> {
        for part in Part::value_variants() {
            if args.only.is_some_and(|only| only != *part) {
                continue;
            }
            match part {
                Part::Here => self.here(args.desktops).await,
                Part::Site | Part::Plain | Part::DeathsSite => self.elsewhere(args, *part),
                Part::DeathsPretended => {
                    let server = tokio::task::spawn_blocking(|| Cluster::start(None)).await?;
                    let shared = [&Life::PRETENDED[..], &Life::SHARED].concat();
                    for (server, lives) in [(None, &Life::PRETENDED[..]), (Some(&server), &shared)]
                    {
                        self.deaths(lives, PRETENDED_AT_ONCE, async |life| {
                            life.pretended(server).await
                        })
                        .await?;
                    }
                    Ok(())
                }
                Part::DeathsMicro => {
                    self.deaths(&[Life::Used, Life::Working], 1, async |_| {
                        let provider = Provider::Qemu(image_folder("MAYFLY_MICRO_GUEST")?);
                        deaths::Place::here("soak deaths micro", &provider, "", None).await
                    })
                    .await
                }
                Part::DeathsDesktop => {
                    self.deaths(&[Life::Unused], 1, async |_| {
                        let provider = Provider::Qemu(image_folder("MAYFLY_DESKTOP_IMAGE")?);
                        deaths::Place::here("soak deaths desktop", &provider, "", None).await
                    })
                    .await
                }
                Part::Join => self.join().await,
                Part::Chaos => {
                    let length = Duration::from_secs(args.minutes * 60);
                    self.chaos(length, seed).await
                }
            }
            .with_context(|| format!("part {part:?}"))?;
        }
        Ok(())
    }

    async fn here(&mut self, desktops: usize) -> Result<()> {
        self.cancels(Place::on_this_machine("soak cancel").await?)
            .await
            .context("cancel")?;
        self.kills(Place::on_this_machine("soak kill").await?)
            .await
            .context("kill")?;
        self.many(Place::on_this_machine("soak many").await?, desktops)
            .await
            .context("many at once")
    }

    /// Runs [`Soak::on_site`] in a network of its own.
    fn elsewhere(&mut self, args: &Args, part: Part) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("points.json");
        let mut arguments: Vec<OsString> = vec!["--on-site".into(), file.clone().into()];
        let part = part.to_possible_value().context("a part's name")?;
        arguments.extend(["--only".into(), part.get_name().into()]);
        arguments.extend(["--desktops".into(), args.desktops.to_string().into()]);
        let status = in_own_network(folder.path(), &arguments)?.status()?;
        if let Ok(shown) = std::fs::read(&file) {
            let (points, deaths): (Vec<Point>, Vec<Death>) = serde_json::from_slice(&shown)?;
            self.points.extend(points);
            self.deaths.extend(deaths);
        }
        ensure!(status.success(), "{status}");
        Ok(())
    }

    async fn on_site(&mut self, args: &Args) -> Result<()> {
        match args.only {
            Some(Part::Plain) => return self.plain().await,
            Some(Part::DeathsSite) => return self.deaths_on_site().await,
            _ => {}
        }
        self.cancels(Place::on_a_site("soak site cancel", LIMITS, json!({})).await?)
            .await
            .context("cancel")?;
        self.kills(Place::on_a_site("soak site kill", LIMITS, json!({})).await?)
            .await
            .context("kill")?;
        self.kills_at_each_step().await.context("kill")?;
        // More than its storage clones at a time.
        let limits = format!("{LIMITS}\nconcurrent_creates = 4");
        let place = Place::on_a_site("soak site many", &limits, json!({})).await?;
        self.many(place, args.desktops)
            .await
            .context("many at once")
    }

    /// A plain template: Ansible makes a desktop of its machine, which keeps the roles' promises, shows XFCE to a person, is not changed
    /// by a second run, and ends as any other.
    async fn plain(&mut self) -> Result<()> {
        let mut site = Site::start(&image_folder("MAYFLY_PLAIN_TEMPLATE")?, json!({}))?;
        let lab = Lab::new("soak plain")?;
        let provider = Provider::Terraform(plain::configuration(&site)?);
        let orchestrator = Orchestrator::start(&lab, &provider, plain::LIMITS).await?;
        let desk = Desk::start(&lab).await?;
        let since = Instant::now();
        let tell = |what: &str| println!("{:>8.1} s  plain: {what}", since.elapsed().as_secs_f64());
        let held = Held::create(&orchestrator).await?;
        let ready = |s: &Session| s.phase.is_usable() || s.phase.is_final();
        let session = held
            .until(&orchestrator, "it is ready", plain::CONFIGURED * 2, ready)
            .await?;
        ensure!(session.phase == SessionPhase::Ready, "{session:?}");
        let configured = since.elapsed().as_secs();
        tell("Ansible made a desktop of it");

        let vmid = FIRST_VM_ID + session.desktop.context("a desktop")?.number();
        let client = orchestrator.client();
        let user = client.credentials(held.id, &held.secret).await?.user;
        let promises = plain::verify(&mut site, vmid, &user)?;
        tell("it keeps the roles' promises");
        let mut viewer = held.view(&lab, &desk, &orchestrator).await?;
        until("XFCE runs", LOGIN, async || {
            viewer.must_run()?;
            let line = format!("pgrep -u {user} -x xfce4-panel || true");
            Ok((!site.shell(vmid, &line)?.is_empty()).then_some(()))
        })
        .await?;
        let still = Duration::from_secs(3);
        let picture = desk.screen().still_picture(500, still, LOGIN).await?;
        std::fs::create_dir_all(Lab::reports())?;
        picture.save(&Lab::reports().join("plain.png"))?;
        tell("XFCE is on the screen");

        let again = Instant::now();
        let address = session.rdp.context("ready without an address")?.address;
        let changed = plain::run_again(&mut site, &lab, vmid, address.ip()).await?;
        // Of a version that is newer than the machine's: what makes the roles run again.
        ensure!(changed == ["Leave the stamp"], "{changed:?}");
        let again = again.elapsed().as_secs();
        tell("the playbook's second run changed nothing");

        viewer.crash().await?;
        let left = |s: &Session| s.phase == SessionPhase::Disconnected || s.phase.is_final();
        held.until(&orchestrator, "it is seen that nobody is there", END, left)
            .await?;
        let ended = held.ended(&orchestrator).await?;
        ensure!(
            (ended.phase, ended.end_reason) == (SessionPhase::Ended, Some(EndReason::Idle)),
            "{ended:?}"
        );
        let mut place = Place {
            lab,
            orchestrator,
            site: Some(site),
        };
        let point = format!(
            "a plain template, configured by Ansible after {configured} s, keeps {promises} promises and shows XFCE; the playbook's \
             second run took {again} s and changed nothing"
        );
        self.shown(&mut place, &point, since)
    }

    /// `tests/ad-lab/verify.py`, which brings its own network and its own domain.
    async fn join(&mut self) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("checks.json");
        let since = Instant::now();
        let checks = tokio::process::Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("ad-lab/verify.py"))
            .arg("--image")
            .arg(image_folder("MAYFLY_DESKTOP_IMAGE")?)
            .arg("--work")
            .arg(folder.path())
            .arg("--report")
            .arg(&file)
            .kill_on_drop(true)
            .status();
        let outcome = tokio::time::timeout(JOIN, checks).await;
        if let Ok(checks) = std::fs::read(&file) {
            self.join = serde_json::from_slice(&checks)?;
        }
        let status = outcome
            .with_context(|| format!("verify.py did not end within {} s", JOIN.as_secs()))?
            .context("starting python3")?;
        ensure!(status.success(), "verify.py: {status}");
        let checks = self.join.as_array().map_or(0, Vec::len);
        self.points.push(Point {
            point: format!("{checks} checks of the domain join passed"),
            ms: u64::try_from(since.elapsed().as_millis())?,
            leftovers: Vec::new(),
        });
        Ok(())
    }

    /// Everything that is on the site, and in its domain, is the same as in the test run; there are more deaths.
    async fn deaths_on_site(&mut self) -> Result<()> {
        let site = || Site::start(&image_folder("MAYFLY_MICRO_GUEST")?, json!({}));
        self.deaths(&[Life::Used, Life::Working], 1, async |_| {
            deaths::Place::on_a_site("soak deaths site", site()?, None).await
        })
        .await?;
        self.deaths(&[Life::Joining], 1, async |_| {
            let realm = Realm::start()?;
            deaths::Place::on_a_site("soak deaths domain", site()?, Some(realm)).await
        })
        .await
    }

    /// Each death, before and after every call and every commit of these lives; all of them, also after one that left something.
    async fn deaths(
        &mut self,
        lives: &[Life],
        at_once: usize,
        place: impl AsyncFn(Life) -> Result<deaths::Place>,
    ) -> Result<()> {
        let mut all = Vec::new();
        for life in lives {
            let place = async || place(*life).await;
            let points = deaths::points(&mut place().await?, *life).await?;
            all.extend(deaths::all(place, *life, points, at_once).await?);
        }
        let outcome = deaths::nothing_was_left(&all);
        self.deaths.extend(all);
        outcome
    }

    fn shown(&mut self, place: &mut Place, point: &str, since: Instant) -> Result<()> {
        let ms = u64::try_from(since.elapsed().as_millis())?;
        let on = if place.site.is_some() {
            "on the PVE lab: "
        } else {
            ""
        };
        println!("{:>8.1} s  {on}{point}", since.elapsed().as_secs_f64());
        let left = place.nothing_is_left();
        let leftovers = left.as_ref().err().map(ToString::to_string);
        self.points.push(Point {
            point: format!("{on}{point}"),
            ms,
            leftovers: leftovers.into_iter().collect(),
        });
        left
    }

    async fn cancels(&mut self, mut place: Place) -> Result<()> {
        for stage in StageName::CREATE {
            let held = Held::create(&place.orchestrator).await?;
            held.reach(&place.orchestrator, stage).await?;
            let since = Instant::now();
            let ended = held.destroyed(&place.orchestrator).await?;
            ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
            self.shown(&mut place, &format!("cancelled in {stage:?}"), since)?;
        }
        Ok(())
    }

    async fn kills(&mut self, mut place: Place) -> Result<()> {
        for stage in StageName::CREATE {
            let held = Held::create(&place.orchestrator).await?;
            held.reach(&place.orchestrator, stage).await?;
            let since = Instant::now();
            place.orchestrator.crash().await?;
            place.orchestrator.start_again(&place.lab).await?;
            held.ready(&place.orchestrator).await?;
            let client = place.orchestrator.client();
            client.destroy(held.id, &held.secret).await?;
            place.orchestrator.crash().await?;
            place.orchestrator.start_again(&place.lab).await?;
            let ended = held.ended(&place.orchestrator).await?;
            ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
            let point = format!("orchestrator killed in {stage:?} and again while it destroys");
            self.shown(&mut place, &point, since)?;
        }
        Ok(())
    }

    /// Each victim killed at each step of a create and of a destroy.
    async fn kills_at_each_step(&mut self) -> Result<()> {
        let changes = kills::changes();
        let mut place = Place::on_a_site("soak site steps", LIMITS, changes).await?;
        for (victim, step) in kills::all() {
            let since = Instant::now();
            place.scene()?.kill(victim, step).await?;
            self.shown(&mut place, &format!("{victim:?} killed at {step:?}"), since)?;
        }
        let since = Instant::now();
        place.scene()?.end().await?;
        self.shown(&mut place, "after these, the reaper looked twice", since)
    }

    async fn many(&mut self, mut place: Place, count: usize) -> Result<()> {
        let since = Instant::now();
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(Held::create(&place.orchestrator).await?);
        }
        let mut addresses = BTreeSet::new();
        for held in &all {
            // The last waits for all others.
            let ready = |s: &Session| s.phase.is_usable() || s.phase.is_final();
            let session = held
                .until(&place.orchestrator, "it is ready", MANY, ready)
                .await?;
            ensure!(session.phase == SessionPhase::Ready, "{session:?}");
            addresses.insert(session.rdp.context("ready without an address")?.address);
            held.call(&place.orchestrator).await?;
        }
        ensure!(
            addresses.len() == count,
            "{count} desktops at {addresses:?}"
        );
        if let Some(site) = &mut place.site {
            let clones = site.order(&json!({"get": ["pve", "most_clones"]}))?;
            ensure!(
                clones.as_u64().is_some_and(|most| (1..=2).contains(&most)),
                "{clones} clones at once"
            );
        }
        let ready = since.elapsed().as_secs();
        for held in &all {
            held.destroyed(&place.orchestrator).await?;
        }
        let point = format!("{count} asked for at once, all ready after {ready} s, destroyed");
        self.shown(&mut place, &point, since)
    }

    async fn chaos(&mut self, length: Duration, seed: u64) -> Result<()> {
        let place = Place::on_this_machine("soak chaos").await?;
        let mut chaos = Chaos {
            random: fastrand::Rng::with_seed(seed),
            desk: Desk::start(&place.lab).await?,
            place,
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
        let Chaos {
            desk, mut place, ..
        } = chaos;
        let point = format!("chaos of {} s", length.as_secs());
        self.shown(&mut place, &point, since)?;
        drop(desk);
        Ok(())
    }
}

/// People come and go, and everything that can be killed is.
struct Chaos {
    random: fastrand::Rng,
    desk: Desk,
    place: Place,
    live: Vec<(Held, Option<Process>)>,
    done: BTreeMap<&'static str, u32>,
}

impl Chaos {
    async fn step(&mut self) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(self.random.u64(0..4000))).await;
        // Whoever has ended makes room.
        let mut live = Vec::new();
        for (held, viewer) in std::mem::take(&mut self.live) {
            if !held.get(&self.place.orchestrator).await?.phase.is_final() {
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
                let held = Held::create(&self.place.orchestrator).await?;
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
                self.place
                    .orchestrator
                    .client()
                    .destroy(held.id, &held.secret)
                    .await?;
                "destroys"
            }
            (14, Some(one)) => self.kill_machine(one).await?,
            (15, _) => {
                self.place.orchestrator.crash().await?;
                self.place.orchestrator.start_again(&self.place.lab).await?;
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
        if held.get(&self.place.orchestrator).await?.phase.is_usable() {
            *viewer = Some(
                held.view(&self.place.lab, &self.desk, &self.place.orchestrator)
                    .await?,
            );
            return Ok("RDP clients opened");
        }
        Ok("looks")
    }

    async fn kill_machine(&mut self, one: usize) -> Result<&'static str> {
        let session = self.live[one].0.get(&self.place.orchestrator).await?;
        let Some(name) = session.desktop else {
            return Ok("looks");
        };
        let folder = self.place.lab.path("machines").join(name.to_string());
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
            held.destroyed(&self.place.orchestrator).await?;
        }
        Ok(())
    }
}
