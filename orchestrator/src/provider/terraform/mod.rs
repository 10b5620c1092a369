//! Desktops on Proxmox VE: made by Terraform or OpenTofu from a module, seen and removed through the API.
//!
//! # What there is of a desktop
//! * a row in the store ([`Machines`]): its node, Terraform's state and lock; written first and removed last but one;
//! * a folder `<state>/terraform/<name>`: the run that makes it ([`run`]);
//! * a virtual machine whose number follows from the desktop's: numbers of desktops are never used twice, so neither is this.
//!
//! # Guarantees
//! Those of [`Provider`], except that a machine's lifetime is not bounded here: nothing of ours runs beside it. Its agent powers it
//! off when the orchestrator stays silent, and the reaper removes what is left.
//!
//! * Terraform only makes. What exists is asked of the API, and removed through it by number: that works with a state, half of one or
//!   none, where `terraform destroy` after a kill finds an empty state and leaves the machine.
//! * A virtual machine is ours by number *and* name, and by a row of ours or by the tag of this installation. Any other is somebody
//!   else's, another Mayfly's too: it is never touched.
//! * A machine that was migrated is found where it is: its node is looked up by its number before every call.

mod events;
mod line;
mod place;
mod run;

use super::news::News;
use super::{
    AgentChannel, Check, CheckStatus, DesktopSpec, JOURNAL, Locks, MachineState, Provider,
    ProviderError, Section, SshServer, Steps, absent, journal,
};
use crate::agents::Agents;
use crate::clock::Clock;
use crate::pve::call::{self, Kind};
use crate::pve::preflight::{Rest, Wanted, preflight};
use crate::pve::reply::{GuestLine, NodeLine, Power, Resource, StorageLine};
use crate::pve::task::{Patience, Tasks, follow};
use crate::pve::{
    Cause, Client, Endpoint, Guest, Limits, PoolName, PveError, Retry, StorageName, Token, VmId,
};
use crate::run::Run;
use crate::secret::{self, Secrets};
use crate::store::machines::{Machines, Reserved, Reserving};
use crate::trust::Trust;
use anyhow::Context;
use async_trait::async_trait;
use line::Line;
use mayfly_api::agent::{BOOTSTRAP_FILE, Bootstrap};
use mayfly_api::{Absence, DesktopName, StageProgress};
use run::{Module, Variable};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The account that cloud-init makes, with the desktop's key.
const SSH_USER: &str = "mayfly";
/// Where SSH answers.
const SSH_PORT: u16 = 22;
/// cloud-init's last word of a first boot, in which it makes the host keys anew; until then it is not there, also in a template
/// that was booted before: each machine's is in a folder of its own.
const FIRST_BOOT_OVER: &str = "/var/lib/cloud/instance/boot-finished";
/// The machine's public host key.
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key.pub";
/// Where xrdp answers.
const RDP_PORT: u16 = 3389;
/// The cluster's lists are asked for again after this.
const FRESH: Duration = Duration::from_secs(1);
/// What was found well is looked at again after this.
const CHECKED: Duration = Duration::from_secs(30);
/// What was not, after this: whoever asks meanwhile is told the same.
const CHECKED_ILL: Duration = Duration::from_secs(3);
/// A stop or a removal takes seconds; a storage that is busy, a minute.
const TASK: Duration = Duration::from_secs(120);
/// A machine whose clone was asked for a moment before its run was killed shows within this.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// Between two looks at what is being cloned.
const CLONE_LOOK: Duration = Duration::from_secs(1);
/// Until an agent that is there has called.
const CALL: Duration = Duration::from_secs(5);
/// Between two attempts to reach a guest agent, each of which costs the API a call.
const AGENT_PAUSE: Duration = Duration::from_millis(800);
/// Between two questions whether a program in a machine has ended.
const EXEC_PAUSE: Duration = Duration::from_millis(500);
/// Of so many of a machine's latest tasks it is told how they ended.
const TASKS: u32 = 10;
/// An API that is slow must not cost the other sections.
const TASKS_LIMIT: Duration = Duration::from_secs(4);

/// `[provider.terraform]` of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TerraformConfig {
    /// `terraform` or `tofu`: a name on `PATH` or a path.
    pub program: PathBuf,
    /// The module's folder; `terraform/README.md` is its contract.
    pub module: PathBuf,
    /// A file system mirror with the module's provider; without it, the registry.
    pub plugins: Option<PathBuf>,
    /// The virtual machine of desktop n has this number plus n. The range is ours alone.
    pub first_vm_id: u32,
    /// A run that takes longer has failed.
    pub apply_timeout_s: u32,
    /// A machine that has no address so long after its start is removed, and another is made, at most twice.
    pub address_timeout_s: u32,
    /// The cluster.
    pub proxmox: ProxmoxConfig,
}

impl Default for TerraformConfig {
    fn default() -> Self {
        Self {
            program: "terraform".into(),
            module: "/usr/share/mayfly/terraform/proxmox".into(),
            plugins: None,
            first_vm_id: 100_000,
            apply_timeout_s: 480,
            address_timeout_s: 120,
            proxmox: ProxmoxConfig::default(),
        }
    }
}

/// `[provider.terraform.proxmox]` of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxmoxConfig {
    /// `https://host:8006`
    pub address: String,
    /// `user@realm!name`
    pub token_id: String,
    /// A file of mode 0600 with the token's secret.
    pub token_file: PathBuf,
    /// The authority that signed the nodes' certificates; without this and `fingerprint`, those of the system.
    pub ca_file: Option<PathBuf>,
    /// SHA-256 of the node's certificate.
    pub fingerprint: Option<String>,
    /// Number of the template.
    pub template: u32,
    /// The storage of the template's disks.
    pub storage: String,
    /// So many clones are made on it at a time; more wait. Proxmox VE lets one wait 10 s for a storage's lock, and then fails it.
    pub clones: u32,
    /// The network bridge.
    pub bridge: String,
    /// The SDN zone of the bridge, whose permissions the token needs.
    pub zone: String,
    /// The pool that desktops are put into, so that the token can be limited to it.
    pub pool: Option<String>,
    /// Size of the disk in GiB, if the template's is smaller.
    pub disk_gb: Option<u32>,
}

impl Default for ProxmoxConfig {
    fn default() -> Self {
        Self {
            address: String::new(),
            token_id: String::new(),
            token_file: PathBuf::new(),
            ca_file: None,
            fingerprint: None,
            template: 0,
            storage: String::new(),
            clones: 2,
            bridge: "vmbr2".to_owned(),
            zone: "localnetwork".to_owned(),
            pool: None,
            disk_gb: None,
        }
    }
}

/// The steps that [`Steps`] is told of.
pub const STEPS: [&str; 7] = [
    "create: reserved",
    "create: folder made",
    "create: run started",
    "create: machine runs",
    "destroy: run ended",
    "destroy: machine gone",
    "destroy: records gone",
];

/// A site that was read from the configuration and can be talked to.
struct Site {
    client: Client,
    /// What Terraform's provider wants: `id=secret`.
    token: SecretString,
    /// The secret alone.
    secret: SecretString,
    trust: Trust,
    template: VmId,
    storage: StorageName,
    pool: Option<PoolName>,
}

impl Site {
    fn open(config: &ProxmoxConfig) -> anyhow::Result<Self> {
        let here = "provider.terraform.proxmox";
        let secret =
            secret::from_file(&config.token_file).with_context(|| format!("{here}.token_file"))?;
        let trust = match (&config.ca_file, &config.fingerprint) {
            (Some(_), Some(_)) => anyhow::bail!("{here}: ca_file or fingerprint, not both"),
            (Some(file), None) => Trust::Authority(file.clone()),
            (None, Some(fingerprint)) => Trust::Fingerprint(fingerprint.parse()?),
            (None, None) => Trust::System,
        };
        let client = Client::new(&Endpoint {
            address: config.address.clone(),
            token: Token::new(&config.token_id, secret.clone())?,
            trust: trust.clone(),
            limits: Limits::default(),
        })
        .with_context(|| here.to_owned())?;
        let token = format!("{}={}", config.token_id, secret.expose_secret()).into();
        let pool = config.pool.as_ref().map(|pool| pool.parse());
        Ok(Self {
            client,
            token,
            secret,
            trust,
            template: VmId::try_from(config.template)
                .with_context(|| format!("{here}.template"))?,
            storage: config
                .storage
                .parse()
                .with_context(|| format!("{here}.storage"))?,
            pool: pool.transpose().with_context(|| format!("{here}.pool"))?,
        })
    }

    /// The variables that the module's provider reads.
    async fn environment(&self, folder: &Path) -> Result<Vec<Variable>, ProviderError> {
        let mut environment = vec![
            ("PROXMOX_VE_ENDPOINT", self.client.address().into()),
            ("PROXMOX_VE_API_TOKEN", self.token.clone()),
        ];
        let file = match &self.trust {
            Trust::System => return Ok(environment),
            Trust::Authority(file) => file.clone(),
            // The provider knows authorities only: the node's certificate is made one, after it was found to be the right one.
            Trust::Fingerprint(_) => {
                let certificate = self.client.certificate().await.map_err(of_pve)?;
                let file = folder.join("node.pem");
                std::fs::write(&file, certificate).map_err(|e| failed(&file, &e))?;
                file
            }
        };
        let file = file.to_string_lossy().into_owned();
        environment.push(("SSL_CERT_FILE", file.into()));
        Ok(environment)
    }
}

/// Whether our own records name a desktop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// They do.
    Yes,
    /// They do not.
    No,
}

/// The cluster, as it was a moment ago.
#[derive(Clone, Default)]
struct Seen {
    guests: Vec<GuestLine>,
    nodes: Vec<NodeLine>,
    storages: Vec<StorageLine>,
}

/// What the provider works with.
pub struct Parts {
    /// This program, for supervisors.
    pub orchestrator: PathBuf,
    /// The state folder.
    pub state: PathBuf,
    /// Where states and reservations are kept.
    pub machines: Arc<dyn Machines>,
    /// Where passwords and keys come from.
    pub secrets: Arc<Secrets>,
    /// Where agents call.
    pub agents: Arc<Agents>,
    /// Where this orchestrator's API answers Terraform: `http://127.0.0.1:5000`.
    pub api: String,
    /// What is left to do in its machines.
    pub rest: Rest,
}

/// The provider `terraform`.
pub struct Terraform {
    config: TerraformConfig,
    parts: Parts,
    site: Site,
    /// The tag by which machines are known as this installation's.
    mark: String,
    folder: PathBuf,
    steps: Steps,
    clock: Clock,
    locks: Locks,
    preparing: tokio::sync::Mutex<()>,
    /// Choosing a node and reserving it are one.
    placing: tokio::sync::Mutex<()>,
    line: Line,
    news: News,
    seen: tokio::sync::Mutex<Option<(Instant, Seen)>>,
    checked: tokio::sync::Mutex<Option<(Instant, Vec<Check>)>>,
}

impl Terraform {
    /// Reads the settings; connects nowhere yet.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn new(config: TerraformConfig, parts: Parts) -> anyhow::Result<Self> {
        let site = Site::open(&config.proxmox)?;
        let folder = parts.state.join("terraform");
        make_folder(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        run::forget_parts(&folder);
        Ok(Self {
            folder: folder.canonicalize()?,
            mark: format!("mayfly-{}", parts.secrets.installation()),
            config,
            parts,
            site,
            steps: crate::failpoints::steps(),
            clock: Clock::default(),
            locks: Locks::default(),
            preparing: tokio::sync::Mutex::default(),
            placing: tokio::sync::Mutex::default(),
            line: Line::default(),
            news: News::default(),
            seen: tokio::sync::Mutex::default(),
            checked: tokio::sync::Mutex::default(),
        })
    }

    /// The same with a function that is told of every step; for tests.
    #[must_use]
    pub fn with_steps(mut self, steps: Steps) -> Self {
        self.steps = steps;
        self
    }

    fn step(&self, step: &'static str) -> Result<(), ProviderError> {
        debug_assert!(STEPS.contains(&step));
        (self.steps)(step)
    }

    /// One create or destroy at a time for each desktop.
    async fn lock(&self, name: DesktopName) -> tokio::sync::OwnedMutexGuard<()> {
        super::lock_of(&self.locks, name).lock_owned().await
    }

    fn run(&self, name: DesktopName) -> Run {
        Run::at(self.folder_of(name))
    }

    fn folder_of(&self, name: DesktopName) -> PathBuf {
        self.folder.join(name.to_string())
    }

    /// The number of its virtual machine.
    fn id(&self, name: DesktopName) -> VmId {
        vm_id(self.config.first_vm_id, name)
    }

    async fn look(&self) -> Result<Seen, PveError> {
        let mut all = Seen::default();
        for kind in [Kind::Guests, Kind::Nodes, Kind::Storages] {
            for resource in self
                .site
                .client
                .send(&call::cluster_resources(kind))
                .await?
            {
                match resource {
                    Resource::Qemu(line) => all.guests.push(line),
                    Resource::Node(line) => all.nodes.push(line),
                    Resource::Storage(line) => all.storages.push(line),
                    Resource::Other => {}
                }
            }
        }
        Ok(all)
    }

    /// The virtual machines, as they were at most [`FRESH`] ago: one question for all desktops.
    async fn recently(&self) -> Result<Seen, PveError> {
        let mut seen = self.seen.lock().await;
        match &*seen {
            Some((at, cluster)) if at.elapsed() < FRESH => Ok(cluster.clone()),
            _ => {
                let cluster = self.look().await?;
                *seen = Some((Instant::now(), cluster.clone()));
                Ok(cluster)
            }
        }
    }

    /// Where its virtual machine is, if there is one. `known`: it is in our records; otherwise only its tag tells that it is ours.
    async fn find(
        &self,
        seen: &Seen,
        name: DesktopName,
        known: Known,
    ) -> Result<Option<Guest>, ProviderError> {
        let id = self.id(name);
        let client = &self.site.client;
        let Some(line) = seen.guests.iter().find(|g| g.vmid == id) else {
            // The list shows what the token may see, and a clone is put into its pool last: ask whether the number is free.
            return match client.send(&call::id_is_free(id)).await {
                Ok(_) => Ok(None),
                Err(error) if error.cause() == Cause::IdTaken && known == Known::Yes => {
                    Err(ProviderError::Failed(format!(
                        "VM {id} exists, and the token may not see it yet"
                    )))
                }
                Err(error) if error.cause() == Cause::IdTaken => Ok(None),
                Err(error) => Err(of_pve(error)),
            };
        };
        let guest = Guest {
            node: line.node.clone(),
            id,
        };
        let shown = match &line.name {
            Some(shown) => Some(shown.clone()),
            // The cluster's list learns a new machine's name some seconds late; its node knows.
            None => match client.send(&call::status(&guest)).await {
                Err(error) if error.cause() == Cause::NoSuchGuest => return Ok(None),
                status => status.map_err(of_pve)?.name,
            },
        };
        let ours = known == Known::Yes || line.tags().any(|tag| tag == self.mark);
        if shown.as_deref() == Some(&*name.to_string()) && ours {
            return Ok(Some(guest));
        }
        tracing::warn!(desktop = %name, %id, ?shown, "this number is another machine's, which is left alone");
        Ok(None)
    }

    /// Whether a row or a folder says that we made it, or were about to.
    async fn known(&self, name: DesktopName) -> Result<Known, ProviderError> {
        let reserved = self.parts.machines.reserved().await.map_err(of_store)?;
        let known = reserved.iter().any(|r| r.name == name) || self.folder_of(name).exists();
        Ok(if known { Known::Yes } else { Known::No })
    }

    async fn require(&self, name: DesktopName) -> Result<Guest, ProviderError> {
        let seen = self.recently().await.map_err(not_yet)?;
        self.find(&seen, name, Known::Yes)
            .await?
            .ok_or_else(|| ProviderError::Failed(format!("{name} does not exist")))
    }

    /// Reserves it on a node, as soon as its storage has a place for another clone. Also where the template is.
    async fn place(&self, spec: &DesktopSpec) -> Result<(Reserved, String), ProviderError> {
        let _in_line = self.line.join(spec.name);
        let _one_at_a_time = self.placing.lock().await;
        loop {
            let (machine, template_node) = self.choose(spec).await?;
            let clones = self.config.proxmox.clones;
            let reserved = self.parts.machines.reserve(&machine, clones).await;
            match reserved.map_err(of_store)? {
                Reserving::Done => {
                    self.news.tell(spec.name, None);
                    return Ok((machine, template_node));
                }
                Reserving::Taken => return Err(exists(spec.name)),
                Reserving::Waits => {
                    self.line.tell(&self.news);
                    tokio::time::sleep(CLONE_LOOK).await;
                }
            }
        }
    }

    async fn choose(&self, spec: &DesktopSpec) -> Result<(Reserved, String), ProviderError> {
        let seen = self.look().await.map_err(of_pve)?;
        let id = self.id(spec.name);
        if let Some(other) = seen.guests.iter().find(|g| g.vmid == id) {
            return Err(ProviderError::Failed(format!(
                "VM {id} exists already ({}); provider.terraform.first_vm_id must begin a range that nobody else uses",
                other.name.as_deref().unwrap_or("without a name")
            )));
        }
        let template = self.site.template;
        let Some(template) = seen.guests.iter().find(|g| g.vmid == template) else {
            return Err(ProviderError::Unavailable(format!(
                "the template {template} is not there, or the token may not see it"
            )));
        };
        let reserved = self.parts.machines.reserved().await.map_err(of_store)?;
        let cluster = place::Cluster {
            nodes: &seen.nodes,
            guests: &seen.guests,
            storages: &seen.storages,
            reserved: &reserved,
        };
        let wanted = place::Wanted {
            template_node: &template.node,
            storage: &self.site.storage,
            memory_mib: spec.memory_mib,
        };
        let node = place::place(&cluster, &wanted, |name| self.id(name)).map_err(|e| match e {
            place::NoPlace::Now(why) => ProviderError::NoCapacity(why),
            place::NoPlace::Ever(why) => ProviderError::Unavailable(why),
        })?;
        let machine = Reserved {
            name: spec.name,
            node: node.to_string(),
            memory_mib: spec.memory_mib,
            storage: self.site.storage.to_string(),
        };
        Ok((machine, template.node.to_string()))
    }

    /// The inputs of the contract (`terraform/README.md`).
    fn variables(&self, spec: &DesktopSpec, machine: &Reserved, template_node: &str) -> Value {
        let proxmox = &self.config.proxmox;
        json!({
            "session_id": spec.session,
            "hostname": spec.name,
            "node": machine.node,
            "vm_id": self.id(spec.name).get(),
            "template_id": proxmox.template,
            "template_node": template_node,
            "storage": proxmox.storage,
            "bridge": proxmox.bridge,
            "pool": proxmox.pool,
            "tags": ["mayfly", self.mark],
            "cores": spec.cpus,
            "memory_mb": spec.memory_mib,
            "disk_gb": proxmox.disk_gb,
            "address_timeout_s": self.config.address_timeout_s,
            "user": SSH_USER,
            "ssh_public_key": self.ssh_key(spec.name),
        })
    }

    fn ssh_key(&self, name: DesktopName) -> String {
        let seed = self.parts.secrets.ssh_key_seed(name);
        let pair = ssh_key::private::Ed25519Keypair::from_seed(seed.expose_secret());
        // An Ed25519 key without a comment is always written.
        ssh_key::PublicKey::from(pair.public)
            .to_openssh()
            .unwrap_or_default()
    }

    async fn environment(&self, name: DesktopName) -> Result<Vec<Variable>, ProviderError> {
        let mut environment = self.site.environment(&self.folder_of(name)).await?;
        let address = format!("{}{}", self.parts.api, crate::http::terraform::path(name));
        let lock = format!("{address}/lock");
        environment.extend([
            ("TF_HTTP_ADDRESS", address.into()),
            ("TF_HTTP_LOCK_ADDRESS", lock.clone().into()),
            ("TF_HTTP_LOCK_METHOD", "PUT".into()),
            ("TF_HTTP_UNLOCK_ADDRESS", lock.into()),
            ("TF_HTTP_UNLOCK_METHOD", "DELETE".into()),
            ("TF_HTTP_USERNAME", name.to_string().into()),
            (
                "TF_HTTP_PASSWORD",
                self.parts.secrets.terraform_password(name),
            ),
            // An orchestrator that is started again meanwhile takes the state all the same.
            ("TF_HTTP_RETRY_MAX", "60".into()),
            ("TF_HTTP_RETRY_WAIT_MIN", "1".into()),
            ("TF_HTTP_RETRY_WAIT_MAX", "2".into()),
        ]);
        Ok(environment)
    }

    /// Waits until it is cloned and says so, which leaves the place to another. Never ends.
    async fn cloned(&self, name: DesktopName) -> std::convert::Infallible {
        let is_running = |seen: &Seen| {
            let id = self.id(name);
            let mut guests = seen.guests.iter();
            guests.any(|g| g.vmid == id && g.status == Power::Running)
        };
        loop {
            tokio::time::sleep(CLONE_LOOK).await;
            let running = self.recently().await.is_ok_and(|seen| is_running(&seen));
            if running && self.parts.machines.cloned(name).await.is_ok() {
                let waits = StageProgress::WaitingForAddress;
                self.news.tell(name, Some(waits));
                return std::future::pending().await;
            }
        }
    }

    /// Waits for the run and for nothing else.
    async fn made(&self, name: DesktopName) -> Result<(), ProviderError> {
        let password = self.parts.secrets.terraform_password(name);
        let secrets = [self.site.secret.clone(), password];
        let run = self.run(name);
        let told = |progress| self.news.tell(name, Some(progress));
        let made = tokio::select! {
            made = run.wait(run::LANGUAGE, &secrets, told) => made.map(drop),
            never = self.cloned(name) => match never {},
        };
        made.map_err(|why| {
            let program = self.config.program.display();
            let what = format!("{program} did not make {name}: {why}");
            match Cause::of(&why) {
                Cause::Locked => ProviderError::Busy(what),
                Cause::NoSpace => ProviderError::Unavailable(what),
                _ => ProviderError::Failed(what),
            }
        })?;
        let cloned = self.parts.machines.cloned(name).await;
        cloned.map_err(of_store)?;
        // The provider gives up waiting for an address, or a machine that died, without an error.
        self.address(name).await.map(drop)
    }

    async fn address(&self, name: DesktopName) -> Result<IpAddr, ProviderError> {
        let state = self.parts.machines.state(name).await.map_err(of_store)?;
        state.as_deref().and_then(address_in).ok_or_else(|| {
            // A guest that hangs, or a moment without DHCP: another may be luckier.
            ProviderError::Busy(format!(
                "{name} was made and has no address: its guest agent told none within {} s \
                 (provider.terraform.address_timeout_s); does {} have a DHCP server?",
                self.config.address_timeout_s, self.config.proxmox.bridge
            ))
        })
    }

    /// A file of the guest.
    async fn read(&self, guest: &Guest, file: &str) -> Result<String, ProviderError> {
        let error = match self.site.client.send(&call::agent_read(guest, file)).await {
            Ok(read) => return Ok(read.content),
            Err(error) => error,
        };
        if error.cause() != Cause::NoSuchFile && error.retry() == Retry::Never {
            return Err(of_pve(error));
        }
        tokio::time::sleep(AGENT_PAUSE).await;
        Err(ProviderError::NotYet(error.to_string()))
    }

    /// Removes its virtual machine, and says whether there was one.
    async fn remove(&self, name: DesktopName) -> Result<bool, ProviderError> {
        let client = &self.site.client;
        let seen = self.look().await.map_err(of_pve)?;
        let known = self.known(name).await?;
        let Some(guest) = self.find(&seen, name, known).await? else {
            return Ok(false);
        };
        let patience = Patience::of(&self.clock, TASK);
        let status = match client.send(&call::status(&guest)).await {
            Err(error) if error.cause() == Cause::NoSuchGuest => return Ok(true),
            status => status.map_err(of_pve)?,
        };
        if status.status != Power::Stopped {
            let task = client.send(&call::stop(&guest)).await.map_err(of_pve)?;
            follow(client, &task, &patience).await.map_err(of_pve)?;
        }
        let task = client.send(&call::delete(&guest)).await.map_err(of_pve)?;
        follow(client, &task, &patience).await.map_err(of_pve)?;
        Ok(true)
    }
}

/// What a machine's tasks were and how they ended, with the end of the log of those that failed.
async fn tasks_of(client: &Client, guest: &Guest) -> Result<String, PveError> {
    let mut text = String::new();
    let mut tasks = client.send(&call::guest_tasks(guest, TASKS)).await?;
    tasks.reverse();
    for task in tasks {
        let begin = i64::try_from(task.starttime).unwrap_or_default();
        let begin = jiff::Timestamp::from_second(begin).unwrap_or_default();
        let status = task.status.as_deref().unwrap_or("running");
        text += &format!("{begin} {} by {}: {status}\n", task.upid.kind(), task.user);
        if !matches!(status, "OK" | "running" | "RUNNING") {
            for line in client.last_lines(&task.upid).await.unwrap_or_default() {
                text += &format!("    {line}\n");
            }
        }
    }
    Ok(text)
}

/// What a program says in a machine, as root.
async fn run_in(client: &Client, guest: &Guest, command: &[&str]) -> Result<String, PveError> {
    let started = client.send(&call::agent_exec(guest, command)).await?;
    loop {
        let ask = call::agent_exec_status(guest, started.pid);
        let status = client.send(&ask).await?;
        if status.exited {
            return Ok(status.output);
        }
        tokio::time::sleep(EXEC_PAUSE).await;
    }
}

/// The number of the virtual machine of a desktop. Checked when the configuration is read: it is never above the highest.
fn vm_id(first: u32, name: DesktopName) -> VmId {
    VmId::try_from(first + name.number()).unwrap_or_else(|_| unreachable!("{first} was checked"))
}

#[async_trait]
impl Provider for Terraform {
    fn kind(&self) -> &'static str {
        "terraform"
    }

    fn is_followed(&self) -> bool {
        true
    }

    async fn preflight(&self) -> Vec<Check> {
        let mut checked = self.checked.lock().await;
        if let Some((at, found)) = &*checked {
            let well = !found.iter().any(|c| c.status == CheckStatus::Error);
            if at.elapsed() < if well { CHECKED } else { CHECKED_ILL } {
                return found.clone();
            }
        }
        let found = checks_of(&self.config, &self.site, self.parts.rest).await;
        *checked = Some((Instant::now(), found.clone()));
        found
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        let name = spec.name;
        let _alone = self.lock(name).await;
        let folder = self.folder_of(name);
        if folder.exists() {
            return Err(exists(name));
        }
        let program = which::which(&self.config.program).map_err(|error| {
            ProviderError::Unavailable(format!("{}: {error}", self.config.program.display()))
        })?;
        let (machine, template_node) = self.place(spec).await?;
        self.step(STEPS[0])?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(|error| failed(&folder, &error))?;
        self.step(STEPS[1])?;
        let environment = self.environment(name).await?;
        let module = {
            let _one_at_a_time = self.preparing.lock().await;
            Module::prepare(
                &self.config.module,
                &program,
                self.config.plugins.as_deref(),
                &self.folder,
                &environment,
            )
            .await
            .map_err(ProviderError::Unavailable)?
        };
        let run = self.run(name);
        let variables = self.variables(spec, &machine, &template_node);
        run::make(&run, &module, &variables)
            .and_then(|()| {
                let deadline = crate::clock::s(self.config.apply_timeout_s);
                let orchestrator = &self.parts.orchestrator;
                run::apply(&run, orchestrator, &program, &environment, deadline)
            })
            .map_err(|error| failed(&folder, &error))?;
        self.step(STEPS[2])?;
        self.made(name).await?;
        self.step(STEPS[3])
    }

    fn news(&self) -> News {
        self.news.clone()
    }

    async fn adopt(&self, name: DesktopName) -> Result<bool, ProviderError> {
        let _alone = self.lock(name).await;
        if !self.run(name).is_followed() {
            return Ok(false);
        }
        match self.made(name).await {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::warn!(desktop = %name, %error, "an earlier process's run failed");
                Ok(false)
            }
        }
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        let seen = self.recently().await.map_err(of_pve)?;
        let known = self.known(name).await?;
        let Some(guest) = self.find(&seen, name, known).await? else {
            return Ok(match known {
                Known::Yes => MachineState::Dead {
                    reason: "there is no virtual machine of it".to_owned(),
                },
                Known::No => MachineState::Absent,
            });
        };
        let shown = seen.guests.iter().find(|g| g.vmid == guest.id);
        if shown.is_some_and(|g| g.status == Power::Running) {
            return Ok(MachineState::Running);
        }
        // The cluster's list is some seconds old: the node knows.
        match self.site.client.send(&call::status(&guest)).await {
            Ok(status) if status.status == Power::Running => Ok(MachineState::Running),
            Ok(_) => Ok(MachineState::Dead {
                reason: format!("{guest} does not run"),
            }),
            Err(error) => Err(of_pve(error)),
        }
    }

    async fn bootstrap(
        &self,
        name: DesktopName,
        bootstrap: &Bootstrap,
    ) -> Result<(), ProviderError> {
        let guest = self.require(name).await?;
        let bootstrap = Bootstrap {
            line: Some(self.parts.agents.line().clone()),
            ..bootstrap.clone()
        };
        let text = serde_json::to_string(&bootstrap)
            .map_err(|error| ProviderError::Failed(format!("the bootstrap: {error}")))?;
        let write = call::agent_write(&guest, BOOTSTRAP_FILE, &text.into())
            .map_err(|error| ProviderError::Failed(error.to_string()))?;
        match self.site.client.send(&write).await {
            Ok(_) => Ok(()),
            Err(error) if error.retry() != Retry::Never => {
                tokio::time::sleep(AGENT_PAUSE).await;
                Err(ProviderError::NotYet(error.to_string()))
            }
            Err(error) => Err(of_pve(error)),
        }
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        tokio::time::timeout(CALL, self.parts.agents.channel(name))
            .await
            .map_err(|_| ProviderError::NotYet(format!("the agent of {name} has not called")))
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        Ok(SocketAddr::new(self.address(name).await?, RDP_PORT))
    }

    async fn last_words(&self, name: DesktopName) -> Vec<Section> {
        if !matches!(self.known(name).await, Ok(Known::Yes)) {
            return Vec::new();
        }
        let password = self.parts.secrets.terraform_password(name);
        let secrets = [self.site.secret.clone(), password];
        let said = self.run(name).said("terraform", run::LANGUAGE, &secrets);
        let mut sections = vec![said];
        let client = &self.site.client;
        let Ok(Ok(guest)) = tokio::time::timeout(TASKS_LIMIT, self.require(name)).await else {
            return sections;
        };
        let shown = async {
            let shown = run_in(client, &guest, &JOURNAL).await;
            shown.map_err(|error| error.to_string())
        };
        let told = tokio::time::timeout(TASKS_LIMIT, tasks_of(client, &guest));
        let (journal, told) = tokio::join!(journal(shown), told);
        let told = told.map(|told| told.unwrap_or_else(|error| error.to_string()));
        sections.push(Section {
            title: "proxmox tasks",
            text: told.unwrap_or_else(|_| "They cannot be had in time.".to_owned()),
        });
        sections.push(journal);
        sections
    }

    async fn ssh(&self, name: DesktopName) -> Result<SshServer, ProviderError> {
        let guest = self.require(name).await?;
        self.read(&guest, FIRST_BOOT_OVER).await?;
        let key = self.read(&guest, HOST_KEY).await?;
        let host_key = key.trim().parse().map_err(|error| {
            ProviderError::Failed(format!("{HOST_KEY} of {name} is no public key: {error}"))
        })?;
        Ok(SshServer {
            address: SocketAddr::new(self.address(name).await?, SSH_PORT),
            user: SSH_USER.to_owned(),
            host_key,
        })
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        let _alone = self.lock(name).await;
        let run = self.run(name);
        let interrupted = run.end().await.map_err(ProviderError::Failed)?;
        self.step(STEPS[4])?;
        self.remove(name).await?;
        if interrupted {
            // What was asked for before the run was killed may come after it was looked for.
            tokio::time::sleep(SECOND_LOOK).await;
        }
        if self.remove(name).await? {
            return Err(ProviderError::Failed(format!(
                "a virtual machine of {name} was there after its removal"
            )));
        }
        let by = self.kind();
        let place = format!("{} in the list of the cluster", self.id(name));
        let mut gone = vec![absent(by, "machine", place)];
        self.step(STEPS[5])?;
        let folder = self.folder_of(name);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(&folder, &error));
            }
            _ => {}
        }
        gone.push(absent(by, "files", folder.display().to_string()));
        let machines = &self.parts.machines;
        machines.release(name).await.map_err(of_store)?;
        if machines.state(name).await.map_err(of_store)?.is_some() {
            let why = format!("Terraform's state of {name} was there after its removal");
            return Err(ProviderError::Failed(why));
        }
        gone.push(absent(by, "terraform state", "the database"));
        self.parts.agents.forget(name);
        *self.seen.lock().await = None;
        self.step(STEPS[6])?;
        Ok(gone)
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        let seen = self.look().await.map_err(of_pve)?;
        let mut names: BTreeSet<DesktopName> = seen
            .guests
            .iter()
            .filter_map(|guest| {
                let name: DesktopName = guest.name.as_deref()?.parse().ok()?;
                let ours = guest.vmid == self.id(name) && guest.tags().any(|t| t == self.mark);
                ours.then_some(name)
            })
            .collect();
        let reserved = self.parts.machines.reserved().await.map_err(of_store)?;
        names.extend(reserved.into_iter().map(|r| r.name));
        let entries = std::fs::read_dir(&self.folder).map_err(|e| failed(&self.folder, &e))?;
        names.extend(
            entries
                .flatten()
                .filter_map(|e| e.file_name().to_str()?.parse::<DesktopName>().ok()),
        );
        Ok(names.into_iter().collect())
    }
}

/// What `doctor` says of a configuration.
pub async fn checks(config: &TerraformConfig, rest: Rest) -> Vec<Check> {
    match Site::open(&config.proxmox) {
        Ok(site) => checks_of(config, &site, rest).await,
        Err(error) => vec![check("proxmox", CheckStatus::Error, format!("{error:#}"))],
    }
}

async fn checks_of(config: &TerraformConfig, site: &Site, rest: Rest) -> Vec<Check> {
    let mut found = vec![
        match which::which(&config.program) {
            Ok(path) => check("terraform", CheckStatus::Ok, path.display().to_string()),
            Err(error) => check(
                "terraform",
                CheckStatus::Error,
                format!(
                    "{}: {error}; install Terraform or OpenTofu, or set provider.terraform.program",
                    config.program.display()
                ),
            ),
        },
        match std::fs::metadata(config.module.join("main.tf")) {
            Ok(_) => check(
                "terraform module",
                CheckStatus::Ok,
                config.module.display().to_string(),
            ),
            Err(error) => check(
                "terraform module",
                CheckStatus::Error,
                format!(
                    "{}/main.tf: {error}; set provider.terraform.module",
                    config.module.display()
                ),
            ),
        },
    ];
    let proxmox = &config.proxmox;
    let wanted = Wanted {
        template: site.template,
        storage: site.storage.clone(),
        pool: site.pool.clone(),
        network: format!("/sdn/zones/{}/{}", proxmox.zone, proxmox.bridge),
        room: 1 << 30,
        rest,
    };
    found.extend(preflight(&site.client, &wanted).await);
    found
}

fn check(name: &str, status: CheckStatus, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        status,
        detail,
    }
}

/// The output `ipv4` of a state.
fn address_in(state: &[u8]) -> Option<IpAddr> {
    let state: Value = serde_json::from_slice(state).ok()?;
    state["outputs"]["ipv4"]["value"].as_str()?.parse().ok()
}

fn make_folder(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

fn exists(name: DesktopName) -> ProviderError {
    ProviderError::Failed(format!("{name} exists already"))
}

fn failed(path: &Path, error: &std::io::Error) -> ProviderError {
    ProviderError::Failed(format!("{}: {error}", path.display()))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn of_store(error: crate::store::StoreError) -> ProviderError {
    ProviderError::Failed(error.to_string())
}

/// While a desktop is made, an API that does not answer for a moment is waited for.
fn not_yet(error: PveError) -> ProviderError {
    match error.retry() {
        Retry::Never => of_pve(error),
        _ => ProviderError::NotYet(error.to_string()),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn of_pve(error: PveError) -> ProviderError {
    let text = error.to_string();
    match error {
        PveError::Unauthorized { .. }
        | PveError::Forbidden { .. }
        | PveError::Certificate { .. } => ProviderError::Unavailable(text),
        _ if error.cause() == Cause::NoSpace => ProviderError::Unavailable(text),
        _ if matches!(error.retry(), Retry::Again | Retry::Look) => ProviderError::Busy(text),
        _ => ProviderError::Failed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_what_terraform_saved() {
        let state = br#"{"version":4,"outputs":{"ipv4":{"value":"10.0.0.7","type":"string"}}}"#;
        assert_eq!(address_in(state), Some("10.0.0.7".parse().unwrap()));
        for nothing in [&b"{}"[..], b"", br#"{"outputs":{"ipv4":{"value":null}}}"#] {
            assert_eq!(address_in(nothing), None);
        }
    }

    #[test]
    fn a_number_is_never_another_desktop_s() {
        let last = DesktopName::from_number(DesktopName::LIMIT - 1).unwrap();
        assert_eq!(vm_id(100_000, last).get(), 268_535_455);
    }
}
