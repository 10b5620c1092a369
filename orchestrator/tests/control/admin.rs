//! What an administrator of this machine does to the running program: start and stop it as systemd does, drain it, resolve what is
//! stuck.

use crate::house::until;
use crate::process::{PROGRAM, Service, configured, run, serve};
use mayfly_api::client::Client;
use mayfly_api::{CreateSession, Created, ProblemCode, SessionPhase};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

async fn create(service: &Service, key: &str) -> Created {
    let request = CreateSession::default();
    service.client.create(&request, key).await.unwrap()
}

async fn reaches(service: &Service, created: &Created, phase: SessionPhase) {
    until(&format!("{phase:?}"), async || {
        let get = service.client.get(created.session.id, &created.secret);
        (get.await.unwrap().phase == phase).then_some(())
    })
    .await;
}

/// What that command prints; it succeeds.
fn prints(arguments: &[&str], config: &Path) -> String {
    let ran = run(&[arguments, &["--config"]].concat(), config);
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{arguments:?}: {said}");
    String::from_utf8(ran.stdout).unwrap()
}

/// What that command says; it fails.
fn refuses(arguments: &[&str], config: &Path) -> String {
    let ran = run(&[arguments, &["--config"]].concat(), config);
    assert!(!ran.status.success(), "{arguments:?} succeeds");
    String::from_utf8(ran.stderr).unwrap()
}

#[tokio::test]
async fn systemd_is_told_that_it_is_ready_alive_and_stopping() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let notify = dir.path().join("notify");
    let systemd = UnixDatagram::bind(&notify).unwrap();
    systemd
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let heard = || {
        let mut words = [0; 256];
        let length = systemd.recv(&mut words).expect("it says something in time");
        String::from_utf8(words[..length].to_vec()).unwrap()
    };
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let child = Command::new(PROGRAM)
        .args(["serve", "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "400000")
        .stderr(log)
        .spawn()
        .unwrap();
    let mut service = Service {
        child,
        client: Client::new(&url).unwrap(),
    };
    assert_eq!(heard().trim(), "READY=1");
    let health = reqwest::get(format!("{url}/readyz")).await.unwrap();
    assert_eq!(health.status(), 200, "ready means ready");
    for _ in 0..3 {
        assert_eq!(heard().trim(), "WATCHDOG=1");
    }
    let pid = Pid::from_raw(service.child.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let last = std::iter::repeat_with(heard).find(|word| word.trim() != "WATCHDOG=1");
    assert_eq!(last.unwrap().trim(), "STOPPING=1");
    let ended = until("it ends", async || service.child.try_wait().unwrap()).await;
    assert!(ended.success());
}

#[tokio::test]
async fn while_it_drains_those_who_wait_are_told_and_those_who_have_a_desktop_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}[limits]\nmax_desktops = 1\n")).unwrap();
    let not_there = refuses(&["drain"], &config);
    assert!(not_there.contains("does not run"), "{not_there}");

    let service = serve(dir.path(), &config, &url).await;
    let has = create(&service, "has").await;
    reaches(&service, &has, SessionPhase::Ready).await;
    let waits = create(&service, "waits").await;
    let said = prints(&["drain"], &config);
    assert!(said.contains(&has.session.id.to_string()), "{said}");
    reaches(&service, &waits, SessionPhase::Failed).await;
    let told = service.client.get(waits.session.id, &waits.secret).await;
    let failure = told.unwrap().failure.unwrap();
    assert_eq!(failure.problem.code, ProblemCode::Draining);

    let refused = reqwest::Client::new()
        .post(format!("{url}/api/v1/sessions"))
        .json(&CreateSession::default())
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["retry-after"], "60");
    let refused = reqwest::get(format!("{url}/readyz")).await.unwrap();
    assert_eq!(refused.status(), 503);
    reaches(&service, &has, SessionPhase::Ready).await;

    // It goes on draining in another process, until it is told to stop that.
    drop(service);
    let service = serve(dir.path(), &config, &url).await;
    let request = CreateSession::default();
    let refused = service.client.create(&request, "later").await.unwrap_err();
    assert_eq!(refused.code(), Some(ProblemCode::Draining));
    let said = prints(&["drain", "--end", "--wait"], &config);
    assert!(said.trim_end().ends_with("no session is left"), "{said}");
    reaches(&service, &has, SessionPhase::Ended).await;
    prints(&["drain", "--off"], &config);
    let again = create(&service, "again").await;
    reaches(&service, &again, SessionPhase::Ready).await;
    let end = service.client.destroy(again.session.id, &again.secret);
    end.await.unwrap();
    reaches(&service, &again, SessionPhase::Ended).await;
}

#[test]
fn nobody_but_the_owner_of_the_state_reaches_the_administrators_socket() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (config, url) = configured(dir.path());
    let service = runtime.block_on(serve(dir.path(), &config, &url));
    let mode = |file: &str| {
        let metadata = std::fs::metadata(dir.path().join(file)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("state"), 0o700);
    assert_eq!(mode("state/admin.sock"), 0o600);
    let over_tcp = runtime.block_on(async {
        let put = reqwest::Client::new().put(format!("{url}/drain"));
        put.json(&serde_json::json!({"rest": "end"})).send().await
    });
    assert_eq!(over_tcp.unwrap().status(), 404);
    drop(service);
}

#[tokio::test]
async fn what_nobody_owns_is_looked_for_at_once_and_told_in_words_and_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let refused = refuses(&["reap"], &config);
    assert!(refused.contains("does not run"), "{refused}");
    let service = serve(dir.path(), &config, &url).await;
    let orphan = "desktop-0000001";
    let file = dir.path().join(format!("state/simulated/{orphan}.json"));
    std::fs::write(&file, "{}").unwrap();
    until("it is removed", async || {
        let reports: serde_json::Value =
            serde_json::from_str(&prints(&["reap", "--json"], &config)).unwrap();
        assert_eq!(reports[0]["provider"], "simulated", "{reports}");
        (!file.exists()).then_some(())
    })
    .await;
    let said = prints(&["reap"], &config);
    assert_eq!(said, "simulated: 0 shown\n");
    let said = prints(&["list", "--strays"], &config);
    assert!(said.starts_with(&format!("{orphan}  removed ")), "{said}");
    assert_eq!(prints(&["list"], &config), "");
    let refused = refuses(&["keep", orphan], &config);
    assert!(
        refused.contains("none of those that nobody owns"),
        "{refused}"
    );
    drop(service);
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    for event in ["reaper.found", "reaper.quarantined", "reaper.removed"] {
        let line = format!("event=\"{event}\" desktop={orphan}");
        assert!(log.contains(&line), "{event}: {log}");
    }
}
