//! A realm: a real Active Directory domain (Samba's) with a file server, beside a [`crate::site::Site`] (`tests/ad-lab`).
//!
//! Needs the network of [`crate::site::alone`], and root.

use anyhow::{Context, Result, ensure};
use data_encoding::BASE64URL_NOPAD;
use serde::Deserialize;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// What the lab says of its domain.
#[derive(Debug, Deserialize)]
struct Facts {
    domain: String,
    server: String,
    address: String,
    ou: String,
    service_account: String,
    ca_file: PathBuf,
    shares_folder: PathBuf,
}

/// The network cable of the domain's controller.
#[derive(Clone, Copy, Debug)]
pub enum Cable {
    /// As at the start.
    Plugged,
    /// Nothing reaches it, and nothing is refused: as when a machine has lost its power.
    Pulled,
}

/// A running domain. Ends with this.
#[derive(Debug)]
pub struct Realm {
    process: Child,
    /// The lab ends with its standard input.
    input: Option<ChildStdin>,
    folder: tempfile::TempDir,
    facts: Facts,
}

/// The password of everybody in the domain: a test's, and of this run alone.
fn password(of: &str) -> String {
    let mut bytes = [0; 12];
    for byte in &mut bytes {
        *byte = fastrand::u8(..);
    }
    format!("Aa1-{of}-{}", BASE64URL_NOPAD.encode(&bytes))
}

impl Realm {
    /// Provisions a domain and waits until it answers; its server's name is known to this machine then.
    ///
    /// # Errors
    /// What is missing, or what the lab said.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        let people = ["alice", "bob", "svc-mayfly", "administrator"];
        let mut passwords = serde_json::Map::new();
        for name in people {
            let secret = password(name);
            write_secret(&path(name), &secret)?;
            passwords.insert(name.to_owned(), secret.into());
        }
        write_secret(
            &path("passwords.json"),
            &serde_json::Value::from(passwords).to_string(),
        )?;
        let mut process = Command::new("python3")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("ad-lab/ad_lab.py"))
            .arg("--passwords")
            .arg(path("passwords.json"))
            .arg("--out")
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(path("stderr"))?)
            .spawn()
            .context("starting python3")?;
        let input = process.stdin.take().context("no standard input")?;
        let output = process.stdout.take().context("no standard output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let facts: Facts = serde_json::from_str(&line).with_context(|| {
            let words = fs::read_to_string(path("stderr")).unwrap_or_default();
            format!("the domain said {line:?}: {words}")
        })?;
        // In this mount namespace alone.
        let hosts = path("hosts");
        let known = fs::read_to_string("/etc/hosts").unwrap_or_default();
        fs::write(
            &hosts,
            format!("{known}\n{} {}\n", facts.address, facts.server),
        )?;
        let bound = Command::new("mount")
            .arg("--bind")
            .arg(&hosts)
            .arg("/etc/hosts")
            .status()?;
        ensure!(bound.success(), "/etc/hosts could not be replaced");
        Ok(Self {
            process,
            input: Some(input),
            folder,
            facts,
        })
    }

    /// Somebody's password.
    ///
    /// # Errors
    /// When the domain does not know them.
    pub fn password(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.folder.path().join(name)).with_context(|| format!("no {name}"))
    }

    /// What the file server has of a share.
    #[must_use]
    pub fn share(&self, path: &str) -> PathBuf {
        self.facts.shares_folder.join(path)
    }

    /// Keys of a template whose desktops are members, and have the lab's shares.
    #[must_use]
    pub fn template(&self) -> String {
        let server = &self.facts.server;
        format!(
            "domain = true\nshares = [\n\
             {{ server = {server:?}, share = \"partage\", mount = \"Partage\" }},\n\
             {{ server = {server:?}, share = \"home\", mount = \"Home\" }},\n]\n"
        )
    }

    /// The part of an orchestrator's configuration that names it.
    #[must_use]
    pub fn configuration(&self) -> String {
        let Facts {
            domain,
            server,
            address,
            ou,
            service_account,
            ca_file,
            ..
        } = &self.facts;
        format!(
            "[domain]\nname = {domain:?}\nservers = [{server:?}]\ndns_servers = [{address:?}]\nca_file = {ca_file:?}\n\
             account = {service_account:?}\npassword_file = {:?}\nou = {ou:?}\n",
            self.folder.path().join("svc-mayfly")
        )
    }

    /// Pulls the controller's network cable, or plugs it in again.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn cable(&self, state: Cable) -> Result<()> {
        let link = format!("ad{}", self.process.id());
        let state = match state {
            Cable::Plugged => "up",
            Cable::Pulled => "down",
        };
        let set = Command::new("ip")
            .args(["link", "set", &link, state])
            .status()?;
        ensure!(set.success(), "{link} could not be set {state}");
        Ok(())
    }

    /// Names of the computer accounts in the desktops' unit, asked as the domain's administrator.
    ///
    /// # Errors
    /// When the domain does not answer.
    pub fn accounts(&self) -> Result<Vec<String>> {
        let Facts {
            domain, server, ou, ..
        } = &self.facts;
        let found = Command::new("ldapsearch")
            .args(["-x", "-LLL", "-H", &format!("ldaps://{server}")])
            .args(["-D", &format!("administrator@{domain}"), "-y"])
            .arg(self.folder.path().join("administrator"))
            .args(["-b", ou, "(objectClass=computer)", "sAMAccountName"])
            .env("LDAPTLS_CACERT", &self.facts.ca_file)
            .output()
            .context("starting ldapsearch (ldap-utils)")?;
        ensure!(
            found.status.success(),
            "ldapsearch: {}",
            String::from_utf8_lossy(&found.stderr)
        );
        Ok(String::from_utf8_lossy(&found.stdout)
            .lines()
            .filter_map(|line| line.strip_prefix("sAMAccountName: "))
            .map(str::to_owned)
            .collect())
    }
}

fn write_secret(path: &Path, secret: &str) -> Result<()> {
    fs::write(path, secret)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

impl Drop for Realm {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("/etc/hosts").status();
        // In order, if it will: it has a file system mounted in our folder.
        drop(self.input.take());
        for _ in 0..200 {
            if matches!(self.process.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
