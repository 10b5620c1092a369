//! A real PostgreSQL of the tests' own, on a Unix socket in a folder of its own.
//!
//! # Guarantees
//! * One for each test program, whichever tests it has. Server and folder end with the program, however that ends: a shell holds the other end of a pipe.
//! * The server runs as an ordinary user: as `postgres` if the tests run as root.

#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "tests are all that uses it: they fail where it does"
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

/// Starts the server when its standard input says nothing, ends it and removes its folder when that ends.
const GUARD: &str = r#"
trap '' HUP INT TERM
folder=$1; shift
"$@" >"$folder/log" 2>&1 &
read -r _
kill -QUIT $!
wait $!
rm -rf "$folder"
"#;

/// A server; see the crate.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    /// Its standard input is open as long as this program runs.
    _guard: Child,
}

impl Cluster {
    /// The one of this program, running. It flushes nothing: a power cut is none of the tests'.
    pub fn get() -> &'static Self {
        static CLUSTER: OnceLock<Cluster> = OnceLock::new();
        CLUSTER.get_or_init(|| Self::start(&["fsync=off", "shared_buffers=16MB"]))
    }

    /// Another one, with these settings; until this program ends.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
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
        for setting in ["listen_addresses=", "max_connections=300"]
            .iter()
            .chain(settings)
        {
            guard.args(["-c", setting]);
        }
        let cluster = Self {
            _guard: guard.stdin(Stdio::piped()).spawn().unwrap(),
            folder,
        };
        let end = Instant::now() + PATIENCE;
        loop {
            let mut ready = Command::new(programs.join("pg_isready"));
            ready.arg("-q").arg("-h").arg(&cluster.folder);
            if ready.status().unwrap().success() {
                return cluster;
            }
            let log = std::fs::read_to_string(cluster.folder.join("log"));
            assert!(Instant::now() < end, "PostgreSQL did not start: {log:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs one of PostgreSQL's programs on a database: its last argument is where that is. What it wrote.
    #[must_use]
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
    #[must_use]
    pub fn url(&self, database: &PgConnectOptions) -> String {
        let (folder, name) = (self.folder.display(), database.get_database());
        format!("postgres:///{}?host={folder}&user={USER}", name.unwrap())
    }

    /// The password of everybody.
    #[must_use]
    pub fn password(&self) -> &'static str {
        PASSWORD
    }

    /// How to reach a database of this cluster.
    #[must_use]
    pub fn options(&self, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.folder)
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
