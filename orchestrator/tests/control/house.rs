//! An orchestrator of a test's own, and the pretended machines that outlive it.

use futures_util::StreamExt;
use mayfly_api::client::Client;
use mayfly_api::{CreateSession, DesktopName, Session, SessionEvent, SessionId, SessionPhase};
use mayfly_orchestrator::clock::Clock;
use mayfly_orchestrator::config::{Config, Limits, ProviderKind, Template};
use mayfly_orchestrator::control::Control;
use mayfly_orchestrator::http;
use mayfly_orchestrator::provider::Provider;
use mayfly_orchestrator::provider::simulated::{Simulated, SimulatedConfig};
use mayfly_orchestrator::secret::Secrets;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_orchestrator::telemetry::Traces;
use secrecy::SecretString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Anything here takes milliseconds; a busy machine gets this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What nobody owns is removed when it is seen for the second time.
pub(crate) fn prompt() -> Limits {
    Limits {
        quarantine_s: 0,
        ..Limits::default()
    }
}

/// Loopback addresses that no other test uses: another second byte in each house, another port in each process.
pub(crate) fn quick() -> SimulatedConfig {
    static HOUSES: AtomicU32 = AtomicU32::new(0);
    let house = 100 + HOUSES.fetch_add(1, Ordering::Relaxed) % 150;
    SimulatedConfig {
        create_ms: 20,
        boot_ms: 20,
        configure_ms: 20,
        destroy_ms: 20,
        evidence_ms: 50,
        address_prefix: format!("127.{house}"),
        rdp_port: u16::try_from(20_000 + std::process::id() % 12_000).unwrap(),
        ..SimulatedConfig::default()
    }
}

/// Waits for something to be so.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "it did not come to this: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) struct House {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) machines: Simulated,
    pub(crate) clock: Clock,
    pub(crate) control: Control,
    pub(crate) client: Client,
    pub(crate) url: String,
    /// In force from the next start on.
    pub(crate) limits: Limits,
    /// Likewise.
    pub(crate) traces: Traces,
    store: SqliteStore,
    server: JoinHandle<std::io::Result<()>>,
}

impl Drop for House {
    fn drop(&mut self) {
        // Workers may still write into it for a moment, and that would keep its own end from removing it.
        for _ in 0..200 {
            if std::fs::remove_dir_all(self.dir.path()).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Somebody's session.
pub(crate) struct Mine {
    pub(crate) id: SessionId,
    pub(crate) secret: SecretString,
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with(prompt(), quick()).await
    }

    pub(crate) async fn with(limits: Limits, machines: SimulatedConfig) -> Self {
        Self::traced(limits, machines, Traces::default()).await
    }

    pub(crate) async fn traced(limits: Limits, machines: SimulatedConfig, traces: Traces) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let machines = Simulated::open(machines, &dir.path().join("machines")).unwrap();
        let clock = Clock::default();
        let (control, store, server, address) =
            start(&dir, &machines, &clock, &limits, &traces).await;
        let url = format!("http://{address}");
        Self {
            client: Client::new(&url).unwrap(),
            dir,
            machines,
            clock,
            control,
            url,
            limits,
            traces,
            store,
            server,
        }
    }

    /// The orchestrator is gone at once, whatever it was doing; another takes its place. Machines go on.
    pub(crate) async fn crash(&mut self) {
        self.crash_with(|_| ()).await;
    }

    /// The same, with something done to its database meanwhile.
    pub(crate) async fn crash_with(&mut self, meanwhile: impl FnOnce(&Path)) {
        self.server.abort();
        self.control.stop(Duration::ZERO).await;
        self.store.close().await;
        meanwhile(&self.dir.path().join("mayfly.db"));
        let (control, store, server, address) = start(
            &self.dir,
            &self.machines,
            &self.clock,
            &self.limits,
            &self.traces,
        )
        .await;
        self.url = format!("http://{address}");
        self.client = Client::new(&self.url).unwrap();
        (self.control, self.store, self.server) = (control, store, server);
    }

    /// A backup.
    pub(crate) async fn copy(&self) -> PathBuf {
        let (database, copy) = (
            self.dir.path().join("mayfly.db"),
            self.dir.path().join("copy"),
        );
        let now = self.clock.now();
        SqliteStore::copy(&database, &copy, now).await.unwrap();
        copy
    }

    /// It stops, that copy is put in the place of its database, and it starts again.
    pub(crate) async fn restore(&mut self, copy: &Path) {
        self.crash_with(|database| {
            for ending in ["-wal", "-shm"] {
                let _ = std::fs::remove_file(format!("{}{ending}", database.display()));
            }
            std::fs::copy(copy, database).unwrap();
        })
        .await;
    }

    /// So many desktops were made and are gone: their numbers are used.
    pub(crate) async fn used(&self, desktops: u32) {
        for number in 1..=desktops {
            let (mine, desktop) = self.ready().await;
            assert_eq!(desktop.number(), number);
            self.client.destroy(mine.id, &mine.secret).await.unwrap();
            self.reaches(&mine, SessionPhase::Ended).await;
        }
    }

    /// The database can be read, and takes no change, as on a full disk.
    pub(crate) async fn refuse_changes(&self) {
        use sqlx::Connection;
        let path = self.dir.path().join("mayfly.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
        let mut other = sqlx::SqliteConnection::connect_with(&options)
            .await
            .unwrap();
        for event in ["INSERT", "UPDATE"] {
            let trigger = format!(
                "CREATE TRIGGER refuse_{event} BEFORE {event} ON pulse BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            );
            let trigger = sqlx::AssertSqlSafe(trigger);
            sqlx::query(trigger).execute(&mut other).await.unwrap();
        }
        other.close().await.unwrap();
    }

    /// The database is gone.
    pub(crate) async fn lose_the_store(&self) {
        self.store.close().await;
    }

    pub(crate) async fn create(&self) -> Mine {
        let key = SessionId::new().to_string();
        let created = self
            .client
            .create(&CreateSession::default(), &key)
            .await
            .unwrap();
        Mine {
            id: created.session.id,
            secret: created.secret,
        }
    }

    pub(crate) async fn get(&self, mine: &Mine) -> Session {
        self.client.get(mine.id, &mine.secret).await.unwrap()
    }

    pub(crate) async fn reaches(&self, mine: &Mine, phase: SessionPhase) -> Session {
        until(&format!("{phase:?}"), async || {
            let session = self.get(mine).await;
            let over = session.phase.is_final() && session.phase != phase;
            assert!(!over, "it is {session:?}, not {phase:?}");
            (session.phase == phase).then_some(session)
        })
        .await
    }

    pub(crate) async fn ready(&self) -> (Mine, DesktopName) {
        let mine = self.create().await;
        let session = self.reaches(&mine, SessionPhase::Ready).await;
        (mine, session.desktop.unwrap())
    }

    /// Time passes, and the agents have had time to report since.
    pub(crate) async fn pass(&self, seconds: u64) {
        // Evidence is stale after 15 s of silence: let it come in between, as it does in life.
        for _ in 0..seconds.div_ceil(10) {
            self.clock.advance(Duration::from_secs(10.min(seconds)));
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    }

    /// The session's events until it is over.
    pub(crate) async fn all_events(&self, mine: &Mine) -> Vec<SessionEvent> {
        let events = self.client.events(mine.id, &mine.secret);
        let all = events.map(Result::unwrap).collect::<Vec<_>>();
        tokio::time::timeout(PATIENCE, all).await.unwrap()
    }

    pub(crate) async fn nothing_is_left(&self) {
        until("no machine is left", async || {
            self.machines.list().await.unwrap().is_empty().then_some(())
        })
        .await;
    }
}

async fn start(
    dir: &tempfile::TempDir,
    machines: &Simulated,
    clock: &Clock,
    limits: &Limits,
    traces: &Traces,
) -> (
    Control,
    SqliteStore,
    JoinHandle<std::io::Result<()>>,
    SocketAddr,
) {
    let store = SqliteStore::open(&dir.path().join("mayfly.db"))
        .await
        .unwrap();
    let config = Config {
        state_dir: dir.path().to_owned(),
        limits: limits.clone(),
        template: vec![Template {
            name: "pretended".to_owned(),
            provider: ProviderKind::Simulated,
            cpus: 2,
            memory_mib: 1024,
            keep_max_s: None,
            domain: false,
            shares: Vec::new(),
            playbook: None,
        }],
        ..Config::default()
    };
    let secrets = Arc::new(Secrets::open(&dir.path().join("secret.key")).unwrap());
    let providers: Vec<Arc<dyn Provider>> = vec![Arc::new(machines.clone())];
    let control = Control::start(
        config,
        Arc::new(store.clone()),
        secrets,
        clock.clone(),
        providers,
        traces.clone(),
    )
    .await
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(http::serve(control.clone(), listener));
    (control, store, server, address)
}
