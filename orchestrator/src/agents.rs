//! Where agents call that have no virtio-serial port: TLS, one desktop a connection.
//!
//! # Guarantees
//! * A connection is believed only after its [`Call`], which must come at once: a token that is the session's, and a desktop
//!   that is the session's, which is worked for here. Anything else is closed without a word; an agent calls the next then.
//! * Who has not been believed yet can hold a bounded number of connections for a bounded time, and nothing else.
//! * The certificate is the same after a restart, so that agents find their orchestrator again.

use crate::provider::{AgentChannel, channel};
use anyhow::{Context, bail};
use async_trait::async_trait;
use data_encoding::HEXLOWER;
use mayfly_api::DesktopName;
use mayfly_api::agent::{Call, Line};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// So many connections may be unbelieved at a time.
const UNBELIEVED: usize = 256;
/// So many of them from one address: a desktop has one agent, but several may be behind one address.
const UNBELIEVED_EACH: usize = 16;
/// A handshake and a call take less.
const PATIENCE: Duration = Duration::from_secs(10);
/// A call is some 200 bytes.
const LONGEST_CALL: u64 = 4096;

/// `[agents]` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentsConfig {
    /// Where agents are waited for, such as `0.0.0.0:5001`; without it, only desktops of this machine can be made.
    pub listen: Option<SocketAddr>,
    /// The same as desktops reach it, `host:port`; without it, `listen`.
    pub address: Option<String>,
    /// The same of the other orchestrators that share the database, all with the `agents.pem` of this one.
    pub others: Vec<String>,
}

/// Who may call.
#[async_trait]
pub trait Callers: Send + Sync + 'static {
    /// Whether that desktop has that session, and the token is the session's.
    async fn believe(&self, call: &Call) -> bool;
}

/// The listener, and the lines that wait to be taken up.
pub struct Agents {
    line: Line,
    waiting: Mutex<HashMap<DesktopName, AgentChannel>>,
    /// Cuts the line that each desktop's agent opened last, taken up or not.
    open: Mutex<HashMap<DesktopName, CancellationToken>>,
    arrived: Notify,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Agents {
    fn drop(&mut self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = task.as_ref() {
            task.abort();
        }
    }
}

impl Agents {
    /// Listens; key and certificate are kept in `folder`.
    ///
    /// # Errors
    /// What cannot be listened on or read, and what to do.
    pub async fn open(
        config: &AgentsConfig,
        folder: &Path,
        callers: Arc<dyn Callers>,
    ) -> anyhow::Result<Arc<Self>> {
        let Some(listen) = config.listen else {
            bail!(
                "desktops on other machines need a place to call: set agents.listen in the configuration, such as \"0.0.0.0:5001\""
            );
        };
        let listener = TcpListener::bind(listen).await.with_context(|| {
            format!("{listen} cannot be listened on; stop what uses it, or set agents.listen")
        })?;
        let (certificate, key) = identity(folder)?;
        let address = match &config.address {
            Some(address) => address.clone(),
            None => listener.local_addr()?.to_string(),
        };
        let line = Line {
            address,
            others: config.others.clone(),
            certificate_sha256: HEXLOWER.encode(&Sha256::digest(&certificate)),
        };
        let tls =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_no_client_auth()
                .with_single_cert(vec![certificate], key)?;
        let agents = Arc::new(Self {
            line,
            waiting: Mutex::default(),
            open: Mutex::default(),
            arrived: Notify::new(),
            task: Mutex::default(),
        });
        // A weak one: the listener ends with the last who uses it.
        let task = tokio::spawn(accept(
            listener,
            TlsAcceptor::from(Arc::new(tls)),
            Arc::downgrade(&agents),
            callers,
        ));
        *agents.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(agents)
    }

    /// What agents must know.
    #[must_use]
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// The line of that desktop's agent, as soon as it has called; the newest, if it called more than once.
    pub async fn channel(&self, name: DesktopName) -> AgentChannel {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // From here on nothing is missed.
            arrived.as_mut().enable();
            if let Some(channel) = self.waiting().remove(&name) {
                return channel;
            }
            arrived.await;
        }
    }

    /// Closes that desktop's line.
    pub fn forget(&self, name: DesktopName) {
        self.replace(name, None);
    }

    /// A newer line takes the place of the older: an agent calls again only when it hears nothing any more, and the network may
    /// not have told this side.
    fn replace(&self, name: DesktopName, newer: Option<(AgentChannel, CancellationToken)>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut waiting = self.waiting();
        waiting.remove(&name);
        if let Some(older) = open.remove(&name) {
            older.cancel();
        }
        if let Some((channel, cut)) = newer {
            waiting.insert(name, channel);
            open.insert(name, cut);
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<DesktopName, AgentChannel>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many unbelieved connections there are from each address.
type Unbelieved = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// One of them, for as long as this lives.
struct Counted(Unbelieved, IpAddr);

impl Counted {
    /// `None`: there are too many from there already.
    fn one_more(all: &Unbelieved, from: IpAddr) -> Option<Self> {
        let mut counts = all.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(from).or_default();
        if *count >= UNBELIEVED_EACH {
            return None;
        }
        *count += 1;
        Some(Self(all.clone(), from))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    agents: std::sync::Weak<Agents>,
    callers: Arc<dyn Callers>,
) {
    let places = Arc::new(Semaphore::new(UNBELIEVED));
    let unbelieved = Unbelieved::default();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let (socket, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "an agent's connection could not be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(counted) = Counted::one_more(&unbelieved, from.ip()) else {
            debug!(%from, "too many callers from there that say nothing");
            continue;
        };
        let (tls, agents, callers) = (tls.clone(), agents.clone(), callers.clone());
        tokio::spawn(async move {
            let answered = tokio::time::timeout(PATIENCE, answer(socket, tls, &*callers)).await;
            drop((place, counted));
            match answered {
                Ok(Ok((name, channel, cut))) => {
                    if let Some(agents) = agents.upgrade() {
                        debug!(desktop = %name, "its agent has called");
                        agents.replace(name, Some((channel, cut)));
                        agents.arrived.notify_waiters();
                    }
                }
                Ok(Err(error)) => {
                    debug!(error = format!("{error:#}"), "a caller was not believed");
                }
                Err(_) => debug!("a caller said nothing"),
            }
        });
    }
}

async fn answer(
    socket: TcpStream,
    tls: TlsAcceptor,
    callers: &dyn Callers,
) -> anyhow::Result<(DesktopName, AgentChannel, CancellationToken)> {
    socket.set_nodelay(true)?;
    let mut stream = tls.accept(socket).await?;
    let call: Call = serde_json::from_slice(&first_line(&mut stream).await?)
        .context("the first line is not a call")?;
    if !callers.believe(&call).await {
        bail!("{} does not have that session, or that token", call.desktop);
    }
    let cut = CancellationToken::new();
    Ok((call.desktop, channel::over(stream, cut.clone()), cut))
}

/// Byte for byte: what comes after the line belongs to the channel.
async fn first_line(stream: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Vec<u8>> {
    let mut stream = stream.take(LONGEST_CALL);
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            byte => line.push(byte),
        }
    }
}

/// The certificate and key in `folder`, made if there is none.
fn identity(folder: &Path) -> anyhow::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
    let path = folder.join("agents.pem");
    let shown = path.display();
    if !path.exists() {
        let made = rcgen::generate_simple_self_signed(["mayfly".to_owned()])?;
        let part = folder.join("agents.part");
        let mut file = std::fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .with_context(|| format!("{} cannot be written", part.display()))?;
        file.write_all(made.signing_key.serialize_pem().as_bytes())?;
        file.write_all(made.cert.pem().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&part, &path).with_context(|| format!("{shown} cannot be made"))?;
    }
    let pem = std::fs::read(&path).with_context(|| format!("{shown} cannot be read"))?;
    let damaged =
        || format!("{shown} is damaged; remove it when no desktop lives, and another is made");
    let certificate = CertificateDer::from_pem_slice(&pem).with_context(damaged)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).with_context(damaged)?;
    Ok((certificate, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayfly_api::SessionId;
    use mayfly_api::agent::{FromAgent, ToAgent};
    use mayfly_api::pinned::Pinned;
    use secrecy::ExposeSecret;
    use tokio::io::AsyncWriteExt;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    struct OneToken;

    #[async_trait]
    impl Callers for OneToken {
        async fn believe(&self, call: &Call) -> bool {
            call.token.expose_secret() == "right"
        }
    }

    async fn agents(folder: &Path) -> Arc<Agents> {
        let config = AgentsConfig {
            listen: Some("127.0.0.1:0".parse().unwrap()),
            ..AgentsConfig::default()
        };
        Agents::open(&config, folder, Arc::new(OneToken))
            .await
            .unwrap()
    }

    async fn call(line: &Line, token: &str) -> TlsStream<TcpStream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pinned = Pinned::new(&line.certificate_sha256, provider.clone());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(pinned))
            .with_no_client_auth();
        let socket = TcpStream::connect(&line.address).await.unwrap();
        let mut stream = TlsConnector::from(Arc::new(config))
            .connect("mayfly".try_into().unwrap(), socket)
            .await
            .unwrap();
        let call = Call {
            session: SessionId::new(),
            token: token.into(),
            desktop: name(),
        };
        let mut said = serde_json::to_vec(&call).unwrap();
        // In one piece with what follows: nothing of it may be lost.
        said.extend_from_slice(b"\n{\"type\":\"evidence\",\"connections\":4}\n");
        stream.write_all(&said).await.unwrap();
        stream.flush().await.unwrap();
        stream
    }

    fn name() -> DesktopName {
        DesktopName::from_number(5).unwrap()
    }

    #[tokio::test]
    async fn an_agent_that_is_believed_has_a_channel_and_a_newer_call_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let agents = agents(folder.path()).await;
        let mut old = call(agents.line(), "right").await;
        let mut channel = agents.channel(name()).await;
        let heard = channel.from_agent.recv().await;
        assert!(matches!(
            heard,
            Some(FromAgent::Evidence { connections: 4, .. })
        ));
        channel.to_agent.send(ToAgent::Ack).await.unwrap();
        let mut said = [0; 15];
        old.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"{\"type\":\"ack\"}\n");

        // The network does not tell this side that the old one is dead.
        let _new = call(agents.line(), "right").await;
        drop(agents.channel(name()).await);
        assert!(channel.from_agent.recv().await.is_none(), "it was cut");
    }

    #[tokio::test]
    async fn a_caller_without_the_token_is_cut_off_and_heard_by_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let agents = agents(folder.path()).await;
        let mut stranger = call(agents.line(), "wrong").await;
        let mut nothing = [0; 1];
        assert!(matches!(stranger.read(&mut nothing).await, Ok(0) | Err(_)));
        assert!(agents.waiting().is_empty());
    }

    #[tokio::test]
    async fn one_address_cannot_take_every_place() {
        let folder = tempfile::tempdir().unwrap();
        let agents = agents(folder.path()).await;
        let address = &agents.line().address;
        let mut silent = Vec::new();
        for _ in 0..UNBELIEVED_EACH {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut one_more = TcpStream::connect(address).await.unwrap();
        let mut nothing = [0; 1];
        assert!(matches!(one_more.read(&mut nothing).await, Ok(0) | Err(_)));
        let heard = tokio::time::timeout(Duration::from_millis(100), silent[0].read(&mut nothing));
        assert!(heard.await.is_err(), "the others are still waited for");
        drop(silent);
        // They were seen to go: the next is heard.
        loop {
            let mut next = TcpStream::connect(address).await.unwrap();
            let heard = tokio::time::timeout(Duration::from_millis(100), next.read(&mut nothing));
            if heard.await.is_err() {
                break;
            }
        }
    }

    #[tokio::test]
    async fn the_certificate_is_the_same_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let first = agents(folder.path())
            .await
            .line()
            .certificate_sha256
            .clone();
        let second = agents(folder.path())
            .await
            .line()
            .certificate_sha256
            .clone();
        assert_eq!(first, second);
    }
}
