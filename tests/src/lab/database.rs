//! The database of an orchestrator of the lab's: its own by default, or one on a PostgreSQL.

use super::Lab;
use anyhow::{Result, ensure};
use mayfly_orchestrator::store::Store;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_orchestrator::store::replicas::ReplicaId;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_postgres::Cluster;
use sqlx::postgres::PgConnectOptions;
use std::os::unix::fs::PermissionsExt;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Database {
    /// None: the file in the orchestrator's folder.
    postgres: Option<PgConnectOptions>,
    /// What names it in a configuration.
    pub(super) section: String,
}

impl Database {
    /// A new one, with its schema; in the orchestrator's folder if there is no server.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn new(lab: &Lab, server: Option<&Cluster>) -> Result<Self> {
        let Some(server) = server else {
            return Ok(Self::default());
        };
        let options = server.database().await;
        PostgresStore::migrate(&options).await?;
        let password = lab.path("config/password");
        std::fs::write(&password, server.password())?;
        std::fs::set_permissions(&password, PermissionsExt::from_mode(0o600))?;
        let url = server.url(&options);
        Ok(Self {
            postgres: Some(options),
            section: format!("[store]\nurl = {url:?}\npassword_file = {password:?}\n"),
        })
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.postgres {
            Some(_) => "postgresql",
            None => "sqlite",
        }
    }

    /// Opens it beside the orchestrator.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn open(&self, lab: &Lab) -> Result<Box<dyn Store>> {
        Ok(match &self.postgres {
            Some(options) => {
                Box::new(PostgresStore::open(options.clone(), ReplicaId::one()).await?)
            }
            None => Box::new(SqliteStore::open_to_read(&lab.path("state/mayfly.db")).await?),
        })
    }

    /// Fails if it has a desktop that is not gone, or the place of a machine.
    ///
    /// # Errors
    /// With what it has.
    pub async fn nothing_is_owned(&self, lab: &Lab) -> Result<()> {
        let store = self.open(lab).await?;
        let owned = (store.desktops().await, store.reserved().await);
        store.close().await;
        let (desktops, reserved) = (owned.0?, owned.1?);
        ensure!(desktops.is_empty(), "not gone: {desktops:?}");
        ensure!(reserved.is_empty(), "reserved: {reserved:?}");
        Ok(())
    }
}
