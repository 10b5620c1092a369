//! Desktops that Ansible configures: the real `ansible-playbook` and `ssh` against an SSH server of this test's own
//! (`ssh_server.py`), which stands for a machine of the simulated provider.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use async_trait::async_trait;
use mayfly_api::agent::Bootstrap;
use mayfly_api::{Absence, DesktopName, SessionId, StageProgress};
use mayfly_orchestrator::ansible::{Ansible, AnsibleConfig, STEPS};
use mayfly_orchestrator::process::{self, Process};
use mayfly_orchestrator::provider::conformance::{self, World};
use mayfly_orchestrator::provider::simulated::{Simulated, SimulatedConfig};
use mayfly_orchestrator::provider::{
    AgentChannel, Check, CheckStatus, DesktopSpec, Extra, MachineState, Provider, ProviderError,
    SshServer, Steps,
};
use mayfly_orchestrator::secret::Secrets;
use rustix::process::Signal;
use secrecy::ExposeSecret;
use ssh_key::private::Ed25519Keypair;
use ssh_key::{LineEnding, PrivateKey, PublicKey};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A playbook takes seconds; a busy machine gets this long.
const PATIENCE: Duration = Duration::from_secs(120);
const PLAYBOOK: &str = "
- hosts: ephemeral_desktop
  gather_facts: false
  tasks:
    - name: Write what a desktop needs
      ansible.builtin.command: {argv: [sh, -c, 'printf %s \"$1\" > \"$0\"', \"{{ mark }}\", \"{{ inventory_hostname }}\"]}
    - name: Wait to be let go
      ansible.builtin.command: {argv: [sh, -c, 'while [ -e \"$0\" ]; do sleep 0.05; done', \"{{ hold }}\"]}
";

/// Pretended machines that have an SSH server.
#[derive(Clone)]
struct Plain {
    machines: Simulated,
    ssh: Arc<Mutex<Option<SshServer>>>,
}

#[async_trait]
impl Provider for Plain {
    fn kind(&self) -> &'static str {
        self.machines.kind()
    }

    async fn preflight(&self) -> Vec<Check> {
        self.machines.preflight().await
    }

    async fn create(&self, spec: &DesktopSpec) -> Result<(), ProviderError> {
        self.machines.create(spec).await
    }

    async fn adopt(&self, name: DesktopName) -> Result<bool, ProviderError> {
        Ok(self.machines.state(name).await? == MachineState::Running)
    }

    async fn state(&self, name: DesktopName) -> Result<MachineState, ProviderError> {
        self.machines.state(name).await
    }

    async fn bootstrap(&self, name: DesktopName, b: &Bootstrap) -> Result<(), ProviderError> {
        self.machines.bootstrap(name, b).await
    }

    async fn agent(&self, name: DesktopName) -> Result<AgentChannel, ProviderError> {
        self.machines.agent(name).await
    }

    async fn rdp_address(&self, name: DesktopName) -> Result<SocketAddr, ProviderError> {
        self.machines.rdp_address(name).await
    }

    async fn ssh(&self, _: DesktopName) -> Result<SshServer, ProviderError> {
        let known = self.ssh.lock().unwrap().clone();
        known.ok_or_else(|| ProviderError::NotYet("it has no host key yet".to_owned()))
    }

    async fn destroy(&self, name: DesktopName) -> Result<Vec<Absence>, ProviderError> {
        self.machines.destroy(name).await
    }

    async fn list(&self) -> Result<Vec<DesktopName>, ProviderError> {
        self.machines.list().await
    }
}

/// A state folder, pretended machines, one SSH server for all of them, and a playbook.
struct Site {
    folder: tempfile::TempDir,
    machines: Plain,
    secrets: Arc<Secrets>,
    config: AnsibleConfig,
    server: Child,
    /// The server ends with it.
    _stdin: ChildStdin,
}

impl Site {
    fn new(playbook: &str) -> Self {
        static SITES: AtomicU8 = AtomicU8::new(0);
        let folder = tempfile::tempdir().unwrap();
        let path = |file: &str| folder.path().join(file);
        for made in ["state", "machines", "ssh"] {
            std::fs::create_dir(path(made)).unwrap();
        }
        std::fs::write(path("agent"), "the agent").unwrap();
        std::fs::write(path("playbook.yml"), playbook).unwrap();
        let variables = format!(
            "ansible_python_interpreter: /usr/bin/python3\nmark: {}\nhold: {}\n",
            path("mark").display(),
            path("hold").display(),
        );
        std::fs::write(path("variables.yml"), variables).unwrap();
        let secrets = Arc::new(Secrets::open(&path("secret.key")).unwrap());

        let host = Ed25519Keypair::from_seed(&[7; 32]);
        let private = PrivateKey::from(host.clone());
        let private = private.to_openssh(LineEnding::LF).unwrap();
        std::fs::write(path("ssh/host_key"), private.as_bytes()).unwrap();
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path("ssh/host_key"), mode).unwrap();
        let allowed: String = (1..30)
            .map(|number| {
                let seed = secrets.ssh_key_seed(DesktopName::from_number(number).unwrap());
                let pair = Ed25519Keypair::from_seed(seed.expose_secret());
                PublicKey::from(pair.public).to_openssh().unwrap() + "\n"
            })
            .collect();
        std::fs::write(path("ssh/authorized_keys"), allowed).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ansible/ssh_server.py");
        // Debian's Python: the one that has the package python3-asyncssh.
        let mut server = Command::new("/usr/bin/python3")
            .args(["-W", "ignore", script])
            .arg(path("ssh"))
            .arg("127.0.0.1")
            // What a module that is killed leaves ends with the site.
            .env("TMPDIR", path("ssh"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut port = String::new();
        let mut said = BufReader::new(server.stdout.take().unwrap());
        said.read_line(&mut port).unwrap();
        let port: u16 = port.trim().parse().expect(
            "the SSH server starts; it needs the package python3-asyncssh, as `cargo xtask test` installs it",
        );

        let place = SITES.fetch_add(1, Ordering::SeqCst);
        let simulated = SimulatedConfig {
            create_ms: 20,
            boot_ms: 20,
            configure_ms: 20,
            destroy_ms: 20,
            evidence_ms: 50,
            address_prefix: format!("127.{}", 30 + place),
            rdp_port: u16::try_from(20_000 + std::process::id() % 12_000).unwrap(),
            ..SimulatedConfig::default()
        };
        let machines = Plain {
            machines: Simulated::open(simulated, &path("machines")).unwrap(),
            ssh: Arc::new(Mutex::new(Some(SshServer {
                address: SocketAddr::from(([127, 0, 0, 1], port)),
                user: "root".to_owned(),
                host_key: PublicKey::from(host.public),
            }))),
        };
        let config = AnsibleConfig {
            agent: path("agent"),
            variables: vec![path("variables.yml")],
            ..AnsibleConfig::default()
        };
        Self {
            _stdin: server.stdin.take().unwrap(),
            machines,
            secrets,
            config,
            server,
            folder,
        }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The provider as an orchestrator has it that has just started.
    fn provider(&self) -> Ansible {
        Ansible::new(
            Arc::new(self.machines.clone()),
            self.config.clone(),
            BTreeSet::from([self.path("playbook.yml")]),
            env!("CARGO_BIN_EXE_mayfly-orchestrator").into(),
            &self.path("state"),
            self.secrets.clone(),
        )
        .unwrap()
    }

    fn spec(&self) -> DesktopSpec {
        DesktopSpec {
            name: name(),
            session: SessionId::new(),
            in_domain: false,
            playbook: Some(self.path("playbook.yml")),
            cpus: 1,
            memory_mib: 128,
            lifetime: Duration::from_secs(600),
        }
    }

    /// Why the create fails.
    async fn failure(&self) -> String {
        let error = self.provider().create(&self.spec()).await.unwrap_err();
        assert!(matches!(error, ProviderError::Failed(_)), "{error:?}");
        error.to_string()
    }

    fn run(&self) -> PathBuf {
        self.path("state/ansible").join(name().to_string())
    }

    fn hold(&self) {
        std::fs::write(self.path("hold"), "").unwrap();
    }

    fn let_go(&self) {
        std::fs::remove_file(self.path("hold")).unwrap();
    }

    fn mark(&self) -> Option<String> {
        std::fs::read_to_string(self.path("mark")).ok()
    }

    /// Of runs: what the kernel shows, and what is on the disk.
    fn left(&self) -> Vec<String> {
        let runs = self.path("state/ansible");
        let mut left: Vec<String> = std::fs::read_dir(&runs)
            .unwrap()
            .map(|entry| entry.unwrap().path().display().to_string())
            .collect();
        left.extend(of_run(&runs).into_iter().map(|(_, line)| line));
        left
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.server.kill().ok();
        self.server.wait().ok();
        // Until they are gone: one that still writes would keep the folder from being removed.
        loop {
            let left = of_run(self.folder.path());
            if left.is_empty() {
                return;
            }
            for (process, _) in left {
                process.signal(Signal::KILL).ok();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Processes that have the folder in their command lines or environments, with both.
fn of_run(folder: &Path) -> Vec<(Process, String)> {
    let folder = folder.to_str().unwrap();
    let all = process::all().unwrap().into_iter();
    all.map(|(process, mut line)| {
        let environ = std::fs::read(format!("/proc/{}/environ", process.pid));
        line.extend(environ.unwrap_or_default());
        (process, String::from_utf8_lossy(&line).replace('\0', " "))
    })
    .filter(|(process, line)| line.contains(folder) && process.is_alive())
    .collect()
}

fn name() -> DesktopName {
    DesktopName::from_number(1).unwrap()
}

async fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "not seen: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn task(number: u32, name: &str) -> StageProgress {
    let name = name.to_owned();
    StageProgress::Task { number, name }
}

/// A playbook with these tasks.
fn tasks(tasks: &str) -> String {
    format!("- hosts: ephemeral_desktop\n  gather_facts: false\n  tasks:\n{tasks}")
}

#[tokio::test]
async fn a_machine_is_configured_by_its_playbook_and_nothing_of_the_run_goes_on() {
    let site = Site::new(PLAYBOOK);
    let provider = site.provider();
    let checks = provider.preflight_of(Extra::Playbook).await;
    let own = checks.iter().find(|check| check.name == "ansible").unwrap();
    assert_eq!(own.status, CheckStatus::Ok, "{own:?}");
    let mut news = provider.news().follow(name());
    provider.create(&site.spec()).await.unwrap();
    assert_eq!(news.unheard(), Some(task(2, "Wait to be let go")));
    assert_eq!(site.mark(), Some(name().to_string()));
    assert!(!site.run().join("work").exists(), "the key is removed");
    assert_eq!(of_run(&site.run()), []);
    assert_eq!(provider.list().await.unwrap(), [name()]);
    provider.destroy(name()).await.unwrap();
    assert_eq!(site.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_desktop_of_a_whole_template_needs_no_playbook() {
    let site = Site::new(PLAYBOOK);
    let spec = DesktopSpec {
        playbook: None,
        ..site.spec()
    };
    site.provider().create(&spec).await.unwrap();
    assert_eq!(site.mark(), None);
    assert_eq!(site.left(), Vec::<String>::new());
    site.provider().destroy(name()).await.unwrap();
}

#[tokio::test]
async fn a_machine_with_another_host_key_is_refused_whatever_the_playbook_says() {
    let off = "  vars:\n    ansible_host_key_checking: false\n    ansible_ssh_common_args: -o StrictHostKeyChecking=no\n  tasks:";
    let site = Site::new(&PLAYBOOK.replace("  tasks:", off));
    let other = Ed25519Keypair::from_seed(&[8; 32]);
    site.machines.ssh.lock().unwrap().as_mut().unwrap().host_key = PublicKey::from(other.public);
    let why = site.failure().await;
    assert!(why.contains("task Write what a desktop needs"), "{why}");
    assert!(why.contains("Host key verification failed"), "{why}");
    assert_eq!(site.mark(), None);
}

#[tokio::test]
async fn a_task_that_fails_is_named_with_its_reason() {
    let site = Site::new(&tasks(
        "    - name: Install packages\n      ansible.builtin.command: {argv: [sh, -c, 'echo no mirror >&2; exit 3']}\n",
    ));
    let why = site.failure().await;
    let words =
        "did not configure desktop-0000001: task Install packages: non-zero return code: no mirror";
    assert!(why.ends_with(words), "{why}");
    site.provider().destroy(name()).await.unwrap();
    assert_eq!(site.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_playbook_that_is_for_other_machines_does_not_pass_for_success() {
    let site = Site::new(&PLAYBOOK.replace("ephemeral_desktop", "domain_vms"));
    let why = site.failure().await;
    assert!(
        why.contains("nothing for the group ephemeral_desktop"),
        "{why}"
    );
}

#[tokio::test]
async fn a_playbook_that_takes_too_long_is_ended() {
    let mut site = Site::new(PLAYBOOK);
    site.hold();
    site.config.timeout_s = 5;
    let why = site.failure().await;
    assert!(why.contains("did not end in time"), "{why}");
    assert_eq!(of_run(&site.run()), []);
}

#[tokio::test]
async fn a_machine_whose_first_boot_never_ends_is_given_up() {
    let mut site = Site::new(PLAYBOOK);
    site.config.timeout_s = 1;
    *site.machines.ssh.lock().unwrap() = None;
    let provider = site.provider();
    let mut news = provider.news().follow(name());
    let error = provider.create(&site.spec()).await.unwrap_err();
    assert_eq!(news.unheard(), Some(StageProgress::FirstBoot));
    let why = error.to_string();
    assert!(
        why.contains("1 s (ansible.timeout_s): it has no host key yet"),
        "{why}"
    );
}

#[tokio::test]
async fn the_key_is_in_no_argument_environment_or_message() {
    // Worse than any playbook should be.
    let site = Site::new(
        &(PLAYBOOK.to_owned()
            + "    - name: Tell\n      ansible.builtin.fail: {msg: \"{{ lookup('file', lookup('env', 'HOME') ~ '/key') }}\"}\n"),
    );
    site.hold();
    let provider = Arc::new(site.provider());
    let create = tokio::spawn({
        let (provider, spec) = (provider.clone(), site.spec());
        async move { provider.create(&spec).await }
    });
    wait_for("the first task", || site.mark()).await;
    let file = site.run().join("work/key");
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let key = std::fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = key.lines().filter(|l| !l.starts_with('-')).collect();
    assert!(lines.len() > 3);
    let shown = of_run(&site.run());
    assert!(shown.len() > 1, "the run is seen: {shown:?}");
    site.let_go();
    let why = create.await.unwrap().unwrap_err().to_string();
    assert!(why.contains("task Tell: -----BEGIN OPENSSH"), "{why}");
    for line in lines {
        assert!(!why.contains(line), "{why}");
        for (_, words) in &shown {
            assert!(!words.contains(line), "{words}");
        }
    }
}

#[tokio::test]
async fn variables_come_from_a_vault_whose_password_only_ansible_reads() {
    let mut site = Site::new(&tasks(
        "    - name: Use the secret\n      ansible.builtin.command:\n        argv: [sh, -c, 'cat > \"$0\"', \"{{ mark }}\"]\n        \
         stdin: \"{{ site_secret }}\"\n        stdin_add_newline: false\n      no_log: true\n",
    ));
    let (vault, password) = (site.path("vault.yml"), site.path("vault-password"));
    std::fs::write(&vault, "site_secret: tiramisu\n").unwrap();
    std::fs::write(&password, "a password for this test alone\n").unwrap();
    let encrypted = Command::new("ansible-vault")
        .args(["encrypt", "--vault-password-file"])
        .args([&password, &vault])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(encrypted.success());
    site.config.variables.push(vault);
    site.config.vault_password_file = Some(password);
    site.provider().create(&site.spec()).await.unwrap();
    assert_eq!(site.mark().unwrap(), "tiramisu");
    let output = std::fs::read_to_string(site.run().join("output.log")).unwrap();
    assert!(output.contains("Use the secret") && !output.contains("tiramisu"));
}

/// A create that came to its first task, and then nobody waits for it any more.
async fn abandoned(site: &Site) {
    site.hold();
    let create = tokio::spawn({
        let (provider, spec) = (site.provider(), site.spec());
        async move { provider.create(&spec).await }
    });
    wait_for("the first task", || site.mark()).await;
    create.abort();
    assert!(create.await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn a_playbook_that_runs_is_ended_with_its_desktop() {
    let site = Site::new(PLAYBOOK);
    abandoned(&site).await;
    assert_ne!(of_run(&site.run()), [], "it goes on");
    let provider = site.provider();
    provider.destroy(name()).await.unwrap();
    assert_eq!(site.left(), Vec::<String>::new());
    assert_eq!(provider.state(name()).await.unwrap(), MachineState::Absent);
}

#[tokio::test]
async fn an_orchestrator_that_starts_again_waits_for_the_playbook_of_the_one_before() {
    let site = Site::new(PLAYBOOK);
    abandoned(&site).await;
    let provider = site.provider();
    let mut news = provider.news().follow(name());
    let adopt = tokio::spawn(async move { provider.adopt(name()).await });
    let hears = async { while news.next().await != Some(task(2, "Wait to be let go")) {} };
    let heard = tokio::time::timeout(PATIENCE, hears).await;
    assert!(heard.is_ok(), "it goes on telling");
    site.let_go();
    assert!(adopt.await.unwrap().unwrap());
    assert_eq!(of_run(&site.run()), []);
}

#[tokio::test]
async fn a_playbook_whose_supervisor_was_killed_is_not_taken_for_success() {
    let site = Site::new(PLAYBOOK);
    abandoned(&site).await;
    wait_for("the end of all of it", || {
        let left = of_run(&site.run());
        for (process, _) in &left {
            process.signal(Signal::KILL).unwrap();
        }
        left.is_empty().then_some(())
    })
    .await;
    let provider = site.provider();
    assert!(!provider.adopt(name()).await.unwrap());
    provider.destroy(name()).await.unwrap();
    assert_eq!(site.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_that_was_made_and_never_configured_is_configured_when_it_is_adopted() {
    let site = Site::new(PLAYBOOK);
    let stopped = site.provider().with_steps(Arc::new(|step| match step {
        "create: machine runs" => Err(ProviderError::Failed("as if killed".to_owned())),
        _ => Ok(()),
    }));
    stopped.create(&site.spec()).await.unwrap_err();
    assert_eq!(site.mark(), None);
    assert!(site.provider().adopt(name()).await.unwrap());
    assert_eq!(site.mark(), Some(name().to_string()));
}

#[async_trait]
impl World for Site {
    fn provider(&self, steps: Steps) -> Arc<dyn Provider> {
        Arc::new(Site::provider(self).with_steps(steps))
    }

    fn create_steps(&self) -> Vec<&'static str> {
        STEPS
            .into_iter()
            .filter(|s| s.starts_with("create"))
            .collect()
    }

    fn destroy_steps(&self) -> Vec<&'static str> {
        STEPS
            .into_iter()
            .filter(|s| s.starts_with("destroy"))
            .collect()
    }

    fn size(&self) -> (u32, u32) {
        (1, 128)
    }

    fn playbook(&self) -> Option<PathBuf> {
        Some(self.path("playbook.yml"))
    }

    fn leftovers(&self) -> Vec<String> {
        let mut left = self.left();
        let machines = std::fs::read_dir(self.path("machines")).unwrap();
        left.extend(machines.map(|m| m.unwrap().path().display().to_string()));
        left
    }
}

#[tokio::test]
async fn it_conforms() {
    let site = Site::new(PLAYBOOK);
    conformance::a_desktop_lives_and_dies(&site).await;
    conformance::nothing_is_destroyed_without_complaint(&site).await;
    conformance::a_crash_between_any_two_steps_leaves_nothing(&site).await;
    conformance::many_at_once(&site).await;
    assert_eq!(site.leftovers(), Vec::<String>::new());
}
