//! Runs the core: feeds it events, runs its effects, pushes what it shows.
//!
//! # Guarantees
//! * Effects run in tasks of their own: nothing they wait for holds the core up, so Quit always ends.
//! * What is remembered or forgotten is on disk before the manager says that it has ended.
//! * An idle manager does not wake up: ticks come only when the core wants them.

use crate::api::ApiTrouble;
use crate::core::{self, Access, Call, Effect, Event, Moment, Recovered, Start, State};
use crate::handle::{Exit, Handle, Request, Tray, WindowWish};
use crate::notify::{self, Notifier};
use crate::rdp;
use crate::record::{Claim, Record, Records};
use crate::secrets::{Keyring, SecretStore, Secrets};
use crate::settings::{self, Places, SettingsError};
use crate::text::{Catalogue, system_language, system_locale};
use crate::view::{RdpOptions, Settings};
use futures_util::StreamExt;
use jiff::{Timestamp, ZonedDateTime};
use mayfly_api::client::Client;
use mayfly_api::{CreateSession, Created, Heartbeat, Keep, Session, SessionId};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// Longest wait, on the way out, for what must be on disk and for the RDP client to stop.
const LAST_TASKS: Duration = Duration::from_secs(4);
/// A tick that comes this much later on the wall than on the launcher's own clock: the machine slept.
const SLEPT: Duration = Duration::from_secs(5);

/// What a surface gives the manager.
#[derive(Debug)]
pub struct Config {
    /// Where files are.
    pub places: Places,
    /// The settings in force.
    pub settings: Settings,
    /// Why the settings file could not be used, if so: `settings` are the defaults then, and the person is told.
    pub settings_problem: Option<SettingsError>,
    /// Login name inside the desktop; absent: the orchestrator's default.
    pub user: Option<String>,
}

impl Config {
    /// Settings from the file in `places`.
    #[must_use]
    pub fn load(places: Places) -> Self {
        let (settings, settings_problem) = match settings::load(&places.settings_file()) {
            Ok(settings) => (settings, None),
            Err(problem) => (Settings::default(), Some(problem)),
        };
        Self {
            places,
            settings,
            settings_problem,
            user: None,
        }
    }
}

/// The world outside, replaceable in tests.
pub struct Adapters {
    /// Where secrets are kept.
    pub secrets: Box<dyn SecretStore>,
    /// Who shows notifications.
    pub notifier: Arc<dyn Notifier>,
}

impl Adapters {
    /// The real ones.
    #[must_use]
    pub fn system() -> Self {
        Self {
            secrets: Box::new(Keyring),
            notifier: Arc::new(notify::System),
        }
    }
}

/// Starts the manager on the current tokio runtime.
#[must_use]
pub fn spawn(config: Config, adapters: Adapters) -> Handle {
    let started = Instant::now();
    let (state, first) = State::start(Start {
        now: moment(started),
        settings: config.settings.clone(),
        settings_problem: config.settings_problem.map(|e| e.to_string()),
        system_language: system_language().to_owned(),
        user: config.user,
        launcher: uuid::Uuid::now_v7().to_string(),
    });
    let (requests, inbox) = mpsc::unbounded_channel();
    let (events, news) = mpsc::unbounded_channel();
    let (view_out, views) = watch::channel(core::view(&state));
    let (tray_out, trays) = watch::channel(tray(&state));
    let (window_out, windows) = watch::channel(WindowWish::default());
    let (settings_out, settings) = watch::channel(config.settings);
    let (exit_out, exit) = watch::channel(None);
    let manager = Manager {
        started,
        catalogue: Catalogue::new(state.language()),
        state: Some(state),
        world: World {
            events,
            records: Records::new(&config.places.data_dir),
            secrets: Secrets::new(adapters.secrets),
            client_folder: config.places.data_dir.clone(),
        },
        places: config.places,
        notifier: adapters.notifier,
        last_tasks: JoinSet::new(),
        following: None,
        clients: HashMap::new(),
        claims: HashMap::new(),
        exit: None,
        view_out,
        tray_out,
        window_out,
        settings_out,
    };
    tokio::spawn(async move {
        let exit = manager.run(first, inbox, news).await;
        exit_out.send_replace(Some(exit));
    });
    Handle {
        requests,
        views,
        trays,
        windows,
        settings,
        exit,
    }
}

fn moment(started: Instant) -> Moment {
    Moment {
        since_start: started.elapsed(),
        wall: ZonedDateTime::now(),
    }
}

fn tray(state: &State) -> Tray {
    Tray {
        menu: core::menu(state),
        icon: core::icon(state),
    }
}

/// What the effects' tasks share.
#[derive(Clone)]
struct World {
    events: mpsc::UnboundedSender<Event>,
    records: Records,
    secrets: Secrets,
    client_folder: std::path::PathBuf,
}

struct Manager {
    started: Instant,
    /// `None` only while a step takes it.
    state: Option<State>,
    catalogue: Catalogue,
    world: World,
    places: Places,
    notifier: Arc<dyn Notifier>,
    last_tasks: JoinSet<()>,
    following: Option<JoinHandle<()>>,
    /// What stops the clients that run.
    clients: HashMap<u64, oneshot::Sender<()>>,
    claims: HashMap<SessionId, Claim>,
    exit: Option<Exit>,
    view_out: watch::Sender<crate::view::View>,
    tray_out: watch::Sender<Tray>,
    window_out: watch::Sender<WindowWish>,
    settings_out: watch::Sender<Settings>,
}

impl Manager {
    async fn run(
        mut self,
        first: Vec<Effect>,
        mut inbox: mpsc::UnboundedReceiver<Request>,
        mut news: mpsc::UnboundedReceiver<Event>,
    ) -> Exit {
        self.perform(first);
        let mut last_wall = Timestamp::now();
        let mut last_own = Instant::now();
        loop {
            if let Some(exit) = self.exit {
                // Clients that were not told to stop are let go.
                self.clients.clear();
                let all = async { while self.last_tasks.join_next().await.is_some() {} };
                // A keyring that hangs must not keep the person waiting.
                let _ = tokio::time::timeout(LAST_TASKS, all).await;
                return exit;
            }
            let wake = self.state.as_ref().and_then(State::wake_at);
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(self.started + at).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                request = inbox.recv() => match request {
                    Some(Request::Act(action)) => Event::Act(action),
                    Some(Request::Save(settings, answer)) => {
                        let saved = settings::save(&self.places.settings_file(), &settings);
                        let used = saved.is_ok();
                        let _ = answer.send(saved);
                        if !used {
                            continue;
                        }
                        Event::Settings(settings)
                    }
                    // No surface is left.
                    None => Event::Act(crate::view::Action::Quit),
                },
                Some(event) = news.recv() => event,
                () = sleep => Event::Tick,
            };
            let (wall, own) = (Timestamp::now(), Instant::now());
            let by_wall = Duration::try_from(wall.duration_since(last_wall)).unwrap_or_default();
            if by_wall > own - last_own + SLEPT {
                self.step(Event::Woke);
            }
            (last_wall, last_own) = (wall, own);
            self.step(event);
        }
    }

    fn step(&mut self, event: Event) {
        let Some(state) = self.state.take() else {
            return;
        };
        tracing::debug!(?event);
        let (state, effects) = core::step(state, moment(self.started), event);
        self.show(&state);
        self.state = Some(state);
        self.perform(effects);
    }

    fn show(&mut self, state: &State) {
        let changed = |old: &mut crate::view::View| {
            let new = core::view(state);
            let differs = *old != new;
            *old = new;
            differs
        };
        if self.view_out.send_if_modified(changed) {
            let language = self.view_out.borrow().language.clone();
            self.catalogue = Catalogue::new(&language);
        }
        self.tray_out.send_if_modified(|old| {
            let new = tray(state);
            let differs = *old != new;
            *old = new;
            differs
        });
        self.settings_out.send_if_modified(|old| {
            let differs = old != state.settings();
            old.clone_from(state.settings());
            differs
        });
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            tracing::debug!(?effect);
            self.perform_one(effect);
        }
    }

    fn perform_one(&mut self, effect: Effect) {
        let world = self.world.clone();
        match effect {
            Effect::FindClient(attempt, options) => self.ask(async move {
                let found = rdp::find(options.client.as_deref()).await;
                Event::ClientFound(attempt, found.map(|client| client.to_string()))
            }),
            Effect::Create {
                attempt,
                orchestrator,
                key,
                user,
            } => self.ask(async move {
                let request = CreateSession {
                    user,
                    template: None,
                    language: system_locale(),
                    time_zone: iana_time_zone::get_timezone().ok(),
                    keyboard: None,
                };
                let created = match Client::new(&orchestrator) {
                    Ok(client) => client.create(&request, &key).await,
                    Err(error) => Err(error),
                };
                let made = created.map(|Created { session, secret }| {
                    let access = Access {
                        orchestrator,
                        id: session.id,
                        secret,
                    };
                    Box::new((access, session))
                });
                Event::Created(attempt, made.map_err(ApiTrouble::from))
            }),
            Effect::Follow(access) => {
                self.unfollow();
                self.following = Some(tokio::spawn(follow(access, world.events)));
            }
            Effect::Unfollow => self.unfollow(),
            Effect::FetchCredentials(access) => self.ask(async move {
                let answer = match Client::new(&access.orchestrator) {
                    Ok(client) => client.credentials(access.id, &access.secret).await,
                    Err(error) => Err(error),
                };
                Event::Credentials(access.id, answer.map_err(ApiTrouble::from))
            }),
            Effect::StartClient {
                run,
                endpoint,
                credentials,
                title,
                options,
            } => {
                let (stop, stopped) = oneshot::channel();
                self.clients.insert(run, stop);
                let job = ClientJob {
                    run,
                    endpoint,
                    credentials,
                    title,
                    options,
                };
                // Among the last tasks only once it is stopped: a client that is left alone outlives the launcher.
                self.last_tasks.spawn(client(job, stopped, world));
            }
            Effect::StopClient(run) => {
                if let Some(stop) = self.clients.remove(&run) {
                    let _ = stop.send(());
                }
            }
            Effect::Beat(access, client) => {
                self.call(access, Call::Beat, move |c, a| async move {
                    c.heartbeat(a.id, &a.secret, Heartbeat { client }).await
                });
            }

            Effect::Keep(access, seconds) => {
                self.call(access, Call::Keep, move |c, a| async move {
                    c.keep(a.id, &a.secret, Keep { seconds }).await
                });
            }
            Effect::Destroy(access) => {
                let call = self.call(access, Call::Destroy, |c, a| async move {
                    c.destroy(a.id, &a.secret).await
                });
                // Whoever quits at once has still asked for it.
                self.last_tasks.spawn(async move {
                    let _ = call.await;
                });
            }

            Effect::Remember(access) => self.remember(access, world),
            Effect::Forget(id) => {
                self.claims.remove(&id);
                self.last_tasks.spawn(async move {
                    world.records.remove(id);
                    if let Err(error) = world.secrets.remove(id.to_string()).await {
                        tracing::debug!(%error, "the keyring kept a secret that is useless now");
                    }
                });
            }
            Effect::Recover => {
                let (event, claim) = (world.events.clone(), world.records.clone());
                match first_orphan(&claim) {
                    Some((record, claim)) => {
                        self.claims.insert(record.id, claim);
                        self.ask(async move { Event::Recovered(recover(record, &world).await) });
                    }
                    None => drop(event.send(Event::Recovered(Recovered::Nothing))),
                }
            }
            Effect::Notify { title, body } => {
                let (title, body) = (self.catalogue.text(&title), self.catalogue.text(&body));
                self.notifier.notify(&title, &body);
            }
            Effect::Window(page) => self.window_out.send_modify(|wish| {
                wish.revision += 1;
                wish.page = page;
            }),
            Effect::Exit(exit) => {
                self.unfollow();
                self.exit = Some(exit);
            }
        }
    }

    /// Runs a question in a task of its own; its answer comes back as an event.
    fn ask(&self, question: impl Future<Output = Event> + Send + 'static) {
        drop(self.asking(question));
    }

    fn asking(&self, question: impl Future<Output = Event> + Send + 'static) -> JoinHandle<()> {
        let events = self.world.events.clone();
        tokio::spawn(async move {
            // Nobody listens any more: the manager has ended.
            let _ = events.send(question.await);
        })
    }

    fn call<F>(
        &self,
        access: Access,
        call: Call,
        run: impl FnOnce(Client, Access) -> F + Send + 'static,
    ) -> JoinHandle<()>
    where
        F: Future<Output = Result<Session, mayfly_api::client::ClientError>> + Send,
    {
        let id = access.id;
        self.asking(async move {
            let answer = match Client::new(&access.orchestrator) {
                Ok(client) => run(client, access).await,
                Err(error) => Err(error),
            };
            Event::Answer(id, call, answer.map(Box::new).map_err(ApiTrouble::from))
        })
    }

    fn remember(&mut self, access: Access, world: World) {
        let record = Record {
            id: access.id,
            orchestrator: access.orchestrator,
            started_at: Timestamp::now(),
        };
        match world.records.add(&record) {
            Ok(claim) => drop(self.claims.insert(access.id, claim)),
            // The session is a lease: it ends by itself if this launcher dies.
            Err(error) => tracing::warn!(%error, "the session cannot be remembered"),
        }
        self.last_tasks.spawn(async move {
            let set = world.secrets.set(access.id.to_string(), access.secret);
            if let Err(why) = set.await {
                let _ = world.events.send(Event::SecretsInMemory(why));
            }
        });
    }

    fn unfollow(&mut self) {
        if let Some(task) = self.following.take() {
            task.abort();
        }
    }
}

async fn follow(access: Access, events: mpsc::UnboundedSender<Event>) {
    let client = match Client::new(&access.orchestrator) {
        Ok(client) => client,
        Err(error) => {
            let _ = events.send(Event::StreamFailed(access.id, error.into()));
            return;
        }
    };
    let mut stream = client.events(access.id, &access.secret);
    while let Some(item) = stream.next().await {
        let event = match item {
            Ok(event) => Event::Session(Box::new(event.session)),
            Err(error) => Event::StreamFailed(access.id, error.into()),
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

struct ClientJob {
    run: u64,
    endpoint: mayfly_api::RdpEndpoint,
    credentials: mayfly_api::Credentials,
    title: String,
    options: RdpOptions,
}

/// Starts a client and waits for its end, or for the word to stop it. If the manager goes away without that word,
/// the client is left alone.
async fn client(job: ClientJob, stopped: oneshot::Receiver<()>, world: World) {
    let run = job.run;
    let tell = |event| drop(world.events.send(event));
    let started = async {
        let found = rdp::find(job.options.client.as_deref()).await?;
        rdp::start(
            &found,
            &job.endpoint,
            &job.credentials,
            &job.title,
            &job.options,
            &world.client_folder,
        )
        .await
    };
    let mut running = match started.await {
        Ok(running) => running,
        Err(trouble) => return tell(Event::ClientStarted(run, Err(trouble))),
    };
    tell(Event::ClientStarted(run, Ok(())));
    tokio::select! {
        (end, tail) = running.wait() => tell(Event::ClientEnded(run, end, tail)),
        word = stopped => if word.is_ok() {
            running.stop().await;
        },
    }
}

fn first_orphan(records: &Records) -> Option<(Record, Claim)> {
    records
        .all()
        .into_iter()
        .find_map(|record| match records.claim(record.id) {
            Ok(Some(claim)) => Some((record, claim)),
            Ok(None) | Err(_) => None,
        })
}

async fn recover(record: Record, world: &World) -> Recovered {
    let id = record.id;
    let secret = match world.secrets.get(id.to_string()).await {
        Ok(Some(secret)) => secret,
        Ok(None) => return Recovered::SecretLost(id),
        Err(error) => {
            tracing::warn!(%error, "the keyring does not give the secret back");
            return Recovered::SecretLost(id);
        }
    };
    let access = Access {
        orchestrator: record.orchestrator,
        id,
        secret,
    };
    let asked = match Client::new(&access.orchestrator) {
        Ok(client) => client.get(id, &access.secret).await,
        Err(error) => Err(error),
    };
    match asked.map_err(ApiTrouble::from) {
        Ok(session) if session.phase.is_final() => Recovered::Gone(id),
        Ok(session) => Recovered::Found(access, Box::new(session)),
        Err(trouble) if trouble.says_gone() => Recovered::Gone(id),
        Err(trouble) => Recovered::Unknown(id, trouble),
    }
}
