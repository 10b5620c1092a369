//! A store of a test's own, of each kind.

use mayfly_orchestrator::store::Store;
use mayfly_orchestrator::store::memory::MemoryStore;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_orchestrator::store::replicas::ReplicaId;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_postgres::Cluster;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{Connection, Executor, SqliteConnection};
use std::sync::Arc;

/// Where a store lies.
pub(crate) enum Place {
    Memory(MemoryStore),
    Sqlite(tempfile::TempDir),
    Postgres(Box<PgConnectOptions>),
}

impl Place {
    pub(crate) async fn memory() -> Self {
        Self::Memory(MemoryStore::default())
    }

    pub(crate) async fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    pub(crate) async fn postgres() -> Self {
        let options = Cluster::get().database().await;
        PostgresStore::migrate(&options).await.unwrap();
        Self::Postgres(Box::new(options))
    }

    /// Opens it, as one process does.
    pub(crate) async fn open(&self) -> Arc<dyn Store> {
        match self {
            Self::Memory(store) => Arc::new(store.clone()),
            Self::Sqlite(folder) => {
                let store = SqliteStore::open(&folder.path().join("db")).await;
                Arc::new(store.unwrap())
            }
            Self::Postgres(options) => Arc::new(
                PostgresStore::open(*options.clone(), ReplicaId("a".to_owned()))
                    .await
                    .unwrap(),
            ),
        }
    }

    /// As another process has it open at the same time; where only one can, as another task of it has.
    pub(crate) async fn open_beside(&self, one: Arc<dyn Store>) -> Arc<dyn Store> {
        match self {
            Self::Memory(_) | Self::Sqlite(_) => one,
            Self::Postgres(_) => self.open().await,
        }
    }

    /// Whether the database refuses a statement that nobody should ever make; a model has no such words.
    pub(crate) async fn refuses(&self, statement: &'static str) -> bool {
        match self {
            Self::Memory(_) => true,
            Self::Sqlite(folder) => {
                let url = format!("sqlite://{}", folder.path().join("db").display());
                let mut db = SqliteConnection::connect(&url).await.unwrap();
                db.execute(statement).await.is_err()
            }
            Self::Postgres(options) => {
                let mut db = PgConnection::connect_with(options).await.unwrap();
                db.execute(statement).await.is_err()
            }
        }
    }
}

/// Each of these tests on each store, in a place of its own.
#[macro_export]
macro_rules! on_every_store {
    ($($test:ident),* $(,)?) => {
        $crate::on_every_store!(@ memory: $($test),*);
        $crate::on_every_store!(@ sqlite: $($test),*);
        $crate::on_every_store!(@ postgres: $($test),*);
    };
    (@ $kind:ident: $($test:ident),*) => {
        mod $kind {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test($crate::place::Place::$kind().await).await;
                }
            )*
        }
    };
}
