//! A fakepve of its own for each test: an unmodified one, in a process, on loopback, with TLS.

use mayfly_orchestrator::pve::{Client, Endpoint, Guest, Limits, Token, VmId};
use mayfly_orchestrator::trust::Trust;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

pub(crate) const TOKEN: &str = "mayfly@pve!orchestrator";
pub(crate) const SECRET: &str = "3f1e2d4c-not-a-real-secret";

/// A running fakepve. Ends with this.
pub(crate) struct FakePve {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    folder: tempfile::TempDir,
    port: u16,
}

impl FakePve {
    /// One real second is `1 / scale` of its own; with 0 every task has ended before its call is answered.
    pub(crate) fn start(scale: f32) -> Self {
        let python = std::env::var_os("MAYFLY_FAKEPVE").expect(
            "MAYFLY_FAKEPVE must name a Python that has fakepve: run `cargo xtask test`, which makes one, or \
             `python3 -m venv V && V/bin/pip install 'fakepve[crypto]==0.5.0'` and MAYFLY_FAKEPVE=V/bin/python",
        );
        let folder = tempfile::tempdir().unwrap();
        let [certificate, key] = certificates(folder.path());
        let mut process = Command::new(python)
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/pve/fakepve_process.py"
            ))
            .args([certificate, key])
            .arg(scale.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.path().join("stderr")).unwrap())
            .spawn()
            .expect("the Python that MAYFLY_FAKEPVE names starts");
        let mut answers = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        let Ok(port) = line.trim().parse() else {
            panic!("fakepve does not start: {}", words(&folder));
        };
        let mut fake = Self {
            orders: process.stdin.take().unwrap(),
            process,
            answers,
            folder,
            port,
        };
        fake.set("pve", "apitokens", json!({ TOKEN: SECRET }));
        fake
    }

    fn order(&mut self, order: &Value) -> Value {
        writeln!(self.orders, "{order}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        match serde_json::from_str::<Value>(&line) {
            Ok(answer) if answer.get("error").is_none() => answer["ok"].clone(),
            _ => panic!("{order}: {line}{}", words(&self.folder)),
        }
    }

    /// Calls a method of `FakePve`.
    pub(crate) fn call(&mut self, name: &str, arguments: Value) {
        let Value::Array(arguments) = arguments else {
            panic!("{name} takes a list, not {arguments}");
        };
        let list: Vec<Value> = std::iter::once(json!(name)).chain(arguments).collect();
        self.order(&json!({ "do": list }));
    }

    /// Sets an attribute of `pve` or of `vm 100`.
    pub(crate) fn set(&mut self, of: &str, name: &str, value: Value) {
        let list = Value::Array(vec![json!(of), json!(name), value]);
        self.order(&json!({ "set": list }));
    }

    /// Changes settings of the cluster's firewall, or of a guest's: `options` or `rules`.
    pub(crate) fn set_firewall(&mut self, guest: Option<u32>, name: &str, value: &Value) {
        let of = match guest {
            Some(id) => json!(["vm", null, id]),
            None => json!(["cluster"]),
        };
        self.order(&json!({ "update": ["firewall_config", of, { name: value }] }));
    }

    pub(crate) fn get(&mut self, of: &str, name: &str) -> Value {
        self.order(&json!({ "get": [of, name] }))
    }

    /// Every request that it saw: method, path, body.
    pub(crate) fn requests(&mut self) -> Vec<[String; 3]> {
        serde_json::from_value(self.order(&json!({ "requests": true }))).unwrap()
    }

    /// A template 9000 on `pve1`, with a disk that can be cloned as linked, behind a firewall; a pool `daas` with a guest 9001.
    pub(crate) fn add_template(&mut self) -> Guest {
        let volume = json!({"base-9000-disk-0": {"content": "images", "format": "raw", "size": 2_u64 << 30, "vmid": 9000}});
        self.set(
            "pve",
            "storages",
            json!({"local-lvm": {
                "type": "lvmthin", "active": 1, "content": "images,rootdir", "files": [], "vgname": "pve",
                "thinpool": "data", "volumes": volume, "avail": 50_u64 << 30,
            }}),
        );
        let config = json!({
            "scsi0": "local-lvm:base-9000-disk-0,size=2G", "net0": "virtio=BC:24:11:00:00:99,bridge=vmbr2,firewall=1",
            "memory": 2048, "cores": 1, "agent": "enabled=1",
        });
        let nothing = Value::Null;
        self.call(
            "add_vm",
            json!([
                9000, "debian", "pve1", "stopped", nothing, config, nothing, true
            ]),
        );
        self.call(
            "add_vm",
            json!([
                9001, "other", "pve1", "stopped", nothing, nothing, nothing, false, nothing, "daas"
            ]),
        );
        self.set_firewall(None, "options", &json!({"enable": 1}));
        let drop = json!({"enable": 1, "policy_in": "DROP", "policy_out": "DROP"});
        self.set_firewall(Some(9000), "options", &drop);
        let person = json!([{"type": "in", "action": "ACCEPT", "enable": 1, "source": "192.0.2.0/24", "proto": "tcp",
                             "dport": "3389"}]);
        self.set_firewall(Some(9000), "rules", &person);
        // It makes up an answer to this one: that nothing can be cloned.
        self.call("fail", json!(["GET", "/9000/feature", 501, "not modelled"]));
        guest(9000)
    }

    /// A guest on `pve1` that runs.
    pub(crate) fn add_guest(&mut self, id: u32) -> Guest {
        self.call("add_vm", json!([id, "other", "pve1", "running"]));
        guest(id)
    }

    pub(crate) fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The authority that signed its certificate.
    pub(crate) fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address(),
            token: Token::new(TOKEN, SECRET.into()).unwrap(),
            trust: Trust::Authority(self.authority()),
            limits: Limits {
                connect: Duration::from_secs(5),
                call: Duration::from_secs(20),
            },
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.endpoint()).unwrap()
    }
}

impl Drop for FakePve {
    fn drop(&mut self) {
        // It would end with its orders, and with what it is at: that may take long.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What it said on its standard error.
fn words(folder: &tempfile::TempDir) -> String {
    std::fs::read_to_string(folder.path().join("stderr")).unwrap_or_default()
}

pub(crate) fn guest(id: u32) -> Guest {
    Guest {
        node: "pve1".parse().unwrap(),
        id: VmId::try_from(id).unwrap(),
    }
}

/// An authority, and a certificate for 127.0.0.1 that it signed: `ca.pem`, `node.pem`, `node.key`.
pub(crate) fn certificates(folder: &std::path::Path) -> [PathBuf; 2] {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let root = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let node = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    write("ca.pem", root.pem());
    [
        write("node.pem", node.pem()),
        write("node.key", key.serialize_pem()),
    ]
}
