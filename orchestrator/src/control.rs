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
use crate::metrics::{Metrics, Reaped};
use crate::provider::{Check, CheckStatus, Extra, MachineState, Provider};
use crate::replica::{self, Tenure};
use crate::secret::Secrets;
use crate::session::{Origin, Record, Wish};
use crate::store::replicas::Replica;
use crate::store::{Accepted, Change, Idempotency, Restored, Store, StoreError};
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
use tracing::{debug, error, info, warn};

/// After a desktop found no room, others of its template are tried again this much later, or when one is gone.
const FULL: Duration = Duration::from_secs(30);
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
    /// Wakes the dispatcher.
    pub dispatch: Notify,
    /// Somebody left the queue or came back to it since places were last numbered. Who comes new is told theirs at once.
    moved: AtomicBool,
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
    providers: BTreeMap<&'static str, Arc<dyn Provider>>,
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

    /// The providers whose machines are on this one.
    pub(crate) fn bound(&self) -> Vec<&'static str> {
        let all = self.providers.values();
        all.filter(|p| p.is_bound()).map(|p| p.kind()).collect()
    }

    /// Places are to be numbered anew: somebody left the queue, or who was to do that is no more.
    pub(crate) fn queue_moved(&self) {
        self.moved.store(true, Ordering::Release);
        self.dispatch.notify_one();
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
                self.traces.over(record, now);
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
        let me = Replica {
            id: store.me().clone(),
            name: format!("{} ({})", replica::host_name(), config.state_dir.display()),
            installation: secrets.installation(),
        };
        let tenure = replica::join(&*store, &me, &stopping).await?;
        let control = Self {
            shared: Arc::new(Shared {
                store,
                clock,
                secrets,
                hub: Hub::default(),
                metrics: Metrics::new(&providers.iter().map(|p| p.kind()).collect::<Vec<_>>()),
                traces,
                vitals: Vitals::default(),
                drain: Drain::open(&config.state_dir),
                config,
                dispatch: Notify::new(),
                // An earlier process may have died before it numbered them.
                moved: AtomicBool::new(true),
                stopping,
                tenure,
                working: Mutex::default(),
                full: Mutex::default(),
                shown: Mutex::default(),
                providers: providers.into_iter().map(|p| (p.kind(), p)).collect(),
            }),
            tasks: Arc::default(),
        };
        let now = control.shared.clock.now();
        let restored = control.shared.store.resume(None, now).await?;
        let (bound, store) = (control.shared.bound(), &control.shared.store);
        store.take_over(&bound, replica::HOST_LOST).await?;
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
        control.spawn(dispatch(control.clone()));
        control.spawn(reap(control.shared.clone()));
        control.spawn(replica::live(control.clone(), me));
        Ok(control)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Has it worked for, by one worker, for as long as it is this orchestrator's.
    pub(crate) fn work_for(&self, id: SessionId) {
        match self.shared.working().entry(id) {
            Entry::Occupied(mut working) => {
                working.insert(true);
            }
            Entry::Vacant(free) => {
                free.insert(false);
                self.spawn(work(self.shared.clone(), id));
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
        // A repeated request is answered as the first was, even if desktops could not be made now.
        if let Some(key) = &idempotency
            && let Some(before) = shared.store.accepted_before(key).await?
        {
            return answer(before);
        }
        if shared.stopping.is_cancelled() {
            return Err(Refused::new(
                ProblemCode::ShuttingDown,
                "the orchestrator is stopping; ask again when it is back",
            ));
        }
        if shared.drain.get().is_some() {
            return Err(drain::problem().into());
        }
        self.can_make(&wish).await?;
        let expected = shared
            .store
            .expected(&wish.template, &wish.provider)
            .await?;
        let limits = &shared.config.limits;
        let record = Record::accepted(SessionId::new(), wish, expected, limits, shared.clock.now());
        let begun = Instant::now();
        let accepted = shared.store.accept(record, idempotency, limits.max_queued);
        let accepted = around("commit accept", accepted).await?;
        shared.metrics.stored("accept", begun.elapsed());
        if let Accepted::New(record) = &accepted {
            info!(session = %record.id, user = record.wish.user, template = record.wish.template, "accepted");
            self.work_for(record.id);
            shared.dispatch.notify_one();
        }
        answer(accepted)
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
async fn work(shared: Arc<Shared>, id: SessionId) {
    /// However it ends: the next who is asked to work for it can.
    struct Working<'a>(&'a Shared, SessionId);
    impl Drop for Working<'_> {
        fn drop(&mut self) {
            self.0.working().remove(&self.1);
        }
    }
    let working = Working(&shared, id);
    loop {
        crate::worker::run(shared.clone(), id).await;
        let mut all = shared.working();
        match all.get_mut(&id) {
            Some(again) if *again => *again = false,
            _ => {
                all.remove(&id);
                std::mem::forget(working);
                return;
            }
        }
    }
}

/// Gives free places to those who wait longest, and tells the others where they stand.
async fn dispatch(control: Control) {
    let shared = &control.shared;
    loop {
        match give_places(&control).await {
            Ok(()) => {}
            Err(error) => error!(%error, "the queue could not be worked on"),
        }
        shared.vitals.dispatched();
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            () = shared.dispatch.notified() => {}
            () = tokio::time::sleep(DISPATCH) => {}
        }
    }
}

async fn give_places(control: &Control) -> Result<(), StoreError> {
    let shared = &control.shared;
    let draining = shared.drain.get();
    if let Some(rest) = draining {
        drain::work(shared, rest).await?;
    }
    let limits = &shared.config.limits;
    // Others give places while this one drains.
    while shared.tenure.is_held() && !(draining.is_some() && shared.store.is_shared()) {
        let (full, now, begun) = (shared.waiting(), shared.clock.now(), Instant::now());
        let planned = shared.store.plan_next(limits, &full, now).await?;
        shared.metrics.stored("plan", begun.elapsed());
        let Some(record) = planned else {
            break;
        };
        failpoints::after(|| record.commit());
        shared.moved.store(true, Ordering::Release);
        shared.hub.publish(&record);
        // It may have been another's until now.
        control.work_for(record.id);
    }
    // Not for each who comes: that would look at all who wait, again and again.
    if shared.moved.swap(false, Ordering::AcqRel) {
        let renumbered = shared.store.renumber_queue(shared.clock.now()).await;
        if renumbered.is_err() {
            shared.moved.store(true, Ordering::Release);
        }
        for record in renumbered? {
            shared.hub.publish(&record);
        }
    }
    Ok(())
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
            () = tokio::time::sleep(REAP) => {}
        }
    }
}
