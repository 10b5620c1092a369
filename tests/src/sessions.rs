//! Sessions asked for at an orchestrator's API, as a launcher does.

use crate::caller::Caller;
use crate::lab::{Desk, Lab, Orchestrator, Process, until};
use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;
use mayfly_api::{CreateSession, Credentials, Session, SessionId, SessionPhase, StageName};
use secrecy::{ExposeSecret, SecretString};
use std::time::Duration;

/// A micro guest is ready after some seconds, a desktop after some more; a loaded machine may take many times that.
pub const READY: Duration = Duration::from_secs(300);
/// From a reason to end to the verified end.
pub const END: Duration = Duration::from_secs(90);

/// A session that a test holds.
#[derive(Debug)]
pub struct Held {
    /// Its id.
    pub id: SessionId,
    /// Its secret.
    pub secret: SecretString,
}

impl Held {
    /// Asks for a desktop.
    ///
    /// # Errors
    /// When the orchestrator refuses.
    pub async fn create(orchestrator: &Orchestrator) -> Result<Self> {
        Self::ask(orchestrator, &CreateSession::default()).await
    }

    /// Asks for this desktop.
    ///
    /// # Errors
    /// When the orchestrator refuses.
    pub async fn ask(orchestrator: &Orchestrator, wish: &CreateSession) -> Result<Self> {
        let key = SessionId::new().to_string();
        let created = orchestrator.client().create(wish, &key).await?;
        Ok(Self {
            id: created.session.id,
            secret: created.secret,
        })
    }

    /// The session as it is now.
    ///
    /// # Errors
    /// When the orchestrator does not know it.
    pub async fn get(&self, orchestrator: &Orchestrator) -> Result<Session> {
        Ok(orchestrator.client().get(self.id, &self.secret).await?)
    }

    /// Waits until the session is as wanted.
    ///
    /// # Errors
    /// After `bound`, with the session as it was last.
    pub async fn until(
        &self,
        orchestrator: &Orchestrator,
        what: &str,
        bound: Duration,
        wanted: impl Fn(&Session) -> bool,
    ) -> Result<Session> {
        let mut seen = None;
        let found = until(what, bound, async || {
            let session = self.get(orchestrator).await?;
            let good = wanted(&session);
            seen = Some(session.clone());
            Ok(good.then_some(session))
        })
        .await;
        found.with_context(|| format!("the session is {seen:?}"))
    }

    /// Waits until its desktop is ready.
    ///
    /// # Errors
    /// When it fails or takes longer than [`READY`].
    pub async fn ready(&self, orchestrator: &Orchestrator) -> Result<Session> {
        let phase = |s: &Session| s.phase.is_usable() || s.phase.is_final();
        let session = self
            .until(orchestrator, "the desktop is ready", READY, phase)
            .await?;
        ensure!(session.phase == SessionPhase::Ready, "{session:?}");
        Ok(session)
    }

    /// Follows the events until this stage runs.
    ///
    /// # Errors
    /// When it is never reached.
    pub async fn reach(&self, orchestrator: &Orchestrator, stage: StageName) -> Result<()> {
        let mut events = orchestrator.client().events(self.id, &self.secret);
        let follow = async {
            while let Some(event) = events.next().await {
                let session = event?.session;
                if session.stages.iter().any(|s| s.name == stage) {
                    return Ok(());
                }
            }
            bail!("the events ended before {stage:?}")
        };
        tokio::time::timeout(READY, follow)
            .await
            .with_context(|| format!("{stage:?} was never reached"))?
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// After [`END`].
    pub async fn ended(&self, orchestrator: &Orchestrator) -> Result<Session> {
        self.until(orchestrator, "the session has ended", END, |s| {
            s.phase.is_final()
        })
        .await
    }

    /// Asks for its end and waits for it.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn destroyed(&self, orchestrator: &Orchestrator) -> Result<Session> {
        orchestrator.client().destroy(self.id, &self.secret).await?;
        self.ended(orchestrator).await
    }

    /// Connects to its RDP port and compares the certificate with the one announced.
    ///
    /// # Errors
    /// When nobody answers, or somebody else.
    pub async fn call(&self, orchestrator: &Orchestrator) -> Result<Caller> {
        let rdp = self
            .get(orchestrator)
            .await?
            .rdp
            .context("no address to call")?;
        let caller = Caller::connect(rdp.address).await?;
        ensure!(
            caller.certificate_sha256 == rdp.certificate_sha256,
            "another certificate than announced"
        );
        Ok(caller)
    }

    /// Opens its desktop in a real xfreerdp, as a launcher would.
    ///
    /// # Errors
    /// When it is not ready or the client does not start.
    pub async fn view(
        &self,
        lab: &Lab,
        desk: &Desk,
        orchestrator: &Orchestrator,
    ) -> Result<Process> {
        let credentials = orchestrator
            .client()
            .credentials(self.id, &self.secret)
            .await?;
        self.view_as(lab, desk, orchestrator, &credentials).await
    }

    /// The same as this person, with this password.
    ///
    /// # Errors
    /// When it is not ready or the client does not start.
    pub async fn view_as(
        &self,
        lab: &Lab,
        desk: &Desk,
        orchestrator: &Orchestrator,
        credentials: &Credentials,
    ) -> Result<Process> {
        let session = self.get(orchestrator).await?;
        let rdp = session.rdp.context("ready without an address")?;
        let pairs: Vec<&str> = (0..rdp.certificate_sha256.len() / 2)
            .filter_map(|i| rdp.certificate_sha256.get(2 * i..2 * i + 2))
            .collect();
        let mut command = lab.command("xfreerdp");
        desk.environment(&mut command);
        command.args([
            format!("/v:{}", rdp.address),
            format!("/u:{}", credentials.user),
            "/d:".to_owned(),
            format!("/cert:deny,fingerprint:sha256:{}", pairs.join(":")),
            "/sec:tls".to_owned(),
        ]);
        // Without a password xrdp's own login window asks for it.
        if !credentials.password.expose_secret().is_empty() {
            command.arg("/from-stdin:force");
        }
        let password = format!("{}\n", credentials.password.expose_secret());
        lab.start_with_input(
            &format!("xfreerdp-{}-{}", credentials.user, self.id),
            command,
            password.as_bytes(),
        )
    }
}
