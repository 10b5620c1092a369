//! A site: a Proxmox VE cluster of three nodes in a network of its own, with real machines behind it (`tests/pve-lab`).
//!
//! It is a lab and not Proxmox VE: its API is an imitation that knows the official schema, and its machines are emulated.
//! What is asked of it here is asked of the lab itself, never by way of the API that Mayfly uses.

use crate::lab::{Database, Lab, Orchestrator, until};
use crate::sessions::READY;
use anyhow::{Context, Result, anyhow, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde::Deserialize;
use serde_json::{Value, json};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// Tells a test that it runs in a network of its own.
const ALONE: &str = "MAYFLY_TEST_ALONE";
/// The machines' bridge.
const BRIDGE: &str = "vmbr2";
/// This side of it.
const HERE: &str = "10.85.0.1";
/// A domain controller and file server ([`crate::realm`]).
const DOMAIN: &str = "10.85.0.10";
/// Where agents call.
pub const AGENTS: &str = "10.85.0.1:5001";
/// The number of the virtual machine of desktop 0.
pub const FIRST_VM_ID: u32 = 1000;
/// The template.
pub const TEMPLATE: u32 = 9000;
/// Even a busy lab says within this what became of an order.
const ANSWER: Duration = Duration::from_secs(180);
/// The token's id and secret.
pub const TOKEN: (&str, &str) = ("mayfly@pve!lab", "7b1d6a52-0000-4000-8000-00000000aa55");

/// Runs `body` as that test in namespaces of its own: network (with a bridge and a DHCP server), processes, mounts. Whatever it
/// starts ends with it. Needs root or user namespaces.
///
/// # Errors
/// What the body says; or that the namespaces cannot be made.
pub fn alone(test: &str, body: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    if std::env::var(ALONE).is_ok_and(|name| name == test) {
        return tokio::runtime::Runtime::new()?.block_on(body());
    }
    let folder = tempfile::tempdir()?;
    let arguments = ["--exact", test, "--nocapture", "--include-ignored"].map(OsString::from);
    let mut command = in_own_network(folder.path(), &arguments)?;
    let output = command.env(ALONE, test).output();
    let output = output.context("starting unshare (util-linux)")?;
    // Shown if this test fails, or by --nocapture.
    for said in [output.stdout, output.stderr] {
        println!("{}", String::from_utf8_lossy(&said));
    }
    if output.status.success() {
        return Ok(());
    }
    bail!("{test}, alone: {}", output.status)
}

/// This program with these arguments, in namespaces as [`alone`] makes them; `folder` is for the network's own files.
///
/// # Errors
/// When this program has no path any more.
pub fn in_own_network(folder: &Path, arguments: &[OsString]) -> Result<Command> {
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
        .args("--net --mount --pid --fork --kill-child --mount-proc".split(' '))
        .arg("sh")
        .arg(lab_folder().join("network.sh"))
        .arg(BRIDGE)
        .arg(folder)
        .arg(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null());
    Ok(command)
}

/// The processes of Terraform or OpenTofu that make a desktop for the lab's orchestrator; not those that initialise a module.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn applying(lab: &Lab) -> Result<Vec<u32>> {
    running(lab, "tofu", b"apply")
}

/// The processes that hold those.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn supervising(lab: &Lab) -> Result<Vec<u32>> {
    // Their name is that of the link by which the orchestrator starts itself.
    running(lab, "", b"supervise")
}

/// Processes of the lab whose name has this in it, with that argument.
fn running(lab: &Lab, name: &str, argument: &[u8]) -> Result<Vec<u32>> {
    let mut running = lab.running(name)?;
    running.retain(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == argument)
    });
    Ok(running)
}

/// Kills a process that may have ended meanwhile.
///
/// # Errors
/// When it may not be killed.
pub fn kill(pid: u32) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    match nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
        Err(nix::errno::Errno::ESRCH) => Ok(()),
        other => Ok(other?),
    }
}

fn lab_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pve-lab")
}

/// The Terraform module, and the firewall of a desktop.
///
/// # Errors
/// When it is not where it belongs.
pub fn module() -> Result<PathBuf> {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("../terraform/proxmox");
    Ok(module.canonicalize()?)
}

/// Shows by frames of its own, in the network of [`alone`], that the firewall of a desktop lets flow what the table in the
/// documentation lists, and nothing else (`isolation.py`).
///
/// # Errors
/// What does not flow, or flows.
pub fn firewall_is_as_documented() -> Result<()> {
    let output = Command::new("python3")
        .arg(lab_folder().join("isolation.py"))
        .arg(BRIDGE)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/proxmox.md"))
        .arg(module()?.join("desktop.fw"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .context("starting python3")?;
    println!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A virtual machine as the lab has it.
#[derive(Clone, Debug, Deserialize)]
pub struct Machine {
    /// Its number.
    pub vmid: u32,
    /// Its name; none if only parts of it are left.
    pub name: Option<String>,
    /// Its node.
    pub node: Option<String>,
    /// Whether its emulator runs.
    pub running: bool,
    /// That process.
    pub pid: Option<i32>,
}

/// A running site. Ends with this, and its machines with it.
#[derive(Debug)]
pub struct Site {
    process: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    folder: tempfile::TempDir,
    python: OsString,
    config: Value,
    port: u16,
}

/// Starts the lab that `folder` has the configuration of. Its answers come until it ends.
fn spawn(python: &OsStr, folder: &Path) -> Result<(Child, ChildStdin, Receiver<String>)> {
    let mut process = Command::new(python)
        .arg(lab_folder().join("lab.py"))
        .arg(folder.join("config.json"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(folder.join("stderr"))?)
        .spawn()
        .context("starting the Python that MAYFLY_FAKEPVE names")?;
    let orders = process.stdin.take().context("no standard input")?;
    let output = process.stdout.take().context("no standard output")?;
    let (said, answers) = mpsc::channel();
    // Ends with the lab, or when nobody listens any more.
    std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        for line in lines {
            if said.send(line).is_err() {
                return;
            }
        }
    });
    Ok((process, orders, answers))
}

impl Site {
    /// Starts one whose template is this image. `changes` goes over its configuration.
    ///
    /// # Errors
    /// What is missing, or what the lab said.
    pub fn start(image: &Path, changes: Value) -> Result<Self> {
        let python = std::env::var_os("MAYFLY_FAKEPVE").context(
            "MAYFLY_FAKEPVE must name a Python that has fakepve: run `cargo xtask test`",
        )?;
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        certificates(folder.path())?;
        fs::write(path("token"), TOKEN.1)?;
        fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600))?;
        let mut config = json!({
            "cert": path("node.pem"), "key": path("node.key"), "run_folder": path("lab"), "bridge": BRIDGE,
            "storages": [{"name": "ceph", "type": "rbd", "shared": 1, "size_gib": 100}],
            "templates": [{
                "vmid": TEMPLATE, "name": "desktop-template", "node": "pve1", "image": image, "storage": "ceph",
                "firewall": module()?.join("desktop.fw"),
            }],
            // Everybody on this side of the bridge has its one address, and a domain has the other.
            "ip_sets": {
                "people": [HERE], "orchestrator": [HERE], "domain": [DOMAIN], "files": [DOMAIN],
                "services": [HERE, DOMAIN], "ipfilter-net0": ["10.85.0.128/25"],
            },
            "pools": ["daas"],
            "tokens": [{"id": TOKEN.0, "secret": TOKEN.1}],
        });
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        fs::create_dir(path("lab"))?;
        fs::write(path("config.json"), config.to_string())?;
        let (process, orders, answers) = spawn(&python, folder.path())?;
        let mut site = Self {
            process,
            orders,
            answers,
            folder,
            python,
            config,
            port: 0,
        };
        site.listens()?;
        Ok(site)
    }

    fn listens(&mut self) -> Result<()> {
        let first = self.answer("its start")?;
        self.port = first["port"]
            .as_u64()
            .and_then(|port| port.try_into().ok())
            .with_context(|| format!("the lab said {first}"))?;
        Ok(())
    }

    /// It loses its power, and has it again: whatever it was doing is cut off, its machines do not run. What it had is there again
    /// if it was started with `keep_state`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn loses_power(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.config["port"] = self.port.into();
        let file = self.folder.path().join("config.json");
        fs::write(file, self.config.to_string())?;
        (self.process, self.orders, self.answers) = spawn(&self.python, self.folder.path())?;
        self.listens()
    }

    fn answer(&self, to: &str) -> Result<Value> {
        let words = || fs::read_to_string(self.path("stderr")).unwrap_or_default();
        let line = self.answers.recv_timeout(ANSWER).map_err(|gone| {
            let what = match gone {
                RecvTimeoutError::Timeout => {
                    format!("did not answer within {} s", ANSWER.as_secs())
                }
                RecvTimeoutError::Disconnected => "ended".to_owned(),
            };
            anyhow!("{to}: the lab {what}: {}", words())
        })?;
        serde_json::from_str(&line)
            .with_context(|| format!("{to}: the lab said {line:?}: {}", words()))
    }

    /// Has the lab do something (the orders are listed in `lab.py`).
    ///
    /// # Errors
    /// When the lab cannot do it.
    pub fn order(&mut self, order: &Value) -> Result<Value> {
        let order = order.to_string();
        writeln!(self.orders, "{order}")
            .with_context(|| format!("{order}: the lab does not listen"))?;
        let mut answer = self.answer(&order)?;
        ensure!(answer.get("error").is_none(), "{order}: {answer}");
        Ok(answer["ok"].take())
    }

    /// Every virtual machine that is no template.
    ///
    /// # Errors
    /// When the lab does not say.
    pub fn machines(&mut self) -> Result<Vec<Machine>> {
        let all = self.order(&json!({"do": ["inventory"]}))?;
        Ok(serde_json::from_value(all)?)
    }

    /// Fails if anything is left of a desktop: asked of the lab, of `/proc`, and of the orchestrator's database.
    ///
    /// # Errors
    /// With what is left.
    pub async fn nothing_is_left(&mut self, lab: &Lab) -> Result<()> {
        let machines = self.machines()?;
        ensure!(machines.is_empty(), "the site has {machines:?}");
        lab.nothing_is_left()?;
        Database::default().nothing_is_owned(lab).await
    }

    /// How often it was asked for all there is: nodes, storages, virtual machines.
    ///
    /// # Errors
    /// When the lab does not say.
    fn looks(&mut self) -> Result<usize> {
        let requests = self.order(&json!({"requests": true}))?;
        let list = requests.as_array().context("a list")?;
        let lists = |request: &&Value| {
            request[1]
                .as_str()
                .is_some_and(|p| p.contains("/cluster/resources"))
        };
        Ok(list.iter().filter(lists).count() / 3)
    }

    /// Starts an orchestrator that was ended and has no session again, and waits until its reaper has looked twice, as a new process
    /// does at once. Ends it.
    ///
    /// # Errors
    /// When the reaper does not look.
    pub async fn reaped(&mut self, lab: &Lab, orchestrator: &mut Orchestrator) -> Result<()> {
        let before = self.looks()?;
        orchestrator.start_again(lab).await?;
        until("the reaper looked twice", READY, async || {
            Ok((self.looks()? >= before + 2).then_some(()))
        })
        .await?;
        // What it has begun is done first.
        orchestrator.stop().await
    }

    /// What a shell line says that root runs in a machine.
    ///
    /// # Errors
    /// When the guest agent does not answer, or the line fails.
    pub fn shell(&mut self, vmid: u32, line: &str) -> Result<String> {
        let said = self.order(&json!({"do": ["inside", vmid, "/bin/sh", "-c", line]}))?;
        let words = |name: &str| said[name].as_str().unwrap_or_default().to_owned();
        ensure!(
            said["code"] == 0,
            "{line}: {} {}{}",
            said["code"],
            words("out"),
            words("err")
        );
        Ok(words("out"))
    }

    /// Takes the firewall of every machine away, as long as they run.
    ///
    /// # Errors
    /// When there is none.
    pub fn without_firewall(&self) -> Result<()> {
        let done = Command::new("nft")
            .args(["delete", "table", "bridge", "mayfly"])
            .output()
            .context("starting nft (nftables)")?;
        ensure!(
            done.status.success(),
            "nft: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(())
    }

    /// A file of its own, such as `ca.pem` or `token`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The parts of an orchestrator's configuration that name it.
    ///
    /// # Errors
    /// When `cargo xtask test` did not say where the tools are.
    pub fn configuration(&self) -> Result<String> {
        self.waiting(120)
    }

    /// The same, with so many seconds for a desktop to have an address.
    ///
    /// # Errors
    /// When `cargo xtask test` did not say where the tools are.
    pub fn waiting(&self, address_timeout_s: u32) -> Result<String> {
        let tool = |name: &str| {
            std::env::var(name)
                .with_context(|| format!("{name} is not set: run `cargo xtask test`"))
        };
        Ok(format!(
            "[agents]\nlisten = {AGENTS:?}\n\
             [provider.terraform]\nprogram = {:?}\nplugins = {:?}\nmodule = {:?}\nfirst_vm_id = {FIRST_VM_ID}\n\
             address_timeout_s = {address_timeout_s}\n\
             [provider.terraform.proxmox]\naddress = \"https://127.0.0.1:{}\"\ntoken_id = {:?}\ntoken_file = {:?}\n\
             ca_file = {:?}\ntemplate = {TEMPLATE}\nstorage = \"ceph\"\nbridge = {BRIDGE:?}\npool = \"daas\"\n",
            tool("MAYFLY_TOFU")?,
            tool("MAYFLY_PLUGINS")?,
            module()?,
            self.port,
            TOKEN.0,
            self.path("token"),
            self.path("ca.pem"),
        ))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An authority, and a certificate for 127.0.0.1 that it signed: `ca.pem`, `node.pem`, `node.key`.
fn certificates(folder: &Path) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?;
    let key = KeyPair::generate()?;
    let node = CertificateParams::new(vec!["127.0.0.1".to_owned()])?
        .signed_by(&key, &Issuer::new(authority, authority_key))?;
    fs::write(folder.join("ca.pem"), authority_certificate.pem())?;
    fs::write(folder.join("node.pem"), node.pem())?;
    fs::write(folder.join("node.key"), key.serialize_pem())?;
    Ok(())
}
