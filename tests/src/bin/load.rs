//! `cargo xtask bench control-plane`: how fast sessions are taken, how soon those who follow them are told, what thousands cost, and
//! how that grows; on SQLite and on PostgreSQL.
//!
//! Machines play no part: one desktop is being made all the time, and everybody else waits in the queue. The load comes from this
//! program, on the same processors. Beside it, in the same run, a small Flask service like the one that Mayfly replaces, and the disk
//! and the processors: no answer comes sooner than a flush, and some wakings of threads. Writes `control-plane.json` to `$MAYFLY_REPORTS`.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use mayfly_api::client::Client;
use mayfly_api::{Created, SessionId, SessionPhase};
use mayfly_postgres::Cluster;
use mayfly_tests::lab::{Database, Lab, Orchestrator, Provider, until};
use mayfly_tests::machine;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

#[derive(Parser)]
struct Args {
    /// Sessions that are asked for in a second, whatever becomes of those before; and a quarter and half of that
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// How many in all
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// How many of them are followed
    #[arg(long, default_value_t = 1_000)]
    streams: usize,
    /// Sessions that are asked for in a second when it is too much
    #[arg(long, default_value_t = 10_000)]
    stress: u32,
    /// Only these parts: disk, rate, streams, rush, stress, growth, flask
    #[arg(long, value_delimiter = ',', value_parser = PARTS)]
    only: Vec<String>,
    /// Only this store
    #[arg(long, value_parser = ["sqlite", "postgresql"])]
    store: Option<String>,
    /// Where control-plane.json goes; given by `cargo xtask bench`
    #[arg(long)]
    reports: Option<PathBuf>,
}

impl Args {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }
}

/// What is measured.
const PARTS: [&str; 7] = [
    "disk", "rate", "streams", "rush", "stress", "growth", "flask",
];
/// Everything here takes seconds; a busy machine gets this long.
const BOUND: Duration = Duration::from_secs(600);
/// Callers who ask again as soon as they are answered, each by a connection of its own.
const CALLERS: usize = 64;
/// Connections by which it is asked at a rate: one is free when a request is due, if the service keeps up.
const ASKERS: usize = 512;
/// And when it is too much: more than may wait.
const CROWD: usize = 6_000;
/// For so long.
const RUSH: Duration = Duration::from_secs(10);
/// So many leave, one after the other, when it is measured how long that takes.
const LEAVING: usize = 20;

/// One desktop is never done, those that are removed take no place, and nobody is tired of waiting.
const MACHINES: Provider = Provider::SimulatedWith("create_ms = 3600000\ndestroy_ms = 1");
const LIMITS: &str = "max_queued = 100000\nmax_desktops = 100\nconcurrent_creates = 1\nlease_s = 7200\ncreate_timeout_s = 7200\ncreating_timeout_s = 7200";

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut report = Map::new();
    report.insert("machine".to_owned(), machine::facts()?);
    if args.wants("disk") {
        report.insert("disk_write_and_flush_ms".to_owned(), disk()?);
        report.insert("thread_woken_and_back_ms".to_owned(), wake()?);
    }
    let cluster = Cluster::durable();
    for (name, kind) in [
        ("sqlite", Kind::Sqlite),
        ("postgresql", Kind::Postgres(&cluster)),
    ] {
        if args.store.as_ref().is_none_or(|only| only == name) {
            let figures = mayfly(&args, kind).await.context(name)?;
            report.insert(format!("mayfly_on_{name}"), figures);
        }
    }
    if args.wants("flask") {
        let figures = flask(&args).await.context("Flask")?;
        report.insert("baseline_flask_in_memory".to_owned(), figures);
    }
    let load = std::fs::read_to_string("/proc/loadavg")?;
    report.insert("load_after".to_owned(), load.trim().into());
    let report = Value::Object(report);
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("control-plane.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{report:#}\n{}", path.display());
    Ok(())
}

/// What a database cannot be faster than, in the folder where it lies.
fn disk() -> Result<Value> {
    let lab = Lab::new("load disk")?;
    let mut file = std::fs::File::create(lab.path("flushed"))?;
    let mut waited = Vec::new();
    for _ in 0..200 {
        file.seek(SeekFrom::Start(0))?;
        let begun = Instant::now();
        file.write_all(&[7; 16 * 1024])?;
        file.sync_data()?;
        waited.push(ms(begun.elapsed()));
    }
    Ok(figures(waited))
}

/// Two threads that wake each other, once in a millisecond: an answer needs that many times. A virtual machine's processors wait.
fn wake() -> Result<Value> {
    let (there, called) = std::sync::mpsc::channel();
    let (back, answered) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || called.iter().try_for_each(|()| back.send(())).is_ok());
    let mut waited = Vec::new();
    for _ in 0..5_000 {
        let begun = Instant::now();
        there.send(())?;
        answered.recv()?;
        waited.push(ms(begun.elapsed()));
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(there);
    ensure!(
        other.join().is_ok_and(|sound| sound),
        "the other thread broke"
    );
    Ok(figures(waited))
}

#[derive(Clone, Copy)]
enum Kind<'a> {
    Sqlite,
    /// One that flushes, as a site's does.
    Postgres(&'a Cluster),
}

/// An orchestrator with an empty database.
struct Service {
    lab: Lab,
    database: Database,
    orchestrator: Orchestrator,
}

impl Service {
    async fn start(kind: Kind<'_>, name: &str) -> Result<Self> {
        let lab = Lab::new(&format!("load {name}"))?;
        let server = match kind {
            Kind::Sqlite => None,
            Kind::Postgres(server) => Some(server),
        };
        let database = Database::new(&lab, server).await?;
        let orchestrator = Orchestrator::start_on(&lab, &MACHINES, LIMITS, &database).await?;
        Ok(Self {
            lab,
            database,
            orchestrator,
        })
    }

    fn address(&self) -> String {
        self.orchestrator.url().replace("http://", "")
    }

    fn resident_mb(&mut self) -> Result<f64> {
        resident_mb(self.orchestrator.process().pid())
    }

    /// The sessions in the database that are not over.
    async fn live(&self) -> Result<HashSet<SessionId>> {
        let store = self.database.open(&self.lab).await?;
        let live = store.live().await?;
        store.close().await;
        Ok(live.into_iter().map(|record| record.id).collect())
    }

    /// What the service says that it spent with the store so far: seconds and how often, by operation.
    async fn spent(&self) -> Result<BTreeMap<String, (f64, f64)>> {
        let url = format!("{}/metrics", self.orchestrator.url());
        let http = reqwest::Client::builder().no_proxy().build()?;
        let text = http.get(url).send().await?.text().await?;
        let mut spent = BTreeMap::<String, (f64, f64)>::new();
        for line in text.lines() {
            let of = |name: &str| {
                let rest = line.strip_prefix("mayfly_store_seconds_")?;
                let rest = rest.strip_prefix(name)?.strip_prefix("{operation=\"")?;
                let (operation, value) = rest.split_once("\"} ")?;
                Some((operation.to_owned(), value.parse::<f64>().ok()?))
            };
            if let Some((operation, seconds)) = of("sum") {
                spent.entry(operation).or_default().0 = seconds;
            } else if let Some((operation, count)) = of("count") {
                spent.entry(operation).or_default().1 = count;
            }
        }
        Ok(spent)
    }
}

async fn mayfly(args: &Args, kind: Kind<'_>) -> Result<Value> {
    let mut all = Map::new();
    if args.wants("rate") || args.wants("streams") {
        let figures = at_rates(args, kind).await.context("at a rate")?;
        all.insert("at_a_rate".to_owned(), figures);
    }
    if args.wants("rush") {
        let service = Service::start(kind, "rush").await?;
        let figures = rush(&service.address(), CREATE).await.context("rush")?;
        all.insert("rush".to_owned(), figures);
    }
    if args.wants("stress") {
        let figures = stress(args, kind).await.context("stress")?;
        all.insert("stress".to_owned(), figures);
    }
    if args.wants("growth") {
        let figures = growth(args, kind).await.context("growth")?;
        all.insert("growth".to_owned(), figures);
    }
    Ok(Value::Object(all))
}

/// What is asked for: path and body.
type Ask = (&'static str, &'static str);
const CREATE: Ask = ("/api/v1/sessions", "{}");
/// Refused before the database is asked.
const REFUSED: Ask = ("/api/v1/sessions", "[]");
const CREATE_FLASK: Ask = ("/api/session/create", r#"{"username": "ada"}"#);

/// One who asks, by a connection that is made again when it was closed.
struct Caller {
    address: String,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Caller {
    fn to(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            connection: None,
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(driver);
        Ok(sender)
    }

    async fn ask(&mut self, (path, body): Ask) -> Result<Answer> {
        let mut connection = match self.connection.take() {
            Some(open) => open,
            None => self.connect().await?,
        };
        // Closed by the other side, perhaps.
        if connection.ready().await.is_err() {
            connection = self.connect().await?;
        }
        let request = Request::post(path)
            .header(header::HOST, &self.address)
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", SessionId::new().to_string())
            .body(Full::new(Bytes::from_static(body.as_bytes())))?;
        let answer = connection.send_request(request).await?;
        let status = answer.status();
        let says_when = answer.headers().contains_key(header::RETRY_AFTER);
        let body = answer.into_body().collect().await?.to_bytes();
        self.connection = Some(connection);
        Ok(Answer {
            status,
            says_when,
            body,
        })
    }
}

struct Answer {
    status: StatusCode,
    says_when: bool,
    body: Bytes,
}

impl Answer {
    fn created(&self) -> Result<Created> {
        let said = || String::from_utf8_lossy(&self.body).into_owned();
        ensure!(self.status.is_success(), "{}: {}", self.status, said());
        serde_json::from_slice(&self.body).with_context(said)
    }
}

/// An answer, or why there was none, and how long after it was due.
type Waited = (Result<Answer>, f64);

/// Asks `count` times, each when it is due and not when the one before was answered, by so many connections. Whoever gets no answer
/// asks no more.
async fn at_a_rate(
    address: &str,
    rate: u32,
    count: usize,
    connections: usize,
    ask: Ask,
) -> Result<Vec<Waited>> {
    let begin = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let due_by_now = Arc::new(Semaphore::new(0));
    let clock = std::thread::spawn({
        let due_by_now = due_by_now.clone();
        move || tick(&due_by_now, rate, begin, count, connections)
    });
    let mut callers = JoinSet::new();
    for _ in 0..connections {
        let (next, mut caller) = (next.clone(), Caller::to(address));
        let due_by_now = due_by_now.clone();
        callers.spawn(async move {
            let mut waited = Vec::new();
            loop {
                due_by_now.acquire().await?.forget();
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(waited);
                }
                let number = f64::from(u32::try_from(number)?);
                let due = begin + Duration::from_secs_f64(number / f64::from(rate));
                let answer = caller.ask(ask).await;
                let over = answer.is_err();
                waited.push((answer, ms(due.elapsed())));
                if over {
                    return Ok(waited);
                }
            }
        });
    }
    let mut all = Vec::new();
    while let Some(waited) = callers.join_next().await {
        all.extend(waited??);
    }
    ensure!(clock.join().is_ok(), "the clock broke");
    Ok(all)
}

/// Lets one request go when it is due, and at the end one more for each who waits for the next. Tokio's timers are a millisecond late.
fn tick(due_by_now: &Semaphore, rate: u32, begin: Instant, count: usize, connections: usize) {
    let (mut gone, each) = (0, Duration::from_secs(1) / rate);
    while gone < count {
        let due = begin.elapsed().as_nanos() / each.as_nanos().max(1) + 1;
        let due = usize::try_from(due).unwrap_or(count).min(count);
        due_by_now.add_permits(due - gone);
        gone = due;
        let next = Duration::from_secs_f64(self::count(gone) / f64::from(rate));
        let pause = next.saturating_sub(begin.elapsed());
        std::thread::sleep(pause.max(Duration::from_micros(50)));
    }
    due_by_now.add_permits(connections);
}

/// Sessions that were all taken, and how long each waited.
fn taken(waited: Vec<Waited>) -> Result<(Vec<Created>, Vec<f64>)> {
    let taken = waited.into_iter().map(|(answer, waited)| {
        let created = answer?.created()?;
        Ok((created, waited))
    });
    Ok(taken.collect::<Result<Vec<_>>>()?.into_iter().unzip())
}

async fn at_rates(args: &Args, kind: Kind<'_>) -> Result<Value> {
    let mut service = Service::start(kind, "rate").await?;
    let idle = service.resident_mb()?;
    let mut all: Vec<Created> = Vec::new();
    let mut steps = BTreeMap::new();
    for (rate, upto) in [
        (args.rate / 4, args.sessions / 10),
        (args.rate / 2, args.sessions / 4),
        (args.rate, args.sessions),
    ] {
        let count = upto - all.len();
        let begin = Instant::now();
        let waited = at_a_rate(&service.address(), rate, count, ASKERS, CREATE).await?;
        let took = begin.elapsed().as_secs_f64();
        let (created, waited) = taken(waited)?;
        all.extend(created);
        let step = json!({"accept_ms": figures(waited), "took_s": tenth(took), "sessions": all.len(), "resident_mb": service.resident_mb()?});
        steps.insert(format!("{rate:06} in a second"), step);
    }
    // Beside it, on the same machine: what is not the database's.
    let refused = at_a_rate(&service.address(), args.rate, all.len(), ASKERS, REFUSED).await?;
    let refused = refused.into_iter().map(|(answer, waited)| {
        let status = answer?.status;
        ensure!(status == StatusCode::BAD_REQUEST, "refused with {status}");
        Ok(waited)
    });
    let refused = figures(refused.collect::<Result<_>>()?);
    // What was accepted is there.
    let live = service.live().await?;
    let there = all.iter().filter(|c| live.contains(&c.session.id)).count();
    ensure!(there == all.len(), "{} accepted, {there} there", all.len());
    let mut told = Value::Null;
    if args.wants("streams") {
        // The last ones: when they leave nobody moves up.
        all.sort_by_key(|created| created.session.queue_position);
        let followed = all.split_off(all.len() - args.streams);
        told = fan_out(&mut service, followed).await?;
    }
    Ok(json!({
        "idle_resident_mb": idle,
        "steps": steps,
        "refused_at_the_last_rate_ms": refused,
        "streams": told,
    }))
}

/// From the word that ends a session to the event of that on its stream, with all streams open.
async fn fan_out(service: &mut Service, followed: Vec<Created>) -> Result<Value> {
    let client = Arc::new(service.orchestrator.client().clone());
    let opened = Arc::new(Semaphore::new(0));
    let mut streams = JoinSet::new();
    for created in &followed {
        let (client, id) = (client.clone(), created.session.id);
        let (secret, opened) = (created.secret.clone(), opened.clone());
        streams.spawn(async move {
            let mut events = client.events(id, &secret);
            let mut first = true;
            while let Some(event) = events.next().await {
                let ended = event?.session.phase == SessionPhase::Ended;
                if first {
                    opened.add_permits(1);
                    first = false;
                }
                if ended {
                    break;
                }
            }
            anyhow::Ok((id, Instant::now()))
        });
    }
    let count = u32::try_from(followed.len())?;
    let all = tokio::time::timeout(BOUND, opened.acquire_many(count));
    let _all = all.await.context("all streams are open")??;
    let resident = service.resident_mb()?;
    let mut said = BTreeMap::new();
    for created in followed.iter().rev() {
        said.insert(created.session.id, Instant::now());
        client.destroy(created.session.id, &created.secret).await?;
    }
    let mut told = Vec::new();
    while let Some(stream) = streams.join_next().await {
        let (id, at) = stream??;
        let since = said.get(&id).context("a session that was ended")?;
        told.push(ms(at.saturating_duration_since(*since)));
    }
    Ok(json!({"open": count, "resident_mb_with_them": resident, "told_after_ms": figures(told)}))
}

/// Everybody asks again and again.
async fn rush(address: &str, ask: Ask) -> Result<Value> {
    let begin = Instant::now();
    let callers = stream::iter(0..CALLERS).map(async |_| {
        let mut caller = Caller::to(address);
        let mut waited = Vec::new();
        while begin.elapsed() < RUSH {
            let since = Instant::now();
            let answer = caller.ask(ask).await?;
            ensure!(answer.status.is_success(), "{}", answer.status);
            waited.push(ms(since.elapsed()));
        }
        anyhow::Ok(waited)
    });
    let waited: Vec<_> = callers.buffer_unordered(CALLERS).collect().await;
    let waited = waited.into_iter().collect::<Result<Vec<_>>>()?.concat();
    let each_second = f64::from(u32::try_from(waited.len())?) / begin.elapsed().as_secs_f64();
    Ok(
        json!({"callers": CALLERS, "accepted_in_a_second": each_second.round(), "accept_ms": figures(waited)}),
    )
}

/// More than can be taken, and a SIGKILL in the middle of it: whoever was told yes is there afterwards, and whoever was not was told so.
async fn stress(args: &Args, kind: Kind<'_>) -> Result<Value> {
    let mut service = Service::start(kind, "stress").await?;
    let address = service.address();
    let count = args.stress as usize * RUSH.as_secs() as usize;
    let begin = Instant::now();
    let asked = {
        let address = address.clone();
        let rate = args.stress;
        tokio::spawn(async move { at_a_rate(&address, rate, count, CROWD, CREATE).await })
    };
    tokio::time::sleep(RUSH).await;
    let resident = service.resident_mb()?;
    let killed = begin.elapsed();
    service.orchestrator.crash().await?;
    let waited = asked.await??;
    service.orchestrator.start_again(&service.lab).await?;
    let live = service.live().await?;
    let (mut accepted, mut refused, mut unclear, mut unanswered) = (vec![], vec![], 0, 0);
    for (answer, waited) in waited {
        match answer {
            Err(_) => unanswered += 1,
            Ok(answer) if answer.status.is_success() => {
                accepted.push((answer.created()?.session.id, waited));
            }
            Ok(answer) if answer.says_when => refused.push(waited),
            Ok(_) => unclear += 1,
        }
    }
    let lost = accepted.iter().filter(|(id, _)| !live.contains(id)).count();
    ensure!(lost == 0, "{lost} of {} are lost", accepted.len());
    let answered = accepted.len() + refused.len() + unclear;
    let each_second =
        |n: usize| anyhow::Ok((f64::from(u32::try_from(n)?) / killed.as_secs_f64()).round());
    Ok(json!({
        "connections": CROWD,
        "wanted_in_a_second": args.stress,
        "asked_in_a_second": each_second(answered + unanswered)?,
        "answered_in_a_second": each_second(answered)?,
        "accepted_in_a_second": each_second(accepted.len())?,
        "accepted": accepted.len(),
        "refused_with_retry_after": refused.len(),
        "refused_otherwise": unclear,
        "unanswered_when_it_was_killed": unanswered,
        "lost_of_the_accepted_after_sigkill": lost,
        "answered_after_it_was_due_ms": figures(accepted.iter().map(|a| a.1).chain(refused).collect()),
        "resident_mb": resident,
    }))
}

/// What a step costs with a hundred sessions, with ten times as many, and so on.
async fn growth(args: &Args, kind: Kind<'_>) -> Result<Value> {
    let mut all: Vec<(usize, BTreeMap<&str, f64>)> = Vec::new();
    for sessions in [args.sessions / 100, args.sessions / 10, args.sessions] {
        let grown = grown(kind, sessions).await;
        all.push((sessions, grown.with_context(|| format!("{sessions}"))?));
    }
    let mut steps = Map::new();
    for name in all[0].1.keys() {
        let values: Vec<_> = all.iter().map(|(_, figures)| figures[name]).collect();
        // Below this it is noise.
        let factors: Vec<_> = values
            .windows(2)
            .map(|w| w[1].max(0.1) / w[0].max(0.1))
            .collect();
        let sessions: Vec<_> = all
            .windows(2)
            .map(|w| count(w[1].0) / count(w[0].0))
            .collect();
        let sound = factors.iter().zip(&sessions).all(|(f, s)| f <= s);
        steps.insert(
            (*name).to_owned(),
            json!({
                "figures": values.into_iter().map(hundredth).collect::<Vec<_>>(),
                "factors": factors.into_iter().map(tenth).collect::<Vec<_>>(),
                "no_faster_than_the_sessions": sound,
            }),
        );
    }
    let sound = steps
        .values()
        .all(|s| s["no_faster_than_the_sessions"] == true);
    Ok(json!({
        "sessions": all.iter().map(|(n, _)| n).collect::<Vec<_>>(),
        "steps": steps,
        "no_step_grows_faster_than_the_sessions": sound,
    }))
}

async fn grown(kind: Kind<'_>, sessions: usize) -> Result<BTreeMap<&'static str, f64>> {
    let mut service = Service::start(kind, "growth").await?;
    let idle = service.resident_mb()?;
    let mut figures = BTreeMap::new();
    let address = service.address();
    let waited = at_a_rate(&address, u32::MAX, sessions, CALLERS, CREATE).await?;
    let (mut all, _) = taken(waited)?;
    let resident = service.resident_mb()?;
    figures.insert("memory_mb", resident - idle);
    // With so many there.
    let mut caller = Caller::to(&address);
    let begin = Instant::now();
    for _ in 0..LEAVING {
        all.push(caller.ask(CREATE).await?.created()?);
    }
    figures.insert("accept_ms_each", ms(begin.elapsed()) / count(LEAVING));

    let client = service.orchestrator.client().clone();
    all.sort_by_key(|created| (created.session.created_at, created.session.id));
    // From behind: nobody moves up.
    let begin = Instant::now();
    for created in all.split_off(all.len() - LEAVING) {
        end(&client, &created).await?;
    }
    figures.insert("end_ms_each", ms(begin.elapsed()) / count(LEAVING));
    // From the front: the next one gets a desktop, and everybody is told another place.
    let mut holds = holder(&client, &all[..all.len().min(CALLERS)]).await?;
    let before = service.spent().await?;
    let begin = Instant::now();
    for _ in 0..LEAVING {
        end(&client, &all.remove(holds)).await?;
        holds = holder(&client, &all[..2]).await?;
    }
    figures.insert(
        "next_has_a_desktop_ms_each",
        ms(begin.elapsed()) / count(LEAVING),
    );
    let last = all.last().context("somebody waits")?;
    let place = u32::try_from(all.len() - 1)?;
    until("the last is told their place", BOUND, async || {
        let session = client.get(last.session.id, &last.secret).await?;
        Ok((session.queue_position == Some(place)).then_some(()))
    })
    .await?;
    figures.insert("all_are_told_their_place_s", begin.elapsed().as_secs_f64());
    let after = service.spent().await?;
    let (was, is) = (before.get("plan"), after.get("plan"));
    if let (Some(was), Some(is)) = (was, is) {
        figures.insert("plan_ms_each", (is.0 - was.0) * 1000.0 / (is.1 - was.1));
    }

    service.orchestrator.crash().await?;
    let begin = Instant::now();
    service.orchestrator.start_again(&service.lab).await?;
    let created = Caller::to(&address).ask(CREATE).await?.created()?;
    figures.insert("started_again_after_s", begin.elapsed().as_secs_f64());
    let live = service.live().await?;
    all.push(created);
    let lost = all.iter().filter(|c| !live.contains(&c.session.id)).count();
    ensure!(
        lost == 0,
        "{lost} of {} are lost; {} there",
        all.len(),
        live.len()
    );
    Ok(figures)
}

/// The one of them that has a desktop, as soon as one has. The very first may have come in another order than they were taken.
async fn holder(client: &Client, among: &[Created]) -> Result<usize> {
    let begin = Instant::now();
    while begin.elapsed() < BOUND {
        for (index, created) in among.iter().enumerate() {
            let session = client.get(created.session.id, &created.secret).await?;
            if session.phase == SessionPhase::Preparing {
                return Ok(index);
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    bail!("nobody got a desktop")
}

async fn end(client: &Client, created: &Created) -> Result<()> {
    client.destroy(created.session.id, &created.secret).await?;
    Ok(())
}

async fn flask(args: &Args) -> Result<Value> {
    let python =
        std::env::var("MAYFLY_FLASK").context("MAYFLY_FLASK, set by `cargo xtask bench`")?;
    let lab = Lab::new("load flask")?;
    let port = lab.port(0);
    let mut command = lab.command(python);
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("flask_baseline.py");
    command.arg(program).arg(port.to_string());
    let mut service = lab.start("flask", command)?;
    let pid = service.pid();
    let address = format!("127.0.0.1:{port}");
    until("it answers", BOUND, async || {
        service.must_run()?;
        Ok(Caller::to(&address).ask(CREATE_FLASK).await.ok())
    })
    .await?;
    let idle = resident_mb(pid)?;
    let (rate, count) = (args.rate / 4, args.sessions / 10);
    let waited = at_a_rate(&address, rate, count, CALLERS, CREATE_FLASK).await?;
    let mut each = Vec::new();
    for (answer, waited) in waited {
        ensure!(answer?.status.is_success());
        each.push(waited);
    }
    let rush = rush(&address, CREATE_FLASK).await?;
    Ok(json!({
        "idle_resident_mb": idle,
        "at_a_rate_of": rate,
        "create_ms": figures(each),
        "rush": rush,
        "resident_mb": resident_mb(pid)?,
    }))
}

/// Of a process, in MB (proc(5): `VmRSS`).
fn resident_mb(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb = line.and_then(|line| line.split_whitespace().next());
    let kb: u32 = kb.context("VmRSS")?.parse()?;
    Ok(tenth(f64::from(kb) * 1.024 / 1000.0))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn count(n: usize) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn hundredth(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Median, 99th percentile and largest, to a tenth.
fn figures(mut all: Vec<f64>) -> Value {
    all.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        all.get(all.len().saturating_sub(1) * percent / 100)
            .copied()
    };
    let at = |percent| at(percent).map(tenth);
    json!({"median": at(50), "p99": at(99), "max": at(100), "n": all.len()})
}
