//! `cargo xtask bench control-plane`: how fast sessions are taken, how soon those who follow them are told, and what thousands cost.
//!
//! Machines play no part: one desktop is being made all the time, and everybody else waits in the queue. The load comes from this
//! program, on the same processors. Beside it, in the same run, a small Flask service like the one that Mayfly replaces.
//! Writes `control-plane.json` to `$MAYFLY_REPORTS`.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use futures_util::{StreamExt, stream};
use mayfly_api::client::Client;
use mayfly_api::{CreateSession, Created, SessionId, SessionPhase};
use mayfly_tests::lab::{Lab, Orchestrator, Provider, until};
use mayfly_tests::machine;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

#[derive(Parser)]
struct Args {
    /// Sessions that are asked for in a second, whatever becomes of those before
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// How many in all
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// How many of them are followed
    #[arg(long, default_value_t = 1_000)]
    streams: usize,
    /// Where control-plane.json goes; given by `cargo xtask bench`
    #[arg(long)]
    reports: Option<PathBuf>,
}

/// Everything here takes seconds; a busy machine gets this long.
const BOUND: Duration = Duration::from_secs(600);
/// Callers who ask again as soon as they are answered.
const CALLERS: usize = 64;
/// For so long.
const RUSH: Duration = Duration::from_secs(10);

/// One desktop is never done, and nobody is tired of waiting.
const MACHINES: &str = "create_ms = 3600000";
const LIMITS: &str = "max_queued = 100000\nconcurrent_creates = 1\nlease_s = 7200\ncreate_timeout_s = 7200\ncreating_timeout_s = 7200";

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let report = json!({
        "machine": machine::facts()?,
        "mayfly_on_sqlite": mayfly(&args).await.context("Mayfly")?,
        "baseline_flask_in_memory": flask(&args).await.context("Flask")?,
    });
    let folder = args.reports.unwrap_or_else(Lab::reports);
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("control-plane.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{report:#}\n{}", path.display());
    Ok(())
}

async fn mayfly(args: &Args) -> Result<Value> {
    let lab = Lab::new("load")?;
    let machines = Provider::SimulatedWith(MACHINES);
    let mut orchestrator = Orchestrator::start(&lab, &machines, LIMITS).await?;
    let pid = orchestrator.process().pid();
    let client = Arc::new(orchestrator.client().clone());
    let idle = resident_mb(pid)?;

    let mut taken: Vec<Created> = Vec::new();
    let mut steps = BTreeMap::new();
    for upto in [args.sessions / 100, args.sessions / 10, args.sessions] {
        let count = upto.saturating_sub(taken.len());
        let begin = Instant::now();
        let (created, waited) =
            at_a_rate(args.rate, count, async |_| create(&client).await).await?;
        let took = begin.elapsed().as_secs_f64();
        taken.extend(created);
        steps.insert(
            format!("to {upto:06} sessions"),
            json!({"accept_ms": figures(waited), "took_s": tenth(took), "resident_mb": resident_mb(pid)?}),
        );
    }
    // What was accepted is there.
    let listed = listed(&lab).await?;
    ensure!(
        listed == taken.len(),
        "{} accepted, {listed} in the database",
        taken.len()
    );

    // The last ones: when they leave nobody moves up.
    taken.sort_by_key(|created| created.session.queue_position);
    let followed = taken.split_off(taken.len() - args.streams);
    let told = fan_out(&client, followed, pid).await?;
    drop(orchestrator);

    let lab = Lab::new("load rush")?;
    let orchestrator = Orchestrator::start(&lab, &machines, LIMITS).await?;
    let client = Arc::new(orchestrator.client().clone());
    let rush = rush(async || create(&client).await.map(drop)).await?;
    Ok(json!({
        "idle_resident_mb": idle,
        "at_a_rate_of": args.rate,
        "steps": steps,
        "streams": told,
        "rush": rush,
    }))
}

async fn create(client: &Client) -> Result<Created> {
    let key = SessionId::new().to_string();
    Ok(client.create(&CreateSession::default(), &key).await?)
}

/// Sessions in the database that are not over.
async fn listed(lab: &Lab) -> Result<usize> {
    use mayfly_orchestrator::store::Store;
    let path = lab.path("state/mayfly.db");
    let store = mayfly_orchestrator::store::sqlite::SqliteStore::open_to_read(&path).await?;
    let live = store.live().await?.len();
    store.close().await;
    Ok(live)
}

/// From the word that ends a session to the event of that on its stream, with all streams open.
async fn fan_out(client: &Arc<Client>, followed: Vec<Created>, pid: u32) -> Result<Value> {
    let opened = Arc::new(tokio::sync::Semaphore::new(0));
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
    let resident = resident_mb(pid)?;
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

async fn flask(args: &Args) -> Result<Value> {
    let python =
        std::env::var("MAYFLY_FLASK").context("MAYFLY_FLASK, set by `cargo xtask bench`")?;
    let lab = Lab::new("load flask")?;
    let port = lab.port(0);
    let url = format!("http://127.0.0.1:{port}/api");
    let mut command = lab.command(python);
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("flask_baseline.py");
    command.arg(program).arg(port.to_string());
    let mut service = lab.start("flask", command)?;
    let pid = service.pid();
    let http = reqwest::Client::builder().no_proxy().build()?;
    until("it answers", BOUND, async || {
        service.must_run()?;
        Ok(http.get(format!("{url}/sessions")).send().await.ok())
    })
    .await?;
    let ask = async || {
        let request = http.post(format!("{url}/session/create"));
        let answer = request.json(&json!({"username": "ada"})).send().await?;
        answer.error_for_status()?.bytes().await?;
        anyhow::Ok(())
    };
    let idle = resident_mb(pid)?;
    let count = args.sessions / 10;
    let (_, waited) = at_a_rate(args.rate / 10, count, async |_| ask().await).await?;
    let rush = rush(ask).await?;
    Ok(json!({
        "idle_resident_mb": idle,
        "at_a_rate_of": args.rate / 10,
        "create_ms": figures(waited),
        "rush": rush,
        "resident_mb": resident_mb(pid)?,
    }))
}

/// Asks so many times, each when it is due and not when the one before was answered; how long after that each was answered.
async fn at_a_rate<T>(
    rate: u32,
    count: usize,
    ask: impl AsyncFn(usize) -> Result<T>,
) -> Result<(Vec<T>, Vec<f64>)> {
    let begin = Instant::now();
    let ask = &ask;
    let asked = stream::iter(0..count).map(async |number| {
        let due =
            begin + Duration::from_secs_f64(f64::from(u32::try_from(number)?) / f64::from(rate));
        tokio::time::sleep_until(due.into()).await;
        let answer = ask(number).await?;
        anyhow::Ok((answer, ms(due.elapsed())))
    });
    let answers: Vec<_> = asked.buffer_unordered(count.max(1)).collect().await;
    let answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(answers.into_iter().unzip())
}

/// Everybody asks again and again.
async fn rush(ask: impl AsyncFn() -> Result<()>) -> Result<Value> {
    let begin = Instant::now();
    let ask = &ask;
    let callers = stream::iter(0..CALLERS).map(async |_| {
        let mut waited = Vec::new();
        while begin.elapsed() < RUSH {
            let since = Instant::now();
            ask().await?;
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

fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
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
