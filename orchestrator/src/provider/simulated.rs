//! Machines that are only pretended, with delays and faults: for load tests, demonstrations and chaos.
//!
//! # Guarantees
//! * What the control plane sees is real: the agent speaks the protocol's own messages, and the RDP address answers an
//!   X.224 negotiation and a TLS handshake with a certificate of the machine's own. A connection that goes on after the
//!   handshake counts as an RDP connection until it closes.
//! * A machine is a file in the provider's folder, so it outlives the process, as a real one does.

use super::news::News;
use super::{
    AgentChannel, Check, CheckStatus, DesktopSpec, MachineState, Provider, ProviderError, Section,
    Steps, absent,
};
use async_trait::async_trait;
use data_encoding::{BASE64, HEXLOWER};
use jiff::Timestamp;
use mayfly_api::agent::{Bootstrap, FromAgent, ToAgent};
use mayfly_api::{Absence, DesktopName};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// `[provider.simulated]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SimulatedConfig {
    /// How long making a machine takes, in milliseconds.
    pub create_ms: u64,
    /// How long it boots, in milliseconds.
    pub boot_ms: u64,
    /// How long it takes its identity, in milliseconds.
    pub configure_ms: u64,
    /// How long its removal takes, in milliseconds.
    pub destroy_ms: u64,
    /// How often its agent reports, in milliseconds.
    pub evidence_ms: u64,
    /// Each machine answers at a loopback address with this beginning.
    pub address_prefix: String,
    /// The port there.
    pub rdp_port: u16,
    /// The socket of a process that has the machines ([`super::site`]): orchestrators that share a database share them there.
    pub site: Option<PathBuf>,
    /// What goes wrong.
    pub fault: Fault,
    /// How many times; absent: always.
    pub fault_count: Option<u32>,
}

impl Default for SimulatedConfig {
    fn default() -> Self {
        Self {
            create_ms: 300,
            boot_ms: 700,
            configure_ms: 500,
            destroy_ms: 200,
            evidence_ms: 2_000,
            address_prefix: "127.78".to_owned(),
            rdp_port: 3389,
            site: None,
            fault: Fault::None,
            fault_count: None,
        }
    }
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Desktops cannot be made here: preflight says so.
    Unavailable,
    /// Making a machine fails half-way.
    CreateFails,
    /// Something else is in the way of making it.
    CreateBusy,
    /// There is no room for it.
    NoRoom,
    /// Its guest agent never answers.
    BootHangs,
    /// It stops while it boots.
    BootDies,
    /// Its agent cannot give it its identity.
    AgentFails,
    /// Its RDP server shows another certificate than its agent announced.
    WrongCertificate,
    /// Removing it fails.
    DestroyFails,
    /// What it leaves to read never comes.
    WordsHang,
}

/// The steps that [`Steps`] is told of.
pub const STEPS: [&str; 4] = [
    "create: file made",
    "create: machine runs",
    "destroy: machine gone",
    "destroy: file gone",
];

/// See the module. Clones are the same world.
#[derive(Clone)]
pub struct Simulated {
    world: Arc<World>,
    steps: Steps,
}

#[derive(Debug)]
struct World {
    config: SimulatedConfig,
    folder: PathBuf,
    fault: Mutex<(Fault, Option<u32>)>,
    machines: Mutex<HashMap<DesktopName, Machine>>,
    /// One create or destroy at a time for each machine.
    busy: Mutex<HashMap<DesktopName, Arc<tokio::sync::Mutex<()>>>>,
    /// What tests tell of its machines.
    news: News,
}

/// A machine's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    whole: bool,
    dead: Option<String>,
    bootstrapped: bool,
    /// The end of its lifetime, which needs no orchestrator.
    ends_at: Timestamp,
    /// Base64 of the DER.
    certificate: String,
    key: String,
}

#[derive(Debug)]
struct Machine {
    kept: Kept,
    booted_at: tokio::time::Instant,
    bootstrap: Option<Bootstrap>,
    connections: watch::Sender<u32>,
    silent: watch::Sender<bool>,
    warnings: Vec<ToAgent>,
    rdp: JoinSet<()>,
    agent: JoinSet<()>,
}

impl Machine {
    fn die(&mut self, reason: &str) {
        self.kept.dead = Some(reason.to_owned());
        self.agent.abort_all();
        self.rdp.abort_all();
    }
}

fn failed(what: impl std::fmt::Display) -> ProviderError {
    ProviderError::Failed(what.to_string())
}

impl Simulated {
    /// The machines in `folder`, which is made if needed; those that ran still run.
    ///
    /// # Errors
    /// [`ProviderError::Unavailable`] if the folder or an address prefix cannot be used.
    pub fn open(config: SimulatedConfig, folder: &Path) -> Result<Self, ProviderError> {
        let unavailable =
            |e: std::io::Error| ProviderError::Unavailable(format!("{}: {e}", folder.display()));
        std::fs::create_dir_all(folder).map_err(unavailable)?;
        let world = Self {
            world: Arc::new(World {
                fault: Mutex::new((config.fault, config.fault_count)),
                config,
                folder: folder.to_owned(),
                machines: Mutex::default(),
                busy: Mutex::default(),
                news: News::default(),
            }),
            steps: crate::failpoints::steps(),
        };
        let probe = DesktopName::from_number(1).ok_or_else(|| failed("no name"))?;
        world.address(probe)?;
        for name in world.names()? {
            let text = std::fs::read(world.file(name)).unwrap_or_default();
            // A file cut short is a half-made machine: listed, dead, removable.
            if let Ok(kept) = serde_json::from_slice::<Kept>(&text) {
                world.start(name, kept)?;
            }
        }
        Ok(world)
    }

    /// The same world with a function that is told of every step; for tests.
    #[must_use]
    pub fn with_steps(mut self, steps: Steps) -> Self {
        self.steps = steps;
        self
    }

    async fn alone(&self, name: DesktopName) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = lock(&self.world.busy).entry(name).or_default().clone();
        lock.lock_owned().await
    }

    fn step(&self, step: &'static str) -> Result<(), ProviderError> {
        debug_assert!(STEPS.contains(&step));
        (self.steps)(step)
    }

    /// From now on this goes wrong, so many times (`None`: always).
    pub fn inject(&self, fault: Fault, count: Option<u32>) {
        *lock(&self.world.fault) = (fault, count);
    }

    /// Pretends that so many RDP connections are open.
    pub fn set_connections(&self, name: DesktopName, connections: u32) {
        if let Some(machine) = self.machines().get(&name) {
            machine.connections.send_replace(connections);
        }
    }

    /// Stops a machine, as a person does who chooses "shut down" in it.
    pub fn power_off(&self, name: DesktopName) {
        if let Some(machine) = self.machines().get_mut(&name) {
            machine.die("powered off");
        }
    }

    /// Its agent says nothing from now on.
    pub fn silence(&self, name: DesktopName) {
        if let Some(machine) = self.machines().get(&name) {
            machine.silent.send_replace(true);
        }
    }

    /// The warnings that its agent was sent.
    #[must_use]
    pub fn warnings(&self, name: DesktopName) -> Vec<ToAgent> {
        let machines = self.machines();
        machines
            .get(&name)
            .map(|m| m.warnings.clone())
            .unwrap_or_default()
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<DesktopName, Machine>> {
        lock(&self.world.machines)
    }

    fn strikes(&self, fault: Fault) -> bool {
        let mut current = lock(&self.world.fault);
        match &mut *current {
            (f, _) if *f != fault => false,
            (_, None) => true,
            (_, Some(0)) => false,
            (_, Some(left)) => {
                *left -= 1;
                true
            }
        }
    }

    fn file(&self, name: DesktopName) -> PathBuf {
        self.world.folder.join(format!("{name}.json"))
    }

    fn names(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.world.folder).map_err(failed)? {
            let file = entry.map_err(failed)?.file_name();
            let name = file.to_str().and_then(|f| f.split_once('.')).map(|f| f.0);
            names.extend(name.and_then(|n| n.parse::<DesktopName>().ok()));
        }
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    fn save(&self, name: DesktopName, kept: &Kept) -> Result<(), ProviderError> {
        use std::io::Write;
        let part = self.world.folder.join(format!("{name}.part"));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .map_err(failed)?;
        file.write_all(&serde_json::to_vec(kept).map_err(failed)?)
            .map_err(failed)?;
        std::fs::rename(part, self.file(name)).map_err(failed)
    }

    fn address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        let config = &self.world.config;
        // .0 and .255 are skipped, so 254 names share a third byte.
        let (third, fourth) = ((name.number() / 254) & 255, name.number() % 254 + 1);
        let ip = format!("{}.{third}.{fourth}", config.address_prefix);
        let ip = ip.parse::<IpAddr>().ok().filter(IpAddr::is_loopback);
        let ip = ip.ok_or_else(|| {
            let prefix = &config.address_prefix;
            ProviderError::Unavailable(format!(
                "provider.simulated.address_prefix = {prefix:?}: the first two bytes of a loopback address are needed, such as 127.78"
            ))
        })?;
        Ok(SocketAddr::new(ip, config.rdp_port))
    }

    /// The machine of `kept` runs from now on.
    fn start(&self, name: DesktopName, kept: Kept) -> Result<(), ProviderError> {
        let connections = watch::Sender::new(0);
        let mut rdp = JoinSet::new();
        if kept.whole && kept.dead.is_none() {
            let decode = |text: &str| BASE64.decode(text.as_bytes()).map_err(failed);
            let certificate = CertificateDer::from(decode(&kept.certificate)?);
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(decode(&kept.key)?));
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let tls = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .map_err(failed)?
                .with_no_client_auth()
                .with_single_cert(vec![certificate], key)
                .map_err(failed)?;
            let listener = listen(self.address(name)?)
                .map_err(|e| failed(format_args!("{name}: its RDP address cannot be used: {e}")))?;
            rdp.spawn(answer_rdp(listener, Arc::new(tls), connections.clone()));
        }
        self.machines().insert(
            name,
            Machine {
                kept,
                booted_at: tokio::time::Instant::now(),
                bootstrap: None,
                connections,
                silent: watch::Sender::new(false),
                warnings: Vec::new(),
                rdp,
                agent: JoinSet::new(),
            },
        );
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(64)
}

#[async_trait]
impl Provider for Simulated {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn is_bound(&self) -> bool {
        self.world.config.site.is_none()
    }

    async fn preflight(&self) -> Vec<Check> {
        let (status, detail) = if self.strikes(Fault::Unavailable) {
            (
                CheckStatus::Error,
                "the simulated provider is told to be unavailable; remove provider.simulated.fault",
            )
        } else {
            (
                CheckStatus::Warning,
                "desktops are only pretended; for real ones set provider = \"qemu\" in [[template]]",
            )
        };
        vec![Check {
            name: "simulated".to_owned(),
            status,
            detail: detail.to_owned(),
        }]
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        let name = spec.name;
        let _alone = self.alone(name).await;
        if self.file(name).exists() {
            return Err(failed(format_args!("{name} exists already")));
        }
        let made = rcgen::generate_simple_self_signed([name.to_string()]).map_err(failed)?;
        let mut kept = Kept {
            whole: false,
            dead: None,
            bootstrapped: false,
            ends_at: crate::clock::after(Timestamp::now(), spec.lifetime),
            certificate: BASE64.encode(made.cert.der()),
            key: BASE64.encode(&made.signing_key.serialize_der()),
        };
        self.save(name, &kept)?;
        self.step("create: file made")?;
        tokio::time::sleep(ms(self.world.config.create_ms)).await;
        if self.strikes(Fault::CreateFails) {
            return Err(failed(format_args!("{name}: the simulated disk broke")));
        }
        if self.strikes(Fault::CreateBusy) {
            let why = format!("{name}: somebody has the lock of the simulated disk");
            return Err(ProviderError::Busy(why));
        }
        if self.strikes(Fault::NoRoom) {
            let why = format!("{name}: the simulated host is full");
            return Err(ProviderError::NoCapacity(why));
        }
        kept.whole = true;
        if self.strikes(Fault::BootDies) {
            kept.dead = Some("the simulated kernel panicked".to_owned());
        }
        self.start(name, kept.clone())?;
        self.save(name, &kept)?;
        self.step("create: machine runs")
    }

    fn news(&self) -> News {
        self.world.news.clone()
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        if !self.file(name).exists() {
            return Ok(MachineState::Absent);
        }
        let mut machines = self.machines();
        let Some(machine) = machines.get_mut(&name).filter(|m| m.kept.whole) else {
            let reason = "half-made".to_owned();
            return Ok(MachineState::Dead { reason });
        };
        if machine.kept.dead.is_none() && machine.kept.ends_at <= Timestamp::now() {
            machine.die("its lifetime ended");
        }
        Ok(match &machine.kept.dead {
            None => MachineState::Running,
            Some(reason) => MachineState::Dead {
                reason: reason.clone(),
            },
        })
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        let hangs = self.strikes(Fault::BootHangs);
        let mut machines = self.machines();
        let machine = machines
            .get_mut(&name)
            .filter(|m| m.kept.whole && m.kept.dead.is_none())
            .ok_or_else(|| failed(format_args!("{name} does not run")))?;
        if hangs || machine.booted_at.elapsed() < ms(self.world.config.boot_ms) {
            return Err(ProviderError::NotYet(format!("{name} boots")));
        }
        machine.bootstrap = Some(bootstrap.clone());
        machine.kept.bootstrapped = true;
        self.save(name, &machine.kept)
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        let (to_control, from_agent) = mpsc::channel(16);
        let (to_agent, from_control) = mpsc::channel(16);
        let mut machines = self.machines();
        let machine = machines
            .get_mut(&name)
            .filter(|m| m.kept.whole && m.kept.dead.is_none())
            .ok_or_else(|| ProviderError::NotYet(format!("{name} does not run")))?;
        machine.agent.abort_all();
        machine.agent = JoinSet::new();
        machine
            .agent
            .spawn(self.clone().play_agent(name, to_control, from_control));
        Ok(AgentChannel {
            from_agent,
            to_agent,
        })
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        self.address(name)
    }

    /// It tells its password, as no machine should.
    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        if self.strikes(Fault::WordsHang) {
            std::future::pending::<()>().await;
        }
        if !self.file(name).exists() {
            return Vec::new();
        }
        let machines = self.machines();
        let bootstrap = machines.get(&name).and_then(|m| m.bootstrap.as_ref());
        let password = bootstrap.map_or("", |b| b.password.expose_secret());
        vec![Section {
            title: "console",
            text: format!("{name} is only pretended\nroot may come in with {password}\n"),
        }]
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let _alone = self.alone(name).await;
        let gone = || {
            let file = self.file(name).display().to_string();
            Ok(vec![absent("simulated", "machine", file)])
        };
        // A process that was killed while it wrote leaves the second alone.
        let files = [
            self.file(name),
            self.world.folder.join(format!("{name}.part")),
        ];
        if !files.iter().any(|file| file.exists()) {
            return gone();
        }
        tokio::time::sleep(ms(self.world.config.destroy_ms)).await;
        if self.strikes(Fault::DestroyFails) {
            return Err(failed(format_args!("{name}: the simulated disk is busy")));
        }
        let machine = self.machines().remove(&name);
        if let Some(mut machine) = machine {
            machine.agent.shutdown().await;
            machine.rdp.shutdown().await;
        }
        self.step("destroy: machine gone")?;
        for file in files {
            match std::fs::remove_file(file) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            }
        }
        self.step("destroy: file gone")?;
        gone()
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        self.names()
    }
}

impl Simulated {
    /// What the agent of a machine does while its channel is open.
    async fn play_agent(
        self,
        name: DesktopName,
        to_control: mpsc::Sender<FromAgent>,
        mut from_control: mpsc::Receiver<ToAgent>,
    ) {
        let evidence_every = ms(self.world.config.evidence_ms);
        let (mut connections, mut silent) = {
            let machines = self.machines();
            let Some(machine) = machines.get(&name) else {
                return;
            };
            (machine.connections.subscribe(), machine.silent.subscribe())
        };
        let mut acknowledged = 0_u32;
        let mut identity_at = None;
        loop {
            let (bootstrap, certificate, bootstrapped) = {
                let machines = self.machines();
                let Some(m) = machines.get(&name) else { return };
                let der = BASE64
                    .decode(m.kept.certificate.as_bytes())
                    .unwrap_or_default();
                (
                    m.bootstrap.clone(),
                    HEXLOWER.encode(&Sha256::digest(der)),
                    m.kept.bootstrapped,
                )
            };
            let (message, pause) = match bootstrap {
                None if !bootstrapped => (
                    FromAgent::Hello {
                        version: "simulated".to_owned(),
                        boot_id: name.to_string(),
                    },
                    ms(50),
                ),
                Some(bootstrap) if acknowledged == 0 => {
                    let configured = ms(self.world.config.configure_ms);
                    let since = identity_at.get_or_insert_with(tokio::time::Instant::now);
                    if since.elapsed() < configured {
                        tokio::time::sleep_until(*since + configured).await;
                    }
                    // Acks of earlier hellos are not the answer to what comes now.
                    while from_control.try_recv().is_ok() {}
                    let message = if self.strikes(Fault::AgentFails) {
                        FromAgent::Failed {
                            step: "user".to_owned(),
                            message: "the simulated disk is read-only".to_owned(),
                        }
                    } else {
                        let wrong = self.strikes(Fault::WrongCertificate);
                        FromAgent::Ready {
                            session: bootstrap.session,
                            token: bootstrap.token,
                            certificate_sha256: if wrong { "0".repeat(64) } else { certificate },
                            ssh_host_key: None,
                            steps_ms: Vec::new(),
                        }
                    };
                    (message, ms(500))
                }
                _ => {
                    let message = FromAgent::Evidence {
                        connections: *connections.borrow_and_update(),
                        idle_ms: None,
                    };
                    (message, evidence_every)
                }
            };
            let asked = matches!(message, FromAgent::Ready { .. });
            if !*silent.borrow_and_update() && to_control.send(message).await.is_err() {
                return;
            }
            let pause = tokio::time::sleep(pause);
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    changed = connections.changed() => if changed.is_err() { return } else { break },
                    changed = silent.changed() => if changed.is_err() { return } else { break },
                    message = from_control.recv() => match message {
                        None => return,
                        Some(ToAgent::Ack) if asked => { acknowledged += 1; break }
                        Some(ToAgent::Ack) => {}
                        Some(warning) => {
                            if let Some(machine) = self.machines().get_mut(&name) {
                                machine.warnings.push(warning);
                            }
                        }
                    },
                }
            }
        }
    }
}

async fn answer_rdp(listener: TcpListener, tls: Arc<ServerConfig>, open: watch::Sender<u32>) {
    let mut clients = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        while clients.try_join_next().is_some() {}
        let (tls, open) = (tls.clone(), open.clone());
        clients.spawn(async move {
            // A client that breaks off is its own affair.
            let _ = serve_rdp(stream, tls, open).await;
        });
    }
}

async fn serve_rdp(
    mut stream: TcpStream,
    tls: Arc<ServerConfig>,
    open: watch::Sender<u32>,
) -> std::io::Result<()> {
    let mut header = [0_u8; 4];
    stream.read_exact(&mut header).await?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] != 3 || !(11..=1024).contains(&length) {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut request = vec![0_u8; length - 4];
    stream.read_exact(&mut request).await?;
    // TPKT, X.224 connection confirm, RDP_NEG_RSP: TLS (MS-RDPBCGR 2.2.1.2).
    let confirm = [
        3, 0, 0, 19, 14, 0xd0, 0, 0, 0x12, 0x34, 0, 2, 0, 8, 0, 1, 0, 0, 0,
    ];
    stream.write_all(&confirm).await?;
    let mut stream = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await?;
    let mut data = [0_u8; 4096];
    if stream.read(&mut data).await? == 0 {
        return Ok(());
    }
    let _counted = Counted::new(open);
    while stream.read(&mut data).await? > 0 {}
    Ok(())
}

/// One open connection, for as long as it lives.
struct Counted(watch::Sender<u32>);

impl Counted {
    fn new(open: watch::Sender<u32>) -> Self {
        open.send_modify(|n| *n += 1);
        Self(open)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n = n.saturating_sub(1));
    }
}
