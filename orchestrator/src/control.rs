//! The control plane as programs use it: accepts sessions, starts a worker for each, gives out places, reaps.
//!
//! # Guarantees
//! * A session that was accepted has a worker until it is over, also after a restart.
//! * A machine that a provider lists and no live row owns is removed after two sightings.
//! * Where an older copy of the database was put in its place, no machine that it does not know is removed while somebody may use it.

use crate::clock::{Clock, after, between};
use crate::config::{Config, Template};
use crate::desktop::DesktopPhase;
use crate::drain::{self, Drain};
use crate::failpoints::{self, around};
use crate::fresh::Fresh;
use crate::intake::{self, Intake};
use crate::metrics::{Metrics, Reaped};
use crate::provider::{Check, CheckStatus, Extra, MachineState, Provider};
use crate::secret::Secrets;
use crate::session::{Expected, Origin, Record, Wish};
use crate::store::{Accepted, Change, Idempotency, Restored, Store, StoreError};
use crate::vitals::Vitals;
use crate::worker::LIFETIME_MARGIN;
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use mayfly_api::{CreateSession, DesktopName, Problem, ProblemCode, SessionId, SessionPhase};
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// After a desktop found no room, others of its template are tried again this much later, or when one is gone.
const FULL: Duration = Duration::from_secs(30);
/// For so long what desktops took is not asked for again.
const FRESH: Duration = Duration::from_secs(2);
/// So many are told their new place in the queue at a time, and further behind so many at most: each time the queue is counted from
/// its head.
const NUMBERED: u32 = 200;
const NUMBERED_BEHIND: u32 = 1_000;
/// Giving places takes one part in so many of the time at most.
const GIVING_SHARE: u32 = 2;
/// Telling those who wait their places takes one part in so many of the time.
const NUMBERING_SHARE: u32 = 10;
/// The dispatcher looks this often even if nobody wakes it.
const DISPATCH: Duration = Duration::from_secs(5);
/// Of the machines that a provider shows, one in so many is removed in one pass, and so many in any case.
const REAPED_SHARE: usize = 5;
const REAPED_ALWAYS: usize = 3;
/// Pause between two passes of the reaper.
const REAP: Duration = Duration::from_secs(30);
/// A second look at what the first pass of a new process found.
const FIRST_REAP: Duration = Duration::from_secs(2);
/// Sessions that are over are kept this long, for history and estimates.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Who follows which session.
#[derive(Debug, Default)]
pub struct Hub(Mutex<HashMap<SessionId, watch::Sender<u64>>>);

impl Hub {
    fn map(&self) -> MutexGuard<'_, HashMap<SessionId, watch::Sender<u64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes whenever the session changes. A hint: the store is the truth.
    pub fn follow(&self, id: SessionId) -> watch::Receiver<u64> {
        self.map().entry(id).or_default().subscribe()
    }

    /// Nobody follows it any more, or did it for what did not come to be.
    pub(crate) fn leave(&self, id: SessionId) {
        let mut map = self.map();
        if map.get(&id).is_some_and(|s| s.receiver_count() == 0) {
            map.remove(&id);
        }
    }

    fn publish(&self, record: &Record) {
        let mut map = self.map();
        if let Some(sender) = map.get(&record.id) {
            if sender.receiver_count() == 0 {
                map.remove(&record.id);
            } else {
                sender.send_replace(record.seq);
            }
        }
    }
}

/// What workers and the API share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The clock.
    pub clock: Clock,
    /// Every secret comes from here.
    pub secrets: Arc<Secrets>,
    /// Who follows what.
    pub hub: Hub,
    /// What is counted and measured.
    pub metrics: Metrics,
    /// Whether it is alive.
    pub vitals: Vitals,
    /// Whether no new sessions are taken.
    pub drain: Drain,
    /// Wakes the dispatcher.
    pub dispatch: Notify,
    /// Somebody left the queue or came back to it since places were last numbered. Who comes new is told theirs at once.
    moved: AtomicBool,
    /// Takes sessions.
    intake: Intake,
    /// The templates whose desktops can be made.
    can_make: Fresh<()>,
    /// What desktops of a template took lately.
    expected: Fresh<Expected>,
    /// The orchestrator stops; machines go on.
    pub stopping: CancellationToken,
    /// Templates for whose desktops there was no room, and when. This process's own: another finds out likewise.
    full: Mutex<HashMap<String, Timestamp>>,
    /// The providers that have shown all their machines to this process: before, a number that is free here may be taken there.
    shown: Mutex<HashSet<&'static str>>,
    providers: BTreeMap<&'static str, Arc<dyn Provider>>,
}

impl Shared {
    fn full(&self) -> MutexGuard<'_, HashMap<String, Timestamp>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, HashSet<&'static str>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There was no room for a desktop of that template: its sessions wait.
    pub fn found_no_room(&self, template: &str) {
        self.full().insert(template.to_owned(), self.clock.now());
    }

    /// A desktop is gone: there may be room again.
    pub fn room_was_made(&self) {
        self.full().clear();
    }

    /// The templates whose sessions go on waiting.
    fn waiting(&self) -> Vec<String> {
        let now = self.clock.now();
        let mut full = self.full();
        full.retain(|_, at| between(*at, now) < FULL);
        let shown = self.shown();
        let unknown = |t: &&Template| !shown.contains(t.provider.as_str());
        let unknown = self.config.template.iter().filter(unknown);
        let unknown = unknown.map(|t| t.name.clone());
        full.keys().cloned().chain(unknown).collect()
    }

    /// No session that an older copy of the database does not know goes on after this.
    fn spared_until(&self, restored: &Restored) -> Timestamp {
        after(restored.at, self.config.limits.lifetime() + LIFETIME_MARGIN)
    }

    /// The provider of that kind, if one is configured.
    #[must_use]
    pub fn provider(&self, kind: &str) -> Option<Arc<dyn Provider>> {
        self.providers.get(kind).cloned()
    }

    /// The password that the orchestrator gave the person; empty where they have one of their own.
    #[must_use]
    pub fn password_of(&self, record: &Record) -> SecretString {
        let template = self.config.find_template(Some(&record.wish.template));
        if template.is_some_and(|t| t.domain) {
            return SecretString::default();
        }
        self.secrets.password(record.id)
    }

    /// Changes a session and tells who follows it.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn update(
        &self,
        id: SessionId,
        change: impl FnOnce(&mut Record) -> Change + Send + 'static,
    ) -> Result<Option<(Record, Change)>, StoreError> {
        let (now, begun) = (self.clock.now(), Instant::now());
        let before = Arc::new(OnceLock::new());
        let was = before.clone();
        let change = move |record: &mut Record| {
            let _ = was.set(record.phase);
            let changed = change(record);
            if changed != Change::Nothing {
                failpoints::before(|| record.commit());
            }
            changed
        };
        let done = self.store.update(id, now, Box::new(change)).await?;
        self.metrics.stored("update", begun.elapsed());
        if let Some((record, Change::Told | Change::Quiet)) = &done {
            failpoints::after(|| record.commit());
            if before.get() != Some(&record.phase) {
                self.metrics.entered(record);
                if record.phase == SessionPhase::Ready {
                    self.expected.forget();
                }
                if [before.get(), Some(&record.phase)].contains(&Some(&SessionPhase::Queued)) {
                    self.moved.store(true, Ordering::Release);
                }
            }
            self.hub.publish(record);
        }
        Ok(done)
    }
}

/// Why a session was not accepted or cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Says why.
    #[error(transparent)]
    Problem(#[from] Problem),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Refused {
    /// A refusal with that code.
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self::Problem(Problem::new(code, detail))
    }
}

/// The running control plane. Clones are the same one.
#[derive(Clone)]
pub struct Control {
    /// What it shares with its workers.
    pub shared: Arc<Shared>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl Control {
    /// Starts: every live session gets its worker again, then the dispatcher and the reaper run.
    ///
    /// # Errors
    /// [`StoreError`] if the live sessions cannot be read.
    pub async fn start(
        config: Config,
        store: Arc<dyn Store>,
        secrets: Arc<Secrets>,
        clock: Clock,
        providers: Vec<Arc<dyn Provider>>,
    ) -> Result<Self, StoreError> {
        let (intake, wishes) = Intake::new();
        let control = Self {
            shared: Arc::new(Shared {
                intake,
                can_make: Fresh::new(Duration::ZERO),
                expected: Fresh::new(FRESH),
                store,
                clock,
                secrets,
                hub: Hub::default(),
                metrics: Metrics::new(&providers.iter().map(|p| p.kind()).collect::<Vec<_>>()),
                vitals: Vitals::default(),
                drain: Drain::open(&config.state_dir),
                config,
                dispatch: Notify::new(),
                // An earlier process may have died before it numbered them.
                moved: AtomicBool::new(true),
                stopping: CancellationToken::new(),
                full: Mutex::default(),
                shown: Mutex::default(),
                providers: providers.into_iter().map(|p| (p.kind(), p)).collect(),
            }),
            tasks: Arc::default(),
        };
        let now = control.shared.clock.now();
        let restored = control.shared.store.resume(None, now).await?;
        let live = control.shared.store.live().await?;
        if !live.is_empty() {
            info!(
                sessions = live.len(),
                "taking up the sessions of an earlier process"
            );
        }
        for record in live {
            let shared = control.shared.clone();
            let doubtful =
                restored.and_then(|r| Some((doubtful(&record, &r)?, shared.spared_until(&r))));
            match doubtful {
                Some((name, until)) => control.spawn(work_later(shared, record, name, until)),
                None => control.work_for(record.id),
            }
        }
        control.spawn(intake::work(control.clone(), wishes));
        control.spawn(dispatch(control.shared.clone()));
        control.spawn(reap(control.shared.clone()));
        Ok(control)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    fn work_for(&self, id: SessionId) {
        self.spawn(crate::worker::run(self.shared.clone(), id, None));
    }

    /// The same for a session that was just accepted, followed since before that.
    pub(crate) fn work_for_new(&self, record: Record, changes: watch::Receiver<u64>) {
        let (id, new) = (record.id, Some((record, changes)));
        self.spawn(crate::worker::run(self.shared.clone(), id, new));
    }

    /// Stops working, within `patience`. Desktops go on; the next process takes them up.
    pub async fn stop(&self, patience: Duration) {
        self.shared.stopping.cancel();
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, all).await.is_err() {
            warn!("some workers did not stop in time and are dropped");
        }
        tasks.shutdown().await;
    }

    /// Takes a wish: durable when this returns.
    ///
    /// # Errors
    /// A [`Problem`] that says what is wrong with the wish, or why desktops cannot be made now.
    pub async fn create(
        &self,
        origin: Origin,
        request: &CreateSession,
        key: Option<&str>,
    ) -> Result<mayfly_api::Session, Refused> {
        let wish = self.wish(origin, request)?;
        let idempotency = key.map(|key| Idempotency {
            key_sha256: HEXLOWER.encode(&Sha256::digest(key)),
            request_sha256: HEXLOWER.encode(&Sha256::digest(
                serde_json::to_vec(request).unwrap_or_default(),
            )),
        });
        let shared = &self.shared;
        if let Err(refused) = self.takes(&wish).await {
            // A repeated request is answered as the first was, even if desktops could not be made now.
            if let Some(key) = &idempotency
                && let Some(before) = shared.store.accepted_before(key).await?
            {
                return answer(before);
            }
            return Err(refused);
        }
        let known = shared.expected.get(&wish.template, async || {
            let (template, provider) = (&wish.template, &wish.provider);
            shared.store.expected(template, provider).await
        });
        let expected = known.await?;
        let limits = &shared.config.limits;
        let record = Record::accepted(SessionId::new(), wish, expected, limits, shared.clock.now());
        answer(shared.intake.accept(record, idempotency).await?)
    }

    /// Refuses at once what cannot be had now.
    async fn takes(&self, wish: &Wish) -> Result<(), Refused> {
        if self.shared.stopping.is_cancelled() {
            return Err(Refused::new(
                ProblemCode::ShuttingDown,
                "the orchestrator is stopping; ask again when it is back",
            ));
        }
        if self.shared.drain.get().is_some() {
            return Err(drain::problem().into());
        }
        let can_make = &self.shared.can_make;
        can_make
            .get(&wish.template, async || self.can_make(wish).await)
            .await
    }

    fn wish(&self, origin: Origin, request: &CreateSession) -> Result<Wish, Refused> {
        let invalid = |detail: String| Refused::new(ProblemCode::InvalidRequest, detail);
        let config = &self.shared.config;
        let template = config
            .find_template(request.template.as_deref())
            .ok_or_else(|| {
                let names: Vec<_> = config.template.iter().map(|t| t.name.as_str()).collect();
                invalid(format!("template: there is {}", names.join(", ")))
            })?;
        let user = match request.user.as_deref() {
            None if template.domain => {
                return Err(invalid(
                    "user: say who it is for, by their login name in the domain".to_owned(),
                ));
            }
            given => given.unwrap_or("user"),
        };
        // Domains have first.last.
        let valid = is_user(user) || template.domain && is_user(&user.replace('.', "-"));
        if !valid {
            return Err(invalid(format!(
                "user = {user:?}: a lower-case letter or '_', then up to 31 lower-case letters, digits, '_' and '-' (in a domain '.' \
                 as well) are allowed, and no account of the system"
            )));
        }
        let check = |name: &str, value: &Option<String>, valid: fn(&str) -> bool, example: &str| {
            match value {
                Some(value) if !valid(value) => Err(invalid(format!(
                    "{name} = {value:?}: it looks like {example}"
                ))),
                _ => Ok(value.clone()),
            }
        };
        Ok(Wish {
            origin,
            template: template.name.clone(),
            provider: template.provider.as_str().to_owned(),
            user: user.to_owned(),
            language: check("language", &request.language, is_language, "fr-FR")?,
            time_zone: check(
                "time_zone",
                &request.time_zone,
                is_time_zone,
                "Europe/Paris",
            )?,
            keyboard: check("keyboard", &request.keyboard, is_keyboard, "fr")?,
        })
    }

    /// Refuses at once what cannot be made, instead of after the wait.
    async fn can_make(&self, wish: &Wish) -> Result<(), Refused> {
        let unavailable = |detail| Refused::new(ProblemCode::ProviderUnavailable, detail);
        let provider = self.shared.provider(&wish.provider).ok_or_else(|| {
            unavailable(format!(
                "the template {:?} wants the provider {:?}, which is not running here",
                wish.template, wish.provider
            ))
        })?;
        let template = self.shared.config.find_template(Some(&wish.template));
        let mut checks = provider.preflight().await;
        for extra in template.map(Template::extras).unwrap_or_default() {
            checks.extend(provider.preflight_of(extra).await);
        }
        let wrong: Vec<Check> = checks
            .into_iter()
            .filter(|c| c.status == CheckStatus::Error)
            .collect();
        if wrong.is_empty() {
            return Ok(());
        }
        let details: Vec<_> = wrong
            .iter()
            .map(|c| format!("{}: {}", c.name, c.detail))
            .collect();
        Err(unavailable(details.join("; ")))
    }

    /// What every provider says of itself.
    pub async fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        for provider in self.shared.providers.values() {
            checks.extend(provider.preflight().await);
            for extra in [Extra::Domain, Extra::Playbook] {
                checks.extend(provider.preflight_of(extra).await);
            }
        }
        checks
    }
}

fn answer(accepted: Accepted) -> Result<mayfly_api::Session, Refused> {
    match accepted {
        Accepted::New(record) => Ok(record.view()),
        Accepted::Again(event) => Ok(event.session),
        Accepted::Mismatch => Err(Refused::new(
            ProblemCode::IdempotencyMismatch,
            "this Idempotency-Key came before with another request; use a new key for a new request",
        )),
        Accepted::Full => Err(Refused::new(
            ProblemCode::NoCapacity,
            "too many sessions wait for a desktop already (limits.max_queued); try again later",
        )),
    }
}

/// `^[a-z_][a-z0-9_-]{0,31}$`, and not an account that a Debian or Ubuntu desktop has by itself.
fn is_user(name: &str) -> bool {
    const SYSTEM: &[&str] = &[
        "root",
        "daemon",
        "bin",
        "sys",
        "sync",
        "games",
        "man",
        "lp",
        "mail",
        "news",
        "uucp",
        "proxy",
        "www-data",
        "backup",
        "list",
        "irc",
        "gnats",
        "nobody",
        "sshd",
        "messagebus",
        "xrdp",
        "polkitd",
        "avahi",
        "rtkit",
        "colord",
        "pulse",
        "lightdm",
        "sssd",
        "tss",
        "uuidd",
        "usbmux",
        "syslog",
        "saned",
        "_apt",
        "mayfly",
        "admin",
        "sudo",
        "adm",
        "tty",
        "disk",
        "wheel",
        "shadow",
        "users",
        "nogroup",
        "staff",
        "kvm",
        "render",
        "input",
        "audio",
        "video",
        "cdrom",
        "plugdev",
        "netdev",
        "ssl-cert",
        "dip",
        "dialout",
        "utmp",
    ];
    let bytes = name.as_bytes();
    (1..=32).contains(&bytes.len())
        && matches!(bytes[0], b'a'..=b'z' | b'_')
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
        && !SYSTEM.contains(&name)
        && !name.starts_with("systemd-")
}

fn is_language(tag: &str) -> bool {
    let mut parts = tag.split('-');
    tag.len() <= 35
        && parts.next().is_some_and(|p| {
            (2..=3).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_alphabetic())
        })
        && parts.all(|p| (1..=8).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn is_time_zone(name: &str) -> bool {
    name.len() <= 64
        && name.split('/').count() <= 3
        && name.split('/').all(|part| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"_+-".contains(&b))
        })
}

fn is_keyboard(layout: &str) -> bool {
    (2..=32).contains(&layout.len())
        && layout
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

/// Gives free places to those who wait longest, and tells the others where they stand.
async fn dispatch(shared: Arc<Shared>) {
    let mut numbering = Numbering::default();
    let mut giving = Pace::new(GIVING_SHARE);
    loop {
        let done = async {
            let begun = Instant::now();
            give_places(&shared).await?;
            giving.worked(begun);
            numbering.work(&shared).await
        };
        if let Err(error) = done.await {
            error!(%error, "the queue could not be worked on");
        }
        shared.vitals.dispatched();
        let woken = async {
            shared.dispatch.notified().await;
            tokio::time::sleep_until(giving.again.into()).await;
        };
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            () = woken => {}
            () = tokio::time::sleep(numbering.pause()) => {}
        }
    }
}

async fn give_places(shared: &Shared) -> Result<(), StoreError> {
    if let Some(rest) = shared.drain.get() {
        drain::work(shared, rest).await?;
    }
    let limits = &shared.config.limits;
    loop {
        let (full, now, begun) = (shared.waiting(), shared.clock.now(), Instant::now());
        let planned = shared.store.plan_next(limits, &full, now).await?;
        shared.metrics.stored("plan", begun.elapsed());
        let Some(record) = planned else {
            return Ok(());
        };
        failpoints::after(|| record.commit());
        shared.moved.store(true, Ordering::Release);
        shared.hub.publish(&record);
    }
}

/// Work that takes at most a share of the time: the first at once, and then the later the longer it took.
#[derive(Debug)]
struct Pace {
    share: u32,
    again: Instant,
}

impl Pace {
    fn new(share: u32) -> Self {
        let again = Instant::now();
        Self { share, again }
    }

    fn is_due(&self) -> bool {
        self.again <= Instant::now()
    }

    fn worked(&mut self, begun: Instant) {
        let now = Instant::now();
        self.again = now + (now - begun) * (self.share - 1);
    }
}

/// Tells those who wait their places when somebody left the queue: the first of them soon, all of them by and by. However many leave,
/// others who use the store do not wait for that.
#[derive(Debug)]
struct Numbering {
    /// The first are to be told.
    first: bool,
    firsts: Pace,
    /// Those behind this place are to be told,
    behind: Option<u32>,
    /// as far as this one if not to the end,
    upto: Option<u32>,
    /// and then once more those as far as this one: somebody left when they had been told.
    again: Option<u32>,
    behinds: Pace,
}

impl Default for Numbering {
    fn default() -> Self {
        Self {
            first: false,
            firsts: Pace::new(NUMBERING_SHARE),
            behind: None,
            upto: None,
            again: None,
            behinds: Pace::new(NUMBERING_SHARE),
        }
    }
}

impl Numbering {
    async fn work(&mut self, shared: &Shared) -> Result<(), StoreError> {
        // Not for each who comes: they were told theirs.
        self.first |= shared.moved.swap(false, Ordering::AcqRel);
        if self.first && self.firsts.is_due() {
            let told = number(shared, 0, &mut self.firsts).await?;
            self.first = false;
            match (told, self.behind) {
                // Nobody behind them has another place than before.
                (None, _) => (self.behind, self.again) = (None, None),
                (last, None) => (self.behind, self.upto) = (last, None),
                (Some(_), reached) => (self.again, self.upto) = (reached, None),
            }
        }
        if let Some(behind) = self.behind
            && self.behinds.is_due()
        {
            let told = number(shared, behind, &mut self.behinds).await?;
            self.behind = told.filter(|last| self.upto.is_none_or(|upto| *last < upto));
            if self.behind.is_none() {
                self.upto = self.again.take();
                self.behind = self.upto.map(|_| 0);
            }
        }
        Ok(())
    }

    /// Until there is more to do, as far as is known.
    fn pause(&self) -> Duration {
        let first = self.first.then_some(self.firsts.again);
        let behind = self.behind.map(|_| self.behinds.again);
        let next = first.into_iter().chain(behind).min();
        let pause = next.map(|next| next.saturating_duration_since(Instant::now()));
        pause.map_or(DISPATCH, |pause| pause.min(DISPATCH))
    }
}

/// Tells those behind that place theirs, so many at a time; the last of them, if there may be others.
async fn number(shared: &Shared, behind: u32, pace: &mut Pace) -> Result<Option<u32>, StoreError> {
    let begun = Instant::now();
    let (now, most) = (shared.clock.now(), behind.clamp(NUMBERED, NUMBERED_BEHIND));
    let numbered = shared.store.renumber_queue(behind, most, now).await;
    pace.worked(begun);
    let numbered = numbered?;
    for record in &numbered {
        shared.hub.publish(record);
    }
    let last = numbered.last().filter(|_| numbered.len() == most as usize);
    Ok(last.and_then(|record| record.queue_position))
}

/// Removes machines that nobody owns, and forgets what was over long ago.
async fn reap(shared: Arc<Shared>) {
    let mut suspects: HashMap<&'static str, HashSet<DesktopName>> = HashMap::new();
    let mut pause = FIRST_REAP;
    loop {
        for (kind, provider) in &shared.providers {
            let suspects = suspects.entry(kind).or_default();
            if let Err(error) = reap_from(&shared, provider, suspects).await {
                shared.metrics.provider_failed(kind, "list");
                warn!(provider = kind, error = %format!("{error:#}"), "not looked for machines without owner");
            }
        }
        let now = shared.clock.now();
        if let Ok(before) = now.checked_sub(KEPT) {
            match shared.store.forget(before).await {
                Ok(0) => {}
                Ok(sessions) => debug!(sessions, "forgotten"),
                Err(error) => warn!(%error, "old sessions were not forgotten"),
            }
        }
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = REAP;
    }
}

async fn reap_from(
    shared: &Shared,
    provider: &Arc<dyn Provider>,
    suspects: &mut HashSet<DesktopName>,
) -> anyhow::Result<()> {
    // In this order: a machine that is made in between is in neither or in both.
    let there = around("list", provider.list()).await?;
    let seen = there.iter().max().copied();
    let restored = shared.store.resume(seen, shared.clock.now()).await?;
    if shared.shown().insert(provider.kind()) {
        shared.dispatch.notify_one();
    }
    // Of every provider: what one shows may be part of another's desktop, such as an account.
    let owned: HashSet<_> = shared.store.desktops().await?.into_iter().collect();
    let most = (there.len() / REAPED_SHARE).max(REAPED_ALWAYS);
    let there_are = there.len();
    let mut unowned: HashSet<_> = there.into_iter().filter(|n| !owned.contains(n)).collect();
    if let Some(restored) = restored {
        spare(shared, &**provider, &restored, &mut unowned).await;
    }
    let (again, new): (Vec<_>, Vec<_>) = unowned.into_iter().partition(|n| suspects.contains(n));
    let (metrics, kind) = (&shared.metrics, provider.kind());
    metrics.reaped(kind, Reaped::Found, new.len());
    *suspects = new.into_iter().collect();
    if again.len() > most {
        metrics.reaped(kind, Reaped::HeldBack, again.len() - most);
        error!(
            provider = kind,
            unowned = again.len(),
            all = there_are,
            "so many machines without owner may be a mistake about who owns them: {most} of them are removed now, the others later"
        );
        suspects.extend(again.iter().skip(most).copied());
    }
    for name in again.into_iter().take(most) {
        warn!(desktop = %name, "nobody owns it; removing it");
        match around("reap", provider.destroy(name)).await {
            Ok(_) => metrics.reaped(kind, Reaped::Removed, 1),
            Err(error) => {
                metrics.provider_failed(kind, "destroy");
                error!(desktop = %name, %error, "a machine that nobody owns could not be removed");
                suspects.insert(name);
            }
        }
    }
    Ok(())
}

/// Leaves machines alone that the database may have owned before an older copy was put in its place, as long as they run and a
/// session that has one may go on. Nobody works for them: a person can use theirs to its end; then its agent switches it off.
async fn spare(
    shared: &Shared,
    provider: &dyn Provider,
    restored: &Restored,
    unowned: &mut HashSet<DesktopName>,
) {
    if shared.clock.now() >= shared.spared_until(restored) {
        return;
    }
    let mut spared = Vec::new();
    for name in unowned.iter().copied().filter(|n| restored.left_out(*n)) {
        // One that nobody can tell about is spared as well.
        if !matches!(
            provider.state(name).await,
            Ok(MachineState::Dead { .. } | MachineState::Absent)
        ) {
            spared.push(name);
        }
    }
    unowned.retain(|name| !spared.contains(name));
    if !spared.is_empty() {
        let names: Vec<_> = spared.iter().map(ToString::to_string).collect();
        warn!(
            provider = provider.kind(),
            machines = names.join(" "),
            until = %shared.spared_until(restored),
            "the database is an older copy that does not know these machines; they are left alone while they run"
        );
    }
}

/// A desktop that the copy knows as being made.
fn doubtful(record: &Record, restored: &Restored) -> Option<DesktopName> {
    let desktop = record.live_desktop()?;
    let made = desktop.phase() < DesktopPhase::Claimed;
    (made && desktop.name() <= restored.known).then(|| desktop.name())
}

/// Works for a session whose desktop was being made when the database was copied: since then somebody may have got it, and would lose
/// it if it were made anew. It is left alone as [`spare`] leaves others.
async fn work_later(shared: Arc<Shared>, record: Record, name: DesktopName, until: Timestamp) {
    let Some(provider) = shared.provider(&record.wish.provider) else {
        return;
    };
    while shared.clock.now() < until
        && matches!(provider.state(name).await, Ok(MachineState::Running))
    {
        warn!(session = %record.id, desktop = %name, %until, "the database is an older copy in which this desktop is not made yet, but it runs; it is left alone while it does");
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            () = shared.clock.sleep_until(Some(until)) => {}
            () = tokio::time::sleep(REAP) => {}
        }
    }
    crate::worker::run(shared, record.id, None).await;
}
