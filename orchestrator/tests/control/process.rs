//! The program itself: killed at any moment, stopped in order, asked with a wrong configuration, searched for secrets.

use crate::house::{quick, until};
use mayfly_api::client::Client;
use mayfly_api::{CreateSession, SessionPhase};
use mayfly_orchestrator::secret::Secrets;
use secrecy::ExposeSecret;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_mayfly-orchestrator");

/// A running program; killed when dropped.
pub(crate) struct Service {
    pub(crate) child: Child,
    pub(crate) client: Client,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with a configuration; the port is free when asked for.
pub(crate) fn configured(dir: &Path) -> (PathBuf, String) {
    let machines = quick();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = listener.local_addr().unwrap().to_string();
    let config = dir.join("orchestrator.toml");
    let text = format!(
        "listen = {listen:?}\nstate_dir = {:?}\n[[template]]\nname = \"t\"\nprovider = \"simulated\"\n\
         [provider.simulated]\naddress_prefix = {:?}\nrdp_port = {}\ncreate_ms = 100\nboot_ms = 100\n\
         configure_ms = 100\ndestroy_ms = 100\nevidence_ms = 100\n",
        dir.join("state"),
        machines.address_prefix,
        machines.rdp_port
    );
    std::fs::write(&config, text).unwrap();
    (config, format!("http://{listen}"))
}

pub(crate) async fn serve(dir: &Path, config: &Path, url: &str) -> Service {
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--config"]).arg(config);
    served(&mut command, &dir.join("log"), url).await
}

/// The program, as that command starts it, once it answers.
pub(crate) async fn served(command: &mut Command, log: &Path, url: &str) -> Service {
    let log = File::options().create(true).append(true).open(log).unwrap();
    let child = command
        .env("MAYFLY_LOG", "trace")
        .env("MAYFLY_LIMITS__QUARANTINE_S", "0")
        .stderr(log)
        .spawn();
    let service = Service {
        child: child.unwrap(),
        client: Client::new(url).unwrap(),
    };
    let health = format!("{url}/healthz");
    until("it answers", async || {
        let answer = reqwest::get(&health).await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await;
    service
}

#[tokio::test]
async fn killed_at_any_moment_it_converges_and_leaves_no_secret_and_no_machine() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let mut created = Vec::new();
    for life in 0_u64..8 {
        let mut service = serve(dir.path(), &config, &url).await;
        let request = CreateSession::default();
        let key = format!("key-{life}");
        created.push(service.client.create(&request, &key).await.unwrap());
        tokio::time::sleep(Duration::from_millis(70 * life)).await;
        // SIGKILL: nothing is tidied up.
        service.child.kill().unwrap();
        service.child.wait().unwrap();
    }
    let service = serve(dir.path(), &config, &url).await;
    for created in &created {
        let get = async || {
            service
                .client
                .get(created.session.id, &created.secret)
                .await
                .unwrap()
        };
        let ready = until("ready", async || {
            let session = get().await;
            assert!(!session.phase.is_final(), "{session:?}");
            (session.phase == SessionPhase::Ready).then_some(session)
        });
        let ready = ready.await;
        let credentials = service.client.credentials(ready.id, &created.secret).await;
        credentials.unwrap();
        service
            .client
            .destroy(ready.id, &created.secret)
            .await
            .unwrap();
        until("ended", async || {
            (get().await.phase == SessionPhase::Ended).then_some(())
        })
        .await;
    }
    until("no machine is left", async || {
        let machines = std::fs::read_dir(dir.path().join("state/simulated")).unwrap();
        (machines.count() == 0).then_some(())
    })
    .await;
    drop(service);

    let secrets = Secrets::open(&dir.path().join("state/secret.key")).unwrap();
    let mut searched = vec![std::fs::read(dir.path().join("log")).unwrap()];
    for file in ["mayfly.db", "mayfly.db-wal"] {
        searched.extend(std::fs::read(dir.path().join("state").join(file)));
    }
    assert!(searched[0].len() > 10_000, "the log says something");
    for created in &created {
        let id = created.session.id;
        let id_text = id.to_string();
        let found = |text: &str| {
            searched
                .iter()
                .any(|bytes| bytes.windows(text.len()).any(|w| w == text.as_bytes()))
        };
        assert!(found(&id_text), "the search can find something");
        for secret in [
            secrets.session_secret(id),
            secrets.agent_token(id),
            secrets.password(id),
        ] {
            assert!(
                !found(secret.expose_secret()),
                "a secret of {id} was written down"
            );
        }
    }
    assert!(
        !searched.iter().any(|b| b.windows(5).any(|w| w == b"key-3")),
        "an idempotency key was written down"
    );
}

#[tokio::test]
async fn a_signal_ends_it_in_order_and_a_second_one_is_refused_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let mut service = serve(dir.path(), &config, &url).await;
    let second = run(&["serve", "--config"], &config);
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("another orchestrator"), "{said}");

    let pid = nix::unistd::Pid::from_raw(service.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let ended = until("it ends", async || service.child.try_wait().unwrap()).await;
    assert!(ended.success());
    let again = run(&["migrate", "--config"], &config);
    assert!(again.status.success());
    let said = String::from_utf8_lossy(&again.stdout).into_owned();
    let (_, versions) = said.trim().rsplit_once("from ").unwrap();
    let (from, to) = versions.split_once(" to ").unwrap();
    assert!(from == to && from.parse::<u32>().is_ok(), "{said}");
}

pub(crate) fn run(arguments: &[&str], config: &Path) -> Output {
    Command::new(PROGRAM)
        .args(arguments)
        .arg(config)
        .output()
        .unwrap()
}

#[tokio::test]
async fn what_a_failed_desktop_left_is_read_while_the_service_runs_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let (config, url) = configured(dir.path());
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "fault = \"agent_fails\"\nfault_count = 1\n").unwrap();
    let read = |whose: &str| {
        let read = run(&["logs", whose, "--config"], &config);
        let shown = String::from_utf8(read.stdout).unwrap();
        let said = String::from_utf8(read.stderr).unwrap();
        (read.status.success(), shown, said)
    };
    let (success, _, said) = read("desktop-0000001");
    assert!(!success && said.contains("mayfly.db"), "{said}");

    let service = serve(dir.path(), &config, &url).await;
    let mut sessions = Vec::new();
    for (key, phase) in [("a", SessionPhase::Failed), ("b", SessionPhase::Ready)] {
        let request = CreateSession::default();
        let created = service.client.create(&request, key).await.unwrap();
        let reached = until("it is made or not", async || {
            let get = service.client.get(created.session.id, &created.secret);
            let session = get.await.unwrap();
            (session.phase == phase).then_some(session)
        });
        sessions.push(reached.await);
    }
    let id = sessions[0].id.to_string();
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(
        log.contains(&format!("mayfly-orchestrator logs {id}")),
        "{log}"
    );

    let (success, shown, said) = read(&id);
    assert!(success, "{said}");
    let desktop = sessions[0].desktop.unwrap().to_string();
    for part in [
        &*format!(
            "session {id} of user, template t\nfailed in the stage Configuring: {desktop} could not take"
        ),
        "the simulated disk is read-only\n",
        "==== console ====\n",
    ] {
        assert!(shown.contains(part), "{part:?} in {shown}");
    }
    let password = Secrets::open(&dir.path().join("state/secret.key"))
        .unwrap()
        .password(sessions[0].id);
    assert!(!shown.contains(password.expose_secret()), "{shown}");
    let (success, _, said) = read(&sessions[1].id.to_string());
    assert!(!success && said.contains("nothing is kept"), "{said}");
    let (success, _, said) = read("desktop-1");
    assert!(!success && said.contains("name of a desktop"), "{said}");

    drop(service);
    assert_eq!(read(&desktop), (true, shown, String::new()));
}

#[test]
fn the_doctor_says_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (config, _) = configured(dir.path());
    let healthy = run(&["doctor", "--json", "--config"], &config);
    assert!(healthy.status.success());
    let checks: serde_json::Value = serde_json::from_slice(&healthy.stdout).unwrap();
    assert_eq!(checks[0]["status"], "ok", "{checks}");

    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "fault = \"unavailable\"\n").unwrap();
    let ill = run(&["doctor", "--config"], &config);
    assert_eq!(ill.status.code(), Some(1));
    let said = String::from_utf8_lossy(&ill.stdout).into_owned();
    assert!(
        said.contains("ERROR") && said.contains("remove provider.simulated.fault"),
        "{said}"
    );

    std::fs::write(&config, "listen = \"0.0.0.0:5000\"\n").unwrap();
    let refused = run(&["serve", "--config"], &config);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(
        said.contains("no login") && said.contains("listen"),
        "{said}"
    );
}
