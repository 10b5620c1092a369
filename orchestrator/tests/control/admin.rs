//! What an administrator of this machine does to the running program: start and stop it as systemd does.

use crate::house::until;
use crate::process::{PROGRAM, Service, configured};
use mayfly_api::client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

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
