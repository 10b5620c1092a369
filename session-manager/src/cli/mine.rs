//! The sessions that launchers of this person made on this machine.

use mayfly_api::client::Client;
use mayfly_api::{Session, SessionId};
use mayfly_session_manager::api::ApiTrouble;
use mayfly_session_manager::record::{Record, Records};
use mayfly_session_manager::secrets::{Keyring, Secrets};
use mayfly_session_manager::settings::Places;
use secrecy::SecretString;

/// Records and the keyring.
pub(crate) struct Mine {
    pub(crate) records: Records,
    secrets: Secrets,
}

impl Mine {
    pub(crate) fn new(places: &Places) -> Self {
        Self {
            records: Records::new(&places.data_dir),
            secrets: Secrets::new(Box::new(Keyring)),
        }
    }

    /// What calls on this session need.
    pub(crate) async fn access(&self, record: &Record) -> Result<(Client, SecretString), String> {
        let secret = self.secrets.get(record.id.to_string()).await?;
        let secret = secret.ok_or(
            "its key is not in the keyring; only the launcher that made it can reach it".to_owned(),
        )?;
        let client = Client::new(&record.orchestrator).map_err(|e| e.to_string())?;
        Ok((client, secret))
    }

    pub(crate) async fn session(&self, record: &Record) -> Result<Session, String> {
        let (client, secret) = self.access(record).await?;
        client
            .get(record.id, &secret)
            .await
            .map_err(|e| ApiTrouble::from(e).to_string())
    }

    /// Forgets a session that is gone, unless its launcher lives and will do so itself.
    pub(crate) async fn forget(&self, id: SessionId) {
        if let Ok(Some(_claim)) = self.records.claim(id) {
            self.records.remove(id);
            let _ = self.secrets.remove(id.to_string()).await;
        }
    }
}
