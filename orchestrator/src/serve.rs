//! `serve`: puts the parts together and runs until it is told to stop.
//!
//! # Guarantees
//! * One orchestrator per state folder.
//! * SIGTERM and SIGINT end it within a bound. Desktops go on; the next one takes them up.

use crate::admin;
use crate::agents::{Agents, Callers};
use crate::ansible::Ansible;
use crate::clock::Clock;
use crate::config::{Config, ProviderKind, Template};
use crate::control::Control;
use crate::desktop::Desktop;
use crate::domain::Member;
use crate::http;
use crate::provider::Provider;
use crate::provider::qemu::Qemu;
use crate::provider::simulated::Simulated;
use crate::provider::site::Site;
use crate::provider::terraform::{self, Terraform};
use crate::replica;
use crate::secret::{self, Secrets};
use crate::store::postgres::PostgresStore;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};
use crate::systemd;
use crate::telemetry::Traces;
use anyhow::{Context, bail};
use async_trait::async_trait;
use mayfly_api::agent::Call;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use secrecy::ExposeSecret;
use std::fs::{File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

/// Supervisors run this very program, also after a package upgrade replaced its file.
const PROGRAM: &str = "/proc/self/exe";
/// Workers get this long to stop.
const PATIENCE: Duration = Duration::from_secs(5);
/// The last spans get this long to be taken.
const LAST_TRACES: Duration = Duration::from_secs(3);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What failed, on what, and what to do.
pub async fn run(config: Config) -> anyhow::Result<()> {
    // Asked for before anything exists, so that a signal that comes early is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    if let Err(error) = allow_many_files() {
        warn!(%error, "so many streams of events as the soft limit of open files leaves can be followed");
    }
    let _lock = own(&config.state_dir)?;
    let secrets = Arc::new(Secrets::open(&config.state_dir.join("secret.key"))?);
    let store = open_store(&config).await?;
    let traces = Traces::open(&config.telemetry, &store.me().0)?;
    let mut providers = open_local_providers(&config)?;
    let listen = config.listen;
    let listener = TcpListener::bind(listen).await.with_context(|| {
        format!("{listen} cannot be listened on; stop what uses it, or set `listen` in the configuration")
    })?;
    let address = listener.local_addr()?;
    let administrators = admin::listen(&config.state_dir)
        .inspect_err(|error| warn!("{error:#}"))
        .ok();
    if config.uses(ProviderKind::Terraform) {
        let callers = Known(store.clone(), secrets.clone());
        let agents = Agents::open(&config.agents, &config.state_dir, Arc::new(callers)).await?;
        let parts = terraform::Parts {
            orchestrator: PROGRAM.into(),
            state: config.state_dir.clone(),
            machines: store.clone(),
            secrets: secrets.clone(),
            agents,
            api: format!("http://{address}"),
            rest: config.rest(),
        };
        let provider = Terraform::new(config.provider.terraform.clone(), parts)?;
        // Also without a playbook: runs of an earlier configuration are found and ended.
        let provider = Ansible::new(
            Arc::new(provider),
            config.ansible.clone(),
            config.playbooks(),
            PROGRAM.into(),
            &config.state_dir,
            secrets.clone(),
        )?;
        providers.push(Arc::new(provider));
    }
    if config.uses_domain() {
        let directory = Arc::new(config.domain.open(&secrets.installation())?);
        for provider in providers.iter_mut().filter(|p| {
            let of_it = |t: &&Template| t.provider.as_str() == p.kind();
            config.template.iter().filter(of_it).any(|t| t.domain)
        }) {
            let (machines, state) = (provider.clone(), &config.state_dir);
            let member = Member::new(machines, directory.clone(), secrets.clone(), state)?;
            *provider = Arc::new(member);
        }
    }
    let (clock, spans) = (Clock::default(), traces.clone());
    let control = Control::start(config, store.clone(), secrets, clock, providers, spans).await?;
    info!(%address, "listening");
    let server = tokio::spawn(http::serve(control.clone(), listener));
    if let Some(administrators) = administrators {
        tokio::spawn(admin::serve(control.clone(), administrators));
    }
    systemd::ready();
    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: stopping; desktops go on"),
        _ = interrupt.recv() => info!("SIGINT: stopping; desktops go on"),
        () = systemd::feed(control.clone()) => {}
    }
    systemd::stopping();
    control.stop(PATIENCE).await;
    server.await??;
    traces.close(LAST_TRACES).await;
    store.close().await;
    Ok(())
}

/// Every stream of events is an open file. The soft limit, 1024 mostly, is for programs that use `select`.
fn allow_many_files() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Opens the database; one that only this orchestrator uses is brought up to date.
///
/// # Errors
/// What failed, on what.
pub async fn open_store(config: &Config) -> anyhow::Result<Arc<dyn Store>> {
    if config.store.is_postgres() {
        let store = PostgresStore::open(config.store.open()?, replica::id(&config.state_dir)).await;
        return Ok(Arc::new(store.context(NOT_POSTGRES)?));
    }
    let path = config.state_dir.join("mayfly.db");
    let store = SqliteStore::open(&path).await;
    Ok(Arc::new(store.with_context(|| unusable(&path))?))
}

/// Reads the database that a service may be using.
///
/// # Errors
/// What failed, on what, and what to do.
pub async fn read_store<T>(
    config: &Config,
    read: impl AsyncFnOnce(&dyn Store) -> Result<T, StoreError>,
) -> anyhow::Result<T> {
    let path = config.state_dir.join("mayfly.db");
    let (place, options) = if config.store.is_postgres() {
        let place = "the database at store.url".to_owned();
        (place, Some(config.store.open()?))
    } else {
        (path.display().to_string(), None)
    };
    let done = async {
        let store: Box<dyn Store> = match options {
            Some(options) => {
                Box::new(PostgresStore::open(options, replica::id(&config.state_dir)).await?)
            }
            None => Box::new(SqliteStore::open_to_read(&path).await?),
        };
        let done = read(&*store).await;
        store.close().await;
        done
    };
    done.await.with_context(|| {
        format!(
            "{place} cannot be read; if it is of an older version, run: mayfly-orchestrator migrate"
        )
    })
}

const NOT_POSTGRES: &str = "the database at store.url cannot be used";

fn unusable(path: &Path) -> String {
    format!("the database {} cannot be used", path.display())
}

/// Brings the database up to date; says what it was and is.
///
/// # Errors
/// What failed, on what.
pub async fn migrate(config: &Config) -> anyhow::Result<String> {
    let (what, schema) = if config.store.is_postgres() {
        let schema = PostgresStore::migrate(&config.store.open()?).await;
        ("at store.url".to_owned(), schema.context(NOT_POSTGRES)?)
    } else {
        let _lock = own(&config.state_dir)?;
        let path = config.state_dir.join("mayfly.db");
        let store = SqliteStore::open(&path).await;
        let store = store.with_context(|| unusable(&path))?;
        store.close().await;
        (path.display().to_string(), store.schema())
    };
    let version = |v: Option<i64>| v.map_or_else(|| "nothing".to_owned(), |v| v.to_string());
    Ok(format!(
        "the schema of the database {what}: from {} to {}\n",
        version(schema.found),
        version(schema.wanted)
    ))
}

/// Copies the database into a new file.
///
/// # Errors
/// What failed, on what.
pub async fn back_up(config: &Config, to: &Path) -> anyhow::Result<()> {
    if config.store.is_postgres() {
        bail!(
            "the database is PostgreSQL; its own pg_dump copies it (docs/operations.md, Backup and restore)"
        );
    }
    let path = config.state_dir.join("mayfly.db");
    let copied = SqliteStore::copy(&path, to, Clock::default().now()).await;
    copied.with_context(|| format!("{} cannot be copied", path.display()))
}

/// The agents of live desktops are believed, by the orchestrator that works for them: they call the others next.
struct Known(Arc<dyn Store>, Arc<Secrets>);

#[async_trait]
impl Callers for Known {
    async fn believe(&self, call: &Call) -> bool {
        let token = self.1.agent_token(call.session);
        if !secret::same(&token, call.token.expose_secret()) {
            return false;
        }
        let record = self.0.get(call.session).await.ok().flatten();
        record.is_some_and(|r| {
            r.live_desktop().map(Desktop::name) == Some(call.desktop)
                && r.owner.as_ref() == Some(self.0.me())
        })
    }
}

/// The providers of this machine that the catalogue names.
///
/// # Errors
/// What is wrong with one of them.
pub fn open_local_providers(config: &Config) -> anyhow::Result<Vec<Arc<dyn Provider>>> {
    let mut providers: Vec<Arc<dyn Provider>> = Vec::new();
    if config.uses(ProviderKind::Qemu) {
        let settings = config.provider.qemu.clone();
        let qemu = Qemu::new(settings, &config.state_dir, PROGRAM.into())?;
        providers.push(Arc::new(qemu));
    }
    if config.uses(ProviderKind::Simulated) {
        let settings = config.provider.simulated.clone();
        providers.push(match settings.site.clone() {
            Some(socket) => Arc::new(Site::at(socket)),
            None => {
                let folder = config.state_dir.join("simulated");
                Arc::new(Simulated::open(settings, &folder)?)
            }
        });
    }
    Ok(providers)
}

/// The state folder, made private, and locked for as long as the file lives.
///
/// # Errors
/// If it cannot be written or another orchestrator has it.
pub fn own(folder: &Path) -> anyhow::Result<File> {
    let shown = folder.display();
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::set_permissions(folder, PermissionsExt::from_mode(0o700)))
        .with_context(|| format!("the state folder {shown} cannot be used; set state_dir"))?;
    let path = folder.join("lock");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "another orchestrator uses the state folder {shown}; stop it, or set another state_dir"
            )
        }
        Err(TryLockError::Error(e)) => {
            Err(e).context(format!("{} cannot be locked", path.display()))
        }
    }
}
