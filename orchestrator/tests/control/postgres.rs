//! The program on PostgreSQL: the same life of a session, across a kill, and what an administrator reads of it.

use crate::house::until;
use crate::process::{Service, configured, run, serve};
use mayfly_api::{CreateSession, Created, Session, SessionPhase};
use mayfly_orchestrator::secret::Secrets;
use mayfly_postgres::Cluster;
use secrecy::ExposeSecret;
use std::os::unix::fs::PermissionsExt;

async fn reaches(service: &Service, created: &Created, phase: SessionPhase) -> Session {
    until(&format!("{phase:?}"), async || {
        let session = service
            .client
            .get(created.session.id, &created.secret)
            .await;
        let session = session.unwrap();
        (session.phase == phase).then_some(session)
    })
    .await
}

#[tokio::test]
async fn killed_while_a_desktop_is_in_use_it_goes_on_with_it_and_leaves_no_secret() {
    let cluster = Cluster::get();
    let database = cluster.database().await;
    let dir = tempfile::tempdir().unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, cluster.password()).unwrap();
    std::fs::set_permissions(&password, PermissionsExt::from_mode(0o600)).unwrap();
    let (config, url) = configured(dir.path());
    let text = std::fs::read_to_string(&config).unwrap();
    let store = cluster.url(&database);
    let store = format!("[store]\nurl = {store:?}\npassword_file = {password:?}\n");
    std::fs::write(&config, text + &store).unwrap();
    for command in ["serve", "doctor"] {
        let early = run(&[command, "--config"], &config);
        let said = String::from_utf8([early.stdout, early.stderr].concat()).unwrap();
        assert!(!early.status.success(), "{command}");
        assert!(said.contains("run: mayfly-orchestrator migrate"), "{said}");
    }
    for command in ["migrate", "doctor"] {
        let done = run(&[command, "--config"], &config);
        assert!(done.status.success(), "{done:?}");
    }

    let mut service = serve(dir.path(), &config, &url).await;
    let created = service.client.create(&CreateSession::default(), "a").await;
    let created = created.unwrap();
    let ready = reaches(&service, &created, SessionPhase::Ready).await;
    service.child.kill().unwrap();
    service.child.wait().unwrap();
    let service = serve(dir.path(), &config, &url).await;
    let again = reaches(&service, &created, SessionPhase::Ready).await;
    assert_eq!((again.desktop, again.rdp), (ready.desktop, ready.rdp));
    let (id, secret) = (created.session.id, &created.secret);
    let health = reqwest::get(format!("{url}/readyz")).await.unwrap();
    assert_eq!(health.status(), 200);
    let prints = |arguments: &[&str]| {
        let ran = run(&[arguments, &["--config"]].concat(), &config);
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    };
    assert!(prints(&["list"]).contains(&id.to_string()));
    assert!(prints(&["drain"]).contains(&id.to_string()));
    prints(&["drain", "--off"]);
    service.client.destroy(id, secret).await.unwrap();
    reaches(&service, &created, SessionPhase::Ended).await;
    let receipt = prints(&["receipt", &id.to_string()]);
    assert!(receipt.contains("no machine: "), "{receipt}");
    assert_eq!(prints(&["list"]), "");
    drop(service);

    let dump = cluster.run("pg_dump", &["--data-only", "--dbname"], &database);
    let dump = String::from_utf8(dump).unwrap();
    assert!(
        dump.contains(&id.to_string()),
        "the search can find something"
    );
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    let secrets = Secrets::open(&dir.path().join("state/secret.key")).unwrap();
    for secret in [
        secrets.session_secret(id).expose_secret(),
        secrets.agent_token(id).expose_secret(),
        secrets.password(id).expose_secret(),
        cluster.password(),
    ] {
        assert!(!dump.contains(secret) && !log.contains(secret));
    }
}
