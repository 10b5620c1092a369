//! Several of the program on one PostgreSQL: any answers for all, and what one leaves another takes up.

use crate::house::until;
use crate::process::{Service, configured, run, serve};
use futures_util::StreamExt;
use mayfly_api::{CreateSession, Created, EndReason, ProblemCode, Session, SessionPhase};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::replica;
use mayfly_orchestrator::session::{Expected, Origin, Record, Wish};
use mayfly_orchestrator::store::Store;
use mayfly_orchestrator::store::postgres::PostgresStore;
use mayfly_postgres::Cluster;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{Connection, Executor};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use tempfile::TempDir;

struct Place {
    dir: TempDir,
    config: PathBuf,
    url: String,
}

impl Place {
    /// With these lines in `[limits]`, and its machines in its own folder.
    async fn new(store: &str, limits: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (config, url) = configured(dir.path());
        let text = std::fs::read_to_string(&config).unwrap();
        let text = format!("{text}[limits]\n{limits}\n{store}");
        std::fs::write(&config, text).unwrap();
        Self { dir, config, url }
    }

    async fn serve(&self) -> Service {
        serve(self.dir.path(), &self.config, &self.url).await
    }

    fn state(&self, name: &str) -> PathBuf {
        self.dir.path().join("state").join(name)
    }

    /// As an administrator does it for another.
    fn gets_the_key_of(&self, other: &Self) {
        std::fs::create_dir_all(self.dir.path().join("state")).unwrap();
        std::fs::copy(other.state("secret.key"), self.state("secret.key")).unwrap();
    }

    fn machines(&self) -> usize {
        let files = std::fs::read_dir(self.state("simulated"));
        files.map_or(0, Iterator::count)
    }
}

async fn database(dir: &TempDir) -> (String, PgConnectOptions) {
    let cluster = Cluster::get();
    let database = cluster.database().await;
    let schema = PostgresStore::migrate(&database).await;
    schema.unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, cluster.password()).unwrap();
    std::fs::set_permissions(&password, PermissionsExt::from_mode(0o600)).unwrap();
    let url = cluster.url(&database);
    let store = format!("[store]\nurl = {url:?}\npassword_file = {password:?}\n");
    (store, database)
}

async fn create(service: &Service) -> Created {
    let key = mayfly_api::SessionId::new().to_string();
    let request = CreateSession::default();
    service.client.create(&request, &key).await.unwrap()
}

async fn reaches(service: &Service, created: &Created, phase: SessionPhase) -> Session {
    until(&format!("{phase:?}"), async || {
        let get = service.client.get(created.session.id, &created.secret);
        let session = get.await.unwrap();
        (session.phase == phase).then_some(session)
    })
    .await
}

async fn stop(service: &mut Service) {
    let pid = Pid::from_raw(service.child.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let ended = until("it ends", async || service.child.try_wait().unwrap());
    assert!(ended.await.success());
}

#[tokio::test]
async fn any_of_them_answers_for_all_and_what_one_that_stops_leaves_another_takes_up() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = database(&dir).await;
    let limits = "max_desktops = 1";
    let (a, b) = (
        Place::new(&store, limits).await,
        Place::new(&store, limits).await,
    );
    let mut one = a.serve().await;
    let stranger = run(&["serve", "--config"], &b.config);
    let said = String::from_utf8_lossy(&stranger.stderr).into_owned();
    assert!(!stranger.status.success());
    assert!(
        said.contains("another key") && said.contains("secret.key"),
        "{said}"
    );
    b.gets_the_key_of(&a);
    let mut two = b.serve().await;

    let used = create(&one).await;
    let ready = reaches(&two, &used, SessionPhase::Ready).await;
    let waits = create(&one).await;
    let session = reaches(&two, &waits, SessionPhase::Queued).await;
    assert_eq!(session.queue_position, Some(1));
    // Told by the one, heard from the other.
    let mut events = two.client.events(waits.session.id, &waits.secret);
    let first = events.next().await.unwrap().unwrap();
    assert_eq!(first.session.phase, SessionPhase::Queued);

    let doctor = run(&["doctor", "--config"], &b.config);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    for place in [&a, &b] {
        let state = place.dir.path().join("state").display().to_string();
        assert!(said.contains(&state), "{said}");
    }

    // A draining one takes nothing, and ends nobody that another can serve.
    assert!(run(&["drain", "--config"], &a.config).status.success());
    let refused = one.client.create(&CreateSession::default(), "k").await;
    assert!(refused.is_err());
    stop(&mut one).await;
    let still = reaches(&two, &used, SessionPhase::Ready).await;
    assert_eq!((still.desktop, a.machines()), (ready.desktop, 1));
    reaches(&two, &waits, SessionPhase::Queued).await;

    // Only its host reaches the desktop: what was asked for meanwhile is done when that is back.
    let destroy = two.client.destroy(used.session.id, &used.secret);
    destroy.await.unwrap();
    assert_eq!(a.machines(), 1);
    let _one = a.serve().await;
    reaches(&two, &used, SessionPhase::Ended).await;
    assert_eq!(a.machines(), 0);
    let ready = reaches(&two, &waits, SessionPhase::Ready).await;
    assert_eq!(b.machines(), 1, "the other drains");
    let (mut seen, mut phases) = (first.seq, Vec::new());
    while phases.last() != Some(&SessionPhase::Ready) {
        let event = events.next().await.unwrap().unwrap();
        assert_eq!(event.seq, seen + 1, "none is missed");
        seen = event.seq;
        phases.push(event.session.phase);
    }
    // It does not wait for what is the other's. When that drains as well, nobody is left who would give a place.
    let last = create(&two).await;
    reaches(&two, &last, SessionPhase::Queued).await;
    let drained = run(&["drain", "--wait", "--config"], &a.config);
    let said = String::from_utf8(drained.stdout).unwrap();
    assert!(said.contains("no session is left"), "{said}");
    reaches(&two, &last, SessionPhase::Queued).await;
    // That one is restarted: nobody is sent away for that.
    stop(&mut two).await;
    assert!(run(&["drain", "--config"], &a.config).status.success());
    let two = b.serve().await;
    reaches(&two, &last, SessionPhase::Queued).await;
    assert!(run(&["drain", "--config"], &b.config).status.success());
    let told = reaches(&two, &last, SessionPhase::Failed).await;
    let code = told.failure.unwrap().problem.code;
    assert_eq!(code, ProblemCode::Draining);
    let doctor = run(&["doctor", "--config"], &b.config);
    let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert_eq!(said.matches("which drains").count(), 2, "{said}");

    let destroy = two.client.destroy(ready.id, &waits.secret);
    destroy.await.unwrap();
    reaches(&two, &waits, SessionPhase::Ended).await;
    assert_eq!(b.machines(), 0);
}

#[tokio::test]
async fn a_machine_that_is_lost_makes_its_desktop_stuck_until_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = database(&dir).await;
    let limits = "host_lost_s = 1";
    let (a, b) = (
        Place::new(&store, limits).await,
        Place::new(&store, limits).await,
    );
    let mut one = a.serve().await;
    b.gets_the_key_of(&a);
    let used = create(&one).await;
    reaches(&one, &used, SessionPhase::Ready).await;
    let two = b.serve().await;
    one.child.kill().unwrap();
    one.child.wait().unwrap();

    let ending = reaches(&two, &used, SessionPhase::Ending).await;
    assert_eq!(ending.end_reason, Some(EndReason::MachineLost));
    let stuck = until("it is stuck", async || {
        let list = run(&["list", "--stuck", "--config"], &b.config);
        let list = String::from_utf8(list.stdout).unwrap();
        (!list.is_empty()).then_some(list)
    });
    let stuck = stuck.await;
    assert!(stuck.contains("host_lost_s"), "{stuck}");
    let name = ending.desktop.unwrap().to_string();
    let gone = run(&["resolve", &name, "--gone", "--config"], &b.config);
    let said = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(!gone.status.success());
    assert!(said.contains("another orchestrator"), "{said}");
    assert_eq!(a.machines(), 1);

    let _one = a.serve().await;
    reaches(&two, &used, SessionPhase::Ended).await;
    assert_eq!(a.machines(), 0);
}

#[tokio::test]
async fn what_it_was_given_in_an_answer_that_was_lost_is_worked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (store, database) = database(&dir).await;
    let place = Place::new(&store, "").await;
    let _service = place.serve().await;
    // It gives no places, and another is believed to: only who works for a session ends it.
    assert!(run(&["drain", "--config"], &place.config).status.success());
    let me = replica::id(&place.dir.path().join("state"));
    let mut db = PgConnection::connect_with(&database).await.unwrap();
    let another = "INSERT INTO replica SELECT 'another', name, installation, until_us + 3600000000, NULL FROM replica";
    db.execute(another).await.unwrap();
    let store = PostgresStore::open(database, me).await.unwrap();
    let wish = Wish {
        origin: Origin::V1,
        template: "t".to_owned(),
        provider: "simulated".to_owned(),
        user: "user".to_owned(),
        language: None,
        time_zone: None,
        keyboard: None,
    };
    let id = mayfly_api::SessionId::new();
    let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24);
    let record = Record::accepted(id, wish, Expected::default(), &Limits::default(), long_ago);
    store.accept(record, None, 1).await.unwrap();
    let ended = until("it is over", async || {
        let record = store.get(id).await.unwrap().unwrap();
        record.phase.is_final().then_some(record)
    });
    assert_eq!(ended.await.end_reason, Some(EndReason::Expired));
}
