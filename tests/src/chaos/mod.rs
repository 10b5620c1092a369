//! Chaos: three orchestrators on one PostgreSQL, people who come and go, and everything that can fail does.
//!
//! What must hold is looked at where it would show: on the site that has the machines, in the database, and by the people themselves.
//! The faults, and what each person does, are drawn from a seed. Which call meets which fault is up to the machine's load.
//!
//! With an orchestrator of an older version beside it, all start as that one, with its schema. At a third of the time the schema is
//! brought up to date while they serve; from then on those that start again are of the one version and the other in turn.

mod people;
mod site;
mod toxics;

use crate::lab::{Lab, Process, program, until};
use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use mayfly_api::SessionPhase;
use mayfly_orchestrator::provider::simulated::{Simulated, SimulatedConfig};
use mayfly_orchestrator::provider::site::serve;
use mayfly_orchestrator::replica;
use mayfly_orchestrator::secret::Secrets;
use mayfly_postgres::{Cluster, Stop};
use nix::sys::signal::Signal;
use people::{People, Seen};
use serde::Serialize;
use serde_json::{Value, json};
use site::{Door, Mood, Site};
use sqlx::postgres::{PgPool, PgPoolOptions, PgRow};
use sqlx::{FromRow, Row};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use toxics::Toxics;

/// So many orchestrators.
const ORCHESTRATORS: usize = 3;
/// So many people at once.
const PEOPLE: usize = 24;
/// What an orchestrator that dies was working on is another's within this.
const TAKEN: Duration = Duration::from_secs(45);
/// Longer than a lease.
const FROZEN: Duration = Duration::from_secs(30);
/// Starting and stopping take a second; a busy machine gets this long.
const START: Duration = Duration::from_secs(120);
/// When nothing fails any more, everything is in order within this.
const CALM: Duration = Duration::from_secs(240);

const LIMITS: &str = "idle_s = 5\nlease_s = 30\nnever_connected_s = 60\ncreate_timeout_s = 120\ncreating_timeout_s = 60\n\
    booting_timeout_s = 60\nconfiguring_timeout_s = 60\nconnecting_timeout_s = 60\nconcurrent_creates = 8\nmax_desktops = 40\n\
    max_queued = 1000";

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL; started again once the others have taken over.
    Killed,
    /// SIGKILL; started again at once.
    KilledAndBack,
    /// SIGSTOP for longer than a lease.
    Frozen,
    /// SIGTERM; started again once the others have taken over.
    Stopped,
    /// PostgreSQL is restarted.
    DatabaseRestarted,
    /// PostgreSQL crashes, and recovers.
    DatabaseCrashed,
    /// One orchestrator's way to the database is closed.
    Cut,
    /// Its connections are reset.
    Reset,
    /// They stay, and carry nothing.
    HalfOpen,
    /// They are slow.
    Latency,
    /// They carry little.
    Bandwidth,
    /// The site takes its time.
    SlowSite,
    /// The site does other things than it says.
    LyingSite,
}

/// Each once, in an order that is drawn; then again.
const FAULTS: [Fault; 13] = [
    Fault::Killed,
    Fault::KilledAndBack,
    Fault::Frozen,
    Fault::Stopped,
    Fault::DatabaseRestarted,
    Fault::DatabaseCrashed,
    Fault::Cut,
    Fault::Reset,
    Fault::HalfOpen,
    Fault::Latency,
    Fault::Bandwidth,
    Fault::SlowSite,
    Fault::LyingSite,
];

/// How an orchestrator's sessions became others'.
#[derive(Debug, Serialize)]
struct Takeover {
    fault: String,
    /// What each of its sessions took until it was over, or another's, from the fault on.
    ms: Vec<u64>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether all that must hold did.
    pub ok: bool,
    /// What the faults were drawn from.
    pub seed: u64,
    seconds: u64,
    orchestrators: usize,
    people_at_once: usize,
    faults: BTreeMap<String, u32>,
    /// How often an orchestrator of each version was started.
    starts: BTreeMap<Version, u32>,
    takeovers: Vec<Takeover>,
    takeover_ms: Value,
    site: Value,
    people: Seen,
    /// From the end of the faults until every session was over, and no machine was left.
    converged_ms: Option<u64>,
    /// What was there then and should not.
    pub leftovers: Vec<String>,
    /// What must never have happened.
    pub wrong: Vec<String>,
}

/// Which of two, while a site is upgraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Version {
    /// With which all start, if there is one.
    Older,
    /// That of this repository.
    Newer,
}

/// The programs of the versions.
struct Versions {
    older: Option<PathBuf>,
    newer: PathBuf,
    /// The older one has been alone until now.
    alone: bool,
    last: Version,
    starts: BTreeMap<Version, u32>,
}

impl Versions {
    /// The one to start now.
    fn next(&mut self) -> &Path {
        let (program, version) = match &self.older {
            Some(older) if self.alone || self.last == Version::Newer => (older, Version::Older),
            _ => (&self.newer, Version::Newer),
        };
        self.last = version;
        *self.starts.entry(version).or_default() += 1;
        program
    }

    /// Nothing was shown of an upgrade that did not happen.
    fn wrong(&self) -> Option<String> {
        let both = [Version::Older, Version::Newer];
        let upgraded = both.iter().all(|version| self.starts.contains_key(version));
        (self.older.is_some() && !upgraded)
            .then(|| format!("no two versions were started: {:?}", self.starts))
    }
}

/// Brings the schema to that of the program's version.
async fn migrate(lab: &Lab, program: &Path, config: &Path) -> Result<()> {
    let mut command = lab.command(program);
    command.arg("migrate").arg("--config").arg(config);
    let output = tokio::process::Command::from(command).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", program.display());
    Ok(())
}

/// One of the orchestrators.
struct Orchestrator {
    name: String,
    url: String,
    config: PathBuf,
    /// As the others know it.
    id: String,
    process: Process,
}

impl Orchestrator {
    async fn answers(&mut self, http: &reqwest::Client) -> Result<()> {
        let health = format!("{}/healthz", self.url);
        until("an orchestrator answers", START, async || {
            self.process.must_run()?;
            let answer = http.get(&health).send().await;
            Ok(answer.is_ok_and(|a| a.status().is_success()).then_some(()))
        })
        .await
    }
}

fn start(lab: &Lab, name: &str, config: &Path, program: &Path) -> Result<Process> {
    let mut command = lab.command(program);
    command.arg("serve").arg("--config").arg(config);
    lab.start(name, command)
}

/// The whole scene.
struct Chaos {
    random: Rng,
    all: Vec<Orchestrator>,
    toxics: Arc<Toxics>,
    site: Arc<Site>,
    cluster: Arc<Cluster>,
    db: PgPool,
    http: reqwest::Client,
    faults: BTreeMap<String, u32>,
    versions: Versions,
    takeovers: Vec<Takeover>,
    wrong: Vec<String>,
    /// Faults that last while others come.
    lasting: JoinSet<Result<()>>,
    lab: Lab,
}

/// Runs for so long, then sees whether everything comes to rest; upgraded meanwhile, if there is an orchestrator of an older version.
///
/// # Errors
/// When the scene cannot be set up or torn down; what went wrong in it is in the report.
pub async fn run(seed: u64, length: Duration, older: Option<&Path>) -> Result<Report> {
    let mut chaos = Chaos::start(seed, older).await?;
    let (go, over) = watch::channel(false);
    let urls: Vec<String> = chaos.all.iter().map(|one| one.url.clone()).collect();
    let people = People::new(&urls, over)?;
    let watching = tokio::spawn(look(chaos.db.clone()));
    let (stop, coming) = watch::channel(false);
    let crowd = tokio::spawn(crowd(people.clone(), Rng::with_seed(seed), coming));

    let begin = Instant::now();
    let mut failed = chaos.fail(begin + length / 3, begin + length).await.err();
    let since = Instant::now();
    stop.send_replace(true);
    let _ = go.send(true);
    let mut leftovers = Vec::new();
    let mut converged = None;
    if failed.is_none() {
        match chaos.rest(&people, crowd, &mut leftovers).await {
            Ok(()) => converged = Some(ms(since.elapsed())),
            Err(error) => failed = Some(error),
        }
    }
    let mut wrong = std::mem::take(&mut chaos.wrong);
    watching.abort();
    match watching.await {
        Ok(seen) => wrong.extend(seen),
        Err(error) if error.is_cancelled() => {}
        Err(error) => wrong.push(format!("nobody watched: {error}")),
    }
    wrong.extend(chaos.site.wrong());
    wrong.extend(people.wrong());
    wrong.extend(chaos.versions.wrong());
    wrong.extend(failed.map(|error| format!("{error:#}")));
    let (calls, lies) = chaos.site.told();
    let all: Vec<u64> = chaos.takeovers.iter().flat_map(|t| t.ms.clone()).collect();
    let report = Report {
        ok: wrong.is_empty() && leftovers.is_empty(),
        seed,
        seconds: length.as_secs(),
        orchestrators: ORCHESTRATORS,
        people_at_once: PEOPLE,
        faults: std::mem::take(&mut chaos.faults),
        starts: std::mem::take(&mut chaos.versions.starts),
        takeovers: std::mem::take(&mut chaos.takeovers),
        takeover_ms: figures(all),
        site: json!({"calls": calls, "lies": lies}),
        people: people.seen(),
        converged_ms: converged,
        leftovers,
        wrong,
    };
    Ok(report)
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn figures(mut all: Vec<u64>) -> Value {
    all.sort_unstable();
    json!({"sessions": all.len(), "median": all.get(all.len() / 2), "max": all.last()})
}

/// Somebody new for each who goes, until nobody comes any more; ends when all are gone.
async fn crowd(people: People, mut random: Rng, coming: watch::Receiver<bool>) {
    let mut all = JoinSet::new();
    while !*coming.borrow() {
        while all.len() < PEOPLE {
            let (people, seed) = (people.clone(), random.u64(..));
            all.spawn(people.come(seed));
            sleep(Duration::from_millis(50)).await;
        }
        let mut coming = coming.clone();
        tokio::select! {
            _ = all.join_next() => {}
            () = async { let _ = coming.wait_for(|over| *over).await; } => {}
        }
    }
    while all.join_next().await.is_some() {}
}

/// What the database must show at no moment.
const NEVER: [(&str, &str); 2] = [
    (
        "a session with two desktops",
        "SELECT session_id FROM desktop WHERE phase <> 'gone' GROUP BY session_id HAVING count(*) > 1",
    ),
    (
        "an address of two desktops",
        "SELECT address FROM desktop WHERE phase IN ('ready', 'claimed') GROUP BY address HAVING count(*) > 1",
    ),
];

/// Sessions and events as they must be when all is over.
const AT_THE_END: [(&str, &str); 4] = [
    (
        "events that are missing",
        "SELECT session_id FROM event GROUP BY session_id HAVING min(seq) <> 1 OR max(seq) <> count(*)",
    ),
    (
        "a session without its last event",
        "SELECT id FROM session s WHERE seq <> (SELECT max(seq) FROM event WHERE session_id = s.id)",
    ),
    (
        "a session that is not over",
        "SELECT id FROM session WHERE phase NOT IN ('ended', 'failed')",
    ),
    (
        "a desktop that is not gone",
        "SELECT session_id FROM desktop WHERE phase <> 'gone'",
    ),
];

/// Looks at the database all the time, past all that fails; ends with the first that must never be.
async fn look(db: PgPool) -> Vec<String> {
    loop {
        for (what, query) in NEVER {
            // A database that is being restarted is asked again.
            if let Ok(found) = sqlx::query_scalar::<_, String>(query).fetch_all(&db).await
                && !found.is_empty()
            {
                eprintln!("WRONG: {what}: {found:?}");
                return vec![format!("{what}: {found:?}")];
            }
        }
        sleep(Duration::from_millis(500)).await;
    }
}

impl Chaos {
    async fn start(seed: u64, older: Option<&Path>) -> Result<Self> {
        let lab = Lab::new("chaos")?;
        let port = lab.port(0);
        let cluster =
            Arc::new(tokio::task::spawn_blocking(move || Cluster::start(Some(port))).await?);
        let database = cluster.database().await;
        let name = database.get_database().context("a database")?.to_owned();
        let db = PgPoolOptions::new()
            .max_connections(4)
            .acquire_timeout(Duration::from_secs(10))
            .connect_with(database)
            .await?;
        let password = lab.path("config/password");
        std::fs::write(&password, cluster.password())?;
        std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600))?;
        let toxics = Arc::new(Toxics::start(&lab, lab.port(1)).await?);

        let config = SimulatedConfig {
            create_ms: 150,
            boot_ms: 150,
            configure_ms: 100,
            destroy_ms: 100,
            evidence_ms: 500,
            address_prefix: lab.address_prefix(),
            ..SimulatedConfig::default()
        };
        let site = Site::new(Simulated::open(config, &lab.path("machines"))?, seed);
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(5))
            .build()?;
        let mut chaos = Self {
            random: Rng::with_seed(seed),
            all: Vec::new(),
            toxics,
            site,
            cluster,
            db,
            http,
            faults: BTreeMap::new(),
            versions: Versions {
                older: older.map(Path::to_owned),
                newer: program("mayfly-orchestrator")?,
                alone: older.is_some(),
                last: Version::Older,
                starts: BTreeMap::new(),
            },
            takeovers: Vec::new(),
            wrong: Vec::new(),
            lasting: JoinSet::new(),
            lab,
        };
        for number in 0..ORCHESTRATORS {
            chaos.add(number, &name, &password).await?;
        }
        Ok(chaos)
    }

    /// Starts another orchestrator, with its own way to the database and its own door to the site.
    async fn add(&mut self, number: usize, database: &str, password: &Path) -> Result<()> {
        let (lab, index) = (&self.lab, u16::try_from(number)?);
        let name = format!("orchestrator-{number}");
        let (listen, way) = (lab.port(2 + 2 * index), lab.port(3 + 2 * index));
        self.toxics.way(&name, way, lab.port(0)).await?;
        let door = lab.path(&format!("run/{name}.sock"));
        let served = Door {
            site: self.site.clone(),
            of: number,
        };
        tokio::spawn(serve(Arc::new(served), UnixListener::bind(&door)?));
        let state = lab.path(&format!("data/{name}"));
        std::fs::create_dir(&state)?;
        std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700))?;
        let key = state.join("secret.key");
        if number == 0 {
            Secrets::open(&key)?;
        } else {
            std::fs::copy(lab.path("data/orchestrator-0/secret.key"), &key)?;
        }
        let config = lab.path(&format!("config/{name}.toml"));
        std::fs::write(
            &config,
            format!(
                "listen = \"127.0.0.1:{listen}\"\nstate_dir = {state:?}\n[limits]\n{LIMITS}\n\
                 [store]\nurl = \"postgres://mayfly@127.0.0.1:{way}/{database}\"\npassword_file = {password:?}\n\
                 [[template]]\nname = \"desktop\"\nprovider = \"simulated\"\n\
                 [provider.simulated]\nsite = {door:?}\n"
            ),
        )?;
        let program = self.versions.next();
        if number == 0 {
            migrate(lab, program, &config).await?;
        }
        let mut one = Orchestrator {
            id: replica::id(&state).0,
            url: format!("http://127.0.0.1:{listen}"),
            process: start(lab, &name, &config, program)?,
            name,
            config,
        };
        one.answers(&self.http).await?;
        self.all.push(one);
        Ok(())
    }

    async fn start_again(&mut self, one: usize) -> Result<()> {
        let program = self.versions.next();
        let one = &mut self.all[one];
        one.process = start(&self.lab, &one.name, &one.config, program)?;
        one.answers(&self.http).await
    }

    /// Draws faults until the end, with an upgrade on the way, and waits for the end of the last ones.
    async fn fail(&mut self, upgrade: Instant, end: Instant) -> Result<()> {
        let mut deck = Vec::new();
        while Instant::now() < end {
            if self.versions.alone && Instant::now() > upgrade {
                println!("            the schema is brought up to date");
                migrate(&self.lab, &self.versions.newer, &self.all[0].config).await?;
                self.versions.alone = false;
            }
            if deck.is_empty() {
                deck = FAULTS.to_vec();
                self.random.shuffle(&mut deck);
            }
            let pause = self.random.u64(500..4_000);
            sleep(Duration::from_millis(pause)).await;
            let (fault, one) = (deck.pop(), self.random.usize(0..ORCHESTRATORS));
            let fault = fault.context("a fault")?;
            println!("            {fault:?} {one}");
            *self.faults.entry(format!("{fault:?}")).or_default() += 1;
            self.happen(fault, one)
                .await
                .with_context(|| format!("{fault:?} {one}"))?;
        }
        while let Some(done) = self.lasting.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn happen(&mut self, fault: Fault, one: usize) -> Result<()> {
        let drawn = Duration::from_millis(self.random.u64(2_000..10_000));
        match fault {
            Fault::Killed => {
                let before = self.working(one).await?;
                let since = Instant::now();
                self.all[one].process.crash().await?;
                self.taken(fault, one, before, since).await?;
                self.start_again(one).await
            }
            Fault::KilledAndBack => {
                self.all[one].process.crash().await?;
                self.start_again(one).await
            }
            Fault::Stopped => {
                let before = self.working(one).await?;
                let since = Instant::now();
                self.all[one].process.signal(Signal::SIGTERM)?;
                let status = self.all[one].process.exit(START).await?;
                if !status.success() {
                    self.wrong.push(format!("stopped, it ended with {status}"));
                }
                self.taken(fault, one, before, since).await?;
                self.start_again(one).await
            }
            Fault::Frozen => {
                let before = self.working(one).await?;
                let since = Instant::now();
                self.all[one].process.signal(Signal::SIGSTOP)?;
                let taken = self.taken(fault, one, before, since).await;
                tokio::time::sleep_until(since + FROZEN).await;
                self.all[one].process.signal(Signal::SIGCONT)?;
                taken?;
                self.all[one].answers(&self.http).await
            }
            Fault::DatabaseRestarted => self.restart(Stop::Fast).await,
            Fault::DatabaseCrashed => self.restart(Stop::Immediate).await,
            Fault::Cut => {
                let name = &self.all[one].name;
                self.toxics.open(name, false).await?;
                sleep(drawn).await;
                self.toxics.open(name, true).await
            }
            Fault::Reset => {
                self.poisoned(one, "reset_peer", &json!({"timeout": 0}), drawn)
                    .await
            }
            Fault::HalfOpen => {
                self.poisoned(one, "timeout", &json!({"timeout": 0}), drawn)
                    .await
            }
            Fault::Latency => {
                let attributes = json!({"latency": self.random.u32(20..150), "jitter": 20});
                self.last_poisoned(one, "latency", attributes, 3 * drawn);
                Ok(())
            }
            Fault::Bandwidth => {
                let attributes = json!({"rate": self.random.u32(30..200)});
                self.last_poisoned(one, "bandwidth", attributes, 3 * drawn);
                Ok(())
            }
            Fault::SlowSite => {
                let slow_ms = self.random.u64(500..3_000);
                self.last_in_a_mood(move |mood| mood.slow_ms = slow_ms, 2 * drawn);
                Ok(())
            }
            Fault::LyingSite => {
                let lies = self.random.u8(10..40);
                self.last_in_a_mood(move |mood| mood.lies = lies, 4 * drawn);
                Ok(())
            }
        }
    }

    async fn restart(&self, how: Stop) -> Result<()> {
        let cluster = self.cluster.clone();
        Ok(tokio::task::spawn_blocking(move || cluster.restart(how)).await?)
    }

    async fn poisoned(&self, one: usize, kind: &str, how: &Value, time: Duration) -> Result<()> {
        let name = &self.all[one].name;
        // One toxic at a time on each way.
        let _ = self.toxics.heal(name).await;
        self.toxics.poison(name, kind, how).await?;
        sleep(time).await;
        let _ = self.toxics.heal(name).await;
        Ok(())
    }

    fn last_poisoned(&mut self, one: usize, kind: &'static str, how: Value, time: Duration) {
        let (name, toxics) = (self.all[one].name.clone(), self.toxics.clone());
        self.lasting.spawn(async move {
            let _ = toxics.heal(&name).await;
            toxics.poison(&name, kind, &how).await?;
            sleep(time).await;
            let _ = toxics.heal(&name).await;
            Ok(())
        });
    }

    /// What was changed is as it was when that time is over; what else was changed meanwhile stays.
    fn last_in_a_mood(&mut self, change: impl FnOnce(&mut Mood) + Send + 'static, time: Duration) {
        let (site, mut mood) = (self.site.clone(), Mood::default());
        change(&mut mood);
        self.lasting.spawn(async move {
            site.turn(|is| {
                is.slow_ms = is.slow_ms.max(mood.slow_ms);
                is.lies = is.lies.max(mood.lies);
            });
            sleep(time).await;
            site.turn(|is| {
                if mood.slow_ms > 0 {
                    is.slow_ms = 0;
                }
                if mood.lies > 0 {
                    is.lies = 0;
                }
            });
            Ok(())
        });
    }

    /// What the database says, past all that fails.
    async fn rows<T>(&self, query: &'static str, of: &str) -> Result<Vec<T>>
    where
        T: Send + Unpin + for<'r> FromRow<'r, PgRow>,
    {
        let end = Instant::now() + START;
        loop {
            let query = sqlx::query_as::<_, T>(query).bind(of);
            match query.fetch_all(&self.db).await {
                Ok(rows) => return Ok(rows),
                Err(error) if Instant::now() > end => return Err(error.into()),
                Err(_) => sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// The live sessions that it works for.
    async fn working(&self, one: usize) -> Result<Vec<String>> {
        let query = "SELECT id FROM session WHERE owner = $1 AND phase NOT IN ('ended', 'failed')";
        let rows: Vec<(String,)> = self.rows(query, &self.all[one].id).await?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// Waits until none of the sessions that an orchestrator worked for is its own and alive, and counts how long each took.
    async fn taken(
        &mut self,
        fault: Fault,
        one: usize,
        mut before: Vec<String>,
        since: Instant,
    ) -> Result<()> {
        let mut taken = Vec::new();
        loop {
            let still = self.working(one).await?;
            let at = ms(since.elapsed());
            before.retain(|id| {
                let is = still.contains(id);
                if !is {
                    taken.push(at);
                }
                is
            });
            if before.is_empty() {
                break;
            }
            if since.elapsed() > TAKEN {
                let why = format!("{fault:?} {one}: not taken over within {TAKEN:?}: {before:?}");
                eprintln!("WRONG: {why}");
                self.wrong.push(why);
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
        println!("            taken over: {}", figures(taken.clone()));
        self.takeovers.push(Takeover {
            fault: format!("{fault:?}"),
            ms: taken,
        });
        Ok(())
    }

    /// Nothing fails any more: everybody goes, and everything comes to rest.
    async fn rest(
        &mut self,
        people: &People,
        crowd: tokio::task::JoinHandle<()>,
        leftovers: &mut Vec<String>,
    ) -> Result<()> {
        self.site.turn(|mood| *mood = Mood::default());
        timeout(CALM, crowd)
            .await
            .context("somebody does not get away")??;
        for one in 0..ORCHESTRATORS {
            let tried = people.try_out(one).await;
            tried.with_context(|| format!("by way of orchestrator {one}, after the faults"))?;
        }
        for (id, secret) in people.accepted() {
            let session = people.look(id, &secret).await?;
            ensure!(session.phase.is_final(), "not over: {session:?}");
            ensure!(
                session.phase != SessionPhase::Failed || session.failure.is_some(),
                "failed without a reason: {session:?}"
            );
        }
        // The reaper looks every 30 s, and acts when it has seen a machine twice.
        let end = Instant::now() + CALM;
        loop {
            let left = self.site.machines().await?;
            *leftovers = left.iter().map(|name| format!("machine {name}")).collect();
            if leftovers.is_empty() || Instant::now() > end {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        for (what, query) in AT_THE_END {
            let found: Vec<String> = sqlx::query_scalar(query).fetch_all(&self.db).await?;
            if !found.is_empty() {
                self.wrong.push(format!("{what}: {found:?}"));
            }
        }
        let known: i64 = sqlx::query("SELECT count(*) FROM session")
            .fetch_one(&self.db)
            .await?
            .try_get(0)?;
        println!("            {known} sessions in the database");
        for one in &mut self.all {
            one.process.signal(Signal::SIGTERM)?;
            one.process.exit(START).await?;
        }
        let left = self.lab.leftovers();
        leftovers.extend(left.0);
        Ok(())
    }
}
