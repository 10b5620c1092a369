//! People who come, use a desktop, and leave, by way of whichever orchestrator answers.

use crate::caller::Caller;
use anyhow::{Context, Result, anyhow, bail, ensure};
use eventsource_stream::Eventsource;
use fastrand::Rng;
use futures_util::StreamExt;
use mayfly_api::client::{Client, ClientError};
use mayfly_api::{
    CreateSession, Created, EndReason, Heartbeat, RdpClientState, Session, SessionEvent, SessionId,
    SessionPhase,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Whoever does not answer within this is left for another.
const ANSWER: Duration = Duration::from_secs(5);
/// Everything that a person waits for comes within this, whatever fails meanwhile.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two heartbeats.
const BEAT: Duration = Duration::from_secs(5);
/// A desktop whose session is told to be usable is given so long to answer.
const USABLE: Duration = Duration::from_secs(10);
/// So many stay until the end, at most.
const STAYERS: usize = 6;

/// What somebody does.
#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Changes their mind.
    Cancel,
    /// Connects, leaves and says so.
    Visit,
    /// Connects, and is then not seen any more.
    Leave,
    /// Asks for a desktop and is not seen any more.
    Vanish,
    /// Connects and stays until everybody goes.
    Stay,
}

/// What people did, and what they saw.
#[derive(Debug, Default, Serialize)]
pub(super) struct Seen {
    /// Sessions that were answered for.
    pub(super) accepted: usize,
    /// How they ended.
    pub(super) ends: BTreeMap<String, u32>,
    /// Connections that the orchestrators saw.
    pub(super) connected: u32,
    /// Calls that another orchestrator answered than the one asked first.
    pub(super) retried: u32,
    /// Streams of events that went on at another place.
    pub(super) streams: u32,
    /// Events on them.
    pub(super) events: u64,
    /// Those that stayed to the end.
    pub(super) stayed: u32,
}

/// See the module. Clones are the same people.
#[derive(Clone)]
pub(super) struct People(Arc<Inner>);

struct Inner {
    clients: Vec<(String, Client)>,
    http: reqwest::Client,
    /// Everybody goes.
    over: watch::Receiver<bool>,
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    seen: Seen,
    accepted: Vec<(SessionId, SecretString)>,
    /// Who uses which address.
    places: HashMap<SocketAddr, SessionId>,
    staying: usize,
    wrong: Vec<String>,
}

/// Somebody's session.
struct Person {
    people: People,
    random: Rng,
    id: SessionId,
    secret: SecretString,
    latest: watch::Receiver<Option<Session>>,
}

impl People {
    pub(super) fn new(urls: &[String], over: watch::Receiver<bool>) -> Result<Self> {
        let client = |url: &String| Ok((url.clone(), Client::new(url)?));
        let inner = Inner {
            clients: urls.iter().map(client).collect::<Result<_>>()?,
            http: reqwest::Client::builder().no_proxy().build()?,
            over,
            notes: Mutex::default(),
        };
        Ok(Self(Arc::new(inner)))
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What must never have happened.
    pub(super) fn wrong(&self) -> Vec<String> {
        self.notes().wrong.clone()
    }

    /// Every session that was answered for.
    pub(super) fn accepted(&self) -> Vec<(SessionId, SecretString)> {
        self.notes().accepted.clone()
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        let notes = &mut *self.notes();
        Seen {
            accepted: notes.accepted.len(),
            ..std::mem::take(&mut notes.seen)
        }
    }

    fn complain(&self, why: String) {
        eprintln!("WRONG: {why}");
        self.notes().wrong.push(why);
    }

    /// Asks whichever orchestrator answers.
    async fn ask<T, F: Future<Output = Result<T, ClientError>> + Send>(
        &self,
        random: &mut Rng,
        what: &'static str,
        call: impl Fn(Client) -> F + Send,
    ) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        let mut last = anyhow!("nobody answered");
        let mut first = true;
        while Instant::now() < end {
            let one = random.usize(0..self.0.clients.len());
            match timeout(ANSWER, call(self.0.clients[one].1.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if !error.is_retryable() => {
                    return Err(error).context(what);
                }
                Ok(Err(error)) => last = error.into(),
                Err(_) => last = anyhow!("no answer within {} s", ANSWER.as_secs()),
            }
            if std::mem::take(&mut first) {
                self.notes().seen.retried += 1;
            }
            sleep(Duration::from_millis(random.u64(50..500))).await;
        }
        Err(last).with_context(|| format!("{what}: nobody answered for {} s", PATIENCE.as_secs()))
    }

    /// The session as any orchestrator knows it.
    pub(super) async fn look(&self, id: SessionId, secret: &SecretString) -> Result<Session> {
        let call = |client: Client| {
            let secret = secret.clone();
            async move { client.get(id, &secret).await }
        };
        self.ask(&mut Rng::new(), "looking at a session", call)
            .await
    }

    /// Somebody comes, and goes at some time.
    pub(super) async fn come(self, seed: u64) {
        let mut random = Rng::with_seed(seed);
        let plan = match random.u8(0..20) {
            0..=3 => Plan::Cancel,
            4..=11 => Plan::Visit,
            12..=15 => Plan::Leave,
            16..=17 => Plan::Vanish,
            _ if self.notes().staying < STAYERS => Plan::Stay,
            _ => Plan::Visit,
        };
        if let Err(error) = self.clone().live(plan, random).await {
            self.complain(format!("{plan:?}: {error:#}"));
        }
    }

    /// Somebody who wants to see that all is well: a desktop, connected, ended, by way of one orchestrator alone.
    pub(super) async fn try_out(&self, one: usize) -> Result<()> {
        let alone = Inner {
            clients: vec![self.0.clients[one].clone()],
            http: self.0.http.clone(),
            over: self.0.over.clone(),
            notes: Mutex::default(),
        };
        let alone = Self(Arc::new(alone));
        alone.clone().live(Plan::Visit, Rng::new()).await?;
        let (connected, wrong) = (alone.notes().seen.connected, alone.wrong());
        ensure!(wrong.is_empty(), "{wrong:?}");
        ensure!(connected == 1, "nobody was seen to be connected");
        Ok(())
    }

    async fn live(self, plan: Plan, mut random: Rng) -> Result<()> {
        let wish = CreateSession {
            user: Some(format!("p{}", random.u32(..))),
            ..CreateSession::default()
        };
        let key = SessionId::new().to_string();
        let ask = |client: Client| {
            let (wish, key) = (wish.clone(), key.clone());
            async move { client.create(&wish, &key).await }
        };
        let Created { session, secret } =
            self.ask(&mut random, "asking for a desktop", &ask).await?;
        let id = session.id;
        self.notes().accepted.push((id, secret.clone()));
        if random.u8(0..4) == 0 {
            let again = self.ask(&mut random, "asking once more", &ask).await?;
            ensure!(
                again.session.id == id,
                "one key, two sessions: {id}, {}",
                again.session.id
            );
        }
        let (told, latest) = watch::channel(None);
        let follow = self.clone().follow(id, secret.clone(), random.fork(), told);
        let person = Person {
            people: self.clone(),
            random,
            id,
            secret,
            latest,
        };
        let followed = async { follow.await.with_context(|| format!("events of {id}")) };
        let lived = async {
            person
                .live(plan)
                .await
                .with_context(|| format!("session {id}"))
        };
        tokio::try_join!(followed, lived).map(drop)
    }

    /// Follows the events to the last one, now here, now there: each comes once, in order.
    async fn follow(
        self,
        id: SessionId,
        secret: SecretString,
        mut random: Rng,
        told: watch::Sender<Option<Session>>,
    ) -> Result<()> {
        let mut last: Option<SessionEvent> = None;
        loop {
            let one = random.usize(0..self.0.clients.len());
            let url = format!("{}/api/v1/sessions/{id}/events", self.0.clients[one].0);
            let mut request = self.0.http.get(url).bearer_auth(secret.expose_secret());
            if let Some(last) = &last {
                request = request.header("Last-Event-ID", last.seq);
            }
            let Ok(Ok(answer)) = timeout(ANSWER, request.send()).await else {
                sleep(Duration::from_millis(random.u64(50..500))).await;
                continue;
            };
            if !answer.status().is_success() {
                let status = answer.status().as_u16();
                ensure!(status >= 500, "the stream is refused: {status}");
                sleep(Duration::from_millis(random.u64(50..500))).await;
                continue;
            }
            self.notes().seen.streams += 1;
            let mut frames = answer.bytes_stream().eventsource();
            let until = Instant::now() + Duration::from_millis(random.u64(2_000..20_000));
            let mut first = true;
            // A broken stream, one that ended and one that was left are the same: go on elsewhere.
            while let Ok(Some(Ok(frame))) = timeout_at(until, frames.next()).await {
                let event: SessionEvent = serde_json::from_str(&frame.data)?;
                ensure!(frame.id == event.seq.to_string(), "{frame:?}");
                let first = std::mem::replace(&mut first, false);
                match &last {
                    Some(last) if first && event.seq == last.seq => {
                        ensure!(event == *last, "told otherwise: {last:?}, {event:?}");
                        continue;
                    }
                    Some(last) if event.seq != last.seq + 1 => {
                        bail!("event {} comes after {}", event.seq, last.seq)
                    }
                    _ => {}
                }
                self.notes().seen.events += 1;
                told.send_replace(Some(event.session.clone()));
                let over = event.session.phase.is_final();
                last = Some(event);
                if over {
                    return Ok(());
                }
            }
        }
    }
}

impl Person {
    async fn live(mut self, plan: Plan) -> Result<()> {
        match plan {
            Plan::Cancel => {
                sleep(Duration::from_millis(self.random.u64(0..4_000))).await;
                self.end().await?;
            }
            Plan::Vanish => {}
            Plan::Visit | Plan::Leave | Plan::Stay => {
                let stays = usize::from(matches!(plan, Plan::Stay));
                self.people.notes().staying += stays;
                let used = self.use_it(plan).await;
                self.people.notes().staying -= stays;
                used?;
            }
        }
        let ended = self
            .until("the session is over", |s| s.phase.is_final())
            .await?;
        let reason = match (&ended.end_reason, &ended.failure) {
            (_, Some(failure)) => format!("{:?} while {:?}", failure.problem.code, failure.stage),
            (Some(reason), None) => format!("{reason:?}"),
            (None, None) => bail!("over without a reason: {ended:?}"),
        };
        let notes = &mut *self.people.notes();
        *notes.seen.ends.entry(reason).or_default() += 1;
        Ok(())
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&Session) -> bool) -> Result<Session> {
        let end = Instant::now() + PATIENCE;
        let wanted = |latest: &Option<Session>| latest.as_ref().is_some_and(&wanted);
        let found = timeout_at(end, self.latest.wait_for(wanted)).await;
        let found = found.map(|found| found.map(|session| session.clone()));
        match found {
            Ok(Ok(Some(session))) => Ok(session),
            // Whoever follows the events says why they ended.
            Ok(_) => bail!("the events ended before {what}"),
            Err(_) => {
                let seen = self.latest.borrow().clone();
                bail!(
                    "waited {} s in vain until {what}: {seen:?}",
                    PATIENCE.as_secs()
                )
            }
        }
    }

    async fn end(&mut self) -> Result<()> {
        let (id, secret) = (self.id, self.secret.clone());
        let call = |client: Client| {
            let secret = secret.clone();
            async move { client.destroy(id, &secret).await }
        };
        let people = self.people.clone();
        people
            .ask(&mut self.random, "ending a session", call)
            .await
            .map(drop)
    }

    async fn beat(&mut self) -> Result<Session> {
        let (id, secret) = (self.id, self.secret.clone());
        let beat = Heartbeat {
            client: RdpClientState::Running,
        };
        let call = |client: Client| {
            let secret = secret.clone();
            async move { client.heartbeat(id, &secret, beat).await }
        };
        let people = self.people.clone();
        people.ask(&mut self.random, "a heartbeat", call).await
    }

    /// Waits until it can be used, connects, and stays for a while.
    async fn use_it(&mut self, plan: Plan) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let session = loop {
            ensure!(
                Instant::now() < end,
                "not usable: {:?}",
                self.latest.borrow()
            );
            let known = |s: &Option<Session>| {
                let phase = s.as_ref().map(|s| s.phase);
                phase.is_some_and(|p| p.is_usable() || p.is_final() || p == SessionPhase::Ending)
            };
            let found = timeout(BEAT, self.latest.wait_for(known)).await;
            let found = found.map(|found| found.map(|session| session.clone()));
            match found {
                Ok(Ok(Some(session))) => break session,
                Ok(_) => bail!("the events ended early"),
                Err(_) => {
                    self.beat().await?;
                }
            }
        };
        let Some(rdp) = session.rdp.filter(|_| session.phase.is_usable()) else {
            return Ok(());
        };
        let Some(mut caller) = self.call(rdp.address, &rdp.certificate_sha256).await? else {
            return Ok(());
        };
        let (id, people) = (self.id, self.people.clone());
        if let Some(other) = people.notes().places.insert(rdp.address, id)
            && other != id
        {
            bail!("{} belongs to {other} as well", rdp.address);
        }
        let used = self.stay(plan, &mut caller).await;
        people.notes().places.remove(&rdp.address);
        used?;
        drop(caller);
        if matches!(plan, Plan::Visit | Plan::Stay) {
            self.end().await?;
        }
        Ok(())
    }

    /// Connects, unless the session ends meanwhile.
    async fn call(&mut self, address: SocketAddr, certificate: &str) -> Result<Option<Caller>> {
        let end = Instant::now() + USABLE;
        loop {
            let error = match timeout(ANSWER, Caller::connect(address)).await {
                Ok(Ok(caller)) => {
                    if caller.certificate_sha256 == certificate {
                        return Ok(Some(caller));
                    }
                    anyhow!("another certificate than announced")
                }
                Ok(Err(error)) => error,
                Err(_) => anyhow!("{address} does not answer"),
            };
            if !self.is_usable().await? {
                return Ok(None);
            }
            ensure!(Instant::now() < end, "it is usable, but: {error:#}");
            sleep(Duration::from_millis(200)).await;
        }
    }

    async fn is_usable(&mut self) -> Result<bool> {
        let people = self.people.clone();
        let session = people.look(self.id, &self.secret).await?;
        Ok(session.phase.is_usable())
    }

    /// Is connected for a while, and nobody throws them out.
    async fn stay(&mut self, plan: Plan, caller: &mut Caller) -> Result<()> {
        let gone = |s: &Session| s.phase.is_final() || s.phase == SessionPhase::Ending;
        let connected = move |s: &Session| s.phase == SessionPhase::Connected || gone(s);
        let mut other = self.another();
        let seen = tokio::select! {
            seen = other.until("the connection is seen", connected) => seen?,
            error = beats(self) => return error,
        };
        let mut over = self.people.0.over.clone();
        let over = async { over.wait_for(|over| *over).await.map(drop) };
        tokio::pin!(over);
        if seen.phase == SessionPhase::Connected {
            self.people.notes().seen.connected += 1;
            let until = Instant::now() + Duration::from_millis(self.random.u64(500..6_000));
            loop {
                let stays = matches!(plan, Plan::Stay);
                tokio::select! {
                    () = tokio::time::sleep_until(until), if !stays => break,
                    _ = &mut over, if stays => {
                        self.beat().await?;
                        self.people.notes().seen.stayed += u32::from(self.is_usable().await?);
                        break;
                    }
                    () = sleep(BEAT) => {
                        if gone(&self.beat().await?) {
                            break;
                        }
                        if let Err(error) = caller.still_there().await {
                            sleep(ANSWER).await;
                            ensure!(!self.is_usable().await?, "its desktop is gone: {error:#}");
                            break;
                        }
                    }
                }
            }
        }
        let last = self.people.clone().look(self.id, &self.secret).await?;
        ensure!(
            !matches!(
                last.end_reason,
                Some(EndReason::Idle | EndReason::Abandoned | EndReason::NeverConnected)
            ),
            "thrown out while connected: {last:?}"
        );
        Ok(())
    }

    /// Another who sees the same.
    fn another(&mut self) -> Person {
        Person {
            people: self.people.clone(),
            random: self.random.fork(),
            id: self.id,
            secret: self.secret.clone(),
            latest: self.latest.clone(),
        }
    }
}

/// The launcher is there; ends only when that cannot be told.
async fn beats(person: &mut Person) -> Result<()> {
    loop {
        sleep(BEAT).await;
        person.beat().await?;
    }
}
