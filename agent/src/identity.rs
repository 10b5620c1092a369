//! How a machine takes its identity: the steps, in order, each timed and each done once.
//!
//! Promises:
//! * Nothing secret is in an argument of a command, in a log or in a failure's message.
//! * A step that was done is not done again, whatever restarts the agent; one that was interrupted is repeated, and every
//!   step may be.
//! * What belongs to one machine alone (key, certificate, machine id, host keys) is made here, never in the image.

use crate::bootstrap::{self, Progress, below, replace};
use crate::line::Calling;
use crate::system::System;
use crate::talk::{Event, Person};
use crate::{certificate, locale, shares};
use anyhow::{Context as _, bail, ensure};
use jiff::{SignedDuration, tz::TimeZone};
use mayfly_api::agent::{Bootstrap, Call, FromAgent};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

/// A clock that is off by less is left alone.
const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_secs(2);
/// Groups that the person joins where the image has them; xrdp's `TerminalServerUsers` is `tsusers`.
const GROUPS: [&str; 5] = ["audio", "plugdev", "render", "tsusers", "video"];
/// Joins a domain, and leaves its shares: the role `ad-join` puts it there.
pub(crate) const DOMAIN_PROGRAM: &str = "/usr/lib/mayfly/ad-join";
/// What it is told, but for the secret.
const DOMAIN_FILE: &str = "/run/mayfly/domain.json";
const SSH_HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";

/// The machine that takes its identity.
pub(crate) struct Machine {
    /// `/`, or a folder in tests.
    pub(crate) root: PathBuf,
    /// The RDP server's certificate.
    pub(crate) certificate: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
    /// The rest.
    pub(crate) system: Arc<dyn System>,
}

type Step = fn(&Machine, &Progress) -> anyhow::Result<()>;

const STEPS: [(&str, Step); 9] = [
    ("clock", Machine::clock),
    ("host_name", Machine::host_name),
    ("machine_id", Machine::machine_id),
    ("ssh_host_key", Machine::ssh_host_key),
    ("rdp_certificate", Machine::rdp_certificate),
    ("domain", Machine::domain),
    ("user", Machine::user),
    ("language", Machine::language),
    ("services", Machine::services),
];

/// Waits for the bootstrap, takes the identity, and says how it went. Never returns: then it removes bootstraps that are
/// written again.
pub(crate) fn take(machine: &Machine, events: &Sender<Event>) {
    let failed = |step: &str, error: &anyhow::Error, secrets: &[SecretString]| {
        let mut message = format!("{error:#}");
        for secret in secrets.iter().map(SecretString::expose_secret) {
            if !secret.is_empty() {
                message = message.replace(secret, "…");
            }
        }
        tracing::error!(step, message, "the machine cannot take its identity");
        FromAgent::Failed {
            step: step.to_owned(),
            message,
        }
    };
    let outcome = match Progress::take(&machine.root, &*machine.system) {
        Err(error) => failed("bootstrap", &error, &[]),
        Ok(mut progress) => {
            let bootstrap = &progress.bootstrap;
            let of_domain = bootstrap
                .domain
                .as_ref()
                .map(|domain| domain.secret.clone());
            let secrets = [bootstrap.password.clone(), of_domain.unwrap_or_default()];
            let person = Person {
                user: bootstrap.user.clone(),
                in_domain: bootstrap.domain.is_some(),
                shares: match &bootstrap.domain {
                    Some(domain) => shares::places(&bootstrap.user, &domain.shares),
                    None => Vec::new(),
                },
                language: bootstrap.language.clone(),
                silence_limit: Duration::from_secs(bootstrap.silence_limit_s.into()),
            };
            let calling = calling(bootstrap);
            if events.send(Event::Taken(person, calling)).is_err() {
                return;
            }
            match machine.personalise(&mut progress) {
                Ok(ready) => ready,
                Err((step, error)) => failed(step, &error, &secrets),
            }
        }
    };
    let _ = events.send(Event::Settled(outcome));
    loop {
        thread::sleep(Duration::from_secs(5));
        bootstrap::forget(&machine.root);
    }
}

/// Whom to call, if the bootstrap names somebody. A host name that is no desktop's fails at its step.
fn calling(bootstrap: &Bootstrap) -> Option<Calling> {
    Some(Calling {
        line: bootstrap.line.clone()?,
        call: Call {
            session: bootstrap.session,
            token: bootstrap.token.clone(),
            desktop: bootstrap.host_name.parse().ok()?,
        },
    })
}

impl Machine {
    fn personalise(
        &self,
        progress: &mut Progress,
    ) -> Result<FromAgent, (&'static str, anyhow::Error)> {
        check(&progress.bootstrap).map_err(|error| ("bootstrap", error))?;
        for (name, step) in STEPS {
            if progress.done.iter().any(|(done, _)| done == name) {
                continue;
            }
            let begun = Instant::now();
            step(self, progress).map_err(|error| (name, error))?;
            let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::info!(step = name, ms, "done");
            progress.done.push((name.to_owned(), ms));
            if name == "user" {
                progress.bootstrap.password = SecretString::default();
            }
            if let Some(domain) = progress
                .bootstrap
                .domain
                .as_mut()
                .filter(|_| name == "domain")
            {
                domain.secret = SecretString::default();
            }
            progress.save(&self.root).map_err(|error| (name, error))?;
        }
        let last = || -> anyhow::Result<FromAgent> {
            let path = self.path(&self.certificate);
            let pem =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            Ok(FromAgent::Ready {
                session: progress.bootstrap.session,
                token: progress.bootstrap.token.clone(),
                certificate_sha256: certificate::fingerprint(&pem)?,
                ssh_host_key: fs::read_to_string(self.path(format!("{SSH_HOST_KEY}.pub")))
                    .ok()
                    .map(|key| key.trim_end().to_owned()),
                steps_ms: progress.done.clone(),
            })
        };
        last().map_err(|error| ("services", error))
    }

    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        below(&self.root, path)
    }

    /// Writes in place: what the image links or mounts there stays linked and mounted.
    fn write(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let path = self.path(path);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    fn has_group(&self, name: &str) -> bool {
        self.read("/etc/group")
            .lines()
            .any(|line| line.split(':').next() == Some(name))
    }

    fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(self.system.run(program, arguments, "")?)
    }

    fn clock(&self, progress: &Progress) -> anyhow::Result<()> {
        let since = self.system.uptime().saturating_sub(progress.as_of);
        let right = progress
            .bootstrap
            .now
            .checked_add(since)
            .context("the time in the bootstrap is out of range")?;
        let off = right.duration_since(self.system.now());
        if off.abs() > CLOCK_TOLERANCE {
            tracing::info!(seconds = off.as_secs(), "the clock was off");
            self.system.set_now(right).context("setting the clock")?;
        }
        Ok(())
    }

    fn host_name(&self, progress: &Progress) -> anyhow::Result<()> {
        let name = &progress.bootstrap.host_name;
        self.write("/etc/hostname", &format!("{name}\n"))?;
        self.write("/etc/hosts", &locale::hosts(&self.read("/etc/hosts"), name))?;
        self.system
            .set_host_name(name)
            .context("setting the host name")
    }

    /// From the token: fresh for every session, the same if the step is repeated (man machine-id).
    ///
    /// journald goes on in the folder named after the id it began with, and journalctl reads the one named after the id of now:
    /// a link keeps the two together.
    fn machine_id(&self, progress: &Progress) -> anyhow::Result<()> {
        let digest = Sha256::new()
            .chain_update("mayfly machine-id\0")
            .chain_update(progress.bootstrap.token.expose_secret())
            .finalize();
        let new = data_encoding::HEXLOWER.encode(&digest[..16]);
        let old = self.read("/etc/machine-id");
        let old = old.trim_end();
        for journals in ["/run/log/journal", "/var/log/journal"].map(|path| self.path(path)) {
            if old.len() == new.len() && old != new && journals.join(old).is_dir() {
                symlink(old, journals.join(&new))
                    .with_context(|| format!("linking a journal in {}", journals.display()))?;
            }
        }
        let id = new + "\n";
        self.write("/etc/machine-id", &id)?;
        let dbus = "/var/lib/dbus/machine-id";
        match fs::symlink_metadata(self.path(dbus)) {
            Ok(meta) if meta.is_file() => self.write(dbus, &id),
            _ => Ok(()),
        }
    }

    /// Ed25519 alone: an RSA key costs seconds under software emulation, and every SSH client of the last ten years knows Ed25519.
    fn ssh_host_key(&self, _: &Progress) -> anyhow::Result<()> {
        let key = self.path(SSH_HOST_KEY);
        if !self.has_ssh() || key.with_extension("pub").exists() {
            return Ok(());
        }
        let _ = fs::remove_file(&key);
        let key = key.to_string_lossy();
        self.run(
            "ssh-keygen",
            &["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", &*key],
        )?;
        Ok(())
    }

    fn has_ssh(&self) -> bool {
        self.path("/usr/sbin/sshd").exists()
    }

    fn rdp_certificate(&self, progress: &Progress) -> anyhow::Result<()> {
        let today = TimeZone::UTC.to_datetime(self.system.now()).date();
        let made = certificate::make(&progress.bootstrap.host_name, today)?;
        let key = self.path(&self.key);
        replace(&key, made.key_pem.as_bytes(), 0o600)?;
        if self.has_group("xrdp") {
            self.run("chgrp", &["xrdp", &key.to_string_lossy()])?;
            fs::set_permissions(&key, fs::Permissions::from_mode(0o640))
                .with_context(|| format!("letting group xrdp read {}", key.display()))?;
        }
        replace(&self.path(&self.certificate), made.pem.as_bytes(), 0o644)
    }

    /// Joins the domain, if there is one. What the program of the image promises: run again after a failure it goes on.
    fn domain(&self, progress: &Progress) -> anyhow::Result<()> {
        let bootstrap = &progress.bootstrap;
        let Some(domain) = &bootstrap.domain else {
            return Ok(());
        };
        let parameters = serde_json::json!({
            "domain": domain.name,
            "users": [bootstrap.user],
            "servers": domain.servers,
            "dns_servers": domain.dns_servers,
            "host_name": bootstrap.host_name,
            "shares": domain.shares,
        });
        let file = self.path(DOMAIN_FILE);
        replace(&file, parameters.to_string().as_bytes(), 0o600)?;
        let secret = format!("{}\n", domain.secret.expose_secret());
        let arguments = ["join", "--parameters", DOMAIN_FILE];
        self.system.run(DOMAIN_PROGRAM, &arguments, &secret)?;
        Ok(())
    }

    fn user(&self, progress: &Progress) -> anyhow::Result<()> {
        let Bootstrap { user, password, .. } = &progress.bootstrap;
        // The domain's own account.
        if progress.bootstrap.domain.is_some() {
            return Ok(());
        }
        let password = password.expose_secret();
        ensure!(
            !password.is_empty() && !password.contains(['\n', '\r', '\0']),
            "the password is empty or more than a line"
        );
        match self.uid(user) {
            None => {
                let groups: Vec<_> = GROUPS.into_iter().filter(|g| self.has_group(g)).collect();
                let groups = groups.join(",");
                let mut arguments = vec!["--create-home", "--shell", "/bin/bash", "--user-group"];
                if !groups.is_empty() {
                    arguments.extend(["--groups", &groups]);
                }
                arguments.push(user);
                self.run("useradd", &arguments)?;
            }
            Some(1000..=59_999) => {}
            Some(_) => bail!("{user:?} is a system account"),
        }
        self.system
            .run("chpasswd", &[], &format!("{user}:{password}\n"))?;
        Ok(())
    }

    fn uid(&self, user: &str) -> Option<u32> {
        let passwd = self.read("/etc/passwd");
        let mut fields = passwd
            .lines()
            .map(|line| line.split(':'))
            .find(|fields| fields.clone().next() == Some(user))?;
        fields.nth(2)?.parse().ok()
    }

    /// What the image does not have is passed over, with a word in the log.
    fn language(&self, progress: &Progress) -> anyhow::Result<()> {
        let bootstrap = &progress.bootstrap;
        if let Some(tag) = &bootstrap.language {
            let installed = self.run("locale", &["-a"]).unwrap_or_default();
            match locale::choose(tag, &installed) {
                // Read by PAM (xrdp-sesman) and by xrdp's startwm.sh.
                Some((lang, languages)) => self.write(
                    "/etc/default/locale",
                    &format!("LANG={lang}\nLANGUAGE={languages}\n"),
                )?,
                None => tracing::warn!(tag, "the image does not speak this language"),
            }
        }
        if let Some(zone) = &bootstrap.time_zone {
            let target = Path::new("/usr/share/zoneinfo").join(zone);
            if locale::is_time_zone(zone) && self.path(&target).is_file() {
                let link = self.path("/etc/localtime");
                let _ = fs::remove_file(&link);
                symlink(&target, &link).with_context(|| format!("linking {}", link.display()))?;
                self.write("/etc/timezone", &format!("{zone}\n"))?;
            } else {
                tracing::warn!(zone, "the image does not know this time zone");
            }
        }
        if let Some(layout) = &bootstrap.keyboard {
            let file = "/etc/default/keyboard";
            match locale::keyboard(&self.read(file), layout) {
                Some(content) => self.write(file, &content)?,
                None => tracing::warn!(layout, "not a keyboard layout"),
            }
        }
        Ok(())
    }

    fn services(&self, _: &Progress) -> anyhow::Result<()> {
        if self.has_ssh() {
            self.run("systemctl", &["start", "--no-block", "ssh.service"])?;
        }
        let started = self.run("systemctl", &["start", "xrdp.service"]);
        started.map(drop).map_err(|error| {
            // systemctl itself only says where to look.
            let journal = [
                "-b",
                "-n",
                "3",
                "-o",
                "cat",
                "-u",
                "xrdp",
                "-u",
                "xrdp-sesman",
            ];
            let words = self.run("journalctl", &journal).unwrap_or_default();
            error.context(format!("xrdp does not start: {}", words.trim_end()))
        })
    }
}

/// Refuses what must not reach a file or a command, wherever the bootstrap came from.
fn check(bootstrap: &Bootstrap) -> anyhow::Result<()> {
    let Bootstrap {
        host_name,
        user,
        domain,
        ..
    } = bootstrap;
    let letters = |text: &str, more: &str| {
        text.chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || more.contains(c))
    };
    ensure!(
        (1..=63).contains(&host_name.len())
            && letters(host_name, "-")
            && !host_name.starts_with('-')
            && !host_name.ends_with('-'),
        "{host_name:?} is not a host name"
    );
    ensure!(
        (1..=32).contains(&user.len())
            && letters(user, if domain.is_some() { "_-." } else { "_-" })
            && user.starts_with(|c: char| c.is_ascii_lowercase() || c == '_'),
        "{user:?} is not a login name"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::CommandError;
    use mayfly_api::SessionId;
    use mayfly_api::agent::BOOTSTRAP_FILE;
    use mayfly_api::agent::Domain;
    use std::io;
    use std::sync::{Mutex, mpsc};

    const PASSWORD: &str = "Tr0ub4dor-und-mehr";
    const TOKEN: &str = "0123456789abcdef-token";

    /// A machine whose clock is a day behind and whose commands are only written down.
    #[derive(Default)]
    struct Paper {
        commands: Mutex<Vec<(String, String)>>,
        clock: Mutex<jiff::Timestamp>,
        refuse: Option<&'static str>,
    }

    impl System for Paper {
        fn run(
            &self,
            program: &str,
            arguments: &[&str],
            input: &str,
        ) -> Result<String, CommandError> {
            let line = std::iter::once(&program)
                .chain(arguments)
                .copied()
                .collect::<Vec<_>>()
                .join(" ");
            if self.refuse == Some(program) {
                return Err(CommandError::new(format!("{program}: no: {input}")));
            }
            self.commands.lock().unwrap().push((line, input.to_owned()));
            Ok("fr_FR.utf8\n".into())
        }
        fn now(&self) -> jiff::Timestamp {
            *self.clock.lock().unwrap()
        }
        fn set_now(&self, now: jiff::Timestamp) -> io::Result<()> {
            *self.clock.lock().unwrap() = now;
            Ok(())
        }
        fn uptime(&self) -> Duration {
            Duration::from_secs(100)
        }
        fn set_host_name(&self, name: &str) -> io::Result<()> {
            self.commands
                .lock()
                .unwrap()
                .push((format!("(host name {name})"), String::new()));
            Ok(())
        }
        fn power_off(&self) {}
    }

    struct Scene {
        root: tempfile::TempDir,
        paper: Arc<Paper>,
    }

    impl Scene {
        fn new(paper: Paper) -> Self {
            let root = tempfile::tempdir().unwrap();
            for folder in [
                "etc/ssh",
                "etc/xrdp",
                "etc/default",
                "usr/sbin",
                "usr/share/zoneinfo/Europe",
                "run/mayfly/bootstrap",
                "var/log/journal/00000000000000000000000000000001",
            ] {
                fs::create_dir_all(root.path().join(folder)).unwrap();
            }
            for (file, content) in [
                (
                    "etc/passwd",
                    "root:x:0:0::/root:/bin/sh\nbackup:x:34:34::/:/bin/false\n",
                ),
                ("etc/group", "root:x:0:\naudio:x:29:\nxrdp:x:115:\n"),
                ("etc/hosts", "127.0.0.1 localhost\n"),
                ("etc/default/keyboard", "XKBMODEL=\"pc105\"\n"),
                ("etc/localtime", "old"),
                ("etc/machine-id", "00000000000000000000000000000001\n"),
                ("usr/sbin/sshd", ""),
                ("usr/share/zoneinfo/Europe/Paris", ""),
            ] {
                fs::write(root.path().join(file), content).unwrap();
            }
            let paper = Arc::new(paper);
            *paper.clock.lock().unwrap() = "2026-02-01T12:00:00Z".parse().unwrap();
            Self { root, paper }
        }

        fn machine(&self) -> Machine {
            Machine {
                root: self.root.path().into(),
                certificate: "/etc/xrdp/cert.pem".into(),
                key: "/etc/xrdp/key.pem".into(),
                system: Arc::clone(&self.paper) as Arc<dyn System>,
            }
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.root.path().join(path)).unwrap()
        }

        /// Runs the agent's part until it settled.
        fn take(&self) -> (Option<Person>, FromAgent) {
            let machine = self.machine();
            let (events, inbox) = mpsc::channel();
            thread::spawn(move || take(&machine, &events));
            let mut person = None;
            loop {
                match inbox.recv_timeout(Duration::from_secs(30)).unwrap() {
                    Event::Taken(taken, _) => person = Some(taken),
                    Event::Settled(outcome) => return (person, outcome),
                    other => panic!("{other:?}"),
                }
            }
        }

        fn commands(&self) -> Vec<(String, String)> {
            self.paper.commands.lock().unwrap().clone()
        }
    }

    fn bootstrap() -> Bootstrap {
        Bootstrap {
            session: SessionId::new(),
            host_name: "desktop-0000abc".into(),
            token: TOKEN.into(),
            user: "ada".into(),
            password: PASSWORD.into(),
            now: "2026-02-02T12:00:00Z".parse().unwrap(),
            language: Some("fr-FR".into()),
            time_zone: Some("Europe/Paris".into()),
            keyboard: Some("fr".into()),
            silence_limit_s: 300,
            domain: None,
            line: None,
        }
    }

    fn give(scene: &Scene, bootstrap: &Bootstrap) {
        let file = below(scene.root.path(), BOOTSTRAP_FILE);
        fs::write(file, serde_json::to_vec(bootstrap).unwrap()).unwrap();
    }

    #[test]
    fn a_machine_takes_its_whole_identity() {
        let scene = Scene::new(Paper::default());
        let given = bootstrap();
        give(&scene, &given);
        let (person, outcome) = scene.take();
        let person = person.unwrap();
        assert_eq!(person.user, "ada");
        assert_eq!(person.silence_limit, Duration::from_secs(300));
        let FromAgent::Ready {
            session,
            token,
            certificate_sha256,
            steps_ms,
            ..
        } = outcome
        else {
            panic!("{outcome:?}");
        };
        assert_eq!(session, given.session);
        assert_eq!(token.expose_secret(), TOKEN);
        assert_eq!(
            certificate_sha256,
            certificate::fingerprint(&scene.read("etc/xrdp/cert.pem")).unwrap()
        );
        let steps: Vec<_> = steps_ms.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(steps, STEPS.map(|(name, _)| name));

        assert_eq!(scene.paper.now().to_string(), "2026-02-02T12:00:00Z");
        assert_eq!(scene.read("etc/hostname"), "desktop-0000abc\n");
        assert!(
            scene
                .read("etc/hosts")
                .contains("127.0.1.1\tdesktop-0000abc")
        );
        let id = scene.read("etc/machine-id");
        assert_eq!(id.trim().len(), 32);
        let journal = scene.root.path().join("var/log/journal").join(id.trim());
        assert_eq!(
            fs::read_link(journal).unwrap(),
            Path::new("00000000000000000000000000000001")
        );
        assert_eq!(
            scene.read("etc/default/locale"),
            "LANG=fr_FR.UTF-8\nLANGUAGE=fr_FR:fr\n"
        );
        assert_eq!(scene.read("etc/timezone"), "Europe/Paris\n");
        assert_eq!(
            fs::read_link(scene.root.path().join("etc/localtime")).unwrap(),
            Path::new("/usr/share/zoneinfo/Europe/Paris")
        );
        assert!(
            scene
                .read("etc/default/keyboard")
                .contains("XKBLAYOUT=\"fr\"")
        );
        let key = scene.root.path().join("etc/xrdp/key.pem");
        assert_eq!(
            fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o640
        );

        let key = key.to_string_lossy();
        let ssh = scene.root.path().join("etc/ssh/ssh_host_ed25519_key");
        let lines: Vec<_> = scene.commands().into_iter().map(|(line, _)| line).collect();
        assert_eq!(
            lines,
            [
                "(host name desktop-0000abc)".to_owned(),
                format!("ssh-keygen -q -t ed25519 -N  -C  -f {}", ssh.display()),
                format!("chgrp xrdp {key}"),
                "useradd --create-home --shell /bin/bash --user-group --groups audio ada".into(),
                "chpasswd".into(),
                "locale -a".into(),
                "systemctl start --no-block ssh.service".into(),
                "systemctl start xrdp.service".into(),
            ]
        );
    }

    #[test]
    fn the_password_goes_in_by_standard_input_alone_and_is_then_forgotten() {
        let scene = Scene::new(Paper::default());
        give(&scene, &bootstrap());
        scene.take();
        for (line, input) in scene.commands() {
            assert!(!line.contains(PASSWORD) && !line.contains(TOKEN), "{line}");
            let expected = if line == "chpasswd" {
                format!("ada:{PASSWORD}\n")
            } else {
                String::new()
            };
            assert_eq!(input, expected, "{line}");
        }
        assert!(!below(scene.root.path(), BOOTSTRAP_FILE).exists());
        let kept = scene.root.path().join("run/mayfly/agent.json");
        assert_eq!(
            fs::metadata(&kept).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(!scene.read("run/mayfly/agent.json").contains(PASSWORD));
        let folder = scene.root.path().join("run/mayfly/bootstrap");
        assert_eq!(
            fs::metadata(folder).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn a_restarted_agent_goes_on_and_keeps_the_certificate() {
        let scene = Scene::new(Paper {
            refuse: Some("useradd"),
            ..Paper::default()
        });
        give(&scene, &bootstrap());
        let (_, outcome) = scene.take();
        assert!(matches!(outcome, FromAgent::Failed { ref step, .. } if step == "user"));
        let certificate = scene.read("etc/xrdp/cert.pem");

        // The machine gets better, and the agent starts again: without a bootstrap file.
        let scene = Scene {
            root: scene.root,
            paper: Arc::default(),
        };
        let (_, outcome) = scene.take();
        assert!(matches!(outcome, FromAgent::Ready { .. }), "{outcome:?}");
        assert_eq!(scene.read("etc/xrdp/cert.pem"), certificate);
        let lines: Vec<_> = scene.commands().into_iter().map(|(line, _)| line).collect();
        assert!(lines[0].starts_with("useradd"), "{lines:?}");

        // And once more, with everything done: nothing is repeated.
        let scene = Scene {
            root: scene.root,
            paper: Arc::default(),
        };
        let (_, outcome) = scene.take();
        assert!(matches!(outcome, FromAgent::Ready { .. }), "{outcome:?}");
        assert_eq!(scene.commands(), []);
    }

    #[test]
    fn a_failure_names_its_step_and_holds_no_secret() {
        let scene = Scene::new(Paper {
            refuse: Some("chpasswd"),
            ..Paper::default()
        });
        give(&scene, &bootstrap());
        let (_, outcome) = scene.take();
        let FromAgent::Failed { step, message } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(step, "user");
        assert_eq!(message.trim(), "chpasswd: no: ada:…");
    }

    #[test]
    fn a_half_written_file_is_read_again_until_it_is_whole() {
        let scene = Scene::new(Paper::default());
        let file = below(scene.root.path(), BOOTSTRAP_FILE);
        let whole = serde_json::to_vec(&bootstrap()).unwrap();
        fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        let machine = scene.machine();
        let (events, inbox) = mpsc::channel();
        thread::spawn(move || take(&machine, &events));
        assert!(inbox.recv_timeout(Duration::from_millis(500)).is_err());
        fs::write(&file, &whole).unwrap();
        let next = || inbox.recv_timeout(Duration::from_secs(30)).unwrap();
        assert!(matches!(next(), Event::Taken(..)));
        // Until then it writes into the folder, which could not be removed.
        assert!(matches!(next(), Event::Settled(_)));
    }

    #[test]
    fn names_that_could_do_harm_are_refused_before_anything_is_done() {
        for (host_name, user) in [
            ("desktop-0000abc", "root"),
            ("desktop-0000abc", "backup"),
            ("desktop-0000abc", "-rf"),
            ("desktop-0000abc", "ada:x"),
            ("desktop-0000abc", ""),
            ("a b", "ada"),
            ("a\n127.0.0.1 bank", "ada"),
            ("", "ada"),
        ] {
            let scene = Scene::new(Paper::default());
            give(
                &scene,
                &Bootstrap {
                    host_name: host_name.into(),
                    user: user.into(),
                    ..bootstrap()
                },
            );
            let (_, outcome) = scene.take();
            assert!(
                matches!(outcome, FromAgent::Failed { .. }),
                "{host_name:?} {user:?}"
            );
            let harmless = |line: &str| !line.starts_with("useradd") && line != "chpasswd";
            assert!(scene.commands().iter().all(|(line, _)| harmless(line)));
        }
    }

    #[test]
    fn a_member_of_a_domain_joins_it_and_makes_no_account() {
        let scene = Scene::new(Paper::default());
        let given = Bootstrap {
            domain: Some(Domain {
                name: "ad.example.org".into(),
                servers: vec!["dc1.ad.example.org".into()],
                dns_servers: vec![],
                shares: vec![],
                secret: "a one-time password".into(),
            }),
            ..bootstrap()
        };
        give(&scene, &given);
        let (person, outcome) = scene.take();
        assert!(matches!(outcome, FromAgent::Ready { .. }), "{outcome:?}");
        assert!(person.unwrap().in_domain);
        let commands = scene.commands();
        let joins: Vec<_> = commands
            .iter()
            .filter(|(line, _)| line.starts_with(DOMAIN_PROGRAM))
            .collect();
        assert_eq!(
            joins,
            [&(
                format!("{DOMAIN_PROGRAM} join --parameters {DOMAIN_FILE}"),
                "a one-time password\n".to_owned()
            )]
        );
        assert!(!commands.iter().any(|(line, _)| line.starts_with("useradd")));
        let told = scene.read("run/mayfly/domain.json");
        assert!(
            told.contains("\"users\":[\"ada\"]") && !told.contains("one-time"),
            "{told}"
        );
        let kept = scene.read("run/mayfly/agent.json");
        assert!(!kept.contains("one-time"), "{kept}");
    }

    #[test]
    fn a_clock_that_is_right_is_left_alone_and_a_wait_is_added() {
        let scene = Scene::new(Paper::default());
        let mut progress = Progress {
            bootstrap: bootstrap(),
            as_of: Duration::from_secs(40),
            done: vec![],
        };
        progress.bootstrap.now = "2026-02-01T11:59:01Z".parse().unwrap();
        scene.machine().clock(&progress).unwrap();
        assert_eq!(scene.paper.now().to_string(), "2026-02-01T12:00:00Z");
        progress.bootstrap.now = "2026-02-01T18:00:00Z".parse().unwrap();
        scene.machine().clock(&progress).unwrap();
        assert_eq!(scene.paper.now().to_string(), "2026-02-01T18:01:00Z");
    }

    #[test]
    fn what_the_image_lacks_is_passed_over() {
        let scene = Scene::new(Paper::default());
        let given = Bootstrap {
            language: Some("pt-BR".into()),
            time_zone: Some("../../etc/passwd".into()),
            keyboard: Some("$(id)".into()),
            ..bootstrap()
        };
        give(&scene, &given);
        let (_, outcome) = scene.take();
        assert!(matches!(outcome, FromAgent::Ready { .. }));
        assert_eq!(scene.read("etc/localtime"), "old");
        assert_eq!(scene.read("etc/default/keyboard"), "XKBMODEL=\"pc105\"\n");
    }
}
