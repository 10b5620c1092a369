//! The control plane as programs use it: accepts sessions, starts a worker for each, gives out places, reaps.
//!
//! # Guarantees
//! * A session that was accepted has a worker until it is over, also after a restart.
//! * Where an older copy of the database was put in its place, no machine that it does not know is removed while somebody may use it.

use crate::clock::{Clock, after, between, s};
use crate::config::{Config, Template};
use crate::desktop::DesktopPhase;
use crate::drain::{self, Drain};
use crate::fresh::Fresh;
use crate::intake::{self, Intake};
use crate::metrics::Metrics;
use crate::provider::{Check, CheckStatus, Extra, MachineState, Provider};
use crate::reaper;
use crate::replica::{self, Tenure};
use crate::secret::Secrets;
use crate::session::{Expected, Origin, Record, Wish};
use crate::store::replicas::Replica;
use crate::store::{Accepted, Change, Idempotency, Planned, Restored, Store, StoreError};
use crate::telemetry::Traces;
use crate::vitals::Vitals;
use crate::worker::LIFETIME_MARGIN;
use data_encoding::HEXLOWER;
use jiff::Timestamp;
use mayfly_api::{CreateSession, DesktopName, Problem, ProblemCode, SessionId, SessionPhase};
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// After a desktop found no room, others of its template are tried again this much later, or when one is gone.
const FULL: Duration = Duration::from_secs(30);
/// For so long what desktops took is not asked for again.
const FRESH: Duration = Duration::from_secs(2);
/// So many are told their new place in the queue at a time: nobody else who uses the store waits for longer than that.
const NUMBERED: u32 = 250;
/// Giving places takes one part in so many of the time at most.
const GIVING_SHARE: u32 = 2;
/// Telling those who wait their places takes one part in so many of the time.
const NUMBERING_SHARE: u32 = 4;
/// The dispatcher looks this often even if nobody wakes it.
const DISPATCH: Duration = Duration::from_secs(5);

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

    /// Somebody else may have changed it.
    pub(crate) fn wake(&self, id: SessionId) {
        if let Some(sender) = self.map().get(&id) {
            sender.send_modify(|_| {});
        }
    }

    /// Somebody else may have changed any.
    pub(crate) fn wake_all(&self) {
        for sender in self.map().values() {
            sender.send_modify(|_| {});
        }
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
    /// Where spans go.
    pub traces: Traces,
    /// Whether it is alive.
    pub vitals: Vitals,
    /// Whether no new sessions are taken.
    pub drain: Drain,
    /// Held while a place is given.
    pub(crate) giving: tokio::sync::Mutex<()>,
    /// This one, for the others that share the database.
    pub(crate) me: Replica,
    /// Held while they are told that it lives.
    pub(crate) saying: tokio::sync::Mutex<()>,
    /// Wakes the dispatcher.
    pub dispatch: Notify,
    /// Somebody left the queue or came back to it since places were last numbered. Who comes new is told theirs at once.
    moved: AtomicBool,
    /// There was no place when the dispatcher looked last: whoever comes new is none of its business.
    no_place: AtomicBool,
    /// Takes sessions.
    intake: Intake,
    /// The templates whose desktops can be made.
    can_make: Fresh<()>,
    /// What desktops of a template took lately.
    expected: Fresh<Expected>,
    /// The orchestrator stops; machines go on.
    pub stopping: CancellationToken,
    /// Whether it may work, among others that share the database.
    pub tenure: Tenure,
    /// The sessions that are worked for here; `true`: whether to go on must be looked at once more.
    working: Mutex<HashMap<SessionId, bool>>,
    /// Templates for whose desktops there was no room, and when. This process's own: another finds out likewise.
    full: Mutex<HashMap<String, Timestamp>>,
    /// The providers that have shown all their machines to this process: before, a number that is free here may be taken there.
    shown: Mutex<HashSet<&'static str>>,
    /// One pass of the reaper at a time.
    pub(crate) reaping: tokio::sync::Mutex<()>,
    pub(crate) providers: BTreeMap<&'static str, Arc<dyn Provider>>,
}

impl Shared {
    fn full(&self) -> MutexGuard<'_, HashMap<String, Timestamp>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, HashSet<&'static str>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn working(&self) -> MutexGuard<'_, HashMap<SessionId, bool>> {
        self.working.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the sessions that nobody works for.
    pub(crate) async fn take_over(&self) -> Result<Vec<SessionId>, StoreError> {
        let all = self.providers.values();
        let bound: Vec<_> = all.filter(|p| p.is_bound()).map(|p| p.kind()).collect();
        let patience = s(self.config.limits.host_lost_s);
        self.store.take_over(&bound, patience).await
    }

    /// Places are to be numbered anew: somebody left the queue, or who was to do that is no more.
    pub(crate) fn queue_moved(&self) {
        self.moved.store(true, Ordering::Release);
        self.dispatch.notify_one();
    }

    /// Sessions came to the end of the queue. Another process that shares the database may have freed a place meanwhile.
    pub(crate) fn queue_grew(&self) {
        if self.store.is_shared() || !self.no_place.load(Ordering::Acquire) {
            self.dispatch.notify_one();
        }
    }

    /// That provider has shown all its machines.
    pub(crate) fn has_shown(&self, provider: &'static str) {
        if self.shown().insert(provider) {
            self.dispatch.notify_one();
        }
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
    pub(crate) fn spared_until(&self, restored: &Restored) -> Timestamp {
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
            change(record)
        };
        let done = self.store.update(id, now, Box::new(change)).await?;
        self.metrics.stored("update", begun.elapsed());
        if let Some((record, Change::Told | Change::Quiet)) = &done {
            if before.get() != Some(&record.phase) {
                self.metrics.entered(record);
                self.traces.over(record, now);
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
        traces: Traces,
    ) -> Result<Self, StoreError> {
        let stopping = CancellationToken::new();
        let drain = Drain::open(&config.state_dir);
        let me = Replica {
            id: store.me().clone(),
            name: format!("{} ({})", replica::host_name(), config.state_dir.display()),
            installation: secrets.installation(),
            draining: drain.get().is_some(),
        };
        let tenure = replica::join(&*store, &me, &stopping).await?;
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
                traces,
                vitals: Vitals::default(),
                drain,
                giving: tokio::sync::Mutex::default(),
                me,
                saying: tokio::sync::Mutex::default(),
                config,
                dispatch: Notify::new(),
                // An earlier process may have died before it numbered them.
                moved: AtomicBool::new(true),
                no_place: AtomicBool::new(false),
                stopping,
                tenure,
                working: Mutex::default(),
                full: Mutex::default(),
                shown: Mutex::default(),
                reaping: tokio::sync::Mutex::default(),
                providers: providers.into_iter().map(|p| (p.kind(), p)).collect(),
            }),
            tasks: Arc::default(),
        };
        let now = control.shared.clock.now();
        let restored = control.shared.store.resume(None, now).await?;
        let store = &control.shared.store;
        control.shared.take_over().await?;
        let mine = |record: &Record| record.owner.as_ref() == Some(store.me());
        let mut live = store.live().await?;
        live.retain(mine);
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
                Some((name, until)) => {
                    let control = control.clone();
                    control.clone().spawn(async move {
                        work_later(&shared, &record, name, until).await;
                        control.work_for(record.id);
                    });
                }
                None => control.work_for(record.id),
            }
        }
        control.spawn(intake::work(control.clone(), wishes));
        control.spawn(dispatch(control.clone()));
        control.spawn(reaper::run(control.shared.clone()));
        control.spawn(replica::live(control.clone()));
        Ok(control)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Has it worked for, by one worker, for as long as it is this orchestrator's.
    pub(crate) fn work_for(&self, id: SessionId) {
        self.work_for_a(id, None);
    }

    /// The same for a session that was just accepted, followed since before that.
    pub(crate) fn work_for_new(&self, record: Record, changes: watch::Receiver<u64>) {
        self.work_for_a(record.id, Some((record, changes)));
    }

    fn work_for_a(&self, id: SessionId, new: Option<(Record, watch::Receiver<u64>)>) {
        match self.shared.working().entry(id) {
            Entry::Occupied(mut working) => {
                working.insert(true);
            }
            Entry::Vacant(free) => {
                free.insert(false);
                self.spawn(work(self.shared.clone(), id, new));
            }
        }
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
        // Without a word it is over a little later.
        if let Err(error) = self.shared.store.leave().await {
            warn!(%error, "the lease was not given up");
        }
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

/// Works for a session until it is over, or another's.
async fn work(shared: Arc<Shared>, id: SessionId, mut new: Option<(Record, watch::Receiver<u64>)>) {
    /// If it breaks, the next who is asked to work for it can.
    struct Working<'a>(&'a Shared, SessionId);
    impl Drop for Working<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.working().remove(&self.1);
            }
        }
    }
    let _working = Working(&shared, id);
    loop {
        crate::worker::run(shared.clone(), id, new.take()).await;
        let mut all = shared.working();
        match all.get_mut(&id) {
            Some(again) if *again => *again = false,
            _ => {
                all.remove(&id);
                return;
            }
        }
    }
}

/// Gives free places to those who wait longest, and tells the others where they stand.
async fn dispatch(control: Control) {
    let shared = &control.shared;
    let mut numbering = Numbering::default();
    let mut giving = Pace::new(GIVING_SHARE);
    loop {
        let done = async {
            let begun = Instant::now();
            give_places(&control).await?;
            giving.worked(begun);
            numbering.work(shared).await
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

async fn give_places(control: &Control) -> Result<(), StoreError> {
    let shared = &control.shared;
    if let Some(rest) = shared.drain.get() {
        drain::work(shared, rest).await?;
    }
    let limits = &shared.config.limits;
    while shared.tenure.is_held() {
        let _giving = shared.giving.lock().await;
        // Others give places while this one drains.
        if shared.drain.get().is_some() && shared.store.is_shared() {
            return Ok(());
        }
        let (full, now, begun) = (shared.waiting(), shared.clock.now(), Instant::now());
        let planned = shared.store.plan_next(limits, &full, now).await?;
        shared.metrics.stored("plan", begun.elapsed());
        shared
            .no_place
            .store(matches!(planned, Planned::NoPlace), Ordering::Release);
        let Some(record) = planned.given() else {
            return Ok(());
        };
        shared.moved.store(true, Ordering::Release);
        shared.hub.publish(&record);
        // It may have been another's until now.
        control.work_for(record.id);
    }
    Ok(())
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

/// Tells those behind that place theirs, so many at a time; the last place of these, if there may be others.
async fn number(shared: &Shared, behind: u32, pace: &mut Pace) -> Result<Option<u32>, StoreError> {
    let (now, begun) = (shared.clock.now(), Instant::now());
    let numbered = shared.store.renumber_queue(behind, NUMBERED, now).await;
    pace.worked(begun);
    let numbered = numbered?;
    for record in &numbered.told {
        shared.hub.publish(record);
    }
    Ok((!numbered.to_the_end).then_some(behind + NUMBERED))
}

/// A desktop that the copy knows as being made.
fn doubtful(record: &Record, restored: &Restored) -> Option<DesktopName> {
    let desktop = record.live_desktop()?;
    let made = desktop.phase() < DesktopPhase::Claimed;
    (made && desktop.name() <= restored.known).then(|| desktop.name())
}

/// Works for a session whose desktop was being made when the database was copied: since then somebody may have got it, and would lose
/// it if it were made anew. It is left alone as [`reaper`] leaves others.
async fn work_later(shared: &Shared, record: &Record, name: DesktopName, until: Timestamp) {
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
            () = tokio::time::sleep(reaper::PAUSE) => {}
        }
    }
}
