//! A real PostgreSQL of the tests' own, on a Unix socket in a folder of its own.
//!
//! # Guarantees
//! * Server and folder end with the program that started it, however that ends: a shell holds the other end of a pipe.
//! * The server runs as an ordinary user: as `postgres` if the tests run as root.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "all of this crate is for tests, which end where something is not as it must be"
)]

use nix::unistd::{User, geteuid};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::io::{Seek, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Starting it takes a second; a busy machine gets this long.
const PATIENCE: Duration = Duration::from_secs(120);
const USER: &str = "mayfly";
const PASSWORD: &str = "correct-horse";

/// Starts the server, and again after each signal that its standard input names; ends it and removes its folder when that ends.
const GUARD: &str = r#"
trap '' HUP INT TERM
folder=$1; shift
"$@" >"$folder/log" 2>&1 &
while read -r signal; do
    kill -"$signal" $!
    wait $!
    "$@" >>"$folder/log" 2>&1 &
done
kill -QUIT $!
wait $!
rm -rf "$folder"
"#;

/// How a server is stopped (postgres(1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Connections are ended, and everything is written.
    Fast,
    /// As in a crash: the next start recovers.
    Immediate,
}

/// See the module.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    port: u16,
    /// Its standard input is open as long as this is.
    guard: Child,
}

impl Drop for Cluster {
    /// Ends the server, and waits until its folder is gone.
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

impl Cluster {
    /// The one of this program, running. It flushes nothing: a power cut is none of the tests'.
    pub fn get() -> &'static Self {
        static CLUSTER: OnceLock<Cluster> = OnceLock::new();
        CLUSTER.get_or_init(|| Self::start(None))
    }

    /// A new one, running; it listens on this port of 127.0.0.1 as well.
    #[must_use]
    pub fn start(port: Option<u16>) -> Self {
        Self::with(port, &["fsync=off", "shared_buffers=16MB"])
    }

    /// A new one that flushes, as a site's does: for a benchmark.
    #[must_use]
    pub fn durable() -> Self {
        Self::with(None, &["shared_buffers=128MB"])
    }

    fn with(port: Option<u16>, settings: &[&str]) -> Self {
        let programs = programs();
        let folder = tempfile::Builder::new().prefix("pg-").tempdir().unwrap();
        let folder = folder.keep();
        let (data, password) = (folder.join("data"), folder.join("password"));
        std::fs::write(&password, PASSWORD).unwrap();
        let mut initdb = Command::new(programs.join("initdb"));
        let mut guard = Command::new("sh");
        guard.args(["-c", GUARD, "guard"]).arg(&folder);
        if geteuid().is_root() {
            // PostgreSQL refuses to run as root.
            let user = User::from_name("postgres").unwrap();
            let user = user.expect("the package postgresql makes the user postgres");
            for path in [&folder, &password] {
                chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
            }
            initdb.uid(user.uid.as_raw()).gid(user.gid.as_raw());
            guard.args([
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
            ]);
        }
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
        initdb.current_dir("/").arg("--pgdata").arg(&data);
        initdb.args([
            "--username",
            USER,
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        initdb
            .arg("--auth=scram-sha-256")
            .arg("--pwfile")
            .arg(&password);
        let made = initdb.output().unwrap();
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(
            made.status.success(),
            "initdb in {}: {said}",
            folder.display()
        );

        guard.arg(programs.join("postgres")).arg("-D").arg(&data);
        guard.arg("-k").arg(&folder);
        if let Some(port) = port {
            guard.args(["-h", "127.0.0.1", "-p", &port.to_string()]);
        } else {
            guard.args(["-h", ""]);
        }
        for setting in settings.iter().chain(&["max_connections=300"]) {
            guard.args(["-c", setting]);
        }
        let cluster = Self {
            guard: guard.stdin(Stdio::piped()).spawn().unwrap(),
            folder,
            port: port.unwrap_or(5432),
        };
        cluster.wait();
        cluster
    }

    /// Waits until it answers.
    fn wait(&self) {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut ready = Command::new(programs().join("pg_isready"));
            ready.args(["-q", "-p", &self.port.to_string(), "-h"]);
            if ready.arg(&self.folder).status().unwrap().success() {
                return;
            }
            let log = std::fs::read_to_string(self.folder.join("log"));
            assert!(Instant::now() < end, "PostgreSQL did not start: {log:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the server, whoever is connected, and starts it again.
    pub fn restart(&self, stop: Stop) {
        let signal = match stop {
            Stop::Fast => "INT",
            Stop::Immediate => "QUIT",
        };
        let running = || std::fs::read_to_string(self.folder.join("data/postmaster.pid"));
        let before = running().unwrap();
        writeln!(self.guard.stdin.as_ref().unwrap(), "{signal}").unwrap();
        let end = Instant::now() + PATIENCE;
        while running().is_ok_and(|pid| pid == before) {
            assert!(Instant::now() < end, "PostgreSQL did not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.wait();
    }

    /// Runs one of PostgreSQL's programs on a database: its last argument is where that is. What it wrote.
    pub fn run(&self, program: &str, args: &[&str], on: &PgConnectOptions) -> Vec<u8> {
        self.feed(program, args, on, &[])
    }

    /// The same, with something to read.
    pub fn feed(
        &self,
        program: &str,
        args: &[&str],
        on: &PgConnectOptions,
        read: &[u8],
    ) -> Vec<u8> {
        let mut input = tempfile::tempfile().unwrap();
        input.write_all(read).unwrap();
        input.rewind().unwrap();
        let mut command = Command::new(programs().join(program));
        command.args(args).arg(self.url(on)).stdin(input);
        let done = command.env("PGPASSWORD", PASSWORD).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{program}: {said}");
        done.stdout
    }

    /// The URL of a database, without its password.
    pub fn url(&self, database: &PgConnectOptions) -> String {
        let (folder, name) = (self.folder.display(), database.get_database());
        let port = self.port;
        format!(
            "postgres:///{}?host={folder}&port={port}&user={USER}",
            name.unwrap()
        )
    }

    /// The password of everybody.
    pub fn password(&self) -> &'static str {
        PASSWORD
    }

    /// How to reach a database of this cluster.
    pub fn options(&self, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.folder)
            .port(self.port)
            .username(USER)
            .password(PASSWORD)
            .database(database)
    }

    /// A new, empty database.
    pub async fn database(&self) -> PgConnectOptions {
        static DATABASES: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let options = self.options("postgres");
        let mut db = PgConnection::connect_with(&options).await.unwrap();
        let create = AssertSqlSafe(format!("CREATE DATABASE {name}"));
        db.execute(create).await.unwrap();
        db.close().await.unwrap();
        self.options(&name)
    }
}

/// Where PostgreSQL's programs are: Debian has those of each version in a folder of its own.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let mut folders: Vec<_> = versions.flatten().map(|v| v.path().join("bin")).collect();
    folders.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.splice(0..0, std::env::split_paths(&path));
    let has_all =
        |folder: &&PathBuf| folder.join("initdb").exists() && folder.join("postgres").exists();
    let found: Option<&PathBuf> = folders.iter().rfind(has_all);
    let found = found.map(|f| Path::new(f).to_owned());
    found.expect(
        "there is no PostgreSQL: install the package postgresql, as `cargo xtask test` does",
    )
}
