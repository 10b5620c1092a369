//! Orchestrators that are killed at a point of their own program (`orchestrator/src/failpoints.rs`), before or after a call
//! that leaves it or a commit, and what becomes of the desktops that they were making, keeping or removing.
//!
//! # What is shown of each death
//! * The orchestrator dies there, by SIGKILL, and another is started in its place.
//! * What was asked for becomes true: the session ends as it would have, and a person who was given a desktop keeps that very one
//!   until they leave; on a real machine their connection does not break.
//! * Nothing is left: of a machine here and on the site, of an account in the domain, of a row in the database.

use crate::caller::Caller;
use crate::lab::{Database, Lab, Orchestrator, Provider, until};
use crate::realm::Realm;
use crate::sessions::{END, Held, READY};
use crate::site::Site;
use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, stream};
use mayfly_api::{
    CreateSession, DesktopName, Heartbeat, Keep, RdpClientState, Session, SessionId, SessionPhase,
    StageName,
};
use mayfly_postgres::Cluster;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// So many deaths at the same point, at most: a desktop that is watched passes some again and again.
const TIMES: u32 = 2;

/// Nobody beats for a session here, and making a desktop takes long on a busy machine.
const PATIENT: &str = "lease_s = 1800";

macro_rules! quick {
    ($fault:literal) => {
        concat!(
            "create_ms = 100\nboot_ms = 100\nconfigure_ms = 100\ndestroy_ms = 100\nevidence_ms = 100\n",
            $fault
        )
    };
}

/// Where orchestrators die.
#[derive(Debug)]
pub struct Place {
    /// What makes the desktops, and of what.
    pub provider: String,
    /// Where the orchestrator is.
    pub lab: Lab,
    /// It.
    pub orchestrator: Orchestrator,
    /// Its database.
    pub database: Database,
    /// Where its desktops are; none: on this machine.
    pub site: Option<Site>,
    /// The domain of its template, if that is of one.
    pub realm: Option<Realm>,
}

impl Place {
    /// One whose desktops are on this machine, and whose database is on that server, if there is one.
    ///
    /// # Errors
    /// When the orchestrator does not come up.
    pub async fn here(
        name: &str,
        provider: &Provider,
        limits: &str,
        server: Option<&Cluster>,
    ) -> Result<Self> {
        let lab = Lab::new(name)?;
        let limits = format!("{PATIENT}\n{limits}");
        let database = Database::new(&lab, server).await?;
        let orchestrator = Orchestrator::start_on(&lab, provider, &limits, &database).await?;
        Ok(Self {
            provider: match provider {
                Provider::Qemu(_) => "qemu".to_owned(),
                _ => "simulated".to_owned(),
            },
            lab,
            orchestrator,
            database,
            site: None,
            realm: None,
        })
    }

    /// One whose desktops are on a site; those of its first template are members of the domain, if there is one.
    ///
    /// # Errors
    /// When the orchestrator does not come up.
    pub async fn on_a_site(name: &str, site: Site, realm: Option<Realm>) -> Result<Self> {
        let lab = Lab::new(name)?;
        let mut sections = site.configuration()?;
        if let Some(realm) = &realm {
            sections = format!("domain = true\n{sections}{}", realm.configuration());
        }
        let provider = Provider::Terraform(sections);
        let orchestrator = Orchestrator::start(&lab, &provider, PATIENT).await?;
        Ok(Self {
            provider: "terraform".to_owned(),
            lab,
            orchestrator,
            database: Database::default(),
            site: Some(site),
            realm,
        })
    }

    async fn nothing_is_left(&mut self) -> Result<()> {
        if let Some(site) = &mut self.site {
            site.nothing_is_left(&self.lab).await?;
        }
        if let Some(realm) = &self.realm {
            let accounts = realm.accounts()?;
            ensure!(accounts.is_empty(), "the domain has {accounts:?}");
        }
        self.lab.nothing_is_left()?;
        self.database.nothing_is_owned(&self.lab).await
    }
}

/// What happens to the desktop whose orchestrator dies on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Somebody asks for it, uses it, and is done. Their connection counts after no more than a TLS handshake.
    Used,
    /// The same where a connection needs more than that to count: nobody comes.
    Unused,
    /// A person works on it when the orchestrator starts that is to die. Their launcher holds it; they leave, and come back.
    Working,
    /// It is to be a member of a domain, and is not wanted any more before it is one.
    Joining,
    /// It has the only place, and two wait; the first of them leaves.
    Waiting,
    /// An administrator has the orchestrator drain; one waits.
    Drained,
    /// A person works on it while the orchestrator is stopped in order, where it has a lease to give back.
    Stopped,
    /// It cannot be made.
    Failing,
    /// Nobody owns it.
    Unowned,
    /// Nobody owns it, and it has a higher number than the database ever gave: that is an older copy.
    Restored,
    /// It could not be removed; an administrator has that tried again.
    Stuck,
}

impl Life {
    /// Those of pretended machines.
    pub const PRETENDED: [Self; 8] = [
        Self::Used,
        Self::Working,
        Self::Waiting,
        Self::Drained,
        Self::Failing,
        Self::Unowned,
        Self::Restored,
        Self::Stuck,
    ];

    /// The others of those, where orchestrators share a database.
    pub const SHARED: [Self; 1] = [Self::Stopped];

    /// The points of this life that are meant: all, or those that others do not have.
    fn has(self, point: &str) -> bool {
        let own: &[&str] = match self {
            Self::Used | Self::Unused | Self::Working => return true,
            Self::Joining => &[" account "],
            Self::Waiting => &["commit renumber", ", no desktop"],
            Self::Drained => &[" drain", ", no desktop"],
            Self::Stopped => &["commit leave"],
            Self::Failing => &[" words", "commit failed,"],
            Self::Unowned => &[" reap"],
            Self::Restored => &["commit resume"],
            Self::Stuck => &["commit ending,", "commit ended,", "receipt", " destroy"],
        };
        own.iter().any(|part| point.contains(part))
    }

    /// Pretended machines for it, that are made and gone in a moment; the database is on that server, if there is one.
    ///
    /// # Errors
    /// When the orchestrator does not come up.
    pub async fn pretended(self, server: Option<&Cluster>) -> Result<Place> {
        let limits = match self {
            Self::Waiting | Self::Drained => "max_desktops = 1",
            _ => "",
        };
        let provider = Provider::SimulatedWith(match self {
            Self::Failing => quick!("fault = \"agent_fails\""),
            Self::Stuck => quick!("fault = \"destroy_fails\""),
            _ => quick!(""),
        });
        Place::here("deaths", &provider, limits, server).await
    }
}

/// Machines that cannot be removed, and that can at the second attempt of a process.
const REFUSING: &str = "fault = \"destroy_fails\"";
const RELUCTANT: &str = "fault = \"destroy_fails\"\nfault_count = 1";
/// After so many attempts to remove it, each later than the one before, a desktop is stuck.
const STUCK: Duration = Duration::from_secs(240);

/// What a death led to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Death {
    /// Where it died, such as `after create#1`: the first time that this was passed.
    pub point: String,
    /// In which life.
    pub life: Life,
    /// What makes the desktops.
    pub provider: String,
    /// What has the database.
    pub store: String,
    /// From the death to the end of the session, its desktop and everything of it; nothing if the point was not passed this time.
    pub ms: Option<u64>,
    /// What was left, or went wrong.
    pub leftovers: Vec<String>,
}

/// Every point that an orchestrator passes in that life, as it is to be told where to die; those of calls that only read last.
///
/// # Errors
/// When the desktop is not made or not removed.
pub async fn points(place: &mut Place, life: Life) -> Result<Vec<String>> {
    let file = place.lab.path("points");
    let told = file.to_str().context("a path of text")?;
    let mut story = Story::new(place, None);
    story.tell(life, ("MAYFLY_POINTS", told)).await?;
    let passed = story.passed;
    std::fs::remove_file(&file)?;
    let mut times: BTreeMap<&str, u32> = BTreeMap::new();
    for point in passed.lines().filter(|point| life.has(point)) {
        *times.entry(point).or_default() += 1;
    }
    ensure!(
        !times.is_empty(),
        "no point was passed; is this a debug build?"
    );
    let numbered = times
        .iter()
        .flat_map(|(point, times)| (1..=TIMES.min(*times)).map(move |n| format!("{point}#{n}")));
    let mut numbered: Vec<_> = numbered.collect();
    numbered.sort_by_key(|point| point.contains(" GET "));
    Ok(numbered)
}

/// One such life, whose orchestrator dies at that point.
pub async fn at(place: &mut Place, life: Life, point: String) -> Death {
    let mut story = Story::new(place, Some(&point));
    let outcome = story.tell(life, ("MAYFLY_DIE_AT", &point)).await;
    let ms = story
        .died
        .map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
    let death = Death {
        point,
        life,
        provider: place.provider.clone(),
        store: place.database.kind().to_owned(),
        ms,
        leftovers: outcome
            .err()
            .map(|e| format!("{e:#}"))
            .into_iter()
            .collect(),
    };
    println!("{}", serde_json::to_string(&death).unwrap_or_default());
    death
}

/// Those deaths, so many at once, each row of them in a place of its own; another in place of one where something was left.
///
/// # Errors
/// When a place cannot be made.
pub async fn all(
    make: impl AsyncFn() -> Result<Place>,
    life: Life,
    points: Vec<String>,
    at_once: usize,
) -> Result<Vec<Death>> {
    let points = std::sync::Mutex::new(points.into_iter());
    let rows = stream::iter(0..at_once).map(async |_| {
        let mut deaths: Vec<Death> = Vec::new();
        let mut place = None;
        loop {
            let Some(point) = points.lock().ok().and_then(|mut points| points.next()) else {
                return anyhow::Ok(deaths);
            };
            // Terraform is readied once for a state folder.
            let used = place.take().filter(|_| !point.contains(" init#"));
            let mut here = match used {
                Some(place) => place,
                None => make().await?,
            };
            let death = at(&mut here, life, point).await;
            if death.leftovers.is_empty() {
                place = Some(here);
            }
            deaths.push(death);
        }
    });
    let rows: Vec<_> = rows.buffer_unordered(at_once).collect().await;
    let rows: Result<Vec<_>> = rows.into_iter().collect();
    Ok(rows?.into_iter().flatten().collect())
}

/// Fails if after one of them something was left.
///
/// # Errors
/// With these.
pub fn nothing_was_left(deaths: &[Death]) -> Result<()> {
    let bad: Vec<_> = deaths.iter().filter(|d| !d.leftovers.is_empty()).collect();
    ensure!(bad.is_empty(), "{}", serde_json::to_string_pretty(&bad)?);
    Ok(())
}

/// So many of the points, others for each commit, so that all have their turn.
#[must_use]
pub fn some(points: Vec<String>, count: usize) -> Vec<String> {
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let commit = head.map(|o| o.stdout).unwrap_or_default();
    let mut drawn: Vec<_> = points
        .into_iter()
        .map(|point| (Sha256::digest([&commit, point.as_bytes()].concat()), point))
        .collect();
    drawn.sort();
    drawn
        .into_iter()
        .map(|(_, point)| point)
        .take(count)
        .collect()
}

/// One life, told to its end, through a death.
struct Story<'a> {
    place: &'a mut Place,
    /// It dies in any case: what is passed for the first time in one run is passed in all. For the second time: maybe.
    must_die: bool,
    died: Option<Instant>,
    /// What was passed in the part of the life that is meant.
    passed: String,
    /// The desktops that people were given.
    given: BTreeMap<SessionId, DesktopName>,
    /// A desktop that nobody owns: its number is never given again.
    unowned: Option<DesktopName>,
    /// Their connection, and whether it was made after the death.
    caller: Option<(Caller, bool)>,
}

impl<'a> Story<'a> {
    fn new(place: &'a mut Place, die_at: Option<&str>) -> Self {
        Self {
            place,
            must_die: die_at.is_some_and(|point| point.ends_with("#1")),
            died: None,
            passed: String::new(),
            given: BTreeMap::new(),
            unowned: None,
            caller: None,
        }
    }

    async fn tell(&mut self, life: Life, told: (&str, &str)) -> Result<()> {
        self.stop().await?;
        let there = self.before(life).await?;
        if life == Life::Stuck {
            self.change(REFUSING, RELUCTANT)?;
        }
        self.place.orchestrator.start_told(&self.place.lab, told)?;
        if !self.is_real() {
            self.caller = None;
        }
        self.lived(life, &there, told).await?;
        self.part(told).await?;
        let mut left = None;
        let nothing = until("nothing is left", END, async || {
            left = self.place.nothing_is_left().await.err();
            Ok(left.is_none().then_some(()))
        });
        let nothing = nothing.await;
        nothing.with_context(|| left.map(|left| format!("{left:#}")).unwrap_or_default())
    }

    /// What is there when the orchestrator starts that is to die: sessions, the first with a desktop.
    async fn before(&mut self, life: Life) -> Result<Vec<Held>> {
        let wish = CreateSession::default();
        let waiting = match life {
            Life::Used | Life::Unused | Life::Joining | Life::Failing => return Ok(Vec::new()),
            Life::Working | Life::Stopped | Life::Unowned | Life::Restored => 0,
            Life::Drained => 1,
            Life::Waiting => 2,
            Life::Stuck => {
                self.change(RELUCTANT, REFUSING)?;
                0
            }
        };
        self.place.orchestrator.start_again(&self.place.lab).await?;
        let mut there = vec![self.ask(&wish).await?];
        let ready = self.until(&there[0], "it is ready", is_usable).await?;
        let name = ready.desktop.context("a desktop")?;
        for _ in 0..waiting {
            there.push(self.ask(&wish).await?);
        }
        match life {
            Life::Working | Life::Stopped => self.connect(&there[0]).await?,
            Life::Unowned | Life::Restored => {
                let file = std::fs::read(self.machine(name))?;
                self.end(&there.remove(0)).await?;
                // A machine that runs and that an older copy does not know is left alone.
                let mut machine: serde_json::Value = serde_json::from_slice(&file)?;
                machine["dead"] = "its power failed".into();
                let higher = if life == Life::Restored { 1000 } else { 0 };
                let name = DesktopName::from_number(name.number() + higher).context("a name")?;
                std::fs::write(self.machine(name), machine.to_string())?;
                self.unowned = Some(name);
            }
            Life::Stuck => {
                let Place { orchestrator, .. } = &self.place;
                let Held { id, secret } = &there[0];
                orchestrator.client().destroy(*id, secret).await?;
                until("it is stuck", STUCK, async || {
                    let Place {
                        orchestrator, lab, ..
                    } = &self.place;
                    let said = orchestrator.administer(lab, &["list", "--stuck"])?;
                    Ok(said.contains(&name.to_string()).then_some(()))
                })
                .await?;
            }
            _ => {}
        }
        self.stop().await?;
        Ok(there)
    }

    /// Also one that is still told to die, and does.
    async fn stop(&mut self) -> Result<()> {
        let stopped = self.place.orchestrator.stop().await;
        let ended = self.place.orchestrator.process().poll()?;
        stopped.or_else(|error| ended.map(drop).ok_or(error))
    }

    async fn lived(&mut self, life: Life, there: &[Held], told: (&str, &str)) -> Result<()> {
        let wish = CreateSession::default();
        match (life, there) {
            (Life::Working, [held]) => {
                self.work(held).await?;
                self.part(told).await?;
                self.ends(held).await
            }
            (Life::Stopped, [held]) => {
                self.connect(held).await?;
                self.stop().await?;
                let status = self.place.orchestrator.process().poll()?;
                if status.is_some_and(was_killed) {
                    self.died = Some(Instant::now());
                }
                self.caller = None;
                self.place.orchestrator.start_again(&self.place.lab).await?;
                self.connect(held).await?;
                self.part(told).await?;
                self.ends(held).await
            }
            (Life::Waiting, [first, second, third]) => {
                self.ends(second).await?;
                let next = |s: &Session| s.queue_position == Some(1);
                self.until(third, "it is the next", next).await?;
                self.part(told).await?;
                self.ends(first).await?;
                self.until(third, "it is ready", is_usable).await?;
                self.ends(third).await
            }
            (Life::Drained, [first, second]) => {
                self.administer(&["drain", "--end"]).await?;
                let told_so = self.over(second).await?;
                ensure!(told_so.phase == SessionPhase::Failed, "{told_so:?}");
                self.over(first).await?;
                self.part(told).await?;
                self.administer(&["drain", "--off"]).await
            }
            (Life::Stuck, [held]) => {
                self.patiently("an administrator had it tried again", END, async |story| {
                    let session = story.look(held).await?;
                    if session.phase.is_final() {
                        return Ok(Some(()));
                    }
                    let name = session.desktop.context("a desktop")?.to_string();
                    let Place {
                        orchestrator, lab, ..
                    } = &*story.place;
                    // Refused while it is tried already.
                    let _ = orchestrator.administer(lab, &["resolve", &name, "--retry"]);
                    Ok(None)
                })
                .await?;
                self.ends(held).await
            }
            (Life::Unowned | Life::Restored, []) => {
                let folder = self.place.lab.path("state/simulated");
                until("the reaper removed it", END, async || {
                    self.tend().await?;
                    let left = std::fs::read_dir(&folder)?.count();
                    Ok((left == 0).then_some(()))
                })
                .await?;
                self.part(told).await?;
                let held = self.ask(&wish).await?;
                let ready = self.until(&held, "it is ready", is_usable).await?;
                let (name, unowned) = (ready.desktop, self.unowned);
                ensure!(name > unowned, "{name:?} was made after {unowned:?}");
                self.ends(&held).await
            }
            (Life::Failing, []) => {
                let held = self.ask(&wish).await?;
                let failed = self.over(&held).await?;
                ensure!(failed.phase == SessionPhase::Failed, "{failed:?}");
                Ok(())
            }
            (Life::Joining, []) => {
                let user = Some("alice".to_owned());
                let held = self.ask(&CreateSession { user, ..wish }).await?;
                let configuring = |s: &Session| {
                    s.stages.iter().any(|s| s.name == StageName::Configuring) || s.phase.is_final()
                };
                self.until(&held, "it is being configured", configuring)
                    .await?;
                // The smallest machine cannot join a domain, and may have said so by then.
                self.end(&held).await.map(drop)
            }
            (life, _) => {
                let held = self.ask(&wish).await?;
                if life == Life::Used {
                    self.connect(&held).await?;
                } else {
                    self.until(&held, "it is ready", is_usable).await?;
                }
                self.ends(&held).await
            }
        }
    }

    /// The end of the part that is meant: by now it has died.
    async fn part(&mut self, (name, value): (&str, &str)) -> Result<()> {
        if name == "MAYFLY_POINTS" && self.passed.is_empty() {
            self.passed = std::fs::read_to_string(value).context("what was passed")?;
        }
        if self.must_die {
            until("it dies", END, async || {
                self.tend().await?;
                Ok(self.died)
            })
            .await?;
        }
        self.tend().await
    }

    /// Their connection goes on without an orchestrator.
    fn is_real(&self) -> bool {
        self.place.provider != "simulated"
    }

    /// Starts another orchestrator if it died.
    async fn tend(&mut self) -> Result<()> {
        let Some(status) = self.place.orchestrator.process().poll()? else {
            return Ok(());
        };
        if self.died.is_some() || !was_killed(status) {
            bail!("the orchestrator ended by itself: {status}");
        }
        self.died = Some(Instant::now());
        self.place.orchestrator.start_again(&self.place.lab).await
    }

    /// Asks again until somebody answers.
    async fn patiently<T>(
        &mut self,
        what: &str,
        bound: Duration,
        mut ask: impl AsyncFnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut said = None;
        let done = until(what, bound, async || {
            self.tend().await?;
            match ask(self).await {
                Ok(answer) => Ok(answer),
                Err(error) if error.is::<Broken>() => Err(error),
                Err(error) => {
                    said = Some(error);
                    Ok(None)
                }
            }
        });
        let done = done.await;
        done.with_context(|| said.map(|said| format!("{said:#}")).unwrap_or_default())
    }

    async fn ask(&mut self, wish: &CreateSession) -> Result<Held> {
        let key = SessionId::new().to_string();
        self.patiently("a session is accepted", END, async |story| {
            let created = story.place.orchestrator.client().create(wish, &key).await?;
            Ok(Some(Held {
                id: created.session.id,
                secret: created.secret,
            }))
        })
        .await
    }

    /// The session, in which nobody has another desktop than they were given.
    async fn look(&mut self, held: &Held) -> Result<Session> {
        let session = held.get(&self.place.orchestrator).await?;
        if let Some(given) = self.given.get(&held.id)
            && session.desktop.is_some_and(|now| now != *given)
        {
            return Err(Broken(format!("{given} was given: {session:?}")).into());
        }
        if let Some(name) = session.desktop.filter(|_| session.phase.is_usable()) {
            self.given.insert(held.id, name);
        }
        Ok(session)
    }

    async fn until(
        &mut self,
        held: &Held,
        what: &str,
        wanted: impl Fn(&Session) -> bool,
    ) -> Result<Session> {
        let mut seen = None;
        let found = self.patiently(what, READY, async |story| {
            let session = story.look(held).await?;
            let good = wanted(&session);
            if !good && session.phase.is_final() {
                return Err(Broken(format!("it is over: {session:?}")).into());
            }
            seen = Some(session.clone());
            Ok(good.then_some(session))
        });
        let found = found.await;
        found.with_context(|| format!("the session is {seen:?}"))
    }

    /// The person is connected, by the connection that they had if that can be.
    async fn connect(&mut self, held: &Held) -> Result<()> {
        self.patiently("the person is connected", READY, async |story| {
            let session = story.look(held).await?;
            if session.phase.is_final() {
                return Err(Broken(format!("it is over: {session:?}")).into());
            }
            let (died, real) = (story.died.is_some(), story.is_real());
            // A pretended machine's connections die with its orchestrator.
            story.caller.take_if(|(_, later)| *later != died && !real);
            if story.caller.is_none() && session.phase.is_usable() {
                story.caller = Some((held.call(&story.place.orchestrator).await?, died));
            }
            if session.phase != SessionPhase::Connected {
                return Ok(None);
            }
            let there = match &mut story.caller {
                Some((caller, _)) => caller.still_there().await,
                None => return Ok(None),
            };
            let broken = |error| Broken(format!("{error:#}: {session:?}")).into();
            there.map(Some).map_err(broken)
        })
        .await
    }

    /// What whoever is at a desktop has its orchestrator do: it is held, they leave, they come back.
    async fn work(&mut self, held: &Held) -> Result<()> {
        self.connect(held).await?;
        let keep = Keep { seconds: 600 };
        let client = RdpClientState::Running;
        let beat = Heartbeat { client };
        self.patiently("its launcher is heard", END, async |story| {
            let client = story.place.orchestrator.client();
            client.heartbeat(held.id, &held.secret, beat).await?;
            client.keep(held.id, &held.secret, keep).await?;
            Ok(Some(()))
        })
        .await?;
        self.connect(held).await?;
        self.caller = None;
        let left = |s: &Session| s.phase == SessionPhase::Disconnected;
        self.until(held, "it is seen that they left", left).await?;
        self.connect(held).await
    }

    /// They are done, and that is all.
    async fn ends(&mut self, held: &Held) -> Result<()> {
        let ended = self.end(held).await?;
        ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
        Ok(())
    }

    /// They are done.
    async fn end(&mut self, held: &Held) -> Result<Session> {
        self.patiently("the session is over", 2 * END, async |story| {
            let session = story.look(held).await?;
            if session.phase.is_final() {
                return Ok(Some(session));
            }
            // Said again after a death before it was written down.
            if session.phase != SessionPhase::Ending {
                let client = story.place.orchestrator.client();
                client.destroy(held.id, &held.secret).await?;
            }
            Ok(None)
        })
        .await
    }

    /// It ends by itself.
    async fn over(&mut self, held: &Held) -> Result<Session> {
        self.patiently("the session is over", 2 * END, async |story| {
            let session = story.look(held).await?;
            Ok(session.phase.is_final().then_some(session))
        })
        .await
    }

    /// An administrator says something until it is answered.
    async fn administer(&mut self, words: &[&str]) -> Result<()> {
        self.patiently("an administrator is answered", END, async |story| {
            let Place {
                orchestrator, lab, ..
            } = &*story.place;
            orchestrator.administer(lab, words).map(|_| Some(()))
        })
        .await
    }

    /// The file of a pretended machine.
    fn machine(&self, name: DesktopName) -> PathBuf {
        self.place.lab.path(&format!("state/simulated/{name}.json"))
    }

    /// Another configuration, for the next start.
    fn change(&self, from: &str, to: &str) -> Result<()> {
        let file = self.place.lab.path("config/orchestrator.toml");
        let text = std::fs::read_to_string(&file)?;
        Ok(std::fs::write(file, text.replace(from, to))?)
    }
}

fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(Signal::SIGKILL as i32)
}

/// Something that must not be, and will not pass.
#[derive(Debug)]
struct Broken(String);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

fn is_usable(session: &Session) -> bool {
    session.phase.is_usable()
}
