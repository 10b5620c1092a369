//! Orchestrators that are killed at a point of their own program (`orchestrator/src/failpoints.rs`), before or after a call
//! that leaves it or a commit, and what becomes of the desktop that they were making or removing.

use crate::lab::{Lab, Orchestrator, until};
use crate::sessions::{END, Held, READY};
use anyhow::{Context, Result, ensure};
use mayfly_api::SessionPhase;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

/// So many deaths at the same point, at most: a desktop that is watched passes some again and again.
const TIMES: u32 = 2;

/// Who comes to the desktop when it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visitor {
    /// Somebody whose connection counts: where a TLS handshake is enough for that.
    Caller,
    /// Nobody.
    Nobody,
}

/// What a death led to. Nothing was left, or there is an error instead.
#[derive(Clone, Debug, Serialize)]
pub struct Death {
    /// Where it died, such as `after create#1`: the first time that this was passed.
    pub point: String,
    /// From the death to the end of the session, its desktop and everything of it; nothing if the point was not passed this time.
    pub ms: Option<u64>,
}

/// Every point that an orchestrator passes for one desktop, as it is to be told where to die, in alphabetical order.
///
/// # Errors
/// When the desktop is not made or not removed.
pub async fn points(
    lab: &Lab,
    orchestrator: &mut Orchestrator,
    visitor: Visitor,
) -> Result<Vec<String>> {
    let file = lab.path("points");
    let told = file.to_str().context("a path of text")?;
    a_life(lab, orchestrator, visitor, ("MAYFLY_POINTS", told), false).await?;
    let passed =
        std::fs::read_to_string(&file).context("what was passed; is this a debug build?")?;
    std::fs::remove_file(&file)?;
    let mut times: BTreeMap<&str, u32> = BTreeMap::new();
    for point in passed.lines() {
        *times.entry(point).or_default() += 1;
    }
    let numbered = times
        .iter()
        .flat_map(|(point, times)| (1..=TIMES.min(*times)).map(move |n| format!("{point}#{n}")));
    Ok(numbered.collect())
}

/// One desktop, whose orchestrator dies at that point.
///
/// # Errors
/// When the session fails, does not end, or the point is never passed although it is the first time that is meant.
pub async fn at(
    lab: &Lab,
    orchestrator: &mut Orchestrator,
    visitor: Visitor,
    point: String,
) -> Result<Death> {
    // What one desktop's orchestrator passes for a second time, another's may pass once.
    let must_die = point.ends_with("#1");
    let life = a_life(
        lab,
        orchestrator,
        visitor,
        ("MAYFLY_DIE_AT", &point),
        must_die,
    );
    let ms = life.await.with_context(|| format!("killed {point}"))?;
    Ok(Death { point, ms })
}

/// So many of the points, others for each commit, so that all have their turn.
#[must_use]
pub fn some(points: Vec<String>, count: usize) -> Vec<String> {
    let head = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let commit = head.map(|o| o.stdout).unwrap_or_default();
    let mut drawn: Vec<_> = points
        .into_iter()
        .map(|point| (Sha256::digest([&commit, point.as_bytes()].concat()), point))
        .collect();
    drawn.sort();
    drawn
        .into_iter()
        .map(|(_, point)| point)
        .take(count)
        .collect()
}

/// From the wish to the verified end, through a death; how long that took from then on.
async fn a_life(
    lab: &Lab,
    orchestrator: &mut Orchestrator,
    visitor: Visitor,
    told: (&str, &str),
    must_die: bool,
) -> Result<Option<u64>> {
    orchestrator.stop().await?;
    orchestrator.start_told(lab, told)?;
    let mut died: Option<Instant> = None;
    let mut again = async |orchestrator: &mut Orchestrator| {
        if died.is_none() && orchestrator.process().poll()?.is_some() {
            died = Some(Instant::now());
            orchestrator.start_again(lab).await?;
        }
        anyhow::Ok(died)
    };
    let key = mayfly_api::SessionId::new().to_string();
    let held = until("a session is accepted", END, async || {
        again(orchestrator).await?;
        let wish = mayfly_api::CreateSession::default();
        Ok(orchestrator.client().create(&wish, &key).await.ok())
    });
    let created = held.await?;
    let held = Held {
        id: created.session.id,
        secret: created.secret,
    };
    let (mut seen, mut caller) = (None, None);
    let ended = until("the session is over", 2 * READY, async || {
        let life = again(orchestrator).await?;
        let Ok(session) = held.get(orchestrator).await else {
            return Ok(None);
        };
        match (session.phase, visitor) {
            // A pretended machine's connections die with its orchestrator.
            (SessionPhase::Ready | SessionPhase::Disconnected, Visitor::Caller)
                if caller.as_ref().is_none_or(|(of, _)| *of != life) =>
            {
                caller = held
                    .call(orchestrator)
                    .await
                    .ok()
                    .map(|caller| (life, caller));
            }
            // Said again after a death before it was written down.
            (SessionPhase::Connected, _) | (SessionPhase::Ready, Visitor::Nobody) => {
                let _ = orchestrator.client().destroy(held.id, &held.secret).await;
            }
            _ => {}
        }
        seen = Some(session.clone());
        Ok(session.phase.is_final().then_some(session))
    });
    let ended = ended.await.with_context(|| format!("{seen:?}"))?;
    ensure!(ended.phase == SessionPhase::Ended, "{ended:?}");
    // The last points come after the end.
    if must_die {
        until("it dies", END, async || again(orchestrator).await).await?;
    }
    let died = again(orchestrator).await?;
    until("nothing is left", END, async || {
        Ok(lab.nothing_is_left().ok())
    })
    .await?;
    Ok(died.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)))
}
