//! What becomes of the database's disk: killed while it writes, full, read-only, damaged. Never is a session lost that was acknowledged.

use crate::house::until;
use crate::process::{PROGRAM, Service, configured, run, serve, served};
use futures_util::future::join_all;
use mayfly_api::Created;
use mayfly_api::{CreateSession, SessionId};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Many may wait, and few are made.
fn of_many(dir: &Path) -> (std::path::PathBuf, String) {
    let (config, url) = configured(dir);
    let text = std::fs::read_to_string(&config).unwrap();
    let limits = "[limits]\nmax_queued = 100000\nmax_desktops = 1\n";
    std::fs::write(&config, format!("{text}{limits}")).unwrap();
    (config, url)
}

/// Asks for sessions, many at once, until one is refused or the service is gone; those that were acknowledged, counted in `so_far`.
async fn ask(service: &Service, most: usize, so_far: &AtomicUsize) -> Vec<Created> {
    static KEYS: AtomicUsize = AtomicUsize::new(0);
    let asked = (0..16).map(async |_| {
        let mut acknowledged = Vec::new();
        while acknowledged.len() < most {
            let key = KEYS.fetch_add(1, Ordering::Relaxed).to_string();
            let created = service.client.create(&CreateSession::default(), &key).await;
            let Ok(created) = created else { break };
            acknowledged.push(created);
            so_far.fetch_add(1, Ordering::Relaxed);
        }
        acknowledged
    });
    join_all(asked).await.into_iter().flatten().collect()
}

async fn all_are_there(service: &Service, acknowledged: &[Created]) {
    let ids: BTreeSet<SessionId> = acknowledged.iter().map(|c| c.session.id).collect();
    assert_eq!(ids.len(), acknowledged.len());
    for created in acknowledged {
        let found = service
            .client
            .get(created.session.id, &created.secret)
            .await;
        found.unwrap_or_else(|e| panic!("{} was lost: {e}", created.session.id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_writes_it_has_everything_that_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = of_many(dir.path());
    let mut acknowledged = Vec::new();
    for life in 0..4 {
        let mut service = serve(dir.path(), &config, &url).await;
        all_are_there(&service, &acknowledged).await;
        let pid = nix::unistd::Pid::from_raw(service.child.id().try_into().unwrap());
        let so_far = AtomicUsize::new(0);
        let kill = async {
            // Somewhere in the midst: others are on their way.
            until("it writes", async || {
                (so_far.load(Ordering::Relaxed) > 20 + life * 13).then_some(())
            })
            .await;
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        };
        let (created, ()) = tokio::join!(ask(&service, usize::MAX, &so_far), kill);
        acknowledged.extend(created);
        service.child.wait().unwrap();
    }
    let service = serve(dir.path(), &config, &url).await;
    all_are_there(&service, &acknowledged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_it_refuses_and_has_everything_that_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = of_many(dir.path());
    // No file grows above this, in blocks of 512 bytes.
    let script = "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, PROGRAM, "serve", "--config"]);
    let service = served(command.arg(&config), Path::new("/dev/null"), &url).await;
    let mut acknowledged = ask(&service, 1_000, &AtomicUsize::new(0)).await;
    assert!(acknowledged.len() < 16_000, "it was never full");
    assert!(!acknowledged.is_empty());
    // Its log was full; the database may have room for some of what is in there.
    let mut more = 0;
    let refused = loop {
        let key = format!("more-{more}");
        match service.client.create(&CreateSession::default(), &key).await {
            Ok(created) => acknowledged.push(created),
            Err(refused) => break refused.to_string(),
        }
        more += 1;
    };
    assert!(refused.contains("database"), "{refused}");
    all_are_there(&service, &acknowledged).await;
    drop(service);

    let service = serve(dir.path(), &config, &url).await;
    all_are_there(&service, &acknowledged).await;
    let more = service
        .client
        .create(&CreateSession::default(), "more")
        .await;
    more.unwrap();
}

#[test]
fn on_a_read_only_disk_it_does_not_start_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (config, _) = configured(dir.path());
    assert!(run(&["migrate", "--config"], &config).status.success());
    let state = dir.path().join("state");
    let script = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    let tried = Command::new("unshare")
        .args(if nix::unistd::geteuid().is_root() {
            ["--mount", "--"].as_slice()
        } else {
            &["--mount", "--map-root-user", "--"]
        })
        .args(["sh", "-c", script])
        .arg(&state)
        .args([PROGRAM, "serve", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&tried.stderr);
    assert!(!tried.status.success());
    for part in ["state folder", "set state_dir", "Read-only file system"] {
        assert!(said.contains(part), "{part:?} in {said}");
    }
}

#[test]
fn a_damaged_database_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (config, _) = configured(dir.path());
    assert!(run(&["migrate", "--config"], &config).status.success());
    let path = dir.path().join("state/mayfly.db");
    let sound = std::fs::read(&path).unwrap();
    let pages = sound.len() / 4_096;
    assert!(pages > 8, "it has {pages} pages");
    for page in 0..pages {
        let mut damaged = sound.clone();
        damaged[page * 4_096..(page + 1) * 4_096].fill(0xa5);
        std::fs::write(&path, &damaged).unwrap();
        let command = if page < 4 { "serve" } else { "migrate" };
        let refused = run(&[command, "--config"], &config);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success(), "page {page}");
        for part in ["mayfly.db", "damaged", "put a backup in its place"] {
            assert!(said.contains(part), "page {page}: {part:?} in {said}");
        }
        let left = std::fs::read(&path).unwrap();
        assert!(left == damaged, "page {page}: it is left as it was");
    }
    std::fs::write(&path, &sound).unwrap();
    assert!(run(&["migrate", "--config"], &config).status.success());
}

#[tokio::test]
async fn a_backup_is_made_while_it_runs_and_is_for_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let service = serve(dir.path(), &config, &url).await;
    let created = service.client.create(&CreateSession::default(), "a").await;
    let created = created.unwrap();
    let copy = dir.path().join("copy.db");
    let back_up = || {
        let mut command = Command::new(PROGRAM);
        command
            .arg("backup")
            .arg(&copy)
            .arg("--config")
            .arg(&config);
        command.output().unwrap()
    };
    let done = back_up();
    assert!(done.status.success(), "{done:?}");
    let again = back_up();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        !again.status.success() && said.contains("copy.db"),
        "{said}"
    );
    let mode = std::os::unix::fs::PermissionsExt::mode(&copy.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    drop(service);

    let state = dir.path().join("state");
    for file in ["mayfly.db", "mayfly.db-wal", "mayfly.db-shm"] {
        let _ = std::fs::remove_file(state.join(file));
    }
    std::fs::rename(&copy, state.join("mayfly.db")).unwrap();
    let service = serve(dir.path(), &config, &url).await;
    all_are_there(&service, &[created]).await;
}
